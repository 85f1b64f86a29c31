"""What is carried forward of the past, so that a loss at any later step can meet it: one class a rule.

    PerUnit   Γ, the sensitivity of the unit that a weight enters (RFP and the rules that drop parts of M)
    Exact     γ, the sensitivity of every unit of the weight's head (exact RTRL)
    RankOne   an unbiased random product in place of γ (UORO)
    Nothing   truncated BPTT

All are advanced in place over the steps of a `Block` and give Σ credit · sensitivity, one gradient a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends import dispatch as ops
from ..backends.room import Room
from ..cells import weights as weight_ops
from ..cells.two_point import Cell, Matrix, state_read
from ..rules import rfp, rtrl
from .tape import Block


class Carried(ABC):
    """Sensitivities of all matrices of a layer, zero at first."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that is carried, in a fixed order: a checkpoint's contents."""

    @property
    def nbytes(self) -> int:
        """Bytes carried."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def load_(self, tensors: Sequence[Tensor]) -> None:
        """Take up what `tensors` gave."""
        for target, source in zip(self.tensors(), tensors, strict=True):
            target.copy_(source)

    def forget_(self, rows: Tensor | None) -> None:
        """Forget the past of the batch rows where `rows` (B,) is True, or of all; each of `tensors` is (B, …)."""
        _forget_(self.tensors(), rows)

    def restart_(self) -> None:
        """Be as when made."""
        self.forget_(None)

    @abstractmethod
    def step_(
        self, block: Block, delta: Tensor | None = None, descent: ops.Descent | None = None
    ) -> list[Tensor] | None:
        """Advance by each step in turn; with delta (S, T, B, N), return Σ_t δ(t) · sensitivity(t) a matrix.

        descent: of the layer's weights, which take that gradient, and None is returned. Mutates them.
        """

    @abstractmethod
    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        """Advance over all steps; with credit (S, B, N) at the state before them, return credit · sensitivity
        as it was then."""

    @abstractmethod
    def read(self, credit: Tensor) -> list[Tensor]:
        """Σ_b credit · sensitivity a matrix, of its weight's shape. credit (S, B, N)."""


def _forget_(tensors: Sequence[Tensor], rows: Tensor | None) -> None:
    """Zero the rows (B,) of tensors (B, …), or all of them."""
    for tensor in tensors:
        if rows is None:
            tensor.zero_()
        else:
            tensor[rows] = 0


def _taken(descent: ops.Descent | None, gradients: list[Tensor] | None) -> list[Tensor] | None:
    """The gradients, or None where the weights have taken them."""
    if descent is None or gradients is None:
        return gradients
    descent.take_(gradients)
    return None


# Between the seeds of two groups: more than between seeds that a user would try one after the other.
_APART = 1 << 48


@dataclass
class Group:
    """Matrices of one shape whose Γ lies together: gammas S of (B, K, N, M).

    rng_state: seed and next step of stochastic rounding, (2,) int64; None rounds to nearest.
    room: of a large gradient on the CPU, which is kept from step to step.
    """

    matrices: list[Matrix]
    indices: list[int]
    shape: tuple[int, ...]
    gammas: list[Tensor]
    backend: str
    why: str
    rng_state: Tensor | None = None
    room: Room = field(default_factory=Room)


