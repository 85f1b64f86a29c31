"""What a step of exact RTRL of an RGC takes beside its matrix product: the Jacobian J, and γ's immediate term.

Recursion (paper, eq. 15; γ is the sensitivity of all 2N states to all 4N² weights):

    γ ← J γ + R        R[(ν, i), (k, i, j)] = φ^k_i y^k_j,  ν the state that matrix k enters, y^k what it reads

torch makes the product J γ. `_rtrl_jacobian_kernel` writes J; `_rtrl_immediate_kernel` adds R to γ in place.

Grid of both: B · (tiles of BLOCK_N × BLOCK_M of an N × N matrix).
A program owns one tile, of all four matrices or blocks of J, of one batch row. For J it reads four weights' tiles and
φ and the own-state partials of its rows, and writes the tile of J's four blocks. For R it reads φ of its rows and
the states of its columns, and reads and writes one number of γ per weight, the only one that R isn't zero for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, vector_width


@triton.jit(do_not_specialize=["stride_own_s", "stride_own_m"])
def _rtrl_jacobian_kernel(
    own_s_ptr,  # [B, N]: ∂s/∂s' through no matrix
    own_m_ptr,  # [B, N]: ∂m/∂m' through no matrix
    phi_ss_ptr,  # [B, N]
    phi_ms_ptr,  # [B, N]
    phi_mm_ptr,  # [B, N]
    phi_sm_ptr,  # [B, N]
    ss_ptr,  # [N, N]
    ms_ptr,  # [N, N]
    mm_ptr,  # [N, N]
    sm_ptr,  # [N, N]
    resets_ptr,  # [B], or None
    jacobian_ptr,  # [B, 2N, 2N]: written
    N,
    stride_own_s,
    stride_own_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # Every batch row reads the weights again, from cache; what is written is B times as large.
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n = i < N
    inside = in_n[:, None] & (j < N)[None, :]
    diagonal = i[:, None] == j[None, :]
    wide_n = tl.cast(N, tl.int64)
    weight = i.to(tl.int64)[:, None] * N + j[None, :]
    # J has 4·N² numbers per batch row and 2·N per row; `lower` leads from its upper half to its lower.
    out = jacobian_ptr + 4 * b * wide_n * N + i.to(tl.int64)[:, None] * (2 * N) + j[None, :]
    lower = 2 * wide_n * N
    row = b * N + i

    # Where the batch row is reset, the partials aren't loaded and count as zero.
    live = in_n
    if resets_ptr is not None:
        live = in_n & (tl.load(resets_ptr + b) == 0)
    own_s = tl.load(own_s_ptr + b * stride_own_s + i, mask=live, other=0.0)
    own_m = tl.load(own_m_ptr + b * stride_own_m + i, mask=live, other=0.0)
    phi_ss = tl.load(phi_ss_ptr + row, mask=live, other=0.0)
    phi_ms = tl.load(phi_ms_ptr + row, mask=live, other=0.0)
    phi_mm = tl.load(phi_mm_ptr + row, mask=live, other=0.0)
    phi_sm = tl.load(phi_sm_ptr + row, mask=live, other=0.0)

    ss = phi_ss[:, None] * tl.load(ss_ptr + weight, mask=inside, other=0.0)
    ms = phi_ms[:, None] * tl.load(ms_ptr + weight, mask=inside, other=0.0)
    mm = phi_mm[:, None] * tl.load(mm_ptr + weight, mask=inside, other=0.0)
    sm = phi_sm[:, None] * tl.load(sm_ptr + weight, mask=inside, other=0.0)
    tl.store(out, ss + tl.where(diagonal, own_s[:, None], 0.0), mask=inside)
    tl.store(out + N, ms, mask=inside)
    tl.store(out + lower, sm, mask=inside)
    tl.store(out + lower + N, mm + tl.where(diagonal, own_m[:, None], 0.0), mask=inside)


@triton.jit(do_not_specialize=["stride_before"])
def _rtrl_immediate_kernel(
    gamma_ptr,  # [B, 2, N, 4, N, N]: state, unit of the state, matrix, the matrix's row i, its column j; mutated
    phi_ss_ptr,  # [B, N]
    phi_ms_ptr,  # [B, N]
    phi_mm_ptr,  # [B, N]
    phi_sm_ptr,  # [B, N]
    before_ptr,  # [2, B, N]
    N,
    stride_before,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # R is zero but where the unit of the state is i, the matrix's row: only those numbers of γ are touched.
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n = i < N
    in_m = j < N
    inside = in_n[:, None] & in_m[None, :]
    square = tl.cast(N, tl.int64) * N
    state = 4 * square * N  # how many numbers of γ one state has
    # In γ, unit i of state s, and of that row i of matrix ss.
    at = gamma_ptr + 2 * b * state + i.to(tl.int64)[:, None] * (4 * square + N) + j[None, :]
    row = b * N + i
    column = b * N + j

    s = tl.load(before_ptr + column, mask=in_m, other=0.0)[None, :]
    m = tl.load(before_ptr + stride_before + column, mask=in_m, other=0.0)[None, :]
    ss = tl.load(phi_ss_ptr + row, mask=in_n, other=0.0)[:, None] * s
    ms = tl.load(phi_ms_ptr + row, mask=in_n, other=0.0)[:, None] * m
    mm = tl.load(phi_mm_ptr + row, mask=in_n, other=0.0)[:, None] * m
    sm = tl.load(phi_sm_ptr + row, mask=in_n, other=0.0)[:, None] * s
    tl.store(at, tl.load(at, mask=inside, other=0.0) + ss, mask=inside)
    at += square
    tl.store(at, tl.load(at, mask=inside, other=0.0) + ms, mask=inside)
    at += state + square
    tl.store(at, tl.load(at, mask=inside, other=0.0) + mm, mask=inside)
    at += square
    tl.store(at, tl.load(at, mask=inside, other=0.0) + sm, mask=inside)


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

    One of 32 threads holds 16 numbers of each of the four matrices. Where rows aren't a multiple of 16 bytes it holds
    8, because each number then has an address and a mask of its own.
    """
    vector = vector_width(N, torch.float32)
    return Config(8 if vector > 1 else 4, 64, vector, num_warps=1)


