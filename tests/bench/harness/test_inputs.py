"""Inputs: deterministic, unit variance, inside the photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rjepa_triton.bench.harness import inputs

LIKE = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("kind", inputs.INPUTS)
def test_the_same_seed_gives_the_same_inputs(kind: str) -> None:
    x = inputs.inputs(kind, 7, 3, 5, 11, LIKE)
    assert x.shape == (7, 3, 5)
    assert torch.equal(x, inputs.inputs(kind, 7, 3, 5, 11, LIKE))
    assert not torch.equal(x, inputs.inputs(kind, 7, 3, 5, 12, LIKE))


def test_photo_inputs_are_standardised_and_correlated_in_time() -> None:
    x = inputs.inputs("photo", 200, 4, 9, 0, LIKE)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(9, dtype=x.dtype))
    torch.testing.assert_close(x.var((0, 1), correction=0), torch.ones(9, dtype=x.dtype))
    # rows are independent walks, steps of one walk are not
    assert float((x[1:] * x[:-1]).mean()) > 0.02
    assert not torch.equal(x[:, 0], x[:, 1])


def test_inputs_take_the_dtype_asked_for() -> None:
    assert inputs.inputs("noise", 2, 1, 3, 0, torch.empty(0)).dtype == torch.float32


def test_scan_path_stays_inside() -> None:
    corners = inputs.scan_path(5000, 120, 90, [0])
    assert corners.min() >= 0
    assert (corners.max(0) <= np.array([70, 40])).all()
    assert (corners.max(0) >= np.array([69, 39])).all()


def test_weights_have_the_scale_asked_for() -> None:
    dense = inputs.weights(200, 0.3, 0, LIKE)
    assert [tuple(w.shape) for w in dense] == [(200, 200)] * 4
    assert all(float(w.std()) == pytest.approx(0.3 / 200**0.5, rel=0.05) for w in dense)
    assert not torch.equal(dense[0], dense[1])
    assert inputs.weights(200, 0.3, 0, LIKE, diagonal=True)[0].shape == (200,)


def test_errors_name_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="input must be one of 'photo', 'noise', got 'film'"):
        inputs.inputs("film", 2, 1, 3, 0, LIKE)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        inputs.inputs("noise", 0, 1, 3, 0, LIKE)
    with pytest.raises(ValueError, match="at least 2 to be standardised"):
        inputs.inputs("photo", 1, 1, 3, 0, LIKE)
