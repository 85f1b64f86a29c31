"""A learner of B batch rows beside B learners of one row each: what the rows of a batch are to do, by themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rjepa_triton import OnlineLearner, TwoPointRNN

INPUTS = 3


class RowByRow:
    """One learner of `batch` rows, and one learner for each row, all of copies of one layer."""

    def __init__(self, layer: TwoPointRNN, batch: int, **options: Any) -> None:
        self._layer, self._options = copy.deepcopy(layer), options
        self.learner = OnlineLearner(layer, batch, **options)
        self.own = [self._one() for _ in range(batch)]
        self._loss: Tensor | float = 0.0
        self._own_losses: list[Tensor | float] = [0.0] * batch
        self._random = torch.Generator().manual_seed(0)

    def _one(self) -> OnlineLearner:
        return OnlineLearner(copy.deepcopy(self._layer), 1, **self._options)

    def step(self, active: Tensor | None = None) -> None:
        """One step of the active rows. x of the others is NaN, and no loss reads them."""
        dtype = self.learner.layer.weights()[0].dtype
        x = torch.randn(len(self.own), INPUTS, generator=self._random, dtype=torch.float64).to(dtype)
        rows = [True] * len(self.own) if active is None else active.tolist()
        x[~torch.tensor(rows)] = torch.nan
        output = self.learner(x) if active is None else self.learner(x, active)
        for row, moves in enumerate(rows):
            if moves:
                alone = self.own[row](x[row : row + 1])
                torch.testing.assert_close(output[row : row + 1], alone)
                self._loss = self._loss + output[row].square().sum()
                self._own_losses[row] = self._own_losses[row] + alone.square().sum()

    def reset(self, mask: Tensor) -> None:
        self.learner.reset(mask)
        for row in mask.nonzero()[:, 0].tolist():
            self.own[row].reset()

    def add_rows(self, count: int) -> None:
        """After an update, as `remove_rows`."""
        self.learner.add_rows(count)
        self.own += [self._one() for _ in range(count)]
        for one in self.own[-count:]:
            one.layer.load_state_dict(self.own[0].layer.state_dict())
        self._own_losses = [0.0] * len(self.own)

    def remove_rows(self, mask: Tensor) -> None:
        self.learner.remove_rows(mask)
        self.own = [one for one, goes in zip(self.own, mask.tolist(), strict=True) if not goes]
        self._own_losses = [0.0] * len(self.own)

    def update(self) -> None:
        """Compare the gradients of the losses since the last update, and states; then change all weights alike."""
        learners = [self.learner, *self.own]
        for learner in learners:
            learner.zero_grad(set_to_none=False)
            for parameter in learner.parameters():
                parameter.grad = torch.zeros_like(parameter)
        for learner, loss in zip(learners, [self._loss, *self._own_losses], strict=True):
            if isinstance(loss, Tensor):
                loss.backward()
            learner.end_chunk()
        for name, parameter in self.learner.named_parameters():
            want = sum(one.get_parameter(name).grad for one in self.own)  # type: ignore[misc]
            torch.testing.assert_close(parameter.grad, want, msg=lambda text, name=name: f"{name}: {text}")
        self.compare_states()
        with torch.no_grad():
            for learner in learners:
                for parameter in learner.parameters():
                    parameter.mul_(0.97)
        self._loss, self._own_losses = 0.0, [0.0] * len(self.own)

    def compare_states(self) -> None:
        for nu, state in enumerate(self.learner.state):
            torch.testing.assert_close(state, torch.cat([one.state[nu] for one in self.own]))
