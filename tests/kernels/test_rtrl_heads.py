"""Exact RTRL, head by head, against a float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernel_problems import DEVICE, poison

from rjepa_triton.kernels.rtrl_heads import pick_config, rtrl_heads_

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Sums of up to 128 products of numbers of order 1, each rounded by 2⁻²⁴.
TOLERANCE = 3e-6


def problem(
    B: int, H: int, S: int, b: int, K: int, M: int, per_head: bool, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "gamma": draw(B, H, S, b, K, b, M),
        "jacobian": draw(B, H, S * b, S * b) / math.sqrt(S * b),
        "phi": draw(S, B, K, H * b),
        "y": draw(B, K, H, M) if per_head else draw(B, K, M),
        "delta": draw(S, B, H * b),
    }


def reference(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """γ after the step and the gradient (H, K, b, M), in float64, written as the equations are."""
    gamma, jacobian, phi, y, delta = (p[name].double() for name in ("gamma", "jacobian", "phi", "y", "delta"))
    B, H, S, b, K, _, M = gamma.shape
    new = torch.einsum("bhsrut,bhutkij->bhsrkij", jacobian.view(B, H, S, b, S, b), gamma)
    if y.dim() == 3:
        y = y[:, :, None].expand(B, K, H, M)
    for i in range(b):
        entering = torch.einsum("sbkh,bkhm->bhskm", phi.view(S, B, K, H, b)[..., i], y)
        new[:, :, :, i, :, i] += entering
    return new, torch.einsum("sbhr,bhsrkij->hkij", delta.view(S, B, H, b), new)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    scale = max(1.0, want.abs().max().item())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE * scale)


# B, H, S, b, K, M, per head
SIZES = [
    (1, 1, 1, 1, 1, 1, False),
    (2, 3, 2, 5, 4, 5, True),
    (1, 2, 2, 16, 4, 16, True),
    (2, 2, 1, 3, 2, 127, False),
    (1, 2, 2, 17, 1, 7, False),
    (3, 2, 2, 4, 4, 1, False),
    (2, 5, 2, 1, 3, 1, True),
    (1, 1, 2, 63, 1, 1, False),
    (2, 2, 3, 5, 2, 5, True),
    (1, 2, 4, 31, 1, 4, False),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_delta", [True, False])
def test_a_step_and_its_gradient(
    size: tuple[Any, ...], with_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(*size)
    want, want_gradient = reference(p)
    poison(monkeypatch)
    gradient = rtrl_heads_(p["gamma"], p["jacobian"], p["phi"], p["y"], p["delta"] if with_delta else None)
    assert_near(p["gamma"], want)
    if with_delta:
        assert gradient is not None
        assert_near(gradient, want_gradient)
    else:
        assert gradient is None


def test_steps_in_a_row_and_twice_the_same() -> None:
    p, twin = problem(2, 2, 2, 5, 3, 5, True), problem(2, 2, 2, 5, 3, 5, True)
    want = p["gamma"].double()
    for t in range(4):
        step = problem(2, 2, 2, 5, 3, 5, True, seed=t)
        want, want_gradient = reference({**step, "gamma": want})
        arguments = (step["jacobian"], step["phi"], step["y"], step["delta"])
        first, second = rtrl_heads_(p["gamma"], *arguments), rtrl_heads_(twin["gamma"], *arguments)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
        assert_near(first, want_gradient)
    assert torch.equal(p["gamma"], twin["gamma"])
    torch.testing.assert_close(
        p["gamma"].double(), want, rtol=0, atol=4 * TOLERANCE * float(want.abs().max())
    )


def test_one_step_of_a_sequence_needs_no_copy_and_nothing_else_is_written() -> None:
    p = problem(2, 2, 2, 4, 2, 4, True)
    want, want_gradient = reference(p)
    phi, delta = torch.full((2, 3, 2, 2, 8), math.nan), torch.full((2, 3, 2, 8), math.nan)
    phi[:, 1], delta[:, 1] = p["phi"].cpu(), p["delta"].cpu()
    buffer = torch.full((p["gamma"].numel() + 64,), math.nan, device=DEVICE)
    gamma = buffer[32:-32].view(p["gamma"].shape).copy_(p["gamma"])
    gradient = rtrl_heads_(gamma, p["jacobian"], phi.to(DEVICE)[:, 1], p["y"], delta.to(DEVICE)[:, 1])
    assert gradient is not None
    assert_near(gamma, want)
    assert_near(gradient, want_gradient)
    assert torch.isnan(buffer[:32]).all()
    assert torch.isnan(buffer[-32:]).all()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 9),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_any_size(B: int, H: int, S: int, b: int, K: int, M: int, per_head: bool, seed: int) -> None:
    p = problem(B, H, S, b, K, M, per_head, seed)
    want, want_gradient = reference(p)
    gradient = rtrl_heads_(p["gamma"], p["jacobian"], p["phi"], p["y"], p["delta"])
    assert gradient is not None
    assert_near(p["gamma"], want)
    assert_near(gradient, want_gradient)


def test_configs_are_of_the_sizes_alone() -> None:
    assert pick_config(128, 1024, "ieee") == pick_config(128, 1024, "ieee")
    assert pick_config(3, 7, "ieee").vector == 1
    assert pick_config(128, 1024, "tf32").block_r == 128


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"gamma": torch.zeros(1, 2, 5, 4, 2, 4, 4)}, ValueError, "gamma must have at most 4 states S, got 5"),
        ({"gamma": torch.zeros(1, 1, 3, 43, 1, 43, 1)}, ValueError, "gamma must have at most 128 rows S·b a head, got 3·43"),
        ({"gamma": torch.zeros(1, 1, 1, 65, 1, 65, 1)}, ValueError, "gamma must have at most 64 units b a head, got 65"),
        ({"gamma": torch.zeros(2, 2, 2, 4, 2, 3, 4)}, ValueError, "gamma must have shape"),
        ({"jacobian": torch.zeros(2, 2, 8, 7)}, ValueError, r"jacobian must have shape \(2, 2, 8, 8\)"),
        ({"jacobian": torch.zeros(2, 2, 8, 8, dtype=torch.float64)}, TypeError, "jacobian must have"),
        ({"y": torch.zeros(2, 4)}, ValueError, r"y must have shape \(B, K, M\) or \(B, K, H, M\), got \(2, 4\)"),
        ({"phi": torch.zeros(2, 2, 2, 9)}, ValueError, "phi must have shape"),
        ({"delta": torch.zeros(2, 2, 9)}, ValueError, "delta must have shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Tensor], error: type[Exception], says: str) -> None:
    p = {**problem(2, 2, 2, 4, 2, 4, True), **change}
    with pytest.raises(error, match=says):
        rtrl_heads_(p["gamma"], p["jacobian"], p["phi"], p["y"], p["delta"])


def test_an_unknown_precision_is_named() -> None:
    p = problem(1, 1, 1, 2, 1, 2, True)
    with pytest.raises(ValueError, match="precision must be one of 'ieee', 'tf32', 'tf32x3', got 'fp8'"):
        rtrl_heads_(p["gamma"], p["jacobian"], p["phi"], p["y"], precision="fp8")  # type: ignore[arg-type]
