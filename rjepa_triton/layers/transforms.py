"""Layers under torch.func (grad, vmap, jvp, jacrev, …), whose transforms don't look into an autograd function.

There the states come from a plain loop in torch, of which a transform takes the derivative that the learning rule has:

    "bptt", "rtrl", refine="exact"   of the loop itself
    "rfp"                            of the loop in which W c is W c⁰ + w ⊙ (c - c⁰), w the diagonal of W and c⁰ = c
                                     without its derivative: the graph that RFP differentiates (docs/exactness.md)

It keeps all of the graph, and takes longer than the layer does elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.two_point import Cell, state_read


def active() -> bool:
    """Whether a transform of torch.func runs."""
    return torch._C._are_functorch_transforms_active()


def states(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None,
    learning: str,
    rounds: int | None,
) -> tuple[Tensor, ...]:
    """The S states, (T, B, N) each, of a sequence: the arguments are those of `functional.two_point`.

    Raises ValueError, naming the nearest that works, for a rule whose derivative a loop doesn't have, and for a cell
    with a surrogate derivative.
    """
    full = learning in ("bptt", "rtrl") or (learning == "rfp" and rounds is None)
    if not full and (learning, rounds) != ("rfp", 0):
        asked = f"learning={learning!r}" + (f" with refine={rounds}" if rounds else "")
        raise ValueError(
            f"{asked} can't go under torch.func, whose transforms need a loop that has the rule's derivative: the "
            "nearest that can are 'rfp' without refine, refine='exact', and 'bptt'"
        )
    if type(cell).partials is not Cell.partials:
        raise ValueError(
            f"{type(cell).__name__} has a surrogate derivative and can't go under torch.func, whose transforms take "
            "the derivative of update(): call the layer and its backward() outside of it"
        )
    return loop(cell, x, weights, state, resets, full)


def loop(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None,
    full: bool,
) -> tuple[Tensor, ...]:
    """The plain loop. full: whether its derivative is its own, else RFP's."""
    now, made = tuple(state), []
    for t in range(x.shape[1]):
        if resets is not None:
            now = tuple(torch.where(resets[t, :, None], 0, value) for value in now)
        gates: list[Tensor | None] = [None] * len(cell.gates)
        for matrix, weight in zip(cell.matrices, weights, strict=True):
            signal, gate = now[state_read(matrix)], matrix.into[1]
            if full:
                arrived = weight_ops.multiply(weight, signal)
            else:
                value = signal.detach()
                arrived = weight_ops.multiply(weight, value) + weight_ops.own(weight) * (signal - value)
            before = gates[gate]
            gates[gate] = arrived if before is None else before + arrived
        read = [torch.zeros_like(x[0, t]) if gate is None else gate for gate in gates]
        now = cell.update(now, read, x[:, t].unbind(0))
        made.append(now)
    return tuple(torch.stack(of_state) for of_state in zip(*made, strict=True))
