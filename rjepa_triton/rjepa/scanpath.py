"""Simulated scan paths: where and when eyes might look at a film or picture, drawn from simple statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from .. import _checks as check

TRIES = 100  # so many saccades are drawn until one lands inside; if none does, the last is moved to the nearest place


@dataclass(frozen=True)
class Statistics:
    """The distributions from which a simulated scan path is drawn. All are choices; what supports each is said here.

    interval_mean       seconds from one fixation's onset to the next. In the paper's movies, 3.4 million saccades in
                        238 viewings of 93 to 142 min are 1.7 to 2.6 a second, or 0.39 to 0.60 s each.
    interval_sd         seconds; intervals have a log-normal distribution. Their skew is well known; this width is a
                        choice.
    amplitude_mean,     degrees, and the shape of a gamma distribution (1 would be exponential). Most saccades in
    amplitude_shape     natural viewing are shorter than 15° (Bahill, Adler and Stark 1975); within that, both are
                        choices.
    horizontal,         fractions of the saccades that go along the horizontal and the vertical; the rest go in any
    vertical            direction. Horizontal ones are the most frequent, then vertical ones (Foulsham, Kingstone and
                        Underwood 2008); the fractions are choices.
    direction_sd        radians; spread around the horizontal or vertical, or around the direction to the centre. A
                        choice.
    centring            fraction of the saccades that go towards the frame's centre, where gaze dwells in pictures and
                        films (Tatler 2007; Dorr et al. 2010); the fraction is a choice.
    returns             fraction of the saccades that go back to the fixation before last. They are known to be frequent
                        (Smith and Henderson 2009); the fraction is a choice.
    return_sd           degrees by which those miss it, in x and in y. A choice.
    first_sd            spread of the first fixation around the centre, as a fraction of width and height. A choice.
    saccade_floor,      a saccade of a° lasts floor + slope · a seconds (Carpenter 1988), by which the fixation is
    saccade_slope       shorter than the interval.

    A saccade is drawn again if a patch at its end would leave the frame, so in a small frame the mean amplitude is
    smaller than amplitude_mean. The content of the picture plays no part.
    """

    interval_mean: float = 0.49
    interval_sd: float = 0.30
    amplitude_mean: float = 5.0
    amplitude_shape: float = 1.3
    horizontal: float = 0.45
    vertical: float = 0.2
    direction_sd: float = 0.3
    centring: float = 0.15
    returns: float = 0.12
    return_sd: float = 0.5
    first_sd: float = 0.1
    saccade_floor: float = 0.021
    saccade_slope: float = 0.0022

    def __post_init__(self) -> None:
        positive = ("interval_mean", "amplitude_mean", "amplitude_shape")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                wanted = "positive" if name in positive else "at least 0"
                raise ValueError(f"{name} must be {wanted}, got {value}")
        for parts in (("horizontal", "vertical"), ("centring", "returns")):
            if sum(getattr(self, name) for name in parts) > 1:
                got = " and ".join(str(getattr(self, name)) for name in parts)
                raise ValueError(f"{' and '.join(parts)} must add up to at most 1, got {got}")


@dataclass(frozen=True)
class ScanPath:
    """T consecutive fixations, as arrays (T,) of float64.

    onset, duration   seconds; the eyes move between a fixation's end and the next one's onset
    x, y              pixels of the frame from its upper left corner
    """

    onset: np.ndarray
    duration: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def since(self, first: int) -> ScanPath:
        """The path from fixation `first` on, with times counted from that fixation's onset."""
        onset = self.onset[first:] - self.onset[first]
        return ScanPath(onset, self.duration[first:], self.x[first:], self.y[first:])


def simulate(
    rng: np.random.Generator,
    steps: int,
    size: tuple[int, int],
    px_per_degree: float,
    *,
    patch_degrees: float = 5.0,
    statistics: Statistics | None = None,
) -> ScanPath:
    """A simulated scan path of `steps` fixations, from time 0, over a frame of `size` = (width, height) pixels.

    Every fixation keeps a distance of half a patch, patch_degrees/2, from the frame's edges, so each patch lies inside.
    The same state of `rng`, which is advanced, gives the same path. statistics: None: the default `Statistics`.

    Raises ValueError for steps below 1, sizes that aren't positive, or a frame smaller than a patch.
    """
    s = statistics or Statistics()
    check.integer("steps", steps, 1)
    for name, value in (("px_per_degree", px_per_degree), ("patch_degrees", patch_degrees)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")
    extent = np.asarray(size, dtype=np.float64) / px_per_degree
    if extent.min() < patch_degrees:
        raise ValueError(
            f"size must hold a patch of {patch_degrees:g}°: {patch_degrees * px_per_degree:g} pixels at "
            f"{px_per_degree:g} pixels per degree, got {size[0]} × {size[1]}"
        )
    low, high = np.full(2, patch_degrees / 2), extent - patch_degrees / 2
    place = np.empty((steps, 2))  # degrees
    place[0] = np.clip(extent / 2 + s.first_sd * extent * rng.standard_normal(2), low, high)
    for t in range(1, steps):
        for _ in range(TRIES):
            place[t] = _landing(rng, s, place[:t], extent / 2)
            if (low <= place[t]).all() and (place[t] <= high).all():
                break
        else:
            place[t] = np.clip(place[t], low, high)

    spread = math.log1p((s.interval_sd / s.interval_mean) ** 2)
    interval = rng.lognormal(math.log(s.interval_mean) - spread / 2, math.sqrt(spread), steps)
    onset = np.concatenate([[0.0], np.cumsum(interval)[:-1]])
    amplitude = np.hypot(*np.diff(place, axis=0, append=place[-1:]).T)
    # the shortest intervals in the log-normal's tail are too short for a whole saccade
    saccade = np.minimum(s.saccade_floor + s.saccade_slope * amplitude, interval / 2)
    x, y = place.T * px_per_degree
    return ScanPath(onset, interval - saccade, x, y)


def _landing(rng: np.random.Generator, s: Statistics, past: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Where a saccade from past[-1] lands, in degrees; this may be outside the frame."""
    here = past[-1]
    amplitude = rng.gamma(s.amplitude_shape, s.amplitude_mean / s.amplitude_shape)
    kind, turn = rng.random(), s.direction_sd * rng.standard_normal()
    if kind < s.returns and len(past) > 1:
        return past[-2] + s.return_sd * rng.standard_normal(2)
    if kind < s.returns + s.centring:
        way = centre - here
        angle = math.atan2(way[1], way[0]) + turn
    else:
        side, axis = rng.integers(2), rng.random()
        if axis < s.horizontal:
            angle = math.pi * side + turn
        elif axis < s.horizontal + s.vertical:
            angle = math.pi * (side + 0.5) + turn
        else:
            angle = rng.uniform(-math.pi, math.pi)
    return here + amplitude * np.array([math.cos(angle), math.sin(angle)])
