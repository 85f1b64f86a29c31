"""Which backend runs, and that Triton's gives what torch's does, through the layer and through the learner."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import kernels_here
import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import ALIF, RGC, Cell, Matrix, OnlineLearner, TwoPointRNN
from rjepa_triton.backend import native_backend, operations, triton_backend
from rjepa_triton.cells.builtin import ElmanCell, GRUCell, LRUCell, LSTMCell, MGUCell, RGCCell
from rjepa_triton.cells.two_point import Trajectory
from rjepa_triton.layers.functional import rgc
from rjepa_triton.rules import rfp

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "gamma_dtype", "states", "chosen", "why"),
    [
        (CPU, F32, F32, 1, "compile", "one pass"),
        (CPU, F64, F64, 2, "compile", "one pass"),
        (CPU, F32, F32, 5, "torch", "up to 4 states a unit, got 5"),
        (CPU, F32, BF16, 2, "torch", "gamma_dtype differs"),
        (CPU, BF16, BF16, 2, "torch", "float32 or float64, got torch.bfloat16"),
        (GPU, F32, BF16, 2, "triton", "one pass"),
        (GPU, F64, F64, 2, "torch", "float32, got torch.float64"),
        (GPU, F32, F32, 5, "torch", "up to 4 states a unit, got 5"),
    ],
)
def test_auto(
    device: torch.device, dtype: torch.dtype, gamma_dtype: torch.dtype, states: int, chosen: str, why: str
) -> None:
    got, because = operations.choose_gamma("auto", device, dtype, gamma_dtype, states)
    assert got == chosen
    assert why in because


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        (CPU, F32, "compile"),
        (CPU, F64, "compile"),
        (CPU, torch.bfloat16, "torch"),
        (GPU, F32, "triton"),
        (GPU, F64, "torch"),
    ],
)
def test_auto_of_a_loop_over_time(device: torch.device, dtype: torch.dtype, chosen: str) -> None:
    assert operations.choose_scan("auto", device, dtype) == chosen


def test_what_can_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' can't run: kernels need a CUDA or ROCm tensor"):
        operations.choose_scan("triton", CPU, F32)
    with pytest.raises(ValueError, match="'triton' can't run"):
        operations.choose_gamma("triton", CPU, F32, F32, 1)
    with pytest.raises(ValueError, match="'compile' can't run: compiled code serves CPU tensors"):
        operations.choose_gamma("compile", GPU, F32, F32, 1)
    with pytest.raises(ValueError, match="'compile' can't run: compiled code serves CPU tensors, got cuda"):
        operations.choose_scan("compile", GPU, F32)
    with pytest.raises(ValueError, match="'compile' can't run: compiled loops compute in float32 or float64"):
        operations.choose_scan("compile", CPU, torch.bfloat16)
    with pytest.raises(
        ValueError, match="backend must be one of 'auto', 'torch', 'compile', 'triton', got 'c'"
    ):
        operations.choose_scan("c", CPU, F32)
    monkeypatch.setattr(native_backend, "cpp_compiler", lambda: None)
    monkeypatch.setattr(native_backend.library, "tell_of_no_compiler", lambda: None)
    for choose in (
        lambda: operations.choose_gamma("compile", CPU, F32, F32, 1),
        lambda: operations.choose_scan("compile", CPU, F32),
    ):
        with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
            choose()
    assert operations.choose_scan("auto", CPU, F32) == "torch"
    assert operations.choose_gamma("auto", CPU, F32, F32, 1) == ("torch", "no C++ compiler was found")


def test_the_layers_gradient_by_triton() -> None:
    kernels_here.go()
    x, weights, state, ds, dm = oracle.problem(7, 3, 17, dtype=F32)
    gradients = []
    for backend in ("torch", "triton"):
        s, m = rgc(x, *weights, state, backend=backend)
        gradients.append(torch.autograd.grad((s * ds + m * dm).sum(), [x, *state, *weights]))
    assert oracle.relative(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize(
    ("form", "how", "every"),
    [
        ("step", "each", 1),
        ("lazy", "each", 1),
        ("chunk", "chunk", 4),
        ("chunk", "together", 4),
        ("history", "each", 1),
    ],
)
@pytest.mark.parametrize(
    "made",
    [
        functools.partial(RGC, 17, init="uniform"),
        functools.partial(RGC, 17, init="uniform", input_size=3),
        functools.partial(RGC, 17, init="uniform", recurrence="diagonal"),
        functools.partial(ALIF, 3, 17),  # three states
    ],
    ids=["RGC", "with input weights", "diagonal", "ALIF"],
)
def test_the_learners_gradient_by_triton(
    form: str, how: str, every: int, made: Callable[[], TwoPointRNN]
) -> None:
    kernels_here.go()
    torch.manual_seed(0)
    layer = made()
    x, delta = torch.randn(9, 2, layer.fan_in), torch.randn(9, 2, 17)
    resets = torch.rand(9, 2) < 0.2
    results = []
    for backend in ("torch", "triton"):
        layer.zero_grad()
        learner = OnlineLearner(layer, 2, form=form, update_every=every, backend=backend)
        losses = []
        for t in range(0, 9, every if how == "chunk" else 1):
            if how == "chunk":
                s = learner.chunk(x[t : t + every], resets[t : t + every])
                (s * delta[t : t + every]).sum().backward()
                continue
            learner.reset(resets[t])
            losses.append((learner.step(x[t]) * delta[t]).sum())
            if how == "each" or len(losses) == every or t == 8:
                torch.stack(losses).sum().backward()
                losses = []
        results.append([p.grad.clone() for p in layer.parameters()])
    assert oracle.relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "compile", "triton"])
def test_what_a_credit_reads_of_gamma(backend: str) -> None:
    """By each backend the float64 sum; Γ is left as it is."""
    if backend == "triton":
        kernels_here.go()
    if backend == "compile" and native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    gammas, credit = [torch.randn(3, 2, 17, 5) for _ in range(2)], torch.randn(2, 4, 3, 17)[:, 1]
    before = [gamma.clone() for gamma in gammas]
    want = sum(torch.einsum("bn,bknm->knm", credit[nu].double(), gammas[nu].double()) for nu in range(2))
    got = operations.gamma_read(gammas, credit, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(gammas, before, strict=True))


def test_a_kernel_that_can_not_launch_gives_way_to_torch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels_here.go()
    from triton.runtime.errors import OutOfResources

    from rjepa_triton.kernels import reverse_scan

    def refuse(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(reverse_scan, "reverse_scan", refuse)
    monkeypatch.setattr(triton_backend.TRITON, "failed", {})
    m, delta = torch.randn(2, 2, 4, 1, 3), torch.randn(2, 4, 1, 3)
    with pytest.warns(
        UserWarning, match="backend 'triton' can't run reverse_scan here, torch runs it.*shared memory"
    ):
        first = operations.reverse_scan(m, delta, backend="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = operations.reverse_scan(m, delta, backend="triton")
    torch.testing.assert_close(first, operations.reverse_scan(m, delta))
    torch.testing.assert_close(first, again)


class ThreeStates(Cell):
    """Leaky copies of what one matrix gives; its partials are found automatically."""

    states = ("a", "b", "c")
    gates = ("a",)
    matrices = (Matrix("aa", ("gate", 0), 0),)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.tanh(p[0] + x[0]), 0.5 * c[1] + 0.5 * c[0], 0.9 * c[2] + c[1] * x[0])


class FiveStates(ThreeStates):
    states = ("a", "b", "c", "d", "e")

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (*super().update(c, p, x), c[2], c[3])


@pytest.mark.parametrize(
    ("cell", "arrays"),
    # E of a matrix whose gate an input drives is that input's gradient
    [
        *[(RGCCell(), 5), (LSTMCell(), 4), (GRUCell(), 4), (GRUCell(bias=False), 4), (ThreeStates(), 2)],
        (FiveStates(), 0),  # more than kernels take
    ],
)
def test_the_dual_forms_parts_by_triton(cell: Cell, arrays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_here.go()
    from rjepa_triton.kernels import reverse_scan

    written: list[int] = []
    launch = reverse_scan.reverse_scan_entering

    def counted(*arguments: Any) -> Any:
        entering, for_inputs, passed = launch(*arguments)
        written.append(len(entering) + len(for_inputs))
        return entering, for_inputs, passed

    monkeypatch.setattr(reverse_scan, "reverse_scan_entering", counted)
    states, inputs = len(cell.states), len(cell.per_unit)
    for steps in (1, 6):
        weights = [torch.randn(7, 7) / 3 for _ in cell.matrices]
        start = [torch.randn(2, 7) for _ in range(states)]
        trajectory = cell.scan(torch.randn(inputs, steps, 2, 7), weights, start)
        lin = cell.linearize(trajectory)
        m, delta = rfp.transition(lin, cell.matrices, weights), torch.randn(states, steps, 2, 7)
        found = []
        for backend in ("torch", "triton"):
            entering, for_inputs, first = operations.dual(
                lin, m, delta, cell.matrices, inputs, backend=backend
            )
            found.append([*entering, for_inputs, first])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert written == ([arrays] * 2 if arrays else [])


SHAPED = {
    "dense": lambda: torch.randn(6, 6) / 3,
    "heads": lambda: torch.randn(3, 2, 2) / 2,
    "diagonal": lambda: torch.randn(6) / 2,
}
by_shape = pytest.mark.parametrize("shaped", [*SHAPED, "mixed"])


def _weights(shaped: str) -> list[Tensor]:
    shapes = ["dense", "heads", "diagonal", "dense"] if shaped == "mixed" else [shaped] * 4
    return [SHAPED[shape]() for shape in shapes]


def _count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launchers of `cell_partials` as they are called."""
    kernels_here.go()
    from rjepa_triton.kernels import cell_partials

    called: list[str] = []

    def counted(name: str, launch: Any, *arguments: Any) -> Any:
        called.append(name)
        return launch(*arguments)

    for name in ("cell_linearize", "cell_dual"):
        monkeypatch.setattr(
            cell_partials, name, functools.partial(counted, name, getattr(cell_partials, name))
        )
    return called


