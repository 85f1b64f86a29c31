"""Counted work is that of the operators that run, and has the powers of N that theory gives."""

from __future__ import annotations

import math

import pytest
import torch

from rjepa_triton.bench.scaling import cases, work
from rjepa_triton.bench.scaling.cases import CASES, Size

COUNTABLE = [name for name, case in CASES.items() if case.countable]


def test_operators_are_counted_by_hand() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with work.Counter() as counter:
        c = a @ b
    assert (counter.flop, counter.bytes) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    for run, flop, numbers in [
        (lambda: c.mul_(2), 15, 2 * 15),  # read and written
        (lambda: c.t(), 0, 0),
        (lambda: torch.empty(9), 0, 0),
        (lambda: torch.zeros(9), 0, 9),
        (lambda: c.copy_(torch.ones(15).view(3, 5)), 0, 15 + 2 * 15),
        (lambda: c.sum(), 15, 15 + 1),
        (
            lambda: c + torch.ones(1).expand(3, 5),
            15,
            1 + 15 + 1 + 15,
        ),  # a number that is repeated is read once
    ]:
        with work.Counter() as counter:
            run()
        assert (counter.flop, counter.bytes) == (flop, 4 * numbers)


@pytest.mark.parametrize("name", ["rfp-step", "rfp-chunk", "bptt-autograd", "rtrl", "rtrl-heads"])
def test_meta_tensors_are_counted_as_real_ones(name: str) -> None:
    size = Size(12, 2, 10, 4)
    like = torch.empty(0)
    problem = cases.problem(size, kind="noise", scale=0.3, seed=1, backend="torch", like=like)
    made = CASES[name](problem)
    made.run()
    with work.Counter() as counter:
        made.run()
    counted = work.count(CASES[name], size)
    assert counted is not None
    assert (counted.flop, counted.bytes) == pytest.approx(
        (counter.flop / made.covers, counter.bytes / made.covers)
    )


@pytest.mark.parametrize("name", COUNTABLE)
def test_a_sequence_is_continued_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of a long sequence is that of its own operators, not only a line through two short ones."""
    size = Size(12, 2, 11, 4)
    counted = work.count(CASES[name], size)
    monkeypatch.setattr(work, "_SHORT", (2, 99))  # as long as this, it is counted itself
    whole = work.count(CASES[name], size)
    assert counted is not None
    assert whole is not None
    assert (counted.flop, counted.bytes) == pytest.approx((whole.flop, whole.bytes), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "flop", "bytes_"),
    [("rfp-step", 2, 2), ("rfp-step-gamma", 2, 2), ("rfp-dual", 2, 2), ("rtrl", 4, 3)],
)
def test_powers_of_large_layers(name: str, flop: float, bytes_: float) -> None:
    """Also where no machine could hold the state: RTRL's at N = 4096 takes 2.2 TB."""
    small, large = (work.count(CASES[name], Size(n, 1, 32, 16)) for n in (2048, 4096))
    assert small is not None
    assert large is not None
    assert math.log2(large.flop / small.flop) == pytest.approx(flop, abs=0.02)
    assert math.log2(large.bytes / small.bytes) == pytest.approx(bytes_, abs=0.02)


def test_what_cannot_be_counted_says_so() -> None:
    assert work.count(CASES["rfp-stream"], Size(8, 1, 8, 4)) is None
