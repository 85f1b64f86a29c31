"""Read a gradient from RFP's sensitivity Γ: one pass that reads Γ and writes none of it.

    G^k = Σ_{b,ν} credit^ν ⊙_rows Γ^{ν,k}                                                          (paper, eq. 14)

Grid: (tiles of BLOCK_N × BLOCK_M of one N × M matrix, K matrices, parts of the batch).
A program owns one tile of one matrix and loops over the batch rows of its part. Per row it reads the tile of Γ of all
S states and the credit of its units, and adds to a sum that stays in registers; at the end it writes its tile of that
part's gradient. The launcher adds up the parts.

What it is for: Γ can be kept lazily, read at every step and rewritten once in C steps. At step t of a chunk that
started from Γ₀,

    Γ^ν(t) = Σ_ν' R(0,t)^{νν'} ⊙_rows Γ₀^ν' + Σ_{τ≤t} U^ν(τ→t) y(τ)ᵀ,       R(τ,t) = M(t) … M(τ+1), U = R φ

so the step's gradient Σ_{b,ν} δ^ν ⊙_rows Γ^ν(t) needs no Γ(t), only credit passed back unit by unit,

    λ(t) = δ(t),   λ(τ-1) = M(τ)ᵀ λ(τ)                                       `reverse_scan`, no matrix in it
    G(t) = Σ_b λ(0) ⊙_rows Γ₀ + Σ_{b,τ≤t} E(τ) y(τ)ᵀ,     E = Σ_ν λ^ν φ^ν    `gamma_read`, and one GEMM over (τ, b)

and at the chunk's last step `gamma_chunk_` folds the chunk into Γ and reads that step's gradient in the same pass.
The gradients equal those of `gamma_step_`, also where weights change at every step, because M, φ and y are kept as
they were at each step. Γ in bfloat16 is rounded once in C steps, where `gamma_step_` rounds it at every one.

Cost per step, for an RGC in float32: `gamma_step_` moves 64·B·N² bytes of Γ; the lazy form 32·B·N² · (1 + 1/C), and
arrays of O(C·B·N). Its GEMM takes 8·B·N²·t FLOP at step t, 4·B·N²·(C + 1) on average, which grows with C. At an
H100's 3.0 TB/s and about 60 TFLOP/s in float32 the sum of both times is least near C = 13, 1.7 times less than the
step form's time; at about 400 TFLOP/s in TF32 it is least near C = 33, 1.9 times less. That is predicted, not
measured, and leaves launches out: there are three or more per step in place of one. At 10 µs each, two more launches
are made up for where 64·B·N² is 150 MB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import moved
from ._launch import check_gammas, check_runnable, check_tensor, device_sizes, split_rows
from .gamma_step import pick_config


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. Memory layout depends on N and M
# alone, so for the others it would be wasted work.
@triton.jit(do_not_specialize=["ROWS", "K", "stride_credit"])
def _gamma_read_kernel(
    gamma_ptrs,  # S of [B, K, N, M]
    credit_ptr,  # [S, B, N]
    grad_ptr,  # [parts, K, N, M]
    ROWS,  # batch rows of one part; B = parts · ROWS
    K,
    N,
    M,
    stride_credit,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers of Γ that one memory access moves; divides M
):
    M = M // VECTOR * VECTOR  # leaves M as it is, and shows the compiler that VECTOR divides it
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

    # Offsets that grow with B, K, N and M need 64 bits; those inside a tile fit in 32.
    corner = (k * N + i0) * M + j0
    tile = row[:, None] * M + col[None, :]
    wide_k = tl.cast(K, tl.int64)

    gamma_ptrs = moved(gamma_ptrs, b0 * K * N * M + corner)
    credit_ptr += b0 * N + i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(ROWS):
        # What no credit reads counts as zero, even where Γ is NaN: a reset forgets.
        for nu in tl.static_range(len(gamma_ptrs)):
            gamma = tl.load(gamma_ptrs[nu] + tile, mask=inside, other=0.0).to(tl.float32)
            credit = tl.load(credit_ptr + nu * tl.cast(stride_credit, tl.int64) + row, mask=in_n, other=0.0)[
                :, None
            ]
            total += credit * tl.where(credit == 0.0, 0.0, gamma)
        gamma_ptrs = moved(gamma_ptrs, wide_k * N * M)
        credit_ptr += N
    tl.store(grad_ptr + part * wide_k * N * M + corner + tile, total, mask=inside)


def gamma_read(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    """The gradient that a credit reads from the sensitivity Γ (paper, eq. 14). Nothing is mutated.

        G^k = Σ_{b,ν} credit^ν ⊙_rows Γ^{ν,k}

    Arithmetic is in float32. The batch is summed in a fixed order. Where Γ is too small to fill the GPU and the batch
    is large, programs sum parts of the batch, and a second pass adds those up. Two runs on one GPU agree in every bit.

    Args:
        gammas: Γ, one tensor (B, K, N, M) per state, S of at most 4, contiguous, float32 or bfloat16. Fast where a row
            of M numbers is a multiple of 16 bytes.
        credit: ∂L/∂(state), (S, B, N) float32, contiguous beyond its first dimension.

    Returns:
        The gradient (K, N, M) float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    batch, matrices, units, fan_in = check_gammas(gammas)
    gamma, states = gammas[0], len(gammas)
    check_tensor("credit", credit, (states, batch, units), gamma, any_stride=1)
    check_runnable(_gamma_read_kernel, "gammas", gamma)

    rows = split_rows(states * gamma.nbytes // batch, batch, device_sizes(gamma).multiprocessors)
    parts = batch // rows
    gradients = torch.empty(parts, matrices, units, fan_in, dtype=torch.float32, device=gamma.device)
    config = pick_config(units, fan_in, gamma.dtype, False, states)
    tiles = triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m)
    with torch.cuda.device_of(gamma):
        _gamma_read_kernel[(tiles, matrices, parts)](
            tuple(gammas),
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
