"""What kernels take of a cell: its functions of one unit, and how the kernels read a unit's numbers.

A kernel for any cell is a template. It reads the numbers of a tile of units, calls the cell's functions, which are
generated from the cell's `update` (`rjepa_triton.backend.triton_cells`), and writes what they return. The functions
take and return tuples of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import kept, load_planes
from ._launch import check_dims, check_tensor


class CellFunctions(NamedTuple):
    """A cell's sizes, how its matrices are wired, and its functions of one unit.

    Letters: c the S states before the step, p the G pre-activations, v the F numbers that a forward pass saves of them,
    x the J per-unit inputs, w the unit's entries on the diagonals of the K recurrent matrices, λ the credit of its S
    states. Partials as in the paper's eq. 14.

    states, inputs, matrices, saves   S, J, K and F
    reads, into                       for each matrix, the state that it reads and the gate that it enters
    order                             the matrices by the state that they read, as products lie side by side
    entering                          for each gate, which of the K products, in that order, enter it
    into_gates                        for each gate, which of the K matrices enter it
    partials_found, credits           how many partials and credits the functions below find
    step_partials                     the partials of gates and inputs: the place of each among those that `partials`
                                      finds, or, so many further on, among v
    links                             for each ν and ν', whether M^{νν'} may be other than zero
    update      (c, p, x) → the S new states, then v
    partials    (c, v, x, w) → the partials that aren't among v, then M row by row
    transition  (c, v, x, w) → M row by row
    dual        (c, v, x, w, λ) → the credits that enter gates and inputs, then Mᵀ λ
    exact       (c, v, x, λ) → the credit that enters each gate and each input, then (∂F/∂c)ᵀ λ
    """

    states: int
    inputs: int
    matrices: int
    saves: int
    reads: tuple[int, ...]
    into: tuple[int, ...]
    order: tuple[int, ...]
    entering: tuple[tuple[int, ...], ...]
    into_gates: tuple[tuple[int, ...], ...]
    partials_found: int
    credits: int
    step_partials: tuple[int, ...]
    links: tuple[bool, ...]
    update: Any
    partials: Any
    transition: Any
    dual: Any
    exact: Any


@triton.jit
def pre_activations(products, ENTERING: tl.constexpr, like):
    """For each gate, the sum of the products that enter it; zeros of the shape of `like` where none does."""
    p = ()
    for g in tl.static_range(len(ENTERING)):
        total = tl.zeros(like.shape, tl.float32)
        for k in tl.static_range(len(ENTERING[g])):
            total += products[ENTERING[g][k]]
        p = p + (total,)
    return p


@triton.jit
def load_step(
    x_ptr,  # [J, T, B, N]
    saved_ptr,  # [T, B, F, N]
    before_ptr,  # [S, T, B, N]
    resets_ptr,  # [T, B], or None
    t,  # int64
    unit,  # flat index into (B, N)
    row,  # its batch row, int64
    N,
    BN,
    plane,  # numbers of one (T, B, N)
    stride_before,
    mask,
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
):
    """c, v and x of step t, and a mask of the units that weren't reset. c is zero where reset."""
    at = t * BN + unit
    v = load_planes(saved_ptr, F * (t * BN + row * N) + unit % N, N, mask, F)
    x = load_planes(x_ptr, at, plane, mask, J)
    c = load_planes(before_ptr, at, stride_before, mask, S)
    keep = mask
    if resets_ptr is not None:
        keep = tl.load(resets_ptr + t * (BN // N) + row, mask=mask, other=0) == 0
        c = kept(keep, c)
    return c, v, x, keep


@triton.jit
def load_diagonals(ptrs, strides, n, mask):
    """The matrices' diagonal entries of units n (int64)."""
    blocks = ()
    for k in tl.static_range(len(ptrs)):
        blocks = blocks + (tl.load(ptrs[k] + n * strides[k], mask=mask, other=0.0),)
    return blocks


def check_matrices(cell: CellFunctions, weights: Sequence[Tensor], units: int, like: Tensor) -> None:
    """K dense matrices (N, N), contiguous. Raises TypeError or ValueError."""
    if len(weights) != cell.matrices:
        raise ValueError(f"weights must hold {cell.matrices} tensors, got {len(weights)}")
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight, (units, units), like)


def check_trajectory(
    cell: CellFunctions,
    x: Tensor,
    saved: Tensor,
    before: Tensor,
    own: Sequence[Tensor] | None,
    resets: Tensor | None,
) -> tuple[int, int, int]:
    """(T, B, N) of what a forward pass left: x (J, T, B, N) and saved (T, B, F, N) contiguous, before (S, T, B, N) with
    any first stride, own: K of (N,) with any stride or None, resets (T, B) or None. Raises TypeError or ValueError.
    """
    _, steps, batch, units = check_dims("x", x, "JTBN")
    check_tensor("x", x, (cell.inputs, steps, batch, units), x)
    if cell.saves:
        check_tensor("saved", saved, (steps, batch, cell.saves, units), x)
    check_tensor("before", before, (cell.states, steps, batch, units), x, any_stride=1)
    if own is not None and len(own) != cell.matrices:
        raise ValueError(f"own must hold {cell.matrices} tensors, got {len(own)}")
    for index, weight in enumerate(own or ()):
        check_tensor(f"own[{index}]", weight, (units,), x, any_stride=1)
    if resets is not None:
        check_tensor("resets", resets, (steps, batch), x, (torch.bool, torch.uint8))
    return steps, batch, units
