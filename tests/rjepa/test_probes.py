"""Probes for labels against what is known of them: Bayes' accuracy, a count of neighbours by hand, a run's own rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import noise
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from rjepa_triton.rjepa import cli, config, probes, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_the_linear_probe_comes_close_to_bayes() -> None:
    """Two Gaussians at a distance of d standard deviations: the best accuracy is Φ(d/2)."""
    rng = np.random.default_rng(0)
    labels, wanted = (np.array(["a", "b"])[rng.integers(0, 2, n)] for n in (600, 4000))
    train, test = (
        rng.standard_normal((len(y), 5)) + 2.0 * (y == "b")[:, None] * np.eye(5)[0] for y in (labels, wanted)
    )
    said, strength = probes.classified(3 * train + 1, labels, 3 * test + 1, np.arange(600) // 20, 15)
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert strength in probes.STRENGTHS
    assert np.mean(said["linear"] == wanted) == pytest.approx(best, abs=0.02)  # 3 standard errors
    assert best - 0.06 < np.mean(said["neighbours"] == wanted) < best + 0.02


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    rng = np.random.default_rng(1)
    train, test = rng.standard_normal((40, 3)), rng.standard_normal((25, 3))
    labels = np.array(list("abc"))[rng.integers(0, 3, 40)]
    said, _ = probes.classified(train, labels, test, np.arange(40), 5, 1.0)
    a, b = ((rows - train.mean(0)) / train.std(0) for rows in (train, test))
    for row, got in zip(b, said["neighbours"], strict=True):
        cosine = [float(row @ one) / float(np.linalg.norm(one)) for one in a]
        nearest = labels[np.argsort(cosine)[-5:]].tolist()
        most = max(nearest.count(one) for one in "abc")
        assert got == next(one for one in "abc" if nearest.count(one) == most)


def test_the_attentive_probe_of_one_step_is_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    train, test = rng.standard_normal((1, 90, 4)), rng.standard_normal((1, 200, 4))
    labels = np.array(list("abc"))[(train[0] @ rng.standard_normal((4, 3)) + 0.5).argmax(1)]
    said = probes.attended((train, np.ones((1, 90), bool)), labels, (test, np.ones((1, 200), bool)), 0.1)
    want, _ = probes.classified(train[0], labels, test[0], np.arange(90), 5, 0.1)
    assert np.mean(said == want["linear"]) > 0.98  # but for rows at a boundary
    assert set(said) == {"a", "b", "c"}


def test_the_attentive_probe_finds_the_step_that_tells() -> None:
    """One step of each history, marked by one number, has the label in another; the steps around it say something else."""
    rng = np.random.default_rng(3)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        steps = rng.standard_normal((8, count, 5))
        steps[..., 0] = 0
        label, place = rng.integers(0, 2, count), rng.integers(0, 6, count)
        steps[place, np.arange(count), 0] = 6
        steps[place, np.arange(count), 1] = 3.0 * label - 1.5
        return steps, np.array(["a", "b"])[label]

    (train, labels), (test, wanted) = drawn(300), drawn(300)
    both = [np.ones((2, 300), bool)] * 2  # of the last two steps, by which the mark has passed
    said = probes.attended((train, both[0]), np.tile(labels, 2), (test, both[1]), 1.0)
    assert np.mean(said == np.tile(wanted, 2)) > 0.95
    alone, _ = probes.classified(train[-1], labels, test[-1], np.arange(300), 5, 1.0)
    assert np.mean(alone["linear"] == wanted) < 0.6
    # a label at a step is told by what came before it alone
    changed = test.copy()
    changed[-1] = 100.0
    again = probes.attended((train, both[0]), np.tile(labels, 2), (changed, both[1]), 1.0)
    assert np.array_equal(again[:300], said[:300])


def test_the_attentive_probe_of_single_labels() -> None:
    """Which steps have a label may differ by sequence, and the labels go with them in the order of `which`."""
    rng = np.random.default_rng(4)
    steps, which = rng.standard_normal((3, 60, 2)), rng.random((2, 60)) < 0.5
    labels = np.where(steps[-2:, :, 0].cumsum(0)[which] > 0, "up", "down")
    said = probes.attended((steps, which), labels, (steps, which), 1.0)
    assert said.shape == labels.shape
    assert np.mean(said == labels) > 0.75


def test_a_label_of_one_group_needs_no_choice() -> None:
    rows, labels = np.eye(4), np.array(["a", "a", "b", "b"])
    _, strength = probes.classified(rows, labels, rows, np.array([0, 0, 1, 1]), 3)
    assert strength == 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four pictures, two of which are held out."""
    folder = tmp_path_factory.mktemp("probes")
    pictures = noise.pictures(folder, 4)
    own = ["data.source=pictures", f"data.files=[{','.join(pictures)}]", "data.held_out=[picture2,picture3]"]
    small = [
        "data.steps=8",
        "data.train=6",
        "data.test=4",
        "model.units=6",
        "train.batch=6",
        "train.epochs=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RJEPA_CACHE", str(folder / "cache"))
        train.Trainer(config.read(None, [*own, *small]), folder / "run", lambda _: None).run()
    return folder / "run"


