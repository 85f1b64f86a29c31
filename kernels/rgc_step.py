"""One step of an RGC on its own and its linearisation in one launch: the forward half of an online step."""

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

# Batch rows of one program at most: each takes sums of its own. Beyond twice as many, weights that are read again for
# each four rows take longer than a product by torch.
MOST_ROWS = 4


# B and N set no layout but by VECTOR, so they shall not compile the kernel anew when they are 1 or multiples of 16.
@triton.jit(do_not_specialize=["B"])
def _rgc_step_kernel(
    u_ptr,  # [B, N]
    ss_ptr,  # [N, N]
    ms_ptr,  # [N, N]
    mm_ptr,  # [N, N]
    sm_ptr,  # [N, N]
    state_ptr,  # [2, B, N]
    resets_ptr,  # [B], or None with before_ptr
    before_ptr,  # [2, B, N], or None
    after_ptr,  # [2, B, N]
    partials_ptr,  # [10, B, N]
    B,
    N,
    UNITS: tl.constexpr,  # as many as warps, so that no sum leaves its warp
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # One program: UNITS units of ROWS batch rows. Sums of products stay apart by column until the last.
    N = N // VECTOR * VECTOR  # N itself, and the compiler sees what divides it
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mine = unit < N
    there = row < B
    column = tl.arange(0, COLUMNS)
    of_row = row.to(tl.int64) * N
    of_unit = unit.to(tl.int64) * N
    plane = tl.cast(B, tl.int64) * N
    keep = there
    if resets_ptr is not None:
        keep = there & (tl.load(resets_ptr + row, mask=there, other=1) == 0)

    sum_ss = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_ms = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_mm = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    sum_sm = tl.zeros((ROWS, UNITS, COLUMNS), tl.float32)
    for start in range(0, N, COLUMNS):
        inside = start + column < N
        at = of_unit[:, None] + (start + column)[None, :]
        mask = mine[:, None] & inside[None, :]
        w_ss = tl.load(ss_ptr + at, mask=mask, other=0.0)
        w_sm = tl.load(sm_ptr + at, mask=mask, other=0.0)
        w_mm = tl.load(mm_ptr + at, mask=mask, other=0.0)
        w_ms = tl.load(ms_ptr + at, mask=mask, other=0.0)
        state_at = state_ptr + of_row[:, None] + (start + column)[None, :]
        state_mask = keep[:, None] & inside[None, :]
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
    written = there[:, None] & mine[None, :]
    read = keep[:, None] & mine[None, :]
    u = tl.load(u_ptr + own, mask=written, other=0.0)
    s = tl.load(state_ptr + own, mask=read, other=0.0)
    m = tl.load(state_ptr + plane + own, mask=read, other=0.0)
    tl.store(after_ptr + own, (1.0 - ms) * u + ss * s, mask=written)
    tl.store(after_ptr + plane + own, (1.0 - sm) * u + mm * m, mask=written)
    if before_ptr is not None:
        tl.store(before_ptr + own, s, mask=written)
        tl.store(before_ptr + plane + own, m, mask=written)

    diagonal = of_unit + unit
    w_ss = tl.load(ss_ptr + diagonal, mask=mine, other=0.0)[None, :]
    w_ms = tl.load(ms_ptr + diagonal, mask=mine, other=0.0)[None, :]
    w_mm = tl.load(mm_ptr + diagonal, mask=mine, other=0.0)[None, :]
    w_sm = tl.load(sm_ptr + diagonal, mask=mine, other=0.0)[None, :]
    by_ss, by_ms, by_mm, by_sm, m00, m01, m10, m11 = rgc_partials(
        ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
    )
    partials_ptr += own
    tl.store(partials_ptr, by_ss, mask=written)
    tl.store(partials_ptr + plane, by_ms, mask=written)
    tl.store(partials_ptr + 2 * plane, by_mm, mask=written)
    tl.store(partials_ptr + 3 * plane, by_sm, mask=written)
    tl.store(partials_ptr + 4 * plane, 1.0 - ms, mask=written)
    tl.store(partials_ptr + 5 * plane, 1.0 - sm, mask=written)
    passes = keep[:, None]
    tl.store(partials_ptr + 6 * plane, tl.where(passes, m00, 0.0), mask=written)
    tl.store(partials_ptr + 7 * plane, tl.where(passes, m01, 0.0), mask=written)
    tl.store(partials_ptr + 8 * plane, tl.where(passes, m10, 0.0), mask=written)
    tl.store(partials_ptr + 9 * plane, tl.where(passes, m11, 0.0), mask=written)


class Config(NamedTuple):
    """Units, columns under way at once and batch rows of one program, and warps."""

    units: int
    columns: int
    rows: int
    num_warps: int


def pick_config(N: int, B: int, warp_size: int) -> Config:
    """For a layer of N units and B batch rows. Pure.

    A warp a unit, and four numbers a lane make 128-bit accesses: a thread has 64 bytes of weights under way at once.
    Few units are dealt out to more programs, of fewer warps, so that more multiprocessors have one.
    """
    num_warps = 8 if N >= 1024 else 4 if N >= 512 else 2
    return Config(num_warps, 4 * warp_size, min(MOST_ROWS, triton.next_power_of_2(B)), num_warps)


class Step(NamedTuple):
    """What `rgc_step` returns.

    after     the states after the step, s and m, (2, B, N)
    before    those that it read, zero in the rows that it resets, (2, B, N)
    partials  (10, B, N): φ of ss, ms, mm and sm, each for the state that it enters; ∂s/∂u and ∂m/∂u; M by rows, zero
              where reset
    """

    after: Tensor
    before: Tensor
    partials: Tensor


@torch.no_grad()
def rgc_step(u: Tensor, weights: Sequence[Tensor], state: Tensor, resets: Tensor | None = None) -> Step:
    """One step of an RGC, and all that RFP needs of it (paper, eq. 13 and 14), in one launch.

        s(t) = (1 - a_s) u + b_s s'       a_s = tanh(W_ms m')      b_s = tanh(W_ss s')      prime: t - 1
        m(t) = (1 - a_m) u + b_m m'       a_m = tanh(W_sm s')      b_m = tanh(W_mm m')
        φ^ss = (1 - b_s²) s'     φ^ms = -(1 - a_s²) u     φ^mm = (1 - b_m²) m'     φ^sm = -(1 - a_m²) u
        M = [[b_s + φ^ss diag W_ss, φ^ms diag W_ms], [φ^sm diag W_sm, b_m + φ^mm diag W_mm]]

    It reads the weights once for each four rows of the batch; products are sums of float32 products, whatever
    torch's precision for them, in an order that sizes alone set: two runs agree in every bit. For few rows.

    Args:
        u: the layer's per-unit input, (B, N) float32, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous. Fast where four divides N.
        state: s and m before the step, (2, B, N) float32, contiguous.
        resets: (B,) bool or uint8, contiguous: rows whose state counts as zero. Or None.

    Nothing is mutated, and nothing differentiated.

    Returns:
        `Step`, float32; without resets `before` is `state` itself.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
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
