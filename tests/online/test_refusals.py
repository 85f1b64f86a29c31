"""What a learner can't do is refused by name, and what it can do it does where it is used: autocast, threads, hooks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from rjepa_triton import ELSTM, GRU, LRU, LSTM, RGC, OnlineLearner, Stack, StackLearner, Stream, TwoPointRNN
from rjepa_triton.backend.native_backend import cpp_compiler
from rjepa_triton.cells.two_point import Cell, Matrix, Partials

F64 = torch.float64


# Weights that are computed from others


def masked(layer: RGC) -> None:
    class Masked(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.tril()

    nn.utils.parametrize.register_parametrization(layer, "weight_ss", Masked())


@pytest.mark.parametrize("change", [lambda made: parametrizations.weight_norm(made, "weight_ss"), masked])
def test_lr_with_weights_that_are_computed(change: Any) -> None:
    before, after = RGC(4, init="uniform"), RGC(4, init="uniform")
    change(before)
    with pytest.raises(
        ValueError, match="lr goes with weights that are parameters: ss is computed from others"
    ):
        OnlineLearner(before, 2, lr=0.1)
    learner = OnlineLearner(after, 2, lr=0.1)
    change(after)
    with pytest.raises(ValueError, match="go with weights that are parameters, and ss is computed"):
        learner.step(torch.randn(2, 4))
    OnlineLearner(before, 2).step(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for name, p in before.named_parameters() if "original" in name)


def test_lr_with_weights_that_become_computed() -> None:
    """After the learner was made, too: as plain attributes, or as torch.func.functional_call puts them there."""
    x = torch.randn(2, 4)
    learner = OnlineLearner(RGC(4, init="uniform"), 2, lr=0.1, form="step")
    others = {name: 2 * value for name, value in learner.named_parameters()}
    with pytest.raises(
        ValueError, match="lr and cuda_graph=True go with weights that are parameters, and ss is"
    ):
        torch.func.functional_call(learner, others, (x,))
    learner(x).sum().backward()
    original = learner.layer._parameters.pop("weight_sm")
    learner.layer.weight_sm = original * 1.0
    with pytest.raises(ValueError, match="and sm is computed from others by now"):
        learner.step(x)
    del learner.layer.weight_sm
    learner.layer.weight_sm = nn.Parameter(torch.zeros(4, 4))  # another parameter learns as the first did
    learner.step(x).sum().backward()
    learner.step(x).sum().backward()
    assert learner.layer.weight_sm.any()


def test_lr_with_a_parametrized_readout_trains_the_rest() -> None:
    layer = ELSTM(3, 4)
    parametrizations.weight_norm(layer.output_in)
    start = layer.weights()[0].detach().clone()
    OnlineLearner(layer, 2, lr=0.1).step(torch.randn(2, 3)).sum().backward()
    learner = OnlineLearner(layer, 2, lr=0.1)
    for _ in range(3):
        learner.step(torch.randn(2, 3)).sum().backward()
    assert not torch.equal(layer.weights()[0], start)


@pytest.mark.parametrize(
    "value", [10**40, 10**400, 1e39, -1, float("inf"), True, "0.1", [0.1], torch.ones(2)]
)
def test_lr_that_is_no_rate(value: Any) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number"):
        OnlineLearner(RGC(3), 2, lr=value)
    learner = OnlineLearner(RGC(3), 2, lr=0.5)
    with pytest.raises(ValueError, match="lr must be a finite number"):
        learner.lr = value
    assert learner.lr == 0.5
    learner.lr = 10**30  # an int that torch has no dtype for, but a number that float32 holds
    assert learner.lr == pytest.approx(1e30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": "1"}, "seed must be an int, got str"),
        ({"seed": 1.0, "learning": "uoro"}, "seed must be an int, got float"),
        ({"cuda_graph": "yes"}, "cuda_graph must be a bool, got str"),
    ],
)
def test_other_junk(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        OnlineLearner(RGC(3), 2, **options)
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*64"):
        OnlineLearner(RGC(3), 2, seed=2**64)


# Hooks


def pruned(layer: RGC) -> None:
    prune.l1_unstructured(layer, "weight_ss", 0.5)


def noisy(module: nn.Module, *_: object) -> None:
    raise AssertionError("a learner ran it")


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (pruned, "L1Unstructured in _forward_pre_hooks"),
        (lambda layer: layer.register_forward_pre_hook(noisy), "noisy in _forward_pre_hooks"),
        (lambda layer: layer.register_forward_hook(noisy), "noisy in _forward_hooks"),
        (lambda layer: layer.register_full_backward_hook(noisy), "noisy in _backward_hooks"),
    ],
)
def test_hooks_are_refused(add: Any, named: str) -> None:
    before, after = RGC(4, init="uniform"), RGC(4, init="uniform")
    add(before)
    with pytest.raises(ValueError, match=f"layer must have no hooks .* got {named}"):
        OnlineLearner(before, 2)
    learner = OnlineLearner(after, 2)
    add(after)
    for call in (lambda: learner.step(torch.randn(2, 4)), lambda: learner.chunk(torch.randn(3, 2, 4))):
        with pytest.raises(ValueError, match="layer must have no hooks"):
            call()


def test_hooks_of_a_stack_are_refused() -> None:
    """Those of its layers are their learners' to refuse."""
    stack = Stack(RGC(4, init="uniform"))
    learner = StackLearner(stack, 2)
    copied = copy.deepcopy(learner)
    hook = stack.register_forward_hook(noisy)
    says = "stack must have no hooks on its forward or backward pass, which a StackLearner doesn't run, got noisy"
    for call in (
        lambda: StackLearner(stack, 2),
        lambda: learner.step(torch.randn(2, 4)),
        lambda: learner(torch.randn(2, 4)),
        lambda: learner.peek(torch.randn(2, 4)),
        lambda: learner.chunk(torch.randn(3, 2, 4)),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    copied.step(torch.randn(2, 4))
    copied.learners[0].layer.register_forward_hook(noisy)
    with pytest.raises(ValueError, match="layer must have no hooks"):
        copied.step(torch.randn(2, 4))
    hook.remove()
    learner.step(torch.randn(2, 4))


@pytest.mark.parametrize("make", [lambda: ELSTM(3, 5), lambda: LRU(3, 5)], ids=["elstm", "lru"])
@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm", "a hook"])
def test_hooks_of_a_readout_run(make: Any, how: str) -> None:
    """By the layer and by its learner, step after step, with a gradient of the weights that a hook computes from."""
    layer, ran = make(), []
    linear = layer.output_in if isinstance(layer, ELSTM) else layer.output_re
    if how == "prune":
        prune.l1_unstructured(linear, "weight", 0.5)
    elif how == "a hook":
        linear.register_forward_hook(lambda *_: ran.append(1))
    else:
        getattr(nn.utils, how)(linear, "weight")
    name = {"prune": "weight_orig", "weight_norm": "weight_v", "spectral_norm": "weight_orig"}.get(
        how, "weight"
    )
    learner = OnlineLearner(layer, 2)
    for run in (lambda: learner.step(torch.randn(2, 3)), lambda: layer(torch.randn(4, 2, 3))[0]):
        for _ in range(3):
            linear.zero_grad()
            run().sum().backward()
            assert getattr(linear, name).grad.any()
    assert len(ran) == (6 if how == "a hook" else 0)


# Threads


def test_two_threads_of_one_learner() -> None:
    """One at a time, or an error that says so: never wrong numbers or an error from within."""
    learner = OnlineLearner(LSTM(8, 64), 8, form="lazy", rewrite_every=4)
    said: list[BaseException] = []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        for _ in range(60):
            try:
                learner.step(torch.randn(8, 8))
            except RuntimeError as error:
                said.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another thread is running this OnlineLearner" in str(error) for error in said)
    assert learner.state_dict()["now"] == 4 * 60 - len(said)
    learner.step(torch.randn(8, 8)).sum().backward()


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("how", ["run", "step"])
def test_two_threads_of_one_stream(how: str) -> None:
    """Compiled code runs without Python's lock: while it does, another thread's call is refused and changes nothing."""
    stream = Stream(RGC(4, input_size=3, init="uniform"), nn.Linear(4, 2), 2, backend="compile")
    x, target = torch.randn(5, 2, 3), torch.randn(5, 2, 2)
    said: list[str] = []
    assert stream._compiled is not None
    function = stream._compiled.function

    def other() -> None:
        try:
            stream.run(x, target)
        except RuntimeError as error:
            said.append(str(error))

    def interrupted(*tables: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        function(*tables)

    stream._compiled.function = interrupted
    if how == "run":
        stream.run(x, target)
    else:
        stream.step(x[0])
        stream.learn(target[0])
    assert len(said) == (1 if how == "run" else 2)
    says = (
        "another thread is running this OnlineLearner",
        "run() came after step() without its learn(target)",
    )
    assert all(any(each in one for each in says) for one in said), said
    assert "another thread is running" in said[0]
    assert stream.learner.state_dict()["now"] == (5 if how == "run" else 1)


@pytest.mark.parametrize("how", ["step", "chunk", "backward"])
def test_what_another_thread_is_in_the_middle_of(how: str) -> None:
    learner = OnlineLearner(RGC(4, init="uniform"), 2)
    loss = learner.step(torch.randn(2, 4)).sum()
    calls = {
        "step": lambda: learner.step(torch.randn(2, 4)),
        "chunk": lambda: learner.chunk(torch.randn(3, 2, 4)),
        "backward": lambda: loss.backward(retain_graph=True),
    }
    learner._past.enter()
    with pytest.raises(RuntimeError, match="another thread is running this OnlineLearner"):
        calls[how]()
    learner._past.leave()
    calls[how]()


# Autocast


@pytest.mark.parametrize(
    "options",
    [
        {"form": "step"},
        {"form": "lazy", "rewrite_every": 3},
        {"form": "history"},
        {"form": "chunk", "update_every": 3},
        {"credit": "carry", "update_every": 3},
        {"refine": 1, "update_every": 3},
        {"learning": "rtrl"},
        {"learning": "uoro"},
        {"learning": "snap0"},
        {"learning": "tbptt", "update_every": 3},
        {"form": "step", "lr": 0.1},
        {"form": "step", "lag": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [lambda: LSTM(3, 8), lambda: GRU(3, 8), lambda: LRU(3, 8), lambda: ELSTM(3, 8)]
)
def test_a_backward_inside_autocast_runs_in_the_parameters_dtype(make: Any, options: dict[str, Any]) -> None:
    layer = make()
    x = torch.randn(9, 2, 3)
    results = []
    for autocast in (False, True):
        twin = copy.deepcopy(layer)
        learner = OnlineLearner(twin, 2, **options)
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for start in (0, 3, 6):
                if options.get("lr"):
                    for t in range(start, start + 3):
                        learner.step(given[t]).square().sum().backward()
                else:
                    learner.chunk(given[start : start + 3]).square().sum().backward()
        parts = [p.detach() if p.grad is None else p.grad for p in twin.parameters()]
        assert given.grad is not None
        results.append([given.grad, *parts])
    assert oracle.relative(results[1], results[0]) < 1e-6


# Cells with partials of their own


class Spike(Cell):
    """A spiking unit with a surrogate slope: autograd finds no gradient through its threshold."""

    states = ("v", "z")
    gates = ("i",)
    matrices = (Matrix("zi", ("gate", 0), 1),)
    outputs: Sequence[int] = (1,)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        v = 0.9 * c[0] + p[0] + x[0] - c[1]
        return v, (v > 0.5).to(v)

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        v = 0.9 * c[0] + p[0] + x[0] - c[1]
        slope, one = 0.3 * (1 - (v - 0.5).abs()).clamp(min=0), torch.ones_like(v)
        into = {0: one, 1: slope}
        return Partials([{0: 0.9 * one, 1: 0.9 * slope}, {0: -one, 1: -slope}], [into], [into])


class Detached(Spike):
    """The same, where no state passes on a gradient."""

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        v, z = super().update(c, p, x)
        return v.detach(), z


@pytest.mark.parametrize("cell", [Spike, Detached])
@pytest.mark.parametrize("outputs", [(1,), (0, 1)])
@pytest.mark.parametrize("learning", ["rfp", "eprop"])
def test_a_cell_with_a_surrogate_slope_learns_online(
    cell: Any, outputs: tuple[int, ...], learning: str
) -> None:
    made = cell()
    made.outputs = outputs
    layer = TwoPointRNN(made, 4, input_size=3, learning=learning, dtype=F64)
    x = torch.randn(6, 2, 3, dtype=F64)
    delta = torch.randn(6, 2, 4, dtype=F64)
    (layer(x)[0] * delta).sum().backward()
    want = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert float(want[0].norm()) > 0
    for options in ({}, {"form": "step"}, {"form": "history"}, {"form": "chunk", "update_every": 6}):
        layer.zero_grad()
        learner = OnlineLearner(layer, 2, learning=learning, **options)  # type: ignore[arg-type]
        (learner.chunk(x) * delta).sum().backward()
        assert oracle.relative([p.grad for p in layer.parameters()], want) < 1e-12


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [ELSTM, LRU, GRU])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
def test_steps_without_gradients(build: Any, mode: Any, autocast: bool, lag: int) -> None:
    """Also of a layer with a readout, where that is one node: with lag=1, and under autocast."""
    layer, x = build(3, 4), torch.randn(6, 2, 3)
    outputs = []
    for inside in (mode, torch.enable_grad):
        learner = OnlineLearner(layer, 2, form="step", lag=lag)
        layer.zero_grad()
        with inside(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [learner.step(x[0]), *learner.chunk(x[1:4])]
        last = learner.step(x[4])  # and the stream goes on
        last.sum().backward()
        outputs.append([each.detach() for each in (*found, last, *(p.grad for p in layer.parameters()))])
    for got, want in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("learning", ["rfp", "rtrl", "uoro", "tbptt"])
@pytest.mark.parametrize("form", ["auto", "lazy", "history"])
def test_a_stream_goes_on_after_steps_in_inference_mode(learning: str, form: str) -> None:
    """What is carried stays a tensor that may be changed in place, by steps, chunks and resets."""
    if learning != "rfp" and form != "auto":
        pytest.skip("the rule has a form of its own")
    found = []
    layer, x = LSTM(3, 4), torch.randn(9, 2, 3)
    for mode in (torch.inference_mode, torch.no_grad):
        layer.zero_grad()
        learner = OnlineLearner(layer, 2, learning=learning, form=form)  # type: ignore[arg-type]
        with mode():
            learner.step(x[0])
            learner.chunk(x[1:3], torch.tensor([[False, True], [False, False]]))
            learner.step(x[3])
        learner.reset(torch.tensor([True, False]))
        learner.step(x[4]).sum().backward()
        learner.chunk(x[5:8]).sum().backward()
        learner.load_state_dict(copy.deepcopy(learner.state_dict()))
        learner.reset()
        learner.step(x[8]).sum().backward()
        found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert oracle.relative(*found) < 1e-6
