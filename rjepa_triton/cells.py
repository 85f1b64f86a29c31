"""Two-point recurrent cells: one per-unit update, and everything that follows from it.

A two-point cell (paper, Appendix D) updates each unit i from its own states, its own pre-activations and
its own input:

    c_i(t) = F(c_i(t-1), p_i(t), x_i(t)),        p^g_i(t) = Σ_{k into g} Σ_j W^k_ij y^k_j(t)

where y^k is the state that matrix k reads, of the step before. A `Cell` says which states, gates
(pre-activations), inputs and matrices there are, and gives F. From F alone follow the three per-unit
partials that every learning rule here is made of:

    own   A^{νν'} = ∂F_ν/∂c^{ν'}      the path through no matrix
    gate  φ^{ν,g} = ∂F_ν/∂p^g         immediate sensitivity to what enters gate g
    input X^{ν,j} = ∂F_ν/∂x^j         what is passed down to the layer's input

Letters: T time, B batch, N units, S states per unit, K matrices, M fan-in. Arrays are time-major.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ByState = dict[int, Tensor]  # by the state ν that a partial is of; absent if zero by structure


Reads = int | Literal["input", "one"]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a layer: what it reads and what it enters.

    into   ("gate", g): pre-activation g, or ("input", j): per-unit input j
    reads  ν: state ν of the step before (a recurrent matrix); "input": the layer's input; "one": a bias
    """

    name: str
    into: tuple[Literal["gate", "input"], int]
    reads: Reads


@dataclass(frozen=True)
class Partials:
    """Per-unit partials of F, by what they are with respect to, then by the state ν that they are of.

    own[ν'][ν] = ∂F_ν/∂c^{ν'}, gate[g][ν] = ∂F_ν/∂p^g, input[j][ν] = ∂F_ν/∂x^j: tensors of the shape F was
    evaluated at, e.g. (T, B, N). A ν that is absent stands for a partial that is zero by structure.
    """

    own: Sequence[ByState]
    gate: Sequence[ByState]
    input: Sequence[ByState]


@dataclass(frozen=True)
class Trajectory:
    """A forward pass and what its backward needs.

    x       (J, T, B, N)   the layer's per-unit inputs
    states  (S, T + 1, B, N)   state before the first step, then after each step
    saved   what the cell keeps of its gates (private to the cell)
    resets  (T, B) bool or None: rows whose state was zeroed before that step
    """

    x: Tensor
    states: Tensor
    saved: Tensor
    resets: Tensor | None = None

    @property
    def after(self) -> Tensor:
        """(S, T, B, N): the state after each step."""
        return self.states[:, 1:]

    @property
    def before(self) -> Tensor:
        """(S, T, B, N): the state that each step read, zero where it was reset."""
        before = self.states[:, :-1]
        return before if self.resets is None else before.masked_fill(self.resets[..., None], 0)


@dataclass(frozen=True)
class Linearization:
    """The partials along a trajectory, with what the matrices read: all that a learning rule needs.

    partials     each entry (T, B, N)
    before       (S, T, B, N): the state that each step read
    resets       (T, B) bool or None: no credit passes from that step to the one before it
    """

    partials: Partials
    before: Tensor
    resets: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.before.shape[1]

    def immediate(self, matrix: Matrix) -> ByState:
        """φ^{ν,k} = ∂F_ν/∂(what matrix k enters), by ν, each (T, B, N)."""
        kind, index = matrix.into
        return (self.partials.gate if kind == "gate" else self.partials.input)[index]


