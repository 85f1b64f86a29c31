"""When backward() may be called: the same in every form that "auto" may choose."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import oracle
import pytest
import replayed
import torch
from torch import Tensor, nn

from rjepa_triton import ELSTM, LRU, LSTM, RGC, OnlineLearner, TwoPointRNN

F64 = torch.float64

LAYERS: dict[str, Any] = {
    "rgc": lambda: RGC(5, input_size=3, init="uniform", dtype=F64),
    "rgc-without-input": lambda: RGC(5, init="uniform", dtype=F64),
    "lstm": lambda: LSTM(3, 5, dtype=F64),
    "lru": lambda: LRU(3, 5, dtype=F64),
    "elstm": lambda: ELSTM(3, 5, dtype=F64),
}
by_layer = pytest.mark.parametrize("name", LAYERS)
FORMS: list[dict[str, Any]] = [
    {"form": "lazy", "rewrite_every": 1},
    {"form": "lazy", "rewrite_every": 3},
    {"form": "history"},
    {"form": "chunk"},
    {"form": "auto"},
]
PATTERNS = ["each", "together", "each afterwards", "the last alone"]


def streamed(
    layer: TwoPointRNN,
    x: Tensor,
    delta: Tensor,
    pattern: str,
    every: int,
    learn: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Gradients of the layer and of an encoder below it, whose own graph a backward frees."""
    layer = copy.deepcopy(layer)
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(2, layer.fan_in, dtype=F64), nn.Tanh())
    learner = OnlineLearner(layer, x.shape[1], update_every=every, **options)
    if options.get("form") == "auto" and every > 1:
        assert learner.form != "step"
    parameters = [*layer.parameters(), *encoder.parameters()]
    found, losses = [torch.zeros_like(p) for p in parameters], []
    for t, row in enumerate(x):
        losses.append((learner.step(encoder(row)) * delta[t]).sum())
        end = (t + 1) % every == 0
        if pattern == "each":
            losses.pop().backward()
        elif end and pattern == "together":
            torch.stack(losses).sum().backward()
            losses = []
        elif end and pattern == "each afterwards":
            for loss in losses:
                loss.backward()
            losses = []
        elif end and pattern == "the last alone":
            losses[-1].backward()
            losses = []
        if end:
            for total, p in zip(found, parameters, strict=True):
                total += 0 if p.grad is None else p.grad
                p.grad = None
                if learn:
                    with torch.no_grad():
                        p.mul_(0.95)
    return found


@by_layer
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_pattern_serves_every_form(name: str, pattern: str, options: dict[str, Any]) -> None:
    layer = LAYERS[name]()
    x, delta = torch.randn(12, 2, 2, dtype=F64), torch.randn(12, 2, 5, dtype=F64)
    counted = delta.clone()
    if pattern == "the last alone":
        counted[torch.arange(12) % 4 != 3] = 0
    got = streamed(layer, x, delta, pattern, 4, True, **options)
    want = streamed(layer, x, counted, "each afterwards", 4, True, form="history")
    assert oracle.relative(got, want) < 1e-12


def test_form_step_gives_the_same() -> None:
    layer = LAYERS["lstm"]()
    x, delta = torch.randn(12, 2, 2, dtype=F64), torch.randn(12, 2, 5, dtype=F64)
    want = streamed(layer, x, delta, "together", 4, form="chunk")
    assert oracle.relative(streamed(layer, x, delta, "each", 1, form="step"), want) < 1e-12


