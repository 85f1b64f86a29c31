"""Refinement: a series of credits that starts with RFP's and ends with the exact ones.

Split the recurrent Jacobian into each unit's own part M and the rest, O, through which credit passes from unit to
unit: the off-diagonal entries of the matrices. The exact credit solves λ(t) = δ(t) + (M + O)(t+1)ᵀ λ(t+1), and

    λ⁽⁰⁾ = RFP's credit,       λ⁽ʳ⁺¹⁾(t) = δ(t) + O(t+1)ᵀ λ⁽ʳ⁾(t+1) + M(t+1)ᵀ λ⁽ʳ⁺¹⁾(t+1)

λ⁽ʳ⁾ contains every path that passes from unit to unit at most r times. What goes on to the state before the first step,
M(1)ᵀ λ⁽ʳ⁾(1) + O(1)ᵀ λ⁽ʳ⁾(1), contains those that do so once more, in step 1: that costs no scan. A round costs one
product per matrix over (T, B) and one scan per unit. The series ends after T rounds at the latest, but with large
weights its terms grow before they vanish. Such divergence is detected, and the sequential backward pass (`bptt`) runs
instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.two_point import Linearization, Matrix, state_read
from . import bptt, rfp

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

MAX_ROUNDS = 100  # of refinement to a tolerance; after these, the sequential backward pass runs instead


class Divergence(UserWarning):
    """Refinement diverged, or took more than MAX_ROUNDS; the exact sequential backward pass ran in its place."""


def credits(
    lin: Linearization,
    m: Tensor,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
    *,
    rounds: int | None = None,
    tolerance: float | None = None,
    scan: Scan = rfp.reverse_scan,
) -> tuple[Tensor, Tensor]:
    """Refined credits of a sequence. Nothing is mutated.

    Args:
        lin, matrices, weights, delta, carry: as in `bptt.credits`.
        m: the transition M (S, S, T, B, N), `rfp.transition` of these.
        rounds: r ≥ 0; or None to run until a round changes λ by at most tolerance·‖λ‖.
        tolerance: 1e-10 in float64 and 1e-6 otherwise, if None.
        scan: the function that runs the reverse scan, called as `rfp.reverse_scan` is.

    Returns:
        λ⁽ʳ⁾ (S, T, B, N), and the credit that the first step passes to the state before it, (S, B, N). Where the
        rounds diverge, the exact ones of `bptt.credits`, with a `Divergence` warning: a term of the series is larger
        than the first or not finite, or MAX_ROUNDS don't suffice.
    """
    if tolerance is None:
        tolerance = 1e-10 if delta.dtype == torch.float64 else 1e-6
    off_diagonal = _OffDiagonal(lin, matrices, weights)
    credit, passed = scan(m, delta, carry, lin.resets)
    first = torch.linalg.vector_norm(credit)
    last_round = MAX_ROUNDS if rounds is None else rounds
    term = first
    for done in range(1, last_round + 1):
        source = off_diagonal.all_steps(credit)
        refined, passed = scan(m, delta + source, carry, lin.resets)
        term = torch.linalg.vector_norm(refined - credit)
        credit = refined
        if rounds is None:
            size = float(term)
            if size <= tolerance * float(torch.linalg.vector_norm(credit)):
                break
            if not size <= float(first) or done == last_round:
                return _fall_back(lin, matrices, weights, delta, carry, done, size, float(first))
    else:
        # read the size only once, at the end, because each reading waits for the device
        if rounds and not float(term) <= float(first):
            return _fall_back(lin, matrices, weights, delta, carry, rounds, float(term), float(first))
    return credit, passed + off_diagonal.first_step(credit)


def _fall_back(
    lin: Linearization,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None,
    rounds: int,
    term: float,
    first: float,
) -> tuple[Tensor, Tensor]:
    warnings.warn(
        f"refinement did not converge in {rounds} rounds: the last changed the credits by {term:.3g}, "
        f"where their norm was {first:.3g} at first; the sequential backward ran instead, which is exact and slower",
        Divergence,
        stacklevel=2,
    )
    return bptt.credits(lin, matrices, weights, delta, carry)


class _OffDiagonal:
    """Oᵀ: the credit that passes from unit to unit, through the off-diagonal entries of the recurrent matrices."""

    def __init__(self, lin: Linearization, matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> None:
        self.lin = lin
        self.by_source: dict[int, list[tuple[Matrix, Tensor]]] = {}
        for matrix, weight in zip(matrices, weights, strict=True):
            if weight.dim() > 1:
                reader = (matrix, weight_ops.hollow(weight))
                self.by_source.setdefault(state_read(matrix), []).append(reader)

    def all_steps(self, credit: Tensor) -> Tensor:
        """O(t+1)ᵀ λ(t+1) for every step t, zero for the last: (S, T, B, N)."""
        out = torch.zeros_like(credit)
        if credit.shape[1] > 1:
            self._add(credit, slice(1, None), out[:, :-1])
        return out

    def first_step(self, credit: Tensor) -> Tensor:
        """O(1)ᵀ λ(1): (S, B, N)."""
        out = torch.zeros_like(credit[:, :1])
        self._add(credit, slice(0, 1), out)
        return out[:, 0]

    def _add(self, credit: Tensor, steps: slice, out: Tensor) -> None:
        """Add Oᵀ λ of the T' steps `steps` to out (S, T', B, N)."""
        for source, readers in self.by_source.items():
            for matrix, weight in readers:
                entering: Tensor | None = None
                for nu, phi in self.lin.immediate(matrix).items():
                    part = credit[nu, steps] * phi[steps]
                    entering = part if entering is None else entering + part
                if entering is not None:
                    out[source] += weight_ops.multiply_transposed(weight, entering)
            if self.lin.resets is not None:
                out[source].masked_fill_(self.lin.resets[steps][..., None], 0)
