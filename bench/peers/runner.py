"""What a worker runs: one peer, built for one problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from .tasks import NETWORKS, TASKS


class Runner(ABC):
    """One peer on one problem (`tasks.problem`).

    covers      time steps that one `run()` covers: all of the sequence, or one step of a stream
    note        what ran it, where that isn't plain from its name
    """

    note: str | None = None

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        self.task, self.device = TASKS[task], device
        self.network = NETWORKS[self.task.network]
        self.steps = len(arrays["x"])
        self.covers = 1 if self.task.online else self.steps

    @abstractmethod
    def run(self) -> Any:
        """One training step, its gradients ready when it returns (on CUDA: submitted)."""

    @abstractmethod
    def named(self, result: Any) -> dict[str, np.ndarray]:
        """What `run()` returned, by parameter as the task names and joins them."""

    def gradients(self) -> dict[str, np.ndarray]:
        """All gradients of a runner just built, over the whole sequence: what is held against the reference."""
        total = self.named(self.run())
        for _ in range(1, self.steps // self.covers):
            for name, part in self.named(self.run()).items():
                total[name] = total[name] + part
        return total
