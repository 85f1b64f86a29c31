"""Triton functions of any cell, written from the cell's `update`, which the kernels of `kernels/cell_*.py` take.

`kernels_of(cell)` gives a cell's functions. They are a module of their own, which lies in no file: Triton reads its
text from `linecache`, as it does a notebook's.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cells.code import Functions, printed
from ..cells.trace import traced
from ..cells.two_point import Cell, state_read
from .planes import Planes

if TYPE_CHECKING:
    from ..kernels._cell import CellFunctions

__all__ = ["Kernels", "kernels_of", "module_of", "source"]


@dataclass(frozen=True, eq=False)
class Kernels:
    """What kernels take of a cell, and where their dual form writes.

    functions  for the kernels
    known      which of the saved numbers the partials are that `partials` doesn't find, in their order
    needed     which of the found and known ones are partials of gates and inputs
    entries    which of these and the found ones the cell's partials are (`Traced.entries`)
    planes     of the dual form
    """

    functions: CellFunctions
    known: list[int]
    needed: list[int]
    entries: Sequence[Sequence[tuple[tuple[int, int], ...]]]
    planes: Planes


def source(cell: Cell) -> str | None:
    """The text of a cell's functions in Triton; None if it can't be traced."""
    found = traced(cell)
    if found is None:
        return None
    functions = Functions(cell, found)
    return _text(cell, functions, Planes(cell, functions).nodes)


def _text(cell: Cell, functions: Functions, credits: Sequence[int]) -> str:
    counts = {
        "c": len(cell.states),
        "p": len(cell.gates),
        "x": len(cell.per_unit),
        "w": len(cell.matrices),
        "l": len(cell.states),
    }
    names = {f"{letter}{k}": f"{letter}[{k}]" for letter, count in counts.items() for k in range(count)}
    saved = {node: f"v[{k}]" for k, node in enumerate(functions.saved)}
    new = [node for node in functions.found if node not in saved]

    def function(name: str, arguments: str, roots: Sequence[int], known: dict[int, str]) -> str:
        statements, values = printed(functions.graph, roots, "triton", names, known)
        body = "".join(f"    {line}\n" for line in [*statements, f"return ({', '.join(values)},)"])
        return f"\n\n@triton.jit\ndef {name}({arguments}):\n{body}"

    return (
        "import triton\nimport triton.language as tl\n\nfrom rjepa_triton.kernels.elementwise import *\n"
        + function("update", "c, p, x", [*functions.states, *functions.saved], {})
        + function("partials", "c, v, x, w", [*new, *functions.m], saved)
        + function("transition", "c, v, x, w", functions.m, saved)
        + function("dual", "c, v, x, w, l", [*credits, *functions.back], saved)
        + function("exact", "c, v, x, l", [*functions.gates, *functions.inputs, *functions.own_back], saved)
    )


def kernels_of(cell: Cell) -> Kernels | None:
    """A cell's functions for kernels, kept with its trace; None if it can't be traced. It imports triton."""
    found = traced(cell)
    if found is None:
        return None
    made: Kernels | None = found.made.get("triton")
    if made is None:
        from ..kernels._cell import CellFunctions

        functions = Functions(cell, found)
        planes = Planes(cell, functions)
        module = module_of(_text(cell, functions, planes.nodes))
        known = [functions.saved.index(node) for node in functions.found if node in functions.saved]
        # the products lie by the state that their matrices read (`Products`)
        reads = [state_read(matrix) for matrix in cell.matrices]
        order = sorted(range(len(reads)), key=reads.__getitem__)
        into = [matrix.into[1] for matrix in cell.matrices]
        new = len(functions.found) - len(known)
        # of each partial of a gate or an input, where the kernel has it
        needed = sorted({k for kind in functions.entries[1:] for places in kind for _, k in places})
        of_kernels = CellFunctions(
            states=len(cell.states),
            inputs=len(cell.per_unit),
            matrices=len(cell.matrices),
            saves=len(functions.saved),
            reads=tuple(reads),
            into=tuple(into),
            order=tuple(order),
            entering=tuple(
                tuple(p for p, k in enumerate(order) if into[k] == g) for g in range(len(cell.gates))
            ),
            into_gates=tuple(
                tuple(k for k, of in enumerate(into) if of == g) for g in range(len(cell.gates))
            ),
            partials_found=new,
            credits=len(planes.nodes),
            step_partials=tuple(k if k < new else new + known[k - new] for k in needed),
            links=tuple(functions.graph.value(node) != 0 for node in functions.m),
            update=module.update,
            partials=module.partials,
            transition=module.transition,
            dual=module.dual,
            exact=module.exact,
        )
        made = found.made["triton"] = Kernels(of_kernels, known, needed, functions.entries, planes)
    return made


def module_of(text: str) -> types.ModuleType:
    """The module of this text; one for each text."""
    name = f"rjepa_triton_cell_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        path = f"<{name}>"
        linecache.cache[path] = (len(text), None, text.splitlines(True), path)
        module = types.ModuleType(name)
        module.__file__ = path
        sys.modules[name] = module  # Triton looks a function's module up there
        exec(compile(text, path, "exec"), module.__dict__)
    return sys.modules[name]
