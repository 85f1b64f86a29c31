"""The base class of what a worker runs: one peer, built for one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from .tasks import NETWORKS, TASKS


class Runner(ABC):
    """One peer on one problem (`tasks.problem`).

    covers      time steps that one `run()` covers: the whole sequence, or one step of a stream
    note        what ran it, if its name doesn't say it
    """

    note: str | None = None

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        self.task, self.device = TASKS[task], device
        self.network = NETWORKS[self.task.network]
        self.steps = len(arrays["x"])
        self.covers = 1 if self.task.online else self.steps

    @abstractmethod
    def run(self) -> Any:
        """Take one training step. Its gradients are computed when it returns (on CUDA: submitted)."""

    @abstractmethod
    def named(self, result: Any) -> dict[str, np.ndarray]:
        """The result of `run()`, as arrays by parameter, which are named and joined as in the task."""

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients over the whole sequence, to be compared with the reference. The runner must be new."""
        total = self.named(self.run())
        for _ in range(1, self.steps // self.covers):
            for name, part in self.named(self.run()).items():
                total[name] = total[name] + part
        return total
