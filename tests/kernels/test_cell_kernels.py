"""Kernels for any cell, by the functions that are generated from its update, against torch in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import every_cell
from kernel_problems import DEVICE, check_error, poison

from rjepa_triton.backend import operations, triton_backend, triton_cells
from rjepa_triton.backend.table import Refusal
from rjepa_triton.cells import weights as weight_ops
from rjepa_triton.cells.two_point import Cell, Matrix, Trajectory
from rjepa_triton.kernels import cell_backward, cell_forward, cell_on_chip, cell_partials, cell_step
from rjepa_triton.kernels._launch import DeviceSizes
from rjepa_triton.layers.functional import two_point
from rjepa_triton.rules import bptt, rfp

F64 = torch.float64
by_cell = pytest.mark.parametrize("name", every_cell.CELLS)
# Numbers are of order 1, over a few steps; a spike or a ReLU is far from its threshold for the seeds here.
TOLERANCE = 1e-5
# NumPy, which the interpreter computes with, warns where the other branch of a choice leaves its domain.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def problem(
    cell: Cell, steps: int, batch: int, units: int, reset: bool, shape: str = "dense"
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """x, weights, initial states and resets, in float64, rounded to float32 so that both read the same numbers."""
    torch.manual_seed(steps + 10 * units)
    sizes = {"dense": (units, units), "diagonal": (units,)}[shape]
    x = torch.randn(len(cell.per_unit), steps, batch, units)
    weights = [torch.randn(sizes) * (0.5 / math.sqrt(sizes[-1])) for _ in cell.matrices]
    state = [torch.randn(batch, units) for _ in cell.states]
    resets = torch.rand(steps, batch) < 0.4 if reset else None
    x, weights, state = x.to(DEVICE), [w.to(DEVICE) for w in weights], [s.to(DEVICE) for s in state]
    return (
        x.double(),
        [w.double() for w in weights],
        [s.double() for s in state],
        resets if resets is None else resets.to(DEVICE),
    )


def narrow(trajectory: Trajectory) -> Trajectory:
    arrays = (a.float() for a in (trajectory.x, trajectory.states, trajectory.saved))
    return Trajectory(*arrays, trajectory.resets)


def served(made: Any) -> Any:
    assert not isinstance(made, Refusal), made
    return made


def near(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    scale = max([1.0, *want.abs().flatten().tolist()])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)


@by_cell
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("batch", "units"), [(1, 1), (3, 17), (2, 132)])
def test_the_forward_loop(monkeypatch, name: str, batch: int, units: int, reset: bool) -> None:
    cell = every_cell.CELLS[name]
    x, weights, state, resets = problem(cell, 4, batch, units, reset)
    want = cell.scan(x, weights, state, resets)
    given = x.float(), [w.float() for w in weights], [s.float() for s in state]
    kept = [a.clone() for a in (given[0], *given[1], *given[2])]
    poison(monkeypatch)
    got = served(triton_backend._scan_by_step(cell, *given, resets, True))
    near(got.states, want.states)
    near(got.saved, want.saved)
    assert all(torch.equal(a, b) for a, b in zip((given[0], *given[1], *given[2]), kept, strict=True))
    again = served(triton_backend._scan_by_step(cell, *given, resets, False))
    assert torch.equal(again.states, got.states)
    assert again.saved.shape == (0,)


# Cells whose units affect one another: those with matrices.
WIRED = [name for name, cell in every_cell.CELLS.items() if cell.matrices]


def at_sizes(letters: str, small: list[Any], large: list[Any]) -> pytest.MarkDecorator:
    """All cells at small sizes, and two of them, with one input and with four, at large ones too."""
    cases = [(name, *size) for name in WIRED for size in small]
    return pytest.mark.parametrize(letters, cases + [(n, *size) for n in ("rgc", "lstm") for size in large])


def functions(cell: Cell) -> Any:
    made = triton_cells.kernels_of(cell)
    assert made is not None
    return made.functions


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (4, 3)])
@at_sizes("name, units", [(1,), (17,)], [(64,), (100,)])
def test_the_loop_in_one_launch(
    monkeypatch, name: str, units: int, steps: int, batch: int, reset: bool
) -> None:
    cell = every_cell.CELLS[name]
    x, weights, state, resets = problem(cell, steps, batch, units, reset)
    want = cell.scan(x, weights, state, resets)
    given = x.float(), [w.float() for w in weights], [s.float() for s in state]
    kept = [a.clone() for a in (given[0], *given[1], *given[2])]
    poison(monkeypatch)
    states, saved = cell_on_chip.cell_forward(functions(cell), *given, resets)
    near(states, want.states)
    near(saved.movedim(2, 0), want.saved)
    assert all(torch.equal(a, b) for a, b in zip((given[0], *given[1], *given[2]), kept, strict=True))
    again, none = cell_on_chip.cell_forward(functions(cell), *given, resets, save=False)
    assert none is None
    assert torch.equal(again, states)


@pytest.mark.parametrize("name", ["lstm", "rgc", "shared-gate"])
def test_a_loop_in_two_parts_agrees_in_every_bit(name: str) -> None:
    cell, units = every_cell.CELLS[name], 68
    x, weights, state, resets = problem(cell, 5, 3, units, True)
    x, weights, state = (
        x.float(),
        [torch.nn.Parameter(w.float()) for w in weights],
        [s.float() for s in state],
    )
    forward = functools.partial(cell_on_chip.cell_forward, functions(cell))
    states, _ = forward(x, weights, state, resets)
    assert not states.requires_grad
    first, _ = forward(x[:, :2].contiguous(), weights, state, resets[:2])
    rest, _ = forward(x[:, 2:].contiguous(), weights, list(first[:, -1]), resets[2:].to(torch.uint8))
    assert torch.equal(torch.cat([first, rest[:, 1:]], 1), states)


@pytest.mark.skipif(DEVICE == "cuda", reason="the lanes of a GPU are its own")
@pytest.mark.parametrize("units", [17, 65, 128])
def test_warps_of_64_lanes(monkeypatch, units: int) -> None:
    monkeypatch.setattr(cell_on_chip, "device_sizes", lambda _: DeviceSizes(64, 304))
    test_the_loop_in_one_launch(monkeypatch, "rgc", units, 2, 2, True)


# NumPy warns of an overflow, which the test shows to be harmless.
@pytest.mark.parametrize("name", ["lstm", "gru", "rgc"])
def test_large_pre_activations_saturate(name: str) -> None:
    cell = every_cell.CELLS[name]
    x, weights, state, _ = problem(cell, 2, 1, 17, False)
    given = x.float(), [1e3 * w.float() for w in weights], [s.float() for s in state]
    states, saved = cell_on_chip.cell_forward(functions(cell), *given)
    assert states.isfinite().all()
    assert saved.isfinite().all()


def test_what_goes_in_one_launch() -> None:
    on_chip = cell_on_chip.on_chip
    assert on_chip(64, 10_000, 4, 1, 132)
    assert on_chip(64, 10_000, 4, 4, 132)
    assert on_chip(128, 132, 4, 1, 132)
    assert on_chip(128, 132, 2, 2, 132)
    assert not on_chip(128, 1, 4, 4, 132)  # an LSTM
    assert not on_chip(65, 133, 4, 1, 132)
    assert not on_chip(129, 1, 4, 1, 132)
    assert on_chip(64, 132, 8, 1, 132)  # some of them are loaded again
    assert not on_chip(64, 133, 8, 1, 132)
    assert not on_chip(128, 1, 6, 1, 132)
    assert not on_chip(64, 1, 0, 1, 132)
    pick = cell_on_chip.pick_config
    assert pick(1, 4, 32) == pick(32, 4, 32) == (32, 4, 2)
    assert pick(33, 4, 32) == pick(64, 4, 32) == (64, 4, 4)
    assert pick(65, 4, 32) == pick(128, 4, 32) == (128, 2, 8)
    assert pick(1, 4, 64) == (64, 4, 4)
    assert pick(128, 4, 64) == (128, 4, 8)


@pytest.mark.parametrize(("units", "lanes"), [(1, 32), (63, 32), (100, 32), (128, 64)])
def test_quarters_hold_every_weight(units: int, lanes: int) -> None:
    """Multiply in the order of the kernel's layout: quarter, group of columns, warp, threads, rows, columns."""
    block = cell_on_chip.pick_config(units, 3, lanes).block
    weights = [torch.randn(units, units) for _ in range(3)]
    parts = cell_on_chip.in_quarters(weights, block, lanes)
    tiles = parts.view(3, 4, block // lanes, block // 16, 8, lanes // 8, 2, 2)
    state = torch.nn.functional.pad(torch.randn(units), (0, block - units))
    by_column = state.view(4, block // lanes, lanes // 8, 2)
    for matrix, weight in zip(tiles, weights, strict=True):
        product = torch.einsum("qgwrlab,qglb->wra", matrix.double(), by_column.double()).flatten()
        near(product[:units].float(), weight.double() @ state[:units].double())
        assert product[units:].eq(0).all()


@pytest.mark.parametrize("reset", [False, True])
@at_sizes("name, batch, units", [(1, 1), (3, 17)], [(7, 132), (2, 260)])
def test_a_step_and_its_linearization(monkeypatch, name: str, batch: int, units: int, reset: bool) -> None:
    cell = every_cell.CELLS[name]
    x, weights, state, resets = problem(cell, 1, batch, units, reset)
    exact = cell.scan(x, weights, state, resets)
    lin = cell.linearize(exact)
    m = rfp.transition(lin, cell.matrices, weights)
    states = torch.stack([s.float() for s in state])
    if resets is not None:  # a state that a reset forgets isn't read
        states.masked_fill_(resets[0, :, None], math.inf)
    given = x.float(), [w.float() for w in weights], states
    kept = [a.clone() for a in (given[0], *given[1], given[2])]
    poison(monkeypatch)
    after, got, got_m = served(triton_backend.step(cell, *given, resets))
    near(after, exact.after)
    near(got.before, lin.before)
    near(got_m, m)
    for kind in ("gate", "input"):
        for ours, theirs in zip(getattr(got.partials, kind), getattr(lin.partials, kind), strict=True):
            assert ours.keys() == theirs.keys()
            for nu, value in ours.items():
                near(value, theirs[nu])
    assert all(torch.equal(a, b) for a, b in zip((given[0], *given[1], given[2]), kept, strict=True))
    again = served(triton_backend.step(cell, *given, resets))
    assert torch.equal(again[0], after)
    assert torch.equal(again[2], got_m)


def test_how_a_step_is_laid_out() -> None:
    pick = cell_step.pick_config
    assert pick(256, 1, 4, 32) == (2, 128, 1, 2)
    assert pick(512, 3, 4, 32) == (4, 128, 4, 4)
    assert pick(1024, 8, 4, 64) == (8, 256, 4, 8)
    assert pick(1024, 8, 8, 32) == (8, 128, 2, 8)  # fewer rows, so that the sums of more matrices fit
    assert pick(1024, 8, 100, 32) == (8, 128, 1, 8)


@pytest.mark.parametrize("reset", [False, True])
@at_sizes("name, steps, batch, units", [(1, 1, 1), (5, 3, 17)], [(4, 2, 132)])
def test_exact_credits(monkeypatch, name: str, steps: int, batch: int, units: int, reset: bool) -> None:
    cell = every_cell.CELLS[name]
    x, weights, state, resets = problem(cell, steps, batch, units, reset)
    exact = cell.scan(x, weights, state, resets)
    lin = cell.linearize(exact)
    delta = torch.randn(len(cell.states), steps, batch, units).to(DEVICE)
    credit, first = bptt.credits(lin, cell.matrices, weights, delta.double())
    narrowed, rounded = [w.float() for w in weights], narrow(exact)
    own = cell.linearize(rounded)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    entering, by_input, passed = served(triton_backend.exact(cell, rounded, own, narrowed, delta))
    for ours, matrix in zip(entering, cell.matrices, strict=True):
        near(ours, rfp.entering_credit(matrix, lin, credit))
    near(by_input, rfp.input_gradient(lin, credit, len(cell.per_unit)))
    near(passed, first)


def test_exact_credits_of_strided_states_agree_in_every_bit() -> None:
    """The stride between two states is one number more than their size, so that four doesn't divide it."""
    cell, units = every_cell.CELLS["lstm"], 64
    x, weights, state, resets = problem(cell, 5, 3, units, True)
    exact = narrow(cell.scan(x, weights, state, resets))
    delta, numbers = torch.randn(2, 5, 3, units).to(DEVICE), 5 * 3 * units
    before = cell.linearize(exact).before.contiguous()
    wide = torch.full((2, numbers + 1), math.nan, device=DEVICE)
    wide[:, :numbers] = before.flatten(1)
    given = exact.x, exact.saved.movedim(0, 2).contiguous()
    rest = [w.float() for w in weights], delta, exact.resets
    first = cell_backward.cell_credits(functions(cell), *given, before, *rest)
    again = cell_backward.cell_credits(functions(cell), *given, wide[:, :numbers].view(2, 5, 3, units), *rest)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@by_cell
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("batch", "units", "shape"), [(1, 1, "dense"), (3, 17, "dense"), (2, 132, "diagonal")]
)
def test_the_linearization(monkeypatch, name: str, batch: int, units: int, shape: str, reset: bool) -> None:
    cell = every_cell.CELLS[name]
    exact = cell.scan(*problem(cell, 3, batch, units, reset, shape))
    weights = problem(cell, 3, batch, units, reset, shape)[1]
    lin = cell.linearize(exact)
    m = rfp.transition(lin, cell.matrices, weights)
    rounded = narrow(exact)
    if rounded.resets is not None:  # states that a reset forgets aren't read
        rounded.states[:, :-1].masked_fill_(rounded.resets[..., None], math.nan)
    poison(monkeypatch)
    got, got_m = served(triton_backend._linearize(cell, rounded, [w.float() for w in weights]))
    near(got_m, m)
    for kind in ("own", "gate", "input"):
        for ours, theirs in zip(getattr(got.partials, kind), getattr(lin.partials, kind), strict=True):
            assert ours.keys() == theirs.keys()
            for nu, value in ours.items():
                near(value, theirs[nu])


def check_dual(
    cell: Cell, steps: int, batch: int, units: int, reset: bool, tolerance: float = TOLERANCE
) -> None:
    x, weights, state, resets = problem(cell, steps, batch, units, reset)
    weights = [w * 0.3 for w in weights]
    exact = cell.scan(x, weights, state, resets)
    delta = torch.randn(len(cell.states), steps, batch, units).to(DEVICE)
    carry = torch.randn(len(cell.states), batch, units).to(DEVICE)
    inputs = len(cell.per_unit)
    for given in (delta, [None, *delta[1:]]):
        want = operations.dual_of(
            cell, exact, weights,
            [None if one is None else one.double() for one in given], cell.matrices, inputs, "rfp", carry.double(),
        )  # fmt: skip
        narrowed = [w.float() for w in weights]
        got = served(triton_backend._dual_of(cell, narrow(exact), narrowed, given, inputs, carry))
        for ours, theirs in zip(got[0], want[0], strict=True):
            near(ours, theirs, tolerance)
        near(got[1], want[1], tolerance)
        near(got[2], want[2], tolerance)


@by_cell
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("batch", "units"), [(1, 1), (3, 17)])
def test_the_dual_form(monkeypatch, name: str, batch: int, units: int, reset: bool) -> None:
    poison(monkeypatch)
    check_dual(every_cell.CELLS[name], 5, batch, units, reset)


