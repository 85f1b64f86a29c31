"""Exact RTRL of an RGC, beside its product J γ: building J, and adding the immediate term to γ."""

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
    own_s_ptr,  # [B, N], as the next
    own_m_ptr,
    phi_ss_ptr,  # [B, N], as the next three
    phi_ms_ptr,
    phi_mm_ptr,
    phi_sm_ptr,
    ss_ptr,  # [N, N], as the next three
    ms_ptr,
    mm_ptr,
    sm_ptr,
    resets_ptr,  # [B], or None
    jacobian_ptr,  # [B, 2N, 2N]
    N,
    stride_own_s,
    stride_own_m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # One program: rows i and columns j of all four blocks of one batch row. The weights, read again by every
    # batch row, stay in cache; what is written is larger by the batch.
    N = N // VECTOR * VECTOR  # N itself, and the compiler sees what divides it
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
    # Two rows of J's are as long as four of a weight's.
    out = jacobian_ptr + 4 * b * wide_n * N + i.to(tl.int64)[:, None] * (2 * N) + j[None, :]
    lower = 2 * wide_n * N
    row = b * N + i

    # A partial that isn't read is zero: all of them where the row is reset.
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
    gamma_ptr,  # [B, 2, N, 4, N, N]: state, its unit i, matrix, the matrix's row i, its column j
    phi_ss_ptr,  # [B, N], as the next three
    phi_ms_ptr,
    phi_mm_ptr,
    phi_sm_ptr,
    before_ptr,  # [2, B, N]
    N,
    stride_before,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # One program: rows i and columns j of all four matrices of one batch row, γ where its unit is row i's.
    N = N // VECTOR * VECTOR  # N itself, and the compiler sees what divides it
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n = i < N
    in_m = j < N
    inside = in_n[:, None] & in_m[None, :]
    square = tl.cast(N, tl.int64) * N
    state = 4 * square * N  # numbers of γ of one state
    # Unit i's part of γ, and in it row i.
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
    """One program's tile of each matrix, the numbers that one access moves, and warps."""

    block_n: int
    block_m: int
    vector: int
    num_warps: int


def pick_config(N: int) -> Config:
    """For a layer of N units. Pure.

    Of each of the four matrices a lane of 32 holds 16 numbers, or 8 where rows aren't a multiple of 16 bytes:
    it has an address and a mask a number then.
    """
    vector = vector_width(N, torch.float32)
    return Config(8 if vector > 1 else 4, 64, vector, num_warps=1)


def rtrl_jacobian(
    own: Sequence[Tensor],
    phi: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Tensor | None = None,
) -> Tensor:
    """The full recurrent Jacobian of one step of an RGC (paper, eq. 15), zero in rows that the step resets.

        J = [ diag(A^s) + φ^ss ⊙_rows W_ss        φ^ms ⊙_rows W_ms             ]
            [ φ^sm ⊙_rows W_sm                    diag(A^m) + φ^mm ⊙_rows W_mm ]

    Args:
        own: A^s = ∂s/∂s' and A^m = ∂m/∂m' through no matrix, (B, N) float32 each; the first index may have
            any stride.
        phi: φ of ss, ms, mm, sm, each for the state that it enters, (B, N) float32 each, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous.
        resets: (B,) bool or uint8, or None.

    From a cell's `Partials`, at step t, they are own[ν][ν][t] and gate[k][k // 2][t].

    Nothing is mutated. Fast where four divides N.

    Returns:
        (B, 2N, 2N) float32.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
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

    What it touches is 4·N² numbers of γ's 8·N³ a batch row. Rows that are reset need no more than before = 0
    there.

    Args:
        gamma: γ (B, 2N, 4N²) float32, contiguous: unit i of s, then of m; ss, ms, mm, sm by row. Mutated.
        phi: φ of ss, ms, mm, sm, each for the state that it enters, (B, N) float32 each, contiguous.
        before: the states that the step read, s and m, (2, B, N) float32; the first index may have any
            stride.

    Fast where four divides N.

    Raises: as `rtrl_jacobian`.
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
    """Raise unless `values` are `count` tensors of `shape`, as `check_tensor` says."""
    if len(values) != count:
        raise ValueError(f"{name} must hold {count} tensors, got {len(values)}")
    for index, value in enumerate(values):
        check_tensor(f"{name}[{index}]", value, shape, like, any_stride=any_stride)


def _check_phi(phi: Sequence[Tensor]) -> tuple[int, int]:
    """(B, N) of phi."""
    if len(phi) != 4:
        raise ValueError(f"phi must hold 4 tensors, got {len(phi)}")
    batch, units = check_dims("phi[0]", phi[0], "BN")
    _check_all("phi", phi, 4, (batch, units), phi[0])
    return batch, units


def _config_and_grid(batch: int, units: int) -> tuple[Config, tuple[int]]:
    config = pick_config(units)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(units, config.block_m)
    return config, (batch * tiles,)
