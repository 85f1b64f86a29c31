"""The benchmark of the forward pass: what is timed agrees, what is predicted is what is counted, and the command."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.tables import place
from rjepa_triton.bench.scaling import forward
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.layers import parallel
from rjepa_triton.planning import cost

SMALL = forward.Settings(hidden=(6,), batches=(1,), steps=(20,), case_seconds=0.001)


def test_command_writes_records_and_markdown_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PREDICTED_AT", (8, 1, 64))
    arguments = [
        "forward",
        "--hidden",
        "6",
        "--batch",
        "1,2",
        "--steps",
        "20",
        "--sample",
        "0.001",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(bench, [*arguments, "--out", str(tmp_path), "--markdown"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("| cell | N | B | T | sequential | parallel | rounds |")
    assert "| rounds, dual; eager | all |" in result.output
    records = record.load(tmp_path / forward.FILE)
    assert len(records) == 2 * 2 * 3 + 1
    for made in records[:-1]:
        assert (made.benchmark, made.status) == ("forward", "ok"), made.message
        assert made.timing is not None
        assert made.payload["error"] < forward.TOLERANCE
    assert place(records[0]) == "sequential cell=rgc N=6 B=1 T=20"
    told = forward.predicted_markdown(records[-1])
    assert told in result.output
    assert [line.split(" | ")[1] for line in told.splitlines()[2:5]] == ["forward", "backward", "all"]
    rounds = {r.params["cell"]: r.payload["rounds"] for r in records if r.algorithm == "parallel"}
    assert rounds["lru"] == 2
    assert 5 <= rounds["rgc"] <= 12
    shown = CliRunner().invoke(bench, [*arguments, "--out", str(tmp_path)]).output
    assert "forward pass, seconds a call" in shown
    assert "predicted for a GPU" in shown
    assert "nothing measured" in " ".join(shown.split())


def test_a_call_over_budget_is_not_timed_and_divergence_is_an_error(tmp_path: Path) -> None:
    slow = forward.run(tmp_path / "a.jsonl", replace(SMALL, cells=("rgc",), steps=(20, 10), budget=1e-9))
    assert {r.status for r in slow} == {"over_budget"}
    assert [r.params["T"] for r in slow] == [10] * 3 + [20] * 3
    assert "for one call, budget 1e-09 s" in slow[0].message
    assert slow[-1].message == "over 1e-09 s at fewer steps"
    assert "| over 1e-09 s at fewer steps |" in forward.markdown(slow)
    wild = forward.run(tmp_path / "b.jsonl", replace(SMALL, cells=("rgc",), scale=40.0))
    by = {r.algorithm: r for r in wild}
    assert (by["parallel"].status, by["sequential"].status) == ("error", "ok")
    assert "did not converge" in by["parallel"].message
    assert forward.markdown(wild).count("error") == 1


def test_building_a_cells_code_is_in_no_calls_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_build, run = [1.0], parallel.forward

    def built(*given: Any, **how: Any) -> Any:
        if to_build:
            time.sleep(to_build.pop())
        return run(*given, **how)

    monkeypatch.setattr(parallel, "forward", built)
    made = forward.run(tmp_path / "a.jsonl", replace(SMALL, cells=("rgc",), budget=0.9))
    assert not to_build
    assert {r.status for r in made} == {"ok"}


def test_a_prediction_is_of_what_is_counted() -> None:
    units, batch, steps = 8, 2, 64
    ways, rounds = forward.predict(units, batch, steps, 0.1, 0)
    loop, dual, launch, eager = ways
    (forward_, _), (bptt, seconds) = loop.parts["forward"], loop.parts["backward"]
    assert forward_.calls == 2 * steps  # the products, and a launch
    assert forward_.flop == steps * 8 * batch * units**2
    assert bptt.flop == 2 * forward_.flop
    assert bptt.calls > 6 * steps
    assert seconds == pytest.approx(bptt.seconds(forward.GRAPH))
    assert dual.parts["forward"] == loop.parts["forward"]
    assert dual.parts["backward"][0].scan_steps == cost.kernel_steps(steps)
    assert dual.parts["backward"][0].calls < 40
    assert eager.parts["backward"][0] == launch.parts["backward"][0] == dual.parts["backward"][0]
    on_chip = launch.parts["forward"][0]
    assert (on_chip.calls, on_chip.flop) == (1, forward_.flop)
    assert on_chip.scan_steps == cost.ON_CHIP_STEP * steps
    in_rounds = eager.parts["forward"][0]
    about = parallel.forward_problem(
        RGCCell(), [torch.empty(units, units)] * 4, (steps, batch, units), torch.float32, True
    )
    assert in_rounds.calls == about.one_round().calls * rounds
    assert in_rounds.flop == forward_.flop * rounds
    assert eager.work.calls == in_rounds.calls + dual.parts["backward"][0].calls
    assert eager.seconds == pytest.approx(sum(spent for _, spent in eager.parts.values()))


def test_what_is_counted_grows_as_it_is_continued() -> None:
    """The predicted calls and bytes of BPTT hold at a length that was not counted."""
    cell, x, weights, state = forward.problem(RGCCell(), 4, 1, 40, 0.1, 0, torch.empty(0))
    trajectory = cell.scan(x, weights, state)
    delta = torch.ones_like(trajectory.after)
    counted = cost.counted(
        lambda: forward.functional.gradients(cell, trajectory, weights, delta, "bptt", backend="torch")
    )
    told = forward.predict(4, 1, 40, 0.1, 0)[0][0].parts["backward"][0]
    assert told.calls == counted.calls
    assert told.bytes == pytest.approx(counted.bytes + 40 * 4 * 16 * 4)
