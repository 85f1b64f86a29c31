"""What a caller sets of a stream's optimizer after the stream was made counts, as it does for torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rjepa_triton import RGC, OnlineLearner, Stream
from rjepa_triton.backend import native_backend

F64 = torch.float64
needs_a_compiler = pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")
by_backend = pytest.mark.parametrize("backend", [pytest.param("compile", marks=needs_a_compiler), "torch"])
X, AIM = torch.randn(17, 2, 3, dtype=F64), torch.randn(17, 2, 3, dtype=F64)
Optimizer = torch.optim.Optimizer
Make = Callable[..., Optimizer]
Change = Callable[[Optimizer], object]


def network() -> tuple[RGC, nn.Linear]:
    return RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)


def weights_of(layer: nn.Module, readout: nn.Module) -> list[nn.Parameter]:
    return [*layer.parameters(), *readout.parameters()]


class Oracle:
    """The loop of a learner, a loss and torch.optim."""

    def __init__(self, layer: RGC, readout: nn.Linear, optimizer: Optimizer, every: int) -> None:
        self.layer, self.readout, self.optimizer, self.every, self.at = layer, readout, optimizer, every, 0
        self.learner = OnlineLearner(layer, 2, form="step")

    def step(self, x: Tensor) -> None:
        self.output = self.readout(self.learner.step(x))

    def learn(self, target: Tensor) -> float:
        if self.at == 0:
            self.optimizer.zero_grad()
        loss = F.mse_loss(self.output, target)
        loss.backward()
        self.at = (self.at + 1) % self.every
        if self.at == 0:
            self.optimizer.step()
        return float(loss.detach())


def setting(name: str, value: Any, group: int = 0) -> Change:
    return lambda optimizer: optimizer.param_groups[group].update({name: value})


def lower(optimizer: Optimizer) -> None:
    """The learning rate as a scheduler has it that was given a tensor."""
    rate = optimizer.param_groups[0]["lr"]
    if isinstance(rate, Tensor):
        rate.mul_(0.5)
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02, dtype=F64)


def split(optimizer: Optimizer) -> None:
    """The last weight goes to a group of its own, with its own settings."""
    weight = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [weight], "lr": 0.05, "weight_decay": 0.3})


def swapped(optimizer: Optimizer) -> None:
    """Two groups, which have other learning rates, exchange their lists of weights."""
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]


def mixed(optimizer: Optimizer) -> None:
    """As `swapped`, in the same lists."""
    first, second = (group["params"] for group in optimizer.param_groups)
    first[:], second[:] = list(second), list(first)


def doubled(optimizer: Optimizer, *_: Any) -> None:
    optimizer.param_groups[0]["params"][0].grad.mul_(2)


def hooked(optimizer: Optimizer) -> None:
    optimizer.register_step_pre_hook(doubled)


def two_groups(kind: Make) -> Make:
    def make(weights: list[nn.Parameter], **options: Any) -> Optimizer:
        return kind([{"params": weights[:3], "lr": 0.03}, {"params": weights[3:]}], **options)

    return make


SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
NONE: Change = lambda optimizer: None  # noqa: E731
# An optimizer, its options, what is set, and what is set back.
CASES: dict[str, tuple[Make, dict[str, Any], Change, Change]] = {
    "maximize": (SGD, {}, setting("maximize", True), setting("maximize", False)),
    "maximize of momentum": (SGD, {"momentum": 0.9}, setting("maximize", True), setting("maximize", False)),
    "maximize of adam": (ADAM, {}, setting("maximize", True), setting("maximize", False)),
    "maximize of adamw": (ADAMW, {}, setting("maximize", True), setting("maximize", False)),
    "maximize of rmsprop": (RMSPROP, {}, setting("maximize", True), setting("maximize", False)),
    "maximize of a group": (two_groups(ADAM), {}, setting("maximize", True, 1), setting("maximize", False, 1)),
    "momentum": (SGD, {}, setting("momentum", 0.8), setting("momentum", 0.0)),
    "no momentum": (
        SGD, {"momentum": 0.9, "dampening": 0.3}, setting("momentum", 0.0), setting("momentum", 0.9)
    ),
    "momentum of a group": (two_groups(SGD), {}, setting("momentum", 0.8, 1), setting("momentum", 0.0, 1)),
    "nesterov": (SGD, {"momentum": 0.9}, setting("nesterov", True), setting("nesterov", False)),
    "differentiable": (ADAM, {}, setting("differentiable", True), setting("differentiable", False)),
    "decoupled": (
        ADAM, {"weight_decay": 0.2}, setting("decoupled_weight_decay", True),
        setting("decoupled_weight_decay", False),
    ),
    "coupled": (
        ADAMW, {"weight_decay": 0.2}, setting("decoupled_weight_decay", False),
        setting("decoupled_weight_decay", True),
    ),
    "decay": (ADAMW, {}, setting("weight_decay", 0.3), setting("weight_decay", 0.01)),
    "decay of a group": (two_groups(ADAM), {}, setting("weight_decay", 0.3, 1), setting("weight_decay", 0.0, 1)),
    "decay as a tensor": (
        ADAM, {}, setting("weight_decay", torch.tensor(0.3, dtype=F64)), setting("weight_decay", 0.0)
    ),
    "betas": (ADAM, {}, setting("betas", (0.5, 0.7)), setting("betas", (0.9, 0.999))),
    "betas as a list": (ADAM, {}, setting("betas", [0.5, 0.7]), setting("betas", (0.9, 0.999))),
    "equal betas as tensors": (
        ADAM, {}, setting("betas", (torch.tensor(0.9), torch.tensor(0.999))), setting("betas", (0.9, 0.999))
    ),
    "eps": (RMSPROP, {}, setting("eps", 0.1), setting("eps", 1e-8)),
    "lr": (ADAM, {}, setting("lr", 0.03), setting("lr", 0.01)),
    "lr as a tensor": (ADAM, {}, lower, lower),
    "a scheduler's own": (two_groups(ADAM), {}, setting("initial_lr", 1.0), setting("initial_lr", 2.0)),
    "a group more": (SGD, {}, split, NONE),
    "a group more of adam": (ADAM, {}, split, NONE),
    "lists swapped": (two_groups(SGD), {}, swapped, swapped),
    "lists mixed": (two_groups(SGD), {}, mixed, mixed),
    "hooks": (SGD, {}, hooked, lambda optimizer: optimizer._optimizer_step_pre_hooks.clear()),
}  # fmt: skip


def differ(ours: Stream, oracle: Oracle) -> None:
    """Weights and the optimizer's state are the same, but for rounding."""
    theirs = weights_of(oracle.layer, oracle.readout)
    for mine, its in zip(ours.parameters, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
        # What torch.optim makes only when it is asked to, such as SGD's momentum, is there on both sides.
        found, wanted = ours.optimizer.state.get(mine, {}), oracle.optimizer.state.get(its, {})
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def paired(make: Make, options: dict[str, Any], backend: str, every: int = 1) -> tuple[Stream, Oracle]:
    layer, readout = network()
    other, reader = copy.deepcopy((layer, readout))
    oracle = Oracle(other, reader, make(weights_of(other, reader), lr=0.01, **options), every)
    optimizer = make(weights_of(layer, readout), lr=0.01, **options)
    stream = Stream(layer, readout, 2, optimizer=optimizer, update_every=every, backend=backend)
    assert stream.backend == backend
    return stream, oracle


@by_backend
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("by", ["run", "step", "between"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_set_counts_until_it_is_set_back(name: str, by: str, every: int, backend: str) -> None:
    """by "between": set after step() and before its learn()."""
    make, options, change, back = CASES[name]
    stream, oracle = paired(make, options, backend, every)
    for start, stop, what in ((0, 5, NONE), (5, 11, change), (11, 17, back)):
        if by != "between":
            what(stream.optimizer), what(oracle.optimizer)
        losses, wanted = [], []
        if by == "run":
            losses = stream.run(X[start:stop], AIM[start:stop]).losses.tolist()
        for t in range(start, stop):
            oracle.step(X[t])
            if by != "run":
                stream.step(X[t])
            if by == "between" and t == start:
                what(stream.optimizer), what(oracle.optimizer)
            wanted.append(oracle.learn(AIM[t]))
            if by != "run":
                losses.append(stream.learn(AIM[t]))
        assert losses == pytest.approx(wanted, rel=1e-12)
        differ(stream, oracle)


LATE = {
    "amsgrad": (ADAM, "amsgrad", True, "max_exp_avg_sq"),
    "amsgrad of adamw": (ADAMW, "amsgrad", True, "max_exp_avg_sq"),
    "centered": (RMSPROP, "centered", True, "grad_avg"),
    "rmsprop's momentum": (RMSPROP, "momentum", 0.9, "momentum_buffer"),
}


@by_backend
@pytest.mark.parametrize("by", ["run", "step", "learn"])
@pytest.mark.parametrize("name", LATE)
def test_options_with_moments_of_their_own(name: str, by: str, backend: str) -> None:
    """They are torch.optim's before its first step; after it they are refused, since torch.optim has no moments then."""
    make, option, value, moment = LATE[name]
    stream, oracle = paired(make, {}, backend)
    for optimizer in (stream.optimizer, oracle.optimizer):
        setting(option, value)(optimizer)
    for t in range(9):
        if t == 5:
            for optimizer in (stream.optimizer, oracle.optimizer):
                setting(option, type(value)())(optimizer)
        oracle.step(X[t])
        wanted = oracle.learn(AIM[t])
        if by == "run":
            assert float(stream.run(X[t : t + 1], AIM[t : t + 1]).losses) == pytest.approx(wanted, rel=1e-12)
        else:
            stream.step(X[t])
            assert stream.learn(AIM[t]) == pytest.approx(wanted, rel=1e-12)
    differ(stream, oracle)

    stream, _ = paired(make, {}, backend)
    stream.run(X[:3], AIM[:3])
    if by == "learn":
        stream.step(X[3])
    setting(option, value)(stream.optimizer)
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises(ValueError, match=f"{option} of torch.optim was set after .* made no {moment}"):
        {
            "run": lambda: stream.run(X[3:], AIM[3:]),
            "step": lambda: stream.step(X[3]),
            "learn": lambda: stream.learn(AIM[3]),
        }[by]()
    after = stream.state_dict()
    assert all(
        torch.equal(a, b) for a, b in zip(before["layer"].values(), after["layer"].values(), strict=True)
    )
    setting(option, type(value)())(stream.optimizer)
    if by == "learn":
        stream.learn(AIM[3])
    stream.run(X[4:], AIM[4:])


def foreign(stream: Stream) -> None:
    stream.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=F64))]})


