"""`Stream` is the loop of an `OnlineLearner`, a loss of torch.nn.functional and an optimizer of torch.optim.

This is one long file because every option of one class is held to one loop (`Loop`).
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import requiring_gradients
from stream_loops import (
    CALLS,
    FACTORS,
    LAYERS,
    OPTIMIZERS,
    Loop,
    by_step,
    compare,
    everything,
    given,
    made,
    near,
    pairwise,
    told,
)
from torch import Tensor, nn
from torch.nn import functional as F

from rjepa_triton import (
    ELSTM,
    LSTM,
    RGC,
    OnlineLearner,
    Residual,
    Stream,
    TwoPointRNN,
)
from rjepa_triton.backend import native_backend
from rjepa_triton.online import stream_code

F32, F64 = torch.float32, torch.float64
STEPS = 23

needs_a_compiler = pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")


@needs_a_compiler
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=told)
def test_one_call_is_the_loop(case: dict[str, Any]) -> None:
    stream, loop = made(case, F64)
    assert stream.backend == "compile"
    compare(stream, loop, case, 1e-10 if case["optimizer"] == "rmsprop" else 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw", "rmsprop"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", ["rfp", "rtrl"])
def test_one_call_is_the_loop_in_float32(rule: str, layer: str, optimizer: str) -> None:
    case = {
        "layer": layer, "optimizer": optimizer, "loss": "mse", "rule": rule, "calls": "both", "units": 17, "batch": 2,
        "outputs": 3, "every": 1, "clip": None, "rates": False, "resets": True, "mask": True, "bias": True,
    }  # fmt: skip
    stream, loop = made(case, F32, lr=0.001)
    compare(stream, loop, case, 1e-4)


def compare_readout(readout: nn.Module, batch: int, clip: float | None, outputs: int = 3) -> None:
    """Compare a stream of that readout with the loop, by Adam."""
    # Where GELU by tanh is almost 0, torch's slope is 1 + tanh of a number near -1, 1e-16 off. With an eps of 1e-8 Adam
    # would move a weight of no other gradient by 1e-8 of its rate for that.
    options = {"eps": 1e-3}
    case = {
        "batch": batch, "outputs": outputs, "loss": "mse", "calls": "both", "rates": False, "resets": True, "mask": True,
    }  # fmt: skip
    layer = RGC(17, input_size=3, init="uniform", dtype=F64)
    loop = Loop(
        copy.deepcopy(layer),
        copy.deepcopy(readout),
        batch,
        "mse",
        "adam",
        0.01,
        "rfp",
        1 if clip is None else 2,
        clip,
        options,
    )
    stream = Stream(
        layer,
        readout,
        batch,
        optimizer="adam",
        lr=0.01,
        optimizer_options=options,
        update_every=loop.every,
        clip_norm=clip,
        backend="compile",
    )
    compare(stream, loop, case, 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(1.3), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(),
        nn.GELU("tanh"),
    ],
    ids=str,
)  # fmt: skip
def test_activations(activation: nn.Module, batch: int) -> None:
    readout = nn.Sequential(nn.Linear(17, 40), activation, nn.Linear(40, 3)).double()
    with torch.no_grad():
        readout[0].weight.mul_(10)  # so that both sides of each activation are met
    compare_readout(readout, batch, None)


@needs_a_compiler
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: nn.Linear(17, 17),
        lambda: nn.Sequential(nn.Linear(17, 34), nn.ReLU(), nn.Linear(34, 17)),
        lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(17, 9), nn.Linear(9, 17, bias=False), nn.Tanh()),
    ],
    ids=["linear", "mlp", "activations"],
)
def test_a_residual_readout(inner: Callable[[], nn.Module], batch: int, clip: float | None) -> None:
    compare_readout(Residual(inner()).double(), batch, clip, outputs=17)


@needs_a_compiler
@pytest.mark.parametrize("kind", [1.0, -1.0, 0.0, 800.0, -800.0, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_activations_where_they_are_not_finite(kind: float, dtype: torch.dtype) -> None:
    """A readout whose bias puts that number into each activation.

    One output, since torch takes a single number by the formula. Of several it asks oneDNN, whose GELU of ∞ is NaN by
    AVX-512.
    """
    for activation in (nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU()):
        outputs = []
        for backend in ("torch", "compile"):
            readout = nn.Sequential(nn.Linear(4, 1), activation).to(dtype)
            with torch.no_grad():
                readout[0].weight.zero_()
                readout[0].bias.fill_(kind)
            stream = Stream(
                RGC(4, init="uniform", dtype=dtype), readout, loss="delta", nonfinite="continue", backend=backend
            )  # type: ignore[arg-type] # fmt: skip
            result = stream.run(torch.zeros(1, 1, 4, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype))
            outputs.append([result.outputs, stream.readout[0].bias.detach()])
        torch.testing.assert_close(*outputs, equal_nan=True, msg=lambda text, f=activation: f"{f}: {text}")


@needs_a_compiler
@pytest.mark.parametrize("by", ["run", "step"])
def test_another_readout_of_the_same_weights(by: str) -> None:
    """A module that is put around the readout counts from the next step on."""
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3).double()
    found = []
    for backend in ("torch", "compile"):
        stream = Stream(copy.deepcopy(layer), copy.deepcopy(readout), 2, lr=0.1, backend=backend)  # type: ignore[arg-type]
        run = stream.run if by == "run" else functools.partial(by_step, stream)
        losses = [next(iter(run(X[:3], AIM[:3])))]
        for around in (nn.Tanh(), nn.Softplus()):  # of which the latter runs by the loop
            stream.readout = nn.Sequential(stream.readout, around)
            losses.append(next(iter(run(X[:3], AIM[:3]))))
        found.append(losses)
    near(*found, 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("by", ["run", "step"])
def test_a_readout_whose_modules_change(by: str) -> None:
    """Another activation or another setting counts from the next step on; other weights are refused."""
    layer = RGC(5, input_size=3, init="uniform", dtype=F64)
    readout = nn.Sequential(nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 3)).double()
    found = []
    for backend in ("torch", "compile"):
        stream = Stream(copy.deepcopy(layer), copy.deepcopy(readout), 2, lr=0.1, backend=backend)  # type: ignore[arg-type]
        run = stream.run if by == "run" else functools.partial(by_step, stream)
        losses = []

        def more(part: slice, run: Any = run, losses: list[Tensor] = losses) -> None:
            found, *_ = run(X[part], AIM[part])
            losses.append(found)

        more(slice(2))
        stream.readout[1].alpha = 0.3
        more(slice(2, 4))
        stream.readout[1] = nn.Softplus()  # runs by the loop
        more(slice(6))
        stream.readout[1] = nn.Tanh()
        more(slice(4, 6))
        found.append(losses)
    near(*found, 1e-11)
    stream.readout[2] = nn.Linear(6, 3).double()
    with pytest.raises(ValueError, match="a weight of the layer or the readout was replaced"):
        run(X, AIM)


@needs_a_compiler
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_exact_rtrl_is_the_loops(layer: str, batch: int, calls: str) -> None:
    case = {
        "layer": layer, "optimizer": "adam", "loss": "mse", "rule": "rtrl", "calls": calls, "units": 17 if batch == 1 else 40,
        "batch": batch, "outputs": 3, "every": 1, "clip": None, "rates": False, "resets": True, "mask": True, "bias": True,
    }  # fmt: skip
    stream, loop = made(case, F64)
    assert stream.backend == "compile"
    compare(stream, loop, case, 1e-12)


@needs_a_compiler
@pytest.mark.parametrize("block", [1, 2, 5, 10])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name", ["rgc", "rgc by heads", "lstm by heads", "diagonal gru", "time decay", "a user's"]
)
def test_rtrl_within_blocks_is_the_loops(name: str, batch: int, block: int) -> None:
    layer = LAYERS[name](40, dtype=F64)
    if name in ("diagonal gru", "time decay"):
        block = 1
    with torch.no_grad():
        for weight in layer.recurrent_weights():
            weight.mul_(0.3)
    streams = [
        Stream(
            copy.deepcopy(layer), nn.Linear(40, 3, dtype=F64), batch, learning="rtrl", block=block, backend=backend,
        )
        for backend in ("compile", "torch")
    ]  # fmt: skip
    streams[1].readout.load_state_dict(streams[0].readout.state_dict())
    x, target = given(layer, batch, 3, "mse")
    resets = torch.rand(STEPS, batch) < 0.1
    results = [stream.run(x, target, resets) for stream in streams]
    near(results[0].losses, results[1].losses, 1e-12)
    near(*(everything(stream) for stream in streams), 1e-12)


@needs_a_compiler
@pytest.mark.parametrize("units", [1, 40])
def test_one_output(units: int) -> None:
    case = {
        "layer": "lstm", "optimizer": "adam", "loss": "mse", "rule": "rfp", "calls": "whole", "units": units, "batch": 1,
        "outputs": 1, "every": 1, "clip": None, "rates": True, "resets": True, "mask": False, "bias": True,
    }  # fmt: skip
    stream, loop = made(case, F64)
    compare(stream, loop, case, 1e-11)


def stream_of(
    layer: TwoPointRNN | None = None,
    batch: int = 2,
    outputs: int = 3,
    backend: str = "compile",
    **options: Any,
) -> Stream:
    layer = RGC(5, input_size=3, init="uniform", dtype=F64) if layer is None else layer
    readout = nn.Linear(layer.hidden_size, outputs, dtype=layer.weights()[0].dtype)
    return Stream(layer, readout, batch, backend=backend, **options)


BACKENDS = [pytest.param("compile", marks=needs_a_compiler), "torch"]
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@by_backend
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stream_resumes(backend: str, optimizer: str) -> None:
    name, options = OPTIMIZERS[optimizer]
    first, second = (
        stream_of(optimizer=name, lr=0.01, optimizer_options=options, backend=backend) for _ in range(2)
    )
    x, target = given(first.layer, 2, 3, "mse")
    first.run(x[:10], target[:10])
    second.run(x[3:5], target[3:5])  # which is forgotten
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    near(second.run(x[10:], target[10:]).losses, first.run(x[10:], target[10:]).losses, 0.0)
    near(everything(second), everything(first), 0.0)


@needs_a_compiler
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", ["rgc", "lstm", "rtrl"])
@pytest.mark.parametrize(("optimizer", "clip"), [("momentum", None), ("adam", 0.1)])
def test_two_threads_give_the_same_bits(
    layer: str, batch: int, optimizer: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N = 200, and N = 60 of RTRL: more numbers of Γ than one thread keeps to itself."""
    monkeypatch.setattr(stream_code, "SHARED_CALL", 0)
    states = []
    name, options = OPTIMIZERS[optimizer]
    for threads in (1, 2):
        torch.manual_seed(1)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        exact = layer == "rtrl"
        network = LAYERS["rgc" if exact else layer](60 if exact else 200, dtype=F32)
        stream = stream_of(
            network, batch, optimizer=name, optimizer_options=options, clip_norm=clip,
            learning="rtrl" if exact else "rfp",
        )  # fmt: skip
        losses, outputs, _ = stream.run(*given(network, batch, 3, "mse", steps=10))
        states.append([losses, outputs, everything(stream)])
    near(*states, 0.0)


