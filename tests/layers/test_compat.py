"""LSTM, GRU and RNN in place of torch.nn's: torch.nn in float64 is the oracle, of values and of exact gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rjepa_triton
from rjepa_triton import compat

F64 = torch.float64
KINDS = ("LSTM", "GRU", "RNN")
# Three ways to the exact gradient: torch.nn's code, exact RTRL by the package's loops, refined RFP.
EXACT: tuple[dict[str, Any], ...] = ({}, {"learning": "rtrl"}, {"learning": "rfp", "refine": "exact"})


def pair(kind: str, *args: Any, learns: dict[str, Any], **options: Any) -> tuple[nn.RNNBase, nn.RNNBase]:
    """torch.nn's layer and ours, each drawn from the same seed."""
    made = []
    for module, more in ((nn, {}), (compat, learns)):
        torch.manual_seed(1)
        made.append(getattr(module, kind)(*args, dtype=F64, **options, **more))
    theirs, ours = made
    return theirs, ours


def flat(result: Any) -> list[Tensor]:
    """All tensors of a layer's result that carry a gradient or values."""
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


def compared(theirs: nn.RNNBase, ours: nn.RNNBase, x: Any, hx: Any) -> None:
    """Outputs, states and the gradients of input, states and every parameter are the same."""
    found = []
    for layer in (theirs, ours):
        torch.manual_seed(2)  # of dropout
        leaves = [x.data.detach() if isinstance(x, PackedSequence) else x.detach()]
        leaves += [] if hx is None else [value.detach() for value in (hx if isinstance(hx, tuple) else (hx,))]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        given = leaves[0] if isinstance(x, Tensor) else PackedSequence(leaves[0], *x[1:])
        state = None if hx is None else tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]
        result = layer(given, state)
        values = flat(result)
        torch.manual_seed(3)
        loss = sum((torch.randn_like(value) * value).sum() for value in values)
        grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
        shape = [type(part) for part in result], [value.shape for value in values]
        found.append((shape, values, grads))
    (shape, values, grads), (our_shape, our_values, our_grads) = found
    assert our_shape == shape
    torch.testing.assert_close(our_values, values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(our_grads, grads, rtol=1e-9, atol=1e-11)


@cases(60, 2000)
@given(
    kind=st.sampled_from(KINDS),
    learns=st.sampled_from(EXACT),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    batch_first=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    training=st.booleans(),
    bidirectional=st.booleans(),
    projects=st.booleans(),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    form=st.sampled_from(["batch", "no batch", "packed", "packed unsorted"]),
    starts=st.booleans(),
    data=st.data(),
)
def test_values_and_exact_gradients_are_those_of_torch(
    kind: str,
    learns: dict[str, Any],
    layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    projects: bool,
    nonlinearity: str,
    sizes: tuple[int, int, int, int],
    form: str,
    starts: bool,
    data: st.DataObject,
) -> None:
    steps, batch, features, units = sizes
    options: dict[str, Any] = {
        "num_layers": layers,
        "bias": bias,
        "batch_first": batch_first,
        "dropout": dropout if layers > 1 else 0.0,
        "bidirectional": bidirectional,
    }
    projection = 0
    if kind == "LSTM" and projects and units > 1:
        projection = options["proj_size"] = data.draw(st.integers(1, units - 1))
    if kind == "RNN":
        options["nonlinearity"] = nonlinearity
    theirs, ours = pair(kind, features, units, learns=learns, **options)
    theirs.train(training), ours.train(training)
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    directed = layers * (1 + bidirectional)
    rows: tuple[int, ...] = (batch,)
    x: Any
    if form == "no batch":
        rows, x = (), torch.randn(steps, features, dtype=F64)
    elif form == "batch":
        x = torch.randn((batch, steps, features) if batch_first else (steps, batch, features), dtype=F64)
    else:
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch))
        lengths = lengths if form == "packed unsorted" else sorted(lengths, reverse=True)
        x = pack_sequence(
            [torch.randn(length, features, dtype=F64) for length in lengths],
            enforce_sorted=form == "packed",
        )
    hx: Any = None
    if starts:
        hx = torch.randn(directed, *rows, projection or units, dtype=F64)
        hx = (hx, torch.randn(directed, *rows, units, dtype=F64)) if kind == "LSTM" else hx
    compared(theirs, ours, x, hx)


