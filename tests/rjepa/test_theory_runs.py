"""`rjepa theory`: its records, tables, plot and command; and the committed record reaches what it must."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from checkout import RESULTS

from rjepa_triton import cli
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.tables import markdown
from rjepa_triton.rjepa import theory, theory_plot, theory_runs

RECORDS = RESULTS / "theory.jsonl"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same studies, fewer settings, stopped early."""
    monkeypatch.setattr(theory_runs, "UNTIL", dict.fromkeys(theory_runs.UNTIL, 10))
    monkeypatch.setattr(theory_runs, "RATE_AT", {"balance": 10, "first-order": 10})
    monkeypatch.setattr(theory_runs, "TAUS", (0.2, 0.1))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", "theory", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.usefixtures("short")
def test_the_command_writes_records_tables_and_plots(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "--seeds", "2", "--samples", "1000", "--out", str(out), "--markdown") == 0
    printed = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"theory.jsonl", "theory.png", "theory.svg"}
    records = record.load(out / "theory.jsonl")
    assert len(records) == len(record.latest(records)) == 14 + 8 + 8 + 8 + 8 + 2
    assert all(markdown(table) in printed for table in theory_runs.tables(records))


def test_bad_options_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for option, value in (("--seeds", "1"), ("--samples", "10")):
        assert run(monkeypatch, option, value, "--out", str(tmp_path)) == 2
        assert f"{option} must be at least" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_records_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    other = record.load(RECORDS.with_name("forward-cpu.jsonl"))
    with pytest.raises(ValueError, match="no records of 'balance'"):
        theory_runs.tables(other)
    with pytest.raises(ValueError, match="no records of 'balance'"):
        theory_plot.draw(other, tmp_path / "theory")


def test_the_committed_record_reaches_its_bars() -> None:
    records = record.load(RECORDS)
    for r in theory_runs.select(records, "balance"):
        assert min(r.payload["cosine_end"]) >= 0.999
        assert r.payload["rate"] == pytest.approx([1.0] * r.params["seeds"], abs=1e-4)
    for r in theory_runs.select(records, "values"):
        roots = theory.surviving(theory_runs.CORRELATION, r.params["eta"])
        living = theory_runs.alive(r)
        assert bool(living) is (roots is not None)
        assert all(abs(value - roots[0]) < 1e-3 for value in living if roots)
    for r in theory_runs.select(records, "stop-gradient"):
        assert (r.payload["trace"][-1] > 1) is r.params["stop_gradient"]
        assert math.isfinite(r.payload["trace"][-1])
    for r in theory_runs.select(records, "moments"):
        found = r.payload
        for exact, sampled, half in zip(found["exact"], found["sampled"], found["interval"], strict=True):
            assert abs(exact - sampled) < half
        assert all(abs(found["paper"][n] - found["sampled"][n]) > 5 * found["interval"][n] for n in (1, 2))
