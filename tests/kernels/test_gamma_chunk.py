"""The chunk kernel of Γ against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from kernel_problems import DEVICE, SEEDS, SIZES, check_error, gammas_amid_nan, poison

from rjepa_triton.kernels import gamma_chunk
from rjepa_triton.kernels.gamma_chunk import Config, gamma_chunk_, pick_config

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Each of the C + S products and sums rounds by at most 2⁻²⁴; a few of these roundings add up.
TOLERANCE = 1e-6
# Tensor cores keep 10 bits of each factor. The interpreter keeps all of them, so there TOLERANCE must hold.
PRODUCT_TOLERANCE = 2**-9 if DEVICE == "cuda" else TOLERANCE


def _problem(
    states: int,
    steps: int,
    batch: int,
    matrices: int,
    units: int,
    fan_in: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | list[Tensor]]:
    torch.manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    return {
        "gammas": [random(batch, matrices, units, fan_in).to(dtype) for _ in range(states)],
        "whole": random(states, states, batch, units),
        "arriving": random(states, steps, batch, matrices, units),
        "y": random(steps, batch, matrices, fan_in),
        "credit": random(states, batch, units),
    }


def _reference(problem: dict) -> tuple[list[Tensor], Tensor]:
    """Γ after the chunk, and the part of the gradient that is read from Γ₀, in float64."""
    old = [g.double() for g in problem["gammas"]]
    new = rfp.carried(old, problem["whole"].double())
    for nu, gamma in enumerate(new):
        rfp.add_arriving_(gamma, problem["arriving"][nu].double(), problem["y"].double())
    return new, rfp.gamma_read(old, problem["credit"].double())


def _assert_near(got: Tensor, want: Tensor, relative: float) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= relative * max(want.abs().max().item(), 1.0)


def _check(problem: dict, relative: float = TOLERANCE, **options: str) -> None:
    want, want_gradient = _reference(problem)
    gradient = gamma_chunk_(**problem, **options)
    for got, expected in zip(problem["gammas"], want, strict=True):
        _assert_near(got, expected, relative)
    _assert_near(gradient, want_gradient, TOLERANCE)


SHAPES = [
    # S, C, B, K, N, M
    (1, 1, 1, 1, 1, 1),
    (2, 5, 1, 2, 63, 65),
    (2, 3, 3, 4, 65, 63),
    (1, 16, 3, 3, 127, 1),
    (2, 8, 3, 1, 1, 127),
    (2, 2, 1, 4, 64, 64),
    (2, 2, 2, 2, 9, 132),
    (3, 4, 2, 3, 33, 64),
    (4, 3, 2, 2, 9, 67),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_advances_gamma_and_reads_the_past(shape):
    _check(_problem(*shape))


SMALL = Config(8, 64, block_c=1, vector=4, num_warps=1, num_stages=1)
PRODUCTS = Config(64, 32, block_c=32, vector=4, num_warps=4, num_stages=1)


@pytest.mark.parametrize(
    "shape",
    [
        # C below one block of 32 steps, exactly one, two, and one with a tail; tails in rows and columns.
        (2, 5, 1, 1, 63, 36),
        (1, 32, 2, 2, 65, 28),
        (2, 64, 1, 2, 64, 32),
        (2, 37, 2, 1, 3, 68),
        (1, 1, 1, 1, 1, 4),
    ],
    ids=str,
)
def test_matrix_products(shape, monkeypatch):
    monkeypatch.setattr(gamma_chunk, "pick_config", lambda *_: PRODUCTS)
    _check(_problem(*shape), PRODUCT_TOLERANCE, precision="tf32")


def test_large_tiles_in_registers(monkeypatch):
    monkeypatch.setattr(gamma_chunk, "pick_config", lambda *_: Config(32, 64, 1, 4, 4, 1))
    _check(_problem(2, 6, 2, 2, 33, 68))


@settings(max_examples=20, deadline=None)
@given(**SIZES, steps=st.integers(1, 9), with_credit=st.booleans(), seed=SEEDS)
def test_any_small_shape(states, steps, batch, matrices, units, fan_in, with_credit, seed):
    problem = _problem(states, steps, batch, matrices, units, fan_in, seed=seed)
    if with_credit:
        _check(problem)
        return
    want, _ = _reference(problem)
    assert gamma_chunk_(**{**problem, "credit": None}) is None
    for got, expected in zip(problem["gammas"], want, strict=True):
        _assert_near(got, expected, TOLERANCE)


@pytest.mark.parametrize("states", [1, 2, 3])
def test_bfloat16_gamma_is_rounded_once(states):
    problem = _problem(states, 4, 2, 2, 17, 66, torch.bfloat16)
    want, want_gradient = _reference(problem)
    gradient = gamma_chunk_(**problem)
    # One unit in the last of 8 bits: the interpreter truncates where a GPU rounds to nearest.
    for got, expected in zip(problem["gammas"], want, strict=True):
        assert got.dtype == torch.bfloat16
        assert bool(((got.double() - expected).abs() <= 2**-7 * expected.abs() + 1e-5).all())
    _assert_near(gradient, want_gradient, TOLERANCE)


def test_a_chunk_is_its_steps_one_by_one():
    """The chunk kernel after those that make U, R(0) and the credit, against the reference's step form."""
    from rjepa_triton.kernels.reverse_scan import arriving, reverse_scan_entering

    states, steps, batch, matrices, units, fan_in = 2, 7, 2, 3, 9, 21
    torch.manual_seed(2)
    m = 0.5 * torch.randn(states, states, steps, batch, units, device=DEVICE)
    phi = torch.randn(states, steps, batch, matrices, units, device=DEVICE)
    y = torch.randn(steps, batch, matrices, fan_in, device=DEVICE)
    delta = torch.randn(states, steps, batch, units, device=DEVICE)
    gammas = [torch.randn(batch, matrices, units, fan_in, device=DEVICE) for _ in range(states)]

    by_step = [g.double() for g in gammas]
    total = sum(
        rfp.gamma_step_(
            by_step,
            m[:, :, t].double(),
            phi[:, t].double(),
            y[t].double(),
            delta[:, t].double(),
        )
        for t in range(steps)
    )
    by_matrix = [{nu: phi[nu, :, :, k].contiguous() for nu in range(states)} for k in range(matrices)]
    entering, _, passed = reverse_scan_entering(m, delta, by_matrix, [])
    adds, whole = arriving(m, phi)
    past = gamma_chunk_(gammas, whole, adds, y, passed)
    for got, want in zip(gammas, by_step, strict=True):
        _assert_near(got, want, TOLERANCE)
    _assert_near(past + torch.einsum("ktbn,tbkm->knm", entering, y), total, 5 * TOLERANCE)


