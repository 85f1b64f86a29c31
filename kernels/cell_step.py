"""One step of a cell and its linearization in one launch: the forward half of an online learning step.

For a cell (`_cell.CellFunctions`) with S states, J inputs and K dense matrices (a prime is the step before):

    p^g = Σ of W^k c'^ν over the matrices that enter gate g,    c = F(c', p, x)
    φ^{ν,k} = ∂F_ν/∂p^g,    ∂F_ν/∂x,    M^{νν'} = ∂F_ν/∂c'^ν' + Σ_{k reads ν'} φ^{ν,k} diag W^k

Grid: (tiles of UNITS of the N units, tiles of ROWS of the batch).
A program owns UNITS units, one warp each, of ROWS batch rows. It reads its units' rows of the K matrices, COLUMNS
columns at a time, the whole state of its batch rows, and the inputs of its own units; it writes the states and
partials of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import kept, load_planes
from ._cell import CellFunctions, check_matrices, pre_activations
from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width

# Most batch rows of one program: each row takes accumulators of its own, one for each matrix. The weights are read
# again for so many rows, and beyond eight rows that takes longer than a product by torch.
MOST_ROWS = 4


@triton.jit
def _totals(K: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    out = ()
    for _ in tl.static_range(K):
        out = out + (tl.zeros((ROWS, UNITS, COLUMNS), tl.float32),)
    return out


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on B, so
# it would be wasted work.
@triton.jit(do_not_specialize=["B"])
def _step_kernel(
    x_ptr,  # [J, B, N]
    weight_ptrs,  # K of [N, N]
    state_ptr,  # [S, B, N]
    resets_ptr,  # [B], or None with before_ptr
    before_ptr,  # [S, B, N]: written, `state` with the reset rows zeroed; or None
    after_ptr,  # [S, B, N]: written, the new state
    out_ptr,  # [partials + S², B, N]: written
    B,
    N,
    UPDATE: tl.constexpr,
    PARTIALS: tl.constexpr,
    READS: tl.constexpr,  # for each matrix, the state that it reads
    ENTERING: tl.constexpr,  # for each gate, the matrices that enter it
    WRITTEN: tl.constexpr,  # for each partial that is written: its place among those found, then those saved
    S: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    FOUND: tl.constexpr,
    UNITS: tl.constexpr,  # as many as there are warps, so that no sum crosses warps
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N
):
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit_mask = unit < N
    row_mask = row < B
    column = tl.arange(0, COLUMNS)
    of_row = row.to(tl.int64) * N
    of_unit = unit.to(tl.int64) * N
    plane = tl.cast(B, tl.int64) * N
    keep = row_mask
    if resets_ptr is not None:
        keep = row_mask & (tl.load(resets_ptr + row, mask=row_mask, other=1) == 0)

    # Each of the COLUMNS positions has a sum of its own; the loop over columns ends before these are added up.
    totals = _totals(K, ROWS, UNITS, COLUMNS)
    for start in range(0, N, COLUMNS):
        column_mask = start + column < N
        at = of_unit[:, None] + (start + column)[None, :]
        mask = unit_mask[:, None] & column_mask[None, :]
        state_at = of_row[:, None] + (start + column)[None, :]
        c = load_planes(state_ptr, state_at, plane, keep[:, None] & column_mask[None, :], S)
        added = ()
        for k in tl.static_range(K):
            w = tl.load(weight_ptrs[k] + at, mask=mask, other=0.0)
            added = added + (totals[k] + w[None, :, :] * c[READS[k]][:, None, :],)
        totals = added
    products = ()
    for k in tl.static_range(K):
        products = products + (tl.sum(totals[k], axis=2),)

    own = of_row[:, None] + unit[None, :]
    written = row_mask[:, None] & unit_mask[None, :]
    x = load_planes(x_ptr, own, plane, written, J)
    c = load_planes(state_ptr, own, plane, keep[:, None] & unit_mask[None, :], S)
    found = UPDATE(c, pre_activations(products, ENTERING, own), x)
    v = ()
    for k in tl.static_range(F):
        v = v + (found[S + k],)
    w = ()
    for k in tl.static_range(K):
        w = w + (tl.load(weight_ptrs[k] + of_unit + unit, mask=unit_mask, other=0.0)[None, :],)
    partials = PARTIALS(c, v, x, w)
    for nu in tl.static_range(S):
        tl.store(after_ptr + nu * plane + own, found[nu], mask=written)
        if before_ptr is not None:
            tl.store(before_ptr + nu * plane + own, c[nu], mask=written)
    out_ptr += own
    for k in tl.static_range(len(WRITTEN)):
        if WRITTEN[k] < FOUND:
            tl.store(out_ptr + k * plane, partials[WRITTEN[k]], mask=written)
        else:
            tl.store(out_ptr + k * plane, v[WRITTEN[k] - FOUND], mask=written)
    out_ptr += len(WRITTEN) * plane
    m = ()
    for k in tl.static_range(S * S):
        m = m + (partials[FOUND + k],)
    if resets_ptr is not None:
        m = kept(keep[:, None], m)
    for k in tl.static_range(S * S):
        tl.store(out_ptr + k * plane, m[k], mask=written)


class Config(NamedTuple):
    """How one program is laid out.

    units      units that it owns
    columns    columns of the matrices that it reads at once
    rows       batch rows that it owns
    num_warps  Triton's option, one warp per unit
    """

    units: int
    columns: int
    rows: int
    num_warps: int


def pick_config(N: int, B: int, matrices: int, warp_size: int) -> Config:
    """The layout for a layer of N units, B batch rows and K matrices. A pure function.

    Each unit has a warp, and four numbers per thread make 128-bit accesses: a thread has 16 bytes of each matrix under
    way at once. A small layer is divided among programs of fewer warps, so that more multiprocessors have work. A
    thread sums at most sixteen products of four numbers at once.
    """
    num_warps = 8 if N >= 1024 else 4 if N >= 512 else 2
    most = min(MOST_ROWS, max(1, 4 * MOST_ROWS // triton.next_power_of_2(matrices)))
    rows = 1 if B == 1 else most
    return Config(num_warps, 4 * warp_size, rows, num_warps)


class Step(NamedTuple):
    """What `cell_step` returns.

    after     the states after the step, (S, B, N)
    before    the states that the step read, zero in the batch rows that it resets, (S, B, N)
    partials  (P + S², B, N): the P partials of gates and inputs that are named in `CellFunctions.step_partials`; M row
              by row, zero where reset
    """

    after: Tensor
    before: Tensor
    partials: Tensor


@torch.no_grad()
def cell_step(
    cell: CellFunctions, x: Tensor, weights: Sequence[Tensor], state: Tensor, resets: Tensor | None = None
) -> Step:
    """One step of a cell, and the linearization that RFP needs, in one launch (paper, eq. 14; equations at the top).

    The weights are read once for every few batch rows, so this is for few rows. Matrix products are in full float32,
    whatever torch's precision for them is set to, and summed in an order that depends on the sizes alone: two runs
    agree in every bit.

    Args:
        x: per-unit inputs, (J, B, N) float32, contiguous.
        weights: the K matrices, (N, N) float32 each, contiguous. Fast where four divides N.
        state: the states before the step, (S, B, N) float32, contiguous.
        resets: (B,) bool or uint8, contiguous: batch rows whose state counts as zero. Or None.

    Nothing is mutated, and autograd doesn't follow it.

    Returns:
        `Step`, float32. Without resets its `before` is `state` itself.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    _, batch, units = check_dims("state", state, "SBN")
    check_tensor("state", state, (cell.states, batch, units), state)
    check_tensor("x", x, (cell.inputs, batch, units), state)
    check_matrices(cell, weights, units, state)
    if resets is not None:
        check_tensor("resets", resets, (batch,), state, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_step_kernel, "state", state)

    after = torch.empty_like(state)
    count = len(cell.step_partials) + cell.states**2
    out = torch.empty(count, batch, units, dtype=torch.float32, device=state.device)
    before = state if resets is None else torch.empty_like(state)
    config = pick_config(units, batch, cell.matrices, device_sizes(state).warp)
    with torch.cuda.device_of(state):
        _step_kernel[(triton.cdiv(units, config.units), triton.cdiv(batch, config.rows))](
            x,
            tuple(weights),
            state,
            resets,
            None if resets is None else before,
            after,
            out,
            batch,
            units,
            UPDATE=cell.update,
            PARTIALS=cell.partials,
            READS=cell.reads,
            ENTERING=cell.into_gates,
            WRITTEN=cell.step_partials,
            S=cell.states,
            J=cell.inputs,
            K=cell.matrices,
            F=cell.saves,
            FOUND=cell.partials_found,
            UNITS=config.units,
            COLUMNS=config.columns,
            ROWS=config.rows,
            VECTOR=vector_width(units, torch.float32),
            num_warps=config.num_warps,
        )
    return Step(after, before, out)
