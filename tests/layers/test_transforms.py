"""Layers under torch.func: autograd of the same layer outside of it is the oracle, and torch.nn for second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_cell import SHAPES, by_smooth_cell, problem
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from rjepa_triton import ELSTM, GRU, LIF, LRU, LSTM, RGC, ConvRGC, OnlineLearner, compat
from rjepa_triton.cells.two_point import Cell
from rjepa_triton.layers.functional import two_point

F64 = torch.float64
RULES: tuple[dict[str, Any], ...] = (
    {"learning": "rfp"},
    {"learning": "bptt"},
    {"learning": "rtrl"},
    {"learning": "rfp", "refine": "exact"},
)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@by_smooth_cell
def test_the_derivative_is_that_of_the_rule(cell: Cell, shape: str, rule: dict[str, Any]) -> None:
    x, weights, state, delta = problem(cell, shape)
    resets = torch.rand(x.shape[1:3]) < 0.2

    def run(x: Tensor, weights: list[Tensor], state: list[Tensor]) -> Tensor:
        return torch.stack(two_point(cell, x, weights, state, resets=resets, **rule))

    want = run(x, weights, state)
    leaves = [x, *weights, *state]
    grads = torch.autograd.grad((want * delta).sum(), leaves, materialize_grads=True)
    got, pull = vjp(run, x.detach(), [w.detach() for w in weights], [s.detach() for s in state])
    torch.testing.assert_close(got, want)
    for_x, for_weights, for_state = pull(delta)
    torch.testing.assert_close((for_x, *for_weights, *for_state), grads, rtol=1e-8, atol=1e-10)


LAYERS = {
    "rgc": lambda **options: RGC(4, input_size=3, init="uniform", **options),
    "lstm": lambda **options: LSTM(3, 4, **options),
    "gru with heads": lambda **options: GRU(3, 4, heads=2, **options),
    "elstm": lambda **options: ELSTM(3, 4, **options),
    "lru": lambda **options: LRU(3, 4, **options),
    "compat": lambda **options: compat.LSTM(3, 4, bidirectional=True, proj_size=2, **options),
}


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_grad_and_vmap(name: str, learning: str) -> None:
    layer = LAYERS[name](dtype=F64, learning=learning)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}
    many = torch.randn(3, 5, 2, 3, dtype=F64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()

    by_sample = vmap(grad(loss), (None, 0))(parameters, many)
    outputs = vmap(lambda x: functional_call(layer, parameters, (x,))[0])(many)
    for i, x in enumerate(many):
        output = layer(x)[0]
        torch.testing.assert_close(outputs[i], output)
        want = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        torch.testing.assert_close([by_sample[key][i] for key in parameters], list(want))
    ensemble = {key: torch.stack([value, 2 * value]) for key, value in parameters.items()}
    both = vmap(lambda parameters: functional_call(layer, parameters, (many[0],))[0])(ensemble)
    twice = {key: 2 * value for key, value in parameters.items()}
    torch.testing.assert_close(both[1], functional_call(layer, twice, (many[0],))[0])


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
@pytest.mark.parametrize("name", ["rgc", "lstm", "lru"])
def test_jvp_is_the_gradient_s_product(name: str, learning: str) -> None:
    layer = LAYERS[name](dtype=F64, learning=learning)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=F64)
    x.requires_grad_()
    loss = layer(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    value, along = jvp(lambda x: layer(x)[0].square().sum(), (x.detach(),), (tangent,))
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(along, (gradient * tangent).sum())


def test_second_derivatives_of_bptt_are_torch_s() -> None:
    theirs = nn.GRU(2, 3, dtype=F64)
    ours = GRU(2, 3, dtype=F64, learning="bptt")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 1, 2, dtype=F64)
    found = [hessian(lambda x, layer=layer: layer(x)[0].square().sum())(x) for layer in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
def test_a_convolutional_layer(learning: Any) -> None:
    layer = ConvRGC(2, learning=learning, dtype=F64)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.2)
    x = torch.randn(3, 2, 2, 4, 4, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    torch.testing.assert_close(grad(lambda x: layer(x)[0].square().sum())(x.detach()), want)


@pytest.mark.parametrize("rule", [{"learning": "eprop"}, {"learning": "snap0"}, {"refine": 2}])
def test_a_rule_that_cannot_names_the_nearest(rule: dict[str, Any]) -> None:
    layer = LSTM(3, 4, **rule)
    with pytest.raises(ValueError, match=r"under torch\.func.*the nearest that can are 'rfp' without refine"):
        grad(lambda x: layer(x)[0].sum())(torch.zeros(5, 2, 3))


def test_a_surrogate_derivative_and_a_learner_say_why_not() -> None:
    layer, x = LIF(3, 4), torch.zeros(5, 2, 3)
    with pytest.raises(
        ValueError, match=r"LIFCell has a surrogate derivative and can't go under torch\.func"
    ):
        vmap(lambda x: layer(x)[0])(x[None])
    learner = OnlineLearner(LSTM(3, 4), 2)
    for call in (lambda x: learner.step(x[0]), learner.chunk, lambda x: learner.peek(x[0])):
        with pytest.raises(RuntimeError, match=r"an OnlineLearner can't go under torch\.func"):
            grad(lambda x: call(x).sum())(x)  # noqa: B023
