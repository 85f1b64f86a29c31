"""Training runs: resume, online and whole-sequence updates, presets, evaluation, and folders that don't fit."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import films
import noise
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rjepa_triton.online import streams
from rjepa_triton.rjepa import backbone, cli, config, data, figures, storage, train
from rjepa_triton.rjepa.online import Streams
from rjepa_triton.rjepa.train import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three pictures of smooth noise."""
    return noise.pictures(tmp_path_factory.mktemp("pictures"), 3)


@pytest.fixture
def settings(pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))

    def make(*overrides: str) -> config.Config:
        small = [
            "data.steps=8",
            "data.train=4",
            "data.test=3",
            "model.units=6",
            "model.hidden=8",
            "train.batch=3",
        ]
        own = [
            "data.source=pictures",
            f"data.files=[{','.join(pictures)}]",
            "train.epochs=2",
            "train.lr_recurrent=1e-3",
        ]
        return config.read(None, [*own, *small, *overrides])

    return make


def run(settings: config.Config, folder: Path) -> Trainer:
    trainer = Trainer(settings, folder, lambda _: None)
    trainer.run()
    return trainer


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.control.parameters())]


def test_a_run_writes_what_it_says(settings: Any, tmp_path: Path) -> None:
    trainer = run(settings(), tmp_path / "run")
    folder = tmp_path / "run"
    with (folder / "metrics.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["epoch"] for row in rows] == ["0.0", "1.0", "2.0"]
    named = {
        "loss",
        "normalised",
        "control",
        "control_normalised",
        "variance",
        "input_gain",
        "participation_ratio",
    }
    named |= {
        "correlation_participation_ratio",
        "next_from_h",
        "next_from_x",
        "current_from_h",
        "current_from_x",
    }
    named |= {"yardstick", "yardstick_control", "rankme"}
    assert named | {"epoch"} == set(rows[0])
    assert list((folder / "tensorboard").glob("events*"))
    found = json.loads((folder / "evaluation.json").read_text())
    assert set(found) == {"before", "after", "config", "held_out", "epoch"}
    assert found["held_out"] == ["picture2"]
    assert len(found["after"]["loss"]) == 7
    assert found["before"]["loss"] == pytest.approx(found["before"]["control"])  # nothing recurs yet
    weights = load_file(folder / "weights.safetensors")
    torch.testing.assert_close(
        weights["encoder.circuit.weight_ss"], trainer.model.encoder.circuit.weight_ss.detach()
    )
    assert trainer.model.encoder.circuit.weight_ss.abs().max() > 0
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_interrupted_and_whole_runs_end_alike(settings: Any, tmp_path: Path, updates: int) -> None:
    whole = run(settings(f"train.updates={updates}"), tmp_path / "whole")
    first = Trainer(settings(f"train.updates={updates}"), tmp_path / "cut", lambda _: None)
    done = 0

    def stop_in_the_second_epoch() -> None:
        nonlocal done
        done += 1
        if done == first.batches + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(stop_in_the_second_epoch)
    said: list[str] = []
    second = Trainer(settings(f"train.updates={updates}"), tmp_path / "cut", said.append)
    assert said == [f"continuing after epoch 1 of {tmp_path / 'cut'}"]
    second.run()
    for a, b in zip(parameters(second), parameters(whole), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "cut" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert (tmp_path / "cut" / "evaluation.json").read_text() == (
        tmp_path / "whole" / "evaluation.json"
    ).read_text()


@pytest.mark.parametrize("where", ["in an epoch", "in an evaluation", "at the end", "before it begins"])
@pytest.mark.parametrize("updates", [0, 1])
def test_a_run_that_is_asked_to_stop_goes_on_from_there(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, updates: int
) -> None:
    made = settings(f"train.updates={updates}", "train.batch=2")
    whole = run(made, tmp_path / "whole")
    first = Trainer(made, tmp_path / "cut", lambda _: None)
    done = 0

    def ask() -> None:
        nonlocal done
        done += 1
        if where == "in an epoch" and done == first.batches + 1:
            first.stop()
        if where == "at the end" and done == 2 * first.batches:
            first.stop()

    if where == "in an evaluation":
        measured = train.Evaluator.__call__

        def evaluate(self: Any, *args: Any, **options: Any) -> Any:
            if done == first.batches:
                first.stop()
            return measured(self, *args, **options)

        monkeypatch.setattr(train.Evaluator, "__call__", evaluate)
    if where == "before it begins":
        first.stop()
    with pytest.raises(train.Stopped):
        first.run(ask)
    done = -1
    assert not (tmp_path / "cut" / "evaluation.json").exists()
    said: list[str] = []
    second = Trainer(made, tmp_path / "cut", said.append)
    place = {
        "in an epoch": "epoch 1 and 1 batches",
        "in an evaluation": f"epoch 0 and {first.batches} batches",
        "at the end": f"epoch 1 and {first.batches} batches",
        "before it begins": "epoch 0 and 1 batches",
    }[where]
    assert said == [f"continuing after {place} of {tmp_path / 'cut'}"]
    second.run()
    for a, b in zip(parameters(second), parameters(whole), strict=True):
        assert torch.equal(a, b)
    for file in ("metrics.csv", "evaluation.json"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()


@pytest.mark.parametrize(("way", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_sigterm_ends_a_run_with_a_checkpoint(
    settings: Any, tmp_path: Path, way: signal.Signals, code: int
) -> None:
    """The command, in a process of its own, in the middle of a long run."""
    file = tmp_path / "config.yaml"
    file.write_text(config.text(settings("train.epochs=100000")))
    command = [
        sys.executable,
        "-m",
        "rjepa_triton",
        "train",
        "--config",
        str(file),
        "--out",
        str(tmp_path / "run"),
    ]
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **heeds)  # type: ignore[call-overload]
    try:
        checkpoint = tmp_path / "run" / "metrics.csv"
        for _ in range(1200):
            if checkpoint.exists() and checkpoint.read_text().count("\n") > 3:
                break
            assert process.poll() is None
            time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(way)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == code, said
    assert time.monotonic() - begun < 10
    assert f"stopped by {way.name}; the same command continues the run" in said
    state = storage.unpickled(tmp_path / "run" / "checkpoint.pt")
    assert state["epochs"] >= 2
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_two_processes_learn_as_one_and_go_on_after_sigterm(settings: Any, tmp_path: Path) -> None:
    """Batches of 3, 3 and 1 sequences, of which a process has 2, 1 or none."""
    file, out = tmp_path / "config.yaml", tmp_path / "two"
    few = ["data.train=7", "train.batch=3", "train.precision=64-true"]
    command = [sys.executable, "-m", "rjepa_triton", "train", "--config", str(file), "--out", str(out)]
    file.write_text(config.text(settings(*few, "train.epochs=100000", "train.devices=2")))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(1800):
            if (out / "metrics.csv").exists() and (out / "metrics.csv").read_text().count("\n") > 2:
                break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "stopped by SIGTERM" in said
    assert "Traceback" not in said
    epochs = storage.unpickled(out / "checkpoint.pt")["epochs"] + 1
    file.write_text(config.text(settings(*few, f"train.epochs={epochs}", "train.devices=2")))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one = run(settings(*few, f"train.epochs={epochs}"), tmp_path / "one")
    found, want = (load_file(folder / "weights.safetensors") for folder in (out, one.folder))
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "way",
    [
        [],
        ["train.updates=1"],
        ["train.updates=2"],
        ["model.train_head=true"],
        ["model.preset=full", "model.backbone=small:2"],
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, way: list[str]
) -> None:
    """Those of weights, and of what runs under autocast. How far SGD's path is from float32's, as a part of its length.

    In bfloat16 a number has 8 bits: an operation errs by .4 %, and weights that move little don't move. Of the full
    preset's convolutions that makes 2 % of h, and more of gradients in which much cancels.
    """
    if precision == "bf16-true" and "train.updates" in str(way):
        with pytest.raises(
            ValueError, match=r"goes with weights of float32 or float64, got train.precision='bf16"
        ):
            settings(f"train.precision={precision}", *way)
        return

    def sgd(model: torch.nn.Module, _: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05)

    monkeypatch.setattr(train, "optimizer_of", sgd)
    ends = []
    for one in (precision, "32-true"):
        trainer = Trainer(settings(f"train.precision={one}", *way), tmp_path / one, lambda _: None)
        begin = [parameter.double() for parameter in parameters(trainer)]
        trainer.run()
        ends.append(parameters(trainer))
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}[precision]
    assert {each.dtype for each in ends[0]} == {dtype}
    found, want, first = (torch.cat([each.double().flatten() for each in one]) for one in (*ends, begin))
    gap = float((found - want).norm() / (want - first).norm())
    low = 0.01 if "full" not in str(way) else 0.5
    assert 0 < gap < {"64-true": 1e-4, "bf16-true": 0.5, "bf16-mixed": low}[precision]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.preset=full", "model.backbone=small:2"],
        ["model.preset=full", "model.backbone=small:2", "train.learning=bptt", "model.train_backbone=true"],
        ["model.preset=full", "model.backbone=small:2", "model.delay=true", "model.depthwise=true"],
        ["model.preset=full", "model.backbone=small:2", "model.feedback=false"],
        ["model.train_head=true", "model.distance=square"],
        ["model.actions=given", "model.embedding=4"],
        ["model.actions=predicted", "train.psi=time"],
        ["train.learning=rtrl", "train.psi=last"],
        ["train.learning=rtrl", "train.updates=1"],
    ],
    ids=" ".join,
)
def test_every_way_trains(settings: Any, tmp_path: Path, overrides: list[str]) -> None:
    trainer = Trainer(settings("train.epochs=1", *overrides), tmp_path / "run", lambda _: None)
    before = parameters(trainer)
    found = trainer.run()
    assert all(np.isfinite(found["after"]["loss"]))
    moved = {
        name
        for (name, _), old, new in zip(
            trainer.model.named_parameters(), before, parameters(trainer), strict=False
        )
        if not torch.equal(old, new)
    }
    assert any("circuit" in name for name in moved)
    assert any("predictor.second" in name for name in moved)
    frozen = "model.train_backbone=true" not in overrides
    assert any("backbone" in name for name in moved) != frozen
    assert any(".head." in name for name in moved) == ("model.train_head=true" in overrides)


def test_one_step_at_a_time_is_the_sum_of_a_sequences_gradient(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that hardly move, online updates add up to the one of the whole sequence."""
    monkeypatch.setattr(Streams, "of", lambda *_: "the loop, whose gradients are seen at each step")
    small = ["train.lr_recurrent=1e-9", "train.lr_predictor=1e-9", "train.learning=rfp"]
    found = []
    for updates in (0, 1):
        trainer = Trainer(
            settings(*small, f"train.updates={updates}"), tmp_path / str(updates), lambda _: None
        )
        with torch.no_grad():
            for weight in trainer.model.encoder.circuit.parameters():
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
            torch.nn.init.normal_(
                trainer.model.predictor.second.weight, generator=torch.Generator().manual_seed(2)
            )
        total = [torch.zeros_like(p) for p in trainer.model.encoder.circuit.parameters()]

        def add(*_: Any, total: list[torch.Tensor] = total, trainer: Trainer = trainer, **__: Any) -> None:
            for into, p in zip(total, trainer.model.encoder.circuit.parameters(), strict=True):
                into += p.grad

        trainer.optimizer.step = add
        trainer._learn(torch.arange(3))
        found.append(torch.cat([t.flatten() for t in total]))
    steps = 7
    torch.testing.assert_close(found[1] / steps, found[0], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("updates", [1, 3])
def test_online_updates_keep_no_more_of_longer_sequences(
    settings: Any, tmp_path: Path, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, int] = {}
    for steps in (9, 30):
        trainer = Trainer(
            settings(f"data.steps={steps}", f"train.updates={updates}"), tmp_path / str(steps), lambda _: None
        )
        made: list[train.OnlineLearner] = []

        class Watched(train.OnlineLearner):
            def __init__(self, *args: Any, made: list[train.OnlineLearner] = made, **options: Any) -> None:
                super().__init__(*args, **options)
                made.append(self)

        for module in (train, streams):
            monkeypatch.setattr(module, "OnlineLearner", Watched)
        trainer._learn(torch.arange(3))
        monkeypatch.undo()
        monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
        kept[steps] = made[0].nbytes
    assert kept[9] == kept[30] > 0


def test_an_evaluation_is_the_runs_own(settings: Any, tmp_path: Path) -> None:
    run(settings(), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    again = train.evaluate_run(tmp_path / "run")
    for name, value in found.items():
        if name != "trajectories":  # up to the sign of a component
            np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6)
    other = train.evaluate_run(tmp_path / "run", ["data.seed=5"])
    assert other["loss"] != again["loss"]


def test_folders_that_do_not_fit(settings: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"isn't a finished run: there is no config\.yaml"):
        train.evaluate_run(folder)
    run(settings(), folder)
    with pytest.raises(ValueError, match=r"holds a run of another configuration: model\.units: 6 against 5"):
        Trainer(settings("model.units=5"), folder)
    with pytest.raises(
        ValueError, match=r"overrides of a finished run must begin with 'data\.', got train\.seed=1"
    ):
        train.evaluate_run(folder, ["train.seed=1"])
    state = backbone.unpickled(folder / "checkpoint.pt")
    state["model"]["encoder.circuit.weight_ss"] = torch.zeros(2, 2)
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt isn't a checkpoint of this run"):
        Trainer(settings(), folder)
    (folder / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="can't be read with weights_only=True"):
        Trainer(settings(), folder)
    save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors doesn't belong to"):
        train.evaluate_run(folder)


def test_what_is_damaged_or_empty_is_named_and_nothing_is_changed(settings: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(settings("train.epochs=1"), folder)
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    doors = {
        "checkpoint.pt": lambda: Trainer(settings("train.epochs=1"), folder, lambda _: None),
        "weights.safetensors": lambda: train.evaluate_run(folder),
        "evaluation.json": lambda: figures.load([folder]),
        "config.yaml": lambda: Trainer(settings("train.epochs=1"), folder, lambda _: None),
    }
    damages: dict[str, list[bytes]] = {
        "checkpoint.pt": [b"", whole["checkpoint.pt"][:-1000]],
        "weights.safetensors": [b"", whole["weights.safetensors"][:-1]],
        "config.yaml": [b"", b"\xff", whole["config.yaml"].replace(b"seed", b"need")],
        "evaluation.json": [b"", b"{}", b"[" * 5000, whole["evaluation.json"].replace(b'"loss"', b'"lost"')],
    }
    for name, damaged in damages.items():
        for bad in damaged:
            (folder / name).write_bytes(bad)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
                doors[name]()
            assert name != "checkpoint.pt" or "remove it to begin the run anew" in str(raised.value)
            there = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
            assert there == {**whole, name: bad}
        (folder / name).write_bytes(whole[name])


def test_files_without_a_digest_are_read(settings: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = run(settings("train.epochs=1"), folder)
    torch.save(backbone.unpickled(folder / "checkpoint.pt"), folder / "checkpoint.pt")
    save_file(load_file(folder / "weights.safetensors"), folder / "weights.safetensors", {"format": "pt"})
    again = Trainer(settings("train.epochs=1"), folder, lambda _: None)
    for a, b in zip(parameters(before), parameters(again), strict=True):
        assert torch.equal(a, b)
    written = (folder / "config.yaml").read_text()
    earlier = [
        line for line in written.splitlines() if line.split(":")[0].strip() not in ("format", "edge", "eye")
    ]
    (folder / "config.yaml").write_text("\n".join(earlier) + "\n")
    assert train.evaluate_run(folder)["loss"]
    Trainer(settings("train.epochs=1"), folder, lambda _: None)  # keys that it lacks have their defaults


def test_a_full_disk_leaves_the_checkpoint_before(settings: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    trainer = Trainer(settings("train.epochs=1"), folder, lambda _: None)
    kept = (folder / "checkpoint.pt").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt can't be written: File too large"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "checkpoint.pt").read_bytes() == kept
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    assert (folder / "checkpoint.pt").stat().st_mode & 0o777 == (
        folder / "config.yaml"
    ).stat().st_mode & 0o777
    Trainer(settings("train.epochs=1"), folder, lambda _: None).run()
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir() if file.is_file()}
    assert len(modes) == 1


def test_a_commands_errors_are_messages(settings: Any, tmp_path: Path) -> None:
    app = typer.Typer()
    cli.add_to(app)
    own = [
        f"data.files=[{','.join(settings().data.files)}]",
        "data.source=pictures",
        "data.steps=8",
        "data.train=2",
    ]
    own += ["data.test=2", "model.units=4", "train.epochs=1", "--out", str(tmp_path / "run")]
    (tmp_path / "empty.pth").touch()
    (tmp_path / "file").touch()
    for override, said in {
        "model.backbone=timm:resnet50": "need timm, which is not installed|can't be had from timm",
        f"model.backbone=file:{tmp_path / 'empty.pth'}": r"empty\.pth is empty",
        "train.accelerator=x": "train.accelerator=x, .* can't be used here",
        "train.accelerator=mps": "train.accelerator=mps, .* can't be used here",
        f"--out={tmp_path / 'file' / 'run'}": "Not a directory.*file",
        "train.lr_predictor=inf": "train.lr_predictor must be above 0, got inf",
    }.items():
        shown = CliRunner().invoke(app, ["train", *own, override])
        assert shown.exit_code == 2, shown.output
        assert re.search(said, shown.output), shown.output
        assert isinstance(shown.exception, SystemExit)


@pytest.mark.parametrize("kind", ["table", "eyelink"])
def test_a_table_is_trained_on_as_it_is_checked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    films.picture(tmp_path)
    films.picture(tmp_path, name="n.png")
    rows, eyelink = [], kind == "eyelink"
    for who in ("p", "q"):
        for movie in ("m", "n"):
            for k in range(12):  # a blink after every fourth
                rows += [
                    f"{who},{movie},{k * 300 + 500 * (k // 4)},200,{9 * k},{40 + k},{eye}" for eye in "LR"
                ]
    header = "participant,movie,onset,duration,x,y,eye"
    if eyelink:
        header = "RECORDING_SESSION_LABEL,clip,CURRENT_FIX_START,CURRENT_FIX_DURATION,CURRENT_FIX_X,CURRENT_FIX_Y,EYE_USED"
    table = tmp_path / "fix.csv"
    table.write_text("\n".join([header, *rows]).replace(",", "\t" if eyelink else ",") + "\n")
    (tmp_path / "fix.csv.yaml").write_text("time_unit: ms\npx_per_degree: 10\nmovies: {m: m.png, n: n.png}\n")
    app = typer.Typer()
    cli.add_to(app)
    as_it_is = ["--format", kind, "--movie-column", "clip"]
    shown = CliRunner().invoke(app, ["fixations", "check", str(table), *as_it_is])
    assert shown.exit_code == 2
    assert "data.eye=L" in shown.output
    shown = CliRunner().invoke(app, ["fixations", "check", str(table), *as_it_is, "--eye", "left"])
    assert shown.exit_code == 0, shown.output
    made = ["data.source=table", f"data.table={table}", f"data.format={kind}", "data.movie_column=clip"]
    made += ["data.eye=left", "data.steps=3", "data.stride=1", "data.max_gap=0.3", "data.edge=pad"]
    sides = data.datasets(config.read(None, made).data)
    assert (len(sides.train), len(sides.test)) == (12, 12)  # of runs of 4, 2 each
    assert sides.train.edge == "pad"
    sides = data.datasets(config.read(None, [*made, "data.stride=0", "data.segments=20"]).data)
    assert len(sides.train) + len(sides.test) == 20  # of 24 places
    with pytest.raises(ValueError, match="patches stick out"):
        data.datasets(config.read(None, [*made, "data.edge=refuse"]).data)
    shown = CliRunner().invoke(
        app, ["train", *made, "model.units=4", "train.epochs=1", "--out", str(tmp_path / "run")]
    )
    assert shown.exit_code == 0, shown.output
    for key, said in {
        "format=csv": "data.format must be one of",
        "max_gap=-1": "data.max_gap must be at least 0",
        "segments=-1": "data.segments must be at least 0",
    }.items():
        with pytest.raises(ValueError, match=said):
            config.read(None, [f"data.{key}"])


def test_more_epochs_go_on(settings: Any, tmp_path: Path) -> None:
    run(settings("train.epochs=1"), tmp_path / "run")
    whole = run(settings("train.epochs=2"), tmp_path / "whole")
    longer = run(settings("train.epochs=2"), tmp_path / "run")
    for a, b in zip(parameters(longer), parameters(whole), strict=True):
        assert torch.equal(a, b)


def test_figures_and_commands(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for rule in ("rfp", "bptt"):
        for seed in range(2):
            runs.append(tmp_path / f"{rule}-{seed}")
            run(settings(f"train.learning={rule}", f"train.seed={seed}", "train.epochs=1"), runs[-1])
    found = figures.load(runs)
    assert {rule: len(some) for rule, some in found.items()} == {"rfp": 2, "bptt": 2}
    for file in figures.draw(found, tmp_path / "figures"):
        assert file.stat().st_size > 10_000
    assert all(len(row) == len(figures.SUMMARY) for row in figures.summary(found))
    with pytest.raises(FileNotFoundError, match="isn't a finished run"):
        figures.load([tmp_path / "none"])
    run(settings("train.epochs=1", "model.units=5"), tmp_path / "other")
    with pytest.raises(ValueError, match=r"can't be averaged with the others: model\.units: 6 against 5"):
        figures.load([*runs, tmp_path / "other"])

    app = typer.Typer()
    cli.add_to(app)
    shown = CliRunner().invoke(
        app, ["figures", *map(str, runs), "--out", str(tmp_path / "out"), "--markdown"]
    )
    assert shown.exit_code == 0, shown.output
    assert "| rfp |" in shown.output
    assert (tmp_path / "out" / "fig4.png").exists()
    shown = CliRunner().invoke(app, ["evaluate", str(runs[0])])
    assert shown.exit_code == 0, shown.output
    assert "participation ratio" in shown.output
    again = [
        f"data.files=[{','.join(settings().data.files)}]",
        "data.source=pictures",
        "data.steps=8",
        "data.train=2",
    ]
    again += ["data.test=2", "model.units=4", "train.epochs=1"]
    shown = CliRunner().invoke(app, ["train", *again, "--out", str(tmp_path / "by-command")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "by-command" / "weights.safetensors").exists()
    shown = CliRunner().invoke(app, ["train", "train.epoch=1", "--out", str(tmp_path / "x")])
    assert shown.exit_code == 2
    assert "Key 'epoch'" in shown.output
