"""torch.library operators, which torch.compile calls without looking into the loops over time or a learner's state.

rjepa_triton::two_point          runs a cell over a sequence and returns (states, saved), as `Cell.scan` does
rjepa_triton::two_point_gradients   the backward pass of `two_point` by a learning rule
rjepa_triton::gamma_step_        advances Γ by a step, in place, and returns the gradient (`operations.gamma_step_`)
rjepa_triton::gamma_chunk_       advances Γ by a chunk, in place, and returns the gradient that a credit at the chunk's
                                 beginning gives (`operations.gamma_chunk_`)
rjepa_triton::learner_steps      runs steps of an `OnlineLearner`, which is named by its handle (`compiled`)
rjepa_triton::learner_gradients  the backward pass of `learner_steps`
rjepa_triton::learner_reset      resets a learner
rjepa_triton::learner_state      copies a learner's states

Eager calls don't use them: `layers.functional` and `OnlineLearner` run the same functions with less overhead.
"""

# No `from __future__ import annotations`: torch reads the operators' schemas from the annotations themselves.

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..backend import operations
from ..cells.keys import cell_of
from ..cells.two_point import Trajectory
from ..layers import functional
from .compiled import learner_of


@torch.library.custom_op("rjepa_triton::two_point", mutates_args=())
def two_point(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Optional[Tensor],  # noqa: UP045
    cell: str,
    learning: str,
    rounds: Optional[int],  # noqa: UP045
    backend: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """A cell over a sequence: its states (S, T + 1, B, N), and what it saves (·, T, B, N), empty with `recompute`.

    x (J, T, B, N); state: S of (B, N); weights: the K recurrent ones; resets (T, B) bool or None; cell: its key.
    """
    runs = operations.choose_scan(backend, x.device, x.dtype)
    found = operations.scan(cell_of(cell), x, weights, state, resets, backend=runs, keep=not recompute)
    return found.states, found.saved


@two_point.register_fake
def _(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Tensor | None,
    cell: str,
    learning: str,
    rounds: int | None,
    backend: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    _, steps, batch, units = x.shape
    states = x.new_empty(len(state), steps + 1, batch, units)
    if recompute:
        return states, x.new_empty(0)
    return states, x.new_empty(steps, batch, cell_of(cell).saves, units).movedim(2, 0)


@torch.library.custom_op("rjepa_triton::two_point_gradients", mutates_args=())
def two_point_gradients(
    x: Tensor,
    states: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    resets: Optional[Tensor],  # noqa: UP045
    grad_states: Tensor,
    cell: str,
    learning: str,
    rounds: Optional[int],  # noqa: UP045
    backend: str,
) -> list[Tensor]:
    """Gradients of x, the S initial states and the weights. grad_states (S, T + 1, B, N): of what `two_point` gave."""
    trajectory = Trajectory(x, states, saved, resets)
    for_x, first, by_weight = functional.gradients(
        cell_of(cell), trajectory, weights, grad_states[:, 1:].contiguous(), learning, rounds, backend
    )
    found = [for_x, *(first + grad_states[:, 0]).unbind(0), *by_weight]
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in found]


@two_point_gradients.register_fake
def _(
    x: Tensor,
    states: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    resets: Tensor | None,
    grad_states: Tensor,
    cell: str,
    learning: str,
    rounds: int | None,
    backend: str,
) -> list[Tensor]:
    like = [x, *states[:, 0].unbind(0), *weights]
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weights, resets, ctx.cell, ctx.learning, ctx.rounds, ctx.backend, _ = inputs
    states, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(x, states, saved, resets, *weights)


def _backward(ctx: Any, grad_states: Tensor, _: Any) -> tuple[Any, ...]:
    x, states, saved, resets, *weights = ctx.saved_tensors
    for_x, *found = two_point_gradients(
        x, states, saved, weights, resets, grad_states, ctx.cell, ctx.learning, ctx.rounds, ctx.backend
    )
    count = states.shape[0]
    return for_x, found[:count], found[count:], None, None, None, None, None, None


two_point.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("rjepa_triton::gamma_step_", mutates_args=("gammas",))
def gamma_step_(
    gammas: Sequence[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor, backend: str
) -> Tensor:
    """One step of Γ and its gradient (K, N, M). Mutates gammas.

    gammas: (B, K, N, M) for each state; m (S, S, B, N); phi (S, B, K, N); y (B, K, Y); delta (S, B, N).
    """
    total = operations.gamma_step_(gammas, m, phi, y, delta, backend=backend)
    assert total is not None
    return total


@torch.library.custom_op("rjepa_triton::gamma_chunk_", mutates_args=("gammas",))
def gamma_chunk_(
    gammas: Sequence[Tensor], m: Tensor, phi: Tensor, y: Tensor, credit: Tensor, backend: str
) -> Tensor:
    """C steps of Γ, and the gradient (K, N, M) of a credit at the state before them. Mutates gammas.

    As `gamma_step_`, with m (S, S, C, B, N); phi (S, C, B, K, N); y (C, B, K, Y); credit (S, B, N).
    """
    total = operations.gamma_chunk_(gammas, m, phi, y, credit, backend=backend)
    assert total is not None
    return total


@gamma_step_.register_fake
@gamma_chunk_.register_fake
def _(gammas: Sequence[Tensor], m: Tensor, phi: Tensor, y: Tensor, credit: Tensor, backend: str) -> Tensor:
    return credit.new_empty(gammas[0].shape[1:])


@torch.library.custom_op("rjepa_triton::learner_steps", mutates_args=())
def learner_steps(
    learner: Tensor,
    x: Tensor,
    resets: Optional[Tensor],  # noqa: UP045
    weights: Sequence[Tensor],
    clock: Tensor,
    units: int,
    outputs: int,
) -> list[Tensor]:
    """The cell's outputs (C, B, N) each for x (C, B, F), and a clock, the number of this call.

    Advances the learner, which keeps its state and sensitivities itself: they are not among the arguments. learner: its
    handle. clock: what the learner's operator before this one returned. weights: the layer's, so that they get
    gradients. units: N. outputs: how many outputs the cell has.
    """
    return learner_of(learner).operate(x, resets)


@learner_steps.register_fake
def _(
    learner: Tensor,
    x: Tensor,
    resets: Tensor | None,
    weights: Sequence[Tensor],
    clock: Tensor,
    units: int,
    outputs: int,
) -> list[Tensor]:
    made = [x.new_empty(x.shape[0], x.shape[1], units) for _ in range(outputs)]
    return [*made, torch.empty_like(clock)]


@torch.library.custom_op("rjepa_triton::learner_gradients", mutates_args=())
def learner_gradients(
    learner: Tensor, call: Tensor, x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of x (C, B, F) and of the weights, for the steps of one call. grads: of their outputs."""
    made = learner_of(learner).operator_gradients(int(call), grads)
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in made]


@learner_gradients.register_fake
def _(
    learner: Tensor, call: Tensor, x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, *weights)]


def _save_steps(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    learner, x, _, weights, *_ = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(learner, output[-1], x, *weights)


def _steps_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    learner, call, x, *weights = ctx.saved_tensors
    for_x, *by_weight = learner_gradients(learner, call, x, weights, list(grads[:-1]))
    return None, for_x, None, by_weight, None, None, None


learner_steps.register_autograd(_steps_backward, setup_context=_save_steps)


@torch.library.custom_op("rjepa_triton::learner_reset", mutates_args=())
def learner_reset(
    learner: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    clock: Tensor,
) -> Tensor:
    """Reset the batch rows where mask (B,) is True, or all, as `OnlineLearner.reset` does. Returns a new clock."""
    learner_of(learner).reset(mask)
    return clock.clone()


@learner_reset.register_fake
def _(learner: Tensor, mask: Tensor | None, clock: Tensor) -> Tensor:
    return torch.empty_like(clock)


@torch.library.custom_op("rjepa_triton::learner_state", mutates_args=())
def learner_state(learner: Tensor, like: Tensor, clock: Tensor, states: int) -> list[Tensor]:
    """Copies of the learner's states, (B, N) each as `like`, and a new clock. states: S."""
    return [*learner_of(learner).state, clock.clone()]


@learner_state.register_fake
def _(learner: Tensor, like: Tensor, clock: Tensor, states: int) -> list[Tensor]:
    return [*(torch.empty_like(like) for _ in range(states)), torch.empty_like(clock)]
