"""Comparing two files of records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import compare, record
from rjepa_triton.bench.harness.record import Record, Timing


def made(n: int, median: float, spread: float = 0.01, torch: str = "2.11.0") -> Record:
    return Record(
        benchmark="scaling",
        algorithm="rfp-step",
        params={"N": n, "B": 1},
        status="ok",
        device="a processor",
        versions={"torch": torch},
        git=None,
        run="",
        time="",
        timing=Timing(median, median * (1 - spread), median * (1 + spread), 20),
    )


BEFORE = [made(n, 1e-6 * n**2) for n in (32, 64, 128)]


def slowed(factor: float, spread: float = 0.01) -> list[Record]:
    """Records in which N = 64 is slower by `factor`, made with another version of torch."""
    return [made(n, 1e-6 * n**2 * (factor if n == 64 else 1), spread, "2.14.1") for n in (32, 64, 128)]


def verdicts(after: list[Record], floor: float = 0.05) -> list[str]:
    return [change.verdict for change in compare.compare(BEFORE, after, floor).changes]


def test_identical_records_show_no_change() -> None:
    assert verdicts(BEFORE) == ["same"] * 3


def test_a_slowdown_of_10_percent_is_found() -> None:
    assert verdicts(slowed(1.10)) == ["same", "slower", "same"]
    assert verdicts(slowed(1 / 1.10)) == ["same", "faster", "same"]


def test_neither_below_the_floor_nor_within_the_spread() -> None:
    assert verdicts(slowed(1.04, 0.001)) == ["same"] * 3
    assert verdicts(slowed(1.10, 0.10)) == ["same"] * 3
    assert verdicts(slowed(1.10), floor=0.2) == ["same"] * 3


def test_what_is_in_one_file_only_is_listed() -> None:
    failed = dataclasses.replace(BEFORE[0], status="oom", timing=None)
    found = compare.compare(BEFORE, [failed, *BEFORE[1:], made(256, 1.0)])
    assert [r.params["N"] for r in found.only_a] == [32]
    assert [r.params["N"] for r in found.only_b] == [256]


def test_command(tmp_path: Path) -> None:
    for name, records in (("a", BEFORE), ("b", [*slowed(1.10), made(256, 1.0)])):
        for r in records:
            record.append(tmp_path / name, r)
    result = CliRunner().invoke(bench, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "3 matched: 1 slower, 0 faster, 2 the same within noise" in result.output
    assert "b: rfp-step N=256 B=1" in result.output.replace("\n", "")


@pytest.mark.parametrize("arguments", [["a", "missing"], ["a", "a", "--floor", "-1"]])
def test_user_errors_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    record.append(tmp_path / "a", BEFORE[0])
    paths = [str(tmp_path / a) if a.isalpha() else a for a in arguments]
    result = CliRunner().invoke(bench, ["compare", *paths])
    assert result.exit_code == 2
    assert "error:" in result.output
