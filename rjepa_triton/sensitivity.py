"""Γ of a layer: one tensor a state for each group of matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from ._tape import Recorded
from .cells import Linearization, Matrix
from .reference import rfp


@dataclass
class Group:
    """Matrices of one shape whose Γ lies together: gammas S of (B, K, N, M)."""

    matrices: list[Matrix]
    indices: list[int]
    shape: tuple[int, ...]
    gammas: list[Tensor]
    backend: str
    why: str

    @property
    def diagonal(self) -> bool:
        """One number a unit: diagonal recurrent weights, and biases."""
        return len(self.shape) == 1


class Sensitivity:
    """Γ^{ν,k} of all matrices of a layer, zero at first, advanced in place.

    matrices, weights: all of the layer's, recurrent and input; weights (N, M), or (N,) for a diagonal one
    or a bias. states S, batch B. dtype is what Γ is kept in; arithmetic is in the weights' dtype.
    Bytes: S·B·(Σ_k N·M_k) numbers of dtype.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        weights: Sequence[Tensor],
        states: int,
        batch: int,
        dtype: torch.dtype,
        backend: str = "auto",
    ) -> None:
        self.groups: list[Group] = []
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, weight in enumerate(weights):
            by_shape.setdefault(tuple(weight.shape), []).append(index)
        for shape, indices in by_shape.items():
            units, fan_in = (*shape, 1)[:2]
            device, numbers = weights[0].device, len(indices) * units * fan_in
            chosen, why = ops.choose_gamma(backend, device, weights[0].dtype, dtype, numbers)
            if len(shape) == 1:
                chosen, why = "torch", "one number a unit"
            gammas = [
                torch.zeros(batch, len(indices), units, fan_in, dtype=dtype, device=device)
                for _ in range(states)
            ]
            self.groups.append(Group([matrices[i] for i in indices], indices, shape, gammas, chosen, why))

    @property
    def nbytes(self) -> int:
        """Bytes of Γ."""
        return sum(gamma.nbytes for group in self.groups for gamma in group.gammas)

    def tensors(self) -> list[Tensor]:
        """Γ itself, in a fixed order: a checkpoint's contents."""
        return [gamma for group in self.groups for gamma in group.gammas]

    def forget_(self, rows: Tensor | None) -> None:
        """Set Γ to zero for the batch rows where `rows` (B,) is True, or for all. Mutates Γ."""
        for gamma in self.tensors():
            if rows is None:
                gamma.zero_()
            else:
                gamma[rows] = 0

    def step_(
        self, lin: Linearization, m: Tensor, inputs: Tensor | None = None, delta: Tensor | None = None
    ) -> list[Tensor] | None:
        """Advance Γ by each step of `lin` in turn; with delta (S, T, B, N), return Σ δ ⊙ Γ a matrix.

        m (S, S, T, B, N) is `rfp.transition`'s; inputs (T, B, I) what input matrices read. Mutates Γ.
        """
        totals = []
        for group in self.groups:
            phi, y = rfp.immediates(group.matrices, lin), rfp.signals(group.matrices, lin, inputs)
            total: Tensor | None = None
            for t in range(lin.steps):
                part = ops.gamma_step_(
                    group.gammas,
                    m.select(2, t),
                    phi.select(1, t),
                    y[t],
                    None if delta is None else delta.select(1, t),
                    diagonal=group.diagonal,
                    backend=group.backend,
                )
                total = part if total is None or part is None else total.add_(part)
            totals.append(total)
        return self._by_matrix(totals)

    @property
    def learns_in_one_call(self) -> bool:
        """Whether `learn_step_` is to be preferred for one step without resets."""
        return any(group.backend == "compile" for group in self.groups) and all(
            ops.is_one_block(group.gammas[0]) for group in self.groups
        )

    def learn_step_(self, recorded: Recorded, delta: Tensor) -> tuple[list[Tensor], Tensor]:
        """Linearise one recorded step and do what `step_` does, compiled as one function.

        delta (S, 1, B, N). Returns the gradients by matrix, and that of the per-unit inputs (J, 1, B, N).
        Mutates Γ.
        """
        totals, for_input = ops.learn_step_(
            recorded.cell,
            [group.matrices for group in self.groups],
            [group.gammas for group in self.groups],
            recorded.trajectory,
            recorded.diagonals,
            recorded.inputs,
            delta,
        )
        gradients = self._by_matrix(totals)
        assert gradients is not None
        return gradients, for_input

    def chunk_(
        self, lin: Linearization, m: Tensor, inputs: Tensor | None = None, credit: Tensor | None = None
    ) -> list[Tensor] | None:
        """Advance Γ over all steps of `lin` at once; with credit M(1)ᵀλ(1) (S, B, N), return Σ credit ⊙ Γ₀.

        Arguments as in `step_`. The steps' own part of the gradient is `rfp.weight_gradients`. Mutates Γ.
        """
        totals = [
            ops.gamma_chunk_(
                group.gammas,
                m,
                rfp.immediates(group.matrices, lin),
                rfp.signals(group.matrices, lin, inputs),
                credit,
                diagonal=group.diagonal,
                backend=group.backend,
            )
            for group in self.groups
        ]
        return self._by_matrix(totals)

    def read(self, credit: Tensor) -> list[Tensor]:
        """Σ_b credit ⊙_rows Γ a matrix, of its weight's shape. credit (S, B, N)."""
        gradients = self._by_matrix([rfp.gamma_read(group.gammas, credit) for group in self.groups])
        assert gradients is not None
        return gradients

    def _by_matrix(self, totals: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The groups' (K, N, M) as one gradient a matrix; None if there are none."""
        found: dict[int, Tensor] = {}
        for group, total in zip(self.groups, totals, strict=True):
            if total is not None:
                gradients = total.flatten(1).unbind() if group.diagonal else total.unbind()
                found.update(zip(group.indices, gradients, strict=True))
        return [found[index] for index in sorted(found)] or None
