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
