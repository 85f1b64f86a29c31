"""One step of an RGC and its linearization in one launch, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import DEVICE, poison
from rgc_problems import assert_near, problem, reference
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from rjepa_triton.kernels.rgc_step import Config, Step, pick_config, rgc_step

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def given(batch: int, units: int, with_resets: bool) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    x, weights, state, resets = problem(1, batch, units, with_resets)
    return x[0], weights, torch.stack(state), None if resets is None else resets[0]


def wanted(u: Tensor, weights: list[Tensor], state: Tensor, resets: Tensor | None) -> Step:
    marks = None if resets is None else resets[None]
    trajectory = reference(u[None], weights, list(state), marks)
    cell = RGCCell()
    lin = cell.linearize(trajectory)
    m = rfp.transition(lin, cell.matrices, [w.double() for w in weights])
    phi = [next(iter(by_state.values()))[0] for by_state in map(lin.immediate, cell.matrices)]
    of_input = [lin.partials.input[0][nu][0] for nu in range(2)]
    partials = torch.stack([*phi, *of_input, *m[:, :, 0].flatten(0, 1)])
    return Step(trajectory.states[:, -1], trajectory.before[:, 0], partials)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("units", [1, 17, 63, 127, 132])
def test_a_step_and_its_linearisation(monkeypatch, units, batch, with_resets):
    arguments = given(batch, units, with_resets)
    want = wanted(*arguments)
    poison(monkeypatch)
    for got, expected in zip(rgc_step(*arguments), want, strict=True):
        assert_near(got, expected)


def test_a_step_of_more_units_than_columns_go_at_once():
    arguments = given(2, 260, True)
    for got, want in zip(rgc_step(*arguments), wanted(*arguments), strict=True):
        assert_near(got, want)


def test_reset_rows_forget_what_is_not_finite():
    u, weights, state, _ = given(2, 17, False)
    resets = torch.tensor([True, False], device=DEVICE)
    want = wanted(u, weights, state, resets)
    state[:, 0] = torch.inf
    for got, expected in zip(rgc_step(u, weights, state, resets), want, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("units", [17, 64])
def test_two_runs_agree_in_every_bit_and_nothing_given_changes(units):
    arguments = given(3, units, True)
    u, weights, state, resets = arguments
    kept = [a.clone() for a in (u, *weights, state, resets)]
    first, second = rgc_step(*arguments), rgc_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((u, *weights, state, resets), kept, strict=True))
    assert rgc_step(u, weights, state).before is state


def test_pick_config():
    assert pick_config(64, 1, 32) == Config(2, 128, 1, 2)
    assert pick_config(512, 3, 32) == Config(4, 128, 4, 4)
    assert pick_config(4096, 100, 64) == Config(8, 256, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": None}, TypeError, "u must be a torch.Tensor, got NoneType"),
        ({"u": torch.zeros(2, 0)}, ValueError, r"u must have shape \(B, N\), none of them 0, got \(2, 0\)"),
        ({"weights": [torch.zeros(5, 5)] * 3}, ValueError, "weights must hold 4 tensors, got 3"),
        ({"weights": [torch.zeros(5, 4)] * 4}, ValueError, r"weights\[0\] must have shape \(5, 5\)"),
        ({"state": torch.zeros(2, 2, 5).double()}, TypeError, "state must have dtype torch.float32"),
        ({"state": torch.zeros(2, 5, 2).mT}, ValueError, "state must be contiguous"),
        ({"resets": torch.zeros(3).bool()}, ValueError, r"resets must have shape \(2,\), got \(3,\)"),
        ({"resets": torch.zeros(2)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    def moved(value: object) -> object:
        return [v.to(DEVICE) for v in value] if isinstance(value, list) else value

    u, weights, state, _ = given(2, 5, False)
    changed = {k: v.to(DEVICE) if isinstance(v, Tensor) else moved(v) for k, v in change.items()}
    with pytest.raises(error, match=message):
        rgc_step(**{"u": u, "weights": weights, "state": state, **changed})
