"""For the tests of the RGC's kernels: a random problem, its float64 reference, and how close a result must be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Trajectory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numbers are of order 1, over five steps. Each sum and tanh rounds by 2⁻²⁴, and each step about doubles the error.
TOLERANCE = 4e-6

Problem = tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(steps: int, batch: int, units: int, with_resets: bool, seed: int = 0) -> Problem:
    """x, weights, state and resets; the first, a middle and the last step each reset a batch row."""
    torch.manual_seed(seed)
    weights = [random(units, units) * (0.5 / math.sqrt(units)) for _ in range(4)]
    resets = None
    if with_resets:
        resets = torch.rand(steps, batch, device=DEVICE) < 0.3
        resets[0, 0] = resets[steps // 2, -1] = resets[-1, 0] = True
    return random(steps, batch, units), weights, [random(batch, units) for _ in range(2)], resets


def reference(x: Tensor, weights: list[Tensor], state: list[Tensor], resets: Tensor | None) -> Trajectory:
    return RGCCell().scan(
        x.double()[None], [w.double() for w in weights], [s.double() for s in state], resets
    )


def assert_near(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """Check dtype float32, the shape, and that errors are at most `tolerance` times want's largest number, or 1."""
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item()))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty fill new memory with NaN, so that a number that isn't written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
