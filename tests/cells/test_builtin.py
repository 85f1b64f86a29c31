"""Every built-in cell: its partials, and every learning rule against autograd of plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import closed_forms
import oracle
import pytest
import spiking
import torch
from every_cell import CELLS, SHAPES, by_cell, by_smooth_cell, problem, random_point
from torch import Tensor

from rjepa_triton import ALIF, LIF, MGU, MinGRU, MinLSTM, OnlineLearner, functional
from rjepa_triton.bench.scaling.work import Counter
from rjepa_triton.cells import weights as weight_ops
from rjepa_triton.cells.builtin import (
    ALIFCell,
    ElmanCell,
    LeakyCell,
    LIFCell,
    LRUCell,
    MinLSTMCell,
    RGCCell,
)
from rjepa_triton.cells.two_point import Cell, state_read

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
        c = list(spiking.update(cell)(c, p, x[:, t].unbind()))
        out.append(torch.stack(c))
    return torch.stack(out, dim=1)


@by_smooth_cell
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


@by_smooth_cell
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


@by_cell
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_says_all_that_the_partials_need_of_the_pre_activations(cell: Cell, shape: str) -> None:
    x, weights, state, _ = problem(cell, shape)
    trajectory = cell.scan(x.detach(), weights, state, torch.rand(6, 2) < 0.3)
    p = [torch.zeros_like(trajectory.after[0]) for _ in cell.gates]
    for matrix, weight in zip(cell.matrices, weights, strict=True):
        p[matrix.into[1]] += weight_ops.multiply(weight, trajectory.before[state_read(matrix)]).detach()
    want = cell.partials(trajectory.before.unbind(), p, trajectory.x.unbind())
    got = cell.linearize(trajectory).partials
    assert cell.saves <= len(cell.gates)
    for kind in ("own", "gate", "input"):
        for by_state, plainly in zip(getattr(got, kind), getattr(want, kind), strict=True):
            assert by_state.keys() == plainly.keys()
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


def near_threshold(cell: Cell, shape: tuple[int, ...]) -> list[list[Tensor]]:
    """A point at which most units are where the pseudo-derivative isn't zero."""
    c, p, x = ([0.3 * value for value in group] for group in random_point(cell, shape))
    c[0] = (c[0] > 0).to(F64)
    return [c, p, [x[0] + cell.threshold]]


