"""Powers with offsets, and shapes: found where points tell them, and not claimed where they don't."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rjepa_triton.bench.harness import growth

N = [16, 32, 64, 128, 256, 512, 1024]


def noisy(values: list[float], by: float, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(v * math.exp(by * rng.standard_normal())) for v in values]


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_a_power_above_an_offset_is_found(p: float) -> None:
    found = growth.power(N, [0.3 * 64**p + n**p for n in N])
    assert found is not None
    assert found.value == pytest.approx(p, abs=0.021)
    assert found.half_width <= 0.05


def test_the_interval_holds_the_power_and_grows_with_noise() -> None:
    """In 95 of 100 draws, within what a binomial count of 40 allows."""
    widths = []
    for by in (0.02, 0.1):
        found = [growth.power(N, noisy([1e4 + n**2 for n in N], by, seed)) for seed in range(40)]
        known = [one for one in found if one is not None]
        assert sum(abs(one.value - 2) <= one.half_width for one in known) >= 0.85 * len(known)
        widths.append(np.median([one.half_width for one in known]))
    assert widths[1] > 2 * widths[0]


def test_what_points_do_not_tell_is_not_printed() -> None:
    assert growth.power(N[:4], [n**2 for n in N[:4]]) is None
    assert growth.power(N, [1.0, 9.0, 2.0, 4.0, 30.0, 9.0, 3.0]) is None
    assert growth.power(N, noisy([1.0] * 7, 0.05)) is None  # nothing grows, so no power can be told
    assert growth.shape(N[:4], [n**2 for n in N[:4]]) is None


@pytest.mark.parametrize("name", growth.SHAPES)
def test_each_shape_is_told_from_the_others(name: str) -> None:
    values = growth.SHAPES[name](np.array(N, dtype=float))
    found = growth.shape(N, noisy([float(0.05 * values.max() + v) for v in values], 0.01 * (name != "1")))
    assert found is not None
    assert found.name == name
    assert found.confidence > 0.9
    assert str(found).startswith(f"{name} (")


def test_known_deviations_widen() -> None:
    y = [1e4 + n**2 for n in N]
    sure, unsure = (growth.power(N, y, [by] * len(N)) for by in (0.0, 0.05))
    assert sure is not None
    assert unsure is not None
    assert unsure.half_width > sure.half_width + 0.02


def test_offset() -> None:
    assert growth.offset(N, [500.0 + n**2 for n in N]) == pytest.approx(500, rel=1e-6)
    assert growth.offset(N[:3], [1, 2, 3]) == 0


@pytest.mark.parametrize("function", [growth.power, growth.shape, growth.offset])
def test_what_cannot_be_fitted_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        function(N, [0.0] * 7)  # type: ignore[operator]
    with pytest.raises(ValueError, match="as many, got 7 and 2"):
        function(N, [1.0, 2.0])  # type: ignore[operator]
