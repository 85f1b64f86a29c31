"""The built-in two-point cells: names and `update`, from which the rest follows.

    ElmanCell      h = f(W h' + x); with a diagonal W an independently recurrent unit
    LeakyCell      h = (1 - α) h' + α f(W h' + x)
    LSTMCell, GRUCell   as in torch.nn
    MGUCell        minimal gated unit: one gate that forgets and resets
    MinLSTMCell, MinGRUCell   gates that read the input alone
    ELSTMCell      element-wise LSTM: forget gate and candidate
    TimeDecayCell  c = τ c' + x
    LRUCell        linear recurrent unit, or recurrent trace unit: one complex decay per unit
    RGCCell        reciprocal gated circuit, the paper's cell
    LIFCell, ALIFCell   spiking neurons, which learn by a surrogate derivative

A prime is the step before. docs/cells.md shows how to write a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks as check
from .two_point import Cell, Matrix, Partials

__all__ = [
    "NONLINEARITIES",
    "ALIFCell",
    "ELSTMCell",
    "ElmanCell",
    "GRUCell",
    "LIFCell",
    "LRUCell",
    "LSTMCell",
    "LeakyCell",
    "MGUCell",
    "MinGRUCell",
    "MinLSTMCell",
    "Nonlinearity",
    "RGCCell",
    "TimeDecayCell",
]

Nonlinearity = Literal["tanh", "relu"]
NONLINEARITIES = ("tanh", "relu")


def _apply(nonlinearity: str, value: Tensor) -> Tensor:
    return torch.tanh(value) if nonlinearity == "tanh" else torch.relu(value)


class ElmanCell(Cell):
    """h = f(W h' + x), f = tanh or relu (Elman 1990; torch.nn.RNN). With diagonal W: IndRNN (Li et al. 2018)."""

    states = ("h",)
    gates = ("hh",)
    matrices = (Matrix("hh", ("gate", 0), 0),)

    def __init__(self, nonlinearity: Nonlinearity = "tanh") -> None:
        check.one_of("nonlinearity", nonlinearity, NONLINEARITIES)
        self.nonlinearity = nonlinearity

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_apply(self.nonlinearity, p[0] + x[0]),)


