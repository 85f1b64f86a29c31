"""What keeps h from collapsing where no gradient is stopped: terms of the loss that ask for spread-out embeddings.

    vicreg   1/E Σ_j max(0, 1 - √(Var h_j + ε)) + 1/25 · 1/E Σ_{i≠j} Cov(h_i, h_j)²
    sigreg   mean over M random directions u of ∫ |φ_u(t) - exp(-t²/2)|² exp(-t²/2)/√(2π) dt

φ_u(t) = mean of exp(i t uᵀh) is the empirical characteristic function of h along u: sigreg is the Epps–Pulley statistic
of normality (of LeJEPA, Balestriero and LeCun 2025), divided by the number of rows. Near collapse its slope in Var h is
-0.65: beside the square loss, whose slope is up to 1, it needs a weight of several. vicreg has the variance and the
covariance term of VICReg (Bardes, Ponce and LeCun 2022) at their ratio there; the prediction is its third.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

KINDS = ("none", "vicreg", "sigreg")
EPSILON = 1e-4  # ε of a standard deviation's root
COVARIANCE = 1 / 25  # weight of the covariance term beside that of the variance
DIRECTIONS = 64  # M
REACH, KNOTS = 5.0, 17  # t goes from 0 to REACH in so many knots; the integrand is even


def vicreg(h: Tensor, count: int = 0) -> Tensor:
    """The scalar of h (…, E), over all its rows. `count` isn't used."""
    rows = rearrange(h, "... e -> (...) e")
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    variance = covariance.diagonal()
    spread = F.relu(1 - (variance + EPSILON).sqrt()).mean()
    between = (covariance.square().sum() - variance.square().sum()) / rows.shape[-1]
    return spread + COVARIANCE * between


def sigreg(h: Tensor, count: int = 0) -> Tensor:
    """The scalar of h (…, E), over all its rows, by the trapezoidal rule. The directions are drawn by `count` alone."""
    rows = rearrange(h, "... e -> (...) e")
    drawn = torch.Generator().manual_seed(count)
    directions = F.normalize(torch.randn(rows.shape[-1], DIRECTIONS, generator=drawn), dim=0).to(rows)
    t = torch.linspace(0, REACH, KNOTS, device=rows.device, dtype=rows.dtype)
    angles = (rows @ directions)[..., None] * t  # (n, M, knots)
    normal = torch.exp(-t.square() / 2)
    apart = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return 2 * torch.trapezoid(apart * normal / math.sqrt(2 * math.pi), t, dim=-1).mean()


TERMS: dict[str, Callable[[Tensor, int], Tensor]] = {"vicreg": vicreg, "sigreg": sigreg}
