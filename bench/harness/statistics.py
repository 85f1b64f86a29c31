"""Slopes and crossovers of curves on log-log axes; intervals of means, medians and ratios. SciPy has the statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # loads scipy.stats, which takes a second, when it is first used

NORMAL_95 = 1.959964  # the two-sided 95 % quantile of the normal distribution
RESAMPLES = 1000  # resamples of a bootstrap


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
    points = [point for point in zip(n, y, given, strict=True) if point[0] >= first]
    if len(points) < 3:
        return None
    if any(a <= 0 or b <= 0 for a, b, _ in points):
        raise ValueError("n and y must be positive to be fitted on log-log axes")
    sizes, values, deviation = np.array(points).T
    if sizes.min() == sizes.max():
        raise ValueError("n must take at least two values to be fitted")
    xs, ys = np.log(sizes), np.log(values)
    value, offset, *_ = scipy.stats.theilslopes(ys, xs, method="joint")
    freedom, centred = len(points) - 2, xs - xs.mean()
    spread = float(np.sum(centred**2))
    residual = float(np.sum((ys - value * xs - offset) ** 2))
    scatter = t_quantile(freedom) * math.sqrt(residual / freedom / spread)
    known = NORMAL_95 * float(np.linalg.norm(centred * deviation)) / spread
    return Slope(float(value), math.hypot(scatter, known), len(points), min(n for n, _, _ in points))


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


def t_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    return float(scipy.stats.t.ppf(0.975, freedom))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, one a seed, and half the width of its 95 % t-interval, t · s/√n."""
    return float(np.mean(values)), t_quantile(len(values) - 1) * float(scipy.stats.sem(values))


def bootstrap(
    statistic: Callable[..., Any], *samples: Sequence[float] | np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval (low, high) of a statistic by percentiles of a bootstrap. It is deterministic.

    statistic: a function of the samples and `axis`, as `numpy.median`. Of several samples, equally long, whole rounds
    are drawn: the same places of each. Raises ValueError for fewer than two values.
    """
    found = scipy.stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        paired=len(samples) > 1,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ratio_of_medians(a: Any, b: Any, axis: int = -1) -> Any:
    """median(a) / median(b) along an axis: a statistic for `bootstrap`."""
    return np.median(a, axis=axis) / np.median(b, axis=axis)
