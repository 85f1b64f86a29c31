"""Γ one step on, in place, and the gradient that the step reads from it: one pass over Γ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_gammas, check_runnable, check_tensor, device_sizes, split_rows, vector_width

# Of Philox. 7 pass all tests of BigCrush (Salmon et al. 2011) and 10 are usual: rounding needs no more than 6.
ROUNDS = tl.constexpr(6)


@triton.jit
def _round_stochastically(value, rng_state_ptr, state: tl.constexpr, matrix, M, i0, j0):
    """float32 [BLOCK_N, BLOCK_M] to bfloat16: the neighbour away from zero as often as `value` is near it.

    Random bits are of (seed, step, state, matrix, unit, column): no tile or part of the batch changes them. Seed and
    step are 64 bits wide.
    """
    # Read anew for each tile: what is kept over the loop over the batch takes registers.
    seed = tl.load(rng_state_ptr)
    step = tl.load(rng_state_ptr + 1)
    # One draw has 16 bits for each of 8 numbers in a row. All four counters are 32 bits wide.
    row = i0 + tl.arange(0, value.shape[0])
    group = j0 // 8 + tl.arange(0, value.shape[1] // 8)
    within = row[:, None] * tl.cdiv(M, 8) + group[None, :]
    late = ((step >> 32) * 2 + state).to(tl.int32)
    a, b, c, d = tl.philox(seed, within, matrix.to(tl.int32), step.to(tl.int32), late, n_rounds=ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d)).reshape(value.shape[0], value.shape[1] // 2)
    random = tl.join(words & 0xFFFF, words >> 16).reshape(value.shape)
    # In integers, which the interpreter doesn't round otherwise. What carries out of the low half makes the
    # high half the next bfloat16, away from zero; a NaN must not carry into the sign.
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits + random, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# Only N and M set a layout: the rest shall not compile the kernel anew when it is 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "ROWS", "next_phi", "next_y", "stride_m_to", "stride_m_from", "stride_delta",
    ]
)  # fmt: skip
def _gamma_step_kernel(
    gamma0_ptr,  # [B, K, N, M]
    gamma1_ptr,  # [B, K, N, M], or None for one state
    m_ptr,  # [S, S, B, N]
    phi_ptrs,  # by state, then by matrix: [B, N], rows `next_phi` apart, or None for zero
    y_ptrs,  # by matrix: [B, M], or [B, N] of which each row of Γ reads its own; rows `next_y` apart
    delta_ptr,  # [S, B, N], or None to advance only
    grad_ptr,  # [parts, K, N, M], or None where weights take the step themselves
    weight_ptrs,  # by matrix: [N, M], or None for one that stays; or None
    lr_ptr,  # [1], or None
    rng_state_ptr,  # [2], a seed and a step, or None to round to nearest
    ROWS,  # of the batch in one part, B = parts · ROWS
    N,
    M,
    next_phi,
    next_y,
    stride_m_to,
    stride_m_from,
    stride_delta,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of M: numbers of Γ that one access moves
    OWN: tl.constexpr,  # whether each row reads its own number, M = 1
):
    # One program: rows i and columns j of one matrix k, over its part of the batch, whose sum stays in
    # registers. All matrices in one program would need K accumulators: it spills, and saves only loads of m.
    K: tl.constexpr = len(y_ptrs)
    M = M // VECTOR * VECTOR  # M itself and the distance, and the compiler sees that VECTOR divides them
    next_y = tl.cast(next_y, tl.int64) // VECTOR * VECTOR
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

    # What is of matrix k. Where it does not enter a state, nothing is loaded from where `phi` then points.
    y_ptr = y_ptrs[0]
    phi0_ptr = m_ptr
    phi1_ptr = m_ptr
    last0 = 0
    last1 = 0
    for each in tl.static_range(K):
        if k == each:
            y_ptr = y_ptrs[each]
            if phi_ptrs[each] is not None:
                phi0_ptr = phi_ptrs[each]
                last0 = N
            if gamma1_ptr is not None and phi_ptrs[K + each] is not None:
                phi1_ptr = phi_ptrs[K + each]
                last1 = N

    # 64 bits for what grows with B, K, N and M; the offset inside a tile fits in 32.
    corner = i0.to(tl.int64) * M + j0
    matrix = tl.cast(N, tl.int64) * M
    tile = row[:, None] * M + col[None, :]
    wide_n = tl.cast(N, tl.int64)
    wide_phi = tl.cast(next_phi, tl.int64)

    gamma0_ptr += (b0 * K + k) * matrix + corner
    if gamma1_ptr is not None:
        gamma1_ptr += (b0 * K + k) * matrix + corner
    m_ptr += b0 * N + i0
    phi0_ptr += i0
    phi1_ptr += i0
    y_ptr += b0 * next_y + (i0 if OWN else j0)
    if delta_ptr is not None:
        delta_ptr += b0 * N + i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for b in range(ROWS):
        if OWN:
            y = tl.load(y_ptr + row, mask=in_n, other=0.0)[:, None]
        else:
            y = tl.load(y_ptr + col, mask=in_m, other=0.0)[None, :]
        old0 = tl.load(gamma0_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        m00 = tl.load(m_ptr + row, mask=in_n, other=0.0)[:, None]
        phi0 = tl.load(phi0_ptr + (b0 + b) * wide_phi + row, mask=i0 + row < last0, other=0.0)[:, None]
        new0 = m00 * old0 + phi0 * y
        if gamma1_ptr is not None:
            old1 = tl.load(gamma1_ptr + tile, mask=inside, other=0.0).to(tl.float32)
            m01 = tl.load(m_ptr + stride_m_from + row, mask=in_n, other=0.0)[:, None]
            m10 = tl.load(m_ptr + stride_m_to + row, mask=in_n, other=0.0)[:, None]
            m11 = tl.load(m_ptr + stride_m_to + stride_m_from + row, mask=in_n, other=0.0)[:, None]
            phi1 = tl.load(phi1_ptr + (b0 + b) * wide_phi + row, mask=i0 + row < last1, other=0.0)[:, None]
            new0 += m01 * old1
            new1 = m10 * old0 + m11 * old1 + phi1 * y
            if rng_state_ptr is not None:
                kept1 = _round_stochastically(new1, rng_state_ptr, 1, (b0 + b) * K + k, M, i0, j0)
            else:
                kept1 = new1.to(gamma1_ptr.dtype.element_ty)
            tl.store(gamma1_ptr + tile, kept1, mask=inside)
        if rng_state_ptr is not None:
            kept0 = _round_stochastically(new0, rng_state_ptr, 0, (b0 + b) * K + k, M, i0, j0)
        else:
            kept0 = new0.to(gamma0_ptr.dtype.element_ty)
        tl.store(gamma0_ptr + tile, kept0, mask=inside)
        if delta_ptr is not None:
            # From the float32 values: rounding Γ to its own dtype doesn't touch this step's gradient.
            total += tl.load(delta_ptr + row, mask=in_n, other=0.0)[:, None] * new0
            if gamma1_ptr is not None:
                total += tl.load(delta_ptr + stride_delta + row, mask=in_n, other=0.0)[:, None] * new1
            delta_ptr += wide_n

        gamma0_ptr += K * matrix
        if gamma1_ptr is not None:
            gamma1_ptr += K * matrix
        m_ptr += wide_n
        y_ptr += next_y

    if weight_ptrs is not None:
        lr = tl.load(lr_ptr)
        for each in tl.static_range(K):
            if weight_ptrs[each] is not None:  # noqa: SIM102 - known as the kernel is compiled, k later
                if k == each:
                    at = weight_ptrs[each] + corner + tile
                    tl.store(at, tl.load(at, mask=inside, other=0.0) - lr * total, mask=inside)
    elif grad_ptr is not None:
        tl.store(grad_ptr + (part * K + k) * matrix + corner + tile, total, mask=inside)


class Config(NamedTuple):
    """One program's tile of Γ, the numbers that one access moves, and warps."""

    block_n: int
    block_m: int
    vector: int
    num_warps: int


