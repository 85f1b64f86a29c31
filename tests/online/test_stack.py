"""Stacks on sequences and online, against plain loops under autograd."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import GRU, LSTM, RGC, IndRNN, OnlineLearner, Stack, StackLearner, TimeDecay

F64 = torch.float64


def make(**options: Any) -> Stack:
    return Stack(
        LSTM(3, 5, dtype=F64, **options),
        GRU(5, 4, dtype=F64, **options),
        RGC(4, init="uniform", dtype=F64, **options),
    )


def grads(stack: Stack) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in stack.parameters()]


def test_a_sequence_by_bptt_is_autograd_of_torchs_layers() -> None:
    lstm, gru = torch.nn.LSTM(3, 5, dtype=F64), torch.nn.GRU(5, 4, dtype=F64)
    stack = Stack(LSTM(3, 5, dtype=F64, learning="bptt"), GRU(5, 4, dtype=F64, learning="bptt"))
    stack[0].load_state_dict(lstm.state_dict())
    stack[1].load_state_dict(gru.state_dict())
    x = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
    output, state = stack(x)
    want = gru(lstm(x)[0])[0]
    torch.testing.assert_close(output, want)
    torch.testing.assert_close(state[1], want[-1])
    delta = torch.randn_like(want)
    got = torch.autograd.grad((output * delta).sum(), [x, stack[0].weight_hi])
    exact = torch.autograd.grad((want * delta).sum(), [x, lstm.weight_hh_l0])
    assert oracle.relative(got, [exact[0], exact[1][:5]]) < 1e-12


def test_state_goes_on() -> None:
    stack = make()
    x = torch.randn(7, 2, 3, dtype=F64)
    whole, _ = stack(x)
    head, state = stack(x[:3])
    torch.testing.assert_close(torch.cat([head, stack(x[3:], state)[0]]), whole)


def instantaneous(stack: Stack, x: Tensor, delta: Tensor) -> list[Tensor]:
    """Each layer's exact gradient given its inputs, from what the layers above pass down at the same step alone."""
    inputs = [x]
    with torch.no_grad():
        for layer in stack.layers:
            inputs.append(layer(inputs[-1])[0])
    passed, found = delta, []
    for i in reversed(range(len(stack))):
        layer = stack[i]
        layer.zero_grad()
        layer(inputs[i])[0].backward(passed)
        found = [p.grad for p in layer.parameters()] + found
        down = []
        for t in range(x.shape[0]):
            state = None if t == 0 else layer(inputs[i][:t])[1]
            here = inputs[i][t : t + 1].detach().clone().requires_grad_()
            state = tuple(v.detach() for v in state) if isinstance(state, tuple) else state
            down.append(torch.autograd.grad(layer(here, state)[0], here, passed[t : t + 1])[0])
        passed = torch.cat(down)
    return found


def test_online_each_layer_learns_from_what_passes_down_at_the_step() -> None:
    stack = make(learning="rtrl")
    x, delta = torch.randn(6, 2, 3, dtype=F64), torch.randn(6, 2, 4, dtype=F64)
    for each in stack.layers:
        each.learning = "bptt"
    want = [g.clone() for g in instantaneous(stack, x, delta)]
    stack.zero_grad()
    learner = StackLearner(stack, 2, learning="rtrl")
    for t in range(6):
        (learner.step(x[t]) * delta[t]).sum().backward()
    assert oracle.relative(grads(stack), want) < 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"form": "lazy", "rewrite_every": 4}, {"form": "history"}, {"learning": "eprop"}], ids=str
)
def test_forms_agree_step_by_step(options: dict[str, Any]) -> None:
    stack = make()
    x, delta = torch.randn(6, 2, 3, dtype=F64), torch.randn(6, 2, 4, dtype=F64)
    found = []
    for each in ({"form": "step", **options}, options):
        stack.zero_grad()
        learner = StackLearner(stack, 2, **each)
        for t in range(6):
            (learner.step(x[t]) * delta[t]).sum().backward()
        found.append([g.clone() for g in grads(stack)])
    assert oracle.relative(*found) < 1e-12


