"""What a learner carries, as its user sees it: traces for each parameter, and the gradients of single batch rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.layer import TwoPointRNN
from ..rules import rfp
from .readout import ReadoutOf
from .sensitivity import Exact, NoSensitivity, PerUnit, RankOne, Sensitivity
from .tape import Block


def by_parameter(sensitivity: Sensitivity) -> list[Tensor]:
    """The sensitivities as copies, one tensor for each parameter.

    PerUnit: (S, B, *W), W the weight's shape. Exact: (S, B, H, b, b, M): of unit j of a head to the weight's row p.
    """
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


def read_rows(layer: TwoPointRNN, sensitivity: Sensitivity, credit: Tensor) -> list[Tensor]:
    """Σ_ν credit^ν · sensitivity^ν for each batch row and parameter, (B, *W). credit (S, B, N)."""
    weights, batch = layer.weights(), credit.shape[1]
    if isinstance(sensitivity, NoSensitivity):
        return [credit.new_zeros(batch, *weight.shape) for weight in weights]
    if isinstance(sensitivity, RankOne):
        return sensitivity.read_rows(credit)
    made = []
    for weight, trace in zip(weights, by_parameter(sensitivity), strict=True):
        states = len(trace)
        if trace.dim() == 2 + weight.dim():  # of the unit that the weight enters
            rows = trace.reshape(states, batch, credit.shape[-1], -1).to(credit.dtype)
            summed = torch.einsum("sbn,sbnm->bnm", credit, rows)
        else:  # of each unit of the weight's head
            by_head = credit.reshape(states, batch, *trace.shape[2:4])
            summed = torch.einsum("sbhj,sbhjpm->bhpm", by_head, trace)
        made.append(summed.reshape(batch, *weight.shape))
    return made


def rows_of_steps(layer: TwoPointRNN, block: Block, credit: Tensor) -> list[Tensor]:
    """Σ_t E^k(t) y^k(t)ᵀ of each batch row and parameter, (B, *W): the steps' own part. credit λ (S, T, B, N)."""
    rows = []
    for b in range(credit.shape[2]):
        one = block.map(lambda array, b=b: array.narrow(-2, b, 1))  # type: ignore[misc]
        of_row = credit.narrow(2, b, 1)
        rows.append(rfp.weight_gradients(one.lin, layer.matrices, layer.weights(), of_row, one.inputs))
    return [torch.stack(of_weight) for of_weight in zip(*rows, strict=True)]


def through_readout(
    layer: TwoPointRNN, outputs: Sequence[Tensor], x: Tensor, credit: Tensor
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """What a credit (B, N) of a layer's output is for the cell's outputs (B, N), and for the readout's parameters.

    The latter are the gradients of single batch rows, (B, *W) each, by the parameters' names. outputs (B, N) each and
    x (B, F): of the step, of which row b of the layer's output depends on row b alone.
    """
    own = set(layer._names)
    parameters = {
        name: parameter.detach()
        for name, parameter in layer.named_parameters()
        if name not in own and not name.startswith("parametrizations.")
    }

    def of_row(
        row: Sequence[Tensor], x: Tensor, credit: Tensor
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        def output(row: Sequence[Tensor], parameters: dict[str, Tensor]) -> Tensor:
            replaced = {f"layer.{name}": value for name, value in parameters.items()}
            return torch.func.functional_call(ReadoutOf(layer), replaced, (row, x))

        return torch.func.vjp(output, row, parameters)[1](credit)

    return torch.func.vmap(of_row)(tuple(outputs), x, credit)
