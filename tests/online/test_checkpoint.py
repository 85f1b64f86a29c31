"""A learner's state: what is damaged or of another learner is refused whole, with nothing changed; older states load."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from states import requiring_gradients, same
from torch import Tensor, nn

from rjepa_triton import CTRNN, LRU, LSTM, RGC, RNN, OnlineLearner, Stack, StackLearner
from rjepa_triton.online import checkpoint

F64 = torch.float64

OPTIONS: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "lazy", "rewrite_every": 4},
    {"form": "lazy", "update_every": 4, "rewrite_every": 2},
    {"form": "history", "update_every": 4},
    {"form": "chunk", "update_every": 4},
    {"credit": "carry", "update_every": 4},
    {"learning": "rtrl"},
    {"learning": "uoro"},
    {"learning": "tbptt", "update_every": 4},
    {"form": "step", "lag": 1},
    {"form": "step", "gamma_dtype": torch.bfloat16, "gamma_rounding": "stochastic"},
]


def midway(options: dict[str, Any], layer: Any = None, steps: int = 3) -> OnlineLearner:
    """A learner in the middle of a stream, with rows to forget."""
    learner = OnlineLearner(LSTM(3, 4) if layer is None else layer, 2, **options)
    for _ in range(steps):
        learner.step(torch.randn(2, 3, dtype=learner.layer.weights()[0].dtype))
    learner.reset(torch.tensor([True, False]))
    return learner


def older(state: dict[str, Any]) -> dict[str, Any]:
    """A state as version 0.1 wrote it."""
    return {name: value for name, value in state.items() if name not in ("version", "layer", "update_every")}


def emptied(tensor: Tensor) -> Tensor:
    """A tensor whose memory is gone."""
    made = tensor.clone()
    made.untyped_storage().resize_(0)
    return made


class Odd:
    """Nothing that a state holds."""


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 5, 2**62, 2**70, 1.5, float("nan"), "", "step", "rfp", [], {}, (), [[]], {1: 2},
    Odd(), torch.tensor(3), torch.tensor(True), torch.zeros(0), torch.ones(2, 4), torch.ones(2, dtype=torch.bool), [0],
    b"x", [torch.zeros(2, 2, 4)],
]  # fmt: skip
OF_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda t: t[None],
    lambda t: t.reshape(-1)[:0],
    lambda t: t.reshape(-1),
    lambda t: t.flatten()[:1].reshape(()),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.flatten()[:1].expand(t.shape),
    lambda t: t.T if t.dim() == 2 else t.reshape(-1, 1),
    lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    lambda t: t.tolist(),
    lambda t: t.numpy() if t.dtype != torch.bfloat16 else t,
    lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else ~t,
    lambda t: torch._efficientzerotensor(tuple(t.shape), dtype=t.dtype),
    emptied,
]


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of a state lies."""
    found = [here] if here else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += paths(part, (*here, key))
    return found


@functools.cache
def learners() -> list[tuple[OnlineLearner, dict[str, Any]]]:
    made = [midway(options) for options in OPTIONS]
    return [(learner, copy.deepcopy(learner.state_dict())) for learner in made]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tensors_of_a_state_may_require_gradients(options: dict[str, Any]) -> None:
    """As those have that a caller computed from a state's: what the learner carries doesn't."""
    first = midway(options)
    second = OnlineLearner(copy.deepcopy(first.layer), 2, **options)
    second.load_state_dict(requiring_gradients(first.state_dict()))
    for x in torch.randn(6, 2, 3):
        assert torch.equal(first.step(x), second.step(x))
    assert not any(tensor.requires_grad for tensor in second.buffers())


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_states_change_nothing(data: st.DataObject) -> None:
    learner, whole = learners()[data.draw(st.integers(0, len(OPTIONS) - 1))]
    state = copy.deepcopy(whole)
    if data.draw(st.booleans()):
        state = older(state)
    for _ in range(data.draw(st.integers(1, 2))):
        damage(state, data)
    try:
        learner.load_state_dict(state)
    except (TypeError, ValueError):
        assert same(learner.state_dict(), whole)
        return
    try:  # it is a state that may be: the learner runs on
        for _ in range(5):
            learner.step(torch.randn(2, 3)).sum().backward()
        learner.chunk(torch.randn(3, 2, 3)).sum().backward()
    finally:
        learner.load_state_dict(whole)


def damage(state: dict[str, Any], data: st.DataObject) -> None:
    *way, last = data.draw(st.sampled_from(paths(state)))
    holder: Any = state
    for key in way:
        holder = holder[key]
    value = holder[last]
    kind = data.draw(st.sampled_from(["junk", "own", "own", "remove", "add"]))
    whole = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
    if kind == "own" and whole and value.numel() and value.dim() and value.untyped_storage().nbytes():
        # what an earlier damage has left may be neither listed nor given to numpy
        plain = value.detach().resolve_neg()
        plain = torch.zeros(value.shape, dtype=value.dtype) if value._is_zerotensor() else plain
        holder[last] = data.draw(st.sampled_from(OF_TENSORS))(plain)
    elif kind == "own" and type(value) is int and abs(value) < 1 << 62:
        holder[last] = data.draw(
            st.sampled_from([value + 1, value - 1, -value, torch.tensor(value), str(value)])
        )
    elif kind == "own" and isinstance(value, list) and value:
        holder[last] = data.draw(st.sampled_from([value[:-1], value + value[-1:], value[::-1], tuple(value)]))
    elif kind == "remove":
        del holder[last]
    elif kind == "add":
        if isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["more", 1, None]))] = 0
        else:
            holder.insert(last, copy.deepcopy(data.draw(st.sampled_from(JUNK))))
    else:  # a copy, which the next damage may change
        holder[last] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("old", [False, True])