class LeakyCell(Cell):
    """h = (1 - α) h' + α f(W h' + x): a leaky recurrent network, which is Euler's method on a continuous-time one.

    α = dt/τ, 0 < α ≤ 1; f = tanh or relu. Raises ValueError for another α or f.
    """

    states = ("h",)
    gates = ("hh",)
    matrices = (Matrix("hh", ("gate", 0), 0),)

    def __init__(self, alpha: float, nonlinearity: Nonlinearity = "tanh") -> None:
        check.number("alpha", alpha)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha}")
        check.one_of("nonlinearity", nonlinearity, NONLINEARITIES)
        self.alpha, self.nonlinearity = alpha, nonlinearity

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return ((1 - self.alpha) * c[0] + self.alpha * _apply(self.nonlinearity, p[0] + x[0]),)


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), in the form of torch.nn.LSTM.

        i, f, o = σ(W h' + x), g = tanh(W_g h' + x_g);    c = f c' + i g;    h = o tanh(c)

    Each of i, f, g and o has a per-unit input x of its own.
    """

    states = ("h", "c")
    gates = ("i", "f", "g", "o")
    inputs = ("i", "f", "g", "o")
    matrices = tuple(Matrix(f"h{name}", ("gate", j), 0) for j, name in enumerate("ifgo"))

    @staticmethod
    def _gates(p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, f, g, o = (a + b for a, b in zip(p, x, strict=True))
        return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        i, f, g, o = self._gates(p, x)
        cell = f * c[1] + i * g
        return o * cell.tanh(), cell


class GRUCell(Cell):
    """Gated recurrent unit (Cho et al. 2014) in torch.nn.GRU's variant, with the reset gate after the product.

        r, z = σ(W h' + x);    n = tanh(x_n + r (W_hn h' + b_hn));    h = (1 - z) n + z h'

    bias: whether there is b_hn. The variant with U(r ⊙ h') is not two-point: its matrix U reads r, which other
    matrices have made in the same step.
    """

    states = ("h",)
    gates = ("r", "z", "n")
    inputs = ("r", "z", "n")
    matrices = tuple(Matrix(f"h{name}", ("gate", j), 0) for j, name in enumerate("rzn"))

    def __init__(self, bias: bool = True) -> None:
        self.parameters = ("bias_hn",) if bias else ()

    @staticmethod
    def _gates(p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r, z = (p[0] + x[0]).sigmoid(), (p[1] + x[1]).sigmoid()
        recurrent = p[2] + x[3] if len(x) > 3 else p[2]
        return r, z, recurrent, (x[2] + r * recurrent).tanh()

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _, z, _, n = self._gates(p, x)
        return ((1 - z) * n + z * c[0],)


class MGUCell(Cell):
    """Minimal gated unit (Zhou et al. 2016), in the two-point variant: the gate comes after the product, as in GRUCell.

        f = σ(W_f h' + x_f);    n = tanh(x_n + f (W_n h' + b_hn));    h = (1 - f) h' + f n

    bias: whether there is b_hn. The paper's W_n (f ⊙ h') is not two-point: W_n reads f, which is of the same step.
    """

    states = ("h",)
    gates = ("f", "n")
    inputs = ("f", "n")
    matrices = (Matrix("hf", ("gate", 0), 0), Matrix("hn", ("gate", 1), 0))

    def __init__(self, bias: bool = True) -> None:
        self.parameters = ("bias_hn",) if bias else ()

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        f = (p[0] + x[0]).sigmoid()
        n = (x[1] + f * (p[1] + x[2] if len(x) > 2 else p[1])).tanh()
        return ((1 - f) * c[0] + f * n,)


class MinLSTMCell(Cell):
    """minLSTM (Feng et al. 2024): an LSTM whose gates read the input alone and sum to 1.

        f = σ(x_f) / (σ(x_f) + σ(x_i));    h = f h' + (1 - f) x_n

    f is computed as σ(log σ(x_f) - log σ(x_i)), which is never 0 / 0. There are no recurrent matrices, so F is affine
    in h' and RFP is exact.
    """

    states = ("h",)
    gates = ()
    inputs = ("f", "i", "n")
    matrices = ()
    affine = True

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        f = (logsigmoid(x[0]) - logsigmoid(x[1])).sigmoid()
        return (f * c[0] + (1 - f) * x[2],)


class MinGRUCell(Cell):
    """minGRU (Feng et al. 2024): h = (1 - z) h' + z x_n, z = σ(x_z). There are no recurrent matrices: RFP is exact."""

    states = ("h",)
    gates = ()
    inputs = ("z", "n")
    matrices = ()
    affine = True

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z = x[0].sigmoid()
        return ((1 - z) * c[0] + z * x[1],)


class ELSTMCell(Cell):
    """The recurrent part of eLSTM, an element-wise LSTM (Irie et al. 2024): forget gate f and candidate z.

        f = σ(w_f c' + x_f),    z = tanh(w_z c' + x_z),    c = f c' + (1 - f) z

    The output gate reads c(t) itself, so it is not part of the recurrence; the layer `nn.ELSTM` adds it.
    """

    states = ("c",)
    gates = ("f", "z")
    inputs = ("f", "z")
    matrices = (Matrix("cf", ("gate", 0), 0), Matrix("cz", ("gate", 1), 0))

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        f, z = (p[0] + x[0]).sigmoid(), (p[1] + x[1]).tanh()
        return (f * c[0] + (1 - f) * z,)


class TimeDecayCell(Cell):
    """Time-decay unit (paper, Appendix A.4): c = τ c' + x, with a learned decay τ per unit.

    The paper's τ_l is one number per layer.
    """

    states = ("c",)
    gates = ()
    parameters = ("tau",)
    matrices = ()
    affine = True

    def initial_parameters(self, units: int) -> dict[str, Tensor]:
        """τ (N,), drawn uniformly from [0, 1)."""
        return {"tau": torch.rand(units)}

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (x[1] * c[0] + x[0],)


