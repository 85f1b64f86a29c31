"""What a form of Recurrent Forward Propagation, or of the forward pass, costs: bytes, FLOP and seconds, before it runs.

Counted for the layer's dense matrices, N×M_k each, S states a unit and batch B; Γ has g = S·B·Σ_k N·M_k
numbers of `gamma_bytes` each, W and its gradient w = Σ_k N·M_k of `item` bytes each.

    step      reads and writes Γ, and adds the gradient:            2·g·gamma_bytes + 2·w·item bytes
    chunk     the same twice a chunk of C steps (Γ is read for the fold and for the rank-C update), and
              2·C·g + 2·C·B·w FLOP: its rank-C update and its own part of the gradient
    history   a reverse scan and a product over the t steps since reset: 2·B·t·w FLOP, S²·B·N·t numbers read

The forward pass over T steps, with calls and bytes of the pointwise work counted on a small problem (`counted`):

    sequential   T steps: calls, 2·B·w FLOP, w·item bytes of weights and the pointwise work's, each
    parallel     rounds of as many FLOP over T steps in few calls, w·item bytes, and an affine scan
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .reference import rfp, rtrl


@dataclass(frozen=True)
class Rates:
    """A device's rates as the model assumes them; not measured here.

    seconds_per_scan_step: of a scan's kernel, which takes its steps one after the other.
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    seconds_per_call: float
    seconds_per_scan_step: float = 0.0


CPU = Rates("CPU (assumed)", 2e10, 1e11, 2e-6)
GPU = Rates("GPU (assumed)", 2e12, 3e13, 5e-6, 2e-7)
# A step of a loop in one launch, in steps of a scan's kernel; assumed. Its products are summed over the lanes of a warp
# and its states go round through shared memory, where a scan's step waits for one load.
ON_CHIP_STEP = 5


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


@dataclass(frozen=True)
class Work:
    """What something costs: calls that launch something, FLOP of products, bytes, dependent steps of scan kernels."""

    calls: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    scan_steps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.calls + other.calls,
            self.flop + other.flop,
            self.bytes + other.bytes,
            self.scan_steps + other.scan_steps,
        )

    def __mul__(self, count: float) -> Work:
        return Work(self.calls * count, self.flop * count, self.bytes * count, self.scan_steps * count)

    def seconds(self, rates: Rates) -> float:
        """Predicted, as if nothing overlapped."""
        return (
            self.calls * rates.seconds_per_call
            + self.flop / rates.flop_per_second
            + self.bytes / rates.bytes_per_second
            + self.scan_steps * rates.seconds_per_scan_step
        )


# What launches nothing: memory without a value, and names for what is there.
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::alias")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class _Counter(TorchDispatchMode):
    """Counts what torch is called for: every call but those of `_NO_LAUNCH` and views."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first call imports all of torch.compile, which takes seconds; nothing compiled is counted.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and not name.startswith(_NO_LAUNCH):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            moved = 0 if name.startswith(_PRODUCTS) else sum(tensor.nbytes for tensor in tensors)
            self.work += Work(calls=1, bytes=moved)
        return out


def counted(function: Callable[[], object]) -> Work:
    """Calls that one call of `function` makes of torch, and bytes that they move but for matrix products."""
    with _Counter() as counter:
        function()
    return counter.work


def scan_level(states: int, steps: int, numbers: int, item: int) -> Work:
    """One halving of `rfp.affine_scan` from T = `steps` to T/2, `numbers` of B·N."""
    planes = states**2 * (states + 1) + states * (3 * states + 1) + 2 * states
    return Work(calls=3 * states + 3, bytes=float(planes * steps * numbers * item))


def kernel_steps(steps: int) -> int:
    """Dependent steps of Triton's scan over T = `steps` of few units: all, or those of √(2T) blocks of time.

    As `kernels.reverse_scan.pick_scan_config` cuts it: a block of √(T/2) steps twice, and a summary a block.
    """
    return steps if steps < 256 else round(2 * math.sqrt(2 * steps))


def scan_work(states: int, steps: int, numbers: int, item: int, kernel: bool) -> Work:
    """Of `ops.affine_scan` over T = `steps`, S = `states`, `numbers` of B·N; kernel: whether Triton's."""
    moved = float(numbers * item * states * (states + 2))  # of a step: M and r in, c out
    if kernel:  # M and r are turned round before, c after; two launches, each of which reads M and r
        return Work(calls=7, bytes=5 * steps * moved, scan_steps=kernel_steps(steps))
    total, left = Work(), steps
    while left > max(1, rfp.SERIAL_STEPS):
        total += scan_level(states, left, numbers, item)
        left //= 2
    return total + Work(calls=(left - 1) * states + 1, bytes=2 * left * moved)


@dataclass(frozen=True)
class ForwardProblem:
    """S, B, N, T; the numbers of all recurrent weights; bytes of a number; and what was counted of the cell.

    step     of the loop: calls of one step, and bytes that they move for one unit and row, products left out
    round    of the parallel pass: calls of one round, and bytes for one unit, row and step, without the scan
    kernel   whether a Triton kernel does the scan
    launch   whether the loop is one launch, with the weights on chip (`kernels.rgc_forward`)
    """

    states: int
    batch: int
    units: int
    steps: int
    weight_numbers: int
    item: int
    step: Work
    round: Work
    kernel: bool
    launch: bool = False

    @property
    def _products(self) -> float:
        """FLOP of a step's matrix products."""
        return 2.0 * self.batch * self.weight_numbers

    def sequential(self) -> Work:
        """The loop over all T steps, which reads the weights on each, or once where all is one launch."""
        if self.launch:  # the input in, the states and gates out
            moved = 4.0 * self.states * self.batch * self.units * self.item * self.steps
            flop = self._products * self.steps
            return Work(1, flop, moved + self.weight_numbers * self.item, ON_CHIP_STEP * self.steps)
        moved = self.step.bytes * self.batch * self.units + self.weight_numbers * self.item
        return Work(self.step.calls, self._products, moved) * self.steps

    def one_round(self) -> Work:
        """One round of the parallel pass over all T steps, which reads the weights once."""
        numbers = self.batch * self.units
        moved = self.round.bytes * numbers * self.steps + self.weight_numbers * self.item
        round_ = Work(self.round.calls, self._products * self.steps, moved)
        return round_ + scan_work(self.states, self.steps, numbers, self.item, self.kernel)


def forward_seconds(problem: ForwardProblem, rounds: int, rates: Rates) -> tuple[float, float]:
    """Predicted seconds of the forward pass: sequential, and in parallel by so many rounds."""
    return problem.sequential().seconds(rates), problem.one_round().seconds(rates) * rounds
