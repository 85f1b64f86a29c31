"""What a learner's state_dict() may hold: one schema, which is checked whole before a learner loads anything.

version         2; absent in states of version 0.1, which also have neither `layer` nor `update_every`
form, learning, credit, gamma_rounding, batch_size   of the learner
layer           the kind of the layer: its cell's name and states, and the name and shape of each weight
update_every    C
state           (S, B, N)
position        how many of the C steps between two updates have run; 0 in form "step"
filling         whether position > 0
forget          (B,) bool or None: batch rows to forget when the next step begins
forget_all      whether these are all rows, by reset()
now, base       the time, and that of the sensitivities; the window holds the steps between
episode         the time of the last reset of all rows
ends            the times at which the calls end whose steps are in the window, in order; of a chunk of several calls
                the last alone; none in form "history"
gamma           the tensors of the sensitivities (`Sensitivity.tensors`)
window          the window's blocks (`Block.to_dict`)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from .holding import with_own
from .tape import TIME, Block

VERSION = 2
ADDED = ("version", "layer", "update_every")  # since version 0.1
SAME = ("form", "learning", "credit", "gamma_rounding", "batch_size", "layer")
LARGEST = 2**62  # of a time


@dataclass(frozen=True)
class Wanted:
    """What a learner can load.

    own       the learner's own state_dict()
    block     makes a block of one step, as the learner records it
    carries   whether the learner has sensitivities, which form "history" has not
    """

    own: Mapping[str, Any]
    block: Callable[[], Block]
    carries: bool


def kind(layer: TwoPointRNN) -> list[Any]:
    """The kind of a layer: its cell's name and states, and each weight's name and shape."""
    weights = [
        [matrix.name, *weight.shape] for matrix, weight in zip(layer.matrices, layer.weights(), strict=True)
    ]
    return [type(layer.cell).__name__, list(layer.cell.states), weights]


def owned(value: Tensor) -> Tensor:
    """A copy of a loaded tensor in memory of its own, as compiled code needs it."""
    return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def load_all(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Load the state of each part, modules and optimizers by their names in `state`: all of them, or none.

    Raises ValueError, naming the part, for what it can't take.
    """
    before = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    try:
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # torch raises RuntimeError, and what junk gives
                raise ValueError(f"state's {name} doesn't fit: {type(error).__name__}: {error}") from error
            if isinstance(part, torch.optim.Optimizer):
                _check_moments(name, part)
    except BaseException:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        raise


