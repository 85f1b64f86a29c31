"""Two-point recurrent cells: one per-unit update, and everything that follows from it.

A two-point cell (paper, Appendix D) updates each unit i from its own states, its own pre-activations and
its own input:

    c_i(t) = F(c_i(t-1), p_i(t), x_i(t)),        p^g_i(t) = Σ_{k into g} Σ_j W^k_ij y^k_j(t)

where y^k is the state of the step before that matrix k reads. A `Cell` names its states, gates (pre-activations),
inputs and matrices, and gives F. From F alone follow the three kinds of per-unit partial derivatives that every
learning rule here is made of:

    own   A^{νν'} = ∂F_ν/∂c^{ν'}      the path from state to state that goes through no matrix
    gate  φ^{ν,g} = ∂F_ν/∂p^g         immediate sensitivity to pre-activation g
    input X^{ν,j} = ∂F_ν/∂x^j         through which credit is passed down to the layer's input

A learned number per unit, such as a decay or a bias inside a gate, counts as one more per-unit input: a "matrix" of
shape (N,) that reads the constant 1 enters it. The cells of this package are in `builtin.py`.

Letters: T time, B batch, N units, S states per unit, G gates, J per-unit inputs, K matrices, M fan-in. Arrays are
time-major.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import weights as weight_ops
from .keys import key_of
from .trace import traced, why_not

__all__ = [
    "ByState",
    "Cell",
    "Linearization",
    "Matrix",
    "Partials",
    "Products",
    "Reads",
    "Trajectory",
    "reset_steps_of",
    "state_read",
    "verify",
]

ByState = dict[
    int, Tensor
]  # partials by the state ν that is differentiated; a ν is absent where they are always zero


Reads = int | Literal["input", "one"]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a layer: what it reads, and what its product is added to.

    into     ("gate", g) for pre-activation g, or ("input", j) for per-unit input j
    reads    ν for state ν of the step before (a recurrent matrix); "input" for the layer's input; "one" for a bias
    columns  of the layer's input that it reads, from the first to before the second; None for all
    """

    name: str
    into: tuple[Literal["gate", "input"], int]
    reads: Reads
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Partials:
    """The per-unit partial derivatives of F.

        own[ν'][ν] = ∂F_ν/∂c^{ν'}        gate[g][ν] = ∂F_ν/∂p^g        input[j][ν] = ∂F_ν/∂x^j

    Each is a tensor of the shape that F was evaluated at, for example (T, B, N). A ν that is absent stands for a
    partial that is zero for all arguments.
    """

    own: Sequence[ByState]
    gate: Sequence[ByState]
    input: Sequence[ByState]


