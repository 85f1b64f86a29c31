"""`Stream(self_prediction=True)` is an `OnlineLearner` with lag=1 whose loss compares readout(h(t-1)) with h(t), or with
a target of step t.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rjepa_triton import ELSTM, LSTM, RGC, RNN, OnlineLearner, Residual, Stream, TwoPointRNN
from rjepa_triton.backend import native_backend

F64 = torch.float64
STEPS = 24
needs_a_compiler = pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")
BACKENDS = [pytest.param("compile", marks=needs_a_compiler), "torch"]
LAYERS: dict[str, Callable[[], TwoPointRNN]] = {
    "rgc": lambda: RGC(17, init="uniform", dtype=F64),
    "lstm": lambda: LSTM(3, 17, dtype=F64),
    "rnn by heads": lambda: RNN(2, 16, heads=4, dtype=F64),
    "diagonal rnn": lambda: RNN(2, 9, recurrence="diagonal", dtype=F64),
}


def mlp(units: int) -> nn.Module:
    inner = nn.Sequential(nn.Linear(units, 2 * units), nn.ReLU(), nn.Linear(2 * units, units))
    return Residual(inner).double()


def oracle(
    layer: TwoPointRNN, readout: nn.Module, batch: int, loss: str, rule: str, every: int, clip: float | None,
    optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor | None, resets: Tensor | None, mask: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The losses, step by step: credit to the step before is the learner's own, by lag=1."""
    learner = OnlineLearner(layer, batch, lag=1, form="step", learning=rule)  # type: ignore[arg-type]
    weights = [*layer.parameters(), *readout.parameters()]
    before: Tensor | None = None
    losses, place = [], 0
    for t in range(len(x)):
        if resets is not None and resets[t].any():
            learner.reset(resets[t])
        h = learner.step(x[t])
        counts = torch.ones(batch, dtype=torch.bool)
        for marks in (None if resets is None else ~resets[t], None if mask is None else mask[t]):
            counts = counts if marks is None else counts & marks
        if before is None or not counts.any():
            losses.append(torch.zeros((), dtype=F64))
            before = h
            continue
        output, aim = readout(before)[counts], (h.detach() if target is None else target[t])[counts]
        if loss == "cosine":
            value = (1 - F.cosine_similarity(output, aim)).mean()
        else:
            value = {"mse": F.mse_loss, "huber": F.huber_loss}[loss](output, aim)
        if place == 0:
            optimizer.zero_grad()
        value.backward()
        place = (place + 1) % every
        if place == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()
        losses.append(value.detach())
        before = h
    return losses


def by_step(
    stream: Stream, x: Tensor, target: Tensor | None, resets: Tensor | None, mask: Tensor | None
) -> Tensor:
    losses = []
    for t in range(len(x)):
        if resets is not None and resets[t].any():
            stream.reset(resets[t])
        stream.step(x[t])
        losses.append(stream.learn(*[None if each is None else each[t] for each in (target, mask)]))
    return torch.tensor(losses, dtype=F64)


CASES: dict[str, Mapping[str, Any]] = {
    "rgc by cosine": {"loss": "cosine", "optimizer": "adam"},
    "of several rows": {"batch": 3, "resets": True, "mask": True, "optimizer": "adam"},
    "one row with episodes": {"resets": True, "optimizer": "momentum"},
    "sums of gradients": {"batch": 2, "resets": True, "every": 3, "clip": 0.05, "optimizer": "adam"},
    "one row, sums, episodes": {"resets": True, "mask": True, "every": 2, "optimizer": "momentum"},
    "of targets": {"target": True, "optimizer": "adam"},
    "of targets by several rows": {
        "target": True,
        "batch": 3,
        "loss": "cosine",
        "resets": True,
        "mask": True,
        "every": 2,
        "optimizer": "momentum",
    },
    "lstm": {"layer": "lstm", "batch": 2, "loss": "huber", "resets": True, "optimizer": "adam"},
    "lstm alone": {"layer": "lstm", "resets": True, "optimizer": "adam"},
    "heads": {"layer": "rnn by heads", "batch": 2, "resets": True, "optimizer": "adam"},
    "diagonal": {"layer": "diagonal rnn", "batch": 2, "resets": True, "optimizer": "adam"},
    "eprop": {"rule": "eprop", "batch": 2, "resets": True, "optimizer": "adam"},
    "snap0": {"rule": "snap0", "resets": True, "optimizer": "adam"},
    "snap0 of several rows": {"rule": "snap0", "batch": 2, "resets": True, "optimizer": "momentum"},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["run", "pieces", "steps", "both"])
