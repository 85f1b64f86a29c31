"""Advance RFP's sensitivity Γ by one step, in place, and read the step's gradient from it in the same pass.

Recursion (paper, eq. 14; M is each unit's own S×S transition, φ the immediate sensitivity, y what a matrix reads):

    Γ^{ν,k} ← Σ_ν' M^{νν'} ⊙_rows Γ^{ν',k} + φ^{ν,k} y^kᵀ
    G^k     = Σ_{b,ν} δ^ν ⊙_rows Γ^{ν,k}

Grid: (tiles of BLOCK_N × BLOCK_M of one N × M matrix, K matrices, parts of the batch).
A program owns one tile of one matrix and loops over the batch rows of its part. Per row it reads the tile of Γ of all
S states, M, φ and δ of its rows and y of its columns, and writes the tile of Γ. The gradient's sum over the batch
stays in registers: at the end the program writes its tile of that part's gradient, or subtracts lr times it from its
tile of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import moved
from ._launch import (
    MAX_STATES,
    check_gammas,
    check_runnable,
    check_tensor,
    device_sizes,
    split_rows,
    vector_width,
)

# Rounds of the Philox generator. With 7 it passes all tests of BigCrush (Salmon et al. 2011), and 10 are usual: for
# rounding, 6 are enough.
ROUNDS = tl.constexpr(6)
STATES = tl.constexpr(MAX_STATES)


@triton.jit
def _round_stochastically(value, rng_state_ptr, state: tl.constexpr, matrix, M, i0, j0):
    """Round float32 [BLOCK_N, BLOCK_M] to bfloat16, away from zero with a probability that makes the mean right.

    matrix: b·K + k, of the batch row and the matrix. The random bits depend on (seed, step, state, matrix, unit,
    column) alone, so neither the tile's size nor how the batch is split changes them. Seed and step have 64 bits.
    """
    # Loaded for each tile: kept in registers over the loop over the batch, they would be missed elsewhere.
    seed = tl.load(rng_state_ptr)
    step = tl.load(rng_state_ptr + 1)
    # One draw of Philox gives 128 bits, 16 for each of 8 numbers of a row. Its four counters have 32 bits each.
    row = i0 + tl.arange(0, value.shape[0])
    group = j0 // 8 + tl.arange(0, value.shape[1] // 8)
    within = row[:, None] * tl.cdiv(M, 8) + group[None, :]
    step_high = ((step >> 32) * STATES + state).to(tl.int32)
    a, b, c, d = tl.philox(seed, within, matrix.to(tl.int32), step.to(tl.int32), step_high, n_rounds=ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d)).reshape(value.shape[0], value.shape[1] // 2)
    random = tl.join(words & 0xFFFF, words >> 16).reshape(value.shape)
    # Integer arithmetic, because the interpreter truncates float32 to bfloat16. Random bits are added to the low half;
    # a carry makes the high half the next bfloat16 away from zero. A NaN must not carry into its sign.
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits + random, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. Memory layout depends on N and M
# alone, so for the others it would be wasted work.
@triton.jit(
    do_not_specialize=[
        "ROWS", "stride_phi_b", "stride_y_b", "stride_m_to", "stride_m_from", "stride_delta",
    ]
)  # fmt: skip
def _gamma_step_kernel(
    gamma_ptrs,  # S of [B, K, N, M]
    m_ptr,  # [S, S, B, N]
    phi_ptrs,  # S·K of [B, N], for state 0 and all matrices, then state 1 and so on; None where φ is zero
    y_ptrs,  # K of [B, M]; with DIAGONAL of [B, N]
    delta_ptr,  # [S, B, N], or None to advance only
    grad_ptr,  # [parts, K, N, M], or None where weights take the step themselves
    weight_ptrs,  # K of [N, M], None for a weight that isn't updated; or None to update none
    lr_ptr,  # [1], or None with weight_ptrs
    rng_state_ptr,  # [2]: a seed and a step; or None to round to nearest
    ROWS,  # batch rows of one part; B = parts · ROWS
    N,
    M,
    stride_phi_b,  # between batch rows, the same in all of phi_ptrs
    stride_y_b,
    stride_m_to,  # of M^{νν'}: between its rows ν
    stride_m_from,  # and between its columns ν'
    stride_delta,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers of Γ that one memory access moves; divides M
    DIAGONAL: tl.constexpr,  # M = 1 and row i of Γ reads y_i, as a diagonal matrix does; else all rows read all of y
):
    # One matrix per program: all of them would need K accumulators, which spills and saves only loads of M.
    K: tl.constexpr = len(y_ptrs)
    S: tl.constexpr = len(gamma_ptrs)
    M = (
        M // VECTOR * VECTOR
    )  # leaves M and the stride as they are, and shows the compiler that VECTOR divides them
    stride_y_b = tl.cast(stride_y_b, tl.int64) // VECTOR * VECTOR
    tiles_m = tl.cdiv(M, BLOCK_M)
    i0 = (tl.program_id(0) // tiles_m) * BLOCK_N
    j0 = (tl.program_id(0) % tiles_m) * BLOCK_M
    k = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    b0 = part * ROWS

    row = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_M)
    in_n = i0 + row < N
    in_m = j0 + col < M
    inside = in_n[:, None] & in_m[None, :]

    # Select matrix k's arrays. Where it doesn't enter state ν, its pointer to φ is a stand-in that is never read: the
    # mask of its loads is `i < end`, and the end stays 0.
    y_ptr = y_ptrs[0]
    for each in tl.static_range(K):
        if k == each:
            y_ptr = y_ptrs[each]
    phi_ptr, phi_end = (), ()
    for nu in tl.static_range(S):
        ptr, end = m_ptr, 0
        for each in tl.static_range(K):
            if phi_ptrs[nu * K + each] is not None:  # noqa: SIM102 - decided at compile time, the next at run time
                if k == each:
                    ptr, end = phi_ptrs[nu * K + each], N
        phi_ptr, phi_end = phi_ptr + (ptr + i0,), phi_end + (end,)

    # Offsets that grow with B, K, N, M and T need 64 bits; those inside a tile fit in 32.
    corner = i0.to(tl.int64) * M + j0
    matrix = tl.cast(N, tl.int64) * M
    tile = row[:, None] * M + col[None, :]
    wide_n = tl.cast(N, tl.int64)
    wide_phi = tl.cast(stride_phi_b, tl.int64)
    wide_to, wide_from = tl.cast(stride_m_to, tl.int64), tl.cast(stride_m_from, tl.int64)
    wide_delta = tl.cast(stride_delta, tl.int64)

    gamma_ptrs = moved(gamma_ptrs, (b0 * K + k) * matrix + corner)
    m_ptr += b0 * N + i0
    y_ptr += b0 * stride_y_b + (i0 if DIAGONAL else j0)
    if delta_ptr is not None:
        delta_ptr += b0 * N + i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for b in range(ROWS):
        if DIAGONAL:
            y = tl.load(y_ptr + row, mask=in_n, other=0.0)[:, None]
        else:
            y = tl.load(y_ptr + col, mask=in_m, other=0.0)[None, :]
        old = ()
        for nu in tl.static_range(S):
            old = old + (tl.load(gamma_ptrs[nu] + tile, mask=inside, other=0.0).to(tl.float32),)
        new = ()
        for nu in tl.static_range(S):
            mask = i0 + row < phi_end[nu]
            value = tl.load(m_ptr + nu * wide_to + row, mask=in_n, other=0.0)[:, None] * old[0]
            value += tl.load(phi_ptr[nu] + (b0 + b) * wide_phi + row, mask=mask, other=0.0)[:, None] * y
            for source in tl.static_range(1, S):
                to_ptr = m_ptr + nu * wide_to + source * wide_from
                value += tl.load(to_ptr + row, mask=in_n, other=0.0)[:, None] * old[source]
            new = new + (value,)
        for nu in tl.static_range(S):
            if rng_state_ptr is not None:
                rounded = _round_stochastically(new[nu], rng_state_ptr, nu, (b0 + b) * K + k, M, i0, j0)
            else:
                rounded = new[nu].to(gamma_ptrs[nu].dtype.element_ty)
            tl.store(gamma_ptrs[nu] + tile, rounded, mask=inside)
        if delta_ptr is not None:
            # Reads the float32 values: that Γ is rounded to its own dtype doesn't change this step's gradient.
            for nu in tl.static_range(S):
                total += tl.load(delta_ptr + nu * wide_delta + row, mask=in_n, other=0.0)[:, None] * new[nu]
            delta_ptr += wide_n

        gamma_ptrs = moved(gamma_ptrs, K * matrix)
        m_ptr += wide_n
        y_ptr += stride_y_b

    if weight_ptrs is not None:
        lr = tl.load(lr_ptr)
        for each in tl.static_range(K):
            if weight_ptrs[each] is not None:  # noqa: SIM102 - decided at compile time, the next at run time
                if k == each:
                    at = weight_ptrs[each] + corner + tile
                    tl.store(at, tl.load(at, mask=inside, other=0.0) - lr * total, mask=inside)
    elif grad_ptr is not None:
        tl.store(grad_ptr + (part * K + k) * matrix + corner + tile, total, mask=inside)


class Config(NamedTuple):
    """How one program is laid out.

    block_n, block_m  rows and columns of its tile of Γ
    vector            numbers of Γ that one memory access moves
    num_warps         Triton's option
    """

    block_n: int
    block_m: int
    vector: int
    num_warps: int


def pick_config(N: int, M: int, dtype: torch.dtype, stochastic: bool = False, S: int = 2) -> Config:
    """The layout for Γ (B, K, N, M) of S states, which is rounded stochastically or not.

    A pure function, no autotuner: an autotuner runs a kernel repeatedly, and this one works in place.

    A thread holds 16 numbers of each state, which are four 128-bit loads of float32, and leave registers for three or
    more programs per multiprocessor, in either dtype. Twice as many spill; of three or four states a thread holds half
    as many. Rows of 64 numbers are whole cache lines.
    """
    fewer = 1 if S <= 2 else 2
    vector = vector_width(M, dtype)
    if M == 1 and not stochastic:
        # One number per row: it is rows that lie together in memory.
        return Config(128 // fewer, 1, vector, num_warps=1)
    if vector == 1:
        # Each number has an address and a mask of its own: with more than half as many numbers per thread, registers
        # spill; with random bits for each number, with more than a quarter.
        rows = 2 if stochastic else 4
        return Config(rows if S <= 2 else 1, 64, vector, num_warps=1)
    if triton.cdiv(N, 32) * triton.cdiv(M, 64) < 64:
        # Programs of four warps would be too few to fill a GPU: take one warp each, with as many numbers per thread.
        return Config(8 // fewer, 64, vector, num_warps=1)
    return Config(32 // fewer, 64, vector, num_warps=4)


def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor | Sequence[Tensor | None],
    y: Tensor | Sequence[Tensor],
    delta: Tensor | None = None,
    *,
    weights: Sequence[Tensor | None] | None = None,
    lr: Tensor | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | None:
    """Advance the sensitivity Γ in place by one step; with delta, return the step's gradient (paper, eq. 14).

        Γ^{ν,k} ← Σ_ν' M^{νν'} ⊙_rows Γ^{ν',k} + φ^{ν,k} y^kᵀ
        G^k     = Σ_{b,ν} δ^ν ⊙_rows Γ^{ν,k}
        W^k     ← W^k - lr · G^k                                 with weights, in the same pass

    Arithmetic is in float32. Γ in bfloat16 is rounded after the gradient has been read. Rounding to nearest loses what
    a step adds or forgets where that is less than 2⁻⁹ of Γ. Stochastic rounding keeps Γ right in the mean over seeds,
    at twice the variance of each rounding. That is far better where memory lasts 500 steps or more and the
    contributions have a mean, as a bias's y = 1 has: after 1,000 steps at a decay of 0.999, errors of 3 % against
    31 %. Contributions of either sign dither Γ by themselves; rounding to nearest is then a little better, 3.4 %
    against 4.4 %.

    The batch is summed in a fixed order. Where Γ is too small to fill the GPU and the batch is large, programs sum
    parts of the batch, a second pass adds those up, and the weights are updated after it. Two runs on one GPU agree in
    every bit.

    Args:
        gammas: Γ, one tensor (B, K, N, M) per state, S of at most 4, contiguous, float32 or bfloat16. Mutated. Fast
            where a row of M numbers is a multiple of 16 bytes.
        m: the transition M, (S, S, B, N) float32; the first index is the row ν.
        phi: the immediate sensitivity φ, (S, B, K, N) float32, zero where a matrix doesn't enter a state. Or its parts
            as separate tensors, S·K of (B, N), all matrices of the first state, then of the next, None for zero; their
            rows are contiguous and equally far apart in all of them.
        y: what each matrix reads, (B, K, M) float32; or K separate tensors (B, M), with rows as phi's. For diagonal
            matrices, with M = 1, (B, K, N) or K of (B, N): row i of Γ reads y_i.
        delta: instantaneous credit δ = ∂L(t)/∂(state), (S, B, N) float32, or None to advance Γ only.
        weights: K of (N, M) float32, contiguous, None for one that isn't to be updated; or None. Mutated. They need
            delta and lr.
        lr: the learning rate of the weights' update, (1,) float32. It is read on the GPU, so a CUDA graph uses the
            value that it has when the graph is replayed.
        rng_state: a seed and a step, (2,) int64, contiguous, from which stochastic rounding of a bfloat16 Γ draws; or
            None to round to nearest. Stochastic rounding takes either neighbour with a probability proportional to
            how near it is, in 1/65,536ths; bfloat16 numbers stay as they are, NaN and infinity too. The same seed and
            step round the same values alike in every bit, so advance the step between two calls on one Γ. It is
            read on the GPU, so a CUDA graph that advances it draws anew each time it is replayed.

    With weights, their gradient never goes through memory. That saves 32 of 128·N² bytes per step at B = 1 (RGC in
    float32: 64 for Γ, 16 for the gradient, 48 for SGD after it).

    The dimensions before the batch of m, phi and delta may have any stride, so that one step of a sequence needs no
    copy; the rest must be contiguous, except for the distance between rows of separate phi and y.

    Returns:
        The gradient (K, N, M) float32; None without delta, and None with weights.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape, device, stride or number of tensors; weights without delta, or one of weights and
            lr without the other; rng_state where Γ is float32; or tensors that aren't on a GPU while kernels aren't
            interpreted.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma, states = gammas[0], len(gammas)
    check_tensor("m", m, (states, states, batch, units), gamma, any_stride=2)
    phi_arrays, stride_phi_b = _separate_arrays("phi", phi, (states, matrices), (batch, units), gamma)
    first = y if isinstance(y, Tensor) else y[0] if isinstance(y, (tuple, list)) and y else None
    diagonal = fan_in == 1 < units and isinstance(first, Tensor) and first.shape[-1:] == (units,)
    y_arrays, stride_y_b = _separate_arrays(
        "y", y, (1, matrices), (batch, units if diagonal else fan_in), gamma
    )
    for k, each in enumerate(y_arrays):
        if each is None:  # `None in y_arrays` would compare tensors, at some 15 µs each
            raise TypeError(f"y[{k}] must be a torch.Tensor, got None")
    if delta is not None:
        check_tensor("delta", delta, (states, batch, units), gamma, any_stride=1)
    if (weights is None) != (lr is None):
        raise ValueError("weights and lr must be given together, got one of them")
    if weights is not None:
        if len(weights) != matrices:
            raise ValueError(f"weights must hold {matrices} tensors, one a matrix, got {len(weights)}")
        for k, weight in enumerate(weights):
            if weight is not None:
                check_tensor(f"weights[{k}]", weight, (units, fan_in), gamma)
        check_tensor("lr", lr, (1,), gamma)
        if delta is None:
            raise ValueError("delta must be given with weights, got None")
    if rng_state is not None:
        check_tensor("rng_state", rng_state, (2,), gamma, (torch.int64,))
        if gamma.dtype != torch.bfloat16:
            raise ValueError(f"rng_state must be None where gammas are {gamma.dtype}, which aren't rounded")
    check_runnable(_gamma_step_kernel, "gammas", gamma)

    rows = split_rows(states * gamma.nbytes // batch, batch, device_sizes(gamma).multiprocessors)
    parts = batch // rows
    in_pass = weights is not None and parts == 1
    gradients = None
    if delta is not None and not in_pass:
        shape = (parts, matrices, units, fan_in)
        gradients = torch.empty(shape, dtype=torch.float32, device=gamma.device)
    config = pick_config(units, fan_in, gamma.dtype, rng_state is not None, states)
    if stride_y_b % config.vector:  # the kernel tells the compiler that it divides the distance between rows
        y_arrays = tuple(each.contiguous() for each in y_arrays if each is not None)
        stride_y_b = fan_in
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m)
    with torch.cuda.device_of(gamma):
        _gamma_step_kernel[(tiles, matrices, parts)](
            tuple(gammas),
            m,
            phi_arrays,
            y_arrays,
            delta,
            gradients,
            tuple(weights) if weights is not None and in_pass else None,
            lr if in_pass else None,
            rng_state,
            rows,
            units,
            fan_in,
            stride_phi_b,
            stride_y_b,
            m.stride(0),
            m.stride(1),
            0 if delta is None else delta.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            DIAGONAL=diagonal,
            num_warps=config.num_warps,
        )
    if gradients is None:
        return None
    gradient = gradients[0] if parts == 1 else gradients.sum(0)
    if weights is None or lr is None:
        return gradient
    for weight, step in zip(weights, gradient.unbind(0), strict=True):
        if weight is not None:
            weight.addcmul_(step, lr, value=-1)
    return None


@triton.jit(do_not_specialize=["NUMBERS"])
def _forget_kernel(
    gamma_ptrs,  # S of [B, NUMBERS]
    resets_ptr,  # [B]
    NUMBERS,
    BLOCK: tl.constexpr,
):
    # One program: BLOCK numbers of one batch row, which it writes only where the row is reset.
    b = tl.program_id(1).to(tl.int64)
    if tl.load(resets_ptr + b) != 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for nu in tl.static_range(len(gamma_ptrs)):
            zeros = tl.zeros((BLOCK,), tl.float32).to(gamma_ptrs[nu].dtype.element_ty)
            tl.store(gamma_ptrs[nu] + b * NUMBERS + at, zeros, mask=at < NUMBERS)


def forget_(gammas: Sequence[Tensor], resets: Tensor) -> None:
    """Set Γ to zero in the batch rows that are reset, before `gamma_step_` of that step. It moves their memory alone.

    M is zero there, but its product with a NaN or an infinity of Γ isn't. A test of M in `gamma_step_` itself would
    take registers, and spill.

    gammas: as for `gamma_step_`; mutated. resets: (B,) bool or uint8, contiguous. Raises TypeError or ValueError as
    `gamma_step_` does.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma = gammas[0]
    check_tensor("resets", resets, (batch,), gamma, (torch.bool, torch.uint8))
    check_runnable(_forget_kernel, "gammas", gamma)
    numbers = matrices * units * fan_in
    with torch.cuda.device_of(gamma):
        _forget_kernel[(triton.cdiv(numbers, 4096), batch)](
            tuple(gammas),
            resets.view(torch.uint8),
            numbers,
            BLOCK=4096,
            num_warps=4,
        )


def _separate_arrays(
    name: str,
    given: Tensor | Sequence[Tensor | None],
    counts: tuple[int, int],
    shape: tuple[int, int],
    like: Tensor,
) -> tuple[tuple[Tensor | None, ...], int]:
    """phi or y as S·K separate arrays, each of `shape` (B, ·), and the stride between batch rows that they share.

    given: phi (S, B, K, ·) or y (B, K, ·), for which S counts as 1; or the S·K arrays themselves. counts: (S, K).
    Raises TypeError or ValueError as `gamma_step_` does.
    """
    states, matrices = counts
    if isinstance(given, Tensor):
        batch, numbers = shape
        whole = (states, batch, matrices, numbers) if name == "phi" else (batch, matrices, numbers)
        check_tensor(name, given, whole, like, any_stride=int(name == "phi"))
        by_state = given if name == "phi" else given[None]
        arrays = [by_state[nu, :, k] for nu in range(states) for k in range(matrices)]
        return tuple(arrays), matrices * numbers
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"{name} must be a torch.Tensor or a sequence of them, got {type(given).__name__}")
    if len(given) != states * matrices:
        raise ValueError(f"{name} must hold {states * matrices} tensors, got {len(given)}")
    row_strides = {}
    for index, each in enumerate(given):
        if each is not None:
            check_tensor(f"{name}[{index}]", each, shape, like, any_stride=1)
            row_strides[index] = each.stride(0)
    row_stride = next(iter(row_strides.values()), 0)
    other = next((index for index, found in row_strides.items() if found != row_stride), None)
    if other is not None:
        raise ValueError(
            f"{name}'s tensors must all have the same stride between rows, got {row_stride} and {row_strides[other]}"
        )
    return tuple(given), row_stride
