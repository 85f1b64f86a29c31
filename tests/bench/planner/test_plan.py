"""`rjepa bench plan`: against committed records, what fits, what is advised, and what it refuses."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from checkout import RESULTS
from typer.testing import CliRunner

from rjepa_triton import RGC, OnlineLearner
from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import measure, record
from rjepa_triton.bench.planner import here as here_module
from rjepa_triton.bench.planner import plan
from rjepa_triton.bench.planner.check import ERRORS, errors
from rjepa_triton.bench.planner.plan import Question
from rjepa_triton.bench.planner.question import MOST
from rjepa_triton.bench.scaling.cases import CASES, Size, head_size
from rjepa_triton.online import counting
from rjepa_triton.planning import cost, devices

H100 = devices.known()["h100"]
CPU = devices.find("AMD EPYC", "cpu")


@pytest.fixture(scope="module")
def checked() -> list[plan.Checked]:
    return plan.against(record.load_all(RESULTS))


def test_predicted_times_are_within_a_quarter_of_committed_ones(checked: list[plan.Checked]) -> None:
    large = [one for one in checked if one.units >= 512 and one.algorithm != "pass"]
    by_device = {one.device for one in large}
    assert by_device
    for device in by_device:
        errors = [abs(one.seconds - 1) for one in large if one.device == device]
        assert len(errors) >= 10
        assert median(errors) <= 0.25, device


@pytest.mark.parametrize("algorithm", ["stream", "stream, population"])
def test_streams_are_predicted_within_a_quarter_where_rates_were_fitted(algorithm: str) -> None:
    """Not on the machine of stream-avx512-cpu.jsonl, which has the same name and isn't the same."""
    made = [RESULTS / name for name in ("stream-cpu.jsonl", "stream-threads-cpu.jsonl")]
    checked = plan.against([each for file in made for each in record.load(file)])
    errors = [abs(one.seconds - 1) for one in checked if one.algorithm == algorithm]
    assert len(errors) >= 5
    assert median(errors) <= 0.25


def test_a_stream_is_advised_on_a_cpu_alone() -> None:
    question = Question(64, 1, None, 16)
    cpu = devices.find("AMD EPYC", "cpu")
    found = plan.predictions(question, cpu)
    told = plan.advise(question, cpu, found)
    assert told.algorithm == "stream"
    assert "Stream(layer, readout, B).run(x, target)" in told.text
    assert "For any other loss take rfp-" in told.text
    assert all(one.algorithm != "stream" for one in plan.predictions(question, H100))


def test_predicted_state_is_within_two_percent_of_committed_ones(checked: list[plan.Checked]) -> None:
    for device in {one.device for one in checked}:
        errors = [
            abs(one.state - 1) for one in checked if one.device == device and one.state and one.units >= 512
        ]
        assert median(errors) <= 0.02, device


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("units", [64, 144])
def test_state_bytes_are_those_of_the_cases(units: int, batch: int) -> None:
    size = Size(units, batch, 20, 16)
    question = Question(units, batch, 20, 16)
    found = {one.algorithm: one for one in plan.predictions(question, H100)}
    own = 2 * batch * units * 4  # the layer's states, which a case leaves out
    for name, one in found.items():
        if name not in ("tbptt", "rfp-lazy", "rfp-history"):
            kept = own if name in ("rfp-step", "rfp-chunk", "rtrl", "rtrl-heads") else 0
            assert one.state_bytes - kept == CASES[name].state_bytes(size), name
            assert one.peak_bytes >= one.state_bytes
    assert found["rtrl-heads"].weight_bytes == 4 * 4 * units * head_size(units)


@pytest.mark.parametrize("batch", [1, 16])
def test_state_bytes_of_lazy_are_the_learners(batch: int) -> None:
    cpu = devices.known()["cpu"]
    found = next(o for o in plan.predictions(Question(64, batch), cpu) if o.algorithm == "rfp-lazy")
    layer = RGC(64)
    every = cost.rewrite_every(counting.problem(layer, batch, torch.float32, gpu=False), cost.CPU)
    learner = OnlineLearner(layer, batch, form="lazy", rewrite_every=every)
    held = 0
    for _ in range(every):
        learner.step(torch.randn(batch, 64)).sum().backward()
        held = max(held, learner.nbytes)
    assert found.state_bytes == held
    assert found.peak_bytes > found.state_bytes
    assert found.every == 1


def test_what_is_predicted_grows_as_it_must() -> None:
    def seconds(name: str, **change: Any) -> float:
        question = replace(Question(4096, 16, 64), **change)
        return next(one.seconds for one in plan.predictions(question, H100) if one.algorithm == name)

    assert seconds("rfp-step", batch=32) == pytest.approx(2 * seconds("rfp-step"), rel=0.1)
    assert seconds("rtrl", hidden=8192) == pytest.approx(16 * seconds("rtrl"), rel=0.02)
    assert seconds("rfp-lazy", batch=64) < seconds("rfp-step", batch=64)
    assert seconds("rfp-chunk", chunk=64) < seconds("rfp-chunk")
    assert seconds("rfp-step", gamma_dtype="bfloat16") < 0.6 * seconds("rfp-step")
    assert seconds("rfp-step", hidden=64, cuda_graph=True) < 0.5 * seconds("rfp-step", hidden=64)


