"""Slopes with their intervals, crossovers, and intervals of means, medians and ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rjepa_triton.bench.harness import statistics as fit

N = [32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize("power", [0.0, 2.0, 4.0])
def test_an_exact_power_is_recovered(power: float) -> None:
    found = fit.slope(N, [3e-6 * n**power for n in N])
    assert found is not None
    assert found.value == pytest.approx(power, abs=1e-12)
    assert found.half_width < 1e-10
    assert (found.points, found.first) == (6, 32)


def test_the_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = fit.slope(N, [n**2 * float(np.exp(0.1 * rng.standard_normal())) for n in N])
        assert found is not None
        covered += abs(found.value - 2) <= found.half_width
    # the standard deviation of a binomial of 1000 draws at 0.95 is 7
    assert 925 <= covered <= 975


def test_only_n_from_the_first_on_count() -> None:
    found = fit.slope(N, [1.0, 1.0, *(n**2 for n in N[2:])], first=128)
    assert found is not None
    assert found.value == pytest.approx(2)
    assert str(found) == "2.00 ± 0.00"
    assert fit.slope(N, N, first=512) is None


def test_one_disturbed_point_does_not_move_the_slope() -> None:
    y = [float(n**2) for n in N]
    y[-1] *= 3
    found = fit.slope(N, y)
    assert found is not None
    assert found.value == pytest.approx(2, abs=1e-9)
    least_squares = np.polyfit(np.log(N), np.log(y), 1)[0]
    assert least_squares > 2.15


def test_what_cannot_be_fitted_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        fit.slope(N, [0.0, *N[1:]])
    with pytest.raises(ValueError, match="two values"):
        fit.slope([8, 8, 8], [1, 2, 3])


def test_crossover_of_two_powers() -> None:
    a, b = {n: float(n**4) for n in N}, {n: 100.0**2 * n**2 for n in N}
    ((n, y),) = fit.crossovers(a, b)
    assert n == pytest.approx(100)
    assert y == pytest.approx(100.0**4)
    assert fit.crossovers(a, {n: 2 * y for n, y in a.items()}) == []


def test_points_that_are_little_known_widen_the_interval() -> None:
    y = [3e-6 * n**2.0 for n in N]
    sure, unsure = fit.slope(N, y), fit.slope(N, y, deviations=[0.1] * len(N))
    assert sure is not None
    assert unsure is not None
    assert (sure.value, sure.half_width) == pytest.approx((2.0, 0.0))
    logs = np.log(N)
    assert unsure.half_width == pytest.approx(
        fit.NORMAL_95 * 0.1 / math.sqrt(((logs - logs.mean()) ** 2).sum())
    )


def test_an_interval_is_student_s_at_any_number_of_seeds() -> None:
    """Quantiles of Student's t from a printed table, also beyond 20 degrees of freedom."""
    for count, quantile in ((2, 12.706), (5, 2.776), (31, 2.042), (121, 1.980)):
        values = [0.0, *[1.0] * (count - 1)]  # variance: (1 - 1/count) / (count - 1) = 1 / count
        mean, half = fit.interval(values)
        assert mean == pytest.approx(1 - 1 / count)
        assert half == pytest.approx(quantile / count, rel=3e-4)


def test_a_bootstrap_of_two_samples_draws_whole_rounds() -> None:
    """A disturbance that both meet leaves their ratio; taken apart, it would not."""
    noise = np.exp(np.random.default_rng(0).standard_normal(40))
    low, high = fit.bootstrap(fit.ratio_of_medians, 2 * noise, noise)
    assert (low, high) == pytest.approx((2, 2))
    low, high = fit.bootstrap(fit.ratio_of_medians, 2 * noise, noise[::-1])
    assert high > 1.2 * low
    assert fit.bootstrap(np.median, noise) == fit.bootstrap(np.median, noise)
    with pytest.raises(ValueError, match="two or more"):
        fit.bootstrap(np.median, [1.0])
