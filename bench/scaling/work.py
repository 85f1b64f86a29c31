"""Count the work of a case as plain torch executes it: FLOP and bytes a time step.

Time depends on the machine: on its caches, and on what a call costs. Work doesn't, so its power of N is known exactly.
The case runs with backend "torch" on meta tensors, which have shapes and no storage, and every operator that it calls
is counted. So also that is counted which no machine could hold. Compiled code does the same arithmetic and moves fewer
bytes, since it makes one operator of several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .case import Case
from .problem import Problem, Size

_ATEN = torch.ops.aten
# Operators that touch no number, those that write without reading, and those that move numbers without arithmetic.
_FREE = {
    *(_ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default, _ATEN.detach.default),
    *(_ATEN.new_empty.default, _ATEN.new_empty_strided.default, _ATEN._unsafe_view.default),
}
_FILLS = {
    *(_ATEN.zero_.default, _ATEN.fill_.Scalar, _ATEN.zeros.default, _ATEN.zeros_like.default),
    *(_ATEN.new_zeros.default, _ATEN.ones.default, _ATEN.ones_like.default),
}
_MOVES = {_ATEN.copy_.default, _ATEN.clone.default, _ATEN.cat.default, _ATEN.stack.default, *_FILLS}


@dataclass(frozen=True)
class Work:
    """What a time step takes.

    flop    2·m·k·n for each matrix product; for any other operator one for each number that it reads or writes, of the
            array that has most. A tanh counts as one.
    bytes   of all numbers that operators read and write. What is read twice counts twice, and a view is free.
    """

    flop: float
    bytes: float


class Counter(TorchDispatchMode):
    """Adds up FLOP and bytes of the operators that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.bytes = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func in _FREE or func.namespace == "prim":
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _FILLS:
            read = []
        elif func is _ATEN.copy_.default:
            read = read[1:]
        moved = [*read, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
        self.bytes += sum(_numbers(tensor) * tensor.element_size() for tensor in moved)
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif func not in _MOVES:
            self.flop += max((tensor.numel() for tensor in moved), default=0)
        return out


def _numbers(tensor: Tensor) -> int:
    """How many numbers a tensor shows. One that it repeats, with a stride of zero, counts once."""
    return math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size
    )


# A whole sequence is counted over so many steps, and continued as a straight line, which its counts lie on.
_SHORT = (2, 4)


def count(case: type[Case], size: Size) -> Work | None:
    """The work of one time step of a case, in its second run: what only the first one does isn't counted.

    None for a case that can't be counted so (`Case.countable`).
    """
    if not case.countable:
        return None
    made = case(_problem(size, size.steps))
    if made.covers < size.steps or size.steps <= max(_SHORT):
        return _counted(made)
    less, more = _SHORT
    first, second = (_counted(case(_problem(size, steps))) for steps in _SHORT)

    def continued(a: float, b: float) -> float:
        slope = (more * b - less * a) / (more - less)
        return slope + less * (a - slope) / size.steps

    return Work(continued(first.flop, second.flop), continued(first.bytes, second.bytes))


def _problem(size: Size, steps: int) -> Problem:
    """A problem that has shapes alone."""
    dtype = {4: torch.float32, 8: torch.float64}[size.itemsize]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, n = size.batch, size.units
    return Problem(
        x=empty(steps, batch, n),
        delta=empty(steps, batch, n),
        state=(empty(batch, n), empty(batch, n)),
        weights=[empty(n, n) for _ in range(4)],
        chunk=min(size.chunk, steps),
        backend="torch",
    )


def _counted(made: Case) -> Work:
    made.run()
    with Counter() as counter:
        made.run()
    return Work(counter.flop / made.covers, counter.bytes / made.covers)
