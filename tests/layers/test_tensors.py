"""What layers do with tensors as such: whose memory their results have, tensors without values, reading of values."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rjepa_triton import Cell, Matrix, OnlineLearner, Stack, Stream, TwoPointRNN, fidelity
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.layers import functional, named
from rjepa_triton.layers.conv import ConvRGC
from rjepa_triton.online import counting

LAYERS: dict[str, Callable[..., Any]] = {
    "RGC": lambda **o: named.RGC(5, input_size=3, **o),
    "RGC heads": lambda **o: named.RGC(6, input_size=3, heads=2, init="uniform", **o),
    "LSTM": lambda **o: named.LSTM(3, 5, **o),
    "LSTM diagonal": lambda **o: named.LSTM(3, 5, recurrence="diagonal", **o),
    "GRU": lambda **o: named.GRU(3, 5, **o),
    "RNN": lambda **o: named.RNN(3, 5, **o),
    "IndRNN": lambda **o: named.IndRNN(3, 5, **o),
    "CTRNN": lambda **o: named.CTRNN(3, 5, **o),
    "ELSTM": lambda **o: named.ELSTM(3, 5, **o),
    "TimeDecay": lambda **o: named.TimeDecay(3, 5, **o),
    "LRU": lambda **o: named.LRU(3, 5, **o),
    "LIF": lambda **o: named.LIF(3, 5, **o),
    "ALIF": lambda **o: named.ALIF(3, 5, **o),
    "MGU": lambda **o: named.MGU(3, 5, **o),
    "MinLSTM": lambda **o: named.MinLSTM(3, 5, **o),
    "MinGRU": lambda **o: named.MinGRU(3, 5, **o),
    "two-point": lambda **o: TwoPointRNN(RGCCell(), 5, input_size=3, learning="bptt", **o),
}


def as_tuple(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def saved_bytes(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return len(file.getvalue())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(40, 2, 3), (40, 3), (1, 1, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_states_have_memory_of_their_own(name: str, shape: tuple[int, ...], grad: bool) -> None:
    for batch_first in (False, True):
        layer = LAYERS[name](batch_first=batch_first)
        with torch.set_grad_enabled(grad):
            output, state = layer(torch.randn(shape))
        storages = {value.untyped_storage().data_ptr() for value in (output, *as_tuple(state))}
        assert len(storages) == 1 + len(as_tuple(state))
        for value in as_tuple(state):
            assert value.untyped_storage().nbytes() == value.nbytes
            assert saved_bytes(value.detach()) < saved_bytes(value.detach().clone()) + 64


def test_changing_an_output_changes_no_state_and_the_other_way() -> None:
    layer, x = named.LSTM(3, 5), torch.randn(6, 2, 3)
    with torch.no_grad():
        y, (h, c) = layer(x)
        before = [value.clone() for value in (y, h, c)]
        y.mul_(2)
        assert torch.equal(h, before[1])
        assert torch.equal(c, before[2])
        h.mul_(0)
        assert torch.equal(y, 2 * before[0])


def test_states_of_maps_and_stacks_have_memory_of_their_own() -> None:
    x = torch.randn(4, 2, 3, 5, 5)
    for learning in ("rfp", "bptt"):
        maps = ConvRGC(3, learning=learning)
        with torch.no_grad():
            results = [maps(x), maps.step(x[0])]
        for output, (s, m) in results:
            assert len({value.untyped_storage().data_ptr() for value in (output, s, m)}) == 3
            assert s.untyped_storage().nbytes() == s.nbytes
    with torch.no_grad():
        output, states = Stack(named.LSTM(3, 5), named.GRU(5, 4))(torch.randn(9, 2, 3))
    values = [value for state in states for value in as_tuple(state)]
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in values)
    assert len({value.untyped_storage().data_ptr() for value in (output, *values)}) == 4


def test_gradients_pass_through_the_last_state() -> None:
    layer, x = named.GRU(3, 5, learning="bptt"), torch.randn(6, 2, 3)
    results = []
    for read in (lambda y, h: y[-1], lambda y, h: h):
        layer.zero_grad()
        read(*layer(x)).square().sum().backward()
        results.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_made_and_run_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
        assert all(parameter.is_meta for parameter in layer.parameters())
        x = torch.randn(7, 2, 3)
        resets = torch.zeros(7, 2, dtype=torch.bool)
    for forward in ("auto", "parallel"):
        layer.forward_mode = forward
        output, state = layer(x, resets=resets)
        assert output.is_meta
        assert output.shape == (7, 2, layer.hidden_size)
        assert all(value.shape == (2, layer.hidden_size) for value in as_tuple(state))
        output.sum().backward()
    assert LAYERS[name](device="meta").weights()[0].is_meta


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_made_and_run_with_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        layer = LAYERS[name]()
        output, _ = layer(torch.randn(7, 2, 3), resets=torch.zeros(7, 2, dtype=torch.bool))
        assert isinstance(output, FakeTensor)
        assert output.shape == (7, 2, layer.hidden_size)
        output.sum().backward()
        assert layer.weights()[0].grad.shape == layer.weights()[0].shape


@pytest.mark.parametrize(
    "options", [{}, {"form": "step"}, {"form": "chunk", "update_every": 2}, {"learning": "uoro"}], ids=str
)
def test_the_first_learner_may_be_made_under_another_default_device(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts calls of torch, on the CPU."""
    monkeypatch.setattr(counting, "_counted", {})
    with torch.device("meta"):
        if "learning" not in options:
            assert OnlineLearner(named.LSTM(3, 5), 2, **options).state[0].is_meta
        layer = named.GRU(3, 5, device="cpu")
        learner = OnlineLearner(layer, 2, **options)
        learner.chunk(torch.randn(2, 2, 3, device="cpu")).sum().backward()
    assert layer.weights()[0].grad is not None


