"""RTRL's step kernels against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_problems import DEVICE, check_error, poison
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Linearization, Trajectory
from rjepa_triton.rules import rtrl

pytest.importorskip("triton")


from rjepa_triton.kernels.rtrl_step import Config, pick_config, rtrl_immediate_, rtrl_jacobian

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Two products and a sum of numbers of order 1, each rounded by 2⁻²⁴.
TOLERANCE = 1e-6

CELL = RGCCell()
Partials = tuple[list[Tensor], list[Tensor]]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def _problem(
    steps: int, batch: int, units: int, with_resets: bool
) -> tuple[Linearization, Linearization, list[Tensor]]:
    """A linearization in float32, the same one in float64, and the weights in float32."""
    torch.manual_seed(0)
    resets = None
    if with_resets:
        resets = torch.rand(steps, batch, device=DEVICE) < 0.3
        resets[0, 0] = resets[-1, -1] = True
    weights = [_random(units, units) * (0.5 / math.sqrt(units)) for _ in range(4)]
    trajectory = CELL.scan(
        _random(1, steps, batch, units), weights, [_random(batch, units) for _ in range(2)], resets
    )
    wide = Trajectory(trajectory.x.double(), trajectory.states.double(), trajectory.saved.double(), resets)
    return CELL.linearize(trajectory), CELL.linearize(wide), weights


def _at(lin: Linearization, t: int) -> Partials:
    """own and phi of step t, in the form that the launchers take."""
    own = [lin.partials.own[nu][nu][t] for nu in range(2)]
    return own, [lin.immediate(matrix)[k // 2][t] for k, matrix in enumerate(RGCCell.matrices)]


def _assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("units", [1, 17, 63, 68, 127])
def test_jacobian(monkeypatch, units, batch, with_resets):
    lin, wide, weights = _problem(1, batch, units, with_resets)
    want = rtrl.jacobian(wide, 0, CELL.matrices, [w.double() for w in weights])[:, 0]
    resets = None if lin.resets is None else lin.resets[0]
    own, phi = _at(lin, 0)
    poison(monkeypatch)
    got = rtrl_jacobian(own, phi, weights, resets)
    _assert_near(got, want)
    if with_resets:
        assert torch.equal(got, rtrl_jacobian(own, phi, weights, resets.to(torch.uint8)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("units", [1, 17, 20, 63])
def test_immediate_term_where_a_unit_meets_its_row_and_nowhere_else(units, batch):
    lin, wide, _ = _problem(1, batch, units, False)
    gamma = _random(batch, 2 * units, 4 * units**2)
    before = gamma.clone()
    want = gamma.double().view(batch, 2, units, 4, units, units)
    for k, matrix in enumerate(CELL.matrices):
        phi, y = wide.immediate(matrix)[k // 2][0], wide.before[matrix.reads, 0]
        own = want[:, k // 2, :, k].diagonal(dim1=1, dim2=2)
        own += (phi[:, :, None] * y[:, None, :]).mT
    twin = gamma.clone()
    rtrl_immediate_(gamma, _at(lin, 0)[1], lin.before[:, 0])
    _assert_near(gamma, want.view_as(gamma))
    kept = (want.view_as(gamma) == before.double()) | (gamma != before)
    assert kept.all()
    assert int((gamma != before).sum()) <= 4 * batch * units**2
    rtrl_immediate_(twin, _at(lin, 0)[1], lin.before[:, 0])
    assert torch.equal(gamma, twin)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("steps", "batch", "units"), [(1, 1, 17), (5, 3, 17), (5, 1, 20)])
def test_steps_are_those_of_exact_rtrl(steps, batch, units, with_resets):
    """γ ← J γ + R over a sequence, where before[:, t] is a strided view."""
    lin, wide, weights = _problem(steps, batch, units, with_resets)
    double = [w.double() for w in weights]
    reference = rtrl.ExactSensitivity(CELL.matrices, double, 2, batch)
    gamma = torch.zeros(batch, 2 * units, 4 * units**2, device=DEVICE)
    for t in range(steps):
        own, phi = _at(lin, t)
        gamma = torch.bmm(
            rtrl_jacobian(own, phi, weights, None if lin.resets is None else lin.resets[t]), gamma
        )
        rtrl_immediate_(gamma, phi, lin.before[:, t])
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
    rtrl_immediate_(gamma, _at(lin, 0)[1], lin.before[:, 0])
    assert buffer[:64].isnan().all()
    assert buffer[-64:].isnan().all()
    assert not gamma.isnan().any()


def test_pick_config():
    assert pick_config(64) == pick_config(1000) == Config(8, 64, 4, 1)
    assert pick_config(1) == pick_config(63) == Config(4, 64, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"phi": [torch.zeros(3, 5)] * 3}, ValueError, "phi must hold 4 tensors, got 3"),
        ({"phi": [torch.zeros(0, 5)] * 4}, ValueError, r"phi\[0\] must have shape \(B, N\), none of them 0"),
        ({"phi": [torch.zeros(5, 3).mT] * 4}, ValueError, r"phi\[0\] must be contiguous"),
        ({"own": [torch.zeros(3, 5)]}, ValueError, "own must hold 2 tensors, got 1"),
        ({"own": [torch.zeros(3, 4)] * 2}, ValueError, r"own\[0\] must have shape \(3, 5\)"),
        ({"weights": [torch.zeros(5)] * 4}, ValueError, r"weights\[0\] must have shape \(5, 5\), got \(5,\)"),
        ({"resets": torch.zeros(3)}, TypeError, "resets must have dtype torch.bool or torch.uint8"),
        ({"resets": torch.zeros(4).bool()}, ValueError, r"resets must have shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "own": [_random(3, 5) for _ in range(2)],
        "phi": [_random(3, 5) for _ in range(4)],
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
        rtrl_immediate_(gamma.to(DEVICE), [_random(3, 5) for _ in range(4)], before.to(DEVICE))
