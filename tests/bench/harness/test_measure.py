"""Cases are timed in turn, and peak bytes are measured."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rjepa_triton.bench.harness import measure

CPU = torch.device("cpu")
MEGA = 1_000_000


def test_interleave_tells_slow_from_fast_and_keeps_exceptions() -> None:
    def fails() -> None:
        raise RuntimeError("not today")

    found = measure.interleave(
        {"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3), "fails": fails},
        CPU,
        case_seconds=0.02,
    )
    slow, fast = found["slow"], found["fast"]
    assert isinstance(slow, measure.Timing)
    assert isinstance(fast, measure.Timing)
    assert slow.p20 <= slow.median <= slow.p80
    assert fast.median < slow.median
    assert slow.repeats >= measure.LEAST_ROUNDS
    assert isinstance(found["fails"], RuntimeError)


def test_long_samples_of_a_pass_are_fewer() -> None:
    functions = {"long": lambda: time.sleep(0.012), "short": lambda: time.sleep(0.003)}
    for passes, least in ((3, measure.LONG_ROUNDS), (1, measure.LEAST_ROUNDS)):
        found = measure.interleave(functions, CPU, case_seconds=0.03, passes=passes)
        long, short = found["long"], found["short"]
        assert isinstance(long, measure.Timing)
        assert isinstance(short, measure.Timing)
        assert long.repeats == least
        assert short.repeats >= (measure.LEAST_OF_A_PASS if passes > 1 else measure.LEAST_ROUNDS)


def test_peak_counts_what_is_alive_at_once() -> None:
    held = torch.zeros(MEGA, dtype=torch.uint8)

    def one_after_the_other() -> torch.Tensor:
        out = torch.zeros(MEGA, dtype=torch.uint8)
        for _ in range(3):
            out = out + held  # two tensors are alive here, the old one and the new
        return out

    peak = measure.peak_bytes(one_after_the_other, CPU)
    assert 2 * MEGA <= peak < 2.01 * MEGA
    # what was alive before does not count, and no call leaves anything over for the next
    assert measure.peak_bytes(one_after_the_other, CPU) == peak


def test_peak_sees_inside_operators_and_backward() -> None:
    w = torch.zeros(250, 1000, requires_grad=True)  # 1 MB

    def backward() -> None:
        torch.autograd.grad(w.tanh().sum(), w)

    assert 2 * MEGA <= measure.peak_bytes(backward, CPU) < 3.1 * MEGA


def test_available_bytes_and_flop_rate_are_plausible() -> None:
    available = measure.available_bytes(CPU)
    assert available is None or available > MEGA
    assert measure.flop_rate(CPU, torch.float32) > 1e8


def test_warm_up_ends_for_an_unsteady_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WARM_SECONDS", 0.05)
    lengths = iter([1e-3, 4e-3] * 100)
    assert measure.warm_up(lambda: time.sleep(next(lengths)), CPU) > 0


FREED = """
import resource, torch
from rjepa_triton.bench import measure
kept = measure.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):  # what lies next to the first block may keep it from being taken again
    torch.empty(1 << 24).fill_(1)
before = faults()
torch.empty(1 << 24).fill_(1)
assert not kept or faults() - before < 100, faults() - before
print(kept)
"""


def test_memory_that_was_freed_is_not_mapped_anew() -> None:
    """The check runs in a process of its own, because the setting holds until the process ends."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if platform.libc_ver()[0] == "glibc":
        assert done.stdout.strip() == "True"


def test_a_c_library_that_can_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda _: object())
    assert not measure.keep_freed_memory.__wrapped__()


def test_rates_are_those_of_numbers_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies and copies equal numbers faster, so they are random: the same each time, from a separate generator."""
    made: list[torch.Tensor] = []
    draw = measure._random

    def small(shape: Sequence[int], *how: Any) -> torch.Tensor:
        made.append(draw([min(n, 1 << 10) for n in shape], *how))
        return made[-1]

    monkeypatch.setattr(measure, "_random", small)
    before = torch.get_rng_state()
    for _ in range(2):
        assert measure.copy_rate(CPU) > 0
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert measure.flop_rate(CPU, dtype) > 0
    assert torch.equal(before, torch.get_rng_state())
    assert all(len(a.unique()) > 100 for a in made)
    half = len(made) // 2
    assert all(torch.equal(a, b) for a, b in zip(made[:half], made[half:], strict=True))
