"""How close a learning rule's gradient is to the exact one, measured on some data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..layers import functional
from ..layers.layer import TwoPointRNN
from .learner import OnlineLearner


@dataclass(frozen=True)
class Fidelity:
    """An estimated gradient compared with the exact one. str() gives a table.

    cosine       between the two, by parameter name; NaN where either is zero
    error        |estimate - exact| / |exact|, by parameter name; NaN where the exact gradient is zero
    total_cosine, total_error   the same of all parameters together
    """

    cosine: Mapping[str, float]
    error: Mapping[str, float]
    total_cosine: float
    total_error: float

    def __str__(self) -> str:
        rows = [(name, self.cosine[name], self.error[name]) for name in self.cosine]
        rows.append(("total", self.total_cosine, self.total_error))
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:{width}}  cosine {cos:7.4f}  error {err:8.2e}" for name, cos, err in rows)


def fidelity(
    layer: TwoPointRNN,
    x: Tensor,
    grad_output: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    learning: functional.Learning | None = None,
    refine: Any = None,
    online: Mapping[str, Any] | None = None,
) -> Fidelity:
    """Compare a learning rule's gradient with the exact one, that of BPTT, on a sequence.

    Args:
        layer: the layer. It stays as it is, its parameters' gradients included; what runs is a copy without hooks.
        x: (T, B, F), whatever the layer's batch_first.
        grad_output: (T, B, N), ∂L/∂output of a loss Σ_t L(t); random normal numbers from a fixed seed if None.
        resets: (T, B) bool or None: rows in which a new episode starts at that step.
        learning, refine: the rule to compare; the layer's own if None.
        online: options of an `OnlineLearner` whose gradient is compared instead. It gets x in pieces of `update_every`
            steps, from the zero state; the weights stay as they are, so `lr` is refused.

    It runs under torch.no_grad() too.

    Raises TypeError or ValueError for an argument out of its range, as the layer and the learner do.
    """
    if not isinstance(layer, TwoPointRNN):
        raise TypeError(f"layer must be a recurrent layer such as RGC, got {type(layer).__name__}")
    check.shape("x", check.tensor("x", x), ("T", "B", layer.fan_in), "to match the layer")
    shape = (*x.shape[:2], layer.hidden_size)
    if grad_output is None:
        generator = torch.Generator().manual_seed(0)
        grad_output = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    check.shape("grad_output", check.tensor("grad_output", grad_output), shape, "to match x")
    estimate = gradients(layer, x, grad_output, resets, learning=learning, refine=refine, online=online)
    return compare(estimate, gradients(layer, x, grad_output, resets, learning="bptt"))


def gradients(
    layer: TwoPointRNN,
    x: Tensor,
    grad_output: Tensor,
    resets: Tensor | None = None,
    *,
    learning: functional.Learning | None = None,
    refine: Any = None,
    online: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """A rule's gradient of each parameter, by name. Arguments are those of `fidelity`. The layer stays as it is."""
    if online is not None and not (learning is None and refine is None):
        raise ValueError("online must hold learning and refine too where it is given, got them outside of it")
    if online is not None and not isinstance(online, Mapping):
        raise TypeError(f"online must be a mapping of options of OnlineLearner, got {type(online).__name__}")
    if online is not None and online.get("lr") is not None:
        raise ValueError(
            f"online can't have lr={online['lr']!r}, by which backward() changes the weights and gives no gradient"
        )
    copied = _without_hooks(layer)
    if learning is not None:
        copied.learning, copied.refine = learning, 0
    if refine is not None:
        copied.refine = refine
    copied.batch_first = False
    with torch.enable_grad():
        if online is None:
            functional.rule("learning", copied.learning, copied.refine)
            copied(x.detach(), resets=resets)[0].backward(grad_output.detach())
        else:
            _stream(copied, x.detach(), resets, grad_output.detach(), online)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in copied.named_parameters()}


def _without_hooks(layer: TwoPointRNN) -> TwoPointRNN:
    """A copy of a layer and its parameters, without gradients and without the user's hooks."""
    copied = copy.deepcopy(layer)
    for module in copied.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    copied.zero_grad(set_to_none=True)
    return copied


def _stream(
    layer: TwoPointRNN,
    x: Tensor,
    resets: Tensor | None,
    grad_output: Tensor,
    options: Mapping[str, Any],
) -> None:
    learner = OnlineLearner(layer, x.shape[1], **options)
    every = learner.update_every
    for start in range(0, x.shape[0], every):
        part = slice(start, start + every)
        output = learner.chunk(x[part], None if resets is None else resets[part])
        output.backward(grad_output[part])


def compare(estimate: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Fidelity:
    """Compare estimates of the parameters' gradients with the exact ones; both by name."""
    pairs = {name: (estimate[name].flatten(), exact[name].flatten()) for name in exact}
    joint = [torch.cat([pair[i] for pair in pairs.values()]) for i in (0, 1)]
    return Fidelity(
        cosine={name: _cosine(*pair) for name, pair in pairs.items()},
        error={name: _error(*pair) for name, pair in pairs.items()},
        total_cosine=_cosine(*joint),
        total_error=_error(*joint),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = a.norm() * b.norm()
    return float((a * b).sum() / norms) if float(norms) > 0 else float("nan")


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if float(b.norm()) > 0 else float("nan")