def loop_with_own_path(layer: nn.RNNBase, x: Tensor) -> Tensor:
    """The output (T, B, ·) of a layer whose recurrent Jacobian autograd sees as diagonal: RFP is its gradient."""

    def read(weight: Tensor, state: Tensor) -> Tensor:
        return state.detach() @ weight.mT + weight.diagonal().detach() * (state - state.detach())

    lstm, units = layer.mode == "LSTM", layer.hidden_size
    for index in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            weight_ih, weight_hh, bias_ih, bias_hh = (
                getattr(layer, f"{name}_l{index}{suffix}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            down = getattr(layer, f"weight_hr_l{index}{suffix}") if layer.proj_size else None
            square = weight_hh if down is None else weight_hh @ down
            h = c = x.new_zeros(x.shape[1], units)
            made = []
            for u in x.flip(0) if suffix else x:
                into, own = u @ weight_ih.mT + bias_ih, bias_hh
                by_gate = [
                    read(weight, h) + b
                    for weight, b in zip(square.split(units), own.split(units), strict=True)
                ]
                if lstm:
                    i, f, g, o = (a + b for a, b in zip(into.split(units, -1), by_gate, strict=True))
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                elif layer.mode == "GRU":
                    r, z, n = into.split(units, -1)
                    r, z = (r + by_gate[0]).sigmoid(), (z + by_gate[1]).sigmoid()
                    h = (1 - z) * (n + r * by_gate[2]).tanh() + z * h
                else:
                    h = (into + by_gate[0]).tanh()
                made.append(h if down is None else h @ down.mT)
            output = torch.stack(made)
            outputs.append(output.flip(0) if suffix else output)
        x = torch.cat(outputs, -1)
    return x


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "projected"])
def test_rfp_is_that_of_each_layer_and_direction(kind: str, bidirectional: bool) -> None:
    more = {"proj_size": 2} if kind == "projected" else {}
    kind = "LSTM" if kind == "projected" else kind
    _, layer = pair(kind, 3, 4, num_layers=2, bidirectional=bidirectional, learns={"learning": "rfp"}, **more)
    x = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    output, want = layer(x)[0], loop_with_own_path(layer, x)
    torch.testing.assert_close(output, want)
    weights = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, weights)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves, weights))
    exact = torch.autograd.grad(copy.deepcopy(layer)(x)[0], x, weights)  # the copy keeps the rule
    torch.testing.assert_close(exact[0], got[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rfp_is_that_of_the_package_s_own_layer(kind: str) -> None:
    _, layer = pair(kind, 3, 4, learns={"learning": "rfp"})
    own = getattr(rjepa_triton, kind)(3, 4, dtype=F64)
    own.load_state_dict(layer.state_dict())
    x = torch.randn(6, 2, 3, dtype=F64)
    output, same = layer(x)[0], own(x)[0]
    torch.testing.assert_close(output, same)
    got = torch.autograd.grad(output.square().sum(), layer.get_parameter("weight_hh_l0"))
    want = torch.autograd.grad(same.square().sum(), own.recurrent_weights())
    torch.testing.assert_close(got[0], torch.cat(want))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torch_s_module(kind: str) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    theirs, ours = pair(kind, 3, 4, learns={"learning": "rfp"}, **options)
    assert isinstance(ours, getattr(nn, kind))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.learning == "rfp"
        assert repr(twin) == repr(ours)
        torch.testing.assert_close(twin(x), ours(x), rtol=0, atol=0)
    assert repr(ours) == repr(theirs).removesuffix(")") + ", learning='rfp')"
    assert ours.float()(x.float())[0].dtype == torch.float32


def test_the_default_is_torch_s_own_gradient_which_can_be_differentiated_again() -> None:
    layer = compat.LSTM(2, 3, dtype=F64)
    assert layer.learning == "bptt"
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_positional_arguments_are_torch_s() -> None:
    assert (
        repr(compat.RNN(3, 4, 2, "relu", False))
        == repr(nn.RNN(3, 4, 2, "relu", False))[:-1] + ", learning='bptt')"
    )
    layer = compat.LSTM(3, 4, 2, True, True, 0.5, True, 2, learning="rfp")
    assert (layer.dropout, layer.proj_size, layer.batch_first) == (0.5, 2, True)
    assert layer(torch.randn(2, 5, 3))[0].shape == (2, 5, 4)


def test_padding_has_no_part_in_anything() -> None:
    """A ReLU network that grows tenfold a step overflows within the padding's 400 steps, and its own rows don't."""
    theirs, ours = pair("RNN", 1, 1, nonlinearity="relu", learns={"learning": "rtrl"})
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.get_parameter("weight_hh_l0").fill_(10)
            layer.get_parameter("weight_ih_l0").fill_(1)
    rows = [torch.ones(3, 1, dtype=F64), -torch.ones(400, 1, dtype=F64)]
    compared(theirs, ours, pack_sequence(rows, enforce_sorted=False), None)


def test_a_parametrized_weight_and_functional_call() -> None:
    theirs, ours = pair("GRU", 3, 4, learns={"learning": "rtrl"})
    for layer in (theirs, ours):
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(5, 2, 3, dtype=F64)
    compared(theirs, ours, x, None)
    replaced = {name: value.detach() * 2 for name, value in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, replaced, (x,)), torch.func.functional_call(theirs, replaced, (x,))
    )


def test_under_autocast_a_rule_runs_in_the_parameters_dtype() -> None:
    layer = compat.LSTM(3, 4, learning="rfp")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(x.bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, layer(x.bfloat16().float())[0])


@pytest.mark.parametrize("learning", ["bptt", "rfp"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(learning: str, batch_first: bool) -> None:
    layer = compat.GRU(3, 4, batch_first=batch_first, learning=learning)
    output, state = layer(torch.randn((0, 5, 3) if batch_first else (5, 0, 3)))
    assert output.numel() == 0
    assert state.shape == (1, 0, 4)


def error_of(call: Callable[[], Any]) -> type[BaseException] | None:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error)
    return None


BAD_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((0, 4), {}),
    ((3, 0), {}),
    ((3.0, 4), {}),
    ((3, "4"), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": "yes"}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"nonlinearity": "sin"}),
    ((3, 4), {"unknown": 1}),
    ((3,), {}),
]


@pytest.mark.parametrize(("args", "options"), BAD_ARGUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_argument_is_refused_as_torch_refuses_it(
    kind: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    want = error_of(lambda: getattr(nn, kind)(*args, **options))
    assert error_of(lambda: getattr(compat, kind)(*args, **options, learning="rfp")) == want


def test_proj_size_is_the_lstm_s_alone() -> None:
    for kind in ("GRU", "RNN"):
        with pytest.raises(ValueError, match="proj_size"):
            getattr(compat, kind)(3, 4, proj_size=2)


@pytest.mark.parametrize(
    ("learning", "refine"), [("uoro", 0), ("tbptt", 0), ("none", 0), ("bptt", 1), ("rfp", -1)]
)
def test_a_rule_that_cannot_run_is_refused(learning: Any, refine: int) -> None:
    with pytest.raises(ValueError, match=r"learning|refine"):
        compat.GRU(3, 4, learning=learning, refine=refine)


def h(*shape: int) -> Tensor:
    return torch.zeros(shape)


BAD_CALLS: list[tuple[str, Callable[[bool], tuple[Any, ...]]]] = [
    ("four dimensions", lambda lstm: (h(1, 5, 2, 3),)),
    ("one dimension", lambda lstm: (h(3),)),
    ("features", lambda lstm: (h(5, 2, 4),)),
    ("features of no batch", lambda lstm: (h(5, 4),)),
    ("no steps", lambda lstm: (h(0, 2, 3),)),
    ("dtype", lambda lstm: (h(5, 2, 3).double(),)),
    ("state's batch", lambda lstm: (h(5, 2, 3), (h(1, 3, 4),) * 2 if lstm else h(1, 3, 4))),
    ("state's units", lambda lstm: (h(5, 2, 3), (h(1, 2, 5),) * 2 if lstm else h(1, 2, 5))),
    ("state's layers", lambda lstm: (h(5, 2, 3), (h(2, 2, 4),) * 2 if lstm else h(2, 2, 4))),
    ("second state's units", lambda lstm: (h(5, 2, 3), (h(1, 2, 4), h(1, 2, 5)) if lstm else h(1, 2, 5))),
    ("state without batch", lambda lstm: (h(5, 2, 3), (h(1, 4),) * 2 if lstm else h(1, 4))),
    ("state with batch", lambda lstm: (h(5, 3), (h(1, 1, 4),) * 2 if lstm else h(1, 1, 4))),
    ("packed features", lambda lstm: (pack_padded_sequence(h(5, 2, 4), torch.tensor([5, 2])),)),
    (
        "packed state",
        lambda lstm: (
            pack_padded_sequence(h(5, 2, 3), torch.tensor([5, 2])),
            (h(1, 3, 4),) * 2 if lstm else h(1, 3, 4),
        ),
    ),
]


@pytest.mark.parametrize(("name", "call"), BAD_CALLS, ids=[name for name, _ in BAD_CALLS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_call_is_refused_as_torch_refuses_it(
    kind: str, name: str, call: Callable[[bool], tuple[Any, ...]]
) -> None:
    args = call(kind == "LSTM")
    want = error_of(lambda: getattr(nn, kind)(3, 4)(*args))
    assert want is not None
    for learning in ("bptt", "rfp"):
        assert error_of(lambda: getattr(compat, kind)(3, 4, learning=learning)(*args)) == want  # noqa: B023


def test_a_call_with_the_wrong_kind_of_state_names_it() -> None:
    with pytest.raises(RuntimeError, match="hx must be a tuple of two tensors"):
        compat.LSTM(3, 4, learning="rfp")(h(5, 2, 3), h(1, 2, 4))
    with pytest.raises(RuntimeError, match="hx must be a tensor, got 2 tensors"):
        compat.GRU(3, 4, learning="rfp")(h(5, 2, 3), (h(1, 2, 4), h(1, 2, 4)))
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got list"):
        compat.GRU(3, 4, learning="rfp")([1.0])
    with pytest.raises(TypeError, match="hx must have the dtype"):
        compat.GRU(3, 4, learning="rfp")(h(5, 2, 3), h(1, 2, 4).double())


@pytest.mark.parametrize("count", [2, 3])
def test_an_unbatched_lstm_takes_both_states_in_one_tensor(count: int) -> None:
    """As torch.nn's does, which reads the first two; with a batch neither takes them."""
    torch.manual_seed(0)
    theirs = nn.LSTM(2, 3, bidirectional=True)
    ours = compat.LSTM(2, 3, bidirectional=True, learning="rfp")
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(5, 2), torch.randn(count, 2, 3)
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))
    for layer in (theirs, ours):
        with pytest.raises((RuntimeError, TypeError)):
            layer(x[:, None], hx[:, :, None])