class LRUCell(Cell):
    """Linear recurrent unit (Orvieto et al. 2023), and recurrent trace unit (Elelimy et al. 2024).

        z = λ z' + √(1 - |λ|²) x,    λ = exp(-exp(ν) + i exp(θ)),    z = re + i im, both of them states

    ν and θ are learned, one number each per unit. With a nonlinearity f, "tanh" or "relu", f is applied to re and im:
    the nonlinear form of the recurrent trace unit. Initially λ is uniform over the ring r_min ≤ |λ| ≤ r_max, with a
    phase up to max_phase.

    Raises ValueError unless 0 ≤ r_min < r_max < 1 and 0 < max_phase ≤ 2π.
    """

    states = ("re", "im")
    gates = ()
    inputs = ("re", "im")
    parameters = ("nu", "theta")
    matrices = ()
    outputs = (0, 1)

    def __init__(
        self,
        nonlinearity: Nonlinearity | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
    ) -> None:
        check.one_of("nonlinearity", nonlinearity, (None, *NONLINEARITIES))
        for name, value in (("r_min", r_min), ("r_max", r_max), ("max_phase", max_phase)):
            check.number(name, value)
        if not 0 <= r_min < r_max < 1:
            raise ValueError(f"r_min and r_max must be 0 ≤ r_min < r_max < 1, got {r_min} and {r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2π], got {max_phase}")
        self.nonlinearity, self.r_min, self.r_max, self.max_phase = nonlinearity, r_min, r_max, max_phase
        self.affine = nonlinearity is None

    def initial_parameters(self, units: int) -> dict[str, Tensor]:
        """ν and θ, (N,) each, that put λ uniformly over the ring."""
        tiny = torch.finfo(torch.float32).tiny
        square = self.r_min**2 + torch.rand(units) * (self.r_max**2 - self.r_min**2)
        phase = (torch.rand(units) * self.max_phase).clamp_min(tiny)
        return {"nu": (-0.5 * square.clamp_min(tiny).log()).log(), "theta": phase.log()}

    @staticmethod
    def _decay(x: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """λ's real part, its imaginary part, and √(1 - |λ|²)."""
        rate, phase = x[2].exp(), x[3].exp()
        modulus = (-rate).exp()
        return modulus * phase.cos(), modulus * phase.sin(), (-torch.expm1(-2 * rate)).sqrt()

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        a, b, gain = self._decay(x)
        re, im = a * c[0] - b * c[1] + gain * x[0], b * c[0] + a * c[1] + gain * x[1]
        return (
            (re, im)
            if self.nonlinearity is None
            else (_apply(self.nonlinearity, re), _apply(self.nonlinearity, im))
        )


class RGCCell(Cell):
    """Reciprocal gated circuit (Nayebi et al. 2022; paper, Section 2.2 and eq. 13; σ is tanh).

        s(t) = (1 - tanh(W_ms m')) x + tanh(W_ss s') s'          prime: t - 1
        m(t) = (1 - tanh(W_sm s')) x + tanh(W_mm m') m'

    In its partials, a is the gate on the input and b the gate on the state itself: a_s = tanh(W_ms m'),
    b_s = tanh(W_ss s'), and likewise for m.

        own   ∂s/∂s' = b_s                  ∂m/∂m' = b_m
        gate  ∂s/∂p_ss = (1 - b_s²) s'      ∂s/∂p_ms = -(1 - a_s²) x       and likewise for m
        input ∂s/∂x = 1 - a_s               ∂m/∂x = 1 - a_m
    """

    states = ("s", "m")
    gates = ("ss", "sm", "mm", "ms")  # by the state that their matrices read
    matrices = (
        Matrix("ss", ("gate", 0), 0),
        Matrix("ms", ("gate", 3), 1),
        Matrix("mm", ("gate", 2), 1),
        Matrix("sm", ("gate", 1), 0),
    )

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        s, m = c
        ss, sm, mm, ms = p
        (u,) = x
        return (1 - ms.tanh()) * u + ss.tanh() * s, (1 - sm.tanh()) * u + mm.tanh() * m


class LIFCell(Cell):
    """Leaky integrate-and-fire neuron (Bellec et al. 2020): v is the membrane's potential, z its spike, 0 or 1.

        v = α v' + W z' + x - θ z';    z = H(v - θ)

    α is `decay`, θ is `threshold`; H(a) is 1 for a > 0, else 0. Its derivative is zero almost everywhere, so in its
    place the partials have the pseudo-derivative ψ, with γ the `dampening`:

        ψ = γ / θ max(0, 1 - |v - θ| / θ)

    The reset - θ z' has no derivative either: credit doesn't pass through it. So e-prop's trace, learning="eprop", is
    that of the paper. A unit's own weight W_ii is like any other; there is no refractory time.

    Raises ValueError unless 0 ≤ decay ≤ 1, threshold > 0 and dampening > 0, all finite.
    """

    states: Sequence[str] = ("z", "v")
    gates = ("z",)
    matrices = (Matrix("hz", ("gate", 0), 0),)

    def __init__(self, decay: float = 0.95, threshold: float = 1.0, dampening: float = 0.3) -> None:
        check.number("decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        for name, value in (("threshold", threshold), ("dampening", dampening)):
            check.number(name, value)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        self.decay, self.threshold, self.dampening = decay, threshold, dampening

    def _potential(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        return self.decay * c[1] + p[0] + x[0] - self.threshold * c[0]

    def _pseudo_derivative(self, over: Tensor) -> Tensor:
        """ψ, of how far the potential is over the threshold."""
        return self.dampening / self.threshold * (1 - over.abs() / self.threshold).clamp_min(0)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        v = self._potential(c, p, x)
        return (v > self.threshold).to(v.dtype), v

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """Those with ψ for the derivative of H."""
        psi = self._pseudo_derivative(self._potential(c, p, x) - self.threshold)
        entering = {0: psi, 1: torch.ones_like(psi)}
        kept = {0: self.decay * psi, 1: torch.full_like(psi, self.decay)}
        return Partials(own=[{}, kept], gate=[entering], input=[entering])


class ALIFCell(LIFCell):
    """Adaptive leaky integrate-and-fire neuron (Bellec et al. 2020): each spike raises its threshold for a while.

        v = α v' + W z' + x - θ z';    a = ρ a' + z';    z = H(v - θ - β a)

    α is `decay`, θ `threshold`, ρ `adaptation_decay` and β `adaptation`. ψ = γ / θ max(0, 1 - |v - θ - β a| / θ) stands
    for the derivative of H, and the reset has none, as in `LIFCell`; credit does pass from z' to a.

    Raises ValueError as `LIFCell`, and unless 0 ≤ adaptation_decay ≤ 1 and adaptation is finite.
    """

    states = ("z", "v", "a")

    def __init__(
        self,
        decay: float = 0.95,
        threshold: float = 1.0,
        dampening: float = 0.3,
        adaptation_decay: float = 0.995,
        adaptation: float = 0.18,
    ) -> None:
        super().__init__(decay, threshold, dampening)
        check.number("adaptation_decay", adaptation_decay)
        check.number("adaptation", adaptation)
        if not 0 <= adaptation_decay <= 1:
            raise ValueError(f"adaptation_decay must be in [0, 1], got {adaptation_decay}")
        if not math.isfinite(adaptation):
            raise ValueError(f"adaptation must be finite, got {adaptation}")
        self.adaptation_decay, self.adaptation = adaptation_decay, adaptation

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        v, a = self._potential(c, p, x), self.adaptation_decay * c[2] + c[0]
        return (v > self.threshold + self.adaptation * a).to(v.dtype), v, a

    def partials(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """Those with ψ for the derivative of H."""
        a = self.adaptation_decay * c[2] + c[0]
        psi = self._pseudo_derivative(self._potential(c, p, x) - (self.threshold + self.adaptation * a))
        one, by_a = torch.ones_like(psi), -self.adaptation * psi
        rho = self.adaptation_decay
        entering = {0: psi, 1: one}
        return Partials(
            own=[
                {0: by_a, 2: one},
                {0: self.decay * psi, 1: self.decay * one},
                {0: rho * by_a, 2: rho * one},
            ],
            gate=[entering],
            input=[entering],
        )
