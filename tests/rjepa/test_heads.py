"""Heads: what x^High keeps of features, calibrated once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rjepa_triton.rjepa import heads


def features(rows: int = 600, size: int = 12) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, rows // 3, 4) @ torch.randn(4, size) + 0.3 * torch.randn(3, rows // 3, size) + 2


def test_components_are_white_and_those_of_a_singular_value_decomposition() -> None:
    given = features()
    head = heads.Components(12, 5, onoff=False)
    head.calibrate_(given)
    made = head(given).flatten(0, 1).double()
    torch.testing.assert_close(made.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        made.T @ made / (len(made) - 1), torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0
    )
    rows = given.flatten(0, 1).double()
    z = ((rows - rows.mean(0)) / (rows.std(0) + 1e-2 * rows.std(0).mean())).clamp(-4, 4)
    left = np.linalg.svd((z - z.mean(0)).numpy(), full_matrices=False)[0][:, :5] * np.sqrt(len(z) - 1)
    np.testing.assert_allclose(np.abs(left.T @ made.numpy() / (len(z) - 1)), np.eye(5), atol=1e-3)


def test_on_and_off_halves_are_the_components() -> None:
    given = features()
    both, whole = heads.Components(12, 6), heads.Components(12, 3, onoff=False)
    for head in (both, whole):
        head.calibrate_(given)
    x, p = both(given), whole(given)
    assert (x >= 0).all()
    torch.testing.assert_close(x[..., :3] - x[..., 3:], p)
    assert (x[..., :3] * x[..., 3:]).abs().max() == 0
    odd = heads.Components(12, 5)
    odd.calibrate_(given)
    torch.testing.assert_close(odd(given), x[..., :5])


@pytest.mark.parametrize("kind", heads.HEADS)
def test_frozen_unless_asked_and_one_outlier_decides_nothing(kind: heads.Kind) -> None:
    frozen, learns = (heads.make(kind, 12, 4, 8, trainable) for trainable in (False, True))
    assert not [p for p in frozen.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in learns.parameters())
    given = features()
    frozen.calibrate_(given)
    assert frozen(given).shape == (3, 200, 4)
    if kind != "mlp":
        before = frozen(given)
        far = given.clone()
        far[0, 0] = 1e6
        assert frozen(far)[0, 0].abs().max() < 1e3
        torch.testing.assert_close(frozen(far)[1:], before[1:])


def test_bad_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"head='onoff' takes 4 principal components for units=8, got 3 features; the"
    ):
        heads.make("onoff", 3, 8, 8, False)
    with pytest.raises(ValueError, match="head must be one of 'onoff', 'components', 'mlp', got 'big'"):
        heads.make("big", 3, 8, 8, False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 principal components need more patches than that, got 2"):
        heads.Components(3, 4).calibrate_(torch.randn(2, 3))
    with pytest.raises(
        ValueError, match="3 principal components were asked for, but the features have 1 that vary"
    ):
        heads.Components(3, 6).calibrate_(torch.randn(50, 1) * torch.ones(3))
