"""Linear R-JEPA and Appendix B's moments: every formula against autograd, truncated sums or simulation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rjepa_triton.rjepa import theory
from rjepa_triton.rjepa.theory import DTYPE, INPUTS, Covariances, Weights

SIZE, HIDDEN = 5, 4
AREAS = [(0.0,), (0.3,), (0.7,), (0.3, 0.6)]


def rate(value: float) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=DTYPE)


def at(name: str, decays: tuple[float, ...], seed: int = 0, first_order: bool = False) -> Covariances:
    return theory.stack([theory.covariances(INPUTS[name](SIZE, seed), decays, first_order)])


def gap(weights: Weights) -> Tensor:
    predicted, encoded = theory.gram(weights)
    return predicted - encoded


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("decays", AREAS)
def test_covariances_are_sums_over_the_past(name: str, decays: tuple[float, ...]) -> None:
    """z(t) = Σ_k κ_k x(t-k), κ the convolved decays; E[x(t+l) x(t)ᵀ] = A^l Σ_x for l ≥ 0."""
    transition, noise = INPUTS[name](SIZE, 0)
    length = 100
    kernel = torch.zeros(length, dtype=DTYPE)
    kernel[0] = 1
    for decay in decays:
        for k in range(1, length):
            kernel[k] += decay * kernel[k - 1]
    lags = [theory.stationary(transition, noise)]
    for _ in range(length):
        lags.append(transition @ lags[-1])

    def lag(steps: int) -> Tensor:
        return lags[steps] if steps >= 0 else lags[-steps].mT

    def summed(ahead: int, late: Tensor) -> Tensor:
        """E[z(t+ahead) q(t)ᵀ] with q(t) = Σ_k late_k x(t-k)."""
        meeting = torch.zeros(2 * length, dtype=DTYPE)
        for k in range(length):
            meeting[length - k : 2 * length - k] += kernel[k] * late
        return sum(
            (weight * lag(ahead + offset - length) for offset, weight in enumerate(meeting) if abs(offset - length) < 95),
            torch.zeros(SIZE, SIZE, dtype=DTYPE),
        )  # fmt: skip

    found = theory.covariances(INPUTS[name](SIZE, 0), decays)
    scale = SIZE / summed(0, kernel).trace()
    torch.testing.assert_close(found.now, scale * summed(0, kernel), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.next, scale * summed(1, kernel), atol=1e-6, rtol=0)
    assert found.credit.equal(found.now)
    if len(decays) == 1:
        first = theory.covariances(INPUTS[name](SIZE, 0), decays, first_order=True)
        itself = torch.zeros(length, dtype=DTYPE)
        itself[0] = 1
        torch.testing.assert_close(first.credit, scale * summed(0, itself), atol=1e-6, rtol=0)
        torch.testing.assert_close(first.credit_next, scale * summed(1, itself), atol=1e-6, rtol=0)


def test_the_first_order_gradient_is_of_one_area() -> None:
    with pytest.raises(ValueError, match="one area, got 2"):
        at("white", (0.1, 0.2), first_order=True)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("decays", AREAS)
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_flow_is_minus_the_gradient_of_the_expected_loss(
    name: str, decays: tuple[float, ...], stop_gradient: bool
) -> None:
    """E = ½ E‖h(t+1) - W h(t)‖² written out in Σ₀ and Σ₁, differentiated by autograd."""
    z = at(name, decays)
    weights = theory.ordinary(SIZE, HIDDEN, len(decays), seed=1)
    w, *areas = [part.requires_grad_() for part in (weights.predictor, *weights.areas)]
    p = weights.encoder
    target = p.detach() if stop_gradient else p
    loss = (
        0.5
        * (target @ z.now @ target.mT - 2 * w @ p @ z.next.mT @ target.mT + w @ p @ z.now @ p.mT @ w.mT)
        .diagonal(dim1=-2, dim2=-1)
        .sum()
    )
    gradients = torch.autograd.grad(loss, (w, *areas))
    with torch.no_grad():
        moved = theory.velocity(weights, z, rate(0.1), stop_gradient)
    for found, gradient, weight in zip((moved.predictor, *moved.areas), gradients, (w, *areas), strict=True):
        torch.testing.assert_close(found, -gradient - 0.1 * weight)


def test_balance_holds_in_any_sequence_with_learned_decays() -> None:
    """Wᵀ ∂E/∂W = ∂E/∂P Pᵀ for the last P, through time, any x and τ: what Theorem 1 rests on."""
    torch.manual_seed(0)
    x = torch.randn(30, 7, SIZE, dtype=DTYPE).cumsum(0)
    decays = torch.tensor([0.4, 0.8], dtype=DTYPE, requires_grad=True)
    first = torch.randn(6, SIZE, dtype=DTYPE, requires_grad=True)
    last = torch.randn(HIDDEN, 6, dtype=DTYPE, requires_grad=True)
    w = torch.randn(HIDDEN, HIDDEN, dtype=DTYPE, requires_grad=True)
    low, high, states = torch.zeros(7, 6, dtype=DTYPE), torch.zeros(7, HIDDEN, dtype=DTYPE), []
    for now in x:
        low = decays[0] * low + now @ first.mT
        high = decays[1] * high + low @ last.mT
        states.append(high)
    h = torch.stack(states)
    loss = (h[1:].detach() - h[:-1] @ w.mT).square().sum()
    in_w, in_last, in_decays = torch.autograd.grad(loss, (w, last, decays))
    torch.testing.assert_close(w.mT @ in_w, in_last @ last.mT)
    assert in_decays.abs().min() > 0


@pytest.mark.parametrize("name", INPUTS)
def test_theorem_1_as_it_holds(name: str) -> None:
    """WᵀW → P Pᵀ at the rate exp(-2ηs), for any input, τ and number of areas."""
    eta, times = 0.05, (0.0, 40.0, 100.0, 160.0)
    for decays in AREAS:
        z = at(name, decays)
        starts, _, middle, end = theory.flow(
            theory.ordinary(SIZE, HIDDEN, len(decays), 0, 1.5), z, rate(eta), times
        )
        assert float(theory.cosine(*theory.gram(end))) >= 0.999
        expected = torch.exp(torch.tensor(-2 * eta * times[2], dtype=DTYPE)) * gap(starts)
        torch.testing.assert_close(gap(middle), expected, rtol=1e-3, atol=1e-6)


def test_gradient_descent_by_autograd_gets_there_too() -> None:
    z, eta = at("coloured, non-commuting", (0.3,)), 0.05
    weights = theory.ordinary(SIZE, HIDDEN, 1, 0)
    w, p = (part[0].requires_grad_() for part in (weights.predictor, weights.areas[0]))
    now, following = z.now[0], z.next[0]
    optimizer = torch.optim.SGD([w, p], lr=0.1, weight_decay=eta)
    for _ in range(1000):
        optimizer.zero_grad()
        target = p.detach()
        loss = (w @ p @ now @ p.mT @ w.mT).trace() / 2 - (w @ p @ following.mT @ target.mT).trace()
        loss.backward()
        optimizer.step()
    end = Weights(w.detach()[None], (p.detach()[None],))
    assert float(theory.cosine(*theory.gram(end))) >= 0.999
    assert end.predictor.norm() > 0.5


def test_eq_3_needs_white_decayed_input() -> None:
    found = {}
    for name, decay in itertools.product(INPUTS, (0.0, 0.7)):
        z = at(name, (decay,))
        (end,) = theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0), z, rate(0.02), (300.0,))
        found[name, decay] = float(theory.cosine(theory.gram(end)[0], theory.representation(end, z)))
    whitened = [("white", 0.0), ("white", 0.7), ("white, uneven rates", 0.0)]
    assert min(found.pop(key) for key in whitened) > 0.9999
    assert max(found.values()) < 0.999


def test_with_several_areas_the_covariance_is_a_power() -> None:
    """White decayed input, N areas: P_lᵀP_l = P_{l-1}P_{l-1}ᵀ as well, so HHᵀ ∝ (WᵀW)^N, not eq. 3."""
    z = at("white, uneven rates", (0.0, 0.0))
    (end,) = theory.flow(theory.ordinary(SIZE, HIDDEN, 2, 0, 1.5), z, rate(0.02), (500.0,))
    predicted, covariance = theory.gram(end)[0], theory.representation(end, z)
    torch.testing.assert_close(covariance, predicted @ predicted, atol=1e-6, rtol=0)
    assert float(theory.cosine(predicted, covariance)) < 0.9999


def test_without_weight_decay_the_gap_stays() -> None:
    z = at("coloured", (0.3,))
    large, small = (theory.ordinary(SIZE, HIDDEN, 1, 0, scale) for scale in (1.0, 0.02))
    (end,) = theory.flow(large, z, rate(0.0), (100.0,))
    torch.testing.assert_close(gap(end), gap(large), rtol=0, atol=1e-5)
    assert float(theory.cosine(*theory.gram(end))) < 0.95
    (end,) = theory.flow(small, z, rate(0.0), (400.0,))
    assert float(theory.cosine(*theory.gram(end))) > 0.999
    assert float(theory.cosine(*theory.gram(small))) < 0.9


def test_the_first_order_gradient_lets_the_encoder_grow() -> None:
    """White input: once W rests at ρ, ln ‖P‖ grows at ρ (E[z(t+1) x] - ρ E[z x]) - η, with the paper's A.4 gradient."""
    eta, decay, alpha = 0.01, 0.7, 0.8
    z = at("white", (decay,), first_order=True)
    middle, end = theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0), z, rate(eta), (100.0, 110.0))
    correlation = (alpha + decay) / (1 + alpha * decay)
    now = (1 - decay**2) / (1 + alpha * decay)
    growth = correlation * now * (alpha + decay - alpha**2 * decay - correlation) - eta
    assert growth > 0
    found = float((end.encoder.norm() / middle.encoder.norm()).log()) / 10
    assert found == pytest.approx(growth, rel=0.05)
    assert float(theory.cosine(*theory.gram(end))) < 0.99


