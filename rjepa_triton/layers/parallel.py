"""The forward pass of a two-point cell in parallel in time: rounds of one product a matrix and one per-unit scan.

A trajectory c solves c(t) = F(c(t-1)) for all t at once. Guess it, and correct the guess by Newton's method with each
unit's own S×S part M of the Jacobian alone, the part that credits of RFP pass through:

    e(t) = F(c(t-1)) - c(t)                     what the guess misses by, at all steps at once
    d(t) = e(t) + M(t) d(t-1),   d(0) = 0       `rfp.affine_scan`: no matrix in it
    c ← c + d

Where units don't meet (diagonal weights) that is Newton's method (DEER: Lim et al. 2024, "Parallelizing non-linear
sequential models over the sequence length"); where they do, a quasi-Newton method (quasi-DEER: Gonzalez et al. 2024,
"Towards scalable and stable parallelization of nonlinear RNNs"; their ELK also damps it, this doesn't). M(t) is zero at
a reset, so nothing passes one. After r rounds the first r steps are right at least; in practice the rounds that it
takes depend on how large the weights between units are, hardly on T. Where they are too large d grows: that is noticed,
and the loop runs instead.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..backends import dispatch as ops
from ..cells.two_point import Cell, Trajectory
from ..planning import cost
from ..rules import rfp

Forward = Literal["auto", "sequential", "parallel"]
FORWARD = ("auto", "sequential", "parallel")

MAX_ROUNDS = 100  # before the loop is run instead
WINDOW = 1 << 17  # numbers of T·B·N that are corrected at once on the CPU
GROWTH = 10.0  # that a correction may grow beyond the first, or the states' own size: early ones fluctuate
# What a guess may miss F by, in eps relative to max(1, |c|), to be right within rounding. Where units don't meet, the
# correction that it is then given is Newton's, and what is left of the order of its square.
ROUNDING, ROUNDING_ALONE = 4.0, 16.0
# What "auto" assumes, since it doesn't look at weights: RGC's at W ~ 0.1/√N. An affine cell takes one round, and one
# that finds nothing left.
ASSUMED_ROUNDS, AFFINE_ROUNDS = 8, 2
# The part of the loop's predicted time that "auto" may spend on rounds before it runs the loop after all; more where
# it is known how many there will be. On the CPU the model takes a loop for up to 2 times as long as it is, and the
# rounds for down to half as long (`bench/results/forward-cpu.jsonl`).
SHARE, AFFINE_SHARE, AFFINE_SHARE_CPU = 0.25, 0.6, 0.3


class Divergence(UserWarning):
    """The rounds diverged, or did not converge in time; the sequential loop ran in their place."""


@dataclass(frozen=True)
class Attempt:
    """How the rounds went.

    trajectory   as `Cell.scan` gives it; None where they didn't converge
    rounds       how many there were, in the window of time that took most
    change       the largest correction of its last, relative to max(1, |c|); `first`: of its first
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
    """Rounds from F of a zero state until they converge: no correction above `tolerance`, relative to max(1, |c|).

    Or until every step is F of the one before within rounding, which is all that a loop could say: with a long memory,
    corrections made of rounding alone may be larger than the tolerance. On the CPU one window of time after the other,
    so that what a round moves stays in cache.

    x, weights, state, resets: as for `Cell.scan`; nothing is mutated. tolerance: 1e-10 in float64, else 1e-6, if None.
    scan: what solves the recursion of d, as `rfp.affine_scan`. They end without a trajectory after max_rounds,
    and when a correction isn't finite or exceeds GROWTH times the first, and GROWTH.

    The trajectory's `saved` is of the states before the last correction.
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
    """`attempt` of one window, after the state in states[:, 0]; what follows it in states is mutated."""
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
    """Correct a guess of the states (S, T + 1, B, N), which is mutated.

    Returns what the cell saves of the guess; and the largest entry of the correction, and of what the guess missed F
    by, relative to max(1, |c|).
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
    """How many rounds "auto" tries before it runs the loop; 0: none, the loop at once.

    As many as `cost.forward_seconds` predicts to take SHARE of the loop's time (of an affine cell's AFFINE_SHARE), if
    those are what the cell may be expected to need, ASSUMED_ROUNDS (AFFINE_ROUNDS). On the CPU of an affine cell alone,
    and with one thread alone: elsewhere a round isn't certain to pay, since it moves many times the bytes of the loop,
    in passes at the end of which each thread waits for all. Where the loop is one launch (`ops.one_launch`), rounds
    rarely pay.

    weights: their shapes count, and where a GPU holds them, how many multiprocessors it has. sizes: T, B, N. kernel:
    whether Triton serves the scan.
    """
    if device.type not in ("cpu", "cuda") or dtype not in (torch.float32, torch.float64) or sizes[0] == 1:
        return 0
    if device.type == "cpu" and not (cell.affine and torch.get_num_threads() == 1):
        return 0
    compiled = device.type == "cpu" and ops.choose_scan("auto", device, dtype) == "compile"
    problem = forward_problem(cell, weights, sizes, dtype, kernel, compiled)
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
    """What the model of cost is told. Arguments as for `rounds_worth`; compiled: whether "compile" serves (`ops`)."""
    steps, batch, units = sizes
    step, round_ = _counts(cell, [weight.dim() for weight in weights])
    scale = dtype.itemsize / _COUNTED_AT.itemsize
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
        launch=kernel and ops.one_launch(cell, weights, batch),
        compiled=compiled and ops.compiled_loop(cell, weights, steps, batch),
    )


_COUNTED_AT = torch.float32


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=_COUNTED_AT, device="cpu")


_counted: dict[tuple[object, ...], tuple[cost.Work, cost.Work]] = {}


def _counts(cell: Cell, dims: Sequence[int]) -> tuple[cost.Work, cost.Work]:
    """A step of the loop and a round without its scan, as `cost.ForwardProblem` has them, for weights of `dims`.

    Counted once for each kind of cell, on a problem of a few units.
    """
    key = (type(cell), cell.affine, cell.per_unit, tuple(dims))
    if key not in _counted:
        units, short, long = 4, 3, 5  # one step may have a way of its own
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
    """The forward pass as `Cell.scan` gives it, in parallel or not; nothing that didn't converge is returned.

    mode "sequential": `Cell.scan`. "parallel": `attempt`, and where it fails `Cell.scan` with a `Divergence`
    warning. "auto": what `rounds_worth` says, without a warning.
    backend: of the scan, as `ops.choose_scan` takes it. keep: whether the trajectory has `saved`.
    """
    chosen = ops.choose_scan(backend, x.device, x.dtype)
    rounds = 0 if mode == "sequential" else MAX_ROUNDS
    if mode == "auto":
        sizes = (x.shape[1], x.shape[2], x.shape[3])
        rounds = rounds_worth(cell, weights, sizes, x.device, x.dtype, chosen == "triton")
    if rounds:
        scan = functools.partial(ops.affine_scan, backend=chosen)
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
    return ops.scan(cell, x, weights, state, resets, backend=chosen, keep=keep)
