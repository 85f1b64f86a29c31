"""Does Γ pay? The streams, a small run against the loop that it stands for, and the verdicts."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rjepa_triton.bench.harness import record
from rjepa_triton.bench.learning import pays, pays_plot, probes
from rjepa_triton.bench.learning.pays import Case, Settings
from rjepa_triton.bench.learning.probes import PROBES
from rjepa_triton.online.learner import OnlineLearner


@pytest.mark.parametrize("name", PROBES)
def test_streams_are_their_beginning_and_of_their_sizes(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    task = PROBES[name]
    long, short, other = (task.make(steps, 2, seed) for steps, seed in ((90, 3), (70, 3), (90, 4)))
    assert long.x.shape == (90, 2, task.features)
    assert long.x.dtype == torch.float32
    for of in ("x", "target", "scored"):
        assert getattr(long, of).shape[:2] == (90, 2)
        if name in ("lorenz", "adding"):
            assert torch.equal(getattr(long, of)[:70], getattr(short, of))
    assert not torch.equal(long.x, other.x)
    assert all(long.scored[i : i + task.period].any() for i in range(90 - task.period))


def test_drift_is_a_sine_whose_frequency_changes() -> None:
    data = probes.drift(3 * probes.SEGMENT, 1, 0)
    x, after = data.x[:, 0, 0].double(), data.target[:, 0].double()
    assert torch.equal(x[1:], after[:-1])
    # sin(φ + ω) + sin(φ - ω) = 2 cos ω sin φ, with one ω in a segment
    for begin in range(0, len(x), probes.SEGMENT):
        inside = slice(begin + 1, begin + probes.SEGMENT - 1)
        before, now, next_ = x[inside][:-2], x[inside][1:-1], x[inside][2:]
        clear = now.abs() > 0.3
        twice = (next_ + before)[clear] / now[clear]
        assert float(twice.max() - twice.min()) < 1e-4
        assert 2 * math.cos(probes.FREQUENCIES[1]) < float(twice.mean()) < 2 * math.cos(probes.FREQUENCIES[0])


def test_lag_chain_and_digits_ask_for_what_was_shown() -> None:
    data = PROBES["lag-4"].make(50, 2, 0)
    assert torch.equal(data.target[4:], data.x[:-4].argmax(-1))
    assert torch.equal(data.scored.all(1), torch.arange(50) >= 4)
    data = PROBES["chain"].make(48, 2, 0)
    length = probes.CHAIN + 2
    assert torch.equal(data.target[length - 1 :: length], (data.x[::length, :, 0] > 0).long())
    assert torch.equal(data.scored.nonzero()[:, 0].unique(), torch.arange(length - 1, 48, length))
    load = pytest.importorskip("sklearn.datasets").load_digits()
    data = PROBES["digits"].make(16, 1, 0)
    for begin in (0, 8):
        picture = data.x[begin : begin + 8, 0].numpy() * 16
        at = np.flatnonzero((load.images == picture).all((1, 2)))
        assert int(data.target[begin + 7, 0]) in load.target[at]


def test_without_scikit_learn_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    settings = Settings(("digits", "lag-1"), ("RNN",), ("snap0",), ("adam",), (16,), 320, 2)
    made = pays.measure(settings, tmp_path / "pays.jsonl")
    assert [r.status for r in made] == ["error", "ok"]
    assert "digits needs scikit-learn, of the extra rjepa" in made[0].message


@pytest.mark.parametrize("rule", ["snap0", "rfp", "block", "rtrl"])
def test_a_run_is_the_loop_that_it_says(rule: str) -> None:
    """Networks of a population against `OnlineLearner`, torch.optim and clipping, one by one."""
    case = Case("lag-1", "GRU", rule, "rmsprop", 32, 80, 2)
    seeds, rates = [5, 7], [0.01, 0.001]
    found = pays.learned(case, seeds, rates, 80)
    task = PROBES["lag-1"]
    for seed, rate, curve in zip(seeds, rates, found, strict=True):
        data = task.make(80, 1, seed)
        torch.manual_seed(seed)
        layer = pays.CELLS["GRU"](hidden_size=32, input_size=task.features)
        readout = nn.Linear(32, task.outputs)
        torch.manual_seed(seed)
        layer.reset_parameters()
        readout.reset_parameters()
        parameters = [*layer.parameters(), *readout.parameters()]
        optimizer = torch.optim.RMSprop(parameters, lr=rate)
        learner = OnlineLearner(layer, 1, form="step", **pays.RULES[rule].options(32))
        losses = []
        for x, target, scored in zip(data.x, data.target, data.scored, strict=True):
            loss = F.cross_entropy(readout(learner.step(x)), target) * scored
            optimizer.zero_grad()
            loss.sum().backward()
            nn.utils.clip_grad_norm_(parameters, pays.CLIP)
            optimizer.step()
            losses.append(float(loss.detach()))
        counted = np.array(losses).reshape(pays.WINDOWS, -1).sum(1)
        want = counted / data.scored.numpy().reshape(pays.WINDOWS, -1).sum(1)
        np.testing.assert_allclose(curve, np.minimum(want, pays.CAP * task.chance), rtol=2e-3)


def test_verdicts() -> None:
    worse = [1.0, 1.1, 0.9, 1.0]
    told = pays.verdict([0.5, 0.6, 0.4, 0.5], worse, [0.0, 0.1, -0.1, 0.0], 1.4)
    assert told.word == "pays"
    assert told.gain == pytest.approx(0.5)
    assert told.share == pytest.approx((0.5, 0.5, 0.5))
    assert pays.verdict(worse, worse, None, 1.4).word == "alike"
    assert pays.verdict([1.2, 1.31, 1.09, 1.2], worse, None, 1.4).word == "harms"
    open_ = pays.verdict([0.2, 1.9, 0.3, 1.2], worse, worse, 1.4)
    assert open_.word == "open"
    assert open_.share is None  # exact RTRL gains nothing


def test_a_run_is_recorded_shown_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "pays.jsonl"
    settings = Settings(
        ("drift", "lag-1"), ("RNN",), ("snap0", "rfp", "rtrl"), ("adam", "rmsprop"), (16,), 320, 2
    )
    made = pays.measure(settings, path)
    assert [r.status for r in made] == ["ok"] * 12
    again = pays.measure(settings, path)
    assert [r.payload for r in again] == [r.payload for r in made]
    assert len(record.load(path)) == 12
    for r in made:
        assert set(r.payload["tuning"]) == {f"{rate:g}" for rate in pays.RATES}
        assert min(r.payload["tuning"].values()) == r.payload["tuning"][f"{r.payload['rate']:g}"]
        assert len(r.payload["finals"]) == 2
    assert [len(table.rows) for table in pays.tables(made)] == [2] * 4
    assert all(path.stat().st_size > 5000 for path in pays_plot.draw(made, tmp_path / "p"))
    with pytest.raises(ValueError, match="no records of the benchmark 'pays'"):
        pays_plot.draw([], tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("x",)}, "task must be one of 'drift'"),
        ({"rules": ()}, "rules must name at least one of snap0"),
        ({"hidden": (20,)}, "hidden must be a multiple of 16, got 20"),
        ({"steps": 100}, "steps must be a multiple of 40 and at least 480"),
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"seeds": 1001}, "seeds must be at most 1000, got 1001"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(**options)  # type: ignore[arg-type]
