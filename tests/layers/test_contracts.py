"""What layers promise of autograd, of their parameters' names and of bad arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rjepa_triton import (
    CTRNN,
    ELSTM,
    GRU,
    LRU,
    LSTM,
    RGC,
    RNN,
    Cell,
    Matrix,
    OnlineLearner,
    TwoPointRNN,
    fidelity,
)
from rjepa_triton.layers import functional
from rjepa_triton.layers.conv import ConvRGC
from rjepa_triton.rules import rtrl

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **o: LSTM(3, 5, **o),
    "RGC": lambda **o: RGC(5, input_size=3, init="uniform", **o),
    "GRU diagonal": lambda **o: GRU(3, 5, recurrence="diagonal", **o),
    "CTRNN": lambda **o: CTRNN(3, 5, **o),
    "LRU": lambda **o: LRU(3, 5, **o),
    "ELSTM": lambda **o: ELSTM(3, 5, **o),
}


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_second_derivative_is_an_error(name: str, learning: str, loss: Callable[[Tensor], Tensor]) -> None:
    layer, x = LAYERS[name](learning=learning), torch.randn(4, 2, 3, requires_grad=True)
    for resets in (None, torch.rand(4, 2) < 0.3):
        given = [x, layer.weights()[0]]
        grads = torch.autograd.grad(loss(layer(x, resets=resets)[0]), given, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            sum(grad.square().sum() for grad in grads).backward()
    grads = torch.autograd.grad(loss(layer(x)[0]), [x], create_graph=True)  # a first one is as ever
    torch.testing.assert_close(grads[0].detach(), torch.autograd.grad(loss(layer(x)[0]), [x])[0])


def test_a_second_derivative_of_a_map_is_an_error() -> None:
    maps, x = ConvRGC(2), torch.randn(3, 1, 2, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(maps(x)[0].sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_inside_autocast_is_in_the_parameters_dtype(name: str, learning: str, where: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](learning=learning), torch.randn(6, 3, 3, requires_grad=True)
    results = []
    for on in (False, True):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=on and where != "backward"):
            loss = layer(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=on and where != "forward"):
            loss.backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for inside, outside in zip(*results, strict=True):
        assert inside.dtype == torch.float32
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


class Drawn(nn.Module):
    """Scales a weight by a number that is drawn anew at each reading, as DropConnect does."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.drawn += 1
        return weight * (1 + self.drawn)


@pytest.mark.parametrize("name", ["weight_hi", "weight_in_f", "bias_o"])
def test_a_parametrization_draws_once_a_forward_pass(name: str) -> None:
    layer, drawn = LSTM(3, 5), Drawn()
    parametrize.register_parametrization(layer, name, drawn)
    for autocast in (False, True):
        before = drawn.drawn
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(torch.randn(4, 2, 3))[0].sum().backward()
        assert drawn.drawn == before + 1
    tau = LRU(3, 5)
    parametrize.register_parametrization(tau, "nu", again := Drawn())
    before = again.drawn
    tau(torch.randn(4, 2, 3))
    assert again.drawn == before + 1


