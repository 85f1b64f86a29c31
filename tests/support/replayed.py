"""What a learner's gradients must be, by their definition: its steps replayed in float64, differentiated by autograd.

It shares nothing with the learner but the cell's `update`: no partials, no Γ, no forms, no backends. Every step keeps
the weights that it ran with as leaves of its own. The gradient of a loss of step t is then the sum, over the steps
t' ≤ t, of the derivatives with respect to the weights of step t', in the graph that the rule differentiates:

    rfp     a matrix passes gradients to the state that it multiplies through its diagonal alone
    eprop   through none of its entries
    rflo    so, and each state's own path leads to itself alone
    snap0   nothing passes from step to step
    rtrl    the network itself
    tbptt   the network itself, cut where the chunk began
    carry   the network itself within the chunk; what it passes to the state before the chunk goes on as rfp
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

from rjepa_triton import ELSTM, LRU, TwoPointRNN

F64 = torch.float64
PASSES = {"rfp": "own", "eprop": "none", "rflo": "none", "snap0": "none"}


@dataclass(frozen=True)
class Step:
    """A step that has run: its weights and those of the readout, x (B, F) and resets (B,) as given, the call that it
    belongs to, and the step with which that call's chunk began."""

    weights: tuple[Tensor, ...]
    readout: tuple[Tensor, ...]
    x: Tensor
    resets: Tensor
    call: int
    chunk: int


@dataclass(frozen=True)
class Loss:
    """Σ_t ⟨weight(t), output(t)⟩ over the steps start … stop - 1 of one call. weight (C, B, N)."""

    start: int
    stop: int
    weight: Tensor


def leaf(value: Tensor) -> Tensor:
    return value.detach().to(F64).clone().requires_grad_()


def readout_of(layer: TwoPointRNN) -> tuple[Tensor, ...]:
    """Copies of the parameters that lie outside the recurrence, in the order of `named_parameters`."""
    return tuple(leaf(p) for name, p in layer.named_parameters() if name not in layer._names)


def step_of(layer: TwoPointRNN, x: Tensor, resets: Tensor, call: int, chunk: int) -> Step:
    return Step(tuple(map(leaf, layer.weights())), readout_of(layer), leaf(x), resets, call, chunk)


def after(
    layer: TwoPointRNN, step: Step, state: Sequence[Tensor], rule: str, full: bool
) -> tuple[Tensor, ...]:
    """The states after one step. full: whether gradients pass through whole matrices."""
    cell = layer.cell
    state = tuple(torch.where(step.resets[:, None], torch.zeros_like(c), c) for c in state)
    if rule == "snap0" and not full:
        state = tuple(c.detach() for c in state)
    through = "full" if full else PASSES[rule]
    gates: list[Tensor | None] = [None] * len(cell.gates)
    inputs: list[Tensor | None] = [None] * (len(cell.inputs) + len(cell.parameters))
    if layer.input_size is None:
        inputs[0] = step.x
    for matrix, weight in zip(layer.matrices, step.weights, strict=True):
        if matrix.reads == "input":
            part = step.x @ weight.T
        elif matrix.reads == "one":
            part = weight.expand(len(step.x), -1)
        else:
            part = oracle.matvec(weight, state[matrix.reads], through)
        kind, index = matrix.into
        into = gates if kind == "gate" else inputs
        into[index] = part if into[index] is None else into[index] + part
    if rule != "rflo" or full:
        return cell.update(state, gates, inputs)  # type: ignore[arg-type]
    return tuple(
        cell.update([c if i == nu else c.detach() for i, c in enumerate(state)], gates, inputs)[nu]  # type: ignore[arg-type]
        for nu in range(len(state))
    )


def output(layer: TwoPointRNN, step: Step, state: Sequence[Tensor]) -> Tensor:
    given = [state[nu] for nu in layer.cell.outputs]
    if isinstance(layer, ELSTM):
        of_x, bias, of_c = step.readout
        return torch.sigmoid(step.x @ of_x.T + bias + given[0] @ of_c.T) * given[0]
    if isinstance(layer, LRU):
        re, im, skip = step.readout
        return given[0] @ re.T - given[1] @ im.T + step.x @ skip.T
    assert not step.readout
    return given[0]


def states(
    layer: TwoPointRNN, steps: Sequence[Step], start: Sequence[Tensor], rule: str, full: bool = False
) -> list[tuple[Tensor, ...]]:
    found, now = [], tuple(start)
    for step in steps:
        now = after(layer, step, now, rule, full)
        found.append(now)
    return found


def zeros(layer: TwoPointRNN, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(batch, layer.hidden_size, dtype=F64) for _ in layer.cell.states)


def trajectory(layer: TwoPointRNN, steps: Sequence[Step]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The outputs (B, N) of all steps, and the states at the end."""
    with torch.no_grad():
        found = states(layer, steps, zeros(layer, len(steps[0].x)), "rfp")
        return [output(layer, step, now) for step, now in zip(steps, found, strict=True)], found[-1]


def gradients(
    layer: TwoPointRNN,
    steps: Sequence[Step],
    losses: Sequence[Loss],
    rule: str,
    before_all: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The gradients of all parameters, in the order of `named_parameters`, and for each loss those of its call's x.

    before_all: the states (B, N) before the first step; None: zeros.
    """
    by_weight: dict[str, Tensor] = {
        name: torch.zeros_like(p, dtype=F64) for name, p in layer.named_parameters()
    }
    of_inputs = []
    outside = [name for name, _ in layer.named_parameters() if name not in layer._names]

    def add(
        names: Sequence[str], leaves: Sequence[Sequence[Tensor]], loss: Tensor, delta: object = None
    ) -> None:
        flat = [each for leaves_of in leaves for each in leaves_of]
        if not flat or not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, flat, delta, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        for i, gradient in enumerate(found):
            if gradient is not None:
                by_weight[names[i % len(names)]] += gradient

    for loss in losses:
        taken = steps[: loss.stop]
        call = range(loss.start, loss.stop)
        start = zeros(layer, len(taken[0].x)) if before_all is None else before_all

        def total(
            found: Sequence[tuple[Tensor, ...]], first: int, loss: Loss = loss, call: range = call
        ) -> Tensor:
            each = [output(layer, steps[t], found[t - first]) * loss.weight[t - loss.start] for t in call]
            return torch.stack(each).sum()

        full = rule in ("rtrl", "tbptt", "carry")
        inner = "rfp" if full else rule
        weights = [step.weights for step in taken]
        if rule in ("tbptt", "carry"):
            first = steps[loss.start].chunk
            past = states(layer, taken[:first], start, inner)
            before = past[-1] if past else start
            base = [c.detach().requires_grad_() for c in before]
            value = total(states(layer, taken[first:], base, inner, True), first)
            add(layer._names, weights[first:], value)
            if rule == "carry" and past:
                passed = torch.autograd.grad(value, base, retain_graph=True, allow_unused=True)
                for c, credit in zip(before, passed, strict=True):
                    if credit is not None:
                        add(layer._names, weights[:first], c, credit)
        else:
            value = total(states(layer, taken, start, inner, full), 0)
            add(layer._names, weights, value)
        # outside of the recurrence, and the input: of this call alone
        with torch.no_grad():
            before = states(layer, taken[: loss.start], start, "rfp")[-1] if loss.start else start
        alone = total(states(layer, taken[loss.start :], before, inner, full), loss.start)
        add(outside, [steps[t].readout for t in call], alone)
        inputs = [steps[t].x for t in call]
        found = torch.autograd.grad(alone, inputs, allow_unused=True)
        of_inputs.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
        )
    return list(by_weight.values()), of_inputs
