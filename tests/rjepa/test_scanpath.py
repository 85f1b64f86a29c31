"""Simulated scan paths: inside the frame, the same for the same seed, with the statistics they were asked for."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rjepa_triton.rjepa.scanpath import Statistics, simulate

WIDE = (20_000, 20_000)  # pixels at 10 a degree: so wide that no edge is met


def path(seed: int = 0, steps: int = 100, size: tuple[int, int] = (400, 300), **changes: float):  # type: ignore[no-untyped-def]
    return simulate(np.random.default_rng(seed), steps, size, 10, statistics=Statistics(**changes))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(50, 800),
    st.integers(50, 800),
    st.sampled_from([1.0, 2.0, 5.0]),
)
def test_every_patch_lies_inside_and_time_goes_on(
    seed: int, steps: int, width: int, height: int, patch: float
) -> None:
    got = simulate(np.random.default_rng(seed), steps, (width, height), 10, patch_degrees=patch)
    half = patch * 10 / 2
    for place, size in ((got.x, width), (got.y, height)):
        assert place.shape == (steps,)
        assert (place >= half - 1e-9).all()
        assert (place <= size - half + 1e-9).all()
    assert got.onset[0] == 0
    assert (got.duration > 0).all()
    assert (np.diff(got.onset) > got.duration[:-1]).all()


def test_the_same_seed_gives_the_same_path_at_any_resolution() -> None:
    one, other, fine = path(3), path(3), simulate(np.random.default_rng(3), 100, (800, 600), 20)
    for name in ("onset", "duration", "x", "y"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(fine.x, 2 * one.x)
    assert not np.array_equal(path(4).x, one.x)


def test_intervals_and_amplitudes_are_those_asked_for() -> None:
    got = path(steps=20_000, size=WIDE, returns=0)
    interval = np.diff(got.onset)
    # four standard errors of the mean: 0.30 s/√n, and 5°/√(1.3 n)
    assert abs(interval.mean() - 0.49) < 4 * 0.30 / 20_000**0.5
    assert interval.std() == pytest.approx(0.30, rel=0.1)
    amplitude = np.hypot(np.diff(got.x), np.diff(got.y)) / 10
    assert abs(amplitude.mean() - 5) < 4 * 5 / (1.3 * 20_000) ** 0.5
    assert amplitude.std() == pytest.approx(5 / math.sqrt(1.3), rel=0.05)
    gap = interval - got.duration[:-1]
    np.testing.assert_allclose(gap, np.minimum(0.021 + 0.0022 * amplitude, interval / 2), atol=1e-9)


def test_directions_are_cardinal_mostly_horizontal() -> None:
    got = path(steps=5000, size=WIDE, returns=0, centring=0)
    angle = np.abs(np.arctan2(np.diff(got.y), np.diff(got.x)))
    horizontal = (np.minimum(angle, np.pi - angle) < 0.4).mean()
    vertical = (np.abs(angle - np.pi / 2) < 0.4).mean()
    even = 2 * 0.8 / (2 * np.pi)  # what each would be if all directions were alike
    assert horizontal > 1.7 * even
    assert horizontal > vertical
    assert 1 - horizontal - vertical < 0.8 * (1 - 2 * even)


def test_gaze_is_centred_and_returns() -> None:
    def distance(**changes: float) -> float:
        paths = [path(seed, **changes) for seed in range(30)]
        return float(np.mean([np.hypot(p.x - 200, p.y - 150).mean() for p in paths]))

    assert distance(centring=0.6) < distance(centring=0) - 5

    def returned(**changes: float) -> float:
        got = path(steps=4000, size=WIDE, **changes)
        return float((np.hypot(got.x[2:] - got.x[:-2], got.y[2:] - got.y[:-2]) < 15).mean())

    assert returned(returns=0.3) == pytest.approx(returned(returns=0) + 0.3, abs=0.04)


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(Statistics)])
def test_constants_that_mean_nothing(part: str) -> None:
    for value in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"{part} must be (positive|at least 0), got {value}"):
            Statistics(**{part: value})


def test_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"horizontal and vertical must add up to at most 1, got 0\.9 and 0\.2"
    ):
        Statistics(horizontal=0.9)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"size must hold a patch of 5°: 50 pixels at 10 .* got 400 × 49"):
        simulate(rng, 3, (400, 49), 10)
    with pytest.raises(ValueError, match="px_per_degree must be a positive number, got 0"):
        simulate(rng, 3, (400, 300), 0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        simulate(rng, 0, (400, 300), 10)


def test_a_path_from_a_later_fixation_on() -> None:
    whole = simulate(np.random.default_rng(4), 30, (400, 300), 10)
    later = whole.since(10)
    assert later.onset[0] == 0
    np.testing.assert_allclose(np.diff(later.onset), np.diff(whole.onset[10:]))
    assert (later.x == whole.x[10:]).all()
    assert (later.duration == whole.duration[10:]).all()
