"""A cell's closed forms, and that the abstraction fits other two-point cells."""

from __future__ import annotations

from collections.abc import Sequence

import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton.cells import Cell, Matrix, RGCCell
from rjepa_triton.functional import two_point

F64 = torch.float64


class Elman(Cell):
    """h = tanh(W h' + x)."""

    states = ("h",)
    gates = ("hh",)
    matrices = (Matrix("hh", ("gate", 0), 0),)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.tanh(p[0] + x[0]),)


class LSTM(Cell):
    """torch.nn.LSTM's update; its four gates' input parts are four per-unit inputs."""

    states = ("h", "c")
    gates = ("i", "f", "g", "o")
    inputs = ("i", "f", "g", "o")
    matrices = tuple(Matrix(name, ("gate", j), 0) for j, name in enumerate("ifgo"))

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        i, f, g, o = (a + b for a, b in zip(p, x, strict=True))
        cell = f.sigmoid() * c[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class SharedGate(Cell):
    """Two states that enter one gate through two matrices."""

    states = ("u", "v")
    gates = ("g",)
    matrices = (Matrix("u", ("gate", 0), 0), Matrix("v", ("gate", 0), 1))

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        u = torch.tanh(p[0] + x[0])
        return u, 0.5 * c[1] + 0.5 * u * c[0]


CELLS = [Elman(), LSTM(), SharedGate(), RGCCell()]


def random_point(cell: Cell, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return tuple(
        [torch.randn(shape, dtype=F64) for _ in names] for names in (cell.states, cell.gates, cell.inputs)
    )  # type: ignore[return-value]


def test_rgc_closed_form_agrees_with_the_automatic_partials() -> None:
    cell = RGCCell()
    point = random_point(cell, (3, 4, 5))
    closed, automatic = cell.partials(*point), cell.automatic_partials(*point)
    for kind in ("own", "gate", "input"):
        for given, full in zip(getattr(closed, kind), getattr(automatic, kind), strict=True):
            for nu, value in full.items():
                got = given.get(nu, torch.zeros_like(value))
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_automatic_partials_agree_with_finite_differences(cell: Cell) -> None:
    point = random_point(cell, (2, 3))
    partials = cell.automatic_partials(*point)
    step = 1e-6
    for which, entries in enumerate((partials.own, partials.gate, partials.input)):
        for j, by_state in enumerate(entries):
            moved = []
            for sign in (1, -1):
                shifted = [list(group) for group in point]
                shifted[which][j] = shifted[which][j] + sign * step
                moved.append(cell.update(*shifted))
            for nu, value in by_state.items():
                difference = (moved[0][nu] - moved[1][nu]) / (2 * step)
                torch.testing.assert_close(value, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
def test_rgc_scan_agrees_with_the_generic_one(diagonal: bool) -> None:
    x, weights, state, _, _ = oracle.problem(6, 3, 5, diagonal=diagonal)
    resets = torch.rand(6, 3) < 0.3
    cell = RGCCell()
    fast = cell.scan(x[None].detach(), weights, state, resets)
    plain = Cell.scan(cell, x[None].detach(), weights, state, resets)
    torch.testing.assert_close(fast.states, plain.states, rtol=1e-12, atol=1e-12)
    want = Cell.linearize(cell, plain).partials
    got = cell.linearize(fast).partials
    for kind in ("own", "gate", "input"):
        for by_state, plainly in zip(getattr(got, kind), getattr(want, kind), strict=True):
            for nu, value in by_state.items():
                torch.testing.assert_close(value, plainly[nu], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mixed", [(0,), (1, 2), (0, 1, 2, 3)])
def test_rgc_takes_diagonal_and_dense_weights_together(mixed: tuple[int, ...]) -> None:
    x, weights, state, delta, _ = oracle.problem(5, 2, 4)
    for k in mixed:
        weights[k] = torch.randn(4, dtype=F64).requires_grad_()
    for learning, through in (("rfp", "own"), ("bptt", "full"), ("rtrl", "full")):
        s = two_point(RGCCell(), x[None], weights, state, learning=learning)[0]
        got = torch.autograd.grad((s * delta).sum(), weights)
        want = torch.autograd.grad((oracle.rgc(x, weights, state, None, through)[0] * delta).sum(), weights)
        assert oracle.relative(got, want) < 1e-12


def through_own(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], through: str
) -> Tensor:
    """The cell as a plain loop: the states stacked, (S, T, B, N)."""
    c = list(state)
    out = []
    for t in range(x.shape[1]):
        p = [torch.zeros_like(c[0]) for _ in cell.gates]
        for matrix, weight in zip(cell.matrices, weights, strict=True):
            p[matrix.into[1]] = p[matrix.into[1]] + oracle.matvec(weight, c[matrix.reads], through)
        c = list(cell.update(c, p, x[:, t].unbind()))
        out.append(torch.stack(c))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_every_cell_learns_by_every_rule(cell: Cell, diagonal: bool) -> None:
    steps, batch, units = 6, 2, 4
    shape = (units,) if diagonal else (units, units)
    weights = [(torch.randn(shape, dtype=F64) * 0.4).requires_grad_() for _ in cell.matrices]
    x = torch.randn(len(cell.inputs), steps, batch, units, dtype=F64, requires_grad=True)
    state = [torch.randn(batch, units, dtype=F64).requires_grad_() for _ in cell.states]
    delta = torch.randn(len(cell.states), steps, batch, units, dtype=F64)
    leaves = [x, *state, *weights]
    for learning, through in (("rfp", "own"), ("bptt", "full"), ("rtrl", "full")):
        out = torch.stack(two_point(cell, x, weights, state, learning=learning))
        plain = through_own(cell, x, weights, state, through)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((out * delta).sum(), leaves)
        want = torch.autograd.grad((plain * delta).sum(), leaves)
        assert oracle.relative(got, want) < 1e-12


def test_a_matrix_of_a_cell_must_read_a_state() -> None:
    class Wrong(Elman):
        matrices = (Matrix("hh", ("gate", 0), "input"),)

    with pytest.raises(ValueError, match="'hh' of a cell must read a state"):
        Wrong().scan(torch.zeros(1, 1, 1, 2), [torch.zeros(2, 2)], [torch.zeros(1, 2)])
