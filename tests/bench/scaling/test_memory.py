"""Peak memory against T, N and B."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import measure, record
from rjepa_triton.bench.scaling import cases, memory, memory_plot
from rjepa_triton.bench.scaling.cases import CASES, Case, Size

CPU = torch.device("cpu")
SIZES = ["--steps", "8,16,32", "--hidden", "8,16", "--batch", "4", "--base", "16,4,16", "--chunk", "4"]
SMALL = [*SIZES, "--algorithms", "bptt-autograd,rfp-step,rfp-history", "--budget", "100"]


def problem(steps: int) -> cases.Problem:
    size = Size(16, 4, steps, 4)
    return cases.problem(size, kind="noise", scale=0.1, seed=0, backend="torch", like=torch.empty(0))


@pytest.mark.parametrize("name", ["rfp-step", "rfp-chunk", "tbptt", "rtrl", "rtrl-heads"])
def test_what_is_carried_forward_does_not_grow_after_the_first_steps(name: str) -> None:
    case: type[Case] = CASES[name]
    case(problem(8)).run()
    short, long = (
        measure.peak_bytes(lambda: memory.run_steps(case, problem(steps), steps), CPU)  # noqa: B023
        - problem(steps).x.nbytes * 5  # x, δ, and δ of both states, which are the problem's
        for steps in (memory.STREAMED, 4 * memory.STREAMED)
    )
    assert long <= short + 4096


@pytest.mark.parametrize("name", ["bptt", "bptt-autograd", "rfp-dual"])
def test_a_history_grows_with_its_length(name: str) -> None:
    case: type[Case] = CASES[name]
    short, long = (
        measure.peak_bytes(lambda: memory.run_steps(case, problem(steps), steps), CPU)  # noqa: B023
        for steps in (64, 256)
    )
    assert long > 3 * short


def test_command(tmp_path: Path) -> None:
    arguments = ["memory", *SMALL, "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    made = record.load(tmp_path / memory.FILE)
    points = {(r.params["N"], r.params["B"], r.params["T"]) for r in made}
    assert points == {(16, 4, 8), (16, 4, 16), (16, 4, 32), (8, 4, 16)}
    assert len(made) == len(points) * 3
    assert {r.status for r in made} == {"ok"}
    assert (tmp_path / "memory.png").exists()
    assert memory.base_of(made) == {"N": 16, "B": 4, "T": 16}
    again = CliRunner().invoke(bench, [*arguments, "--markdown"])
    assert f"kept {len(made)} records" in again.output
    assert "**peak bytes (predicted) against T, N = 16, B = 4**" in again.output


def made(algorithm: str, steps: int, peak: int | None, predicted: int) -> record.Record:
    params = {"N": 16, "B": 4, "T": steps, "C": 4, "backend": "auto", "threads": 1, "device": "cpu"}
    return record.Record(
        "memory",
        algorithm,
        params,
        "ok",
        "a machine",
        {},
        None,
        "",
        "",
        peak_bytes=peak,
        predicted_peak_bytes=predicted,
    )


def test_where_one_passes_the_other() -> None:
    records = [made("bptt-autograd", t, 1000 * t, 2000 * t) for t in (8, 16, 32, 64)]
    records += [made("rfp-step", t, 20_000, 20_000) for t in (8, 16, 32, 64)]
    ((a, b, measured, predicted),) = memory.passes(records, "T")
    assert (a, b) == ("bptt-autograd", "rfp-step")
    assert measured == pytest.approx(20)
    assert predicted == pytest.approx(10)


def test_what_does_not_fit_is_predicted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1000)
    settings = memory.Settings({"T": (8,)}, {"N": 16, "B": 4, "T": 8})
    found = memory.measure_case(CASES["rfp-step"], problem(8), Size(16, 4, 8, 4), settings, 1e9)
    assert found["status"] == "oom"
    assert found["predicted_peak_bytes"] > 1000
    assert "peak_bytes" not in found
    monkeypatch.undo()
    found = memory.measure_case(CASES["rtrl"], problem(8), Size(16, 4, 8, 4), settings, 1e-3)
    assert found["status"] == "over_budget"


def test_devices_are_not_mixed_in_one_plot(tmp_path: Path) -> None:
    two = [made("rfp-step", t, 1, 1) for t in (8, 16)]
    two.append(record.Record(**{**vars(two[0]), "device": "another"}))
    with pytest.raises(ValueError, match="can't mix devices, got a machine, another"):
        memory_plot.draw(two, tmp_path / "x")
    with pytest.raises(ValueError, match="no sweep of the benchmark 'memory' has two points"):
        memory_plot.draw(two[:1], tmp_path / "x")