@pytest.mark.parametrize("name", CASES)
def test_self_prediction_is_a_learner_with_lag_1(name: str, by: str, backend: str) -> None:
    case = {"layer": "rgc", "batch": 1, "loss": "mse", "rule": "rfp", "every": 1, "clip": None, **CASES[name]}
    batch = case["batch"]
    layer = LAYERS[case["layer"]]()
    readout = mlp(layer.hidden_size)
    x = torch.randn(STEPS, batch, layer.fan_in, dtype=F64)
    resets, mask = (torch.rand(STEPS, batch) < 0.2 if case.get(key) else None for key in ("resets", "mask"))
    mask = None if mask is None else ~mask
    target = torch.randn(STEPS, batch, layer.hidden_size, dtype=F64) if case.get("target") else None
    other, predictor = copy.deepcopy(layer), copy.deepcopy(readout)

    def optimizer_of(layer: TwoPointRNN, readout: nn.Module) -> torch.optim.Optimizer:
        """The readout learns at a rate of its own."""
        groups = [
            {"params": list(layer.parameters()), "lr": 0.003},
            {"params": list(readout.parameters()), "lr": 0.02},
        ]
        return OPTIMIZERS[case["optimizer"]](groups)

    theirs = optimizer_of(other, predictor)
    wanted = oracle(
        other,
        predictor,
        batch,
        case["loss"],
        case["rule"],
        case["every"],
        case["clip"],
        theirs,
        x,
        target,
        resets,
        mask,
    )
    ours = optimizer_of(layer, readout)
    stream = Stream(
        layer, readout, batch, loss=case["loss"], optimizer=ours, learning=case["rule"], update_every=case["every"],
        clip_norm=case["clip"], self_prediction=True, backend=backend,
    )  # type: ignore[arg-type] # fmt: skip
    parts = {"run": [STEPS], "pieces": [1, 11, 3, 9], "steps": [-STEPS], "both": [9, -2, 10, -3]}[by]
    losses, start = [], 0
    for part in parts:
        piece = slice(start, start + abs(part))
        marks = [None if each is None else each[piece] for each in (target, resets, mask)]
        losses.append(stream.run(x[piece], *marks).losses if part > 0 else by_step(stream, x[piece], *marks))
        start += abs(part)
    torch.testing.assert_close(torch.cat(losses), torch.stack(wanted), rtol=0, atol=1e-11)
    for mine, its in zip(stream.parameters, [*other.parameters(), *predictor.parameters()], strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-11)
    for mine, its in zip(stream.parameters, [*other.parameters(), *predictor.parameters()], strict=True):
        for key, value in theirs.state[its].items():
            torch.testing.assert_close(ours.state[mine][key], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_resumes_and_is_copied(backend: str) -> None:
    x, found = torch.randn(9, 2, 5, dtype=F64), []
    layer = RGC(5, init="uniform", dtype=F64)
    stream = Stream(layer, mlp(5), 2, optimizer="adam", self_prediction=True, update_every=2, backend=backend)  # type: ignore[arg-type]
    stream.run(x[:4])
    stream.reset(torch.tensor([True, False]))
    twin, saved = copy.deepcopy(stream), copy.deepcopy(stream.state_dict())
    third = Stream(
        copy.deepcopy(layer), mlp(5), 2, optimizer="adam", self_prediction=True, update_every=2, backend=backend
    )  # type: ignore[arg-type] # fmt: skip
    third.load_state_dict(saved)
    found = [each.run(x[4:]).losses for each in (stream, twin, third)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False])])
