"""The functions compiled for the CPU give what torch's give; how their library is built, found and done without.

This is one long file because all compiled functions run here on one set of problems (`sizes`, `given`).
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from every_cell import SharedGate
from torch import Tensor

from rjepa_triton import LSTM, RGC, RNN, OnlineLearner
from rjepa_triton.backend import native_backend, operations
from rjepa_triton.backend.native import calls, generated, library
from rjepa_triton.backend.table import Refusal
from rjepa_triton.cells.builtin import (
    ALIFCell,
    ElmanCell,
    ELSTMCell,
    GRUCell,
    LeakyCell,
    LIFCell,
    LRUCell,
    LSTMCell,
    MGUCell,
    MinGRUCell,
    MinLSTMCell,
    RGCCell,
    TimeDecayCell,
)
from rjepa_triton.cells.two_point import Cell, Trajectory, state_read
from rjepa_triton.layers import parallel
from rjepa_triton.layers.functional import rgc
from rjepa_triton.online import counting
from rjepa_triton.planning import cost
from rjepa_triton.rules import bptt, rfp

F32, F64 = torch.float32, torch.float64
CELL = RGCCell()

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


def compiled(cell: Cell) -> generated.Loops:
    """The cell's compiled loops, which must be there."""
    found = generated.loops(cell)
    assert found is not None
    assert found.code is not None
    return found


def sizes() -> list[tuple[int, int, int]]:
    """T, B, N."""
    return [(1, 1, 1), (1, 3, 65), (5, 1, 1), (6, 3, 63), (6, 1, 64), (7, 4, 65), (3, 9, 16), (4, 2, 200)]


