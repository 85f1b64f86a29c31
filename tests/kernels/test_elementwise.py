"""The functions that generated code calls: their errors against float64 over ±30, and what they make of odd numbers."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_problems import DEVICE

from rjepa_triton.kernels import elementwise
from rjepa_triton.kernels._launch import check_runnable


@triton.jit
def _apply(x_ptr, out_ptr, N, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, FUNCTION(x), mask=at < N)


@triton.jit
def _apply_power(x_ptr, out_ptr, N, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, elementwise._pow(x, EXPONENT), mask=at < N)


@triton.jit
def _apply_both(a_ptr, b_ptr, larger_ptr, smaller_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < N, other=0.0)
    b = tl.load(b_ptr + at, mask=at < N, other=0.0)
    tl.store(larger_ptr + at, elementwise._larger(a, b), mask=at < N)
    tl.store(smaller_ptr + at, elementwise._smaller(a, b), mask=at < N)


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    try:
        check_runnable(_apply, "x", x)
    except ValueError as error:
        pytest.skip(str(error))
    out = torch.full_like(x, math.nan)
    block = triton.next_power_of_2(len(x))
    _apply[(1,)](x, out, len(x), FUNCTION=getattr(elementwise, f"_{name}"), BLOCK=block)
    return out


def points() -> torch.Tensor:
    return torch.cat(
        [torch.linspace(-30, 30, 4001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)]
    )


# name → the largest error, in units of 2⁻²⁴ of the result's size and, beside it, of 1 where that is larger
BOUNDED = {"tanh": 3, "sigmoid": 4, "erf": 6, "sin": 4, "cos": 4}
RELATIVE = {"exp": 6, "expm1": 8, "log": 4, "log1p": 6, "sqrt": 2, "abs": 0, "sign": 0, "floor": 0}
# NumPy, which the interpreter computes with, warns where the other branch of a choice leaves its domain.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@quiet
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_functions(name: str) -> None:
    x = points().to(DEVICE)
    error = (apply(name, x).double() - getattr(torch, name)(x.double())).abs()
    assert float(error.max()) <= BOUNDED[name] * 2**-24


@quiet
@pytest.mark.parametrize("name", RELATIVE)
def test_functions_relative_to_their_value(name: str) -> None:
    x = points().to(DEVICE)
    if name in ("log", "sqrt"):
        x = x.abs()
    elif name == "log1p":
        x = x[x > -1]
    want = getattr(torch, name)(x.double())
    error = (apply(name, x).double() - want).abs() / want.abs().clamp_min(1e-37)
    assert float(error[want.abs() > 1e-37].max()) <= RELATIVE[name] * 2**-24


@quiet
def test_tanh_and_expm1_keep_their_digits_near_zero() -> None:
    x = torch.logspace(-30, 0, 1000).to(DEVICE)
    for name in ("tanh", "expm1", "log1p"):
        want = getattr(torch, name)(x.double())
        assert float(((apply(name, x).double() - want) / want).abs().max()) <= 12 * 2**-24, name


@quiet
def test_odd_numbers_are_torchs() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38]).to(DEVICE)
    for name in ("tanh", "sigmoid", "exp", "expm1", "abs", "floor"):
        want = getattr(torch, name)(odd)
        torch.testing.assert_close(apply(name, odd), want, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    for name in ("log", "log1p", "sqrt"):
        some = odd[[0, 1, 3, 4]]
        want = getattr(torch, name)(some)
        torch.testing.assert_close(apply(name, some), want, rtol=1e-6, atol=0, equal_nan=True, msg=name)


@quiet
@pytest.mark.parametrize("exponent", [0.5, -0.5, 2.0, 3.0, -1.0, 8.0, 2.5, 1.7])
def test_powers(exponent: float) -> None:
    x = points().abs().clamp(1e-3, 20).to(DEVICE)
    if exponent == exponent // 1:
        x = torch.cat([x, -x])
    out = torch.full_like(x, math.nan)
    _apply_power[(1,)](x, out, len(x), EXPONENT=exponent, BLOCK=triton.next_power_of_2(len(x)))
    want = x.double() ** exponent
    assert float(((out.double() - want) / want).abs().max()) <= 32 * 2**-24


def test_the_larger_and_the_smaller_of_two_keep_nan() -> None:
    a = torch.tensor([1.0, math.nan, 2.0, math.nan, -math.inf]).to(DEVICE)
    b = torch.tensor([2.0, 1.0, math.nan, math.nan, 0.0]).to(DEVICE)
    larger, smaller = torch.empty_like(a), torch.empty_like(a)
    _apply_both[(1,)](a, b, larger, smaller, len(a), BLOCK=8)
    torch.testing.assert_close(larger, torch.maximum(a, b), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(smaller, torch.minimum(a, b), rtol=0, atol=0, equal_nan=True)
