"""A step or backward() that fails half-way, as where memory ends: the learner is as it was before, or says that it isn't.

Failures are injected where torch allocates: the k-th operator that makes a new tensor raises, for every k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_learner import LEARNERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rjepa_triton import ELSTM, LSTM, RGC, OnlineLearner, TwoPointRNN

LAYERS: dict[str, Callable[[], TwoPointRNN]] = {
    "lstm": lambda: LSTM(3, 4),  # three groups of weights
    "rgc": lambda: RGC(3, init="uniform"),  # one
    "elstm": lambda: ELSTM(3, 4),  # with a readout
}
OPTIONS = {**LEARNERS, "lr": {"form": "step", "lr": 0.1}, "torch": {"form": "step", "backend": "torch"}}
TOLD = "failed while it advanced the sensitivities \\((OutOfMemoryError|KeyboardInterrupt)"


class Failing(TorchDispatchMode):
    """The k-th operator that allocates raises; there are `count` of them."""

    def __init__(self, k: int, error: BaseException) -> None:
        super().__init__()
        self.k, self.error, self.count = k, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makes = any(made.alias_info is None for made in func._schema.returns)
        if makes and func is not torch.ops.aten.detach.default:
            self.count += 1
            if self.count == self.k:
                raise self.error
        return func(*args, **(kwargs or {}))


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


def begun(layer: str, options: dict[str, Any], steps: int) -> tuple[OnlineLearner, Tensor]:
    torch.manual_seed(0)
    learner = OnlineLearner(LAYERS[layer](), 2, nonfinite="ignore", **options)
    x = torch.randn(12, 2, 3)
    for t in range(steps):
        every = learner.update_every
        loss = learner(x[t]).square().sum()
        if options.get("lag"):
            loss.backward(retain_graph=True)
        elif every == 1 or (t + 1) % every == 0:
            loss.backward()
    learner.layer.zero_grad()
    return learner, x


def everything(learner: OnlineLearner) -> list[Any]:
    return [copy.deepcopy(learner.state_dict()), [p.detach().clone() for p in learner.parameters()]]


MEMORY = torch.OutOfMemoryError("injected")
# Each rule and form with one layer, and some with the others, and with Ctrl-C.
SOME = ("step", "chunk", "carry")
CASES = [
    *(("lstm", options, MEMORY) for options in OPTIONS),
    *((layer, options, MEMORY) for layer in ("rgc", "elstm") for options in (*SOME, "rtrl")),
    *(("lstm", options, KeyboardInterrupt()) for options in SOME),
]
by_case = pytest.mark.parametrize(
    ("layer", "options", "error"),
    CASES,
    ids=[f"{one}-{two}-{type(error).__name__}" for one, two, error in CASES],
)


@by_case
@pytest.mark.parametrize("call", ["step", "chunk"])
def test_a_step_that_fails_leaves_the_learner_as_it_was(
    layer: str, options: str, call: str, error: BaseException
) -> None:
    every = OPTIONS[options].get("update_every", 1)
    learner, x = begun(layer, OPTIONS[options], 2 * every)

    def run(learner: OnlineLearner) -> Tensor:
        return learner(x[6]) if call == "step" else learner.chunk(x[6:8])

    undisturbed = copy.deepcopy(learner)
    want = run(undisturbed).detach()
    before, after, k, told = copy.deepcopy(learner.state_dict()), everything(undisturbed), 0, 0
    while True:
        k += 1
        failing = Failing(k, error)
        try:
            with failing:
                output = run(learner)
            break
        except type(error):
            if options == "lag" and learner._past.broken:  # a step folds what no later loss may reach
                told += 1
                learner.load_state_dict(before)
            again = copy.deepcopy(learner)
            assert torch.equal(run(again), want), k
            assert alike(everything(again), after), k
    assert k > 3
    assert torch.equal(output, want)
    assert told or options != "lag"
    output.square().sum().backward()


@by_case
def test_a_backward_that_fails_is_whole_or_is_told(layer: str, options: str, error: BaseException) -> None:
    """What is carried is as it was before, or as it is afterwards, or every call says that it is neither."""
    every = OPTIONS[options].get("update_every", 1)

    def begin() -> tuple[OnlineLearner, Tensor, Tensor]:
        learner, x = begun(layer, OPTIONS[options], 2 * every)
        loss = sum((learner(x[6 + t]).square().sum() for t in range(every)), torch.zeros(()))
        return learner, x, loss

    learner, x, loss = begin()
    loss.backward()
    done = everything(learner)
    k = told = 0
    while True:
        k += 1
        learner, x, loss = begin()
        before = everything(learner)
        failing = Failing(k, error)
        try:
            with failing:
                loss.backward()
            break
        except type(error):
            pass
        if not learner._past.broken:
            after = everything(learner)
            assert alike(after, before) or alike(after, done), k
            learner(x[9])
            continue
        told += 1
        learner.reset(torch.tensor([True, False]))  # of some rows, which mends nothing
        for call in ("forward", "chunk", "state_dict"):
            with pytest.raises(RuntimeError, match=TOLD):
                getattr(learner, call)(*{"forward": (x[9],), "chunk": (x[9:11],), "state_dict": ()}[call])
        _mend(learner, before[0], told)
        learner(x[9]).square().sum().backward()
    assert k > 5
    if layer == "lstm" and options in ("step", "rtrl", "uoro", "lr", "torch"):
        assert told


def _mend(learner: OnlineLearner, before: dict[str, Any], way: int) -> None:
    """One of three ways in turn, each checked against a new learner that goes the same way."""
    if way % 3 == 0:
        learner.reset()
        assert not any(tensor.any() for tensor in learner._sensitivities())
        assert not any(state.any() for state in learner.state)
    elif way % 3 == 1:
        learner.load_state_dict(before)
        assert alike(copy.deepcopy(learner.state_dict()), before)
    else:
        learner.state = learner.state


def test_a_resumed_learner_isnt_broken_by_a_wrong_state() -> None:
    for k in range(1, 100):
        learner, x = begun("lstm", {"form": "step"}, 2)
        state = copy.deepcopy(learner.state_dict())
        loss = learner(x[6]).square().sum()
        with pytest.raises(torch.OutOfMemoryError), Failing(k, MEMORY):
            loss.backward()
        if learner._past.broken:
            break
    with pytest.raises(ValueError, match="state's batch_size"):
        learner.load_state_dict({**state, "batch_size": 3})
    with pytest.raises(RuntimeError, match=TOLD):
        learner(x[7])
    learner.load_state_dict(state)
    learner(x[7]).sum().backward()