def test_layers_may_have_options_of_their_own() -> None:
    learner = StackLearner(make(), 2, each=[{"learning": "rtrl"}, {}, {"learning": "uoro"}])
    assert [each.learning for each in learner.learners] == ["rtrl", "rfp", "uoro"]
    assert "layer 2: not exact: learning='uoro'" in str(learner.exactness())


def test_exactness_of_a_stack() -> None:
    one = Stack(IndRNN(3, 4))
    assert StackLearner(one, 1).exactness()
    two = Stack(IndRNN(3, 4), TimeDecay(4, 5))
    assert not StackLearner(two, 1).exactness()
    assert all(layer.exactness() for layer in two.layers)


def test_one_layer_is_an_online_learner() -> None:
    stack = Stack(RGC(4, init="uniform", dtype=F64))
    x = torch.randn(5, 2, 4, dtype=F64)
    learner, alone = StackLearner(stack, 2), OnlineLearner(stack[0], 2)
    for t in range(5):
        torch.testing.assert_close(learner.step(x[t]), alone.step(x[t]))
    assert learner.nbytes == alone.nbytes


def test_reset_and_resume() -> None:
    stack = make()
    x = torch.randn(8, 2, 3, dtype=F64)

    def run(learner: StackLearner, steps: range) -> list[Tensor]:
        stack.zero_grad()
        for t in steps:
            if t == 5:
                learner.reset(torch.tensor([True, False]))
            learner.step(x[t]).square().sum().backward()
        return [g.clone() for g in grads(stack)]

    whole = StackLearner(stack, 2)
    run(whole, range(4))
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    want = run(whole, range(4, 8))
    saved.seek(0)
    resumed = StackLearner(stack, 2)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert oracle.relative(run(resumed, range(4, 8)), want) < 1e-12
    assert [len(states) for states in resumed.state] == [2, 1, 2]


