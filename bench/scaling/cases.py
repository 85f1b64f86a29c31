"""The algorithms that the scaling benchmark times: each one training pass of an RGC layer, with the loss on s alone.

A case is given the problem (inputs, weights, δ(t) = ∂L/∂s(t)), and its `run()` does everything a user pays for: forward
pass, linearization, learning. Each predicts its memory and arithmetic before it is built, so that what can't fit is not
tried, and each is checked against float64 before it is timed.

Letters: T time, B batch, N units; an RGC has S = 2 states (s, m) and K = 4 matrices (ss, ms, mm, sm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ... import _checks as check
from ...backend import operations
from ...cells.builtin import RGCCell
from ..harness.device import out_of_memory
from ..harness.settings import check_chosen
from .case import Case
from .online import Pass, RfpChunk, RfpHistory, RfpLazy, RfpStep, RfpStepGamma, RfpStream
from .problem import Problem, Size, dense, eager, oracle, own_path_only, problem
from .rtrl import Rtrl, RtrlHeads, head_size
from .sequence import Bptt, BpttAutograd, RfpDual, Tbptt

__all__ = [
    "CASES",
    "CHECK_STEPS",
    "DEFAULT",
    "DTYPES",
    "TOLERANCE",
    "Bptt",
    "BpttAutograd",
    "Case",
    "Pass",
    "Problem",
    "RfpChunk",
    "RfpDual",
    "RfpHistory",
    "RfpLazy",
    "RfpStep",
    "RfpStepGamma",
    "RfpStream",
    "Rtrl",
    "RtrlHeads",
    "Size",
    "Tbptt",
    "check_backend",
    "check_names",
    "check_steps",
    "dense",
    "eager",
    "head_size",
    "oracle",
    "out_of_memory",
    "own_path_only",
    "predicted_seconds",
    "problem",
    "verify",
]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A relative error of a gradient above this can't be rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
CHECK_STEPS = 4  # the most steps over which a case is checked

_ALL: tuple[type[Case], ...] = (
    RfpStream, RfpStep, RfpStepGamma, Pass, RfpLazy, RfpChunk, RfpHistory, RfpDual, Bptt, BpttAutograd, Tbptt, Rtrl,
    RtrlHeads,
)  # fmt: skip
CASES = {case.name: case for case in _ALL}
# Not run unless they are named: lazy, whose gradient is the same as step's; history, which is not for long streams; and
# truncated BPTT, which costs as much as BPTT.
DEFAULT = tuple(name for name in CASES if name not in ("rfp-lazy", "rfp-history", "tbptt"))


def check_steps(case: type[Case], steps: int) -> int:
    """Over how many steps a case is checked. Steps of RTRL are slow, so it gets the fewest in which J matters."""
    return min(steps, 2 if case is Rtrl else CHECK_STEPS)


def verify(case: type[Case], problem: Problem) -> None:
    """Raise ArithmeticError unless the case's gradients over a few steps agree with `oracle`'s."""
    if case.exact is None:
        return
    steps = check_steps(case, problem.steps)
    # in chunks of half as many steps, so that what is carried from one chunk to the next is checked too
    chunk = max(1, steps // 2)
    short = problem.first(steps - steps % chunk, chunk)
    built, posed = case.checked(short)
    entries = [case.entries(w).double() for w in problem.weights]
    total = [torch.zeros_like(part) for part in entries]
    for _ in range(short.steps // built.covers):
        for sum_, part in zip(total, built.run(), strict=True):
            sum_.add_(part)
    tolerance = TOLERANCE[problem.x.dtype]
    network = replace(posed, weights=[w if w.dim() == 2 else torch.block_diag(*w) for w in entries])
    for matrix, got, whole in zip(
        RGCCell.matrices, total, oracle(network, case.exact, case.truncated), strict=True
    ):
        want = case.entries(whole)
        error = float((got - want).norm() / want.norm())
        if not error <= tolerance:
            raise ArithmeticError(
                f"gradient of W_{matrix.name} differs from float64 by {error:.1e} relative "
                f"(tolerance {tolerance:.0e}) after {short.steps} steps"
            )


def predicted_seconds(case: type[Case], size: Size, rate: float) -> float:
    """Seconds a time step at `rate` FLOP/s. It is a lower bound, which RTRL comes close to."""
    return case.flop(size) / rate


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no case has, or if there are no names."""
    check_chosen("algorithms", names, CASES)


def check_backend(backend: str) -> None:
    """Raise ValueError for a backend that `PerUnit` doesn't know."""
    check.one_of("backend", backend, operations.BACKENDS)
