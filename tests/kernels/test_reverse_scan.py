"""The scans backward in time against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from kernel_problems import DEVICE, SEEDS, SIZES, check_error

from rjepa_triton.kernels import reverse_scan as module
from rjepa_triton.kernels.reverse_scan import (
    ScanConfig,
    arriving,
    pick_config,
    pick_scan_config,
    reverse_scan,
    reverse_scan_entering,
    suffix_products,
)

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Each step rounds S + 1 products by 2⁻²⁴ each, and with the transitions below an error lasts some ten steps.
TOLERANCE = 5e-6
ANY = {"states": SIZES["states"], "with_carry": st.booleans(), "seed": SEEDS}


def _problem(states: int, steps: int, batch: int, units: int, matrices: int = 1, seed: int = 0):
    """m, delta, phi, carry. Transitions have either sign, and some are zero, so no prefix product could be divided out."""
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


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scan of credits is split into blocks of three steps; the last may be shorter."""
    monkeypatch.setattr(module, "pick_scan_config", lambda *_: ScanConfig(128, 4, 3))


def _partials(states: int, phi: Tensor) -> tuple[list[dict[int, Tensor]], list[dict[int, Tensor]]]:
    """Partials of matrices and of one input. Each matrix enters one state, the last one none, and the input all."""
    by_matrix = [[plane[:, :, k].contiguous() for plane in phi] for k in range(phi.shape[3])]
    matrices = [{k % states: of[k % states]} for k, of in enumerate(by_matrix)]
    return [*matrices, {}], [dict(enumerate(by_matrix[0]))]


def _made_of(credit: Tensor, partials: Sequence[Mapping[int, Tensor]]) -> Tensor:
    zero = torch.zeros_like(credit[0])
    return torch.stack([sum((credit[nu] * p.double() for nu, p in of.items()), zero) for of in partials])


def _check_credits(states, steps, batch, units, matrices, with_carry, seed=0):
    m, delta, phi, carry = _problem(states, steps, batch, units, matrices, seed)
    given_carry = carry if with_carry else None
    want, want_passed = rfp.reverse_scan(m.double(), delta.double(), carry.double() if with_carry else None)
    credit, passed = reverse_scan(m, delta, given_carry)
    _assert_near(credit, want)
    _assert_near(passed, want_passed)

    by_matrix, by_input = _partials(states, phi)
    entering, for_inputs, passed = reverse_scan_entering(m, delta, by_matrix, by_input, given_carry)
    _assert_near(entering, _made_of(want, by_matrix))
    _assert_near(for_inputs, _made_of(want, by_input))
    _assert_near(passed, want_passed)


def _check_all(states, steps, batch, units, matrices, with_carry, seed=0):
    _check_credits(states, steps, batch, units, matrices, with_carry, seed)
    m, _, phi, _ = _problem(states, steps, batch, units, matrices, seed)
    want_suffix, want_whole = rfp.suffix_products(m.double())
    suffix, whole = suffix_products(m)
    _assert_near(suffix, want_suffix)
    _assert_near(whole, want_whole)
    adds, whole = arriving(m, phi)
    _assert_near(whole, want_whole)
    _assert_near(adds, rfp.arriving(want_suffix, phi.double()))


# S, T, B, N, K. One unit; a tail; a whole program; several programs, with batch rows that end inside one.
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1, 1, 1), (2, 1, 1, 1, 2), (2, 7, 1, 63, 4), (1, 33, 3, 65, 3), (2, 5, 2, 64, 4)],
        *[(2, 17, 3, 127, 1), (2, 2, 2, 5, 9), (3, 7, 2, 65, 4), (4, 5, 1, 63, 3)],
    ],
    ids=str,
)


@SHAPES
@pytest.mark.parametrize("with_carry", [False, True])
def test_every_scan_is_the_reference(shape, with_carry):
    _check_all(*shape, with_carry=with_carry)


@SHAPES
@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.usefixtures("by_blocks")
def test_blocks_of_time_are_the_reference(shape, with_carry):
    _check_credits(*shape, with_carry=with_carry)


