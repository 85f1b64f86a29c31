"""One online step as two CUDA graphs: the layer's step, and its gradient with the advance of Γ.

A small step costs its kernel launches, not its work; a graph launches them all at once. Every array lives at a fixed
address: inputs are copied in, results copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import dispatch as ops
from ..layers.layer import TwoPointRNN
from ..rules import rfp
from .sensitivity import Carried
from .tape import recorded

# Takes a function of fixed arrays and gives what it returned and how to run it again, into the same arrays.
Capture = Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], None]]]


def cuda_graph(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Capture `function` as a CUDA graph, after a few runs that compile kernels and fill caches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()
    return made, graph.replay


class GraphedStep:
    """The steps of a learner of form "step" by graphs. Owns the layer's state and advances `carried`.

    layer: its parameters keep their storage; state (S, B, N), zero; carried: what is carried forward, zero;
    backend: of `ops.scan`; lr (1,) or None: of the step of SGD that the second graph takes (`ops.Descent`).
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        carried: Carried,
        state: Tensor,
        rule: str,
        backend: str,
        lr: Tensor | None = None,
        capture: Capture = cuda_graph,
    ) -> None:
        self._layer, self._carried, self.state = layer, carried, state
        batch = state.shape[1]
        self._x = state.new_zeros(1, batch, layer.fan_in)
        self._resets = torch.zeros(1, batch, dtype=torch.bool, device=state.device)
        self._delta = state.new_zeros(len(layer.cell.states), 1, batch, layer.hidden_size)
        self._addresses = self._storage()
        self._rule, self._backend_of_scan = rule, backend
        self._descent = None if lr is None else ops.Descent.down(layer.weights(), lr)
        self._now, self._folded = 0, True  # steps made; whether Γ is that of the last
        with torch.no_grad():
            (self._after, *arrays), self._replay_forward = capture(self._run_forward)
            fixed = iter(arrays)  # where replays write, of the structure that the last run left
            self._block = self._structure.map(lambda _: next(fixed))
            self._backward, self._replay_backward = capture(self._run_backward)
            self.state.zero_()
            carried.restart_()

    def _storage(self) -> list[int]:
        return [weight.data_ptr() for weight in self._layer.weights()]

    def _run_forward(self) -> list[Tensor]:
        layer, cell = self._layer, self._layer.cell
        reads = any(matrix.reads == "input" for matrix in layer.matrices)
        after, block = recorded(
            cell,
            layer.drive(self._x),
            [weight.detach() for weight in layer.recurrent_weights()],
            self.state,
            self._resets,
            self._x if reads else None,
            self._rule,
            backend=self._backend_of_scan,
        )
        self.state.copy_(after[:, -1])
        self._structure = block
        return [after, *block.tensors()]

    def _run_backward(self) -> list[Tensor]:
        layer = self._layer
        readers = [
            w.detach() for k, w in zip(layer.matrices, layer.weights(), strict=True) if k.reads == "input"
        ]
        per_unit = rfp.input_gradient(self._block.lin, self._delta, len(layer.cell.inputs))
        for_input = layer.input_gradient(per_unit, readers)[0]
        gradients = self._carried.step_(self._block, self._delta, self._descent)
        return [for_input, *(gradients or [])]

    def step(self, x: Tensor, forget: Tensor | None) -> list[Tensor]:
        """x (B, F), rows to reset before it (B,) bool or None → the cell's outputs, (B, N) each."""
        if self._storage() != self._addresses:
            raise RuntimeError(
                "a parameter of the layer has new storage, and the graph would read the old one: change parameters in "
                "place, or make a new OnlineLearner"
            )
        self.fold()
        if forget is not None:
            self._carried.forget_(forget)  # M is zero there, but zero times an infinity isn't
            self._resets.copy_(forget[None])
        self._x.copy_(x[None])
        self._replay_forward()
        if forget is not None:
            self._resets.zero_()
        self._now, self._folded = self._now + 1, False
        return [self._after[nu, 0].clone() for nu in self._layer.cell.outputs]

    def fold(self) -> None:
        """Advance Γ over the last step, if no backward has."""
        if not self._folded:
            self._delta.zero_()
            self._advance()

    def _advance(self) -> None:
        self._replay_backward()
        self._folded = True

    @property
    def now(self) -> int:
        """Steps made so far."""
        return self._now

    def gradients(
        self, step: int, grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Of the layer's input (B, F) and weights at step `step`, from those of the outputs. Advances Γ.

        needed: which are; with lr the input's alone is given: the weights have taken theirs.
        """
        if step != self._now or self._folded:
            raise RuntimeError(
                f"backward of step {step} comes too late: Γ is that of step {self._now} now. With cuda_graph=True, "
                f"call backward() once, on the sum of the losses, before step {step + 1}"
            )
        # of states that are no outputs it is always zero
        for nu, grad in zip(self._layer.cell.outputs, grads, strict=True):
            target = self._delta[nu, 0]
            target.zero_() if grad is None else target.copy_(grad)
        self._advance()
        if self._descent is not None:
            self._descent.taken()
        return [made.clone() if need else None for made, need in zip(self._backward, needed, strict=False)]


class Graphed(torch.autograd.Function):
    """The node of one graphed step: the cell's outputs."""

    @staticmethod
    def forward(
        ctx: Any, graphed: GraphedStep, forget: Tensor | None, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        shown = graphed.step(x, forget)
        ctx.graphed, ctx.step = graphed, graphed.now
        ctx.set_materialize_grads(False)
        return tuple(shown)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[2:]
        gradients = ctx.graphed.gradients(ctx.step, grads, needed)
        return None, None, *gradients, *(None,) * (len(needed) - len(gradients))
