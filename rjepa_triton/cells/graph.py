"""Element-wise expressions of one unit, as a graph: built with shared nodes, differentiated, and evaluated in torch.

A node is an index into `Graph.nodes`, where it is (operation, operand, …); operands are nodes. Equal nodes are one
node, and what follows from 0, 1 and other constants is simplified when a node is made. So a derivative that is zero by
the structure of an expression is the constant 0. A product with the constant 0 is 0, whatever the other factor is.

`OPERATIONS` lists what a node may be: how torch, C++ and Triton write it, and its derivative.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "Graph", "Operation", "Program"]

Slopes = Callable[["Graph", int, Sequence[int]], Sequence["int | None"]]


@dataclass(frozen=True)
class Operation:
    """What a node may be.

    torch   evaluates it
    cpp     its text in C++, where {0}, {1}, … are the operands: `wide` vectors, or masks where the operand is a truth
    triton  its text in Triton, likewise
    slopes  (graph, node, operands) → its derivative with respect to each operand, None for zero everywhere; absent for
            an operation that is constant almost everywhere
    truth   whether its value is a truth and not a number
    """

    torch: Callable[..., Any]
    cpp: str
    triton: str
    slopes: Slopes | None = None
    truth: bool = False


class Graph:
    """A graph of expressions (see above)."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, ...]] = []
        self._index: dict[tuple[Any, ...], int] = {}

    def _put(self, *node: Any) -> int:
        # 0.0 and -0.0 are equal, and True is 1: the key tells them apart
        key = (*node, math.copysign(1, node[1])) if node[0] == "const" else node
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(node)
        return self._index[key]

    def argument(self, name: str) -> int:
        """The node of a variable."""
        return self._put("argument", name)

    def constant(self, value: float) -> int:
        """The node of a number."""
        return self._put("const", float(value))

    def value(self, node: int) -> float | None:
        """The number that a node is, or None if it isn't a constant."""
        operation, *operands = self.nodes[node]
        return operands[0] if operation == "const" else None

    def add(self, a: int, b: int) -> int:
        """a + b."""
        x, y = self.value(a), self.value(b)
        if x == 0:
            return b
        if y == 0:
            return a
        if x is not None and y is not None:
            return self.constant(x + y)
        if self.nodes[b][0] == "neg":
            return self.sub(a, self.nodes[b][1])
        if self.nodes[a][0] == "neg":
            return self.sub(b, self.nodes[a][1])
        return self._put("add", *sorted((a, b)))

    def sub(self, a: int, b: int) -> int:
        """a - b."""
        x, y = self.value(a), self.value(b)
        if y == 0:
            return a
        if x == 0:
            return self.neg(b)
        if x is not None and y is not None:
            return self.constant(x - y)
        if self.nodes[b][0] == "neg":
            return self.add(a, self.nodes[b][1])
        return self._put("sub", a, b)

    def mul(self, a: int, b: int) -> int:
        """a b."""
        x, y = self.value(a), self.value(b)
        if x == 0 or y == 0:
            return self.constant(0)
        if x is not None and y is not None:
            return self.constant(x * y)
        for factor, other in ((x, b), (y, a)):
            if factor == 1:
                return other
            if factor == -1:
                return self.neg(other)
        for one, other in ((a, b), (b, a)):
            if self.nodes[one][0] == "neg":
                return self.neg(self.mul(self.nodes[one][1], other))
        return self._put("mul", *sorted((a, b)))

    def div(self, a: int, b: int) -> int:
        """a / b."""
        x, y = self.value(a), self.value(b)
        if x is not None and y:
            return self.constant(x / y)
        if x == 0:
            return a
        if y == 1:
            return a
        return self._put("div", a, b)

    def neg(self, a: int) -> int:
        """-a."""
        x = self.value(a)
        if x is not None:
            return self.constant(-x)
        operation, *operands = self.nodes[a]
        if operation == "neg":
            return int(operands[0])
        return self._put("sub", operands[1], operands[0]) if operation == "sub" else self._put("neg", a)

    def where(self, truth: int, a: int, b: int) -> int:
        """a where the truth holds, else b."""
        known = self.value(truth)
        if known is not None:
            return a if known else b
        return a if a == b else self._put("where", truth, a, b)

    def apply(self, operation: str, *operands: int) -> int:
        """A node of any operation of `OPERATIONS`."""
        values = [self.value(each) for each in operands]
        if all(value is not None for value in values):
            numbers = [torch.tensor(value, dtype=torch.float64, device="cpu") for value in values]
            numbers[:1] = [
                each.bool() if operation in ("where", "and", "or", "not") else each for each in numbers[:1]
            ]
            return self.constant(float(OPERATIONS[operation].torch(*numbers)))
        simplified = getattr(self, operation, None) if operation in _SIMPLIFIED else None
        return simplified(*operands) if simplified else self._put(operation, *operands)

    def total(self, terms: Iterable[int]) -> int:
        """The sum of the terms, from the left."""
        found = self.constant(0)
        for term in terms:
            found = self.add(found, term)
        return found

    def derivative(self, node: int, by: int, known: dict[int, int] | None = None) -> int:
        """∂node/∂by as a node. known: derivatives by `by` that were found before, which is added to."""
        known = {} if known is None else known
        if node == by:
            return self.constant(1)
        if node not in known:
            operation, *operands = self.nodes[node]
            found = self.constant(0)
            if operation not in ("argument", "const") and (slopes := OPERATIONS[operation].slopes):
                inner = [
                    0.0 if self.is_truth(each) else self.derivative(each, by, known) for each in operands
                ]
                if any(type(each) is int and self.value(each) != 0 for each in inner):
                    found = self._chain(slopes(self, node, operands), inner, operation, operands)
            known[node] = found
        return known[node]

    def _chain(
        self, slopes: Sequence[int | None], inner: Sequence[Any], operation: str, operands: Sequence[int]
    ) -> int:
        """Σ_j slope_j ∂operand_j, or the choice between the operands' derivatives."""
        if operation == "where":
            return self.where(operands[0], inner[1], inner[2])
        if operation == "div":  # (∂a - (a / b) ∂b) / b: one division
            quotient = self.div(operands[0], operands[1])
            return self.div(self.sub(inner[0], self.mul(quotient, inner[1])), operands[1])
        if operation == "sub":
            return self.sub(inner[0], inner[1])
        return self.total(
            self.mul(slope, each) for slope, each in zip(slopes, inner, strict=True) if slope is not None
        )

    def is_truth(self, node: int) -> bool:
        """Whether a node's value is a truth and not a number."""
        operation = self.nodes[node][0]
        return operation in OPERATIONS and OPERATIONS[operation].truth

    def needed(self, roots: Iterable[int], known: Container[int] = ()) -> list[int]:
        """The nodes that the roots are made of, operands first; not what those in `known` are made of."""
        order: list[int] = []
        seen: set[int] = set()
        stack = [(root, False) for root in reversed(list(roots))]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                if node not in known and self.nodes[node][0] not in ("argument", "const"):
                    stack += [(each, False) for each in reversed(self.nodes[node][1:])]
        return order


