"""Reciprocal gated circuits with other gates than the paper's tanh(W c').

    s(t) = (1 - g(W_ms m' + b_ms)) x(t) + g(W_ss s' + b_ss) s'          prime: t - 1
    m(t) = (1 - g(W_sm s' + b_sm)) x(t) + g(W_mm m' + b_mm) m'

Why an RGC without biases has no linear memory of inputs that are symmetric about 0, as those of a BatchNorm nearly are.
To first order in the weights, what it adds to x(t) is

    s(t) - x(t) = (W_ss x')⊙x' - (W_ms x')⊙x(t),

which doesn't change when all inputs change their signs, while a linear function of x' does. So the two are
uncorrelated, E[(s - x)(t) x'ᵀ] = 0, an odd moment of a symmetric distribution, and a linear map of s(t) knows no more
of x' than one of x(t). In the second step that is exact, with tanh and any weights. Nor does a linear prediction's
gradient of W, E[δ_i x'_i x'_j], move weights that are zero. A head with positive values (`heads.Components`, ON and OFF
halves) breaks the symmetry; so does a bias, since g(b)⊙x' is linear in x'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import _checks as check
from ..cells import weights as weight_ops
from ..cells.builtin import RGCCell
from ..cells.two_point import Cell, Matrix

Gate = Literal["tanh", "affine", "sigmoid"]
GATES = ("tanh", "affine", "sigmoid")
# σ(-4) = 0.018: nearly nothing is held, and nearly all of the input passes, until the circuit has learned otherwise
FIRST_BIAS = -4.0


class _Biased(Cell):
    """What the two cells with biases share: states, matrices, and a learned bias for each gate."""

    states = ("s", "m")
    gates = ("ss", "ms", "mm", "sm")
    matrices = (
        Matrix("ss", ("gate", 0), 0),
        Matrix("ms", ("gate", 1), 1),
        Matrix("mm", ("gate", 2), 1),
        Matrix("sm", ("gate", 3), 0),
    )
    parameters = ("bias_ss", "bias_ms", "bias_mm", "bias_sm")


class AffineRGCCell(_Biased):
    """g(z) = tanh(z), with biases that start at 0: the paper's gate of an affine map. s(1) = x(1) while they are 0."""

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ss, ms, mm, sm = (torch.tanh(a + b) for a, b in zip(p, x[1:], strict=True))
        return (1 - ms) * x[0] + ss * c[0], (1 - sm) * x[0] + mm * c[1]


class SigmoidRGCCell(_Biased):
    """g(z) = σ(z), with biases that start at `FIRST_BIAS`. Since 0 < g < 1, |s| stays below max |x| / (1 - max g).

    The paper's direct passthrough holds nearly, not exactly: s(1) = (1 - σ(b_ms)) x(1).
    """

    def initial_parameters(self, units: int) -> dict[str, Tensor]:
        """The four biases (N,), all of them `FIRST_BIAS`."""
        return {name: torch.full((units,), FIRST_BIAS) for name in self.parameters}

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ss, ms, mm, sm = (torch.sigmoid(a + b) for a, b in zip(p, x[1:], strict=True))
        return (1 - ms) * x[0] + ss * c[0], (1 - sm) * x[0] + mm * c[1]


def cell(gate: Gate) -> Cell:
    """The cell of a gate: "tanh", the paper's, without bias; "affine" or "sigmoid". Raises ValueError for another."""
    check.one_of("gate", gate, GATES)
    kinds: dict[str, Callable[[], Cell]] = {
        "tanh": RGCCell,
        "affine": AffineRGCCell,
        "sigmoid": SigmoidRGCCell,
    }
    return kinds[gate]()


def input_gate(gate: Gate, weights: Sequence[Tensor], m: Tensor) -> Tensor:
    """g(W_ms m' + b_ms) of m' (…, N), the part of the input that is kept out of s. weights: those of the layer."""
    z = weight_ops.multiply(weights[1], m)
    if gate == "tanh":
        return z.tanh()
    z = z + weights[5]
    return z.tanh() if gate == "affine" else z.sigmoid()
