"""The fidelity benchmark: methods, intervals, tables and plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.learning import fidelity, frontier
from rjepa_triton.bench.learning.fidelity import Point, Settings, Sweep
from rjepa_triton.bench.scaling import cases
from rjepa_triton.online import fidelity as comparison

TINY = {
    "frontier": Sweep([Point("rgc", 32, 10, 2, 0.2)], tuple(fidelity.METHODS), 2, timed=True),
    "carry": Sweep([Point(cell, 6, 12, 2, 0.2) for cell in fidelity.CELLS], fidelity.CARRY, 3),
    "matrices": Sweep([Point("rgc", 6, 8, 1, 0.3, "noise")], ("diagonal", "rfp", "refine-1"), 2),
    "sizes": Sweep([Point("rgc", n, 9) for n in (4, 6)], ("rfp", "refine-2"), 2),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[record.Record]:
    path = tmp_path_factory.mktemp("fidelity") / fidelity.FILE
    made = fidelity.run(Settings(tuple(TINY), plan=TINY, case_seconds=0.01), path)
    assert record.load(path) == made
    return made


def test_exact_methods_are_exact_and_others_are_not(records: list[record.Record]) -> None:
    frontier = [r for r in records if r.params["sweep"] == "frontier"]
    assert len(frontier) == len(fidelity.METHODS)
    exact = {name for name, method in fidelity.METHODS.items() if method.kind in ("exact", "other network")}
    for made in frontier:
        assert made.status == "ok"
        assert made.timing is not None
        assert made.timing.median > 0
        error = made.payload["error"]
        if made.algorithm in exact | {"refine-exact"}:
            assert error < 1e-7, made.algorithm
        elif made.algorithm not in (
            "tbptt-10",
            "tbptt-20",
            "carry-10",
            "carry-20",
        ):  # T = 10: these see it whole
            assert error > 1e-7, (made.algorithm, error)


def test_tables_hold_every_method_and_the_carry_table_pairs_seeds(records: list[record.Record]) -> None:
    tables = fidelity.all_rows(records)
    assert len(tables) == 5
    labels = [row[0] for row in tables[0][2]]
    assert labels == [method.label for method in fidelity.METHODS.values()]
    carry = next(table for table in tables if "seeds where higher" in table[1])
    assert [row[:2] for row in carry[2]] == [["0.2/√N", c] for c in ("1", "5", "10", "20")]
    assert carry[2][0][-1] == "3 of 3"
    assert carry[2][3][4].startswith("+0.0000")  # both see the whole sequence
    assert fidelity.markdown(carry).startswith("| W | C | TBPTT | carry |")


def test_an_interval_holds_the_mean_of_its_distribution() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        mean, low, high = fidelity.interval(generator.normal(3, 1, 10).tolist())
        assert low <= mean <= high
        held += low <= 3 <= high
    assert 0.85 < held / 200 <= 0.99  # bootstrap intervals of ten samples are a little short


def test_heads_are_about_the_root_of_the_units() -> None:
    assert [cases.head_size(n) for n in (64, 100, 256, 24, 12)] == [8, 10, 16, 4, 3]
    layer = fidelity.layer_of(Point(units=64), "heads", 0, torch.float64)
    assert layer.weight_ss.shape == (8, 8, 8)


def test_layers_and_data_are_the_same_for_the_same_seed() -> None:
    point = Point("lstm", 5, 4, 2)
    for a, b in zip(
        fidelity.layer_of(point, "dense", 3, torch.float64).parameters(),
        fidelity.layer_of(point, "dense", 3, torch.float64).parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)
    x, delta = fidelity.data_of(point, 3, torch.float64)
    again, other = fidelity.data_of(point, 3, torch.float64)[0], fidelity.data_of(point, 4, torch.float64)[0]
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == delta.shape == (4, 2, 5)


def test_state_bytes_grow_with_what_is_kept() -> None:
    point = Point(units=16, steps=20)
    x, _ = fidelity.data_of(point, 0, torch.float32)

    def size(name: str) -> int:
        method = fidelity.METHODS[name]
        return fidelity.state_bytes(fidelity.layer_of(point, method.shape, 0, torch.float32), method, x)

    gamma = 8 * 16 * 16 * 4
    assert size("rfp") >= gamma
    assert 2 * 16 * gamma < size("rtrl") < 2.1 * 16 * gamma
    assert size("tbptt-20") > size("tbptt-5") > size("tbptt-1")
    assert size("heads") < size("rtrl") / 3


def test_divergence_is_counted() -> None:
    point = Point("rgc", 40, 30, 1, 1.5, "noise")
    found = fidelity.compared(point, ("rfp", "refine-2"), 2)
    assert found["rfp"].diverged == 0
    assert found["refine-2"].diverged == 2
    assert found["refine-2"].results[0].total_error < 1e-10


def test_plot(records: list[record.Record], tmp_path: Path) -> None:
    for file in frontier.draw(records, tmp_path / "frontier.png", scale=0.2):
        assert file.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"no timed records of the frontier at scale 0\.9"):
        frontier.draw(records, tmp_path / "frontier.png", scale=0.9)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fidelity.SWEEPS, "matrices", TINY["matrices"])
    arguments = ["fidelity", "--sweeps", "matrices", "--seeds", "2", "--out", str(tmp_path)]
    shown = CliRunner().invoke(bench, [*arguments, "--markdown"])
    assert shown.exit_code == 0, shown.output
    assert "| RFP, diagonal | c = 0.3 | 1.000 (" in shown.output
    assert len(record.load(tmp_path / fidelity.FILE)) == 3
    assert "RGC, N = 6" in CliRunner().invoke(bench, arguments).output


def test_comparison_is_what_the_benchmark_uses() -> None:
    """The same layer and data by the public function."""
    point = Point("rgc", 6, 8, 1, 0.3, "noise")
    layer = fidelity.layer_of(point, "dense", 0, torch.float64)
    x, delta = fidelity.data_of(point, 0, torch.float64)
    found = fidelity.compared(point, ("rfp",), 1)["rfp"].results[0]
    assert comparison.fidelity(layer, x, delta, learning="rfp").total_cosine == pytest.approx(
        found.total_cosine
    )
