"""Backpropagation through time of a cell with dense matrices, backward in time with the full recurrent Jacobian.

Recursion (the exact counterpart of the paper's eq. 14 in dual form):

    λ(t) = δ(t) + A(t+1)ᵀ λ(t+1) + Σ_k W^kᵀ E^k(t+1)        A: ∂F/∂c, the paths through no matrix
    E^k = Σ_ν λ^ν ∂F_ν/∂p^g, g the gate that matrix k enters

Each step of the loop is one launch of the kernel below and a matrix product by torch for each state that matrices read,
one for all states where each is read by equally many.

Grid: B · (tiles of BLOCK of the N units).
A program, one warp, owns BLOCK units of one batch row at one step. It reads δ, the credit from the step after
(`passed`), the saved numbers, states and inputs; it writes E of the matrices and of the inputs, and the part
A(t)ᵀ λ(t) of the credit for the step before, to which the products then add the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import kept, load_planes
from ._cell import CellFunctions, check_matrices, check_trajectory
from ._launch import check_runnable, check_tensor, device_sizes, vector_width
from .cell_forward import pick_pointwise_config


@triton.jit(
    do_not_specialize=[
        "stride_x",
        "stride_before",
        "stride_delta",
        "stride_for_input",
        "stride_passed",
    ]
)
def _backward_kernel(
    x_ptr,  # [J, B, N]
    saved_ptr,  # [B, F, N]
    before_ptr,  # [S, B, N]
    delta_ptr,  # [S, B, N]
    resets_ptr,  # [B]: whether the step after this one reset the batch row; or None
    entering_ptr,  # [B, K, N]: written, E of the matrices
    for_input_ptr,  # [J, B, N]: written, E of the inputs
    passed_ptr,  # [S, B, N]: read, the credit from the step after; then written, Aᵀ λ of this step
    N,
    stride_x,
    stride_before,
    stride_delta,
    stride_for_input,
    stride_passed,
    EXACT: tl.constexpr,
    INTO: tl.constexpr,  # for each of the K places in `entering`, the gate whose credit it has
    GATES: tl.constexpr,
    LAST: tl.constexpr,  # whether this is the last step, which no credit reaches from a later one
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and every stride
):
    N = N // VECTOR * VECTOR  # leaves N and the strides as they are, and shows the compiler what divides them
    stride_x = tl.cast(stride_x, tl.int64) // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    stride_delta = tl.cast(stride_delta, tl.int64) // VECTOR * VECTOR
    stride_for_input = tl.cast(stride_for_input, tl.int64) // VECTOR * VECTOR
    stride_passed = tl.cast(stride_passed, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < N
    at = b * N + unit

    credit = load_planes(delta_ptr, at, stride_delta, mask, S)
    if not LAST:
        later = load_planes(passed_ptr, at, stride_passed, mask, S)
        if resets_ptr is not None:
            later = kept(tl.load(resets_ptr + b) == 0, later)
        total = ()
        for nu in tl.static_range(S):
            total = total + (credit[nu] + later[nu],)
        credit = total
    c = load_planes(before_ptr, at, stride_before, mask, S)
    x = load_planes(x_ptr, at, stride_x, mask, J)
    v = load_planes(saved_ptr, b * F * N + unit, N, mask, F)
    found = EXACT(c, v, x, credit)
    entering_ptr += b * len(INTO) * N + unit
    for k in tl.static_range(len(INTO)):
        tl.store(entering_ptr + k * N, found[INTO[k]], mask=mask)
    for j in tl.static_range(J):
        tl.store(for_input_ptr + j * stride_for_input + at, found[GATES + j], mask=mask)
    for nu in tl.static_range(S):
        tl.store(passed_ptr + nu * stride_passed + at, found[GATES + J + nu], mask=mask)


class Credits(NamedTuple):
    """What `cell_credits` returns.

    entering   E of the matrices (T, B, K, N), in the order of `CellFunctions.order`: those that read state 0 first
    for_input  E of the inputs (J, T, B, N)
    passed     the credit that the first step passes to the state before it, (S, B, N)
    """

    entering: Tensor
    for_input: Tensor
    passed: Tensor


@torch.no_grad()
def cell_credits(
    cell: CellFunctions,
    x: Tensor,
    saved: Tensor,
    before: Tensor,
    weights: Sequence[Tensor],
    delta: Tensor,
    resets: Tensor | None = None,
) -> Credits:
    """Exact credits of a cell with dense matrices: backpropagation through time (equations at the top).

    Where a step resets a batch row, no credit passes to the step before. Products are torch's, in torch's precision for
    float32 products. The caller makes the weights' gradients Σ_{t,b} E^k yᵀ.

    Args:
        x: per-unit inputs, (J, T, B, N) float32, contiguous.
        saved: what the forward pass saved, (T, B, F, N) float32, contiguous.
        before: the states that the steps read, zero where reset, (S, T, B, N) float32. The first dimension may have
            any stride, so that `states[:, :-1]` needs no copy.
        weights: the K matrices, (N, N) float32 each, contiguous.
        delta: instantaneous credits δ (S, T, B, N) float32, contiguous.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state was zeroed before that step. Or None.

    Nothing is mutated, and autograd doesn't follow it. Fast where four divides N.

    Returns:
        `Credits`, float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    steps, batch, units = check_trajectory(cell, x, saved, before, None, resets)
    check_matrices(cell, weights, units, x)
    check_tensor("delta", delta, (cell.states, steps, batch, units), x)
    if resets is not None:
        resets = resets.view(torch.uint8)
    check_runnable(_backward_kernel, "x", x)

    entering = delta.new_empty(steps, batch, cell.matrices, units)
    for_input = torch.empty_like(x)
    passed = torch.empty_like(delta[:, 0], memory_format=torch.contiguous_format)
    add = _products(cell, weights, entering, passed)
    config = pick_pointwise_config(units, device_sizes(x).warp)
    strides = [a.stride(0) for a in (x, before, delta, for_input, passed)]
    width = vector_width(units, torch.float32)
    grid = (batch * triton.cdiv(units, config.block),)
    at = [a.unbind(1) for a in (x, before, delta, for_input)]
    saved_at, entering_at = saved.unbind(0), entering.unbind(0)
    for t in range(steps - 1, -1, -1):
        x_t, before_t, delta_t, for_input_t = (a[t] for a in at)
        last = t == steps - 1
        with torch.cuda.device_of(x):
            _backward_kernel[grid](
                x_t,
                saved_at[t],
                before_t,
                delta_t,
                None if resets is None or last else resets[t + 1],
                entering_at[t],
                for_input_t,
                passed,
                units,
                *strides,
                EXACT=cell.exact,
                INTO=tuple(cell.into[k] for k in cell.order),
                GATES=len(cell.entering),
                LAST=last,
                S=cell.states,
                J=cell.inputs,
                F=cell.saves,
                BLOCK=config.block,
                VECTOR=width if all(stride % width == 0 for stride in strides) else 1,
                num_warps=1,
            )
        add(t)
    if resets is not None:
        passed.masked_fill_(resets[0, :, None] != 0, 0)
    return Credits(entering, for_input, passed)


def _products(
    cell: CellFunctions, weights: Sequence[Tensor], entering: Tensor, passed: Tensor
) -> Callable[[int], None]:
    """What adds Σ_k W^kᵀ E^k(t) to `passed`, each to the state that matrix k reads."""
    by_state = [[k for k in cell.order if cell.reads[k] == nu] for nu in range(cell.states)]
    there = [nu for nu, readers in enumerate(by_state) if readers]
    joined = [torch.cat([weights[k] for k in by_state[nu]]) for nu in there]
    counts = [len(by_state[nu]) for nu in there]
    if len(set(counts)) == 1 and there == list(range(len(there))):
        stacked, to = torch.stack(joined), passed[: len(there)]
        credits = entering.unflatten(2, (len(there), counts[0])).flatten(3).transpose(1, 2).unbind(0)

        def add_all(t: int) -> None:
            to.baddbmm_(credits[t], stacked)

        return add_all
    parts = [part.flatten(2).unbind(0) for part in entering.split(counts, 2)]

    def add(t: int) -> None:
        for nu, weight, part in zip(there, joined, parts, strict=True):
            passed[nu].addmm_(part[t], weight)

    return add
