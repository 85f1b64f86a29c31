"""What is told of a representation that degenerates, and training that is ended by R² and not by the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rjepa_triton.rjepa import config, data, evaluation, train
from rjepa_triton.rjepa.train import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")
GOOD = {"participation_ratio": 9.0, "rankme": 9.0, "input_gain": 0.9, "next_from_h": 0.3, "next_from_x": 0.29}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        (
            {"participation_ratio": 4.0},
            "h collapses: its participation ratio is 40% of what it was before training",
        ),
        ({"rankme": 5.0}, "h collapses: its rankme is 50% of what it was before training"),
        ({"input_gain": 0.2}, "the input is gated off: 20% of it passes"),
        ({"next_from_h": 0.2}, r"h says less of the next patch than x does: R² -0.090"),
    ],
)
def test_what_is_wrong_is_told(change: dict[str, float], said: str | None) -> None:
    told = evaluation.warnings({**GOOD, **change}, {"participation_ratio": 10.0, "rankme": 10.0})
    assert told == [] if said is None else told[0].startswith(said), told


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for k in range(3):
        small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / f"picture{k}.png")
    files = ",".join(str(tmp_path / f"picture{k}.png") for k in range(3))
    own = [f"data.files=[{files}]", "data.source=pictures", "data.steps=6", "data.train=5", "data.test=3"]
    own += ["model.units=4", "train.batch=5", "data.validate=[picture1]", "train.patience=2"]
    return lambda *more: config.read(None, [*own, *more])


def test_whole_sources_are_taken_to_choose_by(settings: Any) -> None:
    sides = data.datasets(settings().data)
    assert [set(side.movie.tolist()) for side in (sides.train, sides.validation, sides.test)] == [
        {"picture0"},
        {"picture1"},
        {"picture2"},
    ]
    with pytest.raises(
        ValueError, match=r"data\.validate, of the training side: test names movie 'picture2'"
    ):
        data.datasets(settings("data.validate=[picture2]").data)


def test_training_ends_by_r2_and_keeps_the_best_epoch(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    monkeypatch.setattr(evaluation.Evaluator, "gain", lambda *_: next(gains))
    kept: list[torch.Tensor] = []
    trainer = Trainer(settings("train.epochs=9"), tmp_path / "run", lambda _: None)
    batches = trainer.batches

    def keep() -> None:
        kept.append(trainer.model.encoder.circuit.weight_ss.detach().clone())

    found = trainer.run(keep)
    assert trainer.done == 4  # the second is the best, and two more didn't reach it
    assert found["epoch"] == 2
    torch.testing.assert_close(
        trainer.model.encoder.circuit.weight_ss.detach(), kept[2 * batches - 1], rtol=0, atol=0
    )
    assert [row["validation_gain"] for row in trainer.history[1:]] == [0.1, 0.3, 0.2, 0.25]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["epoch"] == 2
    again = train.evaluate_run(tmp_path / "run")
    assert again["loss"] == pytest.approx(found["after"]["loss"], rel=1e-4)
    assert again["control"] == pytest.approx(found["after"]["control"], rel=1e-4)
    said: list[str] = []
    resumed = Trainer(settings("train.epochs=9"), tmp_path / "run", said.append)
    assert resumed.run()["epoch"] == 2  # nothing is left to do


def test_evidence_is_in_the_record(settings: Any, tmp_path: Path) -> None:
    found = Trainer(settings("train.epochs=1"), tmp_path / "run", lambda _: None).run()
    for when in ("before", "after"):
        for name in ("next_from_h", "next_from_x", "next_from_ceiling", "current_from_h"):
            assert len(found[when][f"{name}_by_step"]) == 5
            assert isinstance(found[when][name], float)
    before = found["before"]
    assert before["next_from_h_by_step"] == pytest.approx(before["next_from_x_by_step"], abs=1e-6)
    assert before["yardstick"] == pytest.approx(before["yardstick_control"])
    assert np.array(before["density"]).sum() == 6 * 3


def test_not_every_epoch_need_be_evaluated(settings: Any, tmp_path: Path) -> None:
    given = settings("train.epochs=3", "train.patience=0", "train.evaluate_every=2")
    trainer = Trainer(given, tmp_path / "run", lambda _: None)
    found = trainer.run()
    assert [row["epoch"] for row in trainer.history] == [0, 2]
    assert found["epoch"] == 3