def test_weights_that_grow_without_bound_are_reported() -> None:
    with pytest.raises(ArithmeticError, match="grow without bound"):
        theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0), at("white", (0.0,)), rate(-1e9), (1.0,))


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_surviving_singular_values(decay: float) -> None:
    z = at("white", (decay,))
    correlation = (0.8 + decay) / (1 + 0.8 * decay)  # of an AR(2) process with these roots
    torch.testing.assert_close(z.next, correlation * z.now)
    for eta in (0.01, 0.05, 0.14):
        (end,) = theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0, 2.0), z, rate(eta), (1000.0,))
        roots = theory.surviving(correlation, eta)
        assert roots is not None
        for matrix in (end.predictor, end.areas[0]):
            values = torch.linalg.svdvals(matrix[0])
            alive = values[values > roots[1]]
            assert len(alive) >= 2
            assert (alive - roots[0]).abs().max() < 1e-3
            assert (values[len(alive) :] < 1e-3).all()
    above = 1.05 * correlation**2 / 4
    assert theory.surviving(correlation, above) is None
    (end,) = theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0, 2.0), z, rate(above), (600.0,))
    assert end.encoder.norm() < 1e-6


def test_each_direction_of_coloured_input_has_its_own_value() -> None:
    z = at("coloured", (0.0,))
    (end,) = theory.flow(theory.ordinary(SIZE, HIDDEN, 1, 0), z, rate(0.02), (3000.0,))
    roots = [theory.surviving(0.8, 0.02, float(variance)) for variance in torch.linalg.eigvalsh(z.now)[0]]
    upper = torch.tensor([r[0] for r in roots if r], dtype=DTYPE)
    alive = [value for value in torch.linalg.svdvals(end.predictor[0]) if value > 0.1]
    assert len(alive) >= 2
    assert all((upper - value).abs().min() < 1e-3 for value in alive)


