"""A cell's kernels, of an RGC: forward pass, a step, its linearization, RFP's dual form and BPTT's backward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backend import operations, triton_backend, triton_cells
from ...backend.table import Refusal
from ...cells.builtin import RGCCell
from ...cells.two_point import Partials, Trajectory
from .kernel import MATRICES, STATES, Given, Kernel, WithoutGamma, entered
from .scans import pure_scan


@dataclass(frozen=True)
class Circuit(Given):
    """What a cell's kernels are given, of an RGC.

    x, weights     inputs (T, B, N); W_ss, W_ms, W_mm, W_sm (4, N, N)
    diagonals      a view of the weights' diagonals (4, N)
    state          s and m before the first step (2, B, N)
    gates          tanh of the pre-activations that read s, and of those that read m (T, B, 2, 2, N)
    before, delta  states before each step, and δ (2, T, B, N)
    own, phi       of one step: own-state paths (2, B, N) and immediate sensitivities (4, B, N)
    """

    x: Tensor
    weights: Tensor
    diagonals: Tensor
    state: Tensor
    gates: Tensor
    before: Tensor
    delta: Tensor
    own: Tensor
    phi: Tensor


def _circuit_shapes(units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `Circuit`."""
    return {
        "x": (steps, batch, units),
        "weights": (MATRICES, units, units),
        "diagonals": (MATRICES, units),
        "state": (STATES, batch, units),
        "gates": (steps, batch, 2, 2, units),
        "before": (STATES, steps, batch, units),
        "delta": (STATES, steps, batch, units),
        "own": (STATES, batch, units),
        "phi": (MATRICES, batch, units),
    }


