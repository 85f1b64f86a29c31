"""What `Stream` is held to: the loop of an `OnlineLearner`, a loss of torch.nn.functional and an optimizer of torch.optim."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rjepa_triton import (
    CTRNN,
    GRU,
    LSTM,
    RGC,
    RNN,
    Cell,
    IndRNN,
    Matrix,
    OnlineLearner,
    Stream,
    TimeDecay,
    TwoPointRNN,
)

STEPS = 23


class LeakyGate(Cell):
    """z = σ(W_z h' + x_z);  n = tanh(W_n h' + x_n);  h = σ(leak) h' + z (n - h'): the cell of docs/cells.md."""

    states = ("h",)
    gates = ("z", "n")
    inputs = ("z", "n")
    parameters = ("leak",)
    matrices = (Matrix("hz", ("gate", 0), 0), Matrix("hn", ("gate", 1), 0))

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z, n = torch.sigmoid(p[0] + x[0]), torch.tanh(p[1] + x[1])
        return (torch.sigmoid(x[2]) * c[0] + z * (n - c[0]),)


HEADS = {1: 1, 2: 2, 17: 1, 40: 4}  # of N units
LAYERS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda n, **o: RGC(n, init="uniform", **o),
    "rgc of features": lambda n, **o: RGC(n, input_size=5, init="uniform", **o),
    "rgc by heads": lambda n, **o: RGC(n, input_size=3, init="uniform", heads=HEADS[n], **o),
    "lstm": lambda n, **o: LSTM(9, n, **o),
    "lstm by heads": lambda n, **o: LSTM(2, n, heads=HEADS[n], **o),
    "gru": lambda n, **o: GRU(4, n, **o),
    "gru of one feature": lambda n, **o: GRU(1, n, **o),
    "rnn": lambda n, **o: RNN(3, n, **o),
    "ctrnn": lambda n, **o: CTRNN(3, n, **o),
    "diagonal gru": lambda n, **o: GRU(3, n, recurrence="diagonal", **o),
    "time decay": lambda n, **o: TimeDecay(3, n, **o),
    "indrnn": lambda n, **o: IndRNN(3, n, **o),
    "a user's": lambda n, **o: TwoPointRNN(LeakyGate(), n, input_size=3, **o),
}
HIDDEN = 7  # of a readout that is an MLP, odd as are its inputs
READOUTS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "mlp": lambda n, o, **kind: nn.Sequential(nn.Linear(n, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, o, **kind)),
    "activations all around": lambda n, o, **kind: nn.Sequential(
        nn.Tanh(), nn.Sequential(nn.Linear(n, 33, bias=False), nn.SiLU(), nn.Linear(33, o, **kind)), nn.LeakyReLU(0.3)
    ),
}  # fmt: skip
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True}),
    "dampening": ("sgd", {"momentum": 0.9, "dampening": 0.3}),
    "sgd with decay": ("sgd", {"weight_decay": 0.1}),
    "adam": ("adam", {}),
    "adam with decay": ("adam", {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adamw": ("adamw", {}),
    "rmsprop": ("rmsprop", {}),
}
CLASSES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
# How many steps each call takes; "step" for as many of step() and learn().
Calls = tuple[int | tuple[str, int], ...]
CALLS: dict[str, Calls] = {
    "whole": (STEPS,),
    "pieces": (9, 1, 13),
    "steps": (("step", STEPS),),
    "both": (10, ("step", 4), 3, ("step", 1), 5),
}
FACTORS: dict[str, Sequence[Any]] = {
    "layer": list(LAYERS),
    "optimizer": list(OPTIMIZERS),
    "loss": ["mse", "cross_entropy", "huber", "cosine", "delta"],
    "rule": ["rfp", "eprop", "rflo", "snap0", "rtrl"],
    "calls": list(CALLS),
    "readout": list(READOUTS),
    "units": [1, 2, 17, 40],
    "batch": [1, 3],
    "outputs": [2, 9],
    "every": [1, 3],
    "clip": [None, 0.2],
    "rates": [False, True],
    "resets": [False, True],
    "mask": [False, True],
    "bias": [True, False],
}


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which each value of a factor meets each value of every other one."""
    draw = random.Random(0)
    missing = {
        (a, x, b, y) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]
    }  # a before b
    order = {name: at for at, name in enumerate(factors)}
    cases = []
    while missing:
        a, x, b, y = min(missing, key=str)
        case = {a: x, b: y}

        def gained(name: str, value: Any, case: Mapping[str, Any] = case, missing: set[Any] = missing) -> int:
            met = (
                (name, value, other, case[other])
                if order[name] < order[other]
                else (other, case[other], name, value)
                for other in case
            )
            return sum(pair in missing for pair in met)

        for name in draw.sample([name for name in factors if name not in case], len(factors) - 2):
            values = draw.sample(list(factors[name]), len(factors[name]))
            case[name] = max(values, key=functools.partial(gained, name))
        case = {name: case[name] for name in factors}
        missing -= {(a, case[a], b, case[b]) for a, b in combinations(case, 2)}
        cases.append(case)
    return cases


