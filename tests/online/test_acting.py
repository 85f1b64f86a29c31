"""A learner that acts without learning, whose state is given, whose chunks end early, and whose flags are an environment's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from every_learner import LEARNERS
from torch import Tensor

from rjepa_triton import ELSTM, LRU, LSTM, RGC, OnlineLearner, TwoPointRNN

F64 = torch.float64
X = torch.randn(12, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def made(**options: Any) -> OnlineLearner:
    torch.manual_seed(1)
    return OnlineLearner(RGC(4, input_size=3, init="uniform", dtype=F64), 2, **options)


def learned(learner: OnlineLearner, xs: Tensor) -> list[Tensor]:
    """The gradients of a chunk of losses, one for each step."""
    learner.zero_grad()
    sum(learner(x).square().sum() for x in xs).backward()
    return [parameter.grad.clone() for parameter in learner.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", LEARNERS)
def test_in_eval_mode_the_state_moves_on_and_nothing_else(name: str) -> None:
    learner = made(**LEARNERS[name])
    every = learner.update_every
    learned(learner, X[:every])
    output = learner(X[3])
    learner.end_chunk()
    before, state = copy.deepcopy(learner._past.state_dict()), learner.state
    learner.eval()
    acted = torch.stack([learner(x) for x in X[4:8]])
    want, last = learner.layer(X[4:8], state)
    torch.testing.assert_close(acted, want.detach(), rtol=0, atol=0)
    torch.testing.assert_close(learner.state, tuple(value.detach() for value in last), rtol=0, atol=0)
    assert not acted.requires_grad
    after = learner._past.state_dict()
    assert (after["now"], after["base"]) == (before["now"], before["base"])
    torch.testing.assert_close(after["gamma"], before["gamma"], rtol=0, atol=0)
    output.sum().backward()  # of the last step that learned


@pytest.mark.parametrize("how", ["eval", "state", "checkpoint", "chunk"])
@pytest.mark.parametrize("name", LEARNERS)
def test_after_it_the_past_is_forgotten_and_the_state_is_not(name: str, how: str) -> None:
    learner, twin = made(**LEARNERS[name]), made(**LEARNERS[name])
    every = learner.update_every
    learned(learner, X[:every])
    if how == "state":
        learner.state = tuple(0.5 * value for value in learner.state)
    elif how == "chunk":
        learner.eval().chunk(X[4:6])
        learner.train()
    else:
        learner.reset(torch.tensor([True, False]))
        learner.eval()(X[4])
        learner.train()
    if how == "checkpoint":
        saved = copy.deepcopy(learner.state_dict())
        learner = made(**LEARNERS[name])
        learned(learner, X[:every])
        learner.load_state_dict(saved)
    if LEARNERS[name].get("learning") == "uoro":  # its signs go on
        generator = learner._past.sensitivity._generator.get_state()  # type: ignore[union-attr]
        twin._past.sensitivity._generator.set_state(generator)  # type: ignore[union-attr]
    twin.state = learner.state
    assert learner._cut == (how != "checkpoint")
    for start in (6, 6 + every):
        for a, b in zip(
            learned(learner, X[start : start + every]), learned(twin, X[start : start + every]), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_a_peek_is_the_next_step_and_moves_nothing() -> None:
    for layer in (RGC(4, input_size=3, dtype=F64), ELSTM(3, 4, dtype=F64), LRU(3, 4, dtype=F64)):
        learner = OnlineLearner(layer, 2)
        learner(X[0])
        output = learner(X[1])
        seen = learner.peek(X[2])
        assert not seen.requires_grad
        torch.testing.assert_close(learner.peek(X[2]), seen, rtol=0, atol=0)
        output.sum().backward()
        torch.testing.assert_close(learner(X[2]), seen)
        seen.zero_()
        torch.testing.assert_close(learner.eval().peek(X[3]), learner(X[3]))


def test_an_eval_step_of_a_stream_that_is_not_finite_is_not_told() -> None:
    learner = made(nonfinite="raise").eval()
    assert learner(torch.full((2, 3), torch.nan, dtype=F64)).isnan().any()


@pytest.mark.parametrize("form", ["chunk", "lazy", "history", "carry", "tbptt"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_chunk_that_ends_early(form: str, steps: int) -> None:
    """It is a chunk of so many steps: what it gives, and what the chunk after it gives."""
    options = {k: v for k, v in {**LEARNERS.get(form, {}), "update_every": 4}.items() if k != "rewrite_every"}
    early, whole = made(**options), made(**options)
    learned(early, X[:4]), learned(whole, X[:4])
    outputs = [early(x) for x in X[4 : 4 + steps]]
    early.end_chunk()
    early.zero_grad(), whole.zero_grad()
    sum(output.square().sum() for output in outputs).backward()
    whole.chunk(X[4 : 4 + steps]).square().sum().backward()
    for a, b in zip(early.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        for parameter in [*early.parameters(), *whole.parameters()]:
            parameter.mul_(0.9)
    for a, b in zip(learned(early, X[8:12]), learned(whole, X[8:12]), strict=True):
        torch.testing.assert_close(a, b)


FLAGS = {
    "float": torch.tensor([1.0, 0.0]),
    "int": torch.tensor([1, 0]),
    "numpy bool": np.array([True, False]),
    "numpy float": np.array([1.0, 0.0], dtype=np.float32),
    "numpy int": np.array([1, 0]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_an_environment(name: str) -> None:
    learner, twin = made(), made()
    learned(learner, X[:1]), learned(twin, X[:1])
    learner.reset(FLAGS[name])
    twin.reset(torch.tensor([True, False]))
    torch.testing.assert_close(learner.state, twin.state, rtol=0, atol=0)
    for a, b in zip(learned(learner, X[1:2]), learned(twin, X[1:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.array(["a", "b"]), TypeError, "mask must hold bools or numbers, got a numpy array"),
        (np.zeros(3), ValueError, r"mask must have shape \(2,\), got \(3,\)"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "mask must hold bools or real numbers"),
        ([True, False], TypeError, r"mask must be a torch\.Tensor, got list"),
        (torch.zeros(2, 1), ValueError, r"mask must have shape \(2,\), got \(2, 1\)"),
    ],
)
def test_flags_that_are_none(mask: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made().reset(mask)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (torch.zeros(2, 4, dtype=F64), TypeError, r"state must be a tuple \(s, m\), got Tensor"),
        ((torch.zeros(2, 4, dtype=F64),), ValueError, r"state must be \(s, m\), got 1 entries"),
        (
            (torch.zeros(2, 4, dtype=F64), torch.zeros(1, 2, 4, dtype=F64)),
            ValueError,
            r"state's m must have shape \(2, 4\)",
        ),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), TypeError, "state's s must have the dtype"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state: Any, error: type[Exception], words: str) -> None:
    learner = made()
    learner(X[0])
    before = learner.state
    with pytest.raises(error, match=words):
        learner.state = state
    torch.testing.assert_close(learner.state, before, rtol=0, atol=0)
    assert not learner._cut


def test_a_state_that_was_set_is_a_copy() -> None:
    learner = OnlineLearner(TwoPointRNN(RGC(4).cell, 4, dtype=F64), 2)
    given = (torch.ones(2, 4, dtype=F64, requires_grad=True), torch.ones(2, 4, dtype=F64))
    learner.state = given
    given[1].zero_()
    assert all(bool((value == 1).all()) and not value.requires_grad for value in learner.state)


@pytest.mark.parametrize(
    "options", [{"form": "chunk", "update_every": 3}, {"form": "history"}, {"learning": "rtrl"}]
)
def test_a_chunk_follows_batch_first(options: dict[str, Any]) -> None:
    found = []
    for first in (False, True):
        torch.manual_seed(1)
        learner = OnlineLearner(LSTM(3, 4, batch_first=first, dtype=F64), 2, **options)
        resets = torch.zeros(3, 2, dtype=torch.bool)
        resets[1, 0] = True
        x = X[:3].clone().requires_grad_()
        output = learner.chunk(x.transpose(0, 1), resets.T) if first else learner.chunk(x, resets)
        output = output.transpose(0, 1) if first else output
        grads = torch.autograd.grad(output.square().sum(), [x, *learner.parameters()])
        acted = learner.eval().chunk(X[3:5].transpose(0, 1) if first else X[3:5])
        found.append((output, grads, acted.transpose(0, 1) if first else acted))
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(ValueError, match=r"x must have shape \(2, C, 3\)"):
        learner.chunk(X[:3])
