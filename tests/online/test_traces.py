"""Traces and the gradients of batch rows: autograd of the plain loop, and backward() row by row, are the oracles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from every_learner import LEARNERS
from oracle import rgc as oracle_rgc
from torch import Tensor

from rjepa_triton import ELSTM, LRU, LSTM, RGC, OnlineLearner

F64 = torch.float64
X = torch.randn(5, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def made(learner_options: dict[str, Any], **options: Any) -> OnlineLearner:
    torch.manual_seed(1)
    return OnlineLearner(RGC(4, input_size=3, init="uniform", dtype=F64, **options), 2, **learner_options)


def states_of(learner: OnlineLearner, weights: list[Tensor], how: str) -> tuple[Tensor, Tensor]:
    drive = X @ weights[4].T + weights[5]
    zero = X.new_zeros(2, 4)
    s, m = oracle_rgc(drive, weights[:4], (zero, zero), None, how)
    return s[-1], m[-1]


@pytest.mark.parametrize("recurrence", ["dense", "diagonal"])
@pytest.mark.parametrize(
    "options",
    [
        {"form": "step"},
        {"form": "lazy", "rewrite_every": 3},
        {"form": "chunk", "update_every": 3},
        {"form": "history"},
    ],
    ids=lambda options: options["form"],
)
def test_traces_are_the_derivatives_of_the_states(options: dict[str, Any], recurrence: str) -> None:
    learner = made(options, recurrence=recurrence)
    for x in X:
        learner(x)
    traces = learner.traces()
    assert list(traces) == ["weight_ss", "weight_ms", "weight_mm", "weight_sm", "weight_in", "bias"]
    weights = [weight.detach().clone().requires_grad_() for weight in learner.layer.weights()]
    for nu, state in enumerate(states_of(learner, weights, "own")):
        for row in range(2):  # each row of a weight enters one unit, and Γ is that unit's
            want = torch.autograd.grad(state[row].sum(), weights, retain_graph=True)
            for trace, expected in zip(traces.values(), want, strict=True):
                torch.testing.assert_close(trace[nu, row], expected)
    torch.testing.assert_close(learner.traces(), traces, rtol=0, atol=0)  # nothing has moved


@pytest.mark.parametrize(
    ("shape", "block"), [({}, None), ({"heads": 2}, None), ({"recurrence": "diagonal"}, None), ({}, 2)]
)
def test_traces_of_rtrl_are_those_of_every_unit(shape: dict[str, Any], block: int | None) -> None:
    learner = made({"learning": "rtrl", "block": block}, **shape)
    for x in X:
        learner(x)
    traces = list(learner.traces().values())
    heads, size = traces[0].shape[2:4]
    weights = [weight.detach().clone().requires_grad_() for weight in learner.layer.weights()]
    for nu, state in enumerate(states_of(learner, weights, block or "full")):
        for unit in range(4):
            head, j = divmod(unit, size)
            want = torch.autograd.grad(state[1, unit], weights, retain_graph=True)
            for trace, expected in zip(traces, want, strict=True):
                by_head = expected.reshape(heads, size, -1)[head]
                torch.testing.assert_close(trace[nu, 1, head, j], by_head)


LAYERS = {
    "RGC": lambda: RGC(4, input_size=3, dtype=F64, init="uniform"),
    "LSTM": lambda: LSTM(3, 4, dtype=F64),
    "ELSTM": lambda: ELSTM(3, 4, dtype=F64),  # with a readout
    "LRU": lambda: LRU(3, 4, dtype=F64),
}
RULES = {
    **LEARNERS,
    "eprop": {"learning": "eprop"},
    "refine": {"refine": 1, "update_every": 3},
    "blocks": {"learning": "rtrl", "block": 1},
}


def by_hand(learner: OnlineLearner, output: Tensor) -> tuple[Tensor, Tensor]:
    values = (output * torch.randn(4, dtype=F64)).sum(-1).tanh()
    return values, torch.autograd.grad(values.sum(), output, retain_graph=True)[0]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", [name for name in RULES if name != "uoro"])
def test_row_gradients_are_those_of_a_learner_of_that_row(name: str, kind: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    learner = OnlineLearner(layer, 2, **RULES[name])
    for t, x in enumerate(X):
        output = learner(x)
        values, credit = by_hand(learner, output)
        if (t + 1) % learner.update_every == 0 and t < 3:
            values.sum().backward()
        elif t in (1, 4):
            found = learner.row_gradients(credit)
            assert set(found) == dict(layer.named_parameters()).keys()
            for row in range(2):
                alone = OnlineLearner(copy.deepcopy(layer), 1, **RULES[name])
                alone.zero_grad()
                for before in X[:t]:
                    alone(before[row : row + 1])
                alone(x[row : row + 1]).backward(credit[row : row + 1])
                for key, gradient in found.items():
                    torch.testing.assert_close(gradient[row], alone.layer.get_parameter(key).grad, msg=key)


@pytest.mark.parametrize("options", [{"learning": "uoro"}, {"credit": "carry"}, {"learning": "tbptt"}])
@pytest.mark.parametrize("kind", LAYERS)
def test_row_gradients_add_up_to_backward(kind: str, options: dict[str, Any]) -> None:
    learner = OnlineLearner(LAYERS[kind](), 2, **options, update_every=1 if "uoro" in options.values() else 7)
    learner(X[0])
    output = learner(X[1]) if "uoro" in options.values() else learner.chunk(X, X[..., 0] > 0.8)[-1]
    values, credit = by_hand(learner, output)
    rows = learner.row_gradients(credit)
    if "uoro" in options.values():
        one = learner.row_gradients(credit * torch.tensor([[1.0], [0.0]], dtype=F64))
        assert all(torch.equal(one[key][0], rows[key][0]) and not one[key][1].any() for key in rows)
    values.sum().backward()
    for key, gradient in rows.items():
        torch.testing.assert_close(gradient.sum(0), learner.layer.get_parameter(key).grad)


@pytest.mark.parametrize("kind", ["RGC", "ELSTM", "LRU"])
def test_row_gradients_of_rows_that_are_held_reset_added_and_removed(kind: str) -> None:
    learner = OnlineLearner(LAYERS[kind](), 2, form="step")
    twin = copy.deepcopy(learner)
    ones = torch.ones(2, 4, dtype=F64)
    for x in X:
        learner(x)
    before = learner.row_gradients(ones)
    twin.chunk(X)
    torch.testing.assert_close(twin.row_gradients(ones), before)
    learner.reset(torch.tensor([True, False]))
    after = learner.row_gradients(ones)
    assert all(not after[key][0].any() and torch.equal(after[key][1], before[key][1]) for key in before)
    learner.add_rows(1)
    learner.remove_rows(torch.tensor([True, False, False]))
    after = learner.row_gradients(ones)
    assert all(torch.equal(after[key][0], before[key][1]) for key in before)
    output = learner(torch.full((2, 3), torch.nan, dtype=F64), torch.tensor([False, False]))
    held = learner.row_gradients(ones)
    learner.zero_grad()
    output[0].sum().backward()
    for key, gradient in held.items():
        torch.testing.assert_close(gradient[0], learner.layer.get_parameter(key).grad)
    learner.state = learner.state
    assert all(not gradient.any() for gradient in learner.row_gradients(ones).values())


def test_row_gradients_of_layers_one_above_the_other() -> None:
    """A learner for each, and the credit of each one's output."""
    lower, upper = OnlineLearner(LAYERS["LRU"](), 2), OnlineLearner(LSTM(4, 4, dtype=F64), 2)
    for x in X:
        below = lower(x)
        above = upper(below)
    values, _ = by_hand(upper, above)
    credits = torch.autograd.grad(values.sum(), [below, above], retain_graph=True)
    found = [learner.row_gradients(credit) for learner, credit in zip((lower, upper), credits, strict=True)]
    for row in range(2):
        lower.zero_grad()
        upper.zero_grad()
        values[row].backward(retain_graph=True)
        for learner, rows in zip((lower, upper), found, strict=True):
            for key, gradient in rows.items():
                torch.testing.assert_close(gradient[row], learner.layer.get_parameter(key).grad)