_SIMPLIFIED = ("add", "sub", "mul", "div", "neg", "where")


def _one_minus_square(graph: Graph, node: int, _: Sequence[int]) -> list[int]:
    return [graph.sub(graph.constant(1), graph.mul(node, node))]


def _sigmoid(graph: Graph, node: int, _: Sequence[int]) -> list[int]:
    return [graph.mul(node, graph.sub(graph.constant(1), node))]


def _power(graph: Graph, node: int, operands: Sequence[int]) -> list[int | None]:
    """The exponent is a constant: the trace takes no other."""
    base, exponent = operands
    e = graph.value(exponent)
    assert e is not None
    return [graph.mul(exponent, graph.apply("pow", base, graph.constant(e - 1))), None]


def _both(graph: Graph, _: int, operands: Sequence[int]) -> list[int]:
    """Slopes of the larger or smaller of two numbers, as torch has them: half of each where they are equal."""
    a, b = operands
    one, half, none = graph.constant(1), graph.constant(0.5), graph.constant(0)
    return [
        graph.where(graph.apply(greater, x, y), one, graph.where(graph.apply("eq", x, y), half, none))
        for greater, x, y in (("gt", a, b), ("gt", b, a))
    ]


def _lesser(graph: Graph, node: int, operands: Sequence[int]) -> list[int]:
    return _both(graph, node, operands)[::-1]