@needs_a_compiler
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_threads_give_the_same_bits_with_a_large_readout(
    batch: int, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_code, "SHARED_CALL", 0)
    states = []
    for threads in (1, 2):
        torch.manual_seed(1)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        layer = RGC(200)
        readout = Residual(nn.Sequential(nn.Linear(200, 1801), nn.GELU(), nn.Linear(1801, 200)))
        stream = Stream(layer, readout, batch, optimizer="adam", clip_norm=clip, backend="compile")
        losses, outputs, _ = stream.run(*given(layer, batch, 200, "cosine", steps=10))
        states.append([losses, outputs, everything(stream)])
    near(*states, 0.0)


@needs_a_compiler
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("frozen", ["layer", "readout", "some"])
def test_frozen_weights_stay(optimizer: str, clip: float | None, frozen: str) -> None:
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)
    held = {
        "layer": list(layer.parameters()),
        "readout": list(readout.parameters()),
        "some": [layer.weight_ms, layer.bias, readout.weight],
    }[frozen]
    for weight in held:
        weight.requires_grad_(False)
    before = [weight.clone() for weight in held]
    name, options = OPTIMIZERS[optimizer]
    loop = Loop(
        copy.deepcopy(layer), copy.deepcopy(readout), 1, "mse", name, 0.01, "rfp", clip=clip, options=options
    )
    stream = Stream(
        layer, readout, 1, optimizer=name, lr=0.01, optimizer_options=options, clip_norm=clip, backend="compile"
    )  # type: ignore[arg-type] # fmt: skip
    x, target = given(layer, 1, 3, "mse")
    losses, outputs, _ = stream.run(x, target)
    near([losses, outputs], loop.run(x, target), 1e-11)
    near(everything(stream), everything(loop), 1e-10 if optimizer == "rmsprop" else 1e-11)
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))


