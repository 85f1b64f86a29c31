"""The benchmark against itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.statistics import Slope
from rjepa_triton.bench.scaling import selfcheck
from rjepa_triton.bench.scaling import timing as scaling


def test_two_runs_through_the_command(tmp_path: Path) -> None:
    options = [
        "--runs",
        "2",
        "--hidden",
        "8,16",
        "--algorithms",
        "rfp-dual,bptt",
        "--sample",
        "0.01",
        "--passes",
        "1",
    ]
    result = CliRunner().invoke(bench, ["selfcheck", *options, "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    made = record.load(tmp_path / selfcheck.FILE)
    assert [(r.algorithm, r.payload["matched"]) for r in made] == [("rfp-dual", 2), ("bptt", 2)]
    assert made[0].params["points"] == [[8, 1], [16, 1]]
    assert made[0].payload["largest_ratio"] >= 1
    assert made[0].payload["noise"] > 1
    runs = sorted((tmp_path / selfcheck.FOLDER).glob("*.jsonl"))
    assert [len(record.load(file)) for file in runs] == [4, 4]
    # whole runs are kept
    again = CliRunner().invoke(bench, ["selfcheck", *options, "--device", "cpu", "--out", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert [len(record.load(file)) for file in runs] == [4, 4]
    assert "2 runs of one sweep" in again.output


def test_what_lies_within_the_interval_of_the_run_before() -> None:
    slopes = [Slope(2.0, 0.1, 4, 128), Slope(2.05, 0.01, 4, 128), Slope(2.0, 0.1, 4, 128), None]
    found = selfcheck.Found(slopes, [], [])
    assert (found.within, found.pairs_of_slopes) == (1, 2)


def test_one_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs must be at least 2, got 1"):
        selfcheck.run(scaling.Settings(points=((8, 1),)), 1, tmp_path)
