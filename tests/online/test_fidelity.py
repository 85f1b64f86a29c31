"""Exactness in words agrees with the numbers, and the numbers with the gradients they are of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rjepa_triton import GRU, LRU, LSTM, RGC, RNN, IndRNN, OnlineLearner, TimeDecay, fidelity

F64 = torch.float64

LAYERS: dict[str, Any] = {
    "rgc": lambda **o: RGC(6, init="uniform", dtype=F64, **o),
    "lstm": lambda **o: LSTM(3, 6, dtype=F64, **o),
    "gru": lambda **o: GRU(3, 6, dtype=F64, **o),
    "rnn": lambda **o: RNN(3, 6, dtype=F64, **o),
    "indrnn": lambda **o: IndRNN(3, 6, "tanh", dtype=F64, **o),
    "time-decay": lambda **o: TimeDecay(3, 6, dtype=F64, **o),
    "lru": lambda **o: LRU(3, 6, dtype=F64, **o),
}
RULES: list[dict[str, Any]] = [
    {},
    {"learning": "eprop"},
    {"learning": "rflo"},
    {"learning": "snap0"},
    {"learning": "bptt"},
    {"learning": "rtrl"},
    {"refine": 1},
    {"refine": "exact"},
]


@pytest.mark.parametrize("shape", [{}, {"recurrence": "diagonal"}, {"heads": 3}, {"heads": 6}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_words_agree_with_numbers(name: str, rule: dict[str, Any], shape: dict[str, Any]) -> None:
    torch.manual_seed(1)
    if shape and name in ("indrnn", "time-decay", "lru"):
        pytest.skip("these have one shape")
    layer = LAYERS[name](**rule, **shape)
    said = layer.exactness()
    error = fidelity(layer, torch.randn(12, 2, layer.fan_in, dtype=F64)).total_error
    assert bool(said) == (error < 1e-8), (str(said), error)
    assert str(said).startswith("exact: " if said else "not exact: ")


ONLINE: list[dict[str, Any]] = [
    {},
    {"learning": "rtrl"},
    {"learning": "uoro"},
    {"learning": "tbptt", "update_every": 4},
    {"credit": "carry", "update_every": 4},
    {"refine": 1, "update_every": 4},
    {"form": "chunk", "update_every": 4},
]


@pytest.mark.parametrize("options", ONLINE, ids=str)
@pytest.mark.parametrize("shape", [{}, {"recurrence": "diagonal"}], ids=str)
def test_words_of_a_learner_agree_with_numbers(options: dict[str, Any], shape: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = LAYERS["rgc"](**shape)
    said = OnlineLearner(layer, 2, **options).exactness()
    error = fidelity(layer, torch.randn(12, 2, 6, dtype=F64), online=options).total_error
    assert bool(said) == (error < 1e-10), (str(said), error)


def test_numbers_are_those_of_the_gradients() -> None:
    layer = LAYERS["rgc"](batch_first=True)
    x, delta = torch.randn(9, 2, 6, dtype=F64), torch.randn(9, 2, 6, dtype=F64)
    resets = torch.rand(9, 2) < 0.2
    layer.weight_ss.grad = torch.ones_like(layer.weight_ss)
    found = fidelity(layer, x, delta, resets=resets)
    assert torch.equal(layer.weight_ss.grad, torch.ones_like(layer.weight_ss))
    assert layer.weight_mm.grad is None
    assert (layer.learning, layer.refine, layer.batch_first) == ("rfp", 0, True)
    layer.batch_first = False
    grads = {}
    for learning in ("rfp", "bptt"):
        layer.learning = learning
        grads[learning] = torch.autograd.grad(
            (layer(x, resets=resets)[0] * delta).sum(), list(layer.parameters())
        )
    joint = [torch.cat([g.flatten() for g in grads[learning]]) for learning in ("rfp", "bptt")]
    assert found.total_cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*joint, 0)))
    assert found.total_error == pytest.approx(float((joint[0] - joint[1]).norm() / joint[1].norm()))
    assert list(found.cosine) == ["weight_ss", "weight_ms", "weight_mm", "weight_sm"]
    a, b = grads["rfp"][2], grads["bptt"][2]
    assert found.error["weight_mm"] == pytest.approx(float((a - b).norm() / b.norm()))
    assert str(found).splitlines()[-1].startswith("total")


def test_a_gradient_that_is_zero_has_no_cosine() -> None:
    layer = LAYERS["rgc"]()
    found = fidelity(layer, torch.randn(1, 2, 6, dtype=F64))
    assert math.isnan(found.cosine["weight_mm"])


def test_a_refused_rule_leaves_the_layer_as_it_was() -> None:
    layer = LAYERS["rgc"](refine=2)
    for options, says in (
        ({"learning": "uoro"}, "learns online only"),
        ({"learning": "eprop", "refine": 1}, "refine=1 goes with"),
        ({"refine": 1, "online": {}}, "online must hold learning and refine too"),
        ({"grad_output": torch.zeros(3, 2, 6)}, r"grad_output must have shape \(4, 2, 6\)"),
    ):
        with pytest.raises(ValueError, match=says):
            fidelity(layer, torch.randn(4, 2, 6, dtype=F64), **options)
        assert (layer.learning, layer.refine) == ("rfp", 2)
