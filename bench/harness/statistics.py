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
    """A fitted power p in y ∝ N^p.

    value, half_width   the estimate, and half the width of its 95 % interval
    points, first       how many points were fitted, and the least N among them
    """

    value: float
    half_width: float
    points: int
    first: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.half_width:.2f}"


def slope(
    n: Sequence[float], y: Sequence[float], first: float = 1, deviations: Sequence[float] | None = None
) -> Slope | None:
    """Fit a power of N by Theil and Sen: the median slope of all pairs of points with n ≥ first, on log-log axes.

    One disturbed point moves this less than the least-squares slope. The half-width of the 95 % interval combines two
    parts as the root of their squares' sum. One is Student's t interval from the residuals about the line with that
    slope and the median intercept. The other, if `deviations` gives the standard deviations of log y, is the interval
    of the least-squares slope that they imply: points that lie on a line by chance don't tell how well each of them is
    known.

    Returns None for fewer than 3 points. Raises ValueError for an n or y that isn't positive, or if all n are equal.
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
    # beyond the table's end its last entry gives a wider, so a safer, interval
    t = T_95[min(freedom, len(T_95)) - 1]
    scatter = t * math.sqrt(residual / freedom / spread)
    known = (
        NORMAL_95 * math.hypot(*((x - mean) * d for x, (_, _, d) in zip(xs, points, strict=True))) / spread
    )
    return Slope(value, math.hypot(scatter, known), len(points), points[0][0])


def crossovers(a: dict[int, float], b: dict[int, float]) -> list[tuple[float, float]]:
    """The points (N, y) at which two curves cross, by log-log interpolation between neighbouring N that both have."""
    common = sorted(a.keys() & b.keys())
    found = []
    for low, high in itertools.pairwise(common):
        gap_low, gap_high = math.log(a[low] / b[low]), math.log(a[high] / b[high])
        if gap_low * gap_high < 0 or (gap_low == 0 and gap_high != 0):
            part = gap_low / (gap_low - gap_high)
            found.append((low * (high / low) ** part, a[low] * (a[high] / a[low]) ** part))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, one a seed, and half the width of its 95 % t-interval, t · s/√n."""
    freedom = len(values) - 1
    t = T_95[min(freedom, len(T_95)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
