"""The RGC module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rjepa_triton
from rjepa_triton import LSTM, RGC
from rjepa_triton.layers.functional import rgc

F64 = torch.float64


def made(**options: Any) -> RGC:
    return RGC(4, init="uniform", dtype=F64, **options)


@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("recurrence", ["dense", "diagonal"])
def test_it_is_the_function_on_its_parameters(recurrence: str, learning: str) -> None:
    layer = made(recurrence=recurrence, learning=learning, input_size=3)
    x = torch.randn(6, 2, 3, dtype=F64)
    state = (torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64))
    output, last = layer(x, state)
    drive = x @ layer.weight_in.T + layer.bias
    s, m = rgc(drive, *layer.recurrent_weights(), state, learning=learning)
    torch.testing.assert_close(output, s)
    torch.testing.assert_close(last, (s[-1], m[-1]))
    got = torch.autograd.grad(output.sum(), list(layer.parameters()))
    want = torch.autograd.grad(s.sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)


def test_layouts() -> None:
    layer, first = made(), made(batch_first=True)
    first.load_state_dict(layer.state_dict())
    x = torch.randn(6, 2, 4, dtype=F64)
    resets = torch.rand(6, 2) < 0.3
    state = (torch.randn(2, 4, dtype=F64), torch.randn(2, 4, dtype=F64))
    output, last = layer(x, state, resets)
    swapped, same = first(x.transpose(0, 1), state, resets.transpose(0, 1))
    torch.testing.assert_close(swapped.transpose(0, 1), output)
    torch.testing.assert_close(same, last)
    for either in (layer, first):
        alone, end = either(x[:, 0], (state[0][0], state[1][0]), resets[:, 0])
        torch.testing.assert_close(alone, output[:, 0])
        torch.testing.assert_close(end, (last[0][0], last[1][0]))


def test_it_starts_with_no_dynamics() -> None:
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(RGC(4)(x)[0], x)


def test_parameters_and_their_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in RGC(4, input_size=3).named_parameters()}
    dense = dict.fromkeys(("weight_ss", "weight_ms", "weight_mm", "weight_sm"), (4, 4))
    assert shapes == {**dense, "weight_in": (4, 3), "bias": (4,)}
    diagonal = {name: tuple(p.shape) for name, p in RGC(4, recurrence="diagonal").named_parameters()}
    assert diagonal == dict.fromkeys(dense, (4,))
    assert str(RGC(4, input_size=3)) == "RGC(4, input_size=3, recurrence='dense', learning='rfp')"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size must be an int, got float"),
        ({"input_size": -1}, ValueError, "input_size must be at least 1"),
        ({"recurrence": "sparse"}, ValueError, "recurrence must be one of 'dense', 'diagonal', got 'sparse'"),
        ({"learning": "dual"}, ValueError, "learning must be one of"),
        ({"init": "ones"}, ValueError, "init must be one of 'zeros', 'uniform', got 'ones'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {"hidden_size": 4, **options}
    with pytest.raises(error, match=says):
        RGC(arguments.pop("hidden_size"), **arguments)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(4, dtype=F64), ValueError, r"x must have 2 or 3 dimensions, got shape \(4,\)"),
        (
            torch.zeros(5, 2, 3, dtype=F64),
            ValueError,
            r"x must have shape \(T, B, 4\) to match the layer, got \(5, 2, 3\)",
        ),
        (
            torch.zeros(5, 2, 4),
            TypeError,
            "x must have the dtype of the layer, torch.float64, got torch.float32",
        ),
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input_is_named(x: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        made()(x)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
def test_to_torch_is_torch_s_layer_with_the_same_outputs(kind: str, options: dict[str, Any]) -> None:
    more = {"nonlinearity": "relu"} if kind == "relu" else {}
    kind = "RNN" if kind == "relu" else kind
    layer = getattr(rjepa_triton, kind)(3, 4, dtype=F64, **options, **more)
    made = layer.to_torch()
    assert type(made) is getattr(torch.nn, kind)
    x = torch.randn(2, 5, 3, dtype=F64)
    torch.testing.assert_close(made(x)[0], layer(x)[0])
    back = getattr(rjepa_triton, kind)(3, 4, dtype=F64, **options, **more)
    back.load_state_dict(made.state_dict())
    torch.testing.assert_close(dict(back.state_dict()), dict(layer.state_dict()))
    before = layer(x)[0]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer(x)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"heads": 2}, {"recurrence": "diagonal"}])
def test_to_torch_needs_what_torch_has(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"to_torch\(\) needs recurrence='dense' and no heads.*got (heads=2|rec)"
    ):
        LSTM(3, 4, **options).to_torch()