def test_row_gradients_that_come_too_late_say_so() -> None:
    learner, ones = OnlineLearner(LAYERS["ELSTM"](), 2), torch.ones(2, 4, dtype=F64)
    learner(X[0])
    learner.load_state_dict(learner.state_dict())
    with pytest.raises(RuntimeError, match="ELSTM needs the last step's input"):
        learner.row_gradients(ones)
    learner(X[0])
    assert all(gradient.any() for gradient in learner.row_gradients(ones).values())
    learner = OnlineLearner(LAYERS["ELSTM"](), 2).eval()
    learner(X[0])  # it has no past, and so no gradients
    assert all(not gradient.any() for gradient in learner.row_gradients(ones).values())
    learner.reset(torch.tensor([True, False]))
    assert all(not gradient.any() for gradient in learner.row_gradients(ones).values())
    learner = OnlineLearner(LAYERS["RGC"](), 2, learning="tbptt", update_every=2)
    assert all(not gradient.any() for gradient in learner.row_gradients(ones).values())
    learner.chunk(X).sum().backward()
    with pytest.raises(RuntimeError, match="step 5 come too late: with form='chunk'"):
        learner.row_gradients(ones)


def test_rows_that_are_reset_have_no_trace() -> None:
    learner = made({"form": "step"})
    learner(X[0])
    learner.reset(torch.tensor([True, False]))
    traces = learner.traces()
    assert all(not trace[:, 0].any() for trace in traces.values())
    assert traces["weight_in"][:, 1].any()
    learner.state = learner.state
    assert all(not trace.any() for trace in learner.traces().values())


@pytest.mark.parametrize("options", [{"learning": "uoro"}, {"learning": "tbptt", "update_every": 2}])
def test_a_rule_without_traces_names_the_nearest(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the nearest are 'rtrl', which is exact, and 'rfp'"):
        made(options).traces()


def test_a_bad_credit_is_refused() -> None:
    learner = made({})
    with pytest.raises(ValueError, match=r"credit must have shape \(2, 4\), got \(2, 3\)"):
        learner.row_gradients(X[0])
    with pytest.raises(TypeError, match="credit must have the dtype"):
        learner.row_gradients(torch.zeros(2, 4))
