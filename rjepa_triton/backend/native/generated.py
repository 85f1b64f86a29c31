"""Compiled loops of any cell: C++ written from the cell's `update`, built on first use, and called.

`loops(cell)` gives a cell's compiled loops. The C++ of a cell is its functions of one unit (`rjepa_triton.cells.code`)
in a struct `Cell`, with `loops.h` behind it. Cells with the same source share a library.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cells import weights as weight_ops
from ...cells.builtin import RGCCell
from ...cells.code import Functions, printed
from ...cells.trace import by_kind, traced
from ...cells.two_point import Cell, Partials, Trajectory, state_read
from ...rules.rfp import Joined
from . import calls, library

WIDTH = {torch.float32: 16, torch.float64: 8}  # numbers in a `wide` of vectors.h
NAMES = {torch.float32: "float", torch.float64: "double"}
PACKED_FROM = 16  # packing the weights saves time from T·B = 16 on


def _struct(cell: Cell, functions: Functions, entering: Sequence[int]) -> str:
    """The C++ of a cell's functions of one unit. entering: what its `dual` finds."""

    fixed = {node: f"h[{k}]" for k, node in enumerate(functions.fixed)}

    def body(*results: tuple[str, Sequence[int]]) -> str:
        roots = [root for _, nodes in results for root in nodes]
        known = {} if results[0][0] == "h" else fixed
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
    static constexpr long INPUTS = {len(cell.inputs)}, FIXED = {len(fixed)};
    static constexpr long reads[] = {{{reads}}}, into[] = {{{into}}};

    static inline void prepare(const wide *x, wide *h) {{
        {body(("h", functions.fixed))}
    }}

    static inline void update(const wide *c, const wide *p, const wide *x, const wide *h, wide *now) {{
        {body(("now", functions.states))}
    }}

    static inline void partials(const wide *c, const wide *p, const wide *x, const wide *h, const wide *w, wide *found,
                                wide *m) {{
        {body(("found", functions.found), ("m", functions.m))}
    }}

    static inline void dual(const wide *c, const wide *p, const wide *x, const wide *h, const wide *w,
                            const wide *credit, wide *e, wide *back) {{
        {body(("e", entering), ("back", functions.back))}
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

    prefix = ""  # of the functions' names in the library

    def __init__(self, cell: Cell, functions: Functions) -> None:
        self.cell, self.functions = cell, functions
        self.planes = Planes(cell, functions)
        self.found = len(functions.found)
        self.code = self._library()

    def _library(self) -> ctypes.CDLL | None:
        text = _struct(self.cell, self.functions, self.planes.nodes)
        return library.generated(text + '\n#include "loops.h"\n')

    def _gates(self, saved: Tensor) -> tuple[list[int], list[int]]:
        """The addresses of the pre-activations, and how far apart their steps and rows are."""
        return planes_of(saved), [*saved.stride()[1:3]] * len(saved)

    def _partials(self, out: Tensor, saved: Tensor) -> tuple[Partials, Tensor]:
        """Partials and M from what `linearize` has written."""
        count = len(self.functions.found)
        partials = Partials(*by_kind(self.functions.entries, out.unbind(0)[:count]))
        states = len(self.cell.states)
        return partials, out[count:].view(states, states, *out.shape[1:])

    def _run(self, name: str, like: Tensor, arrays: Sequence[int | None], numbers: Sequence[int]) -> None:
        function = getattr(self.code, f"{self.prefix}{name}_{NAMES[like.dtype]}")
        function(
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

        Returns the states (S, T + 1, B, N), initial state included, and `saved`, the pre-activations (G, T, B, N),
        or (0,) without `keep`. Nothing is mutated.
        """
        inputs, steps, batch, units = x.shape
        gates, count = len(self.cell.gates), len(state)
        x = units_together(x)
        states = x.new_empty(count, steps + 1, batch, units)
        sums = x.new_empty(steps, batch, gates, units) if keep else x.new_empty(0)
        given = [weight.contiguous() for weight in weights]
        start = [one.contiguous() for one in state]
        marks = None if resets is None else resets.contiguous()
        kept = None if resets is None else x.new_empty(count * batch * units)
        products = x.new_empty(len(given) * batch * units)
        packed = None
        if steps * batch >= PACKED_FROM and any(weight.dim() == 2 for weight in given):
            packed = x.new_empty(len(given) * units * units + count * 2 * WIDTH[x.dtype] * units)
        item, row = x.element_size(), gates * units
        self._run(
            "scan",
            x,
            [
                *planes_of(x),
                *[sums.data_ptr() + item * units * g if keep else None for g in range(gates)],
                *addresses(given),
                *addresses(start),
                *planes_of(states),
                *addresses([marks, kept, products, packed]),
            ],
            [
                *x.stride()[1:3] * inputs,
                *(batch * row, row) * gates,
                *[number for weight in given for number in (weight.dim(), weight.shape[-1])],
                *(steps, batch, units, torch.get_num_threads()),
            ],
        )
        return states, sums.movedim(2, 0) if keep else sums

    def linearize(
        self, trajectory: Trajectory, before: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Partials, Tensor]:
        """The partials at every step, and RFP's M (S, S, T, B, N), which is zero at reset steps.

        before (S, T, B, N): the states that the steps read; weights: (N, N), (N,) or (H, b, b). Nothing is mutated.
        """
        x, before = units_together(trajectory.x), units_together(before)
        saved = units_together(trajectory.saved)
        gates, gates_apart = self._gates(saved)
        states, steps, batch, units = before.shape
        marks = None if trajectory.resets is None else trajectory.resets.contiguous()
        out = x.new_empty(self.found + states**2, steps, batch, units)
        diagonals, strides = own(weights)
        self._run(
            "linearize",
            x,
            [*planes_of(x), *gates, *planes_of(before), *addresses([*diagonals, marks, out])],
            [
                *x.stride()[1:3] * len(x),
                *gates_apart,
                *before.stride()[1:3] * states,
                *strides,
                *(steps, batch, units, torch.get_num_threads()),
            ],
        )
        return self._partials(out, saved)

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
        x, states = units_together(trajectory.x), units_together(trajectory.states)
        saved = units_together(trajectory.saved)
        gates, gates_apart = self._gates(saved)
        source = [None if one is None else units_together(one) for one in delta]
        marks = None if trajectory.resets is None else trajectory.resets.contiguous()
        carry = None if carry is None else carry.contiguous()
        _, steps, batch, units = x.shape
        made = self.planes.make(x)
        passed = x.new_empty(len(source), batch, units)
        diagonals, strides = own(weights)
        apart = [
            *x.stride()[1:3] * len(x),
            *gates_apart,
            *states.stride()[1:3] * len(source),
        ]
        for one in source:
            apart += (0, 0) if one is None else one.stride()[:2]
        self._run(
            "dual",
            x,
            [
                *planes_of(x),
                *gates,
                *planes_of(states),
                *addresses(source),
                *made.addresses,
                *addresses([*diagonals, carry, marks, passed]),
            ],
            [*apart, *made.apart, *strides, *(steps, batch, units, torch.get_num_threads())],
        )
        return made.by_matrix, made.by_input, passed


class RGCLoops(Loops):
    """The loops of `rgc.cpp`. `saved` has the layout of `RGCCell.scan`."""

    prefix = "rgc_"

    def __init__(self, cell: Cell, functions: Functions) -> None:
        super().__init__(cell, functions)
        self.found = 6

    def _library(self) -> ctypes.CDLL | None:
        return library.library()

    def _gates(self, saved: Tensor) -> tuple[list[int], list[int]]:
        first, item = saved.data_ptr(), saved.element_size()
        source, gate = item * saved.stride(0), item * saved.stride(3)
        return [first, first + source + gate, first + source, first + gate], [*saved.stride()[1:3]] * 4

    def _partials(self, out: Tensor, saved: Tensor) -> tuple[Partials, Tensor]:
        return RGCCell.partials_in(out, saved)

    def scan(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        resets: Tensor | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As `Loops.scan`, for dense weights."""
        states, saved = calls.rgc_scan(x[0], weights, state, resets)
        return states, saved if keep else x.new_empty(0)


@dataclass(frozen=True)
class Made:
    """The arrays that a dual form writes: the credit of each matrix, and that of the inputs (J, T, B, N)."""

    by_matrix: Iterable[Tensor]
    by_input: Tensor
    addresses: Sequence[int]
    apart: Sequence[int]


class Planes:
    """How the credit that a dual form writes is laid out: E^k of matrices that read one state side by side, for one
    product a state (`rfp.Joined`), where a cell's matrices allow it.

    nodes  what is written, one node of the cell's graph for each array
    """

    def __init__(self, cell: Cell, functions: Functions) -> None:
        self.reads = [state_read(matrix) for matrix in cell.matrices]
        self.into = [matrix.into[1] for matrix in cell.matrices]
        gates, inputs = functions.gates, functions.inputs
        readers = max(self.reads, default=-1) + 1
        by_state = [[k for k, read in enumerate(self.reads) if read == nu] for nu in range(readers)]
        own_gate = len(set(self.into)) == len(self.into)
        self.joined = own_gate and bool(by_state) and len({len(group) for group in by_state}) == 1
        self.inputs, self.shared = len(inputs), 0
        if self.joined and readers == 1:
            # an input that is added to a gate has the gate's credit, and then shares its plane, if the first inputs do
            gate_of = {gates[g]: g for g in reversed(self.into)}
            while self.shared < len(inputs) and inputs[self.shared] in gate_of:
                if inputs[self.shared] in inputs[: self.shared]:
                    break
                self.shared += 1
            first = [gate_of[node] for node in inputs[: self.shared]]
            order = [*(g for g in self.into if g not in first), *first]
            self.places = [(0, order.index(g)) for g in self.into]
            self.nodes = [gates[g] for g in order] + inputs[self.shared :]
        elif self.joined:
            self.places = [(nu, by_state[nu].index(k)) for k, nu in enumerate(self.reads)]
            self.nodes = [gates[self.into[k]] for group in by_state for k in group] + inputs
        else:
            self.places = []
            self.nodes = [*gates, *inputs]
        self.readers = readers

    def make(self, x: Tensor) -> Made:
        """Memory for the arrays of T steps. x: (J, T, B, N)."""
        _, steps, batch, units = x.shape
        item, count = x.element_size(), len(self.nodes)
        if self.joined and self.readers == 1:
            made = x.new_empty(steps, batch, count, units)
            matrices = len(self.into)
            joined = Joined(made.flatten(2)[None, :, :, : matrices * units], self.places, units)
            by_input = made[:, :, count - self.inputs :].movedim(2, 0)
            first, row = made.data_ptr(), count * units
            return Made(
                joined, by_input, [first + item * units * k for k in range(count)], [batch * row, row] * count
            )
        by_input = x.new_empty(self.inputs, steps, batch, units)
        apart = [batch * units, units] * self.inputs
        if self.joined:
            columns = len(self.into) // self.readers
            made = x.new_empty(self.readers, steps, batch, columns, units)
            each = [a for state in made for a in state.movedim(2, 0)]
            joined = Joined(made.flatten(3), self.places, units)
            row = columns * units
            places = [a.data_ptr() for a in each]
            return Made(
                joined, by_input, [*places, *planes_of(by_input)], [batch * row, row] * len(each) + apart
            )
        made = x.new_empty(count - self.inputs, steps, batch, units)
        by_matrix = [made[g] for g in self.into]
        return Made(
            by_matrix,
            by_input,
            [*planes_of(made), *planes_of(by_input)],
            [batch * units, units] * len(made) + apart,
        )


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
        kind = RGCLoops if isinstance(cell, RGCCell) else Loops
        made = found.made["loops"] = kind(cell, Functions(cell, found))
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
