"""The autograd node of one call of a learner's step() or chunk(), and what its backward pass needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._autograd import once_differentiable
from ..backend.descent import Descent
from ..layers.layer import TwoPointRNN
from .past import Past, Record
from .sharded import Shard


@dataclass(frozen=True)
class PendingBackward:
    """The backward pass of one call: the layer, the learner's past, the steps that the call ran, and `lr` or None.

    weights: those that the steps ran with, for their shapes: a parametrization would draw others by now.
    shard: the layer's rows that this rank owns, or None: all.
    """

    layer: TwoPointRNN
    past: Past
    record: Record
    weights: Sequence[Tensor]
    lr: Tensor | None = None
    shard: Shard | None = None

    def gradients(
        self,
        grads: Sequence[Tensor | None],
        later_credit: Tensor | None,
        input_weights: Sequence[Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Gradients of the layer's input (C, B, F), of the credit port before (S, B, N), and of the weights.

        grads: of the cell's outputs, (C, B, N) or None each. later_credit (S, B, N) or None: from the chunk's later
        calls. input_weights: the weights that read the layer's input, as the steps ran with them; None: the input
        needs no gradient. With lr the weights take their step and get None. The port's is None but in a chunk. It is to
        be called without autograd and autocast, as `once_differentiable` does it.
        """
        self.past.enter()
        try:
            return self._gradients(grads, later_credit, input_weights)
        finally:
            self.past.leave()

    def _gradients(
        self,
        grads: Sequence[Tensor | None],
        later_credit: Tensor | None,
        input_weights: Sequence[Tensor] | None,
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        delta = self._delta(grads)
        to_input = None if input_weights is None else self._to_input(input_weights)
        descent = None if self.lr is None else Descent.of_parameters(self.layer.weights(), self.lr)
        for_x, passed, by_weight = self.past.gradients(
            self.record, self.weights, delta, later_credit, to_input, descent
        )
        if descent is not None:
            descent.mark_changed()
        return for_x, passed if self.record.continues_chunk else None, by_weight

    def _delta(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The losses' gradient with respect to all states (S, C, B, N), from that of the cell's outputs."""
        m = self.record.block.m
        delta = m.new_zeros(m.shape[1:])
        for nu, grad in zip(self.layer.cell.outputs, grads, strict=True):
            if grad is not None:
                delta.select(0, nu).copy_(grad if self.shard is None else grad[..., self.shard.rows])
        return delta

    def _to_input(self, input_weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """What makes the gradient of the layer's input from that of the per-unit inputs."""
        if self.shard is None:
            return functools.partial(self.layer.input_gradient, input_weights=input_weights)
        return functools.partial(self.shard.input_gradient, self.layer, input_weights=input_weights)

    def input_gradient(self, grads: Sequence[Tensor | None], input_weights: Sequence[Tensor]) -> Tensor:
        """The part of `gradients` that is the layer's input's, for a call of one step."""
        return self.past.input_gradient(self.record, self._delta(grads), self._to_input(input_weights))


# Runs steps: (x, resets, whether they continue a chunk, weights) → their backward pass, the cell's outputs, and the
# weights that read the layer's input.
RunSteps = Callable[
    [Tensor, Tensor | None, bool, Sequence[Tensor]], tuple[PendingBackward, list[Tensor], Sequence[Tensor]]
]


class Steps(torch.autograd.Function):
    """The node of one call. Inputs: x, a credit port, the weights. Outputs: a credit port, the cell's outputs.

    Credit ports join the calls of one chunk, in form "chunk"; elsewhere they are None. A port is a tensor of zeros of
    the states' shape (S, B, N), and only its gradient matters. A call takes the port that the call before it returned.
    So autograd runs the later call's backward first, and the credit that passes from there to the earlier steps reaches
    the earlier call as the gradient of its port.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: RunSteps,
        resets: Tensor | None,
        x: Tensor,
        port_before: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        continues = port_before is not None and port_before.requires_grad
        pending, outputs, input_weights = run(x, resets, continues, weights)
        ctx.pending = pending
        ctx.save_for_backward(*input_weights)  # so that autograd notices if they change before backward()
        ctx.set_materialize_grads(False)
        if pending.past.form != "chunk":
            return None, *outputs
        states, _, batch, units = pending.record.block.lin.before.shape
        return outputs[0].new_zeros(1).expand(states, batch, units), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, later_credit: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if later_credit is None and all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs_x, _, *needs_weight = ctx.needs_input_grad[2:]
        # Saved tensors are read only if they are needed: a chunk's later backward passes through here again, when
        # autograd has freed them.
        input_weights = ctx.saved_tensors if needs_x else None
        for_x, passed, gradients = ctx.pending.gradients(grads, later_credit, input_weights)
        return (
            None,
            None,
            for_x,
            passed,
            *(g if need else None for g, need in zip(gradients, needs_weight, strict=True)),
        )


class Input(torch.autograd.Function):
    """The node through which one step of a chunk gives its input a gradient. Hands on the cell's outputs.

    It is apart from `Steps`, through which the backward passes of the chunk's later steps come again: what made x has
    freed its graph then.
    """

    @staticmethod
    def forward(
        ctx: Any, pending: PendingBackward, input_weights: Sequence[Tensor], x: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pending = pending
        ctx.save_for_backward(*input_weights)
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return None, None, ctx.pending.input_gradient(grads, ctx.saved_tensors), *grads
