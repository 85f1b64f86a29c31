"""The partials of the built-in cells in closed form: oracles of those that follow from `update`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rjepa_triton.cells.builtin import (
    ElmanCell,
    ELSTMCell,
    GRUCell,
    LeakyCell,
    LRUCell,
    LSTMCell,
    TimeDecayCell,
)
from rjepa_triton.cells.two_point import Cell, Partials

Values = Sequence[Tensor]


def _apply(nonlinearity: str, value: Tensor) -> Tensor:
    return torch.tanh(value) if nonlinearity == "tanh" else torch.relu(value)


def _derivative(nonlinearity: str, result: Tensor) -> Tensor:
    """f'(v), given f(v)."""
    return 1 - result.square() if nonlinearity == "tanh" else (result > 0).to(result.dtype)


def _elman(cell: ElmanCell, c: Values, p: Values, x: Values) -> Partials:
    slope = {0: _derivative(cell.nonlinearity, cell.update(c, p, x)[0])}
    return Partials(own=[{}], gate=[slope], input=[slope])


def _leaky(cell: LeakyCell, c: Values, p: Values, x: Values) -> Partials:
    slope = {0: cell.alpha * _derivative(cell.nonlinearity, _apply(cell.nonlinearity, p[0] + x[0]))}
    return Partials(own=[{0: torch.full_like(c[0], 1 - cell.alpha)}], gate=[slope], input=[slope])


def _lstm(cell: LSTMCell, c: Values, p: Values, x: Values) -> Partials:
    i, f, g, o = cell._gates(p, x)
    shown = (f * c[1] + i * g).tanh()
    to_h = o * (1 - shown.square())  # ∂h/∂c
    into_c = [g * i * (1 - i), c[1] * f * (1 - f), i * (1 - g.square())]
    gates = [{0: to_h * value, 1: value} for value in into_c] + [{0: shown * o * (1 - o)}]
    return Partials(own=[{}, {0: to_h * f, 1: f}], gate=gates, input=gates)


def _gru(cell: GRUCell, c: Values, p: Values, x: Values) -> Partials:
    r, z, recurrent, n = cell._gates(p, x)
    into_n = (1 - z) * (1 - n.square())
    by_r = {0: into_n * recurrent * r * (1 - r)}
    by_z = {0: (c[0] - n) * z * (1 - z)}
    by_hn = {0: into_n * r}
    inputs = [by_r, by_z, {0: into_n}, by_hn]
    return Partials(own=[{0: z}], gate=[by_r, by_z, by_hn], input=inputs[: len(x)])


def _elstm(cell: ELSTMCell, c: Values, p: Values, x: Values) -> Partials:
    f, z = (p[0] + x[0]).sigmoid(), (p[1] + x[1]).tanh()
    gates = [{0: (c[0] - z) * f * (1 - f)}, {0: (1 - f) * (1 - z.square())}]
    return Partials(own=[{0: f}], gate=gates, input=gates)


def _time_decay(cell: TimeDecayCell, c: Values, p: Values, x: Values) -> Partials:
    return Partials(own=[{0: x[1]}], gate=[], input=[{0: torch.ones_like(c[0])}, {0: c[0]}])


def _lru(cell: LRUCell, c: Values, p: Values, x: Values) -> Partials:
    a, b, gain = cell._decay(x)
    rate, phase = x[2].exp(), x[3].exp()
    # dλ/dν = -rate λ, dλ/dθ = i phase λ, d gain/dν = rate |λ|² / gain
    gain_by_nu = rate * (a.square() + b.square()) / gain
    turned_re, turned_im = a * c[0] - b * c[1], b * c[0] + a * c[1]
    by_nu = {0: gain_by_nu * x[0] - rate * turned_re, 1: gain_by_nu * x[1] - rate * turned_im}
    by_theta = {0: -phase * turned_im, 1: phase * turned_re}
    own: list[dict[int, Tensor]] = [{0: a, 1: b}, {0: -b, 1: a}]
    given: list[dict[int, Tensor]] = [{0: gain}, {1: gain}, by_nu, by_theta]
    if cell.nonlinearity is not None:
        slopes = [_derivative(cell.nonlinearity, value) for value in cell.update(c, p, x)]
        own, given = (
            [{nu: slopes[nu] * value for nu, value in by.items()} for by in group] for group in (own, given)
        )
    return Partials(own=own, gate=[], input=given)


FORMS: dict[type[Cell], Callable[..., Partials]] = {
    ElmanCell: _elman,
    LeakyCell: _leaky,
    LSTMCell: _lstm,
    GRUCell: _gru,
    ELSTMCell: _elstm,
    TimeDecayCell: _time_decay,
    LRUCell: _lru,
}