def _call(name: str) -> tuple[str, str]:
    """How C++ (`vectors.h`) and Triton call a function of one operand."""
    return f"{name}_of({{0}})", f"_{name}({{0}})"


def _infix(sign: str) -> tuple[str, str]:
    return f"({{0}} {sign} {{1}})", f"({{0}} {sign} {{1}})"


def _slope(make: Callable[[Graph, int, int], int]) -> Slopes:
    """The slopes of an operation of one operand: make(graph, node, operand)."""
    return lambda graph, node, operands: [make(graph, node, operands[0])]


def _larger(a: Any, b: Any) -> Tensor:
    return torch.clamp_min(*_tensor_first(a, b)) if float in (type(a), type(b)) else torch.maximum(a, b)


def _smaller(a: Any, b: Any) -> Tensor:
    return torch.clamp_max(*_tensor_first(a, b)) if float in (type(a), type(b)) else torch.minimum(a, b)


def _tensor_first(a: Any, b: Any) -> tuple[Any, Any]:
    return (b, a) if type(a) is float else (a, b)


OPERATIONS: Mapping[str, Operation] = {
    "add": Operation(operator.add, *_infix("+"), slopes=lambda g, n, a: [g.constant(1)] * 2),
    "sub": Operation(operator.sub, *_infix("-"), slopes=lambda g, n, a: []),
    "mul": Operation(operator.mul, *_infix("*"), slopes=lambda g, n, a: [a[1], a[0]]),
    "div": Operation(operator.truediv, *_infix("/"), slopes=lambda g, n, a: []),
    "neg": Operation(operator.neg, "(-{0})", "(-{0})", lambda g, n, a: [g.constant(-1)]),
    "where": Operation(torch.where, "chosen({0}, {1}, {2})", "tl.where({0}, {1}, {2})", lambda g, n, a: []),
    "tanh": Operation(torch.tanh, *_call("tanh"), slopes=_one_minus_square),
    "sigmoid": Operation(torch.sigmoid, *_call("sigmoid"), slopes=_sigmoid),
    "relu": Operation(
        torch.relu,
        "chosen({0} < 0, wide{{}}, {0})",
        "tl.where({0} < 0, 0.0, {0})",  # unlike tl.maximum it keeps NaN
        slopes=_slope(lambda g, n, a: g.where(g.apply("gt", a, g.constant(0)), g.constant(1), g.constant(0))),
    ),
    "exp": Operation(torch.exp, *_call("exp"), slopes=_slope(lambda g, n, a: n)),
    "expm1": Operation(torch.expm1, *_call("expm1"), slopes=_slope(lambda g, n, a: g.add(n, g.constant(1)))),
    "log": Operation(torch.log, *_call("log"), slopes=_slope(lambda g, n, a: g.div(g.constant(1), a))),
    "log1p": Operation(
        torch.log1p,
        *_call("log1p"),
        slopes=_slope(lambda g, n, a: g.div(g.constant(1), g.add(a, g.constant(1)))),
    ),
    "sqrt": Operation(torch.sqrt, *_call("sqrt"), slopes=_slope(lambda g, n, a: g.div(g.constant(0.5), n))),
    "sin": Operation(torch.sin, *_call("sin"), slopes=_slope(lambda g, n, a: g.apply("cos", a))),
    "cos": Operation(torch.cos, *_call("cos"), slopes=_slope(lambda g, n, a: g.neg(g.apply("sin", a)))),
    "erf": Operation(
        torch.erf,
        *_call("erf"),
        slopes=_slope(
            lambda g, n, a: g.mul(g.constant(2 / math.sqrt(math.pi)), g.apply("exp", g.neg(g.mul(a, a))))
        ),
    ),
    "abs": Operation(torch.abs, *_call("abs"), slopes=_slope(lambda g, n, a: g.apply("sign", a))),
    "sign": Operation(torch.sign, *_call("sign")),
    "floor": Operation(torch.floor, *_call("floor")),
    "pow": Operation(torch.pow, "pow_of({0}, {1})", "_pow({0}, {1})", _power),
    "maximum": Operation(_larger, "larger({0}, {1})", "_larger({0}, {1})", _both),
    "minimum": Operation(_smaller, "smaller({0}, {1})", "_smaller({0}, {1})", _lesser),
    "stop": Operation(torch.detach, "{0}", "{0}"),
    "gt": Operation(operator.gt, *_infix(">"), truth=True),
    "ge": Operation(operator.ge, *_infix(">="), truth=True),
    "lt": Operation(operator.lt, *_infix("<"), truth=True),
    "le": Operation(operator.le, *_infix("<="), truth=True),
    "eq": Operation(operator.eq, *_infix("=="), truth=True),
    "ne": Operation(operator.ne, *_infix("!="), truth=True),
    "and": Operation(operator.and_, *_infix("&"), truth=True),
    "or": Operation(operator.or_, *_infix("|"), truth=True),
    "not": Operation(torch.logical_not, "(~{0})", "(~{0})", truth=True),
}


