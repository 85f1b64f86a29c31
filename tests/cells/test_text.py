"""A cell as text: what is written, evaluated as Python, is what the cell computes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pages
import pytest
import torch
from checkout import DOCS
from every_cell import CELLS, by_cell, random_point
from torch import Tensor

from rjepa_triton.cells.builtin import ElmanCell, LSTMCell
from rjepa_triton.cells.text import described
from rjepa_triton.cells.two_point import Cell, Matrix

FUNCTIONS: dict[str, Any] = {
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "relu": lambda a: max(a, 0.0),
    "sign": lambda a: math.copysign(1, a) if a else 0,
    **{name: getattr(math, name) for name in ("tanh", "exp", "expm1", "log1p", "sqrt", "sin", "cos")},
}
SIGNS = {"σ": "sigmoid", "√": "sqrt", "²": "**2", "≤": "<=", "≥": ">=", "≠": "!="}


def evaluated(text: str, values: dict[str, float]) -> dict[str, float]:
    """The values of everything that has a line in `text`."""
    known = {name.replace("'", "_before"): value for name, value in values.items()}
    found: dict[str, float] = {}
    parts: dict[int, float] = {}
    lines = text[text.index("\nupdate") : text.index("\nzero by")].splitlines()
    for line in [line.strip() for line in lines if " = " in line]:
        *names, expression = line.split(" = ")
        for sign, plain in SIGNS.items():
            expression = expression.replace(sign, plain)
        expression = re.sub(r"\|([^|]*)\|", r"abs(\1)", expression).replace("'", "_before")
        expression = re.sub(r"\[(\d+)\]", r"parts[\1]", expression)
        value = float(eval(expression, {**FUNCTIONS, **known, "parts": parts}))
        for name in names:
            found[name] = value
            if name.startswith("["):
                parts[int(name[1:-1])] = value
            elif not name.startswith("∂"):
                known[name] = value
    return found


@by_cell
def test_the_lines_compute_the_new_states_and_the_partials(cell: Cell) -> None:
    text = described(cell)
    for _ in range(5):
        c, p, x = random_point(cell, (1,))
        driven = ["x"] if tuple(cell.inputs) == ("x",) else [f"x_{name}" for name in cell.inputs]
        groups = {
            "own": [f"{name}'" for name in cell.states],
            "gate": [f"p_{name}" for name in cell.gates],
            "input": [*driven, *cell.parameters],
        }
        names = [name for group in groups.values() for name in group]
        found = evaluated(text, dict(zip(names, [v.item() for v in (*c, *p, *x)], strict=True)))
        for name, value in zip(cell.states, cell.update(c, p, x), strict=True):
            assert found[name] == pytest.approx(value.item(), rel=1e-12, abs=1e-14)
        partials = cell.partials(c, p, x)
        zeros = re.findall(r"∂\w+/∂[\w']+", text[text.index("zero by structure") :])
        for kind, group in groups.items():
            for symbol, by_state in zip(group, getattr(partials, kind), strict=True):
                for nu, state in enumerate(cell.states):
                    name = f"∂{state}/∂{symbol}"
                    assert (name in found) + (name in zeros) == 1
                    want = by_state[nu].item() if nu in by_state else 0.0
                    assert found.get(name, 0.0) == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_an_lstm_reads_like_its_equations() -> None:
    text = described(LSTMCell())
    assert text.startswith("LSTMCell: Long short-term memory (Hochreiter & Schmidhuber 1997)")
    assert "  c = c' * [2] + [3] * [4]\n  [5] = tanh(c)\n  h = [1] * [5]\n" in text
    assert "matrices    p_i = W_hi h'\n            p_f = W_hf h'" in text
    assert text.endswith("zero by structure\n  ∂h/∂h', ∂c/∂h', ∂c/∂p_o, ∂c/∂x_o")


def test_the_documentation_shows_what_is_printed() -> None:
    page = pages.blocks(DOCS / "cells.md")
    names: dict[str, Any] = {}
    pages.run_python(next(b for b in page if "class LeakyGate" in b.text), names)
    (shown,) = [block.text for block in page if block.text.startswith("LeakyGate: ")]
    assert shown.startswith(described(names["LeakyGate"]()))


def test_two_matrices_of_one_gate_and_a_surrogate_are_told() -> None:
    assert "p_g = W_u u' + W_v v'" in described(CELLS["shared-gate"])
    assert "partials, which the cell gives itself" in described(CELLS["lif"])
    assert "partials\n" in described(ElmanCell())


class Signs(Cell):
    """Operations whose text needs parentheses."""

    states, gates = ("h",), ("g",)
    matrices = (Matrix("w", ("gate", 0), 0),)

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        h, a, u = c[0], p[0], x[0]
        quotient = (h - (a - u)) / (a / (u * u + 2)) - -(h * a) / (3.5 * (u.abs() + 1)) ** 1.5
        chosen = torch.where((a > 0) & ~(u > 1) | (h <= u), torch.where(a < u, h, 2 * h), -(a - u))
        return (quotient + (2 * chosen) ** 3 + torch.maximum(a, u).square() * (1 - u),)


def test_what_needs_parentheses_has_them() -> None:
    test_the_lines_compute_the_new_states_and_the_partials(Signs())


class Untraced(ElmanCell):
    def update(self, *given: Any) -> tuple[Tensor, ...]:
        return tuple(torch.special.i0(value) for value in super().update(*given))


def test_a_cell_that_can_t_be_traced_has_names_and_the_reason() -> None:
    text = described(Untraced())
    assert text.startswith("Untraced\n")
    assert "p_hh = W_hh h'" in text
    assert re.search(r"can't be written out: test_text.py:\d+ \(.*\) calls i0, which has no rule", text)
