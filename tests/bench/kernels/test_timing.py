"""Kernels against their floors: the formulas, the checks, and a sweep that goes on where it stopped."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rjepa_triton import cli
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.tables import markdown
from rjepa_triton.bench.kernels import cases as kernel_cases
from rjepa_triton.bench.kernels import gamma, roofline, rtrl, static
from rjepa_triton.bench.kernels import kernel as kernel_module
from rjepa_triton.bench.kernels import timing as kernels
from rjepa_triton.bench.kernels.cases import KERNELS
from rjepa_triton.bench.kernels.timing import Settings
from rjepa_triton.planning import devices

CPU = torch.device("cpu")
GPU_ONLY = ("chunk-C64-tf32",)


@pytest.mark.parametrize(
    ("name", "moved", "flop"),
    [
        # Γ 2·2·4·B·N², g bytes each; M 4BN, φ 8BN, y 4BN, δ 2BN; the gradient 4N². FLOP a number of Γ: 5, or 7.
        ("step-fp32-gradient", 64 * 3 * 100 + 4 * 18 * 30 + 16 * 100, 7 * 8 * 3 * 100),
        ("step-fp32-advance", 64 * 3 * 100 + 4 * 16 * 30, 5 * 8 * 3 * 100),
        ("step-bf16-gradient", 32 * 3 * 100 + 4 * 18 * 30 + 16 * 100, 7 * 8 * 3 * 100),
        ("step-bf16-stochastic", 32 * 3 * 100 + 4 * 18 * 30 + 16 * 100, 7 * 8 * 3 * 100),
        # Γ once, credit 2BN
        ("read-fp32", 32 * 3 * 100 + 4 * 2 * 30 + 16 * 100, 2 * 8 * 3 * 100),
        ("read-bf16", 16 * 3 * 100 + 4 * 2 * 30 + 16 * 100, 2 * 8 * 3 * 100),
        # R(0) 4BN, U 8CBN, y 4CBN, credit 2BN. FLOP: 3 carried, 2 read, 2C added.
        ("chunk-C8-ieee", 64 * 3 * 100 + 4 * (6 + 12 * 8) * 30 + 16 * 100, (5 + 16) * 8 * 3 * 100),
        # M 4, δ 2, λ 2 a step; and 2 at the end
        ("scan", 4 * (8 * 20 + 2) * 30, 8 * 20 * 30),
        # M 4, δ 2, φ 4, ∂F/∂x 2, E 4, ∂E/∂x 1 a step; and 2 at the end
        ("scan-entering", 4 * (17 * 20 + 2) * 30, (8 + 4 + 3) * 20 * 30),
        # M 4, φ 8, U 8 a step; and R(0)
        ("arriving", 4 * (20 * 20 + 4) * 30, (12 + 24) * 20 * 30),
        # x 1, gates 4, states 2 a step; the state given and once more written, four weights
        ("rgc-forward", 4 * ((7 * 20 + 4) * 30 + 400), (80 + 28) * 20 * 30),
        # x 1, states 2, after 2, partials 10 of one step; four weights
        ("rgc-step", 4 * (15 * 30 + 4 * 100), (80 + 28 + 20) * 30),
        # gates 4, states 2, x 1, δ 2, E 4, ∂E/∂x 1 a step; what passes on, four weights
        ("rgc-backward", 4 * ((14 * 20 + 2) * 30 + 400), (80 + 23) * 20 * 30),
        # gates 4, states 2, x 1, φ 4, ∂F/∂x 2, M 4 a step; four diagonals
        ("rgc-linearize", 4 * (17 * 20 * 30 + 40), 20 * 20 * 30),
        # gates 4, states 2, x 1, δ 2, E 4, ∂E/∂x 1 a step; 2 at the end, four diagonals
        ("rgc-dual", 4 * ((14 * 20 + 2) * 30 + 40), 35 * 20 * 30),
        # own 2BN, φ 4BN, four weights, J 4BN²
        ("rtrl-jacobian", 4 * (6 * 30 + 400 + 400 * 3), 4 * 300 + 2 * 30),
        # five heads of two: γ 8BN·4, in and out; J 5·4·4B, φ 8BN, y 4BN, δ 2BN; the gradient 4N·2
        ("rtrl-heads", 4 * (2 * 32 * 30 + 80 * 3 + 14 * 30 + 80), (8 + 2) * 32 * 30 + 2 * 16 * 30),
    ],
)
def test_bytes_and_flop(name: str, moved: int, flop: int) -> None:
    kernel = KERNELS[name]
    steps = kernel.steps or 20
    assert kernel.bytes(10, 3, steps) == moved
    assert kernel.flop(10, 3, steps) == flop


def test_the_floor_is_the_larger_of_two() -> None:
    assert kernels.floor(100, 10, 10, 10) == (10, "bytes")
    assert kernels.floor(100, 1000, 10, 10) == (100, "flop")


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_written_and_read_is_what_the_formula_counts(name: str) -> None:
    kernel = KERNELS[name]
    steps = kernel.steps or 5
    given = kernel_cases.problem(kernel, 6, 2, steps, 0, CPU)
    for attribute, shape in kernel.shapes(6, 2, steps).items():
        assert tuple(getattr(given, attribute).shape) == shape
    outputs = kernel.reference(given)
    states = len(given.gammas)
    assert (states > 0) == kernel.has_gamma
    assert sum(g.numel() for g in outputs[:states]) == kernel.gamma_numbers(6, 2)
    assert sum(out.numel() for out in outputs[states:]) == kernel.written(6, 2, steps)


@pytest.mark.parametrize("name", KERNELS)
def test_every_runner_agrees_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's runners count too: without one, kernels are interpreted and compiled functions run uncompiled."""
    for module in (kernel_module, gamma, rtrl):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    kernel = KERNELS[name]
    runners = {f"cpu {by}": run for by, run in kernel.runners(CPU).items()}
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        on_gpu = kernel.runners(torch.device("cuda"))
        assert tuple(on_gpu) == kernel_cases.BY
        runners.update(on_gpu)
    given = kernel_cases.problem(kernel, 20, 2, kernel.steps or 9, 0, CPU)
    want = kernel.reference(given.copy(torch.float64))
    before = [g.clone() for g in given.gammas]
    for run in runners.values():
        # the interpreter truncates where a GPU rounds to nearest, which doubles the error
        monkeypatch.setitem(kernels.TOLERANCE, "bfloat16", 2.0**-7)
        assert kernels.verify(kernel, run, given, want) < 2.0**-7
    assert all(torch.equal(a, b) for a, b in zip(given.gammas, before, strict=True))


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["step-fp32-gradient"]
    wrong = {"torch": lambda p: [*p.gammas, torch.zeros(4, 8, 8)]}
    monkeypatch.setattr(kernel, "runners", lambda device: wrong)
    kernels.sweep(settings(kernels=("step-fp32-gradient",)), tmp_path / "k.jsonl")
    (made,) = record.load(tmp_path / "k.jsonl")
    assert (made.status, made.timing) == ("error", None)
    assert "Γ of state 0 differs from float64" in made.message


