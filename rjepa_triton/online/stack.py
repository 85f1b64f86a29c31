"""Several recurrent layers, one above the other, on sequences and online."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.layer import State, TwoPointRNN
from ..rules.exactness import Exactness
from .learner import OnlineLearner


class Stack(nn.Module):
    """Recurrent layers, each reading the output of the one below at the same step.

    layers: bottom first; each takes as many features as the one below has units, and all or none batch_first.
    They are `stack[0]`, `stack[1]`, …; each keeps its own `learning`.

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
        """Run over a sequence: x, resets and the output as in `TwoPointRNN.forward`, of the top layer.

        state: one a layer, or None. Returns the output and the last states, one a layer. Each layer's rule gives
        the gradient of its weights and its input from the credit that the layer above passes down to each step.
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
    """Runs a stack on a stream; each layer has an `OnlineLearner` of its own, and so sensitivities of its own.

    A loss at step t passes down through the layers within that step (paper, Section 4.1), and meets in each layer
    what that layer carries forward of its own past. What a lower layer did at an earlier step to an upper layer's
    state, and through it to this loss, is left out: so even where every layer alone is exact, a stack is not. Within
    one chunk() call, credit that the layer above passes down to each step counts its later steps in that call too.

    Args:
        stack: the layers.
        batch_size: B.
        options: of each layer's `OnlineLearner`; those of one layer alone go to that layer's entry of `each`.
        each: one dict of options a layer, which take precedence; None: no layer has any of its own.
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
        """Advance all layers one step. x (B, F) → the top layer's output (B, N). As `OnlineLearner.step`."""
        for learner in self.learners:
            x = learner.step(x)
        return x

    def chunk(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """Advance all layers C steps. x (C, B, F) → the top layer's outputs (C, B, N). As `OnlineLearner.chunk`."""
        for learner in self.learners:
            x = learner.chunk(x, resets)
        return x

    def reset(self, mask: Tensor | None = None) -> None:
        """Start a new episode in all layers. As `OnlineLearner.reset`."""
        for learner in self.learners:
            learner.reset(mask)

    @property
    def state(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each layer's states now, detached."""
        return tuple(learner.state for learner in self.learners)

    @property
    def nbytes(self) -> int:
        """Bytes of learning state now, of all layers."""
        return sum(learner.nbytes for learner in self.learners)

    def exactness(self) -> Exactness:
        """Exact for one layer that is; else what is left out."""
        of_layers = [learner.exactness() for learner in self.learners]
        if len(of_layers) == 1:
            return of_layers[0]
        parts = [f"layer {i}: {each}" for i, each in enumerate(of_layers)]
        between = "what a layer did to the one above at earlier steps is left out"
        return Exactness(False, "; ".join([between, *parts]))

    def explain(self) -> None:
        """Print what each layer's learner runs and why."""
        for learner in self.learners:
            learner.explain()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed learner needs, by layer. As `OnlineLearner.state_dict`."""
        return {f"layer {i}": learner.state_dict() for i, learner in enumerate(self.learners)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where the learner that made `state` was.

        Raises TypeError or ValueError, with nothing changed, if it is of another stack or other options.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict from state_dict(), got {type(state).__name__}")
        wanted = [f"layer {i}" for i in range(len(self.learners))]
        if sorted(state) != sorted(wanted):
            raise ValueError(f"state must have the keys {wanted}, got {sorted(map(str, state))}")
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.refuse_foreign(state[name])
        for name, learner in zip(wanted, self.learners, strict=True):
            learner.load_state_dict(state[name])
