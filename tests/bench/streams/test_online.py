"""Latency of online steps, one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.streams import latency, online

OPTIONS = ["--hidden", "8", "--batch", "2", "--steps", "200", "--chunk", "4", "--device", "cpu"]


def settings(**changes: object) -> online.Settings:
    return online.Settings(**{"points": ((8, 2),), "forms": ("step",), "steps": 200, "chunk": 4, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [form for form in online.FORMS if "graph" not in form])
def test_every_form_has_the_oracles_gradient(form: str) -> None:
    online.verify(form, 8, 2, settings())


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(online.FORMS, "step", {"form": "step", "learning": "snap0"})
    found = online.measure_form("step", 8, 2, settings())
    assert found["status"] == "error"
    assert "step's gradient of W_ss differs from float64" in found["message"]


def test_a_wrong_gradient_of_a_stream_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(online.FORMS, "stream", {"optimizer": "sgd", "learning": "snap0"})
    assert "stream's gradient of W_ss differs" in online.measure_form("stream", 8, 2, settings())["message"]


@pytest.mark.parametrize("form", online.STREAMS)
def test_a_streams_time_is_a_calls_over_its_steps(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def latencies(call: Callable[[], object], calls: int, device: torch.device) -> np.ndarray:
        asked.append(calls)
        call()
        return np.full(calls, 0.5)

    monkeypatch.setattr(online, "latencies", latencies)
    found = online.measure_form(form, 8, 2, settings(steps=1500))
    assert found["status"] == "ok"
    assert asked == [1, 7]
    assert found["timing"].median == pytest.approx(0.5 / online.STREAM_STEPS)
    assert found["payload"]["mean"] == pytest.approx(0.5 / online.STREAM_STEPS)


def test_a_population_s_networks_are_all_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    three = settings(population=3)
    calls = online.Calls("stream-P", 8, 2, three)
    assert len(calls.networks) == 3
    one = online.Calls("stream", 8, 2, three)
    assert calls.state_bytes == 3 * one.state_bytes
    assert three.params("stream-P", 8, 2)["P"] == 3
    assert "P" not in three.params("stream", 8, 2)
    monkeypatch.setattr(online.measure, "seconds", lambda step, count, device: 1.0)
    found = online.measure_form("stream-P", 8, 2, three)
    assert found["payload"]["steps_per_second"] == pytest.approx(3 * 2 * 200)
    gradients = online.Calls.gradients

    def with_a_wrong_one(calls: online.Calls) -> list[list[torch.Tensor]]:
        *rest, last = gradients(calls)
        return [*rest, [2 * part for part in last]]

    monkeypatch.setattr(online.Calls, "gradients", with_a_wrong_one)
    assert "stream-P's gradient of W_ss differs" in online.measure_form("stream-P", 8, 2, three)["message"]


def test_each_step_is_timed_by_itself() -> None:
    lengths = iter([1e-3, 1e-3, 8e-3, 1e-3])
    taken = online.latencies(lambda: time.sleep(next(lengths)), 4, torch.device("cpu"))
    assert taken.shape == (4,)
    assert taken.argmax() == 2
    assert taken.max() >= 8e-3


def test_the_weights_change_at_a_chunks_end() -> None:
    stream = online.Stream("chunk", 8, 2, settings(), rate=0.1)
    before = [w.detach().clone() for w in stream.layer.recurrent_weights()]
    for _ in range(3):
        stream.step()
    assert all(torch.equal(a, b) for a, b in zip(before, stream.layer.recurrent_weights(), strict=True))
    stream.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, stream.layer.recurrent_weights(), strict=True))


def test_command(tmp_path: Path) -> None:
    arguments = ["online", *OPTIONS, "--forms", "step,chunk,stream", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    made = record.load(tmp_path / online.FILE)
    assert [(r.algorithm, r.params["C"], r.status) for r in made] == [
        ("step", 1, "ok"),
        ("chunk", 4, "ok"),
        ("stream", 1, "ok"),
    ]
    for r in made:
        values = [value for _, value in r.payload["quantiles"]]
        assert values == sorted(values)
        assert r.timing is not None
        assert online.quantile(r, 0.5) == pytest.approx(r.timing.median)
        assert r.payload["steps_per_second"] > 0
    # Γ, the layer's state, and the chunk's window
    assert made[0].state_bytes == 32 * 2 * 8**2 + 8 * 2 * 8
    assert (tmp_path / "online.png").exists()
    again = CliRunner().invoke(bench, [*arguments, "--markdown"])
    assert "kept 3 records" in again.output
    assert "| 8 | 2 | chunk | 4 |" in again.output
    assert len(record.load(tmp_path / online.FILE)) == 3


def test_what_takes_too_long_is_recorded_and_not_run() -> None:
    found = online.measure_form("step", 8, 2, settings(steps=10_000, budget=1e-3))
    assert found["status"] == "over_budget"
    assert "budget 0.001 s" in found["message"]


def test_devices_are_not_mixed_in_one_plot(tmp_path: Path) -> None:
    made = [record.Record("online", "step", {"N": 8, "B": 1}, "ok", name, {}, None, "", "") for name in "ab"]
    with pytest.raises(ValueError, match="can't mix devices, got a, b"):
        latency.draw(made, tmp_path / "x")
