"""A stack of recurrent layers, each reading the output of the one below: on sequences and online."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.layer import State, TwoPointRNN
from ..rules.exactness import Exactness
from .learner import OnlineLearner


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


class StackLearner:
    """Runs a stack on a stream. Each layer has an `OnlineLearner` of its own, and so sensitivities of its own.

    The gradient of a loss at step t passes down through the layers within that step (paper, Section 4.1), and meets in
    each layer the sensitivities that the layer carries of its own past. A lower layer's effect at an earlier step on
    the state of a layer above, and through it on this loss, is left out. So a stack is not exact even where every layer
    alone is. Within one chunk() call, the credit that a layer passes down to a step includes its later steps there.

    Args:
        stack: the layers.
        batch_size: B, the number of streams that run side by side.
        options: of the `OnlineLearner` of every layer.
        each: one dict for each layer, of options for that layer alone, which override `options`; or None.

    Raises TypeError or ValueError as `OnlineLearner` does, for a `stack` that is none, and for a wrong number of dicts.
    """

    def __init__(
        self, stack: Stack, batch_size: int, *, each: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> None:
        if not isinstance(stack, Stack):
            raise TypeError(f"stack must be a Stack, got {type(stack).__name__}")
        own = [{} for _ in range(len(stack))] if each is None else list(each)
        if len(own) != len(stack):
            raise ValueError(f"each must have one dict a layer, {len(stack)}, got {len(own)}")
        self.learners = [
            OnlineLearner(stack[i], batch_size, **{**options, **mine}) for i, mine in enumerate(own)
        ]

    def step(self, x: Tensor) -> Tensor:
        """Advance all layers one step, as `OnlineLearner.step` does. x (B, F) → the top layer's output (B, N)."""
        for learner in self.learners:
            x = learner.step(x)
        return x

    def chunk(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """Advance all layers C steps, as `OnlineLearner.chunk` does. x (C, B, F) → the top layer's output (C, B, N)."""
        for learner in self.learners:
            x = learner.chunk(x, resets)
        return x

    def reset(self, mask: Tensor | None = None) -> None:
        """Start a new episode in all layers, as `OnlineLearner.reset` does in one."""
        for learner in self.learners:
            learner.reset(mask)

    @property
    def state(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each layer's states now, detached."""
        return tuple(learner.state for learner in self.learners)

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

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed learner needs: `OnlineLearner.state_dict` of each layer."""
        return {f"layer {i}": learner.state_dict() for i, learner in enumerate(self.learners)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the learner that made `state` was.

        Raises TypeError or ValueError, with nothing changed, if `state` is of another stack or of other options.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict from state_dict(), got {type(state).__name__}")
        wanted = [f"layer {i}" for i in range(len(self.learners))]
        if set(state) != set(wanted):
            raise ValueError(f"state must have the keys {wanted}, got {sorted(map(str, state))}")
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.refuse_foreign(state[name])
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.load_state_dict(state[name])
