"""Every built-in cell: its closed forms, and every learning rule against autograd of plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import closed_forms
import oracle
import pytest
import torch
from every_cell import CELLS, SHAPES, by_cell, problem, random_point
from torch import Tensor

from rjepa_triton import functional
from rjepa_triton.cells.builtin import (
    ElmanCell,
    LeakyCell,
    LRUCell,
    RGCCell,
)
from rjepa_triton.cells.two_point import Cell

F64 = torch.float64


def plain(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None,
    through: str,
) -> Tensor:
    """Run the cell as a plain loop, and return its states (S, T, B, N). through: as in `oracle.matvec`."""
    c = list(state)
    out = []
    for t in range(x.shape[1]):
        if resets is not None:
            c = [torch.where(resets[t][:, None], torch.zeros_like(value), value) for value in c]
        p = [torch.zeros_like(c[0]) for _ in cell.gates]
        for matrix, weight in zip(cell.matrices, weights, strict=True):
            p[matrix.into[1]] = p[matrix.into[1]] + oracle.matvec(weight, c[matrix.reads], through)
        c = list(cell.update(c, p, x[:, t].unbind()))
        out.append(torch.stack(c))
    return torch.stack(out, dim=1)


@by_cell
def test_partials_agree_with_automatic_differentiation_and_closed_forms(cell: Cell) -> None:
    point = random_point(cell, (3, 4, 5))
    found = cell.partials(*point)
    oracles = [cell.automatic_partials(*point)]
    if type(cell) in closed_forms.FORMS:
        oracles.append(closed_forms.FORMS[type(cell)](cell, *point))
    for kind, names in (("own", cell.states), ("gate", cell.gates), ("input", cell.per_unit)):
        assert len(getattr(found, kind)) == len(names)
        for oracle_ in oracles:
            for given, full in zip(getattr(found, kind), getattr(oracle_, kind), strict=True):
                for nu in given.keys() | full.keys():
                    pair = [of.get(nu, torch.zeros(3, 4, 5, dtype=F64)) for of in (given, full)]
                    assert pair[0].shape == pair[1].shape
                    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@by_cell
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
                torch.testing.assert_close(value, difference, rtol=1e-6, atol=1e-8)


@by_cell
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reset", [False, True])
def test_every_rule_against_autograd(cell: Cell, shape: str, reset: bool) -> None:
    x, weights, state, delta = problem(cell, shape)
    resets = torch.rand(6, 2) < 0.3 if reset else None
    leaves = [x, *state, *weights]
    rules: dict[str, tuple[str, Any]] = {
        "rfp": ("own", 0),
        "eprop": ("none", 0),
        "bptt": ("full", 0),
        "rtrl": ("full", 0),
    }
    for learning, (through, refine) in rules.items():
        out = torch.stack(
            functional.two_point(cell, x, weights, state, resets=resets, learning=learning, refine=refine)
        )
        want_out = plain(cell, x, weights, state, resets, through)
        torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad((out * delta).sum(), leaves)
        want = torch.autograd.grad((want_out * delta).sum(), leaves, materialize_grads=True)
        assert oracle.relative(got, want) < 1e-12, learning


@by_cell
@pytest.mark.parametrize("shape", SHAPES)
def test_refined_to_the_end_is_exact(cell: Cell, shape: str) -> None:
    x, weights, state, delta = problem(cell, shape)
    resets = torch.rand(6, 2) < 0.2
    leaves = [x, *state, *weights]
    out = torch.stack(functional.two_point(cell, x, weights, state, resets=resets, refine="exact"))
    got = torch.autograd.grad((out * delta).sum(), leaves)
    want_out = plain(cell, x, weights, state, resets, "full")
    want = torch.autograd.grad((want_out * delta).sum(), leaves, materialize_grads=True)
    assert oracle.relative(got, want) < 1e-8


@by_cell
@pytest.mark.parametrize("shape", SHAPES)
def test_all_steps_at_once_agree_with_one_by_one(cell: Cell, shape: str) -> None:
    x, weights, state, _ = problem(cell, shape)
    resets = torch.rand(6, 2) < 0.3
    trajectory = cell.scan(x.detach(), weights, state, resets)
    after, saved = cell.evaluate(x.detach(), trajectory.before, weights)
    torch.testing.assert_close(after, trajectory.after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(saved, trajectory.saved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rgc_scan_agrees_with_the_generic_one(shape: str) -> None:
    cell = CELLS["rgc"]
    x, weights, state, _ = problem(cell, shape)
    resets = torch.rand(6, 2) < 0.3
    fast = cell.scan(x.detach(), weights, state, resets)
    generic = Cell.scan(cell, x.detach(), weights, state, resets)
    torch.testing.assert_close(fast.states, generic.states, rtol=1e-12, atol=1e-12)
    want = Cell.linearize(cell, generic).partials
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
        s = functional.two_point(RGCCell(), x[None], weights, state, learning=learning)[0]
        got = torch.autograd.grad((s * delta).sum(), weights)
        want = torch.autograd.grad((oracle.rgc(x, weights, state, None, through)[0] * delta).sum(), weights)
        assert oracle.relative(got, want) < 1e-12


@pytest.mark.parametrize(
    "cell", [CELLS["lru"], CELLS["time-decay"], CELLS["elstm"]], ids=lambda c: type(c).__name__
)
def test_cells_without_paths_between_units_learn_exactly(cell: Cell) -> None:
    x, weights, state, delta = problem(cell, "diagonal", steps=40)
    leaves = [x, *state, *weights]
    grads = []
    for learning in ("rfp", "bptt"):
        out = torch.stack(functional.two_point(cell, x, weights, state, learning=learning))
        grads.append(torch.autograd.grad((out * delta).sum(), leaves))
    assert oracle.relative(*grads) < 1e-10


def test_rules_that_drop_parts_of_m() -> None:
    """rflo keeps each state's own leak, so it equals e-prop on a leaky cell, where A is that leak; snap0 is δ φ yᵀ."""
    leaky = CELLS["leaky"]
    x, weights, state, delta = problem(leaky, "dense")
    grads = {}
    for learning in ("eprop", "rflo", "snap0"):
        (h,) = functional.two_point(leaky, x, weights, state, learning=learning)
        grads[learning] = torch.autograd.grad((h * delta[0]).sum(), weights)
    assert oracle.relative(grads["rflo"], grads["eprop"]) == 0
    before = torch.cat([state[0][None], plain(leaky, x, weights, state, None, "full")[0, :-1]])
    slope = 0.3 * (1 - torch.tanh(before @ weights[0].T + x[0]).square())
    want = torch.einsum("tbi,tbj->ij", delta[0] * slope, before)
    torch.testing.assert_close(grads["snap0"][0], want)
    assert oracle.relative(grads["rflo"], grads["snap0"]) > 0.1


