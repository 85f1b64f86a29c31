"""RTRL's step kernels against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import every_cell
import pytest
import torch
from kernel_problems import DEVICE, check_error, poison
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Cell, Linearization, Trajectory, state_read
from rjepa_triton.rules import rtrl

pytest.importorskip("triton")


from rjepa_triton.kernels.rtrl_step import Config, pick_config, rtrl_immediate_, rtrl_jacobian

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Two products and a sum of numbers of order 1, each rounded by 2⁻²⁴.
TOLERANCE = 1e-6

CELL = RGCCell()
Partials = tuple[list[Tensor | None], list[Tensor | None]]
DENSE = [name for name, cell in every_cell.CELLS.items() if cell.matrices]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def _problem(
    steps: int, batch: int, units: int, with_resets: bool, cell: Cell = CELL
) -> tuple[Linearization, Linearization, list[Tensor]]:
    """A linearization in float32, the same one in float64, and the weights in float32."""
    torch.manual_seed(0)
    resets = None
    if with_resets:
        resets = torch.rand(steps, batch, device=DEVICE) < 0.3
        resets[0, 0] = resets[-1, -1] = True
    weights = [_random(units, units) * (0.5 / math.sqrt(units)) for _ in cell.matrices]
    trajectory = cell.scan(
        _random(len(cell.per_unit), steps, batch, units),
        weights,
        [_random(batch, units) for _ in cell.states],
        resets,
    )
    wide = Trajectory(trajectory.x.double(), trajectory.states.double(), trajectory.saved.double(), resets)
    return cell.linearize(trajectory), cell.linearize(wide), weights


def _at(lin: Linearization, t: int, cell: Cell = CELL) -> Partials:
    """own and phi of step t, in the form that the launchers take."""
    states = range(len(cell.states))
    own = [lin.partials.own[source].get(nu) for nu in states for source in states]
    phi = [lin.immediate(matrix).get(nu) for nu in states for matrix in cell.matrices]
    return [x if x is None else x[t] for x in own], [x if x is None else x[t].contiguous() for x in phi]


def _reads(cell: Cell = CELL) -> list[int]:
    return [state_read(matrix) for matrix in cell.matrices]


def _assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("units", "batch"), [(1, 1), (17, 3), (68, 1), (127, 2)])
def test_jacobian(monkeypatch, units, batch, with_resets, name):
    cell = every_cell.CELLS[name]
    lin, wide, weights = _problem(1, batch, units, with_resets, cell)
    want = rtrl.jacobian(wide, 0, cell.matrices, [w.double() for w in weights])[:, 0]
    resets = None if lin.resets is None else lin.resets[0]
    own, phi = _at(lin, 0, cell)
    poison(monkeypatch)
    got = rtrl_jacobian(own, phi, _reads(cell), weights, resets)
    _assert_near(got, want)
    if with_resets:
        assert torch.equal(got, rtrl_jacobian(own, phi, _reads(cell), weights, resets.to(torch.uint8)))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("units", "batch"), [(1, 1), (17, 3), (20, 1), (63, 1)])
def test_immediate_term_where_a_unit_meets_its_row_and_nowhere_else(units, batch, name):
    cell = every_cell.CELLS[name]
    states, matrices = len(cell.states), len(cell.matrices)
    lin, wide, _ = _problem(1, batch, units, False, cell)
    gamma = _random(batch, states * units, matrices * units**2)
    before = gamma.clone()
    want = gamma.double().view(batch, states, units, matrices, units, units)
    for k, matrix in enumerate(cell.matrices):
        y = wide.before[state_read(matrix), 0]
        for nu, phi in wide.immediate(matrix).items():
            own = want[:, nu, :, k].diagonal(dim1=1, dim2=2)
            own += (phi[0][:, :, None] * y[:, None, :]).mT
    twin = gamma.clone()
    given = _at(lin, 0, cell)[1], _reads(cell), lin.before[:, 0]
    rtrl_immediate_(gamma, *given)
    _assert_near(gamma, want.view_as(gamma))
    kept = (want.view_as(gamma) == before.double()) | (gamma != before)
    assert kept.all()
    assert int((gamma != before).sum()) <= states * matrices * batch * units**2
    rtrl_immediate_(twin, *given)
    assert torch.equal(gamma, twin)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("steps", "batch", "units"), [(1, 1, 17), (5, 3, 17), (5, 1, 20)])
@pytest.mark.parametrize("name", ["rgc", "lstm", "gru"])
def test_steps_are_those_of_exact_rtrl(steps, batch, units, with_resets, name):
    """γ ← J γ + R over a sequence, where before[:, t] is a strided view."""
    cell = every_cell.CELLS[name]
    states, matrices = len(cell.states), len(cell.matrices)
    lin, wide, weights = _problem(steps, batch, units, with_resets, cell)
    double = [w.double() for w in weights]
    reference = rtrl.ExactSensitivity(cell.matrices, double, states, batch)
    gamma = torch.zeros(batch, states * units, matrices * units**2, device=DEVICE)
    for t in range(steps):
        own, phi = _at(lin, t, cell)
        resets = None if lin.resets is None else lin.resets[t]
        gamma = torch.bmm(rtrl_jacobian(own, phi, _reads(cell), weights, resets), gamma)
        rtrl_immediate_(gamma, phi, _reads(cell), lin.before[:, t])
        reference.step_(wide, t, double)
    # A step's product sums 2N terms, and its error is carried into the next step.
    want = reference.gammas[0].view(gamma.shape)
    torch.testing.assert_close(gamma.double(), want, rtol=0, atol=5 * TOLERANCE * float(want.abs().max()))


def test_writes_nothing_beyond_gamma():
    batch, units = 3, 9
    lin, _, _ = _problem(1, batch, units, False)
    numbers = 8 * batch * units**3
    buffer = torch.full((numbers + 128,), math.nan, device=DEVICE)
    gamma = buffer[64:-64].view(batch, 2 * units, 4 * units**2).zero_()
    rtrl_immediate_(gamma, _at(lin, 0)[1], _reads(), lin.before[:, 0])
    assert buffer[:64].isnan().all()
    assert buffer[-64:].isnan().all()
    assert not gamma.isnan().any()


def test_pick_config():
    assert pick_config(64) == pick_config(1000) == Config(8, 64, 4, 1)
    assert pick_config(1) == pick_config(63) == Config(4, 64, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"phi": [torch.zeros(3, 5)] * 3}, ValueError, "phi must hold as many .* 4, .* got 3"),
        ({"phi": [None] * 8}, ValueError, "phi must hold as many .* one of them not None, got 8"),
        ({"phi": [torch.zeros(0, 5)] * 8}, ValueError, r"phi must have shape \(B, N\), none of them 0"),
        ({"phi": [torch.zeros(5, 3).mT] * 8}, ValueError, r"phi\[0\] must be contiguous"),
        ({"reads": [0, 1, 1, 2]}, ValueError, r"reads must name 2 states, got \(0, 1, 1, 2\)"),
        ({"own": [torch.zeros(3, 5)]}, ValueError, "own must hold 4 tensors, got 1"),
        ({"own": [torch.zeros(3, 4)] * 4}, ValueError, r"own\[0\] must have shape \(3, 5\)"),
        ({"weights": [torch.zeros(5)] * 4}, ValueError, r"weights\[0\] must have shape \(5, 5\), got \(5,\)"),
        ({"resets": torch.zeros(3)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
        ({"resets": torch.zeros(4).bool()}, ValueError, r"resets must have shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "own": [_random(3, 5) for _ in range(4)],
        "phi": [_random(3, 5) for _ in range(8)],
        "reads": _reads(),
        "weights": [_random(5, 5) for _ in range(4)],
    }
    check_error(rtrl_jacobian, arguments, change, error, message)


@pytest.mark.parametrize(
    ("gamma", "before", "error", "message"),
    [
        (torch.zeros(3, 10, 99), torch.zeros(2, 3, 5), ValueError, r"gamma must have shape \(3, 10, 100\)"),
        (torch.zeros(3, 10, 100).double(), torch.zeros(2, 3, 5), TypeError, "gamma must have dtype"),
        (torch.zeros(3, 10, 100), torch.zeros(2, 5, 3).mT, ValueError, "before must be contiguous beyond"),
    ],
)
def test_errors_of_the_immediate_term(gamma, before, error, message):
    with pytest.raises(error, match=message):
        rtrl_immediate_(gamma.to(DEVICE), [_random(3, 5) for _ in range(8)], _reads(), before.to(DEVICE))