@pytest.mark.parametrize("cell", plan.CELLS)
def test_every_cell_has_a_plan(cell: str) -> None:
    for steps in (None, 40):
        question = Question(64, 2, steps, cell=cell, input_size=8)
        found = plan.predictions(question, H100)
        assert [one.seconds for one in found] == sorted(one.seconds for one in found)
        assert all(one.seconds > 0 and one.state_bytes > 0 and one.needs > one.peak_bytes for one in found)
        online = {one.algorithm for one in found} & {"rfp-dual", "bptt", "rfp-history"}
        assert bool(online) == (steps is not None)
        assert plan.advise(question, H100, found).devices == 1
    elementwise = cell in ("indrnn", "elstm", "lru")
    assert next(one.exact for one in found if one.algorithm == "rfp-step") == elementwise
    assert ("rtrl" in {one.algorithm for one in found}) != elementwise


def test_advice() -> None:
    def advise(**given: Any) -> plan.Advice:
        question = Question(**given)
        return plan.advise(question, H100, plan.predictions(question, H100))

    assert advise(hidden=1024).algorithm == "rfp-chunk"
    assert advise(hidden=1024, chunk=1).algorithm == "rfp-step"
    told = advise(hidden=2048, batch=64, chunk=1)
    assert told.algorithm == "rfp-lazy"
    assert 'OnlineLearner(layer, B, form="lazy")' in told.text
    told = advise(hidden=1024, steps=100, batch=8)
    assert told.algorithm == "rfp-dual"
    assert "a sequence of 100 steps at hand" in told.text
    assert "Not exact" in told.text
    assert advise(hidden=1024, steps=100, batch=8, exact=True).algorithm == "bptt"
    told = advise(hidden=1024, batch=32, exact=True)
    assert told.algorithm == "rtrl-heads"
    assert "It is another network" in told.text
    assert advise(hidden=64, exact=True).algorithm == "rtrl"
    # sensitivities that don't fit: truncated BPTT does, and so many devices would hold them
    told = advise(hidden=4096, batch=512)
    assert told.algorithm == "tbptt"
    assert "with the batch's 512 rows over" in told.text
    told = advise(hidden=60_000, batch=2)
    assert (told.algorithm, told.devices) == (None, 0)
    assert "for one row" in told.text


