"""What a learner carries forward of the past, so that a loss at any later step can use it: one class for each rule.

    PerUnit        Γ, the sensitivity of the unit that a weight enters (RFP and the rules that drop parts of M)
    Exact          γ, the sensitivity of every unit of the weight's head (exact RTRL)
    RankOne        an unbiased random product in place of γ (UORO)
    NoSensitivity  none (truncated BPTT)

All are advanced in place over the steps of a `Block`, and give Σ credit · sensitivity, one gradient for each matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backend import operations, table
from ..backend.buffers import ReusedMemory
from ..backend.descent import Descent
from ..cells import weights as weight_ops
from ..cells.two_point import Cell, Matrix, state_read
from ..rules import rfp, rtrl
from .tape import Block


class Sensitivity(ABC):
    """Sensitivities of the states to all matrices of a layer, zero at first.

    advances: how often compiled code or kernels, which autograd's version counters don't see, have changed them.
    """

    advances = 0

    def version(self) -> int:
        """Another number after each change."""
        version = self.advances
        for tensor in self.tensors():  # not a generator, which takes longer, in each step
            if not tensor.is_inference():
                version += tensor._version
        return version

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that are carried, in a fixed order: what a checkpoint holds."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is carried."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def numbers(self) -> list[Tensor]:
        """Those of `tensors` that hold sensitivities."""
        return [tensor for tensor in self.tensors() if tensor.is_floating_point()]

    @abstractmethod
    def by_unit(self) -> Iterator[tuple[str, Tensor]]:
        """All sensitivities as (B, N, ·), those of one unit in a row, each with its name: for messages."""

    def load_(self, tensors: Sequence[Tensor]) -> None:
        """Restore what `tensors` gave."""
        for target, source in zip(self.tensors(), tensors, strict=True):
            target.copy_(source.detach())

    def with_rows(self, change: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """`tensors` for other batch rows, as `load_` takes them; change: of a tensor's rows, in this dimension."""
        return [change(tensor, 0) if tensor.is_floating_point() else tensor for tensor in self.tensors()]

    def forget_(self, rows: Tensor | None) -> None:
        """Set the sensitivities of the batch rows where `rows` (B,) is True to zero, or of all rows if None."""
        _zero_rows_(self.tensors(), rows)

    def restart_(self) -> None:
        """Return to the state that the constructor left."""
        self.forget_(None)

    @abstractmethod
    def step_(
        self, block: Block, delta: Tensor | None = None, descent: Descent | None = None
    ) -> list[Tensor] | None:
        """Advance by each step of the block in turn; with delta, return Σ_t δ(t) · sensitivity(t) for each matrix.

        delta (S, T, B, N) or None: the loss's gradient with respect to the states. descent: takes a step of SGD on the
        layer's weights by that gradient, and None is returned. Mutates the sensitivities, and the descent's weights.
        """

    @abstractmethod
    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        """Advance over all steps of the block at once. Mutates the sensitivities.

        credit (S, B, N) or None: of the state before these steps; with it, return Σ_b credit · sensitivity for each
        matrix, of the sensitivity as it was before them.
        """

    @abstractmethod
    def read(self, credit: Tensor) -> list[Tensor]:
        """Σ_b credit · sensitivity for each matrix, of its weight's shape. credit (S, B, N)."""


Carried = Sensitivity  # its name in version 0.1


def _zero_rows_(tensors: Sequence[Tensor], rows: Tensor | None) -> None:
    """Set tensors (B, …) to zero in the rows where `rows` (B,) is True, or everywhere if None."""
    for tensor in tensors:
        if rows is None:
            tensor.zero_()
        else:
            tensor.masked_fill_(rows.view(-1, *(1,) * (tensor.dim() - 1)), 0)


def _descend(descent: Descent | None, gradients: list[Tensor] | None) -> list[Tensor] | None:
    """Take the descent's step by the gradients and return None; without a descent, return the gradients."""
    if descent is None or gradients is None:
        return gradients
    descent.apply_(gradients)
    return None


# The distance between the seeds of two groups of one learner: larger than that of seeds which a user may try in turn.
_SEED_DISTANCE = 1 << 48


@dataclass
class Group:
    """K matrices of one shape, whose Γ is stored together.

    matrices, indices  the matrices, and their places among the layer's
    shape              of one weight
    gammas             Γ^ν for each of the S states, (B, K, N, M)
    backend, why       what runs Γ's recursion, and why it was chosen
    rng_state          seed and next step of stochastic rounding, (2,) int64; None rounds to nearest
    memory             lends the memory of a large gradient on the CPU, from step to step
    """

    matrices: list[Matrix]
    indices: list[int]
    shape: tuple[int, ...]
    gammas: list[Tensor]
    backend: str
    why: str
    rng_state: Tensor | None = None
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    def serving(self) -> tuple[str, str]:
        """Which backend runs Γ of these matrices, and why."""
        return table.serving(
            self.backend,
            self.why,
            operations.gamma_step_of_,
            operations.gamma_chunk_of_,
            operations.gamma_read,
        )