class Cell(ABC):
    """A two-point cell. Subclasses give the four names and `update`; the rest follows.

    states    names of the S states of a unit
    gates     names of the pre-activations p^g
    inputs    names of the J per-unit inputs
    matrices  the K recurrent matrices, each into a gate and reading a state; several may enter one gate
    """

    states: Sequence[str]
    gates: Sequence[str]
    inputs: Sequence[str] = ("x",)
    matrices: Sequence[Matrix]

    @abstractmethod
    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """F: the S new states from S old states, the gates' pre-activations and the J inputs.

        Every tensor has one shape, and F must act on each entry alone.
        """

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """The partials of F at (c, p, x), in closed form where a cell has one."""
        return self.automatic_partials(c, p, x)

    def automatic_partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """The partials of F by forward-mode differentiation.

        F acts on each unit alone, so each partial is one Jacobian-vector product with a tangent of ones.
        No entry is taken to be zero by structure.
        """
        groups = (tuple(c), tuple(p), tuple(x))
        out: list[list[ByState]] = [[], [], []]
        for which, group in enumerate(groups):
            for j in range(len(group)):
                tangents = tuple(
                    tuple(
                        torch.ones_like(a) if (w, i) == (which, j) else torch.zeros_like(a)
                        for i, a in enumerate(g)
                    )
                    for w, g in enumerate(groups)
                )
                derivative = torch.func.jvp(self.update, groups, tangents)[1]
                out[which].append(dict(enumerate(derivative)))
        return Partials(*out)

    @torch.no_grad()
    def scan(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        resets: Tensor | None = None,
    ) -> Trajectory:
        """Run the cell over time.

        x (J, T, B, N); weights: K of (N, N), or (N,) for a diagonal one; state: S of (B, N);
        resets (T, B) bool. Returns a `Trajectory` whose `saved` is the pre-activations, (G, T, B, N).
        """
        _, steps, batch, units = x.shape
        states = x.new_empty(len(self.states), steps + 1, batch, units)
        for nu, initial in enumerate(state):
            states[nu, 0] = initial
        saved = x.new_zeros(len(self.gates), steps, batch, units)
        reset_steps = _reset_steps(resets)
        for t in range(steps):
            before = states[:, t]
            if resets is not None and t in reset_steps:
                before = before.masked_fill(resets[t, :, None], 0)
            for matrix, weight in zip(self.matrices, weights, strict=True):
                signal = before[state_read(matrix)]
                saved[matrix.into[1], t] += signal * weight if weight.dim() == 1 else signal @ weight.mT
            after = self.update(before.unbind(), saved[:, t].unbind(), x[:, t].unbind())
            for nu, value in enumerate(after):
                states[nu, t + 1] = value
        return Trajectory(x, states, saved, resets)

    @torch.no_grad()
    def linearize(self, trajectory: Trajectory) -> Linearization:
        """The partials along a trajectory that `scan` made."""
        before = trajectory.before
        partials = self.partials(before.unbind(), trajectory.saved.unbind(), trajectory.x.unbind())
        return Linearization(partials, before, trajectory.resets)


def state_read(matrix: Matrix) -> int:
    """The index of the state that a recurrent matrix reads."""
    if not isinstance(matrix.reads, int):
        raise ValueError(f"matrix {matrix.name!r} of a cell must read a state, got reads={matrix.reads!r}")
    return matrix.reads


def _reset_steps(resets: Tensor | None) -> frozenset[int]:
    """The steps at which any row is reset."""
    return frozenset() if resets is None else frozenset(resets.any(1).nonzero()[:, 0].tolist())


