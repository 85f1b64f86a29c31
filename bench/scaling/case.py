"""The base class of the scaling benchmark's algorithms, and how many bytes their arrays take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .problem import Problem, Size


class Case(ABC):
    """One algorithm on one problem.

    name, label   its name in options and records, and in plots
    exact         whether its gradient is BPTT's (True) or RFP's (False); None if it has no gradient
    truncated     whether credit stops at the first step of each run
    covers        time steps that one `run()` covers
    countable     whether its work can be counted (`work.count`)
    """

    name: str
    label: str
    exact: bool | None
    truncated = False
    covers: int
    countable = True

    @abstractmethod
    def __init__(self, problem: Problem) -> None: ...

    @classmethod
    def checked(cls, problem: Problem) -> tuple[Case, Problem]:
        """The case, as its gradient is checked, and the problem whose gradient it gives."""
        return cls(problem), problem

    @property
    def backend(self) -> str | None:
        """What runs Γ's recursion, and why, as of now: a kernel that fails gives way. None for a case without Γ."""
        return None

    @staticmethod
    def entries(matrix: Tensor) -> Tensor:
        """The entries of an (N, N) matrix that the case's network has: all of them, or diagonal blocks (H, b, b)."""
        return matrix

    @abstractmethod
    def run(self) -> Sequence[Tensor]:
        """Run the next `covers` steps; returns the four gradients, summed over them."""

    @staticmethod
    @abstractmethod
    def state_bytes(size: Size) -> int:
        """Bytes of learning state: what is kept from step to step in order to learn."""

    @classmethod
    @abstractmethod
    def peak_bytes(cls, size: Size) -> int:
        """About the most bytes alive at once, the problem itself not counted."""

    @staticmethod
    @abstractmethod
    def flop(size: Size) -> float:
        """FLOP a time step of the terms that grow fastest with N; elementwise work along a sequence is not counted."""


def gamma_bytes(size: Size) -> int:
    """Bytes of Γ: S·K·B·N² numbers."""
    return 8 * size.batch * size.units**2 * size.itemsize


def gradient_bytes(size: Size) -> int:
    """Bytes of the gradients of all four matrices: 4·N² numbers."""
    return 4 * size.units**2 * size.itemsize


def step_bytes(size: Size, arrays: float) -> int:
    """Bytes of so many arrays (B, N)."""
    return round(arrays * size.batch * size.units * size.itemsize)


def window_bytes(size: Size, arrays: float) -> int:
    """Bytes of so many arrays (C, B, N)."""
    return size.chunk * step_bytes(size, arrays)


def sequence_bytes(size: Size, arrays: float) -> int:
    """Bytes of so many arrays (T, B, N)."""
    return size.steps * step_bytes(size, arrays)