class Model(nn.Module):
    """A module that holds a stack's learner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.learner, self.readout = StackLearner(make(), 2), nn.Linear(4, 1, dtype=F64)

    def learned(self, steps: int) -> list[Tensor]:
        made = torch.Generator().manual_seed(steps)
        dtype = self.readout.weight.dtype
        self.zero_grad()
        for _ in range(steps):
            x = torch.randn(2, 3, generator=made, dtype=F64).to(dtype)
            self.readout(self.learner(x)).square().sum().backward()
        return [p.grad.clone() for p in self.parameters() if p.grad is not None]


def test_it_is_a_module_of_its_layers() -> None:
    learner = StackLearner(make(), 2)
    names = [name for name, _ in learner.named_parameters()]
    assert names[0] == "learners.0.layer.weight_hi"
    assert len(names) == len(list(make().parameters()))
    assert [each.layer for each in learner.learners] == [m for m in learner.modules() if hasattr(m, "cell")]
    assert sum(buffer.nbytes for buffer in learner.buffers()) <= learner.nbytes
    assert repr(learner).count("OnlineLearner(") == 3
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(learner)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "whole", "own"])
def test_copies_and_checkpoints_go_on(how: str) -> None:
    model = Model()
    model.learned(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    twin = Model()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "state_dict":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin.load_state_dict(model.state_dict())
        twin.learner.reset()
        whole = {
            k.removeprefix("learner."): v for k, v in model.state_dict().items() if k.startswith("learner.")
        }
        twin.learner.load_state_dict(copy.deepcopy(whole if how == "whole" else model.learner.state_dict()))
    for a, b in zip(model.learned(3), twin.learned(3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_move_takes_all_layers_or_none() -> None:
    model = Model()
    model.learned(3)
    model.float()
    assert all(t.dtype == torch.float32 for t in [*model.learner.buffers(), *model.parameters()])
    assert model.learned(2)[0].dtype == torch.float32
    with pytest.raises(TypeError, match="an OnlineLearner runs in float64 or float32"):
        model.learner.half()
    assert all(t.dtype == torch.float32 for t in [*model.learner.buffers(), *model.parameters()])
    model.learned(2)


def test_eval_peek_and_a_state_that_is_set() -> None:
    learner, x = StackLearner(make(), 2), torch.randn(4, 2, 3, dtype=F64)
    learner(x[0]).sum().backward()
    seen = learner.peek(x[1])
    torch.testing.assert_close(learner(x[1]), seen)
    learner.eval()
    assert not any(each.training or each.layer.training for each in learner.learners)
    stack = Stack(*(each.layer for each in learner.learners))
    want, _ = stack(x[2:], [of if len(of) > 1 else of[0] for of in learner.state])
    acted = torch.stack([learner(x[2]), learner(x[3])])
    torch.testing.assert_close(acted, want.detach())
    twin = StackLearner(stack, 2)
    twin.state = learner.train().state
    torch.testing.assert_close(twin(x[0]), learner(x[0]))
    before = twin.state
    bad = [tuple(2 * v for v in before[0]), before[1], before[0]]
    for state, words in ((bad, "state's"), (before[:2], "state must have one entry a layer, 3, got 2")):
        with pytest.raises((TypeError, ValueError), match=words):
            twin.state = state
    torch.testing.assert_close(twin.state, before, rtol=0, atol=0)


def test_rows_come_and_go_and_are_held_in_all_layers() -> None:
    stack = make()
    learner, x = StackLearner(stack, 2), torch.randn(6, 3, 3, dtype=F64)
    own = [StackLearner(copy.deepcopy(stack), 1) for _ in range(3)]

    def step(t: int, rows: list[int], active: list[bool]) -> None:
        mask = torch.tensor(active)
        (learner(x[t, rows], mask).square() * mask[:, None]).sum().backward()
        for row, moves in zip(rows, active, strict=True):
            if moves:
                own[row](x[t, row : row + 1]).square().sum().backward()

    step(0, [0, 1], [True, True])
    step(1, [0, 1], [False, True])
    learner.add_rows()
    step(2, [0, 1, 2], [True, True, True])
    learner.remove_rows(torch.tensor([False, True, False]))
    step(3, [0, 2], [True, True])
    step(4, [0, 2], [True, False])
    assert learner.batch_size == 2
    want = [sum(each) for each in zip(*(grads_of(one) for one in own), strict=True)]
    assert oracle.relative(grads_of(learner), want) < 1e-12
    uneven = StackLearner(make(), 2, each=[{}, {}, {"update_every": 2}])
    uneven(x[0, :2])
    with pytest.raises(ValueError, match="after step 1 of update_every=2"):
        uneven.add_rows()
    assert [each.batch_size for each in uneven.learners] == [2, 2, 2]


def grads_of(learner: StackLearner) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]


def test_a_foreign_state_changes_nothing() -> None:
    learner = StackLearner(make(), 2)
    learner.step(torch.randn(2, 3, dtype=F64))
    before = [value.clone() for states in learner.state for value in states]
    foreign = StackLearner(make(), 2, each=[{}, {}, {"learning": "rtrl"}]).state_dict()
    with pytest.raises(ValueError, match="state's learning must be the learner's, 'rfp', got 'rtrl'"):
        learner.load_state_dict(foreign)
    assert all(torch.equal(a, b) for a, b in zip(before, [v for s in learner.state for v in s], strict=True))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: Stack(), ValueError, "layers must be at least one recurrent layer, got none"),
        (lambda: Stack(torch.nn.LSTM(3, 4)), TypeError, r"layers\[0\] must be a recurrent layer such as RGC, got LSTM"),
        (lambda: Stack(LSTM(3, 4), GRU(5, 4)), ValueError, r"layers\[1\] must take the 4 units of the layer below, got 5 features"),
        (lambda: Stack(LSTM(3, 4), GRU(4, 4, batch_first=True)), ValueError, r"layers\[1\] must have batch_first=False"),
        (lambda: make()(torch.zeros(2, 1, 3, dtype=F64), [None]), ValueError, "state must have one entry a layer, 3, got 1"),
        (lambda: StackLearner(LSTM(3, 4), 2), TypeError, "stack must be a Stack, got LSTM"),
        (lambda: StackLearner(make(), 2, each=[{}]), ValueError, "each must have one dict a layer, 3, got 1"),
        (lambda: StackLearner(make(), 2).load_state_dict({}), ValueError, r"state must have the keys \['layer 0'"),
        (lambda: StackLearner(make(), 2).load_state_dict([]), TypeError, "state must be a dict"),
    ],
)  # fmt: skip
def test_bad_input_is_named(build: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()
