"""What a learner does about NaN, infinities and sensitivities that explode: how they are found, told and mended.

Two things are looked at.

- The input and the new state of each call, by one call of compiled code or of torch. Nearly all that goes wrong comes
  by here: a NaN in the input, an overflow, and weights that a gradient which isn't finite has spoiled.
- The sensitivities, at every `LOOK_EVERY`-th step. Γ grows by a factor of |M| a step, so that one which explodes stays
  so until a reset, and a look now and then finds it. A look at each step would read as much memory again as a third of
  the step does, and the gradient isn't much smaller than Γ of one batch row. Between two looks at every 64th step it
  stays below overflow if it grows by less than 2 a step; at every 8th, by less than 256.

On a CPU each is told at once. On a GPU reading a number waits for all that was launched before. There each call leaves
a flag of its own on the device. At every `LOOK_EVERY`-th step the flags are sent to the host, and those that were sent
the time before are read, so that the step is known exactly and told late. Only where something was found is the place
looked for.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..backend import native_backend
from ..layers.layer import TwoPointRNN, local
from .sensitivity import Sensitivity

POLICIES = ("warn", "raise", "clip", "ignore")
# In how many steps the sensitivities are looked at once. "raise" and "clip" are to come before an overflow.
LOOK_EVERY = {"warn": 64, "raise": 8, "clip": 8, "ignore": 0}


def largest_sensitivity(dtype: torch.dtype) -> float:
    """The bound beyond which a sensitivity counts as exploding: the root of the dtype's largest number.

    1.8e19 in float32 and bfloat16, 1.3e154 in float64. What exceeds it overflows when it is multiplied by its like.
    """
    return float(torch.finfo(dtype).max ** 0.5)


def reads_at_once(device: torch.device) -> bool:
    """Whether Python may read a number there without waiting for what was launched before."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Seen:
    """What the flags tell. steps: first and last of those in which the input or the state wasn't finite, or None."""

    steps: tuple[int, int] | None
    sensitivities: bool


@dataclass(frozen=True)
class Report:
    """Flags on their way to the host. steps: first and last of each flag; event: recorded behind the copy, or None."""

    flags: Tensor
    steps: list[tuple[int, int]]
    event: Any

    def read(self) -> Seen | None:
        """What they tell. It waits for the copy, which was made `LOOK_EVERY` steps ago."""
        if self.event is not None:
            self.event.synchronize()
        *calls, sensitivities = self.flags.tolist()
        found = [steps for steps, flag in zip(self.steps, calls, strict=True) if flag]
        return Seen(found[0] if found else None, bool(sensitivities)) if found or sensitivities else None


