"""Traces a cell: `Cell.update` as a graph of expressions, and its partials, which follow from the graph.

`traced(cell)` runs `update` once, on a few numbers, and follows each of torch's operations. Where it can't, because an
operation has no rule here, it returns why; such a cell runs in plain torch, and its partials are found by
`Cell.automatic_partials`.

The partials are derivatives of the graph, but for a cell with a `partials` of its own, as a spiking cell with a
surrogate derivative has: then that function is traced. Either way the result is compared with torch's own, at random
points, before it is used.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import OPERATIONS, Graph, Program

if TYPE_CHECKING:
    from .two_point import Cell, Partials

__all__ = ["Traced", "Untraceable", "traced", "why_not"]

KINDS = ("own", "gate", "input")
Key = tuple[
    str, int, int
]  # ("own" | "gate" | "input", index, ν): the partial ∂F_ν by that state, gate or input


class Untraceable(Exception):
    """Why a cell can't be traced: the operation, and the line of the cell's code that uses it."""


@dataclass(eq=False)
class Traced:
    """A cell as expressions.

    arguments  the nodes of the S states c0, c1, …, the G pre-activations p0, … and the J per-unit inputs x0, …
    states     the nodes of the S new states
    partials   the nodes of the partials that aren't zero by their structure
    saved      the nodes that a forward pass keeps for the partials in place of the pre-activations (`_worth_saving`)
    made       what was made of it, such as compiled loops, by its name
    found      the distinct nodes among `partials`: first those that aren't among `saved`
    entries    of each state, gate and input, (ν, place) of its partials among the distinct ones
    """

    graph: Graph
    arguments: tuple[int, ...]
    states: tuple[int, ...]
    partials: dict[Key, int]
    saved: tuple[int, ...]
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # made here, so that torch.compile, which traces `partials_at`, finds it
        found = list(dict.fromkeys(self.partials.values()))
        found = self.found = sorted(found, key=lambda node: node in self.saved)
        names = [self.graph.nodes[node][1][0] for node in self.arguments]
        by_letter = [
            [node for node, of in zip(self.arguments, names, strict=True) if of == letter] for letter in "cpx"
        ]
        self.made["partials"] = Program(self.graph, self.arguments, found)
        self.made["partials of saved"] = Program(
            self.graph, (*by_letter[0], *self.saved, *by_letter[2]), found
        )
        self.made["advance"] = Program(self.graph, self.arguments, [*self.states, *self.saved])
        place = {node: k for k, node in enumerate(found)}
        self.entries: list[list[tuple[tuple[int, int], ...]]] = [
            [
                tuple((nu, place[node]) for (of, j, nu), node in self.partials.items() if (of, j) == (kind, index))
                for index in range(names.count(letter))
            ]
            for kind, letter in zip(KINDS, "cpx", strict=True)
        ]  # fmt: skip

    def partials_at(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> Partials:
        """`Cell.partials`, without those that are zero by their structure."""
        return self._partials("partials", c, p, x)

    def partials_of_saved(
        self, c: Sequence[Tensor], saved: Sequence[Tensor], x: Sequence[Tensor]
    ) -> Partials:
        """`partials_at`, from what `advance` has saved of the pre-activations."""
        return self._partials("partials of saved", c, saved, x)

    def _partials(
        self, program: str, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]
    ) -> Partials:
        from .two_point import Partials

        values = self.made[program]((*c, *p, *x))
        return Partials(*by_kind(self.entries, _whole(values, c[0])))

    def advance(
        self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The new states, and what is saved for `partials_of_saved`."""
        values = _whole(self.made["advance"]((*c, *p, *x)), c[0])
        return values[: len(c)], values[len(c) :]

    def __copy__(self) -> Traced:
        return self

    def __deepcopy__(self, memo: object) -> Traced:
        return self

    def __reduce__(self) -> Any:
        return _nothing, ()  # a cell that was pickled is traced anew


def _whole(values: Sequence[Any], like: Tensor) -> list[Tensor]:
    """Values of a `Program`, in which a constant is a float, as tensors."""
    return [value if isinstance(value, Tensor) else torch.full_like(like, value) for value in values]


