"""Linearized steps of a layer, joined along time without copying a step more than a few times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backend import operations
from ..cells.two_point import Cell, Linearization, Partials, Trajectory

TIME = -3  # the dimension of time in every array below


@dataclass(frozen=True)
class Block:
    """T steps in a row, linearized.

    lin      the cell's partials and the states before each step
    m        (S, S, T, B, N): each unit's transition M, which is zero at a reset
    inputs   (T, B, I), the layer's input, or None if no matrix reads it
    weights  the recurrent weights that the steps ran with, for rules that need the full Jacobian; `lin` then also holds
             own-state partials. None for the other rules, which need no more than M of these.

    `lin.resets` is None where no call of these steps was given any.
    """

    lin: Linearization
    m: Tensor
    inputs: Tensor | None
    weights: tuple[Tensor, ...] | None = None

    @property
    def steps(self) -> int:
        return self.lin.steps

    def tensors(self) -> list[Tensor]:
        """Every array that has a dimension of time, in a fixed order."""
        p = self.lin.partials
        arrays = [self.m, self.lin.before]
        arrays += [value for group in (p.own, p.gate, p.input) for by in group for value in by.values()]
        if self.lin.resets is not None:
            arrays.append(self.lin.resets[..., None])
        return arrays if self.inputs is None else [*arrays, self.inputs]

    def marked(self) -> Block:
        """The block with `lin.resets`, False where it has none, so that it can be joined to blocks that have them."""
        if self.lin.resets is not None:
            return self
        resets = torch.zeros(self.lin.before.shape[1:3], dtype=torch.bool, device=self.lin.before.device)
        return replace(self, lin=replace(self.lin, resets=resets))

    def without(self, steps: Tensor) -> Block:
        """The block with zeros for the steps and batch rows where `steps` (T, B) is True, as if they had not run."""
        made = self.map(lambda t: t.masked_fill(steps[..., None], 0))
        return replace(made, lin=replace(made.lin, resets=self.lin.resets))

    @property
    def nbytes(self) -> int:
        """Bytes of these arrays."""
        return sum(t.nbytes for t in self.tensors())

    def to_dict(self) -> dict[str, Any]:
        """The block as lists and tensors, for a checkpoint. The tensors are shared, not copied."""
        p = self.lin.partials
        keys = [[list(by) for by in group] for group in (p.own, p.gate, p.input)]
        has = [self.lin.resets is not None, self.inputs is not None]
        weights = None if self.weights is None else list(self.weights)
        return {"keys": keys, "has": has, "tensors": self.tensors(), "weights": weights}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Block:
        """The block that `to_dict` described."""
        given = iter(saved["tensors"])
        m, before = next(given), next(given)
        groups = [[{nu: next(given) for nu in by} for by in group] for group in saved["keys"]]
        has_resets, has_inputs = saved["has"]
        resets = next(given)[..., 0] if has_resets else None
        inputs = next(given) if has_inputs else None
        weights = None if saved["weights"] is None else tuple(saved["weights"])
        return cls(Linearization(Partials(*groups), before, resets), m, inputs, weights)

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        """A block of this structure whose arrays are `function` of this one's; the weights are the same."""
        saved = {**self.to_dict(), "tensors": [function(t) for t in self.tensors()]}
        return replace(self.from_dict(saved), weights=self.weights)

    def narrow(self, start: int, stop: int) -> Block:
        """Steps start … stop - 1, without copying."""
        return self.map(lambda t: t.narrow(TIME, start, stop - start))


def linearized(
    cell: Cell,
    trajectory: Trajectory,
    recurrent: Sequence[Tensor],
    inputs: Tensor | None,
    rule: str = "rfp",
    weights: tuple[Tensor, ...] | None = None,
    backend: str = "torch",
) -> Block:
    """Linearizes the steps of a trajectory. The block shares the trajectory's states; its other arrays are its own.

    recurrent: the weights that the steps ran with, or their diagonals (N,); they are not kept. inputs: (T, B, I) or
    None. rule: which parts of M are kept (`rfp.transition`). weights: as in `Block`. backend: of the linearization
    (`operations.linearize`).
    """
    lin, m = operations.linearize(cell, trajectory, recurrent, rule, backend=backend)
    return Block(lin if weights is not None else lin.without_own(), m, inputs, weights)


def recorded(
    cell: Cell,
    x: Tensor,
    recurrent: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None,
    inputs: Tensor | None,
    rule: str = "rfp",
    weights: tuple[Tensor, ...] | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Block]:
    """Runs steps and linearizes them: returns the state after each step (S, T, B, N), and the block.

    x: (J, T, B, N), the cell's per-unit inputs. state: (S, B, N), before the first step. resets: (T, B) bool or None.
    The other arguments are those of `linearized`. A backend that can run and linearize one step at once does so
    (`operations.step`).
    """
    if weights is None:
        after, lin, m = operations.step(cell, x, recurrent, state, resets, rule, backend=backend)
        return after, Block(lin, m, inputs)
    trajectory = operations.scan(cell, x, recurrent, state.unbind(0), resets, backend=backend)
    return trajectory.after, linearized(cell, trajectory, recurrent, inputs, rule, weights, backend)