def test_rows_are_shared_out_over_as_few_devices_as_hold_them() -> None:
    question = Question(1024, 64, exact=True)
    found = [one for one in plan.predictions(question, H100) if one.algorithm == "rtrl"]
    told = plan.advise(question, H100, found)
    rows = plan.rows_that_fit(question, H100, "rtrl")
    assert (told.algorithm, told.devices) == ("rtrl", -(-64 // rows))
    for batch, fits in ((rows, True), (rows + 1, False)):
        one = next(o for o in plan.predictions(question, H100, batch) if o.algorithm == "rtrl")
        assert one.fits(H100) == fits


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(here_module, "flop_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(here_module, "copy_rate", lambda device: 2e10)
    monkeypatch.setattr(here_module, "_gamma_rate", lambda cache, per_call: 5e10)  # compiles for some seconds
    here = here_module.profile(torch.device("cpu"))
    assert {rate.basis for rate in here.rates.values()} == {"measured"}
    assert 1e-7 < here.rate("call") == here.rate("view") < 1e-3
    assert here.memory_bytes > 1e8
    assert here.cache_bytes == measure.cache_bytes()
    plan.save(here, tmp_path / "here.json")
    assert plan.device_of(str(tmp_path / "here.json")) == here
    assert cost.rates(here).bytes_per_second == 2e10


def run(*arguments: str) -> Any:
    return CliRunner().invoke(bench, ["plan", *arguments], terminal_width=200)


def test_what_the_table_says_of_its_errors_is_what_the_records_say(checked: list[plan.Checked]) -> None:
    told, found = json.loads(ERRORS.read_text()), errors(checked)
    assert {kind: list(named) for kind, named in told.items()} == {kind: list(n) for kind, n in found.items()}
    for kind, named in found.items():
        assert told[kind] == pytest.approx(named, abs=0.03)  # another torch may make a few calls more
    shown = plan.table(Question(64), CPU, plan.predictions(Question(64), CPU))
    column = next(column for column in shown.columns if column.header == "off by")
    by = dict(zip(shown.columns[0].cells, column.cells, strict=True))
    assert by["rfp-step"] == f"{told['cpu']['rfp-step']:.0%}"
    assert by["rfp-lazy"] == "?"
    off = next(
        c
        for c in plan.table(Question(64), H100, plan.predictions(Question(64), H100)).columns
        if c.header == "off by"
    )
    assert set(off.cells) == {"?"}  # there is no record of a GPU


def test_heads_and_populations_are_planned() -> None:
    dense, heads = (
        {one.algorithm: one for one in plan.predictions(Question(64, heads=h), H100)} for h in (None, 8)
    )
    assert heads["rfp-step"].weight_bytes == dense["rfp-step"].weight_bytes / 8
    assert heads["rtrl"].state_bytes == dense["rtrl-heads"].state_bytes
    assert "rtrl-heads" not in heads
    (one,), (many,) = (
        [p for p in plan.predictions(Question(64, population=n), CPU) if p.algorithm == "stream"]
        for n in (1, 8)
    )
    assert many.seconds == pytest.approx(8 * one.seconds, rel=0.5)
    assert (many.state_bytes, many.needs) == (8 * one.state_bytes, 8 * one.needs)
    with pytest.raises(ValueError, match="population is predicted where a Stream is compiled"):
        plan.predictions(Question(64, population=8), H100)
    found = {one.algorithm: one for one in plan.predictions(Question(64, block=4), CPU)}
    assert found["rtrl-block"].state_bytes - found["rfp-step"].state_bytes == 3 * 4 * 2 * 4 * 64**2
    assert not found["rtrl-block"].exact
    assert found["rfp-step"].seconds < found["rtrl-block"].seconds < found["rtrl"].seconds
    with pytest.raises(ValueError, match="block must divide the 8 units of a head, got 16"):
        Question(64, heads=8, block=16)
    with pytest.raises(ValueError, match="heads must divide hidden = 64, got 7"):
        Question(64, heads=7)


@pytest.mark.parametrize("cell", plan.CELLS)
def test_any_size_is_answered_at_once(cell: str) -> None:
    """At the largest size of each argument, alone and together; an answer takes a tenth of a second, and two are for a loaded machine."""
    most = dict.fromkeys(("batch", "steps", "chunk", "input_size"), MOST)
    plan.predictions(
        Question(64, steps=100, cell=cell), H100
    )  # the calls are counted once, by running a small layer
    for device in (H100, CPU):
        for sizes in ({}, *({name: MOST} for name in most), most):
            begin = time.process_time()
            question = Question(MOST, cell=cell, **sizes)  # type: ignore[arg-type]
            told = plan.advise(question, device, plan.predictions(question, device))
            assert told.algorithm is None
            assert "nothing fits" in told.text
            assert time.process_time() - begin < 2


def test_the_command_prints_the_table_and_why(tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    result = run("--hidden", "256", "--device", "h100", "--markdown", "--save", str(file))
    assert result.exit_code == 0, result.output
    assert "**predicted, on NVIDIA H100: rgc N = 256, B = 1, no end, C = 16, float32**" in result.output
    assert "| rfp-step | RFP | step |" in result.output
    assert "Nothing measured here; rates: estimated: float32" in result.output
    assert "take rfp-step" in result.output
    assert json.loads(file.read_text())["h100"]["name"] == H100.name
    assert run("--hidden", "256", "--device", str(file)).exit_code == 0


def test_the_check_prints_medians() -> None:
    result = run("--check", str(RESULTS / "heads-cpu.jsonl"), "--markdown")
    assert result.exit_code == 0, result.output
    assert "| AMD EPYC | rtrl-heads |" in result.output
    assert "| AMD EPYC | all algorithms |" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "h100"], "--hidden must be given"),
        (["--hidden", "64", "--device", "tpu"], "one of a100, h100, h200, b200, mi300x"),
        (["--hidden", "0", "--device", "h100"], "hidden must be at least 1, got 0"),
        (["--hidden", "64", "--batch", "0", "--device", "h100"], "batch must be at least 1, got 0"),
        (["--hidden", "64", "--steps", "0", "--device", "h100"], "steps must be at least 1, got 0"),
        (["--hidden", "64", "--cell", "mlp", "--device", "h100"], "cell must be one of 'rgc'"),
        (
            ["--hidden", "64", "--dtype", "int8", "--device", "h100"],
            "dtype must be one of 'float32', 'float64'",
        ),
        (["--hidden", "64", "--gamma-dtype", "int8", "--device", "h100"], "gamma_dtype must be one of"),
        (["--hidden", "64", "--cuda-graph", "--device", "xeon-2"], "cuda_graph=True needs a GPU"),
        (["--check", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_user_errors_exit_2(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_records_of_a_slower_machine_say_nothing_of_the_model() -> None:
    """Of the same name, and with yardsticks of a fifth of the speed that the device's rates are of."""
    made = next(
        r for r in record.load(RESULTS / "scaling-cpu.jsonl") if r.timing and r.algorithm == "rfp-step"
    )
    assert made.timing is not None
    assert len(plan.against([made])) == 1
    slower = {"copy": [5 * seconds for seconds in made.timing.yardsticks["copy"]]}
    assert plan.against([replace(made, timing=replace(made.timing, yardsticks=slower))]) == []
