"""A stack of recurrent layers, each reading the output of the one below: on sequences and online."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import _checks as check
from ..layers.layer import State, TwoPointRNN
from ..rules.exactness import Exactness
from .learner import OnlineLearner
from .options import refuse_hooks
from .rows import ChangeRows, adding, keeping


class Stack(nn.Module):
    """Recurrent layers, each of which reads the output of the one below at the same step.

    layers: the bottom one first. Each must take as many features as the one below has units, and all must have the same
    batch_first. They are `stack[0]`, `stack[1]`, …; each keeps its own `learning`.

    Raises TypeError or ValueError for layers that don't fit together.
    """

    def __init__(self, *layers: TwoPointRNN) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must be at least one recurrent layer, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, TwoPointRNN):
                raise TypeError(
                    f"layers[{i}] must be a recurrent layer such as RGC, got {type(layer).__name__}"
                )
        for i, (below, above) in enumerate(itertools.pairwise(layers), start=1):
            if above.fan_in != below.hidden_size:
                raise ValueError(
                    f"layers[{i}] must take the {below.hidden_size} units of the layer below, "
                    f"got {above.fan_in} features"
                )
            if above.batch_first != below.batch_first:
                raise ValueError(
                    f"layers[{i}] must have batch_first={below.batch_first} as the layer below has"
                )
        self.layers = nn.ModuleList(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> TwoPointRNN:
        layer = self.layers[index]
        assert isinstance(layer, TwoPointRNN)
        return layer

    def forward(
        self, x: Tensor, state: Sequence[State] | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Run over a sequence. x, resets and the output, the top layer's, are as in `TwoPointRNN.forward`.

        state: one for each layer, or None for zeros. Returns the output and the last states, one for each layer. In the
        backward pass each layer's rule finds the gradients of its weights and its input from the credit that the layer
        above passes down to each step. Raises ValueError for a wrong number of states.
        """
        given = [None] * len(self) if state is None else list(state)
        if len(given) != len(self):
            raise ValueError(f"state must have one entry a layer, {len(self)}, got {len(given)}")
        last = []
        for layer, start in zip(self.layers, given, strict=True):
            x, end = layer(x, start, resets)
            last.append(end)
        return x, tuple(last)


