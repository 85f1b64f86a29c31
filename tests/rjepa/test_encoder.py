"""The recurrent encoder: what it is at first, its equations, and credit as its learning rule has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rjepa_triton.rjepa import backbone
from rjepa_triton.rjepa.encoder import Encoder, State

F64 = torch.float64


def full(scale: float = 0.0, **options: Any) -> Encoder:
    """Five areas of 2 to 8 maps in float64; recurrent weights and feedback of size `scale`."""
    torch.manual_seed(0)
    made = Encoder(backbone.load("small:2"), preset="full", units=4, hidden=6, **options).double()
    with torch.no_grad():
        for weight in made.trained_parameters():
            weight.copy_(scale * torch.randn_like(weight))
    return made


def patches(steps: int = 4, batch: int = 2, size: int = 12) -> Tensor:
    return torch.rand(steps, batch, 3, size, size, dtype=F64, generator=torch.Generator().manual_seed(1))


def by_hand(made: Encoder, given: Tensor) -> Tensor:
    """s of the top over time, by plain convolutions and autograd's own graph: eq. 1, 2 and 13 as they stand."""
    stages, areas = made.backbone.stages, made.areas
    s: list[Tensor | None] = [None] * 5
    m: list[Tensor | None] = [None] * 5
    top = (given.new_zeros(given.shape[1], 4), given.new_zeros(given.shape[1], 4))
    out = []

    def conv(weight: Tensor, signal: Tensor) -> Tensor:
        return F.conv2d(signal, weight, padding=1)

    for frame in (given - made.backbone.mean) / made.backbone.std:
        old_s, old_m = list(s), list(m)
        below = frame
        for level in range(5):
            into = below
            if level < 4 and old_s[4] is not None:
                above = [
                    F.interpolate(old_s[k], below.shape[-2:], mode="bilinear") for k in range(level + 1, 5)
                ]
                into = below + F.conv2d(torch.cat(above, 1), made.feedback[level].weight)
            x = stages[level](into)
            s0 = torch.zeros_like(x) if old_s[level] is None else old_s[level]
            m0 = torch.zeros_like(x) if old_m[level] is None else old_m[level]
            ss, ms, mm, sm = areas[level].weights()
            s[level] = (1 - conv(ms, m0).tanh()) * x + conv(ss, s0).tanh() * s0
            m[level] = (1 - conv(sm, s0).tanh()) * x + conv(mm, m0).tanh() * m0
            below = s[level]
        x = made.head(below.mean((-2, -1)))
        ss, ms, mm, sm = made.circuit.weights()
        s0, m0 = top
        top = (
            (1 - (m0 @ ms.T).tanh()) * x + (s0 @ ss.T).tanh() * s0,
            (1 - (s0 @ sm.T).tanh()) * x + (m0 @ mm.T).tanh() * m0,
        )
        out.append(top[0])
    return torch.stack(out)


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
def test_the_whole_encoder_is_its_equations(learning: Any) -> None:
    made = full(0.3, learning=learning)
    torch.testing.assert_close(made(patches()).h, by_hand(made, patches()), rtol=1e-12, atol=1e-12)


def test_bptt_gives_autograds_gradient_of_everything() -> None:
    made = full(0.3, learning="bptt")
    delta = torch.randn(4, 2, 4, dtype=F64)
    given = made.trained_parameters()
    got = torch.autograd.grad((made(patches()).h * delta).sum(), given)
    want = torch.autograd.grad((by_hand(made, patches()) * delta).sum(), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rfp_keeps_credit_within_units_and_steps() -> None:
    """After one step there is no past: it is exact. Later it is not."""
    for steps, same in ((1, True), (4, False)):
        found = []
        for learning in ("rfp", "bptt"):
            made = full(0.3, learning=learning)
            state = made(patches(2)).state.detached()
            h = made(patches(steps), state).h
            into_s = made.areas[0].weights()[:2]
            found.append(torch.autograd.grad(h[-1].square().sum(), into_s))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-13) == same


@pytest.mark.parametrize("preset", ["initial", "full"])
def test_at_first_nothing_is_remembered(preset: Any) -> None:
    torch.manual_seed(0)
    made = Encoder(backbone.load("small:2"), preset=preset, units=4, hidden=6).double()
    given = patches()
    torch.testing.assert_close(made(given).h, made.without_recurrence(given))
    torch.testing.assert_close(made(given).h[2], made(given[2:3]).h[0])


def test_the_state_goes_on() -> None:
    made, given = full(0.3), patches(5)
    whole = made(given)
    first = made(given[:2])
    second = made(given[2:], first.state.detached())
    torch.testing.assert_close(torch.cat([first.h, second.h]), whole.h)
    assert isinstance(second.state, State)
    torch.testing.assert_close(second.state.areas[3], whole.state.areas[3])


def test_the_delay_of_the_letter() -> None:
    """A patch reaches the top after four steps: one for each area above the first."""
    made = full(delay=True)
    dark = torch.zeros_like(patches(7))
    lit = dark.clone()
    lit[1] = patches(1)[0]
    changed = (made(lit).h - made(dark).h).abs().flatten(1).amax(1)
    assert [bool(value > 1e-9) for value in changed] == [False, False, False, False, False, True, False]


def test_features_made_beforehand() -> None:
    torch.manual_seed(0)
    made = Encoder(backbone.load("gabor"), units=5)
    given = torch.randint(0, 255, (3, 2, 3, 50, 50), dtype=torch.uint8)
    features = made.features(given, at_once=4)
    made.head.calibrate_(features)
    torch.testing.assert_close(made.encode(made.head(features)).h, made(given).h)
    x = made.head(features).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(5), atol=2e-2, rtol=0)
    assert not any(p.requires_grad for p in made.head.parameters())


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
@pytest.mark.parametrize("delay", [False, True])
def test_without_feedback_sequences_are_what_steps_are(learning: Any, delay: bool) -> None:
    """The dual form, area by area, against the detach oracle step by step, in which feedback has no weight."""
    stepwise = full(0.3, learning=learning, delay=delay)
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in stepwise.feedback.parameters()), dtype=F64),
        stepwise.feedback.parameters(),
    )
    at_once = full(0.3, learning=learning, delay=delay, feedback=False)
    at_once.load_state_dict(stepwise.state_dict(), strict=False)
    found = []
    for made in (stepwise, at_once):
        first = made(patches(2))
        second = made(patches(6), first.state.detached())
        given = [*made.areas.parameters(), *made.circuit.parameters()]
        torch.manual_seed(6)
        loss = (second.h * torch.randn_like(second.h)).sum()
        found.append([second.h, second.state.areas[4][1], *torch.autograd.grad(loss, given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_is_frozen_stays_in_evaluation() -> None:
    made = Encoder(backbone.load("small:2"), preset="full", units=4).train()
    assert not made.backbone.training
    assert not made.head.norm.training
    learns = Encoder(backbone.load("small:2", True), preset="full", units=4, train_head=True).train()
    assert learns.backbone.stages[0][1].training
    assert learns.head.norm.training


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: Encoder(backbone.load("gabor"), preset="full"), "preset='full' needs a backbone of several stages"),
        (lambda: Encoder(backbone.load("small:2"), preset="full", learning="rtrl"), "takes learning='rfp' or 'bptt', got 'rtrl'"),
        (lambda: Encoder(backbone.load("gabor"), delay=True), "delay is for preset='full'"),
        (lambda: Encoder(backbone.load("gabor"), preset="big"), "preset must be one of 'initial', 'full', got 'big'"),
        (lambda: full().features(torch.zeros(1, 1, 3, 20, 20)), "preset='initial' alone"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run()
