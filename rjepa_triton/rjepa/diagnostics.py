"""What a falling loss doesn't show: whether there is still something in the representation to predict.

A raw loss falls too when h shrinks, or when it stops looking at the input. Beside it stand the loss of the best
constant prediction, h's variance and rank, how much of the input passes the gate, and what h says of the patches: of
the one seen and of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Distance


def constant_loss(kind: Distance, h: Tensor) -> Tensor:
    """The loss of the best prediction that is the same for all sequences, by step: (T,) of h (T, B, E).

    "square": the variance over sequences, mean over dimensions. "cosine": 1 - ‖mean of h/‖h‖‖. A loss over this is 1
    where h(t) is predicted no better than not at all, whatever h's size.
    """
    if kind == "square":
        return h.var(1, correction=0).mean(-1)
    return 1 - F.normalize(h, dim=-1).mean(1).norm(dim=-1)


def participation_ratio(h: Tensor, *, correlation: bool = False) -> float:
    """(Σλ)²/Σλ² of the eigenvalues λ of h's covariance over all but the last dimension: an effective rank.

    correlation: of the correlation matrix (the paper's Fig. 3B), which doesn't see h shrink.
    """
    values = spectrum(h, correlation=correlation)
    return float(values.sum() ** 2 / values.square().sum().clamp_min(torch.finfo(values.dtype).tiny))


def spectrum(h: Tensor, *, correlation: bool = False) -> Tensor:
    """Eigenvalues of h's covariance (or correlation) matrix, descending, float64: (E,)."""
    rows = h.reshape(-1, h.shape[-1]).double()
    rows = rows - rows.mean(0)
    if correlation:
        rows = rows / rows.std(0, correction=0).clamp_min(1e-12)
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).clamp_min(0).flip(0)


def explained(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], ridge: float = 30.0) -> float:
    """R² on test rows of a linear map from the first of a pair to the second, fitted on the train rows by ridge
    regression of standardised inputs; 1 - residual/total over all outputs, total about the test rows' own mean.

    Each pair: (rows, P) and (rows, Q). Inputs beyond 4 standard deviations are clipped, so that a row unlike all of
    training doesn't decide the figure.
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
    """The first principal components of features, which the probes are asked for: mean (D,), axes (D, Q)."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor, count: int = 50) -> Components:
        """From features (…, D), whitened by nothing: in their own units."""
        rows = features.reshape(-1, features.shape[-1]).double()
        mean = rows.mean(0)
        centred = rows - mean
        _, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
        return cls(mean, axes.flip(1)[:, :count])

    def __call__(self, features: Tensor) -> Tensor:
        """(…, Q) of features (…, D)."""
        return (features.double() - self.mean) @ self.axes