@pytest.mark.parametrize("saved", [False, True])
def test_a_reset_of_the_learner_begins_an_episode_as_the_streams_own(
    saved: bool, mask: Tensor | None, backend: str
) -> None:
    x, found = torch.randn(12, 2, 5, dtype=F64), []
    layer, readout = RGC(5, init="uniform", dtype=F64), mlp(5)
    for own in (True, False):
        mine, predictor = copy.deepcopy((layer, readout))
        stream = Stream(mine, predictor, 2, lr=0.1, self_prediction=True, backend=backend)  # type: ignore[arg-type]
        reset = stream.reset if own else stream.learner.reset
        losses = [stream.run(x[:4]).losses]
        reset(mask)
        if saved:
            stream.load_state_dict(copy.deepcopy(stream.state_dict()))
        losses.append(stream.run(x[4:8]).losses)
        reset(mask)
        losses.append(by_step(stream, x[8:], None, None, None))
        found.append([torch.cat(losses), *stream.parameters])
        resets = torch.zeros(12, 2, dtype=torch.bool)
        resets[4] = resets[8] = True if mask is None else mask
    other = Stream(layer, readout, 2, lr=0.1, self_prediction=True, backend=backend)  # type: ignore[arg-type]
    found.append([other.run(x, None, resets).losses, *other.parameters])
    for own, of_the_learner, in_one_call in zip(*found, strict=True):
        assert torch.equal(own, of_the_learner)
        torch.testing.assert_close(own, in_one_call, rtol=0, atol=1e-12)