class PerUnit(Sensitivity):
    """Γ^{ν,k} of all matrices of a layer, stored as one tensor a state for each group of matrices of one shape.

    matrices, weights: all of the layer's, recurrent and input, of any shape (`cells.weights`). states: S. batch: B.
    dtype: of Γ, S·B·Σ_k N·M_k numbers; the arithmetic is in the weights' dtype.
    seed: of the stochastic rounding of a bfloat16 Γ, which `step_` alone does; None rounds to nearest.
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
            chosen, why = operations.choose_gamma(
                backend, first.device, first.dtype, dtype, states, blocks=len(shape) == 3
            )
            gammas = [
                torch.zeros(batch, len(indices), units, fan_in, dtype=dtype, device=first.device)
                for _ in range(states)
            ]
            rng_state = None
            if seed is not None:
                # each group of one learner draws from a stream of its own
                own = (seed + len(self.groups) * _SEED_DISTANCE) % (1 << 63)
                rng_state = torch.tensor([own, 0], device=first.device)
            group = Group([matrices[i] for i in indices], indices, shape, gammas, chosen, why, rng_state)
            self.groups.append(group)

    def tensors(self) -> list[Tensor]:
        gammas = self._gammas()
        return gammas + [group.rng_state for group in self.groups if group.rng_state is not None]

    def by_unit(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            for gamma in group.gammas:
                for k, matrix in enumerate(group.matrices):
                    yield f"Γ of {matrix.name}", gamma[:, k]

    def _gammas(self) -> list[Tensor]:
        return [gamma for group in self.groups for gamma in group.gammas]

    def forget_(self, rows: Tensor | None) -> None:
        _zero_rows_(self._gammas(), rows)

    def restart_(self) -> None:
        self.forget_(None)
        for group in self.groups:
            if group.rng_state is not None:
                group.rng_state[1] = 0

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: Descent | None = None
    ) -> list[Tensor] | None:
        totals = []
        for group in self.groups:
            total = operations.gamma_steps_(
                group.gammas,
                group.matrices,
                block.lin,
                block.inputs,
                block.m,
                delta,
                rng_state=group.rng_state,
                backend=group.backend,
                memory=group.memory,
                descent=None if descent is None else descent.select(group.indices),
            )
            self.advances += 1
            totals.append(total)
        return self._by_matrix(totals)

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        if block.lin.resets is not None:  # Γ forgets the steps before a reset, even where they are NaN
            block = block.without(rfp.before_a_reset(block.lin.resets))
        totals = []
        for group in self.groups:
            steps = operations.GammaSteps(group.matrices, block.lin, block.inputs, block.m, None)
            total = operations.gamma_chunk_of_(
                group.gammas, steps, credit, backend=group.backend, memory=group.memory
            )
            self.advances += 1
            totals.append(total)
        return self._by_matrix(totals)

    def read(self, credit: Tensor) -> list[Tensor]:
        totals = [
            operations.gamma_read(group.gammas, credit, backend=group.backend, memory=group.memory)
            for group in self.groups
        ]
        gradients = self._by_matrix(totals)
        assert gradients is not None
        return gradients

    def _by_matrix(self, totals: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The groups' gradients (K, N, M) as one for each matrix, in the layer's order; None if there are none."""
        found: dict[int, Tensor] = {}
        for group, total in zip(self.groups, totals, strict=True):
            if total is not None:
                shaped = total if len(group.shape) == 2 else total.view(-1, *group.shape)
                found.update(zip(group.indices, shaped.unbind(), strict=True))
        return [found[index] for index in sorted(found)] or None


class _StepByStep(Sensitivity):
    """Sensitivities that are advanced one step at a time, since there is no formula for a chunk."""

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: Descent | None = None
    ) -> list[Tensor] | None:
        totals: list[Tensor] | None = None
        for t in range(block.steps):
            parts = self._advance(block, t, None if delta is None else delta[:, t])
            totals = parts if totals is None else [a.add_(b) for a, b in zip(totals, parts, strict=True)]
        return None if delta is None else _descend(descent, totals)

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        gradients = None if credit is None else self.read(credit)
        self.step_(block)
        return gradients

    @abstractmethod
    def _advance(self, block: Block, t: int, delta: Tensor | None) -> list[Tensor]:
        """Advance by step t of the block. With delta (S, B, N), return a gradient for each matrix, else none."""