def settings(**changes: object) -> Settings:
    base = Settings(points=((8, 1),), steps=4, case_seconds=0.001)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gamma.native_backend, "cpp_compiler", lambda: None)
    for module in (kernel_module, gamma):
        monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setattr(kernels, "device_rates", lambda device: {"copy": 1e10, "float32": 1e11})


@pytest.mark.usefixtures("no_compiling")
def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / kernels.FILE
    some = settings(kernels=("step-bf16-advance", "scan"))
    assert kernels.sweep(some, file) == 0
    first = record.load(file)
    assert [r.algorithm for r in first] == ["step-bf16-advance/torch", "scan/torch"]
    for made in first:
        assert (made.benchmark, made.status) == ("kernels", "ok")
        assert made.timing is not None
        about = made.payload
        assert about["floor_seconds"] == about["bytes"] / 1e10 == made.predicted_seconds
        assert about["fraction"] == pytest.approx(about["floor_seconds"] / made.timing.median)
        assert about["bytes_per_second"] == pytest.approx(about["bytes"] / made.timing.median)
        assert about["error"] < 0.01
    assert kernels.sweep(some, file) == 2
    assert kernels.sweep(settings(), file) == 2
    assert len(record.load(file)) == len(KERNELS) - len(GPU_ONLY)

    told = io.StringIO()
    console = Console(file=told, width=200)
    records = kernels.run(settings(), file, console)
    assert f"kept {len(records)} records" in told.getvalue()
    text = markdown(kernels.table(records))
    rows = [line.split("|")[1].strip() for line in text.splitlines()[4:]]
    assert rows == [name for name in KERNELS if name not in GPU_ONLY]
    assert "GB/s" in text or "MB/s" in text


