"""The forward pass of a two-point cell in parallel in time: rounds of one product for each matrix and one scan.

A trajectory c solves c(t) = F(c(t-1)) for all t at once. It is guessed, and the guess is corrected by Newton's method
with only each unit's own S×S block M of the Jacobian, through which RFP's credits pass as well:

    e(t) = F(c(t-1)) - c(t)                     what the guess misses by, at all steps at once
    d(t) = e(t) + M(t) d(t-1),   d(0) = 0       `rfp.affine_scan`, a scan for each unit, without a matrix
    c ← c + d

With diagonal weights this is Newton's method (DEER: Lim et al. 2024, "Parallelizing non-linear sequential models over
the sequence length"). With others it is a quasi-Newton method (quasi-DEER: Gonzalez et al. 2024, "Towards scalable
and stable parallelization of nonlinear RNNs"; their ELK also damps it, which this doesn't). M(t) is zero at a reset,
so no correction passes a reset. After r rounds at least the first r steps are right. In practice the number of rounds
depends on how large the weights between units are, and hardly on T. Where they are too large, d grows; that is
noticed, and the sequential loop runs instead.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..backend import native_backend, operations, triton_backend
from ..cells.trace import traced
from ..cells.two_point import Cell, Trajectory
from ..rules import rfp

if TYPE_CHECKING:
    from ..planning import cost

Forward = Literal["auto", "sequential", "parallel"]
FORWARD = ("auto", "sequential", "parallel")

MAX_ROUNDS = 100  # after these the sequential loop runs instead
WINDOW = 1 << 17  # T·B·N of the steps that are corrected at once on the CPU
# The rounds count as diverging when a correction is this many times the first, and this many times max(1, |c|). It is
# not 1 because the first few corrections fluctuate.
GROWTH = 10.0
# A guess counts as right within rounding if it misses F by at most so many eps, relative to max(1, |c|). The second
# holds for diagonal weights: there the last correction is Newton's, whose error is of the order of its square.
ROUNDING, ROUNDING_ALONE = 4.0, 16.0
# How many rounds "auto" expects, since it doesn't look at the weights: those of an RGC at W ~ 0.1/√N. An affine cell
# takes one round, and another that finds nothing to correct.
ASSUMED_ROUNDS, AFFINE_ROUNDS = 8, 2
# The part of the loop's predicted time that "auto" may spend on rounds before it runs the loop after all; it is larger
# for affine cells, whose number of rounds is known. On the CPU the cost model predicts a loop at up to twice its time,
# and rounds at down to half of theirs (`bench/results/forward-cpu.jsonl`).
SHARE, AFFINE_SHARE, AFFINE_SHARE_CPU = 0.25, 0.6, 0.3


class Divergence(UserWarning):
    """Warns that the rounds diverged or ran out, so that the sequential loop ran instead."""


@dataclass(frozen=True)
class Attempt:
    """The result of rounds.

    trajectory   as `Cell.scan` returns it; None if the rounds didn't converge
    rounds       how many there were, in the window of time that took most
    change       the largest correction of the last of these, relative to max(1, |c|)
    first        the largest correction of the first
    """

    trajectory: Trajectory | None
    rounds: int
    change: float
    first: float


@torch.no_grad()
def attempt(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    tolerance: float | None = None,
    max_rounds: int = MAX_ROUNDS,
    scan: Callable[[Tensor, Tensor], Tensor] = rfp.affine_scan,
) -> Attempt:
    """Runs rounds until they converge, from the guess c(t) = F(0).

    They converge when no correction is above `tolerance`, relative to max(1, |c|), or when every step is F of the step
    before within rounding, which is as good as a loop: with a long memory, corrections that consist of rounding errors
    may be larger than the tolerance. They end without a trajectory after max_rounds, and when a correction isn't finite
    or exceeds both GROWTH and GROWTH times the first. On the CPU the windows of time run one after another, so that the
    arrays of a round stay in cache.

    x, weights, state, resets: as for `Cell.scan`; nothing is mutated. tolerance: None stands for 1e-10 in float64, else
    1e-6. scan: solves the recursion of d, as `rfp.affine_scan` does.

    The trajectory's `saved` is that of the states before the last correction.
    """
    if tolerance is None:
        tolerance = 1e-10 if x.dtype == torch.float64 else 1e-6
    _, steps, batch, units = x.shape
    states = x.new_empty(len(cell.states), steps + 1, batch, units)
    states[:, 0] = torch.stack(tuple(state))
    length = max(1, WINDOW // (batch * units)) if x.device.type == "cpu" else steps
    saved, worst = [], Attempt(None, 0, 0.0, 0.0)
    for start in range(0, steps, length):
        window = slice(start, min(start + length, steps))
        made = _converge(
            cell,
            x[:, window],
            weights,
            states[:, window.start : window.stop + 1],
            None if resets is None else resets[window],
            tolerance,
            max_rounds,
            scan,
        )
        if made.trajectory is None:
            return made
        saved.append(made.trajectory.saved)
        worst = max(worst, made, key=lambda one: one.rounds)
    whole = saved[0] if len(saved) == 1 else torch.cat(saved, dim=1)
    return replace(worst, trajectory=Trajectory(x, states, whole, resets))


def _converge(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Tensor,
    resets: Tensor | None,
    tolerance: float,
    max_rounds: int,
    scan: Callable[[Tensor, Tensor], Tensor],
) -> Attempt:
    """`attempt` on one window of time, from the state in states[:, 0] on. Mutates the states after it."""
    zero = torch.zeros_like(x[0])
    guess = cell.update([zero] * len(cell.states), [zero] * len(cell.gates), x.unbind())
    for target, value in zip(states[:, 1:], guess, strict=True):
        target.copy_(value)
    eps = torch.finfo(x.dtype).eps
    rounding = eps * (ROUNDING if any(weight.dim() > 1 for weight in weights) else ROUNDING_ALONE)
    first = change = math.inf
    for done in range(1, max_rounds + 1):
        saved, change, missed = one_round(cell, x, weights, states, resets, scan)
        if done == 1:
            first = change
        if change <= tolerance or missed <= rounding:
            return Attempt(Trajectory(x, states, saved, resets), done, change, first)
        if not math.isfinite(change) or change > GROWTH * max(1.0, first):
            return Attempt(None, done, change, first)
    return Attempt(None, max_rounds, change, first)


@torch.no_grad()
def one_round(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Tensor,
    resets: Tensor | None,
    scan: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, float, float]:
    """One round: corrects a guess of the states (S, T + 1, B, N), which it mutates.

    Returns what the cell saves of the guess, the largest correction, and the largest error |F(c(t-1)) - c(t)| of the
    guess, both relative to max(1, |c|).
    """
    guess = Trajectory(x, states, x, resets)
    after, saved = cell.evaluate(x, guess.before, weights)
    missing = after - guess.after
    lin = cell.linearize(replace(guess, saved=saved))
    correction = scan(rfp.transition(lin, cell.matrices, weights), missing)
    corrected = guess.after.add_(correction)
    relative = torch.stack([correction, missing]).abs_().div_(corrected.abs().clamp_(min=1))
    change, missed = relative.flatten(1).amax(1).tolist()
    return saved, change, missed


def rounds_worth(
    cell: Cell,
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    kernel: bool,
) -> int:
    """How many rounds mode "auto" tries before it runs the sequential loop; 0: it runs the loop at once.

    It is the number of rounds that `cost.forward_seconds` predicts to take SHARE of the loop's time (AFFINE_SHARE for
    an affine cell), or 0 if the cell is expected to need more, ASSUMED_ROUNDS (AFFINE_ROUNDS). On the CPU it is 0 but
    for an affine cell with one thread whose loop isn't compiled: elsewhere rounds may not pay, since a round moves many
    times the bytes of the loop, in passes at whose end the threads wait for each other. Rounds rarely pay where the
    loop is one launch (`triton_backend.one_launch`).

    weights: only their shapes matter, and on a GPU how many multiprocessors it has. sizes: T, B, N. kernel: whether
    Triton runs the scan.
    """
    from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model

    if device.type not in ("cpu", "cuda") or dtype not in (torch.float32, torch.float64) or sizes[0] == 1:
        return 0
    if device.type == "cpu":
        if not cell.affine or torch.get_num_threads() > 1:
            return 0
        compiled = operations.choose_scan("auto", device, dtype) == "compile"
        if compiled and native_backend.compiled_loop(cell, weights, *sizes[:2]):
            return 0
    problem = forward_problem(cell, weights, sizes, dtype, kernel)
    loop, round_ = cost.forward_seconds(problem, 1, cost.rates_of(device))
    known = AFFINE_SHARE_CPU if device.type == "cpu" else AFFINE_SHARE
    share, expected = (known, AFFINE_ROUNDS) if cell.affine else (SHARE, ASSUMED_ROUNDS)
    rounds = min(MAX_ROUNDS, int(share * loop / round_))
    return rounds if rounds >= expected else 0


def forward_problem(
    cell: Cell,
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    kernel: bool,
    compiled: bool = False,
) -> cost.ForwardProblem:
    """The forward pass as the cost model sees it. compiled: whether "compile" runs it; else as in `rounds_worth`."""
    from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model

    steps, batch, units = sizes
    step, round_ = _counts(cell, [weight.dim() for weight in weights])
    scale = dtype.itemsize / _COUNTED_AT.itemsize
    if kernel and traced(cell) is not None:
        step = replace(step, calls=triton_backend.step_calls(cell), views=0)
    return cost.ForwardProblem(
        states=len(cell.states),
        batch=batch,
        units=units,
        steps=steps,
        weight_numbers=sum(weight.numel() for weight in weights),
        item=dtype.itemsize,
        step=replace(step, bytes=step.bytes * scale),
        round=replace(round_, bytes=round_.bytes * scale),
        kernel=kernel,
        launch=kernel and triton_backend.one_launch(cell, weights, batch),
        compiled=compiled and native_backend.compiled_loop(cell, weights, steps, batch),
    )


_COUNTED_AT = torch.float32


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=_COUNTED_AT, device="cpu")


_counted: dict[tuple[object, ...], tuple[cost.Work, cost.Work]] = {}


def _counts(cell: Cell, dims: Sequence[int]) -> tuple[cost.Work, cost.Work]:
    """The calls and bytes of a step of the loop, and of a round without its scan, as in `cost.ForwardProblem`.

    They are counted once for each kind of cell, on a few units. dims: how many dimensions each weight has.
    """
    from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model

    key = (type(cell), cell.affine, cell.per_unit, tuple(dims))
    if key not in _counted:
        units, short, long = 4, 3, 5  # not a single step, which may run by other code
        weights = [_zeros(*((), (units,), (units, units), (2, units // 2, units // 2))[dim]) for dim in dims]
        state = [_zeros(1, units)] * len(cell.states)
        x = _zeros(len(cell.per_unit), long, 1, units)
        few = cost.counted(lambda: cell.scan(x[:, :short], weights, state))
        more = cost.counted(lambda: cell.scan(x, weights, state))
        steps = long - short
        each = (more + few * -1.0) * (1 / steps)
        step = cost.Work(calls=each.calls, views=each.views, bytes=each.bytes / units)
        states = _zeros(len(cell.states), long + 1, 1, units)
        round_ = cost.counted(lambda: one_round(cell, x, weights, states, None, lambda m, r: r))
        _counted[key] = (
            step,
            cost.Work(calls=round_.calls, views=round_.views, bytes=round_.bytes / long / units),
        )
    return _counted[key]


def forward(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    mode: Forward = "auto",
    backend: str = "auto",
    keep: bool = True,
) -> Trajectory:
    """The forward pass, as `Cell.scan` returns it, in parallel or sequentially.

    mode: "sequential" runs the loop. "parallel" runs `attempt` and, where that doesn't converge, the loop, with a
    `Divergence` warning. "auto" tries as many rounds as `rounds_worth` says, then runs the loop, without a warning.
    backend: as `operations.choose_scan` takes it. keep: whether the trajectory has `saved`.
    """
    chosen = operations.choose_scan(backend, x.device, x.dtype)
    rounds = 0 if mode == "sequential" else MAX_ROUNDS
    if mode == "auto":
        sizes = (x.shape[1], x.shape[2], x.shape[3])
        rounds = rounds_worth(cell, weights, sizes, x.device, x.dtype, chosen == "triton")
    if rounds:
        scan = functools.partial(operations.affine_scan, backend=chosen)
        made = attempt(cell, x, weights, state, resets, max_rounds=rounds, scan=scan)
        if made.trajectory is not None:
            return made.trajectory if keep else made.trajectory.without_saved()
        if mode == "parallel":
            warnings.warn(
                f"the forward pass in parallel did not converge in {made.rounds} rounds: the last changed the states "
                f"by {made.change:.3g} of max(1, |state|), the first by {made.first:.3g}; the sequential loop ran "
                "instead, which is slower",
                Divergence,
                stacklevel=2,
            )
    return operations.scan(cell, x, weights, state, resets, backend=chosen, keep=keep)