class Watch:
    """Finds what isn't finite, or explodes, in one learner.

    policy     one of `POLICIES`
    on         whether it looks at all: not by "ignore", nor once "warn" has told
    at_once    whether flags are read where they are made, as on a CPU
    one_flag   whether all calls share a flag, as those of a captured graph do; no step is known exactly then
    backend    of the steps, as `operations.choose_scan` returns it
    next       the time from which on a look is due
    """

    def __init__(self, policy: str, state: Tensor, backend: str, *, one_flag: bool = False) -> None:
        self.policy, self.every = policy, LOOK_EVERY[policy]
        self._compiled = backend == native_backend.NATIVE.name
        self.on = policy != "ignore" and check.values_known(state)
        self.at_once = reads_at_once(state.device) and not one_flag
        self._told = False
        device, count = state.device, 1 if self.at_once or one_flag else max(1, self.every)
        with torch.inference_mode(False):  # else only inference mode could write them
            self._flags = torch.zeros(count, dtype=torch.float32, device=device)
            self._one = torch.ones(1, dtype=torch.float32, device=device)
        self._slots = self._flags.split(1)
        self._one_flag = one_flag
        self.begin(0)

    def begin(self, now: int) -> None:
        """Start at time `now`: forget the flags so far."""
        self._looked = self._sent = now
        self.next: float = now + self.every if self.on else math.inf
        self._steps: list[tuple[int, int]] = []
        self._report: Report | None = None
        self._flags.zero_()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the report, which belongs to this learner's device stream."""
        return {**self.__dict__, "_report": None, "_slots": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._slots = self._flags.split(1)

    def mark(self, slot: Tensor, tensors: Sequence[Tensor]) -> None:
        """Set `slot` (1,) to 1 if any of these isn't finite: one call for all of them. Waits for nothing.

        The function is that of torch's GradScaler. It multiplies the tensors by 1, and so leaves them as they are.
        """
        torch._amp_foreach_non_finite_check_and_unscale_(list(tensors), slot, self._one)

    def mark_graphed(self, *tensors: Tensor) -> None:
        """`mark` by the flag that all calls share."""
        self.mark(self._slots[0], tensors)

    def found(self, now: int, x: Tensor, after: Tensor) -> bool:
        """Whether x (C, B, F) or the states after the steps from time `now` on aren't finite, if it is known at once.

        x is a clone, and so are the states if C is 1.
        """
        steps = x.shape[0]
        if self.at_once:
            # Within a step, whose other calls fill the processor's caches, this takes 3 µs, and torch's call 13 µs.
            if self._compiled and steps == 1:
                found = native_backend.not_finite(x, after)
                if type(found) is bool:
                    return found
            self.mark(self._flags, (x, after))
            if not self._flags.item():
                return False
            self._flags.zero_()
            return True
        self.mark(self._slots[len(self._steps)], (x, after))
        self._steps.append((now + 1, now + steps))
        return False

    def look(self, now: int, base: int, sensitivity: Sensitivity | None) -> Seen | None:
        """What is to be told before the step after time `now`, at which a look is due; base: time of sensitivities.

        Sensitivities that have stayed as they are since the last look aren't looked at again.
        """
        self.next = now + self.every
        moved = sensitivity if base > self._looked else None
        self._looked = base
        if self.at_once:
            return Seen(None, True) if moved is not None and _explodes(moved) else None
        report = self._report
        self._send(now, moved)
        return None if report is None else report.read()

    def _send(self, now: int, sensitivity: Sensitivity | None) -> None:
        steps = [(self._sent + 1, now)] if self._one_flag else self._steps
        flags = [self._flags[: len(steps)]]
        flags.append(_exploding(sensitivity, self._flags))
        together = torch.cat(flags)
        event = None
        if together.is_cuda:
            together = together.to("cpu", non_blocking=True)  # to pinned memory
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._flags.device))
        self._flags.zero_()
        self._sent, self._steps = now, []
        self._report = Report(together, steps, event)

    def tell(self, layer: TwoPointRNN, what: str) -> None:
        """Warn of it once, or raise FloatingPointError, as the policy says."""
        text = f"OnlineLearner of {type(layer).__name__}: {what}"
        if self.policy == "raise":
            raise FloatingPointError(f"{text}; reset(mask) makes batch rows start anew")
        if self.policy == "warn":
            self.on, self.next = False, math.inf
        if self._told:
            return
        self._told = True
        others = (
            "reset(mask) makes batch rows start anew; nonfinite='raise' stops here, and 'clip' goes on without them"
            if self.policy == "warn"
            else "rows that aren't finite start anew, and sensitivities beyond the bound are scaled back to it"
        )
        warnings.warn(f"{text}; {others}. This is told once.", RuntimeWarning, stacklevel=_users_level())


def _users_level() -> int:
    """The stacklevel at which a warning of the function that asks names the user's line."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("rjepa_triton", "torch"):
            break
        level, frame = level + 1, frame.f_back
    return level + 1


def _explodes(sensitivity: Sensitivity) -> bool:
    """Whether a sensitivity is NaN or beyond its bound. Waits for the device."""
    for tensor in sensitivity.numbers():
        low, high = torch.aminmax(tensor.detach())
        bound = largest_sensitivity(tensor.dtype)
        if not (low.item() >= -bound and high.item() <= bound):  # nor is NaN
            return True
    return False


def _exploding(sensitivity: Sensitivity | None, like: Tensor) -> Tensor:
    """`_explodes` as a flag (1,) on the device."""
    flag = like.new_zeros(1)
    for tensor in () if sensitivity is None else sensitivity.numbers():
        low, high = torch.aminmax(tensor.detach())
        bound = largest_sensitivity(tensor.dtype)
        flag += ~((low >= -bound) & (high <= bound))
    return flag


@dataclass(frozen=True)
class Steps:
    """Where steps weren't finite. what: in words; x (C, B, F) and state (C, B): True where these weren't."""

    what: str
    x: Tensor
    state: Tensor

    def mended(self, x: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        """x with zeros in place of what isn't finite, and `resets` with a start at each row's steps that weren't."""
        first = self.state & (self.state.cumsum(0) == 1)
        starts = self.x.any(-1) | first
        return x.masked_fill(self.x, 0), starts if resets is None else starts | resets


