"""What a credit reads from Γ: one pass that reads it, and writes none of it.

With it, Γ can be kept lazily: read at every step, rewritten once in C. At step t of a chunk that started from Γ₀,

    Γ^ν(t) = Σ_ν' R(0,t)^{νν'} ⊙_rows Γ₀^ν' + Σ_{τ≤t} U^ν(τ→t) y(τ)ᵀ,       R(τ,t) = M(t) … M(τ+1), U = R φ

so the step's gradient Σ_{b,ν} δ^ν ⊙_rows Γ^ν(t) needs no Γ(t), only credits passed back per unit,

    λ(t) = δ(t),   λ(τ-1) = M(τ)ᵀ λ(τ)                                       `reverse_scan`, no matrix in it
    G(t) = Σ_b λ(0) ⊙_rows Γ₀ + Σ_{b,τ≤t} E(τ) y(τ)ᵀ,     E = Σ_ν λ^ν φ^ν    `gamma_read`, and one GEMM over (τ, b)

and `gamma_chunk_` folds the chunk into Γ at its last step, which it reads in the same pass. That is the gradient of
`gamma_step_`, also where weights change at every step: M, φ and y are kept as they were. Γ in bfloat16 is rounded
once in C steps, where `gamma_step_` rounds at every one.

Bytes of Γ a step, for an RGC in float32: `gamma_step_` moves 64·B·N²; this 32·B·N² · (1 + 1/C), and arrays of
O(C·B·N). The GEMM takes 8·B·N²·t FLOP at step t, 4·B·N²·(C + 1) on average, which grows with C. At an H100's
3.0 TB/s and about 60 TFLOP/s in float32 the sum of both is least near C = 13, 1.7 times less than the step form's
time; at about 400 TFLOP/s in TF32 near C = 33, 1.9 times. Predicted, not measured. It leaves out launches, three or
more a step in place of one: at 10 µs each, two more are made up for where 64·B·N² is 150 MB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_gammas, check_runnable, check_tensor, device_sizes, split_rows
from .gamma_step import pick_config


# Only N and M set a layout: the rest shall not compile the kernel anew when it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["ROWS", "K", "stride_credit"])
def _gamma_read_kernel(
    gamma0_ptr,  # [B, K, N, M]
    gamma1_ptr,  # [B, K, N, M], or None for one state
    credit_ptr,  # [S, B, N]
    grad_ptr,  # [parts, K, N, M]
    ROWS,  # of the batch in one part, B = parts · ROWS
    K,
    N,
    M,
    stride_credit,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of M: numbers of Γ that one access moves
):
    # One program: rows i and columns j of one matrix k, over its part of the batch, whose sum stays in registers.
    M = M // VECTOR * VECTOR  # M itself, and the compiler sees that VECTOR divides it
    tiles_m = tl.cdiv(M, BLOCK_M)
    i0 = (tl.program_id(0) // tiles_m) * BLOCK_N
    j0 = (tl.program_id(0) % tiles_m) * BLOCK_M
    k = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    b0 = part * ROWS

    row = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_M)
    in_n = i0 + row < N
    inside = in_n[:, None] & (j0 + col < M)[None, :]

    # 64 bits for what grows with B, K, N and M; the offset inside a tile fits in 32.
    corner = (k * N + i0) * M + j0
    tile = row[:, None] * M + col[None, :]
    wide_k = tl.cast(K, tl.int64)

    gamma0_ptr += b0 * K * N * M + corner
    if gamma1_ptr is not None:
        gamma1_ptr += b0 * K * N * M + corner
    credit_ptr += b0 * N + i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(ROWS):
        gamma0 = tl.load(gamma0_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(credit_ptr + row, mask=in_n, other=0.0)[:, None] * gamma0
        if gamma1_ptr is not None:
            gamma1 = tl.load(gamma1_ptr + tile, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(credit_ptr + stride_credit + row, mask=in_n, other=0.0)[:, None] * gamma1
            gamma1_ptr += wide_k * N * M
        gamma0_ptr += wide_k * N * M
        credit_ptr += N
    tl.store(grad_ptr + part * wide_k * N * M + corner + tile, total, mask=inside)


def gamma_read(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    """What a credit reads from Γ, which is left as it is.

        G^k = Σ_{b,ν} credit^ν ⊙_rows Γ^{ν,k}

    Arithmetic is in float32. The batch is summed in order; where Γ is too small to fill the GPU and the batch
    is large, by parts, whose sums a second pass adds up. Two runs on one GPU agree in every bit.

    Args:
        gammas: S tensors (B, K, N, M), S of 1 or 2, contiguous, float32 or bfloat16. Fast where a row is a
            multiple of 16 bytes.
        credit: (S, B, N) float32, contiguous beyond its first dimension.

    Returns:
        The gradient (K, N, M) float32.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape, device or stride; tensors that aren't on a GPU, where kernels aren't
            interpreted.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma, states = gammas[0], len(gammas)
    check_tensor("credit", credit, (states, batch, units), gamma, any_stride=1)
    check_runnable(_gamma_read_kernel, "gammas", gamma)

    rows = split_rows(states * gamma.nbytes // batch, batch, device_sizes(gamma).multiprocessors)
    parts = batch // rows
    gradients = torch.empty(parts, matrices, units, fan_in, dtype=torch.float32, device=gamma.device)
    config = pick_config(units, fan_in, gamma.dtype)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m)
    with torch.cuda.device_of(gamma):
        _gamma_read_kernel[(tiles, matrices, parts)](
            gamma,
            gammas[1] if states == 2 else None,
            credit,
            gradients,
            rows,
            matrices,
            units,
            fan_in,
            credit.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            VECTOR=config.vector,
            num_warps=config.num_warps,
        )
    return gradients[0] if parts == 1 else gradients.sum(0)
