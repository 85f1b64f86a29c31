"""Scans backward in time, unit by unit: credits λ(t), suffix products R(t), and what partials make of each.

Credits come of one pass, or where that would leave most of the chip empty, of blocks of time side by side. What a
block does to the credit that arrives at its end is affine, of products alone, never ratios:

    M(first)ᵀ λ(first) = ℓ + Rᵀ (M(last+1)ᵀ λ(last+1)),        R = M(last) … M(first)

One launch finds ℓ and R of every block but the first; another takes each block's credit through the blocks after it,
which are few, and then scans the block as the one pass does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width


@triton.jit
def load_transition(m_ptr, at, stride_from, stride_to, mask, STATES: tl.constexpr):
    """M of the units `at`: four entries by row, of which one state has the first alone."""
    m00 = tl.load(m_ptr + at, mask=mask, other=0.0)
    if STATES == 1:
        return m00, m00, m00, m00
    m01 = tl.load(m_ptr + stride_from + at, mask=mask, other=0.0)
    m10 = tl.load(m_ptr + stride_to + at, mask=mask, other=0.0)
    m11 = tl.load(m_ptr + stride_to + stride_from + at, mask=mask, other=0.0)
    return m00, m01, m10, m11


@triton.jit
def load_states(ptr, at, stride, mask, STATES: tl.constexpr):
    """A number a state of the units `at`, of which one state has the first alone."""
    of0 = tl.load(ptr + at, mask=mask, other=0.0)
    if STATES == 1:
        return of0, of0
    return of0, tl.load(ptr + stride + at, mask=mask, other=0.0)


@triton.jit
def pass_back(m00, m01, m10, m11, credit0, credit1, STATES: tl.constexpr):
    """Mᵀ λ."""
    if STATES == 1:
        return m00 * credit0, credit1
    return m00 * credit0 + m10 * credit1, m01 * credit0 + m11 * credit1


@triton.jit
def times(r00, r01, r10, r11, m00, m01, m10, m11, STATES: tl.constexpr):
    """R M."""
    if STATES == 1:
        return r00 * m00, r01, r10, r11
    return (
        r00 * m00 + r01 * m10,
        r00 * m01 + r01 * m11,
        r10 * m00 + r11 * m10,
        r10 * m01 + r11 * m11,
    )


@triton.jit
def store_summary(
    product_ptr, local_ptr, r00, r01, r10, r11, local0, local1, unit, BN, mask, STATES: tl.constexpr
):
    """R and ℓ of the block of time that this program summarises."""
    wide_bn = tl.cast(BN, tl.int64)
    at = tl.program_id(1) * wide_bn + unit
    plane = wide_bn * tl.num_programs(1)
    tl.store(product_ptr + at, r00, mask=mask)
    tl.store(local_ptr + at, local0, mask=mask)
    if STATES == 2:
        tl.store(product_ptr + plane + at, r01, mask=mask)
        tl.store(product_ptr + 2 * plane + at, r10, mask=mask)
        tl.store(product_ptr + 3 * plane + at, r11, mask=mask)
        tl.store(local_ptr + plane + at, local1, mask=mask)


@triton.jit
def through_blocks(
    product_ptr,
    local_ptr,
    arriving0,
    arriving1,
    unit,
    BN,
    mask,
    STATES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What arrives at the end of this program's block of time, of what arrives at the end of the last."""
    summaries = tl.num_programs(1) - 1
    stride = tl.cast(BN, tl.int64) * summaries
    for step in tl.range(0, summaries - tl.program_id(1), num_stages=STAGES):
        at = tl.cast(summaries - 1 - step, tl.int64) * BN + unit
        r00, r01, r10, r11 = load_transition(product_ptr, at, stride, STATES * stride, mask, STATES)
        local0, local1 = load_states(local_ptr, at, stride, mask, STATES)
        through0, through1 = pass_back(r00, r01, r10, r11, arriving0, arriving1, STATES)
        arriving0 = local0 + through0
        arriving1 = local1 + through1
    return arriving0, arriving1