def rtrl_jacobian(
    own: Sequence[Tensor],
    phi: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Tensor | None = None,
) -> Tensor:
    """The full recurrent Jacobian of one step of an RGC (paper, eq. 15), zero in batch rows that the step resets.

        J = [ diag(A^s) + φ^ss ⊙_rows W_ss        φ^ms ⊙_rows W_ms             ]
            [ φ^sm ⊙_rows W_sm                    diag(A^m) + φ^mm ⊙_rows W_mm ]

    Args:
        own: A^s = ∂s/∂s' and A^m = ∂m/∂m', the paths through no matrix, (B, N) float32 each; the first dimension may
            have any stride.
        phi: φ of ss, ms, mm, sm, each of the state that the matrix enters, (B, N) float32 each, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous.
        resets: (B,) bool or uint8: batch rows whose state was zeroed before the step. Or None.

    In a cell's `Partials`, own and phi at step t are own[ν][ν][t] and gate[k][k // 2][t].

    Nothing is mutated. Fast where four divides N.

    Returns:
        J (B, 2N, 2N) float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    batch, units = _check_phi(phi)
    _check_all("own", own, 2, (batch, units), phi[0], any_stride=1)
    _check_all("weights", weights, 4, (units, units), phi[0])
    if resets is not None:
        check_tensor("resets", resets, (batch,), phi[0], (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_rtrl_jacobian_kernel, "phi[0]", phi[0])
    jacobian = torch.empty(batch, 2 * units, 2 * units, dtype=torch.float32, device=phi[0].device)
    strides = [a.stride(0) for a in own]
    config, grid = _config_and_grid(batch, units)
    with torch.cuda.device_of(jacobian):
        _rtrl_jacobian_kernel[grid](
            *own,
            *phi,
            *weights,
            resets,
            jacobian,
            units,
            *strides,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            num_warps=config.num_warps,
        )
    return jacobian


def rtrl_immediate_(gamma: Tensor, phi: Sequence[Tensor], before: Tensor) -> None:
    """Add the immediate term of one step of an RGC to γ, in place (paper, eq. 15).

        γ[(ν, i), (k, i, j)] += φ^k_i y^k_j        ν the state that matrix k enters, y^k what it reads

    It changes 4·N² of γ's 8·N³ numbers per batch row. For batch rows that the step resets, `before` must be zero.

    Args:
        gamma: γ (B, 2N, 4N²) float32, contiguous. Mutated. Its rows are the units of s, then of m; its columns the
            entries of ss, ms, mm and sm, each matrix row by row.
        phi: φ of ss, ms, mm, sm, each of the state that the matrix enters, (B, N) float32 each, contiguous.
        before: the states that the step read, s and m, (2, B, N) float32; the first dimension may have any stride.

    Fast where four divides N.

    Raises:
        As `rtrl_jacobian`.
    """
    batch, units = _check_phi(phi)
    check_tensor("gamma", gamma, (batch, 2 * units, 4 * units**2), phi[0])
    check_tensor("before", before, (2, batch, units), phi[0], any_stride=1)
    check_runnable(_rtrl_immediate_kernel, "gamma", gamma)
    config, grid = _config_and_grid(batch, units)
    with torch.cuda.device_of(gamma):
        _rtrl_immediate_kernel[grid](
            gamma,
            *phi,
            before,
            units,
            before.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            num_warps=config.num_warps,
        )


def _check_all(
    name: str, values: Sequence[Tensor], count: int, shape: Sequence[int], like: Tensor, any_stride: int = 0
) -> None:
    """Raise ValueError unless there are `count` values, and check each with `check_tensor`."""
    if len(values) != count:
        raise ValueError(f"{name} must hold {count} tensors, got {len(values)}")
    for index, value in enumerate(values):
        check_tensor(f"{name}[{index}]", value, shape, like, any_stride=any_stride)


def _check_phi(phi: Sequence[Tensor]) -> tuple[int, int]:
    """(B, N) of phi. Raises TypeError or ValueError as `rtrl_jacobian` does."""
    if len(phi) != 4:
        raise ValueError(f"phi must hold 4 tensors, got {len(phi)}")
    batch, units = check_dims("phi[0]", phi[0], "BN")
    _check_all("phi", phi, 4, (batch, units), phi[0])
    return batch, units


def _config_and_grid(batch: int, units: int) -> tuple[Config, tuple[int]]:
    config = pick_config(units)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(units, config.block_m)
    return config, (batch * tiles,)
