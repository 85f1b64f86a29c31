"""Configurations: files, overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rjepa_triton.rjepa import config


def test_a_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {units: 30}\ntrain:\n  epochs: 2\n  lr_recurrent: 1e-5\n")
    made = config.read(file, ["train.epochs=5", "data.held_out=[a,b]"])
    assert (made.model.units, made.train.epochs, made.train.lr_recurrent) == (30, 5, 1e-5)
    assert made.data.held_out == ["a", "b"]
    written = config.text(made)
    file.write_text(written)
    assert config.read(file) == made
    assert config.differences(written, config.text(config.read(file, ["train.seed=3"]))) == [
        "train.seed: 0 against 3"
    ]
    assert config.value(written, "train.epochs") == 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=1", "Key 'epoch' not in 'TrainConfig'"),
        ("train.epochs=many", "Value 'many'"),
        ("train.epochs=-1", "train.epochs must be at least 0, got -1"),
        ("train.epochs", "must be section.key=value, got 'train.epochs'"),
        ("model.preset=half", "model.preset must be one of 'initial', 'full', got 'half'"),
        ("train.lr_predictor=0", r"train.lr_predictor must be above 0, got 0"),
        ("data.steps=1", "data.steps must be at least 2, got 1"),
    ],
)
def test_bad_values_are_named(override: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config.read(None, [override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.preset=full", "goes with model.preset='initial', got 'full'.*nearest is train.updates=0"),
        ("train.learning=bptt", "needs whole sequences"),
        ("model.actions=given", "goes with model.actions='none'"),
        ("train.devices=2", "goes with train.devices=1, got 2"),
        (
            "train.precision=bf16-true",
            "goes with weights of float32 or float64, got train.precision='bf16-true'",
        ),
    ],
)
def test_what_cannot_learn_online(override: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config.read(None, ["train.updates=1", override])


def test_segments_have_no_stride() -> None:
    with pytest.raises(ValueError, match=r"data\.stride goes with data\.segments=0, got 3 and 5"):
        config.read(None, ["data.stride=3", "data.segments=5"])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no configuration"):
        config.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("train: {epochs: [1")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        config.read(tmp_path / "bad.yaml")
    (tmp_path / "other.yaml").write_text("training: {epochs: 1}\n")
    with pytest.raises(ValueError, match=r"other\.yaml: Key 'training'"):
        config.read(tmp_path / "other.yaml")


def test_names_are_text_in_files_and_overrides(tmp_path: Path) -> None:
    names = ["007", "010", "1_0", "no", "12:30", "1e3", "~", "null", "2026-01-02"]
    made = config.read(None, [f"data.held_out=[{','.join(names)}]", "data.table=012", "train.seed=010"])
    assert made.data.held_out == names
    assert (made.data.table, made.train.seed) == ("012", 10)
    (tmp_path / "run.yaml").write_text(config.text(made))
    assert config.read(tmp_path / "run.yaml") == made
    (tmp_path / "own.yaml").write_text(f"data:\n  held_out: [{', '.join(names)}]\n  table: 012\n")
    assert config.read(tmp_path / "own.yaml", ["train.seed=10"]) == made
    for table in ("", "#1.csv", "a: b.csv", "x:1.csv", "- a", "*a"):
        assert config.read(None, [f"data.table={table}"]).data.table == table
    assert config.read(None, ["data.table='[a].csv'"]).data.table == "[a].csv"
    with pytest.raises(ValueError, match=r"data\.table=\[a: not YAML that can be read"):
        config.read(None, ["data.table=[a"])


@pytest.mark.parametrize(
    "body", [b"", b"# nothing", b"text", b"[1, 2]", b"data: {}\ndata: {}", b"\xff", b"[" * 3000]
)
def test_files_that_are_no_configuration_are_named(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(body)
    with pytest.raises(ValueError, match=r"run\.yaml: "):
        config.read(tmp_path / "run.yaml")


def test_a_value_out_of_range_names_the_file_that_has_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {source: demos}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml: data\.source must be one of .* got 'demos'"):
        config.read(file)
    file.write_text("train: {epochs: 3}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml with data\.source=x: data\.source must be one of"):
        config.read(file, ["data.source=x"])