class Exact(_StepByStep):
    """γ of RTRL (`rules.rtrl`): γ ← J γ + R, with J the Jacobian of a head or block and R its immediate sensitivity.

    block: b, the units of a block; None: those of a head, for which γ is exact.

    Blocks must carry the recurrent weights that their steps ran with. backend: "torch" or "triton". Triton advances
    heads of at most 64 units and reads their gradient in one pass over γ; for a larger dense RGC it computes J in one
    pass and adds R in another (`backend.triton_backend`), and torch multiplies J γ.
    """

    def __init__(
        self,
        cell: Cell,
        matrices: Sequence[Matrix],
        weights: Sequence[Tensor],
        states: int,
        batch: int,
        block: int | None = None,
        backend: str = "torch",
    ) -> None:
        self._cell, self._backend = cell, backend
        self._gamma = rtrl.ExactSensitivity(matrices, weights, states, batch, block)

    @property
    def block(self) -> int:
        """b, the units of a head or block."""
        return self._gamma.units // self._gamma.heads

    @property
    def nbytes(self) -> int:
        return self._gamma.nbytes + self._gamma.spare_nbytes

    def tensors(self) -> list[Tensor]:
        return self._gamma.gammas

    def by_unit(self) -> Iterator[tuple[str, Tensor]]:
        for gamma, (_, indices) in zip(self._gamma.gammas, self._gamma.groups, strict=True):
            for k, index in enumerate(
                indices
            ):  # (B, H, S, b, b, M): of unit j of a head, by unit p that W enters
                of_units = gamma[:, :, :, :, k].transpose(2, 3)
                yield f"γ of {self._gamma.matrices[index].name}", of_units.flatten(3).flatten(1, 2)

    def by_index(self) -> list[tuple[Tensor, list[int]]]:
        """γ (B, H, S, b, K, b, M) of each group of matrices, and their places among the layer's."""
        return [
            (gamma, indices)
            for gamma, (_, indices) in zip(self._gamma.gammas, self._gamma.groups, strict=True)
        ]

    def _advance(self, block: Block, t: int, delta: Tensor | None) -> list[Tensor]:
        assert block.weights is not None
        gamma, lin = self._gamma, block.lin
        step = operations.rtrl_jacobian(self._cell, gamma, lin, t, block.weights, backend=self._backend)
        gamma.forget_(lin, t)
        totals = []
        for group in range(len(gamma.groups)):
            self.advances += 1  # first: a product may make γ another tensor, with a version of its own
            total = operations.rtrl_step_(
                self._cell, gamma, group, step, lin, t, block.inputs, delta, backend=self._backend
            )
            totals.append(total)
        return [] if delta is None else gamma.by_matrix([total for total in totals if total is not None])

    def read(self, credit: Tensor) -> list[Tensor]:
        return self._gamma.read(credit)