def joined(blocks: Sequence[Block]) -> Block:
    """Blocks of one structure whose steps follow one another, and which ran with the first one's weights, as one."""
    run = _Run(blocks[0].weights)
    for block in blocks:
        run.append(block)
    return run.joined()


class Tape:
    """Steps in a row. Where blocks carry weights, a new run begins whenever the weights change."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    @property
    def steps(self) -> int:
        """How many steps are held."""
        return sum(run.steps for run in self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes held, including the unused part of the buffers, without the weights."""
        return sum(run.nbytes for run in self._runs)

    def append(self, steps: Block) -> None:
        """Append steps. Their arrays are not copied before the next call of `blocks` joins them to others."""
        if not self._runs or self._runs[-1].weights is not steps.weights:
            self._runs.append(_Run(steps.weights))
        self._runs[-1].append(steps)

    def take_back(self) -> int:
        """Drop what was appended last, before any other call, and return how many steps that was."""
        run = self._runs[-1]
        steps = run.take_back()
        if not run.steps:
            self._runs.pop()
        return steps

    def blocks(self, stop: int | None = None) -> list[Block]:
        """The first `stop` steps, or all, as one block for each run."""
        left = self.steps if stop is None else stop
        blocks = []
        for run in self._runs:
            if left <= 0:
                break
            block = run.joined()
            blocks.append(block if block.steps <= left else block.narrow(0, left))
            left -= block.steps
        return blocks

    def forget_(self, rows: Tensor) -> None:
        """Set all arrays to zero in the batch rows where `rows` (B,) is True, as if those steps had not run there."""
        for run in self._runs:
            run.forget_(rows)

    def drop_first(self, steps: int) -> None:
        """Drop the first `steps` steps and their memory; steps that remain in the same run are copied."""
        while self._runs and steps >= self._runs[0].steps:
            steps -= self._runs.pop(0).steps
        if steps:
            self._runs[0].drop_first(steps)


class _Run:
    """Steps with the same weights. Joining copies each step once, into a buffer that doubles when it is full."""

    def __init__(self, weights: tuple[Tensor, ...] | None) -> None:
        self.weights, self.steps = weights, 0
        self._buffer: Block | None = None
        self._filled = 0
        self._pending: list[Block] = []
        self._joined: Block | None = None  # what `joined` gave, until something changes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None}

    @property
    def nbytes(self) -> int:
        held = 0 if self._buffer is None else self._buffer.nbytes
        return held + sum(block.nbytes for block in self._pending)

    def append(self, steps: Block) -> None:
        self._pending.append(steps)
        self.steps += steps.steps
        self._joined = None

    def take_back(self) -> int:
        steps = self._pending.pop().steps
        self.steps -= steps
        self._joined = None
        return steps

    def joined(self) -> Block:
        """All steps as one block. There must be at least one step."""
        if self._joined is None:
            if self._pending and (self._filled or len(self._pending) > 1):
                self._flush()
            if self._filled:
                assert self._buffer is not None
                self._joined = self._buffer.narrow(0, self._filled)
            else:
                self._joined = self._pending[0]
        return self._joined

    def _flush(self) -> None:
        self._joined = None
        total = self.steps
        joined = self._pending if self._buffer is None else [self._buffer, *self._pending]
        if any(block.lin.resets is not None for block in joined):
            self._pending = [block.marked() for block in self._pending]
            self._buffer = None if self._buffer is None else self._buffer.marked()
        if self._buffer is None or total > self._buffer.steps:
            size = max(total, 2 * self._filled)
            new = self._pending[0].map(lambda t: _empty_of_steps(t, size))
            if self._buffer is not None:
                for target, source in zip(new.tensors(), self._buffer.tensors(), strict=True):
                    target.narrow(TIME, 0, self._filled).copy_(source.narrow(TIME, 0, self._filled))
            self._buffer = new
        filled = self._filled  # which becomes true at once: a copy that fails leaves the steps pending
        for block in self._pending:
            for target, source in zip(self._buffer.tensors(), block.tensors(), strict=True):
                target.narrow(TIME, filled, block.steps).copy_(source)
            filled += block.steps
        self._filled, self._pending = filled, []

    def forget_(self, rows: Tensor) -> None:
        self._flush()
        assert self._buffer is not None
        for array in self._buffer.tensors():
            array.narrow(TIME, 0, self._filled).masked_fill_(rows[:, None], 0)

    def drop_first(self, steps: int) -> None:
        rest = self.joined().narrow(steps, self.steps).map(Tensor.clone)
        self._buffer, self._filled, self._pending, self._joined = None, 0, [rest], rest
        self.steps = rest.steps


def _empty_of_steps(like: Tensor, steps: int) -> Tensor:
    """An uninitialized tensor of the shape of `like`, but for `steps` steps."""
    shape = list(like.shape)
    shape[TIME] = steps
    return torch.empty(shape, dtype=like.dtype, device=like.device)
