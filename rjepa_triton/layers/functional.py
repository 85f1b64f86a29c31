"""Recurrent layers as functions: the states over a sequence, whose gradients a chosen learning rule finds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks as check
from .._autograd import once_differentiable
from ..backend import native_backend, operations
from ..cells import weights as weight_ops
from ..cells.builtin import RGCCell
from ..cells.keys import key_of
from ..cells.two_point import Cell, Trajectory
from ..rules import refine as refinement
from ..rules import rfp, rtrl
from . import parallel, transforms

Learning = Literal["rfp", "bptt", "rtrl", "eprop", "rflo", "snap0"]
LEARNING = ("rfp", "bptt", "rtrl", "eprop", "rflo", "snap0")
# The rules that run online only, and the nearest rule to each on sequences.
ONLINE_ONLY = {"uoro": "rtrl", "tbptt": "bptt"}


def rule(name: str, learning: str, refine: object) -> int | None:
    """The number of rounds that `refine` asks for; None for "exact", which takes as many as are needed.

    Raises TypeError or ValueError for a bad value and for a combination that can't run. name: of the argument
    `learning`.
    """
    if learning in ONLINE_ONLY:
        raise ValueError(
            f"{name}={learning!r} learns online only (OnlineLearner(layer, batch, learning={learning!r})); the nearest "
            f"rule on sequences is {ONLINE_ONLY[learning]!r}"
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
    """Runs a two-point cell over a sequence; a learning rule is its backward pass. tensors: S states, K weights."""

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
    @once_differentiable
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
    delta: operations.StateArrays,
    learning: str,
    rounds: int | None = 0,
    backend: str = "auto",
    needs_weights: bool = True,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Gradients of x (J, T, B, N), of the initial state (S, B, N) and of the weights, by a learning rule.

    delta: the loss's gradient with respect to the states, (S, T, B, N), or one (T, B, N) for each state, None for
    zeros.
    rounds: as `rule` returns them. needs_weights: else the weights' gradients are empty tensors.
    """
    trajectory = rfp.emptied(trajectory, delta)
    x = trajectory.x
    runs = operations.choose_scan(backend, x.device, x.dtype)
    if learning in rfp.RULES and rounds == 0 and runs != "triton" and x.device.type == "cpu":
        large, window = LARGE[native_backend.one_pass(cell, learning, runs)]
        if x[0].numel() > large:
            return _dual_by_windows(cell, trajectory, weights, delta, learning, runs, needs_weights, window)
    trajectory = trajectory.with_saved(cell, weights)
    inputs = len(cell.per_unit)
    by_weight: Sequence[Tensor] = [x.new_empty(0)] * len(weights)
    if learning == "rtrl" and needs_weights and weights:
        delta = operations.joined_states(delta, trajectory)
        lin, _ = operations.linearize(cell, trajectory, weights, backend=runs)
        _, for_x, first = operations.exact(cell, trajectory, lin, weights, delta, backend=runs)
        return for_x, first, rtrl.weight_gradients(lin, cell.matrices, weights, delta)
    if learning not in rfp.RULES:
        entering, for_x, first = operations.exact_of(cell, trajectory, weights, delta, backend=runs)
        if needs_weights:
            by_weight = rfp.outer_products(trajectory.before, cell.matrices, weights, entering)
        return for_x, first, by_weight
    if rounds == 0:
        matrices = cell.matrices if needs_weights else ()
        entering, for_x, first = operations.dual_of(
            cell, trajectory, weights, delta, matrices, inputs, learning, backend=runs
        )
        if needs_weights:
            by_weight = rfp.outer_products(trajectory.before, matrices, weights, entering)
        return for_x, first, by_weight
    delta = operations.joined_states(delta, trajectory)
    lin, m = operations.linearize(cell, trajectory, weights, learning, backend=runs)
    scan = functools.partial(operations.reverse_scan, backend=runs)
    credit, first = refinement.credits(lin, m, cell.matrices, weights, delta, rounds=rounds, scan=scan)
    if needs_weights:
        by_weight = rfp.weight_gradients(lin, cell.matrices, weights, credit)
    return rfp.input_gradient(lin, credit, inputs), first, by_weight


