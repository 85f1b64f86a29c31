"""Learners under torch.compile: each is itself, whatever is compiled, copied or pickled before."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rjepa_triton import LSTM, RGC, OnlineLearner, Stack, StackLearner

F64 = torch.float64

OPTIONS: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "lazy", "rewrite_every": 4},
    {"form": "history"},
    {"form": "chunk", "update_every": 3},
    {"credit": "carry", "update_every": 3},
    {"refine": 2, "update_every": 3},
    {"learning": "rtrl"},
    {"learning": "uoro"},
    {"learning": "tbptt", "update_every": 3},
    {"lag": 1, "form": "step"},
]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def advance(learner: OnlineLearner, x: Tensor) -> Tensor:
    return learner.chunk(x)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def gradients(learner: OnlineLearner) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.layer.parameters()]


def test_one_graph_serves_any_number_of_learners() -> None:
    layers = [LSTM(3, 5, dtype=F64) for _ in range(4)]
    learners = [OnlineLearner(layer, 2) for layer in layers]
    twins = [OnlineLearner(copy.deepcopy(layer), 2) for layer in layers]
    run = compiled(advance)
    for _ in range(2):
        for learner, twin in zip(learners, twins, strict=True):
            x = torch.randn(3, 2, 3, dtype=F64)
            run(learner, x).square().sum().backward()
            twin.chunk(x).square().sum().backward()
    for learner, twin in zip(learners, twins, strict=True):
        torch.testing.assert_close(gradients(learner), gradients(twin), rtol=0, atol=1e-12)
    assert graphs() == 1


def test_each_learner_compiled_for_itself() -> None:
    learners = [OnlineLearner(RGC(4, init="uniform"), 2) for _ in range(4)]
    for learner in learners:
        compiled(learner.step)(torch.randn(2, 4)).sum().backward()
    assert [learner._past.now for learner in learners] == [1] * 4
    assert graphs() == 1


def test_two_learners_in_one_graph() -> None:
    """A learner that trains and one that is evaluated, of one layer; an actor and a critic."""
    layer = RGC(4, init="uniform", dtype=F64)
    train, evaluate = (OnlineLearner(layer, 2) for _ in range(2))
    x = torch.randn(2, 4, dtype=F64)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        train.step(x)
        return train.step(x), evaluate.step(x)

    second, first = compiled(both)(x)
    again = OnlineLearner(layer, 2)
    torch.testing.assert_close(first, again.step(x))
    torch.testing.assert_close(second, again.step(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_learner_of_its_own(options: dict[str, Any], how: str) -> None:
    learner = OnlineLearner(LSTM(3, 5, dtype=F64), 2, **options)
    x = torch.randn(8, 2, 3, dtype=F64)
    for row in x[:4]:  # ends in the middle of a chunk
        learner.step(row.clone().requires_grad_())
    learner.reset(torch.tensor([True, False]))
    other = copy.deepcopy(learner) if how == "deepcopy" else pickle.loads(pickle.dumps(learner))
    assert other.layer is not learner.layer
    assert other.number != learner.number
    kept = {name: value for name, value in learner.state_dict().items() if isinstance(value, int)}
    run = compiled(advance) if options in (OPTIONS[0], OPTIONS[4]) else advance
    run(other, x[4:7]).square().sum().backward()
    assert {name: learner.state_dict()[name] for name in kept} == kept
    assert all(p.grad is None for p in learner.layer.parameters())
    run(learner, x[4:7]).square().sum().backward()
    torch.testing.assert_close(gradients(other), gradients(learner), rtol=0, atol=1e-12)
    torch.testing.assert_close(other.state, learner.state, rtol=0, atol=1e-12)


def test_a_copy_of_a_module_that_holds_a_learner() -> None:
    layer = RGC(4, init="uniform")
    layer.learner = OnlineLearner(layer, 2, form="chunk", update_every=2)  # type: ignore[assignment]
    layer.learner.step(torch.randn(2, 4))
    twin = copy.deepcopy(layer)
    assert twin.learner.layer is twin
    twin.learner.step(torch.randn(2, 4)).sum().backward()  # in the middle of a chunk: no weight has changed
    assert layer.weight_ss.grad is None
    assert twin.weight_ss.grad is not None


def test_a_shallow_copy_is_refused() -> None:
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(OnlineLearner(RGC(4), 2))


def test_a_learner_that_is_gone() -> None:
    layer = RGC(4, init="uniform")
    learner = OnlineLearner(layer, 2)
    run = compiled(lambda learner, x: learner.step(x))
    loss = run(learner, torch.randn(2, 4)).sum()
    del learner
    gc.collect()
    with pytest.raises(RuntimeError, match="the OnlineLearner of a compiled step is gone: keep it until"):
        loss.backward()


def test_a_step_before_a_checkpoint_was_loaded_is_refused() -> None:
    """Though the step after it has the same time."""
    learner = OnlineLearner(RGC(4, init="uniform"), 2)
    run = compiled(lambda x: learner.step(x))
    saved = copy.deepcopy(learner.state_dict())
    late = run(torch.randn(2, 4)).sum()
    learner.load_state_dict(saved)
    run(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="comes too late"):
        late.backward()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[7]], ids=str)
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])], ids=str)
def test_resets_and_states_in_a_compiled_function(options: dict[str, Any], mask: Tensor | None) -> None:
    results = []
    x = torch.randn(9, 2, 3, dtype=F64)
    layer = LSTM(3, 5, dtype=F64)
    for wrap in (compiled, lambda function: function):
        learner = OnlineLearner(layer, 2, **options)
        layer.zero_grad()

        def episode(learner: OnlineLearner, x: Tensor) -> tuple[Tensor, ...]:
            before = learner.state
            learner.reset(mask)
            after = learner.state
            output = learner.chunk(x)
            return output, *before, *after, *learner.state

        run = wrap(episode)
        found = []
        for start in (0, 3, 6):
            output, *states = run(learner, x[start : start + 3])
            output.square().sum().backward()
            found += [output.detach(), *states]
        results.append([*found, *gradients(learner)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_a_stack_in_a_compiled_function() -> None:
    stack = Stack(LSTM(3, 5, dtype=F64), RGC(5, init="uniform", dtype=F64))
    x, done = torch.randn(6, 2, 3, dtype=F64), torch.tensor([False, True])
    results = []
    for wrap in (compiled, lambda function: function):
        learner = StackLearner(stack, 2)
        stack.zero_grad()

        def step(learner: StackLearner, x: Tensor) -> tuple[Tensor, Any]:
            learner.reset(done)
            return learner.step(x), learner.state

        run = wrap(step)
        for row in x:
            output, states = run(learner, row)
            output.square().sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stack.parameters()]
        results.append([output.detach(), *(v for of in states for v in of), *gradients])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_states_are_copies() -> None:
    learner = OnlineLearner(RGC(4, init="uniform"), 2)
    learner.step(torch.randn(2, 4))
    kept = [state.clone() for state in learner.state]
    learner.state[0].zero_()
    torch.testing.assert_close(learner.state, tuple(kept))
    for state in learner.state:
        assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda learner: learner.nbytes, "nbytes can't go under torch.compile"),
        (lambda learner: learner.state_dict(), "state_dict\\(\\) can't go under torch.compile"),
        (lambda learner: learner.load_state_dict({}), "load_state_dict\\(\\) can't go under torch.compile"),
        (lambda learner: OnlineLearner(learner.layer, 2), "can't go under torch.compile: make the learner"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(
    use: Callable[[OnlineLearner], object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = OnlineLearner(RGC(4), 2)
    with pytest.raises(Exception, match="Observed exception"):
        compiled(lambda x: (learner.step(x), use(learner)))(torch.randn(2, 4))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=says):
        use(learner)


def test_a_state_of_another_number_of_tensors_cannot_be_set() -> None:
    learner = OnlineLearner(RGC(4), 2)
    with pytest.raises(ValueError, match=r"state must be \(s, m\), got 1 entries"):
        learner.state = (torch.zeros(2, 4),)