def pick_config(N: int, M: int, dtype: torch.dtype, stochastic: bool = False) -> Config:
    """The tile for Γ of (B, K, N, M). Pure, for a kernel that works in place can't be tuned.

    A thread holds 16 numbers of each state: four 128-bit loads of float32 each, and registers for three or
    more programs a multiprocessor, in either dtype. Twice as many spill. Rows of 64 are whole cache lines.
    """
    vector = vector_width(M, dtype)
    if M == 1 and not stochastic:
        # One number a row: what lies together are rows.
        return Config(128, 1, vector, num_warps=1)
    if vector == 1:
        # An address and a mask a number: half as many numbers a thread, or registers spill; and half of that with
        # random bits for each.
        return Config(2 if stochastic else 4, 64, vector, num_warps=1)
    if triton.cdiv(N, 32) * triton.cdiv(M, 64) < 64:
        # Too few programs to fill a GPU: smaller ones, of as many numbers a thread.
        return Config(8, 64, vector, num_warps=1)
    return Config(32, 64, vector, num_warps=4)


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
    """Advance Γ in place by one step; with delta, read the gradient from it in the same pass (paper, eq. 14).

        Γ^{ν,k} ← Σ_ν' M^{νν'} ⊙_rows Γ^{ν',k} + φ^{ν,k} y^kᵀ
        G^k     = Σ_{b,ν} δ^ν ⊙_rows Γ^{ν,k}
        W^k     ← W^k - lr · G^k                                 with weights, in the same pass

    Arithmetic is in float32. Γ in bfloat16 is rounded after the gradient has read it. To nearest, what a step
    adds or forgets is lost where it is less than 2⁻⁹ of Γ; stochastically, Γ is right in the mean over seeds,
    at twice the variance of each rounding. That is far better where memory lasts 500 steps or more and what
    enters has a mean, as a bias's y = 1 has: after 1,000 steps at a decay of 0.999, errors of 3 % against 31 %.
    Inputs of either sign dither Γ themselves: to nearest is a little better then, 3.4 % against 4.4 %.

    The batch is summed in order; where Γ is too small to fill the GPU and the batch is large, by parts, whose
    sums a second pass adds up, and weights then take their step after it. Two runs on one GPU agree in every bit.

    Args:
        gammas: S tensors (B, K, N, M), S of 1 or 2, contiguous, float32 or bfloat16. Mutated. Fast where a
            row is a multiple of 16 bytes.
        m: (S, S, B, N) float32, first index the row ν.
        phi: (S, B, K, N) float32, zero where a matrix does not enter a state; or where they lie, S·K of (B, N)
            state by state, None for zero. Rows contiguous, and as far apart in all.
        y: (B, K, M) float32; or K of (B, M), rows as of phi. With M = 1 also N numbers, of which each row of Γ reads
            its own, as a diagonal matrix does.
        delta: (S, B, N) float32, or None to advance only.
        weights: K of (N, M) float32, contiguous, None for one that stays as it is; or None. Mutated. They need delta
            and lr.
        lr: the learning rate of the weights' step, (1,) float32. It is read on the GPU, so a CUDA graph takes what
            it is when it is replayed.
        rng_state: for Γ in bfloat16, a seed and a step that stochastic rounding draws from, (2,) int64,
            contiguous; None rounds to nearest. Stochastic rounding takes either neighbour, with probability
            proportional to how near it is, in 1/65,536ths; a bfloat16 number stays, NaN and infinity too.
            The same two round the same values alike in every bit: advance the step between two calls on one
            Γ. It is read on the GPU, so a CUDA graph that advances it draws anew each time it is replayed.

    With weights, their gradient never touches memory: of 128·N² bytes a step at B = 1 (RGC in float32: Γ 64, the
    gradient 16, SGD after it 48) 32 are saved.

    The indices before the batch of m, phi and delta may have any stride, so that one step of a sequence needs
    no copy; what they index must be contiguous, but for phi's and y's rows.

    Returns:
        The gradient (K, N, M) float32, or None without delta and with weights.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape, device, stride or number of tensors; weights without delta, or one of weights and
            lr without the other; rng_state where Γ is float32; tensors that aren't on a GPU, where kernels aren't
            interpreted.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma, states = gammas[0], len(gammas)
    check_tensor("m", m, (states, states, batch, units), gamma, any_stride=2)
    entering, next_phi = _apart("phi", phi, (states, matrices), (batch, units), gamma)
    first = y if isinstance(y, Tensor) else y[0] if isinstance(y, (tuple, list)) and y else None
    own = fan_in == 1 < units and isinstance(first, Tensor) and first.shape[-1:] == (units,)
    read, next_y = _apart("y", y, (1, matrices), (batch, units if own else fan_in), gamma)
    if None in read:
        raise TypeError(f"y[{read.index(None)}] must be a torch.Tensor, got None")
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
    config = pick_config(units, fan_in, gamma.dtype, rng_state is not None)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m)
    with torch.cuda.device_of(gamma):
        _gamma_step_kernel[(tiles, matrices, parts)](
            gamma,
            gammas[1] if states == 2 else None,
            m,
            entering,
            read,
            delta,
            gradients,
            tuple(weights) if weights is not None and in_pass else None,
            lr if in_pass else None,
            rng_state,
            rows,
            units,
            fan_in,
            next_phi,
            next_y,
            m.stride(0),
            m.stride(1),
            0 if delta is None else delta.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            OWN=own,
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


def _apart(
    name: str,
    given: Tensor | Sequence[Tensor | None],
    counts: tuple[int, int],
    shape: tuple[int, int],
    like: Tensor,
) -> tuple[tuple[Tensor | None, ...], int]:
    """The arrays (B, ·) of `given`, one each for S·K, and how far their rows are apart.

    given: (S, B, K, ·), or without S where it is 1; or S·K arrays. Raises TypeError or ValueError as `gamma_step_`.
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
    apart = {}
    for index, each in enumerate(given):
        if each is not None:
            check_tensor(f"{name}[{index}]", each, shape, like, any_stride=1)
            apart[index] = each.stride(0)
    distance = next(iter(apart.values()), 0)
    other = next((index for index, found in apart.items() if found != distance), None)
    if other is not None:
        raise ValueError(f"{name}'s rows must be as far apart in all, got {distance} and {apart[other]}")
    return tuple(given), distance
