"""A cell's expressions: what is traced, what is refused and with which words, and that they are torch's own."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_cell import CELLS, by_smooth_cell, random_point
from torch import Tensor

from rjepa_triton import TwoPointRNN
from rjepa_triton.cells.builtin import ElmanCell, LeakyCell, LSTMCell
from rjepa_triton.cells.trace import traced, why_not
from rjepa_triton.cells.two_point import Cell, Matrix, Partials, verify

F64 = torch.float64


class Own(Cell):
    """A cell of one state whose update is `f` of its pre-activation, input and state."""

    states, gates = ("h",), ("g",)
    matrices = (Matrix("w", ("gate", 0), 0),)

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        self.f = f

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.f(p[0] + x[0]) + 0.5 * c[0],)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda a: F.gelu(a, approximate="tanh"),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "leaky relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softsign": F.softsign,
    "threshold": lambda a: F.threshold(a, 0.1, 20.0),
    "power": lambda a: a.abs() ** 1.5 + a**3 + a**2,
    "square root": lambda a: (a * a + 1).sqrt() + (a * a + 2).rsqrt(),
    "waves": lambda a: a.sin() * a.cos(),
    "exponentials": lambda a: torch.exp(-a * a) + torch.expm1(-a.abs()) + torch.log1p(a.abs()) + (a * a + 1).log(),
    "choice": lambda a: torch.where((a > 0) & ~(a > 1) | (a < -2), a, 2 * a),
    "clamp": lambda a: torch.clamp(a, -1, 1) + a.clamp_min(0.2) + a.clamp_max(0.3),
    "maximum": lambda a: torch.maximum(a, 0.5 * a) + torch.minimum(a, a * a),
    "fused": lambda a: torch.addcmul(a, a, a, value=2) + torch.lerp(a, a * a, 0.3),
    "reverse": lambda a: 1 - a + 2 / (1 + a * a) - a.neg(),
    "truth": lambda a: (a > 0) * a + (a > 0.3).to(a.dtype),
    "detached": lambda a: a.detach() * a + (a - a.detach()) + (a > 0).to(a.dtype).detach(),
    "erf": torch.erf,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_update_s_partials_are_those_of_autograd(name: str) -> None:
    """Forward and derivatives, which `_compare` checked, once more and elsewhere; and that torch runs the expressions."""
    cell = Own(FUNCTIONS[name])
    assert why_not(cell) is None
    point = [[3 * torch.randn(5, 7, dtype=F64).requires_grad_() for _ in group] for group in ("c", "p", "x")]
    (after,) = cell.update(*point)
    want = torch.autograd.grad(after.sum(), [group[0] for group in point], allow_unused=True)
    found = cell.partials(*[[value.detach() for value in group] for group in point])
    for by_state, slope in zip((found.own[0], found.gate[0], found.input[0]), want, strict=True):
        zero = torch.zeros(5, 7, dtype=F64)
        torch.testing.assert_close(
            by_state.get(0, zero), zero if slope is None else slope, rtol=1e-6, atol=1e-9
        )


@by_smooth_cell
def test_every_cell_s_partials_at_large_arguments(cell: Cell) -> None:
    """Over ±30, in float32, against float64: as near as torch's own automatic derivatives, and finite."""
    wide = [
        torch.linspace(-30, 30, 241)[torch.randperm(241)] for group in random_point(cell, (1,)) for _ in group
    ]
    counts = [len(group) for group in random_point(cell, (1,))]
    groups = [wide[: counts[0]], wide[counts[0] : sum(counts[:2])], wide[sum(counts[:2]) :]]
    if len(cell.per_unit) == 4 and not cell.gates:  # ν and θ of an LRU: exp(exp(30)) is no number
        groups[2][2:] = [value / 30 for value in groups[2][2:]]
    found = cell.partials(*groups)
    exact = cell.automatic_partials(*[[value.double() for value in group] for group in groups])
    for kind in ("own", "gate", "input"):
        for ours, theirs in zip(getattr(found, kind), getattr(exact, kind), strict=True):
            for nu, want in theirs.items():
                got = ours.get(nu, torch.zeros(241))
                assert got.isfinite().all()
                error = (got.double() - want).abs() / (1 + want.abs())
                assert float(error.max()) < 2e-6 * max(1.0, float(max(w.abs().max() for w in wide)))


