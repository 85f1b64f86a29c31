"""Exact RTRL: with dense weights, and with heads of √N units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells.builtin import RGCCell
from ...rules import rtrl
from ...rules.rtrl import ExactSensitivity
from .case import Case
from .problem import Problem, Size


class Rtrl(Case):
    """Exact real-time recurrent learning with dense weights: γ has 8·B·N³ numbers, a step takes 32·B·N⁴ FLOP."""

    name, label = "rtrl", "RTRL, exact"
    exact = True
    covers = 1

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cell = RGCCell()
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        self.weights = [self.entries(weight).contiguous() for weight in problem.weights]
        self.sensitivity = ExactSensitivity(self.cell.matrices, self.weights, 2, problem.x.shape[1])
        self.no_delta = torch.zeros_like(problem.delta[0])

    def run(self) -> Sequence[Tensor]:
        t = self.position
        trajectory = self.cell.scan(self.problem.x[None, t : t + 1], self.weights, self.state)
        self.sensitivity.step_(self.cell.linearize(trajectory), 0, self.weights)
        self.state = trajectory.states[:, -1].unbind()
        self.position = (t + 1) % self.problem.steps
        return self.sensitivity.read(torch.stack([self.problem.delta[t], self.no_delta]))

    @staticmethod
    def state_bytes(size: Size) -> int:
        return 8 * size.batch * size.units**3 * size.itemsize

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # γ, the batch rows of the next γ that are made at once, the Jacobian and its parts, and a gradient for each row
        state, rows = cls.state_bytes(size), rtrl.rows_at_once(size.batch)
        return state + state * rows // size.batch + (8 + 4) * size.batch * size.units**2 * size.itemsize

    @staticmethod
    def flop(size: Size) -> float:
        return 32 * size.batch * size.units**4


class RtrlHeads(Rtrl):
    """Exact real-time recurrent learning with heads of b ≈ √N units: γ has 8·B·N·b² numbers, a step 32·B·N·b³ FLOP."""

    name, label = "rtrl-heads", "RTRL, heads of √N"

    @staticmethod
    def entries(matrix: Tensor) -> Tensor:
        size = head_size(matrix.shape[0])
        blocks = matrix.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (H, b, H, b)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    @staticmethod
    def state_bytes(size: Size) -> int:
        return 8 * size.batch * size.units * head_size(size.units) ** 2 * size.itemsize

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # γ, an eighth of the next γ, the Jacobian and its parts, and a gradient for each batch row
        head = head_size(size.units)
        return 9 * cls.state_bytes(size) // 8 + (8 + 4) * size.batch * size.units * head * size.itemsize

    @staticmethod
    def flop(size: Size) -> float:
        return 32 * size.batch * size.units * head_size(size.units) ** 3


def head_size(units: int) -> int:
    """b: the divisor of N nearest to √N on a logarithmic scale; of two equally near, the smaller."""
    small = [b for b in range(1, math.isqrt(units) + 1) if units % b == 0]
    sizes = [*small, *(units // b for b in reversed(small))]
    return min(sizes, key=lambda b: max(b * b / units, units / (b * b)))