class RGCCell(Cell):
    """Reciprocal gated circuit (Nayebi et al. 2022; paper, Section 2.2 and eq. 13; σ is tanh).

        s(t) = (1 - tanh(W_ms m')) x + tanh(W_ss s') s'          prime: t - 1
        m(t) = (1 - tanh(W_sm s')) x + tanh(W_mm m') m'

    With a = the gate on the input and b = the gate on the state itself, of each state:

        own   ∂s/∂s' = b_s                  ∂m/∂m' = b_m
        gate  ∂s/∂p_ss = (1 - b_s²) s'      ∂s/∂p_ms = -(1 - a_s²) x       and likewise for m
        input ∂s/∂x = 1 - a_s               ∂m/∂x = 1 - a_m
    """

    states = ("s", "m")
    gates = ("ss", "ms", "mm", "sm")
    matrices = (
        Matrix("ss", ("gate", 0), 0),
        Matrix("ms", ("gate", 1), 1),
        Matrix("mm", ("gate", 2), 1),
        Matrix("sm", ("gate", 3), 0),
    )

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        s, m = c
        ss, ms, mm, sm = p
        (u,) = x
        return (1 - ms.tanh()) * u + ss.tanh() * s, (1 - sm.tanh()) * u + mm.tanh() * m

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        ss, ms, mm, sm = p
        gates = torch.stack([torch.stack([ss, sm]), torch.stack([mm, ms])]).tanh()
        return self._partials_from_gates(gates.movedim(1, -2), torch.stack(tuple(c)), x[0])

    @staticmethod
    def _partials_from_gates(gates: Tensor, c: Tensor, x: Tensor) -> Partials:
        """gates (2, …, 2, N): tanh of ss, sm by source s, then of mm, ms by source m; c (2, …, N)."""
        own_gate, cross_gate = gates.unbind(-2)
        own_square, cross_square = gates.square().unbind(-2)
        from_ss, from_mm = torch.addcmul(c, own_square, c, value=-1).unbind(0)
        from_sm, from_ms = torch.addcmul(x.neg(), cross_square, x).unbind(0)
        open_m, open_s = (1 - cross_gate).unbind(0)
        b_s, b_m = own_gate.unbind(0)
        return Partials(
            own=[{0: b_s}, {1: b_m}],
            gate=[{0: from_ss}, {0: from_ms}, {1: from_mm}, {1: from_sm}],
            input=[{0: open_s, 1: open_m}],
        )

    @torch.no_grad()
    def scan(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        resets: Tensor | None = None,
    ) -> Trajectory:
        """As `Cell.scan`; `saved` is tanh of the gates by source, (2, T, B, 2, N).

        saved[0, …, 0, :] is ss, saved[0, …, 1, :] sm, saved[1, …, 0, :] mm and saved[1, …, 1, :] ms: what
        one source drives lies together, so a step is one matrix product per source and four pointwise calls.
        """
        (u,) = x.unbind(0)
        steps, batch, units = u.shape
        if steps == 1:
            return self._one_step(x, u[0], weights, torch.stack(tuple(state)), resets)
        states = x.new_empty(2, steps + 1, batch, units)
        states[0, 0], states[1, 0] = state
        gates = x.new_empty(2, steps, batch, 2, units)
        drive = [
            _SourceDrive(w_own, w_cross, gates[j])
            for j, (w_own, w_cross) in enumerate([(weights[0], weights[3]), (weights[2], weights[1])])
        ]
        reset_steps = _reset_steps(resets)

        at, u_at, gate_at = states.unbind(1), u.unbind(0), gates.unbind(1)
        s_at, m_at = states[0].unbind(0), states[1].unbind(0)
        own_at = gates[..., 0, :].unbind(1)
        ms_at, sm_at = gates[1, :, :, 1].unbind(0), gates[0, :, :, 1].unbind(0)
        for t in range(steps):
            before, s, m = at[t], s_at[t], m_at[t]
            if resets is not None and t in reset_steps:
                before = before.masked_fill(resets[t, :, None], 0)
                s, m = before
            drive[0](t, s)
            drive[1](t, m)
            gate_at[t].tanh_()
            torch.addcmul(u_at[t], own_at[t], before, out=at[t + 1])
            s_at[t + 1].addcmul_(ms_at[t], u_at[t], value=-1)
            m_at[t + 1].addcmul_(sm_at[t], u_at[t], value=-1)
        return Trajectory(x, states, gates, resets)

    def _one_step(
        self, x: Tensor, u: Tensor, weights: Sequence[Tensor], old: Tensor, resets: Tensor | None
    ) -> Trajectory:
        """`scan` of one step: fewer calls, since here they cost more than what they do."""
        before = old if resets is None else old.masked_fill(resets[0, :, None], 0)
        s, m = before.unbind(0)
        gates = x.new_empty(2, 1, *u.shape[:1], 2, u.shape[1])
        from_s, from_m = gates.squeeze(1).unbind(0)
        (ss, sm), (mm, ms) = from_s.unbind(1), from_m.unbind(1)
        for weight, signal, out in zip(weights, (s, m, m, s), (ss, ms, mm, sm), strict=True):
            if weight.dim() == 1:
                torch.mul(signal, weight, out=out)
            else:
                torch.mm(signal, weight.t(), out=out)
        gates.tanh_()
        new = torch.addcmul(u, gates.squeeze(1).select(2, 0), before)
        new_s, new_m = new.unbind(0)
        new_s.addcmul_(ms, u, value=-1)
        new_m.addcmul_(sm, u, value=-1)
        return Trajectory(x, torch.stack([old, new], dim=1), gates, resets)

    @torch.no_grad()
    def linearize(self, trajectory: Trajectory) -> Linearization:
        before = trajectory.before
        partials = self._partials_from_gates(trajectory.saved, before, trajectory.x[0])
        return Linearization(partials, before, trajectory.resets)


class _SourceDrive:
    """Writes both gates that one source drives: gates[t] = [signal W_ownᵀ, signal W_crossᵀ], (B, 2, N)."""

    def __init__(self, w_own: Tensor, w_cross: Tensor, gates: Tensor) -> None:
        self.weights = (w_own, w_cross)
        self.out = gates.unbind(0)
        self.joined: Tensor | None = None
        if w_own.dim() == w_cross.dim() == 2:
            # one product with the joined matrix is one call, not two
            self.joined = torch.cat(self.weights).t()
            self.out = gates.flatten(-2).unbind(0)

    def __call__(self, t: int, signal: Tensor) -> None:
        out = self.out[t]
        if self.joined is not None:
            torch.mm(signal, self.joined, out=out)
            return
        for j, weight in enumerate(self.weights):
            if weight.dim() == 1:
                torch.mul(signal, weight, out=out[:, j])
            else:
                torch.mm(signal, weight.t(), out=out[:, j])
