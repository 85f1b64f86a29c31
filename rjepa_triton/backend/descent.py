"""A step of SGD that is taken where the gradient is found, so that the gradient never goes to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Descent:
    """W ← W - lr · ∂E/∂W, for each of some weights.

    weights: detached, None in the place of one that stays as it is. lr (1,): of the weights' dtype and device; its
    value counts when the gradient is found.
    """

    weights: Sequence[Tensor | None]
    lr: Tensor

    @classmethod
    def of_parameters(cls, weights: Sequence[Tensor], lr: Tensor) -> Descent:
        """A step of those parameters that require a gradient."""
        return cls([weight.detach() if weight.requires_grad else None for weight in weights], lr)

    def mark_changed(self) -> None:
        """Tell autograd that the weights have changed, which kernels don't."""
        torch.autograd.graph.increment_version([weight for weight in self.weights if weight is not None])

    def select(self, indices: Sequence[int]) -> Descent:
        """The step of some of the weights."""
        return Descent([self.weights[index] for index in indices], self.lr)

    def apply_(self, gradients: Tensor | Sequence[Tensor]) -> None:
        """Take the step in plain torch. gradients: one a weight, with as many numbers. Mutates the weights."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            if weight is not None:
                weight.addcmul_(gradient.view(weight.shape), self.lr, value=-1)
