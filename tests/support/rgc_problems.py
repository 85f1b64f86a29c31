"""For the tests of the RGC's kernels: a random problem, its float64 reference, and how close a result must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from kernel_problems import DEVICE
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Trajectory

# Numbers are of order 1, over five steps. Each sum and tanh rounds by 2⁻²⁴, and each step about doubles the error.
TOLERANCE = 4e-6

# (changed arguments, error, message): those of each launcher of the forward loop, for `problem(2, 3, 5, True)` …
FORWARD_ERRORS = [
    ({"x": torch.zeros(2, 0, 5)}, ValueError, r"none of them 0, got \(2, 0, 5\)"),
    ({"weights": [torch.zeros(5, 4)] * 4}, ValueError, r"weights\[0\] must have shape \(5, 5\)"),
    ({"state": [torch.zeros(3, 5)]}, ValueError, "state must hold 2 tensors, got 1"),
    ({"resets": torch.zeros(2, 3)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
]
# … and those of each launcher that takes what a loop of these sizes has saved.
TRAJECTORY_ERRORS = [
    ({"u": torch.zeros(2, 0, 5)}, ValueError, r"u must have shape \(T, B, N\), none of them 0"),
    ({"u": torch.zeros(2, 3, 5).double()}, TypeError, "u must have dtype torch.float32"),
    ({"gates": torch.zeros(2, 2, 3, 5)}, ValueError, r"gates must have shape \(2, 3, 2, 2, 5\)"),
    ({"before": torch.zeros(2, 2, 5, 3).mT}, ValueError, "before must be contiguous beyond its first 1"),
    ({"delta": torch.zeros(2, 2, 5, 3).mT}, ValueError, "delta must be contiguous"),
    ({"resets": torch.zeros(2, 3)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
]

Problem = tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]


def gates_of(saved: Tensor) -> Tensor:
    """What an RGC's forward pass has saved, (4, T, B, N), as its kernels have it: (T, B, 2, 2, N)."""
    return saved.movedim(0, 2).contiguous().unflatten(2, (2, 2))


# A launcher of the forward loop.
Forward = Callable[..., tuple[Tensor, Any]]


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


def check_parameters(forward: Forward, units: int) -> None:
    """Weights may be parameters, and nothing is differentiated."""
    x, weights, state, _ = problem(2, 3, units, False)
    states, gates = forward(x, [torch.nn.Parameter(w) for w in weights], state)
    assert not states.requires_grad
    assert not gates.requires_grad
    assert torch.equal(states, forward(x, weights, state)[0])


def check_repeats_and_continues(forward: Forward, units: int) -> None:
    """Two runs, and a run in two parts, agree in every bit; resets may be bytes."""
    x, weights, state, resets = problem(5, 3, units, True)
    assert resets is not None
    states, gates = forward(x, weights, state, resets)
    again, gates_again = forward(x, weights, state, resets)
    assert torch.equal(again, states)
    assert torch.equal(gates_again, gates)
    first, _ = forward(x[:2], weights, state, resets[:2])
    rest, _ = forward(x[2:], weights, list(first[:, -1]), resets[2:].to(torch.uint8))
    assert torch.equal(torch.cat([first, rest[:, 1:]], dim=1), states)
