"""Compiled loops of any cell: C++ written from the cell's `update`, built on first use, and called.

`loops(cell)` gives a cell's compiled loops. The C++ of a cell is its functions of one unit (`rjepa_triton.cells.code`)
in a struct `Cell`, with `loops.h` behind it. Cells with the same source share a library.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...cells import weights as weight_ops
from ...cells.code import Functions, printed
from ...cells.trace import by_kind, traced
from ...cells.two_point import Cell, Linearization, Matrix, Partials, Trajectory, state_read
from ...rules.rfp import RULES
from ..planes import Planes
from . import calls, library

WIDTH = {torch.float32: 16, torch.float64: 8}  # numbers in a `wide` of vectors.h
NAMES = {torch.float32: "float", torch.float64: "double"}


def _struct(cell: Cell, functions: Functions, entering: Sequence[int]) -> str:
    """The C++ of a cell's functions of one unit. entering: what its `dual` finds."""

    fixed = {node: f"h[{k}]" for k, node in enumerate(functions.fixed)}
    kept = fixed | {node: f"kept[{k}]" for k, node in enumerate(functions.saved)}

    def body(known: dict[int, str], *results: tuple[str, Sequence[int]]) -> str:
        roots = [root for _, nodes in results for root in nodes]
        statements, values = printed(functions.graph, roots, "cpp", names, known)
        to = [f"{array}[{k}]" for array, nodes in results for k in range(len(nodes))]
        return "\n        ".join(
            [*statements, *(f"{place} = {value};" for place, value in zip(to, values, strict=True))]
        )

    names = {
        f"{letter}{k}": f"{array}[{k}]"
        for letter, array, count in (
            ("c", "c", len(cell.states)),
            ("p", "p", len(cell.gates)),
            ("x", "x", len(cell.per_unit)),
            ("w", "w", len(cell.matrices)),
            ("l", "credit", len(cell.states)),
        )
        for k in range(count)
    }
    reads = ", ".join(str(state_read(matrix)) for matrix in cell.matrices) or "0"
    into = ", ".join(str(matrix.into[1]) for matrix in cell.matrices) or "0"
    return f"""#include "products.h"

namespace {{

template <class real> struct Cell {{
    typedef typename Lanes<real>::wide wide;
    static constexpr long S = {len(cell.states)}, G = {len(cell.gates)}, J = {len(cell.per_unit)};
    static constexpr long K = {len(cell.matrices)}, FOUND = {len(functions.found)}, ENTERING = {len(entering)};
    static constexpr long NEW = {len(set(functions.found) - set(functions.saved))}, KEPT = {len(functions.saved)};
    static constexpr long INPUTS = {len(cell.inputs)}, FIXED = {len(fixed)};
    static constexpr long reads[] = {{{reads}}}, into[] = {{{into}}};

    static inline void prepare(const wide *x, wide *h) {{
        {body({}, ("h", functions.fixed))}
    }}

    static inline void update(const wide *c, const wide *p, const wide *x, const wide *h, wide *now, wide *saving) {{
        {body(fixed, ("now", functions.states), ("saving", functions.saved))}
    }}

    static inline void partials(const wide *c, const wide *kept, const wide *x, const wide *h, const wide *w,
                                wide *found, wide *m) {{
        {body(kept, ("found", functions.found), ("m", functions.m))}
    }}

    static inline void dual(const wide *c, const wide *kept, const wide *x, const wide *h, const wide *w,
                            const wide *credit, wide *e, wide *back) {{
        {body(kept, ("e", entering), ("back", functions.back))}
    }}
}};

}} // namespace
"""