def _trajectories(
    weights: list[Tensor], steps: int, reset: bool
) -> tuple[Trajectory, Trajectory, list[Tensor]]:
    """In float64, and rounded to float32; and the weights in float64."""
    resets = torch.rand(steps, 2) < 0.4 if reset else None
    given = torch.randn(1, steps, 2, 6).double(), [torch.randn(2, 6).double() for _ in range(2)]
    exact_weights = [weight.double() for weight in weights]
    exact = RGCCell().scan(given[0], exact_weights, given[1], resets)
    rounded = Trajectory(exact.x.float(), exact.states.float(), exact.saved.float(), resets)
    return exact, rounded, exact_weights


@by_shape
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
def test_an_rgcs_linearisation_by_triton(
    shaped: str, reset: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = _count(monkeypatch)
    weights = _weights(shaped)
    exact, rounded, exact_weights = _trajectories(weights, steps, reset)
    want, want_m = operations.linearize(RGCCell(), exact, exact_weights)
    got, m = operations.linearize(RGCCell(), rounded, weights, backend="triton")
    assert called == ["cell_linearize"]
    torch.testing.assert_close(m.double(), want_m, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.before.double(), want.before, rtol=0, atol=1e-6)
    assert got.resets is exact.resets
    for group in ("own", "gate", "input"):
        for a, b in zip(getattr(got.partials, group), getattr(want.partials, group), strict=True):
            assert a.keys() == b.keys()
            for nu in a:
                torch.testing.assert_close(a[nu].double(), b[nu], rtol=0, atol=1e-6)
    rule_m = operations.linearize(RGCCell(), rounded, weights, "eprop", backend="triton")[1]
    assert called == ["cell_linearize"]
    torch.testing.assert_close(rule_m, operations.linearize(RGCCell(), rounded, weights, "eprop")[1])


@by_shape
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_dual_form_of_an_rgc_by_triton(
    shaped: str, reset: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = _count(monkeypatch)
    cell, weights = RGCCell(), _weights(shaped)
    exact, rounded, exact_weights = _trajectories(weights, steps, reset)
    delta = torch.randn(2, steps, 2, 6)
    for learning in ("rfp", "eprop"):
        for carry in (None, torch.randn(2, 2, 6)):
            later = None if carry is None else carry.double()
            want = operations.dual_of(
                cell, exact, exact_weights, delta.double(), cell.matrices, 1, learning, later
            )
            got = operations.dual_of(
                cell, rounded, weights, delta, cell.matrices, 1, learning, carry, backend="triton"
            )
            for a, b in zip([*got[0], *got[1:]], [*want[0], *want[1:]], strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert called == ["cell_dual"] * 2


@by_shape
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 260])
def test_the_layers_gradient_by_triton_is_that_of_the_oracle(
    shaped: str, reset: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of autograd through the graph in which a matrix passes gradients to its own unit alone, by one launch.

    Weights are small, for with larger ones the float32 states of 260 steps drift from float64's.
    """
    called = _count(monkeypatch)
    weights = [(weight / 4).double().requires_grad_() for weight in _weights(shaped)]
    x, _, state, ds, dm = oracle.problem(steps, 2, 6)
    resets = torch.rand(steps, 2) < 0.2 if reset else None
    want_s, want_m = oracle.rgc(x, weights, state, resets, "own")
    want = torch.autograd.grad((want_s * ds + want_m * dm).sum(), [x, *state, *weights])
    given = [t.detach().float().requires_grad_() for t in (x, *state, *weights)]
    s, m = rgc(
        given[0], *given[3:], (given[1], given[2]), resets=resets, forward="sequential", backend="triton"
    )
    got = torch.autograd.grad((s * ds.float() + m * dm.float()).sum(), given)
    assert called == ["cell_dual"]
    assert oracle.relative(got, want) < 4e-6


def test_a_dual_form_that_can_not_launch_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_here.go()
    from triton.runtime.errors import OutOfResources

    from rjepa_triton.kernels import cell_partials

    def refuse(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    for name in ("cell_dual", "cell_linearize"):
        monkeypatch.setattr(cell_partials, name, refuse)
    monkeypatch.setattr(triton_backend.TRITON, "failed", {})
    cell, weights = RGCCell(), _weights("dense")
    _, rounded, _ = _trajectories(weights, 6, True)
    delta = torch.randn(2, 6, 2, 6)
    with pytest.warns(UserWarning, match="backend 'triton' can't run (dual_of|linearize) here"):
        got = operations.dual_of(cell, rounded, weights, delta, cell.matrices, 1, "rfp", backend="triton")
    want = operations.dual_of(cell, rounded, weights, delta, cell.matrices, 1, "rfp", backend="torch")
    for a, b in zip([*got[0], *got[1:]], [*want[0], *want[1:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_triton_is_a_clear_refusal() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rjepa_triton\n"
        "rjepa_triton.OnlineLearner(rjepa_triton.RGC(3), 1, backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: backend='triton' can't run: triton is not installed" in done.stderr


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("units", [5, 130])
@pytest.mark.parametrize("learning", ["bptt", "rtrl", "rfp"])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_rgc_by_kernels(units: int, reset: bool, learning: str, recompute: bool) -> None:
    """Forward pass and exact backward pass, on chip and a step at a time, against float64."""
    kernels_here.go()
    if learning == "rtrl" and units > 5:
        pytest.skip("RTRL's weights are torch's")
    x, weights, state, delta, delta_m = oracle.problem(6, 2, units)
    resets = torch.rand(6, 2) < 0.3 if reset else None
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        given = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *state)]
        s, m = rgc(
            given[0],
            *given[1:5],
            (given[5], given[6]),
            resets=resets,
            learning=learning,
            recompute=recompute,
            backend=backend,
        )
        loss = (s * delta.to(s)).sum() + (m * delta_m.to(m)).sum()
        found.append([s.detach(), m.detach(), *torch.autograd.grad(loss, given)])
    assert oracle.relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("reset", [False, True])
def test_a_step_of_rgc_and_its_linearisation_at_once(reset: bool) -> None:
    kernels_here.go()
    cell, batch, units = RGCCell(), 3, 17
    x, weights, state, *_ = oracle.problem(1, batch, units)
    resets = torch.tensor([[False, True, False]]) if reset else None
    trajectory = cell.scan(x[None], weights, state, resets)
    lin, m = operations.linearize(cell, trajectory, weights)
    narrow = [w.float() for w in weights]
    c, given = torch.stack(state).float(), x[None].float()
    made = operations.step(cell, given, narrow, c, resets, backend="triton")
    assert made is not None
    after, found, found_m = made
    assert oracle.relative([after, found.before, found_m], [trajectory.after, lin.before, m]) < 1e-5
    for group, want in ((found.partials.gate, lin.partials.gate), (found.partials.input, lin.partials.input)):
        for got, wanted in zip(group, want, strict=True):
            assert list(got) == list(wanted)
            assert oracle.relative(list(got.values()), list(wanted.values())) < 1e-5


def test_a_step_that_the_kernel_is_not_for_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_here.go()
    from rjepa_triton.kernels import cell_step as kernels

    monkeypatch.setattr(kernels, "cell_step", lambda *_: pytest.fail("the kernel was launched"))
    cell, units, many = RGCCell(), 5, triton_backend.STEP_ROWS + 1
    dense = [torch.randn(units, units) / 3 for _ in range(4)]
    for steps, batch, weights, backend in (
        (1, 2, dense, "torch"),
        (1, 2, [w.diagonal() for w in dense], "triton"),
        (1, many, dense, "triton"),
        (2, 2, dense, "triton"),
    ):
        x, state = torch.randn(1, steps, batch, units), torch.randn(2, batch, units)
        after, lin, m = operations.step(cell, x, weights, state, backend=backend)
        trajectory = cell.scan(x, weights, state.unbind(0))
        torch.testing.assert_close(after, trajectory.after)
        torch.testing.assert_close(m, operations.linearize(cell, trajectory, weights)[1])
        torch.testing.assert_close(lin.before, trajectory.before)


def test_limits_are_those_of_the_kernels() -> None:
    heads = pytest.importorskip("rjepa_triton.kernels.rtrl_heads")
    forward = pytest.importorskip("rjepa_triton.kernels.cell_on_chip")
    ours = triton_backend.MAX_STATES, triton_backend.HEAD_UNITS, triton_backend.HEAD_ROWS
    assert ours == (heads.MAX_STATES, heads.MAX_UNITS, heads.MAX_ROWS)
    for cell in (RGCCell(), LSTMCell(), MGUCell(), ElmanCell()):
        for units, batch in itertools.product((1, 64, 65, 128, 129), (1, 132, 133)):
            weights = [torch.empty(units, units) for _ in cell.matrices]
            want = forward.on_chip(units, batch, len(weights), len(cell.per_unit), 132)
            assert triton_backend.one_launch(cell, weights, batch) == want
    assert not triton_backend.one_launch(RGCCell(), [torch.empty(2, 3, 3)] * 4, 1)
    assert not triton_backend.one_launch(LRUCell(), [], 1)
