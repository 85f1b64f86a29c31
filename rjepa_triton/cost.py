"""What a form of Recurrent Forward Propagation costs a step: bytes, FLOP and seconds, before it is run.

Counted for the layer's dense matrices, N×M_k each, S states a unit and batch B; Γ has g = S·B·Σ_k N·M_k
numbers of `gamma_bytes` each, W and its gradient w = Σ_k N·M_k of `item` bytes each.

    step      reads and writes Γ, and adds the gradient:            2·g·gamma_bytes + 2·w·item bytes
    chunk     the same twice a chunk of C steps (Γ is read for the fold and for the rank-C update), and
              2·C·g + 2·C·B·w FLOP: its rank-C update and its own part of the gradient
    history   a reverse scan and a product over the t steps since reset: 2·B·t·w FLOP, S²·B·N·t numbers read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .reference import rtrl


@dataclass(frozen=True)
class Rates:
    """A device's rates as the model assumes them; not measured here."""

    name: str
    bytes_per_second: float
    flop_per_second: float
    seconds_per_call: float


CPU = Rates("CPU (assumed)", 2e10, 1e11, 2e-6)
GPU = Rates("GPU (assumed)", 2e12, 3e13, 5e-6)


def rates_of(device: torch.device) -> Rates:
    """The assumed rates for a device."""
    return CPU if device.type == "cpu" else GPU


@dataclass(frozen=True)
class FormCost:
    """Predicted cost of one form: seconds a step, bytes of learning state, and what they are made of."""

    form: str
    seconds: float
    state_bytes: int
    because: str


@dataclass(frozen=True)
class Problem:
    """S, B, N; M_k of each matrix (1 for a diagonal one or a bias); bytes of a number."""

    states: int
    batch: int
    units: int
    fan_ins: Sequence[int]
    item: int
    gamma_item: int

    @property
    def weight_numbers(self) -> int:
        return self.units * sum(self.fan_ins)

    @property
    def gamma_bytes(self) -> int:
        return self.states * self.batch * self.weight_numbers * self.gamma_item

    def carried_bytes(self, learning: str, per_head: int) -> int:
        """Bytes of what a learning rule carries forward; per_head b: units that meet within the step."""
        if learning == "rtrl":
            gamma = self.states * per_head * self.batch * self.weight_numbers * self.item
            return gamma + gamma * rtrl.rows_at_once(blocks := self.batch * self.units // per_head) // blocks
        if learning == "uoro":
            return self.batch * (self.states * self.units + self.weight_numbers) * self.item
        return 0 if learning == "tbptt" else self.gamma_bytes

    def window_bytes(self, steps: int) -> int:
        """Bytes that `steps` recorded steps take: M, φ, the states read and ∂F/∂x."""
        numbers = self.states**2 + len(self.fan_ins) + 2 * self.states
        return steps * self.batch * self.units * numbers * self.item


def form_costs(problem: Problem, update_every: int, horizon: int | None, rates: Rates) -> list[FormCost]:
    """Costs of the forms that can serve: step, chunk if update_every ≥ 2, history if a horizon is known.

    update_every C: steps between changes of the weights; horizon: steps between resets, None if unbounded.
    """
    moved = 2 * problem.gamma_bytes + 2 * problem.weight_numbers * problem.item
    costs = [
        FormCost(
            "step",
            moved / rates.bytes_per_second + 20 * rates.seconds_per_call,
            problem.gamma_bytes,
            f"{moved:.3g} bytes moved a step",
        )
    ]
    if update_every >= 2:
        flop = 1.0 * (2 * problem.states + 2) * problem.batch * problem.weight_numbers
        seconds = (
            2 * moved / update_every / rates.bytes_per_second
            + flop / rates.flop_per_second
            + (10 + 40 / update_every) * rates.seconds_per_call
        )
        costs.append(
            FormCost(
                "chunk",
                seconds,
                problem.gamma_bytes + problem.window_bytes(update_every),
                f"{2 * moved / update_every:.3g} bytes moved and {flop:.3g} FLOP a step",
            )
        )
    if horizon is not None:
        steps = (horizon + 1) / 2  # mean over an episode
        flop = 2.0 * problem.batch * steps * problem.weight_numbers
        scanned = steps * problem.batch * problem.units * problem.states * (problem.states + 2) * problem.item
        seconds = (
            flop / rates.flop_per_second
            + scanned / rates.bytes_per_second
            + (20 + steps * problem.states) * rates.seconds_per_call
        )
        costs.append(
            FormCost(
                "history",
                seconds,
                problem.window_bytes(horizon),
                f"{flop:.3g} FLOP and {steps:.0f} scanned steps a step, mean over {horizon} steps",
            )
        )
    return costs


def cheapest(costs: Sequence[FormCost], available_bytes: int | None) -> FormCost:
    """The fastest form whose state fits in `available_bytes`, or the smallest if none fits."""
    fitting = [c for c in costs if available_bytes is None or c.state_bytes <= available_bytes]
    if fitting:
        return min(fitting, key=lambda c: c.seconds)
    return min(costs, key=lambda c: c.state_bytes)