def left_out(stream: Stream) -> None:
    stream.optimizer.param_groups[0]["params"].pop()


def replaced(stream: Stream) -> None:
    groups = stream.optimizer.param_groups
    groups[0]["params"] = [nn.Parameter(one.detach().clone()) for one in groups[0]["params"]]


def another_weight(stream: Stream) -> None:
    stream.readout.weight = nn.Parameter(stream.readout.weight.detach().clone())  # type: ignore[assignment]


def another_of_the_layer(stream: Stream) -> None:
    stream.layer.weight_ss = nn.Parameter(stream.layer.weight_ss.detach().clone())


def fewer_rows(stream: Stream) -> None:
    stream.learner.remove_rows(torch.tensor([True, False]))


@by_backend
@pytest.mark.parametrize("by", ["run", "step", "learn"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (foreign, "optimizer must still have the weights"),
        (left_out, "optimizer must still have the weights"),
        (replaced, "optimizer must still have the weights"),
        (another_weight, "a weight of the layer or the readout was replaced"),
        (another_of_the_layer, "a weight of the layer or the readout was replaced"),
        (fewer_rows, "the stream's learner must keep its 2 batch rows, got 1"),
    ],
)
def test_other_weights_are_refused(
    change: Callable[[Stream], None], says: str, by: str, backend: str
) -> None:
    stream, _ = paired(ADAM, {}, backend)
    stream.run(X[:3], AIM[:3])
    of_the_optimizer = change in (foreign, left_out, replaced)
    if by == "learn":
        if not of_the_optimizer:
            return
        stream.step(X[3])
    before = copy.deepcopy([*stream.parameters])
    change(stream)
    with pytest.raises(ValueError, match=says):
        {
            "run": lambda: stream.run(X[3:], AIM[3:]),
            "step": lambda: stream.step(X[3]),
            "learn": lambda: stream.learn(AIM[3]),
        }[by]()
    assert all(torch.equal(a, b) for a, b in zip(before, stream.parameters, strict=True))


