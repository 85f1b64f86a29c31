"""Graphed steps, with a stand-in for CUDA's graphs that runs the same function into the same arrays."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import GRU, LRU, LSTM, RGC, RNN, OnlineLearner, TwoPointRNN
from rjepa_triton.backend import triton_backend
from rjepa_triton.online import cuda_graph
from rjepa_triton.online.cuda_graph import Capture
from rjepa_triton.planning import cost

F64 = torch.float64

LAYERS: dict[str, Any] = {
    "rgc": lambda: RGC(5, input_size=3, init="uniform", dtype=F64),
    "rgc-without-input": lambda: RGC(5, init="uniform", dtype=F64),
    "lstm-heads": lambda: LSTM(3, 6, heads=3, dtype=F64),
    "gru": lambda: GRU(3, 5, dtype=F64),
    "lru": lambda: LRU(3, 5, dtype=F64),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


POISONS = [float("nan"), float("inf"), 1e30]


def stand_in(learner: OnlineLearner, poison: float = float("nan")) -> Capture:
    """In place of `cuda_graph`: three runs, then a capture, which changes nothing and whose results hold no numbers."""
    sensitivity = learner._past.sensitivity
    assert sensitivity is not None
    held = [learner._state, *sensitivity.tensors(), *(p.data for p in learner.layer.parameters())]

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        for _ in range(3):
            function()
        kept = [tensor.clone() for tensor in held]
        made, again = function(), function()
        for tensor, other in zip(made, again, strict=True):
            if (
                tensor.data_ptr() != other.data_ptr()
            ):  # of the capture, and not an input that is handed through
                tensor.fill_(poison if tensor.is_floating_point() else 1)
        for tensor, before in zip(held, kept, strict=True):
            tensor.copy_(before)

        def replay() -> None:
            with torch.no_grad():
                for target, value in zip(made, function(), strict=True):
                    target.copy_(value)

        return made, replay

    return capture


def graphed(layer: TwoPointRNN, batch: int, *, poison: float = float("nan"), **options: Any) -> OnlineLearner:
    learner = OnlineLearner(layer, batch, **{"form": "step", **options})
    learner._graph = learner._graphed(stand_in(learner, poison))
    return learner


def run(learner: OnlineLearner, x: Tensor, delta: Tensor, skip: set[int] = frozenset()) -> list[Tensor]:  # type: ignore[assignment]
    """Outputs, input gradients, parameters after learning with every loss but those of steps in `skip`."""
    layer = learner.layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)  # has nothing to do where the learner has lr
    found = []
    for t in range(len(x)):
        if t == 3:
            learner.reset(torch.tensor([True, False]))
        if t == 6:
            learner.reset()
        given = x[t].clone().requires_grad_()
        output = learner.step(given)
        found.append(output.detach().clone())
        if t not in skip:
            optimizer.zero_grad()
            (output * delta[t]).sum().backward()
            assert given.grad is not None
            found.append(given.grad)
            optimizer.step()
    return [*found, *(p.detach().clone() for p in layer.parameters())]


@by_layer
@pytest.mark.parametrize("skip", [set(), {2, 3, 7}], ids=str)
def test_a_graphed_learner_is_the_plain_one(name: str, skip: set[int]) -> None:
    plain = LAYERS[name]()
    twin = LAYERS[name]()
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, plain.fan_in, dtype=F64), torch.randn(9, 2, plain.hidden_size, dtype=F64)
    want = run(OnlineLearner(plain, 2, form="step"), x, delta, skip)
    got = run(graphed(twin, 2), x, delta, skip)
    assert oracle.relative(got, want) < 1e-12


@by_layer
def test_a_graph_that_takes_the_weights_step(name: str) -> None:
    plain, twin = LAYERS[name](), LAYERS[name]()
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, plain.fan_in, dtype=F64), torch.randn(9, 2, plain.hidden_size, dtype=F64)
    want = run(OnlineLearner(plain, 2, form="step"), x, delta, {2, 7})
    learner = graphed(twin, 2, lr=0.5)
    learner.lr = 0.1  # after the capture
    assert oracle.relative(run(learner, x, delta, {2, 7}), want) < 1e-12
    assert all(weight.grad is None for weight in twin.weights())


@by_layer
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_constructor_changes_no_weight(name: str, poison: float, autocast: bool) -> None:
    """A capture runs nothing: the second one's first runs must not read arrays that no kernel has written."""
    plain, twin = LAYERS[name](), LAYERS[name]()
    twin.load_state_dict(plain.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        learner = graphed(twin, 2, lr=0.1, poison=poison)
    for weight, want in zip(twin.parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, want)
    sensitivity = learner._past.sensitivity
    assert sensitivity is not None
    assert not any(bool(tensor.any()) for tensor in (learner._state, *sensitivity.tensors()))
    x, delta = torch.randn(5, 2, plain.fan_in, dtype=F64), torch.randn(5, 2, plain.hidden_size, dtype=F64)
    want = run(OnlineLearner(plain, 2, form="step"), x, delta)
    assert oracle.relative(run(learner, x, delta), want) < 1e-12


def test_nor_does_one_that_fails_or_whose_first_runs_overflow() -> None:
    layer = RNN(3, 5, nonlinearity="relu", dtype=F64)
    with torch.no_grad():
        layer.bias.fill_(1e300)
        layer.weight_hh.fill_(1e300)
    before = [p.clone() for p in layer.parameters()]
    graphed(layer, 2, lr=0.1)
    learner = OnlineLearner(layer, 2, form="step", lr=0.1)

    def fails(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        made = stand_in(learner)(function)
        if function.__name__ == "_run_backward":
            raise RuntimeError("out of memory")
        return made

    with pytest.raises(RuntimeError, match="out of memory"):
        learner._graphed(fails)
    assert all(torch.equal(p, want) for p, want in zip(layer.parameters(), before, strict=True))


def test_a_capture_runs_on_the_layers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's functions replaced: the current device is another."""
    said: list[object] = []

    class Context:
        def __init__(self, *names: object, **named: object) -> None:
            self.names = (*names, *named.values())

        def __enter__(self) -> None:
            said.append(self.names)

        def __exit__(self, *_: object) -> None:
            said.append("end")

    class Stream(Context):
        def wait_stream(self, other: object) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            pass

    streams: list[Stream] = []

    def make() -> Stream:
        streams.append(Stream())
        return streams[-1]

    for name, value in {
        "device": Context,
        "Stream": make,
        "stream": Context,
        "graph": Context,
        "CUDAGraph": Graph,
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    second = torch.device("cuda", 1)
    with cuda_graph._current(second):
        cuda_graph.cuda_graph(list)
    assert said[0] == (second,)
    captured = [
        names for names in said if isinstance(names, tuple) and any(isinstance(n, Graph) for n in names)
    ]
    assert captured[0][1] is streams[0]  # not the one that torch made on another device
    assert said[-1] == "end"
    assert isinstance(cuda_graph._current(torch.device("cpu")), contextlib.nullcontext)


@pytest.mark.parametrize(("features", "kernels", "forward", "backward"), [(None, 2, 2, 3), (3, 4, 3, 5)])
def test_what_a_graph_of_kernels_is_made_of(
    features: int | None, kernels: int, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton, with lr: the step's kernel and Γ's; of torch the state kept, its flag, and the input's gradient.

    With an input of its own a product more each way, and two more groups of matrices, W_in and the bias.
    """
    pytest.importorskip("triton")
    if triton_backend.no_triton(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("the interpreter is off: a GPU is here")
    from rjepa_triton.kernels import cell_step, gamma_step

    learner = graphed(RGC(16, input_size=features), 1, backend="triton", lr=0.1)
    graph = learner._graph
    assert graph is not None
    launched: list[object] = []
    for module, name in ((cell_step, "_step_kernel"), (gamma_step, "_gamma_step_kernel")):
        monkeypatch.setattr(module, name, Unlaunched(launched))
    with torch.no_grad():
        made = [cost.counted(function).calls for function in (graph._run_forward, graph._run_backward)]
    assert len(launched) == kernels
    assert made == [forward, backward]


class Unlaunched:
    """In a kernel's place: writes down that it would be launched."""

    def __init__(self, launched: list[object]) -> None:
        self.launched = launched

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: self.launched.append(grid)


def test_a_graphed_learner_by_kernels() -> None:
    if triton_backend.no_triton(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("no triton, or a GPU is here")
    plain, twin = (RGC(9, input_size=3, init="uniform") for _ in range(2))
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, 3), torch.randn(9, 2, 9)
    want = run(OnlineLearner(plain, 2, form="step", backend="torch"), x, delta)
    assert oracle.relative(run(graphed(twin, 2, backend="triton", lr=0.1), x, delta), want) < 1e-5


@pytest.mark.parametrize("learning", ["eprop", "snap0"])
def test_rules_with_less_of_m(learning: str) -> None:
    plain, twin = LAYERS["gru"](), LAYERS["gru"]()
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, 3, dtype=F64), torch.randn(9, 2, 5, dtype=F64)
    want = run(OnlineLearner(plain, 2, learning=learning, form="step"), x, delta)
    assert oracle.relative(run(graphed(twin, 2, learning=learning), x, delta), want) < 1e-12


def test_stochastic_rounding_draws_anew_at_each_replay() -> None:
    """As the plain learner draws, whatever was drawn while the graphs were captured."""
    plain, twin = (RGC(5, input_size=3, init="uniform") for _ in range(2))
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, 3), torch.randn(9, 2, 5)
    options: dict[str, Any] = {"gamma_dtype": torch.bfloat16, "gamma_rounding": "stochastic", "seed": 5}
    want = run(OnlineLearner(plain, 2, form="step", **options), x, delta, {4})
    assert oracle.relative(run(graphed(twin, 2, **options), x, delta, {4}), want) < 1e-6


def test_a_checkpoint_serves_both_kinds() -> None:
    layer = LAYERS["rgc"]()
    x = torch.randn(8, 2, 3, dtype=F64)

    def go_on(learner: OnlineLearner) -> list[Tensor]:
        layer.zero_grad()
        for t in range(5, 8):
            learner.step(x[t]).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    first = graphed(layer, 2)
    for t in range(5):
        first.step(x[t])
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    want = go_on(first)
    for learner in (OnlineLearner(layer, 2, form="step"), graphed(layer, 2)):
        saved.seek(0)
        learner.load_state_dict(torch.load(saved, weights_only=True))
        assert oracle.relative(go_on(learner), want) < 1e-12


def test_a_checkpoint_of_a_step_whose_backward_is_still_to_come() -> None:
    """It leaves the learner as it is, whichever kind wrote it, and the other kind goes on from it."""
    layer = LAYERS["rgc"]()
    x = torch.randn(9, 2, 3, dtype=F64)

    def go_on(learner: OnlineLearner) -> list[Tensor]:
        layer.zero_grad()
        for row in x[5:]:
            learner.step(row).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    found = []
    for make in (lambda: OnlineLearner(layer, 2, form="step"), lambda: graphed(layer, 2)):
        learner = make()
        for row in x[:4]:
            learner.step(row)
        last = learner.step(x[4])
        saved = io.BytesIO()
        torch.save(learner.state_dict(), saved)
        last.sum().backward()
        found.append(go_on(learner))
        for other in (OnlineLearner(layer, 2, form="step"), graphed(layer, 2)):
            other.step(x[0])
            saved.seek(0)
            other.load_state_dict(torch.load(saved, weights_only=True))
            found.append(go_on(other))
    for other in found[1:]:
        assert oracle.relative(other, found[0]) < 1e-12


def test_gradients_handed_out_stay_as_they_are() -> None:
    layer = LAYERS["rgc"]()
    learner = graphed(layer, 2)
    first = torch.autograd.grad(learner.step(torch.randn(2, 3, dtype=F64)).sum(), layer.weight_in)[0]
    kept = first.clone()
    output = learner.step(torch.randn(2, 3, dtype=F64))
    shown = output.detach().clone()
    torch.autograd.grad(output.sum(), layer.weight_in)
    learner.step(torch.randn(2, 3, dtype=F64))
    assert torch.equal(first, kept)
    assert torch.equal(output, shown)


def test_what_a_graph_cannot_do_is_said() -> None:
    layer = LAYERS["rgc"]()
    with pytest.raises(ValueError, match="cuda_graph=True needs a layer on a CUDA or ROCm device, got cpu"):
        OnlineLearner(layer, 2, cuda_graph=True)
    for options in ({"lag": 1}, {"learning": "rtrl"}, {"form": "lazy"}):
        with pytest.raises(
            ValueError, match="cuda_graph=True goes with form='step', lag=0 and a rule of rfp"
        ):
            graphed(layer, 2, **options)
    learner = graphed(layer, 2)
    with pytest.raises(ValueError, match=r"chunk\(\) can't go with cuda_graph=True"):
        learner.chunk(torch.randn(3, 2, 3, dtype=F64))
    late = learner.step(torch.randn(2, 3, dtype=F64))
    learner.step(torch.randn(2, 3, dtype=F64))
    with pytest.raises(RuntimeError, match="backward of step 1 comes too late: Γ is that of step 2 now"):
        late.sum().backward()
    layer.weight_ss.data = layer.weight_ss.detach().clone()
    with pytest.raises(RuntimeError, match="a parameter of the layer has new storage"):
        learner.step(torch.randn(2, 3, dtype=F64))
