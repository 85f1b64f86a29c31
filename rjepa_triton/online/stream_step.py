"""One step of a stream in compiled code (`stream_code`), for a loop with an environment between its two halves."""

from __future__ import annotations

import ctypes
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .stream_optimizer import alike, has_step_hooks, unserved
from .stream_readout import LINEAR, hooks_of
from .stream_tables import DONE, FIRST, FORWARD, LEARN, PHASE, POSITION, TARGET, X, packed

if TYPE_CHECKING:
    from .learner import OnlineLearner
    from .stream_code import Compiled

NUMBERS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
_address_of, _requires_grad = Tensor.data_ptr, operator.attrgetter("requires_grad")
_values = operator.methodcaller("values")


class Same:
    """Whether collections hold the objects that they held at first. They are kept, and seen as they are by then."""

    END = object()

    def __init__(self, parts: Iterable[Iterable[Any]]) -> None:
        self.parts = [*parts, (self.END,)]  # the end is elsewhere where one has grown or shrunk
        self.objects = [*itertools.chain.from_iterable(self.parts)]

    def holds(self) -> bool:
        return all(map(operator.is_, itertools.chain.from_iterable(self.parts), self.objects))


class OneStep:
    """The tables of one step, which a loop with an environment uses again and again.

    Of a step of a small layer most of the time goes to looking whether all is as it was. So what is looked at is bound
    once, and compared by loops that run in C.
    """

    def __init__(self, compiled: Compiled) -> None:
        stream = compiled.stream
        self.stream, self.compiled, self.function = stream, compiled, compiled.function
        batch, weight = stream.batch_size, stream.parameters[0]
        classes = stream.loss == "cross_entropy"
        self.x = weight.new_zeros(batch, stream.layer.fan_in)
        aims = (batch,) if classes else (batch, compiled.outputs)
        self.target = torch.zeros(aims, dtype=torch.int64 if classes else weight.dtype, device="cpu")
        self.outputs = weight.new_zeros(batch, compiled.outputs)
        self.mask = torch.ones(batch, dtype=torch.bool, device="cpu")
        self.loss, self.rates = ctypes.c_double(), (ctypes.c_double * len(stream.optimizer.param_groups))()
        given = {
            "x": self.x,
            "kept": self.x,
            "target": self.target,
            "outputs": self.outputs,
            "mask": self.mask,
        }
        arrays, numbers, options = compiled.tables(given, 1, FORWARD)
        arrays[FIRST.index("losses")] = ctypes.addressof(self.loss)
        arrays[FIRST.index("rates")] = ctypes.addressof(self.rates)
        self.arrays, self.numbers, self.options = packed([(arrays, numbers, options)], 1)
        self.tables = [ctypes.addressof(table) for table in (self.arrays, self.numbers, self.options)]
        self.given, self.learned, self.masked = given, compiled.learned(), False
        self.optimizer, self.groups = stream.optimizer, stream.optimizer.param_groups
        self.told = [_objects(group) for group in self.groups]
        self.rated = False  # whether `rates` holds what `told` has
        self.settings = compiled.settings()
        self.activated = any(kind != LINEAR for kind, _ in compiled.parts.kinds())
        # The state that the step reads: `reset` between step() and learn() gives the learner another.
        self.state, _ = stream.learner.lend()
        self.layer, self.inside = stream.layer, bool(compiled.parts.inside)
        modules = [stream.layer, *compiled.parts.parts, *(module for module, _ in compiled.parts.inside)]
        self.hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self.owned = Same(module._parameters.values() for module in (stream.layer, *compiled.parts.parts))
        self.addresses, self.learns = self._addresses(), [*map(_requires_grad, self.learned)]
        self.done = numbers[DONE - 3]
        self._bind()
        self._tell()

    def _addresses(self) -> list[int]:
        """Addresses that the tables name."""
        addresses = [*map(_address_of, self.learned)]
        if self.compiled.head:  # a learner's own step exchanges γ and its spare room
            addresses += map(_address_of, self.stream.learner.lend()[1].tensors())
        return addresses

    def _kept(self) -> list[Any]:
        """What the optimizer has of the weights: its moments, and how many steps it has taken."""
        states = map(self.stream.optimizer.state.get, self.learned)
        return [*itertools.chain.from_iterable(map(_values, filter(None, states)))]

    def _bind(self) -> None:
        """Take what the optimizer has now as what the tables name."""
        self.kept = self._kept()
        self.moments = [value for value in self.kept if isinstance(value, Tensor)]
        self.places = [*map(_address_of, self.moments)]
        states = map(self.stream.optimizer.state.get, self.learned)
        steps = [state["step"] for state in states if state and "step" in state]
        # An operation of torch takes microseconds for each of them.
        known = all(isinstance(step, Tensor) and step.is_cpu and step.dtype in NUMBERS for step in steps)
        self.counts = [NUMBERS[step.dtype].from_address(step.data_ptr()) for step in steps if known]

    def _tell(self) -> None:
        """Take the settings that the optimizer has now as what the tables name."""
        of_groups = (part for group in self.groups for part in (group.values(), group["params"]))
        # Objects, not values: a tensor may equal a number, and a list may hold other weights by now.
        self.same = Same((self.groups, *of_groups))

    def is_told(self) -> bool:
        """Whether the optimizer and the loss have what is in the tables. Rates are given at each step."""
        stream, optimizer, settings = self.stream, self.optimizer, self.settings
        if settings[4] != stream.huber_delta or settings[5] != (stream.clip_norm or 0.0):
            return False
        if stream.optimizer is not optimizer or has_step_hooks(optimizer):
            return False
        if (optimizer.state or self.kept) and not (
            are_same(self._kept(), self.kept) and [*map(_address_of, self.moments)] == self.places
        ):
            return False
        return (optimizer.param_groups is self.groups and self.same.holds()) or self._still_told()

    def _still_told(self) -> bool:
        """`is_told` of groups that hold other objects."""
        groups, self.rated = self.optimizer.param_groups, False
        if len(groups) != len(self.told):
            return False
        for group, told in zip(groups, self.told, strict=True):
            if not are_same(_objects(group), told) and not self._rate_alone(group, told):
                return self._all_told()
        self.groups = groups
        self._tell()
        return True

    @staticmethod
    def _rate_alone(group: Mapping[str, Any], told: list[Any]) -> bool:
        """Whether the group has another lr, which is a number, and all else is the same. Then it counts as told."""
        at, now = list(group).index("lr"), _objects(group)
        if isinstance(group["lr"], Tensor) or not are_same(
            now[:at] + now[at + 1 :], told[:at] + told[at + 1 :]
        ):
            return False
        told[:] = now
        return True

    def _all_told(self) -> bool:
        """As `is_told`, by the values of settings."""
        stream = self.stream
        for group, told in zip(stream.optimizer.param_groups, self.told, strict=True):
            if not are_same(group["params"], told[len(told) - len(group["params"]) :]):
                return False
        if unserved(stream.optimizer, stream.kind) or self.settings[:6] != self.compiled.settings()[:6]:
            return False
        return alike(stream.optimizer)

    def is_still(self) -> bool:
        """Whether the tables name what the stream has now."""
        stream, compiled = self.stream, self.compiled
        if any(self.hooks) or stream.readout is not compiled.readout or stream.layer is not self.layer:
            return False
        if not self.owned.holds():
            return False
        if self.inside and not compiled.parts.are_the_same():
            return False
        if self.activated and self.settings[6:] != [setting for _, setting in compiled.parts.kinds()]:
            return False
        if not _gives(stream.learner, self.state) and stream.learner.lend()[0] is not self.state:
            return False
        if [*map(_requires_grad, self.learned)] != self.learns:
            return False
        return self._addresses() == self.addresses

    def _call(self, tables: Sequence[Any]) -> None:
        """Run compiled code, into which no other thread may come with this learner meanwhile. Raises RuntimeError."""
        past = self.stream.learner._past
        past.enter()
        try:
            self.function(*tables)
        finally:
            past.leave()

    def forward(self, x: Tensor) -> Tensor:
        """The output of a step, (B, O)."""
        self.arrays[X] = self._place("x", x, self.x)
        self.numbers[PHASE] = FORWARD
        self._call(self.tables)
        return self.outputs.clone()

    @staticmethod
    def _place(name: str, given: Tensor, own: Tensor) -> int:
        """Where compiled code finds the numbers of a caller's tensor: with him, or in a copy. Raises ValueError."""
        if type(given) is Tensor and given.is_cpu and given.is_contiguous() and not given.is_neg():
            if address := given.data_ptr():
                return address
            if not given._is_zerotensor():
                raise ValueError(f"{name} must have memory of its own, got a tensor whose storage was freed")
        own.copy_(given.detach())
        return own.data_ptr()

    def _take(self, target: Tensor | None, mask: Tensor | None) -> None:
        if target is not None:
            self.arrays[TARGET] = self._place("target", target, self.target)
        elif self.stream.self_prediction:
            self.arrays[TARGET] = 0
        if mask is not None or self.masked:
            self.masked = mask is not None
            self.mask.fill_(True) if mask is None else self.mask.copy_(mask)

    def learn(self, target: Tensor | None, mask: Tensor | None) -> float:
        """The loss of the step that `forward` ran; it is learned from."""
        self._take(target, mask)
        numbers, stream = self.numbers, self.stream
        if not self.rated:
            rates = [group["lr"] for group in stream.optimizer.param_groups]
            self.rates[:] = list(map(float, rates))
            self.rated = not any(isinstance(rate, Tensor) for rate in rates)
        numbers[PHASE], numbers[POSITION] = LEARN, stream.position
        numbers[DONE] = self.done
        self._call(self.tables)
        counted = 0 if stream.self_prediction and self.masked and not bool(self.mask.any()) else 1
        new = self.compiled.new
        self.compiled.advanced(1, counted, self.learned, self.counts)
        if new is not self.compiled.new:  # the optimizer has them now
            self._bind()
        self.done += counted and stream.position == 0
        return self.loss.value

    def summed(self, target: Tensor | None, mask: Tensor | None) -> float:
        """As `learn`, with the gradients' sum alone."""
        self._take(target, mask)
        arrays, numbers, options = self.compiled.tables(self.given, 1, LEARN, updates=False)
        arrays[TARGET] = self.arrays[TARGET]
        for name, value in (("losses", self.loss), ("rates", self.rates)):
            arrays[FIRST.index(name)] = ctypes.addressof(value)
        arrays[len(FIRST)], options[6:] = self.state.data_ptr(), self.settings[6:]
        self._call(packed([(arrays, numbers, options)], 1))
        self.compiled.stream.learner.returned(1)
        return self.loss.value


def _gives(learner: OnlineLearner, state: Tensor) -> bool:
    """Whether `learner.lend()` would do nothing but give this state."""
    past = learner._past
    return (
        learner._state is state
        and learner._forget is None
        and not learner._cut
        and past.now == past.base
        and not past.broken
        and not past._in_use.locked()
    )


def are_same(these: Any, those: Any) -> bool:
    """Whether two collections hold the same objects."""
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _objects(group: Mapping[str, Any]) -> list[Any]:
    """What a group holds: its settings, then its weights."""
    return [*group.values(), *group["params"]]