def by_kind(
    entries: Sequence[Sequence[tuple[tuple[int, int], ...]]], values: Sequence[Tensor] | Mapping[int, Tensor]
) -> list[list[dict[int, Tensor]]]:
    """The groups of `Partials` that `entries` has, by the places of their values. What is equal is one dict, so that
    the credit that enters it is found once.
    """
    made: dict[tuple[tuple[int, int], ...], dict[int, Tensor]] = {}
    for group in entries:
        for places in group:
            if places not in made:
                made[places] = {nu: values[k] for nu, k in places}
    return [[made[places] for places in group] for group in entries]


def _nothing() -> None:
    """What a trace is pickled as."""


def traced(cell: Cell) -> Traced | None:
    """The cell's expressions; None, with one warning that says why, if it can't be traced.

    The trace is kept with the cell until one of its attributes changes.
    """
    found = cell.__dict__.get("_traced")
    if type(found) is Traced:
        return found
    if torch.compiler.is_compiling():  # a layer traces its cell when it is made
        return None
    reason = why_not(cell)
    if reason is not None and not cell.__dict__.get("_told"):
        cell.__dict__["_told"] = True
        warnings.warn(
            f"{type(cell).__name__} runs in plain torch, with the same results and slower, because it can't be traced: "
            f"{reason}",
            stacklevel=3,
        )
    return None if reason else cell.__dict__["_traced"]


def why_not(cell: Cell) -> str | None:
    """Why a cell can't be traced, or None. It traces the cell if that wasn't done before."""
    found = cell.__dict__.get("_traced")
    if found is None:
        key = attributes(cell)
        known = _KNOWN.setdefault(type(cell), {}) if key is not None else {}
        found = known.get(key)
        if found is None:
            found = known[key] = _attempt(cell)
        cell.__dict__["_traced"] = found
    return found if isinstance(found, str) else None


# The traces of cells whose attributes are plain values, by class: the package makes such cells anew here and there.
_KNOWN: weakref.WeakKeyDictionary[type, dict[Any, Traced | str]] = weakref.WeakKeyDictionary()


def attributes(cell: Cell) -> tuple[Any, ...] | None:
    """The attributes of a cell, by name, if all are plain values: they tell cells of one class apart. Else None."""
    values = {name: value for name, value in vars(cell).items() if name not in ("_traced", "_told", "_key")}
    plain = (str, int, float, bool, type(None))
    flat = [each for value in values.values() for each in (value if isinstance(value, tuple) else (value,))]
    return tuple(sorted(values.items())) if all(type(each) in plain for each in flat) else None


