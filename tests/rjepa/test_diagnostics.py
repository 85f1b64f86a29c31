"""Diagnostics against what they should say of representations made for it."""

from __future__ import annotations

import pytest
import torch

from rjepa_triton.rjepa import diagnostics
from rjepa_triton.rjepa.model import distance


@pytest.mark.parametrize("kind", ["square", "cosine"])
def test_no_constant_predicts_better(kind: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(3, 500, 6, dtype=torch.float64) + 0.5
    told = diagnostics.constant_loss(kind, h)
    best = h.mean(1) if kind == "square" else (h / h.norm(dim=-1, keepdim=True)).mean(1)
    for trial in (best, best + 0.05 * torch.randn_like(best), torch.ones_like(best)):
        loss = distance(kind, trial[:, None].expand_as(h), h).mean(1)
        assert (loss >= told - 1e-12).all()
        if trial is best:
            torch.testing.assert_close(loss, told)


def test_ranks_of_known_spectra() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20_000, 8, dtype=torch.float64)
    assert diagnostics.participation_ratio(rows) == pytest.approx(8, rel=0.01)
    assert diagnostics.participation_ratio(rows[:, :1] * torch.ones(8)) == pytest.approx(1)
    shrunk = rows * torch.tensor([1.0, *[0.01] * 7], dtype=torch.float64)
    assert diagnostics.participation_ratio(shrunk) == pytest.approx(1, rel=0.01)
    # The paper's correlation matrix doesn't see that seven dimensions all but vanished.
    assert diagnostics.participation_ratio(shrunk, correlation=True) == pytest.approx(8, rel=0.01)
    assert diagnostics.participation_ratio(0 * rows) == 0
    values = diagnostics.spectrum(rows)
    assert (values[:-1] >= values[1:]).all()
    assert values.sum() == pytest.approx(rows.var(0, correction=0).sum())


def test_explained_variance() -> None:
    torch.manual_seed(0)
    a = torch.randn(4000, 5, dtype=torch.float64)
    y = a @ torch.randn(5, 3, dtype=torch.float64) + 7
    noise = y.std(0) * torch.randn_like(y)
    halves = slice(0, 2000), slice(2000, 4000)

    def told(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        return diagnostics.explained(*((inputs[half], outputs[half]) for half in halves), ridge=1e-3)  # type: ignore[arg-type]

    assert told(a.clamp(-3, 3), a.clamp(-3, 3) @ torch.ones(5, 3, dtype=torch.float64)) == pytest.approx(1)
    assert told(a, y + noise) == pytest.approx(0.5, abs=0.03)
    assert told(torch.randn_like(a), y) == pytest.approx(0, abs=0.01)


def test_components_are_the_principal_ones() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 300, 4) * torch.tensor([3.0, 0.1, 1.0, 0.5]) + 2
    made = diagnostics.Components.of(rows, 2)
    found = made(rows)
    assert found.shape == (7, 300, 2)
    variances = found.flatten(0, 1).var(0)
    assert variances[0] == pytest.approx(9, rel=0.1)
    assert variances[1] == pytest.approx(1, rel=0.1)
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
