"""Recurrent layers as functions: states over a sequence, differentiable by a chosen learning rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks as check
from . import ops
from .cells import Cell, RGCCell, Trajectory
from .reference import bptt, rfp, rtrl

Learning = Literal["rfp", "bptt", "rtrl"]
LEARNING = ("rfp", "bptt", "rtrl")


class _TwoPoint(torch.autograd.Function):
    """A two-point layer over a sequence; backward by a learning rule. Inputs: x, S states, K weights."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, learning: str, backend: str, resets: Tensor | None, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(cell.states)
        state, weights = tensors[:count], tensors[count:]
        trajectory = cell.scan(x, weights, state, resets)
        ctx.cell, ctx.learning, ctx.backend = cell, learning, backend
        ctx.save_for_backward(x, trajectory.states, trajectory.saved, resets, *weights)
        ctx.set_materialize_grads(False)
        return trajectory.after.unbind(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: Cell = ctx.cell
        x, states, saved, resets, *weights = ctx.saved_tensors
        delta = torch.stack([torch.zeros_like(states[0, 1:]) if g is None else g for g in grads])
        needs_x, *needs = ctx.needs_input_grad[4:]
        needs_state, needs_weight = needs[: len(grads)], needs[len(grads) :]
        for_x, first, by_weight = gradients(
            cell, ctx.learning, ctx.backend, x, states, saved, resets, weights, delta, any(needs_weight)
        )
        return (
            *(None,) * 4,
            for_x if needs_x else None,
            *(g if need else None for g, need in zip(first, needs_state, strict=True)),
            *(g if need else None for g, need in zip(by_weight, needs_weight, strict=True)),
        )


def gradients(
    cell: Cell,
    learning: str,
    backend: str,
    x: Tensor,
    states: Tensor,
    saved: Tensor,
    resets: Tensor | None,
    weights: Sequence[Tensor],
    delta: Tensor,
    needs_weights: bool = True,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Gradients of x (J, T, B, N), of the initial state (S, B, N) and of the weights, by a learning rule.

    states and saved: a trajectory's; delta (S, T, B, N). The weights' are left out if not needed.
    """
    lin = cell.linearize(Trajectory(x, states, saved, resets))
    if learning == "rfp":
        backend = ops.choose_scan(backend, x.device, x.dtype)
        m = rfp.transition(lin, cell.matrices, weights)
        credit, first = ops.reverse_scan(m, delta, backend=backend)
    else:
        credit, first = bptt.credits(lin, cell.matrices, weights, delta)
    by_weight: Sequence[Tensor] = [delta.new_empty(0)] * len(weights)
    if needs_weights and learning == "rtrl":
        by_weight = rtrl.weight_gradients(lin, cell.matrices, weights, delta)
    elif needs_weights:
        by_weight = rfp.weight_gradients(lin, cell.matrices, weights, credit)
    return rfp.input_gradient(lin, credit, len(cell.inputs)), first, by_weight


def two_point(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    *,
    resets: Tensor | None = None,
    learning: Learning = "rfp",
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Run any two-point cell over a sequence; the S states, each (T, B, N), differentiable by `learning`.

    x (J, T, B, N): the cell's per-unit inputs; weights: K of (N, N) or (N,); state: S of (B, N);
    resets (T, B) bool or None. What the rules and backends do is said in `rgc`. Only backend is checked.
    """
    ops.choose_scan(backend, x.device, x.dtype)  # refuses now what backward() would
    return _TwoPoint.apply(cell, learning, backend, resets, x, *state, *weights)


def rgc(
    x: Tensor,
    weight_ss: Tensor,
    weight_ms: Tensor,
    weight_mm: Tensor,
    weight_sm: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    resets: Tensor | None = None,
    learning: Learning = "rfp",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Reciprocal gated circuit over a sequence (paper, Section 2.2 and eq. 13; Nayebi et al. 2022).

        s(t) = (1 - tanh(W_ms m(t-1))) x(t) + tanh(W_ss s(t-1)) s(t-1)
        m(t) = (1 - tanh(W_sm s(t-1))) x(t) + tanh(W_mm m(t-1)) m(t-1)

    Args:
        x: (T, B, N), T ≥ 1, any floating dtype.
        weight_ss, weight_ms, weight_mm, weight_sm: (N, N) each, row i enters unit i; or (N,) for a diagonal
            one. Dtype and device of x; finite.
        state: (s0, m0), each (B, N); zero if None.
        resets: (T, B) bool. True starts a new episode at that step: state and sensitivities of that row are
            forgotten before it.
        learning: how gradients of the weights, x and state are found.
            "rfp"   Recurrent Forward Propagation in its dual form. Equal to "bptt" if all four weights are
                    diagonal; for dense ones an approximation (SnAp-1 with each unit's 2×2 block kept).
            "bptt"  backpropagation through time: exact.
            "rtrl"  weights by exact real-time recurrent learning, O(B·N³) memory and O(B·N⁴) time a step;
                    x and state, which forward sensitivities to the weights don't reach, as "bptt". Exact.
        backend: of RFP's reverse scan: "torch", "triton", or "auto", which takes Triton for float32 tensors
            on a GPU.

    Returns:
        s, m: (T, B, N) each. Nothing is mutated.

    Raises:
        TypeError: a value that isn't a tensor, a dtype that isn't floating or differs from x's.
        ValueError: a wrong shape (T = 0 among them), device, learning or backend; weights not finite; a
            backend that can't run here.
    """
    check.shape("x", check.tensor("x", x), ("T", "B", "N"))
    check.floating("x", x)
    check.one_of("learning", learning, LEARNING)
    steps, batch, units = x.shape
    weights = {
        "weight_ss": weight_ss,
        "weight_ms": weight_ms,
        "weight_mm": weight_mm,
        "weight_sm": weight_sm,
    }
    for name, weight in weights.items():
        recurrent_weight(name, weight, units, x)
    if state is None:
        zero = x.new_zeros(batch, units)
        state = (zero, zero)
    else:
        initial_state(state, ("s0", "m0"), batch, units, x)
    if resets is not None:
        resets = check.mask("resets", resets, (steps, batch), x.device)
    if torch.compiler.is_compiling():
        states, _ = torch.ops.rjepa_triton.rgc(
            x[None], state[0], state[1], list(weights.values()), resets, learning, backend
        )
        return states[0, 1:], states[1, 1:]
    s, m = two_point(
        RGCCell(), x[None], tuple(weights.values()), state, resets=resets, learning=learning, backend=backend
    )
    return s, m


def recurrent_weight(name: str, weight: Tensor, units: int, x: Tensor) -> None:
    """Raise unless `weight` is a finite (N, N) or (N,) tensor of x's dtype and device."""
    if check.tensor(name, weight).dim() == 1:
        check.shape(name, weight, (units,), "to match x")
    else:
        check.shape(name, weight, (units, units), "or (N,) to match x")
    check.like(name, weight, "x", x)
    if not torch.compiler.is_compiling():  # a value can't steer a compiled graph
        check.finite(name, weight)


def initial_state(state: object, names: Sequence[str], batch: int, units: int, x: Tensor) -> None:
    """Raise unless `state` is a tuple of (B, N) tensors, one a name, of x's dtype and device."""
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"state must be a tuple ({', '.join(names)}), got {type(state).__name__}")
    if len(state) != len(names):
        raise ValueError(f"state must be ({', '.join(names)}), got {len(state)} entries")
    for name, value in zip(names, state, strict=True):
        check.shape(f"state's {name}", check.tensor(f"state's {name}", value), (batch, units), "to match x")
        check.like(f"state's {name}", value, "x", x)
