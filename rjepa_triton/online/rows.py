"""Batch rows that come and go while a learner runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .compiled import refuse_while_compiling
from .cuda_graph import GraphedStep
from .module import LearnerModule
from .options import FormChoice, Options
from .past import Past

# Makes a tensor of other batch rows, which lie in the dimension that is given: (tensor, dimension) → tensor.
ChangeRows = Callable[[Tensor, int], Tensor]


def adding(count: int) -> ChangeRows:
    """Appends `count` rows of zeros."""

    def change(tensor: Tensor, dim: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = count
        return torch.cat([tensor, tensor.new_zeros(shape)], dim)

    return change


def keeping(rows: Tensor) -> ChangeRows:
    """Keeps the rows (B',) in this order."""
    return lambda tensor, dim: tensor.index_select(dim, rows)


class LearnerRows(LearnerModule):
    """The part of `OnlineLearner` that changes its batch size B."""

    batch_size: int
    carried_bytes: int
    update_every: int
    _choice: FormChoice
    _forget: Tensor | None
    _forget_all: bool
    _graph: GraphedStep | None
    _input: Tensor | None
    _options: Options
    _past: Past
    _position: int

    def add_rows(self, count: int = 1) -> None:
        """Append `count` batch rows, each as a new learner of one row begins: of zero state, without a past.

        The other rows keep their state, their sensitivities and their numbers. Mutates the learner: `batch_size`, and
        its buffers, which are replaced. A backward() of the steps before still works, and until their outputs are
        dropped they keep the memory of what was carried then. The form stays the one that the learner was made with.

        Raises TypeError or ValueError, with nothing changed, for count; in the middle of the `update_every` steps
        between two updates (`end_chunk`); with cuda_graph=True; and for sensitivities that don't fit in memory.
        """
        check.integer("count", count, 1)
        self.prepare_rows(self.batch_size + count, adding(count))()

    def remove_rows(self, mask: Any) -> None:
        """Take away the batch rows where mask (B,) is True; the others close up, and keep state and sensitivities.

        mask: as of `reset`. It waits for the device, since the batch size becomes another. Mutates the learner, and
        serves a backward() of the steps before, as `add_rows` does. Raises TypeError or ValueError, with nothing
        changed, for mask, which must leave at least one row, and as `add_rows` does.
        """
        rows = self.kept_rows(mask)
        self.prepare_rows(len(rows), keeping(rows))()

    def kept_rows(self, mask: Any) -> Tensor:
        """The numbers of the rows that `remove_rows` keeps. Raises TypeError or ValueError for mask."""
        rows = (~self._flags("mask", mask)).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(f"mask must leave at least one batch row, got True in all {self.batch_size}")
        return rows

    @abstractmethod
    def _refuse_sharded(self, what: str, instead: str) -> None:
        """Raise ValueError if the learner has a mesh."""

    @abstractmethod
    def _renew_past(self, past: dict[str, Any]) -> None:
        """Go on with another past, of the sizes that the options have now, and what `Past.state_dict` gave."""

    def _flags(self, name: str, mask: Any, shape: tuple[int, ...] | None = None) -> Tensor:
        """A mask as a bool tensor of a shape, (B,) if None. Raises TypeError or ValueError for another."""
        if not isinstance(mask, Tensor) and hasattr(mask, "__array_interface__"):
            if mask.dtype.kind not in "biuf":
                raise TypeError(f"{name} must hold bools or numbers, got a numpy array of {mask.dtype}")
            mask = torch.as_tensor(mask, device=self._state.device)
        if check.tensor(name, mask).is_complex():
            raise TypeError(f"{name} must hold bools or real numbers, got {mask.dtype}")
        flags = mask if mask.dtype == torch.bool else mask != 0
        return check.mask(name, flags, shape or (self.batch_size,), self._state.device)

    def prepare_rows(self, batch_size: int, change: ChangeRows) -> Callable[[], None]:
        """What changes the batch rows once it is called; until then nothing is. Raises as `add_rows` does."""
        refuse_while_compiling("changing batch rows", "do it outside of the compiled function")
        self._refuse_sharded(
            "changing batch rows", "make a learner of other batch_size of the layer as it was"
        )
        if self._graph is not None:
            raise ValueError(
                "an OnlineLearner with cuda_graph=True can't change its batch rows, since its graphs read fixed "
                "memory: make it without cuda_graph, or make a new one"
            )
        if self._position:
            raise ValueError(
                f"batch rows can't change after step {self._position} of update_every={self.update_every}: change them "
                "after the last, or call end_chunk() first"
            )
        options = replace(self._options, batch_size=batch_size)
        choice = self._choice.of_rows(self.layer, options)

        def finish() -> None:
            past, sensitivity = self._past.state_dict(), self._past.sensitivity
            past["gamma"] = [] if sensitivity is None else sensitivity.with_rows(change)
            for block in past["window"]:
                block["tensors"] = [change(tensor, tensor.dim() - 2) for tensor in block["tensors"]]
            self.batch_size, self._options, self._choice = batch_size, options, choice
            self.carried_bytes = choice.carried_bytes
            self._state = change(self._state, 1)
            if self._input is not None:
                self._input = change(self._input, 0)
            if self._forget is not None:
                self._forget = change(self._forget, 0) | self._forget_all
            self._renew_past(past)

        return finish
