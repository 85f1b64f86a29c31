"""How many calls of torch each part of a training step makes, for any cell: counted by running it on a few units.

A call takes microseconds whatever it works on, so at small sizes the time is that of the calls. Their number doesn't
depend on N. It is a constant plus a multiple of the number of steps, so a part with a loop over steps is counted at two
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backend import native_backend, triton_backend
from ..cells import weights as weight_ops
from ..cells.trace import traced
from ..cells.two_point import Cell, Matrix, Trajectory, state_read
from ..layers.layer import TwoPointRNN
from ..planning.cost import Calls, Line, Problem, Work, counted, runs_gamma
from ..rules import bptt, rfp
from ..rules.rtrl import PIECES, ExactSensitivity
from .sensitivity import PerUnit
from .tape import Block, linearized

UNITS, FEATURES = 4, 3
# The two lengths. Neither is 1, since a single step may run by other code.
SHORT, LONG = 3, 5

_counted: dict[tuple[object, ...], Calls] = {}


def calls(cell: Cell, matrices: Sequence[Matrix], weights: Sequence[Tensor]) -> Calls:
    """The calls that a layer of `cell` makes; counted once for each kind of cell and of weights.

    matrices: all of the layer's, the cell's first. weights: one for each, on any device and of any size; only what they
    read and how many dimensions they have matters.
    """
    dims = tuple(weight.dim() for weight in weights)
    kinds = tuple((matrix.into, matrix.reads) for matrix in matrices)
    key = (type(cell), cell.affine, cell.per_unit, kinds, dims)
    if key not in _counted:
        _counted[key] = _Count(cell, matrices, dims).calls()
    return _counted[key]


def problem(layer: TwoPointRNN, batch: int, gamma_dtype: torch.dtype, *, gpu: bool) -> Problem:
    """A layer as the cost model sees it; its parameters may be on the meta device. gpu: whether it runs on a GPU."""
    weights, recurrent = layer.weights(), layer.recurrent_weights()
    fan_ins = [weight_ops.fan_in(weight) for weight in weights]
    item = weights[0].dtype.itemsize
    narrow = weights[0].dtype == torch.float32
    compiled = not gpu and narrow and native_backend.cpp_compiler() is not None
    kernels = gpu and narrow and traced(layer.cell) is not None
    found = calls(layer.cell, layer.matrices, weights)
    if kernels:
        found = replace(found, loop=Line(Work(), Work(calls=triton_backend.step_calls(layer.cell))))
    return Problem(
        states=len(layer.cell.states),
        batch=batch,
        units=layer.hidden_size,
        fan_ins=fan_ins,
        item=item,
        gamma_item=gamma_dtype.itemsize,
        calls=found,
        features=layer.input_size or 0,
        runs=runs_gamma(gpu, item, gamma_dtype.itemsize, len(layer.cell.states)),
        loop=compiled and native_backend.compiled_loop(layer.cell, recurrent, LONG, batch),
        one_step=(compiled and native_backend.compiled_loop(layer.cell, recurrent, 1, batch))
        or (kernels and triton_backend.is_dense(layer.cell, recurrent) and batch <= triton_backend.STEP_ROWS),
        partials=kernels or (compiled and native_backend.compiled_partials(layer.cell)),
        reverse=compiled and native_backend.compiled_reverse(batch * layer.hidden_size),
    )


class _Count:
    """A layer of a few units on one batch row, whose weights and states are zeros."""

    def __init__(self, cell: Cell, matrices: Sequence[Matrix], dims: Sequence[int]) -> None:
        self.cell, self.matrices = cell, matrices
        self.count = len(cell.matrices)
        self.weights = [_zeros(*self._shape(matrix, dim)) for matrix, dim in zip(matrices, dims, strict=True)]
        self.recurrent = self.weights[: self.count]
        self.state = [_zeros(1, UNITS)] * len(cell.states)
        self.x = _zeros(len(cell.per_unit), LONG, 1, UNITS)
        self.inputs = _zeros(LONG, 1, FEATURES)

    @staticmethod
    def _shape(matrix: Matrix, dim: int) -> tuple[int, ...]:
        fan_in = FEATURES if matrix.reads == "input" else UNITS
        return ((), (UNITS,), (UNITS, fan_in), (2, UNITS // 2, UNITS // 2))[dim]

    def scan(self, steps: int) -> Trajectory:
        """`steps` steps of the layer."""
        return self.cell.scan(self.x[:, :steps], self.recurrent, self.state)

    def block(self, steps: int) -> Block:
        """The same steps, as a learner records them."""
        return linearized(self.cell, self.scan(steps), self.recurrent, self.inputs[:steps])

    def calls(self) -> Calls:
        """The calls of each part of a training step."""
        step = _calls(lambda: self.scan(1))
        block = self.block(1)
        delta = _zeros(len(self.cell.states), LONG, 1, UNITS)

        count = len(self.cell.states)
        gamma = PerUnit(self.matrices, self.weights, count, 1, torch.float32, backend="torch")

        def stack() -> None:
            for group in gamma.groups:
                rfp.immediates(group.matrices, block.lin)
                rfp.signals(group.matrices, block.lin, block.inputs)

        stacked = _calls(stack)

        def chunk(steps: int) -> Work:
            whole = self.block(steps)
            return _calls(lambda: gamma.chunk_(whole, delta[:, 0]))

        def credit(steps: int) -> Work:
            whole = self.block(steps)
            return _calls(lambda: rfp.reverse_scan(whole.m, delta[:, :steps]))

        def exact(steps: int) -> Work:
            lin = self.cell.linearize(self.scan(steps))
            return _calls(lambda: bptt.credits(lin, self.cell.matrices, self.recurrent, delta[:, :steps]))

        return Calls(
            step=step,
            loop=_line(lambda steps: _calls(lambda: self.scan(steps))),
            linearize=_calls(lambda: self.block(1)) + step * -1.0,
            stacked=stacked,
            gamma=_calls(lambda: gamma.step_(block, delta[:, :1])) + stacked * -1.0,
            read=_calls(lambda: gamma.read(delta[:, 0])),
            groups=len(gamma.groups),
            chunk=_line(chunk),
            credit=_line(credit),
            exact=_line(exact),
            outer=_calls(lambda: self._outer(block, delta[:, :1])),
            eager=_line(lambda steps: _calls(lambda: self._eager(steps))),
            eager_kept=(self._kept(LONG) - self._kept(SHORT)) // (LONG - SHORT),
            rtrl=self._rtrl(1),
            rtrl_heads=self._rtrl(PIECES),
            arrays=len(block.tensors()),
            window=sum(tensor.numel() for tensor in block.tensors()[:-1]) // UNITS,  # the last is the input
        )  # fmt: skip

    def _outer(self, block: Block, credit: Tensor) -> list[Tensor]:
        return rfp.weight_gradients(block.lin, self.matrices, self.weights, credit, block.inputs)

    def _eager(self, steps: int) -> None:
        """The plain eager loop over time under autograd, and its backward."""
        weights = [torch.zeros_like(weight).requires_grad_() for weight in self.recurrent]
        if not weights:
            return
        with torch.enable_grad():
            state, outputs = list(self.state), []
            for t in range(steps):
                entering: list[list[Tensor]] = [[] for _ in self.cell.gates]
                for matrix, weight in zip(self.cell.matrices, weights, strict=True):
                    entering[matrix.into[1]].append(weight_ops.multiply(weight, state[state_read(matrix)]))
                gates = [sum(parts[1:], parts[0]) for parts in entering]
                state = list(self.cell.update(state, gates, self.x[:, t].unbind()))
                outputs.append(state[self.cell.outputs[0]])
            output = torch.stack(outputs)
            if (
                output.requires_grad
            ):  # not where a cell's own partials alone pass on credit, as through a threshold
                torch.autograd.grad(output, weights, _zeros(steps, 1, UNITS), allow_unused=True)

    def _kept(self, steps: int) -> int:
        """How many arrays of one step's shape autograd keeps of that loop, without the inputs."""
        given, kept = {x.data_ptr() for x in self.x.flatten(0, 1)}, {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == UNITS and tensor.data_ptr() not in given:
                kept[tensor.data_ptr()] = tensor  # held, so that its address isn't reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._eager(steps)
        return len(kept)

    def _rtrl(self, heads: int) -> Work:
        """The calls of a step of exact RTRL for the recurrent matrices, dense if heads is 1, else block-diagonal."""
        units = UNITS if heads == 1 else 2 * heads
        if not self.recurrent:
            return Work()
        size = units // heads
        weights = [
            _zeros(units, units) if heads == 1 else _zeros(heads, size, size) for _ in self.cell.matrices
        ]
        x = _zeros(len(self.cell.per_unit), 1, 1, units)
        state = [_zeros(1, units)] * len(self.cell.states)
        sensitivity = ExactSensitivity(self.cell.matrices, weights, len(state), 1)
        delta = _zeros(len(state), 1, units)

        def run() -> None:
            moved = self.cell.scan(x, weights, state)
            sensitivity.step_(self.cell.linearize(moved), 0, weights)
            sensitivity.read(delta)

        return _calls(run)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _calls(function: Callable[[], object]) -> Work:
    """The calls and views of `function`. Its bytes are left out, since they are those of a few units."""
    found = counted(function)
    return Work(calls=found.calls, views=found.views)


def _line(count: Callable[[int], Work]) -> Line:
    few, more = count(SHORT), count(LONG)
    each = (more + few * -1.0) * (1 / (LONG - SHORT))
    return Line(few + each * -SHORT, each)
