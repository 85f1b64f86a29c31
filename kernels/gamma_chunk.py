"""Advance RFP's sensitivity Γ over a chunk of C steps, in place: Γ is read once and written once for all C.

Recursion (paper, eq. 14 unrolled over C steps; M(t) is each unit's own S×S transition):

    Γ^{ν,k} ← Σ_ν' R(0)^{νν'} ⊙_rows Γ₀^{ν',k} + Σ_t U^{ν,k}(t) y^k(t)ᵀ
    R(t) = M(C) … M(t+1),        U^{ν,k}(t) = Σ_ν' R(t)^{νν'} φ^{ν',k}(t)        both by `reverse_scan.arriving`

Grid: (tiles of BLOCK_N × BLOCK_M of one N × M matrix, K matrices).
A program owns one tile of one matrix and loops over the batch, so that the sum over the batch of the gradient that is
read from Γ₀ stays in registers. Per batch row it reads the tile of Γ₀ of all S states, R(0) and the credit of its
units, and U(t) and y(t) of all C steps; it writes the tile of Γ. At the end it writes its tile of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import moved, on_states
from ._launch import check_dims, check_gammas, check_runnable, check_tensor, vector_width


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on B, C
# or K, so it would be wasted work.
@triton.jit(do_not_specialize=["C", "B", "K"])
def _gamma_chunk_kernel(
    gamma_ptrs,  # S of [B, K, N, M]
    whole_ptr,  # [S, S, B, N], R(0)
    u_ptr,  # [S, C, B, K, N], U
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
    VECTOR: tl.constexpr,  # numbers of Γ that one memory access moves; divides M
    VECTOR_U: tl.constexpr,  # numbers of U that one memory access moves; divides N
    BLOCK_C: tl.constexpr,  # steps that one `tl.dot` sums over; 1 for outer products in registers
):
    S: tl.constexpr = len(gamma_ptrs)
    # The chunk's own part of the gradient, Σ E yᵀ, would need a third accumulator here: a GEMM of its own makes it.

    # These leave N and M as they are, and show the compiler what divides them.
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

    # Offsets that grow with B, C, K, N and M need 64 bits (`wide_…`, `…_step`, `plane`, `corner`); those inside a
    # tile fit in 32. plane: numbers of one (B, N) array.
    corner = (k * N + i0) * M + j0
    tile = row[:, None] * M + col[None, :]
    wide_k = tl.cast(K, tl.int64)
    wide_n = tl.cast(N, tl.int64)
    u_step = wide_k * N * B
    y_step = wide_k * M * B
    plane = wide_n * B

    gamma_ptrs = moved(gamma_ptrs, corner)
    whole_ptr += i0
    u_ptr += k * N + i0
    y_ptr += k * M + j0
    if credit_ptr is not None:
        credit_ptr += i0

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(B):
        old = ()
        for nu in tl.static_range(S):
            old = old + (tl.load(gamma_ptrs[nu] + tile, mask=inside, other=0.0).to(tl.float32),)
        r = ()
        for each in tl.static_range(S * S):
            r = r + (tl.load(whole_ptr + each * plane + row, mask=in_n, other=0.0)[:, None],)
        # What no credit reads and what is forgotten counts as zero, even where Γ is NaN: a reset selects.
        if credit_ptr is not None:
            for nu in tl.static_range(S):
                credit = tl.load(credit_ptr + nu * plane + row, mask=in_n, other=0.0)[:, None]
                total += credit * tl.where(credit == 0.0, 0.0, old[nu])
        forgets = r[0] == 0.0
        for each in tl.static_range(1, S * S):
            forgets = forgets & (r[each] == 0.0)
        before = ()
        for nu in tl.static_range(S):
            before = before + (tl.where(forgets, 0.0, old[nu]),)
        new = on_states(r, before, S)

        # The products accumulate into the transformed Γ₀: accumulators of their own would take registers, and spill.
        if BLOCK_C == 1:
            u_at = u_ptr + row
            y_at = y_ptr + col
            for _t in range(C):
                y = tl.load(y_at, mask=in_m, other=0.0)[None, :]
                sums = ()
                for nu in tl.static_range(S):
                    u = tl.load(u_at + nu * C * u_step, mask=in_n, other=0.0)[:, None]
                    sums = sums + (new[nu] + u * y,)
                new = sums
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
                sums = ()
                for nu in tl.static_range(S):
                    u = tl.load(u_at + nu * C * u_step, mask=u_mask, other=0.0)
                    sums = sums + (tl.dot(u, y, new[nu], input_precision="tf32"),)
                new = sums

        for nu in tl.static_range(S):
            tl.store(gamma_ptrs[nu] + tile, new[nu].to(gamma_ptrs[nu].dtype.element_ty), mask=inside)
        gamma_ptrs = moved(gamma_ptrs, wide_k * N * M)
        whole_ptr += wide_n
        u_ptr += wide_k * N
        y_ptr += wide_k * M
        if credit_ptr is not None:
            credit_ptr += wide_n

    if credit_ptr is not None:
        tl.store(grad_ptr + corner + tile, total, mask=inside)


class Config(NamedTuple):
    """How one program is laid out.

    block_n, block_m       rows and columns of its tile of Γ
    block_c                steps that one matrix product sums over; 1 for outer products in registers
    vector                 numbers of Γ that one memory access moves
    num_warps, num_stages  Triton's options of the same names
    """

    block_n: int
    block_m: int
    block_c: int
    vector: int
    num_warps: int
    num_stages: int


def pick_config(N: int, M: int, C: int, dtype: torch.dtype, precision: str, S: int = 2) -> Config:
    """The layout for Γ (B, K, N, M) of S states over C steps.

    A pure function, no autotuner: an autotuner runs a kernel repeatedly, and this one works in place.

    A thread holds 16 numbers of each state, 8 where there are more than two, which leaves room for two or more programs
    per multiprocessor.
    Tensor cores pay from 32 steps per chunk on, and need tiles of at least 64 rows. For shorter chunks, and in float32
    ("ieee"), outer products in registers are as fast and take less room. With more than two states no
    tiles for tensor cores are tried.
    """
    fewer = 1 if S <= 2 else 2
    vector = vector_width(M, dtype)
    if vector == 1:
        # Each number has an address and a mask of its own: with more than half as many numbers per thread, registers
        # spill.
        return Config(4 if S <= 2 else 1, 64, 1, vector, num_warps=1, num_stages=1)
    if triton.cdiv(N, 32) * triton.cdiv(M, 64) < 64:
        # Programs of four warps would be too few to fill a GPU: take one warp each, with as many numbers per thread.
        return Config(8 // fewer, 64, 1, vector, num_warps=1, num_stages=1)
    if precision == "tf32" and C >= 32 and S <= 2:
        # One stage: loading the next operands ahead takes registers, and room for one program per multiprocessor.
        return Config(64, 32, 32, vector, num_warps=4, num_stages=1)
    return Config(32 // fewer, 64, 1, vector, num_warps=4, num_stages=1)


def gamma_chunk_(
    gammas: Sequence[Tensor],
    whole: Tensor,
    arriving: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    precision: Literal["ieee", "tf32"] = "ieee",
) -> Tensor | None:
    """Advance Γ in place by C steps; with credit, return what the chunk's gradient takes from the Γ before it.

        Γ^{ν,k} ← Σ_ν' R(0)^{νν'} ⊙_rows Γ₀^{ν',k} + Σ_t U^{ν,k}(t) y^k(t)ᵀ
        G^k     = Σ_{b,ν} credit^ν ⊙_rows Γ₀^{ν,k},          credit = M(1)ᵀ λ(1)

    (Paper, eq. 14, over C steps; R and U are this module's.) The gradient's other part, from the steps of the chunk
    themselves, is Σ_{t,b} E^k(t) y^k(t)ᵀ: one GEMM, which the caller runs. Arithmetic is in float32, except for the
    products U yᵀ under "tf32"; Γ in bfloat16 is rounded to nearest once, at the end. The sum over the batch has a
    fixed order: two runs agree in every bit.

    Args:
        gammas: Γ₀, one tensor (B, K, N, M) per state, S of at most 4, contiguous, float32 or bfloat16. Mutated: Γ after
            the chunk. Fast where a row of M numbers is a multiple of 16 bytes.
        whole: R(0), the product of the chunk's transitions, (S, S, B, N) float32, contiguous; the first index is the
            row ν.
        arriving: U, what the immediate sensitivity φ of each step has become at the chunk's end, (S, C, B, K, N)
            float32, contiguous, C ≥ 1.
        y: what each matrix reads at each step, (C, B, K, M) float32, contiguous.
        credit: what the chunk passes back to the states before it, (S, B, N) float32, contiguous; or None.
        precision: of the products U yᵀ. "tf32" allows tensor cores, which keep 10 bits of each factor: an error
            of 2⁻¹⁰ or less of each product. They are used where C is 32 or more, S is at most 2,
            and Γ is large enough to fill the GPU.

    Returns:
        That part of the gradient, (K, N, M) float32, or None without credit.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device, stride or precision; or tensors that
            aren't on a GPU while kernels aren't interpreted.
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
    config = pick_config(units, fan_in, steps, gamma.dtype, precision, states)
    grid = (triton.cdiv(units, config.block_n) * triton.cdiv(fan_in, config.block_m), matrices)
    with torch.cuda.device_of(gamma):
        _gamma_chunk_kernel[grid](
            tuple(gammas),
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
