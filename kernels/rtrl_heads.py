"""Advance exact RTRL's sensitivity γ by one step, in place, for block-diagonal recurrent weights: H heads of b units.

Recursion (paper, eq. 15, head by head; J_h is the head's full S·b × S·b Jacobian):

    γ_h ← J_h γ_h + R_h        R_h[(ν, i), (k, i, j)] = φ^{ν,k}_i y^k_j
    G_h = Σ_batch δ_hᵀ γ_h

Grid: H · (tiles of BLOCK_P of γ_h's K·b·M columns).
A program owns all S·b rows and some columns of one head's γ, and loops over the batch. So it can write γ to where it
has read it from, and the gradient's sum over the batch stays in registers. Per batch row it reads J_h, its columns
of γ, φ, y and δ, and writes its columns of γ; at the end it writes its columns of the gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_planes
from ._launch import MAX_STATES, check_dims, check_runnable, check_tensor, vector_width

# A program holds all rows of a head's γ, S·b of them: states times units per head.
MAX_UNITS, MAX_ROWS = 64, 128
PRECISIONS = ("ieee", "tf32", "tf32x3")


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on any
# of them, only on the tile, so it would be wasted work.
@triton.jit(do_not_specialize=["B", "H", "b", "K", "M", "stride_phi", "stride_delta"])
def _rtrl_heads_kernel(
    gamma_ptr,  # [B, H, S, b, K, b, M]: by state, its unit, matrix, the matrix's row i, its column j; mutated
    jacobian_ptr,  # [B, H, S·b, S·b]
    phi_ptr,  # [S, B, K, H·b]
    y_ptr,  # [B, K, H, M] with PER_HEAD, else [B, K, M]
    delta_ptr,  # [S, B, H·b], or None to advance only
    grad_ptr,  # [H, K, b, M]: written; or None with delta_ptr
    B,
    H,
    b,
    K,
    M,
    stride_phi,
    stride_delta,
    S: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of the tile of γ, S·b or more
    BLOCK_P: tl.constexpr,  # columns of the tile of γ
    BLOCK_K: tl.constexpr,  # rows of γ that one `tl.dot` sums over
    VECTOR: tl.constexpr,  # numbers of γ that one memory access moves; divides its columns
    VECTOR_J: tl.constexpr,  # numbers of J that one memory access moves; divides its rows
):
    # γ's rows and columns; the divisions leave them as they are, and show the compiler what divides them.
    rows = S * b // VECTOR_J * VECTOR_J
    columns = K * b * M // VECTOR * VECTOR
    tiles = tl.cdiv(columns, BLOCK_P)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    c0 = (tl.program_id(0) % tiles) * BLOCK_P

    row = tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_P)
    in_r = row < rows
    in_p = c0 + col < columns

    # Each column of γ belongs to entry (i, j) of matrix k; phi_at and y_at are where it finds its φ and y.
    i = (c0 + col) // M % b
    j = (c0 + col) % M
    k = (c0 + col) // (b * M)
    units = H * b
    phi_at = k * units + i
    if PER_HEAD:
        y_at = k * (H * M) + j
        y_ptr += h * M
    else:
        y_at = k * M + j

    # Offsets that grow with B, or with rows of γ, need 64 bits.
    wide = tl.cast(columns, tl.int64)
    total = tl.zeros((BLOCK_P,), tl.float32)
    # disable_licm: the compiler must not move what is the same in every iteration out of the loop. Addresses and masks
    # of a whole tile, kept in registers over the product, would spill.
    for n in tl.range(0, B, num_stages=1, disable_licm=True):
        n = tl.cast(n, tl.int64)
        head = n * H + h
        tile_ptr = gamma_ptr + head * rows * wide + c0
        square_ptr = jacobian_ptr + head * rows * rows

        new = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        for r0 in range(0, rows, BLOCK_K):
            source = r0 + tl.arange(0, BLOCK_K)
            in_k = source < rows
            jacobian = tl.load(
                square_ptr + row[:, None] * rows + source[None, :],
                mask=in_r[:, None] & in_k[None, :],
                other=0.0,
            )
            old = tl.load(
                tile_ptr + source.to(tl.int64)[:, None] * wide + col[None, :],
                mask=in_k[:, None] & in_p[None, :],
                other=0.0,
            )
            new = tl.dot(jacobian, old, new, input_precision=PRECISION)

        unit0 = n * units + h * b
        if delta_ptr is not None:
            at = row.to(tl.int64)
            for nu in tl.static_range(1, S):
                at = tl.where(row < nu * b, at, at - b + stride_delta)
            delta = tl.load(delta_ptr + unit0 + at, mask=in_r, other=0.0)
            total += tl.sum(delta[:, None] * new, axis=0)
        tl.debug_barrier()  # every thread has read its part of the tile
        tl.store(
            tile_ptr + row.to(tl.int64)[:, None] * wide + col[None, :],
            new,
            mask=in_r[:, None] & in_p[None, :],
        )

        # φ y is added to one number per state in each column. Loading those again costs less than a test on every
        # number of the tile.
        y = tl.load(y_ptr + n * K * (H if PER_HEAD else 1) * M + y_at, mask=in_p, other=0.0)
        phi_at_n = phi_ptr + n * K * units + h * b + phi_at
        immediate = ()
        for nu in tl.static_range(S):
            immediate = immediate + (
                tl.load(phi_at_n + nu * tl.cast(stride_phi, tl.int64), mask=in_p, other=0.0) * y,
            )
            if delta_ptr is not None:
                credit = tl.load(
                    delta_ptr + unit0 + nu * tl.cast(stride_delta, tl.int64) + i, mask=in_p, other=0.0
                )
                total += credit * immediate[nu]
        own_ptr = tile_ptr + i * wide + col
        tl.debug_barrier()  # every thread has written its part of the tile
        own = load_planes(own_ptr, 0, b * wide, in_p, S)
        for nu in tl.static_range(S):
            tl.store(own_ptr + nu * b * wide, own[nu] + immediate[nu], mask=in_p)

    if delta_ptr is not None:
        tl.store(grad_ptr + h * wide + c0 + col, total, mask=in_p)


class Config(NamedTuple):
    """How one program is laid out.

    block_r, block_p  rows and columns of its tile of γ
    block_k           rows of γ that one matrix product sums over
    vector, vector_j  numbers of γ and of J that one memory access moves
    num_warps         Triton's option
    registers         most registers per thread, on NVIDIA. Without a limit its compiler spills one or two, to fit one
                      more program on a multiprocessor.
    """

    block_r: int
    block_p: int
    block_k: int
    vector: int
    vector_j: int
    num_warps: int
    registers: int


def pick_config(rows: int, columns: int, precision: str) -> Config:
    """The layout for a head's γ of S·b ≤ 128 rows and K·b·M columns.

    A pure function, no autotuner: an autotuner runs a kernel repeatedly, and this one works in place.

    With four warps of 32 threads, a thread holds 16 or 32 numbers of γ, which leaves room for three or more programs
    per multiprocessor. With 128 rows J is larger than the tile: float32 products then take twice the columns, and two
    programs fit; with operands of tensor cores that would spill. One stage: loading ahead takes registers, and the
    other programs have work in the meantime.
    """
    vector, vector_j = vector_width(columns, torch.float32), vector_width(rows, torch.float32)
    block_r = max(16, triton.next_power_of_2(rows))
    registers = 255
    if vector == 1:
        # Each number has an address and a mask of its own, so a thread can hold fewer numbers.
        block_p = {16: 128, 32: 128, 64: 32, 128: 16}[block_r]
        vector_j = 1
    elif precision == "ieee":
        block_p = {16: 128, 32: 128, 64: 64, 128: 64}[block_r]
        registers = 255 if block_r == 128 else 168
    else:
        block_p = {16: 128, 32: 128, 64: 64, 128: 32}[block_r]
    return Config(block_r, block_p, 16, vector, vector_j, num_warps=4, registers=registers)


def rtrl_heads_(
    gamma: Tensor,
    jacobian: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    *,
    precision: Literal["ieee", "tf32", "tf32x3"] = "ieee",
) -> Tensor | None:
    """Advance exact RTRL's γ of every head in place by one step; with delta, return the step's gradient (eq. 15).

    γ is the exact sensitivity of a layer whose units read only units of their own head. With H heads of b units, the
    layer of N = H·b units has H sensitivities of S·b rows instead of one of S·N.

        γ_h[(ν, r), (k, i, j)] ← Σ_(ν', r') J_h[(ν, r), (ν', r')] γ_h[(ν', r'), (k, i, j)] + [r = i] φ^{ν,k}_i y^k_j
        G_h[k, i, j]           = Σ_batch Σ_(ν, r) δ^ν_r γ_h[(ν, r), (k, i, j)]                      after the step

    i, r and r' count the units of a head; φ, δ, and y where it is a state, are the head's own part. One call takes
    matrices of one shape: recurrent blocks (M = b), input matrices (M features) or biases (M = 1, y = 1). The sum over
    the batch has a fixed order: two runs agree in every bit.

    Args:
        gamma: γ (B, H, S, b, K, b, M) float32, contiguous, S of at most 4, b of at most 64 and S·b of at most 128.
            Mutated. Fast where four divides K·b·M.
        jacobian: J (B, H, S·b, S·b) float32, contiguous, row (ν, r) by column (ν', r'). Zero for batch rows that the
            step resets; their γ must be finite. Fast where four divides S·b.
        phi: the immediate sensitivity φ, (S, B, K, N) float32, zero where a matrix doesn't enter a state.
        y: what each matrix reads: (B, K, H, M) float32 where each head reads its own, or (B, K, M) where all read the
            same; contiguous.
        delta: instantaneous credit δ = ∂L(t)/∂(state), (S, B, N) float32, or None to advance γ only.
        precision: of the products J γ. "tf32" keeps 10 bits of each factor, an error of 2⁻¹⁰ or less of each product.
            "tf32x3", on NVIDIA only, makes three such products to keep nearly all 23 bits.

    The first dimension of phi and delta may have any stride, so that one step of a sequence needs no copy; the rest
    must be contiguous.

    Returns:
        The gradient (H, K, b, M) float32, or None without delta.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0, more than 4 states, more than 64 units per head or more than
            128 rows S·b among them), device, stride or precision; or tensors that aren't on a GPU while kernels aren't
            interpreted.
    """
    batch, heads, states, units, matrices, _, fan_in = check_dims("gamma", gamma, "BHSbKbM")
    check_tensor("gamma", gamma, (batch, heads, states, units, matrices, units, fan_in), gamma)
    if states > MAX_STATES:
        raise ValueError(f"gamma must have at most {MAX_STATES} states S, got {states}")
    if units > MAX_UNITS:
        raise ValueError(f"gamma must have at most {MAX_UNITS} units b a head, got {units}")
    rows, columns = states * units, matrices * units * fan_in
    if rows > MAX_ROWS:
        raise ValueError(f"gamma must have at most {MAX_ROWS} rows S·b a head, got {states}·{units}")
    check_tensor("jacobian", jacobian, (batch, heads, rows, rows), gamma)
    check_tensor("phi", phi, (states, batch, matrices, heads * units), gamma, any_stride=1)
    per_head = isinstance(y, Tensor) and y.dim() == 4
    if isinstance(y, Tensor) and y.dim() not in (3, 4):
        raise ValueError(f"y must have shape (B, K, M) or (B, K, H, M), got {tuple(y.shape)}")
    check_tensor("y", y, (batch, matrices, heads, fan_in) if per_head else (batch, matrices, fan_in), gamma)
    if delta is not None:
        check_tensor("delta", delta, (states, batch, heads * units), gamma, any_stride=1)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    check_runnable(_rtrl_heads_kernel, "gamma", gamma)

    gradient = None
    if delta is not None:
        gradient = torch.empty(heads, matrices, units, fan_in, dtype=torch.float32, device=gamma.device)
    config = pick_config(rows, columns, precision)
    limits = {} if torch.version.hip else {"maxnreg": config.registers}
    with torch.cuda.device_of(gamma):
        _rtrl_heads_kernel[(heads * triton.cdiv(columns, config.block_p),)](
            gamma,
            jacobian,
            phi,
            y,
            delta,
            gradient,
            batch,
            heads,
            units,
            matrices,
            fan_in,
            phi.stride(0),
            0 if delta is None else delta.stride(0),
            S=states,
            PER_HEAD=per_head,
            PRECISION=precision,
            BLOCK_R=config.block_r,
            BLOCK_P=config.block_p,
            BLOCK_K=config.block_k,
            VECTOR=config.vector,
            VECTOR_J=config.vector_j,
            num_warps=config.num_warps,
            num_stages=1,
            **limits,
        )
    return gradient
