"""The operators that torch.compile sees: their contract, and a compiled model's values and gradients."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import GRU, LIF, LRU, LSTM, RGC, RNN, OnlineLearner, TwoPointRNN
from rjepa_triton.cells import keys
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.keys import cell_of, key_of
from rjepa_triton.cells.two_point import Cell, Matrix
from rjepa_triton.rules import rfp

F64 = torch.float64


@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_operators_keep_their_contract(
    learning: str, steps: int, diagonal: bool, recompute: bool
) -> None:
    x, weights, (s0, m0), _, _ = oracle.problem(steps, 2, 3, diagonal=diagonal)
    x = x.detach()[None].requires_grad_()
    resets = torch.rand(steps, 2) < 0.3
    cell = key_of(RGCCell())
    arguments = (x, [s0, m0], weights, resets, cell, learning, 0, "torch", recompute)
    torch.library.opcheck(torch.ops.rjepa_triton.two_point.default, arguments)
    states, saved = torch.ops.rjepa_triton.two_point(*arguments)
    assert (saved.numel() == 0) == recompute
    plain = [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.rjepa_triton.two_point_gradients.default,
        (
            x.detach(),
            states.detach(),
            saved.detach(),
            plain,
            resets,
            torch.randn_like(states),
            cell,
            learning,
            0,
            "torch",
        ),
    )


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = RGC(5, input_size=3, init="uniform", dtype=F64, **options)
        self.readout = nn.Linear(5, 2, dtype=F64)

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        output, (s, m) = self.layer(x, resets=resets)
        return self.readout(output).square().mean() + (s * m).mean()


@pytest.mark.parametrize(
    "options",
    [{}, {"learning": "bptt"}, {"recurrence": "diagonal", "batch_first": True}, {"recompute": True}],
    ids=str,
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_compiled_model_is_one_graph_for_every_length(options: dict[str, Any], reset: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for steps in (4, 7, 9):
        x = torch.randn(steps, 2, 3, dtype=F64, requires_grad=True)
        given = x.transpose(0, 1) if options.get("batch_first") else x
        resets = torch.rand(given.shape[:2]) < 0.3 if reset else None
        results = []
        for run in (model, compiled):
            loss = run(given, resets)
            results.append([loss, *torch.autograd.grad(loss, [x, *model.parameters()])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length, then any


class Leaky(Cell):
    """A cell of a user's, with an attribute."""

    states, gates, affine = ("h",), ("h",), False
    matrices = (Matrix("hh", ("gate", 0), 0),)

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self.alpha * c[0] + (1 - self.alpha) * torch.tanh(p[0] + x[0]),)