# Blocks as they are picked for long sequences of few units: about twenty steps each, the last of them shorter.
@pytest.mark.parametrize("shape", [(2, 63, 1, 1, 1), (2, 300, 1, 63, 1), (1, 1000, 1, 127, 1)], ids=str)
def test_long_sequences(shape):
    _check_credits(*shape, with_carry=True)


@settings(max_examples=25, deadline=None)
@given(
    **ANY,
    steps=st.integers(1, 9),
    batch=SIZES["batch"],
    units=st.integers(1, 70),
    matrices=SIZES["matrices"],
)
def test_any_small_shape(states, steps, batch, units, matrices, with_carry, seed):
    _check_all(states, steps, batch, units, matrices, with_carry, seed)


@settings(max_examples=15, deadline=None)
@given(**ANY, steps=st.integers(1, 12), block_steps=st.integers(1, 12), units=st.integers(1, 140))
def test_any_blocks_of_time(states, steps, block_steps, units, with_carry, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pick_scan_config", lambda *_: ScanConfig(128, 4, min(steps, block_steps)))
        _check_credits(states, steps, 1, units, 2, with_carry, seed)


@pytest.mark.parametrize("states", [1, 2, 3, 4])
def test_two_pieces_joined_by_carry_are_one_scan(states):
    m, delta, _, _ = _problem(states, 9, 2, 37)
    credit, passed = reverse_scan(m, delta)
    late, carry = reverse_scan(m[:, :, 4:].contiguous(), delta[:, 4:].contiguous())
    early, passed_early = reverse_scan(m[:, :, :4].contiguous(), delta[:, :4].contiguous(), carry)
    _assert_near(torch.cat([early, late], dim=1), credit.double())
    _assert_near(passed_early, passed.double())


def _check_reset():
    m, delta, _, _ = _problem(2, 6, 1, 5)
    m[:, :, 3] = 0
    delta[:, 3:] *= 1e30
    credit, _ = reverse_scan(m, delta)
    alone, _ = reverse_scan(m[:, :, :3].contiguous(), delta[:, :3].contiguous())
    _assert_near(credit[:, :3], alone.double())


def test_a_zero_transition_lets_nothing_pass_however_large():
    """A reset is a transition of zero, which stops credit of any finite size."""
    _check_reset()


@pytest.mark.usefixtures("by_blocks")
def test_a_zero_transition_lets_nothing_pass_from_block_to_block():
    _check_reset()


def _all_outputs() -> list[Tensor]:
    m, delta, phi, carry = _problem(2, 5, 3, 43, 3)
    of_credit = [
        *reverse_scan(m, delta, carry),
        *reverse_scan_entering(m, delta, *_partials(2, phi), carry),
    ]
    return [*of_credit, *suffix_products(m), *arriving(m, phi)]


def _check_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _all_outputs()
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    second = _all_outputs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_agree_in_every_bit_and_unwritten_memory_is_not_read(monkeypatch):
    _check_repeats(monkeypatch)


@pytest.mark.usefixtures("by_blocks")
def test_two_runs_by_blocks_agree_too(monkeypatch):
    _check_repeats(monkeypatch)


def test_pick_config():
    assert pick_config(0, 2, 32) == pick_config(8, 2, 32) == (128, 4)
    assert pick_config(4, 2, 64) == (256, 4)
    assert pick_config(9, 2, 32) == (128, 1)
    assert pick_config(9, 3, 32) == (64, 1)


@pytest.mark.parametrize(
    ("steps", "units", "states", "partials", "written", "picked"),
    [
        # √(2T) blocks for few units, eight programs per multiprocessor for more
        (4096, 64, 2, 0, 2, (128, 4, 46)),
        (4096, 8192, 2, 0, 2, (128, 4, 256)),
        # 128 units move 128·14 numbers per step, and 132 multiprocessors 132·1024 while they wait for it: 75 programs
        (4096, 128 * 75, 2, 0, 2, (128, 4, 293)),
        (4096, 128 * 76, 2, 0, 2, (128, 4, 4096)),
        # with one state it is 128·5
        (4096, 128 * 211, 1, 0, 1, (128, 4, 820)),
        (4096, 128 * 212, 1, 0, 1, (128, 4, 4096)),
        # with partials it is more
        (4096, 128 * 45, 2, 6, 5, (128, 4, 179)),
        (4096, 128 * 46, 2, 6, 5, (128, 4, 4096)),
        (100, 32 * 1024, 2, 0, 2, (128, 4, 100)),
        (255, 1, 2, 0, 2, (128, 4, 255)),
        (256, 1, 2, 0, 2, (128, 4, 12)),
        (1, 1, 1, 0, 1, (128, 4, 1)),
        # too much for the loads of four steps
        (64, 64, 2, 19, 9, (128, 1, 64)),
        # half as many units of three or four states
        (4096, 64, 3, 0, 3, (64, 4, 46)),
        (64, 64, 4, 5, 3, (64, 1, 64)),
    ],
)
def test_pick_scan_config(steps, units, states, partials, written, picked):
    assert pick_scan_config(steps, units, states, partials, written, 32, 132) == picked


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"m": [1.0]}, TypeError, "m must be a torch.Tensor, got list"),
        ({"m": torch.zeros(2, 3, 5, 7)}, ValueError, r"m must have shape \(S, S, T, B, N\)"),
        ({"m": torch.zeros(2, 2, 0, 5, 7)}, ValueError, r"none of them 0, got \(2, 2, 0, 5, 7\)"),
        ({"m": torch.zeros(5, 5, 3, 5, 7)}, ValueError, "with S of at most 4"),
        ({"m": torch.zeros(2, 1, 3, 5, 7)}, ValueError, "with S of at most 4"),
        ({"m": torch.zeros(2, 2, 3, 5, 7).bfloat16()}, TypeError, "m must have dtype torch.float32"),
        ({"m": torch.zeros(2, 2, 3, 7, 5).mT}, ValueError, "m must be contiguous, got strides"),
        ({"delta": torch.zeros(2, 3, 5, 6)}, ValueError, r"delta must have shape \(2, 3, 5, 7\)"),
        ({"delta": torch.zeros(2, 3, 5, 7, device="meta")}, ValueError, "delta must be on"),
        (
            {"matrices": [{2: torch.zeros(3, 5, 7)}]},
            ValueError,
            r"matrices\[0\] must have states below 2, got 2",
        ),
        (
            {"matrices": [{0: torch.zeros(3, 5, 6)}]},
            ValueError,
            r"matrices\[0\]\[0\] must have shape \(3, 5, 7\)",
        ),
        ({"inputs": [{}, {1: 1.0}]}, TypeError, r"inputs\[1\]\[1\] must be a torch.Tensor, got float"),
        ({"carry": torch.zeros(5, 7)}, ValueError, r"carry must have shape \(2, 5, 7\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    m, delta, _, carry = _problem(2, 3, 5, 7)
    arguments = {"m": m, "delta": delta, "carry": carry}
    check_error(reverse_scan_entering, {**arguments, "matrices": [], "inputs": []}, change, error, message)
    if not {"matrices", "inputs"} & change.keys():
        check_error(reverse_scan, arguments, change, error, message)
    if "m" in change:
        check_error(suffix_products, {}, change, error, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": torch.zeros(5, 5, 3, 5, 7)}, "with S of at most 4"),
        ({"phi": torch.zeros(2, 3, 5, 7)}, r"phi must have shape \(S, T, B, K, N\)"),
        ({"phi": torch.zeros(2, 3, 5, 4, 6)}, r"phi must have shape \(2, 3, 5, 4, 7\)"),
    ],
)
def test_errors_of_arriving_name_the_argument(change, message):
    m, _, phi, _ = _problem(2, 3, 5, 7)
    with pytest.raises(ValueError, match=message):
        arriving(**{"m": m, "phi": phi, **{name: value.to(DEVICE) for name, value in change.items()}})