@dataclass(frozen=True)
class Trajectory:
    """A forward pass and what its backward pass needs.

    x       (J, T, B, N)       the layer's per-unit inputs
    states  (S, T + 1, B, N)   the state before the first step, then after each step
    saved   (·, T, B, N)       what `Cell.advance` keeps of the pre-activations; (0,) where nothing is kept
    resets  (T, B) bool        batch rows whose state was zeroed before that step; or None
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
        """(S, T, B, N): the state that each step read, zero where the batch row was reset."""
        before = self.states[:, :-1]
        return before if self.resets is None else before.masked_fill(self.resets[..., None], 0)

    def window(self, start: int, stop: int) -> Trajectory:
        """The trajectory of steps start … stop - 1, made of views."""
        resets = None if self.resets is None else self.resets[start:stop]
        steps = slice(start, stop)
        saved = self.saved[:, steps] if self.saved.dim() > 1 else self.saved
        return Trajectory(self.x[:, steps], self.states[:, start : stop + 1], saved, resets)

    def without_saved(self) -> Trajectory:
        """The same trajectory without `saved`, which takes most of the memory."""
        return replace(self, saved=self.x.new_empty(0))

    def with_saved(self, cell: Cell, weights: Sequence[Tensor]) -> Trajectory:
        """The same trajectory with `saved`: where it is missing, one product per matrix over (T, B) makes it again."""
        if self.saved.dim() > 1:
            return self
        return replace(self, saved=cell.evaluate(self.x, self.before, weights)[1])


@dataclass(frozen=True)
class Linearization:
    """The partials at every step of a trajectory, and what the matrices read: all that a learning rule needs.

    partials  each entry (T, B, N)
    before    (S, T, B, N)   the state that each step read
    resets    (T, B) bool    batch rows in which no credit passes from that step to the one before it; or None
    """

    partials: Partials
    before: Tensor
    resets: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.before.shape[1]

    def immediate(self, matrix: Matrix) -> ByState:
        """φ^{ν,k} of one matrix k: ∂F_ν with respect to the gate or input that k enters, by ν, each (T, B, N)."""
        kind, index = matrix.into
        return (self.partials.gate if kind == "gate" else self.partials.input)[index]

    def without_own(self) -> Linearization:
        """Without ∂F_ν/∂c^{ν'}, which only rules that need the full Jacobian read again once M has been made."""
        partials = self.partials
        return replace(self, partials=Partials((), partials.gate, partials.input))


class Cell(ABC):
    """A two-point cell (paper, Appendix D). Subclasses give the names and `update`; the rest follows from these.

    states      names of the S states of a unit
    gates       names of the G pre-activations p^g
    inputs      names of the per-unit inputs that the layer's input is projected to
    parameters  names of further per-unit inputs, each of them one learned number per unit
    matrices    the K recurrent matrices; each reads a state and enters a gate, and several may enter one gate
    outputs     indices of the states that a loss may depend on
    affine      whether F is affine in the states, so that one round of the parallel forward pass solves it; a wrong
                value costs time, not correctness
    """

    states: Sequence[str]
    gates: Sequence[str]
    inputs: Sequence[str] = ("x",)
    parameters: Sequence[str] = ()
    matrices: Sequence[Matrix]
    outputs: Sequence[int] = (0,)
    affine: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        for name_of_made in ("_traced", "_key"):  # what `update` computes may depend on the attribute
            self.__dict__.pop(name_of_made, None)
        super().__setattr__(name, value)

    @property
    def per_unit(self) -> tuple[str, ...]:
        """Names of all J per-unit inputs: `inputs`, then `parameters`."""
        return (*self.inputs, *self.parameters)

    def initial_parameters(self, units: int) -> dict[str, Tensor]:
        """The initial values of `parameters`, (N,) each; zeros unless a cell overrides this."""
        return {name: torch.zeros(units) for name in self.parameters}

    @abstractmethod
    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """F: the S new states.

        c: the S old states; p: the G pre-activations; x: the J per-unit inputs, all of one shape. F must act
        element-wise. It must not mutate its arguments.
        """

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """The partials of F at (c, p, x), which follow from `update` (`trace`).

        A cell whose partials aren't the derivatives of `update`, as with a surrogate derivative, overrides this.
        """
        found = traced(self)
        return self.automatic_partials(c, p, x) if found is None else found.partials_at(c, p, x)

    def advance(
        self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The S new states, and what is to be kept of p for the partials: at most G arrays.

        That is p itself for a cell that can't be traced, else what the partials would compute again of it
        (`Traced.saved`), such as tanh(p).
        """
        found = traced(self)
        return (self.update(c, p, x), p) if found is None else found.advance(c, p, x)

    def partials_of_saved(
        self, c: Sequence[Tensor], saved: Sequence[Tensor], x: Sequence[Tensor]
    ) -> Partials:
        """`partials`, from what `advance` has kept of the pre-activations."""
        found = traced(self)
        return self.partials(c, saved, x) if found is None else found.partials_of_saved(c, saved, x)

    @property
    def saves(self) -> int:
        """How many arrays `advance` keeps."""
        found = traced(self)
        return len(self.gates) if found is None else len(found.saved)

    def automatic_partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """The partials of F by forward-mode differentiation.

        F acts element-wise, so each partial is one Jacobian-vector product with a tangent of ones. No ν is left out,
        even where the partial is always zero.
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
        """Run the cell over time. Nothing is mutated, and autograd doesn't follow it.

        Args:
            x: per-unit inputs (J, T, B, N).
            weights: K recurrent weights (N, N), (H, b, b) or (N,) each (`weights.py`).
            state: S initial states (B, N) each.
            resets: (T, B) bool, batch rows whose state is zeroed before that step; or None.

        Returns:
            A `Trajectory`, whose `saved` is what `advance` keeps.
        """
        _, steps, batch, units = x.shape
        states = x.new_empty(len(self.states), steps + 1, batch, units)
        for nu, initial in enumerate(state):
            states[nu, 0] = initial
        saved = x.new_empty(steps, batch, self.saves, units)
        products = Products(self, weights, states[0, 0], steps)
        states_at, saved_at, x_at = states.unbind(1), saved.unbind(0), x.unbind(1)
        for t in range(steps):
            before = states_at[t]
            if resets is not None:  # at which steps isn't asked: reading that would wait for the device
                before = before.masked_fill(resets[t, :, None], 0)
            products.multiply(before)
            after, kept = self.advance(before.unbind(), products.pre_activations(), x_at[t].unbind())
            for target, value in zip(states_at[t + 1].unbind(), after, strict=True):
                target.copy_(value)
            if kept:
                torch.stack(tuple(kept), 1, out=saved_at[t])
        return Trajectory(x, states, saved.movedim(2, 0), resets)

    @torch.no_grad()
    def evaluate(self, x: Tensor, before: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """F at all steps at once, given the state that each step reads: one product per matrix over (T, B).

        x (J, T, B, N), before (S, T, B, N), weights as in `scan`. Returns the states after each step (S, T, B, N), and
        `saved` in the layout of `scan`.
        """
        _, steps, batch, units = x.shape
        pre = x.new_zeros(len(self.gates), steps, batch, units)
        for matrix, weight in zip(self.matrices, weights, strict=True):
            pre[matrix.into[1]] += weight_ops.multiply(weight, before[state_read(matrix)])
        after, kept = self.advance(before.unbind(), pre.unbind(), x.unbind())
        return torch.stack(tuple(after)), torch.stack(tuple(kept)) if kept else x.new_empty(
            0, steps, batch, units
        )

    @torch.no_grad()
    def linearize(self, trajectory: Trajectory) -> Linearization:
        """The partials at every step of a trajectory that `scan` has returned."""
        before = trajectory.before
        partials = self.partials_of_saved(before.unbind(), trajectory.saved.unbind(), trajectory.x.unbind())
        return Linearization(partials, before, trajectory.resets)


def state_read(matrix: Matrix) -> int:
    """The index of the state that a recurrent matrix reads. Raises ValueError for a matrix that reads no state."""
    if not isinstance(matrix.reads, int):
        raise ValueError(f"matrix {matrix.name!r} of a cell must read a state, got reads={matrix.reads!r}")
    return matrix.reads


def reset_steps_of(resets: Tensor | None) -> frozenset[int]:
    """The steps at which any batch row is reset; for a single step always {0}, a superset. It waits for the device."""
    if resets is None:
        return frozenset()
    if len(resets) == 1:
        return frozenset({0})
    return frozenset(resets.any(1).nonzero()[:, 0].tolist())


class Products:
    """The matrix products of one step, W^k y^k, by the state that they read.

    Where it pays over the steps to come, each state's dense matrices are laid out as one, and so are those of all
    states where as many matrices read each: fewer products, for a copy of the weights.

    products  (B, K, N): those of matrices that read state 0 first, and so on
    """

    # Joined, the weights are written and read some four times more. That takes less than the calls that it saves in a
    # step where they have at most so many numbers, on a CPU and on a GPU (predicted).
    JOINED_A_STEP = (1 << 12, 1 << 20)

    def __init__(self, cell: Cell, weights: Sequence[Tensor], like: Tensor, steps: int) -> None:
        """like: (B, N), which the states are. steps: how many steps the products are for."""
        numbers = sum(weight.numel() for weight in weights)
        join = numbers <= steps * self.JOINED_A_STEP[like.is_cuda]
        sources = [state_read(matrix) for matrix in cell.matrices]
        order = sorted(range(len(weights)), key=sources.__getitem__)
        self.products = like.new_empty(like.shape[0], len(weights), like.shape[1])
        at = dict(zip(order, self.products.unbind(1), strict=True))
        self.dense: list[tuple[int, Tensor, Tensor]] = []  # state read, weights, where the product goes
        self.others: list[tuple[int, Tensor, Tensor]] = []
        first = 0
        for source in sorted(set(sources)):
            own = [k for k in order if sources[k] == source]
            if not all(weights[k].dim() == 2 for k in own):
                self.others += [(source, weights[k], at[k]) for k in own]
            elif join:
                to = self.products[:, first : first + len(own)].flatten(1)
                self.dense.append((source, torch.cat([weights[k] for k in own]).t(), to))
            else:
                self.dense += [(source, weights[k].t(), at[k]) for k in own]
            first += len(own)
        self.all: tuple[Tensor, Tensor] | None = None
        count = len(self.dense)
        even = len({weight.shape for _, weight, _ in self.dense}) == 1 and not self.others
        if join and count > 1 and even and [source for source, _, _ in self.dense] == list(range(count)):
            to = self.products.unflatten(1, (count, -1)).flatten(2).transpose(0, 1)
            self.all = torch.stack([weight for _, weight, _ in self.dense]), to
        zero = torch.zeros_like(like)
        entering: list[list[Tensor]] = [[] for _ in cell.gates]
        for k, matrix in enumerate(cell.matrices):
            entering[matrix.into[1]].append(at[k])
        self.entering = [parts or [zero] for parts in entering]

    def multiply(self, before: Tensor) -> None:
        """Write the products of the states before (S, B, N)."""
        if self.all is not None:
            weights, to = self.all
            torch.bmm(before[: len(weights)], weights, out=to)
            return
        for source, weight, to in self.dense:
            torch.mm(before[source], weight, out=to)
        for source, weight, to in self.others:
            to.copy_(weight_ops.multiply(weight, before[source]))

    def pre_activations(self) -> list[Tensor]:
        """p^g = Σ_{k into g} W^k y^k, (B, N) each; a view of the products where one matrix enters the gate."""
        return [functools.reduce(torch.add, parts) for parts in self.entering]


def verify(cell: Cell) -> None:
    """Raise ValueError, with the reason, unless `cell` is two-point and its matrices fit its gates and states.

    A cell that can be traced (`trace`) acts on each unit alone. Another is checked numerically, on the CPU:
    when unit 0 of one argument changes, no other unit's new state may change. It takes no part in a tensor mode, such
    as a device or FakeTensorMode, that a layer is made in.
    """
    with torch.device("cpu"), _disable_current_modes():
        _verify(cell)
    traced(cell)
    key_of(cell)


def _verify(cell: Cell) -> None:
    name = type(cell).__name__
    for matrix in cell.matrices:
        into, gate = matrix.into
        if into != "gate" or not 0 <= gate < len(cell.gates):
            raise ValueError(
                f"{name}'s matrix {matrix.name!r} must enter one of its {len(cell.gates)} gates, got {matrix.into}"
            )
        if not 0 <= state_read(matrix) < len(cell.states):
            raise ValueError(
                f"{name}'s matrix {matrix.name!r} must read one of its {len(cell.states)} states, got {matrix.reads}"
            )
    generator = torch.Generator().manual_seed(0)
    groups = {"state": cell.states, "gate": cell.gates, "input": cell.per_unit}
    point = [
        [torch.randn(2, 4, dtype=torch.float64, device="cpu", generator=generator) for _ in names]
        for names in groups.values()
    ]
    with torch.no_grad():
        new = cell.update(*point)
        shapes = [tuple(value.shape) for value in new]
        if shapes != [(2, 4)] * len(cell.states):
            raise ValueError(
                f"{name}.update must give {len(cell.states)} states of the shape of what it gets, (2, 4), got {shapes}"
            )
        wanted = f"{len(cell.states)} states of float64, the dtype of what it gets"
        if any(value.dtype != torch.float64 for value in new):
            raise ValueError(f"{name}.update must give {wanted}, got {[value.dtype for value in new]}")
        reason = why_not(cell)
        for which, (kind, names) in enumerate(groups.items() if reason else ()):
            for j, changed in enumerate(names):
                moved = [list(group) for group in point]
                moved[which][j] = point[which][j].clone()
                moved[which][j][:, 0] += 0.5
                _refuse_mixing(name, cell.states, new, cell.update(*moved), f"{kind} {changed!r}", reason)


def _refuse_mixing(
    name: str,
    states: Sequence[str],
    new: Sequence[Tensor],
    moved: Sequence[Tensor],
    changed: str,
    reason: str | None,
) -> None:
    """Raise ValueError if a new state of a unit other than 0 differs between `new` and `moved`."""
    for state, before, after in zip(states, new, moved, strict=True):
        others = (after != before)[:, 1:].any(0).nonzero()
        if len(others):
            raise ValueError(
                f"{name} is not a two-point cell: new state {state!r} of unit {int(others[0]) + 1} depends on "
                f"{changed} of unit 0 within the step. update() must act on each unit alone; units meet only in "
                "matrices that read a state of the step before. A product with something computed in this step, "
                f"such as U(r ⊙ h), is none of these. {reason}"
            )
