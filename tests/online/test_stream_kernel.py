"""A stream's Triton kernel, against the loop in float64: an `OnlineLearner`, torch's losses and torch.optim."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels_here
import pytest
import stream_loops
import torch
from stream_loops import LAYERS, Loop, compare, everything, given, made, near, pairwise, told, widened
from torch import nn

pytest.importorskip("triton")

from rjepa_triton import LSTM, RGC, Residual, Stream
from rjepa_triton.kernels import cell_stream, stream_layout
from rjepa_triton.online import stream_given, stream_kernel
from rjepa_triton.rules import rfp

F32, F64 = torch.float32, torch.float64
# NumPy, which the interpreter computes with, warns where the other branch of a choice leaves its domain.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _where_kernels_run() -> None:
    kernels_here.go()


CALLS: dict[str, Any] = {
    "whole": (7,),
    "pieces": (3, 1, 3),
    "both": (2, ("step", 2), 3),
}
FACTORS = {
    name: values for name, values in stream_loops.FACTORS.items() if name not in ("readout", "batch")
} | {
    "layer": [name for name in LAYERS if "heads" not in name],
    "rule": ["rfp", "eprop", "rflo", "snap0"],
    "calls": list(CALLS),
    "units": [1, 2, 17],
}


def of_both(case: dict[str, Any]) -> tuple[Stream, Loop]:
    """A stream by the kernel, and the loop in float64, with the same weights."""
    stream, _ = made({**case, "batch": 1}, F32, lr=0.001, backend="triton")
    wide = made({**case, "batch": 1}, F64, lr=0.001, backend="torch")[1]
    for ours, theirs in ((stream.layer, wide.layer), (stream.readout, wide.readout)):
        theirs.load_state_dict(ours.state_dict())
    return stream, wide


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=told)
def test_one_launch_is_the_loop(case: dict[str, Any]) -> None:
    stream, loop = of_both(case)
    assert stream.backend == "triton"
    compare(stream, loop, {**case, "batch": 1}, 2e-5, CALLS, wide=True)


def case_of(layer: str = "rgc", **change: Any) -> dict[str, Any]:
    plain = {
        "layer": layer, "optimizer": "sgd", "loss": "mse", "rule": "rfp", "calls": "whole", "units": 17, "outputs": 3,
        "every": 1, "clip": None, "rates": False, "resets": False, "mask": False, "bias": True,
    }  # fmt: skip
    return {**plain, **change}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs a team by itself")
def test_a_team_of_programs_is_one_program() -> None:
    """Programs that are processes, which share memory and wait for one another (`support/team.py`)."""
    script = Path(stream_loops.__file__).with_name("team.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, str(script), "4"],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            told_, _ = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    assert float(told_) < 1e-6


@pytest.mark.parametrize("frozen", ["layer", "readout", "some"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_frozen_weights_stay(frozen: str, clip: float | None) -> None:
    stream, loop = of_both(case_of("lstm", optimizer="adam", clip=clip, units=6))
    for side in (stream, loop):
        weights = {"layer": side.layer.parameters(), "readout": side.readout.parameters()}.get(frozen)
        for parameter in weights or [side.layer.weights()[1], side.readout.bias]:
            parameter.requires_grad_(False)
    x, target = given(loop.layer, 1, 3, "mse", 4)
    before = [p.detach().clone() for p in stream.parameters if not p.requires_grad]
    losses, outputs, _ = stream.run(x.float(), target.float())
    near(widened([losses, outputs]), loop.run(x.float().double(), target.float().double()), 1e-5)
    near(widened(everything(stream)["layer"]), everything(loop)["layer"], 1e-5)
    after = [p for p in stream.parameters if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_reset_forgets_even_nan() -> None:
    stream, _ = of_both(case_of("gru of one feature", units=6))
    fresh, _ = of_both(case_of("gru of one feature", units=6))
    for ours, theirs in zip(stream.parameters, fresh.parameters, strict=True):
        theirs.data.copy_(ours)
    state, sensitivity = stream.learner.lend()
    state.fill_(math.nan)
    for group in sensitivity.groups:
        for gamma in group.gammas:
            gamma.fill_(math.nan)
    x, target = torch.randn(3, 1, 1), torch.randn(3, 1, 3)
    resets = torch.tensor([[True], [False], [False]])
    found, wanted = (each.run(x, target, resets) for each in (stream, fresh))
    assert torch.equal(found.losses, wanted.losses)
    near(everything(stream), everything(fresh), 0)


def test_a_population_is_its_networks_alone() -> None:
    """Networks of one kind take one launch; one that differs takes another."""
    layer = LAYERS["lstm"](5, dtype=F32)
    options: dict[str, Any] = {
        "optimizer": "adam",
        "backend": "triton",
        "population": 3,
        "lr": [0.1, 0.01, 0.001],
    }
    many = Stream(layer, nn.Linear(5, 2), 1, **options)
    assert many.members is not None
    many.members[2].layer.weights()[0].requires_grad_(False)
    alone = copy.deepcopy(many.members)
    x, target = torch.randn(3, 4, 1, layer.fan_in), torch.randn(4, 1, 2)
    launches = []
    launch = cell_stream.cell_stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cell_stream, "cell_stream", lambda *a, **k: (launches.append(len(a[2])), launch(*a, **k))
        )
        result = many.run(x, target, hidden=True)
    assert sorted(launches) == [1, 2]
    for p, one in enumerate(alone):
        assert one.backend == "triton"
        found = one.run(x[p], target, hidden=True)
        for got, want in ((result.losses, found.losses), (result.hidden, found.hidden)):
            assert got is not None
            assert want is not None
            assert torch.equal(got[p], want)
        near(everything(many.members[p]), everything(one), 0)


REFUSED: dict[str, tuple[Callable[[], Stream], str]] = {
    "rows": (lambda: Stream(RGC(4), nn.Linear(4, 2), 2, backend="triton"), "one batch row, got batch_size=2"),
    "itself": (
        lambda: Stream(RGC(4), nn.Linear(4, 4), self_prediction=True, backend="triton"), "no self_prediction",
    ),
    "readout": (
        lambda: Stream(RGC(4), nn.Sequential(nn.Linear(4, 2), nn.ReLU()), backend="triton"), "one nn.Linear",
    ),
    "residual": (lambda: Stream(RGC(4), Residual(nn.Linear(4, 4)), backend="triton"), "one nn.Linear"),
    "heads": (lambda: Stream(LSTM(2, 4, heads=2), nn.Linear(4, 2), backend="triton"), "got heads"),
    "dtype": (
        lambda: Stream(RGC(4, dtype=F64), nn.Linear(4, 2, dtype=F64), backend="triton"), "compute in float32",
    ),
    "rule": (
        lambda: Stream(RGC(4), nn.Linear(4, 2), learning="uoro", backend="triton"), "takes the rules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_serve(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(ValueError, match="backend='triton' can't run: .*" + says):
        make()


def test_another_readout_runs_by_the_loop() -> None:
    stream, loop = of_both(case_of(units=6, outputs=6))
    x, target = given(loop.layer, 1, 6, "mse", 4)
    stream.readout = nn.Sequential(stream.readout, nn.Tanh())
    loop.readout = nn.Sequential(loop.readout, nn.Tanh())
    losses, outputs, _ = stream.run(x.float(), target.float())
    near(widened([losses, outputs]), loop.run(x.float().double(), target.float().double()), 1e-5)


def test_layouts() -> None:
    """Programs are as large as registers allow; a network that no GPU holds has no layout."""
    found = {}
    for units in (32, 64, 256, 512, 1024):
        stream = Stream(RGC(units), nn.Linear(units, 4), backend="torch")
        parts = stream_given.served_parts(stream, rfp.RULES)
        assert not isinstance(parts, str)
        problem = stream_kernel.InKernel(stream, parts).problem()
        found[units] = stream_layout.pick_config(problem, 32, 132)
    assert found[32] == stream_layout.Config(1, 32, 4)
    assert found[64] == stream_layout.Config(2, 32, 8)
    assert found[256] == stream_layout.Config(32, 8, 8)
    assert found[512] == stream_layout.Config(128, 4, 8)
    assert found[1024] is None
