"""RGC over a sequence as torch.library operators: what torch.compile sees in place of the loops over time.

rjepa_triton::rgc            forward: (states, saved), as `RGCCell.scan` gives them
rjepa_triton::rgc_gradients  its backward by a learning rule

Eager calls don't come through here: `functional` runs the same functions with less overhead.
"""

# No `from __future__ import annotations`: torch reads the operators' schemas from the annotations themselves.

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from . import functional
from .cells import RGCCell
from .two_point import Trajectory


@torch.library.custom_op("rjepa_triton::rgc", mutates_args=())
def rgc(
    x: Tensor,
    s0: Tensor,
    m0: Tensor,
    weights: Sequence[Tensor],
    resets: Optional[Tensor],  # noqa: UP045
    learning: str,
    rounds: Optional[int],  # noqa: UP045
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x (1, T, B, N), s0, m0 (B, N), four weights → states (2, T + 1, B, N), saved (2, T, B, 2, N)."""
    trajectory = RGCCell().scan(x, weights, (s0, m0), resets)
    return trajectory.states, trajectory.saved


@rgc.register_fake
def _(
    x: Tensor,
    s0: Tensor,
    m0: Tensor,
    weights: Sequence[Tensor],
    resets: Tensor | None,
    learning: str,
    rounds: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _, steps, batch, units = x.shape
    return x.new_empty(2, steps + 1, batch, units), x.new_empty(2, steps, batch, 2, units)


@torch.library.custom_op("rjepa_triton::rgc_gradients", mutates_args=())
def rgc_gradients(
    x: Tensor,
    states: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    resets: Optional[Tensor],  # noqa: UP045
    grad_states: Tensor,
    learning: str,
    rounds: Optional[int],  # noqa: UP045
    backend: str,
) -> list[Tensor]:
    """Gradients of x, s0, m0 and the weights from that of all states (2, T + 1, B, N)."""
    trajectory = Trajectory(x, states, saved, resets)
    for_x, first, by_weight = functional.gradients(
        RGCCell(), trajectory, weights, grad_states[:, 1:].contiguous(), learning, rounds, backend
    )
    first = first + grad_states[:, 0]
    return [for_x, first[0].clone(), first[1].clone(), *(g.contiguous() for g in by_weight)]


@rgc_gradients.register_fake
def _(
    x: Tensor,
    states: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    resets: Tensor | None,
    grad_states: Tensor,
    learning: str,
    rounds: int | None,
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(states[0, 0]) for _ in range(2)),
            *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights)]  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, weights, resets, ctx.learning, ctx.rounds, ctx.backend = inputs
    states, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(x, states, saved, resets, *weights)


def _backward(ctx: Any, grad_states: Tensor, _: Any) -> tuple[Any, ...]:
    x, states, saved, resets, *weights = ctx.saved_tensors
    for_x, for_s0, for_m0, *by_weight = rgc_gradients(
        x, states, saved, weights, resets, grad_states, ctx.learning, ctx.rounds, ctx.backend
    )
    return for_x, for_s0, for_m0, by_weight, None, None, None, None


rgc.register_autograd(_backward, setup_context=_save)
