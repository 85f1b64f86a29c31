"""Backpropagation through time of an RGC, backward in time with the full recurrent Jacobian.

Recursion (the exact counterpart of the paper's eq. 14 in dual form; A is the path through no matrix):

    λ(t) = δ(t) + A(t+1)ᵀ λ(t+1) + Σ_k W^kᵀ E^k(t+1)        E^k = λ^ν φ^{ν,k}, ν the state that matrix k enters

Each step of the loop is one launch of the kernel below and one batched matrix product by torch, for Σ_k W^kᵀ E^k.

Grid: B · (tiles of BLOCK of the N units).
A program, one warp, owns BLOCK units of one batch row at one step. It reads δ, the credit from the step after
(`passed`), four gates, two states and the input; it writes λ, E of the four matrices, and the part A(t)ᵀ λ(t) of the
credit for the step before, to which the product then adds the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes
from .rgc_forward import PointwiseConfig, joined_by_source, pick_pointwise_config


@triton.jit(
    do_not_specialize=[
        "stride_before",
        "stride_delta",
        "stride_credit",
        "stride_entering",
        "stride_passed",
    ]
)
def _rgc_backward_kernel(
    gates_ptr,  # [B, 2, 2, N]
    before_ptr,  # [2, B, N]
    u_ptr,  # [B, N]
    delta_ptr,  # [2, B, N]
    resets_ptr,  # [B]: whether the step after this one reset the batch row; or None
    credit_ptr,  # [2, B, N]: written, λ
    entering_ptr,  # [2, B, 2, N]: written, E
    passed_ptr,  # [2, B, N]: read, the credit from the step after; then written, Aᵀ λ of this step
    N,
    stride_before,
    stride_delta,
    stride_credit,
    stride_entering,
    stride_passed,
    LAST: tl.constexpr,  # whether this is the last step, which no credit reaches from a later one
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N and every stride
):
    N = N // VECTOR * VECTOR  # leaves N and the strides as they are, and shows the compiler what divides them
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    stride_delta = tl.cast(stride_delta, tl.int64) // VECTOR * VECTOR
    stride_credit = tl.cast(stride_credit, tl.int64) // VECTOR * VECTOR
    stride_entering = tl.cast(stride_entering, tl.int64) // VECTOR * VECTOR
    stride_passed = tl.cast(stride_passed, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < N
    at = b * N + unit
    gates_ptr += b * 4 * N
    entering_ptr += b * 2 * N

    credit_s = tl.load(delta_ptr + at, mask=mask, other=0.0)
    credit_m = tl.load(delta_ptr + stride_delta + at, mask=mask, other=0.0)
    if not LAST:
        from_s = tl.load(passed_ptr + at, mask=mask, other=0.0)
        from_m = tl.load(passed_ptr + stride_passed + at, mask=mask, other=0.0)
        if resets_ptr is not None:
            keep = tl.load(resets_ptr + b) == 0
            from_s = tl.where(keep, from_s, 0.0)
            from_m = tl.where(keep, from_m, 0.0)
        credit_s += from_s
        credit_m += from_m
    tl.store(credit_ptr + at, credit_s, mask=mask)
    tl.store(credit_ptr + stride_credit + at, credit_m, mask=mask)

    s = tl.load(before_ptr + at, mask=mask, other=0.0)
    m = tl.load(before_ptr + stride_before + at, mask=mask, other=0.0)
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    ss = tl.load(gates_ptr + unit, mask=mask, other=0.0)
    sm = tl.load(gates_ptr + N + unit, mask=mask, other=0.0)
    mm = tl.load(gates_ptr + 2 * N + unit, mask=mask, other=0.0)
    ms = tl.load(gates_ptr + 3 * N + unit, mask=mask, other=0.0)
    tl.store(entering_ptr + unit, credit_s * (1.0 - ss * ss) * s, mask=mask)
    tl.store(entering_ptr + N + unit, credit_m * (sm * sm - 1.0) * u, mask=mask)
    tl.store(entering_ptr + stride_entering + unit, credit_m * (1.0 - mm * mm) * m, mask=mask)
    tl.store(entering_ptr + stride_entering + N + unit, credit_s * (ms * ms - 1.0) * u, mask=mask)
    tl.store(passed_ptr + at, ss * credit_s, mask=mask)
    tl.store(passed_ptr + stride_passed + at, mm * credit_m, mask=mask)


# Each program is laid out as one of `_rgc_pointwise_kernel`: one warp, and a few units a thread.
Config = PointwiseConfig
pick_config = pick_pointwise_config


class Credits(NamedTuple):
    """What `bptt_credits` returns.

    credit    λ (2, T, B, N)
    passed    the credit that the first step passes to the state before it, (2, B, N)
    entering  E (2, T, B, 2, N): [0] of the matrices that read s, ss and sm; [1] of those that read m, mm and ms
    """

    credit: Tensor
    passed: Tensor
    entering: Tensor


@torch.no_grad()
def bptt_credits(
    gates: Tensor,
    before: Tensor,
    u: Tensor,
    weights: Sequence[Tensor],
    delta: Tensor,
    resets: Tensor | None = None,
) -> Credits:
    """Exact credits of an RGC with dense matrices: backpropagation through time, backward in time.

        λ(t) = δ(t) + A(t+1)ᵀ λ(t+1) + Σ_k W^kᵀ E^k(t+1)        W^kᵀ E^k goes to the state that matrix k reads
        E^ss = λ^s (1 - ss²) s'        E^ms = -λ^s (1 - ms²) u        ss, ms, mm, sm: tanh of the pre-activations
        E^mm = λ^m (1 - mm²) m'        E^sm = -λ^m (1 - sm²) u        s', m': the state before the step

    (The derivative of the paper's eq. 13.) Where a step resets a batch row, no credit passes to the step before.
    Each step takes one pointwise pass and one batched matrix product, by torch and in torch's precision for float32
    products. The caller makes the weights' gradients: with y = before[j].flatten(0, 1),

        entering[j].flatten(0, 1).flatten(1).T @ y        (2N, N), dW_ss above dW_sm, or dW_mm above dW_ms

    Args:
        gates: tanh of the pre-activations, (T, B, 2, 2, N) float32, contiguous, as `rgc_forward` returns them.
        before: the states that the steps read, zero where reset, (2, T, B, N) float32. The first dimension may have
            any stride, so that `states[:, :-1]` needs no copy.
        u: the layer's per-unit input, (T, B, N) float32, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous.
        delta: instantaneous credits δ (2, T, B, N) float32, contiguous.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state was zeroed before that step. Or None.

    Nothing is mutated, and autograd doesn't follow it. Fast where four divides N.

    Returns:
        `Credits`, float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    steps, batch, units = check_dims("u", u, "TBN")
    check_tensor("u", u, (steps, batch, units), u)
    check_tensor("gates", gates, (steps, batch, 2, 2, units), u)
    check_tensor("before", before, (2, steps, batch, units), u, any_stride=1)
    check_tensor("delta", delta, (2, steps, batch, units), u)
    if len(weights) != 4:
        raise ValueError(f"weights must hold 4 tensors, got {len(weights)}")
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight, (units, units), u)
    if resets is not None:
        check_tensor("resets", resets, (steps, batch), u, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_rgc_backward_kernel, "u", u)

    credit, entering = torch.empty_like(delta), delta.new_empty(2, steps, batch, 2, units)
    passed = torch.empty_like(delta[:, 0], memory_format=torch.contiguous_format)
    joined = joined_by_source(weights)
    config = pick_config(units, device_sizes(u).warp)
    strides = [a.stride(0) for a in (before, delta, credit, entering, passed)]
    vector = config.vector if all(stride % config.vector == 0 for stride in strides) else 1
    grid = (batch * triton.cdiv(units, config.block),)
    at = [gates.unbind(0), *(a.unbind(1) for a in (before, delta, credit, entering))]
    entering_at = entering.flatten(-2).unbind(1)
    for t in range(steps - 1, -1, -1):
        gates_t, before_t, delta_t, credit_t, entering_t = (a[t] for a in at)
        last = t == steps - 1
        with torch.cuda.device_of(u):
            _rgc_backward_kernel[grid](
                gates_t,
                before_t,
                u[t],
                delta_t,
                None if resets is None or last else resets[t + 1],
                credit_t,
                entering_t,
                passed,
                units,
                *strides,
                LAST=last,
                BLOCK=config.block,
                VECTOR=vector,
                num_warps=1,
            )
        passed.baddbmm_(entering_at[t], joined)
    if resets is not None:
        passed.masked_fill_(resets[0, :, None] != 0, 0)
    return Credits(credit, passed, entering)