LABELS = "movie,label\npicture0,night\npicture1,day\npicture2,night\npicture3,day\n"


def test_a_run_is_probed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    (tmp_path / "labels.csv").write_text(LABELS)
    app = typer.Typer()
    cli.add_to(app)
    asked = [
        "probe",
        str(run),
        "--labels",
        str(tmp_path / "labels.csv"),
        "--out",
        str(tmp_path / "found.json"),
    ]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "always the most frequent label: 0.5000" in shown.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["labels"] == ["day", "night"]
    assert found["rows"] == {"train": 12, "test": 8, "unlabelled": 0}  # of 8 steps the last is late
    done = train.finished(run)
    assert not done.model.training
    with torch.no_grad():
        x = [side.x[-1].double().numpy() for side in (done.data.train, done.data.test)]
    assert done.data.train.x is not None
    h = done.model.encoder.encode(done.data.train.x).h[-1]
    other = done.model.encoder.encode(done.data.test.x).h[-1]
    labels = np.repeat(["night", "day"], 6)
    for name, rows in (("x", x), ("h", [one.detach().double().numpy() for one in (h, other)])):
        said, _ = probes.classified(rows[0], labels, rows[1], labels, 20, 1.0)
        right = said["linear"] == np.repeat(["night", "day"], 4)
        assert found["linear"][name]["accuracy"] == pytest.approx(right.mean())
        assert found["linear"][name]["balanced_accuracy"] == pytest.approx(
            (right[:4].mean() + right[4:].mean()) / 2
        )
    mean, half = found["linear"]["gain"]
    assert mean == pytest.approx(found["linear"]["h"]["accuracy"] - found["linear"]["x"]["accuracy"])
    assert half >= 0
    (tmp_path / "labels.csv").write_text(LABELS.replace("picture3,day\n", ""))
    part = probes.probe(done, tmp_path / "labels.csv")
    assert part["rows"] == {"train": 12, "test": 4, "unlabelled": 4}


def test_labels_that_cannot_be_told_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(run.parent / "cache"))
    done = train.finished(run)
    file = tmp_path / "labels.csv"
    for text, says in {
        LABELS.replace("picture2,night", "picture2,dawn"): "labels that no training sequence has: dawn",
        LABELS.replace("1,day", "1,night"): "must have at least 2 labels, got night",
        "movie,label\npicture0,a\npicture1,b\n": "no late fixation of the test sequences has a label",
        LABELS.replace("label", "kind"): "no column 'label'; there are kind",
        LABELS.replace("3,day", "3,"): "row 5: has no label",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            probes.probe(done, file)
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        probes.probe(done, file, neighbours=0)
    app = typer.Typer()
    cli.add_to(app)
    shown = CliRunner().invoke(app, ["probe", str(run), "data.order=shuffled", "--labels", str(file)])
    assert shown.exit_code == 2
    assert "labels go with data.order='recorded', got 'shuffled'" in shown.output
