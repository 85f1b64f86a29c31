"""Real-time recurrent learning (Williams & Zipser 1989; paper, eq. 15): exact head by head, or within blocks of units.

    γ(t) = J(t) γ(t-1) + R(t)        γ ∈ R^{SN × P}, P the number of weights

J is the layer's full recurrent Jacobian and R the immediate term, R[(ν, i), (k, i, j)] = φ^{ν,k}_i y^k_j. Where the
recurrent weights connect units only within H heads of b = N/H units (`weights.py`), J is block-diagonal, and a weight
of unit i acts only on states of i's head. So γ takes S·b·B·Σ_k N·M_k numbers, and a step takes
2·B·(S·b)²·Σ_k N·M_k FLOP. For K dense matrices (H = 1, b = M = N) that is S·K·B·N³ numbers and 2·S²·K·B·N⁴
FLOP (32·B·N⁴ for RGC); for recurrent blocks of b = M = √N it is S·K·B·N² numbers, as many as Γ has for dense ones.
The gradient is exact for any two-point cell.

Blocks of b units smaller than a head keep of J what lies within a block: a weight's sensitivities are then those of the
b units of its unit's block, b times what RFP carries. So b = 1 is RFP with S·S per unit, b a head's units is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks as check
from ..cells import weights as weight_ops
from ..cells.two_point import Linearization, Matrix, state_read
from . import rfp

# J γ is made in this many pieces where γ has several heads or batch rows, so that the second buffer is an eighth of γ.
PIECES = 8


def rows_at_once(blocks: int) -> int:
    """How many of γ's B·H = `blocks` blocks are multiplied at once; the second buffer has room for as many."""
    return -(-blocks // PIECES)


def joint_heads(weights: Sequence[Tensor], units: int) -> int:
    """H, the number of groups of units such that no recurrent weight connects two of them; N without such weights.

    It is the greatest common divisor of the weights' own numbers of heads: heads of different sizes are joined.
    """
    return math.gcd(units, *(weight_ops.heads_of(weight) for weight in weights))


def block_units(weights: Sequence[Tensor], units: int, block: int | None) -> int:
    """The units of a block: `block`, or those of a head. weights: the recurrent ones.

    Raises TypeError or ValueError unless `block` is an integer that divides the units of a head.
    """
    head = units // joint_heads(weights, units)
    if block is None:
        return head
    if head % check.integer("block", block, 1):
        raise ValueError(f"block must divide the {head} units that recurrent weights connect, got {block}")
    return block


def jacobian(
    lin: Linearization, t: int, matrices: Sequence[Matrix], weights: Sequence[Tensor], heads: int = 1
) -> Tensor:
    """J(t) = ∂c(t)/∂c(t-1) of each head or block, (B, H, S·b, S·b), zero for batch rows that are reset at t.

    matrices and weights are the recurrent ones; heads: H, how many blocks there are.
    """
    count, _, batch, units = lin.before.shape
    size = units // heads
    out = lin.before.new_zeros(batch, heads, count, size, count, size)
    for source, entries in enumerate(lin.partials.own):
        for nu, own in entries.items():
            diagonal = out[:, :, nu, :, source].diagonal(dim1=2, dim2=3)
            diagonal.add_(own[t].unflatten(-1, (heads, size)))
    for matrix, weight in zip(matrices, weights, strict=True):
        for nu, phi in lin.immediate(matrix).items():
            block = out[:, :, nu, :, state_read(matrix)]
            by_head = phi[t].unflatten(-1, (heads, size))
            if weight.dim() == 1:
                block.diagonal(dim1=2, dim2=3).addcmul_(by_head, weight.view(heads, size))
            else:
                block.addcmul_(by_head[..., None], weight_ops.in_heads(weight, heads))
    if lin.resets is not None:
        out.masked_fill_(lin.resets[t].view(-1, *(1,) * 5), 0)
    return out.flatten(4).flatten(2, 3)


class ExactSensitivity:
    """γ, zero at first, advanced one step at a time.

    matrices and weights are all those whose gradient is wanted; those that read a state are the recurrent ones, from
    which J is made. states is S and batch B. block: b, which divides a head's units; None: these (`block_units`).
    Matrices of one shape form a group and share one γ (B, H, S, b, K, b, M).
    A matrix product can't be made in place, so each group has a second buffer: of γ's size for one head of one batch
    row, else of about an eighth of it.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        weights: Sequence[Tensor],
        states: int,
        batch: int,
        block: int | None = None,
    ) -> None:
        self.states = states
        self.recurrent = [i for i, matrix in enumerate(matrices) if isinstance(matrix.reads, int)]
        self.matrices = list(matrices)
        first = weights[0]
        self.units = first.shape[0] if first.dim() < 3 else first.shape[0] * first.shape[1]
        size = block_units([weights[i] for i in self.recurrent], self.units, block)
        self.heads = self.units // size
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, weight in enumerate(weights):
            by_shape.setdefault(tuple(weight.shape), []).append(i)
        self.groups = list(by_shape.items())
        self.gammas = [
            first.new_zeros(
                batch, self.heads, states, size, len(indices), size, weight_ops.fan_in(weights[indices[0]])
            )
            for _, indices in self.groups
        ]
        blocks = batch * self.heads
        self._at_once = rows_at_once(blocks)
        self._spare = [
            torch.empty_like(gamma) if blocks == 1 else torch.empty_like(_rows(gamma)[: self._at_once])
            for gamma in self.gammas
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of γ itself, without the second buffers."""
        return sum(gamma.nbytes for gamma in self.gammas)

    @property
    def spare_nbytes(self) -> int:
        """Bytes of the second buffers."""
        return sum(spare.nbytes for spare in self._spare)

    def multiply_(self, group: int, step: Tensor) -> None:
        """γ ← J γ for one group; `step` is J (B, H, S·b, S·b). Mutates γ."""
        step = step.flatten(0, 1)
        gamma, spare = self.gammas[group], self._spare[group]
        if len(step) == 1:
            torch.bmm(step, _rows(gamma), out=_rows(spare))
            self.gammas[group], self._spare[group] = spare, gamma
            return
        rows = _rows(gamma)
        for start in range(0, len(step), self._at_once):
            piece = slice(start, start + self._at_once)
            made = spare[: len(rows[piece])]
            torch.bmm(step[piece], rows[piece], out=made)
            rows[piece].copy_(made)

    def step_(
        self, lin: Linearization, t: int, weights: Sequence[Tensor], inputs: Tensor | None = None
    ) -> None:
        """γ ← J γ + R at step t of `lin`. Mutates γ.

        weights: the recurrent ones; inputs: the layer's input (T, B, I), or None where no matrix reads it.
        """
        self.forget_(lin, t)
        step = self.jacobian(lin, t, weights)
        for group in range(len(self.groups)):
            self.advance_(group, step, lin, t, inputs)

    def forget_(self, lin: Linearization, t: int) -> None:
        """Set γ to zero in the batch rows that are reset at step t of `lin`: J is zero there, but zero times NaN isn't.

        Mutates γ.
        """
        if lin.resets is not None:
            for gamma in self.gammas:
                gamma.masked_fill_(lin.resets[t].view(-1, *(1,) * (gamma.dim() - 1)), 0)

    def jacobian(self, lin: Linearization, t: int, weights: Sequence[Tensor]) -> Tensor:
        """J(t) (B, H, S·b, S·b); weights: the recurrent ones."""
        recurrent = [self.matrices[i] for i in self.recurrent]
        return jacobian(lin, t, recurrent, weights, self.heads)

    def advance_(self, group: int, step: Tensor, lin: Linearization, t: int, inputs: Tensor | None) -> None:
        """`step_` for one group; `step` is J (B, H, S·b, S·b)."""
        self.multiply_(group, step)
        self.enter_(group, lin, t, inputs)

    def enter_(self, group: int, lin: Linearization, t: int, inputs: Tensor | None) -> None:
        """γ ← γ + R for one group, at step t of `lin`. Mutates γ."""
        new = self.gammas[group]
        for k, index in enumerate(self.groups[group][1]):
            matrix = self.matrices[index]
            y = self._read(rfp.signal(matrix, lin.before, inputs)[t], new.shape[-1])
            for nu, phi in lin.immediate(matrix).items():
                own = new[:, :, nu, :, k].diagonal(
                    dim1=2, dim2=3
                )  # (B, H, M, b), where the state's unit is row i
                own.addcmul_(self._by_head(phi[t])[:, :, None], y)

    def _by_head(self, per_unit: Tensor) -> Tensor:
        """Reshape (B, N) to (B, H, b)."""
        return per_unit.unflatten(-1, (self.heads, -1))

    def _read(self, y: Tensor, fan_in: int) -> Tensor:
        """y (B, Y), with Y as in `rfp.rows_read`, in a shape that broadcasts against (B, H, M, b)."""
        if y.shape[-1] == fan_in:
            return y[:, None, :, None]
        if fan_in not in (1, self.units // self.heads):  # several heads of this weight are joined in one
            rows = rfp.rows_read(y[:, None], fan_in)[:, 0]
            return rows.unflatten(1, (self.heads, -1)).mT
        return self._by_head(y)[:, :, None] if fan_in == 1 else self._by_head(y)[..., None]

    def read(self, delta: Tensor) -> list[Tensor]:
        """The gradient Σ_b δ · γ of each weight, in its shape, for delta (S, B, N)."""
        return self.by_matrix([self.read_group(group, delta) for group in range(len(self.groups))])

    def read_group(self, group: int, delta: Tensor) -> Tensor:
        """The gradient Σ_b δ · γ of one group, (H, K, b, M), for delta (S, B, N).

        A head and batch row without credit counts as zero, even where γ is NaN: a reset forgets.
        """
        gamma, batch = self.gammas[group], delta.shape[1]
        by_head = delta.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3).reshape(batch * self.heads, 1, -1)
        read = torch.bmm(by_head, _rows(gamma)).masked_fill_((by_head == 0).all(-1, keepdim=True), 0)
        return read.view(batch, self.heads, *gamma.shape[4:]).sum(0)

    def by_matrix(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Turn the groups' gradients (H, K, b, M) into one gradient per weight, in the weight's shape."""
        found: dict[int, Tensor] = {}
        for (shape, indices), total in zip(self.groups, totals, strict=True):
            for k, index in enumerate(indices):
                found[index] = total[:, k].reshape(shape)
        return [found[index] for index in sorted(found)]


def _rows(gamma: Tensor) -> Tensor:
    """γ (B, H, S, b, K, b, M) as matrices (B·H, S·b, K·b·M)."""
    return gamma.flatten(4).flatten(2, 3).flatten(0, 1)


def weight_gradients(
    lin: Linearization, matrices: Sequence[Matrix], weights: Sequence[Tensor], delta: Tensor
) -> list[Tensor]:
    """Exact gradients of the recurrent weights over a whole sequence, made forward in time, for delta (S, T, B, N)."""
    count, steps, batch, _ = delta.shape
    sensitivity = ExactSensitivity(matrices, weights, count, batch)
    total = [torch.zeros_like(w) for w in weights]
    for t in range(steps):
        sensitivity.step_(lin, t, weights)
        for sum_, part in zip(total, sensitivity.read(delta[:, t]), strict=True):
            sum_.add_(part)
    return total
