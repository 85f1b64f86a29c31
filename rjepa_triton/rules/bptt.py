"""Backpropagation through time without autograd: RFP's dual form with the full recurrent Jacobian.

    λ(t) = δ(t) + A(t+1)ᵀ λ(t+1) + Σ_k W^kᵀ E^k(t+1)        E^k = Σ_ν λ^ν φ^{ν,k}; W^kᵀ E^k goes to the state k reads
    ∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ

It differs from Recurrent Forward Propagation only in that the off-diagonal entries of the recurrent matrices pass
credit too. That costs one matrix product per state in each step of the loop. Weight gradients are one product per
matrix over all of (T, B).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.two_point import Linearization, Matrix


def credits(
    lin: Linearization,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact credits of a sequence. Nothing is mutated.

    Args:
        lin: the linearization of the forward pass.
        matrices, weights: the recurrent ones, dense, block-diagonal or diagonal (`weights.py`).
        delta: instantaneous credit δ(t) = ∂L(t)/∂c(t), (S, T, B, N).
        carry: credit that the steps after the last pass to it, (S, B, N); or None.

    Returns:
        λ (S, T, B, N), and the credit that the first step passes to the state before it, (S, B, N).
    """
    count, steps = delta.shape[:2]
    credit = torch.empty_like(delta)
    credit[:, -1] = delta[:, -1] if carry is None else delta[:, -1] + carry
    into_states = [_CreditIntoState(lin, nu, matrices, weights) for nu in range(count)]
    # selected, not multiplied: what comes back may be NaN
    forgets = None if lin.resets is None else lin.resets[..., None].unbind(0)
    credit_at, delta_at = credit.unbind(1), delta.unbind(1)
    for t in range(steps - 1, 0, -1):
        passed = [source.pass_back(t, credit_at[t]) for source in into_states]
        for nu, value in enumerate(passed):
            if forgets is not None:
                value = value.masked_fill_(forgets[t], 0)
            torch.add(delta_at[t - 1][nu], value, out=credit_at[t - 1][nu])
    first = torch.stack([source.pass_back(0, credit_at[0]) for source in into_states])
    return credit, first if forgets is None else first.masked_fill_(forgets[0], 0)


class _CreditIntoState:
    """The credit that goes back into one state: through no matrix, and through each matrix that reads the state."""

    def __init__(
        self, lin: Linearization, source: int, matrices: Sequence[Matrix], weights: Sequence[Tensor]
    ) -> None:
        self.own = [(nu, a.unbind(0)) for nu, a in lin.partials.own[source].items()]
        # φ of each matrix by state and step; for diagonal and block-diagonal ones with the weight
        self.sparse: list[tuple[dict[int, tuple[Tensor, ...]], Tensor]] = []
        self.dense: list[dict[int, tuple[Tensor, ...]]] = []
        dense_weights = []
        for matrix, weight in zip(matrices, weights, strict=True):
            if matrix.reads != source:
                continue
            phi = {nu: value.unbind(0) for nu, value in lin.immediate(matrix).items()}
            if weight.dim() != 2:
                self.sparse.append((phi, weight))
            else:
                self.dense.append(phi)
                dense_weights.append(weight)
        # one product for all K' dense matrices that read this state: [E^k …] (B, K'·N) times [W^k …] (K'·N, N)
        self.joined = torch.cat(dense_weights) if dense_weights else None
        batch, units = lin.before.shape[2:]
        self.entering = lin.before.new_zeros(batch, len(self.dense), units)

    def pass_back(self, t: int, credit: Tensor) -> Tensor:
        """The credit (B, N) that step t passes to the state before it, given its own credit (S, B, N)."""
        if self.joined is None:
            out = torch.zeros_like(credit[0])
        else:
            for j, phi in enumerate(self.dense):
                _entering(phi, t, credit, out=self.entering[:, j])
            out = self.entering.flatten(1) @ self.joined
        for nu, own in self.own:
            out.addcmul_(own[t], credit[nu])
        for phi, weight in self.sparse:
            entering = _entering(phi, t, credit, out=torch.empty_like(out))
            out += weight_ops.multiply_transposed(weight, entering)
        return out


def _entering(phi: dict[int, tuple[Tensor, ...]], t: int, credit: Tensor, out: Tensor) -> Tensor:
    """Write E^k(t) = Σ_ν λ^ν φ^{ν,k}(t) to `out`, and return it."""
    started = False
    for nu, value in phi.items():
        if started:
            out.addcmul_(credit[nu], value[t])
        else:
            torch.mul(credit[nu], value[t], out=out)
            started = True
    return out if started else out.zero_()
