"""Every kind of cell that tests run: the built-in ones, and one in which matrices of two states enter one gate."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rjepa_triton.cells import builtin
from rjepa_triton.cells.two_point import Cell, Matrix

F64 = torch.float64


class SharedGate(Cell):
    """A cell with two matrices, each reading one of its two states, that enter the same gate."""

    states = ("u", "v")
    gates = ("g",)
    matrices = (Matrix("u", ("gate", 0), 0), Matrix("v", ("gate", 0), 1))

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        u = torch.tanh(p[0] + x[0])
        return u, 0.5 * c[1] + 0.5 * u * c[0]


CELLS: dict[str, Cell] = {
    "elman-tanh": builtin.ElmanCell(),
    "elman-relu": builtin.ElmanCell("relu"),
    "leaky": builtin.LeakyCell(0.3),
    "leaky-relu": builtin.LeakyCell(1.0, "relu"),
    "lstm": builtin.LSTMCell(),
    "gru": builtin.GRUCell(),
    "gru-without-bias": builtin.GRUCell(bias=False),
    "mgu": builtin.MGUCell(),
    "min-lstm": builtin.MinLSTMCell(),
    "min-gru": builtin.MinGRUCell(),
    "elstm": builtin.ELSTMCell(),
    "time-decay": builtin.TimeDecayCell(),
    "lru": builtin.LRUCell(),
    "rtu": builtin.LRUCell("relu"),
    "rgc": builtin.RGCCell(),
    "shared-gate": SharedGate(),
    "lif": builtin.LIFCell(0.9),
    "alif": builtin.ALIFCell(0.9, 0.8, 0.5, 0.95, 0.3),
}
# Those whose partials are the derivatives of `update`, and not a surrogate.
SMOOTH = {name: cell for name, cell in CELLS.items() if not isinstance(cell, builtin.LIFCell)}
by_smooth_cell = pytest.mark.parametrize("cell", SMOOTH.values(), ids=SMOOTH.keys())
by_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
# The shapes that a recurrent weight may have, for N = 6.
SHAPES = {"dense": (6, 6), "blocks": (3, 2, 2), "diagonal": (6,)}


def random_point(cell: Cell, shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return tuple(
        [torch.randn(shape, dtype=F64) for _ in names] for names in (cell.states, cell.gates, cell.per_unit)
    )  # type: ignore[return-value]


def problem(
    cell: Cell, shape: str, steps: int = 6, batch: int = 2
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """x, weights, state, which all require gradients, and δ of all states."""
    weights = [(torch.randn(SHAPES[shape], dtype=F64) * 0.4).requires_grad_() for _ in cell.matrices]
    x = torch.randn(len(cell.per_unit), steps, batch, 6, dtype=F64).requires_grad_()
    state = [torch.randn(batch, 6, dtype=F64).requires_grad_() for _ in cell.states]
    return x, weights, state, torch.randn(len(cell.states), steps, batch, 6, dtype=F64)
