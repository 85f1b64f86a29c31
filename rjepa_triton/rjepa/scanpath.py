"""A simulated scan path: where and when eyes might look in a film or picture, drawn from simple statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from .. import _checks as check

TRIES = 100  # saccades drawn until one lands inside; after that the gaze lands at the nearest place that is


@dataclass(frozen=True)
class Statistics:
    """What a simulated scan path is drawn from. Choices, with what supports each.

    interval_mean       seconds from one fixation's onset to the next. The paper's movies: 3.4 million saccades in
                        238 viewings of 93 to 142 min are 1.7 to 2.6 a second, 0.39 to 0.60 s each.
    interval_sd         seconds, of a log-normal distribution. That fixations are skewed so is well known; this
                        width is a choice.
    amplitude_mean      degrees, of a gamma distribution. Most saccades in natural viewing are shorter than 15°
                        (Bahill, Adler and Stark 1975); mean and
    amplitude_shape     shape (1 would be exponential) are choices within that.
    horizontal,         parts of saccades that go along the horizontal and the vertical, the rest in any direction.
    vertical            Horizontal ones are the most frequent, then vertical (Foulsham, Kingstone and Underwood
                        2008); the parts are choices.
    direction_sd        radians around the horizontal or vertical, or around the way to the centre: a choice.
    centring            part of saccades that go towards the frame's centre, where gaze dwells in pictures and
                        films (Tatler 2007; Dorr et al. 2010): the part is a choice.
    returns             part of saccades that go back to the fixation before last. That this is frequent is known
                        (Smith and Henderson 2009); the part is a choice.
    return_sd           degrees by which they miss it, in x and in y: a choice.
    first_sd            where the first fixation lies around the centre, as a part of width and height: a choice.
    saccade_floor,      a saccade of a° lasts floor + slope · a seconds (Carpenter 1988): what the fixation is
    saccade_slope       shorter than the interval.

    Saccades that would leave the room for a whole patch are drawn again, so in a small frame their amplitudes are
    smaller than amplitude_mean. What is in the picture plays no part.
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
    """Fixations one after another, each array (T,) float64.

    onset, duration   seconds, onset[0] = 0; between a fixation's end and the next onset the eyes move
    x, y              pixels of the frame from its upper left corner
    """

    onset: np.ndarray
    duration: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def since(self, first: int) -> ScanPath:
        """From fixation `first` on, whose onset is then 0."""
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
    """A scan path of `steps` fixations over a frame of `size` = (width, height) pixels.

    Every fixation keeps half a patch, patch_degrees/2, from the frame's edges, so each patch lies inside. The same
    state of `rng` gives the same path; `rng` is advanced.

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
    # the shortest intervals of the log-normal's tail leave no room for a whole saccade
    saccade = np.minimum(s.saccade_floor + s.saccade_slope * amplitude, interval / 2)
    x, y = place.T * px_per_degree
    return ScanPath(onset, interval - saccade, x, y)


def _landing(rng: np.random.Generator, s: Statistics, past: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Where a saccade from past[-1] lands, in degrees, be it inside the frame or not."""
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
