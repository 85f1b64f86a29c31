"""Diagnostics of what a falling loss doesn't show: whether the representation still holds anything to predict.

A raw loss also falls when h shrinks or stops depending on the input. So runs also report the loss of the best constant
prediction, the variance and rank of h, how much of the input passes the gate, and the `evidence`: how well h predicts
the present patch and the next one.
"""

from __future__ import annotations

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


def rankme(h: Tensor) -> float:
    """The effective rank exp(-Σ p log p) of h (…, E), with p = σ/Σσ of its singular values, without centring.

    RankMe of Garrido et al. (2023).
    """
    rows = rearrange(h, "... e -> (...) e").double()
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0).sqrt()
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())
