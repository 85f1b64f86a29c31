"""Gradients of a whole sequence: RFP's dual form, BPTT by hand and by autograd; and truncated BPTT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layers import functional
from .case import Case, gradient_bytes, sequence_bytes, window_bytes
from .problem import Problem, Size, dense, eager


class _Sequence(Case):
    """The gradients of a whole sequence by `functional.rgc` and its backward pass."""

    learning: functional.Learning
    KEPT = 6  # arrays of (T, B, N) kept for the backward pass: two states and four gates
    MOST = 12  # arrays of (T, B, N) alive at once in the backward pass, where compiled code runs it

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.covers = problem.steps
        self.weights = [w.detach().requires_grad_() for w in problem.weights]

    def run(self) -> Sequence[Tensor]:
        ss, ms, mm, sm = self.weights
        s, _ = functional.rgc(self.problem.x, ss, ms, mm, sm, self.problem.state, learning=self.learning)
        return torch.autograd.grad(s, self.weights, self.problem.delta)

    @classmethod
    def state_bytes(cls, size: Size) -> int:
        return sequence_bytes(size, cls.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return sequence_bytes(size, cls.MOST) + gradient_bytes(size)

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8)


class RfpDual(_Sequence):
    """Recurrent Forward Propagation's gradient of a sequence by one reverse scan: what `loss.backward()` runs."""

    name, label = "rfp-dual", "RFP, whole sequence"
    learning: functional.Learning = "rfp"
    exact = False
    BY_WINDOWS = 9.4  # arrays of (T, B, N) alive at once where the backward pass goes by windows of time

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        whole = super().peak_bytes(size)
        large, window = functional.LARGE[size.itemsize == 4]
        if size.steps * size.batch * size.units <= large:
            return whole
        windows = 15 * window * size.itemsize
        return min(whole, sequence_bytes(size, cls.BY_WINDOWS) + windows + gradient_bytes(size))


class Bptt(_Sequence):
    """Backpropagation through time with a hand-written backward pass."""

    name, label = "bptt", "BPTT, by hand"
    learning: functional.Learning = "bptt"
    exact = True

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8 + 8)


class BpttAutograd(_Sequence):
    """Backpropagation through time as torch users write it: autograd of a Python loop."""

    name, label = "bptt-autograd", "BPTT, autograd"
    exact = True
    MOST = 7  # arrays of (T, B, N): what was saved is freed as it is used, and δ takes its place

    def run(self) -> Sequence[Tensor]:
        s, _ = eager(self.problem.x, self.weights, self.problem.state, dense)
        return torch.autograd.grad(s, self.weights, self.problem.delta)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the gradients; and for one matrix at a time, what a step adds to its sum, and the new sum
        return sequence_bytes(size, cls.MOST) + 3 * gradient_bytes(size) // 2

    flop = staticmethod(Bptt.flop)


class Tbptt(Case):
    """Truncated BPTT as torch users write it: autograd over C steps from a detached state. Within them it is exact."""

    name, label = "tbptt", "BPTT, truncated"
    exact = True
    truncated = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.covers = problem.chunk
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        self.weights = [w.detach().requires_grad_() for w in problem.weights]

    def run(self) -> Sequence[Tensor]:
        now = slice(self.position, self.position + self.covers)
        s, state = eager(self.problem.x[now], self.weights, self.state, dense)
        self.state = [c.detach() for c in state]
        self.position = now.stop if now.stop + self.covers <= self.problem.steps else 0
        return torch.autograd.grad(s, self.weights, self.problem.delta[now])

    @staticmethod
    def state_bytes(size: Size) -> int:
        return window_bytes(size, BpttAutograd.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return window_bytes(size, BpttAutograd.MOST) + 3 * gradient_bytes(size) // 2

    @staticmethod
    def flop(size: Size) -> float:
        return BpttAutograd.flop(size)
