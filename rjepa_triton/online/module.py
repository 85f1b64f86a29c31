"""What makes a learner a torch.nn.Module: its attributes, its moves between devices and dtypes, and its checkpoints.

A learner changes some of its attributes at every step. torch.nn.Module looks a name up in several dictionaries, which
takes longer than the rest of the attribute's use; so these names are read and written directly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.layer import TwoPointRNN

# What a step writes.
_WRITTEN = frozenset(
    {"_chunk_weights", "_forget", "_forget_all", "_input", "_port", "_position", "_versions", "_within"}
)
_EXTRA = "_extra_state"  # torch.nn.Module's name for what get_extra_state() gave


class LearnerModule(nn.Module):
    """The module part of `OnlineLearner`.

    The layer is its one submodule. The states (S, B, N) and the sensitivities are its buffers. `state_dict()` of the
    learner itself is that of `checkpoint`; within the state_dict of a module that holds the learner, the same stands
    under one key, beside the layer's parameters.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_state":
            self._buffers[name] = value  # as the property's setter, which it spares a call
        elif name in _WRITTEN:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def layer(self) -> TwoPointRNN:
        """The layer that learns."""
        return self._modules["layer"]  # type: ignore[return-value]

    @property
    def _state(self) -> Tensor:
        """The layer's states now, (S, B, N)."""
        return self._buffers["_state"]  # type: ignore[return-value]

    @_state.setter
    def _state(self, state: Tensor) -> None:
        self._buffers["_state"] = state

    def _register(self, state: Tensor, sensitivities: list[Tensor]) -> None:
        """Make the states and what is carried the module's buffers. The latter change in place, so they stay these."""
        for name in [name for name in self._buffers if name.startswith("gamma_")]:
            del self._buffers[name]
        for name, tensor in [("_state", state), *((f"gamma_{i}", t) for i, t in enumerate(sensitivities))]:
            self._buffers[name] = tensor
            self._non_persistent_buffers_set.add(name)  # checkpoints have them by get_extra_state

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What a DistributedDataParallel of this learner leaves alone: all of it is of this process's batch rows."""
        return list(self._buffers)

    @abstractmethod
    def step(self, x: Tensor, active: Any = None) -> Tensor:
        """Advance one step."""

    def forward(self, x: Tensor, active: Any = None) -> Tensor:
        """As `step`."""
        return self.step(x, active)

    @abstractmethod
    def _checkpoint(self) -> dict[str, Any]:
        """The learner's own state (`checkpoint`)."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Continue from what `_checkpoint` gave."""

    def get_extra_state(self) -> dict[str, Any]:
        """What the state_dict of a module that holds this learner has of it."""
        return self._checkpoint()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what `get_extra_state` gave."""
        self._restore(state)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All that a resumed learner needs, as tensors, numbers, strings and lists; tensors are shared, not copied.

        With a mesh it settles first (`OnlineLearner.settle`), and Γ is in it as DTensors, of which a rank holds its
        rows (`online.elastic`).

        Autograd's graphs are not kept: the resumed learner can't serve the backward() of a step that ran before. The
        layer's parameters are not in it; the arguments are for a module that holds the learner, whose state_dict() has
        the layer's parameters and, under one key, this.
        """
        return super().state_dict(*args, **kwargs) if args or kwargs else self._checkpoint()

    def load_state_dict(  # type: ignore[override]
        self, state: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Continue where the learner that made `state` was.

        The whole state is checked first (`checkpoint`). Raises TypeError or ValueError, with nothing changed, if it is
        damaged, or of another form, rule, rounding, batch size or layer, or of another `update_every` in the middle of
        these steps; with a mesh, if it has steps that aren't folded (`OnlineLearner.settle`), or rows of other ranks.
        States of version 0.1 load. A state with the layer's parameters, as a module that holds the learner
        has it, is loaded as torch.nn.Module loads it; the arguments are torch's.
        """
        if isinstance(state, Mapping) and _EXTRA in state:
            return super().load_state_dict(state, *args, **kwargs)
        self._restore(state)  # type: ignore[arg-type]
        return None

    @abstractmethod
    def _refuse_move(self, probe: Tensor) -> None:
        """Raise, with nothing changed, if the learner can't run with a tensor's dtype and on its device."""

    @abstractmethod
    def _moved(self, move: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """What remakes the learner once its layer has moved."""

    def refuse_move(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether `fn`, as `_apply` takes it, moves the learner. Raises as that does."""
        probe = fn(self._state.new_zeros(1))
        if probe.dtype == self._state.dtype and probe.device == self._state.device:
            return False
        self._refuse_move(probe)
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnerModule:
        """As torch.nn.Module's `to`, `float`, `double`, `cuda` and the like ask for.

        Raises TypeError or ValueError, with nothing changed, for a dtype or device on which the learner can't run. The
        backward() of a step that ran before comes too late.
        """
        finish = self._moved(fn) if self.refuse_move(fn) else None
        with torch.no_grad():
            super()._apply(fn, recurse)
            if finish is not None:
                finish()
        return self
