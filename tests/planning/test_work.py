"""Work and rates: how seconds follow from them."""

from __future__ import annotations

import pytest

from rjepa_triton.backend.buffers import MAPPED
from rjepa_triton.planning.work import Phase, Rates, Work, fresh_bytes_of, seconds


def test_seconds_are_the_sum_of_what_is_counted() -> None:
    rates = Rates("x", 1e9, 1e12, 1e-6, 1e-7, 1000.0, 4e9, 2e9, 1e-8, 5e-7)
    work = Work(calls=3, flop=2e6, bytes=4000, scan_steps=5, matrix_bytes=1000, fresh_bytes=100, views=2)
    fixed = 3e-6 + 2e-6 + 5e-7 + 1e-6 + 1e-6
    # all in the cache, half of it, and none told apart
    assert work.seconds(rates, 500) == pytest.approx(fixed + 4000 / 4e9 + 1000 / 2e9)
    half = 4000 * (0.5 / 4e9 + 0.5 / 1e9) + 1000 * (0.5 / 2e9 + 0.5 / 1e9)
    assert work.seconds(rates, 2000) == pytest.approx(fixed + half)
    assert work.seconds(rates) == pytest.approx(fixed + 5000 / 1e9)
    assert sum(work.parts(rates).values()) == work.seconds(rates)
    assert (work + work).seconds(rates) == pytest.approx((work * 2).seconds(rates))
    phases = (Phase("a", work, 500), Phase("b", work))
    assert seconds(phases, rates) == pytest.approx(work.seconds(rates, 500) + work.seconds(rates))


def test_large_arrays_are_mapped_anew() -> None:
    assert fresh_bytes_of(MAPPED) == 0
    assert fresh_bytes_of(MAPPED + 1, 4) == 4 * (MAPPED + 1)
