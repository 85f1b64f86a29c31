"""ConvRGC against RGC, against autograd, and against itself a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rjepa_triton import RGC, ConvRGC
from rjepa_triton.layers.functional import rgc

F64 = torch.float64


def layer(channels: int = 3, scale: float = 0.2, **options: Any) -> ConvRGC:
    made = ConvRGC(channels, dtype=F64, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=F64))
    return made


def problem(steps: int = 5, batch: int = 2, maps: Sequence[int] = (3, 4, 5)) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(steps, batch, *maps, dtype=F64, requires_grad=True)
    state = torch.randn(2, batch, *maps, dtype=F64, requires_grad=True)
    return x, state, torch.randn(steps, batch, *maps, dtype=F64)


def gradients(
    made: ConvRGC, x: Tensor, state: Tensor, delta: Tensor, resets: Tensor | None = None
) -> list[Tensor]:
    """By the sequence: of x, the state and the weights; with credit for the last m too."""
    s, (_, m) = made(x, (state[0], state[1]), resets)
    loss = (s * delta).sum() + (m * delta[0]).sum()
    return list(torch.autograd.grad(loss, [x, state, *made.parameters()]))


def by_steps(
    made: ConvRGC, x: Tensor, state: Tensor, delta: Tensor, resets: Tensor | None = None
) -> list[Tensor]:
    now = (state[0], state[1])
    loss = x.new_zeros(())
    for t in range(len(x)):
        if resets is not None:
            now = tuple(c.masked_fill(resets[t, :, None, None, None], 0) for c in now)
        s, now = made.step(x[t], now)
        loss = loss + (s * delta[t]).sum()
    return list(torch.autograd.grad(loss + (now[1] * delta[0]).sum(), [x, state, *made.parameters()]))


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_the_dual_form_is_the_detach_oracle(kernel_size: int, depthwise: bool, reset: bool) -> None:
    """`step` is the graph in which a unit's way back in time is its own tap alone; the sequence has no graph."""
    made = layer(kernel_size=kernel_size, depthwise=depthwise)
    x, state, delta = problem()
    resets = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1], [0, 0]]).bool() if reset else None
    assert_close(gradients(made, x, state, delta, resets), by_steps(made, x, state, delta, resets))


@pytest.mark.parametrize("depthwise", [False, True])
def test_bptt_is_autograds(depthwise: bool) -> None:
    made = layer(depthwise=depthwise, learning="bptt")
    x, state, delta = problem(steps=3, batch=1, maps=(3, 2, 3))
    assert_close(gradients(made, x, state, delta), by_steps(made, x, state, delta))
    names = [name for name, _ in made.named_parameters()]

    def run(x: Tensor, state: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(made, given, (x, (state[0], state[1])))[0]

    assert torch.autograd.gradcheck(run, (x, state, *made.parameters()))


def test_exact_where_units_do_not_meet() -> None:
    x, state, delta = problem()
    rfp, bptt = (layer(kernel_size=1, depthwise=True, scale=0.7, learning=rule) for rule in ("rfp", "bptt"))
    assert_close(gradients(rfp, x, state, delta), gradients(bptt, x, state, delta))


def test_not_exact_where_they_do() -> None:
    x, state, delta = problem()
    rfp, bptt = (layer(learning=rule) for rule in ("rfp", "bptt"))
    different = [
        (a - b).norm() / b.norm()
        for a, b in zip(
            gradients(rfp, x, state, delta)[2:], gradients(bptt, x, state, delta)[2:], strict=True
        )
    ]
    assert min(different) > 1e-3


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
def test_on_one_pixel_it_is_the_dense_circuit(learning: Any) -> None:
    made = layer(4, kernel_size=1, learning=learning)
    x, state, delta = problem(maps=(4, 1, 1))
    weights = [w.detach().flatten(1).requires_grad_() for w in made.weights()]
    s, m = rgc(x.flatten(2), *weights, (state[0].flatten(1), state[1].flatten(1)), learning=learning)
    loss = (s * delta.flatten(2)).sum() + (m[-1] * delta[0].flatten(1)).sum()
    want = torch.autograd.grad(loss, [x, state, *weights])
    got = gradients(made, x, state, delta)
    assert_close(got, [w.view_as(g) for w, g in zip(want, got, strict=True)])


def test_the_state_goes_on() -> None:
    made = layer()
    x, state, _ = problem(steps=6)
    whole, last = made(x, (state[0], state[1]))
    first, between = made(x[:4], (state[0], state[1]))
    second, end = made(x[4:], between)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, last)


def test_at_first_the_input_passes_through() -> None:
    x = torch.randn(4, 2, 3, 5, 5)
    torch.testing.assert_close(ConvRGC(3)(x)[0], x)
    torch.testing.assert_close(RGC(5)(x.flatten(2)[..., :5])[0], x.flatten(2)[..., :5])


@pytest.mark.parametrize(
    ("run", "error", "says"),
    [
        (lambda: ConvRGC(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: ConvRGC(2, kernel_size=4), ValueError, "kernel_size must be odd.*got 4"),
        (lambda: ConvRGC(2, learning="rtrl"), ValueError, "learning must be one of 'rfp', 'bptt', got 'rtrl'"),
        (lambda: ConvRGC(2)(torch.zeros(3, 1, 3, 4, 4)), ValueError, r"x must have shape \(T, B, 2, H, W\)"),
        (lambda: ConvRGC(2)(torch.zeros(3, 1, 2, 4, 4, dtype=F64)), TypeError, "x must have the dtype of the weights"),
        (lambda: ConvRGC(2).step(torch.zeros(1, 2, 4, 4), (torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4))), ValueError, r"state\[1\] must have shape \(1, 2, 4, 4\)"),
        (lambda: ConvRGC(2)(torch.zeros(3, 1, 2, 4, 4), resets=torch.zeros(3, 2).bool()), ValueError, r"resets must have shape \(3, 1\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        run()


@pytest.mark.parametrize("stepwise", [False, True])
def test_under_autocast_it_runs_in_its_own_dtype(stepwise: bool) -> None:
    """A convolution before it gives bfloat16 there."""
    made, (x, state, _) = layer(), problem()
    low, pair = x.detach().bfloat16(), (state[0].detach().bfloat16(), state[1].detach().bfloat16())
    given = low[0] if stepwise else low
    run = made.step if stepwise else made
    want, _ = run(given.double(), (pair[0].double(), pair[1].double()))
    with torch.autocast("cpu", torch.bfloat16):
        got, (s, m) = run(given, pair)
        alone, _ = run(given)
    assert got.dtype == s.dtype == m.dtype == alone.dtype == F64
    torch.testing.assert_close(got, want, rtol=0, atol=0)