# T and the steps of a block set no layout, so they shall not compile a kernel anew when 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T", "block_steps"])
def _block_summary_kernel(
    m_ptr,  # [S, S, T, B·N]
    delta_ptr,  # [S, T, B·N]
    product_ptr,  # [S, S, G, B·N]: R of each block of time but the first
    local_ptr,  # [S, G, B·N]: ℓ of each
    T,
    block_steps,
    BN,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of BN: numbers that one access moves
):
    BN = BN // VECTOR * VECTOR  # BN itself, and the compiler sees what divides it
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    first = (tl.program_id(1) + 1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    r00 = tl.full((BLOCK,), 1.0, tl.float32)
    r01 = tl.zeros((BLOCK,), tl.float32)
    r10 = tl.zeros((BLOCK,), tl.float32)
    r11 = tl.full((BLOCK,), 1.0, tl.float32)
    arriving0 = tl.zeros((BLOCK,), tl.float32)
    arriving1 = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        at = tl.cast(first + count - 1 - step, tl.int64) * BN + unit
        m00, m01, m10, m11 = load_transition(m_ptr, at, plane, STATES * plane, mask, STATES)
        delta0, delta1 = load_states(delta_ptr, at, plane, mask, STATES)
        arriving0, arriving1 = pass_back(m00, m01, m10, m11, delta0 + arriving0, delta1 + arriving1, STATES)
        r00, r01, r10, r11 = times(r00, r01, r10, r11, m00, m01, m10, m11, STATES)

    store_summary(product_ptr, local_ptr, r00, r01, r10, r11, arriving0, arriving1, unit, BN, mask, STATES)


@triton.jit(do_not_specialize=["T", "block_steps"])
def _reverse_scan_kernel(
    m_ptr,  # [S, S, T, B·N]
    delta_ptr,  # [S, T, B·N]
    carry_ptr,  # [S, B·N], or None for zero
    product_ptr,  # [S, S, G, B·N], R of each block of time but the first, or None where there is one block
    local_ptr,  # [S, G, B·N], ℓ of each, or None
    partial_ptrs,  # by output, then by state: [T, B·N], or None for zero
    credit_ptr,  # [S, T, B·N], or None
    output_ptrs,  # [T, B·N] each
    passed_ptr,  # [S, B·N]
    T,
    block_steps,
    BN,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of BN: numbers that one access moves
):
    # One program: BLOCK units in one block of time.
    BN = BN // VECTOR * VECTOR  # BN itself, and the compiler sees what divides it
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    first = tl.program_id(1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    arriving0 = tl.zeros((BLOCK,), tl.float32)
    arriving1 = tl.zeros((BLOCK,), tl.float32)
    if carry_ptr is not None:
        arriving0, arriving1 = load_states(carry_ptr, unit, wide_bn, mask, STATES)
    if product_ptr is not None:
        arriving0, arriving1 = through_blocks(
            product_ptr, local_ptr, arriving0, arriving1, unit, BN, mask, STATES, STAGES
        )

    for step in tl.range(0, count, num_stages=STAGES):
        at = tl.cast(first + count - 1 - step, tl.int64) * BN + unit
        m00, m01, m10, m11 = load_transition(m_ptr, at, plane, STATES * plane, mask, STATES)
        delta0, delta1 = load_states(delta_ptr, at, plane, mask, STATES)
        credit0 = delta0 + arriving0
        credit1 = delta1 + arriving1
        credits = (credit0, credit1)
        arriving0, arriving1 = pass_back(m00, m01, m10, m11, credit0, credit1, STATES)
        if credit_ptr is not None:
            tl.store(credit_ptr + at, credit0, mask=mask)
            if STATES == 2:
                tl.store(credit_ptr + plane + at, credit1, mask=mask)
        for o in tl.static_range(len(output_ptrs)):
            total = tl.zeros((BLOCK,), tl.float32)
            for nu in tl.static_range(STATES):
                if partial_ptrs[o * STATES + nu] is not None:
                    partial = tl.load(partial_ptrs[o * STATES + nu] + at, mask=mask, other=0.0)
                    total += partial * credits[nu]
            tl.store(output_ptrs[o] + at, total, mask=mask)

    mask = mask & (tl.program_id(1) == 0)
    tl.store(passed_ptr + unit, arriving0, mask=mask)
    if STATES == 2:
        tl.store(passed_ptr + wide_bn + unit, arriving1, mask=mask)


@triton.jit(do_not_specialize=["C"])
def _suffix_kernel(
    m_ptr,  # [S, S, C, B·N]
    phi_ptr,  # [S, C, B, K, N], or None with arriving_ptr
    suffix_ptr,  # [S, S, C, B·N], or None
    arriving_ptr,  # [S, C, B, K, N], or None
    whole_ptr,  # [S, S, B·N]
    C,
    BN,
    N,
    STATES: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of BN, and of N if there is φ: numbers that one access moves
):
    # BN and N themselves, and the compiler sees what divides them.
    BN = BN // VECTOR * VECTOR
    if MATRICES > 0:
        N = N // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    in_matrix0 = (unit // N).to(tl.int64) * (MATRICES * N) + unit % N
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * C

    r00 = tl.full((BLOCK,), 1.0, tl.float32)
    r01 = tl.zeros((BLOCK,), tl.float32)
    r10 = tl.zeros((BLOCK,), tl.float32)
    r11 = tl.full((BLOCK,), 1.0, tl.float32)
    for step in tl.range(0, C, num_stages=STAGES):
        t = tl.cast(C - 1 - step, tl.int64)
        at = t * BN + unit
        if suffix_ptr is not None:
            tl.store(suffix_ptr + at, r00, mask=mask)
            if STATES == 2:
                tl.store(suffix_ptr + plane + at, r01, mask=mask)
                tl.store(suffix_ptr + 2 * plane + at, r10, mask=mask)
                tl.store(suffix_ptr + 3 * plane + at, r11, mask=mask)
        if arriving_ptr is not None:
            for k in tl.static_range(MATRICES):
                at_k = t * BN * MATRICES + in_matrix0 + k * N
                phi0 = tl.load(phi_ptr + at_k, mask=mask, other=0.0)
                if STATES == 1:
                    tl.store(arriving_ptr + at_k, r00 * phi0, mask=mask)
                else:
                    phi1 = tl.load(phi_ptr + plane * MATRICES + at_k, mask=mask, other=0.0)
                    tl.store(arriving_ptr + at_k, r00 * phi0 + r01 * phi1, mask=mask)
                    tl.store(arriving_ptr + plane * MATRICES + at_k, r10 * phi0 + r11 * phi1, mask=mask)
        m00, m01, m10, m11 = load_transition(m_ptr, at, plane, STATES * plane, mask, STATES)
        r00, r01, r10, r11 = times(r00, r01, r10, r11, m00, m01, m10, m11, STATES)

    tl.store(whole_ptr + unit, r00, mask=mask)
    if STATES == 2:
        tl.store(whole_ptr + wide_bn + unit, r01, mask=mask)
        tl.store(whole_ptr + 2 * wide_bn + unit, r10, mask=mask)
        tl.store(whole_ptr + 3 * wide_bn + unit, r11, mask=mask)


class Config(NamedTuple):
    """Units of one program, which is one warp, and how many steps' loads are under way at once."""

    block: int
    stages: int


def pick_config(K: int, warp_size: int) -> Config:
    """Of suffix products, for φ of K matrices, 0 without φ. Pure.

    Four units a lane make 128-bit accesses, and one warp makes as many programs as there can be: they are
    few, and each waits for its own loads alone. Over eight matrices the loads of four steps would ask for
    too much shared memory, and have enough in one step.
    """
    return Config(block=4 * warp_size, stages=4 if K <= 8 else 1)


class ScanConfig(NamedTuple):
    """`Config`, and the steps of a block of time: all T where there is one block."""

    block: int
    stages: int
    steps: int


# Numbers that a multiprocessor moves while a program waits for one step, of three whose loads are under way: of an
# H100, a third of 0.6 µs at 1/132 of 3 TB/s.
STEP_NUMBERS = 1024


def pick_scan_config(
    T: int, BN: int, S: int, partials: int, written: int, warp_size: int, multiprocessors: int
) -> ScanConfig:
    """Of credits, for T steps of B·N units with S states, so many partials, and numbers written, of each. Pure.

    Units and stages as in `pick_config`. By blocks of time, M and δ are read twice.
    """
    block, stages = 4 * warp_size, 4 if S * S + S + partials <= 24 else 1
    tiles = -(-BN // block)
    moved = tiles * block * (2 * (S * S + S) + partials + written)
    return ScanConfig(block, stages, pick_steps(T, tiles, moved, multiprocessors))


def pick_steps(T: int, tiles: int, moved: int, multiprocessors: int) -> int:
    """Of a block of time, of T by so many tiles of units; moved: numbers a step, by blocks. Pure.

    However little a program reads, it waits for memory step after step. Blocks of time read twice what M and δ are
    made of, and wait for the steps of two blocks and a summary a block: for the fewest where there are √(2T) blocks.
    One pass it is where moving these bytes takes longer than the waits of one pass, and under 256 steps, whose waits
    are short beside a second launch.
    """
    if T < 256 or moved > STEP_NUMBERS * multiprocessors:
        return T
    blocks = min(math.isqrt(2 * T), 8 * multiprocessors // tiles)
    return -(-T // blocks)


def _check_transitions(m: Tensor) -> tuple[int, int, int, int]:
    """(S, T, B, N) of m (S, S, T, B, N)."""
    states, columns, steps, batch, units = check_dims("m", m, "SSTBN")
    if states not in (1, 2) or columns != states:
        raise ValueError(f"m must have shape (S, S, T, B, N) with S of 1 or 2, got {tuple(m.shape)}")
    check_tensor("m", m, m.shape, m)
    return states, steps, batch, units


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Credits of a sequence, and what they pass on to the state before its first step.

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero

    Args:
        m: transitions M (S, S, T, B, N) float32, contiguous, first index the row; S of 1 or 2.
        delta: instantaneous credits δ (S, T, B, N) float32, contiguous.
        carry: credit that later steps pass to the last, (S, B, N) float32, contiguous, or None.

    Nothing is mutated. Fast where four divides B·N. Where blocks of time are scanned side by side
    (`pick_scan_config`), a product of M over one block must not overflow.

    Returns:
        λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N), float32.

    Raises:
        TypeError: an argument that isn't a tensor, or isn't float32.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
    """
    _check_scan(m, delta, carry)
    credit = torch.empty_like(delta)
    return credit, _scan(m, delta, carry, [], credit, [])


def reverse_scan_entering(
    m: Tensor,
    delta: Tensor,
    matrices: Sequence[Mapping[int, Tensor]],
    inputs: Sequence[Mapping[int, Tensor]],
    carry: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `reverse_scan`'s credits make of partials, in the same pass; λ itself is never written.

        E^k(t) = Σ_ν λ^ν(t) φ^{ν,k}(t),        from which ∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ: one GEMM a matrix
        ∂E/∂x^j(t) = Σ_ν λ^ν(t) ∂F_ν/∂x^j(t)

    Args:
        m, delta, carry: as for `reverse_scan`.
        matrices: of each matrix k, φ^{ν,k} (T, B, N) float32, contiguous, by state ν; a ν that is absent is zero.
        inputs: of each input j, ∂F_ν/∂x^j likewise.

    Nothing is mutated.

    Returns:
        E (K, T, B, N), ∂E/∂x (J, T, B, N) and M(1)ᵀ λ(1) (S, B, N), float32.

    Raises: as `reverse_scan`; ValueError for a state that there isn't.
    """
    states, *shape = _check_scan(m, delta, carry)
    for name, group in (("matrices", matrices), ("inputs", inputs)):
        for index, by_state in enumerate(group):
            for nu, partial in by_state.items():
                if nu not in range(states):
                    raise ValueError(f"{name}[{index}] must have states below {states}, got {nu}")
                check_tensor(f"{name}[{index}][{nu}]", partial, shape, m)
    entering = delta.new_empty(len(matrices), *shape)
    for_inputs = delta.new_empty(len(inputs), *shape)
    passed = _scan(m, delta, carry, [*matrices, *inputs], None, [*entering.unbind(0), *for_inputs.unbind(0)])
    return entering, for_inputs, passed


def _check_scan(m: Tensor, delta: Tensor, carry: Tensor | None) -> tuple[int, int, int, int]:
    states, steps, batch, units = _check_transitions(m)
    check_tensor("delta", delta, (states, steps, batch, units), m)
    if carry is not None:
        check_tensor("carry", carry, (states, batch, units), m)
    check_runnable(_reverse_scan_kernel, "m", m)
    return states, steps, batch, units


def _scan(
    m: Tensor,
    delta: Tensor,
    carry: Tensor | None,
    partials: Sequence[Mapping[int, Tensor]],
    credit: Tensor | None,
    outputs: Sequence[Tensor],
) -> Tensor:
    """Write credit, if given, and of each output what its partials make of it; returns what passes on."""
    states, steps, batch, units = delta.shape
    total = batch * units
    by_state = [by.get(nu) for by in partials for nu in range(states)]
    count = sum(partial is not None for partial in by_state)
    written = len(outputs) + (0 if credit is None else states)
    config = pick_scan_config(steps, total, states, count, written, *device_sizes(m))
    tiles, blocks = triton.cdiv(total, config.block), triton.cdiv(steps, config.steps)
    vector = vector_width(total, torch.float32)
    passed = delta.new_empty(states, batch, units)
    product = local = None
    with torch.cuda.device_of(m):
        if blocks > 1:
            product = m.new_empty(states, states, blocks - 1, total)
            local = m.new_empty(states, blocks - 1, total)
            _block_summary_kernel[(tiles, blocks - 1)](
                m,
                delta,
                product,
                local,
                steps,
                config.steps,
                total,
                STATES=states,
                BLOCK=config.block,
                STAGES=config.stages,
                VECTOR=vector,
                num_warps=1,
            )
        _reverse_scan_kernel[(tiles, blocks)](
            m,
            delta,
            carry,
            product,
            local,
            tuple(by_state),
            credit,
            tuple(outputs),
            passed,
            steps,
            config.steps,
            total,
            STATES=states,
            BLOCK=config.block,
            STAGES=config.stages,
            VECTOR=vector,
            num_warps=1,
        )
    return passed


def _suffix(m: Tensor, phi: Tensor | None, suffix: Tensor | None, adds: Tensor | None) -> Tensor:
    """Write R(t), or R(t) φ(t), whichever is given; returns R(0)."""
    check_runnable(_suffix_kernel, "m", m)
    states, _, steps, batch, units = m.shape
    matrices = 0 if phi is None else phi.shape[3]
    config = pick_config(matrices, device_sizes(m).warp)
    whole = torch.empty_like(m[:, :, 0])
    with torch.cuda.device_of(m):
        _suffix_kernel[(triton.cdiv(batch * units, config.block),)](
            m,
            phi,
            suffix,
            adds,
            whole,
            steps,
            batch * units,
            units,
            STATES=states,
            MATRICES=matrices,
            BLOCK=config.block,
            STAGES=config.stages,
            VECTOR=vector_width(units if matrices else batch * units, torch.float32),
            num_warps=1,
        )
    return whole


def suffix_products(m: Tensor) -> tuple[Tensor, Tensor]:
    """R(t) = M(C) … M(t+1) for t = 1 … C, R(C) the identity, and R(0) = M(C) … M(1).

    Args:
        m: (S, S, C, B, N) float32, contiguous, first index the row; S of 1 or 2. Not mutated.

    Returns:
        (S, S, C, B, N) and (S, S, B, N), float32.

    Raises: as `reverse_scan`.
    """
    _check_transitions(m)
    suffix = torch.empty_like(m)
    return suffix, _suffix(m, None, suffix, None)


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """What each step of a chunk still adds to Γ at its end, and R(0); the products R(t) are never written.

        U^{ν,k}(t) = Σ_ν' R^{νν'}(t) φ^{ν',k}(t),        R(t) = M(C) … M(t+1)

    Args:
        m: (S, S, C, B, N) float32, contiguous, first index the row; S of 1 or 2. Not mutated.
        phi: (S, C, B, K, N) float32, contiguous, zero where a matrix does not enter a state. Not mutated.
            Fast where four divides N.

    Returns:
        U (S, C, B, K, N) and R(0) (S, S, B, N), float32.

    Raises: as `reverse_scan`.
    """
    states, steps, batch, units = _check_transitions(m)
    matrices = check_dims("phi", phi, "STBKN")[3]
    check_tensor("phi", phi, (states, steps, batch, matrices, units), m)
    adds = torch.empty_like(phi)
    return adds, _suffix(m, phi, None, adds)