class Program:
    """Some nodes of a graph as a function in torch: program(values of the arguments) → the nodes' values.

    The arguments may be any nodes; what they are made of isn't computed.

    A value that isn't needed any more is let go at once, so no more arrays are held than the expression needs. A node
    that is constant is a float. Tensors that are returned may be the arguments themselves.
    """

    def __init__(self, graph: Graph, arguments: Sequence[int], roots: Sequence[int]) -> None:
        given = frozenset(arguments)
        order = graph.needed(roots, given)
        operands_of = {node: () if node in given else self._operands(graph, node) for node in order}
        place = {node: k for k, node in enumerate((*arguments, *(n for n in order if n not in arguments)))}
        last = {each: node for node in order for each in operands_of[node]}
        kept = set(roots)
        self.size = len(place)
        self.constants: list[tuple[int, float]] = []
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...], int, tuple[int, ...]]] = []
        for node in order:
            if (value := graph.value(node)) is not None:
                self.constants.append((place[node], value))
            elif operands := operands_of[node]:
                done = {each for each in operands if last[each] == node and each not in kept}
                self.steps.append(
                    (
                        OPERATIONS[graph.nodes[node][0]].torch,
                        tuple(place[each] for each in operands),
                        place[node],
                        tuple(place[each] for each in done),
                    )
                )
        self.results = tuple(place[root] for root in roots)

    @staticmethod
    def _operands(graph: Graph, node: int) -> tuple[int, ...]:
        operation, *operands = graph.nodes[node]
        return () if operation in ("argument", "const") else tuple(operands)

    def __call__(self, arguments: Sequence[Tensor]) -> list[Any]:
        values: list[Any] = [*arguments, *[None] * (self.size - len(arguments))]
        for place, constant in self.constants:
            values[place] = constant
        for function, operands, to, done in self.steps:
            given = [values[each] for each in operands]
            if (
                function is torch.where and type(given[1]) is float
            ):  # two numbers would give the default dtype
                given[1] = arguments[0].new_full((), given[1])
            values[to] = function(*given)
            for each in done:
                values[each] = None
        return [values[each] for each in self.results]
