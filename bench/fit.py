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


@dataclass(frozen=True)
class Slope:
    """p in y ∝ N^p: the estimate, half the width of its 95 % interval, and over how many N from which on."""

    value: float
    half_width: float
    points: int
    first: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.half_width:.2f}"


def first_n(algorithm: str, quantity: str) -> int:
    """The N from which a curve is fitted: below it a step costs what its calls cost, whatever N is.

    Bytes: all N. Time: N ≥ 32 for exact RTRL, whose N⁴ shows at once; N ≥ 128 for all else.
    """
    if quantity != "time":
        return 1
    return 32 if algorithm == "rtrl" else 128


def slope(n: Sequence[float], y: Sequence[float], first: float = 1) -> Slope | None:
    """Least squares of log y on log n for n ≥ first, with its 95 % t-interval; None below 3 points.

    Raises ValueError for a y or n that isn't positive, or for n that are all equal.
    """
    points = [(a, b) for a, b in zip(n, y, strict=True) if a >= first]
    if len(points) < 3:
        return None
    if any(a <= 0 or b <= 0 for a, b in points):
        raise ValueError("n and y must be positive to be fitted on log-log axes")
    xs, ys = [math.log(a) for a, _ in points], [math.log(b) for _, b in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        raise ValueError("n must take at least two values to be fitted")
    value = sum((x - mean_x) * (v - mean_y) for x, v in zip(xs, ys, strict=True)) / spread
    residual = sum((v - mean_y - value * (x - mean_x)) ** 2 for x, v in zip(xs, ys, strict=True))
    freedom = len(points) - 2
    # beyond the table the last entry is the wider, so the safer, interval
    t = T_95[min(freedom, len(T_95)) - 1]
    return Slope(value, t * math.sqrt(residual / freedom / spread), len(points), min(a for a, _ in points))


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
