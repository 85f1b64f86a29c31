"""R² by time step against what representations made for it must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from rjepa_triton.rjepa import diagnostics, evidence

STEPS = 40


def world(count: int, seed: int, hold: float = 0.9) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations x(t) = z + noise of a scene's z (3,), and z itself at each step: the mean of x tells more of z."""
    torch.manual_seed(seed)
    z = torch.randn(1, count, 3).expand(STEPS, count, 3)
    return z + torch.randn(STEPS, count, 3), z


def test_running_averages() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    seen = evidence.with_averages(x)
    assert seen.shape == (6, 2, 12)
    for t in range(6):
        past = x[: t + 1]
        weights = 0.5 ** torch.arange(t, -1, -1, dtype=torch.float64)
        torch.testing.assert_close(seen[t, :, :3], x[t])
        torch.testing.assert_close(seen[t, :, 3:6], past.mean(0))
        torch.testing.assert_close(seen[t, :, 6:9], torch.einsum("t,tnd->nd", weights, past) / weights.sum())


def test_memory_shows_as_a_gap_that_grows_and_its_absence_as_none() -> None:
    (a, y), (b, z) = world(300, 0), world(200, 1)
    of_x = evidence.explained((a, y), (b, z))
    ceiling = evidence.explained((evidence.with_averages(a), y), (evidence.with_averages(b), z))
    assert len(of_x.next) == STEPS - 1
    assert of_x.next == pytest.approx([0.5] * (STEPS - 1), abs=0.1)  # Var z / Var x
    want = [t / (t + 1) for t in range(1, STEPS)]  # of a mean of t observations
    assert ceiling.next == pytest.approx(want, abs=0.1)
    assert ceiling.late_next - of_x.late_next == pytest.approx(30 / 31 - 0.5, abs=0.05)
    shuffled = [
        values.flatten(0, 1)[torch.randperm(values.shape[0] * values.shape[1])].view_as(values)
        for values in (a, b)
    ]
    targets = [
        values.flatten(0, 1)[torch.randperm(values.shape[0] * values.shape[1])].view_as(values)
        for values in (y, z)
    ]
    none = evidence.explained((shuffled[0], targets[0]), (shuffled[1], targets[1]))
    assert none.late_next == pytest.approx(0, abs=0.01)


def test_next_and_present_are_not_mixed_up() -> None:
    torch.manual_seed(0)
    x = torch.randn(STEPS, 100, 3)
    found = evidence.explained((x[:, :50], x[:, :50]), (x[:, 50:], x[:, 50:]), ridge=1e-6)
    assert found.late_present == pytest.approx(1, abs=1e-3)
    assert found.late_next < 0.01
    coming = torch.cat([x[1:], x[:1]])
    found = evidence.explained((coming[:, :50], x[:, :50]), (coming[:, 50:], x[:, 50:]), ridge=1e-6)
    assert found.late_next == pytest.approx(1, abs=1e-3)
    assert found.late_present < 0.01


def test_late_numbers_are_a_ridge_regressions_own() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(STEPS, 60, 4), torch.randn(STEPS, 30, 4)
    mixed = torch.randn(4, 2)
    y, z = (values @ mixed + torch.randn(*values.shape[:2], 2) for values in (a, b))
    told = evidence.explained((a, y), (b, z), late_only=True, ridge=10.0)
    rows, seen = (values[20:-1].reshape(-1, 4).double().numpy() for values in (a, b))
    mean, std = rows.mean(0), rows.std(0)
    rows, seen = (np.clip((r - mean) / std, -4, 4) for r in (rows, seen))
    fitted = Ridge(10.0).fit(rows, y[21:].reshape(-1, 2).double().numpy())
    wanted = z[21:].reshape(-1, 2).double().numpy()
    about = wanted - z.reshape(-1, 2).double().numpy().mean(0)
    want = 1 - np.square(wanted - fitted.predict(seen)).sum() / np.square(about).sum()
    assert told.late_next == pytest.approx(want, abs=1e-9)
    assert told.next == []


def test_the_ridge_is_chosen_by_whole_sources_that_are_left_out() -> None:
    """Many inputs, few sources, all of whose steps are alike: only whole ones, left out, tell overfitting."""
    torch.manual_seed(0)
    a = torch.randn(1, 30, 40).expand(STEPS, 30, 40) + 0.01 * torch.randn(STEPS, 30, 40)
    y = torch.randn(1, 30, 2).expand(STEPS, 30, 2)
    inputs, targets = (values.numpy().astype(float) for values in (a, y))
    assert evidence._chosen(inputs[20:], targets, 20, np.arange(30)) >= 1000
    sources = np.repeat(np.arange(6), 5)
    inputs, targets = (
        inputs[:, sources * 5],
        targets[:, sources * 5],
    )  # the sequences of a source are alike too
    assert evidence._chosen(inputs[20:], targets, 20, np.arange(30)) < 1000
    assert evidence._chosen(inputs[20:], targets, 20, sources) >= 1000
    assert evidence._chosen(inputs[20:, :4], targets[:, :4], 20, np.zeros(4)) == 100


def test_short_sequences() -> None:
    for steps in (2, 3, 21):
        x = torch.randn(steps, 9, 2)
        found = evidence.explained((x, x), (x, x))
        assert len(found.next) == len(found.present) == steps - 1
        assert np.isfinite([*found.next, found.late_next]).all()


def test_rankme_counts_directions() -> None:
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(500, 8, dtype=torch.float64)).Q
    assert diagnostics.rankme(rows) == pytest.approx(8)
    assert diagnostics.rankme(rows[:, :1] * torch.ones(8)) == pytest.approx(1, abs=1e-5)
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert diagnostics.rankme(rows[:, :3] * p) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