@needs_a_compiler
def test_the_loop_takes_over_and_gives_back() -> None:
    x, found = torch.randn(12, 2, 5, dtype=F64), []
    layer, readout = RGC(5, init="uniform", dtype=F64), mlp(5)
    for backend in ("torch", "compile"):
        stream = Stream(
            copy.deepcopy(layer), copy.deepcopy(readout), 2, optimizer="adam", self_prediction=True, backend=backend
        )  # type: ignore[arg-type] # fmt: skip
        losses = [stream.run(x[:4]).losses]
        hook = stream.readout.register_forward_hook(lambda *_: None)
        losses.append(stream.run(x[4:8]).losses)
        hook.remove()
        losses.append(stream.run(x[8:]).losses)
        found.append(torch.cat(losses))
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [None, True, False])
def test_a_population_predicts_itself(shared: bool | None, backend: str) -> None:
    """Or a target, of which there is one for all networks or one for each."""
    x, targets = torch.randn(9, 2, 5, dtype=F64), torch.randn(3, 9, 2, 5, dtype=F64)
    each = [None if shared is None else targets[0 if shared else p] for p in range(3)]
    many = Stream(
        RGC(5, init="uniform", dtype=F64), mlp(5), 2, optimizer="adam", self_prediction=True, population=3, backend=backend
    )  # type: ignore[arg-type] # fmt: skip
    assert many.members is not None
    alone = copy.deepcopy(many.members)
    for part in (slice(4), slice(4, None)):
        parts = [None if target is None else target[part] for target in each]
        wanted = torch.stack([one.run(x[part], its).losses for one, its in zip(alone, parts, strict=True)])
        given = parts[0] if shared is not False else targets[:, part]
        torch.testing.assert_close(many.run(x[part], given).losses, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "delta"}, "self_prediction goes with loss='mse', 'huber' or 'cosine', got 'delta'"),
        ({"loss": "cross_entropy"}, "got 'cross_entropy'"),
        ({"readout": nn.Linear(5, 4)}, "must give the layer's 5 units with self_prediction, got 4 outputs"),
        ({"learning": "rtrl"}, "goes with the rules rfp, eprop, rflo, snap0, got 'rtrl'"),
        ({"layer": ELSTM(5, 5)}, "a layer whose output is a state, got ELSTM"),
    ],
    ids=["delta", "classes", "outputs", "rtrl", "elstm"],
)
def test_what_cannot_predict_itself(options: dict[str, Any], says: str) -> None:
    arguments = {"layer": RGC(5), "readout": nn.Linear(5, 5), **options}
    with pytest.raises(ValueError, match=says):
        Stream(arguments.pop("layer"), arguments.pop("readout"), self_prediction=True, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_and_without_a_target_may_take_turns(backend: str) -> None:
    layer, readout = LAYERS["rgc"](), mlp(17)
    other, predictor = copy.deepcopy(layer), copy.deepcopy(readout)
    stream = Stream(layer, readout, lr=0.1, self_prediction=True, backend=backend)  # type: ignore[arg-type]
    by_call = Stream(other, predictor, lr=0.1, self_prediction=True, backend=backend)  # type: ignore[arg-type]
    x, target = torch.randn(12, 1, 17, dtype=F64), torch.randn(12, 1, 17, dtype=F64)
    for t in range(12):
        given = target[t] if t % 3 == 0 else None
        stream.step(x[t])
        loss = stream.learn(given)
        wanted = by_call.run(x[t : t + 1], None if given is None else given[None]).losses
        torch.testing.assert_close(torch.tensor([loss], dtype=F64), wanted, rtol=0, atol=1e-12)
    for mine, its in zip(stream.parameters, by_call.parameters, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_a_target_of_another_shape_is_refused() -> None:
    stream = Stream(RGC(5), nn.Linear(5, 5), self_prediction=True, backend="torch")
    x = torch.randn(3, 1, 5)
    with pytest.raises(ValueError, match=r"target must have shape \(3, 1, 5\)"):
        stream.run(x, x[..., :4])
    stream.step(x[0])
    with pytest.raises(ValueError, match="target must have shape"):
        stream.learn(x[0, :, :4])
    stream.learn(x[0])


def test_an_optimizer_of_other_weights_is_refused() -> None:
    layer, readout = RGC(5), nn.Linear(5, 2)
    for weights in (
        [*layer.parameters()],
        [*layer.parameters(), *readout.parameters(), *nn.Linear(2, 2).parameters()],
    ):
        with pytest.raises(
            ValueError, match="optimizer must have the weights of the layer and the readout, and no others"
        ):
            Stream(layer, readout, optimizer=torch.optim.SGD(weights, lr=0.1))
    every = torch.optim.SGD([*layer.parameters(), *readout.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="optimizer_options go with the name of an optimizer"):
        Stream(layer, readout, optimizer=every, optimizer_options={})
    with pytest.raises(ValueError, match="optimizer must be a name with a population"):
        Stream(layer, readout, optimizer=every, population=2)
    other = torch.optim.Adagrad([*layer.parameters(), *readout.parameters()], lr=0.1)
    stream = Stream(layer, readout, optimizer=other)
    assert "compiled code takes the optimizers SGD, Adam, AdamW, RMSprop, got Adagrad" in stream.why
    stream.run(torch.randn(3, 1, 5), torch.randn(3, 1, 2))


@needs_a_compiler
def test_groups_that_differ_in_more_than_lr_run_by_the_loop() -> None:
    found = []
    layer, readout, x = RGC(5, init="uniform"), nn.Linear(5, 2), torch.randn(6, 1, 5)
    target = torch.randn(6, 1, 2)
    for backend in ("torch", "auto"):
        mine, own = copy.deepcopy((layer, readout))
        groups = [{"params": mine.parameters(), "lr": 0.1, "weight_decay": 0.1}, {"params": own.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.02)
        stream = Stream(mine, own, optimizer=optimizer, backend=backend)
        found.append(stream.run(x, target).losses)
    assert torch.equal(*found)
