"""An RGC's partials from its saved gates: written as arrays, or made on the fly by RFP's scan backward in time.

The partials of one unit at one step take seven numbers: four gates, two states and the input (paper, eq. 13 and 14):

    φ^ss = (1 - ss²) s'     φ^ms = -(1 - ms²) u     φ^mm = (1 - mm²) m'     φ^sm = -(1 - sm²) u
    ∂s/∂u = 1 - ms          ∂m/∂u = 1 - sm          ss, ms, mm, sm: tanh of the pre-activations; prime: the step before
    M = ( ss + φ^ss w^ss      φ^ms w^ms     )       w: the weight from each unit to itself, a matrix's diagonal
        (    φ^sm w^sm      mm + φ^mm w^mm  )

M is zero where the state was reset.

`_linearize_kernel` writes all ten of them. Grid: (tiles of BLOCK of the B·N units) · (groups of `steps` steps). A
program, one warp, owns BLOCK units for those steps, with the diagonals in registers; per step it reads seven numbers
of each unit and writes ten.

`_dual_kernel` runs the credit's recursion λ(t) = δ(t) + M(t+1)ᵀ λ(t+1) (eq. 14 in dual form) and makes the partials of
each step as it goes. Grid: (tiles of BLOCK of the B·N units, blocks of time). A program, one warp, owns BLOCK units and
walks its block of time backward, with λ and the diagonals in registers; per step it reads nine numbers of each unit
(the seven, and δ of two states) and writes five, E of the four matrices and ∂E/∂u. `reverse_scan` says how blocks of
time are joined, for which `_dual_summary_kernel` makes the summaries.
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
    gates_ptr,
    before_ptr,
    u_ptr,
    resets_ptr,
    t,
    unit,
    row,
    gate_offset,
    N,
    BN,
    stride_before,
    mask,
):
    """Gates ss, ms, mm and sm, states s and m and input u of step t (int64), and a mask of units that weren't reset.

    unit: flat index into (B, N); row: its batch row; gate_offset: its offset in (B, 2, 2, N) for the first of the four.
    """
    at = t * BN + unit
    from_ptr = gates_ptr + 4 * t * BN + gate_offset
    ss = tl.load(from_ptr, mask=mask, other=0.0)
    sm = tl.load(from_ptr + N, mask=mask, other=0.0)
    mm = tl.load(from_ptr + 2 * N, mask=mask, other=0.0)
    ms = tl.load(from_ptr + 3 * N, mask=mask, other=0.0)
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
    """φ of ss, ms, mm and sm, and M row by row, for units that weren't reset. w: the matrices' diagonals."""
    phi_ss = s - ss * ss * s
    phi_ms = ms * ms * u - u
    phi_mm = m - mm * mm * m
    phi_sm = sm * sm * u - u
    return (
        phi_ss,
        phi_ms,
        phi_mm,
        phi_sm,
        ss + phi_ss * w_ss,
        phi_ms * w_ms,
        phi_sm * w_sm,
        mm + phi_mm * w_mm,
    )


@triton.jit
def _load_diagonals(ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask):
    """The four matrices' diagonal entries of units n (int64)."""
    w_ss = tl.load(ss_ptr + n * stride_ss, mask=mask, other=0.0)
    w_ms = tl.load(ms_ptr + n * stride_ms, mask=mask, other=0.0)
    w_mm = tl.load(mm_ptr + n * stride_mm, mask=mask, other=0.0)
    w_sm = tl.load(sm_ptr + n * stride_sm, mask=mask, other=0.0)
    return w_ss, w_ms, w_mm, w_sm


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on T, on
# steps or on these strides, so for those it would be wasted work.
STRIDES = ("stride_before", "stride_ss", "stride_ms", "stride_mm", "stride_sm")


