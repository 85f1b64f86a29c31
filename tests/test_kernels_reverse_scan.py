"""The scans backward in time against the float64 reference: interpreted here, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.reference import rfp

pytest.importorskip("triton")

from rjepa_triton.kernels.reverse_scan import (
    arriving,
    pick_config,
    reverse_scan,
    reverse_scan_entering,
    suffix_products,
)

# Triton 3.6's interpreter turns one-element arrays into ints as NumPy is about to stop doing.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Each step rounds S + 1 products, 2⁻²⁴ each, and the transitions below let an error live some ten steps.
TOLERANCE = 5e-6


def _problem(states: int, steps: int, batch: int, units: int, matrices: int = 1, seed: int = 0):
    """m, delta, phi, carry; transitions of either sign, some of them zero: no prefix could be divided out."""
    torch.manual_seed(seed)
    m = 0.5 * torch.randn(states, states, steps, batch, units, device=DEVICE)
    m[torch.rand_like(m) < 0.1] = 0
    delta = torch.randn(states, steps, batch, units, device=DEVICE)
    phi = torch.randn(states, steps, batch, matrices, units, device=DEVICE)
    return m, delta, phi, torch.randn(states, batch, units, device=DEVICE)


def _assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= TOLERANCE * max(want.abs().max().item(), 1.0)


def _check_all(states, steps, batch, units, matrices, with_carry, seed=0):
    m, delta, phi, carry = _problem(states, steps, batch, units, matrices, seed)
    given_carry = carry if with_carry else None
    want, want_passed = rfp.reverse_scan(m.double(), delta.double(), carry.double() if with_carry else None)
    credit, passed = reverse_scan(m, delta, given_carry)
    _assert_near(credit, want)
    _assert_near(passed, want_passed)

    credit, passed, entering = reverse_scan_entering(m, delta, phi, given_carry)
    _assert_near(credit, want)
    _assert_near(passed, want_passed)
    _assert_near(entering, torch.einsum("vtbn,vtbkn->tbkn", want, phi.double()))

    want_suffix, want_whole = rfp.suffix_products(m.double())
    suffix, whole = suffix_products(m)
    _assert_near(suffix, want_suffix)
    _assert_near(whole, want_whole)
    adds, whole = arriving(m, phi)
    _assert_near(whole, want_whole)
    _assert_near(adds, rfp.arriving(want_suffix, phi.double()))


@pytest.mark.parametrize(
    "shape",
    [
        # S, T, B, N, K: one unit; a tail; a whole program; several, with rows that end inside one.
        (1, 1, 1, 1, 1),
        (2, 1, 1, 1, 2),
        (2, 7, 1, 63, 4),
        (1, 33, 3, 65, 3),
        (2, 5, 2, 64, 4),
        (2, 17, 3, 127, 1),
        (2, 2, 2, 5, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_carry", [False, True])
def test_every_scan_is_the_reference(shape, with_carry):
    _check_all(*shape, with_carry=with_carry)


@settings(max_examples=25, deadline=None)
@given(
    states=st.integers(1, 2),
    steps=st.integers(1, 9),
    batch=st.integers(1, 3),
    units=st.integers(1, 70),
    matrices=st.integers(1, 4),
    with_carry=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_small_shape(states, steps, batch, units, matrices, with_carry, seed):
    _check_all(states, steps, batch, units, matrices, with_carry, seed)


@pytest.mark.parametrize("states", [1, 2])
def test_two_pieces_joined_by_carry_are_one_scan(states):
    m, delta, _, _ = _problem(states, 9, 2, 37)
    credit, passed = reverse_scan(m, delta)
    late, carry = reverse_scan(m[:, :, 4:].contiguous(), delta[:, 4:].contiguous())
    early, passed_early = reverse_scan(m[:, :, :4].contiguous(), delta[:, :4].contiguous(), carry)
    _assert_near(torch.cat([early, late], dim=1), credit.double())
    _assert_near(passed_early, passed.double())


def test_a_zero_transition_lets_nothing_pass_however_large():
    """A reset is a transition of zero, and credit of any finite size passes it as nothing."""
    m, delta, _, _ = _problem(2, 6, 1, 5)
    m[:, :, 3] = 0
    delta[:, 3:] *= 1e30
    credit, _ = reverse_scan(m, delta)
    alone, _ = reverse_scan(m[:, :, :3].contiguous(), delta[:, :3].contiguous())
    _assert_near(credit[:, :3], alone.double())


def test_two_runs_agree_in_every_bit_and_unwritten_memory_is_not_read(monkeypatch):
    m, delta, phi, carry = _problem(2, 5, 3, 43, 3)
    first = [*reverse_scan_entering(m, delta, phi, carry), *suffix_products(m), *arriving(m, phi)]
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    second = [*reverse_scan_entering(m, delta, phi, carry), *suffix_products(m), *arriving(m, phi)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pick_config():
    assert pick_config(0, 32) == pick_config(8, 32) == (128, 4)
    assert pick_config(4, 64) == (256, 4)
    assert pick_config(9, 32) == (128, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"m": [1.0]}, TypeError, "m must be a torch.Tensor, got list"),
        ({"m": torch.zeros(2, 3, 5, 7)}, ValueError, r"m must have shape \(S, S, T, B, N\)"),
        ({"m": torch.zeros(2, 2, 0, 5, 7)}, ValueError, r"none of them 0, got \(2, 2, 0, 5, 7\)"),
        ({"m": torch.zeros(3, 3, 3, 5, 7)}, ValueError, "with S of 1 or 2"),
        ({"m": torch.zeros(2, 1, 3, 5, 7)}, ValueError, "with S of 1 or 2"),
        ({"m": torch.zeros(2, 2, 3, 5, 7).bfloat16()}, TypeError, "m must have dtype torch.float32"),
        ({"m": torch.zeros(2, 2, 3, 7, 5).mT}, ValueError, "m must be contiguous, got strides"),
        ({"delta": torch.zeros(2, 3, 5, 6)}, ValueError, r"delta must have shape \(2, 3, 5, 7\)"),
        ({"delta": torch.zeros(2, 3, 5, 7, device="meta")}, ValueError, "delta must be on"),
        ({"phi": torch.zeros(2, 3, 5, 7)}, ValueError, r"phi must have shape \(S, T, B, K, N\)"),
        ({"phi": torch.zeros(2, 3, 5, 4, 6)}, ValueError, r"phi must have shape \(2, 3, 5, 4, 7\)"),
        ({"carry": torch.zeros(5, 7)}, ValueError, r"carry must have shape \(2, 5, 7\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    m, delta, phi, carry = _problem(2, 3, 5, 7)
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.is_cpu else v for k, v in change.items()}
    arguments = {"m": m, "delta": delta, "phi": phi, "carry": carry, **moved}
    with pytest.raises(error, match=message):
        reverse_scan_entering(**arguments)
    if "phi" not in change:
        del arguments["phi"]
        with pytest.raises(error, match=message):
            reverse_scan(**arguments)
    if "m" in change:
        with pytest.raises(error, match=message):
            suffix_products(arguments["m"])
    if "m" in change or "phi" in change:
        with pytest.raises(error, match=message):
            arriving(arguments["m"], {"phi": phi, **change}["phi"])