def refused(f: Callable[[Tensor], Any]) -> str:
    reason = why_not(Own(f))
    assert reason is not None
    return reason


def in_place(a: Tensor) -> Tensor:
    b = a + 1
    return b.tanh_()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return (a > 0).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_what_can_t_be_traced_is_named_with_its_line() -> None:
    assert "test_trace.py:" in (told := refused(lambda a: a.cumsum(-1)))
    assert "calls cumsum, which has no rule" in told
    assert "calls tanh_, which changes a tensor in place" in refused(in_place)
    assert "b.tanh_()" in refused(in_place)
    assert "reads a tensor's value" in refused(lambda a: a if a[0, 0] > 0 else -a)
    assert "of shape (2, 3) that isn't one number" in refused(lambda a: a * torch.arange(6.0).view(2, 3))
    assert "autograd.Function has a derivative of its own" in refused(Rounded.apply)
    assert "calls i0, which has no rule" in refused(torch.special.i0)


def test_a_cell_that_can_t_be_traced_works_with_one_warning() -> None:
    def make() -> TwoPointRNN:
        layer = TwoPointRNN(Own(torch.special.i0e), 4, dtype=F64)
        layer(torch.randn(5, 2, 4, dtype=F64))[0].sum().backward()
        return layer

    with pytest.warns(UserWarning, match="Own runs in plain torch, with the same results and slower") as told:
        layer = make()
    assert len(told) == 1
    weight = layer.get_parameter("weight_w")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_mixing_units_is_an_error_that_names_the_operation() -> None:
    with pytest.raises(ValueError, match=r"Own is not a two-point cell.*test_trace.py:\d+ .* calls cumsum"):
        verify(Own(lambda a: a.cumsum(-1)))
    with pytest.raises(ValueError, match="must give 1 states of float64"):
        verify(Own(lambda a: (a + 0.0).float().to(torch.complex128)))


class Spiking(Cell):
    """A threshold with a surrogate derivative."""

    states, gates = ("v",), ("g",)
    matrices = (Matrix("w", ("gate", 0), 0),)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        spike = (c[0] > 1).to(c[0].dtype)
        return (0.9 * c[0] + p[0] + x[0] - spike,)

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        one = torch.ones_like(c[0])
        surrogate = 0.3 * torch.clamp(1 - (c[0] - 1).abs(), 0)
        return Partials(own=[{0: 0.9 - surrogate}], gate=[{0: one}], input=[{0: one}])


def test_a_surrogate_derivative_is_traced_from_the_cell_s_own_partials() -> None:
    cell = Spiking()
    found = traced(cell)
    assert found is not None
    point = random_point(cell, (4, 5))
    torch.testing.assert_close(found.partials_at(*point).own[0][0], cell.partials(*point).own[0][0])
    assert found.graph.value(found.partials["gate", 0, 0]) == 1


def test_zeros_are_known_and_what_is_equal_is_one_dict() -> None:
    cell = LSTMCell()
    found = cell.partials(*random_point(cell, (3,)))
    assert found.own[0] == {}  # h doesn't reach the new state but through matrices
    assert set(found.gate[3]) == {0}  # o doesn't enter c
    assert all(gate is given for gate, given in zip(found.gate, found.input, strict=True))


def test_an_attribute_that_changes_changes_the_trace() -> None:
    cell, point = LeakyCell(0.25), random_point(LeakyCell(0.5), (3,))
    first = cell.partials(*point).own[0][0]
    cell.alpha = 0.5
    assert torch.equal(first, torch.full((3,), 0.75, dtype=F64))
    assert torch.equal(cell.partials(*point).own[0][0], torch.full((3,), 0.5, dtype=F64))


def test_cells_of_one_class_and_value_share_a_trace_and_copies_work() -> None:
    assert traced(ElmanCell()) is traced(ElmanCell())
    assert traced(ElmanCell()) is not traced(ElmanCell("relu"))
    cell = LSTMCell()
    point = random_point(cell, (3,))
    want = cell.partials(*point).gate[0][1]
    for other in (copy.copy(cell), copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert torch.equal(other.partials(*point).gate[0][1], want)


def test_modes_of_the_caller_don_t_reach_the_trace() -> None:
    class Fresh(LSTMCell):
        pass

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert traced(Fresh()) is not None


def test_no_cell_of_the_package_is_untraced() -> None:
    assert [name for name, cell in CELLS.items() if why_not(cell)] == []
