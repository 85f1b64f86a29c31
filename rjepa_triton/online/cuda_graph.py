"""One online step as two CUDA graphs: one runs the layer's step, the other finds its gradient and advances Γ.

The time of a small step is that of its kernel launches, not of its arithmetic; a graph launches all kernels at once.
Every array has a fixed address: inputs are copied to it, and results are copied from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._autograd import once_differentiable
from .._device import without_autocast
from ..backend.descent import Descent
from ..layers.layer import TwoPointRNN
from ..rules import rfp
from .nonfinite import Watch
from .sensitivity import Sensitivity
from .tape import recorded

# Takes a function that works on fixed arrays; returns its result, and a function that runs it again into these arrays.
Capture = Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], None]]]


def cuda_graph(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Capture `function` as a CUDA graph of the current device, after three runs that compile kernels and fill caches.

    The capture itself runs nothing: the results hold no numbers before the first replay. A `Capture`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Without a stream torch takes one that it once made, on the device that was current then.
    with torch.cuda.graph(graph, stream=stream):
        made = function()
    return made, graph.replay


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class GraphedStep:
    """Runs the steps of a learner of form "step" as CUDA graphs. Mutates `state` and `carried`.

    The constructor leaves the weights as they are, and the other two zero.

    layer    its parameters must keep their storage
    carried  the sensitivities, zero
    state    (S, B, N), zero
    rule     which parts of M are kept (`rfp.transition`)
    backend  of the loops over time, as `operations.choose_scan` returns it
    lr       (1,) or None; with it the second graph also takes a step of SGD (`Descent`)
    capture  makes a graph of a function
    watch    gets a flag from the first graph for each step that isn't finite; None: none is made
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        carried: Sensitivity,
        state: Tensor,
        rule: str,
        backend: str,
        lr: Tensor | None = None,
        capture: Capture = cuda_graph,
        watch: Watch | None = None,
    ) -> None:
        self._layer, self._carried, self.state = layer, carried, state
        batch = state.shape[1]
        self._x = state.new_zeros(1, batch, layer.fan_in)
        self._resets = torch.zeros(1, batch, dtype=torch.bool, device=state.device)
        self._delta = state.new_zeros(len(layer.cell.states), 1, batch, layer.hidden_size)
        self._addresses = self._storage()
        self._rule, self._backend_of_scan = rule, backend
        self._watch = watch if watch is not None and watch.on else None
        self._descent = None if lr is None else Descent.of_parameters(layer.weights(), lr)
        self._now = 0  # how many steps have run
        self._folded = True  # whether Γ has been advanced over the last of them
        weights = layer.weights()
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad(), without_autocast(state.device), _current(state.device):
                (self._after, *arrays), self._replay_forward = capture(self._run_forward)
                fixed = iter(arrays)  # the arrays that replays write to, in the order of the block's tensors
                self._block = self._structure.map(lambda _: next(fixed))
                # The runs before the next capture read these arrays, and with lr change the weights by what they find.
                self._replay_forward()
                self._backward, self._replay_backward = capture(self._run_backward)
        finally:
            with torch.no_grad():
                if self._descent is not None:
                    for weight, before in zip(weights, kept, strict=True):
                        weight.detach().copy_(before)
                self.state.zero_()
                carried.restart_()
                if self._watch is not None:
                    self._watch.begin(0)

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
        if self._watch is not None:
            self._watch.mark_graphed(self._x, self.state)
        # `step` itself has Γ forget, so that a replay needs no launch for it
        block = replace(block, lin=replace(block.lin, resets=None))
        self._structure = block
        return [after, *block.tensors()]

    def _run_backward(self) -> list[Tensor]:
        layer = self._layer
        input_weights = [
            w.detach() for k, w in zip(layer.matrices, layer.weights(), strict=True) if k.reads == "input"
        ]
        per_unit = rfp.input_gradient(self._block.lin, self._delta, len(layer.cell.inputs))
        for_input = layer.input_gradient(per_unit, input_weights)[0]
        gradients = self._carried.step_(self._block, self._delta, self._descent)
        return [for_input, *(gradients or [])]

    def step(self, x: Tensor, forget: Tensor | None) -> list[Tensor]:
        """Run one step; return the cell's outputs, (B, N) each, which are copies.

        x (B, F); forget (B,) bool or None: batch rows that are reset before this step. Raises RuntimeError if a
        parameter of the layer has new storage.
        """
        if self._storage() != self._addresses:
            raise RuntimeError(
                "a parameter of the layer has new storage, and the graph would read the old one: change parameters in "
                "place, or make a new OnlineLearner"
            )
        self.fold()
        if forget is not None:
            self._carried.forget_(forget)  # M is zero in these rows, but zero times an infinity is not
            self._resets.copy_(forget[None])
        self._x.copy_(x[None])
        self._replay_forward()
        if forget is not None:
            self._resets.zero_()
        self._now, self._folded = self._now + 1, False
        return [self._after[nu, 0].clone() for nu in self._layer.cell.outputs]

    def fold(self) -> None:
        """Advance Γ over the last step, if its backward pass has not done so."""
        if not self._folded:
            self._delta.zero_()
            self._advance()

    def unfolded(self) -> dict[str, Any]:
        """The entries of a checkpoint that tell of the last step, where Γ has not been advanced over it yet."""
        if self._folded:
            return {}
        return {"now": 1, "ends": [1], "window": [self._block.map(Tensor.clone).to_dict()]}

    def load(self, state: Tensor) -> None:
        """Go on from a state (S, B, N), with Γ as it is now."""
        self.state.copy_(state.detach())
        self._folded = True

    def _advance(self) -> None:
        self._replay_backward()
        self._folded = True

    @property
    def now(self) -> int:
        """How many steps have run."""
        return self._now

    def gradients(
        self, step: int, grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the layer's input (B, F) and of its weights at step `step`. Advances Γ.

        grads: of the cell's outputs, (B, N) or None each. needed: which gradients autograd needs; the others are None.
        With lr the list ends with the input's, and the weights have taken their step.

        Raises RuntimeError if `step` is not the last step, or if its backward has run already.
        """
        if step != self._now or self._folded:
            raise RuntimeError(
                f"backward of step {step} comes too late: Γ is that of step {self._now} now. With cuda_graph=True, "
                f"call backward() once, on the sum of the losses, before step {step + 1}"
            )
        # δ of states that are not outputs stays zero
        for nu, grad in zip(self._layer.cell.outputs, grads, strict=True):
            target = self._delta[nu, 0]
            target.zero_() if grad is None else target.copy_(grad)
        self._advance()
        if self._descent is not None:
            self._descent.mark_changed()
        return [made.clone() if need else None for made, need in zip(self._backward, needed, strict=False)]


class Graphed(torch.autograd.Function):
    """The autograd node of one graphed step. Its outputs are the cell's outputs."""

    @staticmethod
    def forward(
        ctx: Any, graphed: GraphedStep, forget: Tensor | None, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = graphed.step(x, forget)
        ctx.graphed, ctx.step = graphed, graphed.now
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[2:]
        gradients = ctx.graphed.gradients(ctx.step, grads, needed)
        return None, None, *gradients, *(None,) * (len(needed) - len(gradients))
