"""Traces and the gradients of batch rows: autograd of the plain loop, and backward() row by row, are the oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import rgc as oracle_rgc
from torch import Tensor

from rjepa_triton import ELSTM, GRU, LSTM, RGC, OnlineLearner

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


@pytest.mark.parametrize("shape", [{}, {"heads": 2}, {"recurrence": "diagonal"}])
def test_traces_of_rtrl_are_those_of_every_unit(shape: dict[str, Any]) -> None:
    learner = made({"learning": "rtrl"}, **shape)
    for x in X:
        learner(x)
    traces = list(learner.traces().values())
    heads, size = traces[0].shape[2:4]
    weights = [weight.detach().clone().requires_grad_() for weight in learner.layer.weights()]
    for nu, state in enumerate(states_of(learner, weights, "full")):
        for unit in range(4):
            head, j = divmod(unit, size)
            want = torch.autograd.grad(state[1, unit], weights, retain_graph=True)
            for trace, expected in zip(traces, want, strict=True):
                by_head = expected.reshape(heads, size, -1)[head]
                torch.testing.assert_close(trace[nu, 1, head, j], by_head)


@pytest.mark.parametrize("kind", [RGC, LSTM, GRU])
@pytest.mark.parametrize(
    "options", [{"form": "step"}, {"form": "history"}, {"learning": "rtrl"}, {"learning": "eprop"}]
)
def test_row_gradients_are_those_of_one_backward_a_row(kind: type, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = kind(4, input_size=3, dtype=F64, init="uniform") if kind is RGC else kind(3, 4, dtype=F64)
    learner = OnlineLearner(layer, 2, **options)
    for x in X[:-1]:
        learner(x).sum().backward()
    output = learner(X[-1])
    values = (output * torch.randn(4, dtype=F64)).sum(-1).tanh()
    (credit,) = torch.autograd.grad(values.sum(), output, retain_graph=True)
    found = learner.row_gradients(credit)
    for row in range(2):
        learner.zero_grad()
        values[row].backward(retain_graph=True)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[row], layer.get_parameter(name).grad)


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
    with pytest.raises(ValueError, match="ELSTM has a readout of its own"):
        OnlineLearner(ELSTM(3, 4, dtype=F64), 2).row_gradients(torch.zeros(2, 4, dtype=F64))
