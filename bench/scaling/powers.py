"""How time, memory and counted work of the scaling sweep grow with N, and where two curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..harness import growth
from ..harness.growth import Shape
from ..harness.record import Record, Timing
from ..harness.statistics import NORMAL_95, Slope, crossovers, slope

# The algorithms whose step goes through all of Γ, as the pass over its bytes does.
CARRYING = ("rfp-stream", "rfp-step", "rfp-step-gamma")
PASS = "pass"
# Pairs of curves whose crossing tells from which N on the other algorithm is better.
CROSSING = (("rtrl", "rfp-step"), ("rtrl", "bptt-autograd"), ("rfp-step", "bptt-autograd"))
# Γ is in a level of memory if it takes at most this part of it, and the inverse of that of the level before at least:
# weights, gradients and states need a place, too.
FILLS = 0.5
# Within a level a pass runs at one speed: at least this part of its fastest. Of a cache that others share less is left
# than the machine tells.
ONE_SPEED = 0.6
NEAR_LARGEST = 4.0  # counted powers are those of N at most this many times below the largest
MOST_OFFSET = 0.5  # of a time that is said to grow


@dataclass(frozen=True)
class Level:
    """A level of memory, and how the time over that of a pass changes while Γ is in it.

    name         "L1", …, or "memory"
    units        the N of its points
    ratio        the median time over that of a pass
    power        of N, in that ratio
    """

    name: str
    units: list[int]
    ratio: float
    power: Slope


def of(records: Sequence[Record], algorithm: str, batch: int) -> list[Record]:
    """The records of one algorithm and batch size, by N."""
    mine = (r for r in records if r.algorithm == algorithm and r.params["B"] == batch)
    return sorted(mine, key=lambda r: r.params["N"])


def slopes(records: Sequence[Record], algorithm: str, batch: int) -> dict[str, Slope | None]:
    """The powers of N of a case's "time" per step, "state" and "peak" bytes, and counted "flop" and "bytes".

    Time and peak are fitted as a + b·Nᵖ (`growth.power`), state bytes as b·Nᵖ. The power of counted work is that
    within a factor of 4 of the largest N: what grows more slowly is least there. The interval of the power of time
    includes those of the medians. None where a power can't be had.
    """
    mine = of(records, algorithm, batch)
    units, times, deviations = _times(mine)
    fitted: dict[str, Slope | None] = {"time": growth.power(units, times, deviations)}
    for what, get in (("state", "state_bytes"), ("peak", "peak_bytes")):
        known = {r.params["N"]: getattr(r, get) for r in mine if getattr(r, get)}
        fit = slope if what == "state" else growth.power
        fitted[what] = fit(list(known), list(known.values()))
    for what in ("flop", "bytes"):
        counted = {r.params["N"]: r.payload[what] for r in mine if r.payload.get(what)}
        largest = [n for n in counted if n >= max(counted) / NEAR_LARGEST]
        fitted[what] = slope(largest, [counted[n] for n in largest])
    return fitted


def shape(records: Sequence[Record], algorithm: str, batch: int) -> Shape | None:
    """As which of 1, N, N log N, N², N³ and N⁴ the time of a case grows (`growth.shape`).

    That of an algorithm in `CARRYING` is counted in passes over Γ's bytes of the same run, which takes the caches out.
    """
    over = _over_pass(records, algorithm, batch) if algorithm in CARRYING else None
    if over is not None:
        units, ratios, deviations, _ = over
        return growth.shape(units, [n**2 * ratio for n, ratio in zip(units, ratios, strict=True)], deviations)
    return growth.shape(*_times(of(records, algorithm, batch)))


def levels(records: Sequence[Record], algorithm: str, batch: int) -> list[Level]:
    """For each level of memory that holds at least 3 points: the power of time over that of a pass over Γ's bytes.

    What doesn't grow with N is taken off both times first, as fitted to the points within the first two levels of
    cache; a point of which it is more than half says nothing and is left out.
    """
    over = _over_pass(records, algorithm, batch)
    if over is None:
        return []
    by_size = {r.params["N"]: r for r in of(records, PASS, batch)}
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for n, ratio, known, seconds in zip(*over, strict=True):
        name = _level(by_size[n])
        if name is not None:
            found.setdefault(name, []).append((n, ratio, known, n**2 / seconds))
    out = []
    for name, points in found.items():
        fastest = max(speed for *_, speed in points)
        kept = [point[:3] for point in points if point[3] >= ONE_SPEED * fastest]
        units, ratios, deviations = (list(column) for column in zip(*kept, strict=True))
        fitted = slope(units, ratios, deviations=deviations)
        if fitted is not None:
            out.append(Level(name, units, float(np.median(ratios)), fitted))
    return out


def crossings(records: Sequence[Record], batch: int) -> list[tuple[str, str, float, float, float, float]]:
    """Where pairs of `CROSSING` cross for the last time: (a, b, N, its 95 % interval's ends, seconds there)."""
    out = []
    rng = np.random.default_rng(0)
    for a, b in CROSSING:
        curves = [_times(of(records, name, batch)) for name in (a, b)]
        here = crossovers(*(dict(zip(units, times, strict=True)) for units, times, _ in curves))
        if not here:
            continue
        drawn = []
        for _ in range(growth.RESAMPLES):
            again = [
                dict(
                    zip(
                        units,
                        times * np.exp(np.asarray(known) * rng.standard_normal(len(times))),
                        strict=True,
                    )
                )
                for units, times, known in curves
            ]
            drawn += [crossed[-1][0] for crossed in [crossovers(*again)] if crossed]
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        out.append((a, b, here[-1][0], low, high, here[-1][1]))
    return out


def _times(mine: Sequence[Record]) -> tuple[list[int], list[float], list[float]]:
    """N, median seconds a step, and the standard deviation of its logarithm, of the records that have times."""
    timed = [(r.params["N"], r.timing) for r in mine if r.timing]
    return [n for n, _ in timed], [t.median for _, t in timed], [_deviation(t) for _, t in timed]


def _deviation(timing: Timing) -> float:
    """The standard deviation of the median's logarithm, from its 95 % interval; 0 if there is no interval."""
    if timing.low is None or timing.high is None:
        return 0.0
    return math.log(timing.high / timing.low) / (2 * NORMAL_95)


def _over_pass(
    records: Sequence[Record], algorithm: str, batch: int
) -> tuple[list[int], list[float], list[float], list[float]] | None:
    """N, time over that of a pass, the standard deviation of its logarithm, and the pass's seconds, offsets taken off.

    None if there was no pass.
    """
    passes = of(records, PASS, batch)
    if not passes:
        return None
    near = {r.params["N"] for r in passes if _level(r, fills=1.0) in ("L1", "L2")}
    curves = []
    for made in (of(records, algorithm, batch), passes):
        units, times, known = _times(made)
        small = [(n, t) for n, t in zip(units, times, strict=True) if n in near]
        fixed = growth.offset([n for n, _ in small], [t for _, t in small])
        curves.append(
            {
                n: (t - fixed, d * t / (t - fixed))
                for n, t, d in zip(units, times, known, strict=True)
                if fixed <= MOST_OFFSET * t
            }
        )
    steps, floor = curves
    units = [n for n in steps if n in floor]
    ratios = [steps[n][0] / floor[n][0] for n in units]
    deviations = [math.hypot(steps[n][1], floor[n][1]) for n in units]
    return units, ratios, deviations, [floor[n][0] for n in units]


def _level(made: Record, fills: float = FILLS) -> str | None:
    """The level of memory in which Γ lies; None if it is about as large as a cache, or if caches aren't known."""
    caches = made.payload.get("levels") or {}
    if not caches or made.state_bytes is None:
        return None
    below = 0.0
    for name, size in caches.items():
        if made.state_bytes <= fills * size:
            return name if made.state_bytes >= below / fills else None
        below = float(size)
    return "memory" if made.state_bytes >= below / fills else None
