"""Streams that ask what a sensitivity is good for, beside the tasks of `rjepa bench learn`: `rjepa bench pays`.

    drift     the next value of a sine whose frequency changes every SEGMENT steps     squared error
    lag-L     the symbol of L steps ago, at every step                                  cross-entropy, nats
    chain     one bit, asked for after CHAIN steps of noise                             cross-entropy, nats
    digits    the digit in a picture that is shown row by row                           cross-entropy, nats

Drift is of the kind in which immediate derivatives alone were found to do as well as exact RTRL (Merin 2026,
arXiv:2603.28750); the chain is MemoryChain of bsuite (Osband et al. 2020) with a target in place of a reward. Arrays
are time-major, one batch row: x (T, 1, F), target (T, 1), scored (T, 1).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from ... import _checks as check
from .tasks import TASKS, Stream, Task

SEGMENT = 500  # steps between two changes of the sine's frequency
FREQUENCIES = (0.1, 0.6)  # radians a step
SYMBOLS = 4
LAGS = (1, 4, 8)
CHAIN = 10
DIGITS, SIDE = 10, 8


def drift(steps: int, batch: int, seed: int) -> Stream:
    """sin φ(t), φ(t+1) = φ(t) + ω, with ω from U(FREQUENCIES), drawn anew every SEGMENT steps. F = 1, all scored."""
    random = _random(steps, batch, seed)
    frequency = random.uniform(*FREQUENCIES, size=(-(-steps // SEGMENT), batch)).repeat(SEGMENT, 0)[:steps]
    phase = random.uniform(0, 2 * math.pi, size=batch) + frequency.cumsum(0)
    value = torch.from_numpy(np.sin(np.vstack([phase - frequency, phase[-1:]])).astype(np.float32))
    return Stream(value[:-1, :, None], value[1:], torch.ones(steps, batch, dtype=torch.bool))


def lag(steps: int, batch: int, seed: int, *, back: int) -> Stream:
    """Random symbols, one-hot, F = SYMBOLS; the target is the one of `back` steps ago, scored once there is one."""
    shown = torch.from_numpy(_random(steps, batch, seed).integers(SYMBOLS, size=(steps, batch)))
    asked = torch.zeros_like(shown)
    asked[back:] = shown[: max(0, steps - back)]
    scored = (torch.arange(steps) >= back)[:, None].expand(steps, batch).clone()
    return Stream(torch.nn.functional.one_hot(shown, SYMBOLS).float(), asked, scored)


def chain(steps: int, batch: int, seed: int) -> Stream:
    """Episodes of CHAIN + 2 steps: a bit as ±1, noise N(0, 1), the question. F = 3: bit, noise, whether it is asked."""
    random, length = _random(steps, batch, seed), CHAIN + 2
    count = -(-steps // length)
    bits = random.integers(2, size=(count, batch))
    x = np.zeros((count, length, batch, 3), dtype=np.float32)
    x[:, 0, :, 0] = 2 * bits - 1
    x[:, 1:-1, :, 1] = random.standard_normal((count, length - 2, batch))
    x[:, -1, :, 2] = 1
    flat = torch.from_numpy(x.reshape(-1, batch, 3)[:steps])
    asked = torch.from_numpy(bits.repeat(length, 0)[:steps])
    return Stream(flat, asked, flat[..., 2] == 1)


def digits(steps: int, batch: int, seed: int) -> Stream:
    """Pictures of 8 × 8 in random order, a row a step, F = 8; the digit is asked for at the last row.

    scikit-learn's `load_digits`. Raises ModuleNotFoundError without that package.
    """
    pictures, names = _digits()
    count = -(-steps // SIDE)
    drawn = _random(steps, batch, seed).integers(len(pictures), size=(count, batch))
    x = torch.from_numpy(pictures[drawn].transpose(0, 2, 1, 3).reshape(-1, batch, SIDE)[:steps])
    asked = torch.from_numpy(names[drawn].repeat(SIDE, 0)[:steps])
    scored = (torch.arange(steps) % SIDE == SIDE - 1)[:, None].expand(steps, batch).clone()
    return Stream(x, asked, scored)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The pictures (1797, 8, 8) in float32 from 0 to 1, and their digits as int64."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the task digits needs scikit-learn, of the extra rjepa, or leave it out by --tasks: {error}"
        ) from error
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def _random(steps: int, batch: int, seed: int) -> np.random.Generator:
    check.integer("steps", steps, 1)
    check.integer("batch", batch, 1)
    return np.random.default_rng([check.integer("seed", seed, 0), 0])


PROBES: dict[str, Task] = {
    "drift": Task(drift, "squared error", 1, 1, 0.5, 0.0, 1),
    "lorenz": TASKS["lorenz"],
    **{
        f"lag-{back}": Task(
            functools.partial(lag, back=back),
            "cross-entropy",
            SYMBOLS,
            SYMBOLS,
            math.log(SYMBOLS),
            0.0,
            back + 1,
        )
        for back in LAGS
    },
    "adding": TASKS["adding"],
    "digits": Task(digits, "cross-entropy", SIDE, DIGITS, math.log(DIGITS), 0.0, SIDE),
    "chain": Task(chain, "cross-entropy", 3, 2, math.log(2), 0.0, CHAIN + 2),
}
