"""This package's ways to learn from a stream, T steps with SGD or Adam after every one, as peers.

Each call of `run()` starts from the same weights, states and Γ, and takes all T steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layers import named as nn
from ...online.learner import OnlineLearner
from ...online.streams import Stream
from .runner import Runner
from .tasks import OUTPUTS, RATE, READOUT


class _Streams(Runner):
    """The problem's layer and readout; their weights, and those at the start of each `run()`."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.start = {
            name: torch.from_numpy(arrays[name]).to(device) for name in (*self.network.parameters, *READOUT)
        }
        self.x, self.target = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "target"))
        _, self.batch, units = self.x.shape
        self.layer = nn.RGC(units, dtype=self.x.dtype, device=device)
        self.readout = torch.nn.Linear(units, OUTPUTS, dtype=self.x.dtype, device=device)

    def weights(self, layer: torch.nn.Module, readout: torch.nn.Module) -> dict[str, Tensor]:
        """The weights by their names in the task."""
        own = {name: layer.get_parameter(name) for name in self.network.parameters}
        return {**own, **{name: readout.get_parameter(name.removeprefix("readout_")) for name in READOUT}}

    @torch.no_grad()
    def restart(
        self, learner: OnlineLearner, optimizer: torch.optim.Optimizer, readout: torch.nn.Module
    ) -> None:
        """Set weights and moments back, and let the next step be the first."""
        weights = self.weights(learner.layer, readout)
        torch._foreach_copy_(list(weights.values()), [self.start[name] for name in weights])
        learner.reset()
        if optimizer.state:
            optimizer.state.clear()

    def changes(
        self, layer: torch.nn.Module, readout: torch.nn.Module, losses: Tensor
    ) -> dict[str, np.ndarray]:
        """What the weights have changed by, in float64, and the losses."""
        found = {
            name: (weight.detach().double() - self.start[name].double()).cpu().numpy()
            for name, weight in self.weights(layer, readout).items()
        }
        return {**found, "losses": losses.cpu().numpy()}


class OneCall(_Streams):
    """`Stream.run`: all steps in one call.

    optimizer   its name
    threads     torch's threads, if others than the settings'
    """

    optimizer: Any = "sgd"
    threads: int | None = None

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.stream = Stream(self.layer, self.readout, self.batch, optimizer=self.optimizer, lr=RATE)
        self.note = f"{self.stream.backend}: {self.stream.why}"

    def run(self) -> Tensor:
        self.restart(self.stream.learner, self.stream.optimizer, self.readout)
        return self.stream.run(self.x, self.target).losses

    def named(self, result: Tensor) -> dict[str, np.ndarray]:
        return self.changes(self.layer, self.readout, result)


class OneThread(OneCall):
    """The same by one thread, beside others that have more."""

    threads = 1


class Adam(OneCall):
    """The same with Adam in place of SGD."""

    optimizer = "adam"


class StepByStep(OneCall):
    """`Stream.step` and `Stream.learn`, a call of each for every step, as with an environment in between."""

    def run(self) -> Tensor:
        self.restart(self.stream.learner, self.stream.optimizer, self.readout)
        losses = []
        for x, target in zip(self.x.unbind(), self.target.unbind(), strict=True):
            self.stream.step(x)
            losses.append(self.stream.learn(target))
        return torch.tensor(losses, dtype=torch.float64)


class Loop(_Streams):
    """`OnlineLearner`, the readout, the loss's `backward()` and torch.optim.SGD, as a user writes them."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.learner = OnlineLearner(self.layer, self.batch, learning="rfp")
        self.optimizer = torch.optim.SGD([*self.layer.parameters(), *self.readout.parameters()], lr=RATE)
        self.note = f"form {self.learner.form}"

    def run(self) -> Tensor:
        self.restart(self.learner, self.optimizer, self.readout)
        losses = []
        for x, target in zip(self.x.unbind(), self.target.unbind(), strict=True):
            loss = torch.nn.functional.mse_loss(self.readout(self.learner.step(x)), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def named(self, result: Tensor) -> dict[str, np.ndarray]:
        return self.changes(self.layer, self.readout, result)


class Population(OneCall):
    """A population of `count` networks in one call, each of which learns the whole task from the same weights."""

    count: int

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.stream = Stream(self.layer, self.readout, self.batch, lr=RATE, population=self.count)
        self.covers = self.count * self.steps

    def run(self) -> Tensor:
        assert self.stream.members is not None
        for member in self.stream.members:
            self.restart(member.learner, member.optimizer, member.readout)
        return self.stream.run(self.x, self.target).losses

    def named(self, result: Tensor) -> dict[str, np.ndarray]:
        """Those of the first network. Raises ArithmeticError if another one's weights or losses are others."""
        assert self.stream.members is not None
        first, *others = (
            self.changes(member.layer, member.readout, losses)
            for member, losses in zip(self.stream.members, result, strict=True)
        )
        for other in others:
            if any(not np.array_equal(other[name], first[name]) for name in first):
                raise ArithmeticError(
                    "networks of a population differ, but for their seeds they are the same"
                )
        return first


class Two(Population):
    """Two networks."""

    count = 2


class Eight(Population):
    """Eight networks."""

    count = 8


class TwoByOneThread(Two):
    """Two networks by one thread, beside others that have more."""

    threads = 1


class EightByOneThread(Eight):
    """Eight networks by one thread, beside others that have more."""

    threads = 1