def told(case: Mapping[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


class Loop:
    """What a `Stream` is documented to do, step by step."""

    def __init__(
        self, layer: TwoPointRNN, readout: nn.Module, batch: int, loss: str, optimizer: str, lr: float, rule: str,
        every: int = 1, clip: float | None = None, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.readout, self.loss, self.every, self.clip = layer, readout, loss, every, clip
        self.learner = OnlineLearner(layer, batch, form="step", learning=rule)  # type: ignore[arg-type]
        self.weights = [*layer.parameters(), *readout.parameters()]
        self.optimizer = CLASSES[optimizer](self.weights, lr=lr, **(options or {}))
        self.now = 0

    def step(
        self, x: Tensor, target: Tensor, reset: Tensor | None, mask: Tensor | None, rate: float | None
    ) -> tuple[Tensor, Tensor]:
        if reset is not None and reset.any():
            self.learner.reset(reset)
        output = self.readout(self.learner.step(x))
        loss = self.of(output, target) if mask is None else self.of(output[mask], target[mask])
        loss.backward()
        self.now += 1
        if self.now % self.every == 0:
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.weights, self.clip)
            if rate is not None:
                self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach(), output.detach()

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        if self.loss == "delta":
            return (output * target).sum()
        if not len(output):
            return output.sum()  # of nothing: 0
        if self.loss == "cosine":
            return (1 - F.cosine_similarity(output, target)).mean()
        if self.loss == "huber":
            return F.huber_loss(output, target, delta=0.7)
        return {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}[self.loss](output, target)

    def run(
        self, x: Tensor, target: Tensor, resets: Tensor | None = None, mask: Tensor | None = None,
        rates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = [
            self.step(
                x[t], target[t], None if resets is None else resets[t], None if mask is None else mask[t],
                None if rates is None else float(rates[t]),
            )
            for t in range(len(x))
        ]  # fmt: skip
        losses, outputs = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(outputs)


def by_step(
    stream: Stream, x: Tensor, target: Tensor, resets: Tensor | None = None, mask: Tensor | None = None,
    rates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `Stream.run`, by step() and learn()."""
    losses, outputs = [], []
    for t in range(len(x)):
        if resets is not None and resets[t].any():
            stream.reset(resets[t])
        if rates is not None:
            stream.optimizer.param_groups[0]["lr"] = float(rates[t])
        outputs.append(stream.step(x[t]))
        losses.append(stream.learn(target[t], None if mask is None else mask[t]))
    return torch.tensor(losses, dtype=x.dtype), torch.stack(outputs)


def given(
    layer: TwoPointRNN, batch: int, outputs: int, loss: str, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """x (T, B, F) that isn't contiguous, and a target that fits the loss."""
    dtype = layer.weights()[0].dtype
    x = torch.randn(batch, steps, layer.fan_in, dtype=dtype).transpose(0, 1)
    if loss == "cross_entropy":
        return x, torch.randint(outputs, (steps, batch))
    return x, torch.randn(steps, outputs, batch, dtype=dtype).mT


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state_dict."""
    if isinstance(value, Mapping):
        for key in value:
            yield from flat(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for at, each in enumerate(value):
            yield from flat(each, f"{path}.{at}")
    else:
        yield path, value


def near(found: Any, wanted: Any, tolerance: float) -> None:
    """Numbers of two state_dicts within rounding, relative to the largest of each tensor, and all else equal."""
    ours, theirs = dict(flat(found)), dict(flat(wanted))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            got = ours[name]
            assert got.dtype == value.dtype, name
            assert got.shape == value.shape, name
            scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            torch.testing.assert_close(
                got, value, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert ours[name] == value, name


def everything(of: Stream | Loop) -> dict[str, Any]:
    """Weights, the learner's state with Γ, and the optimizer's."""
    of.learner.lend()  # folds a step that no backward pass has reached, as in a layer that doesn't learn
    learner = of.learner.state_dict()
    learner.pop("episode")  # when all rows were last reset, which form "step" doesn't use
    return {
        "layer": of.layer.state_dict(),
        "readout": of.readout.state_dict(),
        "learner": learner,
        "optimizer": of.optimizer.state_dict(),
    }


def without_rates(state: dict[str, Any]) -> dict[str, Any]:
    """Without the optimizer's learning rate, which stands for the steps that are given none."""
    for group in state["optimizer"]["param_groups"]:
        group.pop("lr")
    return state


def made(
    case: Mapping[str, Any], dtype: torch.dtype, lr: float = 0.01, backend: str = "compile"
) -> tuple[Stream, Loop]:
    """A compiled stream and the loop, with the same weights."""
    layer = LAYERS[case["layer"]](case["units"], dtype=dtype)
    # The cosine doesn't depend on the length of w h, of one unit: its gradient would be rounding alone.
    bias = case["bias"] or (case["loss"] == "cosine" and case["units"] == 1)
    readout = READOUTS[case.get("readout", "linear")](case["units"], case["outputs"], bias=bias).to(dtype)
    optimizer, options = OPTIMIZERS[case["optimizer"]]
    loop = Loop(
        copy.deepcopy(layer), copy.deepcopy(readout), case["batch"], case["loss"], optimizer, lr, case["rule"],
        case["every"], case["clip"], options,
    )  # fmt: skip
    stream = Stream(
        layer, readout, case["batch"], loss=case["loss"], optimizer=optimizer, lr=lr, optimizer_options=options,
        learning=case["rule"], update_every=case["every"], clip_norm=case["clip"], huber_delta=0.7,
        backend=backend,
    )  # type: ignore[arg-type] # fmt: skip
    return stream, loop


def widened(value: Any) -> Any:
    """A state or a list with its float32 numbers as float64, but for an optimizer's count of steps."""
    if isinstance(value, dict):
        return {name: each if name == "step" else widened(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [widened(each) for each in value]
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def compare(
    stream: Stream,
    loop: Loop,
    case: Mapping[str, Any],
    tolerance: float,
    calls: Mapping[str, Calls] = CALLS,
    *,
    wide: bool = False,
) -> None:
    """Run both, and compare losses, outputs and all state after each call. wide: the loop is in float64."""
    as_loop = widened if wide else list
    sizes = [call if isinstance(call, int) else call[1] for call in calls[case["calls"]]]
    x, target = given(stream.layer, case["batch"], case["outputs"], case["loss"], sum(sizes))
    resets = torch.rand(len(x), case["batch"]) < 0.2 if case["resets"] else None
    mask = torch.rand(len(x), case["batch"]) < 0.6 if case["mask"] else None
    rates = 0.001 + 0.02 * torch.rand(len(x)) if case["rates"] else None
    start = 0
    for call, count in zip(calls[case["calls"]], sizes, strict=True):
        part = slice(start, start + count)
        start += count
        arguments = [x[part], target[part], *(None if a is None else a[part] for a in (resets, mask, rates))]
        run = stream.run if isinstance(call, int) else functools.partial(by_step, stream)
        losses, outputs, *_ = run(*arguments)
        near(as_loop([losses, outputs]), loop.run(*as_loop(arguments)), tolerance)
        ours, theirs = everything(stream), everything(loop)
        if rates is not None:
            ours, theirs = without_rates(ours), without_rates(theirs)
        near(widened(ours) if wide else ours, theirs, tolerance)
