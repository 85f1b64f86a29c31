"""Refinement: how close a few rounds come, that the limit is exact, and that divergence never reaches the caller."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import RGC, RNN
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.layers.functional import rgc
from rjepa_triton.rules import bptt, refine, rfp

F64 = torch.float64


def problem(units: int, steps: int, scale: float, batch: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    torch.manual_seed(0)
    weights = [(torch.randn(units, units, dtype=F64) * scale / units**0.5).requires_grad_() for _ in range(4)]
    x = torch.randn(steps, batch, units, dtype=F64)
    return x, weights, torch.randn(steps, batch, units, dtype=F64)


def gradients(x: Tensor, weights: list[Tensor], delta: Tensor, **options: object) -> tuple[Tensor, ...]:
    s, _ = rgc(x, *weights, **options)  # type: ignore[arg-type]
    return torch.autograd.grad((s * delta).sum(), weights)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


@pytest.mark.parametrize(("scale", "least"), [(0.1, 0.99), (0.3, 0.98)])
def test_two_rounds_bring_every_matrix_near(scale: float, least: float) -> None:
    x, weights, delta = problem(120, 100, scale)
    exact = gradients(x, weights, delta, learning="bptt")
    assert all(
        cosine(a, b) >= least for a, b in zip(gradients(x, weights, delta, refine=2), exact, strict=True)
    )
    assert min(cosine(a, b) for a, b in zip(gradients(x, weights, delta), exact, strict=True)) < 0.2


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.5])
def test_the_limit_is_exact(scale: float) -> None:
    x, weights, delta = problem(24, 60, scale, batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", refine.Divergence)
        got = gradients(x, weights, delta, refine="exact")
    assert oracle.relative(got, gradients(x, weights, delta, learning="bptt")) < 1e-8


def test_as_many_rounds_as_steps_are_exact_whatever_the_weights() -> None:
    """The series is finite: λ⁽ᵀ⁻¹⁾ is exact. The weights are small enough for the check on divergence to pass."""
    x, weights, delta = problem(6, 5, 0.3)
    got = gradients(x, weights, delta, refine=4)
    assert oracle.relative(got, gradients(x, weights, delta, learning="bptt")) < 1e-13


@pytest.mark.parametrize("rounds", [1, 4, "exact"])
def test_divergence_is_reported_and_the_exact_gradient_given(rounds: object) -> None:
    x, weights, delta = problem(60, 50, 1.5)
    with pytest.warns(
        refine.Divergence, match=r"refinement did not converge in \d+ rounds: .* sequential backward"
    ):
        got = gradients(x, weights, delta, refine=rounds)
    assert oracle.relative(got, gradients(x, weights, delta, learning="bptt")) < 1e-12


def test_too_many_rounds_give_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "MAX_ROUNDS", 3)
    x, weights, delta = problem(24, 60, 0.3)
    with pytest.warns(refine.Divergence, match="in 3 rounds"):
        got = gradients(x, weights, delta, refine="exact")
    assert oracle.relative(got, gradients(x, weights, delta, learning="bptt")) < 1e-13


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_two_pieces_joined_by_carry_end_in_the_exact_credits(rounds: int) -> None:
    """Credit of the later piece passes to the earlier one; refined to the limit it is that of BPTT over the whole."""
    x, weights, delta = problem(5, 8, 0.4, batch=2)
    weights = [w.detach() for w in weights]
    cell, zero = RGCCell(), torch.zeros(2, 5, dtype=F64)
    both = torch.stack([delta, torch.randn_like(delta)])
    whole = cell.linearize(cell.scan(x[None], weights, (zero, zero)))
    want, want_first = bptt.credits(whole, cell.matrices, weights, both)
    first = cell.scan(x[None, :3], weights, (zero, zero))
    pieces = [first, cell.scan(x[None, 3:], weights, first.after[:, -1].unbind())]
    carry, credits = None, []
    for piece, part in zip(reversed(pieces), (both[:, 3:], both[:, :3]), strict=True):
        lin = cell.linearize(piece)
        m = rfp.transition(lin, cell.matrices, weights)
        credit, carry = refine.credits(lin, m, cell.matrices, weights, part, carry, rounds=rounds or None)
        credits.insert(0, credit)
    near = 1e-8 if rounds == 0 else 0.5
    assert oracle.relative([torch.cat(credits, 1), carry], [want, want_first]) < near


def test_float32_refines_to_its_own_precision() -> None:
    x, weights, delta = problem(24, 40, 0.3, batch=2)
    narrow = [w.detach().float().requires_grad_() for w in weights]
    got = gradients(x.float(), narrow, delta.float(), refine="exact")
    assert oracle.relative(got, gradients(x, weights, delta, learning="bptt")) < 1e-4


def test_layers_take_it() -> None:
    torch.manual_seed(0)
    for make in (
        lambda **o: RNN(3, 8, dtype=F64, **o),
        lambda **o: RGC(8, input_size=3, dtype=F64, init="uniform", **o),
    ):
        layer = make(refine="exact")
        exact = make(learning="bptt")
        exact.load_state_dict(layer.state_dict())
        x = torch.randn(12, 2, 3, dtype=F64)
        for each in (layer, exact):
            each(x)[0].square().sum().backward()
        grads = [[p.grad for p in each.parameters()] for each in (layer, exact)]
        assert oracle.relative(*grads) < 1e-8