def test_small_weights_and_weight_decay_collapse() -> None:
    """Zero attracts all within (ρ - √(ρ² - 4η))/2, with stop-gradient and far below η = ρ²/4."""
    z, roots = at("white", (0.0,)), theory.surviving(0.8, 0.05)
    assert roots is not None
    for start, survives in ((0.9 * roots[1], False), (1.1 * roots[1], True)):
        w, p = start * torch.eye(HIDDEN, dtype=DTYPE), start * torch.eye(HIDDEN, SIZE, dtype=DTYPE)
        (end,) = theory.flow(Weights(w[None], (p[None],)), z, rate(0.05), (600.0,))
        assert bool(end.encoder.norm() > 1) is survives


@pytest.mark.parametrize("eta", [0.0, 0.02])
@pytest.mark.parametrize("name", INPUTS)
def test_without_stop_gradient_the_representation_collapses(name: str, eta: float) -> None:
    z, start = at(name, (0.3,)), theory.ordinary(SIZE, HIDDEN, 1, 0)
    fastest = float(theory.collapse_rate(z)) + eta
    times = [t / fastest for t in (0.5, 2.0, 12.0)]
    for at_time, weights in zip(
        times, theory.flow(start, z, rate(eta), times, stop_gradient=False), strict=True
    ):
        bound = start.encoder.square().sum() * torch.exp(torch.tensor(-2 * fastest * at_time, dtype=DTYPE))
        assert weights.encoder.square().sum() <= bound + 1e-9
    (kept,) = theory.flow(start, z, rate(eta), times[-1:])
    covariances = [theory.representation(w, z)[0].trace() for w in (weights, kept)]
    assert covariances[0] < 1e-4
    assert covariances[1] > 0.5


