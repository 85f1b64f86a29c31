"""The demo's plan, and a run of it that is small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rjepa_triton.rjepa import config, figures, showcase

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_every_seed_has_data_of_its_own() -> None:
    plan = showcase.Plan(seeds=4)
    names = [run.name for run in plan.runs]
    assert len(set(names)) == len(names) == 4 * 2 + 2 * 3
    assert {"rfp-3", "bptt-0", "rfp-shuffled-2", "rfp-other-0"} < set(names)
    for run in plan.runs:
        settings = plan.settings(run)
        assert (settings.train.seed, settings.data.seed) == (run.seed, run.seed)
        assert (settings.train.learning, settings.data.order) == (run.rule, run.order)
        assert settings.train.lr_recurrent == showcase.RATES[run.rule]
    assert showcase.Plan(overrides=["data.seed=9"]).settings(plan.runs[0]).data.seed == 9


def test_a_small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for k in range(2):
        small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / f"picture{k}.png")
    files = ",".join(str(tmp_path / f"picture{k}.png") for k in range(2))
    own = [f"data.files=[{files}]", "data.source=pictures", "data.steps=8", "data.train=5", "data.test=5"]
    own += ["model.units=4", "train.epochs=1"]
    plan = showcase.Plan(seeds=2, shuffles=1, overrides=own, vary=["model.gate=tanh train.lr_recurrent=1e-4"])
    told: list[tuple[int, int]] = []
    runs, files_made = showcase.run(plan, tmp_path / "demo", lambda *done: told.append(done), jobs=1)
    assert told == [(k, 10) for k in range(11)]
    assert {rule: len(found) for rule, found in runs.items()} == {
        "rfp": 2,
        "bptt": 2,
        "rfp, shuffled": 1,
        "rfp, other": 1,
    }
    assert all(file.stat().st_size > 1000 for file in files_made)
    table = figures.summary(runs)
    assert [row[0] for row in table] == list(runs)
    assert all(len(row) == len(figures.SUMMARY) for row in table)
    named = figures.evaluations([tmp_path / "demo" / run.name for run in plan.runs])
    rows = figures.compared(named)
    assert {row[0]: row[1] for row in rows} == {
        "nothing": "2",
        "train.learning=bptt train.lr_recurrent=1e-05": "2",
        "data.order=shuffled": "1",
        "data.order=other": "1",
        "model.gate=tanh train.lr_recurrent=0.0001": "2",
    }
    assert all(len(row) == len(figures.COMPARED) for row in rows)
    lines = (tmp_path / "demo" / "evaluations.jsonl").read_text().splitlines()
    seeds = [config.value(json.loads(line)["config"], "data.seed") for line in lines]
    assert sorted(seeds) == [0, 0, 0, 0, 1, 1]
    kept = (tmp_path / "demo" / "compared.jsonl").read_text().splitlines()
    assert figures.compared([("record", json.loads(line)) for line in kept]) == rows
    features = tmp_path / "demo" / "features-0.pt"
    made = features.stat().st_mtime_ns
    (tmp_path / "demo" / "rfp-1" / "evaluation.json").unlink()
    showcase.run(plan, tmp_path / "demo", lambda *_: None, jobs=1)
    assert features.stat().st_mtime_ns == made
    assert (tmp_path / "demo" / "rfp-1" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"overrides": ["train.updates=2"]}, r"train\.updates=2 .* got 'bptt'"),
        ({"vary": ["model.gate=tanh", "model.gate=round"]}, "model.gate must be one of .* got 'round'"),
        (
            {"vary": ["model.gate=tanh data.seed=3"]},
            r"vary must leave the data as they are.* got data\.seed=3",
        ),
        (
            {"vary": ["model.gate=tanh"] * 2},
            "names of their own, got rfp-model.gate=tanh-0, .* more than once",
        ),
        ({"rules": ["rfp", "rfp"]}, "names of their own, got rfp-0, rfp-1 more than once"),
    ],
)
def test_what_one_of_the_runs_cannot_have_is_told_before_anything_is_made(
    change: Any, says: str, tmp_path: Path
) -> None:
    plan = showcase.Plan(**{"seeds": 2, **change})
    with pytest.raises(ValueError, match=says):
        showcase.run(plan, tmp_path / "demo", lambda *_: None, jobs=1)
    assert not (tmp_path / "demo").exists()
