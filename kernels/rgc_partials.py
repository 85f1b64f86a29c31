"""An RGC's partials from its saved gates: written as arrays, or made on the fly by a scan backward in time.

Of a unit and a step they are made of seven numbers, four gates, two states and the input (paper, eq. 13 and 14):

    φ^ss = (1 - ss²) s'     φ^ms = -(1 - ms²) u     φ^mm = (1 - mm²) m'     φ^sm = -(1 - sm²) u
    ∂s/∂u = 1 - ms          ∂m/∂u = 1 - sm          ss, ms, mm, sm: the gates' tanh; prime: the step before
    M = ( ss + φ^ss w^ss      φ^ms w^ms     )       w: the weight from each unit to itself
        (    φ^sm w^sm      mm + φ^mm w^mm  )

and M is zero where the state was reset.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width
from .reverse_scan import ScanConfig, load_states, pass_back, pick_steps, store_summary, through_blocks, times


@triton.jit
def _load_step(
    gates_ptr, before_ptr, u_ptr, resets_ptr, t, unit, row, in_gates, N, BN, gates_plane, stride_before, mask
):
    """Gates ss, ms, mm and sm, states s and m, and the input of step t (int64); and where there was no reset."""
    at = t * BN + unit
    at_gates = 2 * t * BN + in_gates
    ss = tl.load(gates_ptr + at_gates, mask=mask, other=0.0)
    sm = tl.load(gates_ptr + at_gates + N, mask=mask, other=0.0)
    mm = tl.load(gates_ptr + gates_plane + at_gates, mask=mask, other=0.0)
    ms = tl.load(gates_ptr + gates_plane + at_gates + N, mask=mask, other=0.0)
    s, m = load_states(before_ptr, at, stride_before, mask, 2)
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    keep = mask
    if resets_ptr is not None:
        keep = tl.load(resets_ptr + t * (BN // N) + row, mask=mask, other=0) == 0
        s = tl.where(keep, s, 0.0)
        m = tl.where(keep, m, 0.0)
    return ss, ms, mm, sm, s, m, u, keep


@triton.jit
def rgc_partials(ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm):
    """φ of ss, ms, mm and sm, and M by rows, had nothing been reset."""
    by_ss = s - ss * ss * s
    by_ms = ms * ms * u - u
    by_mm = m - mm * mm * m
    by_sm = sm * sm * u - u
    return by_ss, by_ms, by_mm, by_sm, ss + by_ss * w_ss, by_ms * w_ms, by_sm * w_sm, mm + by_mm * w_mm


@triton.jit
def _load_own(ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask):
    """The weights of units n (int64) to themselves."""
    w_ss = tl.load(ss_ptr + n * stride_ss, mask=mask, other=0.0)
    w_ms = tl.load(ms_ptr + n * stride_ms, mask=mask, other=0.0)
    w_mm = tl.load(mm_ptr + n * stride_mm, mask=mask, other=0.0)
    w_sm = tl.load(sm_ptr + n * stride_sm, mask=mask, other=0.0)
    return w_ss, w_ms, w_mm, w_sm


# T, steps and strides set no layout, so they shall not compile a kernel anew when 1 or a multiple of 16.
STRIDES = ("stride_before", "stride_ss", "stride_ms", "stride_mm", "stride_sm")


@triton.jit(do_not_specialize=["T", "steps", *STRIDES])
def _linearize_kernel(
    gates_ptr,  # [2, T, B, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each, the weights' own parts
    ms_ptr,
    mm_ptr,
    sm_ptr,
    resets_ptr,  # [T, B], or None
    out_ptr,  # [10, T, B, N]
    T,
    steps,
    BN,
    N,
    stride_before,
    stride_ss,
    stride_ms,
    stride_mm,
    stride_sm,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N and of stride_before: numbers that one access moves
):
    # One program: BLOCK units, of one batch row or several, of `steps` steps.
    N = N // VECTOR * VECTOR  # N, B·N and the stride themselves, and the compiler sees what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(BN, BLOCK)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    in_gates = row.to(tl.int64) * (2 * N) + unit % N
    first = (tl.program_id(0) // tiles) * steps
    count = tl.minimum(first + steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_own(
        ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask
    )
    for step in tl.range(0, count):
        t = tl.cast(first + step, tl.int64)
        ss, ms, mm, sm, s, m, u, keep = _load_step(
            gates_ptr,
            before_ptr,
            u_ptr,
            resets_ptr,
            t,
            unit,
            row,
            in_gates,
            N,
            BN,
            2 * plane,
            stride_before,
            mask,
        )
        by_ss, by_ms, by_mm, by_sm, m00, m01, m10, m11 = rgc_partials(
            ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
        )
        if resets_ptr is not None:
            m00 = tl.where(keep, m00, 0.0)
            m01 = tl.where(keep, m01, 0.0)
            m10 = tl.where(keep, m10, 0.0)
            m11 = tl.where(keep, m11, 0.0)
        at = t * BN + unit
        tl.store(out_ptr + at, by_ss, mask=mask)
        tl.store(out_ptr + plane + at, by_ms, mask=mask)
        tl.store(out_ptr + 2 * plane + at, by_mm, mask=mask)
        tl.store(out_ptr + 3 * plane + at, by_sm, mask=mask)
        tl.store(out_ptr + 4 * plane + at, 1.0 - ms, mask=mask)
        tl.store(out_ptr + 5 * plane + at, 1.0 - sm, mask=mask)
        tl.store(out_ptr + 6 * plane + at, m00, mask=mask)
        tl.store(out_ptr + 7 * plane + at, m01, mask=mask)
        tl.store(out_ptr + 8 * plane + at, m10, mask=mask)
        tl.store(out_ptr + 9 * plane + at, m11, mask=mask)


@triton.jit(do_not_specialize=["T", "block_steps", *STRIDES])
def _dual_summary_kernel(
    gates_ptr,  # [2, T, B, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each, the weights' own parts
    ms_ptr,
    mm_ptr,
    sm_ptr,
    delta_ptr,  # [2, T, B, N]
    resets_ptr,  # [T, B], or None; of 32 bits, as loads of fewer are not under way steps ahead
    product_ptr,  # [2, 2, G, B·N]: R of each block of time but the first
    local_ptr,  # [2, G, B·N]: ℓ of each
    T,
    block_steps,
    BN,
    N,
    stride_before,
    stride_ss,
    stride_ms,
    stride_mm,
    stride_sm,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N and of stride_before: numbers that one access moves
):
    N = N // VECTOR * VECTOR  # N, B·N and the stride themselves, and the compiler sees what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    in_gates = row.to(tl.int64) * (2 * N) + unit % N
    first = (tl.program_id(1) + 1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    plane = tl.cast(BN, tl.int64) * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_own(
        ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask
    )
    r00 = tl.full((BLOCK,), 1.0, tl.float32)
    r01 = tl.zeros((BLOCK,), tl.float32)
    r10 = tl.zeros((BLOCK,), tl.float32)
    r11 = tl.full((BLOCK,), 1.0, tl.float32)
    arriving0 = tl.zeros((BLOCK,), tl.float32)
    arriving1 = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + count - 1 - step, tl.int64)
        ss, ms, mm, sm, s, m, u, keep = _load_step(
            gates_ptr,
            before_ptr,
            u_ptr,
            resets_ptr,
            t,
            unit,
            row,
            in_gates,
            N,
            BN,
            2 * plane,
            stride_before,
            mask,
        )
        delta0, delta1 = load_states(delta_ptr, t * BN + unit, plane, mask, 2)
        _, _, _, _, m00, m01, m10, m11 = rgc_partials(ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm)
        arriving0, arriving1 = pass_back(m00, m01, m10, m11, delta0 + arriving0, delta1 + arriving1, 2)
        r00, r01, r10, r11 = times(r00, r01, r10, r11, m00, m01, m10, m11, 2)
        if resets_ptr is not None:
            arriving0 = tl.where(keep, arriving0, 0.0)
            arriving1 = tl.where(keep, arriving1, 0.0)
            r00 = tl.where(keep, r00, 0.0)
            r01 = tl.where(keep, r01, 0.0)
            r10 = tl.where(keep, r10, 0.0)
            r11 = tl.where(keep, r11, 0.0)
    store_summary(product_ptr, local_ptr, r00, r01, r10, r11, arriving0, arriving1, unit, BN, mask, 2)


@triton.jit(do_not_specialize=["T", "block_steps", *STRIDES])
def _dual_kernel(
    gates_ptr,  # [2, T, B, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each, the weights' own parts
    ms_ptr,
    mm_ptr,
    sm_ptr,
    delta_ptr,  # [2, T, B, N]
    resets_ptr,  # [T, B], or None; of 32 bits, as loads of fewer are not under way steps ahead
    carry_ptr,  # [2, B, N], or None for zero
    product_ptr,  # [2, 2, G, B·N], R of each block of time but the first, or None where there is one block
    local_ptr,  # [2, G, B·N], ℓ of each, or None
    entering_ptr,  # [2, T, B, 2, N]
    for_input_ptr,  # [T, B, N]
    passed_ptr,  # [2, B, N]
    T,
    block_steps,
    BN,
    N,
    stride_before,
    stride_ss,
    stride_ms,
    stride_mm,
    stride_sm,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N and of stride_before: numbers that one access moves
):
    # One program: BLOCK units in one block of time.
    N = N // VECTOR * VECTOR  # N, B·N and the stride themselves, and the compiler sees what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    in_gates = row.to(tl.int64) * (2 * N) + unit % N
    first = tl.program_id(1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_own(
        ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask
    )
    arriving0 = tl.zeros((BLOCK,), tl.float32)
    arriving1 = tl.zeros((BLOCK,), tl.float32)
    if carry_ptr is not None:
        arriving0, arriving1 = load_states(carry_ptr, unit, wide_bn, mask, 2)
    if product_ptr is not None:
        arriving0, arriving1 = through_blocks(
            product_ptr, local_ptr, arriving0, arriving1, unit, BN, mask, 2, STAGES
        )

    for step in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + count - 1 - step, tl.int64)
        at = t * BN + unit
        ss, ms, mm, sm, s, m, u, keep = _load_step(
            gates_ptr,
            before_ptr,
            u_ptr,
            resets_ptr,
            t,
            unit,
            row,
            in_gates,
            N,
            BN,
            2 * plane,
            stride_before,
            mask,
        )
        delta0, delta1 = load_states(delta_ptr, at, plane, mask, 2)
        by_ss, by_ms, by_mm, by_sm, m00, m01, m10, m11 = rgc_partials(
            ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
        )
        credit0 = delta0 + arriving0
        credit1 = delta1 + arriving1
        at_gates = 2 * t * BN + in_gates
        tl.store(entering_ptr + at_gates, credit0 * by_ss, mask=mask)
        tl.store(entering_ptr + at_gates + N, credit1 * by_sm, mask=mask)
        tl.store(entering_ptr + 2 * plane + at_gates, credit1 * by_mm, mask=mask)
        tl.store(entering_ptr + 2 * plane + at_gates + N, credit0 * by_ms, mask=mask)
        tl.store(for_input_ptr + at, credit0 * (1.0 - ms) + credit1 * (1.0 - sm), mask=mask)
        arriving0, arriving1 = pass_back(m00, m01, m10, m11, credit0, credit1, 2)
        if resets_ptr is not None:
            arriving0 = tl.where(keep, arriving0, 0.0)
            arriving1 = tl.where(keep, arriving1, 0.0)

    mask = mask & (tl.program_id(1) == 0)
    tl.store(passed_ptr + unit, arriving0, mask=mask)
    tl.store(passed_ptr + wide_bn + unit, arriving1, mask=mask)


class Config(NamedTuple):
    """Units of one program, which is one warp, and the steps that it takes."""

    block: int
    steps: int


def pick_config(T: int, BN: int, warp_size: int, multiprocessors: int) -> Config:
    """Of partials, for T steps of B·N units. Pure.

    Four units a lane make 128-bit accesses. A program reads its units' own weights once, of a dense weight 32 bytes for
    four that count: beside what several steps move they are little, but for so many there must be programs enough.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    return Config(block, max(1, min(8, T * tiles // (32 * multiprocessors))))


def pick_dual_config(T: int, BN: int, warp_size: int, multiprocessors: int) -> ScanConfig:
    """Of the dual form, for T steps of B·N units. Pure.

    Units as in `pick_config`, blocks of time as in `reverse_scan.pick_steps`, which read nine numbers of each unit and
    step twice. The loads of four steps are under way at once, of three where a warp has 64 lanes: there they wait in
    registers, and four spill.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    steps = pick_steps(T, tiles, tiles * block * (2 * 9 + 5), multiprocessors)
    return ScanConfig(block, 4 if warp_size == 32 else 3, steps)


class Dual(NamedTuple):
    """What `rgc_dual` returns.

    entering   E (2, T, B, 2, N): by the source that a matrix reads, then ss and sm, or mm and ms
    for_input  ∂E/∂u (T, B, N)
    passed     the credit to the state before the first step, (2, B, N)
    """

    entering: Tensor
    for_input: Tensor
    passed: Tensor


@torch.no_grad()
def rgc_linearize(
    gates: Tensor, before: Tensor, u: Tensor, own: Sequence[Tensor], resets: Tensor | None = None
) -> Tensor:
    """Partials of an RGC along its steps, and RFP's M, in one pass (paper, eq. 14; the equations are this module's).

    Of each unit and step seven numbers are read and ten written.

    Args:
        gates: tanh by source, (2, T, B, 2, N) float32, contiguous: `rgc_forward`'s second result.
        before: the states before the steps, (2, T, B, N) float32; where reset they count as zero. The first index may
            have any stride, so that all states but the last need no copy.
        u: the layer's per-unit input, (T, B, N) float32, contiguous.
        own: the diagonals of W_ss, W_ms, W_mm, W_sm, (N,) float32 each, of any stride.
        resets: (T, B) bool or uint8, contiguous: rows whose state was zeroed before that step. Or None.

    Nothing is mutated, and nothing differentiated. Fast where four divides N.

    Returns:
        (10, T, B, N) float32: φ of ss, ms, mm and sm; ∂s/∂u and ∂m/∂u; M by rows, zero where reset.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
    """
    steps, batch, units = _check(gates, before, u, own, resets)
    total = batch * units
    config = pick_config(steps, total, *device_sizes(u))
    grid = (triton.cdiv(total, config.block) * triton.cdiv(steps, config.steps),)
    out = torch.empty(10, steps, batch, units, dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        _linearize_kernel[grid](
            gates,
            before,
            u,
            *own,
            None if resets is None else resets.view(torch.uint8),
            out,
            steps,
            config.steps,
            total,
            units,
            before.stride(0),
            *(weight.stride(0) for weight in own),
            BLOCK=config.block,
            VECTOR=_vector(units, before),
            num_warps=1,
        )
    return out


@torch.no_grad()
def rgc_dual(
    gates: Tensor,
    before: Tensor,
    u: Tensor,
    own: Sequence[Tensor],
    delta: Tensor,
    resets: Tensor | None = None,
    carry: Tensor | None = None,
) -> Dual:
    """RFP's dual form of an RGC in one pass; its partials, M and λ are never written (paper, eq. 14).

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero
        E^ss = λ^s φ^ss    E^ms = λ^s φ^ms    E^mm = λ^m φ^mm    E^sm = λ^m φ^sm
        ∂E/∂u = λ^s (1 - ms) + λ^m (1 - sm)

    Of each unit and step nine numbers are read, four gates, two states, the input and δ, and five written: 14 in all,
    where `rgc_linearize` and `reverse_scan_entering` move 17 each, 34. By blocks of time the nine are read twice.
    Weight gradients are products apart, as those of `rgc_backward.bptt_credits`.

    Args:
        gates, before, u, own, resets: as for `rgc_linearize`.
        delta: instantaneous credits δ (2, T, B, N) float32, contiguous.
        carry: credit that later steps pass to the last, (2, B, N) float32, contiguous, or None.

    Nothing is mutated, and nothing differentiated. Fast where four divides N. Where blocks of time are scanned side by
    side (`pick_dual_config`), a product of M over one block must not overflow.

    Returns:
        `Dual`, float32.

    Raises: as `rgc_linearize`.
    """
    steps, batch, units = _check(gates, before, u, own, resets)
    check_tensor("delta", delta, (2, steps, batch, units), u)
    if carry is not None:
        check_tensor("carry", carry, (2, batch, units), u)
    total = batch * units
    config = pick_dual_config(steps, total, *device_sizes(u))
    tiles, blocks = triton.cdiv(total, config.block), triton.cdiv(steps, config.steps)
    given = (gates, before, u, *own, delta, None if resets is None else resets.to(torch.int32))
    sizes = (steps, config.steps, total, units, before.stride(0), *(weight.stride(0) for weight in own))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=u.device)
    entering, for_input, passed = empty(gates.shape), empty(u.shape), empty(2, batch, units)
    product = local = None
    constants = {"BLOCK": config.block, "STAGES": config.stages, "VECTOR": _vector(units, before)}
    with torch.cuda.device_of(u):
        if blocks > 1:
            product = empty(2, 2, blocks - 1, total)
            local = empty(2, blocks - 1, total)
            _dual_summary_kernel[(tiles, blocks - 1)](
                *given, product, local, *sizes, **constants, num_warps=1
            )
        _dual_kernel[(tiles, blocks)](
            *given, carry, product, local, entering, for_input, passed, *sizes, **constants, num_warps=1
        )
    return Dual(entering, for_input, passed)


def _check(
    gates: Tensor, before: Tensor, u: Tensor, own: Sequence[Tensor], resets: Tensor | None
) -> tuple[int, int, int]:
    """(T, B, N) of arguments that are as they must be."""
    steps, batch, units = check_dims("u", u, "TBN")
    check_tensor("u", u, (steps, batch, units), u)
    check_tensor("gates", gates, (2, steps, batch, 2, units), u)
    check_tensor("before", before, (2, steps, batch, units), u, any_stride=1)
    if len(own) != 4:
        raise ValueError(f"own must hold 4 tensors, got {len(own)}")
    for index, weight in enumerate(own):
        check_tensor(f"own[{index}]", weight, (units,), u, any_stride=1)
    if resets is not None:
        check_tensor("resets", resets, (steps, batch), u, (torch.bool, torch.uint8))
    check_runnable(_linearize_kernel, "u", u)
    return steps, batch, units


def _vector(units: int, before: Tensor) -> int:
    """Numbers that one access moves."""
    width = vector_width(units, torch.float32)
    return width if before.stride(0) % width == 0 else 1
