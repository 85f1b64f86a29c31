"""Steps in a history of records: found where they are, and not where there are none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import history, record
from rjepa_triton.bench.harness.record import Record, Timing


def made(run: int, median: float, slow: float = 1.0, **changes: object) -> Record:
    timing = Timing(
        median=median * slow,
        p20=median * slow,
        p80=median * slow,
        repeats=1,
        samples=[[median * slow]],
        yardsticks={"copy": [0.01 * slow], "calls": [0.002 * slow]},
    )
    plain = Record(
        benchmark="scaling",
        algorithm="rfp-step",
        params={"N": 64, "B": 1, "T": 4, "device": "cpu"},
        status="ok",
        device="a processor",
        versions=record.versions(),
        git=f"{run:040x}",
        run=f"2026-11-{1 + run:02}T00:00:00.000+00:00",
        time=record.now(),
        timing=timing,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def noisy(levels: list[float], seed: int, spread: float = 0.05) -> list[float]:
    return list(np.array(levels) * np.exp(np.random.default_rng(seed).normal(0, spread, len(levels))))


def test_a_step_is_found_where_it_is_whatever_the_machine_does() -> None:
    random = np.random.default_rng(1)
    records = [
        made(run, value, slow=float(random.uniform(0.5, 2)))
        for run, value in enumerate(noisy([1e-3] * 12 + [1.3e-3] * 12, 0))
    ]
    (found,) = history.histories(records[::-1])  # in any order
    (step,) = found.steps
    assert (step.before.git, step.after.git) == (records[11].git, records[12].git)
    value, low, high = step.ratio
    assert low < 1.3 < high
    assert 1.2 < value < 1.4
    assert step.chance < history.LEVEL
    told = history.table([found])
    assert told.title == "1 step in 1 histories"


def test_two_steps_and_a_spell() -> None:
    levels = [1e-3] * 12 + [2e-3] * 12 + [1e-3] * 12
    cuts = history.steps_in(np.log(noisy(levels, 3)))
    assert [at for at, _ in cuts] == [12, 24]
    levels[5] = 5e-3  # one slow run is no step
    assert [at for at, _ in history.steps_in(np.log(noisy(levels, 3)))] == [12, 24]


def test_noise_has_no_steps() -> None:
    """At most a few of a hundred histories: each has a chance of 1 %."""
    series = np.random.default_rng(0).standard_normal((100, 20))
    assert sum(bool(history.steps_in(row)) for row in series) <= 4
    assert not history.steps_in(np.zeros(20))


def test_small_changes_few_runs_and_other_cases_are_left_out() -> None:
    small = [made(run, value) for run, value in enumerate(noisy([1e-3] * 12 + [1.02e-3] * 12, 0, 1e-3))]
    assert not history.histories(small)[0].steps
    assert history.histories(small, floor=0.0)[0].steps
    assert not history.histories(small[: history.FEWEST - 1])
    other = [dataclasses.replace(r, algorithm="bptt") for r in small]
    failed = [made(run, 1.0, timing=None, status="error") for run in range(30)]
    assert [len(one.records) for one in history.histories([*small, *other, *failed])] == [24, 24]
    with pytest.raises(ValueError, match="floor must be at least 0, got -1"):
        history.histories(small, floor=-1)


def test_the_command(tmp_path: Path) -> None:
    for run, value in enumerate(noisy([1e-3] * 8 + [2e-3] * 8, 0)):
        record.append(tmp_path / f"{run}.jsonl", made(run, value))
    (tmp_path / "other.json").write_text(json.dumps({}))
    shown = CliRunner().invoke(bench, ["history", str(tmp_path), "--markdown"])
    assert shown.exit_code == 0, shown.output
    assert "rfp-step N=64 B=1" in shown.output
    assert "2026-11-09T00:00" in shown.output
    few = CliRunner().invoke(bench, ["history", str(tmp_path / "0.jsonl")])
    assert few.exit_code == 2
    assert "must have at least 10 runs of a case, got fewer of each" in few.output
