"""Γ over a chunk of steps, in place: one read and one write of Γ for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_gammas, check_runnable, check_tensor, vector_width


# B, C and K set no layout, so they shall not compile the kernel anew when they are 1 or multiples of 16.
@triton.jit(do_not_specialize=["C", "B", "K"])
def _gamma_chunk_kernel(
    gamma0_ptr,  # [B, K, N, M]
    gamma1_ptr,  # [B, K, N, M], or None for one state
    whole_ptr,  # [S, S, B, N]
    u_ptr,  # [S, C, B, K, N]
    y_ptr,  # [C, B, K, M]
    credit_ptr,  # [S, B, N], or None with grad_ptr
    grad_ptr,  # [K, N, M], or None
    C,
    B,
    K,
    N,
    M,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of M: numbers of Γ that one access moves
    VECTOR_U: tl.constexpr,  # a divisor of N: numbers of U that one access moves
    BLOCK_C: tl.constexpr,  # steps that one matrix product takes; 1 for outer products in registers
):
    # One program: rows i and columns j of one matrix k, over the whole batch, so that the batch sum stays in
    # registers. The gradient's other part, Σ E yᵀ, would be a third product: it is a GEMM of its own.

    # N and M themselves, and the compiler sees what divides them.
    N = N // VECTOR_U * VECTOR_U
    M = M // VECTOR * VECTOR
    tiles_m = tl.cdiv(M, BLOCK_M)
    i0 = (tl.program_id(0) // tiles_m) * BLOCK_N
    j0 = (tl.program_id(0) % tiles_m) * BLOCK_M
    k = tl.program_id(1).to(tl.int64)

    row = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_M)
    in_n = i0 + row < N
    in_m = j0 + col < M
    inside = in_n[:, None] & in_m[None, :]

    # 64 bits for what grows with B, C, K, N and M; the offset inside a tile fits in 32.
    corner = (k * N + i0) * M + j0
    tile = row[:, None] * M + col[None, :]
    wide_k = tl.cast(K, tl.int64)
    wide_n = tl.cast(N, tl.int64)
    u_step = wide_k * N * B
    y_step = wide_k * M * B
    plane = wide_n * B

    gamma0_ptr += corner
    if gamma1_ptr is not None:
        gamma1_ptr += corner
    whole_ptr += i0
    u_ptr += k * N + i0
    y_ptr += k * M + j0
    if credit_ptr is not None:
        credit_ptr += i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(B):
        old0 = tl.load(gamma0_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        new0 = tl.load(whole_ptr + row, mask=in_n, other=0.0)[:, None] * old0
        if credit_ptr is not None:
            total += tl.load(credit_ptr + row, mask=in_n, other=0.0)[:, None] * old0
        if gamma1_ptr is not None:
            old1 = tl.load(gamma1_ptr + tile, mask=inside, other=0.0).to(tl.float32)
            r01 = tl.load(whole_ptr + plane + row, mask=in_n, other=0.0)[:, None]
            r10 = tl.load(whole_ptr + 2 * plane + row, mask=in_n, other=0.0)[:, None]
            r11 = tl.load(whole_ptr + 3 * plane + row, mask=in_n, other=0.0)[:, None]
            new0 += r01 * old1
            new1 = r10 * old0 + r11 * old1
            if credit_ptr is not None:
                total += tl.load(credit_ptr + plane + row, mask=in_n, other=0.0)[:, None] * old1

        # The products add to what was carried: sums of their own would cost registers, and spill.
        if BLOCK_C == 1:
            u_at = u_ptr + row
            y_at = y_ptr + col
            for _t in range(C):
                y = tl.load(y_at, mask=in_m, other=0.0)[None, :]
                new0 += tl.load(u_at, mask=in_n, other=0.0)[:, None] * y
                if gamma1_ptr is not None:
                    new1 += tl.load(u_at + C * u_step, mask=in_n, other=0.0)[:, None] * y
                u_at += u_step
                y_at += y_step
        else:
            for t0 in range(0, C, BLOCK_C):
                t = tl.cast(t0, tl.int64) + tl.arange(0, BLOCK_C)
                in_c = t < C
                y_at = y_ptr + t[:, None] * y_step + col[None, :]
                y = tl.load(y_at, mask=in_c[:, None] & in_m[None, :], other=0.0)
                u_at = u_ptr + t[None, :] * u_step + row[:, None]
                u_mask = in_n[:, None] & in_c[None, :]
                u0 = tl.load(u_at, mask=u_mask, other=0.0)
                new0 = tl.dot(u0, y, new0, input_precision="tf32")
                if gamma1_ptr is not None:
                    u1 = tl.load(u_at + C * u_step, mask=u_mask, other=0.0)
                    new1 = tl.dot(u1, y, new1, input_precision="tf32")

        tl.store(gamma0_ptr + tile, new0.to(gamma0_ptr.dtype.element_ty), mask=inside)
        gamma0_ptr += wide_k * N * M
        if gamma1_ptr is not None:
            tl.store(gamma1_ptr + tile, new1.to(gamma1_ptr.dtype.element_ty), mask=inside)
            gamma1_ptr += wide_k * N * M
        whole_ptr += wide_n
        u_ptr += wide_k * N
        y_ptr += wide_k * M
        if credit_ptr is not None:
            credit_ptr += wide_n

    if credit_ptr is not None:
        tl.store(grad_ptr + corner + tile, total, mask=inside)


class Config(NamedTuple):
    """One program's tile of Γ, steps of one matrix product (1 for outer products), numbers of one access."""

    block_n: int
    block_m: int
    block_c: int
    vector: int
    num_warps: int
    num_stages: int


