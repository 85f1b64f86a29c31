"""One step of any cell after its matrix products, in one pass.

For a cell (`_cell.CellFunctions`) with S states, J inputs, K matrices and F saved numbers:

    c(t) = F(c(t-1), p(t), x(t)),        p^g = Σ of the products that enter gate g

Grid: B · (tiles of BLOCK of the N units). A program, one warp, owns BLOCK units of one batch row. It reads K products,
S states and J inputs; it writes S states and, if wanted, the F numbers that the backward pass needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import load_planes
from ._cell import CellFunctions, pre_activations
from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width


@triton.jit(do_not_specialize=["stride_x", "stride_before", "stride_after", "stride_next"])
def _pointwise_kernel(
    products_ptr,  # [B, K, N]
    x_ptr,  # [J, B, N]
    before_ptr,  # [S, B, N]: the state that the products read
    after_ptr,  # [S, B, N]: written, the new state
    saved_ptr,  # [B, F, N]: written; or None
    resets_ptr,  # [B]: whether the next step resets the batch row; or None with next_ptr
    next_ptr,  # [S, B, N]: written, the new state with those rows zeroed; or None
    N,
    stride_x,
    stride_before,
    stride_after,
    stride_next,
    UPDATE: tl.constexpr,
    ENTERING: tl.constexpr,  # for each gate, the products that enter it
    S: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and the strides
):
    # These leave N and the strides as they are, and show the compiler what divides them.
    N = N // VECTOR * VECTOR
    stride_x = tl.cast(stride_x, tl.int64) // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    stride_after = tl.cast(stride_after, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < N
    at = b * N + unit
    c = load_planes(before_ptr, at, stride_before, mask, S)
    x = load_planes(x_ptr, at, stride_x, mask, J)
    products = load_planes(products_ptr, b * K * N + unit, N, mask, K)
    found = UPDATE(c, pre_activations(products, ENTERING, unit), x)
    for nu in tl.static_range(S):
        tl.store(after_ptr + nu * stride_after + at, found[nu], mask=mask)
    if saved_ptr is not None:
        for k in tl.static_range(F):
            tl.store(saved_ptr + b * F * N + k * N + unit, found[S + k], mask=mask)
    if next_ptr is not None:
        stride_next = tl.cast(stride_next, tl.int64) // VECTOR * VECTOR
        keep = tl.load(resets_ptr + b) == 0
        for nu in tl.static_range(S):
            tl.store(next_ptr + nu * stride_next + at, tl.where(keep, found[nu], 0.0), mask=mask)


class PointwiseConfig(NamedTuple):
    """How one program, of one warp, of a pointwise pass is laid out.

    block   units that it owns
    vector  numbers that one memory access moves
    """

    block: int
    vector: int


def pick_pointwise_config(N: int, warp_size: int) -> PointwiseConfig:
    """The layout for a layer of N units. A pure function.

    Four units per thread make 128-bit accesses, and one warp per program makes as many programs as possible.
    """
    return PointwiseConfig(4 * warp_size, vector_width(N, torch.float32))


def cell_pointwise_(
    cell: CellFunctions,
    products: Tensor,
    x: Tensor,
    before: Tensor,
    after: Tensor,
    saved: Tensor | None = None,
    next_resets: Tensor | None = None,
    next_before: Tensor | None = None,
) -> None:
    """One step of a cell from its matrix products, in one pass (equations at the top).

    The products of the next step read the new state, zeroed in the batch rows that the next step resets. This pass
    writes both: the new state to `after`, the zeroed copy to next_before, which may be `before` itself.

    Args:
        products: W c of each matrix, (B, K, N) float32, contiguous.
        x: per-unit inputs, (J, B, N) float32.
        before: the state that the products read, (S, B, N) float32.
        after: (S, B, N) float32. Mutated: receives the new state.
        saved: (B, F, N) float32, contiguous, or None. Mutated: receives what the backward pass needs of the products.
        next_resets: (B,) bool or uint8, batch rows that the next step resets, or None. It needs next_before.
        next_before: (S, B, N) float32, or None. Mutated: receives the new state with those rows zeroed. It needs
            next_resets.

    The first dimension of x, before, after and next_before may have any stride; the rest must be contiguous. Fast where
    four divides N and those strides.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; one of next_resets and
            next_before without the other; or tensors that aren't on a GPU while kernels aren't interpreted.
    """
    _, batch, units = check_dims("before", before, "SBN")
    check_tensor("before", before, (cell.states, batch, units), before, any_stride=1)
    check_tensor("products", products, (batch, cell.matrices, units), before)
    check_tensor("x", x, (cell.inputs, batch, units), before, any_stride=1)
    check_tensor("after", after, (cell.states, batch, units), before, any_stride=1)
    if saved is not None:
        check_tensor("saved", saved, (batch, cell.saves, units), before)
    if (next_resets is None) != (next_before is None):
        raise ValueError("next_resets and next_before must be given together, got one of them")
    if next_resets is not None:
        check_tensor("next_resets", next_resets, (batch,), before, (torch.bool, torch.uint8))
        check_tensor("next_before", next_before, (cell.states, batch, units), before, any_stride=1)
        next_resets = next_resets.view(torch.uint8)
    check_runnable(_pointwise_kernel, "before", before)
    strides = [0 if a is None else a.stride(0) for a in (x, before, after, next_before)]
    config = pick_pointwise_config(units, device_sizes(before).warp)
    width = config.vector
    with torch.cuda.device_of(before):
        _pointwise_kernel[(batch * triton.cdiv(units, config.block),)](
            products,
            x,
            before,
            after,
            saved,
            next_resets,
            next_before,
            units,
            *strides,
            UPDATE=cell.update,
            ENTERING=cell.entering,
            S=cell.states,
            J=cell.inputs,
            K=cell.matrices,
            F=cell.saves,
            BLOCK=config.block,
            VECTOR=width if all(stride % width == 0 for stride in strides) else 1,
            num_warps=1,
        )
