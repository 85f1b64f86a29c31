"""The generic layer: any cell, names, shapes, weights of torch.nn, refusals, and every layer online."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import (
    CTRNN,
    ELSTM,
    GRU,
    LRU,
    LSTM,
    MGU,
    RGC,
    RNN,
    Cell,
    IndRNN,
    Matrix,
    MinGRU,
    MinLSTM,
    OnlineLearner,
    TimeDecay,
    TwoPointRNN,
    functional,
)
from rjepa_triton.backend import operations
from rjepa_triton.cells.builtin import ElmanCell, LSTMCell, TimeDecayCell

F64 = torch.float64

# name → how to make a layer of 6 units and 3 input features
LAYERS: dict[str, Any] = {
    "rnn": lambda **o: RNN(3, 6, **o),
    "rnn-relu": lambda **o: RNN(3, 6, "relu", **o),
    "indrnn": lambda **o: IndRNN(3, 6, **o),
    "ctrnn": lambda **o: CTRNN(3, 6, 0.3, **o),
    "lstm": lambda **o: LSTM(3, 6, **o),
    "gru": lambda **o: GRU(3, 6, **o),
    "mgu": lambda **o: MGU(3, 6, **o),
    "min-lstm": lambda **o: MinLSTM(3, 6, **o),
    "min-gru": lambda **o: MinGRU(3, 6, **o),
    "elstm": lambda **o: ELSTM(3, 6, **o),
    "time-decay": lambda **o: TimeDecay(3, 6, **o),
    "lru": lambda **o: LRU(3, 6, **o),
    "rtu": lambda **o: LRU(3, 6, nonlinearity="tanh", **o),
    "rgc": lambda **o: RGC(6, input_size=3, init="uniform", **o),
}
MATRIX_FREE = {"indrnn", "min-lstm", "min-gru", "elstm", "time-decay", "lru", "rtu"}
by_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **options: Any) -> TwoPointRNN:
    return LAYERS[name](**{"dtype": F64, **options})


def exact_gradients(
    layer: TwoPointRNN, x: Tensor, delta: Tensor, resets: Tensor | None = None
) -> dict[str, Tensor]:
    """Of Σ δ output by autograd of a plain loop over the cell, with the layer's own parameters as leaves."""
    c: list[Tensor] = [x.new_zeros(x.shape[1], layer.hidden_size) for _ in layer.cell.states]
    total = x.new_zeros(())
    recurrent = layer.recurrent_weights()
    for t in range(x.shape[0]):
        if resets is not None:
            c = [torch.where(resets[t][:, None], torch.zeros_like(value), value) for value in c]
        drive = layer.drive(x[t : t + 1])[:, 0]
        p = [torch.zeros_like(c[0]) for _ in layer.cell.gates]
        for matrix, weight in zip(layer.cell.matrices, recurrent, strict=True):
            p[matrix.into[1]] = p[matrix.into[1]] + oracle.matvec(weight, c[matrix.reads], "full")
        c = list(layer.cell.update(c, p, drive.unbind()))
        total = total + (layer.readout([c[nu] for nu in layer.cell.outputs], x[t]) * delta[t]).sum()
    leaves = dict(layer.named_parameters())
    return dict(
        zip(leaves, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True), strict=True)
    )


