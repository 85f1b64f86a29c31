"""Online updates of R-JEPA in one call for all steps: they are those of the loop over steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import Stream
from rjepa_triton.layers.layer import TwoPointRNN
from rjepa_triton.rjepa import backbone
from rjepa_triton.rjepa.config import TrainConfig
from rjepa_triton.rjepa.encoder import Encoder
from rjepa_triton.rjepa.model import RJEPA, control_of
from rjepa_triton.rjepa.online import PassingCell, Streams
from rjepa_triton.rjepa.train import Trainer, optimizer_of

UNITS = 10


def model_of(**options: Any) -> RJEPA:
    torch.manual_seed(0)
    gate = options.pop("gate", "tanh")
    encoder = Encoder(backbone.load("gabor"), units=UNITS, head="onoff", gate=gate)
    model = RJEPA(encoder, hidden=7, **options).double()
    with torch.no_grad():
        for parameter in [
            *model.encoder.circuit.parameters(),
            *model.predictor.parameters(),
            *model.yardstick.parameters(),
        ]:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def batches(count: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 9, rows, UNITS, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(one[0].relu(), one[1]) for one in made]


class Alone(Trainer):
    """The loop over steps, without a run around it."""

    def __init__(self, settings: Any) -> None:
        from lightning.fabric import Fabric

        self.settings, self.fabric = settings, Fabric(accelerator="cpu", devices=1)

    def _update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", ["compile", "torch"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "cosine"},
        {"kind": "square", "gate": "sigmoid"},
        {"kind": "square", "predictor": "linear", "decoupled": True},
        {"kind": "cosine", "target": "context_free"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True], ids=["model", "control"])
def test_streams_are_the_loop(options: dict[str, Any], rows: int, frozen: bool, backend: str) -> None:
    given = dict(options)
    train = TrainConfig(
        updates=1,
        lr_recurrent=0.01,
        lr_bias=0.02,
        lr_predictor=0.03,
        weight_decay=0.1,
        decoupled=given.pop("decoupled", False),
    )
    first = model_of(**given)
    looped = control_of(first) if frozen else first
    called = copy.deepcopy(looped)
    settings = type("Settings", (), {"train": train})()
    optimizers = [optimizer_of(one, train) for one in (looped, called)]
    before = [p.detach().clone() for p in looped.parameters()]
    streams = Streams(called, optimizers[1], rows, backend)
    for x, yardstick in batches(3, rows):
        Alone(settings)._learn_online(looped, optimizers[0], x, yardstick)
        streams.learn(x, yardstick)
    moved = 0
    for (name, a), b, old in zip(looped.named_parameters(), called.parameters(), before, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12, msg=name)
        moved += not torch.equal(a, old)
    predictors = 2 if options.get("predictor") == "linear" else 8
    assert moved == predictors + (0 if frozen else len(list(looped.encoder.circuit.parameters())))
    ours, theirs = (one.state_dict()["state"] for one in optimizers)
    assert ours.keys() == theirs.keys()
    for key in ours:
        for name, value in ours[key].items():
            torch.testing.assert_close(theirs[key][name], value, rtol=1e-10, atol=1e-12)


def test_a_frozen_passing_layer_leaves_its_input_as_it_is() -> None:
    torch.manual_seed(0)
    layer = TwoPointRNN(PassingCell(), 4).double().requires_grad_(False)
    readout = nn.Linear(4, 2).double()
    alone = copy.deepcopy(readout)
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    x, target = torch.randn(20, 3, 4).double(), torch.randn(20, 3, 2).double()
    result = Stream(layer, readout, 3, lr=0.1).run(x, target, hidden=True)
    assert result.hidden is not None
    assert torch.equal(result.hidden, x)
    for t in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(alone(x[t]), target[t]).backward()
        optimizer.step()
    torch.testing.assert_close(readout.weight, alone.weight, rtol=1e-12, atol=1e-12)
    assert not layer.get_parameter("offset").any()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": "context_free", "gate": "affine"}, "'context_free', which moves"),
        ({"target": "ema"}, "'ema'"),
    ],
)
def test_what_needs_the_loop_says_why(options: dict[str, Any], why: str) -> None:
    model = model_of(**options)
    told = Streams.of(model, optimizer_of(model, TrainConfig(updates=1)), 2)
    assert isinstance(told, str)
    assert why in told


def test_exact_learning_needs_the_loop() -> None:
    model = model_of()
    model.encoder.circuit.learning = "rtrl"
    told = Streams.of(model, optimizer_of(model, TrainConfig(updates=1)), 2)
    assert told == "the rule is 'rtrl'"