def pick_config(N: int, M: int, C: int, dtype: torch.dtype, precision: str) -> Config:
    """The tile for Γ of (B, K, N, M) over C steps. Pure, for a kernel that works in place can't be tuned.

    A thread holds 16 numbers of each state, which leaves room for two or more programs a multiprocessor.
    Tensor cores are worth it from 32 steps a chunk, and take no less than 64 rows; below, and in float32,
    outer products in registers are as fast and smaller.
    """
    vector = vector_width(M, dtype)
    if vector == 1:
        # An address and a mask a number: half as many numbers a thread, or registers spill.
        return Config(4, 64, 1, vector, num_warps=1, num_stages=1)
    if triton.cdiv(N, 32) * triton.cdiv(M, 64) < 64:
        # Too few programs to fill a GPU: smaller ones, of as many numbers a thread.
        return Config(8, 64, 1, vector, num_warps=1, num_stages=1)
    if precision == "tf32" and C >= 32:
        # One stage: keeping the next operands in flight costs registers and a program per multiprocessor.
        return Config(64, 32, 32, vector, num_warps=4, num_stages=1)
    return Config(32, 64, 1, vector, num_warps=4, num_stages=1)


def gamma_chunk_(
    gammas: Sequence[Tensor],
    whole: Tensor,
    arriving: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    precision: Literal["ieee", "tf32"] = "ieee",
) -> Tensor | None:
    """Advance Γ in place by C steps; with credit, read the past's part of the chunk's gradient as well.

        Γ^{ν,k} ← Σ_ν' R(0)^{νν'} ⊙_rows Γ₀^{ν',k} + Σ_t U^{ν,k}(t) y^k(t)ᵀ
        G^k     = Σ_{b,ν} credit^ν ⊙_rows Γ₀^{ν,k},          credit = M(1)ᵀ λ(1)

    The steps' own part of the gradient, Σ_{t,b} E^k(t) y^k(t)ᵀ, is a GEMM apart. Arithmetic is in float32,
    but for the products U yᵀ under "tf32"; Γ in bfloat16 is rounded to nearest at the end. The batch is
    summed in order: two runs agree in every bit.

    Args:
        gammas: S tensors (B, K, N, M), S of 1 or 2, contiguous, float32 or bfloat16. Mutated. Fast where a
            row is a multiple of 16 bytes.
        whole: R(0), (S, S, B, N) float32, contiguous, first index the row ν.
        arriving: U, (S, C, B, K, N) float32, contiguous, C ≥ 1.
        y: (C, B, K, M) float32, contiguous.
        credit: (S, B, N) float32, contiguous, or None.
        precision: of the products U yᵀ. "tf32" allows tensor cores to keep 10 bits of each factor, an error
            of 2⁻¹⁰ or less of each product; they are used where C is 32 or more and Γ fills the GPU.

    Returns:
        The gradient's part (K, N, M) float32, or None without credit.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device, stride or precision; tensors that aren't
            on a GPU, where kernels aren't interpreted.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma, states = gammas[0], len(gammas)
    check_tensor("whole", whole, (states, states, batch, units), gamma)
    steps = check_dims("arriving", arriving, "SCBKN")[1]
    check_tensor("arriving", arriving, (states, steps, batch, matrices, units), gamma)
    check_tensor("y", y, (steps, batch, matrices, fan_in), gamma)
    if credit is not None:
        check_tensor("credit", credit, (states, batch, units), gamma)
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    check_runnable(_gamma_chunk_kernel, "gammas", gamma)

    gradient = None
    if credit is not None:
        gradient = torch.empty(matrices, units, fan_in, dtype=torch.float32, device=gamma.device)
    config = pick_config(units, fan_in, steps, gamma.dtype, precision)
    grid = (triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m), matrices)
    with torch.cuda.device_of(gamma):
        _gamma_chunk_kernel[grid](
            gamma,
            gammas[1] if states == 2 else None,
            whole,
            arriving,
            y,
            credit,
            gradient,
            steps,
            batch,
            matrices,
            units,
            fan_in,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            VECTOR=config.vector,
            VECTOR_U=vector_width(units, torch.float32),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return gradient