@by_backend
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layer", ["rgc of features", "lstm", "gru of one feature"])
@pytest.mark.parametrize("rule", ["rfp", "rtrl"])
def test_a_reset_forgets_even_nan(rule: str, layer: str, batch: int, backend: str) -> None:
    """A stream whose row was poisoned and then reset gives what one that was never poisoned does."""
    losses = []
    network = LAYERS[layer](17, dtype=F64)
    stream = stream_of(network, batch, backend=backend, lr=0.01, learning=rule)
    x, target = given(network, batch, 3, "mse", steps=12)
    resets = torch.zeros(12, batch, dtype=torch.bool)
    resets[0] = True
    start = copy.deepcopy(stream.state_dict())
    for poison in (0.0, float("nan")):
        saved = copy.deepcopy(start)
        for tensor in (saved["learner"]["state"], *saved["learner"]["gamma"]):
            tensor.fill_(poison)
        stream.load_state_dict(saved)
        losses.append(stream.run(x, target, resets).losses)
    assert losses[0].isfinite().all()
    assert torch.equal(*losses)


@by_backend
@pytest.mark.parametrize(("rule", "batch"), [("rfp", 2), ("rtrl", 2), ("rtrl", 1)])
@pytest.mark.parametrize("by", ["run", "step"])
def test_a_learner_and_its_stream_go_on_from_each_other(by: str, rule: str, batch: int, backend: str) -> None:
    """With one batch row, RTRL's own step exchanges γ and another memory."""
    layer = RGC(5, input_size=3, init="uniform", dtype=F64)
    stream, other = (
        stream_of(copy.deepcopy(layer), batch, backend=each, lr=0.01, learning=rule)
        for each in (backend, "torch")
    )
    other.load_state_dict(copy.deepcopy(stream.state_dict()))
    x, target = given(stream.layer, batch, 3, "mse")
    for each in (stream, other):
        (functools.partial(by_step, each) if by == "step" else each.run)(x[:10], target[:10])
    for each in (stream, other):
        for t in (10, 11):
            each.optimizer.zero_grad()
            F.mse_loss(each.readout(each.learner.step(x[t])), target[t]).backward()
            each.optimizer.step()
    near(stream.run(x[12:], target[12:]).losses, other.run(x[12:], target[12:]).losses, 1e-12)