class PerUnit(Carried):
    """Γ^{ν,k} of all matrices of a layer, one tensor a state for each group of matrices of one shape.

    matrices, weights: all of the layer's, recurrent and input, of any shape (`weights.py`). states S, batch B.
    dtype is what Γ is kept in; arithmetic is in the weights' dtype. Bytes: S·B·(Σ_k N·M_k) numbers of dtype.
    seed: of stochastic rounding, of Γ in bfloat16, which steps alone do; None rounds to nearest.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        weights: Sequence[Tensor],
        states: int,
        batch: int,
        dtype: torch.dtype,
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.groups: list[Group] = []
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, weight in enumerate(weights):
            by_shape.setdefault(tuple(weight.shape), []).append(index)
        for shape, indices in by_shape.items():
            first = weights[indices[0]]
            fan_in = weight_ops.fan_in(first)
            units = first.numel() // fan_in
            chosen, why = ops.choose_gamma(backend, first.device, first.dtype, dtype, states)
            if len(shape) == 3 and chosen == "triton":
                chosen, why = "torch", "kernels take dense matrices, not blocks"
            gammas = [
                torch.zeros(batch, len(indices), units, fan_in, dtype=dtype, device=first.device)
                for _ in range(states)
            ]
            rng_state = None
            if seed is not None:
                # groups of one learner draw apart
                own = (seed + len(self.groups) * _APART) % (1 << 63)
                rng_state = torch.tensor([own, 0], device=first.device)
            made = Group([matrices[i] for i in indices], indices, shape, gammas, chosen, why, rng_state)
            self.groups.append(made)

    def tensors(self) -> list[Tensor]:
        return [
            *self._gammas(),
            *(group.rng_state for group in self.groups if group.rng_state is not None),
        ]

    def _gammas(self) -> list[Tensor]:
        return [gamma for group in self.groups for gamma in group.gammas]

    def forget_(self, rows: Tensor | None) -> None:
        _forget_(self._gammas(), rows)

    def restart_(self) -> None:
        self.forget_(None)
        for group in self.groups:
            if group.rng_state is not None:
                group.rng_state[1] = 0

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: ops.Descent | None = None
    ) -> list[Tensor] | None:
        totals = [
            ops.gamma_steps_(
                group.gammas,
                group.matrices,
                block.lin,
                block.inputs,
                block.m,
                delta,
                rng_state=group.rng_state,
                backend=group.backend,
                room=group.room,
                descent=None if descent is None else descent.of(group.indices),
            )
            for group in self.groups
        ]
        return self._by_matrix(totals)

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        totals = [
            ops.gamma_chunk_(
                group.gammas,
                block.m,
                rfp.immediates(group.matrices, block.lin),
                rfp.signals(group.matrices, block.lin, block.inputs),
                credit,
                backend=group.backend,
                room=group.room,
            )
            for group in self.groups
        ]
        return self._by_matrix(totals)

    def read(self, credit: Tensor) -> list[Tensor]:
        totals = [
            ops.gamma_read(group.gammas, credit, backend=group.backend, room=group.room)
            for group in self.groups
        ]
        gradients = self._by_matrix(totals)
        assert gradients is not None
        return gradients

    def _by_matrix(self, totals: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The groups' (K, N, M) as one gradient a matrix; None if there are none."""
        found: dict[int, Tensor] = {}
        for group, total in zip(self.groups, totals, strict=True):
            if total is not None:
                gradients = total.view(-1, *group.shape).unbind()
                found.update(zip(group.indices, gradients, strict=True))
        return [found[index] for index in sorted(found)] or None


class _StepByStep(Carried):
    """What is advanced one step at a time and has no formula for a chunk."""

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: ops.Descent | None = None
    ) -> list[Tensor] | None:
        totals: list[Tensor] | None = None
        for t in range(block.steps):
            self._advance(block, t)
            if delta is not None:
                parts = self.read(delta[:, t])
                totals = parts if totals is None else [a.add_(b) for a, b in zip(totals, parts, strict=True)]
        return _taken(descent, totals)

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        gradients = None if credit is None else self.read(credit)
        self.step_(block)
        return gradients

    @abstractmethod
    def _advance(self, block: Block, t: int) -> None:
        """Advance by step t of the block."""


