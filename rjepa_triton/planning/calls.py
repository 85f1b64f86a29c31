"""How many torch operators a function calls, and what a layer's parts were found to call.

`counted` runs a function and counts. `online.counting` counts every part of a training step of a layer that way, on a
few units, and returns `Calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .work import Work

# Operators that launch nothing: they allocate memory without filling it, or return another name for an array.
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::alias")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Line:
    """Work that grows linearly with the number of time steps: fixed + each · steps."""

    fixed: Work
    each: Work

    def at(self, steps: float) -> Work:
        return self.fixed + self.each * steps


@dataclass(frozen=True)
class Calls:
    """The torch calls (`calls` and `views` of a `Work`) of each part of a layer's training step.

    step        one time step of the layer, recorded
    loop        several time steps of it
    linearize   the partials and the transition M of recorded steps; the same for any number of steps
    stacked     putting φ and y into arrays, one for each group of matrices of one shape
    groups      how many such groups there are
    gamma       Γ's step and the gradient in plain torch, without `stacked`
    read        reading Γ with a credit, which gives a gradient and leaves Γ as it is
    chunk       Γ's update by a chunk of steps in plain torch, with the suffix products
    credit      RFP's credits of some steps in plain torch
    exact       BPTT's credits of some steps
    outer       the products Σ E yᵀ of all matrices
    eager       a Python loop over the cell, and its backward by autograd
    eager_kept  how many numbers of one unit, batch row and time step autograd keeps for that backward
    rtrl        a step of exact RTRL with dense weights
    rtrl_heads  the same with heads
    arrays      how many arrays a recorded block has
    window      how many numbers these hold for one unit, batch row and time step, the layer's input left out
    """

    step: Work
    loop: Line
    linearize: Work
    stacked: Work
    groups: int
    gamma: Work
    read: Work
    chunk: Line
    credit: Line
    exact: Line
    outer: Work
    eager: Line
    eager_kept: int
    rtrl: Work
    rtrl_heads: Work
    arrays: int
    window: int


class _Counter(TorchDispatchMode):
    """Counts calls of torch operators; those that only make views or launch nothing are counted apart, as views."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first call imports all of torch.compile, which takes seconds; nothing compiled is counted.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if func.is_view or name.startswith(_NO_LAUNCH):
            self.work += Work(views=1)
        else:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            moved = 0 if name.startswith(_PRODUCTS) else sum(tensor.nbytes for tensor in tensors)
            self.work += Work(calls=1, bytes=moved)
        return out


def counted(function: Callable[[], object]) -> Work:
    """Run `function` once and count: its torch calls, its views, and the bytes that all but its products move."""
    with _Counter() as counter:
        function()
    return counter.work
