"""A million steps of learning: memory stays as it is, and Γ is what a learner that begins late computes."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import SOAK
from torch import Tensor, nn

from rjepa_triton import LSTM, OnlineLearner, Stream

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")

STEPS = 1_000_000 if SOAK else 20_000
CALL = 1_000  # steps
LATE = 500  # steps without learning, again and again until what was before them is forgotten
BATCH, F64 = 2, torch.float64


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drawn(steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """A stream whose target is what it was some steps ago, in part."""
    x = torch.randn(steps, BATCH, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x, 0.5 * x.roll(2, 0)[..., :2]


@pytest.mark.parametrize("how", ["compile", "torch"])
def test_a_long_run(how: str, record_property: Callable[[str, object], None]) -> None:
    """By compiled code, and by the loop of an `OnlineLearner` with autograd and torch.optim."""
    torch.manual_seed(0)
    layer, readout = LSTM(3, 16, dtype=F64), nn.Linear(16, 2, dtype=F64)
    stream = Stream(layer, readout, BATCH, optimizer="adam", lr=1e-3, backend=how)
    steps = STEPS if SOAK or how == "compile" else STEPS // 10
    calls, before, losses = steps // CALL, 0, []
    for call in range(calls):
        losses.append(float(stream.run(*drawn(CALL, call)).losses.mean()))
        if call == calls // 10:
            before = resident()
        record_property("count of online steps", CALL)
    assert losses[-1] < 0.9 * losses[0]
    assert resident() - before < 16 << 20
    late, other = (OnlineLearner(copy.deepcopy(layer), BATCH, form="step", backend="torch") for _ in range(2))
    late.state = other.state = stream.learner.state
    # Two learners begin late, one with Γ of zero and one with ones. Where they agree, all that came before is forgotten.
    ones = other.state_dict()
    other.load_state_dict({**ones, "gamma": [torch.ones_like(gamma) for gamma in ones["gamma"]]})
    remembered, part = 1.0, 0
    while remembered > 1e-13:
        part += 1
        assert part <= 400, f"{LATE * part} steps ago are remembered: {remembered}"
        x, target = drawn(LATE, -part)
        stream.run(x, target, lr=torch.zeros(LATE))
        for now in x:
            late.step(now)
            other.step(now)
        late.settle()
        other.settle()
        want, ones = late.state_dict(), other.state_dict()
        remembered = max(
            float((a - b).abs().max()) for a, b in zip(want["gamma"], ones["gamma"], strict=True)
        )
    assert late.state[0].abs().max() > 1e-3
    found = stream.learner.state_dict()
    torch.testing.assert_close(found["gamma"], want["gamma"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stream.learner.state, late.state, rtol=1e-10, atol=1e-12)
