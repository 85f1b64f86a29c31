"""One step of an RGC and its linearization in one launch: the forward half of an online learning step.

Recursion (paper, eq. 13; a prime is the step before, u the layer's input), and all that RFP's Γ (eq. 14) needs of it:

    s = (1 - tanh(W_ms m')) u + tanh(W_ss s') s'            φ of four matrices, ∂s/∂u, ∂m/∂u and M:
    m = (1 - tanh(W_sm s')) u + tanh(W_mm m') m'            `rgc_partials` has their equations

Grid: (tiles of UNITS of the N units, tiles of ROWS of the batch).
A program owns UNITS units, one warp each, of ROWS batch rows. It reads its units' rows of the four matrices, COLUMNS
columns at a time, the whole state of its batch rows, and u of its own units; it writes two states and ten partials of
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width
from .rgc_forward import tanh
from .rgc_partials import rgc_partials

# Most batch rows of one program: each row takes accumulators of its own. The weights are read again for every four
# rows, and beyond eight rows that takes longer than a product by torch.
MOST_ROWS = 4


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on B, so
# it would be wasted work.
@triton.jit(do_not_specialize=["B"])
def _rgc_step_kernel(
    u_ptr,  # [B, N]
    ss_ptr,  # [N, N]
    ms_ptr,  # [N, N]
    mm_ptr,  # [N, N]
    sm_ptr,  # [N, N]
    state_ptr,  # [2, B, N]
    resets_ptr,  # [B], or None with before_ptr
    before_ptr,  # [2, B, N]: written, `state` with the reset rows zeroed; or None
    after_ptr,  # [2, B, N]: written, the new state
    partials_ptr,  # [10, B, N]: written, φ of ss, ms, mm, sm; ∂s/∂u, ∂m/∂u; M row by row
    B,
    N,
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
    sum_ss = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_ms = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_mm = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_sm = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    for start in range(0, N, COLUMNS):
        column_mask = start + column < N
        at = of_unit[:, None] + (start + column)[None, :]
        mask = unit_mask[:, None] & column_mask[None, :]
        w_ss = tl.load(ss_ptr + at, mask=mask, other=0.0)
        w_sm = tl.load(sm_ptr + at, mask=mask, other=0.0)
        w_mm = tl.load(mm_ptr + at, mask=mask, other=0.0)
        w_ms = tl.load(ms_ptr + at, mask=mask, other=0.0)
        state_at = state_ptr + of_row[:, None] + (start + column)[None, :]
        state_mask = keep[:, None] & column_mask[None, :]
        s = tl.load(state_at, mask=state_mask, other=0.0)[:, None, :]
        m = tl.load(state_at + plane, mask=state_mask, other=0.0)[:, None, :]
        sum_ss += w_ss[None, :, :] * s
        sum_sm += w_sm[None, :, :] * s
        sum_mm += w_mm[None, :, :] * m
        sum_ms += w_ms[None, :, :] * m
    ss = tanh(tl.sum(sum_ss, axis=2))
    sm = tanh(tl.sum(sum_sm, axis=2))
    mm = tanh(tl.sum(sum_mm, axis=2))
    ms = tanh(tl.sum(sum_ms, axis=2))

    own = of_row[:, None] + unit[None, :]
    written = row_mask[:, None] & unit_mask[None, :]
    read = keep[:, None] & unit_mask[None, :]
    u = tl.load(u_ptr + own, mask=written, other=0.0)
    s = tl.load(state_ptr + own, mask=read, other=0.0)
    m = tl.load(state_ptr + plane + own, mask=read, other=0.0)
    tl.store(after_ptr + own, (1.0 - ms) * u + ss * s, mask=written)
    tl.store(after_ptr + plane + own, (1.0 - sm) * u + mm * m, mask=written)
    if before_ptr is not None:
        tl.store(before_ptr + own, s, mask=written)
        tl.store(before_ptr + plane + own, m, mask=written)

    diagonal = of_unit + unit
    w_ss = tl.load(ss_ptr + diagonal, mask=unit_mask, other=0.0)[None, :]
    w_ms = tl.load(ms_ptr + diagonal, mask=unit_mask, other=0.0)[None, :]
    w_mm = tl.load(mm_ptr + diagonal, mask=unit_mask, other=0.0)[None, :]
    w_sm = tl.load(sm_ptr + diagonal, mask=unit_mask, other=0.0)[None, :]
    phi_ss, phi_ms, phi_mm, phi_sm, m00, m01, m10, m11 = rgc_partials(
        ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
    )
    partials_ptr += own
    tl.store(partials_ptr, phi_ss, mask=written)
    tl.store(partials_ptr + plane, phi_ms, mask=written)
    tl.store(partials_ptr + 2 * plane, phi_mm, mask=written)
    tl.store(partials_ptr + 3 * plane, phi_sm, mask=written)
    tl.store(partials_ptr + 4 * plane, 1.0 - ms, mask=written)
    tl.store(partials_ptr + 5 * plane, 1.0 - sm, mask=written)
    passes = keep[:, None]
    tl.store(partials_ptr + 6 * plane, tl.where(passes, m00, 0.0), mask=written)
    tl.store(partials_ptr + 7 * plane, tl.where(passes, m01, 0.0), mask=written)
    tl.store(partials_ptr + 8 * plane, tl.where(passes, m10, 0.0), mask=written)
    tl.store(partials_ptr + 9 * plane, tl.where(passes, m11, 0.0), mask=written)


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


def pick_config(N: int, B: int, warp_size: int) -> Config:
    """The layout for a layer of N units and B batch rows. A pure function.

    Each unit has a warp, and four numbers per thread make 128-bit accesses: a thread has 64 bytes of weights under way
    at once. A small layer is divided among programs of fewer warps, so that more multiprocessors have work.
    """
    num_warps = 8 if N >= 1024 else 4 if N >= 512 else 2
    return Config(num_warps, 4 * warp_size, min(MOST_ROWS, triton.next_power_of_2(B)), num_warps)


class Step(NamedTuple):
    """What `rgc_step` returns.

    after     the states after the step, s and m, (2, B, N)
    before    the states that the step read, zero in the batch rows that it resets, (2, B, N)
    partials  (10, B, N): φ of ss, ms, mm and sm, each of the state that the matrix enters; ∂s/∂u and ∂m/∂u; the four
              entries of M row by row, zero where reset
    """

    after: Tensor
    before: Tensor
    partials: Tensor


@torch.no_grad()
def rgc_step(u: Tensor, weights: Sequence[Tensor], state: Tensor, resets: Tensor | None = None) -> Step:
    """One step of an RGC, and the linearization that RFP needs, in one launch (paper, eq. 13 and 14).

        s(t) = (1 - a_s) u + b_s s'       a_s = tanh(W_ms m')      b_s = tanh(W_ss s')      prime: t - 1
        m(t) = (1 - a_m) u + b_m m'       a_m = tanh(W_sm s')      b_m = tanh(W_mm m')
        φ^ss = (1 - b_s²) s'     φ^ms = -(1 - a_s²) u     φ^mm = (1 - b_m²) m'     φ^sm = -(1 - a_m²) u
        M = [[b_s + φ^ss diag W_ss, φ^ms diag W_ms], [φ^sm diag W_sm, b_m + φ^mm diag W_mm]]

    The weights are read once for every four batch rows, so this is for few rows. Matrix products are in full float32,
    whatever torch's precision for them is set to, and summed in an order that depends on the sizes alone: two runs
    agree in every bit.

    Args:
        u: the layer's per-unit input, (B, N) float32, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous. Fast where four divides N.
        state: s and m before the step, (2, B, N) float32, contiguous.
        resets: (B,) bool or uint8, contiguous: batch rows whose state counts as zero. Or None.

    Nothing is mutated, and autograd doesn't follow it.

    Returns:
        `Step`, float32. Without resets its `before` is `state` itself.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    batch, units = check_dims("u", u, "BN")
    check_tensor("u", u, (batch, units), u)
    if len(weights) != 4:
        raise ValueError(f"weights must hold 4 tensors, got {len(weights)}")
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight, (units, units), u)
    check_tensor("state", state, (2, batch, units), u)
    if resets is not None:
        check_tensor("resets", resets, (batch,), u, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_rgc_step_kernel, "u", u)

    after = torch.empty(2, batch, units, dtype=torch.float32, device=u.device)
    partials = torch.empty(10, batch, units, dtype=torch.float32, device=u.device)
    before = state if resets is None else torch.empty_like(after)
    config = pick_config(units, batch, device_sizes(u).warp)
    with torch.cuda.device_of(u):
        _rgc_step_kernel[(triton.cdiv(units, config.units), triton.cdiv(batch, config.rows))](
            u,
            *weights,
            state,
            resets,
            None if resets is None else before,
            after,
            partials,
            batch,
            units,
            UNITS=config.units,
            COLUMNS=config.columns,
            ROWS=config.rows,
            VECTOR=vector_width(units, torch.float32),
            num_warps=config.num_warps,
        )
    return Step(after, before, partials)