class Leaky(Cell):
    states, gates, inputs, parameters = ("h",), ("a",), ("a",), ("tau",)
    matrices = (Matrix("ha", ("gate", 0), 0),)

    def update(self, c: Any, p: Any, x: Any) -> Any:
        return (c[0] * torch.sigmoid(x[1]) + torch.tanh(p[0] + x[0]),)


def test_what_lies_on_the_cpu_runs_under_another_default_device() -> None:
    """Also what is made by the way: numbers for compiled code, points where a cell is tried, first parameters."""
    x, target = torch.randn(4, 2, 3), torch.randn(4, 2, 1)
    with torch.device("meta"):
        for layer in (
            named.LSTM(3, 5, device="cpu"),
            named.LRU(3, 5, device="cpu"),
            named.TimeDecay(3, 5, device="cpu"),
            TwoPointRNN(Leaky(), 5, input_size=3, init="uniform", device="cpu"),
        ):
            assert layer.weights()[0].device.type == "cpu"
            output, _ = layer(x)
            output.sum().backward()
            assert fidelity(layer, x).total_cosine > 0
        for optimizer in ("sgd", "adam"):
            readout = nn.Linear(5, 1, device="cpu")
            stream = Stream(named.LSTM(3, 5, device="cpu"), readout, 2, optimizer=optimizer)
            assert stream.run(x, target).losses.isfinite().all()
            stream.step(x[0])
            stream.learn(target[0], torch.tensor([True, False], device="cpu"))
            stream.load_state_dict(stream.state_dict())


def test_initialization_can_be_skipped_and_the_default_device_changed() -> None:
    for name, sizes in (
        ("LSTM", (3, 5)),
        ("RGC", (5,)),
        ("LRU", (3, 5)),
        ("IndRNN", (3, 5)),
        ("GRU", (3, 5)),
    ):
        layer = torch.nn.utils.skip_init(getattr(named, name), *sizes)
        assert layer.weights()[0].device.type == "cpu"
    torch.set_default_device("meta")
    try:
        layer = named.LSTM(3, 5)
    finally:
        torch.set_default_device(None)
    assert layer.weights()[0].is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, 1, 3))[0]).all()


def test_a_cell_that_mixes_units_is_refused_on_meta_too() -> None:
    class Mixing(RGCCell):
        def update(self, c: Any, p: Any, x: Any) -> Any:
            return tuple(value.flip(-1) for value in super().update(c, p, x))

    with torch.device("meta"), pytest.raises(ValueError, match="is not a two-point cell"):
        TwoPointRNN(Mixing(), 5)


READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")


class Reads(TorchDispatchMode):
    """Counts the operations that make Python wait for the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_forward_pass_reads_a_value(name: str, learning: str) -> None:
    layer, x = LAYERS[name](), torch.randn(7, 2, 3)
    layer.learning = learning
    resets = torch.rand(7, 2) < 0.3
    layer.forward_mode = "sequential"
    with Reads() as reads:
        layer(x)
        layer(x, resets=resets)
        layer(x[:1], resets=resets[:1])
        with torch.no_grad():
            layer(x[:, 0])
    assert reads.found == []


def test_no_forward_pass_of_a_function_or_a_map_reads_a_value() -> None:
    weights = [torch.randn(5, 5) * 0.1 for _ in range(4)]
    resets = torch.rand(4, 2) < 0.3
    maps = ConvRGC(2)
    with Reads() as reads:
        functional.rgc(torch.randn(4, 2, 5), *weights, resets=resets)
        functional.rgc(torch.randn(4, 2, 5), *weights, resets=resets, backend="torch")
        functional.rgc(
            torch.randn(4, 2, 5, dtype=torch.float64), *(w.double() for w in weights), resets=resets
        )
        maps(torch.randn(4, 2, 2, 3, 3), resets=resets)
        Stack(named.LSTM(3, 5), named.GRU(5, 4))(torch.randn(4, 2, 3), resets=resets)
    assert reads.found == []


def test_weights_that_are_not_finite_give_nan_and_no_learner() -> None:
    layer = named.LSTM(3, 5)
    with torch.no_grad():
        layer.weights()[0][1, 2] = torch.nan
    assert layer(torch.randn(3, 1, 3))[0].isnan().any()
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        OnlineLearner(layer, 1)
    assert copy.deepcopy(layer)(torch.randn(3, 1, 3))[0].isnan().any()