@pytest.mark.usefixtures("no_compiling")
def test_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.measure, "available_bytes", lambda device: 1000)
    kernels.sweep(settings(kernels=("chunk-C8-ieee",)), tmp_path / "k.jsonl")
    (made,) = record.load(tmp_path / "k.jsonl")
    assert made.status == "oom"
    assert "predicted: needs" in made.message
    assert markdown(kernels.table([made])).endswith("| oom |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": ()}, "kernels must name at least one"),
        ({"kernels": ("tea",)}, "kernels must be one of"),
        ({"points": ((0, 1),)}, "hidden must be"),
        ({"points": ((1, 0),)}, "batch must be"),
        ({"steps": 1}, "steps must be"),
        ({"case_seconds": 0}, "case_seconds must be above 0"),
        ({"device": "tpu"}, "device must be"),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_rates_have_units() -> None:
    assert kernels.rate_text(3.0e12, "B") == "3 TB/s"
    assert kernels.rate_text(1.5e6, "FLOP") == "1.5 MFLOP/s"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.usefixtures("no_compiling")
def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path))
    assert command(monkeypatch, "roofline", *out) == 2
    assert "run `rjepa bench kernels` first, or give --predict" in capsys.readouterr().err
    assert command(monkeypatch, "kernels", "--kernels", "tea", *out) == 2
    assert "kernels must be one of" in capsys.readouterr().err
    small = (
        "--hidden",
        "8",
        "--kernels",
        "scan,suffix",
        "--steps",
        "4",
        "--sample",
        "0.001",
        "--device",
        "cpu",
    )
    assert command(monkeypatch, "kernels", *small, *out) == 0
    assert "floor / time" in capsys.readouterr().out
    assert command(monkeypatch, "roofline", *out) == 0
    shown = capsys.readouterr().out
    assert "scan" in shown
    assert "predicted" not in shown
    assert command(monkeypatch, "roofline", "--predict", "--gpu", "tpu", *out) == 2


# --- predictions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fit", "limit"),
    [
        # a scheduler has 16,384 registers: 122 a thread take 3,904, rounded up to 4,096 a warp
        (122, 0, 4, 4, "registers"),
        (168, 0, 4, 3, "registers"),
        (32, 100_000, 4, 2, "shared memory"),
        (32, 0, 8, 8, "registers"),
        (16, 0, 1, 32, "programs"),
        (16, 0, 4, 16, "warps"),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, fit: int, limit: str) -> None:
    assert roofline.occupancy(roofline.GPUS["h100"], registers, shared, warps) == (fit, limit)


def test_gpus() -> None:
    h100, h200 = roofline.GPUS["h100"], roofline.GPUS["h200"]
    assert h100.copy == devices.Rate(3.0e12, "measured")
    assert h200.copy == devices.Rate(4.3e12, "estimated")
    assert h100.float32 == h200.float32
    with pytest.raises(ValueError, match="gpu must be one of 'a100', 'h100', 'h200', 'b200', got 'tpu'"):
        roofline.run(Path("never"), "tpu", ((64, 1),))


@pytest.fixture
def cuobjdump() -> None:
    """Skip the test without triton, or where it comes without the program that reads machine code."""
    pytest.importorskip("triton")
    if roofline.static.cuobjdump() is None:
        pytest.skip("this triton comes without cuobjdump")


@pytest.mark.usefixtures("cuobjdump")
def test_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels are compiled for a GPU that isn't here."""
    few = {name: KERNELS[name] for name in ("step-fp32-gradient", "arriving")}
    monkeypatch.setattr(roofline, "KERNELS", few)
    file = tmp_path / roofline.FILE
    made = roofline.run(file, "h200", ((512, 2), (1024, 2)))
    assert record.load(file) == made
    assert all(r.device == "NVIDIA H200 (predicted)" and r.status == "ok" for r in made), made
    step = made[0].payload
    assert step["predicted"]
    assert (step["config"], step["programs"]) == ("32×64 w4 v4", 4 * 16 * 8)
    assert not step["spills"]
    assert step["wide_loads"] >= 8
    assert made[0].predicted_seconds == pytest.approx(step["bytes"] / 4.3e12)
    assert step["static_instructions_per_number"] == step["instructions"] * 128 / (2 * 32 * 64)
    assert step["instructions"] > 100
    assert made[2].payload["limited_by"] == "shared memory"
    for table in roofline.tables(made):
        assert str(table.title).startswith("predicted for NVIDIA H200")
    assert "copy 4.3 TB/s estimated" in str(roofline.tables(made)[1].caption)


