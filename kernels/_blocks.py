"""Device functions over tuples of blocks: S states, or the S×S entries of a matrix row by row, of a tile of units."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT blocks of zeros."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((BLOCK,), tl.float32),)
    return out


@triton.jit
def identity(S: tl.constexpr, BLOCK: tl.constexpr):
    """The S×S identity, row by row."""
    out = ()
    for i in tl.static_range(S):
        for j in tl.static_range(S):
            out = out + (tl.full((BLOCK,), 1.0 if i == j else 0.0, tl.float32),)
    return out


@triton.jit
def load_planes(ptr, at, plane, mask, COUNT: tl.constexpr):
    """COUNT blocks, each `plane` numbers behind the one before."""
    blocks = ()
    for k in tl.static_range(COUNT):
        blocks = blocks + (tl.load(ptr + k * plane + at, mask=mask, other=0.0),)
    return blocks


@triton.jit
def store_planes(ptr, at, plane, blocks, mask):
    """Write blocks, each `plane` numbers behind the one before."""
    for k in tl.static_range(len(blocks)):
        tl.store(ptr + k * plane + at, blocks[k], mask=mask)


@triton.jit
def moved(ptrs, by):
    """Pointers, each `by` numbers further on."""
    out = ()
    for k in tl.static_range(len(ptrs)):
        out = out + (ptrs[k] + by,)
    return out


@triton.jit
def load_at(ptrs, at, mask):
    """A block from each of some pointers; zeros where there is none."""
    blocks = ()
    for k in tl.static_range(len(ptrs)):
        if ptrs[k] is None:
            blocks = blocks + (tl.zeros(at.shape, tl.float32),)
        else:
            blocks = blocks + (tl.load(ptrs[k] + at, mask=mask, other=0.0),)
    return blocks


@triton.jit
def part(blocks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the blocks, from the FIRST on."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (blocks[FIRST + k],)
    return found


@triton.jit
def kept(keep, blocks):
    """The blocks, zero where `keep` isn't."""
    found = ()
    for k in tl.static_range(len(blocks)):
        found = found + (tl.where(keep, blocks[k], 0.0),)
    return found


@triton.jit
def passes(m):
    """Whether one of the S×S entries isn't zero, of each unit: at a reset all are, and nothing passes, not even NaN."""
    total = tl.abs(m[0])
    for k in tl.static_range(1, len(m)):
        total += tl.abs(m[k])
    return total != 0.0


@triton.jit
def add(a, b):
    """The sums of two tuples' blocks, one by one."""
    out = ()
    for k in tl.static_range(len(a)):
        out = out + (a[k] + b[k],)
    return out


@triton.jit
def times(r, m, S: tl.constexpr):
    """The S×S product R M, row by row."""
    out = ()
    for i in tl.static_range(S):
        for j in tl.static_range(S):
            total = r[i * S] * m[j]
            for k in tl.static_range(1, S):
                total += r[i * S + k] * m[k * S + j]
            out = out + (total,)
    return out


@triton.jit
def transposed_times(r, credit, S: tl.constexpr):
    """Rᵀ λ."""
    out = ()
    for j in tl.static_range(S):
        total = r[j] * credit[0]
        for k in tl.static_range(1, S):
            total += r[k * S + j] * credit[k]
        out = out + (total,)
    return out


@triton.jit
def on_states(r, values, S: tl.constexpr):
    """R v."""
    out = ()
    for i in tl.static_range(S):
        total = r[i * S] * values[0]
        for k in tl.static_range(1, S):
            total += r[i * S + k] * values[k]
        out = out + (total,)
    return out
