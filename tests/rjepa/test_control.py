"""The control is matched: where the circuit can't learn, model and control are the same, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import noise
import numpy as np
import pytest
import torch

from rjepa_triton.rjepa import backbone, config, sequences
from rjepa_triton.rjepa.encoder import Encoder
from rjepa_triton.rjepa.model import RJEPA, LinearPredictor, control_of, distance
from rjepa_triton.rjepa.train import Trainer, build, optimizer_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")
T, n, D = 7, 6, 405


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return noise.pictures(tmp_path_factory.mktemp("pictures"), 2)


MODES = [
    [],
    ["model.head=mlp", "model.distance=square"],
    ["model.head=components", "model.gate=affine"],
    ["model.gate=sigmoid"],
    ["model.target=context_free"],
    ["model.target=ema", "model.embedding=4"],
    ["model.embedding=4", "model.actions=given"],
    ["model.actions=predicted", "train.psi=time", "model.lambda_a=0.5"],
    ["model.predictor=linear", "train.weight_decay=0.01", "train.decoupled=true"],
    ["train.updates=1"],
    ["train.updates=3", "model.target=context_free", "model.gate=affine"],
    ["train.updates=1", "model.target=ema"],
    ["model.train_head=true", "model.head=mlp"],
    ["model.train_head=true", "model.target=context_free"],
    ["train.learning=bptt", "data.order=shuffled"],
    ["train.learning=rtrl", "train.psi=last", "data.order=other"],
    ["train.refine=1", "model.heads=2"],
    ["model.preset=full", "model.backbone=small:2"],
    ["model.preset=full", "model.backbone=small:2", "model.train_backbone=true", "model.head=mlp"],
    ["model.preset=full", "model.backbone=small:2", "model.feedback=false", "model.delay=true"],
]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_without_learning_in_the_circuit_nothing_differs(
    mode: list[str], pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    own = [
        f"data.files=[{','.join(pictures)}]",
        "data.source=pictures",
        "data.steps=7",
        "data.train=4",
        "data.test=3",
    ]
    own += [
        "model.units=6",
        "model.hidden=8",
        "train.batch=2",
        "train.lr_predictor=0.05",
        "train.lr_recurrent=0.01",
    ]
    trainer = Trainer(config.read(None, [*own, *mode]), tmp_path / "run", lambda _: None)
    recurrent = trainer.model.encoder.recurrent_parameters()
    first = [p.detach().clone() for p in recurrent]
    step = trainer.optimizer.step

    def put_back(*given: Any, **options: Any) -> None:
        step(*given, **options)
        with torch.no_grad():
            for parameter, value in zip(recurrent, first, strict=True):
                parameter.copy_(value)

    monkeypatch.setattr(trainer.optimizer, "step", put_back)
    still = set(map(id, recurrent))
    for group in trainer.optimizer.param_groups:  # of a call for all steps, which takes its own
        if still.issuperset(map(id, group["params"])):
            group["lr"] = 0.0
    before = [p.detach().clone() for p in trainer.control.parameters()]
    ours = dict(trainer.model.named_parameters())
    for batch in trainer._order(0):
        trainer._learn(batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.control.parameters(), strict=True))
    for name, parameter in trainer.control.named_parameters():
        torch.testing.assert_close(parameter, ours[name], rtol=1e-5, atol=1e-6)
        if name.startswith("predictor.") and trainer.control.yardstick is trainer.control.predictor:
            torch.testing.assert_close(
                parameter, ours[f"yardstick.{name.partition('.')[2]}"], rtol=1e-5, atol=1e-6
            )
    found = trainer.evaluate(whole=False)
    np.testing.assert_allclose(found["loss"], found["control"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["yardstick"], found["yardstick_control"], rtol=1e-4, atol=1e-6)
    if not {"model.embedding=4", "model.gate=sigmoid"} & set(mode):  # else h isn't x
        assert found["next_from_h"] == pytest.approx(found["next_from_x"], abs=1e-4)


def made(**options: Any) -> RJEPA:
    torch.manual_seed(0)
    encoder = Encoder(backbone.load("gabor"), units=6, head="onoff", **options)
    return RJEPA(encoder, hidden=8)


def test_the_control_shares_a_frozen_backbone_and_no_more() -> None:
    model = made()
    control = control_of(model)
    assert control.encoder.backbone is model.encoder.backbone
    assert not [p for p in control.encoder.recurrent_parameters() if p.requires_grad]
    ours = {id(p) for p in model.parameters()}
    assert not [p for p in control.parameters() if id(p) in ours]


@pytest.mark.parametrize("gate", ["tanh", "affine", "sigmoid"])
def test_a_context_free_embedding_is_the_answer_to_a_patch_alone(gate: Any) -> None:
    model = made(gate=gate)
    for parameter in model.encoder.circuit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(T, n, 6)
    told = model.encoder.context_free(x)
    for t in range(T):
        torch.testing.assert_close(told[t], model.encoder.encode(x[t : t + 1]).h[0])
    if gate == "tanh":
        torch.testing.assert_close(told, x)


def test_targets() -> None:
    x, yardstick = torch.randn(T, n, 6), torch.randn(T, n, 6)
    for target in ("h", "context_free", "ema"):
        torch.manual_seed(0)
        encoder = Encoder(backbone.load("gabor"), units=6, head="onoff")
        model = RJEPA(encoder, hidden=8, target=target, momentum=0.5)  # type: ignore[arg-type]
        with torch.no_grad():
            for weight in encoder.circuit.parameters():
                weight.normal_(std=0.3)
        found = model.from_inputs(x, yardstick=yardstick)
        h = found.encoding.h
        want = h if target == "h" else x  # the teacher's circuit is still zero
        torch.testing.assert_close(found.target, want.detach())
        assert not found.target.requires_grad
        torch.testing.assert_close(
            found.representation, distance("cosine", model.predictor(h[:-1]), want[1:])
        )
        model.follow_()
        if model.teacher is not None:
            for a, b in zip(model.teacher["circuit"].parameters(), encoder.circuit.parameters(), strict=True):
                torch.testing.assert_close(a, 0.5 * b)
            torch.testing.assert_close(
                model.from_inputs(x).target, encoder_with_half(encoder).encode(x).h.detach()
            )


def encoder_with_half(encoder: Encoder) -> Encoder:
    made = Encoder(backbone.load("gabor"), units=6, head="onoff")
    with torch.no_grad():
        for a, b in zip(made.circuit.parameters(), encoder.circuit.parameters(), strict=True):
            a.copy_(0.5 * b)
    return made


def test_the_yardstick_trains_its_predictor_alone() -> None:
    model = made()
    with torch.no_grad():
        for weight in model.encoder.circuit.parameters():
            weight.normal_(std=0.3)
        torch.nn.init.normal_(model.yardstick.second.weight)
    x, yardstick = torch.randn(T, n, 6), torch.randn(T, n, 6)
    error = model.from_inputs(x, yardstick=yardstick).yardstick
    torch.testing.assert_close(
        error, distance("cosine", model.yardstick(model.encoder.encode(x).h[:-1]), yardstick[1:])
    )
    error.mean().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"yardstick"}


def test_a_linear_predictor_is_the_appendixs() -> None:
    g = LinearPredictor(4, actions=2)
    h, a = torch.randn(3, 4), torch.randn(3, 2)
    torch.testing.assert_close(g(h, a), h)
    torch.nn.init.normal_(g.of_h.weight)
    assert g.of_a is not None
    torch.nn.init.normal_(g.of_a.weight)
    torch.testing.assert_close(g(h, a), h @ g.of_h.weight.T + a @ g.of_a.weight.T)


def test_weights_of_the_losses_and_kinds_of_decay() -> None:
    settings = config.read(
        None,
        [
            "model.units=6",
            "model.actions=predicted",
            "model.lambda_r=2",
            "model.lambda_a=0.5",
            "train.decoupled=true",
        ],
    )
    model = build(settings)
    found = model.from_inputs(torch.randn(T, n, 6), torch.randn(T, n, 2))
    want = 2 * found.representation.mean() + 0.5 * found.action.mean()
    torch.testing.assert_close(found.total(torch.mean), want)
    assert type(optimizer_of(model, settings.train)) is torch.optim.AdamW
    rates = [
        group["lr"]
        for group in optimizer_of(
            build(config.read(None, ["model.gate=affine"])), settings.train
        ).param_groups
    ]
    assert rates == [3e-5, 1e-3, 3e-3]


def test_other_orders_of_the_same_patches() -> None:
    values = torch.arange(T * n * 2.0).view(T, n, 2)
    assert sequences.reordered(values, "recorded", 0) is values
    shuffled, other = (sequences.reordered(values, order, 0) for order in ("shuffled", "other"))
    for made_of in (shuffled, other):
        assert not torch.equal(made_of, values)
        assert torch.equal(made_of.flatten().sort().values, values.flatten())
    assert torch.equal(shuffled.sum(0), values.sum(0))  # within each sequence
    assert not torch.equal(other.sum(0), values.sum(0))
    assert torch.equal(other, sequences.reordered(values, "other", 0))
    assert not torch.equal(other, sequences.reordered(values, "other", 1))


def test_what_does_not_go_together_is_named() -> None:
    with pytest.raises(
        ValueError, match="target='ema' goes with an encoder of which the top circuit and F alone learn"
    ):
        build(config.read(None, ["model.target=ema", "model.train_head=true"]))
    for override, said in {
        "data.order=shuffled model.actions=given": "data.order='shuffled' goes with model.actions='none', got 'given'",
        "data.order=other model.preset=full": "data.order='other' goes with model.preset='initial'",
        "train.patience=2": "train.patience=2 needs data.validate to choose by, got none",
        "model.momentum=1": "model.momentum must be at least 0 and below 1, got 1",
        "model.heads=7": "model.heads must divide model.units, 120, got 7",
        "train.updates=1 train.refine=1": "goes with train.refine=0, got 1",
        "model.lambda_r=-1": "model.lambda_r must be at least 0, got -1",
    }.items():
        with pytest.raises(ValueError, match=said):
            config.read(None, override.split())
