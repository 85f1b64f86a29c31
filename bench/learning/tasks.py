"""Online tasks: streams of any length that never reset, with a known chance level and a known best loss.

    recall   symbols shown, recalled in order after a delay        cross-entropy, nats
    adding   the sum of the two marked numbers of a window         squared error
    lorenz   the next value of one coordinate of a chaotic system  squared error

A shorter stream is the beginning of a longer one, and batch rows are at different places of their windows. Arrays are
time-major: T time, B batch rows, F features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ... import _checks as check

# Delayed recall: how many symbols there are, how many are shown, and the steps between the last one shown and the first
# one recalled.
SYMBOLS, SHOWN, DELAY = 4, 2, 4
# Steps in a window of the adding task.
WINDOW = 12
# Lorenz's own parameters, and the standard deviation of x, whose mean is 0 by symmetry.
SIGMA, RHO, BETA = 10.0, 28.0, 8 / 3
LORENZ_STD = 7.92
SAMPLING = 0.15  # time units between two values of the stream
SUBSTEPS = 10  # Runge–Kutta steps between them
TRANSIENT = 100  # samples until a row is on the attractor


@dataclass(frozen=True)
class Stream:
    """Data of a task.

    x        inputs (T, B, F), float32
    target   (T, B), int64 for symbols, else float32
    scored   (T, B), bool: the steps and rows whose loss counts
    """

    x: Tensor
    target: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Task:
    """An online task.

    make               make(steps, batch, seed) gives a `Stream`
    features, outputs  sizes of the network's input and output
    chance, best       mean losses over the scored steps: of the best answer that doesn't look at the stream, and of a
                       perfect answer
    period             among so many consecutive steps of a row, at least one is scored
    """

    make: Callable[[int, int, int], Stream]
    loss: Literal["cross-entropy", "squared error"]
    features: int
    outputs: int
    chance: float
    best: float
    period: int

    def losses(self, answer: Tensor, target: Tensor) -> Tensor:
        """The loss of each step and row, in target's shape. answer: (…, outputs)."""
        if self.loss == "cross-entropy":
            flat = torch.nn.functional.cross_entropy(
                answer.flatten(0, -2), target.flatten(), reduction="none"
            )
            return flat.view(target.shape)
        return (answer.squeeze(-1) - target).square()


def _windows(length: int, steps: int, batch: int, seed: int) -> tuple[int, np.ndarray]:
    """How many windows cover the stream, and at which step of its first window each row begins, (B,)."""
    check.integer("steps", steps, 1)
    check.integer("batch", batch, 1)
    check.integer("seed", seed, 0)
    begins = np.random.default_rng([seed, 0]).integers(length, size=batch)
    return -(-steps // length) + 1, begins


def _laid_out(windows: np.ndarray, begins: np.ndarray, steps: int) -> np.ndarray:
    """Join windows (W, B, L, …) to a stream (T, B, …), each row from its own begin."""
    rows = np.moveaxis(windows, 1, 0)
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[3:])
    return np.stack([row[begin : begin + steps] for row, begin in zip(rows, begins, strict=True)], 1)


def recall(steps: int, batch: int, seed: int) -> Stream:
    """Windows of SHOWN symbols, one a step, then DELAY blanks, then SHOWN steps that ask for the symbols in their
    order.

    x is one-hot over the SYMBOLS, the blank and the question: F = SYMBOLS + 2. The questions are scored.
    """
    length = 2 * SHOWN + DELAY
    count, begins = _windows(length, steps, batch, seed)
    shown = np.random.default_rng([seed, 1]).integers(SYMBOLS, size=(count, batch, SHOWN))
    seen = np.full((count, batch, length), SYMBOLS)
    seen[..., :SHOWN] = shown
    seen[..., -SHOWN:] = SYMBOLS + 1
    asked = np.zeros_like(seen)
    asked[..., -SHOWN:] = shown
    seen, asked = (_laid_out(a, begins, steps) for a in (seen, asked))
    x = np.eye(SYMBOLS + 2, dtype=np.float32)[seen]
    return Stream(torch.from_numpy(x), torch.from_numpy(asked), torch.from_numpy(seen == SYMBOLS + 1))


def adding(steps: int, batch: int, seed: int) -> Stream:
    """Windows of WINDOW numbers from U(0, 1), one marked in each half; at the last step, their sum.

    x has the features (number, mark, last): F = 3. The last step of a window is scored. The target's variance is 2/12.
    """
    count, begins = _windows(WINDOW, steps, batch, seed)
    half = WINDOW // 2
    number = np.random.default_rng([seed, 1]).random((count, batch, WINDOW), dtype=np.float32)
    at = np.random.default_rng([seed, 2]).integers(half, size=(count, batch, 2)) + np.array([0, half])
    mark = np.zeros_like(number)
    np.put_along_axis(mark, at, 1, axis=2)
    last = np.zeros_like(number)
    last[..., -1] = 1
    x = _laid_out(np.stack([number, mark, last], -1), begins, steps)
    target = _laid_out(last * (number * mark).sum(2, keepdims=True), begins, steps)
    return Stream(torch.from_numpy(x), torch.from_numpy(target), torch.from_numpy(x[..., 2] == 1))


def lorenz_samples(start: np.ndarray, steps: int, interval: float, substeps: int) -> np.ndarray:
    """x, y, z of Lorenz's system (1963), once every `interval` after `start` (3, B): (T, 3, B) float64.

    dx/dt = σ (y - x), dy/dt = x (ρ - z) - y, dz/dt = x y - β z; fourth-order Runge–Kutta in steps of interval/substeps.
    """

    def velocity(state: np.ndarray) -> np.ndarray:
        x, y, z = state
        return np.stack([SIGMA * (y - x), x * (RHO - z) - y, x * y - BETA * z])

    h, state = interval / substeps, start
    out = np.empty((steps, *start.shape))
    for t in range(steps):
        for _ in range(substeps):
            a = velocity(state)
            b = velocity(state + h / 2 * a)
            c = velocity(state + h / 2 * b)
            d = velocity(state + h * c)
            state = state + h / 6 * (a + 2 * b + 2 * c + d)
        out[t] = state
    return out


@functools.lru_cache(maxsize=2)
def lorenz(steps: int, batch: int, seed: int) -> Stream:
    """x of Lorenz's system, one value every SAMPLING, divided by its standard deviation; the target is the next one.

    Rows start at different places. F = 1, and every step is scored. There is no noise, so the best loss is 0.
    """
    check.integer("steps", steps, 1)
    check.integer("batch", batch, 1)
    start = np.random.default_rng([check.integer("seed", seed, 0), 0]).standard_normal((3, batch))
    start = start * 8 + np.array([[0], [0], [25]])
    path = lorenz_samples(start, TRANSIENT + steps + 1, SAMPLING, SUBSTEPS)[TRANSIENT:, 0] / LORENZ_STD
    series = torch.from_numpy(path.astype(np.float32))
    return Stream(series[:-1, :, None], series[1:], torch.ones(steps, batch, dtype=torch.bool))


TASKS = {
    "recall": Task(recall, "cross-entropy", SYMBOLS + 2, SYMBOLS, math.log(SYMBOLS), 0.0, 2 * SHOWN + DELAY),
    "adding": Task(adding, "squared error", 3, 1, 1 / 6, 0.0, WINDOW),
    "lorenz": Task(lorenz, "squared error", 1, 1, 1.0, 0.0, 1),
}