def _attempt(cell: Cell) -> Traced | str:
    """The trace, or why there is none. It is made in a thread of its own, which no mode of the caller's reaches."""
    made: list[Traced | str | BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found = _trace(cell)
                _compare(cell, found)
            made.append(found)
        except Untraceable as reason:
            made.append(str(reason))
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


def _trace(cell: Cell) -> Traced:
    graph = Graph()
    counts = len(cell.states), len(cell.gates), len(cell.per_unit)
    names = [f"{letter}{k}" for letter, count in zip("cpx", counts, strict=True) for k in range(count)]
    arguments = [graph.argument(name) for name in names]
    groups = _grouped(arguments, counts)
    followed = _follow(graph, arguments, counts, cell.update)
    states = tuple(followed.node(value) for value in followed.result)
    partials: dict[Key, int] = {}
    if not _has_own_partials(cell):
        for kind, group in zip(KINDS, groups, strict=True):
            for index, argument in enumerate(group):
                known: dict[int, int] = {}
                for nu, state in enumerate(states):
                    partials[kind, index, nu] = graph.derivative(state, argument, known)
    else:
        followed = _follow(graph, arguments, counts, cell.partials)
        for kind in KINDS:
            for index, by_state in enumerate(getattr(followed.result, kind)):
                for nu, value in by_state.items():
                    partials[kind, index, nu] = followed.node(value)
    partials = {key: node for key, node in partials.items() if graph.value(node) != 0}
    return Traced(graph, tuple(arguments), states, partials, _worth_saving(graph, groups[1], partials))


def _worth_saving(graph: Graph, gates: Sequence[int], partials: Mapping[Key, int]) -> tuple[int, ...]:
    """What a forward pass keeps of its pre-activations p, so that the partials needn't compute it again.

    A node that p alone enters and that all partials of p go through says all that they need of p: tanh(p) in place of
    p, say, or σ(p + x), whose input then needn't be read again either. For each p it is the last such node.
    """
    users: dict[int, set[int]] = {}
    roots = set(partials.values())
    for node in graph.needed(roots):
        if graph.nodes[node][0] not in ("argument", "const"):
            for operand in graph.nodes[node][1:]:
                users.setdefault(operand, set()).add(node)
    saved: dict[int, None] = {}
    for node in gates:
        if node not in users and node not in roots:
            continue  # no partial depends on it
        best = at = node
        while at not in roots and len(users[at]) == 1:
            (at,) = users[at]
            # a truth is no number to save; a change of sign may be moved on into the products that a partial enters
            if graph.nodes[at][0] != "neg" and not graph.is_truth(at):
                best = at
        saved[best] = None
    return tuple(saved)


def _has_own_partials(cell: Cell) -> bool:
    from .two_point import Cell

    return type(cell).partials is not Cell.partials


def _grouped(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The values of c, p and x."""
    s, g, _ = counts
    return [list(values[:s]), list(values[s : s + g]), list(values[s + g :])]


def _follow(
    graph: Graph, arguments: Sequence[int], counts: Sequence[int], run: Callable[..., Any]
) -> _Follow:
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(2, 3, dtype=torch.float64, device="cpu", generator=generator) for _ in arguments]
    follow = _Follow(graph, dict(zip(map(id, values), arguments, strict=True)))
    follow.alive += values
    with follow:
        follow.result = run(*_grouped(values, counts))
    return follow


class _Follow(TorchDispatchMode):
    """Follows torch's operations on tensors whose nodes it knows."""

    def __init__(self, graph: Graph, nodes: dict[int, int]) -> None:
        super().__init__()
        self.graph, self.nodes = graph, nodes
        self.alive: list[Tensor] = []  # nodes are known by their tensors' ids
        self.result: Any = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports torch.compile, which takes two seconds, to keep it away from this class."""
        return False

    def node(self, value: Any) -> int:
        """The node of a tensor, or of a number."""
        if not isinstance(value, Tensor):
            return self.graph.constant(value)
        if id(value) not in self.nodes:
            first = value.flatten()[:1]
            if value.numel() == 0 or not bool((value == first).all()):
                raise Untraceable(
                    f"{_line()} reads a tensor of shape {tuple(value.shape)} that isn't one number; what differs from "
                    "unit to unit can be one of the cell's `parameters`"
                )
            return self.graph.constant(first.item())
        return self.nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func._schema.is_mutable:
            raise Untraceable(f"{_line()} calls {name}, which changes a tensor in place")
        if name in RULES:
            result = func(*args, **kwargs)
            node = RULES[name](self, *args, **kwargs)
            if node is NotImplemented:
                raise Untraceable(f"{_line()} calls {name} in a way that has no rule")
            self.nodes[id(result)] = node
            self.alive.append(result)
            return result
        if name in MADE:
            result = func(*args, **kwargs)
            self.alive.append(result)
            return result
        if name in READS:
            raise Untraceable(f"{_line()} reads a tensor's value ({name}), as a branch does")
        found = self._taken_apart(func, args, kwargs)
        if found is NotImplemented:
            raise Untraceable(f"{_line()} calls {name}, which has no rule")
        return found

    def _taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation as others that torch says it is made of, or NotImplemented."""
        try:
            with self:
                if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                    return func.decompose(*args, **kwargs)
                apart = torch._decomp.decomposition_table.get(func)
                return NotImplemented if apart is None else apart(*args, **kwargs)
        except Untraceable:  # of an operation that the user hasn't written
            return NotImplemented


def _line() -> str:
    """Where the cell's code is, such as "cells.py:12 (z.sum())"."""
    ours = {os.path.abspath(__file__)}
    library = os.path.dirname(os.path.abspath(torch.__file__))
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in ours or frame.f_code.co_filename.startswith(library)
    ):
        frame = frame.f_back
    path, number = frame.f_code.co_filename, frame.f_lineno
    try:
        text = Path(path).read_text(encoding="utf-8").splitlines()[number - 1].strip()
    except (OSError, UnicodeDecodeError, IndexError):
        return f"{Path(path).name}:{number}"
    return f"{Path(path).name}:{number} ({text})"


def _compare(cell: Cell, found: Traced) -> None:
    """Raise Untraceable unless the expressions are torch's own functions, at random points.

    It would find a trace that depends on the numbers that were traced, and an autograd.Function, whose derivative isn't
    that of its operations.
    """
    generator = torch.Generator().manual_seed(1)
    points = [
        3 * torch.randn(64, dtype=torch.float64, device="cpu", generator=generator) for _ in found.arguments
    ]
    counts = len(cell.states), len(cell.gates), len(cell.per_unit)
    groups = _grouped(points, counts)
    try:
        theirs = _torchs(cell, groups)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise Untraceable(f"torch can't differentiate it: {error}") from error
    keys = list(found.partials)
    values = Program(found.graph, found.arguments, [*found.states, *found.partials.values()])(points)
    ours = dict(zip([("state", 0, nu) for nu in range(counts[0])] + keys, values, strict=True))
    for key in ours.keys() | theirs.keys():
        one, other = (
            torch.as_tensor(of.get(key, 0.0), dtype=torch.float64, device="cpu").expand(64)
            for of in (ours, theirs)
        )
        if not torch.allclose(one, other, rtol=1e-6, atol=1e-9, equal_nan=True):
            what = f"new state {key[2]}" if key[0] == "state" else f"∂F_{key[2]} by {key[0]} {key[1]}"
            raise Untraceable(
                f"its {what} isn't what its operations give one by one, as where a value is read or an "
                "autograd.Function has a derivative of its own: give the cell a `partials`"
            )


@torch.enable_grad()
def _torchs(cell: Cell, groups: Sequence[Sequence[Tensor]]) -> dict[Key, Tensor]:
    """The new states and the partials as torch finds them, by autograd; zeros may be left out."""
    given = [[value.clone().requires_grad_() for value in group] for group in groups]
    states = cell.update(*given)
    found: dict[Key, Tensor] = {("state", 0, nu): value.detach() for nu, value in enumerate(states)}
    if _has_own_partials(cell):
        partials: Partials = cell.partials(*groups)
        for kind in KINDS:
            for index, by_state in enumerate(getattr(partials, kind)):
                found |= {(kind, index, nu): value for nu, value in by_state.items()}
        return found
    flat = [value for group in given for value in group]
    keys = [(kind, index) for kind, group in zip(KINDS, groups, strict=True) for index in range(len(group))]
    for nu, state in enumerate(states):
        if state.requires_grad:  # F acts on each unit alone: the gradient of the sum is each unit's own
            slopes = torch.autograd.grad(state.sum(), flat, retain_graph=True, allow_unused=True)
            found |= {
                (kind, index, nu): slope
                for (kind, index), slope in zip(keys, slopes, strict=True)
                if slope is not None
            }
    return found


def _rule(operation: str) -> Callable[..., Any]:
    """The rule of one of torch's operations that is a node of the same operands."""

    def apply(follow: _Follow, *operands: Any, **options: Any) -> Any:
        return NotImplemented if options else follow.graph.apply(operation, *map(follow.node, operands))

    return apply


def _scaled(operation: str, turned: bool = False) -> Callable[..., Any]:
    """The rule of add, sub and rsub: a ± alpha b."""

    def apply(follow: _Follow, a: Any, b: Any, alpha: Any = 1) -> int:
        graph = follow.graph
        first, second = follow.node(a), follow.node(b)
        if turned:
            first, second = second, first
            return graph.apply(operation, first, graph.mul(graph.constant(alpha), second))
        return graph.apply(operation, first, graph.mul(graph.constant(alpha), second))

    return apply


def _same(follow: _Follow, a: Any, *_: Any, **__: Any) -> int:
    return follow.node(a)


def _power(follow: _Follow, a: Any, b: Any) -> Any:
    graph = follow.graph
    exponent = graph.value(follow.node(b))
    if exponent is None:
        return NotImplemented
    base = follow.node(a)
    if exponent == 0.5:
        return graph.apply("sqrt", base)
    if exponent in (1.0, 2.0, 3.0):
        found = base
        for _ in range(int(exponent) - 1):
            found = graph.mul(found, base)
        return found
    return graph.constant(1) if exponent == 0 else graph.apply("pow", base, graph.constant(exponent))


def _clamp(follow: _Follow, a: Any, low: Any = None, high: Any = None, **named: Any) -> int:
    """Written as choices, so that its derivative is 1 from `low` to `high`, ends included, as torch's."""
    graph, found = follow.graph, follow.node(a)
    for bound, beyond in ((named.get("min", low), "lt"), (named.get("max", high), "gt")):
        if bound is not None:
            limit = follow.node(bound)
            found = graph.where(graph.apply(beyond, found, limit), limit, found)
    return found


def _filled(follow: _Follow, a: Any, truth: Any, value: Any) -> int:
    return follow.graph.where(follow.node(truth), follow.node(value), follow.node(a))


def _cast(follow: _Follow, a: Any, dtype: Any = None, **options: Any) -> Any:
    """To another dtype: only from truths, since numbers are of one dtype here."""
    wanted = options.get("dtype", dtype)
    if isinstance(a, Tensor) and a.dtype == torch.bool and wanted in (None, torch.float64):
        graph = follow.graph
        return graph.where(follow.node(a), graph.constant(1), graph.constant(0))
    return follow.node(a) if wanted in (None, getattr(a, "dtype", None)) else NotImplemented


def _product(follow: _Follow, a: Any, b: Any) -> int:
    """a b, where either may be a truth."""
    graph, operands = follow.graph, []
    for each in (a, b):
        node = follow.node(each)
        is_truth = isinstance(each, Tensor) and each.dtype == torch.bool
        operands.append(graph.where(node, graph.constant(1), graph.constant(0)) if is_truth else node)
    return graph.mul(*operands)


def _where(follow: _Follow, truth: Any, a: Any, b: Any) -> int:
    return follow.graph.where(follow.node(truth), follow.node(a), follow.node(b))


def _divided(follow: _Follow, a: Any, b: Any, **options: Any) -> Any:
    return NotImplemented if options else follow.graph.div(follow.node(a), follow.node(b))


def _composed(make: Callable[[Graph, int], int]) -> Callable[..., int]:
    """The rule of an operation of one tensor that is made of others."""
    return lambda follow, a: make(follow.graph, follow.node(a))


# torch's operations by the name in their schema. What isn't here is taken apart by torch's own table of decompositions.
RULES: dict[str, Callable[..., Any]] = {
    **{
        name: _rule(name)
        for name in OPERATIONS
        if name not in ("add", "sub", "mul", "div", "pow", "where", "stop", "and", "or", "not")
    },
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": _scaled("sub", turned=True),
    "mul": _product,
    "div": _divided,
    "true_divide": _divided,
    "pow": _power,
    "where": _where,
    "masked_fill": _filled,
    "clamp": _clamp,
    "clamp_min": lambda follow, a, low: _clamp(follow, a, low),
    "clamp_max": lambda follow, a, high: _clamp(follow, a, None, high),
    "detach": lambda follow, a: follow.graph.apply("stop", follow.node(a)),
    "reciprocal": _composed(lambda graph, a: graph.div(graph.constant(1), a)),
    "square": _composed(lambda graph, a: graph.mul(a, a)),
    "rsqrt": _composed(lambda graph, a: graph.div(graph.constant(1), graph.apply("sqrt", a))),
    "exp2": _composed(lambda graph, a: graph.apply("exp", graph.mul(graph.constant(0.6931471805599453), a))),
    "logical_and": _rule("and"),
    "bitwise_and": _rule("and"),
    "logical_or": _rule("or"),
    "bitwise_or": _rule("or"),
    "logical_not": _rule("not"),
    "bitwise_not": _rule("not"),
    "_to_copy": _cast,
    "convert_element_type": _cast,
    **dict.fromkeys(("alias", "clone", "view_of", "lift_fresh", "positive"), _same),
}
# Operations that make a tensor of no other's numbers: `_Follow.node` reads it as a constant.
MADE = frozenset(
    ("ones_like", "zeros_like", "full_like", "ones", "zeros", "full", "scalar_tensor", "new_full", "new_zeros",
     "new_ones", "_tensor_constant", "lift_fresh_copy")
)  # fmt: skip
READS = frozenset(("_local_scalar_dense", "item", "is_nonzero", "equal"))