def _parametrized() -> TwoPointRNN:
    layer = RGC(4, init="uniform")
    nn.utils.parametrizations.weight_norm(layer, "weight_ss")
    return layer


@pytest.mark.parametrize(
    ("layer", "readout", "options", "why"),
    [
        (lambda: RGC(4), nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 2)), {}, "ELU, .* got Softplus"),
        (lambda: RGC(4), nn.Linear(4, 2), {"learning": "uoro"}, "the rules rfp, eprop, rflo, snap0, rtrl, got 'uoro'"),
        (
            lambda: LSTM(4, 130), nn.Linear(130, 2), {"learning": "rtrl"},
            "takes RTRL of heads or blocks of at most 256 states, got 260",
        ),
        (lambda: ELSTM(4, 4), nn.Linear(4, 2), {}, "ELSTM computes its output outside of the recurrence"),
        (_parametrized, nn.Linear(4, 2), {}, "a weight is computed from others"),
        (lambda: RGC(4), nn.Linear(4, 2), {"optimizer": "adam", "optimizer_options": {"amsgrad": True}}, "amsgrad"),
        (
            lambda: RGC(4), nn.Linear(4, 2), {"optimizer": "rmsprop", "optimizer_options": {"momentum": 0.9}},
            "no momentum of RMSprop",
        ),
    ],
    ids=["softplus", "uoro", "large rtrl", "elstm", "parametrized", "amsgrad", "rmsprop with momentum"],
)  # fmt: skip
def test_what_compiled_code_does_not_serve_runs_by_the_loop(
    layer: Callable[[], TwoPointRNN], readout: nn.Module, options: dict[str, Any], why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    network = layer()
    stream = Stream(network, copy.deepcopy(readout), **options)
    assert stream.backend == "torch"
    assert re.search(why, stream.why)
    stream.explain()
    assert re.search(why, capsys.readouterr().out)
    before = copy.deepcopy(stream.readout.state_dict())
    losses, outputs, _ = stream.run(torch.randn(5, 1, 4), torch.randn(5, 1, 2))
    assert losses.shape == (5,)
    assert outputs.shape == (5, 1, 2)
    assert not all(torch.equal(before[name], value) for name, value in stream.readout.state_dict().items())
    with pytest.raises(ValueError, match="backend='compile' can't run: "):
        Stream(layer(), readout, backend="compile", **options)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"readout": torch.zeros(3)}, TypeError, "readout must be a torch.nn.Module, got Tensor"),
        ({"readout": nn.Linear(4, 2)}, ValueError, "must take the layer's 5 units, got in_features=4"),
        ({"readout": nn.Linear(5, 2, dtype=F64)}, TypeError, "readout must have the dtype of the layer"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"loss": "l1"}, ValueError, "loss must be one of 'mse', .*, got 'l1'"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of 'sgd', .*, got 'lion'"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"optimizer_options": {"betas": 1}}, TypeError, "betas"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1, got 0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be a number above 0, got 0.0"),
        ({"huber_delta": float("nan")}, ValueError, "huber_delta must be a number above 0, got nan"),
        ({"learning": "bptt"}, ValueError, "learning='bptt' needs the whole sequence"),
        (
            {"backend": "jax"},
            ValueError,
            "backend must be one of 'auto', 'compile', 'triton', 'torch', got 'jax'",
        ),
    ],
    ids=str,
)
def test_a_stream_that_cannot_be(change: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {"readout": nn.Linear(5, 2), "batch_size": 1, **change}
    with pytest.raises(error, match=says):
        Stream(RGC(5), arguments.pop("readout"), arguments.pop("batch_size"), **arguments)


X, AIM, KINDS = (
    torch.randn(6, 2, 3, dtype=F64),
    torch.randn(6, 2, 3, dtype=F64),
    torch.zeros(6, 2, dtype=torch.long),
)
BAD: dict[str, tuple[str, Callable[[Stream], object], type[Exception], str]] = {
    "no steps": ("mse", lambda s: s.run(X[:0], AIM[:0]), ValueError, r"x must have shape \(T, 2, 3\)"),
    "rows": ("mse", lambda s: s.run(X[:, :1], AIM), ValueError, r"x must have shape \(T, 2, 3\)"),
    "one step's": ("mse", lambda s: s.run(X[0], AIM[0]), ValueError, r"x must have shape \(T, 2, 3\)"),
    "dtype": ("mse", lambda s: s.run(X.float(), AIM), TypeError, "x must have the dtype of the layer"),
    "no tensor": ("mse", lambda s: s.run([1.0], AIM), TypeError, "x must be a torch.Tensor, got list"),
    "target's steps": ("mse", lambda s: s.run(X, AIM[:5]), ValueError, r"target must have shape \(6, 2, 3\)"),
    "target's outputs": (
        "mse",
        lambda s: s.run(X, AIM[..., :2]),
        ValueError,
        r"target must have shape \(6, 2, 3\)",
    ),
    "target's dtype": ("huber", lambda s: s.run(X, AIM.float()), TypeError, "target must have the dtype of"),
    "classes for mse": ("mse", lambda s: s.run(X, KINDS), ValueError, "for the loss 'mse'"),
    "numbers for classes": ("cross_entropy", lambda s: s.run(X, AIM), ValueError, "of classes"),
    "classes' dtype": (
        "cross_entropy",
        lambda s: s.run(X, KINDS.int()),
        TypeError,
        "classes as int64, got torch.int32",
    ),
    "a class too high": (
        "cross_entropy",
        lambda s: s.run(X, KINDS + 3),
        ValueError,
        "from 0 to 2, got one that is 3",
    ),
    "a class too low": ("cross_entropy", lambda s: s.run(X, KINDS - 100), ValueError, "got one that is -100"),
    "resets' rows": (
        "mse",
        lambda s: s.run(X, AIM, X[:, 0] > 0),
        ValueError,
        r"resets must have shape \(6, 2\)",
    ),
    "resets' dtype": ("mse", lambda s: s.run(X, AIM, KINDS), TypeError, "resets must have dtype torch.bool"),
    "mask's rows": (
        "mse",
        lambda s: s.run(X, AIM, None, X[0] > 0),
        ValueError,
        r"mask must have shape \(6, 2\)",
    ),
    "rates' shape": (
        "mse",
        lambda s: s.run(X, AIM, lr=torch.ones(5)),
        ValueError,
        r"lr must have shape \(6,\)",
    ),
    "a rate below 0": (
        "mse",
        lambda s: s.run(X, AIM, lr=-torch.ones(6)),
        ValueError,
        "lr must hold numbers of at least 0",
    ),
    "a rate of nan": (
        "mse",
        lambda s: s.run(X, AIM, lr=torch.full((6,), torch.nan)),
        ValueError,
        "lr must hold numbers",
    ),
    "learn first": ("mse", lambda s: s.learn(AIM[0]), RuntimeError, "without a step"),
    "another's state": (
        "mse",
        lambda s: s.load_state_dict({"layer": {}}),
        ValueError,
        "lacks readout, learner, optimizer",
    ),
    "no state": ("mse", lambda s: s.load_state_dict(3), TypeError, "state must be what state_dict"),
}


JUNK: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    **{
        f"position {value}": (
            lambda s, value=value: s.update(position=value),
            TypeError if value in (2.5, True, None) else ValueError,
            "state's position must be an int",
        )
        for value in (99, -7, 2.5, True, None)
    },
    "few gradients": (
        lambda s: s["gradients"].pop(),
        ValueError,
        "must have the gradients of 8 parameters, got 7",
    ),
    "no gradients": (lambda s: s.update(gradients=None), TypeError, "state's gradients must be a list"),
    "a gradient's shape": (
        lambda s: s["gradients"].__setitem__(0, torch.zeros(7)),
        ValueError,
        r"state's gradients\[0\] must have shape",
    ),
    "a moment's shape": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
        ValueError,
        "state's optimizer doesn't fit: exp_avg must have shape",
    ),
    **{
        f"{name} {junk}": (
            lambda s, name=name, junk=junk: s.update({name: junk}),
            (TypeError, ValueError),
            "state",
        )
        for name in ("layer", "readout", "learner", "optimizer")
        for junk in (None, 3, "x", {}, [])
    },
}


