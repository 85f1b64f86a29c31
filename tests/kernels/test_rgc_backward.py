"""The RGC's backward kernel against backpropagation through time in float64: interpreted, or on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Linearization
from rjepa_triton.rules import bptt, rfp

pytest.importorskip("triton")

from kernel_problems import DEVICE, check_error
from rgc_problems import TRAJECTORY_ERRORS, gates_of

from rjepa_triton.kernels.rgc_backward import Config, Credits, bptt_credits, pick_config

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Sums of N or T·B products of numbers of order 1, each rounded by 2⁻²⁴; five steps add to the error.
TOLERANCE = 4e-6

CELL = RGCCell()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def _problem(
    steps: int, batch: int, units: int, with_resets: bool
) -> tuple[dict[str, Any], list[Tensor], Linearization]:
    """The launcher's arguments, rounded from a float64 trajectory; that trajectory's weights and linearization."""
    torch.manual_seed(0)
    resets = None
    if with_resets:
        resets = torch.rand(steps, batch, device=DEVICE) < 0.3
        resets[0, 0] = resets[steps // 2, -1] = resets[-1, 0] = True
    weights = [_random(units, units).double() * (0.5 / math.sqrt(units)) for _ in range(4)]
    state = [_random(batch, units).double() for _ in range(2)]
    trajectory = CELL.scan(_random(1, steps, batch, units).double(), weights, state, resets)
    arguments = {
        "gates": gates_of(trajectory.saved.float()),
        "before": trajectory.before.float().contiguous(),
        "u": trajectory.x[0].float(),
        "weights": [w.float() for w in weights],
        "delta": _random(2, steps, batch, units),
        "resets": resets,
    }
    return arguments, weights, CELL.linearize(trajectory)


def _assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE * max(1.0, want.abs().max().item()))


def _assert_equals_reference(
    found: Credits, arguments: dict[str, Any], weights: list[Tensor], lin: Linearization
) -> None:
    credit, passed = bptt.credits(lin, CELL.matrices, weights, arguments["delta"].double())
    _assert_near(found.credit, credit)
    _assert_near(found.passed, passed)
    ss, ms, mm, sm = (rfp.entering_credit(matrix, lin, credit) for matrix in CELL.matrices)
    _assert_near(found.entering, torch.stack([torch.stack([ss, sm], -2), torch.stack([mm, ms], -2)]))
    # One product per state that matrices read gives two weights' gradients, as the docstring says.
    d_ss, d_ms, d_mm, d_sm = rfp.weight_gradients(lin, CELL.matrices, weights, credit)
    for j, want in enumerate([(d_ss, d_sm), (d_mm, d_ms)]):
        product = found.entering[j].flatten(0, 1).flatten(1).T @ arguments["before"][j].flatten(0, 1)
        _assert_near(product, torch.cat(want))


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("units", [1, 17, 63, 127, 132])
def test_credits_are_those_of_bptt(monkeypatch, units, steps, batch, with_resets):
    arguments, weights, lin = _problem(steps, batch, units, with_resets)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    _assert_equals_reference(bptt_credits(**arguments), arguments, weights, lin)


@pytest.mark.parametrize("units", [17, 64])
def test_states_but_the_last_need_no_copy_and_two_runs_agree_in_every_bit(units):
    """The stride between the two states is one number more than their size, so that four doesn't divide it."""
    arguments, weights, lin = _problem(5, 3, units, True)
    arguments["resets"] = arguments["resets"].to(torch.uint8)
    arguments["weights"] = [torch.nn.Parameter(w) for w in arguments["weights"]]
    first = bptt_credits(**arguments)
    _assert_equals_reference(first, arguments, weights, lin)
    numbers = 5 * 3 * units
    wide = torch.full((2, numbers + 1), math.nan, device=DEVICE)
    wide[:, :numbers] = arguments["before"].flatten(1)
    kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    again = bptt_credits(**{**arguments, "before": wide[:, :numbers].view(2, 5, 3, units)})
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(arguments[k], v) for k, v in kept.items())


def test_chunks_add_up_to_the_whole():
    """Credit that a later chunk passes back is added to δ of the earlier chunk's last step."""
    arguments, _, _ = _problem(5, 2, 20, False)
    whole = bptt_credits(**arguments)
    split = {k: arguments[k] for k in ("before", "delta")}
    late = {k: v[:, 2:].contiguous() for k, v in split.items()} | {"gates": arguments["gates"][2:]}
    early = {k: v[:, :2].contiguous() for k, v in split.items()} | {"gates": arguments["gates"][:2]}
    weights, u = arguments["weights"], arguments["u"]
    after = bptt_credits(**late, u=u[2:], weights=weights)
    early["delta"][:, -1] += after.passed
    first = bptt_credits(**early, u=u[:2], weights=weights)
    torch.testing.assert_close(
        torch.cat([first.credit, after.credit], dim=1), whole.credit, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(first.passed, whole.passed, rtol=0, atol=1e-5)


def test_pick_config():
    assert pick_config(512, 32) == Config(128, 4)
    assert pick_config(511, 64) == Config(256, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *TRAJECTORY_ERRORS,
        ({"weights": [torch.zeros(5, 5)] * 3}, ValueError, "weights must hold 4 tensors, got 3"),
        ({"weights": [torch.zeros(5)] * 4}, ValueError, r"weights\[0\] must have shape \(5, 5\), got \(5,\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments, _, _ = _problem(2, 3, 5, True)
    check_error(bptt_credits, arguments, change, error, message)
