"""Functions of one number that the generated functions of a cell call (`rjepa_triton.backend.triton_cells`).

They use exp, log and other functions that every GPU has, and that Triton's interpreter has too. Their errors against
float64 over ±30 are those that tests/kernels/test_elementwise.py allows.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "_abs",
    "_cos",
    "_erf",
    "_exp",
    "_expm1",
    "_floor",
    "_larger",
    "_log",
    "_log1p",
    "_pow",
    "_sigmoid",
    "_sign",
    "_sin",
    "_smaller",
    "_sqrt",
    "_tanh",
]


@triton.jit
def _tanh(x):
    # By exp(2x): the form with exp(-2x) is NaN at large negative x. Near 0 a series, since 1 - 2/(…) loses digits.
    square = x * x
    series = x + x * square * (
        -0.333333333 + square * (0.133333333 + square * (-0.0539682540 + square * 0.0218694885))
    )
    return tl.where(square < 0.0625, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _expm1(x):
    series = x * (
        1.0
        + x
        * (
            0.5
            + x
            * (
                0.166666667
                + x * (0.0416666667 + x * (0.00833333333 + x * (0.00138888889 + x * 0.000198412698)))
            )
        )
    )
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _log1p(x):
    # log(u) is of u = 1 + x as rounded; the second factor mends what rounding took (Kahan).
    u = 1.0 + x
    mended = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, mended))


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x)


@triton.jit
def _quarter_turns(x):
    """x less the nearest multiple of π/2, and which multiple.

    π/2 is subtracted in three parts, whose products with the multiple are exact up to some 8,000 radians; beyond,
    digits are lost. The library's functions take any angle by a table, and every thread then has a stack in memory.
    """
    turns = tl.floor(x * 0.6366197724 + 0.5)
    rest = x - turns * 1.5703125
    rest = rest - turns * 4.83751297e-4
    return rest - turns * 7.54978999e-8, turns


@triton.jit
def _turned(x, MORE: tl.constexpr):
    """sin(x + MORE π/2)."""
    rest, turns = _quarter_turns(x)
    square = rest * rest
    sine = -0.16666654611 + square * (8.3321608736e-3 + square * -1.9515295891e-4)
    sine = rest + rest * square * sine
    cosine = 1.0 - 0.5 * square
    cosine += square * square * (4.166664568e-2 + square * (-1.388731625e-3 + square * 2.443315711e-5))
    turns += MORE
    quadrant = turns - 4.0 * tl.floor(turns * 0.25)
    value = tl.where((quadrant == 1.0) | (quadrant == 3.0), cosine, sine)
    return tl.where(quadrant >= 2.0, -value, value)


@triton.jit
def _sin(x):
    return _turned(x, 0.0)


@triton.jit
def _cos(x):
    return _turned(x, 1.0)


@triton.jit
def _erf(x):
    return tl.erf(x)


@triton.jit
def _abs(x):
    return tl.abs(x)


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x * 0.0))


@triton.jit
def _floor(x):
    return tl.floor(x)


@triton.jit
def _larger(a, b):
    """The larger of two numbers; NaN if one of them is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _smaller(a, b):
    """The smaller of two numbers; NaN if one of them is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def _pow(x, EXPONENT: tl.constexpr):
    """x to a power that is known when the kernel is compiled: by products where it is a small whole number."""
    if EXPONENT == 0.5:
        return tl.sqrt_rn(x)
    if EXPONENT == -0.5:
        return 1.0 / tl.sqrt_rn(x)
    if EXPONENT == EXPONENT // 1 and EXPONENT >= -8 and EXPONENT <= 8:
        result = x * 0.0 + 1.0
        for _ in tl.static_range(int(EXPONENT if EXPONENT > 0 else -EXPONENT)):
            result = result * x
        if EXPONENT < 0:
            result = 1.0 / result
        return result
    return tl.exp2(EXPONENT * tl.log2(x))