@by_backend
@pytest.mark.parametrize("name", JUNK)
def test_a_damaged_state_changes_nothing(name: str, backend: str) -> None:
    """The weights come before what is damaged, so they would be loaded by then."""
    damage, error, says = JUNK[name]
    stream = stream_of(backend=backend, optimizer="adam", update_every=3)
    stream.run(X[:4], AIM[:4])
    before = copy.deepcopy(stream.state_dict())
    state = copy.deepcopy(before)
    for value in (*state["layer"].values(), *state["readout"].values()):
        value.add_(1)
    damage(state)
    with pytest.raises(error, match=says):
        stream.load_state_dict(state)
    near(stream.state_dict(), before, 0.0)


@by_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str, backend: str) -> None:
    loss, use, error, says = BAD[name]
    stream = stream_of(backend=backend, loss=loss, optimizer="adam")
    stream.run(X[:3], KINDS[:3] if loss == "cross_entropy" else AIM[:3])
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises(error, match=says):
        use(stream)
    near(stream.state_dict(), before, 0.0)
    near(
        stream.run(X[3:], KINDS[3:] if loss == "cross_entropy" else AIM[3:]).losses.isfinite().all(),
        True,
        0.0,
    )


@by_backend
@pytest.mark.parametrize("options", [{}, {"self_prediction": True}, {"population": 2}], ids=str)
def test_hidden_is_the_layers_output_at_each_step(options: dict[str, Any], backend: str) -> None:
    alone = {name: value for name, value in options.items() if name != "population"}
    one = stream_of(backend=backend, outputs=5 if alone else 3, **options)
    members = one.members or [one]
    aim = None if alone else AIM
    learners = [OnlineLearner(copy.deepcopy(member.layer), 2) for member in members]
    by_step = [copy.deepcopy(member) for member in members]
    found = one.run(X, aim, hidden=True).hidden
    assert found is not None
    found = found if options.get("population") else found[None]
    for member, learner, hidden in zip(by_step, learners, found, strict=True):
        for t in range(len(X)):  # by the weights that each step of `by_step` leaves
            near(hidden[t], learner.step(X[t]).detach(), 1e-12)
            member.run(X[t : t + 1], None if aim is None else aim[t : t + 1])
            learner.layer.load_state_dict(member.layer.state_dict())
    assert one.run(X, aim).hidden is None