@pytest.mark.parametrize("config", [SMALL, PRODUCTS], ids=["registers", "products"])
def test_two_runs_agree_in_every_bit_and_unwritten_memory_is_not_read(config, monkeypatch):
    monkeypatch.setattr(gamma_chunk, "pick_config", lambda *_: config)
    first = _problem(2, 35, 2, 2, 33, 68)
    second = {**first, "gammas": [g.clone() for g in first["gammas"]]}
    gradient = gamma_chunk_(**first)
    poison(monkeypatch)
    assert torch.equal(gradient, gamma_chunk_(**second))
    assert all(torch.equal(a, b) for a, b in zip(first["gammas"], second["gammas"], strict=True))


@pytest.mark.parametrize("config", [SMALL, PRODUCTS], ids=["registers", "products"])
def test_writes_nothing_beyond_gamma(config, monkeypatch):
    monkeypatch.setattr(gamma_chunk, "pick_config", lambda *_: config)
    shape = (2, 2, 9, 68)
    with gammas_amid_nan(*shape) as gammas:
        gamma_chunk_(**{**_problem(2, 4, *shape), "gammas": gammas})


def test_pick_config():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert pick_config(1024, 1024, 32, fp32, "tf32") == PRODUCTS
    assert pick_config(1024, 1000, 100, bf16, "tf32") == PRODUCTS._replace(vector=8)
    registers = Config(32, 64, 1, 4, 4, 1)
    assert pick_config(1024, 1024, 31, fp32, "tf32") == registers
    assert pick_config(1024, 1024, 64, fp32, "ieee") == registers
    assert pick_config(128, 128, 64, fp32, "tf32") == pick_config(1, 4, 1, fp32, "ieee") == SMALL
    # Rows that aren't a multiple of 16 bytes are accessed number by number.
    assert pick_config(4096, 4095, 64, fp32, "tf32") == Config(4, 64, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gammas": torch.zeros(1)}, TypeError, "gammas must be a tuple or a list of tensors, got Tensor"),
        ({"whole": torch.zeros(2, 2, 2, 4)}, ValueError, r"whole must have shape \(2, 2, 2, 5\)"),
        ({"whole": torch.zeros(2, 2, 5, 2).mT}, ValueError, "whole must be contiguous, got strides"),
        ({"arriving": torch.zeros(2, 2, 3, 5)}, ValueError, r"arriving must have shape \(S, C, B, K, N\)"),
        ({"arriving": torch.zeros(2, 0, 2, 3, 5)}, ValueError, "none of them 0"),
        ({"arriving": torch.zeros(2, 4, 2, 3, 6)}, ValueError, r"shape \(2, 4, 2, 3, 5\), got"),
        ({"arriving": torch.zeros(2, 4, 2, 3, 5).double()}, TypeError, "arriving must have dtype"),
        ({"y": torch.zeros(5, 2, 3, 7)}, ValueError, r"y must have shape \(4, 2, 3, 7\)"),
        ({"y": torch.zeros(4, 2, 3, 7, device="meta")}, ValueError, "y must be on"),
        ({"credit": torch.zeros(2, 5, 2).mT}, ValueError, "credit must be contiguous"),
        ({"credit": 1.0}, TypeError, "credit must be a torch.Tensor, got float"),
        ({"precision": "bf16"}, ValueError, "precision must be 'ieee' or 'tf32', got 'bf16'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    check_error(gamma_chunk_, _problem(2, 4, 2, 3, 5, 7), change, error, message)