@pytest.mark.parametrize("cell", [CELLS["lif"], CELLS["alif"]], ids=["lif", "alif"])
def test_a_spiking_cell_s_partials_are_autograd_s_of_a_function_with_the_surrogate(cell: Cell) -> None:
    point = [[value.requires_grad_() for value in group] for group in near_threshold(cell, (40, 50))]
    new = spiking.update(cell)(*point)
    torch.testing.assert_close(new, cell.update(*point))
    assert 0.2 < float(new[0].detach().mean()) < 0.8
    with torch.no_grad():
        found = cell.partials(*point)
    flat = [value for group in point for value in group]
    by_argument = [by for kind in (found.own, found.gate, found.input) for by in kind]
    for nu, value in enumerate(new):
        slopes = torch.autograd.grad(
            value.sum(), flat, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for by, slope in zip(by_argument, slopes, strict=True):
            torch.testing.assert_close(by.get(nu, torch.zeros_like(slope)), slope, rtol=1e-12, atol=1e-12)
    assert float((found.gate[0][0] != 0).double().mean()) > 0.5


@pytest.mark.parametrize("adaptive", [False, True])
def test_e_prop_of_a_spiking_layer_is_the_paper_s(adaptive: bool) -> None:
    """Eligibility traces as Bellec et al. 2020 have them (eqs. 22–25), in their own loop."""
    beta, rho, alpha, theta, gamma = (0.3 if adaptive else 0.0), 0.95, 0.9, 0.8, 0.5
    cell = ALIFCell(alpha, theta, gamma, rho, beta) if adaptive else LIFCell(alpha, theta, gamma)
    steps, units = 40, 7
    x, weight = (
        torch.rand(1, steps, 1, units, dtype=F64),
        torch.randn(units, units, dtype=F64).requires_grad_(),
    )
    start = [torch.zeros(1, units, dtype=F64) for _ in cell.states]
    out = functional.two_point(cell, x, [weight], start, learning="eprop")[0]
    signal = torch.randn(steps, units, dtype=F64)
    (got,) = torch.autograd.grad((out[:, 0] * signal).sum(), [weight])

    z, v, a = (torch.zeros(units, dtype=F64) for _ in range(3))
    filtered, adapting = torch.zeros(units, dtype=F64), torch.zeros(units, units, dtype=F64)
    psi, want, spikes = torch.zeros(units, dtype=F64), torch.zeros(units, units, dtype=F64), []
    for t in range(steps):
        adapting = psi[:, None] * filtered + (rho - psi[:, None] * beta) * adapting
        filtered = alpha * filtered + z
        a = rho * a + z
        v = alpha * v + weight.detach() @ z + x[0, t, 0] - theta * z
        z = (v > theta + beta * a).to(F64)
        psi = gamma / theta * torch.clamp(1 - ((v - theta - beta * a) / theta).abs(), min=0)
        want += signal[t][:, None] * psi[:, None] * (filtered - beta * adapting)
        spikes.append(z)
    torch.testing.assert_close(out[:, 0], torch.stack(spikes))
    assert 0.05 < float(torch.stack(spikes).mean()) < 0.95
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_mgu_and_the_minimal_cells_are_their_papers_equations() -> None:
    """By layer, from the input on; their gradient is in the tests of every cell."""
    u = torch.randn(9, 2, 3, dtype=F64)
    layers = [make(3, 5, dtype=F64) for make in (MGU, MinLSTM, MinGRU)]
    mgu, min_lstm, min_gru = ({name: p.detach() for name, p in layer.named_parameters()} for layer in layers)

    def given(of: dict[str, Tensor], gate: str, t: int) -> Tensor:
        return u[t] @ of[f"weight_in_{gate}"].T + of[f"bias_{gate}"]

    h = [torch.zeros(2, 5, dtype=F64) for _ in range(3)]
    found = [layer(u)[0] for layer in layers]
    for t in range(9):
        f = torch.sigmoid(h[0] @ mgu["weight_hf"].T + given(mgu, "f", t))
        n = torch.tanh(given(mgu, "n", t) + f * (h[0] @ mgu["weight_hn"].T + mgu["bias_hn"]))
        h[0] = (1 - f) * h[0] + f * n
        f, i = (torch.sigmoid(given(min_lstm, gate, t)) for gate in "fi")
        h[1] = f / (f + i) * h[1] + i / (f + i) * given(min_lstm, "n", t)
        z = torch.sigmoid(given(min_gru, "z", t))
        h[2] = (1 - z) * h[2] + z * given(min_gru, "n", t)
        for out, want in zip(found, h, strict=True):
            torch.testing.assert_close(out[t], want)
    assert all(layer.exactness() for layer in layers[1:])


def test_a_minlstm_s_gates_stay_numbers_where_both_are_shut() -> None:
    x = [torch.full((1,), value) for value in (-200.0, -200.0, 3.0)]
    assert MinLSTMCell().update([torch.ones(1)], [], x)[0].item() == 2.0
    found = MinLSTMCell().partials([torch.ones(1)], [], x).input
    assert all(value.isfinite().all() for by_state in found for value in by_state.values())


@pytest.mark.parametrize("make", [LIF, ALIF])
@pytest.mark.parametrize("form", ["step", "lazy", "chunk", "history"])
def test_a_spiking_layer_learns_on_a_stream_as_over_the_sequence(make: Any, form: str) -> None:
    layer = make(3, 6, dtype=F64)
    u, delta = 2 * torch.randn(24, 2, 3, dtype=F64), torch.randn(24, 2, 6, dtype=F64)
    out, _ = layer(u)
    assert 0.05 < float(out.detach().mean()) < 0.95
    want = torch.autograd.grad((out * delta).sum(), list(layer.parameters()))
    learner = OnlineLearner(
        layer, batch_size=2, form=form, update_every=8 if form in ("chunk", "lazy") else 1
    )
    for t in range(24):
        (learner.step(u[t]) * delta[t]).sum().backward()
    assert oracle.relative([p.grad for p in layer.parameters()], want) < 1e-10


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
        (lambda: LRUCell(r_min="x"), "r_min must be a number, got 'x'"),
        (lambda: LRUCell(max_phase=None), "max_phase must be a number, got None"),
        (lambda: LeakyCell("x"), "alpha must be a number, got 'x'"),
        (lambda: LIFCell(threshold=None), "threshold must be a number, got None"),
        (lambda: LIFCell(decay=True), "decay must be a number, got True"),
        (lambda: ALIFCell(adaptation="x"), "adaptation must be a number, got 'x'"),
        (lambda: LRUCell(max_phase=7.0), r"max_phase must be in \(0, 2π\], got 7.0"),
        (lambda: LRUCell("softplus"), "nonlinearity must be one of None"),
        (lambda: LIFCell(decay=1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: LIFCell(threshold=0.0), "threshold must be above 0 and finite, got 0.0"),
        (lambda: ALIFCell(dampening=float("inf")), "dampening must be above 0 and finite, got inf"),
        (lambda: ALIFCell(adaptation_decay=-0.1), r"adaptation_decay must be in \[0, 1\], got -0.1"),
        (lambda: ALIFCell(adaptation=float("nan")), "adaptation must be finite, got nan"),
    ],
)
def test_bad_arguments_are_named(make: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make()


@pytest.mark.parametrize(
    ("units", "steps", "times"), [(8, 1, 5), (256, 1, 1.1), (256, 3, 1.1), (256, 200, 1.2)]
)
def test_a_loop_of_few_steps_does_not_copy_large_weights(units: int, steps: int, times: float) -> None:
    """One step of an online layer once wrote and read its weights four times more than it used them."""
    weights = [torch.empty(units, units, device="meta")] * 4
    state = [torch.empty(1, units, device="meta")] * 2
    with Counter() as counter:
        RGCCell().scan(torch.empty(1, steps, 1, units, device="meta"), weights, state)
    assert counter.bytes / steps <= times * 16 * units**2 + 400 * units
