"""Counters of joules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rjepa_triton.bench.harness import energy

CPU = torch.device("cpu")


def zone(folder: Path, name: str, microjoules: int) -> Path:
    made = folder / name
    made.mkdir(parents=True)
    (made / "energy_uj").write_text(f"{microjoules}\n")
    (made / "max_energy_range_uj").write_text("1000000000\n")
    return made


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", 3_000_000)
    zone(tmp_path, "intel-rapl:0:0", 500_000)
    zone(tmp_path, "intel-rapl:1", 2_000_000)
    meter = energy.meter(CPU, tmp_path)
    assert meter.source == "RAPL, 2 processor packages"
    before = meter.read()
    assert before == pytest.approx(5.0)
    (first / "energy_uj").write_text("4500000")
    assert meter.between(before, meter.read()) == pytest.approx(1.5)


def test_a_counter_that_started_again(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", 999_000_000)
    meter = energy.meter(CPU, tmp_path)
    before = meter.read()
    (first / "energy_uj").write_text("1000000")
    assert meter.between(before, meter.read()) == pytest.approx(2.0)


def test_without_a_counter_the_reason_is_given(tmp_path: Path) -> None:
    meter = energy.meter(CPU, tmp_path)
    assert meter.source == f"none: no RAPL counter in {tmp_path}"
    assert meter.read() is None
    assert meter.between(None, None) is None
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text("not a number")
    assert energy.meter(CPU, tmp_path).source.startswith("none: RAPL can't be read")
