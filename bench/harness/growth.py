"""How a measured quantity grows with N: the power in a + b·Nᵖ, and which of 1, N, N log N, N², N³, N⁴ it follows.

Both fits minimize the sum of squares of relative errors, with a and b at least 0. The offset a is what doesn't grow,
such as the calls of a step. A bootstrap gives their confidence: values are drawn anew around the fit, by the scatter
about it and by the standard deviations that are given, and fitted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .statistics import NORMAL_95, Slope, t_quantile

RESAMPLES = 400
POWERS = np.arange(0.5, 5.0001, 0.02)
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1": np.ones_like,
    "N": lambda n: n,
    "N log N": lambda n: n * np.log(n),
    "N²": lambda n: n**2,
    "N³": lambda n: n**3,
    "N⁴": lambda n: n**4,
}
# A power whose 95 % interval is wider than ± this says nothing, nor does a shape below this confidence.
WIDEST, LEAST_CONFIDENCE = 0.5, 0.8
LEAST_POINTS = 5


@dataclass(frozen=True)
class Shape:
    """The one of `SHAPES` that predicts a left-out point best.

    name         such as "N²"
    confidence   the share of bootstrap resamples in which it is the best
    error        root mean square of the relative errors of left-out points
    """

    name: str
    confidence: float
    error: float

    def __str__(self) -> str:
        return f"{self.name} ({self.confidence:.0%})"


def power(n: Sequence[float], y: Sequence[float], deviations: Sequence[float] | None = None) -> Slope | None:
    """The power p in y = a + b·Nᵖ, with its 95 % interval.

    deviations: standard deviations of log y. None if there are fewer than `LEAST_POINTS` points, or if the interval is
    wider than ± `WIDEST`, so that the points don't tell. Raises ValueError for an n or y that isn't positive.
    """
    size, value = _positive(n, y)
    if len(size) < LEAST_POINTS:
        return None
    columns = _powers(size)
    (best,), fitted = _best(columns, value[None])
    drawn = _resampled(fitted[0], value, deviations, freedom=3)
    found = POWERS[_best(columns, drawn)[0]]
    low, high = np.quantile(found, [0.025, 0.975])
    estimate = float(POWERS[best])
    half = float(max(high - estimate, estimate - low))
    return Slope(estimate, half, len(size), float(size.min())) if half <= WIDEST else None


def offset(n: Sequence[float], y: Sequence[float]) -> float:
    """a in y = a + b·Nᵖ: what doesn't grow with N. 0 for fewer than 4 points. Raises ValueError as `power` does."""
    size, value = _positive(n, y)
    if len(size) < 4:
        return 0.0
    columns = _powers(size)
    (best,), _ = _best(columns, value[None])
    a, _ = _fit(columns[best : best + 1], value[None], np.ones(len(value), dtype=bool))
    return float(a[0, 0])


def shape(n: Sequence[float], y: Sequence[float], deviations: Sequence[float] | None = None) -> Shape | None:
    """The shape by which each point is predicted best from the others, as y = a + b·f(N).

    None if there are fewer than `LEAST_POINTS` points, or if no shape is the best in four of five resamples. Raises
    ValueError for an n or y that isn't positive.
    """
    size, value = _positive(n, y)
    if len(size) < LEAST_POINTS:
        return None
    columns = np.stack([function(size) / function(size).max() for function in SHAPES.values()])
    _, fitted = _best(columns, value[None])
    drawn = np.concatenate([value[None], _resampled(fitted[0], value, deviations, freedom=2)])
    errors = _held_out(columns, drawn)  # (shapes, 1 + resamples)
    chosen = errors.argmin(0)
    name = list(SHAPES)[chosen[0]]
    confidence = float((chosen[1:] == chosen[0]).mean())
    return Shape(name, confidence, float(errors[chosen[0], 0])) if confidence > LEAST_CONFIDENCE else None


def _positive(n: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    size, value = np.asarray(n, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if size.shape != value.shape:
        raise ValueError(f"n and y must be as many, got {size.size} and {value.size}")
    if (size <= 0).any() or (value <= 0).any():
        raise ValueError("n and y must be positive to be fitted")
    return size, value


def _powers(size: np.ndarray) -> np.ndarray:
    """Nᵖ of every power, (POWERS, P), the largest of each 1."""
    return (size / size.max()) ** POWERS[:, None]


def _fit(columns: np.ndarray, values: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b ≥ 0 of a + b·column by relative least squares, for every column (C, P) and every row of values (R, P).

    keep (P,): which points count. Returns a and b, each (C, R).
    """
    weight = np.where(keep, 1 / values, 0.0)  # (R, P): each equation is divided by its value
    f = columns[:, None] * weight  # (C, R, P)
    one, want = weight[None], keep.astype(float)[None, None]
    s11, s1f, sff = (one * one).sum(-1), (one * f).sum(-1), (f * f).sum(-1)
    s1y, sfy = (one * want).sum(-1), (f * want).sum(-1)
    determinant = s11 * sff - s1f**2
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (sff * s1y - s1f * sfy) / determinant
        b = (s11 * sfy - s1f * s1y) / determinant
    flat = ~(determinant > 1e-12 * s11 * sff) | (b < 0)
    steep = ~flat & (a < 0)
    a = np.where(flat, s1y / s11, np.where(steep, 0.0, a))
    b = np.where(flat, 0.0, np.where(steep, sfy / sff, b))
    return a, b


def _best(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of values (R, P): the index of the column that fits best, and the fitted values (R, P)."""
    a, b = _fit(columns, values, np.ones(values.shape[1], dtype=bool))
    fitted = a[..., None] + b[..., None] * columns[:, None]
    best = (((fitted / values - 1) ** 2).sum(-1)).argmin(0)
    return best, fitted[best, np.arange(len(values))]


def _held_out(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Root mean square of the relative errors of points that are predicted from the others, (C, R)."""
    points = values.shape[1]
    total = np.zeros((len(columns), len(values)))
    for left_out in range(points):
        keep = np.arange(points) != left_out
        a, b = _fit(columns, values, keep)
        total += ((a + b * columns[:, left_out, None]) / values[:, left_out] - 1) ** 2
    return np.sqrt(total / points)


def _resampled(
    fitted: np.ndarray, values: np.ndarray, deviations: Sequence[float] | None, freedom: int
) -> np.ndarray:
    """Values (RESAMPLES, P) drawn around the fitted ones; freedom: how many numbers were fitted."""
    left = len(values) - freedom
    scatter = math.sqrt(float(((values / fitted - 1) ** 2).sum()) / left)
    scatter *= t_quantile(left) / NORMAL_95  # it is known from so few points
    known = np.zeros(len(values)) if deviations is None else np.asarray(deviations, dtype=np.float64)
    drawn = np.random.default_rng(0).standard_normal((RESAMPLES, len(values)))
    return fitted * np.exp(np.hypot(scatter, known) * drawn)