# On the CPU the dual form runs over windows of time when T·B·N is larger than the first number; a window has the second
# as its T·B·N. The key is whether the dual form is one compiled pass (`native_backend.one_pass`). Where it isn't, some
# twenty arrays of a window's size stay in cache, which those of whole sequences don't. Where it is, a window's results
# go to memory that has been written before, which is faster than the new memory that larger arrays get.
LARGE = {False: (1 << 18, 1 << 16), True: (1 << 20, 1 << 19)}


def _dual_by_windows(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: operations.StateArrays,
    learning: str,
    runs: str,
    needs_weights: bool,
    window: int,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """`gradients` by the dual form, over windows of T·B·N = `window` numbers, the last window first.

    Credit passes from each window to the one before. The partials of a window are freed before the next is computed.
    """
    inputs, steps, batch, units = trajectory.x.shape
    length = max(1, window // (batch * units))
    matrices = cell.matrices if needs_weights else ()
    # In memory the J inputs of a unit lie side by side, which is the layout that the layer's input projection reads.
    for_x = trajectory.x.new_empty(steps, batch, inputs, units).movedim(2, 0)
    by_weight: Sequence[Tensor] | None = None
    passed: Tensor | None = None
    for stop in range(steps, 0, -length):
        start = max(0, stop - length)
        part = trajectory.window(start, stop).with_saved(cell, weights)
        source = [None if of_state is None else of_state[start:stop] for of_state in delta]
        entering, for_x[:, start:stop], passed = operations.dual_of(
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
    """Run any two-point cell over a sequence. Returns its S states, each (T, B, N), differentiable by `learning`.

    The states have no number in common, but lie in one array: clone one that is to be kept without the others.

    Args:
        cell: the cell (`cells.two_point.Cell`), which defines the equations.
        x: (J, T, B, N), T ≥ 1: the cell's per-unit inputs, its parameters last; any floating dtype.
        weights: the K recurrent weights, of x's dtype and device. Each is (N, N), whose row i enters unit i;
            (H, b, b) with H·b = N, the blocks of a block-diagonal matrix; or (N,), a diagonal.
        state: the S initial states, (B, N) each.
        resets: (T, B) bool. True starts a new episode at that step: state and sensitivities of that row are
            forgotten before it.
        learning: how the gradients of the weights, x and state are found.
            "rfp"   Recurrent Forward Propagation in its dual form. Equal to "bptt" if all weights are diagonal; else an
                    approximation (SnAp-1 with each unit's S×S block kept).
            "bptt"  backpropagation through time: exact.
            "rtrl"  exact. The weights' gradients come from real-time recurrent learning, which takes S·b·B·Σ_k N·M_k
                    numbers with b units a head (b = N for dense weights). Sensitivities to the weights say nothing of
                    x and state, whose gradients are found as in "bptt".
            "eprop", "rflo", "snap0"   RFP with parts of M dropped, for comparison (`rules.rfp.transition`).
        refine: with "rfp": r rounds that move its credits towards the exact ones, each of one product over (T, B) and
            one scan; "exact": as many rounds as it takes. Where they diverge, the exact sequential backward pass runs
            instead, with a warning (`rules.refine.Divergence`).
        forward: how the states are found. The states are the same to the tolerance of `parallel.attempt`, and so are
            the gradients.
            "sequential"   by a loop over time; always so under torch.compile, while a CUDA graph is captured, and for
                           tensors without values (meta, fake)
            "parallel"     all steps at once, in rounds (`parallel`), each of which waits for the device to tell whether
                           it is the last. Where these diverge, the loop runs instead, with a
                           warning (`parallel.Divergence`).
            "auto"         in parallel where that is predicted to be faster: for long sequences of a small layer on a
                           GPU, and for an affine cell on the CPU with one thread. Elsewhere, and where the rounds
                           diverge, by the loop.
        recompute: keep only the states until backward(), which then computes the gates again: one more product over
            (T, B) for each matrix, in torch's precision for products. An RGC then keeps x and 2 numbers a unit and
            step, in place of 6.
        backend: runs the loops over time of the forward pass and of RFP's backward pass, and the scan of a parallel
            forward pass: "torch", "compile" (CPU), "triton" (GPU), or "auto", which chooses among them for float32
            tensors (`operations.choose_scan`).

    Nothing is mutated. Under the transforms of torch.func a plain loop runs in place of all this, which has the
    derivative of "bptt", "rtrl", "rfp" and refine="exact" (`layers.transforms`); other rules raise ValueError there.

    Raises:
        TypeError: for a value that isn't a tensor, and a dtype that isn't floating or differs from x's.
        ValueError: for a wrong shape (T = 0 included), device, learning, refine, forward or backend; a combination of
            learning and refine that can't run; a backend that can't run here.

    Values aren't looked at, since reading them would wait for the device: NaN in x or a weight gives NaN. An
    `OnlineLearner` refuses weights that aren't finite when it is made.
    """
    check.shape("x", check.tensor("x", x), (len(cell.per_unit), "T", "B", "N"))
    check.floating("x", x)
    rounds = rule("learning", learning, refine)
    check.one_of("forward", forward, parallel.FORWARD)
    check.boolean("recompute", recompute)
    _, steps, batch, units = x.shape
    if len(weights) != len(cell.matrices):
        raise ValueError(
            f"weights must be {len(cell.matrices)}, one for each recurrent matrix, got {len(weights)}"
        )
    for matrix, weight in zip(cell.matrices, weights, strict=True):
        recurrent_weight(f"weight_{matrix.name}", weight, units, x)
    initial_state(state, cell.states, batch, units, x)
    if resets is not None:
        resets = check.mask("resets", resets, (steps, batch), x.device)
    compiling = torch.compiler.is_compiling()
    if torch.onnx.is_in_onnx_export():  # ONNX has no operator for the loop, and learns nothing
        return transforms.loop(cell, x, weights, state, resets, full=True)
    if not compiling and transforms.active():
        return transforms.states(cell, x, weights, state, resets, learning, rounds)
    if not compiling:
        operations.choose_scan(backend, x.device, x.dtype)  # raises here rather than in backward()
    key = cell.__dict__.get("_key") if compiling else None  # made with the layer
    if key is not None:
        states, _ = torch.ops.rjepa_triton.two_point(
            x, list(state), list(weights), resets, key, learning, rounds, backend, recompute
        )
        return states[:, 1:].unbind(0)
    # how many rounds there are depends on values, which a compiled or captured graph and a fake tensor don't know
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    known = check.values_known(x) and not capturing
    mode: parallel.Forward = forward if known else "sequential"
    if not compiling and not check.values_known(x):
        backend = "torch"  # there is no memory to give to other code
    return _TwoPoint.apply(cell, learning, rounds, backend, mode, recompute, resets, x, *state, *weights)


_RGC = RGCCell()
key_of(_RGC)


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
        weight_ss, weight_ms, weight_mm, weight_sm: of x's dtype and device. Each is (N, N), whose row i enters
            unit i; (H, b, b), block-diagonal; or (N,), a diagonal.
        state: (s0, m0), each (B, N); zero if None.
        resets: (T, B) bool. True starts a new episode at that step: state and sensitivities of that row are
            forgotten before it.
        learning, refine, forward, recompute, backend: as in `two_point`.

    Returns:
        s, m: (T, B, N) each, which have no number in common, but lie in one array: clone one that is to be kept without
        the other. Nothing is mutated.

    Raises:
        TypeError, ValueError: as `two_point` does.
    """
    check.shape("x", check.tensor("x", x), ("T", "B", "N"))
    if state is None:
        zero = x.new_zeros(x.shape[1:])
        state = (zero, zero)
    s, m = two_point(
        _RGC,
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
    """Raise unless `weight` is an (N, N), (H, b, b) or (N,) tensor of x's dtype and device."""
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


def state_tuple(state: object, names: Sequence[str]) -> tuple[Tensor, ...]:
    """`state` as a tuple of tensors, one for each name. Raises TypeError or ValueError if it isn't one."""
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"state must be a tuple ({', '.join(names)}), got {type(state).__name__}")
    if len(state) != len(names):
        raise ValueError(f"state must be ({', '.join(names)}), got {len(state)} entries")
    return tuple(check.tensor(f"state's {name}", value) for name, value in zip(names, state, strict=True))


def initial_state(state: object, names: Sequence[str], batch: int, units: int, x: Tensor) -> None:
    """Raise unless `state` is a tuple of (B, N) tensors, one for each name, of x's dtype and device."""
    for name, value in zip(names, state_tuple(state, names), strict=True):
        check.shape(f"state's {name}", value, (batch, units), "to match x")
        check.like(f"state's {name}", value, "x", x)
