"""The statistics of a benchmark from samples to verdicts, on a machine whose noise is known."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rjepa_triton.bench.harness import compare, measure
from rjepa_triton.bench.harness.record import Record, Timing

CPU = torch.device("cpu")
CASES = {"rfp-step": 300e-6, "rfp-dual": 2.1e-3, "rtrl": 40e-3}
POINTS, PASSES = 4, 3


class Machine:
    """A simulated clock, and work whose duration depends on how slow the machine is at that moment.

    Each call varies by 2 %; the speed wanders by 1 % and returns within a hundred calls; one call in fifty takes twice
    its time; and one factor (`speed`) applies to all of a run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.now, self.wander, self.speed = 0.0, 0.0, 1.0
        self.rng = random.Random(seed)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.gc, "collect", lambda: 0)  # it takes 0.1 s and isn't needed
        sizes = {"calls": 100e-6, "product": 3e-3, "copy": 4e-3}
        gauges = {name: self.work(seconds) for name, seconds in sizes.items()}
        monkeypatch.setattr(measure, "yardsticks", lambda device: gauges)

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.wander = 0.99 * self.wander + 0.0014 * self.rng.gauss(0, 1)
            held_up = 1 + (self.rng.random() < 0.02)
            noise = math.exp(self.rng.gauss(0, 0.02) + self.wander)
            self.now += seconds * self.speed * noise * held_up

        return call

    def run(self, slower: dict[str, float] | None = None, speed: float = 1.0) -> list[Record]:
        """Records of all cases at all points. `slower` holds the factor by which a case is slowed."""
        self.speed, found = speed, {}
        for _ in range(PASSES):
            for point in range(POINTS):
                work = {
                    name: self.work(s * 2**point * (slower or {}).get(name, 1)) for name, s in CASES.items()
                }
                for name, timing in measure.interleave(work, CPU, case_seconds=0.1, passes=PASSES).items():
                    assert isinstance(timing, Timing)
                    earlier = found.get((name, point))
                    found[name, point] = timing if earlier is None else measure.pooled(earlier, timing)
        return [
            Record(
                "scaling", name, {"N": 2**point, "B": 1}, "ok", "a machine", {}, None, "", "", timing=timing
            )
            for (name, point), timing in found.items()
        ]


def changed(a: list[Record], b: list[Record]) -> list[tuple[str, str]]:
    return [(c.a.algorithm, c.verdict) for c in compare.compare(a, b).changes if c.beyond_noise]


def test_nothing_is_found_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, seed=0)
    runs = [machine.run() for _ in range(21)]
    assert [changed(a, b) for a, b in itertools.pairwise(runs)] == [[]] * 20


def test_a_slowdown_of_10_percent_is_found_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, seed=1)
    before = machine.run()
    found = 0
    for name in CASES:
        slower = machine.run({name: 1.10})
        for a, b, verdict in ((before, slower, "slower"), (slower, before, "faster")):
            seen = changed(a, b)
            assert set(seen) == {(name, verdict)}
            found += len(seen)
    # noise may hide the change at single points: it did at 3 of 144, over twelve machines
    assert found >= 2 * len(CASES) * POINTS - 2


def test_a_machine_that_became_slower_is_not_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, seed=2)
    before = machine.run()
    assert changed(before, machine.run(speed=1.2)) == []
    # a case that slows more than the machine is still found
    assert changed(before, machine.run({"rfp-dual": 1.4}, speed=1.2)) == [("rfp-dual", "slower")] * POINTS


def test_an_unsteady_machine_widens_what_counts_as_noise() -> None:
    def timing(yardstick: float) -> Timing:
        return Timing(1.0, 0.99, 1.01, 20, 0.99, 1.01, {"copy": [yardstick]})

    steady = [timing(1e-3 * (1 + 1e-4 * i)) for i in range(10)]
    rough = [timing(1e-3 * (1 + 0.03 * (i % 5))) for i in range(10)]
    assert compare.unsteadiness(steady) < 0.01
    assert compare.unsteadiness(rough) > 0.1
    assert compare.unsteadiness(rough[:3]) == 0
    # at one point in ten, other programs had the machine
    assert compare.unsteadiness([*steady, timing(1.1e-3)]) < 0.01
    assert compare.unsteadiness([*steady, timing(2e-3)]) == pytest.approx(
        math.sqrt(2) * math.log(2), rel=1e-2
    )
    assert compare.noise_of(steady[0], steady[0], 0.05, 0.0) == pytest.approx(1.05)
    drifted = replace(steady[0], yardsticks={"copy": [1.2e-3], "new": [1.0]})
    assert compare.noise_of(steady[0], drifted, 0.05, 0.0) == pytest.approx(1.05 * 1.2)


def test_the_interval_of_a_median_covers_it_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = measure.timing(np.exp(0.1 * rng.standard_normal(25)))
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.median <= found.high
        covered += found.low <= 1.0 <= found.high
    # the standard deviation of a binomial of 300 draws at 0.95 is 4
    assert 270 <= covered <= 297


def test_passes_count_alike_and_the_interval_has_what_differs_between_them() -> None:
    low, high = [1.0, 1.01, 0.99, 1.0, 1.0], [2.0, 2.02, 1.98]
    steady, mixed = measure.timing(low, low, low), measure.timing(low, high, low)
    assert steady.low is not None
    assert steady.high is not None
    assert mixed.high is not None
    assert (steady.median, mixed.median) == (1.0, pytest.approx(1.0, rel=0.02))
    assert steady.high - steady.low < 0.02
    assert mixed.high > 1.9  # all three passes that are drawn may be the slow one
    # five samples of one pass weigh no more than three of the other
    assert measure.timing(low, high).median == pytest.approx(1.5, abs=0.02)
    one, other = (
        replace(measure.timing(taken), samples=[taken], yardsticks={"copy": [1.0]}) for taken in (low, high)
    )
    both = measure.pooled(one, other)
    assert (both.samples, both.repeats, both.yardsticks) == ([low, high], 8, {"copy": [1.0, 1.0]})
    assert both.median == measure.timing(low, high).median


def test_the_widest_interval_of_a_case_is_its_noise() -> None:
    def timing(high: float | None) -> Timing:
        return Timing(1.0, 0.99, 1.01, 20, None if high is None else 1.0, high)

    assert compare.widest([timing(None)]) == 0
    assert compare.widest([timing(1.02), timing(1.1)]) == pytest.approx(math.log(1.1) / math.sqrt(2))
    assert compare.widest([timing(1.02), timing(2.0)]) == pytest.approx(math.log(2.0))


def test_one_sample_has_no_interval() -> None:
    assert measure.timing([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    assert measure.timing([1.0, 3.0]) == measure.timing([1.0, 3.0])
