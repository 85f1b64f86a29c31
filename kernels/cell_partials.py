"""A cell's partials from what its forward pass saved: written as arrays, or made by RFP's scan backward in time.

For any cell (`_cell.CellFunctions`), with S states, J inputs, K matrices and F saved numbers:

    M^{νν'} = ∂F_ν/∂c^ν' + Σ_{k reads ν'} φ^{ν,k} w^k         w^k: the diagonal of matrix k; zero where reset
    λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)                              credit (paper, eq. 14 in dual form)
    E(t) = Σ_ν λ^ν(t) ∂F_ν/∂p(t), and of the inputs           what enters gates and inputs

`_linearize_kernel` writes the partials and M. Grid: (tiles of BLOCK of the B·N units) · (groups of `steps` steps). A
program, one warp, owns BLOCK units for those steps, with the diagonals in registers; per step it reads S + F + J
numbers of each unit.

`_dual_kernel` runs the credit's recursion and makes the partials of each step as it goes. Grid: (tiles of BLOCK of the
B·N units, blocks of time). A program, one warp, owns BLOCK units and walks its block of time backward, with λ and the
diagonals in registers; per step it reads 2 S + F + J numbers of each unit and writes the credits. `reverse_scan` says
how blocks of time are joined, for which `_dual_summary_kernel` makes the summaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import (
    add,
    identity,
    kept,
    load_at,
    load_planes,
    part,
    passes,
    store_planes,
    times,
    transposed_times,
    zeros,
)
from ._cell import CellFunctions, check_trajectory, load_diagonals, load_step
from ._launch import check_runnable, check_tensor, device_sizes, vector_width
from .reverse_scan import ScanConfig, pick_steps, store_summary, through_blocks


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on T or
# on steps, so for those it would be wasted work.
@triton.jit(do_not_specialize=["T", "steps", "stride_before"])
def _linearize_kernel(
    x_ptr,  # [J, T, B, N]
    saved_ptr,  # [T, B, F, N]
    before_ptr,  # [S, T, B, N]
    own_ptrs,  # K of [N]: the matrices' diagonals
    resets_ptr,  # [T, B], or None
    out_ptr,  # [FOUND + S², T, B, N]: written
    T,
    steps,
    BN,
    N,
    stride_before,
    own_strides,
    PARTIALS: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
    FOUND: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    # A program's units may span batch rows. These leave N, BN and the stride as they are, and show the compiler what
    # divides them.
    N = N // VECTOR * VECTOR
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(BN, BLOCK)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = (unit // N).to(tl.int64)
    first = (tl.program_id(0) // tiles) * steps
    count = tl.minimum(first + steps, T) - first
    plane = tl.cast(BN, tl.int64) * T

    w = load_diagonals(own_ptrs, own_strides, (unit % N).to(tl.int64), mask)
    for step in tl.range(0, count):
        t = tl.cast(first + step, tl.int64)
        c, v, x, keep = load_step(
            x_ptr, saved_ptr, before_ptr, resets_ptr, t, unit, row, N, BN, plane, stride_before, mask, S, J, F
        )
        found = PARTIALS(c, v, x, w)
        at = t * BN + unit
        for k in tl.static_range(FOUND):
            tl.store(out_ptr + k * plane + at, found[k], mask=mask)
        for k in tl.static_range(S * S):
            entry = tl.where(keep, found[FOUND + k], 0.0)
            tl.store(out_ptr + (FOUND + k) * plane + at, entry, mask=mask)


@triton.jit(do_not_specialize=["T", "block_steps", "stride_before"])
def _dual_summary_kernel(
    x_ptr,  # [J, T, B, N]
    saved_ptr,  # [T, B, F, N]
    before_ptr,  # [S, T, B, N]
    own_ptrs,  # K of [N]: the matrices' diagonals
    delta_ptrs,  # S of [T, B, N], or None for zeros
    resets_ptr,  # [T, B] of 32 bits, or None; narrower loads can't be issued steps ahead
    product_ptr,  # [S, S, G', B·N]: written, R of each of the G' blocks of time after the first
    local_ptr,  # [S, G', B·N]: written, ℓ of each
    T,
    block_steps,
    BN,
    N,
    stride_before,
    own_strides,
    TRANSITION: tl.constexpr,
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    N = N // VECTOR * VECTOR
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = (unit // N).to(tl.int64)
    first = (tl.program_id(1) + 1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T

    w = load_diagonals(own_ptrs, own_strides, (unit % N).to(tl.int64), mask)
    r = identity(S, BLOCK)
    later = zeros(S, BLOCK)
    for step in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + count - 1 - step, tl.int64)
        c, v, x, keep = load_step(
            x_ptr, saved_ptr, before_ptr, resets_ptr, t, unit, row, N, BN, plane, stride_before, mask, S, J, F
        )
        delta = load_at(delta_ptrs, t * BN + unit, mask)
        m = TRANSITION(c, v, x, w)
        later = transposed_times(m, add(delta, later), S)
        if resets_ptr is None:
            r = times(r, m, S)
        else:  # once R is zero it stays so
            later = kept(keep, later)
            r = kept(keep & passes(r), times(r, m, S))

    store_summary(product_ptr, local_ptr, r, later, unit, BN, mask)


@triton.jit(do_not_specialize=["T", "block_steps", "stride_before"])
def _dual_kernel(
    x_ptr,  # [J, T, B, N]
    saved_ptr,  # [T, B, F, N]
    before_ptr,  # [S, T, B, N]
    own_ptrs,  # K of [N]: the matrices' diagonals
    delta_ptrs,  # S of [T, B, N], or None for zeros
    resets_ptr,  # [T, B] of 32 bits, or None; narrower loads can't be issued steps ahead
    carry_ptr,  # [S, B, N], or None for zero
    product_ptr,  # [S, S, G', B·N], R of each block of time after the first; or None where there is one block
    local_ptr,  # [S, G', B·N], ℓ of each; or None with product_ptr
    written_ptrs,  # WRITTEN of [T, B, ·]: the credits that enter gates and inputs
    passed_ptr,  # [S, B, N]: written, M(1)ᵀ λ(1)
    T,
    block_steps,
    BN,
    N,
    stride_before,
    own_strides,
    DUAL: tl.constexpr,
    ROWS: tl.constexpr,  # of each array of written_ptrs: how many N its batch rows are apart
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and stride_before
):
    N = N // VECTOR * VECTOR
    BN = BN // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    row = (unit // N).to(tl.int64)
    n = unit % N
    first = tl.program_id(1) * block_steps
    count = tl.minimum(first + block_steps, T) - first
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T

    w = load_diagonals(own_ptrs, own_strides, n.to(tl.int64), mask)
    # the credit that the step after the current one passes back, M(t+1)ᵀ λ(t+1)
    later = zeros(S, BLOCK)
    if carry_ptr is not None:
        later = load_planes(carry_ptr, unit, wide_bn, mask, S)
    if product_ptr is not None:
        later = through_blocks(product_ptr, local_ptr, later, unit, BN, mask, S, STAGES)

    for step in tl.range(0, count, num_stages=STAGES):
        t = tl.cast(first + count - 1 - step, tl.int64)
        c, v, x, keep = load_step(
            x_ptr, saved_ptr, before_ptr, resets_ptr, t, unit, row, N, BN, plane, stride_before, mask, S, J, F
        )
        credit = add(load_at(delta_ptrs, t * BN + unit, mask), later)
        found = DUAL(c, v, x, w, credit)
        for k in tl.static_range(len(written_ptrs)):
            at = ROWS[k] * (t * BN + row * N) + n
            tl.store(written_ptrs[k] + at, found[k], mask=mask)
        later = part(found, len(written_ptrs), S)
        if resets_ptr is not None:
            later = kept(keep, later)

    mask = mask & (tl.program_id(1) == 0)
    store_planes(passed_ptr, unit, wide_bn, later, mask)


class Config(NamedTuple):
    """How one program of one warp is laid out.

    block  units that it owns
    steps  how many steps it takes
    """

    block: int
    steps: int


def pick_config(T: int, BN: int, warp_size: int, multiprocessors: int) -> Config:
    """The layout for partials, over T steps of B·N units. A pure function.

    Four units per thread make 128-bit accesses. A program reads the diagonals once; from a dense matrix each entry of
    4 bytes costs a memory access of 32. That is little compared with what several steps move, so a program takes
    several steps, up to eight, as long as there are still 32 programs per multiprocessor.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    return Config(block, max(1, min(8, T * tiles // (32 * multiprocessors))))


# The loads of four steps are under way at once where a step has at most so many numbers to load; else those of one.
PIPELINED_NUMBERS = 16


def pick_dual_config(
    T: int, BN: int, read: int, written: int, warp_size: int, multiprocessors: int
) -> ScanConfig:
    """The layout for the dual form, over T steps of B·N units. A pure function.

    read, written: numbers of a unit and step. Units are picked as in `pick_config`, and blocks of time by
    `reverse_scan.pick_steps`; several blocks read twice. Where a warp has 64 threads (AMD), loads wait in registers, so
    only those of one step are under way.
    """
    block = 4 * warp_size
    tiles = -(-BN // block)
    stages = 4 if warp_size == 32 and read <= PIPELINED_NUMBERS else 1
    return ScanConfig(
        block, stages, pick_steps(T, tiles, tiles * block * (2 * read + written), multiprocessors)
    )


@torch.no_grad()
def cell_linearize(
    cell: CellFunctions,
    x: Tensor,
    saved: Tensor,
    before: Tensor,
    own: Sequence[Tensor],
    resets: Tensor | None = None,
) -> Tensor:
    """The partials of a cell at every step, and RFP's transition M, in one pass (paper, eq. 14; equations at the top).

    Args:
        x: per-unit inputs, (J, T, B, N) float32, contiguous.
        saved: what the forward pass saved, (T, B, F, N) float32, contiguous.
        before: the states before the steps, (S, T, B, N) float32; where reset they count as zero. The first dimension
            may have any stride, so that `states[:, :-1]` needs no copy.
        own: the diagonals of the K matrices, (N,) float32 each, of any stride.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state was zeroed before that step. Or None.

    Nothing is mutated, and autograd doesn't follow it. Fast where four divides N.

    Returns:
        (`partials_found` + S², T, B, N) float32: the partials that aren't among `saved`; M row by row, zero where
        reset.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    steps, batch, units = check_trajectory(cell, x, saved, before, own, resets)
    check_runnable(_linearize_kernel, "x", x)
    total = batch * units
    config = pick_config(steps, total, *device_sizes(x))
    grid = (triton.cdiv(total, config.block) * triton.cdiv(steps, config.steps),)
    count = cell.partials_found + cell.states**2
    out = torch.empty(count, steps, batch, units, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _linearize_kernel[grid](
            x,
            saved,
            before,
            tuple(own),
            None if resets is None else resets.view(torch.uint8),
            out,
            steps,
            config.steps,
            total,
            units,
            before.stride(0),
            tuple(weight.stride(0) for weight in own),
            PARTIALS=cell.partials,
            S=cell.states,
            J=cell.inputs,
            F=cell.saves,
            FOUND=cell.partials_found,
            BLOCK=config.block,
            VECTOR=_vector(units, before),
            num_warps=1,
        )
    return out


@torch.no_grad()
def cell_dual(
    cell: CellFunctions,
    x: Tensor,
    saved: Tensor,
    before: Tensor,
    own: Sequence[Tensor],
    delta: Sequence[Tensor | None],
    written: Sequence[Tensor],
    resets: Tensor | None = None,
    carry: Tensor | None = None,
) -> Tensor:
    """RFP's dual form for a cell in one pass (paper, eq. 14). Partials, M and λ are never written.

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero
        E(t) = Σ_ν λ^ν(t) ∂F_ν/∂p(t), and likewise for the per-unit inputs

    Args:
        x, saved, before, own, resets: as for `cell_linearize`.
        delta: instantaneous credits δ of the S states, (T, B, N) float32 each, contiguous; None for zeros.
        written: `credits` arrays (T, B, N) float32, whose batch rows are a multiple of N apart and whose steps B times
            that. Mutated: they receive E.
        carry: credit that the steps after the last pass to it, (S, B, N) float32, contiguous; or None.

    Autograd doesn't follow it. Fast where four divides N. Where blocks of time are scanned side by side
    (`pick_dual_config`), the product of M over one block must not overflow.

    Returns:
        The credit that the first step passes to the state before it, (S, B, N) float32.

    Raises:
        As `cell_linearize`.
    """
    steps, batch, units = check_trajectory(cell, x, saved, before, own, resets)
    for name, values, count in (("delta", delta, cell.states), ("written", written, cell.credits)):
        if len(values) != count:
            raise ValueError(f"{name} must hold {count} tensors, got {len(values)}")
    for index, one in enumerate(delta):
        if one is not None:
            check_tensor(f"delta[{index}]", one, (steps, batch, units), x)
    for index, one in enumerate(written):
        check_tensor(f"written[{index}]", one, (steps, batch, units), x, any_stride=2)
        if one.stride(1) % units or (steps > 1 and one.stride(0) != batch * one.stride(1)):
            raise ValueError(
                f"written[{index}] must have batch rows a multiple of {units} apart and steps {batch} times that, got "
                f"strides {one.stride()}"
            )
    if carry is not None:
        check_tensor("carry", carry, (cell.states, batch, units), x)
    check_runnable(_dual_kernel, "x", x)
    total = batch * units
    read = 2 * cell.states + cell.inputs + cell.saves
    config = pick_dual_config(steps, total, read, cell.credits, *device_sizes(x))
    tiles, blocks = triton.cdiv(total, config.block), triton.cdiv(steps, config.steps)
    marks = None if resets is None else resets.to(torch.int32)
    passed = torch.empty(cell.states, batch, units, dtype=torch.float32, device=x.device)
    given = (x, saved, before, tuple(own), tuple(delta), marks)
    sizes = (steps, config.steps, total, units, before.stride(0), tuple(weight.stride(0) for weight in own))
    product = local = None
    constants = {
        "S": cell.states,
        "J": cell.inputs,
        "F": cell.saves,
        "BLOCK": config.block,
        "STAGES": config.stages,
        "VECTOR": _vector(units, before),
    }
    with torch.cuda.device_of(x):
        if blocks > 1:
            product = passed.new_empty(cell.states, cell.states, blocks - 1, total)
            local = passed.new_empty(cell.states, blocks - 1, total)
            _dual_summary_kernel[(tiles, blocks - 1)](
                *given, product, local, *sizes, TRANSITION=cell.transition, **constants, num_warps=1
            )
        _dual_kernel[(tiles, blocks)](
            *given,
            carry,
            product,
            local,
            tuple(written),
            passed,
            *sizes,
            DUAL=cell.dual,
            ROWS=tuple(one.stride(1) // units for one in written),
            **constants,
            num_warps=1,
        )
    return passed


def _vector(units: int, before: Tensor) -> int:
    """How many numbers one memory access may move, given N and the stride of `before`."""
    width = vector_width(units, torch.float32)
    return width if before.stride(0) % width == 0 else 1