@pytest.mark.parametrize("name", ["lstm", "alif"])
@pytest.mark.parametrize("reset", [False, True])
def test_the_dual_form_of_a_long_sequence(name: str, reset: bool) -> None:
    """Blocks of time are scanned side by side, and the last one is shorter."""
    assert cell_partials.pick_dual_config(300, 5, 10, 5, 32, 132).steps == 13
    check_dual(every_cell.CELLS[name], 300, 1, 5, reset, 1e-4)


def test_two_runs_agree_in_every_bit() -> None:
    cell = every_cell.CELLS["lstm"]
    x, weights, state, resets = problem(cell, 6, 3, 17, True)
    rounded, narrowed = narrow(cell.scan(x, weights, state, resets)), [w.float() for w in weights]
    delta = torch.randn(2, 6, 3, 17).to(DEVICE)
    first, second = (triton_backend._dual_of(cell, rounded, narrowed, delta, 4, None) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip((*first[0], *first[1:]), (*second[0], *second[1:]), strict=True)
    )


class Own(Cell):
    """A cell of a user's, with most operations, a shared gate and a parameter."""

    states = ("a", "b")
    gates = ("p", "q")
    inputs = ("u", "v")
    parameters = ("k",)
    matrices = (Matrix("pa", ("gate", 0), 0), Matrix("pb", ("gate", 0), 1), Matrix("qb", ("gate", 1), 1))
    outputs = (0, 1)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        u, v, k = x
        gate = torch.sigmoid(p[0] + u) * torch.exp(-k.abs())
        pull = torch.where(v > 0, torch.log1p(v.square()), torch.expm1(0.3 * v)) + torch.sin(p[1])
        b = 0.5 * torch.maximum(c[1], pull) + 0.1 * torch.erf(p[1]) - c[0].clamp(-1, 1) ** 3
        return gate * c[0] + (1 - gate) * torch.tanh(pull), torch.sqrt(1 + b * b)


