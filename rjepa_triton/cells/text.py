"""A traced cell as text: its equations and its partials, as a person writes them. `rjepa cells show` prints it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence

from .graph import Graph
from .trace import KINDS, traced, why_not
from .two_point import Cell, state_read

__all__ = ["described"]

# How tightly an operation binds its operands; what isn't here is written as a call.
_BINDS = {"where": 0, "and": 1, "or": 1, "not": 2, "add": 4, "sub": 4, "mul": 5, "div": 5, "neg": 6, "pow": 7}
_SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "and": "and", "or": "or",
    "gt": ">", "ge": "≥", "lt": "<", "le": "≤", "eq": "==", "ne": "≠",
}  # fmt: skip
_BINDS |= dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), 3)
_CALLS = {"sigmoid": "σ", "sqrt": "√", "maximum": "max", "minimum": "min"}
_ATOM = 9


class _Writer:
    """Writes nodes of a graph. What occurs more than once is written once, on a line of its own: [1] = …

    titles: names of some of the roots, which stand for these wherever they occur.
    """

    def __init__(
        self, graph: Graph, roots: Sequence[int], arguments: Mapping[str, str], titles: Mapping[int, str]
    ) -> None:
        self.graph, self.arguments, self.titles = graph, arguments, titles
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.uses = Counter(roots)
        for node in graph.needed(roots):
            if graph.nodes[node][0] not in ("argument", "const"):
                self.uses.update(set(graph.nodes[node][1:]))
        self.counted = 0

    def result(self, name: str, node: int) -> None:
        """Add the lines for `name` = node."""
        titled = self.titles.get(node) == name
        text = self._text(node, whole=titled)[0]
        if not titled or text != name:  # else it was written where another result needed it
            self.lines.append(f"{name} = {text}")
        if titled and self.graph.nodes[node][0] not in ("argument", "const"):
            self.names[node] = name

    def _text(self, node: int, whole: bool = False) -> tuple[str, int]:
        """The text of a node, and how tightly it binds. whole: on a line of its own."""
        operation, *operands = self.graph.nodes[node]
        if node in self.names:
            return self.names[node], _ATOM
        if operation == "argument":
            return self.arguments.get(operands[0], operands[0]), _ATOM
        if operation == "const":
            return _number(operands[0]), _ATOM if operands[0] >= 0 else _BINDS["neg"]
        text, binds = self._expression(operation, operands)
        short = operation in ("neg", "sub") and len(text) < 8 and node not in self.titles
        if whole or short or self.uses[node] < 2:
            return text, binds
        self.counted += node not in self.titles
        self.names[node] = self.titles.get(node, f"[{self.counted}]")
        self.lines.append(f"{self.names[node]} = {text}")
        return self.names[node], _ATOM

    def _expression(self, operation: str, operands: Sequence[int]) -> tuple[str, int]:
        parts = [self._text(each) for each in operands]
        binds = _BINDS.get(operation, _ATOM)

        def within(k: int, least: int) -> str:
            text, tight = parts[k]
            return text if tight >= least else f"({text})"

        if operation == "mul" and operands[0] == operands[1]:
            return f"{within(0, _ATOM)}²", _BINDS["pow"]
        if operation == "where":
            return f"{within(1, 1)} if {within(0, 1)} else {within(2, 1)}", binds
        if operation in ("neg", "not"):
            return f"{'-' if operation == 'neg' else 'not '}{within(0, binds)}", binds
        if operation == "abs":
            return f"|{parts[0][0]}|", _ATOM
        if operation in _SIGNS:
            if operation == "mul" and self.graph.value(operands[1]) is not None:
                parts.reverse()
            if operation in ("add", "mul"):
                sides = within(0, binds), within(1, binds)
            elif operation == "pow":
                sides = within(0, binds + 1), within(1, binds)
            else:  # from the left, and truths are never joined without parentheses
                sides = within(0, binds + (binds <= 3)), within(1, binds + 1)
            return f"{sides[0]} {_SIGNS[operation]} {sides[1]}", binds
        return f"{_CALLS.get(operation, operation)}({', '.join(text for text, _ in parts)})", _ATOM


def _number(value: float) -> str:
    return str(int(value)) if value == round(value, 0) and abs(value) < 1e6 else repr(value)


def described(cell: Cell) -> str:
    """A cell's names, equations, partials, and which partials are zero by structure.

    A prime marks what is of the step before. Of a cell that can't be traced there are the names alone, and why.
    """
    driven = ["x"] if tuple(cell.inputs) == ("x",) else [f"x_{name}" for name in cell.inputs]
    symbols = {
        "c": [f"{name}'" for name in cell.states],
        "p": [f"p_{name}" for name in cell.gates],
        "x": [*driven, *cell.parameters],
    }
    first = (inspect.getdoc(type(cell)) or "").split("\n\n")[0].replace("\n", " ")
    own_doc = type(cell).__doc__ is not None
    lines = [f"{type(cell).__name__}: {first}" if own_doc and first else type(cell).__name__, ""]
    for label, named in (
        ("states", ", ".join(cell.states)),
        ("inputs", ", ".join(driven)),
        ("parameters", ", ".join(cell.parameters)),
        ("outputs", ", ".join(cell.states[nu] for nu in cell.outputs)),
    ):
        lines.append(f"{label:11} {named or 'none'}")
    for g, symbol in enumerate(symbols["p"]):
        entering = [
            f"W_{matrix.name} {symbols['c'][state_read(matrix)]}"
            for matrix in cell.matrices
            if matrix.into[1] == g
        ]
        lines.append(f"{'' if g else 'matrices':11} {symbol} = {' + '.join(entering) or '0'}")
    if not cell.gates:
        lines.append(f"{'matrices':11} none")
    reason = why_not(cell)
    found = None if reason else traced(cell)
    if found is None:
        return "\n".join([*lines, "", "update, partials", f"  can't be written out: {reason}"])

    names = {f"{letter}{k}": symbol for letter, group in symbols.items() for k, symbol in enumerate(group)}
    by = [
        (kind, k, symbol)
        for kind, letter in zip(KINDS, "cpx", strict=True)
        for k, symbol in enumerate(symbols[letter])
    ]
    equal: dict[tuple[str, int], list[str]] = {}  # by the state and the node
    zeros = []
    for kind, k, symbol in by:
        for nu, state in enumerate(cell.states):
            node = found.partials.get((kind, k, nu))
            if node is None:
                zeros.append(f"∂{state}/∂{symbol}")
            else:
                equal.setdefault((state, node), []).append(f"∂{state}/∂{symbol}")
    roots = [*found.states, *(node for _, node in equal)]
    writer = _Writer(found.graph, roots, names, dict(zip(found.states, cell.states, strict=True)))
    for state, node in zip(cell.states, found.states, strict=True):
        writer.result(state, node)
    updated = len(writer.lines)
    for (_, node), partials in equal.items():
        writer.result(" = ".join(partials), node)
    surrogate = type(cell).partials is not Cell.partials
    lines += ["", "update", *(f"  {line}" for line in writer.lines[:updated])]
    lines += ["", "partials" + ", which the cell gives itself (they may be surrogates)" * surrogate]
    lines += [f"  {line}" for line in writer.lines[updated:]]
    return "\n".join([*lines, "", "zero by structure", f"  {', '.join(zeros) or 'none'}"])
