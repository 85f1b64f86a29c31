"""Gates of the reciprocal gated circuit, and why a symmetric head gives it no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rjepa_triton import OnlineLearner, TwoPointRNN
from rjepa_triton.layers.functional import two_point
from rjepa_triton.rjepa import gates, heads

F64 = torch.float64


def layer(gate: Any, units: int = 5, learning: Any = "bptt", scale: float = 0.4) -> TwoPointRNN:
    made = TwoPointRNN(gates.cell(gate), units, learning=learning, init="zeros", dtype=F64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += scale * torch.randn_like(parameter)
    return made


def plain(made: TwoPointRNN, gate: str, x: Tensor) -> Tensor:
    """s (T, B, N) by the equations at the top of the module."""
    g = torch.sigmoid if gate == "sigmoid" else torch.tanh
    ss, ms, mm, sm, *biases = made.weights()
    b_ss, b_ms, b_mm, b_sm = biases or [torch.zeros(())] * 4
    s = m = torch.zeros_like(x[0])
    out = []
    for now in x:
        s, m = (
            (1 - g(m @ ms.T + b_ms)) * now + g(s @ ss.T + b_ss) * s,
            (1 - g(s @ sm.T + b_sm)) * now + g(m @ mm.T + b_mm) * m,
        )
        out.append(s)
    return torch.stack(out)


@pytest.mark.parametrize("gate", gates.GATES)
def test_the_cells_are_their_equations_and_bptt_is_autograds(gate: str) -> None:
    made = layer(gate)
    x = torch.randn(7, 3, 5, dtype=F64, requires_grad=True)
    told, want = made(x)[0], plain(made, gate, x)
    torch.testing.assert_close(told, want, rtol=1e-12, atol=1e-12)
    up = torch.randn_like(want)
    given = [x, *made.parameters()]
    for a, b in zip(
        torch.autograd.grad((told * up).sum(), given),
        torch.autograd.grad((want * up).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", ["affine", "sigmoid"])
def test_the_bias_learns_online_as_in_sequences(gate: str) -> None:
    whole, online = layer(gate, learning="rfp"), TwoPointRNN(gates.cell(gate), 5, dtype=F64)
    online.load_state_dict(whole.state_dict())
    x, up = torch.randn(6, 2, 5, dtype=F64), torch.randn(6, 2, 5, dtype=F64)
    (whole(x)[0] * up).sum().backward()
    learner = OnlineLearner(online, 2)
    for now, weight in zip(x, up, strict=True):
        (learner.step(now) * weight).sum().backward()
    for a, b in zip(whole.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_what_passes_at_first() -> None:
    x = torch.randn(4, 3, 5, dtype=F64)
    for gate in ("tanh", "affine"):
        torch.testing.assert_close(layer(gate, scale=0)(x)[0], x, rtol=0, atol=0)
    shut = torch.sigmoid(torch.tensor(gates.FIRST_BIAS, dtype=F64))
    torch.testing.assert_close(layer("sigmoid", scale=0)(x)[0][0], (1 - shut) * x[0])


@pytest.mark.parametrize("gate", gates.GATES)
def test_the_input_gate_is_what_the_cell_keeps_out(gate: Any) -> None:
    """With the own-state gate's part known, s(t) = (1 - a) x + b s' gives a back."""
    made = layer(gate)
    g = torch.sigmoid if gate == "sigmoid" else torch.tanh
    s, m, x = (torch.randn(3, 5, dtype=F64) for _ in range(3))
    found = two_point(made.cell, made.drive(x[None]), made.recurrent_weights(), (s, m))[0][0]
    bias = made.weights()[4] if gate != "tanh" else 0
    b = g(s @ made.weights()[0].T + bias)
    torch.testing.assert_close(gates.input_gate(gate, made.weights(), m), 1 - (found - b * s) / x)


def test_a_sigmoid_circuit_stays_bounded_where_the_papers_grows() -> None:
    x = torch.ones(400, 1, 2, dtype=F64)
    sizes = {}
    for gate in ("tanh", "sigmoid"):
        made = layer(gate, units=2, scale=0)
        with torch.no_grad():
            made.get_parameter("weight_ss").fill_(2.0)
        sizes[gate] = float(made(x)[0].abs().max())
    assert sizes["tanh"] > 350  # b = tanh(W s') → 1: s(t) = s' + x
    made = layer("sigmoid", units=2, scale=0)
    assert float(made(x)[0].abs().max()) < 1 / (1 - float(torch.sigmoid(torch.tensor(gates.FIRST_BIAS))))


@pytest.mark.parametrize("gate", ["tanh", "affine"])
@pytest.mark.parametrize("onoff", [False, True])
def test_a_symmetric_head_gives_no_memory(gate: Any, onoff: bool) -> None:
    """E[(s - x)(2) x(1)ᵀ] over features and their negatives: 0 for components and the paper's gate, else not."""
    torch.manual_seed(3)
    features = torch.randn(2, 4000, 6, dtype=F64)
    features = torch.cat([features, -features], dim=1)  # as symmetric as can be
    head = heads.Components(6, 6, onoff=onoff).to(F64)
    head.calibrate_(features)
    x = head(features)
    s = layer(gate, units=6, scale=0.2)(x)[0]
    first = x[0] - x[0].mean(0)
    shared = ((s - x)[1].T @ first / len(first)).abs().max()
    if gate == "tanh" and not onoff:
        assert shared < 1e-6
    else:
        assert shared > 1e-2


@pytest.mark.parametrize("onoff", [False, True])
def test_nor_does_it_move_weights_that_are_zero(onoff: bool) -> None:
    """The gradient of Σ |A s(2) - y|² in W_ss at W = 0, of the best linear A, with y that depends on x(1) and x(2)."""
    torch.manual_seed(3)
    features = torch.randn(2, 4000, 6, dtype=F64)
    y = (features[0] + features[1]) @ torch.randn(6, 4, dtype=F64)
    features, y = torch.cat([features, -features], dim=1), torch.cat([y, -y])
    head = heads.Components(6, 6, onoff=onoff).to(F64)
    head.calibrate_(features)
    made, x = layer("tanh", units=6, scale=0), head(features)
    s = made(x)[0][1]
    best = torch.linalg.lstsq(torch.cat([x[1], torch.ones(len(y), 1, dtype=F64)], 1), y).solution
    (s @ best[:-1] + best[-1] - y).square().mean().backward()
    size = made.get_parameter("weight_ss").grad.abs().max()
    assert size > 1e-2 if onoff else size < 1e-6


def test_an_unknown_gate_is_named() -> None:
    with pytest.raises(ValueError, match="gate must be one of 'tanh', 'affine', 'sigmoid', got 'relu'"):
        gates.cell("relu")  # type: ignore[arg-type]
