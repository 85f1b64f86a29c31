"""What the tests of an RGC's kernels share: a problem, its float64 reference, and how near a result must be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Trajectory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numbers of order 1, five steps: a rounding of 2⁻²⁴ of each sum and tanh, twice or so as large a step later.
TOLERANCE = 4e-6

Problem = tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(steps: int, batch: int, units: int, with_resets: bool, seed: int = 0) -> Problem:
    """x, weights, state, resets: the first, a middle and the last step of some row are reset."""
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
    """float32, of the shape wanted, and within `tolerance` times the largest number, or 1."""
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item()))


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN, so that what isn't written is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
