"""Whether a layer's gradient is exact by construction, and why. `online/fidelity.py` measures how far off one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.two_point import Cell
from . import rtrl


@dataclass(frozen=True)
class Exactness:
    """Whether a gradient is exact by construction, and why. Its truth value is `exact`."""

    exact: bool
    why: str

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        return f"{'exact' if self.exact else 'not exact'}: {self.why}"


# What each rule leaves out of the gradient.
DROPPED = {
    "eprop": "each unit's path through its own recurrent weights",
    "rflo": "each unit's path through its own recurrent weights, and from one of its states to another",
    "snap0": "all that came before the step",
}


def exactness(
    cell: Cell,
    weights: Sequence[Tensor],
    learning: str,
    refine: object = 0,
    credit: str = "own",
    block: int | None = None,
) -> Exactness:
    """Whether the rule `learning` gives the exact gradient of a layer of `cell` with the recurrent `weights`.

    learning, refine, credit and block are options of `OnlineLearner` and `functional.two_point`. Where weights change
    during a sequence, "exact" refers to the gradient at the weights that each step ran with.
    """
    joining = [
        f"weight_{matrix.name}"
        for matrix, weight in zip(cell.matrices, weights, strict=True)
        if weight.dim() > 1 and weight.shape[-1] > 1
    ]
    between = f"credit that passes from unit to unit through {', '.join(joining)}"
    if learning == "rtrl" and block is not None and joining:
        units = weights[0].numel() // weight_ops.fan_in(weights[0])
        if (head := units // rtrl.joint_heads(weights, units)) > block:
            return Exactness(
                False,
                f"block={block} of the {head} units of a head leaves out credit that passes from block to block",
            )
    if learning in ("bptt", "rtrl"):
        return Exactness(True, f"learning={learning!r} takes the full recurrent Jacobian")
    if learning == "uoro":
        return Exactness(False, "learning='uoro' is exact on average over its random signs alone, and noisy")
    if learning == "tbptt":
        return Exactness(False, "learning='tbptt' leaves out all that came before the chunk")
    if learning in DROPPED:
        nothing = learning == "eprop" or (learning == "rflo" and len(cell.states) == 1)
        if nothing and not cell.matrices:
            return Exactness(
                True, f"there are no recurrent weights, so learning={learning!r} leaves out nothing"
            )
        return Exactness(False, f"learning={learning!r} leaves out {DROPPED[learning]}")
    if not joining:
        kind = "recurrent weights are diagonal" if cell.matrices else "there are no recurrent weights"
        return Exactness(True, f"{kind}, so no credit passes from unit to unit between steps")
    if credit == "carry":
        within = (
            "exact within a chunk" if refine in (0, "exact") else f"refined by {refine} rounds within a chunk"
        )
        return Exactness(False, f"{within}; before it, learning='rfp' leaves out {between}")
    if refine == "exact":
        return Exactness(True, f"refine='exact' brings in {between}, to a tolerance")
    if refine:
        return Exactness(False, f"refine={refine} leaves out {between} more than {refine} times")
    return Exactness(
        False,
        f"learning='rfp' leaves out {between}; exact are recurrence='diagonal', learning='rtrl' or 'bptt', and "
        "refine='exact'",
    )
