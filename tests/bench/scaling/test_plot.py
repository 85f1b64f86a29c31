"""The plot is written, and refuses what it can't show truthfully."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.bench.scaling import plot
from rjepa_triton.bench.scaling.cases import CASES

SIZES = (64, 128, 256, 512)


def made(algorithm: str, n: int) -> Record:
    power = 4 if algorithm == "rtrl" else 2
    fits = n < 512 or algorithm != "rtrl"
    median = 1e-9 * n**power
    return Record(
        benchmark="scaling",
        algorithm=algorithm,
        params={"N": n, "B": 1, "T": 50, "dtype": "float32", "device": "cpu", "threads": 2},
        status="ok" if fits else "oom",
        device="a processor",
        versions={"torch": "2.14.1"},
        git=None,
        run="",
        time="",
        timing=Timing(median, median, median, 9) if fits else None,
        state_bytes=32 * n ** (power - 1),
        peak_bytes=40 * n ** (power - 1) if fits else None,
        predicted_peak_bytes=40 * n ** (power - 1),
        predicted_seconds=median,
    )


RECORDS = [made(name, n) for name in CASES for n in SIZES]


def test_every_case_has_a_look() -> None:
    assert plot.LOOKS.keys() == CASES.keys()
    assert len({look.colour for look in plot.LOOKS.values()}) == len(CASES)


def test_plot_is_written_as_png_and_svg(tmp_path: Path) -> None:
    png, svg = plot.draw(RECORDS, tmp_path / "a.png")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert png.name == "a.png"
    text = svg.read_text()
    assert "<svg" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another"}, "can't mix devices, got a processor, another"),
        ({"params": {**RECORDS[0].params, "T": 9}}, "can't mix lengths T, got 9, 50"),
        ({"params": {**RECORDS[0].params, "dtype": "float64"}}, "can't mix dtypes"),
        ({"params": {**RECORDS[0].params, "B": 8}}, "can't mix batch sizes B, got 1, 8"),
    ],
)
def test_mixed_records_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    mixed = [*RECORDS, dataclasses.replace(RECORDS[0], **change)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        plot.draw(mixed, tmp_path / "a")


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "scaling.jsonl"
    for r in RECORDS[:3]:
        record.append(file, r)
    runner = CliRunner()
    assert runner.invoke(bench, ["plot", str(file)]).exit_code == 0
    assert (tmp_path / "scaling.svg").exists()
    result = runner.invoke(bench, ["plot", str(file), "--batch", "3"])
    assert result.exit_code == 2
    assert "--batch must be one of 1, got 3" in result.output
    assert runner.invoke(bench, ["plot", str(tmp_path / "none.jsonl")]).exit_code == 2
    (tmp_path / "empty.jsonl").touch()
    result = runner.invoke(bench, ["plot", str(tmp_path / "empty.jsonl")])
    assert result.exit_code == 2
    assert "no records" in result.output