def in_steps(layer: TwoPointRNN, now: int, x: Tensor, after: Tensor) -> Steps | None:
    """The first place at which x (C, B, F) or the states (S, C, B, N) of the steps after time `now` aren't finite."""
    bad_x, bad = ~x.isfinite(), ~after.isfinite()
    in_x, in_state = bad_x.any(-1), bad.any(-1).any(0)
    where = (in_x | in_state).nonzero()
    if not len(where):
        return None
    t, row = where[0].tolist()
    places = []
    if in_x[t, row]:
        feature = _first(bad_x[t, row])
        places.append(f"input x is {x[t, row, feature].item()} in batch row {row}, feature {feature}")
    if in_state[t, row]:
        places.append(_place_of_state(layer, after[:, t], bad[:, t], row))
    else:
        places.append("no unit's state shows it")
    return Steps(f"at step {now + t + 1} {'; '.join(places)}{_of_weights(layer)}", bad_x, in_state)


def _place_of_state(layer: TwoPointRNN, state: Tensor, bad: Tensor, row: int) -> str:
    nu = _first(bad[:, row].any(-1))
    unit = _first(bad[nu, row])
    return f"state {layer.cell.states[nu]} is {state[nu, row, unit].item()} in batch row {row}, unit {unit}"


def _of_weights(layer: TwoPointRNN) -> str:
    """Which weights aren't finite, in words to append."""
    names = [
        matrix.name
        for matrix, weight in zip(layer.matrices, layer.weights(), strict=True)
        if not local(weight).isfinite().all()
    ]
    return f"; nor are the layer's weights {', '.join(names)} finite" if names else ""


def _first(mask: Tensor) -> int:
    return int(mask.int().argmax())


def described(
    layer: TwoPointRNN, seen: Seen, now: int, state: Tensor, sensitivity: Sensitivity | None
) -> tuple[str, Tensor]:
    """What was seen, in words, and the batch rows (B,) whose state (S, B, N) or sensitivity isn't finite now."""
    bad = ~state.isfinite()
    rows = bad.any(-1).any(0)
    parts = []
    if seen.steps is not None:
        first, last = seen.steps
        when = f"at step {first}" if first == last else f"in steps {first} to {last}"
        place = "which has been forgotten since"
        if rows.any():
            place = f"and after step {now} {_place_of_state(layer, state, bad, _first(rows))}"
        parts.append(f"{when} the input or the state wasn't finite, {place}{_of_weights(layer)}")
    place = "a sensitivity exploded, which has been forgotten since"
    for name, numbers in () if sensitivity is None else sensitivity.by_unit():
        largest = numbers.abs().amax(-1)  # (B, N); NaN where a number is
        bound = largest_sensitivity(numbers.dtype)
        beyond = ~(largest <= bound)
        if beyond.any() and place.startswith("a"):
            row, unit = beyond.nonzero()[0].tolist()
            place = (
                f"before step {now + 1} {name} is up to {largest[row, unit].item():.2g} in batch row {row}, "
                f"unit {unit}: it explodes, beyond {bound:.2g}"
            )
        rows = rows | ~largest.isfinite().all(-1)
    if seen.sensitivities:
        parts.append(place)
    return "; ".join(parts), rows


def watched(
    watch: Watch,
    layer: TwoPointRNN,
    now: int,
    base: int,
    state: Tensor,
    sensitivity: Sensitivity | None,
    reset: Callable[[Tensor], None],
) -> None:
    """Look before the step after time `now`, and do what the policy says.

    reset: of a learner, which by "clip" resets the batch rows that aren't finite. Mutates the sensitivities by "clip".
    """
    seen = watch.look(now, base, sensitivity)
    if seen is None:
        return
    what, rows = described(layer, seen, now, state, sensitivity)
    watch.tell(layer, what)
    if watch.policy == "clip":
        if rows.any():
            reset(rows)
        if sensitivity is not None:
            if rows.any():
                sensitivity.forget_(rows)
            for numbers in sensitivity.numbers():
                scale_back_(numbers, largest_sensitivity(numbers.dtype))


def scale_back_(numbers: Tensor, bound: float) -> None:
    """Scale each row, of the last dimension, whose largest number exceeds `bound` so that it is `bound`. Mutates it."""
    largest = numbers.abs().amax(-1, keepdim=True)
    numbers.mul_(torch.where(largest > bound, bound / largest, 1.0))