class OfCircuit(WithoutGamma):
    """A kernel of an RGC without Γ, which is given a `Circuit`."""

    def shapes(self, units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
        return _circuit_shapes(units, batch, steps)

    def draw(
        self, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
    ) -> Circuit:
        size = self.shapes(units, batch, steps)
        drawn = {name: torch.randn(size[name], generator=generator, device=device) for name in size}
        drawn["weights"] *= 0.3 / math.sqrt(units)
        drawn["diagonals"] = drawn["weights"].diagonal(dim1=1, dim2=2)
        drawn["gates"].tanh_()
        return Circuit(gammas=[], **drawn)


class RGCForward(OfCircuit):
    """The forward pass of an RGC. A step is a matrix product and a pointwise pass; few units take one launch in all."""

    def __init__(self) -> None:
        super().__init__("rgc-forward", ("x", "weights", "state"), _forward, _pure_forward, _launch_forward)
        self.loop = _loop_forward

    def flop(self, units: int, batch: int, steps: int) -> float:
        # for each unit: four products with N numbers; four tanh of five operations each, and eight more
        return batch * steps * units * (8 * units + 28)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (STATES * (steps + 1) + MATRICES * steps) * batch * units


class RGCStep(OfCircuit):
    """One step of an RGC and its linearization: the first launch of an online step."""

    steps = 1

    def __init__(self) -> None:
        super().__init__("rgc-step", ("x", "weights", "state"), _step, _pure_step, _launch_step)
        self.loop = functools.partial(_step, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # the step as above; φ: three operations a matrix; ∂F/∂x: one a state; M: a product a matrix, and two sums
        return batch * units * (8 * units + 28 + 3 * MATRICES + STATES + MATRICES + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (STATES + MATRICES + STATES + STATES**2) * batch * units


class RGCBackward(OfCircuit):
    """BPTT of an RGC: the credit that enters each matrix, and the gradients of the input and the first state."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "weights", "delta")
        super().__init__("rgc-backward", takes, _backward, _pure_backward, _launch_backward)
        self.loop = functools.partial(_backward, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # for each unit: four products with N numbers; credits added, E of four matrices and of the input, two own paths
        return batch * steps * units * (8 * units + 2 + 4 * MATRICES + 2 * STATES - 1 + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return ((MATRICES + 1) * steps + STATES) * batch * units


class RGCLinearize(OfCircuit):
    """The linearization of an RGC from its gates: φ, ∂F/∂x and RFP's transition M."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "diagonals")
        super().__init__("rgc-linearize", takes, _linearize, _pure_linearize, _launch_linearize)
        self.loop = functools.partial(_linearize, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # φ: three operations a matrix; ∂F/∂x: one a state; M: a product a matrix, and two sums
        return batch * steps * units * (3 * MATRICES + STATES + MATRICES + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (MATRICES + STATES + STATES**2) * batch * steps * units


class RGCDual(OfCircuit):
    """RFP's dual form of an RGC from its gates: the credit that enters each matrix, and the input's gradient."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "diagonals", "delta")
        super().__init__("rgc-dual", takes, _dual, _pure_dual, _launch_dual)
        self.loop = functools.partial(_dual, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # the linearization as above; δ added to Mᵀλ; E: a product a matrix; for x, S products and S - 1 additions
        return batch * steps * units * (4 * MATRICES + STATES + 2 + 8 + MATRICES + 2 * STATES - 1)

    def written(self, units: int, batch: int, steps: int) -> int:
        return ((MATRICES + 1) * steps + STATES) * batch * units


def _forward(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    made = RGCCell().scan(x[None], weights.unbind(0), state.unbind(0))
    return made.states, _gates_of(made.saved)


def _gates_of(saved: Tensor) -> Tensor:
    """What an RGC has saved, (4, T, B, N), as its kernels lay it out."""
    return saved.movedim(0, 2).unflatten(2, (2, 2))


def _pure_forward(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    ss, ms, mm, sm = weights.mT
    (s, m), states, gates = state.unbind(0), [state], []
    for u in x:
        by_s, by_m = [(s @ ss).tanh(), (s @ sm).tanh()], [(m @ mm).tanh(), (m @ ms).tanh()]
        s, m = (1 - by_m[1]) * u + by_s[0] * s, (1 - by_s[1]) * u + by_m[0] * m
        states.append(torch.stack([s, m]))
        gates.append(torch.stack([torch.stack(by_s, -2), torch.stack(by_m, -2)], 1))
    return torch.stack(states, 1), torch.stack(gates)


def _loop_forward(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor] | None:
    made = operations.scan(RGCCell(), x[None], weights.unbind(0), state.unbind(0), backend="compile")
    return made.states, _gates_of(made.saved)


def _launch_forward(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor]:
    made = triton_backend.scan(RGCCell(), x[None], weights.unbind(0), state.unbind(0))
    assert not isinstance(made, Refusal)
    return made.states, _gates_of(made.saved)


def _kernels() -> triton_cells.Kernels:
    made = triton_cells.kernels_of(RGCCell())
    assert made is not None
    return made


def _step(x: Tensor, weights: Tensor, state: Tensor, backend: str = "torch") -> tuple[Tensor, ...]:
    cell, dense = RGCCell(), weights.unbind(0)
    trajectory = operations.scan(cell, x[None, :1], dense, state.unbind(0), backend=backend)
    lin, m = operations.linearize(cell, trajectory, dense, backend=backend)
    return trajectory.states[:, 1], *_parts(lin.partials, m)


def _pure_step(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    states, gates = _pure_forward(x[:1], weights, state)
    own = weights.diagonal(dim1=1, dim2=2)
    return states[:, 1], *_pure_linearize(gates, state[:, None], x[:1], own)


def _launch_step(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor]:
    from ...kernels import cell_step

    made = _kernels()
    after, _, planes = cell_step.cell_step(made.functions, x[:1], weights.unbind(0), state)
    return after, *_parts(*triton_backend.partials_of_step(made, planes[:, None]))


def _trajectory(gates: Tensor, before: Tensor, x: Tensor) -> Trajectory:
    states = torch.cat([before, before[:, -1:]], 1)  # no step reads the last
    return Trajectory(x[None], states, gates.flatten(2, 3).movedim(2, 0))


def _backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor, backend: str = "torch"
) -> tuple[Tensor, ...]:
    trajectory = _trajectory(gates, before, x)
    entering, for_x, passed = operations.exact_of(
        RGCCell(), trajectory, weights.unbind(0), delta, backend=backend
    )
    return *entering, for_x[0], passed


def _pure_backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor
) -> tuple[Tensor, ...]:
    w_ss, w_ms, w_mm, w_sm = weights
    passed = torch.zeros_like(delta[:, 0])
    found: list[list[Tensor]] = []  # E of ss, ms, mm, sm and the input, of each step
    for t in range(x.shape[0] - 1, -1, -1):
        (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in gates[t].unbind(1))
        (s, m), credit = before[:, t], delta[:, t] + passed
        from_ss, from_ms = credit[0] * (1 - ss * ss) * s, credit[0] * (ms * ms - 1) * x[t]
        from_mm, from_sm = credit[1] * (1 - mm * mm) * m, credit[1] * (sm * sm - 1) * x[t]
        to_s = ss * credit[0] + from_ss @ w_ss + from_sm @ w_sm
        to_m = mm * credit[1] + from_mm @ w_mm + from_ms @ w_ms
        passed = torch.stack([to_s, to_m])
        found.append([from_ss, from_ms, from_mm, from_sm, credit[0] * (1 - ms) + credit[1] * (1 - sm)])
    return *map(torch.stack, zip(*found[::-1], strict=True)), passed


def _launch_backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor
) -> Sequence[Tensor]:
    from ...kernels import cell_backward

    functions = _kernels().functions
    found = cell_backward.cell_credits(
        functions, x[None], gates.flatten(2, 3), before, weights.unbind(0), delta
    )
    entering = (found.entering[:, :, functions.order.index(k)] for k in range(MATRICES))
    return *entering, found.for_input[0], found.passed


def _parts(partials: Partials, m: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a linearization: φ of ss, ms, mm and sm, ∂F_s/∂x, ∂F_m/∂x, and M."""
    entering = [partials.gate[matrix.into[1]] for matrix in RGCCell.matrices]
    phi, by_input = (next(iter(by_state.values())) for by_state in entering), partials.input[0]
    return *phi, by_input[0], by_input[1], m


def _linearize(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, backend: str = "torch"
) -> tuple[Tensor, ...]:
    trajectory = _trajectory(gates, before, x)
    lin, m = operations.linearize(RGCCell(), trajectory, diagonals.unbind(0), backend=backend)
    return _parts(lin.partials, m)


def _pure_linearize(gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor) -> tuple[Tensor, ...]:
    (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in gates.unbind(2))
    w_ss, w_ms, w_mm, w_sm = diagonals
    by_ss, by_ms = (1 - ss * ss) * before[0], (ms * ms - 1) * x
    by_mm, by_sm = (1 - mm * mm) * before[1], (sm * sm - 1) * x
    m = torch.stack([ss + by_ss * w_ss, by_ms * w_ms, by_sm * w_sm, mm + by_mm * w_mm])
    return by_ss, by_ms, by_mm, by_sm, 1 - ms, 1 - sm, m.view(STATES, STATES, *x.shape)


def _launch_linearize(gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor) -> Sequence[Tensor]:
    made = triton_backend.linearize(RGCCell(), _trajectory(gates, before, x), diagonals.unbind(0))
    assert not isinstance(made, Refusal)
    return _parts(made[0].partials, made[1])


def _dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor, backend: str = "torch"
) -> tuple[Tensor, ...]:
    cell, trajectory = RGCCell(), _trajectory(gates, before, x)
    entering, for_input, passed = operations.dual_of(
        cell, trajectory, diagonals.unbind(0), delta, cell.matrices, 1, "rfp", backend=backend
    )
    return *entering, for_input[0], passed


def _pure_dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor
) -> tuple[Tensor, ...]:
    *phi, of_s, of_m, m = _pure_linearize(gates, before, x, diagonals)
    credit, passed = pure_scan(m, delta)
    entering = [credit[entered(k)] * phi[k] for k in range(MATRICES)]
    return *entering, credit[0] * of_s + credit[1] * of_m, passed


def _launch_dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor
) -> Sequence[Tensor]:
    cell, own = RGCCell(), diagonals.unbind(0)
    made = triton_backend.dual_of(
        cell, _trajectory(gates, before, x), own, list(delta), cell.matrices, 1, "rfp"
    )
    assert not isinstance(made, Refusal)
    return *made[0], made[1][0], made[2]


KERNELS: tuple[Kernel, ...] = (
    RGCForward(),
    RGCStep(),
    RGCBackward(),
    RGCLinearize(),
    RGCDual(),
)