@pytest.mark.usefixtures("cuobjdump")
def test_a_prediction_of_a_long_scan_of_few_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan runs by blocks of time and in one pass; both wait for memory longer than they move bytes."""
    monkeypatch.setattr(roofline, "KERNELS", {"scan": KERNELS["scan"]})
    blocks, one = roofline.run(tmp_path / roofline.FILE, "h100", ((64, 1),), 4096)
    assert (blocks.algorithm, one.algorithm) == ("scan", "scan-one-pass")
    assert blocks.payload["bound"] == one.payload["bound"] == "waits"
    assert (blocks.payload["config"], blocks.payload["programs"]) == ("128 w1 v4 s4 t46", 90)
    assert (one.payload["config"], one.payload["programs"]) == ("128 w1 v4 s4", 1)
    assert one.payload["bytes"] == 4 * 64 * (8 * 4096 + 2)
    # blocks read all but 46 steps twice, and write and read 89 summaries
    again = 4 * 64 * 6 * (4096 - 46 + 2 * 89)
    assert blocks.payload["bytes"] == one.payload["bytes"] + again
    assert blocks.predicted_seconds == pytest.approx((2 * 46 + 89) / 3 * 600e-9)
    assert one.predicted_seconds == pytest.approx(4096 / 3 * 600e-9)


@pytest.mark.usefixtures("cuobjdump")
def test_a_prediction_of_a_long_dual_form_of_few_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in one pass, and by blocks of time, which read nine numbers of each unit and step twice."""
    monkeypatch.setattr(roofline, "KERNELS", {"rgc-dual": KERNELS["rgc-dual"]})
    blocks, one = roofline.run(tmp_path / roofline.FILE, "h100", ((64, 1),), 4096)
    assert (blocks.algorithm, one.algorithm) == ("rgc-dual", "rgc-dual-one-pass")
    assert (blocks.payload["config"], blocks.payload["programs"]) == ("128 w1 v4 s4 t46", 90)
    assert (one.payload["config"], one.payload["programs"]) == ("128 w1 v4 s4", 1)
    again = 4 * 64 * (9 * (4096 - 46) + 2 * 6 * 89)
    assert blocks.payload["bytes"] == one.payload["bytes"] + again
    assert blocks.predicted_seconds == pytest.approx((2 * 46 + 89) / 3 * 600e-9)
    assert one.predicted_seconds == pytest.approx(4096 / 3 * 600e-9)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("units", "batch"), [(63, 2), (63, 32), (256, 2), (1024, 2)])
def test_a_prediction_compiles_what_the_launcher_launches(
    name: str, units: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build has the constants, grid and options that the launcher passes."""
    pytest.importorskip("triton")
    from launches import MODULES

    passed: list[tuple[object, dict[str, object]]] = []

    class Stub:
        def __init__(self, kernel: object) -> None:
            self.arg_names = list(kernel.arg_names)  # type: ignore[attr-defined]

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*arguments: object, **named: object) -> None:
                passed.append((grid, {**dict(zip(self.arg_names, arguments, strict=False)), **named}))

            return launch

    for module in MODULES:
        for attribute, value in list(vars(module).items()):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, Stub(value))
    kernel = KERNELS[name]
    given = kernel_cases.problem(kernel, units, batch, kernel.steps or 3, 0, CPU)
    kernel.runners(torch.device("cuda"))["triton"](given)
    by_step = name == "rgc-backward" or (name == "rgc-forward" and units > 128)
    assert len(passed) == (3 if by_step else 1)
    grid, arguments = passed[1 if name == "rgc-backward" else 0]  # its first has no step after it
    made = roofline.launch(kernel, units, batch, kernel.steps or 3, roofline.GPUS["h100"])
    programs = 1
    for size in grid:  # type: ignore[attr-defined]
        programs *= size
    assert programs == made.programs
    for constant, value in made.build.constants.items():
        assert arguments[constant] == static.constant_of(value), constant
    for argument, kinds in made.build.types.items():
        if not isinstance(kinds, str) and argument not in made.build.constants:
            pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
            given_kinds = [
                None if item is None else pointers[item.dtype] if isinstance(item, torch.Tensor) else "i32"
                for item in arguments[argument]  # type: ignore[attr-defined]
            ]
            assert given_kinds == kinds, argument
    for argument in made.build.types:
        absent = made.build.constants.get(argument, 0) is None
        assert absent == (arguments[argument] is None), argument
    for option, number in made.build.options.items():
        assert arguments[option] == number, option
    specialized = () if name == "rtrl-heads" or "on_chip" in made.build.kernel else ("N", "M", "BN")
    for argument in specialized:
        if argument in arguments:
            assert (argument in made.build.divisible) == (arguments[argument] % 16 == 0)  # type: ignore[operator]
