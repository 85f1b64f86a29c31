"""Exact RTRL of a layer whose recurrent weights are block-diagonal: each head's γ one step on, in place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, vector_width

# A program holds all rows of a head's γ: states of a unit times units of a head, 128 at most.
MAX_STATES, MAX_UNITS = 2, 64
PRECISIONS = ("ieee", "tf32", "tf32x3")


# The tile is all that sets a layout: no size shall compile the kernel anew when it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["B", "H", "b", "K", "M", "stride_phi", "stride_delta"])
def _rtrl_heads_kernel(
    gamma_ptr,  # [B, H, S, b, K, b, M]: state, its unit, matrix, the matrix's row i, its column j
    jacobian_ptr,  # [B, H, S·b, S·b]
    phi_ptr,  # [S, B, K, H·b]
    y_ptr,  # [B, K, H, M] with PER_HEAD, else [B, K, M]
    delta_ptr,  # [S, B, H·b], or None to advance only
    grad_ptr,  # [H, K, b, M], or None with delta_ptr
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
    BLOCK_R: tl.constexpr,  # γ's rows, S·b, or more
    BLOCK_P: tl.constexpr,  # columns
    BLOCK_K: tl.constexpr,  # rows of γ that one matrix product takes
    VECTOR: tl.constexpr,  # a divisor of γ's columns: numbers of γ that one access moves
    VECTOR_J: tl.constexpr,  # a divisor of γ's rows: numbers of J that one access moves
):
    # One program: all rows and some columns of one head's γ, over the whole batch. So it can write γ where it
    # has read it, and the batch sum stays in registers.

    # γ's rows and columns, and the compiler sees what divides them.
    rows = S * b // VECTOR_J * VECTOR_J
    columns = K * b * M // VECTOR * VECTOR
    tiles = tl.cdiv(columns, BLOCK_P)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    c0 = (tl.program_id(0) % tiles) * BLOCK_P

    row = tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_P)
    in_r = row < rows
    in_p = c0 + col < columns

    # Column by column, matrix k's number (i, j); where it finds φ and y in a head's part of a batch row.
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

    # 64 bits for what grows with B, and with rows of γ.
    wide = tl.cast(columns, tl.int64)
    total = tl.zeros((BLOCK_P,), tl.float32)
    # What is the same on every round is made anew: addresses and masks of a whole tile, kept over the product,
    # would spill registers.
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
            at = tl.where(row < b, row, row - b + tl.cast(stride_delta, tl.int64))
            delta = tl.load(delta_ptr + unit0 + at, mask=in_r, other=0.0)
            total += tl.sum(delta[:, None] * new, axis=0)
        tl.debug_barrier()  # every thread has read its part of the tile
        tl.store(
            tile_ptr + row.to(tl.int64)[:, None] * wide + col[None, :],
            new,
            mask=in_r[:, None] & in_p[None, :],
        )

        # φ y goes to one row a state of each column. To read those again is less than to ask every number of
        # the tile whether it is one.
        y = tl.load(y_ptr + n * K * (H if PER_HEAD else 1) * M + y_at, mask=in_p, other=0.0)
        phi_at_n = phi_ptr + n * K * units + h * b + phi_at
        enters0 = tl.load(phi_at_n, mask=in_p, other=0.0) * y
        if delta_ptr is not None:
            total += tl.load(delta_ptr + unit0 + i, mask=in_p, other=0.0) * enters0
        if S == 2:
            enters1 = tl.load(phi_at_n + stride_phi, mask=in_p, other=0.0) * y
            if delta_ptr is not None:
                total += tl.load(delta_ptr + unit0 + stride_delta + i, mask=in_p, other=0.0) * enters1
        own_ptr = tile_ptr + i * wide + col
        tl.debug_barrier()  # every thread has written its part of the tile
        own0 = tl.load(own_ptr, mask=in_p, other=0.0)
        if S == 2:
            own1 = tl.load(own_ptr + b * wide, mask=in_p, other=0.0)
            tl.store(own_ptr + b * wide, own1 + enters1, mask=in_p)
        tl.store(own_ptr, own0 + enters0, mask=in_p)

    if delta_ptr is not None:
        tl.store(grad_ptr + h * wide + c0 + col, total, mask=in_p)


class Config(NamedTuple):
    """One program's tile of γ, rows of one product, numbers of one access to γ and to J, and warps.

    registers: at most so many a thread, on NVIDIA. Without a limit its compiler spills one or two to fit one
    program more on a multiprocessor.
    """

    block_r: int
    block_p: int
    block_k: int
    vector: int
    vector_j: int
    num_warps: int
    registers: int


def pick_config(rows: int, columns: int, precision: str) -> Config:
    """The tile for a head's γ of S·b ≤ 128 rows and K·b·M columns. Pure, for in place nothing can be tuned.

    Of 32 lanes and four warps a thread holds 16 or 32 numbers of γ, which leaves room for three or more
    programs a multiprocessor. With 128 rows J is larger than the tile: float32 products take twice the
    columns, and two programs; operands of tensor cores would spill then. One stage: loads in flight take
    registers, and the other programs have work meanwhile.
    """
    vector, vector_j = vector_width(columns, torch.float32), vector_width(rows, torch.float32)
    block_r = max(16, triton.next_power_of_2(rows))
    registers = 255
    if vector == 1:
        # An address and a mask a number: fewer numbers a thread.
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
    """Advance γ of every head in place by one step; with delta, read the gradient in the same pass.

    The exact sensitivity (paper, eq. 15) of a layer whose units see only units of their own head, H heads of
    b units: a layer of N = H·b units has H sensitivities of S·b rows instead of one of S·N.

        γ_h[(ν, r), (k, i, j)] ← Σ_(ν', r') J_h[(ν, r), (ν', r')] γ_h[(ν', r'), (k, i, j)] + [r = i] φ^{ν,k}_i y^k_j
        G_h[k, i, j]           = Σ_batch Σ_(ν, r) δ^ν_r γ_h[(ν, r), (k, i, j)]                      after the step

    i and r count a head's units; φ, δ, and y where it is a state, are the head's part. A call takes matrices
    of one shape: recurrent blocks (M = b), input matrices (M features) or biases (M = 1, y = 1). The batch is
    summed in order: two runs agree in every bit.

    Args:
        gamma: γ (B, H, S, b, K, b, M) float32, contiguous, S of 1 or 2 and b of at most 64. Mutated. Fast
            where four divides K·b·M.
        jacobian: J (B, H, S·b, S·b) float32, contiguous, row (ν, r) by column (ν', r'). Zero where the step
            resets a row of the batch, whose γ must be finite. Fast where four divides S·b.
        phi: (S, B, K, N) float32, zero where a matrix does not enter a state.
        y: (B, K, H, M) float32, a part for each head, or (B, K, M), one for all; contiguous.
        delta: (S, B, N) float32, or None to advance only.
        precision: of the products J γ. "tf32" keeps 10 bits of each factor, an error of 2⁻¹⁰ or less of each
            product, and "tf32x3", which NVIDIA alone has, makes three such products for nearly all 23.

    The first index of phi and delta may have any stride, so that one step of a sequence needs no copy; what it
    indexes must be contiguous.

    Returns:
        The gradient (H, K, b, M) float32, or None without delta.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0, more than 2 states or more than 64 units a head among them),
            device, stride or precision; tensors that aren't on a GPU, where kernels aren't interpreted.
    """
    batch, heads, states, units, matrices, _, fan_in = check_dims("gamma", gamma, "BHSbKbM")
    check_tensor("gamma", gamma, (batch, heads, states, units, matrices, units, fan_in), gamma)
    if states > MAX_STATES:
        raise ValueError(f"gamma must have at most {MAX_STATES} states S, got {states}")
    if units > MAX_UNITS:
        raise ValueError(f"gamma must have at most {MAX_UNITS} units b a head, got {units}")
    rows, columns = states * units, matrices * units * fan_in
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
