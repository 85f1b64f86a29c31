"""Scans backward in time, each unit on its own: the credit λ(t) of RFP's dual form, and suffix products of M.

Recursions (paper, eq. 14 in dual form; M(t) is each unit's own S×S transition):

    λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)                        credit; `reverse_scan`
    E^k(t) = Σ_ν λ^ν(t) φ^{ν,k}(t)                      its products with partials; `reverse_scan_entering`
    R(t) = R(t+1) M(t+1),   R(C) the identity           suffix products M(C) … M(t+1); `suffix_products`
    U^{ν,k}(t) = Σ_ν' R(t)^{νν'} φ^{ν',k}(t)            their products with φ; `arriving`

Grid: (tiles of BLOCK of the B·N units, blocks of time); for suffix products one block of time, the whole chunk.
A program is one warp. It owns BLOCK units and walks its block of time from the last step to the first, with the S
credits, or the S×S product, of each unit in registers. Per step it reads M and, as needed, δ, partials or φ of its
units. It writes λ (`reverse_scan`), the products with partials in place of λ (`reverse_scan_entering`), R(t)
(`suffix_products`), or U(t) (`arriving`).

Credits take one pass over all T steps or, where that would leave most of the GPU idle, several blocks of time side by
side. What one block, of steps first … last, does to the credit from the steps after it is an affine map. Its two
coefficients, ℓ and R, take products alone and no ratios:

    M(first)ᵀ λ(first) = ℓ + Rᵀ (M(last+1)ᵀ λ(last+1)),        R = M(last) … M(first)

One launch (`_block_summary_kernel`) finds ℓ and R of every block but the first. In a second one each program applies
the maps of the blocks after its own, which are few, to the credit from beyond the sequence, and then scans its block
as the one pass does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import (
    add,
    identity,
    kept,
    load_planes,
    on_states,
    passes,
    store_planes,
    times,
    transposed_times,
    zeros,
)
from ._launch import MAX_STATES, check_dims, check_runnable, check_tensor, device_sizes, vector_width


@triton.jit
def store_summary(product_ptr, local_ptr, r, local, unit, BN, mask):
    """Write R and ℓ of the block of time that this program summarises.

    product_ptr [S, S, G, B·N] and local_ptr [S, G, B·N] hold G blocks, all but the first of the sequence.
    """
    wide_bn = tl.cast(BN, tl.int64)
    at = tl.program_id(1) * wide_bn + unit
    store_planes(product_ptr, at, wide_bn * tl.num_programs(1), r, mask)
    store_planes(local_ptr, at, wide_bn * tl.num_programs(1), local, mask)


@triton.jit
def through_blocks(product_ptr, local_ptr, later, unit, BN, mask, S: tl.constexpr, STAGES: tl.constexpr):
    """The credit from later steps at the end of this program's block of time.

    later: the same at the end of the last block. Each block in between applies its map ℓ + Rᵀ(…).
    """
    summaries = tl.num_programs(1) - 1
    stride = tl.cast(BN, tl.int64) * summaries
    for step in tl.range(0, summaries - tl.program_id(1), num_stages=STAGES):
        at = tl.cast(summaries - 1 - step, tl.int64) * BN + unit
        r = load_planes(product_ptr, at, stride, mask, S * S)
        local = load_planes(local_ptr, at, stride, mask, S)
        later = add(local, kept(passes(r), transposed_times(r, later, S)))
    return later


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on T or
# on the steps of a block, so for those it would be wasted work.
@triton.jit(do_not_specialize=["T", "block_steps"])
def _block_summary_kernel(
    m_ptr,  # [S, S, T, B·N]
    delta_ptr,  # [S, T, B·N]
    product_ptr,  # [S, S, G, B·N]: written, R of each of the G blocks of time after the first
    local_ptr,  # [S, G, B·N]: written, ℓ of each
    T,
    block_steps,
    BN,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides BN
):
    # One program: BLOCK units in one block of time, scanned from zero credit (ℓ) and multiplied up (R).
    BN = BN // VECTOR * VECTOR  # leaves BN as it is, and shows the compiler what divides it
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    first = (tl.program_id(1) + 1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    r = identity(S, BLOCK)
    later = zeros(S, BLOCK)
    open = mask  # whether no step so far was a reset
    for step in tl.range(0, count, num_stages=STAGES):
        at = tl.cast(first + count - 1 - step, tl.int64) * BN + unit
        m = load_planes(m_ptr, at, plane, mask, S * S)
        delta = load_planes(delta_ptr, at, plane, mask, S)
        through = passes(m)
        later = kept(through, transposed_times(m, add(delta, later), S))
        r = times(r, m, S)
        open = open & through

    store_summary(product_ptr, local_ptr, kept(open, r), later, unit, BN, mask)


@triton.jit(do_not_specialize=["T", "block_steps"])
def _reverse_scan_kernel(
    m_ptr,  # [S, S, T, B·N]
    delta_ptr,  # [S, T, B·N]
    carry_ptr,  # [S, B·N], or None for zero
    product_ptr,  # [S, S, G, B·N], R of each block of time after the first; or None where there is one block
    local_ptr,  # [S, G, B·N], ℓ of each; or None with product_ptr
    partial_ptrs,  # S per output, of [T, B·N] each, None where the partial is zero
    credit_ptr,  # [S, T, B·N]: written, λ; or None
    output_ptrs,  # [T, B·N] each: written, Σ_ν λ^ν times the output's partial of state ν
    passed_ptr,  # [S, B·N]: written, M(1)ᵀ λ(1)
    T,
    block_steps,
    BN,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides BN
):
    # One program: BLOCK units in one block of time.
    BN = BN // VECTOR * VECTOR  # leaves BN as it is, and shows the compiler what divides it
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    first = tl.program_id(1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    # The credit that the step after the current one passes back, M(t+1)ᵀ λ(t+1).
    later = zeros(S, BLOCK)
    if carry_ptr is not None:
        later = load_planes(carry_ptr, unit, wide_bn, mask, S)
    if product_ptr is not None:
        later = through_blocks(product_ptr, local_ptr, later, unit, BN, mask, S, STAGES)

    for step in tl.range(0, count, num_stages=STAGES):
        at = tl.cast(first + count - 1 - step, tl.int64) * BN + unit
        m = load_planes(m_ptr, at, plane, mask, S * S)
        credit = add(load_planes(delta_ptr, at, plane, mask, S), later)
        later = kept(passes(m), transposed_times(m, credit, S))
        if credit_ptr is not None:
            store_planes(credit_ptr, at, plane, credit, mask)
        for o in tl.static_range(len(output_ptrs)):
            total = tl.zeros((BLOCK,), tl.float32)
            for nu in tl.static_range(S):
                if partial_ptrs[o * S + nu] is not None:
                    total += tl.load(partial_ptrs[o * S + nu] + at, mask=mask, other=0.0) * credit[nu]
            tl.store(output_ptrs[o] + at, total, mask=mask)

    store_planes(passed_ptr, unit, wide_bn, later, mask & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["C"])
def _suffix_kernel(
    m_ptr,  # [S, S, C, B·N]
    phi_ptr,  # [S, C, B, K, N], or None with arriving_ptr
    suffix_ptr,  # [S, S, C, B·N]: written, R(t) for t = 1 … C; or None
    arriving_ptr,  # [S, C, B, K, N]: written, U(t); or None
    whole_ptr,  # [S, S, B·N]: written, R(0)
    C,
    BN,
    N,
    S: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides BN, and N if there is φ
):
    # One program: BLOCK units over the whole chunk. These leave BN and N as they are, and show the compiler what
    # divides them.
    BN = BN // VECTOR * VECTOR
    if MATRICES > 0:
        N = N // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    # A unit's offset in (B, K, N) for matrix 0; matrix k's is k·N further on.
    at_matrix0 = (unit // N).to(tl.int64) * (MATRICES * N) + unit % N
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * C

    r = identity(S, BLOCK)
    for step in tl.range(0, C, num_stages=STAGES):
        t = tl.cast(C - 1 - step, tl.int64)
        at = t * BN + unit
        if suffix_ptr is not None:
            store_planes(suffix_ptr, at, plane, r, mask)
        if arriving_ptr is not None:
            for k in tl.static_range(MATRICES):
                at_k = t * BN * MATRICES + at_matrix0 + k * N
                phi = load_planes(phi_ptr, at_k, plane * MATRICES, mask, S)
                store_planes(arriving_ptr, at_k, plane * MATRICES, on_states(r, phi, S), mask)
        r = times(r, load_planes(m_ptr, at, plane, mask, S * S), S)

    store_planes(whole_ptr, unit, wide_bn, r, mask)


class Config(NamedTuple):
    """How one program of one warp is laid out.

    block   units that it owns
    stages  steps whose loads are under way at once (Triton's num_stages)
    """

    block: int
    stages: int


def pick_config(K: int, S: int, warp_size: int) -> Config:
    """The layout for suffix products of S states with φ of K matrices, K = 0 without φ. A pure function.

    One warp per program makes as many programs as possible: there are few units, and each program then waits for its
    own loads alone. With more than eight matrices the loads of four steps would ask for too much shared memory, and
    those of one step are enough to keep memory busy.
    """
    return Config(block=units_of_a_program(S, warp_size), stages=4 if K <= 8 else 1)


def units_of_a_program(S: int, warp_size: int) -> int:
    """Four a thread make 128-bit accesses. With more than two states a thread has two, to leave registers."""
    return (4 if S <= 2 else 2) * warp_size


class ScanConfig(NamedTuple):
    """`Config`, and how many steps one block of time has: all T where there is one block."""

    block: int
    stages: int
    steps: int


# Numbers that one multiprocessor could move while a program waits for the loads of one step, with those of three steps
# under way: on an H100, a third of 0.6 µs at 1/132 of 3 TB/s.
STEP_NUMBERS = 1024


def pick_scan_config(
    T: int, BN: int, S: int, partials: int, written: int, warp_size: int, multiprocessors: int
) -> ScanConfig:
    """The layout for credits, over T steps of B·N units with S states. A pure function.

    partials and written: numbers read beside M and δ, and numbers written, of each unit and step. Units and stages are
    picked as in `pick_config`. With several blocks of time, M and δ are read twice.
    """
    block, stages = units_of_a_program(S, warp_size), 4 if S * S + S + partials <= 24 else 1
    tiles = -(-BN // block)
    moved = tiles * block * (2 * (S * S + S) + partials + written)
    return ScanConfig(block, stages, pick_steps(T, tiles, moved, multiprocessors))


def pick_steps(T: int, tiles: int, moved: int, multiprocessors: int) -> int:
    """How many of T steps one block of time has; T itself for one pass over all of them. A pure function.

    tiles: programs per block of time; moved: numbers that all units together read and write per step when there are
    several blocks.

    However little a program reads, it waits for memory at every step. With several blocks of time, what M and δ are
    made of is read twice, and a program waits for the steps of two blocks and for one summary per block; these waits
    are fewest with √(2T) blocks. One pass is taken where moving those numbers takes longer than the waits of one pass,
    and below 256 steps, whose waits are short compared with a second launch.
    """
    if T < 256 or moved > STEP_NUMBERS * multiprocessors:
        return T
    blocks = min(math.isqrt(2 * T), 8 * multiprocessors // tiles)
    return -(-T // blocks)


def _check_transitions(m: Tensor) -> tuple[int, int, int, int]:
    """(S, T, B, N) of the transitions m (S, S, T, B, N). Raises TypeError or ValueError as `reverse_scan` does."""
    states, columns, steps, batch, units = check_dims("m", m, "SSTBN")
    if columns != states or states > MAX_STATES:
        raise ValueError(
            f"m must have shape (S, S, T, B, N) with S of at most {MAX_STATES}, got {tuple(m.shape)}"
        )
    check_tensor("m", m, m.shape, m)
    return states, steps, batch, units


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Credits of a sequence, and the credit that they pass to the state before its first step (paper, eq. 14, dual).

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero

    Args:
        m: transitions M (S, S, T, B, N) float32, contiguous; the first index is the row. S of at most 4.
        delta: instantaneous credits δ (S, T, B, N) float32, contiguous.
        carry: credit that the steps after the last pass to it, (S, B, N) float32, contiguous; or None.

    Nothing is mutated. Where M is zero, as at a reset, nothing passes on, NaN and infinities included. Fast where four
    divides B·N. Where blocks of time are scanned side by side (`pick_scan_config`), the product of M over one block
    must not overflow.

    Returns:
        λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N), float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
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
    """`reverse_scan`, with its credits multiplied into partials in the same pass. λ itself is never written.

        E^k(t) = Σ_ν λ^ν(t) φ^{ν,k}(t)                  the loss's gradient to the pre-activation that matrix k enters
        ∂E/∂x^j(t) = Σ_ν λ^ν(t) ∂F_ν/∂x^j(t)            and to input j

    The weights' gradients are then ∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ: one GEMM per matrix, which the caller runs.

    Args:
        m, delta, carry: as for `reverse_scan`.
        matrices: for each matrix k, φ^{ν,k} (T, B, N) float32, contiguous, by state ν; a ν that is absent stands for
            zero.
        inputs: for each input j, ∂F_ν/∂x^j in the same form.

    Nothing is mutated.

    Returns:
        E (K, T, B, N), ∂E/∂x (J, T, B, N) and M(1)ᵀ λ(1) (S, B, N), float32.

    Raises:
        As `reverse_scan`; also ValueError for a state ν that isn't below S.
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
    """Launch the scan. Writes λ to `credit`, if given, and Σ_ν λ^ν partials[o][ν] to each outputs[o].

    Returns M(1)ᵀ λ(1) (S, B, N).
    """
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
                S=states,
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
            S=states,
            BLOCK=config.block,
            STAGES=config.stages,
            VECTOR=vector,
            num_warps=1,
        )
    return passed


