"""Diagnostics of what a falling loss doesn't show: whether the representation still holds anything to predict.

A raw loss also falls when h shrinks or stops depending on the input. So runs also report the loss of the best constant
prediction, the variance and rank of h, how much of the input passes the gate, and how well h predicts the current patch
and the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .model import Distance


def constant_loss(kind: Distance, h: Tensor) -> Tensor:
    """(T,): for each step, the loss of the best prediction that is the same for all sequences; h is (T, B, E).

    "square": the variance over sequences, averaged over dimensions. "cosine": 1 - ‖mean of h/‖h‖‖. A loss divided by
    this is 1 if h(t) is predicted no better than by a constant, whatever the size of h.
    """
    if kind == "square":
        return h.var(1, correction=0).mean(-1)
    return 1 - F.normalize(h, dim=-1).mean(1).norm(dim=-1)


def participation_ratio(h: Tensor, *, correlation: bool = False) -> float:
    """The effective rank (Σλ)²/Σλ² of h (…, E); λ are the eigenvalues of its covariance matrix.

    correlation: take the correlation matrix instead (as the paper's Fig. 3B does), which doesn't show that h shrinks.
    """
    values = spectrum(h, correlation=correlation)
    return float(values.sum() ** 2 / values.square().sum().clamp_min(torch.finfo(values.dtype).tiny))


def spectrum(h: Tensor, *, correlation: bool = False) -> Tensor:
    """The eigenvalues (E,) of the covariance (or correlation) matrix of h (…, E), descending, in float64."""
    rows = rearrange(h, "... e -> (...) e").double()
    rows = rows - rows.mean(0)
    if correlation:
        rows = rows / rows.std(0, correction=0).clamp_min(1e-12)
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_min(0).flip(0)


def explained(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], ridge: float = 30.0) -> float:
    """R² on test rows of a linear map from inputs to outputs that is fitted on the train rows.

    train, test: inputs (rows, P) and outputs (rows, Q). The fit is a ridge regression on standardised inputs. R² is
    1 - residual/total over all outputs, with the total about the test rows' own mean. Inputs are clipped at 4 standard
    deviations, so that one row unlike all of training doesn't decide the result.
    """
    (a, y), (a_test, y_test) = ((one.double() for one in pair) for pair in (train, test))
    mean, std = a.mean(0), a.std(0).clamp_min(1e-8)
    a, a_test = (_with_one(((rows - mean) / std).clamp(-4, 4)) for rows in (a, a_test))
    solved = torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1], dtype=a.dtype), a.T @ y)
    residual = (y_test - a_test @ solved).square().sum()
    return float(1 - residual / (y_test - y_test.mean(0)).square().sum())


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


@dataclass(frozen=True)
class Components:
    """The first Q principal components of features, which the probes predict: mean (D,), axes (D, Q)."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor, count: int = 50) -> Components:
        """The first `count` components of features (…, D), without whitening."""
        rows = rearrange(features, "... d -> (...) d").double()
        mean = rows.mean(0)
        centred = rows - mean
        _, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
        return cls(mean, axes.flip(1)[:, :count])

    def __call__(self, features: Tensor) -> Tensor:
        """The components (…, Q) of features (…, D)."""
        return (features.double() - self.mean) @ self.axes