@by_backend
@pytest.mark.parametrize("by", ["run", "step"])
def test_the_mean_over_all_rows(by: str, backend: str) -> None:
    """It is the mean over those that count, times their part of the rows."""
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)
    mask = torch.tensor([[True, False], [True, True], [False, False]] * 2)
    found = []
    for mean in ("all", "counted"):
        mine = copy.deepcopy((layer, readout))
        stream = Stream(*mine, 2, lr=0.1, mean=mean, backend=backend)  # type: ignore[arg-type]
        part = mask.double().mean(1)
        if mean == "all":
            rates, scale = None, torch.ones(())
        else:  # of SGD, whose step is its rate times the gradient
            rates, scale = 0.1 * part, part
        run = stream.run if by == "run" else functools.partial(by_step, stream)
        losses, *_ = run(X, AIM, None, mask, rates)
        found.append([losses * scale, *stream.parameters])
    near(*found, 1e-12)
    with pytest.raises(ValueError, match="mean must be one of 'counted', 'all', got 'none'"):
        Stream(layer, readout, mean="none")  # type: ignore[arg-type]


@by_backend
def test_step_and_learn_take_turns(backend: str) -> None:
    stream = stream_of(backend=backend)
    stream.step(X[0])
    for use, says in [
        (lambda: stream.step(X[1]), "twice"),
        (lambda: stream.run(X, AIM), "without its learn"),
    ]:
        with pytest.raises(RuntimeError, match=says):
            use()
    with pytest.raises(ValueError, match="target must have shape"):
        stream.learn(AIM[0, :, :2])
    with pytest.raises(TypeError, match="mask must have dtype"):
        stream.learn(AIM[0], KINDS[0])
    other = stream_of(copy.deepcopy(stream.layer), backend="torch")
    other.readout.load_state_dict(stream.readout.state_dict())
    assert stream.learn(AIM[0]) == pytest.approx(float(other.run(X[:1], AIM[:1]).losses), rel=1e-12)
    near(stream.layer.state_dict(), other.layer.state_dict(), 1e-12)


