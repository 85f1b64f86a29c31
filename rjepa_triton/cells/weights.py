"""Operations on a weight by its shape: dense (N, M), block-diagonal (H, b, b), or diagonal (N,).

A block-diagonal weight connects the N = H·b units of a layer within H heads of b units each. Biases and a cell's
per-unit parameters are (N,) too: they read the constant 1 (`two_point.Matrix`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def heads_of(weight: Tensor) -> int:
    """How many groups of units, or heads, a recurrent weight connects within: 1 if dense, H, or N if diagonal."""
    return 1 if weight.dim() == 2 else weight.shape[0]


def fan_in(weight: Tensor) -> int:
    """M, how many numbers each unit reads through this weight."""
    return 1 if weight.dim() == 1 else weight.shape[-1]


def own(weight: Tensor) -> Tensor:
    """The diagonal of a recurrent weight, from each unit to itself: (N,)."""
    if weight.dim() == 1:
        return weight
    return weight.diagonal(dim1=-2, dim2=-1).flatten()


def hollow(weight: Tensor) -> Tensor:
    """A detached copy of a dense or block-diagonal recurrent weight with its diagonal (`own`) set to zero."""
    out = weight.detach().clone()
    out.diagonal(dim1=-2, dim2=-1).zero_()
    return out


def within_blocks(weight: Tensor, size: int) -> Tensor:
    """A detached copy of a recurrent weight, with zeros where it connects units of two blocks of `size` units.

    size divides the units that the weight connects, or is a multiple of them.
    """
    fan_in = weight.shape[-1]
    if weight.dim() == 1 or size >= fan_in:
        return weight.detach().clone()
    weight = weight.detach()
    out = torch.zeros_like(weight)
    _on_the_diagonal(out, size).copy_(_on_the_diagonal(weight, size))
    return out


def _on_the_diagonal(weight: Tensor, size: int) -> Tensor:
    """A view of the diagonal's blocks of `size` units: (N/size, size, size), or (H, b/size, size, size) of H heads."""
    blocks = weight.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def in_heads(weight: Tensor, heads: int) -> Tensor:
    """A dense or block-diagonal recurrent weight as (heads, b, b), where its own heads, if more, are joined.

    Of fewer heads of its own it is the blocks on their diagonals: what connects one block with another is left out.
    """
    own, size = heads_of(weight), weight.shape[-1]
    if own % heads and heads % own:
        return in_heads(torch.block_diag(*weight), heads)
    if own <= heads:
        block = own * size // heads
        return _on_the_diagonal(weight, block).reshape(heads, block, block)
    out = weight.new_zeros(heads, own // heads, size, own // heads, size)
    out.diagonal(dim1=1, dim2=3).copy_(weight.view(heads, own // heads, size, size).permute(0, 2, 3, 1))
    return out.flatten(3).flatten(1, 2)


def multiply(weight: Tensor, y: Tensor) -> Tensor:
    """W y, (…, N), for y (…, M)."""
    if weight.dim() == 1:
        return y * weight
    if weight.dim() == 2:
        return y @ weight.mT
    return by_head(weight.mT, y)


def multiply_transposed(weight: Tensor, e: Tensor) -> Tensor:
    """Wᵀ e, (…, M), for e (…, N)."""
    if weight.dim() == 1:
        return e * weight
    if weight.dim() == 2:
        return e @ weight
    return by_head(weight, e)


def by_head(blocks: Tensor, rows: Tensor) -> Tensor:
    """The product of rows (…, H·p) and blocks (H, p, q), head by head: (…, H·q)."""
    heads, size, _ = blocks.shape
    left = rows.reshape(-1, heads, size).transpose(0, 1)
    return torch.bmm(left, blocks).transpose(0, 1).reshape(*rows.shape[:-1], -1)


def outer(e: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Σ e yᵀ over all leading dimensions, in the shape of `weight`: e (…, N), y (…, M), or (…, N) if diagonal."""
    if weight.dim() == 1:
        return (e * y).flatten(0, -2).sum(0)
    if weight.dim() == 2:
        return e.flatten(0, -2).mT @ y.flatten(0, -2)
    heads, size, _ = weight.shape
    left, right = (a.reshape(-1, heads, size).permute(1, 2, 0) for a in (e, y))
    return torch.bmm(left, right.mT)
