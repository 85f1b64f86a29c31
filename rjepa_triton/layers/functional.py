"""Recurrent layers as functions: states over a sequence, differentiable by a chosen learning rule."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import dispatch as ops
from ..cells import weights as weight_ops
from ..cells.builtin import RGCCell
from ..cells.two_point import Cell, Trajectory
from ..rules import refine as refinement
from ..rules import rfp, rtrl
from . import parallel

Learning = Literal["rfp", "bptt", "rtrl", "eprop", "rflo", "snap0"]
LEARNING = ("rfp", "bptt", "rtrl", "eprop", "rflo", "snap0")
# Rules that run online only, and what serves in their place on sequences.
ONLINE_ONLY = {"uoro": "rtrl", "tbptt": "bptt"}


def rule(name: str, learning: str, refine: object) -> int | None:
    """Rounds of refinement, None for as many as it takes; raise unless the two can go together."""
    if learning in ONLINE_ONLY:
        raise ValueError(
            f"{name}={learning!r} learns online only (OnlineLearner(layer, batch, learning={learning!r})); the nearest "
            f"on sequences is {ONLINE_ONLY[learning]!r}"
        )
    check.one_of(name, learning, LEARNING)
    if refine == "exact":
        rounds = None
    elif isinstance(refine, str):
        raise ValueError(f"refine must be a number of rounds or 'exact', got {refine!r}")
    else:
        rounds = check.integer("refine", refine, 0)
    if rounds != 0 and learning != "rfp":
        exact = ", which is exact as it is" if learning in ("bptt", "rtrl") else ""
        raise ValueError(
            f"refine={refine!r} goes with learning='rfp', whose credits it refines, got learning={learning!r}{exact}"
        )
    return rounds


class _TwoPoint(torch.autograd.Function):
    """A two-point layer over a sequence; backward by a learning rule. Inputs: x, S states, K weights."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        learning: str,
        rounds: int | None,
        backend: str,
        mode: parallel.Forward,
        recompute: bool,
        resets: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(cell.states)
        state, weights = tensors[:count], tensors[count:]
        trajectory = parallel.forward(
            cell, x, weights, state, resets, mode=mode, backend=backend, keep=not recompute
        )
        ctx.cell, ctx.learning, ctx.rounds, ctx.backend = cell, learning, rounds, backend
        ctx.save_for_backward(x, trajectory.states, trajectory.saved, resets, *weights)
        ctx.set_materialize_grads(False)
        return trajectory.after.unbind(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell: Cell = ctx.cell
        x, states, saved, resets, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[7:]
        needs_state, needs_weight = needs[: len(grads)], needs[len(grads) :]
        trajectory = Trajectory(x, states, saved, resets)
        for_x, first, by_weight = gradients(
            cell, trajectory, weights, grads, ctx.learning, ctx.rounds, ctx.backend, any(needs_weight)
        )
        return (
            *(None,) * 7,
            for_x if needs_x else None,
            *(g if need else None for g, need in zip(first, needs_state, strict=True)),
            *(g if need else None for g, need in zip(by_weight, needs_weight, strict=True)),
        )


def gradients(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: ops.OfStates,
    learning: str,
    rounds: int | None = 0,
    backend: str = "auto",
    needs_weights: bool = True,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Gradients of x (J, T, B, N), of the initial state (S, B, N) and of the weights, by a learning rule.

    delta (S, T, B, N), or one for each state, None for zeros; rounds as `rule` gives them. The weights' are left out if
    not needed.
    """
    x = trajectory.x
    runs = ops.choose_scan(backend, x.device, x.dtype)
    if learning in rfp.RULES and rounds == 0 and runs != "triton" and x.device.type == "cpu":
        large, window = LARGE[ops.one_pass(cell, learning, runs)]
        if x[0].numel() > large:
            return _dual_by_windows(cell, trajectory, weights, delta, learning, runs, needs_weights, window)
    trajectory = trajectory.with_saved(cell, weights)
    inputs = len(cell.per_unit)
    by_weight: Sequence[Tensor] = [x.new_empty(0)] * len(weights)
    if learning not in rfp.RULES:
        delta = ops.of_states(delta, trajectory)
        lin = cell.linearize(trajectory)
        entering, for_x, first = ops.exact(cell, trajectory, lin, weights, delta, backend=runs)
        if needs_weights and learning == "rtrl" and weights:
            by_weight = rtrl.weight_gradients(lin, cell.matrices, weights, delta)
        elif needs_weights:
            by_weight = rfp.outer_products(lin.before, cell.matrices, weights, entering)
        return for_x, first, by_weight
    if rounds == 0:
        matrices = cell.matrices if needs_weights else ()
        entering, for_x, first = ops.dual_of(
            cell, trajectory, weights, delta, matrices, inputs, learning, backend=runs
        )
        if needs_weights:
            by_weight = rfp.outer_products(trajectory.before, matrices, weights, entering)
        return for_x, first, by_weight
    delta = ops.of_states(delta, trajectory)
    lin, m = ops.linearize(cell, trajectory, weights, learning, backend=runs)
    scan = functools.partial(ops.reverse_scan, backend=runs)
    credit, first = refinement.credits(lin, m, cell.matrices, weights, delta, rounds=rounds, scan=scan)
    if needs_weights:
        by_weight = rfp.weight_gradients(lin, cell.matrices, weights, credit)
    return rfp.input_gradient(lin, credit, inputs), first, by_weight


# Numbers of T·B·N beyond which the dual form on the CPU takes windows of time, and those of a window, by whether it is
# one pass (`ops.one_pass`). If not, what some twenty arrays of them take stays in cache, where whole sequences' don't.
# If it is, what it writes is memory that was written before, as that of larger arrays isn't.
LARGE = {False: (1 << 18, 1 << 16), True: (1 << 20, 1 << 19)}


def _dual_by_windows(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: ops.OfStates,
    learning: str,
    runs: str,
    needs_weights: bool,
    window: int,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """`gradients` by the dual form, windows of so many numbers one after the other, the last one first.

    Credit passes from each window to the one before; the partials of one window are forgotten before the next.
    """
    inputs, steps, batch, units = trajectory.x.shape
    length = max(1, window // (batch * units))
    matrices = cell.matrices if needs_weights else ()
    # units of all inputs next to one another, as the layer's own input reads them
    for_x = trajectory.x.new_empty(steps, batch, inputs, units).movedim(2, 0)
    by_weight: Sequence[Tensor] | None = None
    passed: Tensor | None = None
    for stop in range(steps, 0, -length):
        start = max(0, stop - length)
        part = trajectory.window(start, stop).with_saved(cell, weights)
        source = [None if of_state is None else of_state[start:stop] for of_state in delta]
        entering, for_x[:, start:stop], passed = ops.dual_of(
            cell, part, weights, source, matrices, inputs, learning, passed, backend=runs
        )
        if needs_weights:
            found = rfp.outer_products(part.before, matrices, weights, entering)
            by_weight = (
                found if by_weight is None else [a.add_(b) for a, b in zip(by_weight, found, strict=True)]
            )
    assert passed is not None
    return for_x, passed, [for_x.new_empty(0)] * len(weights) if by_weight is None else by_weight


def two_point(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    *,
    resets: Tensor | None = None,
    learning: Learning = "rfp",
    refine: int | Literal["exact"] = 0,
    forward: parallel.Forward = "auto",
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Any two-point cell over a sequence; the S states, each (T, B, N), differentiable by `learning`.

    Args:
        cell: the cell (`two_point.Cell`); its equations are its own.
        x: (J, T, B, N), T ≥ 1: the cell's per-unit inputs, its parameters last; any floating dtype.
        weights: the K recurrent ones, each (N, N), row i enters unit i; (H, b, b) with H·b = N, blocks along the
            diagonal; or (N,), the diagonal. Dtype and device of x; finite.
        state: S of (B, N).
        resets: (T, B) bool. True starts a new episode at that step: state and sensitivities of that row are
            forgotten before it.
        learning: how gradients of the weights, x and state are found.
            "rfp"   Recurrent Forward Propagation in its dual form. Equal to "bptt" if all weights are
                    diagonal; for others an approximation (SnAp-1 with each unit's S×S block kept).
            "bptt"  backpropagation through time: exact.
            "rtrl"  weights by exact real-time recurrent learning, S·b·B·Σ_k N·M_k numbers, b the units of a
                    head (b = N for dense weights); x and state, which forward sensitivities to the weights don't
                    reach, as "bptt". Exact.
            "eprop", "rflo", "snap0"   RFP with parts of M dropped, for comparison (`reference.rfp.transition`).
        refine: with "rfp": r rounds that bring its credits towards the exact ones, each a product over (T, B)
            and a scan; "exact": as many as it takes. Where they diverge, the exact sequential backward runs
            instead, with a warning (`reference.refine.Divergence`).
        forward: how the states are found; they are the same to the tolerance of `parallel.attempt`, and so is the
            gradient.
            "sequential"   a loop over time. Under torch.compile always.
            "parallel"     all steps at once, in rounds (`parallel`). Where they diverge, the loop runs instead, with
                           a warning (`parallel.Divergence`).
            "auto"         in parallel where that is predicted to pay: for long sequences of a small layer on a GPU,
                           and on the CPU, with one thread, of an affine cell. Else, and where it diverges, the loop.
        recompute: keep the states alone until backward(), which makes the gates again: one product more a matrix over
            (T, B), in torch's precision for products. RGC keeps x and 2 numbers a unit and step then, in place of 6.
        backend: of the loops over time, forward and RFP's backward one, and of the scan of the forward pass in
            parallel: "torch", "compile" (CPU), "triton" (GPU), or "auto", which takes the last two for float32 tensors
            (`ops`).

    Nothing is mutated.

    Raises:
        TypeError: a value that isn't a tensor, a dtype that isn't floating or differs from x's.
        ValueError: a wrong shape (T = 0 among them), device, learning, refine, forward or backend; a combination of
            learning and refine that can't be; weights not finite; a backend that can't run here.
    """
    check.shape("x", check.tensor("x", x), (len(cell.per_unit), "T", "B", "N"))
    check.floating("x", x)
    rounds = rule("learning", learning, refine)
    check.one_of("forward", forward, parallel.FORWARD)
    _, steps, batch, units = x.shape
    if len(weights) != len(cell.matrices):
        raise ValueError(f"weights must be {len(cell.matrices)}, one a recurrent matrix, got {len(weights)}")
    for matrix, weight in zip(cell.matrices, weights, strict=True):
        recurrent_weight(f"weight_{matrix.name}", weight, units, x)
    initial_state(state, cell.states, batch, units, x)
    if resets is not None:
        resets = check.mask("resets", resets, (steps, batch), x.device)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        ops.choose_scan(backend, x.device, x.dtype)  # refuses now what backward() would
    if compiling and isinstance(cell, RGCCell):
        states, _ = torch.ops.rjepa_triton.rgc(
            x, state[0], state[1], list(weights), resets, learning, rounds, backend, recompute
        )
        return states[0, 1:], states[1, 1:]
    mode: parallel.Forward = (
        "sequential" if compiling else forward
    )  # rounds end by a value, which no graph has
    return _TwoPoint.apply(cell, learning, rounds, backend, mode, recompute, resets, x, *state, *weights)


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
    refine: int | Literal["exact"] = 0,
    forward: parallel.Forward = "auto",
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Reciprocal gated circuit over a sequence (paper, Section 2.2 and eq. 13; Nayebi et al. 2022).

        s(t) = (1 - tanh(W_ms m(t-1))) x(t) + tanh(W_ss s(t-1)) s(t-1)
        m(t) = (1 - tanh(W_sm s(t-1))) x(t) + tanh(W_mm m(t-1)) m(t-1)

    Args:
        x: (T, B, N), T ≥ 1, any floating dtype.
        weight_ss, weight_ms, weight_mm, weight_sm: (N, N) each, row i enters unit i; (H, b, b) for a
            block-diagonal or (N,) for a diagonal one. Dtype and device of x; finite.
        state: (s0, m0), each (B, N); zero if None.
        resets: (T, B) bool. True starts a new episode at that step: state and sensitivities of that row are
            forgotten before it.
        learning, refine, forward, recompute, backend: as in `two_point`.

    Returns:
        s, m: (T, B, N) each. Nothing is mutated.

    Raises:
        TypeError: a value that isn't a tensor, a dtype that isn't floating or differs from x's.
        ValueError: a wrong shape (T = 0 among them), device, learning, forward or backend; weights not finite; a
            backend that can't run here.
    """
    check.shape("x", check.tensor("x", x), ("T", "B", "N"))
    if state is None:
        zero = x.new_zeros(x.shape[1:])
        state = (zero, zero)
    s, m = two_point(
        RGCCell(),
        x[None],
        (weight_ss, weight_ms, weight_mm, weight_sm),
        state,
        resets=resets,
        learning=learning,
        refine=refine,
        forward=forward,
        recompute=recompute,
        backend=backend,
    )
    return s, m


def recurrent_weight(name: str, weight: Tensor, units: int, x: Tensor) -> None:
    """Raise unless `weight` is a finite (N, N), (H, b, b) or (N,) tensor of x's dtype and device."""
    dims = check.tensor(name, weight).dim()
    if dims == 1:
        check.shape(name, weight, (units,), "to match x")
    elif dims == 3:
        size = weight.shape[-1]
        check.shape(
            name, weight, (units // max(size, 1), size, size), f"with {units} units in all to match x"
        )
        if weight_ops.own(weight).shape != (units,):
            raise ValueError(
                f"{name} must have blocks of {units} units in all, got shape {tuple(weight.shape)}"
            )
    else:
        check.shape(name, weight, (units, units), "or (H, b, b), or (N,), to match x")
    check.like(name, weight, "x", x)
    if not torch.compiler.is_compiling():  # a value can't steer a compiled graph
        check.finite(name, weight)


def state_tuple(state: object, names: Sequence[str]) -> tuple[Tensor, ...]:
    """`state` as a tuple of tensors, one a name; raise TypeError or ValueError if it is none."""
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"state must be a tuple ({', '.join(names)}), got {type(state).__name__}")
    if len(state) != len(names):
        raise ValueError(f"state must be ({', '.join(names)}), got {len(state)} entries")
    return tuple(check.tensor(f"state's {name}", value) for name, value in zip(names, state, strict=True))


def initial_state(state: object, names: Sequence[str], batch: int, units: int, x: Tensor) -> None:
    """Raise unless `state` is a tuple of (B, N) tensors, one a name, of x's dtype and device."""
    for name, value in zip(names, state_tuple(state, names), strict=True):
        check.shape(f"state's {name}", value, (batch, units), "to match x")
        check.like(f"state's {name}", value, "x", x)