class RankOne(_StepByStep):
    """Unbiased online recurrent optimization (UORO; Tallec & Ollivier 2018): γ ≈ c̃ θ̃ᵀ, for each batch row.

        c̃ ← ρ₀ J c̃ + ρ₁ σ        θ̃ ← θ̃ / ρ₀ + Rᵀσ / ρ₁        σ random signs, (S, B, N)
        ρ₀² = ‖θ̃‖ / ‖J c̃‖         ρ₁² = ‖Rᵀσ‖ / ‖σ‖

    Where nothing enters, R = 0, ρ₀ is 1 and ρ₁ 0: c̃ ← J c̃, without noise.

    J is the layer's Jacobian, R its immediate sensitivity. While the weights stay as they are, E[c̃ θ̃ᵀ] = γ, so the
    gradient is unbiased; it is noisy. Numbers: B·(S·N + Σ_k N·M_k). seed: of the signs, which are drawn on the CPU.
    """

    def __init__(
        self, matrices: Sequence[Matrix], weights: Sequence[Tensor], states: int, batch: int, seed: int
    ) -> None:
        first = weights[0]
        units = first.numel() // weight_ops.fan_in(first)
        self._matrices = list(matrices)
        self._shapes = [tuple(weight.shape) for weight in weights]
        self._c = first.new_zeros(states, batch, units)
        self._fan_ins = [weight_ops.fan_in(weight) for weight in weights]
        self._joined = first.new_zeros(batch, units * sum(self._fan_ins))  # θ̃ of all matrices, side by side
        self._theta = self._apart(self._joined)
        self._generator = torch.Generator().manual_seed(seed)

    def _apart(self, joined: Tensor) -> list[Tensor]:
        """Views (B, N, M) of what is joined as θ̃ is, one for each matrix."""
        units = self._c.shape[2]
        parts = joined.split([units * fan_in for fan_in in self._fan_ins], dim=-1)
        return [part.unflatten(-1, (units, -1)) for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        """For copies, in which views would no longer be those of one array."""
        return {**self.__dict__, "_theta": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._theta = self._apart(self._joined)

    def tensors(self) -> list[Tensor]:
        return [self._c, *self._theta, self._generator.get_state()]

    def numbers(self) -> list[Tensor]:
        return [self._c, *self._theta]

    def version(self) -> int:  # without the generator, whose state is copied to be read
        return self.advances + sum(tensor._version for tensor in self.numbers() if not tensor.is_inference())

    def with_rows(self, change: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        return [change(self._c, 1), *(change(theta, 0) for theta in self._theta), self._generator.get_state()]

    def by_unit(self) -> Iterator[tuple[str, Tensor]]:
        yield "c̃", self._c.permute(1, 2, 0)
        for matrix, theta in zip(self._matrices, self._theta, strict=True):
            yield f"θ̃ of {matrix.name}", theta

    def load_(self, tensors: Sequence[Tensor]) -> None:
        *own, generator = tensors
        for target, source in zip((self._c, *self._theta), own, strict=True):
            target.copy_(source.detach())
        self._generator.set_state(generator.cpu())

    def forget_(self, rows: Tensor | None) -> None:
        _zero_rows_([self._joined, *self._c.unbind(0)], rows)

    def _advance(self, block: Block, t: int, delta: Tensor | None) -> list[Tensor]:
        assert block.weights is not None
        lin = block.lin
        if lin.resets is not None:
            self.forget_(lin.resets[t])
        moved = self._through_jacobian(block, t)
        self.advances += 1  # the generator of the signs is part of what is carried
        signs = torch.randint(0, 2, self._c.shape, generator=self._generator, device="cpu") * 2 - 1
        signs = signs.to(self._c)
        entering = []
        for matrix, theta in zip(self._matrices, self._theta, strict=True):
            rows = torch.zeros_like(self._c[0])
            for nu, phi in lin.immediate(matrix).items():
                rows.addcmul_(signs[nu], phi[t])
            y = rfp.signal(matrix, lin.before, block.inputs)[t]
            read = rfp.rows_read(y[:, None], theta.shape[-1])[:, 0]
            entering.append((rows[:, :, None] * read).flatten(1))
        new = torch.cat(entering, 1)
        size = _norm(new)
        rho_0, inverse_0 = _balance(_norm(self._joined), _norm(moved.transpose(0, 1)))
        rho_1, inverse_1 = _balance(size, _norm(signs.transpose(0, 1)))
        nothing = size == 0
        rho_0, inverse_0 = rho_0.masked_fill_(nothing, 1), inverse_0.masked_fill_(nothing, 1)
        rho_1 = rho_1.masked_fill_(nothing, 0)
        # in place: a tensor that is made in inference mode could not be changed outside of it
        torch.addcmul(moved * rho_0[:, None], signs, rho_1[:, None], out=self._c)
        self._joined.mul_(inverse_0[:, None]).addcmul_(new, inverse_1[:, None])
        return [] if delta is None else self.read(delta)

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
        share, joined = self._shares(credit)
        totals = self._apart(share @ joined)
        return [total.reshape(shape) for total, shape in zip(totals, self._shapes, strict=True)]

    def read_rows(self, credit: Tensor) -> list[Tensor]:
        """As `read`, of each batch row: (B, *W)."""
        share, joined = self._shares(credit)
        rows = self._apart(share[:, None] * joined)
        return [of.reshape(-1, *shape) for of, shape in zip(rows, self._shapes, strict=True)]

    def _shares(self, credit: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_ν credit^ν · c̃^ν (B,), and θ̃ of all matrices, joined."""
        # what no credit reads counts as zero, even where it is NaN: a reset forgets
        share = torch.where(credit == 0, 0, credit * self._c).sum((0, 2))
        return share, self._joined.masked_fill((share == 0)[:, None], 0)


def _norm(rows: Tensor) -> Tensor:
    """The norm of each row of an array (B, …): (B,)."""
    return rows.flatten(1).square().sum(1).sqrt()


def _balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """ρ = √(a/b) and 1/ρ, (B,); both 1 where a or b is zero, which would make the other factor zero or infinite."""
    degenerate = (a == 0) | (b == 0)
    ratio = torch.where(degenerate, torch.ones_like(a), (a / b).sqrt())
    return ratio, 1 / ratio


class NoSensitivity(Sensitivity):
    """For truncated BPTT, which carries nothing: steps before the chunk have no part in the gradient."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._zeros = [torch.zeros_like(weight) for weight in weights]

    def tensors(self) -> list[Tensor]:
        return []

    def by_unit(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def step_(
        self, block: Block, delta: Tensor | None = None, descent: Descent | None = None
    ) -> list[Tensor] | None:
        raise AssertionError("truncated BPTT has no step form")

    def chunk_(self, block: Block, credit: Tensor | None = None) -> list[Tensor] | None:
        return None if credit is None else self._zeros

    def read(self, credit: Tensor) -> list[Tensor]:
        return self._zeros


Nothing = NoSensitivity  # its name in version 0.1
