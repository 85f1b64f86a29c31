"""Predictor, losses, ψ and actions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rjepa_triton.rjepa import backbone, model
from rjepa_triton.rjepa.encoder import Encoder
from rjepa_triton.rjepa.model import PSI, RJEPA, Predictor, distance

F64 = torch.float64


def small(learning: Any = "rfp", **options: Any) -> RJEPA:
    torch.manual_seed(0)
    made = RJEPA(Encoder(backbone.load("gabor"), units=5, hidden=6, learning=learning), **options).double()
    with torch.no_grad():
        for weight in (*made.encoder.circuit.parameters(), *made.predictor.parameters()):
            weight.copy_(0.3 * torch.randn_like(weight))
    return made


def test_at_first_the_next_is_predicted_to_be_the_same() -> None:
    h, a = torch.randn(3, 4), torch.randn(3, 2)
    assert torch.equal(Predictor(4)(h), h)
    assert torch.equal(Predictor(4, actions=2)(h, a), h)


def test_losses_are_the_papers_with_a_stopped_target() -> None:
    x = torch.randn(6, 2, 5, dtype=F64)
    for kind in ("square", "cosine"):
        made = small("bptt", kind=kind)
        losses = made.from_inputs(x)
        h = losses.encoding.h
        for t in range(1, 6):
            for b in range(2):
                guess, target = made.predictor(h[t - 1, b]), h[t, b]
                want = (guess - target).square().sum() / 5
                if kind == "cosine":
                    want = 1 - (guess @ target) / guess.norm() / target.norm()
                torch.testing.assert_close(losses.representation[t - 1, b], want)
        got = torch.autograd.grad(losses.total(PSI["mean"]), made.encoder.circuit.weights())
        h = made.from_inputs(x).encoding.h
        stopped = distance(kind, made.predictor(h[:-1]), h[1:].detach().clone()).mean()
        for a, b in zip(got, torch.autograd.grad(stopped, made.encoder.circuit.weights()), strict=True):
            torch.testing.assert_close(a, b)


def test_psi() -> None:
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [6.0, 8.0]])
    assert PSI["mean"](losses) == pytest.approx(22 / 6)
    assert PSI["last"](losses) == 7
    assert PSI["time"](losses) == pytest.approx((1 * 2 + 2 * 2 + 3 * 7) / 6)


def test_actions() -> None:
    x, a = torch.randn(4, 2, 5, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    a[-1] = torch.nan  # leads out of the sequence
    given = small(actions="given").from_inputs(x, a)
    assert given.action is None
    assert given.representation.isfinite().all()
    made = small(actions="predicted")
    predicted = made.from_inputs(x, a)
    state = torch.cat([predicted.encoding.s, predicted.encoding.m], -1)
    want = (made.action_predictor(state) - a)[:-1].square().mean(-1)
    torch.testing.assert_close(predicted.action, want)
    total = predicted.total(PSI["mean"])
    torch.testing.assert_close(total, predicted.representation.mean() + want.mean())
    total.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 2, 5, dtype=F64)
    with pytest.raises(ValueError, match="actions must be given to a model with actions='given'"):
        small(actions="given").from_inputs(x)
    with pytest.raises(ValueError, match="actions must not be given"):
        small().from_inputs(x, x[..., :2])
    with pytest.raises(ValueError, match=r"actions must have shape \(4, 2, 2\), got \(3, 2, 2\)"):
        small(actions="given").from_inputs(x, x[:3, :, :2])
    with pytest.raises(ValueError, match="kind must be one of 'square', 'cosine', got 'huber'"):
        small(kind="huber")
    assert model.ACTION_SIZE == 2
