"""The step kernel of Γ against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from kernel_problems import DEVICE, SEEDS, SHAPES, SIZES, check_error, gammas_amid_nan, poison

from rjepa_triton.kernels import gamma_step
from rjepa_triton.kernels._launch import DeviceSizes
from rjepa_triton.kernels.gamma_step import Config, gamma_step_, pick_config

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

FP32 = torch.float32
# Γ is a sum of at most S + 1 products, and the gradient a sum over the batch of S products; each rounding is at most
# 2⁻²⁴ of its terms.
TOLERANCE = 1e-6
LR = torch.full((1,), 0.1, device=DEVICE)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def _rng_state(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step], device=DEVICE)


def _problem(
    states: int, batch: int, matrices: int, units: int, fan_in: int, dtype: torch.dtype = FP32, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """gammas, m, phi, y, delta. Each matrix enters one state, as in an RGC."""
    torch.manual_seed(seed)
    gammas = [_random(batch, matrices, units, fan_in).to(dtype) for _ in range(states)]
    phi = _random(states, batch, matrices, units)
    for k in range(matrices):
        phi[[nu for nu in range(states) if nu != k % states], :, k] = 0
    m, y = _random(states, states, batch, units), _random(batch, matrices, fan_in)
    return gammas, m, phi, y, _random(states, batch, units)


def _reference(
    gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    new = [g.double() for g in gammas]
    wide = None if delta is None else delta.double()
    gradient = rfp.gamma_step_(new, m.double(), phi.double(), y.double(), wide)
    return new, gradient


def _assert_near(got: Tensor, want: Tensor, relative: float, terms: int = 1) -> None:
    """Every error is at most relative·√terms times the largest entry of `want`, or 1: `terms` numbers were summed."""
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= relative * math.sqrt(terms) * max(want.abs().max().item(), 1.0)


@pytest.mark.parametrize(
    "shape", [*SHAPES, (1, 1, 2, 8, 130), (2, 2, 2, 9, 132), (3, 2, 4, 9, 132), (4, 3, 4, 33, 65)], ids=str
)
def test_advances_gamma_and_reads_the_gradient_of_the_reference(shape):
    gammas, m, phi, y, delta = _problem(*shape)
    want, want_gradient = _reference(gammas, m, phi, y, delta)
    gradient = gamma_step_(gammas, m, phi, y, delta)
    for got, expected in zip(gammas, want, strict=True):
        _assert_near(got, expected, TOLERANCE)
    _assert_near(gradient, want_gradient, TOLERANCE, terms=shape[1])


@settings(max_examples=25, deadline=None)
@given(**SIZES, with_delta=st.booleans(), seed=SEEDS)
def test_any_small_shape(states, batch, matrices, units, fan_in, with_delta, seed):
    gammas, m, phi, y, delta = _problem(states, batch, matrices, units, fan_in, seed=seed)
    given_delta = delta if with_delta else None
    want, want_gradient = _reference(gammas, m, phi, y, given_delta)
    gradient = gamma_step_(gammas, m, phi, y, given_delta)
    for got, expected in zip(gammas, want, strict=True):
        _assert_near(got, expected, TOLERANCE)
    if with_delta:
        _assert_near(gradient, want_gradient, TOLERANCE, terms=batch)
    else:
        assert gradient is None


def test_large_tiles_agree(monkeypatch):
    monkeypatch.setattr(gamma_step, "pick_config", lambda *_: Config(32, 64, 4, 4))
    gammas, m, phi, y, delta = _problem(2, 2, 2, 65, 68)
    want, want_gradient = _reference(gammas, m, phi, y, delta)
    gradient = gamma_step_(gammas, m, phi, y, delta)
    for got, expected in zip(gammas, want, strict=True):
        _assert_near(got, expected, TOLERANCE)
    _assert_near(gradient, want_gradient, TOLERANCE, terms=2)


@pytest.mark.parametrize("states", [1, 2, 3])
def test_bfloat16_gamma_is_rounded_after_the_gradient_is_read(states):
    gammas, m, phi, y, delta = _problem(states, 3, 2, 17, 66, torch.bfloat16)
    want, want_gradient = _reference(gammas, m, phi, y, delta)
    gradient = gamma_step_(gammas, m, phi, y, delta)
    # One unit in the last of 8 bits: the interpreter truncates where a GPU rounds to nearest.
    for got, expected in zip(gammas, want, strict=True):
        assert got.dtype == torch.bfloat16
        assert bool(((got.double() - expected).abs() <= 2**-7 * expected.abs() + TOLERANCE).all())
    _assert_near(gradient, want_gradient, TOLERANCE, terms=3)


def _floor(value: Tensor) -> Tensor:
    """`value` truncated to bfloat16, toward zero."""
    return (value.view(torch.int32) & ~0xFFFF).view(torch.float32)


def test_stochastic_rounding_is_unbiased():
    """Each result is one of two neighbours, the larger one as often as it should be, and draws are independent."""
    states, batch, matrices, units, fan_in, draws = 2, 1, 1, 8, 64, 200
    m = torch.zeros(states, states, batch, units, device=DEVICE)
    phi, y = _random(states, batch, matrices, units), _random(batch, matrices, fan_in)
    exact = phi[..., None] * y[None, :, :, None]
    below = _floor(exact)
    gap = _floor(below * (1 + 2**-7)) - below
    share = (exact.double() - below) / gap
    errors = []
    for step in range(draws):
        gammas = [
            torch.zeros(batch, matrices, units, fan_in, dtype=torch.bfloat16, device=DEVICE)
            for _ in range(states)
        ]
        gamma_step_(gammas, m, phi, y, rng_state=_rng_state(7, step))
        up = (torch.stack(gammas).double() - below) / gap
        assert bool(((up == 0) | (up == 1)).all())
        errors.append((up - share) / (share * (1 - share)).sqrt().clamp(min=0.1))
    z = torch.stack(errors)
    count = z[0].numel()
    # Over the draws, each number has a mean of 0 and a variance of 1, if it isn't clamped; and no two are correlated.
    free = (share > 0.05) & (share < 0.95)
    assert abs(z[:, free].mean().item()) < 4 / math.sqrt(draws * count)
    assert abs((z[:, free].mean(0) ** 2).mean().item() * draws - 1) < 6 * math.sqrt(2 / count)
    pairs = [
        (z[..., 1:], z[..., :-1]),
        (z[..., 1:, :], z[..., :-1, :]),
        (z[:, :1], z[:, 1:]),
        (z[1:], z[:-1]),
    ]
    for left, right in pairs:
        assert abs((left * right).mean().item()) < 5 / math.sqrt((left * right).numel())


def test_stochastic_rounding_leaves_what_needs_none():
    """bfloat16 numbers, zeros, infinities and NaN of either sign stay; the largest float32 may become infinite."""
    largest = torch.finfo(torch.float32).max
    kept = torch.tensor([1.0, -1.0078125, 0.0, -0.0, 2.0**-126, math.inf, -math.inf, math.nan, -math.nan])
    gamma = kept.bfloat16().reshape(1, 1, 1, -1).to(DEVICE)
    want = gamma.clone()
    one, nothing = torch.ones(1, 1, 1, 1, device=DEVICE), torch.zeros(1, 1, 1, 1, device=DEVICE)
    y = torch.zeros(1, 1, kept.numel(), device=DEVICE)
    for step in range(5):
        gamma_step_([gamma], one, nothing, y, rng_state=_rng_state(0, step))
        torch.testing.assert_close(gamma, want, rtol=0, atol=0, equal_nan=True)
    gamma = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    gamma_step_([gamma], one, one * largest, torch.ones(1, 1, 1, device=DEVICE), rng_state=_rng_state(0, 0))
    assert gamma.item() in (_floor(torch.tensor(largest)).item(), math.inf)


def test_random_bits_are_of_seed_step_and_place(monkeypatch):
    """Tiles and parts of the batch don't change the bits; seed and step do, with their upper 32 bits too."""
    problem = _problem(2, 2, 2, 9, 24, torch.bfloat16)

    def stepped(seed: int = 3, step: int = 5) -> Tensor:
        gammas = [g.clone() for g in problem[0]]
        gamma_step_(gammas, *problem[1:4], rng_state=_rng_state(seed, step))
        return torch.stack(gammas)

    first = stepped()
    assert torch.equal(first, stepped())
    for other in ({"seed": 4}, {"step": 6}, {"seed": 3 + 2**40}, {"step": 5 + 2**32}, {"seed": 5, "step": 3}):
        assert 0.2 < (stepped(**other) != first).float().mean().item() < 0.5
    for config in (Config(2, 64, 1, 1), Config(4, 64, 1, 1), Config(32, 64, 8, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(gamma_step, "pick_config", lambda *_, config=config: config)
            assert torch.equal(first, stepped())
    monkeypatch.setattr(gamma_step, "split_rows", lambda *_: 1)
    assert torch.equal(first, stepped())


def test_long_memory_is_better_rounded_stochastically():
    """Inputs with a mean and a decay of 0.999: rounding to nearest loses most of what a step adds and forgets."""
    steps, units, fan_in = 500, 8, 64
    m = torch.full((1, 1, 1, units), 0.999, device=DEVICE)
    exact = [torch.zeros(1, 1, units, fan_in, dtype=torch.float64, device=DEVICE)]
    nearest, stochastic = ([exact[0].bfloat16()] for _ in range(2))
    for step in range(steps):
        phi = 0.5 + torch.rand(1, 1, 1, units, device=DEVICE)
        y = 1 + 0.3 * _random(1, 1, fan_in)
        rfp.gamma_step_(exact, m.double(), phi.double(), y.double())
        rfp.gamma_step_(nearest, m, phi, y)
        gamma_step_(stochastic, m, phi, y, rng_state=_rng_state(1, step))

    def error(got: list[Tensor]) -> float:
        return float((got[0].double() - exact[0]).norm() / exact[0].norm())

    # At most 500 roundings count. Neighbours are 2⁻⁷ apart or less, and a rounding's variance is a sixth of
    # that squared.
    assert error(stochastic) < math.sqrt(500 / 6) * 2**-7 < error(nearest)


@pytest.mark.parametrize(
    "batch", [3, 16]
)  # the kernel updates the weights, or the launcher after adding up parts
def test_weights_take_the_step_that_the_gradient_says(batch):
    gammas, m, phi, y, delta = _problem(2, batch, 3, 33, 65)
    weights = [_random(33, 65) for _ in range(3)]
    before, twin = [w.clone() for w in weights], [g.clone() for g in gammas]
    gradient = gamma_step_(twin, m, phi, y, delta)
    # the second weight isn't updated
    assert gamma_step_(gammas, m, phi, y, delta, weights=[weights[0], None, weights[2]], lr=LR) is None
    for k in (0, 2):
        torch.testing.assert_close(weights[k], before[k] - 0.1 * gradient[k], rtol=0, atol=1e-6)
    assert torch.equal(weights[1], before[1])
    assert all(torch.equal(a, b) for a, b in zip(gammas, twin, strict=True))


@pytest.mark.parametrize("units", [2, 127, 300])
@pytest.mark.parametrize("states", [1, 2, 3])
def test_rows_that_read_their_own_number(states, units):
    """Diagonal matrices: Γ and y have one number per unit."""
    gammas, m, phi, _, delta = _problem(states, 3, 2, units, 1)
    y = _random(3, 2, units)
    want, want_gradient = _reference(gammas, m, phi, y, delta)
    gradient = gamma_step_(gammas, m, phi, y, delta)
    _assert_near(gradient, want_gradient, TOLERANCE, terms=3)
    for got, expected in zip(gammas, want, strict=True):
        _assert_near(got, expected, TOLERANCE)


@pytest.mark.parametrize("states", [1, 2, 3])
def test_immediates_and_signals_that_lie_apart(states):
    """φ and y as separate tensors, as a linearization has them; some φ are None, and y's rows have gaps of NaN."""
    shape = (states, 3, 4, 33, 65)
    gammas, m, phi, y, delta = _problem(*shape)
    twin = [g.clone() for g in gammas]
    apart = [phi[nu, :, k].contiguous() for nu in range(states) for k in range(4)]
    there = [each if each.any() else None for each in apart]
    assert (None in there) == (states > 1)
    want = gamma_step_(twin, m, phi, y, delta)
    wide = torch.full((4, 3, 70), math.nan, device=DEVICE)
    wide[:, :, :65] = y.transpose(0, 1)
    assert torch.equal(want, gamma_step_(gammas, m, there, wide[:, :, :65].unbind(0), delta))
    assert all(torch.equal(a, b) for a, b in zip(gammas, twin, strict=True))


@pytest.mark.parametrize(
    ("dtype", "fan_in", "row_stride"),
    [(torch.float32, 8, 9), (torch.float32, 8, 10), (torch.bfloat16, 16, 20), (torch.float32, 8, 12)],
)
def test_rows_of_y_may_lie_any_distance_apart(dtype, fan_in, row_stride):
    """Where one memory access doesn't divide that distance (kernels.md, fault 5), and where it does."""
    shape = (2, 3, 2, 5, fan_in)
    gammas, m, phi, y, delta = _problem(*shape)
    gammas = [g.to(dtype) for g in gammas]
    twin = [g.clone() for g in gammas]
    want = gamma_step_(twin, m, phi, y, delta)
    wide = torch.full((2, 3, row_stride), math.nan, device=DEVICE)
    wide[:, :, :fan_in] = y.transpose(0, 1)
    apart = [phi[nu, :, k].contiguous() for nu in range(2) for k in range(2)]
    assert torch.equal(want, gamma_step_(gammas, m, apart, wide[:, :, :fan_in].unbind(0), delta))
    assert all(torch.equal(a, b) for a, b in zip(gammas, twin, strict=True))


def test_tensors_are_not_compared_with_none(monkeypatch):
    """A comparison of a tensor raises and catches an exception: 15 µs each on the host (kernels.md, fault 2)."""
    gammas, m, phi, y, delta = _problem(1, 2, 2, 5, 8)
    monkeypatch.setattr(torch.Tensor, "__eq__", lambda *_: pytest.fail("a tensor was compared"))
    gamma_step_(gammas, m, phi[0].unbind(1), y.contiguous().unbind(1), delta)


@pytest.mark.parametrize(("batch", "rows"), [(6, 3), (3, 1), (16, None)])  # None: what the launcher picks
@pytest.mark.parametrize("states", [1, 2, 3])
def test_a_split_batch(states, batch, rows, monkeypatch):
    """Γ equals in every bit that of a batch that isn't split; the gradient is near the reference's."""
    gammas, m, phi, y, delta = _problem(states, batch, 2, 9, 67)
    want, want_gradient = _reference(gammas, m, phi, y, delta)
    twins = [[g.clone() for g in gammas] for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(gamma_step, "split_rows", lambda *_: batch)
        gamma_step_(twins[0], m, phi, y)
    if rows is not None:
        monkeypatch.setattr(gamma_step, "split_rows", lambda *_: rows)
    poison(monkeypatch)
    gradient = gamma_step_(gammas, m, phi, y, delta)
    _assert_near(gradient, want_gradient, TOLERANCE, terms=batch)
    for got, expected in zip(gammas, want, strict=True):
        _assert_near(got, expected, TOLERANCE)
    assert torch.equal(gradient, gamma_step_(twins[1], m, phi, y, delta))
    weight = _random(2, 9, 67)
    before = weight.clone()
    assert gamma_step_(twins[2], m, phi, y, delta, weights=weight.unbind(0), lr=LR) is None
    torch.testing.assert_close(weight, before - 0.1 * gradient, rtol=0, atol=1e-6)
    for twin in twins:
        assert all(torch.equal(a, b) for a, b in zip(twin, gammas, strict=True))


def test_what_a_launcher_splits(monkeypatch):
    """The launcher splits a large batch as `split_rows` says, where Γ is too small to fill the GPU."""
    grids = []

    class Stub:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(gamma_step, "check_runnable", lambda *_: None)
    monkeypatch.setattr(gamma_step, "_gamma_step_kernel", Stub())
    monkeypatch.setattr(gamma_step, "device_sizes", lambda _: DeviceSizes(32, 132))
    for batch, units in ((15, 64), (16, 64), (64, 64), (8, 256)):
        gammas, m, phi, y, delta = _problem(2, batch, 4, units, units)
        gamma_step_(gammas, m, phi, y, delta)
    assert [grid[2] for grid in grids] == [1, 2, 8, 1]


def test_steps_of_a_sequence_are_views_and_add_up_to_the_dual_form():
    """m[:, :, t], phi[:, t] and delta[:, t] aren't contiguous; the gradients add up to Σ E yᵀ."""
    states, steps, batch, matrices, units, fan_in = 2, 4, 2, 2, 9, 21
    torch.manual_seed(1)
    m = 0.5 * _random(states, states, steps, batch, units)
    phi, delta = _random(states, steps, batch, matrices, units), _random(states, steps, batch, units)
    y = _random(steps, batch, matrices, fan_in)
    gammas = [torch.zeros(batch, matrices, units, fan_in, device=DEVICE) for _ in range(states)]
    total = sum(gamma_step_(gammas, m[:, :, t], phi[:, t], y[t], delta[:, t]) for t in range(steps))

    credit, _ = rfp.reverse_scan(m.double(), delta.double())
    entering = torch.einsum("vtbn,vtbkn->tbkn", credit, phi.double())
    _assert_near(total, torch.einsum("tbkn,tbkm->knm", entering, y.double()), TOLERANCE, terms=steps * batch)


def test_two_runs_agree_in_every_bit_and_unwritten_memory_is_not_read(monkeypatch):
    shape = (2, 3, 2, 33, 67)
    gammas, m, phi, y, delta = _problem(*shape)
    first, second = [g.clone() for g in gammas], [g.clone() for g in gammas]
    gradient = gamma_step_(first, m, phi, y, delta)
    poison(monkeypatch)
    assert torch.equal(gradient, gamma_step_(second, m, phi, y, delta))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_writes_nothing_beyond_gamma():
    shape = (3, 2, 9, 67)
    _, m, phi, y, delta = _problem(2, *shape)
    with gammas_amid_nan(*shape) as gammas:
        gamma_step_(gammas, m, phi, y, delta)


def test_pick_config():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert pick_config(512, 512, fp32) == pick_config(4096, 1000, fp32) == Config(32, 64, 4, 4)
    assert pick_config(512, 1, fp32) == pick_config(1, 1, bf16) == Config(128, 1, 1, 1)
    assert pick_config(512, 512, bf16) == pick_config(4096, 1000, bf16) == Config(32, 64, 8, 4)
    assert pick_config(1, 4, fp32) == pick_config(128, 128, fp32) == Config(8, 64, 4, 1)
    # Rows that aren't a multiple of 16 bytes are accessed number by number.
    assert pick_config(4096, 4095, fp32) == pick_config(4096, 1004, bf16) == Config(4, 64, 1, 1)
    assert pick_config(4096, 1004, bf16, stochastic=True) == Config(2, 64, 1, 1)
    assert pick_config(4096, 1000, bf16, stochastic=True) == Config(32, 64, 8, 4)


def _valid() -> dict[str, object]:
    gammas, m, phi, y, delta = _problem(2, 2, 3, 5, 7)
    return {"gammas": gammas, "m": m, "phi": phi, "y": y, "delta": delta}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gammas": torch.zeros(1)}, TypeError, "gammas must be a tuple or a list of tensors, got Tensor"),
        ({"gammas": []}, ValueError, r"gammas must hold one tensor a state, 1 to 4, got 0"),
        ({"gammas": [torch.zeros(2, 3, 5)]}, ValueError, r"gammas\[0\] must have shape \(B, K, N, M\)"),
        ({"gammas": [torch.zeros(2, 3, 0, 7)]}, ValueError, r"none of them 0, got \(2, 3, 0, 7\)"),
        ({"gammas": [torch.zeros(2, 3, 5, 7).double()]}, TypeError, "torch.bfloat16, got torch.float64"),
        ({"gammas": [torch.zeros(2, 3, 7, 5).mT]}, ValueError, r"gammas\[0\] must be contiguous"),
        ({"m": torch.zeros(2, 2, 2, 4)}, ValueError, r"m must have shape \(2, 2, 2, 5\), got \(2, 2, 2, 4\)"),
        ({"m": torch.zeros(2, 2, 5, 2).mT}, ValueError, "m must be contiguous beyond its first 2"),
        ({"phi": None}, TypeError, "phi must be a torch.Tensor or a sequence of them, got NoneType"),
        ({"phi": [torch.zeros(2, 5)] * 3}, ValueError, "phi must hold 6 tensors, got 3"),
        ({"phi": [torch.zeros(2, 4)] * 6}, ValueError, r"phi\[0\] must have shape \(2, 5\), got \(2, 4\)"),
        (
            {"y": [torch.zeros(2, 7), torch.zeros(2, 8)[:, :7], torch.zeros(2, 7)]},
            ValueError,
            "y's tensors must all have the same stride between rows, got 7 and 8",
        ),
        ({"y": [torch.zeros(2, 7), None, None]}, TypeError, r"y\[1\] must be a torch.Tensor, got None"),
        ({"phi": torch.zeros(2, 2, 3, 5).double()}, TypeError, "phi must have dtype torch.float32"),
        ({"y": torch.zeros(2, 3, 1, 7)}, ValueError, r"y must have shape \(2, 3, 7\)"),
        ({"y": torch.zeros(2, 3, 7, device="meta")}, ValueError, "y must be on"),
        ({"delta": torch.zeros(1, 2, 5)}, ValueError, r"delta must have shape \(2, 2, 5\)"),
        ({"weights": torch.zeros(3, 5, 8), "lr": LR}, ValueError, r"weights\[0\] must have shape \(5, 7\)"),
        (
            {"weights": torch.zeros(2, 5, 7), "lr": LR},
            ValueError,
            "weights must hold 3 tensors, one a matrix, got 2",
        ),
        (
            {"weights": torch.zeros(3, 5, 7), "lr": LR, "delta": None},
            ValueError,
            "delta must be given with weights",
        ),
        ({"weights": torch.zeros(3, 5, 7), "lr": 0.1}, TypeError, "lr must be a torch.Tensor, got float"),
        ({"lr": LR}, ValueError, "weights and lr must be given together, got one of them"),
        (
            {"rng_state": torch.zeros(2).long()},
            ValueError,
            "None where gammas are torch.float32, which aren't",
        ),
        ({"rng_state": 1}, TypeError, "rng_state must be a torch.Tensor, got int"),
        (
            {"rng_state": torch.zeros(2)},
            TypeError,
            "rng_state must have dtype torch.int64, got torch.float32",
        ),
        ({"rng_state": torch.zeros(1).long()}, ValueError, r"rng_state must have shape \(2,\), got \(1,\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    check_error(gamma_step_, _valid(), change, error, message)


def test_gammas_must_be_two_tensors():
    arguments = _valid()
    arguments["gammas"] = [arguments["gammas"][0]] * 2
    with pytest.raises(ValueError, match=r"gammas must not share memory: gammas\[1\]"):
        gamma_step_(**arguments)
