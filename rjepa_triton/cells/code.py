"""A traced cell as source code: the functions of one unit that loops and kernels are made of.

`Functions` says what these compute, as nodes of the cell's graph. `printed` writes nodes as C++ or Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .graph import OPERATIONS, Graph
from .trace import Traced
from .two_point import Cell, state_read

__all__ = ["Functions", "printed"]

Target = Literal["cpp", "triton"]


class Functions:
    """What is computed of one unit of a cell, as nodes of its graph.

    w0 … are further arguments, the unit's entries on the diagonals of the K recurrent matrices, and l0 … the credit λ
    of its S states.

    states    the S new states
    saved     what a forward pass keeps of the pre-activations; all that follows but `fixed` can be computed from it
    found     the distinct partials that aren't zero by their structure; first those that aren't among `saved`
    entries   which of `found` the partials are (`Traced.entries`)
    m         RFP's M^{νν'} = ∂F_ν/∂c^ν' + Σ_k ∂F_ν/∂p^g(k) w^k over the matrices that read ν', at [ν · S + ν']
    gates     the credit E^g = Σ_ν λ^ν ∂F_ν/∂p^g that enters each pre-activation
    inputs    the credit E^j = Σ_ν λ^ν ∂F_ν/∂x^j that enters each per-unit input
    back      what goes back to each state, Σ_ν M^{νν'} λ^ν
    own_back  the part of it that goes through no matrix, Σ_ν ∂F_ν/∂c^ν' λ^ν
    fixed     the nodes that depend on the cell's `parameters` alone, and that others need: the same at all steps
    """

    def __init__(self, cell: Cell, traced: Traced) -> None:
        graph = self.graph = traced.graph
        states, matrices = range(len(cell.states)), list(enumerate(cell.matrices))
        self.w = [graph.argument(f"w{k}") for k, _ in matrices]
        self.credit = [graph.argument(f"l{nu}") for nu in states]
        self.states, self.saved = list(traced.states), list(traced.saved)
        self.found = traced.found
        self.entries = traced.entries
        zero = graph.constant(0)

        def partial(kind: str, index: int, nu: int) -> int:
            return traced.partials.get((kind, index, nu), zero)

        self.m = [
            graph.total(
                [partial("own", source, nu)]
                + [
                    graph.mul(partial("gate", matrix.into[1], nu), self.w[k])
                    for k, matrix in matrices
                    if state_read(matrix) == source
                ]
            )
            for nu in states
            for source in states
        ]

        def entering(kind: str, index: int) -> int:
            return graph.total(graph.mul(partial(kind, index, nu), self.credit[nu]) for nu in states)

        self.gates = [entering("gate", g) for g in range(len(cell.gates))]
        self.inputs = [entering("input", j) for j in range(len(cell.per_unit))]
        self.own_back = [entering("own", source) for source in states]
        self.back = [
            graph.total(
                [graph.mul(partial("own", source, nu), self.credit[nu]) for nu in states]
                + [
                    graph.mul(self.w[k], self.gates[matrix.into[1]])
                    for k, matrix in matrices
                    if state_read(matrix) == source
                ]
            )
            for source in states
        ]

        self.fixed = self._fixed(
            {f"x{j}" for j in range(len(cell.inputs), len(cell.per_unit))},
            [*self.states, *self.found, *self.m, *self.gates, *self.inputs, *self.back, *self.own_back],
        )

    def _fixed(self, parameters: set[str], roots: Sequence[int]) -> list[int]:
        graph, alone = self.graph, set[int]()
        found: dict[int, None] = {}
        for node in graph.needed(roots):
            operation, *operands = graph.nodes[node]
            if operation == "argument":
                if operands[0] in parameters:
                    alone.add(node)
            elif operation == "const" or all(each in alone for each in operands):
                alone.add(node)
            else:
                found.update((each, None) for each in operands if each in alone)
        found.update((root, None) for root in roots if root in alone)
        return [node for node in found if graph.nodes[node][0] not in ("argument", "const")]


def printed(
    graph: Graph,
    roots: Sequence[int],
    target: Target,
    names: dict[str, str],
    known: dict[int, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Statements that compute the roots, and the text of each root's value.

    names: how the arguments are written, where that isn't their own name. known: the text of nodes that were computed
    before.
    """
    text: dict[int, str] = {}
    statements = []
    known = known or {}
    for node in graph.needed(roots, known):
        operation, *operands = graph.nodes[node]
        if node in known:
            text[node] = known[node]
            continue
        if operation == "argument":
            text[node] = names.get(operands[0], operands[0])
        elif operation == "const":
            text[node] = _number(operands[0], target)
        else:
            # C++ has no vector operation that takes two types, but for infix ones, whose scalar becomes a vector
            infix = operation in _INFIX or operation == "pow"
            given = [
                f"(wide{{}} + {text[each]})"
                if target == "cpp" and not infix and graph.value(each) is not None
                else text[each]
                for each in operands
            ]
            value = getattr(OPERATIONS[operation], target).format(*given)
            if value == given[0]:  # as of "stop"
                text[node] = value
                continue
            text[node] = f"v{node}"
            statements.append(f"const auto v{node} = {value};" if target == "cpp" else f"v{node} = {value}")
    return statements, [_whole(graph, root, text[root], target) for root in roots]


_INFIX = ("add", "sub", "mul", "div", "neg", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")


def _number(value: float, target: Target) -> str:
    if math.isfinite(value):
        return f"real({value!r})" if target == "cpp" else repr(value)
    name = "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
    return f"real({name})" if target == "cpp" else f'float("{value}")'


def _whole(graph: Graph, node: int, text: str, target: Target) -> str:
    """The value of a root, which must be a vector even where it is a constant."""
    return f"wide{{}} + {text}" if target == "cpp" and graph.value(node) is not None else text
