"""Γ's recursion compiled for the CPU: what float64 gives, whatever the shape, the dtype and the number of threads."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.backend import operations
from rjepa_triton.backend.descent import Descent
from rjepa_triton.backend.native import calls, library
from rjepa_triton.cells.builtin import ElmanCell, GRUCell, LSTMCell, RGCCell
from rjepa_triton.cells.two_point import Cell, Matrix
from rjepa_triton.online.sensitivity import PerUnit
from rjepa_triton.online.tape import linearized
from rjepa_triton.rules import rfp

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 3e-6, F64: 1e-13}

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is what it was after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Problem:
    """Γ of S states, B rows, K matrices, N units, M numbers a unit, and C steps; Y as in `rfp.rows_read`."""

    def __init__(self, states: int, batch: int, count: int, units: int, fan_in: int, reads: int, steps: int):
        torch.manual_seed(0)
        self.gammas = [torch.randn(batch, count, units, fan_in, dtype=F64) for _ in range(states)]
        # forgets, so that sums over many steps stay of the terms' size
        self.m = min(0.4, 0.8 / states) * torch.randn(states, states, steps, batch, units, dtype=F64)
        self.phi = torch.randn(states, steps, batch, count, units, dtype=F64)
        self.y = torch.randn(steps, batch, count, reads, dtype=F64)
        self.credit = torch.randn(states, batch, units, dtype=F64)

    def run(self, what: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        """Γ and, if there is one, the gradient."""
        gammas = [gamma.to(dtype, copy=True) for gamma in self.gammas]
        m, phi, y, credit = (a.to(dtype) for a in (self.m, self.phi, self.y, self.credit))
        asked = None if what.startswith("move") else credit
        if what == "read":
            found = operations.gamma_read(gammas, credit, backend=backend)
        elif what.endswith("chunk"):
            found = operations.gamma_chunk_(gammas, m, phi, y, asked, backend=backend)
        else:
            found = operations.gamma_step_(gammas, m[:, :, 0], phi[:, 0], y[0], asked, backend=backend)
        assert (found is None) == (asked is None)
        return gammas if found is None else [*gammas, found]

    def magnitudes(self, what: str) -> list[Tensor]:
        """What `run` gives if no terms cancel. Rounding is of that size, however small a sum is."""
        sizes = copy.copy(self)
        sizes.gammas = [gamma.abs() for gamma in self.gammas]
        sizes.m, sizes.phi, sizes.y, sizes.credit = (a.abs() for a in (self.m, self.phi, self.y, self.credit))
        return sizes.run(what, F64, "torch")

    def check(self, what: str, dtype: torch.dtype) -> None:
        results = self.run(what, dtype, "compile"), self.run(what, F64, "torch"), self.magnitudes(what)
        for got, want, magnitude in zip(*results, strict=True):
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert bool(((got - want).abs() <= TOLERANCE[dtype] * magnitude).all())


WHAT = ("step", "chunk", "read", "move step", "move chunk")


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("states", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("batch", "count", "units", "fan_in", "reads", "steps"),
    [
        (1, 1, 1, 1, 1, 1),
        (3, 4, 17, 17, 17, 5),
        (2, 3, 12, 4, 12, 7),  # heads of 4 units, which read their own
        (2, 2, 20, 5, 20, 2),  # heads across which rows that are gone through together lie
        (2, 2, 9, 1, 9, 3),  # one number a unit
        (2, 2, 9, 2100, 2100, 3),  # rows longer than a tile
        (1, 5, 127, 63, 63, 70),  # more steps than are summed at once
    ],
)
def test_it_is_what_float64_gives(
    what: str,
    dtype: torch.dtype,
    states: int,
    batch: int,
    count: int,
    units: int,
    fan_in: int,
    reads: int,
    steps: int,
) -> None:
    Problem(states, batch, count, units, fan_in, reads, steps).check(what, dtype)


@settings(max_examples=40, deadline=None)
@drawn(st.data())
def test_any_shape(data: st.DataObject) -> None:
    def size(most: int) -> int:
        return data.draw(st.integers(1, most))

    head = size(9)
    units, kind = head * size(9), data.draw(st.sampled_from(("dense", "heads", "one")))
    fan_in, reads = {"dense": (size(70),) * 2, "heads": (head, units), "one": (1, units)}[kind]
    problem = Problem(size(4), size(4), size(5), units, fan_in, reads, size(9))
    problem.check(data.draw(st.sampled_from(WHAT)), data.draw(st.sampled_from((F32, F64))))


@pytest.mark.parametrize("what", WHAT)
def test_threads_change_no_bit(what: str, threads: None) -> None:
    problem = Problem(2, 3, 4, 65, 130, 130, 20)
    assert problem.gammas[0].numel() > 1 << 16  # so many that threads share them
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(problem.run(what, F32, "compile"))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_strides_of_all_but_gamma_don_t_matter() -> None:
    p = Problem(2, 3, 4, 17, 17, 17, 5)
    turned = [a.transpose(-1, -2).contiguous().transpose(-1, -2) for a in (p.m, p.phi, p.y, p.credit)]
    want = p.run("chunk", F64, "compile")
    p.m, p.phi, p.y, p.credit = turned
    torch.testing.assert_close(p.run("chunk", F64, "compile"), want, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    p = Problem(2, 2, 3, 9, 11, 11, 4)
    p.gammas[0][1, 2, 5, 7] = value
    for got, want in zip(p.run("chunk", F32, "compile"), p.run("chunk", F64, "torch"), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("states", [1, 2, 3, 4])
def test_what_steps_add_at_their_end(states: int, dtype: torch.dtype) -> None:
    p = Problem(states, 3, 4, 65, 1, 65, 9)
    suffix, whole = rfp.suffix_products(p.m)
    made = calls.arriving(p.m.to(dtype), p.phi.to(dtype))
    assert made is not None
    for got, want in zip(made, (rfp.arriving(suffix, p.phi), whole), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5 if dtype == F32 else 1e-12, atol=1e-6)


def test_five_states_are_torchs() -> None:
    why = operations.choose_gamma("auto", torch.device("cpu"), F32, F32, 5)
    assert why == ("torch", "compiled code takes up to 4 states a unit, got 5")
    with pytest.raises(ValueError, match="'compile' can't run: compiled code takes up to 4 states a unit"):
        operations.choose_gamma("compile", torch.device("cpu"), F32, F32, 5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("name", ["rgc", "lstm", "gru", "elman"])
def test_steps_take_immediates_and_signals_where_they_lie(
    name: str, with_delta: bool, dtype: torch.dtype
) -> None:
    cell: Cell = {"rgc": RGCCell, "lstm": LSTMCell, "gru": GRUCell, "elman": ElmanCell}[name]()
    torch.manual_seed(0)
    steps, batch, units, features = 5, 3, 17, 6
    x = torch.randn(len(cell.per_unit), steps, batch, units, dtype=F64)
    # a dense one, a diagonal one, and what reads the layer's input and 1
    weights = [0.3 * torch.randn(units, units, dtype=F64) for _ in cell.matrices]
    weights[-1] = weights[-1].diagonal().clone()
    state = [torch.randn(batch, units, dtype=F64) for _ in cell.states]
    resets = torch.rand(steps, batch) < 0.3
    delta = torch.randn(len(cell.states), steps, batch, units, dtype=F64) if with_delta else None
    inputs = torch.randn(steps, batch, features, dtype=F64)
    matrices = (*cell.matrices, Matrix("in", ("input", 0), "input"), Matrix("bias", ("input", 0), "one"))
    all_weights = [*weights, torch.zeros(units, features, dtype=F64), torch.zeros(units, dtype=F64)]

    def run(dtype: torch.dtype, backend: str, descends: bool = False) -> list[Tensor]:
        """Γ and both gradients; where the weights descend by 1, of which one stays, those in place of gradients."""
        given = [w.to(dtype) for w in weights]
        trajectory = cell.scan(x.to(dtype), given, [c.to(dtype) for c in state], resets)
        block = linearized(cell, trajectory, given, inputs.to(dtype))
        held = [torch.zeros_like(w, dtype=dtype) for w in all_weights]
        gamma = PerUnit(matrices, held, len(cell.states), batch, dtype, backend)
        credit = None if delta is None else delta.to(dtype)
        if descends:
            descent = Descent([None, *held[1:]], torch.ones(1, dtype=dtype))
            for _ in range(2):
                assert gamma.step_(block, credit, descent) is None
            return [*gamma.tensors(), *held]
        # the second time from a Γ that isn't zero
        found = [gamma.step_(block, credit) or [] for _ in range(2)]
        return [*gamma.tensors(), *found[0], *found[1]]

    def compare(got: list[Tensor], want: list[Tensor]) -> None:
        for value, wanted in zip(got, want, strict=True):
            scale = float(wanted.abs().max())
            assert float((value.double() - wanted).abs().max()) <= 5 * TOLERANCE[dtype] * scale

    want = run(F64, "torch")
    assert all(bool(wanted.any()) for wanted in want)
    compare(run(dtype, "compile"), want)
    count = len(all_weights)
    gammas, first, second = want[: len(want) - 2 * count], want[-2 * count : -count], want[-count:]
    if delta is None:
        gammas, first, second = want, [torch.zeros(1)] * count, [torch.zeros(1)] * count
    moved = [-a - b for a, b in zip(first, second, strict=True)]
    compare(run(dtype, "compile", descends=True), [*gammas, moved[0] * 0, *moved[1:]])
