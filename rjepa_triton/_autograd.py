"""What the backward passes of this package share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._device import autocast_is_on, without_autocast

_TWICE = (
    b"a layer of rjepa_triton can't be differentiated twice: its learning rule gives first derivatives alone"
)
Backward = Callable[..., tuple[Any, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """Decorate the backward() of an autograd function that can't be differentiated itself.

    It runs without autograd, and outside of autocast, so in the dtype of the forward pass. With create_graph=True a
    second derivative raises RuntimeError. torch's decorator of this name gives None in its place where the loss is
    linear in the function's outputs.
    """

    def outside_autocast(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        device = next((grad.device for grad in grads if isinstance(grad, Tensor)), None)
        if device is None or not autocast_is_on(device):
            return backward(ctx, *grads)
        with without_autocast(device):
            return backward(ctx, *grads)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():  # as it mostly is
            return outside_autocast(ctx, *grads)
        with torch.no_grad():
            found = outside_autocast(ctx, *grads)
        if torch.compiler.is_compiling():  # which refuses by itself
            return found
        refuse: Any = torch._C._functions.DelayedError(_TWICE, len(found))
        marked = [value if value is None else value.detach().requires_grad_() for value in found]
        refused = refuse(*marked)
        return refused if isinstance(refused, tuple) else (refused,)

    return run