def assert_near(layer: TwoPointRNN, want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, parameter in layer.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert oracle.relative([got], [want[name]]) < tolerance, name


@by_layer
@pytest.mark.parametrize("learning", ["bptt", "rtrl"])
def test_a_sequence_gives_the_exact_gradient_of_all_parameters(name: str, learning: str) -> None:
    layer = make(name, learning=learning)
    x, delta = torch.randn(7, 2, 3, dtype=F64), torch.randn(7, 2, 6, dtype=F64)
    resets = torch.rand(7, 2) < 0.2
    (layer(x, resets=resets)[0] * delta).sum().backward()
    assert_near(layer, exact_gradients(layer, x, delta, resets))


@pytest.mark.parametrize("name", sorted(MATRIX_FREE))
@pytest.mark.parametrize(("form", "every"), [("step", 1), ("lazy", 1), ("chunk", 4), ("history", 1)])
def test_element_wise_layers_learn_exactly_online(name: str, form: str, every: int) -> None:
    layer = make(name)
    x, delta = torch.randn(11, 2, 3, dtype=F64), torch.randn(11, 2, 6, dtype=F64)
    learner = OnlineLearner(layer, 2, form=form, update_every=every)
    for start in range(0, 11, every):
        (learner.chunk(x[start : start + every]) * delta[start : start + every]).sum().backward()
    assert_near(layer, exact_gradients(layer, x, delta))


@by_layer
@pytest.mark.parametrize("heads", [None, 3])
def test_rtrl_learns_exactly_online_in_every_layer(name: str, heads: int | None) -> None:
    if name in MATRIX_FREE and heads:
        pytest.skip("no recurrent matrices to cut into heads")
    layer = make(name) if heads is None else make(name, heads=heads)
    x, delta = torch.randn(9, 2, 3, dtype=F64), torch.randn(9, 2, 6, dtype=F64)
    resets = torch.rand(9, 2) < 0.2
    learner = OnlineLearner(layer, 2, learning="rtrl")
    for t in range(9):
        if bool(resets[t].any()):
            learner.reset(resets[t])
        (learner.step(x[t]) * delta[t]).sum().backward()
    assert_near(layer, exact_gradients(layer, x, delta, resets))


@by_layer
@pytest.mark.parametrize(("form", "every"), [("step", 1), ("lazy", 1), ("chunk", 3), ("history", 1)])
@pytest.mark.parametrize("heads", [None, 3])
def test_every_form_gives_the_gradient_of_the_sequence(
    name: str, form: str, every: int, heads: int | None
) -> None:
    if name in MATRIX_FREE and heads:
        pytest.skip("no recurrent matrices to cut into heads")
    layer = make(name) if heads is None else make(name, heads=heads)
    x, delta = torch.randn(8, 2, 3, dtype=F64), torch.randn(8, 2, 6, dtype=F64)
    (layer(x)[0] * delta).sum().backward()
    want = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    learner = OnlineLearner(layer, 2, form=form, update_every=every)
    for start in range(0, 8, every):
        (learner.chunk(x[start : start + every]) * delta[start : start + every]).sum().backward()
    assert_near(layer, want)


@by_layer
def test_outputs_do_not_depend_on_layout(name: str) -> None:
    layer = make(name)
    x = torch.randn(5, 2, 3, dtype=F64)
    output, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    assert output.shape == (5, 2, 6)
    assert [value.shape for value in states] == [(2, 6)] * len(layer.cell.states)
    single, single_state = layer(x[:, 0])
    torch.testing.assert_close(single, output[:, 0])
    first = single_state[0] if isinstance(single_state, tuple) else single_state
    torch.testing.assert_close(first, states[0][0])
    layer.batch_first = True
    torch.testing.assert_close(layer(x.transpose(0, 1))[0], output.transpose(0, 1))
    layer.batch_first = False
    head, middle = layer(x[:2])
    torch.testing.assert_close(torch.cat([head, layer(x[2:], middle)[0]]), output)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(LSTM, torch.nn.LSTM), (GRU, torch.nn.GRU), (RNN, torch.nn.RNN)]
)
def test_weights_of_torch_give_torchs_outputs(ours: Any, theirs: Any, bias: bool) -> None:
    reference = theirs(3, 6, bias=bias, dtype=F64)
    layer = ours(3, 6, bias=bias, dtype=F64, learning="bptt")
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(9, 2, 3, dtype=F64)
    output, state = layer(x)
    want, last = reference(x)
    torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
    if ours is LSTM:
        for got, value in zip(state, last, strict=True):
            torch.testing.assert_close(got, value[0], rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(state, last[0], rtol=1e-12, atol=1e-12)
    delta = torch.randn_like(want)
    (output * delta).sum().backward()
    (want * delta).sum().backward()
    got = torch.cat([layer.get_parameter(f"weight_{m.name}").grad for m in layer.cell.matrices])
    assert oracle.relative([got], [reference.weight_hh_l0.grad]) < 1e-12
    suffixes = [f"_{name}" for name in layer.cell.inputs] if len(layer.cell.inputs) > 1 else [""]
    got = torch.cat([layer.get_parameter(f"weight_in{suffix}").grad for suffix in suffixes])
    assert oracle.relative([got], [reference.weight_ih_l0.grad]) < 1e-12


def test_weights_of_a_deeper_torch_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one layer and one direction of torch\.nn, got bias_hh_l1"):
        LSTM(3, 6).load_state_dict(torch.nn.LSTM(3, 6, num_layers=2).state_dict())


def test_own_weights_load_too_also_inside_a_model() -> None:
    model, other = torch.nn.Sequential(GRU(3, 6)), torch.nn.Sequential(GRU(3, 6))
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class ResetAfter(Cell):
    """The GRU variant with U(r ⊙ h): U is inside the update, so it mixes units within a step."""

    states = ("h",)
    gates = ("r",)
    matrices = (Matrix("hr", ("gate", 0), 0),)

    def __init__(self) -> None:
        self.u = torch.randn(4, 4, dtype=F64)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        r = p[0].sigmoid()
        return (torch.tanh(x[0] + (r * c[0]) @ self.u.T),)


class TwoStatesGiven(ElmanCell):
    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (p[0], p[0])


class IntoInput(ElmanCell):
    matrices = (Matrix("hh", ("input", 0), 0),)


class ReadsNothing(ElmanCell):
    matrices = (Matrix("hh", ("gate", 0), 1),)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: TwoPointRNN(ResetAfter(), 4), ValueError, "ResetAfter is not a two-point cell: new state 'h' of unit"),
        (lambda: TwoPointRNN(TwoStatesGiven(), 4), ValueError, "must give 1 states"),
        (lambda: TwoPointRNN(IntoInput(), 4), ValueError, "'hh' must enter one of its 1 gates"),
        (lambda: TwoPointRNN(ReadsNothing(), 4), ValueError, "'hh' must read one of its 1 states, got 1"),
        (lambda: TwoPointRNN("lstm", 4), TypeError, "cell must be a two_point.Cell, got str"),
        (lambda: TwoPointRNN(LSTMCell(), 4), ValueError, "input_size must be given: LSTMCell has 4 inputs a unit"),
        (lambda: LSTM(3, 6, heads=4), ValueError, "heads must divide hidden_size, 6, got 4"),
        (lambda: LSTM(3, 6, heads=0), ValueError, "heads must be at least 1, got 0"),
        (lambda: LSTM(3, 6, heads=2, recurrence="diagonal"), ValueError, "heads=2 can't go with recurrence='diagonal'"),
        (lambda: LSTM(3, 6, learning="uoro"), ValueError, "learns online only .* nearest rule on sequences is 'rtrl'"),
        (lambda: LSTM(3, 6, learning="tbptt"), ValueError, "learns online only .* nearest rule on sequences is 'bptt'"),
        (lambda: LSTM(3, 6, learning="bptt", refine=2), ValueError, "refine=2 goes with learning='rfp'.*exact as it is"),
        (lambda: LSTM(3, 6, learning="eprop", refine=2), ValueError, "refine=2 goes with learning='rfp'"),
        (lambda: LSTM(3, 6, refine=-1), ValueError, "refine must be at least 0, got -1"),
        (lambda: LSTM(3, 6, refine="twice"), ValueError, "refine must be a number of rounds or 'exact', got 'twice'"),
        (lambda: LSTM(0, 6), ValueError, "input_size must be at least 1, got 0"),
        (lambda: LSTM(3, 6)(torch.zeros(4, 2, 5)), ValueError, r"x must have shape \(T, B, 3\)"),
        (lambda: LSTM(3, 6)(torch.zeros(4, 2, 3), torch.zeros(2, 6)), TypeError, r"state must be a tuple \(h, c\), got Tensor"),
        (lambda: GRU(3, 6)(torch.zeros(4, 2, 3), torch.zeros(2, 5)), ValueError, r"state's h must have shape \(2, 6\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(build: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([torch.zeros(2, 2, 2)], r"weight_hh must have shape \(3, 2, 2\)"),
        ([torch.zeros(2, 3, 2)], "weight_hh must have shape"),
        ([torch.zeros(6, 6), torch.zeros(6, 6)], "weights must be 1, one for each recurrent matrix, got 2"),
    ],
)
def test_blocks_of_other_sizes_are_refused(weights: list[Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        functional.two_point(ElmanCell(), torch.zeros(1, 4, 2, 6), weights, [torch.zeros(2, 6)])


def test_a_layer_without_projection_is_its_cell() -> None:
    layer = TwoPointRNN(TimeDecayCell(), 6)
    assert [name for name, _ in layer.named_parameters()] == ["tau"]
    x = torch.randn(4, 2, 6)
    c = torch.zeros(2, 6)
    for t in range(4):
        c = layer.get_parameter("tau") * c + x[t]
    torch.testing.assert_close(layer(x)[1], c)


def test_elstm_and_lru_by_their_own_equations() -> None:
    x = torch.randn(5, 2, 3, dtype=F64)
    layer = make("elstm")
    p = dict(layer.named_parameters())
    c = torch.zeros(2, 6, dtype=F64)
    for t in range(5):
        f = torch.sigmoid(p["weight_cf"] * c + x[t] @ p["weight_in_f"].T + p["bias_f"])
        z = torch.tanh(p["weight_cz"] * c + x[t] @ p["weight_in_z"].T + p["bias_z"])
        c = f * c + (1 - f) * z
    gate = x[-1] @ p["output_in.weight"].T + p["output_in.bias"] + c @ p["output_cell.weight"].T
    torch.testing.assert_close(layer(x)[0][-1], torch.sigmoid(gate) * c)

    layer = make("lru")
    p = dict(layer.named_parameters())
    decay = torch.polar(torch.exp(-torch.exp(p["nu"])), torch.exp(p["theta"]))
    b = torch.complex(p["weight_in_re"], p["weight_in_im"])
    bias = torch.complex(p["bias_re"], p["bias_im"])
    z = torch.zeros(2, 6, dtype=torch.complex128)
    for t in range(5):
        z = decay * z + torch.sqrt(1 - decay.abs() ** 2) * (x[t].to(z.dtype) @ b.T + bias)
    c = torch.complex(p["output_re.weight"], p["output_im.weight"])
    torch.testing.assert_close(layer(x)[0][-1], (z @ c.T).real + x[-1] @ p["skip.weight"].T)


@by_layer
@pytest.mark.parametrize(("form", "every"), [("step", 1), ("chunk", 4)])
def test_triton_kernels_serve_every_layer(name: str, form: str, every: int) -> None:
    """The kernels that CUDA tensors take, here under the interpreter, against float64."""
    wide = make(name)
    narrow = make(name, dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x, delta = torch.randn(8, 2, 3, dtype=F64), torch.randn(8, 2, 6, dtype=F64)
    for layer, backend in ((wide, "torch"), (narrow, "triton")):
        like = layer.weights()[0]
        learner = OnlineLearner(layer, 2, form=form, update_every=every, backend=backend)
        for start in range(0, 8, every):
            output = learner.chunk(x[start : start + every].to(like))
            (output * delta[start : start + every].to(like)).sum().backward()
    grads = [[p.grad for p in layer.parameters()] for layer in (narrow, wide)]
    assert oracle.relative(*grads) < 1e-5


@by_layer
def test_autocast_leaves_the_recurrence_in_its_own_dtype(name: str) -> None:
    layer = make(name, dtype=torch.float32)
    x = torch.randn(6, 2, 3)
    want, _ = layer(x)
    want.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = torch.nn.functional.linear(x, torch.eye(3))  # bfloat16, as a layer before it would give
        output, state = layer(projected)
        again, _ = layer(projected, state)
    assert projected.dtype == torch.bfloat16
    assert output.dtype == again.dtype == torch.float32
    rounded = x.bfloat16().float()
    torch.testing.assert_close(output, layer(rounded)[0])
    output.sum().backward()
    assert oracle.relative([p.grad for p in layer.parameters()], grads) < 0.05
    learner = OnlineLearner(layer, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step, chunk = learner.step(projected[0]), learner.chunk(projected[1:])
    torch.testing.assert_close(torch.cat([step[None], chunk]), layer(rounded)[0])


@by_layer
@pytest.mark.parametrize("learning", ["rfp", "eprop", "snap0"])
def test_triton_kernels_give_every_layers_sequence_gradient(
    name: str, learning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of x and all parameters: E and the input's gradient from one launch, against float64 by torch."""
    monkeypatch.setattr(operations, "choose_scan", lambda _, __, dtype: "torch" if dtype == F64 else "triton")
    wide = make(name, learning=learning)
    narrow = make(name, dtype=torch.float32, learning=learning)
    narrow.load_state_dict(wide.state_dict())
    x, delta = torch.randn(8, 2, 3, dtype=F64), torch.randn(8, 2, 6, dtype=F64)
    resets = torch.rand(8, 2) < 0.2
    grads = []
    for layer in (narrow, wide):
        given = x.to(layer.weights()[0]).requires_grad_()
        (layer(given, resets=resets)[0] * delta.to(given)).sum().backward()
        grads.append([given.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert oracle.relative(*grads) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        lambda **o: LSTM(3, 6, heads=3, **o),
        lambda **o: RGC(6, input_size=3, init="uniform", heads=2, **o),
        lambda **o: GRU(3, 6, **o),
        lambda **o: RNN(3, 6, recurrence="diagonal", **o),
        lambda **o: LRU(3, 6, **o),
    ],
)
def test_rtrl_by_its_kernel(layer: Any) -> None:
    """γ of heads in one pass a step, resets among them, under the interpreter against float64."""
    wide, narrow = layer(dtype=F64, learning="rtrl"), layer(dtype=torch.float32, learning="rtrl")
    narrow.load_state_dict(wide.state_dict())
    x, delta = torch.randn(7, 2, 3, dtype=F64), torch.randn(7, 2, 6, dtype=F64)
    for made, backend in ((wide, "torch"), (narrow, "triton")):
        like = made.weights()[0]
        learner = OnlineLearner(made, 2, backend=backend)
        for t in range(7):
            if t == 4:
                learner.reset(torch.tensor([True, False]))
            output = learner.step(x[t].to(like))
            if t != 2:  # a step without a loss advances γ too
                (output * delta[t].to(like)).sum().backward()
    grads = [[p.grad for p in made.parameters()] for made in (narrow, wide)]
    assert oracle.relative(*grads) < 1e-5


@pytest.mark.parametrize("forward", ["sequential", "parallel"])
@pytest.mark.parametrize("name", LAYERS)
def test_recomputing_gives_the_same_gradients(name: str, forward: str) -> None:
    """Of parameters and the input, with resets."""
    plain, twin = make(name, forward=forward), make(name, forward=forward, recompute=True)
    twin.load_state_dict(plain.state_dict())
    assert "recompute=True" in repr(twin)
    x, resets = torch.randn(9, 2, plain.fan_in, dtype=F64), torch.rand(9, 2) < 0.2
    found = []
    for layer in (plain, twin):
        given = x.clone().requires_grad_()
        output, _ = layer(given, resets=resets)
        found.append(torch.autograd.grad(output.square().sum(), [given, *layer.weights()]))
    assert oracle.relative(found[1], found[0]) < 1e-12


def test_recomputing_keeps_the_states_alone() -> None:
    """Bytes that wait for backward(): the input, two states and not four gates a unit and step; and the weights."""
    steps, batch, units = 20, 3, 8
    x = torch.randn(steps, batch, units, dtype=F64, requires_grad=True)
    kept = []
    for recompute in (False, True):
        layer = RGC(units, dtype=F64, recompute=recompute)
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        kept.append(sum(held.values()))
    step = 8 * batch * units
    assert kept[0] - kept[1] == 4 * steps * step
    assert kept[1] == steps * step + 2 * (steps + 1) * step + 4 * 8 * units**2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", ["time first", "batch first", "unbatched"])
@pytest.mark.parametrize("cell", [RGC, GRU])  # of two states, and of one
def test_what_is_no_state_and_no_reset_is_named_in_every_layout(
    cell: Any, shape: str, autocast: bool
) -> None:
    layer = cell(hidden_size=3, input_size=2, batch_first=shape == "batch first")
    x = torch.randn(5, 2) if shape == "unbatched" else torch.randn(5, 4, 2)
    right = torch.zeros(x.shape[:-1], dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x, resets=right)
        for wrong in (1, "x", [True], right.numpy(), right.float(), right[:-1], right[..., None], 0.5):
            with pytest.raises((TypeError, ValueError), match="resets must"):
                layer(x, resets=wrong)
        for wrong in (1, "x", [True], (1, 2), (None, None), {"s": 1}):
            with pytest.raises((TypeError, ValueError), match="state"):
                layer(x, wrong)
