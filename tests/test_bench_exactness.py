"""RFP against BPTT: equal for diagonal recurrence, not for dense."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rjepa_triton.bench import exactness, record
from rjepa_triton.bench.cli import bench


def test_diagonal_is_exact_and_dense_is_not() -> None:
    diagonal = exactness.measure("diagonal", 0.3, units=12, steps=20, seeds=2)
    dense = exactness.measure("dense", 0.3, units=12, steps=20, seeds=2)
    for name in exactness.MATRICES:
        # rounding of 20 steps in float64
        assert diagonal[name]["relative"] < 1e-13
        assert diagonal[name]["cosine"] == pytest.approx(1, abs=1e-13)
        assert dense[name]["relative"] > 1e-2
    # the loss is on s: what reaches it through m is what RFP drops
    assert dense["ss"]["cosine"] > 0.8 > dense["mm"]["cosine"]


def test_command_writes_records_and_a_markdown_table(tmp_path: Path) -> None:
    arguments = ["exactness", "--hidden", "6", "--steps", "5", "--seeds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench, [*arguments, "--markdown"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("| recurrent weights | W_ss | W_ms | W_mm | W_sm |\n| --- |")
    assert "| dense, 0.5/√N |" in result.output
    records = record.load(tmp_path / "exactness.jsonl")
    assert len(records) == len(exactness.RECURRENCE) * len(exactness.SCALES)
    assert set(records[0].payload) == set(exactness.MATRICES)
    assert "RFP against BPTT" in CliRunner().invoke(bench, arguments).output


def test_user_errors_exit_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["exactness", "--seeds", "0", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "seeds must be at least 1, got 0" in result.output
