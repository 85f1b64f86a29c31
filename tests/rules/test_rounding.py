"""Stochastic rounding in torch: to either neighbour with the right probability, by seed, step and place alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rjepa_triton.rules import rfp
from rjepa_triton.rules.rounding import round_stochastically


def rng_state(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step])


def test_it_is_unbiased_and_draws_each_number_by_itself() -> None:
    draws, exact = 400, torch.randn(16, 64)
    below = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    gap = ((below * (1 + 2**-7)).view(torch.int32) & ~0xFFFF).view(torch.float32) - below
    share = (exact.double() - below) / gap
    errors = []
    for step in range(draws):
        got = round_stochastically(exact, rng_state(7, step), 0, exact.numel())
        assert got.dtype == torch.bfloat16
        up = (got.double() - below) / gap
        assert bool(((up == 0) | (up == 1)).all())
        errors.append((up - share) / (share * (1 - share)).sqrt().clamp(min=0.1))
    z = torch.stack(errors)
    free = (share > 0.05) & (share < 0.95)
    assert abs(z[:, free].mean().item()) < 4 / math.sqrt(draws * exact.numel())
    assert abs((z[:, free].mean(0) ** 2).mean().item() * draws - 1) < 6 * math.sqrt(2 / exact.numel())
    for left, right in ((z[..., 1:], z[..., :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        assert abs((left * right).mean().item()) < 5 / math.sqrt((left * right).numel())


def test_what_needs_no_rounding_stays() -> None:
    kept = torch.tensor([1.0, -1.0078125, 0.0, -0.0, 2.0**-126, math.inf, -math.inf, math.nan, -math.nan])
    for step in range(5):
        got = round_stochastically(kept, rng_state(0, step), 0, kept.numel())
        torch.testing.assert_close(got, kept.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_bits_are_of_seed_step_and_place(seed: int) -> None:
    values = torch.randn(4, 500)
    first = round_stochastically(values, rng_state(seed, 5), 0, 2000)
    assert torch.equal(first, round_stochastically(values, rng_state(seed, 5), 0, 2000))
    part = round_stochastically(values[1:3], rng_state(seed, 5), 500, 2000)
    assert torch.equal(part, first[1:3])
    for other in (rng_state(seed ^ 1, 5), rng_state(seed, 6), rng_state(seed, 5 + 2**40)):
        changed = round_stochastically(values, other, 0, 2000) != first
        assert 0.2 < changed.float().mean().item() < 0.5


def test_long_memory_is_better_rounded_so() -> None:
    """Inputs with a mean and a decay of 0.999, as in the kernel's test."""
    m = torch.full((1, 1, 2, 8), 0.999)
    exact = [torch.zeros(2, 1, 8, 64, dtype=torch.float64)]
    nearest, stochastic = ([exact[0].bfloat16()] for _ in range(2))
    for step in range(1000):
        phi, y = 0.5 + torch.rand(1, 2, 1, 8), 1 + 0.3 * torch.randn(2, 1, 64)
        rfp.gamma_step_(exact, m.double(), phi.double(), y.double())
        rfp.gamma_step_(nearest, m, phi, y)
        rfp.gamma_step_(stochastic, m, phi, y, rng_state=rng_state(1, step))

    def error(got: list[Tensor]) -> float:
        return float((got[0].double() - exact[0]).norm() / exact[0].norm())

    # At most Σ 0.999²ⁿ = 500 roundings count. Neighbours are 2⁻⁷ apart or less, and a rounding's variance is a sixth of
    # that squared.
    assert error(stochastic) < math.sqrt(500 / 6) * 2**-7 < error(nearest)
