"""Slopes and crossovers of curves on log-log axes; intervals of means."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
NORMAL_95 = 1.96  # the normal distribution's


@dataclass(frozen=True)
class Slope:
    """p in y ∝ N^p: the estimate, half the width of its 95 % interval, and over how many N from which on."""

    value: float
    half_width: float
    points: int
    first: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.half_width:.2f}"


# A curve is fitted where it is this many times its least value or more.
ASYMPTOTIC = 4.0


def first_n(n: Sequence[float], y: Sequence[float]) -> float:
    """The N from which on a curve is fitted: the first from which all values are at least 4 times the least one.

    What doesn't grow with N, such as the calls that a step takes, is a quarter of each value there or less: a power
    p ≥ 1 comes out at most a quarter too low. Infinity if no value is so large.
    """
    least, first = min(y), math.inf
    for size, value in sorted(zip(n, y, strict=True), reverse=True):
        if value < ASYMPTOTIC * least:
            break
        first = size
    return first


def slope(
    n: Sequence[float], y: Sequence[float], first: float = 1, deviations: Sequence[float] | None = None
) -> Slope | None:
    """The power of N by Theil and Sen: the median slope of all pairs on log-log axes, for n ≥ first.

    One point that was disturbed doesn't move it as it would the least-squares slope. The 95 % interval is that of
    Student's t from the residuals about the line of that slope and the median intercept; and, if `deviations` gives
    the standard deviations of log y, of what they make of the least-squares slope, the two squared and added: points
    that lie on a line by chance say nothing of how well each is known. None below 3 points.

    Raises ValueError for a y or n that isn't positive, or for n that are all equal.
    """
    given = deviations if deviations is not None else [0.0] * len(n)
    points = sorted(point for point in zip(n, y, given, strict=True) if point[0] >= first)
    if len(points) < 3:
        return None
    if any(a <= 0 or b <= 0 for a, b, _ in points):
        raise ValueError("n and y must be positive to be fitted on log-log axes")
    xs, ys = [math.log(a) for a, _, _ in points], [math.log(b) for _, b, _ in points]
    pairs = itertools.combinations(zip(xs, ys, strict=True), 2)
    rises = [(v - w) / (x - z) for (z, w), (x, v) in pairs if x > z]
    if not rises:
        raise ValueError("n must take at least two values to be fitted")
    value = statistics.median(rises)
    offsets = [v - value * x for x, v in zip(xs, ys, strict=True)]
    residual = sum((offset - statistics.median(offsets)) ** 2 for offset in offsets)
    mean = statistics.fmean(xs)
    spread = sum((x - mean) ** 2 for x in xs)
    freedom = len(points) - 2
    # beyond the table the last entry is the wider, so the safer, interval
    t = T_95[min(freedom, len(T_95)) - 1]
    scatter = t * math.sqrt(residual / freedom / spread)
    known = (
        NORMAL_95 * math.hypot(*((x - mean) * d for x, (_, _, d) in zip(xs, points, strict=True))) / spread
    )
    return Slope(value, math.hypot(scatter, known), len(points), points[0][0])


def crossovers(a: dict[int, float], b: dict[int, float]) -> list[tuple[float, float]]:
    """Where two curves N → y cross: (N, y), between neighbouring common N, by log-log interpolation."""
    common = sorted(a.keys() & b.keys())
    found = []
    for low, high in itertools.pairwise(common):
        gap_low, gap_high = math.log(a[low] / b[low]), math.log(a[high] / b[high])
        if gap_low * gap_high < 0 or (gap_low == 0 and gap_high != 0):
            part = gap_low / (gap_low - gap_high)
            found.append((low * (high / low) ** part, a[low] * (a[high] / a[low]) ** part))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval over seeds: t · s/√n. Two values at least."""
    freedom = len(values) - 1
    t = T_95[min(freedom, len(T_95)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