def _decayed(stream: Stream) -> None:
    stream.optimizer.param_groups[0]["weight_decay"] = 0.5


def _frozen(stream: Stream) -> None:
    stream.layer.weight_ss.requires_grad_(False)


def _thawed(stream: Stream) -> None:
    for weight in stream.layer.parameters():
        weight.requires_grad_(not weight.requires_grad)


def _optimizer_loaded(stream: Stream) -> None:
    stream.optimizer.load_state_dict(copy.deepcopy(stream.optimizer.state_dict()))


@needs_a_compiler
@pytest.mark.parametrize("by", ["run", "step"])
@pytest.mark.parametrize("between", [_decayed, _frozen, _thawed, _optimizer_loaded])
@pytest.mark.parametrize("optimizer", ["dampening", "adam"])
def test_what_a_caller_changes_between_steps_counts(
    optimizer: str, between: Callable[[Stream], None], by: str
) -> None:
    name, options = OPTIMIZERS[optimizer]
    first = stream_of(backend="torch", optimizer=name, optimizer_options=options, lr=0.01)
    second = stream_of(copy.deepcopy(first.layer), optimizer=name, optimizer_options=options, lr=0.01)
    second.readout.load_state_dict(first.readout.state_dict())
    x, target = given(first.layer, 2, 3, "mse")
    found = []
    for stream in (first, second):
        if between is _thawed:
            between(stream)
        run = stream.run if by == "run" else functools.partial(by_step, stream)
        losses, *_ = run(x[:10], target[:10])
        between(stream)
        more, *_ = run(x[10:], target[10:])
        found.append([losses, more])
    near(*found, 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("optimizer", ["momentum", "dampening", "adam"])
def test_calls_that_end_between_two_updates(optimizer: str) -> None:
    name, options = OPTIMIZERS[optimizer]
    results = []
    x, target = X, AIM
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)
    for backend in ("torch", "compile"):
        stream = Stream(
            copy.deepcopy(layer), copy.deepcopy(readout), 2, optimizer=name, optimizer_options=options, update_every=4,
            lr=0.1, backend=backend,
        )  # type: ignore[arg-type] # fmt: skip
        results.append([stream.run(x[:2], target[:2]).losses, stream.run(x[2:], target[2:]).losses])
    near(*results, 1e-11)


@by_backend
def test_a_stream_resumes_between_two_updates(backend: str) -> None:
    """The sum of the gradients since the last update is part of the state."""
    first, second = (stream_of(backend=backend, update_every=4, lr=0.1) for _ in range(2))
    x, target = given(first.layer, 2, 3, "mse")
    first.run(x[:6], target[:6])
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict({**state, "gradients": requiring_gradients(state["gradients"])})
    assert not any(p.grad.requires_grad for p in second.parameters)
    near(second.run(x[6:], target[6:]).losses, first.run(x[6:], target[6:]).losses, 0.0)


@by_backend
def test_rates_of_a_call_leave_the_optimizers(backend: str) -> None:
    stream = stream_of(backend=backend, lr=0.01)
    stream.run(X, AIM, lr=torch.full((6,), 0.5))
    assert stream.optimizer.param_groups[0]["lr"] == 0.01