@pytest.mark.parametrize("options", [{"credit": "carry"}, {"refine": 1}, {"learning": "tbptt"}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_every_pattern_serves_the_rules_of_form_chunk(options: dict[str, Any], pattern: str) -> None:
    layer = LAYERS["lstm"]()
    x, delta = torch.randn(12, 2, 2, dtype=F64), torch.randn(12, 2, 5, dtype=F64)
    want = streamed(layer, x, delta, "together", 4, True, **options)
    assert oracle.relative(streamed(layer, x, delta, pattern, 4, True, **options), want) < 1e-12


@pytest.mark.parametrize("units", [4, 64, 300])
@pytest.mark.parametrize("every", [2, 8, 64])
@pytest.mark.parametrize("horizon", [None, 4, 10_000])
def test_auto_takes_no_form_of_another_contract(units: int, every: int, horizon: int | None) -> None:
    assert OnlineLearner(RGC(units), 1, update_every=every, horizon=horizon).form != "step"


@pytest.mark.parametrize("name", ["lru", "elstm", "rgc"])
@pytest.mark.parametrize("form", ["step", "lazy", "history"])
@pytest.mark.parametrize("learn", [False, True])
def test_a_loss_of_two_steps_needs_no_graph_to_be_retained(name: str, form: str, learn: bool) -> None:
    """With lag=1 the output of a step meets two backward passes, and the readout may change between them."""
    layer = LAYERS[name]()
    x = torch.randn(7, 2, 3, dtype=F64)
    results = []
    for retain in (False, True):
        twin = copy.deepcopy(layer)
        learner = OnlineLearner(twin, 2, form=form, lag=1)
        previous, found = None, []
        for row in x:
            output = learner.step(row)
            if previous is not None:
                (previous * output).sum().backward(retain_graph=retain)
                found += [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
                twin.zero_grad()
                if learn:
                    with torch.no_grad():
                        for p in twin.parameters():
                            p.mul_(0.9)
            previous = output
        results.append(found)
    assert oracle.relative(*results) < 1e-12
    assert any(bool(g.any()) for g in results[0])


@pytest.mark.parametrize("name", ["lru", "elstm"])
def test_a_readout_in_one_node_gives_torchs_gradient(name: str) -> None:
    layer = LAYERS[name]()
    x, delta = torch.randn(6, 2, 3, dtype=F64), torch.randn(6, 2, 5, dtype=F64)
    results = []
    for lag in (0, 1):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        learner = OnlineLearner(layer, 2, form="step", lag=lag)
        for row, d in zip(given, delta, strict=True):
            (learner.step(row) * d).sum().backward()
        results.append([given.grad, *(p.grad.clone() for p in layer.parameters())])
    assert oracle.relative(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("options", [{"credit": "carry"}, {"refine": 2}, {"learning": "tbptt"}], ids=str)
@pytest.mark.parametrize("name", ["lstm", "rgc"])
def test_a_second_backward_of_a_folded_step_is_refused_where_gamma_is_not_its_gradient(
    name: str, options: dict[str, Any]
) -> None:
    """With update_every=1 each step is a chunk, which its first backward folds."""
    layer = LAYERS[name]()
    learner = OnlineLearner(layer, 2, **options)
    for _ in range(3):
        output = learner.step(torch.randn(2, 3, dtype=F64))
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward of step 3 comes too late"):
        output.sum().backward()


@pytest.mark.parametrize(
    "options", [{"form": "step"}, {"form": "lazy", "rewrite_every": 1}, {"learning": "rtrl"}], ids=str
)
def test_a_second_backward_of_a_folded_step_reads_gamma(options: dict[str, Any]) -> None:
    layer = LAYERS["lstm"]()
    learner = OnlineLearner(layer, 2, **options)
    for _ in range(3):
        output = learner.step(torch.randn(2, 3, dtype=F64))
    found = []
    for _ in range(2):
        layer.zero_grad()
        output.sum().backward(retain_graph=True)
        found.append([p.grad.clone() for p in layer.parameters()])
    assert oracle.relative(*found) < 1e-12


@pytest.mark.parametrize(
    "options", [{"credit": "carry"}, {"refine": "exact"}, {"learning": "tbptt"}], ids=str
)
@pytest.mark.parametrize("by", ["copy", "pickle", "checkpoint"])
def test_a_chunk_goes_on_in_a_copy_with_other_weights(by: str, options: dict[str, Any]) -> None:
    """Credit passes back through the weights that each step ran with."""
    layer = LAYERS["rgc"]()
    learner = OnlineLearner(layer, 2, update_every=2, **options)
    x = torch.randn(4, 2, 3, dtype=F64)
    for row in x[:3]:
        learner.step(row)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.8)
    if by == "checkpoint":
        state = copy.deepcopy(learner.state_dict())
        learner = OnlineLearner(layer, 2, update_every=2, **options)
        learner.load_state_dict(state)
    else:
        learner = copy.deepcopy(learner) if by == "copy" else pickle.loads(pickle.dumps(learner))
    learner.step(x[3]).sum().backward()
    old = copy.deepcopy(layer)
    with torch.no_grad():
        for p in old.parameters():
            p.div_(0.8)
    none = torch.zeros(2, dtype=torch.bool)
    ran = [old, old, old, layer]
    steps = [
        replayed.step_of(one, row, none, t, t // 2 * 2)
        for t, (one, row) in enumerate(zip(ran, x, strict=True))
    ]
    loss = replayed.Loss(3, 4, torch.ones(1, 2, 5, dtype=F64))
    want, _ = replayed.gradients(layer, steps, [loss], "tbptt" if "learning" in options else "carry")
    got = [p.grad for p in learner.layer.parameters()]
    assert oracle.relative(got, want) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("options", [{"form": "step"}, *FORMS], ids=str)
@pytest.mark.parametrize("name", ["rgc", "elstm"])
def test_with_lag_a_loss_reaches_the_step_before(name: str, options: dict[str, Any], every: int) -> None:
    """Against RFP of whole sequences, at every place of a chunk: the step before may be in the chunk before."""
    if options["form"] == "chunk" and every == 1:
        pytest.skip("form='chunk' needs update_every ≥ 2")
    layer = LAYERS[name]()
    x, delta = torch.randn(8, 2, 3, dtype=F64), torch.randn(2, 5, dtype=F64)
    for t in range(1, 8):
        learner = OnlineLearner(layer, 2, lag=1, update_every=every, **options)
        outputs = [learner.step(row) for row in x[: t + 1]]
        layer.zero_grad()
        (outputs[t - 1] * delta).sum().backward()
        got = [p.grad for p in layer.parameters()]
        layer.zero_grad()
        (layer(x[:t])[0][-1] * delta).sum().backward()
        assert oracle.relative(got, [p.grad for p in layer.parameters()]) < 1e-12, t  # type: ignore[arg-type]


def test_a_step_of_a_chunk_that_is_folded_is_refused() -> None:
    layer = LAYERS["rgc"]()
    learner = OnlineLearner(layer, 2, lag=1, update_every=2, form="chunk")
    outputs = [learner.step(row) for row in torch.randn(7, 2, 3, dtype=F64)]
    for early in (0, 1, 2):
        with pytest.raises(
            RuntimeError, match=f"backward of step {early + 1} comes too late: Γ is that of step 4 now"
        ):
            outputs[early].sum().backward()