COLOUR = torch.tensor([[1.0, 0.5, 0.2], [0.5, 0.8, -0.3], [0.2, -0.3, 0.6]], dtype=DTYPE)
RATES = torch.tensor([1.0, 0.8, 0.6], dtype=DTYPE)


def lagged_by_wick(recurrence: Tensor, lags: tuple[int, int, int, int]) -> Tensor:
    """E[c_i(t-l₁) c_j(t-l₂) c_m(t-l₃) c_n(t-l₄)] of a Gaussian process: the sum over pairings."""
    now = theory.stationary(recurrence, COLOUR)

    def pair(a: int, b: int) -> Tensor:
        power = torch.linalg.matrix_power(recurrence, abs(lags[b] - lags[a]))
        return power @ now if lags[a] <= lags[b] else (power @ now).mT

    return (
        torch.einsum("ij,mn->ijmn", pair(0, 1), pair(2, 3))
        + torch.einsum("im,jn->ijmn", pair(0, 2), pair(1, 3))
        + torch.einsum("in,jm->ijmn", pair(0, 3), pair(1, 2))
    )


@pytest.mark.parametrize("full", [False, True])
def test_fourth_moments_are_those_of_a_gaussian_process(full: bool) -> None:
    recurrence = 0.4 * torch.diag(RATES)
    if full:
        recurrence = recurrence + 0.2 * torch.randn(
            3, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0)
        )
    found = theory.fourth_moments(recurrence, COLOUR)
    for moment, lags in zip(found, ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 2)), strict=True):
        torch.testing.assert_close(moment, lagged_by_wick(recurrence, lags))


def test_orders_in_the_decay() -> None:
    """log₂ of the ratio of norms at τ and τ/2 is the order: 0 and 1 whole, 2 and 3 connected."""
    whole, linked = [], []
    for decay in (0.02, 0.01):
        recurrence = decay * torch.diag(RATES)
        moments = theory.fourth_moments(recurrence, COLOUR)
        whole.append([float(m.norm()) for m in moments])
        linked.append([float(m.norm()) for m in theory.connected(moments, recurrence, COLOUR)])
    for norms, orders in ((whole, (0, 0, 1)), (linked, (0, 2, 3))):
        for upper, lower, order in zip(*norms, orders, strict=True):
            assert torch.tensor(upper / lower).log2().item() == pytest.approx(order, abs=0.01)


def test_sampled_moments_agree_with_the_exact_ones_and_not_with_the_papers() -> None:
    recurrence, entry, samples = 0.4 * torch.diag(RATES), (0, 0, 1, 1), 200_000
    drawn = theory.sampled_fourth_moments(recurrence, COLOUR, entry, samples, seed=0)
    exact = theory.fourth_moments(recurrence, COLOUR)
    paper = theory.papers_fourth_moments(recurrence, COLOUR)
    for values, right, wrong in zip(drawn, exact, paper, strict=True):
        half = 2.576 * float(values.std()) / samples**0.5
        assert abs(float(values.mean() - right[entry])) < half
        assert abs(float(values.mean() - wrong[entry])) > 5 * half