class Loops:
    """The compiled loops of one cell. Tensors are on the CPU, float32 or float64, with memory of their own.

    Each method calls the function of its name in `loops.h`.

    code    the library; None where it can't be built
    planes  where the dual form writes credit
    """

    def __init__(self, cell: Cell, functions: Functions) -> None:
        self.cell, self.functions = cell, functions
        self.planes = Planes(cell, functions)
        saved = functions.saved
        self.known = [
            saved.index(node) for node in functions.found if node in saved
        ]  # partials that were saved
        self.new = len(functions.found) - len(self.known)
        # of what `step` makes: the plane of each partial, and of φ^ν by what a matrix enters, None for zeros
        self.kept = self.new + len(cell.states) ** 2
        self.places = [*range(self.new), *(self.kept + k for k in self.known)]
        self.entering: dict[tuple[str, int], list[int | None]] = {}
        for kind, group in zip(("gate", "input"), functions.entries[1:], strict=True):
            for index, by_state in enumerate(group):
                at = {nu: self.places[k] for nu, k in by_state}
                self.entering[kind, index] = [at.get(nu) for nu in range(len(cell.states))]
        text = _struct(cell, functions, self.planes.nodes)
        self.code = library.generated(text + '\n#include "loops.h"\n')
        inputs, states, weights = len(cell.per_unit), len(cell.states), len(cell.matrices)
        backward = inputs + len(saved) + 2 * states + len(self.planes.nodes) + weights + 3
        self.takes = {  # how many arrays
            "scan": inputs + len(saved) + weights + 2 * states + 4,
            "linearize": inputs + len(saved) + states + weights + 2,
            "step": inputs + weights + states + 3,
            "dual": backward,
            "exact": backward + 1,
        }
        self.calls = {
            (name, dtype): getattr(self.code, f"{name}_{of}")
            for name in self.takes
            for dtype, of in (NAMES.items() if self.code is not None else ())
        }

    def _run(self, name: str, like: Tensor, arrays: Sequence[int | None], numbers: Sequence[int]) -> None:
        if len(arrays) != self.takes[name]:  # the code would take what follows in memory for addresses
            raise ValueError(
                f"{name} of {type(self.cell).__name__} takes {self.takes[name]} arrays, got {len(arrays)}: inputs, "
                "weights or states are those of another cell"
            )
        self.calls[name, like.dtype](
            struct.pack(f"{len(arrays)}P", *[address or 0 for address in arrays]),
            struct.pack(f"{len(numbers)}l", *numbers),
        )

    def scan(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        resets: Tensor | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Run the cell over T steps, as `Cell.scan` does. weights of any shape that `weights.py` knows.

        Returns the states (S, T + 1, B, N), initial state included, and `saved` (·, T, B, N), or (0,) without `keep`.
        Nothing is mutated.
        """
        inputs, steps, batch, units = x.shape
        saves, count = len(self.functions.saved), len(state)
        x = units_together(x)
        states = x.new_empty(count, steps + 1, batch, units)
        saved = x.new_empty(steps, batch, saves, units) if keep else x.new_empty(0)
        given = [weight.contiguous() for weight in weights]
        start = [one.contiguous() for one in state]
        marks = None if resets is None else resets.contiguous()
        products = _whole_lines(len(given) * batch * units)
        kept = 0 if resets is None else _whole_lines(count * batch * units)
        packed = _packed(given, count, steps * batch, x)
        scratch = x.new_empty(products + kept + packed)
        item, row, first = x.element_size(), saves * units, scratch.data_ptr()
        self._run(
            "scan",
            x,
            [
                *planes_of(x),
                *[saved.data_ptr() + item * units * k if keep else None for k in range(saves)],
                *addresses(given),
                *addresses(start),
                *planes_of(states),
                None if marks is None else marks.data_ptr(),
                first + item * products if kept else None,
                first,
                first + item * (products + kept) if packed else None,
            ],
            [
                *x.stride()[1:3] * inputs,
                *(batch * row, row) * saves,
                *[number for weight in given for number in (weight.dim(), weight.shape[-1])],
                *(steps, batch, units, torch.get_num_threads()),
            ],
        )
        return states, saved.movedim(2, 0) if keep else saved

    def advance(
        self, x: Tensor, weights: Sequence[Tensor], products: Sequence[Tensor | None], state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step whose dense products are there, as `operations.advance` has it: `scan` with T = 1.

        x (J, B, N), state (S, B, N); products[k] (B, N), of which a row's numbers are contiguous, or None. Nothing is
        mutated.
        """
        x, state = units_together(x), state.contiguous()
        inputs, batch, units = x.shape
        saves, count = len(self.functions.saved), len(state)
        states, saved = x.new_empty(count, 2, batch, units), x.new_empty(saves, batch, units)
        given = [
            weight.contiguous() if product is None else product
            for weight, product in zip(weights, products, strict=True)
        ]
        scratch = x.new_empty(len(given) * batch * units)
        kinds: list[int] = []
        for product, one in zip(products, given, strict=True):
            kinds += (one.dim(), one.shape[-1]) if product is None else (0, one.stride(0))
        self._run(
            "scan",
            x,
            [
                *planes_of(x),
                *planes_of(saved),
                *addresses(given),
                *planes_of(state),
                *planes_of(states),
                *(None, None, scratch.data_ptr(), None),
            ],
            [
                *(0, x.stride(1)) * inputs,
                *(0, units) * saves,
                *kinds,
                *(1, batch, units, torch.get_num_threads()),
            ],
        )
        return states[:, 1], saved

    def linearize(
        self, trajectory: Trajectory, before: Tensor, weights: Sequence[Tensor], rule: str
    ) -> tuple[Partials, Tensor]:
        """The partials at every step, and M (S, S, T, B, N) as a rule has it, which is zero at reset steps.

        before (S, T, B, N): the states that the steps read; weights: (N, N), (N,) or (H, b, b); rule: one of
        `rfp.RULES`. Nothing is mutated.
        """
        x, before = units_together(trajectory.x), units_together(before)
        saved = units_together(trajectory.saved)
        states, steps, batch, units = before.shape
        marks = None if trajectory.resets is None else trajectory.resets.contiguous()
        out = x.new_empty(self.new + states**2, steps, batch, units)
        diagonals, strides = own(weights)
        self._run(
            "linearize",
            x,
            [*planes_of(x), *planes_of(saved), *planes_of(before), *addresses([*diagonals, marks, out])],
            [
                *x.stride()[1:3] * x.shape[0],
                *saved.stride()[1:3] * saved.shape[0],
                *before.stride()[1:3] * states,
                *strides,
                *(steps, batch, units, torch.get_num_threads(), RULES.index(rule)),
            ],
        )
        found = [*out.unbind(0)[: self.new], *[saved[k] for k in self.known]]
        partials = Partials(*by_kind(self.functions.entries, found))
        return partials, out[self.new :].view(states, states, steps, batch, units)

    def step(
        self, x: Tensor, weights: Sequence[Tensor], state: Tensor, resets: Tensor | None, rule: str
    ) -> tuple[Tensor, JoinedLinearization, Tensor]:
        """`scan` and `linearize` in one call: a small layer's time is mostly what lies around the calls.

        x (J, T, B, N), state (S, B, N); resets (1, B) bool of one step, or None. Returns the states after the steps
        (S, T, B, N), their linearization, and M (S, S, T, B, N) as a rule has it. Nothing is mutated.
        """
        x, state = units_together(x), state.contiguous()
        inputs, steps, batch, units = x.shape
        count, numbers = len(state), batch * units
        given = [weight.contiguous() for weight in weights]
        marks = None if resets is None else resets.contiguous()
        planes = self.kept + len(self.functions.saved)
        made = x.new_empty(planes * steps * numbers + count * (steps + 1) * numbers)
        packed = x.new_empty(_packed(given, count, steps * batch, x))
        self._run(
            "step",
            x,
            [
                *planes_of(x),
                *[weight.data_ptr() for weight in given],
                *planes_of(state),
                None if marks is None else marks.data_ptr(),
                made.data_ptr(),
                packed.data_ptr(),
            ],
            [
                *x.stride()[1:3] * inputs,
                *[number for weight in given for number in (weight.dim(), weight.shape[-1])],
                *(steps, batch, units, torch.get_num_threads(), RULES.index(rule)),
            ],
        )
        lin, plane = (
            JoinedLinearization.of(self, made, (planes, steps, batch, units), resets),
            steps * numbers,
        )
        apart = (count * plane, plane, numbers, units, 1)
        m = made.as_strided((count, count, steps, batch, units), apart, self.new * plane)
        return lin.states(1), lin, m

    def dual(
        self,
        trajectory: Trajectory,
        weights: Sequence[Tensor],
        delta: Tensor | Sequence[Tensor | None],
        carry: Tensor | None = None,
    ) -> tuple[Iterable[Tensor], Tensor, Tensor]:
        """`operations.dual_of` for RFP, in one pass.

        delta is (S, T, B, N), or a (T, B, N) for each state with None for zeros; carry is (S, B, N) or None; the rest
        as in `linearize`. Returns the credit E^k of the cell's matrices, the credit of the J inputs (J, T, B, N), and
        M(1)ᵀ λ(1) (S, B, N). Nothing is mutated.
        """
        return self._backward("dual", trajectory, *own(weights), delta, carry)

    def exact(
        self,
        trajectory: Trajectory,
        weights: Sequence[Tensor],
        delta: Tensor | Sequence[Tensor | None],
    ) -> tuple[Iterable[Tensor], Tensor, Tensor]:
        """`operations.exact_of` for dense weights (N, N), in one pass: arguments and results as of `dual`."""
        dense = [weight.contiguous() for weight in weights]
        units = trajectory.x.shape[-1]
        room = trajectory.x.new_empty(len(dense) * calls.packed_numbers(1, units))
        return self._backward("exact", trajectory, dense, self.planes.of_matrix, delta, None, room)

    def _backward(
        self,
        name: str,
        trajectory: Trajectory,
        weights: Sequence[Tensor],
        of_weight: Sequence[int],
        delta: Tensor | Sequence[Tensor | None],
        carry: Tensor | None,
        *room: Tensor,
    ) -> tuple[Iterable[Tensor], Tensor, Tensor]:
        """A backward pass of `loops.h`, by what it takes of each weight."""
        x, states = units_together(trajectory.x), units_together(trajectory.states)
        saved = units_together(trajectory.saved)
        source = [None if one is None else units_together(one) for one in delta]
        marks = None if trajectory.resets is None else trajectory.resets.contiguous()
        carry = None if carry is None else carry.contiguous()
        _, steps, batch, units = x.shape
        by_matrix, by_input, written = self.planes.make(x)
        passed = x.new_empty(len(source), batch, units)
        apart = [
            *x.stride()[1:3] * x.shape[0],
            *saved.stride()[1:3] * saved.shape[0],
            *states.stride()[1:3] * len(source),
        ]
        for one in source:
            apart += (0, 0) if one is None else one.stride()[:2]
        for one in written:
            apart += one.stride()[:2]
        self._run(
            name,
            x,
            [
                *planes_of(x),
                *planes_of(saved),
                *planes_of(states),
                *addresses(source),
                *addresses(written),
                *addresses([*weights, carry, marks, passed, *room]),
            ],
            [*apart, *of_weight, *(steps, batch, units, torch.get_num_threads())],
        )
        return by_matrix, by_input, passed


class JoinedLinearization(Linearization):
    """The linearization of steps as `Loops.step` has made it, with no partials of the states through no matrix.

    Its arrays are parts of one, and become tensors once they are read, each of which takes longer than to compute it in
    a small layer. Γ's step reads their addresses.

    made   what `Loops.step` wrote; None in a linearization that was made of this one, with other arrays
    shape  (planes, T, B, N) of the first part of it, behind which the states lie
    """

    loops: Loops
    made: Tensor | None = None
    shape: tuple[int, int, int, int]

    @classmethod
    def of(
        cls, loops: Loops, made: Tensor, shape: tuple[int, int, int, int], resets: Tensor | None
    ) -> JoinedLinearization:
        lin = cls.__new__(cls)
        lin.__dict__.update(loops=loops, made=made, shape=shape, resets=resets)
        return lin

    def __reduce__(self) -> Any:  # a copy has arrays of its own, and no compiled code
        return Linearization, (self.partials, self.before, self.resets)

    @property
    def steps(self) -> int:
        return super().steps if self.made is None else self.shape[1]

    @cached_property
    def before(self) -> Tensor:
        return self.states(0)

    @cached_property
    def partials(self) -> Partials:
        assert self.made is not None
        planes, loops = self.made[: math.prod(self.shape)].view(self.shape).unbind(0), self.loops
        gate, by_input = by_kind(loops.functions.entries[1:], [planes[place] for place in loops.places])
        return Partials((), gate, by_input)

    def states(self, later: int) -> Tensor:
        """The states (S, T, B, N) that the steps read, or with `later` = 1 those after them."""
        assert self.made is not None
        count, (planes, steps, batch, units) = len(self.loops.cell.states), self.shape
        apart = ((steps + 1) * batch * units, batch * units, units, 1)
        first = (planes * steps + later) * batch * units
        return self.made.as_strided((count, steps, batch, units), apart, first)

    def phi_at(self, matrices: Sequence[Matrix]) -> list[int | None]:
        """The addresses of φ^{ν,k} (T, B, N), S·K of them, those of state 0 first; None for zeros."""
        assert self.made is not None
        _, steps, batch, units = self.shape
        first, plane = self.made.data_ptr(), steps * batch * units * self.made.element_size()
        of = [self.loops.entering[matrix.into] for matrix in matrices]
        return [
            None if (place := each[nu]) is None else first + place * plane
            for nu in range(len(self.loops.cell.states))
            for each in of
        ]

    def state_at(self, nu: int) -> int:
        """The address of the state ν that the steps read, (T, B, N)."""
        assert self.made is not None
        planes, steps, batch, units = self.shape
        place = (planes * steps + nu * (steps + 1)) * batch * units
        return self.made.data_ptr() + place * self.made.element_size()


def _packed(weights: Sequence[Tensor], states: int, rows: int, x: Tensor) -> int:
    """The numbers that the packed weights of a loop over T·B = rows take, 0 where they are read as they are."""
    units = x.shape[-1]
    if not calls.packs(rows, units) or all(weight.dim() != 2 for weight in weights):
        return 0
    return len(weights) * units * units + states * 2 * WIDTH[x.dtype] * units


def _whole_lines(numbers: int) -> int:
    """So many numbers that what lies behind them begins at a line of the cache."""
    return -(-numbers // 16) * 16


def units_together(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only where it isn't."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """The address of each tensor's first number; None stays None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def planes_of(array: Tensor) -> list[int]:
    """The address of array[k] for each k."""
    first, apart = array.data_ptr(), array.element_size() * array.stride(0)
    return [first + apart * k for k in range(array.shape[0])]


def own(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The diagonals of weights (N, N), (N,) or (H, b, b): tensors that begin there, and how far numbers are apart."""
    flat = [weight if weight.dim() < 3 else weight_ops.own(weight).contiguous() for weight in weights]
    return flat, [sum(weight.stride()) for weight in flat]


def loops(cell: Cell) -> Loops | None:
    """A cell's compiled loops, built on first use and kept with its trace; None if it can't be traced."""
    found = traced(cell)
    if found is None:
        return None
    made: Loops | None = found.made.get("loops")
    if made is None:
        made = found.made["loops"] = Loops(cell, Functions(cell, found))
    return made


def source(cell: Cell) -> str | None:
    """The C++ of a cell's functions of one unit; None if it can't be traced."""
    found = traced(cell)
    if found is None:
        return None
    functions = Functions(cell, found)
    return _struct(cell, functions, Planes(cell, functions).nodes)


def stream_code(cell: Cell) -> ctypes.CDLL | None:
    """The library of a cell's streams (`stream.h`), built on first use; None if the cell can't be traced or built."""
    found = traced(cell)
    if found is None:
        return None
    if "stream" not in found.made:
        found.made["stream"] = library.generated(f'{source(cell)}\n#include "stream.h"\n')
    made: ctypes.CDLL | None = found.made["stream"]
    return made
