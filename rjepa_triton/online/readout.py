"""A layer's readout as one autograd node, where torch's own nodes would not do.

These free what they keep in the first backward pass, and under autocast they run in its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd import once_differentiable
from .._device import without_autocast
from ..layers.layer import TwoPointRNN


def has_readout(layer: TwoPointRNN) -> bool:
    """Whether the layer computes its output from the cell's, rather than handing the first of them on."""
    return type(layer).readout is not TwoPointRNN.readout


def readout(layer: TwoPointRNN, outputs: Sequence[Tensor], x: Tensor, copies: bool) -> Tensor:
    """`layer.readout(outputs, x)`, whose backward pass may run several times, in the parameters' dtype.

    copies: whether it keeps copies of the readout's own parameters, so that they may change before a backward pass.
    """
    if not torch.is_grad_enabled():  # no backward pass comes; in inference mode none could be kept for
        return layer.readout(outputs, x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return _Readout.apply(layer, names, copies, x, *outputs, *parameters)


class ReadoutOf(nn.Module):
    """A module that calls a layer's readout, so that its parameters can be replaced for one call."""

    def __init__(self, layer: TwoPointRNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, outputs: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.layer.readout(outputs, x)


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: TwoPointRNN, names: Sequence[str], copies: bool, x: Tensor, *given: Tensor
    ) -> Tensor:
        count = len(given) - len(names)
        own = set(layer._names)
        leaves = [tensor.detach() for tensor in (x, *given[:count])]
        for name, parameter in zip(names, given[count:], strict=True):
            copied = copies and name not in own
            leaves.append(parameter.detach().clone() if copied else parameter.detach())
        needed = ctx.needs_input_grad[3:]
        for leaf, need in zip(leaves, needed, strict=True):
            leaf.requires_grad_(need)
        replaced = {f"layer.{name}": leaf for name, leaf in zip(names, leaves[1 + count :], strict=True)}
        with torch.enable_grad():
            made = torch.func.functional_call(ReadoutOf(layer), replaced, (leaves[1 : 1 + count], leaves[0]))
        # a graph of its own, which lives as long as this node and is not freed by a backward pass
        ctx.made, ctx.leaves = made, [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        return made.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            found = iter(
                torch.autograd.grad(ctx.made, ctx.leaves, grad, retain_graph=True, allow_unused=True)
            )
        return (None, None, None, *(next(found) if need else None for need in ctx.needs_input_grad[3:]))
