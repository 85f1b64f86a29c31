"""What kernels are meant to reach: predictions that add up, and measurements beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import DOCS
from typer.testing import CliRunner

from rjepa_triton.backend import triton_backend
from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.measure import timing
from rjepa_triton.bench.harness.record import Record
from rjepa_triton.bench.harness.tables import markdown
from rjepa_triton.bench.kernels import roofline, targets
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.layers.parallel import forward_problem


@pytest.fixture(scope="module")
def times() -> targets.Times:
    pytest.importorskip("triton")
    if roofline.static.cuobjdump() is None:
        pytest.skip("this triton comes without cuobjdump")
    return targets.times("h100")


def test_every_target_is_predicted_and_its_text_says_what_it_is(times: targets.Times) -> None:
    assert len({(t.what, t.at) for t in targets.TARGETS}) == len(targets.TARGETS)
    for target in targets.TARGETS:
        value = target.predicted(times)
        assert 0 < value < 1e3, target.what
        if target.unit == "%":
            assert value <= 1, target.what
        assert target.reached(target.bar)
        assert not target.reached(target.bar * (0.9 if target.least else 1.1))


def test_a_prediction_is_the_sum_that_it_says(times: targets.Times) -> None:
    """Of an online step at N = 2048: W read forward, Γ read and written, W read and written, and launches."""
    gamma, weights = 4 * 8 * 2048**2, 4 * 4 * 2048**2
    target = next(t for t in targets.TARGETS if t.what == "online step with SGD against its floor")
    floor = (2 * gamma + 3 * weights) / 3e12
    assert target.predicted(times) == pytest.approx((floor + 9 * 1.5e-6) / floor, rel=0.01)


def test_launches_of_a_step_are_those_that_are_counted() -> None:
    cell, weights = RGCCell(), [torch.empty(256, 256, device="meta")] * 4
    eager = forward_problem(cell, weights, (100, 32, 256), torch.float32, False)
    assert eager.step.calls == targets.EAGER_NODES
    assert triton_backend.step_calls(cell) == targets.KERNEL_NODES


def test_the_documented_table_is_what_is_predicted(times: targets.Times) -> None:
    assert markdown(targets.table("h100")) in (DOCS / "backends.md").read_text()


def measured(benchmark: str, algorithm: str, seconds: float, payload: dict[str, Any], **at: int) -> Record:
    shared = record.started(benchmark, "NVIDIA H100 80GB HBM3")
    params = {"device": "cuda", **at}
    made: dict[str, Any] = {"timing": timing([seconds] * 5), "payload": payload, "time": record.now()}
    return Record(status="ok", algorithm=algorithm, params=params, **shared, **made)


def test_what_was_measured_stands_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if roofline.static.cuobjdump() is None:
        pytest.skip("this triton comes without cuobjdump")
    at = {"N": 1024, "B": 8}
    for made in (
        measured("kernels", "step-fp32-gradient/triton", 2e-4, {"fraction": 0.91}, **at),
        measured("kernels", "step-fp32-gradient/torch", 8e-4, {"fraction": 0.2}, **at),
        measured("online", "step-graph-lr", 25e-6, {}, N=256, B=1),
    ):
        record.append(tmp_path / f"{made.benchmark}.jsonl", made)
    result = CliRunner().invoke(bench, ["targets", str(tmp_path), "--markdown"])
    assert result.exit_code == 0, result.output
    told = [line.split("|") for line in result.output.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): cells[-2].strip() for cells in told}
    assert rows["Γ's step: part of the copy rate"] == "91%"
    assert rows["Γ's step against eager torch"] == "4.00×"
    assert rows["Γ's step against torch.compile"] == ""
    assert rows["online step with SGD"] == "25 µs"


def test_an_unknown_gpu_is_named() -> None:
    result = CliRunner().invoke(bench, ["targets", "--gpu", "tpu"])
    assert result.exit_code == 2
    assert "gpu must be one of" in result.output