class Exact(_StepByStep):
    """γ of exact RTRL (`reference.rtrl`); blocks carry the recurrent weights that their steps ran with.

    backend: "torch", or "triton", which takes a step and its gradient in one pass over γ, for heads of at most 64
    units (`kernels.rtrl_heads`), and builds J of a larger dense RGC and adds its R in one pass each
    (`kernels.rtrl_step`); J γ is torch's product.
    """

    def __init__(
        self,
        cell: Cell,
        matrices: Sequence[Matrix],
        weights: Sequence[Tensor],
        states: int,
        batch: int,
        backend: str = "torch",
    ) -> None:
        self._gamma = rtrl.ExactSensitivity(matrices, weights, states, batch)
        size = self._gamma.units // self._gamma.heads
        # what each unit reads of its own has no place in the kernel, but where a head is a unit
        per_unit = any(
            weight.dim() == 1 and isinstance(k.reads, int)
            for k, weight in zip(matrices, weights, strict=True)
        )
        fits = size <= ops.HEAD_UNITS and states <= ops.SCAN_STATES and not (per_unit and size > 1)
        self._one_pass = backend == "triton" and fits
        recurrent = [weights[i] for i in self._gamma.recurrent]
        self._dense = backend == "triton" and not fits and ops.is_dense_rgc(cell, recurrent)

    @property
    def nbytes(self) -> int:
        return self._gamma.nbytes + self._gamma.spare_nbytes

    def tensors(self) -> list[Tensor]:
        return self._gamma.gammas

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: ops.Descent | None = None
    ) -> list[Tensor] | None:
        if not self._one_pass:
            return super().step_(block, delta, descent)
        totals: list[Tensor] | None = None
        for t in range(block.steps):
            parts = self._step_by_kernel(block, t, None if delta is None else delta[:, t])
            totals = parts if totals is None else [a.add_(b) for a, b in zip(totals, parts, strict=True)]
        return None if delta is None else _taken(descent, totals)

    def _step_by_kernel(self, block: Block, t: int, delta: Tensor | None) -> list[Tensor]:
        """Advance by step t of the block; gradients by matrix with delta (S, B, N), else none."""
        gamma, lin = self._gamma, block.lin
        assert block.weights is not None
        step = gamma.jacobian(lin, t, block.weights).contiguous()
        totals = []
        for group, (_, indices) in enumerate(gamma.groups):
            matrices = [gamma.matrices[i] for i in indices]
            fan_in = gamma.gammas[group].shape[-1]
            y = rfp.signals(matrices, lin, block.inputs)[t]
            if y.shape[-1] != fan_in:  # heads each read their own units; a bias reads 1
                biases = fan_in == 1 and gamma.heads < gamma.units
                y = y[..., :1] if biases else y.unflatten(-1, (gamma.heads, fan_in))
            phi = rfp.immediates(matrices, lin).select(1, t)
            done = ops.rtrl_heads_(gamma.gammas[group], step, phi, y.contiguous(), delta)
            if done is None:
                gamma.advance_(group, step, lin, t, block.inputs)
                done = (None if delta is None else gamma.read_group(group, delta),)
            if done[0] is not None:
                totals.append(done[0])
        return gamma.by_matrix(totals) if totals else []

    def _advance(self, block: Block, t: int) -> None:
        assert block.weights is not None
        gamma, lin = self._gamma, block.lin
        step = ops.rtrl_jacobian(lin, t, block.weights) if self._dense else None
        if step is None:
            step = gamma.jacobian(lin, t, block.weights)
        for group, (_, indices) in enumerate(gamma.groups):
            gamma.multiply_(group, step)
            by_kernel = self._dense and indices == gamma.recurrent
            if not (by_kernel and ops.rtrl_immediate_(gamma.gammas[group], lin, t)):
                gamma.enter_(group, lin, t, block.inputs)

    def read(self, credit: Tensor) -> list[Tensor]:
        return self._gamma.read(credit)


