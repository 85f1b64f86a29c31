"""What a learner carries, as its user sees it: traces for each parameter, and the gradients of single batch rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.layer import TwoPointRNN
from .sensitivity import Exact, PerUnit, Sensitivity
from .tape import Block


def advanced(sensitivity: Sensitivity, blocks: Sequence[Block]) -> list[Tensor]:
    """The sensitivities after the steps of the blocks, one tensor for each parameter; `sensitivity` is changed.

    PerUnit: (S, B, *W), W the weight's shape. Exact: (S, B, H, b, b, M): of unit j of a head to the weight's row p.
    """
    for block in blocks:
        sensitivity.step_(block)
    found: dict[int, Tensor] = {}
    if isinstance(sensitivity, PerUnit):
        for group in sensitivity.groups:
            gammas = torch.stack(group.gammas)  # (S, B, K, N, M)
            for k, index in enumerate(group.indices):
                found[index] = gammas[:, :, k].reshape(*gammas.shape[:2], *group.shape)
    else:
        assert isinstance(sensitivity, Exact)
        for gamma, indices in sensitivity.by_index():  # (B, H, S, b, K, b, M)
            for k, index in enumerate(indices):
                found[index] = gamma[:, :, :, :, k].movedim(2, 0).clone()
    return [found[index] for index in sorted(found)]


def row_gradients(layer: TwoPointRNN, traces: Sequence[Tensor], credit: Tensor) -> list[Tensor]:
    """Σ_ν credit^ν · trace^ν for each batch row and parameter, (B, *W). credit (S, B, N)."""
    made = []
    for weight, trace in zip(layer.weights(), traces, strict=True):
        states, batch = trace.shape[:2]
        if trace.dim() == 2 + weight.dim():  # of the unit that the weight enters
            rows = trace.reshape(states, batch, credit.shape[-1], -1).to(credit.dtype)
            summed = torch.einsum("sbn,sbnm->bnm", credit, rows)
        else:  # of each unit of the weight's head
            by_head = credit.reshape(states, batch, *trace.shape[2:4])
            summed = torch.einsum("sbhj,sbhjpm->bhpm", by_head, trace)
        made.append(summed.reshape(batch, *weight.shape))
    return made
