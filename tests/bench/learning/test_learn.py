"""Online tasks are what they say, every rule runs on them through the command, and tables and curves are of the records."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness import statistics as fit
from rjepa_triton.bench.harness.record import Record
from rjepa_triton.bench.learning import curves, learn, tasks
from rjepa_triton.bench.learning.learn import RULES, Settings
from rjepa_triton.bench.learning.tasks import TASKS

TINY = Settings(
    tasks=("lorenz",), rules=("rfp", "tbptt"), seeds=2, steps=40, hidden=4, batch=2, chunk=2, jobs=1
)


@pytest.mark.parametrize("name", TASKS)
def test_streams_have_their_shapes_and_are_what_the_seed_makes_them(name: str) -> None:
    task = TASKS[name]
    stream = task.make(50, 3, 7)
    assert stream.x.shape == (50, 3, task.features)
    assert stream.x.dtype == torch.float32
    assert stream.target.shape == stream.scored.shape == (50, 3)
    assert stream.scored.dtype == torch.bool
    assert task.losses(torch.zeros(50, 3, task.outputs), stream.target).shape == (50, 3)
    again, longer, other = task.make(50, 3, 7), task.make(77, 3, 7), task.make(50, 3, 8)
    for a, b, c, d in zip(*map(dataclasses.astuple, (stream, again, longer, other)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c[:50])
        assert name == "lorenz" or not torch.equal(a, d)
    assert not torch.equal(stream.x, other.x)
    assert not torch.equal(stream.x[:, 0], stream.x[:, 1])


def test_recall_asks_for_what_was_shown() -> None:
    stream = tasks.recall(200, 4, 0)
    assert torch.equal(stream.x.sum(2), torch.ones(200, 4))
    asked = 0
    for b in range(4):
        memory: list[int] = []
        for t, seen in enumerate(stream.x[:, b].argmax(1).tolist()):
            question = seen == tasks.SYMBOLS + 1
            assert bool(stream.scored[t, b]) == question
            if seen < tasks.SYMBOLS:
                memory.append(seen)
            elif question and memory and t >= 2 * tasks.SHOWN + tasks.DELAY:
                assert int(stream.target[t, b]) == memory[-tasks.SHOWN]
                memory.append(memory[-tasks.SHOWN])  # so that the next question's is as far back
                asked += 1
    assert asked > 150


def test_adding_asks_for_the_sum_of_the_marked() -> None:
    stream = tasks.adding(200, 4, 0)
    number, mark, last = stream.x.unbind(2)
    assert torch.equal(stream.scored, last == 1)
    for b in range(4):
        ends = [t for t in range(200) if last[t, b] == 1]
        assert all(later - end == tasks.WINDOW for end, later in itertools.pairwise(ends))
        for end in ends[1:]:
            marked = [t for t in range(end - tasks.WINDOW + 1, end + 1) if mark[t, b] == 1]
            first, second = marked
            assert first <= end - tasks.WINDOW // 2 < second
            assert float(stream.target[end, b]) == pytest.approx(float(number[first, b] + number[second, b]))
    assert int(stream.scored.sum()) in range(4 * 16, 4 * 17 + 1)


def test_lorenz_agrees_with_a_finer_integration() -> None:
    start = np.array([[1.0, -5.0], [3.0, -9.0], [20.0, 30.0]])
    coarse = tasks.lorenz_samples(start, 20, tasks.SAMPLING, tasks.SUBSTEPS)
    fine = tasks.lorenz_samples(start, 20, tasks.SAMPLING, 16 * tasks.SUBSTEPS)
    # 3 time units, over which errors grow about 15-fold; states are of the order of 20
    assert np.abs(coarse - fine).max() < 2e-2
    # and of fourth order: half the step leaves a sixteenth of the error
    half = tasks.lorenz_samples(start, 20, tasks.SAMPLING, 2 * tasks.SUBSTEPS)
    assert np.abs(half - fine).max() < np.abs(coarse - fine).max() / 10
    # Euler's method knows only the equations
    state, h = start, 1e-6
    for _ in range(10000):
        x, y, z = state
        state = state + h * np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])
    assert tasks.lorenz_samples(start, 1, 0.01, 1)[0] == pytest.approx(state, abs=1e-3)


def test_lorenz_asks_for_the_next_value() -> None:
    stream = tasks.lorenz(30, 2, 0)
    assert torch.equal(stream.target[:-1], stream.x[1:, :, 0])
    assert bool(stream.scored.all())


@pytest.mark.parametrize(("name", "tolerance"), [("recall", 0.01), ("adding", 0.05), ("lorenz", 0.03)])
def test_chance_is_the_loss_of_the_best_constant_answer(name: str, tolerance: float) -> None:
    task = TASKS[name]
    stream = task.make(1500, 32, 3)
    told = stream.target[stream.scored]
    if task.loss == "cross-entropy":
        answer = torch.bincount(told).div(len(told)).log().expand(len(told), -1)
    else:
        answer = told.mean().expand(len(told), 1)
    assert float(task.losses(answer, told).mean()) == pytest.approx(task.chance, rel=tolerance)
    assert task.best == 0


@pytest.mark.parametrize("cell", learn.CELLS)
def test_heads_start_from_the_dense_layers_blocks(cell: str) -> None:
    dense, heads = learn.layer(cell, 3, 8, 1, seed=1), learn.layer(cell, 3, 8, 4, seed=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(dense.weights(), learn.layer(cell, 3, 8, 1, 1).weights(), strict=True)
    )
    for a, b in zip(dense.weights(), heads.weights(), strict=True):
        if b.dim() == 3:
            assert torch.equal(torch.block_diag(*b), a * torch.block_diag(*torch.ones(4, 2, 2)))
        else:
            assert torch.equal(a, b)


def test_every_rule_runs_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "LEARNING_RATES", (0.01,))
    sizes = {"--seeds": 2, "--steps": 40, "--hidden": 4, "--batch": 2, "--chunk": 2, "--jobs": 1}
    arguments = ["learn", "--tasks", "lorenz", "--out", str(tmp_path)]
    arguments += [text for option, size in sizes.items() for text in (option, str(size))]
    result = CliRunner().invoke(bench, [*arguments, "--markdown"])
    assert result.exit_code == 0, result.output
    assert "**lorenz: squared error, RGC, N = 4, B = 2, T = 40, 2 seeds**" in result.stdout
    assert "| chance |  |  | 1.0000 |  |  |" in result.stdout
    assert (tmp_path / "learn.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "learn.svg").read_text()

    records = record.load(tmp_path / "learn.jsonl")
    counted = [r for r in records if r.params["stage"] == "learning"]
    assert {(r.algorithm, r.params["seed"]) for r in counted} == {
        (rule, seed) for rule in RULES for seed in (0, 1)
    }
    assert len(records) - len(counted) == len(RULES) * len(learn.LEARNING_RATES) * len(learn.TUNING_SEEDS)
    for r in counted:
        assert r.status == "ok"
        assert len(r.payload["curve"]) == learn.WINDOWS
        assert r.payload["final"] == pytest.approx(sum(r.payload["curve"][-4:]) / 4, rel=1e-4)
        assert r.payload["updates"] == 40 // r.params["C"]
        assert r.params["C"] == (2 if RULES[r.algorithm].chunked else 1)
        assert r.timing is not None
        assert f"| {r.algorithm} | {r.params['C']} | {r.params['lr']:g} |" in result.stdout

    again = CliRunner().invoke(bench, arguments)
    assert f"kept {len(records)} runs made earlier" in again.output
    assert len(record.load(tmp_path / "learn.jsonl")) == len(records)

    file = str(tmp_path / "learn.jsonl")
    assert CliRunner().invoke(bench, ["table", file, "--markdown"]).stdout == result.stdout
    drawn = CliRunner().invoke(bench, ["plot", file, "--out", str(tmp_path / "new" / "drawn")])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "new" / "drawn.svg").read_bytes() == (tmp_path / "learn.svg").read_bytes()


@pytest.mark.parametrize(
    ("task", "rule", "same"),
    [("recall", "rflo", "snap0"), ("adding", "rflo", "eprop"), ("lorenz", "rflo", "eprop")],
)
def test_rules_that_coincide_for_a_cell(task: str, rule: str, same: str) -> None:
    """RFLO keeps only a state's own leak, and for these cells that equals a simpler rule.

    An LSTM's output h doesn't depend directly on its previous value, so its leak carries no credit to a loss. With one
    state, or with two that influence each other only through matrices, e-prop has nothing but the leak either.
    """
    sizes = dataclasses.replace(TINY, steps=240)
    a, b = (learn.train(sizes.run(task, name, 0, 0.01, tuning=False)) for name in (rule, same))
    assert a["status"] == "ok"
    assert a["payload"]["curve"] == b["payload"]["curve"]


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.streams])
@pytest.mark.parametrize("task", TASKS)
def test_a_stream_finds_what_the_loop_of_a_learner_finds(task: str, rule: str) -> None:
    sizes = dataclasses.replace(TINY, tasks=(task,), steps=240, batch=3)
    run = sizes.run(task, rule, 0, 0.01, tuning=False)
    streamed, looped = (learn._curve(run, by_stream=way, dtype=torch.float64) for way in (True, False))
    assert streamed[0] == pytest.approx(looped[0], rel=1e-10)
    assert streamed[2] == looped[2]


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, rules=("tbptt",))
    alone, _ = learn.measure(settings, tmp_path / "a.jsonl")
    together, kept = learn.measure(dataclasses.replace(settings, jobs=2), tmp_path / "b.jsonl")
    assert kept == 0
    assert [r.payload["curve"] for r in alone] == [r.payload["curve"] for r in together]
    more, kept = learn.measure(dataclasses.replace(settings, seeds=3), tmp_path / "a.jsonl")
    assert (len(more), kept) == (3, 8)


def test_a_run_that_is_not_finite_says_so_and_counts_as_the_cap() -> None:
    run = TINY.run("lorenz", "rfp", 0, 1e30, tuning=False)
    found = learn.train(run)
    assert found["status"] == "error"
    assert "the loss is not finite in the 2 steps to" in found["message"]
    made = recorded("rfp", 0, **found)
    assert learn.final(made) == 2 * TASKS["lorenz"].chance
    assert learn.blew_up(made)
    drawn = learn.curve(made)
    assert drawn.shape == (learn.WINDOWS,)
    assert drawn[-1] == drawn.max() == 2.0


def recorded(rule: str, seed: int, rate: float = 0.01, *, task: str = "lorenz", **found: object) -> Record:
    """A record of a run at the sizes of TINY."""
    run = TINY.run(task, rule, seed, rate, tuning=False)
    found = {"status": "ok", "payload": {"curve": [0.5] * learn.WINDOWS, "final": 0.5}, **found}
    common = {"device": "a processor", "versions": {}, "git": None, "run": "", "time": ""}
    return Record(benchmark="learn", algorithm=rule, params=run.params, **common, **found)  # type: ignore[arg-type]


def ending(loss: float) -> dict[str, object]:
    return {"curve": [loss] * learn.WINDOWS, "final": loss}


def test_the_rate_of_the_least_mean_loss_is_chosen() -> None:
    losses = {0.001: (0.6, 0.6), 0.01: (0.4, 0.5), 0.03: (0.1, 80.0)}
    tried = [
        recorded("rfp", s, rate, payload=ending(v)) for rate, two in losses.items() for s, v in enumerate(two)
    ]
    assert learn.chosen_rate(tried) == 0.01


def test_interval_is_students() -> None:
    mean, half = fit.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = √2.5, and 2.77645 is t's 97.5 % quantile for 4 degrees of freedom
    assert (mean, half) == (3.0, pytest.approx(2.7764451 * math.sqrt(2.5 / 5)))


def test_table_gives_intervals_and_differences_on_the_same_seeds() -> None:
    finals = {"rfp": (0.4, 0.6), "eprop": (0.3, 0.5), "uoro": (0.9, 70.0)}
    records = [
        recorded(rule, s, payload=ending(v)) for rule, two in finals.items() for s, v in enumerate(two)
    ]
    (table,) = learn.tables(records)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["rule"] == ["rfp", "eprop", "uoro", "chance", "best possible"]
    assert columns["final loss"] == [
        "0.5000 ± 1.2706",
        "0.4000 ± 1.2706",
        "1.4500 ± 6.9884",
        "1.0000",
        "0.0000",
    ]
    assert columns["less rfp's"][:2] == ["", "-0.1000 ± 0.0000"]
    assert columns["blown up"] == ["", "", "1", "", ""]


def test_every_rule_has_a_look_of_its_own() -> None:
    assert curves.LOOKS.keys() == RULES.keys()
    assert len({(look.colour, look.line) for look in curves.LOOKS.values()}) == len(RULES)


def test_plot_refuses_what_it_cannot_show_truthfully(tmp_path: Path) -> None:
    records = [recorded("rfp", seed) for seed in (0, 1)]
    png, svg = curves.draw(records, tmp_path / "a.jsonl")
    assert (png.name, svg.name) == ("a.png", "a.svg")
    other = dataclasses.replace(records[0], params={**records[0].params, "N": 8})
    with pytest.raises(ValueError, match="can't mix N, got 4, 8"):
        curves.draw([*records, other], tmp_path / "b")
    with pytest.raises(ValueError, match="no records of the benchmark 'learn'"):
        curves.draw([], tmp_path / "c")
