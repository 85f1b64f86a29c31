"""Which settings of a stream's optimizer compiled code takes. They may change at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# In the order of learned.h.
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
# What torch.optim calls their moments.
MOMENTS: tuple[tuple[str, ...], ...] = (
    ("momentum_buffer",),
    ("exp_avg", "exp_avg_sq"),
    ("exp_avg", "exp_avg_sq"),
    ("square_avg",),
)
# Options of torch.optim, and the moment that each needs, which is made at a weight's first step alone.
LATE = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}


def unserved(optimizer: torch.optim.Optimizer, kind: int) -> str | None:
    """Why compiled code can't take the steps of this optimizer, of that kind when the stream was made, or None."""
    wanted = list(OPTIMIZERS.values())[kind]
    if type(optimizer) is not wanted:
        return f"compiled code was made for {wanted.__name__}, got {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        for name in optimizer.defaults:
            value = group.get(name)
            if not all(each is None or isinstance(each, int | float) for each in _plain(value)):
                return f"compiled code takes {name} of torch.optim as numbers, got {type(value).__name__}"
        for name in ("amsgrad", "maximize", "centered", "differentiable"):
            if group.get(name):
                return f"compiled code has no {name} of torch.optim"
        if bool(group.get("decoupled_weight_decay", kind == 2)) != (kind == 2):
            return f"compiled code takes decoupled_weight_decay={kind == 2} of {wanted.__name__}"
        if kind == 3 and group["momentum"]:
            return "compiled code has no momentum of RMSprop"
    return "the optimizer has hooks" if has_step_hooks(optimizer) else None


def clip_(parameters: Sequence[Tensor], largest: float, on_ranks: bool) -> None:
    """torch.nn.utils.clip_grad_norm_; on_ranks: of DTensors and tensors together, which it doesn't take."""
    if not on_ranks:
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms: list[Any] = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    scale = float((largest / (torch.linalg.vector_norm(torch.stack(whole)) + 1e-6)).clamp(max=1))
    for gradient in gradients:
        gradient.mul_(scale)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def alike(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all groups have the same settings but for lr."""
    first, *rest = (
        [group.get(name) for name in optimizer.defaults if name != "lr"] for group in optimizer.param_groups
    )
    return all(each == first for each in rest)


def refuse_late(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an option needs moments that the optimizer's first step didn't make."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.RMSprop):
        return
    for group in optimizer.param_groups:
        for name in [name for name in LATE if group.get(name)]:
            states = [optimizer.state.get(parameter) for parameter in group["params"]]
            if any(state and LATE[name] not in state for state in states):
                raise ValueError(
                    f"{name} of torch.optim was set after the optimizer's first step, which made no {LATE[name]}: set "
                    "it before, or make a new optimizer"
                )


def _plain(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