@pytest.mark.parametrize("reset", [False, True])
def test_a_cell_of_ones_own(monkeypatch, reset: bool) -> None:
    monkeypatch.setitem(every_cell.CELLS, "own", Own())
    for check in (test_the_forward_loop, test_the_linearization):
        arguments = {"batch": 2, "units": 9, "reset": reset, "name": "own"}
        if check is test_the_linearization:
            arguments["shape"] = "dense"
        with pytest.MonkeyPatch.context() as patch:
            check(patch, **arguments)
    check_dual(Own(), 5, 2, 9, reset)


@pytest.mark.parametrize("learning", ["rfp", "bptt", "eprop"])
@pytest.mark.parametrize("name", ["lstm", "gru", "alif"])
def test_a_sequence_by_kernels(name: str, learning: Any) -> None:
    """Kernels where they serve, torch where they don't: values and gradients are torch's."""
    cell = every_cell.CELLS[name]
    x, weights, state, resets = problem(cell, 5, 2, 6, True)
    found = []
    for backend in ("torch", "triton"):
        leaves = [a.float().requires_grad_() for a in (x, *weights, *state)]
        count = 1 + len(weights)
        states = two_point(
            cell,
            leaves[0],
            leaves[1:count],
            leaves[count:],
            resets=resets,
            learning=learning,
            backend=backend,
        )
        loss = sum((of_state.square().sum() for of_state in states), torch.zeros((), device=DEVICE))
        found.append([*states, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def arguments() -> dict[str, Any]:
    cell = every_cell.CELLS["lstm"]
    made = triton_cells.kernels_of(cell)
    assert made is not None
    x, weights, state, resets = problem(cell, 3, 2, 5, True)
    rounded = narrow(cell.scan(x, weights, state, resets))
    return {
        "cell": made.functions,
        "x": rounded.x,
        "saved": rounded.saved.movedim(0, 2).contiguous(),
        "before": rounded.states[:, :-1],
        "own": [weight_ops.own(w.float()) for w in weights],
        "resets": rounded.resets,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 0, 2, 5)}, ValueError, r"x must have shape \(J, T, B, N\), none of them 0"),
        ({"x": torch.zeros(4, 3, 2, 5).double()}, TypeError, "x must have dtype torch.float32"),
        ({"saved": torch.zeros(3, 2, 5, 4)}, ValueError, r"saved must have shape \(3, 2, 4, 5\)"),
        ({"before": torch.zeros(2, 3, 5, 2).mT}, ValueError, "before must be contiguous beyond its first 1"),
        ({"own": [torch.zeros(5)] * 3}, ValueError, "own must hold 4 tensors, got 3"),
        ({"resets": torch.zeros(3, 2)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    check_error(cell_partials.cell_linearize, arguments(), change, error, message)
    dual = {
        "delta": list(torch.zeros(2, 3, 2, 5).to(DEVICE)),
        "written": list(torch.zeros(4, 3, 2, 5).to(DEVICE)),
    }
    check_error(cell_partials.cell_dual, {**arguments(), **dual}, change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"products": torch.zeros(2, 3, 5)}, ValueError, r"products must have shape \(2, 4, 5\)"),
        ({"x": torch.zeros(3, 2, 5)}, ValueError, r"x must have shape \(4, 2, 5\)"),
        ({"before": torch.zeros(2, 0, 5)}, ValueError, r"before must have shape \(S, B, N\), none of them 0"),
        ({"saved": torch.zeros(2, 4, 4)}, ValueError, r"saved must have shape \(2, 4, 5\)"),
        (
            {"next_resets": torch.zeros(2).bool()},
            ValueError,
            "next_resets and next_before must be given together",
        ),
    ],
)
def test_what_does_not_fit_a_step_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {
        "cell": arguments()["cell"],
        "products": torch.zeros(2, 4, 5),
        "x": torch.zeros(4, 2, 5),
        "before": torch.zeros(2, 2, 5),
        "after": torch.zeros(2, 2, 5),
    }
    given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
    check_error(cell_forward.cell_pointwise_, given, change, error, message)