class RankOne(_StepByStep):
    """Unbiased online recurrent optimization (UORO; Tallec & Ollivier 2018): γ ≈ c̃ θ̃ᵀ, a row of the batch each.

        c̃ ← ρ₀ J c̃ + ρ₁ σ        θ̃ ← θ̃ / ρ₀ + Rᵀσ / ρ₁        σ random signs, (S, B, N)
        ρ₀² = ‖θ̃‖ / ‖J c̃‖         ρ₁² = ‖Rᵀσ‖ / ‖σ‖

    With weights that stay as they are E[c̃ θ̃ᵀ] = γ: the gradient is unbiased, and noisy. Numbers: B·(S·N +
    Σ_k N·M_k). seed: of the signs, which are drawn on the CPU.
    """

    def __init__(
        self, matrices: Sequence[Matrix], weights: Sequence[Tensor], states: int, batch: int, seed: int
    ) -> None:
        first = weights[0]
        units = first.numel() // weight_ops.fan_in(first)
        self._matrices = list(matrices)
        self._shapes = [tuple(weight.shape) for weight in weights]
        self._c = first.new_zeros(states, batch, units)
        self._theta = [first.new_zeros(batch, units, weight_ops.fan_in(weight)) for weight in weights]
        self._generator = torch.Generator().manual_seed(seed)

    def tensors(self) -> list[Tensor]:
        return [self._c, *self._theta, self._generator.get_state()]

    def load_(self, tensors: Sequence[Tensor]) -> None:
        *own, generator = tensors
        for target, source in zip((self._c, *self._theta), own, strict=True):
            target.copy_(source)
        self._generator.set_state(generator.cpu())

    def forget_(self, rows: Tensor | None) -> None:
        keep = slice(None) if rows is None else rows
        self._c[:, keep] = 0
        for theta in self._theta:
            theta[keep] = 0

    def _advance(self, block: Block, t: int) -> None:
        assert block.weights is not None
        lin = block.lin
        if lin.resets is not None:
            self.forget_(lin.resets[t])
        moved = self._through_jacobian(block, t)
        signs = torch.randint(0, 2, self._c.shape, generator=self._generator) * 2 - 1
        signs = signs.to(self._c)
        entering = []
        for matrix, theta in zip(self._matrices, self._theta, strict=True):
            rows = torch.zeros_like(self._c[0])
            for nu, phi in lin.immediate(matrix).items():
                rows.addcmul_(signs[nu], phi[t])
            y = rfp.signal(matrix, lin.before, block.inputs)[t]
            read = rfp.rows_read(y[:, None], theta.shape[-1])[:, 0]
            entering.append(rows[:, :, None] * read)
        before, after = _ratio(_norm(self._theta), _norm([moved.transpose(0, 1)]))
        drawn, given = _ratio(_norm(entering), _norm([signs.transpose(0, 1)]))
        self._c = moved * before[:, None] + signs * drawn[:, None]
        for theta, new in zip(self._theta, entering, strict=True):
            theta.mul_(after[:, None, None]).add_(new * given[:, None, None])

    def _through_jacobian(self, block: Block, t: int) -> Tensor:
        """J(t) c̃ (S, B, N)."""
        lin = block.lin
        out = torch.zeros_like(self._c)
        for source, entries in enumerate(lin.partials.own):
            for nu, own in entries.items():
                out[nu].addcmul_(own[t], self._c[source])
        recurrent = self._matrices[: len(block.weights or ())]
        for matrix, weight in zip(recurrent, block.weights or (), strict=True):
            arrived = weight_ops.multiply(weight, self._c[state_read(matrix)])
            for nu, phi in lin.immediate(matrix).items():
                out[nu].addcmul_(phi[t], arrived)
        return out

    def read(self, credit: Tensor) -> list[Tensor]:
        share = (credit * self._c).sum((0, 2))
        totals = [torch.einsum("b,bnm->nm", share, theta) for theta in self._theta]
        return [total.reshape(shape) for total, shape in zip(totals, self._shapes, strict=True)]


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """Norm over all but the batch, (B,), of arrays (B, …) taken together."""
    return torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()


def _ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """√(a/b) and its inverse, (B,); 1 where either is zero, so that neither is lost."""
    degenerate = (a == 0) | (b == 0)
    ratio = torch.where(degenerate, torch.ones_like(a), (a / b).sqrt())
    return ratio, 1 / ratio


class Nothing(Carried):
    """Truncated BPTT: what lies before the chunk counts for nothing."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._zeros = [torch.zeros_like(weight) for weight in weights]

    def tensors(self) -> list[Tensor]:
        return []

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: ops.Descent | None = None
    ) -> list[Tensor] | None:
        raise AssertionError("truncated BPTT has no step form")

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        return None if credit is None else self._zeros

    def read(self, credit: Tensor) -> list[Tensor]:
        return self._zeros