def _check_moments(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for moments of other shapes than their parameters', which torch takes."""
    for parameter, moments in optimizer.state.items():
        for moment, value in moments.items():
            if isinstance(value, Tensor) and value.shape not in (parameter.shape, ()):
                raise ValueError(
                    f"state's {name} doesn't fit: {moment} must have shape {tuple(parameter.shape)}, got "
                    f"{tuple(value.shape)}"
                )


def refuse_sums(state: Mapping[str, Any], every: int, parameters: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless a stream's state has a position among `every` steps, and the sums there."""
    position, name = _integer("position", state["position"], 0, every), "gradients"
    if not position:
        if state[name] is not None:
            raise ValueError(f"state's {name} must be None at position 0, got {_shown(state[name])}")
        return
    given = _list(name, state[name])
    if len(given) != len(parameters):
        raise ValueError(f"state must have the gradients of {len(parameters)} parameters, got {len(given)}")
    for at, (got, parameter) in enumerate(zip(given, parameters, strict=True)):
        if got is not None:
            check.shape(
                f"state's {name}[{at}]", check.tensor(f"state's {name}[{at}]", got), tuple(parameter.shape)
            )


def refuse_mask(name: str, value: object, rows: int) -> None:
    """Raise TypeError or ValueError unless a field is a bool of each batch row."""
    _tensor(name, value, torch.zeros(rows, dtype=torch.bool, device="cpu"), anywhere=True)


def refuse_agent(state: Mapping[str, Any], own: Mapping[str, Any], weights: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless the fields of an agent's state that no part of it loads are like its `own`.

    weights: those that `bonus` has gradients of.
    """
    _boolean("acted", state["acted"])
    _tensor("value", state["value"], own["value"], anywhere=True)
    _alike("traces", state["traces"], own["traces"])
    if state["bonus"] is not None:
        _alike("bonus", state["bonus"], weights)


def _alike(name: str, value: object, wanted: Sequence[Tensor]) -> None:
    given = _list(name, value)
    if len(given) != len(wanted):
        raise ValueError(f"state's {name} must have {len(wanted)} tensors, got {len(given)}")
    for at, (got, want) in enumerate(zip(given, wanted, strict=True)):
        _tensor(f"{name}[{at}]", got, want, anywhere=True)


def refuse_damaged(state: object, wanted: Wanted) -> None:
    """Raise TypeError or ValueError, naming the field, unless `state` is what the learner can load."""
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict from state_dict(), got {type(state).__name__}")
    own = wanted.own
    keys = set(own) if "version" in state else set(own) - set(ADDED)
    if set(state) != keys:
        raise ValueError(f"state must have the keys {sorted(keys)}, got {sorted(map(str, state))}")
    if "version" in state and _integer("version", state["version"], 0, LARGEST) != VERSION:
        raise ValueError(f"state's version must be {VERSION}, got {state['version']}")
    for name in SAME:
        if name in state and not _same(state[name], own[name]):
            raise ValueError(
                f"state's {name} must be the learner's, {own[name]!r}, got {_shown(state[name])}"
            )
    _check_chunk(state, own)
    _tensor("state", state["state"], own["state"])
    if state["forget"] is not None:
        _tensor("forget", state["forget"], torch.zeros_like(own["state"][0, :, 0], dtype=torch.bool))
    if _boolean("forget_all", state["forget_all"]) and (state["forget"] is None or not state["forget"].all()):
        raise ValueError("state's forget must be True in all rows, since forget_all is True")
    _check_gamma(state["gamma"], own["gamma"])
    steps = _check_times(state, wanted.carries)
    found = _check_window(state["window"], wanted)
    if found != steps:
        raise ValueError(f"state's window must hold the {steps} steps from base to now, got {found}")


def _check_chunk(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    every = own["update_every"]
    position = _integer("position", state["position"], 0, 1 if own["form"] == "step" else every)
    if _boolean("filling", state["filling"]) != (position > 0):
        raise ValueError(f"state's filling must be {position > 0} at position {position}")
    if "update_every" not in state:
        return
    theirs = _integer("update_every", state["update_every"], 1, LARGEST)
    if position and theirs != every:
        raise ValueError(
            f"state's update_every must be the learner's, {every}, in the middle of these steps, got {theirs} at "
            f"position {position}"
        )


def _check_times(state: Mapping[str, Any], carries: bool) -> int:
    """Check the times and return the number of steps from base to now."""
    now = _integer("now", state["now"], 0, LARGEST)
    base = _integer("base", state["base"], 0, now + 1)
    _integer("episode", state["episode"], 0, now + 1)
    ends = _list("ends", state["ends"])
    for i, end in enumerate(ends):
        _integer(f"ends[{i}]", end, base + 1, now + 1)
    if any(later <= before for before, later in itertools.pairwise(ends)):
        raise ValueError(f"state's ends must rise, got {_shown(ends)}")
    last = [now] if carries and now > base else []
    if ends[-1:] != last:
        wanted = f"end with now, {now}" if last else "be empty"
        raise ValueError(f"state's ends must {wanted}, got {_shown(ends)}")
    return now - base


def _check_gamma(gamma: object, own: Sequence[Tensor]) -> None:
    given = _list("gamma", gamma)
    if len(given) != len(own):
        raise ValueError(f"state's gamma must have {len(own)} tensors, got {len(given)}")
    for i, (got, want) in enumerate(zip(given, own, strict=True)):
        name = f"gamma[{i}]"
        if want.dtype == torch.uint8:  # of a generator, which lies on the CPU wherever the learner is
            _tensor(name, got, want, anywhere=True)
            try:
                torch.Generator().set_state(owned(got).cpu())
            except RuntimeError as error:
                raise ValueError(
                    f"state's {name} must be the state of a random generator: {error}"
                ) from error
            continue
        _tensor(name, got, want)
        if want.dtype == torch.int64 and bool((got < 0).any()):  # seed and step of stochastic rounding
            raise ValueError(f"state's {name} must be at least 0, got {got.tolist()}")


def _check_window(window: object, wanted: Wanted) -> int:
    """Check all blocks and return the number of their steps."""
    blocks = _list("window", window)
    if not blocks:
        return 0
    like = wanted.block()
    structure, with_held = like.to_dict(), with_own(like)  # of steps in which batch rows were held
    keys_held = with_held.to_dict()["keys"]
    resets = torch.zeros_like(like.lin.before[0, ..., :1], dtype=torch.bool)
    inputs = [] if like.inputs is None else [like.inputs]
    steps = 0
    for i, block in enumerate(blocks):
        name = f"window[{i}]"
        if not isinstance(block, dict) or set(block) != set(structure):
            raise ValueError(f"state's {name} must be a dict of {sorted(structure)}, got {_shown(block)}")
        own = with_held if like.weights is not None and _same(block["keys"], keys_held) else like
        if own is like and not _same(block["keys"], structure["keys"]):
            raise ValueError(
                f"state's {name} must have the partials of the learner's layer, {structure['keys']}, got "
                f"{_shown(block['keys'])}"
            )
        has = _list(f"{name}['has']", block["has"])
        if len(has) != 2 or type(has[0]) is not bool or not _same(has[1], bool(inputs)):
            raise ValueError(
                f"state's {name}['has'] must be [True or False, {bool(inputs)}], got {_shown(has)}"
            )
        given = _list(f"{name}['tensors']", block["tensors"])
        want = [like.m, like.lin.before, *_partials(own), *([resets] if has[0] else []), *inputs]
        if len(given) != len(want):
            raise ValueError(f"state's {name}['tensors'] must be {len(want)} tensors, got {len(given)}")
        first = given[0]
        if not isinstance(first, Tensor) or first.dim() != like.m.dim() or first.shape[TIME] < 1:
            raise ValueError(f"state's {name} must hold at least one step, got {_shown(first)}")
        for j, (got, one) in enumerate(zip(given, want, strict=True)):
            _tensor(f"{name}['tensors'][{j}]", got, one, steps=first.shape[TIME])
        _check_weights(f"{name}['weights']", block["weights"], like.weights)
        steps += first.shape[TIME]
    return steps


def _partials(block: Block) -> list[Tensor]:
    p = block.lin.partials
    return [value for group in (p.own, p.gate, p.input) for by in group for value in by.values()]


def _check_weights(name: str, weights: object, own: Sequence[Tensor] | None) -> None:
    if own is None:
        if weights is not None:
            raise ValueError(f"state's {name} must be None, got {_shown(weights)}")
        return
    given = _list(name, weights)
    if len(given) != len(own):
        raise ValueError(f"state's {name} must be {len(own)} tensors, got {len(given)}")
    for i, (got, want) in enumerate(zip(given, own, strict=True)):
        _tensor(f"{name}[{i}]", got, want)


def _integer(name: str, value: object, least: int, limit: int) -> int:
    if type(value) is not int:
        raise TypeError(f"state's {name} must be an int, got {type(value).__name__}")
    if not least <= value < limit:
        raise ValueError(f"state's {name} must be an int from {least} to {limit - 1}, got {_shown(value)}")
    return value


def _boolean(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise TypeError(f"state's {name} must be a bool, got {type(value).__name__}")
    return value


def _list(name: str, value: object) -> list[Any]:
    if type(value) not in (list, tuple):
        raise TypeError(f"state's {name} must be a list, got {type(value).__name__}")
    return list(value)  # type: ignore[call-overload]


def _tensor(
    name: str, value: object, want: Tensor, *, steps: int | None = None, anywhere: bool = False
) -> None:
    """Raise unless `value` is a plain tensor like `want`; with steps its dimension of time has that size."""
    name = f"state's {name}"
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    assert isinstance(value, Tensor)
    if value.layout != torch.strided or value.is_mkldnn or value._is_zerotensor():
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    shape = list(want.shape)
    if steps is not None:
        shape[TIME] = steps
    check.shape(name, value, tuple(shape))
    if value.dtype != want.dtype:
        raise TypeError(f"{name} must have the dtype of the learner, {want.dtype}, got {value.dtype}")
    if value.device != want.device and (not anywhere or value.is_meta):
        raise ValueError(f"{name} must be on the device of the learner, {want.device}, got {value.device}")
    if value.numel():
        last = value.storage_offset() + sum(
            (size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        if value.untyped_storage().nbytes() < (last + 1) * value.element_size():
            raise ValueError(f"{name} must have memory for its numbers, got too little")


def _same(got: object, want: object) -> bool:
    """Whether two values of numbers, strings and lists are equal, in their types too; a tuple counts as a list."""
    if isinstance(want, (list, tuple)):
        if type(got) not in (list, tuple) or len(got) != len(want):  # type: ignore[arg-type]
            return False
        return all(_same(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[call-overload]
    return type(got) is type(want) and got == want


def _shown(value: object, levels: int = 3) -> str:
    """A value for a message: itself if short, else its type. levels: of lists in lists, which may hold themselves."""
    if isinstance(value, (str, bool, float, type(None))) or (type(value) is int and abs(value) < LARGEST):
        shown = repr(value)
    elif levels and type(value) in (list, tuple) and len(value) <= 8:  # type: ignore[arg-type]
        shown = "[" + ", ".join(_shown(each, levels - 1) for each in value) + "]"  # type: ignore[attr-defined]
    else:
        shown = type(value).__name__
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
