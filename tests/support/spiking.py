"""The spiking cells once more, as autograd has them: a step function with a derivative of its own.

`update(cell)` is `cell.update`, which autograd can differentiate; of other cells it is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rjepa_triton.cells.builtin import ALIFCell, LIFCell
from rjepa_triton.cells.two_point import Cell


class Spike(torch.autograd.Function):
    """1 for over > 0, else 0, with the derivative γ / θ max(0, 1 - |over| / θ)."""

    @staticmethod
    def forward(ctx: Any, over: Tensor, threshold: float, dampening: float) -> Tensor:
        ctx.save_for_backward(over)
        ctx.threshold, ctx.dampening = threshold, dampening
        return (over > 0).to(over.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (over,) = ctx.saved_tensors
        scaled = over / ctx.threshold
        height = torch.where(scaled.abs() < 1, 1 - scaled.abs(), torch.zeros_like(scaled))
        return grad * height * ctx.dampening / ctx.threshold, None, None


def update(cell: Cell) -> Callable[..., tuple[Tensor, ...]]:
    """The cell's F as autograd is to differentiate it."""
    if not isinstance(cell, LIFCell):
        return cell.update

    def spiking(c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        z, v, *rest = c
        v = cell.decay * v + p[0] + x[0] - (cell.threshold * z).detach()
        if not isinstance(cell, ALIFCell):
            return Spike.apply(v - cell.threshold, cell.threshold, cell.dampening), v
        a = cell.adaptation_decay * rest[0] + z
        over = v - cell.threshold - cell.adaptation * a
        return Spike.apply(over, cell.threshold, cell.dampening), v, a

    return spiking