def _suffix(m: Tensor, phi: Tensor | None, suffix: Tensor | None, at_end: Tensor | None) -> Tensor:
    """Launch the suffix products. Writes R(t) to `suffix` and U(t) = R(t) φ(t) to `at_end`, where given.

    Returns R(0) (S, S, B, N).
    """
    check_runnable(_suffix_kernel, "m", m)
    states, _, steps, batch, units = m.shape
    matrices = 0 if phi is None else phi.shape[3]
    config = pick_config(matrices, states, device_sizes(m).warp)
    whole = torch.empty_like(m[:, :, 0])
    with torch.cuda.device_of(m):
        _suffix_kernel[(triton.cdiv(batch * units, config.block),)](
            m,
            phi,
            suffix,
            at_end,
            whole,
            steps,
            batch * units,
            units,
            S=states,
            MATRICES=matrices,
            BLOCK=config.block,
            STAGES=config.stages,
            VECTOR=vector_width(units if matrices else batch * units, torch.float32),
            num_warps=1,
        )
    return whole


def suffix_products(m: Tensor) -> tuple[Tensor, Tensor]:
    """Suffix products of a chunk's transitions: R(t) = M(C) … M(t+1) for t = 1 … C, where R(C) is the identity.

    Args:
        m: transitions M (S, S, C, B, N) float32, contiguous; the first index is the row. S of at most 4. Not mutated.

    Returns:
        R(1) … R(C) as (S, S, C, B, N), and R(0) = M(C) … M(1) as (S, S, B, N), float32.

    Raises:
        As `reverse_scan`.
    """
    _check_transitions(m)
    suffix = torch.empty_like(m)
    return suffix, _suffix(m, None, suffix, None)


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """What the immediate sensitivity φ(t) of each step has become at a chunk's end, and R(0), for `gamma_chunk_`.

        U^{ν,k}(t) = Σ_ν' R^{νν'}(t) φ^{ν',k}(t),        R(t) = M(C) … M(t+1)

    The products R(t) are never written.

    Args:
        m: transitions M (S, S, C, B, N) float32, contiguous; the first index is the row. S of at most 4. Not mutated.
        phi: φ (S, C, B, K, N) float32, contiguous, zero where a matrix doesn't enter a state. Not mutated. Fast where
            four divides N.

    Returns:
        U (S, C, B, K, N) and R(0) (S, S, B, N), float32.

    Raises:
        As `reverse_scan`.
    """
    states, steps, batch, units = _check_transitions(m)
    matrices = check_dims("phi", phi, "STBKN")[3]
    check_tensor("phi", phi, (states, steps, batch, matrices, units), m)
    at_end = torch.empty_like(phi)
    return at_end, _suffix(m, phi, None, at_end)