@by_backend
@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (X[0, :1], ValueError, r"x must have shape \(2, 3\)"),
        (X[0, 0], ValueError, r"x must have shape \(2, 3\)"),
        (X[0].float(), TypeError, "x must have the dtype of the layer"),
        ([1.0], TypeError, "x must be a torch.Tensor"),
    ],
)
def test_a_step_of_a_wrong_input(x: Any, error: type[Exception], says: str, backend: str) -> None:
    stream = stream_of(backend=backend)
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises(error, match=says):
        stream.step(x)
    near(stream.state_dict(), before, 0.0)
    stream.step(X[0])
    stream.learn(AIM[0])


@by_backend
def test_a_step_does_not_keep_the_graph_of_its_input(backend: str) -> None:
    stream = stream_of(backend=backend)
    for t in range(3):
        assert not stream.step(X[t].clone().requires_grad_()).requires_grad
        stream.learn(AIM[t])


@by_backend
def test_a_state_that_does_not_fit_changes_nothing(backend: str) -> None:
    stream, other = stream_of(backend=backend), stream_of(backend=backend, outputs=2)
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        stream.load_state_dict(other.state_dict())
    near(stream.state_dict(), before, 0.0)


@by_backend
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"]
)
def test_a_copy_is_a_stream_of_its_own(how: Callable[[Stream], Stream], backend: str) -> None:
    stream = stream_of(backend=backend, update_every=2)  # which is copied between two updates
    stream.run(X[:3], AIM[:3])
    twin = how(stream)
    losses = stream.run(X[3:], AIM[3:]).losses
    near(twin.run(X[3:], AIM[3:]).losses, losses, 0.0)


@by_backend
def test_a_layer_that_became_another_is_refused(backend: str) -> None:
    stream = stream_of(backend=backend)
    stream.layer.float()
    with pytest.raises((TypeError, ValueError), match=r"must have the dtype of|must stay torch\.float64"):
        stream.run(X.float(), AIM.float())


@needs_a_compiler
@pytest.mark.parametrize("of", ["layer", "readout"])
def test_hooks_run_or_are_refused(of: str) -> None:
    """As the loop does: it refuses the layer's, and runs the readout's."""
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)
    found = []
    for backend in ("torch", "auto"):
        stream = Stream(copy.deepcopy(layer), copy.deepcopy(readout), 2, backend=backend)
        if of == "readout":
            stream.readout.register_forward_hook(lambda module, given, output: 2 * output)
            found.append(stream.run(X, AIM).losses)
        else:
            stream.layer.register_forward_hook(lambda *_: None)
            with pytest.raises(ValueError, match="must have no hooks"):
                stream.run(X, AIM)
    if found:
        near(*found, 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("by", ["run", "step"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_the_loop_takes_over_between_two_updates_and_gives_back(optimizer: str, by: str) -> None:
    """A hook on the readout makes the loop serve; the gradients' sum and the moments go along, there and back."""
    name, options = OPTIMIZERS[optimizer]
    layer, readout = RGC(5, input_size=3, init="uniform", dtype=F64), nn.Linear(5, 3, dtype=F64)
    found, (x, target) = [], given(layer, 2, 3, "mse")
    for backend in ("torch", "compile"):
        stream = Stream(
            copy.deepcopy(layer), copy.deepcopy(readout), 2, optimizer=name, optimizer_options=options, update_every=4,
            lr=0.1, backend=backend,
        )  # type: ignore[arg-type] # fmt: skip
        run = stream.run if by == "run" else functools.partial(by_step, stream)
        losses = []
        for hooked, part in (
            (False, slice(3)),
            (True, slice(3, 6)),
            (False, slice(6, 7)),
            (False, slice(7, None)),
        ):
            hook = (
                stream.readout.register_forward_hook(lambda module, given, output: output + 1)
                if hooked
                else None
            )
            loss, *_ = run(x[part], target[part])
            losses.append(loss)
            if hook is not None:
                hook.remove()
        found.append(losses)
    near(*found, 1e-11)


@needs_a_compiler
@pytest.mark.parametrize("population", [None, 2])
def test_explain_says_what_would_run_now(population: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    stream = Stream(RGC(3), nn.Linear(3, 2), population=population)
    stream.explain()
    assert capsys.readouterr().out == "backend = 'compile': one call for all steps\n"
    group = (stream if stream.members is None else stream.members[0]).optimizer.param_groups[0]
    group["maximize"] = True
    stream.explain()
    assert capsys.readouterr().out == "backend = 'torch': compiled code has no maximize of torch.optim\n"
    group["maximize"] = False
    stream.explain()
    assert "'compile'" in capsys.readouterr().out
