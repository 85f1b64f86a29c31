"""Recorded steps: linearised when needed, joined along time without copying a step more than a few times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cells import Cell, Linearization, Partials, Trajectory
from .reference import rfp

TIME = -3  # of every array below


@dataclass(frozen=True)
class Block:
    """Steps in a row: gate and input partials, transitions M (S, S, T, B, N), and inputs (T, B, I) or None.

    M is zero at a reset, so `lin.resets` is not kept.
    """

    lin: Linearization
    m: Tensor
    inputs: Tensor | None

    @property
    def steps(self) -> int:
        return self.lin.steps

    def tensors(self) -> list[Tensor]:
        """Every array, in a fixed order."""
        p = self.lin.partials
        arrays = [self.m, self.lin.before]
        arrays += [value for group in (p.own, p.gate, p.input) for by in group for value in by.values()]
        return arrays if self.inputs is None else [*arrays, self.inputs]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def to_dict(self) -> dict[str, Any]:
        """The block as lists and tensors, for a checkpoint."""
        p = self.lin.partials
        keys = [[list(by) for by in group] for group in (p.own, p.gate, p.input)]
        return {"keys": keys, "tensors": self.tensors()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Block:
        """The block that `to_dict` wrote."""
        given = iter(saved["tensors"])
        m, before = next(given), next(given)
        groups = [[{nu: next(given) for nu in by} for by in group] for group in saved["keys"]]
        return cls(Linearization(Partials(*groups), before), m, next(given, None))

    def replaced(self, arrays: list[Tensor]) -> Block:
        """A block of this structure with other arrays, in the order of `tensors`."""
        return self.from_dict({**self.to_dict(), "tensors": arrays})

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        return self.replaced([function(t) for t in self.tensors()])

    def narrow(self, start: int, stop: int) -> Block:
        """Steps start … stop - 1, without copying."""
        return self.map(lambda t: t.narrow(TIME, start, stop - start))


class Recorded:
    """Steps as they were run, linearised when that is first asked for.

    diagonals: of the recurrent weights at that time, (N,) each; inputs (T, B, I) or None. Owns its arrays.
    """

    def __init__(
        self, cell: Cell, trajectory: Trajectory, diagonals: Sequence[Tensor], inputs: Tensor | None
    ) -> None:
        self.cell, self.trajectory, self.diagonals, self.inputs = cell, trajectory, diagonals, inputs

    @property
    def steps(self) -> int:
        return self.trajectory.states.shape[1] - 1

    @functools.cached_property
    def block(self) -> Block:
        lin = self.cell.linearize(self.trajectory)
        m = rfp.transition(lin, self.cell.matrices, self.diagonals)
        # M is all that is needed of the own-state path
        kept = Partials((), lin.partials.gate, lin.partials.input)
        return Block(Linearization(kept, lin.before), m, self.inputs)

    @property
    def nbytes(self) -> int:
        return self.block.nbytes


class Tape:
    """A run of recorded steps. Joining copies each step once, into a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self._buffer: Block | None = None
        self._filled = 0
        self._pending: list[Block | Recorded] = []

    @property
    def steps(self) -> int:
        return self._filled + sum(block.steps for block in self._pending)

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room in the buffer among them."""
        held = 0 if self._buffer is None else self._buffer.nbytes
        return held + sum(block.nbytes for block in self._pending)

    def append(self, steps: Block | Recorded) -> None:
        self._pending.append(steps)

    def joined(self) -> Block | None:
        """All steps as one block, or None if there are none."""
        if self._pending and (self._filled or len(self._pending) > 1):
            self._flush()
        if self._filled:
            assert self._buffer is not None
            return self._buffer.narrow(0, self._filled)
        return _block(self._pending[0]) if self._pending else None

    def _flush(self) -> None:
        total = self.steps
        if self._buffer is None or total > self._buffer.steps:
            room = max(total, 2 * self._filled)
            new = _block(self._pending[0]).map(lambda t: _resized(t, room))
            if self._buffer is not None:
                for target, source in zip(new.tensors(), self._buffer.tensors(), strict=True):
                    target.narrow(TIME, 0, self._filled).copy_(source.narrow(TIME, 0, self._filled))
            self._buffer = new
        for block in map(_block, self._pending):
            for target, source in zip(self._buffer.tensors(), block.tensors(), strict=True):
                target.narrow(TIME, self._filled, block.steps).copy_(source)
            self._filled += block.steps
        self._pending = []

    def drop_first(self, steps: int) -> None:
        """Forget the first `steps` steps; the memory they took is kept only if others remain."""
        left = self.steps - steps
        rest = None
        if left:
            block = self.joined()
            assert block is not None
            rest = block.narrow(steps, steps + left).map(Tensor.clone)
        self._buffer, self._filled = None, 0
        self._pending = [] if rest is None else [rest]


def _block(steps: Block | Recorded) -> Block:
    return steps.block if isinstance(steps, Recorded) else steps


def _resized(like: Tensor, steps: int) -> Tensor:
    shape = list(like.shape)
    shape[TIME] = steps
    return torch.empty(shape, dtype=like.dtype, device=like.device)