LAYERS: dict[str, Callable[[], TwoPointRNN]] = {
    "lstm": lambda: LSTM(3, 5, dtype=F64),
    "gru": lambda: GRU(3, 5, dtype=F64, learning="bptt"),
    "elman": lambda: RNN(3, 5, dtype=F64),
    "lru": lambda: LRU(3, 5, dtype=F64),
    "lif": lambda: LIF(3, 5, dtype=F64),
    "of one's own": lambda: TwoPointRNN(Leaky(0.7), 5, input_size=3, dtype=F64),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_one_graph_for_every_length(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for steps, batch in ((4, 2), (7, 3), (9, 4), (2, 5), (30, 7)):
        x = torch.randn(steps, batch, 3, dtype=F64, requires_grad=True)
        results = []
        for run in (layer, compiled):
            output, state = run(x)
            last = state if isinstance(state, Tensor) else torch.stack(state)
            loss = output.square().sum() + last.sum()
            results.append([output, *torch.autograd.grad(loss, [x, *layer.parameters()])])
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["lstm", "lru", "of one's own"])
def test_a_layer_is_exported_for_every_length_and_batch(name: str) -> None:
    layer = LAYERS[name]()
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    x = torch.randn(6, 3, 3, dtype=F64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": sizes})
    for steps, batch in ((6, 3), (11, 2), (2, 7)):
        given = torch.randn(steps, batch, 3, dtype=F64)
        torch.testing.assert_close(program.module()(given), layer(given), rtol=1e-12, atol=1e-12)


def test_a_cell_is_made_again_from_its_key() -> None:
    first, other = Leaky(0.7), Leaky(0.2)
    key = key_of(first)
    assert key_of(Leaky(0.7)) == key != key_of(other)
    first.alpha = 0.1  # the key is that of the cell as it is
    assert key_of(first) != key
    assert vars(cell_of(key))["alpha"] == 0.7
    keys._MADE.clear()
    made = cell_of(key)
    assert isinstance(made, Leaky)
    assert made.alpha == 0.7
    for unknown in ("rjepa_triton.cells.builtin:NoCell?{}", "nowhere:Cell?{}", "nowhere:Cell#7"):
        with pytest.raises(ValueError, match=r"cell .* (can.t be made|doesn.t live)"):
            cell_of(unknown)


def test_a_cell_whose_attributes_are_no_plain_values_has_a_key_while_it_lives() -> None:
    cell = Leaky(torch.tensor(0.5))  # type: ignore[arg-type]
    key = key_of(cell)
    assert cell_of(key) is cell
    assert key_of(copy.copy(cell)) != key
    del cell
    gc.collect()
    with pytest.raises(ValueError, match="doesn't live in this process"):
        cell_of(key)


def test_a_compiled_model_by_inductor() -> None:
    torch._dynamo.reset()
    model = Model()
    x = torch.randn(4, 2, 3, dtype=F64)
    want = torch.autograd.grad(model(x), list(model.parameters()))
    got = torch.autograd.grad(torch.compile(model, fullgraph=True)(x), list(model.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_compiled_model_under_autocast() -> None:
    model = torch.nn.ModuleDict({"below": torch.nn.Linear(3, 4), "rgc": RGC(4, init="uniform")})

    def run(x: torch.Tensor) -> torch.Tensor:
        return model["rgc"](model["below"](x))[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), run(x))


LEARNING: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "step", "learning": "rtrl"},
    {"form": "lazy", "rewrite_every": 8},
    {"form": "history"},
    {"form": "chunk", "update_every": 5},
    {"credit": "carry", "update_every": 5},
]


@pytest.mark.parametrize("options", LEARNING, ids=str)
@pytest.mark.parametrize(
    "make", [lambda: RGC(4, input_size=3, init="uniform", dtype=F64), lambda: LRU(3, 4, dtype=F64)]
)
def test_a_learners_steps_compile_as_one_graph(make: Any, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = make()
    readout = nn.Linear(4, 2, dtype=F64)
    streams = [torch.randn(steps, 2, 3, dtype=F64) for steps in (5, 5, 3, 4, 2)]
    parameters = [*layer.parameters(), *readout.parameters()]
    results = []
    for compiled in (False, True):
        learner = OnlineLearner(layer, 2, **options)

        def loss(x: Tensor, learner: OnlineLearner = learner) -> Tensor:
            return readout(learner.chunk(x)).square().sum()

        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        found = []
        for i, x in enumerate(streams):
            if i == 3:
                learner.reset(torch.tensor([True, False]))
            given = x.clone().requires_grad_()
            value = run(given)
            found += [value.detach(), *torch.autograd.grad(value, [given, *parameters])]
        results.append(found)
    assert oracle.relative(results[1], results[0]) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_single_steps_compile_too() -> None:
    torch._dynamo.reset()
    layer = RGC(4, init="uniform", dtype=F64)
    x = torch.randn(6, 2, 4, dtype=F64)
    results = []
    for compiled in (False, True):
        layer.zero_grad()
        learner = OnlineLearner(layer, 2)

        def two(a: Tensor, b: Tensor, learner: OnlineLearner = learner) -> Tensor:
            learner.step(a)
            return learner.step(b).square().sum()

        run = torch.compile(two, fullgraph=True) if compiled else two
        with torch.no_grad():
            learner.step(x[0])
        value = run(x[1], x[1])  # two equal calls are two steps
        value.backward()
        results.append([value.detach(), torch.stack(learner.state), layer.weight_ss.grad.clone()])
    assert oracle.relative(results[1], results[0]) < 1e-10
    chunked = OnlineLearner(layer, 2, form="chunk", update_every=2)
    with pytest.raises(Exception, match=r"form='chunk' runs by chunk\(\) under torch\.compile"):
        torch.compile(chunked.step, fullgraph=True, backend="eager")(x[0])


def test_the_learners_operators_keep_their_contract() -> None:
    layer = RGC(4, input_size=3, init="uniform")
    learner = OnlineLearner(layer, 2)
    clock = torch.zeros((), dtype=torch.int64)
    handle, x = learner._compiled.handle, torch.randn(3, 2, 3, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.rjepa_triton.learner_steps, (handle, x, None, list(layer.weights()), clock, 4, 1)),
        (torch.ops.rjepa_triton.learner_reset, (handle, torch.tensor([True, False]), clock)),
        (torch.ops.rjepa_triton.learner_state, (handle, torch.zeros(2, 4), clock, 2)),
    ]
    for operator, arguments in operators:
        torch.library.opcheck(operator.default, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("fan_in", [1, 3, 5])
def test_gammas_operators_keep_their_contract(backend: str, fan_in: int) -> None:
    states, batch, matrices, units, steps = 2, 2, 3, 5, 4
    reads = units if fan_in == 1 else fan_in
    gammas = [torch.randn(batch, matrices, units, fan_in) for _ in range(states)]
    m, phi = (
        torch.randn(states, states, steps, batch, units),
        torch.randn(states, steps, batch, matrices, units),
    )
    y, credit = torch.randn(steps, batch, matrices, reads), torch.randn(states, batch, units)
    if backend == "triton" and fan_in == 1:
        pytest.skip("kernels take dense matrices")
    step = (gammas, m[:, :, 0].clone(), phi[:, 0].clone(), y[0].clone(), credit, backend)
    torch.library.opcheck(torch.ops.rjepa_triton.gamma_step_.default, step)
    torch.library.opcheck(torch.ops.rjepa_triton.gamma_chunk_.default, (gammas, m, phi, y, credit, backend))
    copies = [gamma.clone() for gamma in gammas]
    got = torch.ops.rjepa_triton.gamma_step_(gammas, *step[1:])
    want = rfp.gamma_step_(copies, *step[1:-1])
    torch.testing.assert_close([got, *gammas], [want, *copies], rtol=1e-5, atol=1e-5)