def test_lstm_tells_rflo_from_eprop() -> None:
    """In an LSTM h depends on the previous c, but not through A on the previous h; rflo drops that path from h's trace."""
    x, weights, state, delta = problem(CELLS["lstm"], "dense")
    delta = delta.clone()
    delta[1] = 0
    grads = []
    for learning in ("eprop", "rflo"):
        out = torch.stack(functional.two_point(CELLS["lstm"], x, weights, state, learning=learning))
        grads.append(torch.autograd.grad((out * delta).sum(), weights))
    assert oracle.relative(*grads) > 0.1


def test_the_decay_of_an_lru_starts_on_its_ring() -> None:
    cell = LRUCell(r_min=0.4, r_max=0.8, max_phase=1.0)
    own = cell.initial_parameters(1000)
    modulus = torch.exp(-torch.exp(own["nu"]))
    assert 0.4 <= float(modulus.min()) < 0.45
    assert 0.75 < float(modulus.max()) <= 0.8
    assert float(own["theta"].exp().max()) <= 1.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ElmanCell("gelu"), "nonlinearity must be one of 'tanh', 'relu', got 'gelu'"),
        (lambda: LeakyCell(0.0), r"alpha must be in \(0, 1\], got 0.0"),
        (lambda: LRUCell(r_min=0.9, r_max=0.5), "r_min and r_max must be"),
        (lambda: LRUCell(max_phase=7.0), r"max_phase must be in \(0, 2π\], got 7.0"),
        (lambda: LRUCell("softplus"), "nonlinearity must be one of None"),
    ],
)
def test_bad_arguments_are_named(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