@needs_a_compiler
def test_another_optimizer_is_the_loops() -> None:
    """One of another class takes its own steps; one of the same class is served."""
    for make in (torch.optim.Adagrad, torch.optim.Adam):
        stream, oracle = paired(ADAM, {}, "compile")
        for start in (0, 8):
            stream.run(X[start : start + 8], AIM[start : start + 8])
            for t in range(start, start + 8):
                oracle.step(X[t])
                oracle.learn(AIM[t])
            differ(stream, oracle)
            stream.optimizer = make(stream.parameters, lr=0.02)
            oracle.optimizer = make(weights_of(oracle.layer, oracle.readout), lr=0.02)


@by_backend
def test_a_population_whose_members_differ(backend: str) -> None:
    """One network's optimizer is changed: all run by the loop, each by its own settings."""
    layer, readout = network()
    many = Stream(layer, readout, 2, optimizer="adam", lr=0.01, population=2, backend=backend)
    assert many.members is not None
    oracles = [
        Oracle(one, reader, ADAM(weights_of(one, reader), lr=0.01), 1)
        for one, reader in (copy.deepcopy((each.layer, each.readout)) for each in many.members)
    ]
    for start, maximize in ((0, False), (6, True), (12, False)):
        for optimizer in (many.members[1].optimizer, oracles[1].optimizer):
            setting("maximize", maximize)(optimizer)
        many.run(X[start : start + 5], AIM[start : start + 5])
        for oracle, member in zip(oracles, many.members, strict=True):
            for t in range(start, start + 5):
                oracle.step(X[t])
                oracle.learn(AIM[t])
            differ(member, oracle)


@by_backend
@pytest.mark.parametrize("predicts", [False, True])
def test_a_reset_between_step_and_learn_is_of_the_next_step(predicts: bool, backend: str) -> None:
    found = []
    layer, readout = RGC(5, init="uniform", dtype=F64), nn.Linear(5, 5, dtype=F64)
    x, aim = torch.randn(12, 2, 5, dtype=F64), None if predicts else torch.randn(12, 2, 5, dtype=F64)
    for late in (True, False):
        mine = copy.deepcopy((layer, readout))
        stream = Stream(*mine, 2, lr=0.1, self_prediction=predicts, backend=backend)
        losses = []
        for t in range(12):
            stream.step(x[t])
            rows = torch.tensor([t in (3, 7), t == 7])
            if late:
                stream.reset(rows)
            losses.append(stream.learn(None if aim is None else aim[t]))
            if not late:
                stream.reset(rows)
        found.append([torch.tensor(losses), *stream.parameters])
    for late, usual in zip(*found, strict=True):
        assert torch.equal(late, usual)
