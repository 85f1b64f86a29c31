"""Where a dual form that is made of a cell writes the credits that it finds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..cells.code import Functions
from ..cells.two_point import Cell, state_read
from ..rules.rfp import Joined

__all__ = ["Planes"]


class Planes:
    """How the credits of a dual form are laid out: E^k of matrices that read one state side by side, for one product a
    state (`rfp.Joined`), where a cell's matrices allow it.

    nodes      what is written, one node of the cell's graph for each array
    of_matrix  the place among them of each matrix's E^k
    """

    def __init__(self, cell: Cell, functions: Functions) -> None:
        self.reads = [state_read(matrix) for matrix in cell.matrices]
        self.into = [matrix.into[1] for matrix in cell.matrices]
        gates, inputs = functions.gates, functions.inputs
        readers = max(self.reads, default=-1) + 1
        by_state = [[k for k, read in enumerate(self.reads) if read == nu] for nu in range(readers)]
        own_gate = len(set(self.into)) == len(self.into)
        self.joined = own_gate and bool(by_state) and len({len(group) for group in by_state}) == 1
        self.inputs = len(inputs)
        if self.joined and readers == 1:
            # an input that is added to a gate has the gate's credit, and then shares its plane, if the first inputs do
            gate_of = {gates[g]: g for g in reversed(self.into)}
            shared = 0
            while (
                shared < len(inputs) and inputs[shared] in gate_of and inputs[shared] not in inputs[:shared]
            ):
                shared += 1
            first = [gate_of[node] for node in inputs[:shared]]
            order = [*(g for g in self.into if g not in first), *first]
            self.places = [(0, order.index(g)) for g in self.into]
            self.nodes = [gates[g] for g in order] + inputs[shared:]
        elif self.joined:
            self.places = [(nu, by_state[nu].index(k)) for k, nu in enumerate(self.reads)]
            self.nodes = [gates[self.into[k]] for group in by_state for k in group] + inputs
        else:
            self.places = []
            self.nodes = [*gates, *inputs]
        self.of_matrix = [self.nodes.index(gates[g]) for g in self.into]
        self.readers = readers

    def make(self, x: Tensor) -> tuple[Iterable[Tensor], Tensor, list[Tensor]]:
        """Memory for T steps: the credit of each matrix, that of the inputs (J, T, B, N), and the arrays to write.

        x: (J, T, B, N). The arrays are (T, B, N) each, one for each of `nodes`, and views of the others.
        """
        _, steps, batch, units = x.shape
        count, matrices = len(self.nodes), len(self.into)
        if self.joined and self.readers == 1:
            made = x.new_empty(steps, batch, count, units)
            joined = Joined(made.flatten(2)[None, :, :, : matrices * units], self.places, units)
            return joined, made[:, :, count - self.inputs :].movedim(2, 0), list(made.unbind(2))
        by_input = x.new_empty(self.inputs, steps, batch, units)
        if self.joined:
            made = x.new_empty(self.readers, steps, batch, matrices // self.readers, units)
            written = [each for of_state in made for each in of_state.unbind(2)]
            return Joined(made.flatten(3), self.places, units), by_input, [*written, *by_input.unbind(0)]
        made = x.new_empty(count - self.inputs, steps, batch, units)
        return [made[g] for g in self.into], by_input, [*made.unbind(0), *by_input.unbind(0)]
