"""The kernel that reads Γ against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from kernel_problems import DEVICE, SHAPES, SIZES, check_error, gammas_amid_nan, poison

from rjepa_triton.kernels import gamma_read as module
from rjepa_triton.kernels.gamma_read import gamma_read
from rjepa_triton.kernels.gamma_step import Config

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# A sum of S·B products, each rounded by at most 2⁻²⁴ of its terms.
TOLERANCE = 1e-6


def _problem(
    states: int, batch: int, matrices: int, units: int, fan_in: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """gammas, credit."""
    gammas = [torch.randn(batch, matrices, units, fan_in, device=DEVICE).to(dtype) for _ in range(states)]
    return gammas, torch.randn(states, batch, units, device=DEVICE)


def _check(gammas: list[Tensor], credit: Tensor) -> Tensor:
    before = [g.clone() for g in gammas]
    want = rfp.gamma_read([g.double() for g in gammas], credit.double())
    got = gamma_read(gammas, credit)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= TOLERANCE * math.sqrt(credit.shape[1]) * max(want.abs().max().item(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(gammas, before, strict=True))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        (2, 2, 2, 9, 136),
        (3, 2, 4, 9, 136),
        (4, 9, 1, 9, 67),
        # A batch in two parts, and a prime one.
        (2, 16, 2, 9, 67),
        (1, 17, 1, 3, 8),
    ],
    ids=str,
)
def test_reads_what_the_reference_does(shape, dtype):
    _check(*_problem(*shape, dtype))


@settings(max_examples=20, deadline=None)
@given(**{**SIZES, "batch": st.integers(1, 18)})
def test_any_small_shape(states, batch, matrices, units, fan_in):
    _check(*_problem(states, batch, matrices, units, fan_in))


def test_large_tiles_agree(monkeypatch):
    monkeypatch.setattr(module, "pick_config", lambda *_: Config(32, 64, 4, 4))
    _check(*_problem(2, 2, 2, 65, 68))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_two_runs_agree_in_every_bit_and_unwritten_memory_is_not_read(rows, monkeypatch):
    """The batch is split into parts of `rows` rows. Γ lies between NaNs, which masked loads must leave out."""
    monkeypatch.setattr(module, "split_rows", lambda *_: rows)
    credit = torch.randn(2, 6, 33, device=DEVICE)
    with gammas_amid_nan(6, 2, 33, 67) as gammas:
        poison(monkeypatch)
        assert torch.equal(_check(gammas, credit), gamma_read(gammas, credit))


def test_a_credit_may_be_one_step_of_a_sequence():
    gammas, _ = _problem(2, 3, 2, 5, 9)
    _check(gammas, torch.randn(2, 4, 3, 5, device=DEVICE)[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazily_written_gamma_gives_each_steps_gradient(dtype):
    """Γ isn't written until the chunk's last step, and yet each step's gradient is that of a Γ written at every step."""
    from rjepa_triton.kernels.gamma_chunk import gamma_chunk_
    from rjepa_triton.kernels.reverse_scan import arriving, reverse_scan

    states, steps, batch, matrices, units, fan_in = 2, 5, 2, 3, 9, 24
    m = 0.5 * torch.randn(states, states, steps, batch, units, device=DEVICE)
    phi = torch.randn(states, steps, batch, matrices, units, device=DEVICE)
    y = torch.randn(steps, batch, matrices, fan_in, device=DEVICE)
    delta = torch.randn(states, steps, batch, units, device=DEVICE)
    gammas, _ = _problem(states, batch, matrices, units, fan_in, dtype)
    at_each = [g.double() for g in gammas]
    for t in range(steps):
        want = rfp.gamma_step_(
            at_each, m[:, :, t].double(), phi[:, t].double(), y[t].double(), delta[:, t].double()
        )
        until = slice(t + 1)
        alone = torch.zeros_like(delta[:, until])
        alone[:, t] = delta[:, t]
        credit, passed = reverse_scan(m[:, :, until].contiguous(), alone)
        entering = torch.einsum("vtbn,vtbkn->tbkn", credit, phi[:, until])
        if t < steps - 1:
            past = gamma_read(gammas, passed)
        else:
            adds, whole = arriving(m, phi)
            past = gamma_chunk_(gammas, whole, adds, y, passed)
        got = past + torch.einsum("tbkn,tbkm->knm", entering, y[until])
        error = (got.double() - want).abs().max().item()
        assert error <= 5 * TOLERANCE * max(want.abs().max().item(), 1.0)
    # Γ is rounded once; the interpreter truncates where a GPU rounds to nearest.
    rounding = 2**-7 if dtype == torch.bfloat16 else 0.0
    for got, want in zip(gammas, at_each, strict=True):
        assert bool(((got.double() - want).abs() <= rounding * want.abs() + 1e-5).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gammas": torch.zeros(1)}, TypeError, "gammas must be a tuple or a list of tensors, got Tensor"),
        ({"gammas": [torch.zeros(2, 3, 0, 7)]}, ValueError, r"none of them 0, got \(2, 3, 0, 7\)"),
        ({"gammas": [torch.zeros(2, 3, 5, 7).double()]}, TypeError, "torch.bfloat16, got torch.float64"),
        ({"gammas": [torch.zeros(2, 3, 7, 5).mT]}, ValueError, r"gammas\[0\] must be contiguous"),
        ({"credit": None}, TypeError, "credit must be a torch.Tensor, got NoneType"),
        ({"credit": torch.zeros(2, 2, 5).double()}, TypeError, "credit must have dtype torch.float32"),
        ({"credit": torch.zeros(1, 2, 5)}, ValueError, r"credit must have shape \(2, 2, 5\)"),
        ({"credit": torch.zeros(2, 5, 2).mT}, ValueError, "credit must be contiguous beyond its first 1"),
        ({"credit": torch.zeros(2, 2, 5, device="meta")}, ValueError, "credit must be on"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    gammas, credit = _problem(2, 2, 3, 5, 7)
    check_error(gamma_read, {"gammas": gammas, "credit": credit}, change, error, message)
