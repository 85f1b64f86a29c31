"""What the forward pass over T steps costs, step by step or in parallel in time.

Calls and bytes of the pointwise work are counted on a small problem (`calls.counted`). The weights are w = Σ_k N·M_k
numbers.

    sequential   T times: the step's calls, 2·B·w FLOP, the weights' bytes and the pointwise work's bytes; the calls of
                 a single one where compiled code runs the whole loop
    parallel     rounds, each of which has as many FLOP over all T steps in a few calls, reads the weights once, and
                 scans an affine recursion
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..rules import rfp
from .work import COMPILED_LOOP, Rates, Work

# How many steps of a scan kernel a step of a loop in one launch takes as long as; assumed. The loop sums its products
# over the lanes of a warp and passes its states through shared memory, where a scan's step waits for one load. With up
# to 64 units it has less to do; with 128, its instructions and the weights from the cache alone take 0.9 µs on an H100
# (`kernels.cell_on_chip.cell_forward`).
ON_CHIP_STEP = 5


def scan_level(states: int, steps: int, numbers: int, item: int) -> Work:
    """One halving of `rfp.affine_scan`, from T = `steps` to T/2.

    states: S; numbers: B·N; item: bytes of a number.
    """
    planes = states**2 * (states + 1) + states * (3 * states + 1) + 2 * states
    return Work(calls=3 * states + 3, bytes=float(planes * steps * numbers * item))


def kernel_steps(steps: int) -> int:
    """Dependent steps that Triton's scan takes over T = `steps` of few units.

    That is T below 256. Longer scans are cut into blocks of √(T/2) steps, as `kernels.reverse_scan.pick_scan_config`
    does: each block is gone through twice, and the blocks' summaries once, which is 2·√(2T) steps.
    """
    return steps if steps < 256 else round(2 * math.sqrt(2 * steps))


def scan_work(states: int, steps: int, numbers: int, item: int, kernel: bool) -> Work:
    """The work of `operations.affine_scan` over T = `steps`.

    states: S; numbers: B·N; item: bytes of a number; kernel: whether Triton's kernel runs it.
    """
    moved = float(numbers * item * states * (states + 2))  # in a step: M and r in, c out
    if kernel:  # M and r are reversed before and c after; two launches, each of which reads M and r
        return Work(calls=7, bytes=5 * steps * moved, scan_steps=kernel_steps(steps))
    total, left = Work(), steps
    while left > max(1, rfp.SERIAL_STEPS):
        total += scan_level(states, left, numbers, item)
        left //= 2
    return total + Work(calls=(left - 1) * states + 1, bytes=2 * left * moved)


@dataclass(frozen=True)
class ForwardProblem:
    """A forward pass: its sizes, and what was counted of its cell.

    states, batch, units, steps   S, B, N, T
    weight_numbers  w, of all recurrent matrices
    item      bytes of a number
    step      one step of the loop: its calls, and the bytes of one unit and batch row, matrix products left out
    round     one round of the parallel pass, without its scan: its calls, and the bytes of one unit, batch row and step
    kernel    whether a Triton kernel runs the scan
    launch    whether the loop is one launch that keeps the weights on chip (`kernels.cell_on_chip`)
    compiled  whether the loop is one call of compiled code on the CPU (`native_backend.compiled_loop`)
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
    compiled: bool = False

    @property
    def _products(self) -> float:
        """FLOP of a step's matrix products."""
        return 2.0 * self.batch * self.weight_numbers

    def sequential(self) -> Work:
        """The loop over all T steps, which reads the weights in every step, or once if it is one launch."""
        # the input in; states and gates out
        moved = 4.0 * self.states * self.batch * self.units * self.item * self.steps
        flop, read = self._products * self.steps, float(self.weight_numbers * self.item)
        if self.compiled:
            return COMPILED_LOOP + Work(flop=flop, bytes=moved, matrix_bytes=read * self.steps)
        if self.launch:
            return Work(1, flop, moved + read, ON_CHIP_STEP * self.steps)
        moved = self.step.bytes * self.batch * self.units
        work = Work(self.step.calls, self._products, moved, matrix_bytes=read, views=self.step.views)
        return work * self.steps

    def one_round(self) -> Work:
        """One round of the parallel pass over all T steps, which reads the weights once."""
        numbers = self.batch * self.units
        moved = self.round.bytes * numbers * self.steps + self.weight_numbers * self.item
        round_ = Work(self.round.calls, self._products * self.steps, moved, views=self.round.views)
        return round_ + scan_work(self.states, self.steps, numbers, self.item, self.kernel)


def forward_seconds(problem: ForwardProblem, rounds: int, rates: Rates) -> tuple[float, float]:
    """Predicted seconds of the forward pass: of the sequential loop, and of `rounds` parallel rounds."""
    return problem.sequential().seconds(rates), problem.one_round().seconds(rates) * rounds
