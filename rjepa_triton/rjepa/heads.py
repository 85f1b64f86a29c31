"""The head, which makes x^High of a backbone's features (paper, eq. 2): an MLP, principal components, or their halves.

What the paper calls an MLP it doesn't describe. A random one that stays frozen discards what is to be predicted; the
first principal components keep it. Split into ON and OFF halves, they are what a reciprocal gated circuit can remember
(`gates`).
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check

Kind = Literal["onoff", "components", "mlp"]
HEADS = ("onoff", "components", "mlp")
CLIP = 4.0  # standard deviations: one feature unlike all of training doesn't decide a component


class Head(nn.Module):
    """The MLP of eq. 2: x^High = norm(V₂ relu(V₁ (f - μ)/σ + b₁) + b₂), (…, N), of features f (…, D).

    μ and σ are mean and standard deviation of each feature; they are 0 and 1 until `calibrate_` sets them. norm is a
    BatchNorm without gain and offset. If `trainable` is False (the default), the weights are frozen and norm keeps the
    statistics that `calibrate_` set; if True, norm takes them from each batch while training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, units: int, hidden: int = 512, trainable: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, units)
        self.norm = nn.BatchNorm1d(units, affine=False)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.trainable = trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> Head:
        """As `nn.Module.train`, except that a frozen head stays in evaluation mode, which norm depends on."""
        return super().train(mode and self.trainable)

    def forward(self, features: Tensor) -> Tensor:
        x = self._mixed(features)
        return self.norm(x.flatten(0, -2)).view(x.shape)

    def _mixed(self, features: Tensor) -> Tensor:
        return self.second(F.relu(self.first((features - self.mean) / self.std)))

    @torch.no_grad()
    def calibrate_(self, features: Tensor) -> None:
        """Set μ, σ and the norm's statistics, in place, to those of features (…, D)."""
        rows = rearrange(features, "... d -> (...) d")
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0) + 1e-3 * rows.std())
        x = self._mixed(rows)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(x.mean(0))
        self.norm.running_var.copy_(x.var(0))


class Components(nn.Module):
    """Principal components, each of variance 1: p = Aᵀ clip((f - μ)/σ, ±4) - o, (…, N), of features f (…, D).

    onoff: x^High = [relu(p), relu(-p)] of N/2 components, as ON and OFF cells have it (of an odd N, without the last
    OFF); else p itself, of N components. `calibrate_` sets μ, σ, A and o; until then A is the identity's first columns.
    trainable: whether A learns.

    Raises ValueError if there are fewer features than components.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor

    def __init__(self, features: int, units: int, *, onoff: bool = True, trainable: bool = False) -> None:
        super().__init__()
        kind = "onoff" if onoff else "components"
        self.units, self.count = units, (units + 1) // 2 if onoff else units
        if self.count > features:
            raise ValueError(
                f"head={kind!r} takes {self.count} principal components for units={units}, got {features} features; "
                "the nearest is head='mlp'"
            )
        self.onoff, self.trainable = onoff, trainable
        self.axes = nn.Parameter(torch.eye(features, self.count), requires_grad=trainable)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("offset", torch.zeros(self.count))

    def forward(self, features: Tensor) -> Tensor:
        p = standardised(features, self.mean, self.std) @ self.axes - self.offset
        return torch.cat([p.relu(), (-p).relu()], dim=-1)[..., : self.units] if self.onoff else p

    @torch.no_grad()
    def calibrate_(self, features: Tensor) -> None:
        """Set μ, σ, A and o, in place, to those of features (…, D): by scikit-learn's PCA, in float64.

        Raises ValueError if fewer than N components vary.
        """
        from sklearn.decomposition import PCA

        rows = rearrange(features, "... d -> (...) d")
        mean, std = statistics(rows)
        self.mean.copy_(mean)
        self.std.copy_(std)
        z = standardised(rows, mean, std).double().cpu().numpy()
        if len(z) <= self.count:
            raise ValueError(f"{self.count} principal components need more patches than that, got {len(z)}")
        found = PCA(self.count, svd_solver="covariance_eigh").fit(z)
        variance = torch.from_numpy(found.explained_variance_)
        if float(variance[-1]) <= 1e-9 * float(variance[0]):
            raise ValueError(
                f"{self.count} principal components were asked for, but the features have "
                f"{int((variance > 1e-9 * variance[0]).sum())} that vary; ask for fewer units, or head='mlp'"
            )
        axes = torch.from_numpy(found.components_).T / variance.sqrt()
        self.axes.copy_(axes)
        self.offset.copy_(torch.from_numpy(found.mean_) @ axes)


def make(kind: Kind, features: int, units: int, hidden: int, trainable: bool) -> Head | Components:
    """The head of a kind. hidden: of the MLP. Raises ValueError for another kind, and as `Components` does."""
    check.one_of("head", kind, HEADS)
    if kind == "mlp":
        return Head(features, units, hidden, trainable)
    return Components(features, units, onoff=kind == "onoff", trainable=trainable)


def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of each feature of rows (n, D); 1 % of the mean deviation is added to each."""
    std = rows.std(0)
    return rows.mean(0), std + 1e-2 * std.mean()


def standardised(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(f - μ)/σ, clipped at ±`CLIP`."""
    return ((features - mean) / std).clamp(-CLIP, CLIP)
