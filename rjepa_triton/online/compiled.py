"""An online learner as torch.compile sees it.

A compiled graph calls the operators of `operators.py`, whose arguments are tensors, numbers and strings: a learner is
one of their arguments by its number, and the time of a call's last step tells which call a backward pass belongs to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .autograd import PendingBackward

if TYPE_CHECKING:
    from .learner import OnlineLearner

# All learners that are alive, by their numbers.
LEARNERS: weakref.WeakValueDictionary[int, OnlineLearner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class CompiledCalls:
    """One learner's number, and its calls from compiled graphs whose backward passes may still come.

    It doesn't refer to the learner, so that nothing keeps a learner alive that its user has dropped.
    """

    def __init__(self, learner: OnlineLearner) -> None:
        self.number = next(_numbers)
        LEARNERS[self.number] = learner
        # Each call of the operator takes the clock that the call before returned, so that torch.compile neither merges
        # two calls nor changes their order.
        self._clock = torch.zeros((), dtype=torch.int64)
        self._pending: dict[int, tuple[PendingBackward, Sequence[Tensor]]] = {}

    def outputs(self, x: Tensor, resets: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
        """The cell's outputs (C, B, N) for x (C, B, F), by the operator that torch.compile doesn't look into."""
        made = torch.ops.rjepa_triton.learner_steps(self.number, x, resets, list(weights), self._clock)
        *outputs, self._clock = made
        return outputs

    def add(self, pending: PendingBackward, input_weights: Sequence[Tensor], lag: int) -> int:
        """Keep a call's backward pass, drop those that no loss may reach, and return the time of its last step."""
        time = pending.record.end
        self._pending[time] = pending, input_weights
        while len(self._pending) > 1 + lag:
            del self._pending[next(iter(self._pending))]
        return time

    def gradients(self, time: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of x (C, B, F) and of the weights, for the call whose last step was at `time`.

        grads: of the cell's outputs, (C, B, N) each. Raises RuntimeError if that call's backward comes too late.
        """
        if time not in self._pending:
            raise RuntimeError(
                f"backward of step {time} comes too late: call backward() before the steps after it"
            )
        pending, input_weights = self._pending[time]
        for_x, _, by_weight = pending.gradients(grads, None, input_weights)
        assert for_x is not None
        return [for_x, *(gradient for gradient in by_weight if gradient is not None)]