class StackLearner(nn.Module):
    """Runs a stack on a stream. Each layer has an `OnlineLearner` of its own, and so sensitivities of its own.

    The gradient of a loss at step t passes down through the layers within that step (paper, Section 4.1), and meets in
    each layer the sensitivities that the layer carries of its own past. A lower layer's effect at an earlier step on
    the state of a layer above, and through it on this loss, is left out. So a stack is not exact even where every layer
    alone is. Within one chunk() call, the credit that a layer passes down to a step includes its later steps there.

    Like an `OnlineLearner` it is a torch.nn.Module whose `forward` is `step`: the layers are submodules, below
    `learners`, and their states and sensitivities buffers; `.to()`, copy.deepcopy, pickle and `eval()` do what they do
    there, for all layers or none.

    Args:
        stack: the layers.
        batch_size: B, the number of streams that run side by side.
        options: of the `OnlineLearner` of every layer.
        each: one dict for each layer, of options for that layer alone, which override `options`; or None.

    Raises TypeError or ValueError as `OnlineLearner` does, for a `stack` that is none or has hooks, and for a wrong
    number of dicts.
    """

    def __init__(
        self, stack: Stack, batch_size: int, *, each: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> None:
        if not isinstance(stack, Stack):
            raise TypeError(f"stack must be a Stack, got {type(stack).__name__}")
        refuse_hooks(stack, "stack", "a StackLearner")
        own = [{} for _ in range(len(stack))] if each is None else list(each)
        if len(own) != len(stack):
            raise ValueError(f"each must have one dict a layer, {len(stack)}, got {len(own)}")
        made = [OnlineLearner(stack[i], batch_size, **{**options, **mine}) for i, mine in enumerate(own)]
        super().__init__()
        self.training = stack.training
        self._modules["learners"] = nn.ModuleList(made)
        self._stack = (stack,)  # in a tuple: as a submodule, its layers would be there twice

    @property
    def learners(self) -> list[OnlineLearner]:
        """Each layer's learner, the bottom one first."""
        return list(self._modules["learners"])  # type: ignore[call-overload]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """As of an `OnlineLearner`."""
        return [
            f"learners.{i}.{name}"
            for i, learner in enumerate(self.learners)
            for name in learner._ddp_params_and_buffers_to_ignore
        ]

    @property
    def batch_size(self) -> int:
        """B, the number of streams that run side by side."""
        return self.learners[0].batch_size

    def __copy__(self) -> StackLearner:
        """Raises TypeError: two learners can't share what they carry."""
        raise TypeError("copy.copy of a StackLearner would share what it has learned: use copy.deepcopy")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackLearner:
        """As in `OnlineLearner`. Raises TypeError or ValueError, with nothing changed, where a layer can't go."""
        for learner in self.learners:
            learner.refuse_move(fn)
        super()._apply(fn, recurse)
        return self

    def _refuse_hooks(self) -> None:
        """Raise ValueError if the stack has got hooks."""
        refuse_hooks(*self._stack, "stack", "a StackLearner")

    def step(self, x: Tensor, active: Any = None) -> Tensor:
        """Advance all layers one step, as `OnlineLearner.step` does. x (B, F) → the top layer's output (B, N).

        active: as there; in the rows that take no step, no layer does.
        """
        self._refuse_hooks()
        for learner in self.learners:
            x = learner.step(x) if active is None else learner.step(x, active)
        return x

    def forward(self, x: Tensor, active: Any = None) -> Tensor:
        """As `step`."""
        return self.step(x, active)

    def peek(self, x: Tensor) -> Tensor:
        """The output (B, N) that step(x) would give, as `OnlineLearner.peek`: nothing is mutated."""
        self._refuse_hooks()
        for learner in self.learners:
            x = learner.peek(x)
        return x

    def end_chunk(self) -> None:
        """End the steps between two updates before their time, as `OnlineLearner.end_chunk` does."""
        for learner in self.learners:
            learner.end_chunk()

    def add_rows(self, count: int = 1) -> None:
        """Append `count` batch rows in all layers, as `OnlineLearner.add_rows` does in one; raises as it does."""
        check.integer("count", count, 1)
        self._change_rows(self.batch_size + count, adding(count))

    def remove_rows(self, mask: Any) -> None:
        """Take batch rows away in all layers, as `OnlineLearner.remove_rows` does in one; raises as it does."""
        rows = self.learners[0].kept_rows(mask)
        self._change_rows(len(rows), keeping(rows))

    def _change_rows(self, batch_size: int, change: ChangeRows) -> None:
        for finish in [learner.prepare_rows(batch_size, change) for learner in self.learners]:
            finish()

    def chunk(self, x: Tensor, resets: Tensor | None = None, active: Any = None) -> Tensor:
        """Advance all layers C steps, as `OnlineLearner.chunk` does. x (C, B, F) → the top layer's output (C, B, N)."""
        self._refuse_hooks()
        for learner in self.learners:
            x = learner.chunk(x, resets, active)
        return x

    def reset(self, mask: Any = None) -> None:
        """Start a new episode in all layers, as `OnlineLearner.reset` does in one."""
        for learner in self.learners:
            learner.reset(mask)

    @property
    def state(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each layer's states now, detached.

        They can be set, to one entry a layer, each as `OnlineLearner.state` takes it and with its effect. Raises
        TypeError or ValueError, with nothing changed, for a state that doesn't fit.
        """
        return tuple(learner.state for learner in self.learners)

    @state.setter
    def state(self, state: Sequence[State]) -> None:
        if not isinstance(state, (tuple, list)):
            raise TypeError(f"state must be a tuple with one entry a layer, got {type(state).__name__}")
        if len(state) != len(self.learners):
            raise ValueError(f"state must have one entry a layer, {len(self.learners)}, got {len(state)}")
        joined = [learner.joined_state(of) for learner, of in zip(self.learners, state, strict=True)]
        for learner, of in zip(self.learners, joined, strict=True):
            learner.go_on_from(of)

    @property
    def nbytes(self) -> int:
        """Bytes of learning state now, of all layers together."""
        return sum(learner.nbytes for learner in self.learners)

    def exactness(self) -> Exactness:
        """Whether the gradient is exact, which needs a single layer whose gradient is; else what is left out."""
        of_layers = [learner.exactness() for learner in self.learners]
        if len(of_layers) == 1:
            return of_layers[0]
        parts = [f"layer {i}: {each}" for i, each in enumerate(of_layers)]
        between = "a layer's effect at earlier steps on the one above is left out"
        return Exactness(False, "; ".join([between, *parts]))

    def explain(self) -> None:
        """Print which form each layer's learner runs, and why."""
        for learner in self.learners:
            learner.explain()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All that a resumed learner needs: `OnlineLearner.state_dict` of each layer.

        The arguments are for a module that holds the learner, whose state_dict() has the layers' parameters too.
        """
        if args or kwargs:
            return super().state_dict(*args, **kwargs)
        return {f"layer {i}": learner.state_dict() for i, learner in enumerate(self.learners)}

    def load_state_dict(  # type: ignore[override]
        self, state: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Continue where the learner that made `state` was.

        Raises TypeError or ValueError, with nothing changed, if `state` is of another stack or of other options. A
        state with the layers' parameters, as a module that holds the learner has it, is loaded as torch.nn.Module loads
        it; the arguments are torch's.
        """
        if isinstance(state, Mapping) and "learners.0._extra_state" in state:
            return super().load_state_dict(state, *args, **kwargs)
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict from state_dict(), got {type(state).__name__}")
        wanted = [f"layer {i}" for i in range(len(self.learners))]
        if set(state) != set(wanted):
            raise ValueError(f"state must have the keys {wanted}, got {sorted(map(str, state))}")
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.refuse_foreign(state[name])
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.load_state_dict(state[name])
        return None