def given(steps: int, batch: int, units: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    weights = [torch.randn(units, units) / units**0.5 for _ in range(4)]
    return torch.randn(1, steps, batch, units), weights, [torch.randn(batch, units) for _ in range(2)]


@pytest.mark.parametrize(("function", "most"), [("tanh", 2), ("sigmoid", 4), ("exp", 2)])
def test_functions_are_within_ulps_over_the_whole_range(function: str, most: int) -> None:
    some = torch.cat([torch.linspace(-12, 12, 400_001), torch.logspace(-44, 38, 200_001)])
    if function != "tanh":
        some = torch.cat([some[some < 88], torch.linspace(-86, 12, 200_001)])
    found, exact = some.clone(), getattr(torch, function)(some.double())
    calls.activate_(found, function)
    ulp = (torch.nextafter(exact.float().abs(), torch.tensor(math.inf)) - exact.float().abs()).double()
    assert float(((found.double() - exact).abs() / ulp).max()) < most
    assert function == "exp" or float(found.abs().max()) == 1


@pytest.mark.parametrize(("function", "most"), [("tanh", 4), ("sigmoid", 4), ("exp", 3)])
def test_functions_in_float64_are_within_ulps_over_the_whole_range(function: str, most: int) -> None:
    """numpy's longdouble, where it is longer than float64, is the oracle; else torch's own function."""
    some = torch.cat(
        [torch.linspace(-30, 30, 200_001, dtype=F64), torch.logspace(-300, 2, 50_001, dtype=F64)]
    )
    found, long = some.clone(), some.numpy().astype(np.longdouble)
    calls.activate_(found, function)
    exact = {"tanh": np.tanh, "exp": np.exp, "sigmoid": lambda v: 1 / (1 + np.exp(-v))}[function](long)
    error = np.abs(found.numpy().astype(np.longdouble) - exact) / np.spacing(np.abs(exact.astype(np.float64)))
    assert float(error.max()) < most


def test_tanh_and_sigmoid_of_what_is_no_ordinary_number() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, 3e38, -3e38])
    found = odd.clone()
    calls.activate_(found, "tanh")
    torch.testing.assert_close(found, odd.tanh(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[1:], odd.signbit()[1:])
    found = odd.clone()
    calls.activate_(found, "sigmoid")
    torch.testing.assert_close(found, odd.sigmoid(), rtol=0, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("steps", "batch", "units"), sizes())
def test_the_forward_loop_is_torchs(steps: int, batch: int, units: int, reset: bool) -> None:
    x, weights, state = given(steps, batch, units)
    resets = torch.rand(steps, batch) < 0.4 if reset else None
    exact = CELL.scan(x.double(), [w.double() for w in weights], [s.double() for s in state], resets)
    ours, theirs = compiled(CELL).scan(x, weights, state, resets), CELL.scan(x, weights, state, resets)
    for got, one, want in zip(ours, (theirs.states, theirs.saved), (exact.states, exact.saved), strict=True):
        assert got.shape == one.shape
        assert got.stride() == one.stride()
        scale = float(want.abs().max())
        error, torchs = float((got - want).abs().max()) / scale, float((one - want).abs().max()) / scale
        assert error <= max(3 * torchs, 1e-6)


def test_strides_don_t_matter() -> None:
    x, weights, state = given(6, 3, 10)
    resets = torch.rand(6, 3) < 0.4
    want = operations.scan(CELL, x, weights, state, resets, backend="compile")
    turned = [
        x.transpose(1, 3).contiguous().transpose(1, 3),
        [w.t().contiguous().t() for w in weights],
        [s.repeat(1, 2)[:, ::2] if i else s.t().contiguous().t() for i, s in enumerate(state)],
        resets.t().contiguous().t(),
    ]
    turned[2][1] = torch.stack([state[1], state[1]], -1)[..., 0]
    got = operations.scan(CELL, *turned, backend="compile")
    torch.testing.assert_close([got.states, got.saved], [want.states, want.saved], rtol=0, atol=0)
    assert operations.scan(CELL, x, weights, state, resets, backend="compile", keep=False).saved.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_where_torch_has_it_go(value: float) -> None:
    x, weights, state = given(5, 3, 20)
    x[0, 1, 0, 4] = value
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[3, 0] = True  # forgotten here
    got, want = (operations.scan(CELL, x, weights, state, resets, backend=b) for b in ("compile", "torch"))
    torch.testing.assert_close(got.states, want.states, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got.saved, want.saved, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got.states[:, 4:].isfinite().all()


CELLS: dict[str, Cell] = {
    "tanh": ElmanCell(),
    "relu": ElmanCell("relu"),
    "lstm": LSTMCell(),
    "gru": GRUCell(),
    "gru without its bias": GRUCell(bias=False),
    "leaky": LeakyCell(0.3),
    "elstm": ELSTMCell(),
    "time decay": TimeDecayCell(),
    "lru": LRUCell(),
    "rtu": LRUCell("tanh"),
    "two states into one gate": SharedGate(),
    "mgu": MGUCell(),
    "minlstm": MinLSTMCell(),
    "mingru": MinGRUCell(),
    "lif": LIFCell(),
    "alif": ALIFCell(),
}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("steps", "batch", "units"), sizes())
def test_other_cells(name: str, steps: int, batch: int, units: int, reset: bool) -> None:
    """Their loop and their linearisation, as float64 has them."""
    cell = CELLS[name]
    x = torch.randn(len(cell.per_unit), steps, batch, units)
    weights = [torch.randn(units, units) / units**0.5 for _ in cell.matrices]
    state = [torch.randn(batch, units) for _ in cell.states]
    resets = torch.rand(steps, batch) < 0.4 if reset else None
    got = operations.scan(cell, x, weights, state, resets, backend="compile")
    want = cell.scan(x.double(), [w.double() for w in weights], [s.double() for s in state], resets)
    for ours, exact, like in zip(
        (got.states, got.saved),
        (want.states, want.saved),
        (cell.scan(x, weights, state, resets).states, cell.scan(x, weights, state, resets).saved),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=3e-6)
        assert ours.stride() == like.stride()
    lin, m = operations.linearize(cell, got, weights, backend="compile")
    exact_lin, exact_m = operations.linearize(cell, want, [w.double() for w in weights])
    torch.testing.assert_close(m.double(), exact_m, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        lin.partials.__dict__.values(), exact_lin.partials.__dict__.values(), strict=True
    ):
        double = [{nu: value.double() for nu, value in by.items()} for by in ours]
        torch.testing.assert_close(double, list(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "heads"])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
@pytest.mark.parametrize("rule", rfp.RULES)
def test_steps_in_one_call_are_the_loop_and_the_linearization(
    rule: str, name: str, kind: str, reset: bool, dtype: torch.dtype
) -> None:
    """In every bit, of tensors that lie in memory in any way; a reset row's NaN is not read. M is that of the rule, and
    a copy has the same arrays.
    """
    cell = CELLS.get(name, CELL)
    for steps, batch, units in (
        (1, 1, 2),
        (1, 3, 66),
        (1, 15, 8),
        (5, 3, 8),
        (15, 1, 34),
        (1, 17, 6),
        (9, 9, 34),
    ):
        shape = {"dense": (units, units), "diagonal": (units,), "heads": (2, units // 2, units // 2)}[kind]
        weights = [torch.randn(shape, dtype=dtype) / units**0.5 for _ in cell.matrices]
        if kind == "dense":
            weights = [weight.t() for weight in weights]
        state = torch.randn(len(cell.states), units, batch, dtype=dtype).transpose(1, 2)
        x = torch.randn(len(cell.per_unit), steps, batch, 2 * units, dtype=dtype)[..., ::2]
        resets = torch.rand(steps, batch) < 0.5 if reset else None
        if resets is not None:
            resets[0, 0] = True
            state[:, 0] = math.nan
        after, lin, m = operations.step(cell, x, weights, state, resets, rule, backend="compile")
        ran = operations.scan(cell, x, weights, state.unbind(0), resets, backend="compile")
        wanted_lin, wanted_m = operations.linearize(cell, ran, weights, rule, backend="compile")
        assert torch.equal(after, ran.after)
        assert torch.equal(m, wanted_m)
        # in another order of products, as torch rounds them
        torch.testing.assert_close(m, rfp.transition(wanted_lin, cell.matrices, weights, rule))
        assert lin.steps == steps
        for made in (lin, copy.deepcopy(lin), pickle.loads(pickle.dumps(lin))):
            assert torch.equal(made.before, wanted_lin.before)
            for got, wanted in zip(
                (made.partials.gate, made.partials.input),
                (wanted_lin.partials.gate, wanted_lin.partials.input),
                strict=True,
            ):
                for of, by in zip(got, wanted, strict=True):
                    assert list(of) == list(by)
                    assert all(torch.equal(of[nu], by[nu]) for nu in by)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "heads"])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
def test_a_step_whose_products_are_given(name: str, kind: str, dtype: torch.dtype) -> None:
    """It is the loop's first step. The products lie side by side, as one product of joined weights leaves them."""
    cell = CELLS.get(name, CELL)
    for batch, units in ((1, 2), (3, 66), (9, 34)):
        shape = {"dense": (units, units), "diagonal": (units,), "heads": (2, units // 2, units // 2)}[kind]
        weights = [torch.randn(shape, dtype=dtype) / units**0.5 for _ in cell.matrices]
        state = torch.randn(len(cell.states), units, batch, dtype=dtype).transpose(1, 2)
        x = torch.randn(len(cell.per_unit), batch, 2 * units, dtype=dtype)[..., ::2]
        products: list[Tensor | None] = [None] * len(weights)
        if kind == "dense" and weights:
            read = [state[state_read(matrix)] for matrix in cell.matrices]
            side = torch.cat([y @ w.t() for y, w in zip(read, weights, strict=True)], 1)
            products = list(side.split(units, 1))
        wanted = cell.scan(x[:, None], weights, state.unbind(0))
        for backend in ("torch", "compile"):
            after, saved = operations.advance(cell, x, weights, products, state, backend=backend)
            torch.testing.assert_close(after, wanted.states[:, 1])
            torch.testing.assert_close(saved, wanted.saved[:, 0])


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
@pytest.mark.parametrize(
    ("steps", "batch", "units"), [(16, 1, 1), (20, 1, 33), (7, 5, 64), (16, 3, 65), (3, 9, 200)]
)
def test_exact_credits(
    name: str, steps: int, batch: int, units: int, reset: bool, carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one thread and by two, as float64 has them of the same states."""
    cell = CELLS.get(name, CELL)
    weights = [0.5 * torch.randn(units, units) / units**0.5 for _ in cell.matrices]
    state = [torch.randn(batch, units) for _ in cell.states]
    resets = torch.rand(steps, batch) < 0.2 if reset else None
    ran = cell.scan(torch.randn(len(cell.per_unit), steps, batch, units), weights, state, resets)
    exact = Trajectory(ran.x.double(), ran.states.double(), ran.saved.double(), resets)
    delta = torch.randn(len(state), steps, batch, units)
    carry = torch.randn(len(state), batch, units) if carried else None
    want = bptt.credits(
        cell.linearize(exact),
        cell.matrices,
        [w.double() for w in weights],
        delta.double(),
        None if carry is None else carry.double(),
    )
    lin = cell.linearize(ran)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        got = operations.exact_credits(cell, lin, weights, delta, carry, backend="compile")
        for ours, theirs in zip(got, want, strict=True):
            scale = float(want[0].abs().max())
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("changes", [None, (0, 0, 1), (4, 2, 32)])
@pytest.mark.parametrize("name", ["lru", "rtu", "time decay"])
def test_parameters_that_are_the_same_at_all_steps_or_not(name: str, changes: tuple[int, ...] | None) -> None:
    """What depends on a cell's parameters alone is computed once, unless one number of them differs at one step."""
    cell = CELLS[name]
    x = torch.randn(len(cell.per_unit), 5, 3, 33)
    x[len(cell.inputs) :] = 0.3 * x[len(cell.inputs) :, :1, :1]
    if changes is not None:
        x[(-1, *changes)] += 1.0
    state = [torch.randn(3, 33) for _ in cell.states]
    got = operations.scan(cell, x, [], state, None, backend="compile")
    want = cell.scan(x.double(), [], [s.double() for s in state])
    torch.testing.assert_close(got.states.double(), want.states, rtol=1e-5, atol=1e-5)
    m = operations.linearize(cell, got, [], backend="compile")[1]
    torch.testing.assert_close(m.double(), operations.linearize(cell, want, [])[1], rtol=1e-5, atol=1e-5)
    assert_dual(cell, got, [], torch.randn_like(got.after))


def ran(
    cell: Cell, steps: int, batch: int, units: int, shape: str, reset: bool
) -> tuple[Trajectory, list[Tensor]]:
    """A trajectory of a cell, and the weights that it ran with."""
    heads = next(h for h in (3, 2, 1) if units % h == 0)
    size = {"dense": (units, units), "heads": (heads, units // heads, units // heads), "diagonal": (units,)}
    weights = [0.5 * torch.randn(size[shape]) for _ in cell.matrices]
    weights = [w / w.shape[-1] ** 0.5 if w.dim() > 1 else w for w in weights]
    x = torch.randn(len(cell.per_unit), steps, batch, units)
    resets = torch.rand(steps, batch) < 0.2 if reset else None
    return cell.scan(x, weights, [torch.randn(batch, units) for _ in cell.states], resets), weights


def assert_dual(
    cell: Cell,
    trajectory: Trajectory,
    weights: list[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
    *,
    exact: bool = False,
) -> list[Tensor]:
    """That one pass gives what float64 gives of the same trajectory; what it gives, flat. exact: of BPTT's credit."""
    inputs, wide = len(cell.per_unit), [w.double() for w in weights]
    arrays = (a.double() for a in (trajectory.x, trajectory.states, trajectory.saved))
    double = Trajectory(*arrays, trajectory.resets)
    code = generated.loops(cell)
    if exact:
        entering, *rest = operations.exact_of(cell, double, wide, delta.double())
        made = code.exact(trajectory, weights, delta)
    else:
        last = None if carry is None else carry.double()
        entering, *rest = operations.dual_of(
            cell, double, wide, delta.double(), cell.matrices, inputs, "rfp", last
        )
        made = code.dual(trajectory, weights, delta, carry)
    want = [*entering, *rest]
    entering, *rest = made
    got = [*entering, *rest]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6 * scale)
    by_weight = [
        rfp.outer_products(t.before, cell.matrices, w, e)
        for t, w, e in ((trajectory, weights, made[0]), (double, wide, iter(want[: len(wide)])))
    ]
    for ours, theirs in zip(*by_weight, strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * scale)
    return [*got, *by_weight[0]]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is taken is full of NaN."""
    take = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: take(*a, **k).fill_(math.nan))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
@pytest.mark.parametrize(
    ("steps", "batch", "units", "shape"),
    [
        (1, 1, 1, "dense"),
        (5, 3, 63, "dense"),
        (6, 2, 127, "heads"),
        (7, 5, 64, "diagonal"),
        (9, 1, 66, "heads"),
        (1, 300, 15, "dense"),
    ],
)
def test_the_dual_form_in_one_pass(
    name: str, steps: int, batch: int, units: int, shape: str, reset: bool, carried: bool, poisoned: None
) -> None:
    cell = CELLS.get(name, CELL)
    trajectory, weights = ran(cell, steps, batch, units, shape, reset)
    delta = torch.randn_like(trajectory.after)
    carry = torch.randn(len(delta), batch, units) if carried else None
    found = [assert_dual(cell, trajectory, weights, delta, carry) for _ in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
@pytest.mark.parametrize(("steps", "batch", "units"), [(16, 1, 1), (5, 3, 63), (7, 5, 64), (3, 19, 130)])
def test_the_exact_credit_in_one_pass(
    name: str, steps: int, batch: int, units: int, reset: bool, poisoned: None
) -> None:
    cell = CELLS.get(name, CELL)
    trajectory, weights = ran(cell, steps, batch, units, "dense", reset)
    delta = torch.randn_like(trajectory.after)
    found = [assert_dual(cell, trajectory, weights, delta, exact=True) for _ in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["rgc", *CELLS])
def test_the_dual_form_by_threads_and_strides(
    name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough rows and units that threads share them, and that one takes them in more than one go."""
    cell = CELLS.get(name, CELL)
    trajectory, weights = ran(cell, 8, 17, 260, "dense", True)
    delta = torch.randn_like(trajectory.after)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found.append(assert_dual(cell, trajectory, weights, delta, exact=exact))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    turned = [
        a.transpose(-1, 1).contiguous().transpose(-1, 1)
        for a in (trajectory.x, trajectory.states, trajectory.saved, delta)
    ]
    assert trajectory.resets is not None
    resets = trajectory.resets.t().contiguous().t()
    other = [w.t().contiguous().t() for w in weights]
    carry = None if exact else torch.zeros(len(delta), 17, 520)[:, :, ::2]
    again = assert_dual(cell, Trajectory(*turned[:3], resets), other, turned[3], carry, exact=exact)
    torch.testing.assert_close(again, found[0], rtol=0, atol=0)
    # of one state alone
    apart = [delta[0], *[None] * (len(delta) - 1)]
    made = generated.loops(cell).dual(trajectory, weights, apart)
    want = assert_dual(cell, trajectory, weights, torch.stack([delta[0], *(0 * delta[1:])]))
    torch.testing.assert_close([*made[0], *made[1:]], want[: len(want) - len(weights)], rtol=0, atol=0)
    # δ of a sum, the batch first, and a window of steps
    batch_first = trajectory.x.transpose(1, 2).contiguous().transpose(1, 2)
    of_sum = torch.ones(()).expand(delta.shape)
    first = Trajectory(batch_first, trajectory.states, trajectory.saved, trajectory.resets)
    assert_dual(cell, first.window(2, 7), weights, of_sum[:, 2:7])


@pytest.mark.parametrize("name", ["rgc", *CELLS])
def test_what_is_not_finite_passes_no_reset_backward(name: str) -> None:
    cell = CELLS.get(name, CELL)
    trajectory, weights = ran(cell, 6, 2, 20, "dense", False)
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3, 0] = True
    delta = torch.randn_like(trajectory.after)
    delta[:, 4, 0, 7] = math.nan
    made = generated.loops(cell).dual(
        Trajectory(trajectory.x, trajectory.states, trajectory.saved, resets), weights, delta
    )
    for entering in (*made[0], *made[1]):
        lost = ~entering.isfinite()
        assert lost[3:5, 0, 7].all()
        assert lost.sum() == 2
    assert made[2].isfinite().all()


@pytest.mark.parametrize("shape", ["dense", "heads", "diagonal"])
def test_the_dual_forms_gradient_is_the_oracles(shape: str) -> None:
    """Of all leaves, against autograd of the graph that RFP is exact of; gradients don't share what they are."""
    x, weights, state, ds, dm = oracle.problem(9, 2, 18)
    size = {"dense": (18, 18), "heads": (3, 6, 6), "diagonal": (18,)}[shape]
    weights = [(0.2 * torch.randn(size, dtype=F64)).requires_grad_() for _ in weights]
    resets = torch.rand(9, 2) < 0.3
    s, m = oracle.rgc(x, weights, state, resets, through="own")
    want = torch.autograd.grad((s * ds + m * dm).sum(), [x, *weights, *state])
    leaves = [t.detach().to(F32).requires_grad_() for t in (x, *weights, *state)]
    for _ in range(2):  # gradients are added to those that are there
        s, m = rgc(leaves[0], *leaves[1:5], tuple(leaves[5:]), resets=resets, backend="compile")
        (s * ds.to(F32) + m * dm.to(F32)).sum().backward()
    got = [leaf.grad.clone() for leaf in leaves]
    assert oracle.relative([g.double() / 2 for g in got], want) < 1e-5
    for leaf, was in zip(leaves, got, strict=True):
        leaf.grad.mul_(3)
        torch.testing.assert_close(leaf.grad, 3 * was)
    torch.testing.assert_close([leaf.grad for leaf in leaves], [3 * g for g in got])


@pytest.mark.parametrize("name", CELLS)
def test_other_cells_by_threads_strides_and_what_is_not_finite(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, units = CELLS[name], 260
    x = torch.randn(3, 6, units, len(cell.per_unit)).movedim(-1, 0)  # its units apart
    x[0, 1, 2, 7] = math.nan
    x[-1, 0, 1, 9] = math.inf
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[2, 2] = True
    weights = [torch.randn(units, units).t() / units**0.5 for _ in cell.matrices]
    state = [torch.randn(6, units) for _ in cell.states]
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        made = operations.scan(cell, x, weights, state, resets, backend="compile")
        found.append(
            [made.states, made.saved, operations.linearize(cell, made, weights, backend="compile")[1]]
        )
    monkeypatch.undo()
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    want = cell.scan(x, weights, state, resets)
    m = operations.linearize(cell, want, weights)[1]
    torch.testing.assert_close(found[0], [want.states, want.saved, m], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[0][0][:, 3, 2].isfinite().all()  # what came before is forgotten there


def test_a_cell_of_ones_own_is_compiled_and_one_that_can_t_be_traced_is_torchs() -> None:
    class Squared(LSTMCell):
        def update(self, *given: Any) -> tuple[Tensor, ...]:
            return tuple(value.square() for value in super().update(*given))

    class Untraced(LSTMCell):
        def update(self, *given: Any) -> tuple[Tensor, ...]:
            return tuple(torch.special.i0(value) for value in super().update(*given))

    weights = [torch.randn(5, 5) for _ in range(4)]
    for cell in (LSTMCell(), Squared()):
        assert native_backend.compiled_loop(cell, weights, 9, 1)
        assert native_backend.compiled_partials(cell)
    with pytest.warns(UserWarning, match=r"Untraced runs in plain torch.*test_calls.py:\d+ .*i0"):
        assert not native_backend.compiled_loop(Untraced(), weights, 9, 1)


@pytest.mark.parametrize("packed_from", [1, 1 << 30])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_forward_loop_by_weights_packed_or_not_and_by_threads(
    packed_from: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "packs", lambda rows, units: rows >= packed_from)
    x, weights, state = given(3, 6, 210)  # so much that threads share a step
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = compiled(CELL).scan(x, weights, state, None)
    want = CELL.scan(x.double(), [w.double() for w in weights], [s.double() for s in state])
    torch.testing.assert_close(found[0].double(), want.states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), want.saved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("shape", ["dense", "heads", "diagonal"])
@pytest.mark.parametrize(("steps", "batch", "units"), [(1, 1, 2), (5, 3, 66), (40, 9, 100)])
def test_the_linearisation_is_torchs(steps: int, batch: int, units: int, shape: str, reset: bool) -> None:
    x, weights, state = given(steps, batch, units)
    if shape != "dense":
        weights = [torch.randn((units,) if shape == "diagonal" else (2, units // 2, units // 2))] * 4
    resets = torch.rand(steps, batch) < 0.4 if reset else None
    trajectory = CELL.scan(x, weights, state, resets)
    found = [
        operations.linearize(CELL, trajectory, weights, backend=backend) for backend in ("compile", "torch")
    ]
    (lin, m), (want, want_m) = found
    torch.testing.assert_close(m, want_m, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(lin.partials.__dict__.values(), want.partials.__dict__.values(), strict=True):
        torch.testing.assert_close(list(got), list(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lin.before, want.before, rtol=0, atol=0)


@pytest.mark.parametrize("states", [1, 2, 3])
@pytest.mark.parametrize(("steps", "batch", "units"), sizes())
def test_the_reverse_scan_is_torchs(states: int, steps: int, batch: int, units: int) -> None:
    m, delta = torch.randn(states, states, steps, batch, units) / 2, torch.randn(states, steps, batch, units)
    apart = m.movedim(2, 0).contiguous().movedim(0, 2), delta.movedim(1, 0).contiguous().movedim(0, 1)
    for carry in (None, torch.randn(states, batch, units)):
        exact = rfp.reverse_scan(m.double(), delta.double(), None if carry is None else carry.double())
        for one, other in ((m, delta), apart):
            got = operations.reverse_scan(one, other, carry, backend="compile")
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("refine", [0, 2])
def test_the_layers_gradient(learning: str, recompute: bool, refine: int) -> None:
    if learning == "bptt" and refine:
        pytest.skip("there is nothing to refine")
    x, weights, state, ds, dm = oracle.problem(7, 3, 17, dtype=F64)
    resets = torch.rand(7, 3) < 0.3
    found = []
    for dtype, backend in ((F64, "torch"), (F32, "compile")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *state)]
        s, m = rgc(
            leaves[0],
            *leaves[1:5],
            tuple(leaves[5:]),
            resets=resets,
            learning=learning,
            refine=refine,
            recompute=recompute,
            backend=backend,
        )
        found.append(torch.autograd.grad((s * ds.to(dtype) + m * dm.to(dtype)).sum(), leaves))
    assert oracle.relative([g.double() for g in found[1]], found[0]) < 1e-5


def test_auto_takes_them_and_torch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = RGC(8), torch.randn(5, 2, 8)
    learner = OnlineLearner(layer, 2, update_every=4, form="chunk")
    stepping = OnlineLearner(layer, 2, form="step")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's loop ran")

    monkeypatch.setattr(RGCCell, "scan", refuse)
    monkeypatch.setattr(rfp, "reverse_scan", refuse)
    monkeypatch.setattr(bptt, "credits", refuse)
    layer(x)[0].sum().backward()
    learner.chunk(x[:4]).sum().backward()
    stepping.step(x[0]).sum().backward()
    RGC(8, learning="bptt")(torch.randn(8, 2, 8))[0].sum().backward()
    with pytest.raises(AssertionError, match="torch's loop ran"):
        rgc(x, *layer.weights(), backend="torch")


def test_the_model_of_cost_knows_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(units: int, dtype: torch.dtype = F32, gpu: bool = False, batch: int = 1) -> cost.Problem:
        return counting.problem(RGC(units, device="meta", dtype=dtype), batch, dtype, gpu=gpu)

    def forward(batch: int) -> float:
        weights = [torch.empty(64, 64, device="meta")] * 4
        return parallel.forward_problem(CELL, weights, (50, batch, 64), F32, False, True).sequential().calls

    def compiled(problem: cost.Problem) -> tuple[bool, ...]:
        return problem.loop, problem.one_step, problem.partials, problem.reverse

    small = told(64)
    assert compiled(small) == (True, True, True, True)
    assert compiled(told(64, batch=16)) == (True, True, True, True)
    assert compiled(told(256, batch=16)) == (True, False, True, True)
    assert compiled(told(4096, batch=16)) == (True, False, True, False)
    assert compiled(told(64, batch=129)) == (False, False, True, True)
    assert not any(compiled(told(64, F64)))
    # on a GPU a step of few rows and the linearisation are launches of an RGC's own kernels, loops are calls
    assert compiled(told(64, gpu=True)) == (False, True, True, False)
    assert compiled(told(64, gpu=True, batch=16)) == (False, False, True, False)
    assert not any(compiled(told(64, F64, gpu=True)))
    assert forward(1) == cost.COMPILED_LOOP.calls
    assert forward(129) == 16 * 50
    assert small.linearize(50).calls == cost.COMPILED_LINEARIZE.calls
    assert small.credit(50).calls == cost.COMPILED_REVERSE.calls
    assert told(64, gpu=True).credit(50).calls > 100
    calls = [cost.loop_phase(one, 16).work.calls for one in (small, told(64, gpu=True))]
    assert calls[0] < calls[1] / 10
    monkeypatch.setattr(native_backend, "cpp_compiler", lambda: None)
    assert not any(compiled(told(64)))


def test_which_weights_are_packed() -> None:
    assert [calls.packs(rows, 255) for rows in (15, 16)] == [False, True]
    assert [calls.packs(rows, 256) for rows in (47, 48)] == [False, True]


def test_limits() -> None:
    def dense(units: int) -> list[Tensor]:
        return [torch.empty(units, units, device="meta")] * 4

    assert native_backend.compiled_loop(CELL, dense(4096), 50, 128)
    assert not native_backend.compiled_loop(CELL, dense(256), 50, 129)
    # of a few steps
    assert native_backend.compiled_loop(CELL, dense(4096), 1, 8)
    assert not native_backend.compiled_loop(CELL, dense(129), 1, 9)
    assert native_backend.compiled_loop(CELL, dense(128), 1, 9)
    assert native_backend.compiled_loop(CELL, dense(129), 4, 9)
    assert native_backend.compiled_loop(CELL, [torch.empty(8)] * 4, 50, 1)
    assert native_backend.compiled_loop(LSTMCell(), dense(8), 50, 1)
    assert native_backend.compiled_loop(LeakyCell(0.5), [torch.empty(8)], 50, 1)
    m, delta = torch.randn(1, 1, 2, 3, 1 << 13), torch.randn(1, 2, 3, 1 << 13)
    assert not native_backend.compiled_reverse(m[0, 0, 0].numel())
    torch.testing.assert_close(
        operations.reverse_scan(m, delta, backend="compile"), rfp.reverse_scan(m, delta)
    )


@pytest.mark.parametrize("layer", [RGC(6), RNN(6, 6)], ids=lambda layer: type(layer).__name__)
def test_under_torch_compile_with_a_full_graph(layer: Any) -> None:
    x = torch.randn(5, 2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, layer):
        layer.zero_grad()
        run(x)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_layer_that_ran_is_copied_and_pickled() -> None:
    layer, x = RGC(6), torch.randn(3, 1, 6)
    want = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x)[0], want, rtol=0, atol=0)


def _made(_: int) -> list[float]:
    torch.manual_seed(0)
    x, weights, state = given(4, 1, 5)
    return operations.scan(CELL, x, weights, state, backend="compile").states.flatten().tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_other_processes(method: str) -> None:
    want = _made(0)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_made, range(2)) == [want] * 2


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, which lie in memory with the other sign."""
    made = torch._neg_view(-tensor)
    assert made.is_neg()
    assert made.is_contiguous()
    return made


@pytest.mark.parametrize("where", ["x", "weights", "state", "delta", "zeros"])
@pytest.mark.parametrize("cell", [CELL, LSTMCell(), GRUCell()], ids=lambda cell: type(cell).__name__)
def test_numbers_that_lie_in_memory_with_the_other_sign(cell: Cell, where: str) -> None:
    """And torch's own zeros, which have no memory."""
    x = torch.randn(len(cell.per_unit), 4, 2, 6)
    weights, state = [torch.randn(6, 6) / 3 for _ in cell.matrices], [torch.randn(2, 6) for _ in cell.states]
    delta = torch.randn(len(state), 4, 2, 6)
    given = {"x": x, "weights": weights, "state": state, "delta": delta}
    if where == "zeros":
        given["x"], given["delta"] = (torch._efficientzerotensor(a.shape) for a in (x, delta))
        x, delta = torch.zeros_like(x), torch.zeros_like(delta)
    else:
        value = given[where]
        given[where] = [negated(one) for one in value] if isinstance(value, list) else negated(value)

    def found(backend: str, x: Any, weights: Any, state: Any, delta: Any) -> list[Tensor]:
        ran = operations.scan(cell, x, weights, state, backend=backend)
        lin, m = operations.linearize(cell, ran, weights, backend=backend)
        dual = operations.dual_of(
            cell, ran, weights, delta, cell.matrices, len(cell.per_unit), "rfp", backend=backend
        )
        exact = operations.exact_credits(cell, lin, weights, delta, backend=backend)
        joined = operations.exact_of(cell, ran, weights, delta, backend=backend)
        scanned = operations.reverse_scan(m, delta, backend=backend)
        return [ran.states, m, *dual[0], *dual[1:], *exact, *joined[0], *joined[1:], *scanned]

    got = found("compile", **given)
    want = found("torch", x, weights, state, delta)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_the_other_sign_reaches_the_sensitivity() -> None:
    for backend in ("compile", "torch"):
        torch.manual_seed(0)
        gammas = [torch.randn(2, 4, 5, 5) for _ in range(2)]
        m, phi, y = torch.randn(2, 2, 2, 5), torch.randn(2, 2, 4, 5), torch.randn(2, 4, 5)
        delta = negated(torch.randn(2, 2, 5))
        gradient = operations.gamma_step_(gammas, m, phi, y, delta, backend=backend)
        read = operations.gamma_read(gammas, delta, backend=backend)
        if backend == "compile":
            got = [*gammas, gradient, read]
    torch.testing.assert_close(got, [*gammas, gradient, read], rtol=1e-4, atol=1e-5)


def test_a_storage_that_was_freed_is_never_read() -> None:
    x, weights, state = given(4, 1, 5)
    weights[0].untyped_storage().resize_(0)
    assert native_backend._unusable(given=(x, *weights, *state)) == "a tensor has no memory"
    assert native_backend._unusable(given=(torch.empty(3, device="meta"),)) == "a tensor has no memory"


def test_a_step_down_the_gradient_of_weights_of_the_other_sign() -> None:
    """OnlineLearner(lr=…) writes weights where they lie."""
    found = []
    for turned in (False, True):
        torch.manual_seed(0)
        layer, x = RNN(5, 5), torch.randn(3, 2, 5)
        if turned:
            for name, weight in list(layer.named_parameters()):
                setattr(layer, name, torch.nn.Parameter(negated(weight.detach())))
            assert all(weight.is_neg() for weight in layer.parameters())
        learner = OnlineLearner(layer, 2, lr=0.1)
        for step in x:
            learner.step(step).square().sum().backward()
        found.append([weight.detach() + 0 for weight in layer.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    info = torch.finfo(dtype)
    finite = [0.0, -0.0, 1.0, info.max, info.min, info.tiny, info.tiny / 4]
    for size in (0, 1, 2, 7, 8, 33, 64, 65):
        arrays = [torch.tensor([*finite, *finite] * 5, dtype=dtype)[:size].clone() for _ in range(2)]
        assert native_backend.not_finite(*arrays) is False
        for array in arrays:
            for place in range(size):
                kept = array[place].item()
                array[place] = bad
                assert native_backend.not_finite(*arrays) is True
                array[place] = kept


def test_what_has_no_memory_of_its_own_is_not_given_to_it() -> None:
    class Other(Tensor):
        pass

    plain, other = torch.zeros(3), torch.zeros(3).as_subclass(Other)
    assert isinstance(native_backend.not_finite(plain, other), Refusal)
    zero = torch._efficientzerotensor((3,))  # its address is null
    assert native_backend.not_finite(zero, plain) is False


def test_arrays_of_another_cell_are_refused() -> None:
    """Compiled code would take what follows a table that is too short for addresses."""
    mine = compiled(CELL)
    x, weights, state = torch.zeros(1, 2, 1, 4), [torch.zeros(4, 4)] * 4, torch.zeros(2, 1, 4)
    trajectory = Trajectory(x, *mine.scan(x, weights, state.unbind(0), None), None)
    before, one_less = trajectory.before, weights[:3]
    for run in (
        lambda: mine.scan(x.expand(2, -1, -1, -1), weights, state.unbind(0), None),
        lambda: mine.scan(x, weights, state.unbind(0)[:1], None),
        lambda: mine.step(x, one_less, state, None, "rfp"),
        lambda: mine.linearize(trajectory, before, one_less, "rfp"),
        lambda: mine.dual(trajectory, one_less, [None, None]),
    ):
        with pytest.raises(
            ValueError, match=r"of RGCCell takes \d+ arrays, got \d+: inputs, weights or states"
        ):
            run()
    layer = LSTM(2, 3)
    learner = OnlineLearner(layer, 1)
    layer.cell = GRUCell()
    with pytest.raises(ValueError, match=r"of GRUCell takes \d+ arrays"):
        learner.step(torch.zeros(1, 2))
