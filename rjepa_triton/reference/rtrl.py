"""Exact real-time recurrent learning (Williams & Zipser 1989; paper, eq. 15).

    γ(t) = J(t) γ(t-1) + R(t)        γ ∈ R^{SN × P}, P the number of recurrent weights

J is the layer's full recurrent Jacobian and R the immediate term, R[(ν, i), (k, i, j)] = φ^{ν,k}_i y^k_j. For
K dense matrices P = K·N², so γ takes S·K·B·N³ numbers and a step 2·B·(S·N)²·K·N² FLOP: 32·B·N⁴ for RGC.
The gradient is exact for any two-point cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import Linearization, Matrix, state_read


def jacobian(lin: Linearization, t: int, matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> Tensor:
    """J(t) (B, S·N, S·N) = ∂c(t)/∂c(t-1), zero for rows reset at t."""
    count, _, batch, units = lin.before.shape
    out = lin.before.new_zeros(batch, count, units, count, units)
    for source, entries in enumerate(lin.partials.own):
        for nu, own in entries.items():
            out[:, nu, :, source].diagonal(dim1=1, dim2=2).add_(own[t])
    for matrix, weight in zip(matrices, weights, strict=True):
        for nu, phi in lin.immediate(matrix).items():
            block = out[:, nu, :, state_read(matrix)]
            if weight.dim() == 1:
                block.diagonal(dim1=1, dim2=2).addcmul_(phi[t], weight)
            else:
                block.addcmul_(phi[t][:, :, None], weight)
    if lin.resets is not None:
        out.masked_fill_(lin.resets[t][:, None, None, None, None], 0)
    return out.flatten(3).flatten(1, 2)


class ExactSensitivity:
    """γ, advanced one step at a time.

    count S, batch B, units N; weights: the recurrent ones, whose shapes it keeps. Two buffers of γ's size,
    since a product can't be made in place.
    """

    def __init__(self, count: int, batch: int, units: int, weights: Sequence[Tensor]) -> None:
        self.count, self.units = count, units
        self.shapes = [tuple(w.shape) for w in weights]
        self.sizes = [w.numel() for w in weights]
        self.gamma = weights[0].new_zeros(batch, count * units, sum(self.sizes))
        self._spare = torch.empty_like(self.gamma)
        self._own, self._spare_own = self._own_rows(self.gamma), self._own_rows(self._spare)

    @property
    def nbytes(self) -> int:
        """Bytes of γ itself, without the second buffer."""
        return self.gamma.nbytes

    def step_(
        self, lin: Linearization, t: int, matrices: Sequence[Matrix], weights: Sequence[Tensor]
    ) -> None:
        """γ ← J γ + R at step t of `lin`. Mutates γ."""
        torch.bmm(jacobian(lin, t, matrices, weights), self.gamma, out=self._spare)
        self.gamma, self._spare = self._spare, self.gamma
        self._own, self._spare_own = self._spare_own, self._own
        for matrix, own in zip(matrices, self._own, strict=True):
            y = lin.before[state_read(matrix), t]
            for nu, phi in lin.immediate(matrix).items():
                if own[nu].dim() == 2:
                    own[nu].addcmul_(phi[t], y)
                else:
                    own[nu].addcmul_(phi[t][:, None, :], y[:, :, None])

    def read(self, delta: Tensor) -> list[Tensor]:
        """Σ_b δ · γ for each weight. delta (S, B, N)."""
        total = torch.mv(self.gamma.flatten(0, 1).t(), delta.transpose(0, 1).flatten())
        return [g.view(shape) for g, shape in zip(total.split(self.sizes), self.shapes, strict=True)]

    def _own_rows(self, gamma: Tensor) -> list[list[Tensor]]:
        """Views of γ where unit i meets row i, by weight, then state: (B, M, N), or (B, N) if diagonal."""
        views = []
        for part, shape in zip(gamma.split(self.sizes, dim=2), self.shapes, strict=True):
            by_state = part.unflatten(2, shape).unflatten(1, (self.count, self.units))
            views.append([block.diagonal(dim1=1, dim2=2) for block in by_state.unbind(1)])
        return views


def weight_gradients(
    lin: Linearization, matrices: Sequence[Matrix], weights: Sequence[Tensor], delta: Tensor
) -> list[Tensor]:
    """Exact gradients of the recurrent weights over a whole sequence, forward in time. delta (S, T, B, N)."""
    count, steps, batch, units = delta.shape
    sensitivity = ExactSensitivity(count, batch, units, weights)
    total = [torch.zeros_like(w) for w in weights]
    for t in range(steps):
        sensitivity.step_(lin, t, matrices, weights)
        for sum_, part in zip(total, sensitivity.read(delta[:, t]), strict=True):
            sum_.add_(part)
    return total
