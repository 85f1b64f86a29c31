"""What a step of exact RTRL takes beside its matrix product: the Jacobian J, and γ's immediate term.

Recursion (paper, eq. 15; γ is the sensitivity of all S·N states to all K·N² weights of dense matrices):

    γ ← J γ + R        J[(ν, i), (ν', j)] = δ_ij ∂F_ν/∂c^ν' + Σ_{k reads ν'} φ^{ν,k}_i W^k_ij
                       R[(ν, i), (k, i, j)] = φ^{ν,k}_i y^k_j,  y^k what matrix k reads

torch makes the product J γ. `_rtrl_jacobian_kernel` writes J; `_rtrl_immediate_kernel` adds R to γ in place.

Grid of both: B · (tiles of BLOCK_N × BLOCK_M of an N × N matrix).
A program owns one tile, of all matrices or blocks of J, of one batch row. For J it reads the matrices' tiles and
φ and the own-state partials of its rows, and writes the tile of J's S² blocks. For R it reads φ of its rows and
the states of its columns, and reads and writes the numbers of γ that R isn't zero for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, vector_width


@triton.jit
def _tile(N, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The program's batch row (int64), and the rows and columns of its tile of N × N."""
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    i = (tl.program_id(0) % tiles // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tl.program_id(0) // tiles).to(tl.int64), i, j


@triton.jit
def _rtrl_jacobian_kernel(
    own_ptrs,  # S² of [B, N]: ∂F_ν/∂c^ν' through no matrix, row by row; None for zeros
    phi_ptrs,  # S·K of [B, N]: φ^{ν,k}, state by state; None for zeros
    weight_ptrs,  # K of [N, N]
    resets_ptr,  # [B], or None
    jacobian_ptr,  # [B, S·N, S·N]: written
    N,
    own_strides,
    READS: tl.constexpr,  # for each matrix, the state that it reads
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # Every batch row reads the weights again, from cache; what is written is B times as large.
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    K: tl.constexpr = len(READS)
    b, i, j = _tile(N, BLOCK_N, BLOCK_M)
    in_n = i < N
    inside = in_n[:, None] & (j < N)[None, :]
    diagonal = i[:, None] == j[None, :]
    wide_n = tl.cast(N, tl.int64)
    weight = i.to(tl.int64)[:, None] * N + j[None, :]
    out = jacobian_ptr + S * S * b * wide_n * N + i.to(tl.int64)[:, None] * (S * N) + j[None, :]
    row = b * N + i

    # Where the batch row is reset, the partials aren't loaded and count as zero.
    live = in_n
    if resets_ptr is not None:
        live = in_n & (tl.load(resets_ptr + b) == 0)
    w = ()
    for k in tl.static_range(K):
        w = w + (tl.load(weight_ptrs[k] + weight, mask=inside, other=0.0),)
    for to in tl.static_range(S):
        for source in tl.static_range(S):
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for k in tl.static_range(K):
                if READS[k] == source and phi_ptrs[to * K + k] is not None:
                    total += tl.load(phi_ptrs[to * K + k] + row, mask=live, other=0.0)[:, None] * w[k]
            if own_ptrs[to * S + source] is not None:
                at = b * own_strides[to * S + source] + i
                own = tl.load(own_ptrs[to * S + source] + at, mask=live, other=0.0)
                total += tl.where(diagonal, own[:, None], 0.0)
            tl.store(out + to * S * wide_n * N + source * N, total, mask=inside)


@triton.jit
def _rtrl_immediate_kernel(
    gamma_ptr,  # [B, S, N, K, N, N]: state, unit of the state, matrix, the matrix's row i, its column j; mutated
    phi_ptrs,  # S·K of [B, N]: φ^{ν,k}, state by state; None for zeros
    before_ptr,  # [S, B, N]
    N,
    stride_before,
    READS: tl.constexpr,  # for each matrix, the state that it reads
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # R is zero but where the unit of the state is i, the matrix's row: only those numbers of γ are touched.
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    K: tl.constexpr = len(READS)
    b, i, j = _tile(N, BLOCK_N, BLOCK_M)
    in_n = i < N
    in_m = j < N
    inside = in_n[:, None] & in_m[None, :]
    square = tl.cast(N, tl.int64) * N
    state = K * square * N  # how many numbers of γ one state has
    # In γ, unit i of the first state, and of that row i of the first matrix.
    at = gamma_ptr + S * b * state + i.to(tl.int64)[:, None] * (K * square + N) + j[None, :]
    row = b * N + i
    column = b * N + j

    c = ()
    for nu in tl.static_range(S):
        c = c + (tl.load(before_ptr + nu * stride_before + column, mask=in_m, other=0.0)[None, :],)
    for to in tl.static_range(S):
        for k in tl.static_range(K):
            if phi_ptrs[to * K + k] is not None:
                phi = tl.load(phi_ptrs[to * K + k] + row, mask=in_n, other=0.0)[:, None]
                entry = at + to * state + k * square
                tl.store(entry, tl.load(entry, mask=inside, other=0.0) + phi * c[READS[k]], mask=inside)


class Config(NamedTuple):
    """How one program is laid out.

    block_n, block_m  rows and columns of its tile of each matrix
    vector            numbers that one memory access moves
    num_warps         Triton's option
    """

    block_n: int
    block_m: int
    vector: int
    num_warps: int


def pick_config(N: int) -> Config:
    """The layout for a layer of N units. A pure function.

    One of 32 threads holds 16 numbers of each matrix. Where rows aren't a multiple of 16 bytes it holds 8, because each
    number then has an address and a mask of its own.
    """
    vector = vector_width(N, torch.float32)
    return Config(8 if vector > 1 else 4, 64, vector, num_warps=1)


def rtrl_jacobian(
    own: Sequence[Tensor | None],
    phi: Sequence[Tensor | None],
    reads: Sequence[int],
    weights: Sequence[Tensor],
    resets: Tensor | None = None,
) -> Tensor:
    """The full recurrent Jacobian of one step (paper, eq. 15), zero in batch rows that the step resets.

        J[(ν, i), (ν', j)] = δ_ij ∂F_ν/∂c^ν' + Σ_{k reads ν'} φ^{ν,k}_i W^k_ij

    Args:
        own: ∂F_ν/∂c^ν', the paths through no matrix: S² of (B, N) float32, row by row; the first dimension may have any
            stride. None for zeros.
        phi: φ^{ν,k}: S·K of (B, N) float32, contiguous, state by state. None for zeros; one must be there.
        reads: for each of the K matrices, the state that it reads.
        weights: the matrices, (N, N) float32 each, contiguous.
        resets: (B,) bool or uint8: batch rows whose state was zeroed before the step. Or None.

    Nothing is mutated. Fast where four divides N.

    Returns:
        J (B, S·N, S·N) float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong number of tensors, shape (a dimension of size 0 among them), device or stride; or tensors
            that aren't on a GPU while kernels aren't interpreted.
    """
    states, batch, units, like = _check_phi(phi, reads)
    if len(own) != states**2:
        raise ValueError(f"own must hold {states**2} tensors, got {len(own)}")
    for index, value in enumerate(own):
        if value is not None:
            check_tensor(f"own[{index}]", value, (batch, units), like, any_stride=1)
    if len(weights) != len(reads):
        raise ValueError(f"weights must hold {len(reads)} tensors, got {len(weights)}")
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight, (units, units), like)
    if resets is not None:
        check_tensor("resets", resets, (batch,), like, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_rtrl_jacobian_kernel, "phi", like)
    jacobian = torch.empty(batch, states * units, states * units, dtype=torch.float32, device=like.device)
    config, grid = _config_and_grid(batch, units)
    with torch.cuda.device_of(jacobian):
        _rtrl_jacobian_kernel[grid](
            tuple(own),
            tuple(phi),
            tuple(weights),
            resets,
            jacobian,
            units,
            tuple(0 if one is None else one.stride(0) for one in own),
            READS=tuple(reads),
            S=states,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            num_warps=config.num_warps,
        )
    return jacobian


def rtrl_immediate_(
    gamma: Tensor, phi: Sequence[Tensor | None], reads: Sequence[int], before: Tensor
) -> None:
    """Add the immediate term of one step to γ, in place (paper, eq. 15).

        γ[(ν, i), (k, i, j)] += φ^{ν,k}_i y^k_j        y^k what matrix k reads

    It changes at most S·K·N² of γ's S·K·N³ numbers per batch row. For batch rows that the step resets, `before` must be
    zero.

    Args:
        gamma: γ (B, S·N, K·N²) float32, contiguous. Mutated. Its rows are the units, state by state; its columns the
            entries of the matrices, each row by row.
        phi, reads: as for `rtrl_jacobian`.
        before: the states that the step read, (S, B, N) float32; the first dimension may have any stride.

    Fast where four divides N.

    Raises:
        As `rtrl_jacobian`.
    """
    states, batch, units, like = _check_phi(phi, reads)
    check_tensor("gamma", gamma, (batch, states * units, len(reads) * units**2), like)
    check_tensor("before", before, (states, batch, units), like, any_stride=1)
    check_runnable(_rtrl_immediate_kernel, "gamma", gamma)
    config, grid = _config_and_grid(batch, units)
    with torch.cuda.device_of(gamma):
        _rtrl_immediate_kernel[grid](
            gamma,
            tuple(phi),
            before,
            units,
            before.stride(0),
            READS=tuple(reads),
            S=states,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            num_warps=config.num_warps,
        )


def _check_phi(phi: Sequence[Tensor | None], reads: Sequence[int]) -> tuple[int, int, int, Tensor]:
    """S, B, N, and one of phi. Raises TypeError or ValueError as `rtrl_jacobian` does."""
    like = next((one for one in phi if one is not None), None)
    if not reads or len(phi) % len(reads) or like is None:
        raise ValueError(
            f"phi must hold as many tensors a state as there are matrices, {len(reads)}, one of them not None, got "
            f"{len(phi)}"
        )
    states = len(phi) // len(reads)
    if not all(0 <= source < states for source in reads):
        raise ValueError(f"reads must name {states} states, got {tuple(reads)}")
    batch, units = check_dims("phi", like, "BN")
    for index, one in enumerate(phi):
        if one is not None:
            check_tensor(f"phi[{index}]", one, (batch, units), like)
    return states, batch, units, like


def _config_and_grid(batch: int, units: int) -> tuple[Config, tuple[int]]:
    config = pick_config(units)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(units, config.block_m)
    return config, (batch * tiles,)