@triton.jit(do_not_specialize=["T", "steps", *STRIDES])
def _linearize_kernel(
    gates_ptr,  # [T, B, 2, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each: the diagonals of W_ss, W_ms, W_mm and W_sm
    ms_ptr,
    mm_ptr,
    sm_ptr,
    resets_ptr,  # [T, B], or None
    out_ptr,  # [10, T, B, N]: written
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
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    # A program's units may span batch rows.
    N = (
        N // VECTOR * VECTOR
    )  # leaves N, BN and the stride as they are, and shows the compiler what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(BN, BLOCK)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    gate_offset = row.to(tl.int64) * (4 * N) + unit % N
    first = (tl.program_id(0) // tiles) * steps
    count = tl.minimum(first + steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_diagonals(
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
            gate_offset,
            N,
            BN,
            stride_before,
            mask,
        )
        phi_ss, phi_ms, phi_mm, phi_sm, m00, m01, m10, m11 = rgc_partials(
            ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
        )
        if resets_ptr is not None:
            m00 = tl.where(keep, m00, 0.0)
            m01 = tl.where(keep, m01, 0.0)
            m10 = tl.where(keep, m10, 0.0)
            m11 = tl.where(keep, m11, 0.0)
        at = t * BN + unit
        tl.store(out_ptr + at, phi_ss, mask=mask)
        tl.store(out_ptr + plane + at, phi_ms, mask=mask)
        tl.store(out_ptr + 2 * plane + at, phi_mm, mask=mask)
        tl.store(out_ptr + 3 * plane + at, phi_sm, mask=mask)
        tl.store(out_ptr + 4 * plane + at, 1.0 - ms, mask=mask)
        tl.store(out_ptr + 5 * plane + at, 1.0 - sm, mask=mask)
        tl.store(out_ptr + 6 * plane + at, m00, mask=mask)
        tl.store(out_ptr + 7 * plane + at, m01, mask=mask)
        tl.store(out_ptr + 8 * plane + at, m10, mask=mask)
        tl.store(out_ptr + 9 * plane + at, m11, mask=mask)


@triton.jit(do_not_specialize=["T", "block_steps", *STRIDES])
def _dual_summary_kernel(
    gates_ptr,  # [T, B, 2, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each: the diagonals of W_ss, W_ms, W_mm and W_sm
    ms_ptr,
    mm_ptr,
    sm_ptr,
    delta_ptr,  # [2, T, B, N]
    resets_ptr,  # [T, B] of 32 bits, or None; narrower loads can't be issued steps ahead
    product_ptr,  # [2, 2, G, B·N]: written, R of each of the G blocks of time after the first
    local_ptr,  # [2, G, B·N]: written, ℓ of each
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
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    N = (
        N // VECTOR * VECTOR
    )  # leaves N, BN and the stride as they are, and shows the compiler what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    gate_offset = row.to(tl.int64) * (4 * N) + unit % N
    first = (tl.program_id(1) + 1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    plane = tl.cast(BN, tl.int64) * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_diagonals(
        ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask
    )
    r00 = tl.full((BLOCK,), 1.0, tl.float32)
    r01 = tl.zeros((BLOCK,), tl.float32)
    r10 = tl.zeros((BLOCK,), tl.float32)
    r11 = tl.full((BLOCK,), 1.0, tl.float32)
    later0 = tl.zeros((BLOCK,), tl.float32)
    later1 = tl.zeros((BLOCK,), tl.float32)
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
            gate_offset,
            N,
            BN,
            stride_before,
            mask,
        )
        delta0, delta1 = load_states(delta_ptr, t * BN + unit, plane, mask, 2)
        _, _, _, _, m00, m01, m10, m11 = rgc_partials(ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm)
        later0, later1 = pass_back(m00, m01, m10, m11, delta0 + later0, delta1 + later1, 2)
        r00, r01, r10, r11 = times(r00, r01, r10, r11, m00, m01, m10, m11, 2)
        if resets_ptr is not None:
            later0 = tl.where(keep, later0, 0.0)
            later1 = tl.where(keep, later1, 0.0)
            r00 = tl.where(keep, r00, 0.0)
            r01 = tl.where(keep, r01, 0.0)
            r10 = tl.where(keep, r10, 0.0)
            r11 = tl.where(keep, r11, 0.0)
    store_summary(product_ptr, local_ptr, r00, r01, r10, r11, later0, later1, unit, BN, mask, 2)


@triton.jit(do_not_specialize=["T", "block_steps", *STRIDES])
def _dual_kernel(
    gates_ptr,  # [T, B, 2, 2, N]
    before_ptr,  # [2, T, B, N]
    u_ptr,  # [T, B, N]
    ss_ptr,  # [N] each: the diagonals of W_ss, W_ms, W_mm and W_sm
    ms_ptr,
    mm_ptr,
    sm_ptr,
    delta_ptr,  # [2, T, B, N]
    resets_ptr,  # [T, B] of 32 bits, or None; narrower loads can't be issued steps ahead
    carry_ptr,  # [2, B, N], or None for zero
    product_ptr,  # [2, 2, G, B·N], R of each block of time after the first; or None where there is one block
    local_ptr,  # [2, G, B·N], ℓ of each; or None with product_ptr
    entering_ptr,  # [T, B, 2, 2, N]: written, E
    for_input_ptr,  # [T, B, N]: written, ∂E/∂u
    passed_ptr,  # [2, B, N]: written, M(1)ᵀ λ(1)
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
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    # One program: BLOCK units in one block of time.
    N = (
        N // VECTOR * VECTOR
    )  # leaves N, BN and the stride as they are, and shows the compiler what divides them
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = unit // N
    gate_offset = row.to(tl.int64) * (4 * N) + unit % N
    first = tl.program_id(1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    n = (unit % N).to(tl.int64)
    w_ss, w_ms, w_mm, w_sm = _load_diagonals(
        ss_ptr, ms_ptr, mm_ptr, sm_ptr, stride_ss, stride_ms, stride_mm, stride_sm, n, mask
    )
    later0 = tl.zeros((BLOCK,), tl.float32)
    later1 = tl.zeros((BLOCK,), tl.float32)
    if carry_ptr is not None:
        later0, later1 = load_states(carry_ptr, unit, wide_bn, mask, 2)
    if product_ptr is not None:
        later0, later1 = through_blocks(product_ptr, local_ptr, later0, later1, unit, BN, mask, 2, STAGES)

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
            gate_offset,
            N,
            BN,
            stride_before,
            mask,
        )
        delta0, delta1 = load_states(delta_ptr, at, plane, mask, 2)
        phi_ss, phi_ms, phi_mm, phi_sm, m00, m01, m10, m11 = rgc_partials(
            ss, ms, mm, sm, s, m, u, w_ss, w_ms, w_mm, w_sm
        )
        credit0 = delta0 + later0
        credit1 = delta1 + later1
        at_gates = 4 * t * BN + gate_offset
        tl.store(entering_ptr + at_gates, credit0 * phi_ss, mask=mask)
        tl.store(entering_ptr + (at_gates + N), credit1 * phi_sm, mask=mask)
        tl.store(entering_ptr + (at_gates + 2 * N), credit1 * phi_mm, mask=mask)
        tl.store(entering_ptr + (at_gates + 3 * N), credit0 * phi_ms, mask=mask)
        tl.store(for_input_ptr + at, credit0 * (1.0 - ms) + credit1 * (1.0 - sm), mask=mask)
        later0, later1 = pass_back(m00, m01, m10, m11, credit0, credit1, 2)
        if resets_ptr is not None:
            later0 = tl.where(keep, later0, 0.0)
            later1 = tl.where(keep, later1, 0.0)

    mask = mask & (tl.program_id(1) == 0)
    tl.store(passed_ptr + unit, later0, mask=mask)
    tl.store(passed_ptr + wide_bn + unit, later1, mask=mask)


class Config(NamedTuple):
    """How one program of one warp is laid out.

    block  units that it owns
    steps  how many steps it takes
    """

    block: int
    steps: int


def pick_config(T: int, BN: int, warp_size: int, multiprocessors: int) -> Config:
    """The layout for partials, over T steps of B·N units. A pure function.

    Four units per thread make 128-bit accesses. A program reads the diagonals once; from a dense matrix each entry of
    4 bytes costs a memory access of 32. That is little compared with what several steps move, so a program takes
    several steps, up to eight, as long as there are still 32 programs per multiprocessor.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    return Config(block, max(1, min(8, T * tiles // (32 * multiprocessors))))


def pick_dual_config(T: int, BN: int, warp_size: int, multiprocessors: int) -> ScanConfig:
    """The layout for the dual form, over T steps of B·N units. A pure function.

    Units are picked as in `pick_config`, and blocks of time by `reverse_scan.pick_steps`; several blocks read the nine
    numbers of each unit and step twice. The loads of four steps are under way at once. Where a warp has 64 threads
    (AMD) it is those of three: loads wait in registers there, and those of four steps would spill.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    steps = pick_steps(T, tiles, tiles * block * (2 * 9 + 5), multiprocessors)
    return ScanConfig(block, 4 if warp_size == 32 else 3, steps)


class Dual(NamedTuple):
    """What `rgc_dual` returns.

    entering   E (T, B, 2, 2, N): [:, :, 0] of the matrices that read s, ss and sm; [:, :, 1] of those that read m, mm
               and ms
    for_input  ∂E/∂u (T, B, N)
    passed     the credit that the first step passes to the state before it, (2, B, N)
    """

    entering: Tensor
    for_input: Tensor
    passed: Tensor


@torch.no_grad()
def rgc_linearize(
    gates: Tensor, before: Tensor, u: Tensor, own: Sequence[Tensor], resets: Tensor | None = None
) -> Tensor:
    """The partials of an RGC at every step, and RFP's transition M, in one pass (paper, eq. 14; equations at the top).

    Seven numbers of each unit and step are read, and ten written.

    Args:
        gates: tanh of the pre-activations, (T, B, 2, 2, N) float32, contiguous, as `rgc_forward` returns them.
        before: the states before the steps, (2, T, B, N) float32; where reset they count as zero. The first dimension
            may have any stride, so that `states[:, :-1]` needs no copy.
        u: the layer's per-unit input, (T, B, N) float32, contiguous.
        own: the diagonals of W_ss, W_ms, W_mm, W_sm, (N,) float32 each, of any stride.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state was zeroed before that step. Or None.

    Nothing is mutated, and autograd doesn't follow it. Fast where four divides N.

    Returns:
        (10, T, B, N) float32: φ of ss, ms, mm and sm; ∂s/∂u and ∂m/∂u; the four entries of M row by row, zero where
        reset.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
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
    """RFP's dual form for an RGC in one pass (paper, eq. 14). Partials, M and λ are never written.

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero
        E^ss = λ^s φ^ss    E^ms = λ^s φ^ms    E^mm = λ^m φ^mm    E^sm = λ^m φ^sm
        ∂E/∂u = λ^s (1 - ms) + λ^m (1 - sm)

    Nine numbers of each unit and step are read (four gates, two states, the input and two of δ) and five written: 14 in
    all, where `rgc_linearize` and `reverse_scan_entering` move 17 each, 34 together. With several blocks of time the
    nine are read twice. The caller makes the weights' gradients, as after `rgc_backward.bptt_credits`.

    Args:
        gates, before, u, own, resets: as for `rgc_linearize`.
        delta: instantaneous credits δ (2, T, B, N) float32, contiguous.
        carry: credit that the steps after the last pass to it, (2, B, N) float32, contiguous; or None.

    Nothing is mutated, and autograd doesn't follow it. Fast where four divides N. Where blocks of time are scanned side
    by side (`pick_dual_config`), the product of M over one block must not overflow.

    Returns:
        `Dual`, float32.

    Raises:
        As `rgc_linearize`.
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
    """(T, B, N) of checked arguments. Raises TypeError or ValueError as `rgc_linearize` does."""
    steps, batch, units = check_dims("u", u, "TBN")
    check_tensor("u", u, (steps, batch, units), u)
    check_tensor("gates", gates, (steps, batch, 2, 2, units), u)
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
    """How many numbers one memory access may move, given N and the stride of `before`."""
    width = vector_width(units, torch.float32)
    return width if before.stride(0) % width == 0 else 1
