"""An online learner as torch.compile sees it.

A compiled graph calls the operators of `operators.py`, whose arguments are tensors, numbers and strings. A learner is
one of their arguments by its handle, an int64 tensor. A number would be a constant of the compiled graph, which would
then belong to one learner; a tensor is an input, so that one graph serves all learners of the same shapes. Copies and
unpickled learners get handles of their own.

Each operator also takes the clock that the operator before it returned, and returns a new one. So torch.compile keeps
each call, merges no two of them, and keeps their order.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._device import without_autocast
from .autograd import PendingBackward

if TYPE_CHECKING:
    from .learner import OnlineLearner

# All learners that are alive, by their numbers.
LEARNERS: weakref.WeakValueDictionary[int, OnlineLearner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def learner_of(handle: Tensor) -> OnlineLearner:
    """The learner with this handle. Raises RuntimeError if it is gone."""
    learner = LEARNERS.get(int(handle))
    if learner is None:
        raise RuntimeError(
            "the OnlineLearner of a compiled step is gone: keep it until the backward() of its last step has run"
        )
    return learner


class CompiledCalls:
    """One learner's handle, and its calls from compiled graphs whose backward passes may still come.

    It doesn't refer to the learner, so that nothing keeps a learner alive that its user has dropped.
    """

    def __init__(self, learner: OnlineLearner) -> None:
        self.number = next(_numbers)
        LEARNERS[self.number] = learner
        # On the CPU whatever the default device is: the operators read it.
        self.handle = torch.tensor(self.number, dtype=torch.int64, device="cpu")
        self._clock = _time(0)
        self._calls = itertools.count(1)
        self._pending: dict[int, tuple[PendingBackward, Sequence[Tensor]]] = {}

    def outputs(
        self, x: Tensor, resets: Tensor | None, weights: Sequence[Tensor], units: int, outputs: int
    ) -> list[Tensor]:
        """The cell's outputs (C, B, N) for x (C, B, F), by an operator. units: N; outputs: how many there are."""
        made = torch.ops.rjepa_triton.learner_steps(
            self.handle, x, resets, list(weights), self._clock, units, outputs
        )
        *found, self._clock = made
        return found

    def reset(self, mask: Tensor | None) -> None:
        """Reset the learner by an operator. mask (B,) bool, or None for all rows."""
        self._clock = torch.ops.rjepa_triton.learner_reset(self.handle, mask, self._clock)

    def state(self, like: Tensor, states: int) -> tuple[Tensor, ...]:
        """Copies of the learner's states (B, N), by an operator. like (B, N): a tensor of their dtype and device."""
        *found, self._clock = torch.ops.rjepa_triton.learner_state(self.handle, like, self._clock, states)
        return tuple(found)

    def add(self, pending: PendingBackward, input_weights: Sequence[Tensor], lag: int) -> Tensor:
        """Keep a call's backward pass, drop those that no loss may reach, and return the call's number as a clock."""
        call = next(self._calls)
        self._pending[call] = pending, input_weights
        while len(self._pending) > 1 + lag:
            del self._pending[next(iter(self._pending))]
        return _time(call)

    def gradients(self, call: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of x (C, B, F) and of the weights, for the call of this number.

        grads: of the cell's outputs, (C, B, N) each. Raises RuntimeError if that call's backward comes too late.
        """
        if call not in self._pending:
            raise RuntimeError(
                "backward of a compiled step comes too late: call backward() before the steps after it"
            )
        pending, input_weights = self._pending[call]
        with torch.no_grad(), without_autocast(grads[0].device):
            for_x, _, by_weight = pending.gradients(grads, None, input_weights)
        assert for_x is not None
        return [for_x, *(gradient for gradient in by_weight if gradient is not None)]


def _time(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def refuse_while_compiling(what: str, instead: str) -> None:
    """Raise RuntimeError while torch.compile traces: the graph would hold what `what` is now, not when it runs."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{what} can't go under torch.compile: {instead}")