class Named(Cell):
    states, gates, inputs = ("h",), ("a",), ("a",)
    matrices = (Matrix("ha", ("gate", 0), 0),)

    def update(self, c: Any, p: Any, x: Any) -> Any:
        total = p[0]
        for each in x:
            total = total + each
        return (torch.tanh(total),)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parameters": ("weight_ha",)}, "got two named 'weight_ha'"),
        ({"parameters": ("weight_in",)}, "got two named 'weight_in'"),
        ({"parameters": ("bias",)}, "got two named 'bias'"),
        ({"parameters": ("tau", "tau")}, "got two named 'tau'"),
        ({"inputs": ("a", "a")}, "got two named 'weight_in_a'"),
        ({"matrices": (Matrix("ha", ("gate", 0), 0),) * 2}, "got two named 'weight_ha'"),
        ({"matrices": (Matrix("in", ("gate", 0), 0),)}, "got two named 'weight_in'"),
        ({"parameters": ("heads",)}, "'heads', which is an attribute of the layer"),
        ({"parameters": ("learning",)}, "'learning', which is an attribute of the layer"),
        ({"parameters": ("matrices",)}, "'matrices', which is an attribute of the layer"),
        ({"parameters": ("a.b",)}, r"'a\.b', which is not a Python name"),
    ],
)
def test_two_parameters_of_one_name_are_refused(changes: dict[str, Any], says: str) -> None:
    cell = Named()
    for name, value in changes.items():
        setattr(cell, name, value)
    with pytest.raises(ValueError, match=says):
        TwoPointRNN(cell, 5, input_size=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"bias": 0}, "bias must be True or False, got 0"),
        ({"batch_first": 1}, "batch_first must be True or False, got 1"),
        ({"recompute": None}, "recompute must be True or False, got None"),
    ],
)
def test_flags_are_bools(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        RNN(3, 5, **options)


def test_tensors_that_are_not_dense_are_named() -> None:
    layer, x = LSTM(3, 5), torch.randn(4, 2, 3)
    others = [x.to_sparse(), torch.nested.nested_tensor([x[0], x[1]])]
    if torch.backends.mkldnn.is_available():
        others.append(x.to_mkldnn())
    for other in others:
        with pytest.raises(TypeError, match="x must be a dense tensor"):
            layer(other)
    with pytest.raises(TypeError, match="state's h must be a dense tensor"):
        layer(x, (torch.zeros(2, 5).to_sparse(), torch.zeros(2, 5)))
    with pytest.raises(TypeError, match="resets must be a dense tensor"):
        layer(x, resets=torch.zeros(4, 2, dtype=torch.bool).to_sparse())
    with pytest.raises(TypeError, match="weight_ss must be a dense tensor"):
        functional.rgc(torch.zeros(4, 2, 3), torch.zeros(3, 3).to_sparse(), *[torch.zeros(3, 3)] * 3)


SHAPES = {
    "dense": (6, 6),
    "two heads": (2, 3, 3),
    "three heads": (3, 2, 2),
    "diagonal": (6,),
    "six": (6, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shapes",
    [
        ("dense", "three heads", "dense", "diagonal"),
        ("two heads", "three heads", "two heads", "three heads"),
        ("three heads", "diagonal", "six", "three heads"),
        ("two heads", "six", "diagonal", "two heads"),
        ("dense", "two heads", "three heads", "six"),
    ],
)
def test_exact_rtrl_joins_heads_of_different_sizes(shapes: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [(torch.randn(SHAPES[s], dtype=dtype) * 0.4).requires_grad_() for s in shapes]
    x = torch.randn(5, 3, 6, dtype=dtype)
    resets = torch.rand(5, 3) < 0.2
    gradients = []
    for learning in ("rtrl", "bptt"):
        s, m = functional.rgc(x, *weights, resets=resets, learning=learning)
        gradients.append(torch.autograd.grad(s.square().sum() + m.sum(), weights))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_joint_heads() -> None:
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert rtrl.joint_heads([weights["two heads"], weights["three heads"]], 6) == 1
    assert rtrl.joint_heads([weights["three heads"], weights["diagonal"]], 6) == 3
    assert rtrl.joint_heads([weights["dense"], weights["six"]], 6) == 1
    assert rtrl.joint_heads([], 6) == 6


def test_refinement_counts_one_more_crossing_for_the_initial_state() -> None:
    """After r rounds, the credits of r + 1 steps are exact, and after T - 1 what goes on to the state before T steps."""
    for steps in (1, 2, 3):
        torch.manual_seed(0)
        layer = LSTM(3, 5, dtype=torch.float64)
        x, state = (
            torch.randn(steps, 2, 3).double(),
            [torch.randn(2, 5).double().requires_grad_() for _ in range(2)],
        )
        gradients = []
        for learning, refine in (("rfp", max(steps - 1, 1)), ("bptt", 0)):
            layer.learning, layer.refine = learning, refine
            gradients.append(torch.autograd.grad(layer(x, tuple(state))[0].square().sum(), state))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_fidelity_leaves_the_layer_as_it_is() -> None:
    layer, x = LSTM(3, 5), torch.randn(6, 2, 3, requires_grad=True)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda grad: calls.append("gradient"))
        p.register_post_accumulate_grad_hook(lambda grad: calls.append("added"))
    before = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        found = fidelity(layer, x)
        streamed = fidelity(layer, x, online={"form": "step"})
    torch.testing.assert_close(found.total_cosine, streamed.total_cosine)
    assert 0.5 < found.total_cosine < 1
    assert calls == []
    assert x.grad is None
    for p, value in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, torch.ones_like(p))
    with pytest.raises(ValueError, match=r"online can't have lr=0\.1"):
        fidelity(layer, x, online={"lr": 0.1})
    assert all(torch.equal(p, value) for p, value in zip(layer.parameters(), before, strict=True))
    with pytest.raises(TypeError, match="layer must be a recurrent layer such as RGC, got Linear"):
        fidelity(nn.Linear(3, 5), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="online must be a mapping"):
        fidelity(layer, x, online=3)  # type: ignore[arg-type]
    assert fidelity(ELSTM(3, 5), x).total_cosine > 0.999


@pytest.mark.parametrize(
    "options", [{"form": "step"}, {"form": "chunk", "update_every": 4}, {"learning": "rtrl"}]
)
@pytest.mark.parametrize("name", ["LSTM", "LRU"])
def test_a_second_derivative_through_a_learner_is_an_error(name: str, options: dict[str, Any]) -> None:
    layer, x = LAYERS[name](), torch.randn(4, 2, 3, requires_grad=True)
    learner = OnlineLearner(layer, 2, **options)
    for run in (lambda: learner.step(x[0]), lambda: learner.chunk(x)):
        learner.reset()
        grads = torch.autograd.grad(run().sum(), [x, layer.weights()[0]], create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            grads[1].sum().backward()


EVERY_RULE: list[dict[str, Any]] = [
    *({"form": form} for form in ("step", "lazy", "history")),
    {"form": "chunk", "update_every": 2},
    {"form": "step", "lag": 1},
    {"learning": "rtrl"},
    {"learning": "uoro"},
    {"learning": "tbptt", "update_every": 2},
    {"credit": "carry", "update_every": 2},
    {"refine": "exact", "update_every": 2},
]


@pytest.mark.parametrize("options", EVERY_RULE, ids=str)
@pytest.mark.parametrize("name", ["weight_in_f", "bias_o"])
def test_a_parametrization_draws_once_a_call_of_a_learner(name: str, options: dict[str, Any]) -> None:
    layer, drawn = LSTM(3, 5), Drawn()
    parametrize.register_parametrization(layer, name, drawn)
    learner = OnlineLearner(layer, 2, **options)
    for call in (learner.step, learner.step, lambda x: learner.chunk(x[None])):
        before, losses = drawn.drawn, call(torch.randn(2, 3)).sum()
        assert drawn.drawn == before + 1
        if call == learner.step and options.get("update_every") and learner._position:
            continue
        losses.backward()
        assert drawn.drawn == before + 1


def draws(base: RNN) -> tuple[RNN, list[Tensor]]:
    """A layer with recurrent weights that are scaled by a number drawn anew, and what it drew."""
    layer, drawn = RNN(3, 5, dtype=torch.float64), []

    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            drawn.append(1 + 0.3 * torch.randn((), dtype=weight.dtype))
            return weight * drawn[-1]

    layer.load_state_dict(base.state_dict())
    parametrize.register_parametrization(layer, "weight_hh", Scaled())
    drawn.clear()
    return layer, drawn


@pytest.mark.parametrize(
    "options",
    [{"learning": "rtrl"}, {"learning": "tbptt"}, {"credit": "carry"}, {"refine": "exact"}],
    ids=str,
)
def test_exact_gradients_are_those_of_the_weights_that_were_drawn(options: dict[str, Any]) -> None:
    base, x = RNN(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    layer, drawn = draws(base)
    by_step = options == {"learning": "rtrl"}
    learner = OnlineLearner(layer, 2, update_every=1 if by_step else 4, **options)
    drawn.clear()
    output = [learner.step(x[t]) for t in range(4)][-1] if by_step else learner.chunk(x)[-1]
    output.square().sum().backward()
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(4):
        h = torch.tanh(
            h @ (base.weight_hh * drawn[t if by_step else 0]).detach().T + x[t] @ base.weight_in.T + base.bias
        )
    h.square().sum().backward()
    assert len(drawn) == (4 if by_step else 1)
    torch.testing.assert_close(layer.weight_in.grad, base.weight_in.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"learning": "tbptt"}, {"credit": "carry"}, {"refine": 1}], ids=str)
def test_weights_that_are_drawn_anew_within_a_chunk_of_full_credit_are_refused(
    options: dict[str, Any],
) -> None:
    layer, _ = draws(RNN(3, 5, dtype=torch.float64))
    learner = OnlineLearner(layer, 2, update_every=3, **options)
    x = torch.randn(2, 3, dtype=torch.float64)
    learner.step(x)
    state = learner.state
    with pytest.raises(ValueError, match="the parametrization of weight_hh gave other weights at step 2"):
        learner.step(x)
    assert learner.state is state or torch.equal(learner.state[0], state[0])
    parametrize.remove_parametrizations(layer, "weight_hh")
    weight = nn.utils.parametrizations.weight_norm(layer, "weight_hh")  # computed anew, to the same numbers
    learner = OnlineLearner(weight, 2, update_every=3, **options)
    sum(learner.step(x).sum() for _ in range(3)).backward()