def test_a_state_loads_in_every_form(options: dict[str, Any], old: bool) -> None:
    learner = midway(options)
    state = copy.deepcopy(learner.state_dict())
    other = OnlineLearner(learner.layer, 2, **options)
    other.load_state_dict(older(state) if old else state)
    assert same(other.state_dict(), learner.state_dict())


def test_a_loaded_state_is_a_copy() -> None:
    learner = midway({"credit": "carry", "update_every": 4})
    state = copy.deepcopy(learner.state_dict())
    kept = copy.deepcopy(state)
    learner.load_state_dict(state)
    state["window"][0]["weights"][0].zero_()
    state["state"].zero_()
    assert same(learner.state_dict(), kept)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (lambda: RNN(3, 4), lambda: CTRNN(3, 4, 0.5)),
        (lambda: CTRNN(3, 4, 0.5), lambda: RNN(3, 4)),
        (lambda: LSTM(3, 4), lambda: LSTM(3, 4, heads=2)),
        (lambda: RGC(4, input_size=3), lambda: RGC(4, input_size=3, bias=False)),
        (lambda: RGC(4, input_size=3), lambda: LRU(3, 4)),
    ],
)
@pytest.mark.parametrize("form", ["step", "history"])
def test_a_state_of_another_layer_is_refused(mine: Any, theirs: Any, form: str) -> None:
    learner = midway({"form": form}, mine())
    kept = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match="state's layer must be the learner's"):
        learner.load_state_dict(midway({"form": form}, theirs()).state_dict())
    assert same(learner.state_dict(), kept)


def test_an_older_history_of_another_layer_is_refused() -> None:
    learner = midway({"form": "history"}, LSTM(3, 4))
    foreign = older(midway({"form": "history"}, RGC(4, input_size=3)).state_dict())
    with pytest.raises(ValueError, match="must have the partials of the learner's layer"):
        learner.load_state_dict(foreign)


@pytest.mark.parametrize("form", ["chunk", "lazy", "history"])
def test_update_every_may_change_between_updates_only(form: str) -> None:
    layer = LSTM(3, 4)
    eight, four = ({"form": form, "update_every": every} for every in (8, 4))
    learner = OnlineLearner(layer, 2, **four)
    with pytest.raises(ValueError, match=r"update_every must be the learner's, 4, .* got 8 at position 3"):
        learner.load_state_dict(midway(eight, layer).state_dict())
    with pytest.raises(ValueError, match="position must be an int from 0 to 3, got 5"):
        learner.load_state_dict(older(midway(eight, layer, 5).state_dict()))
    learner.load_state_dict(midway(eight, layer, 8).state_dict())


def test_numbers_are_not_tensors() -> None:
    """In form "lazy" compiled code once ran over no steps for these."""
    learner = midway({"form": "lazy", "rewrite_every": 4})
    state = learner.state_dict()
    for name in ("now", "base", "episode", "position"):
        with pytest.raises(TypeError, match=f"state's {name} must be an int, got Tensor"):
            learner.load_state_dict({**state, name: torch.tensor(state[name])})


@pytest.mark.parametrize("name", ["form", "layer", "now", "window", "version"])
def test_a_list_that_holds_itself_is_refused(name: str) -> None:
    learner = midway({"form": "chunk", "update_every": 4})
    kept = copy.deepcopy(learner.state_dict())
    endless: list[Any] = [1]
    endless.append(endless)
    with pytest.raises((TypeError, ValueError), match=f"state's {name}"):
        learner.load_state_dict({**kept, name: endless})
    assert same(learner.state_dict(), kept)


def test_a_state_of_a_later_version_is_refused() -> None:
    learner = midway({"form": "step"})
    with pytest.raises(ValueError, match="state's version must be 2, got 3"):
        learner.load_state_dict({**learner.state_dict(), "version": checkpoint.VERSION + 1})


def test_a_stacks_state_is_refused_whole() -> None:
    learner = StackLearner(Stack(LSTM(3, 4), RNN(4, 4)), 2)
    learner.step(torch.randn(2, 3))
    kept = copy.deepcopy(learner.state_dict())
    bad = copy.deepcopy(kept)
    bad["layer 0"]["state"] += 1
    bad["layer 1"]["now"] = -1
    with pytest.raises(ValueError, match="state's now must be an int from 0"):
        learner.load_state_dict(bad)
    with pytest.raises(ValueError, match="state must have the keys"):
        learner.load_state_dict({**kept, 1: 2})  # type: ignore[dict-item]
    assert same(learner.state_dict(), kept)


def test_a_parameter_may_stand_for_a_tensor() -> None:
    learner = midway({"form": "step"})
    state = learner.state_dict()
    learner.load_state_dict({**state, "state": nn.Parameter(state["state"])})
    assert not learner._state.requires_grad
