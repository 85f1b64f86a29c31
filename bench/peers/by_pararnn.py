"""pararnn-torch: a GRU of diagonal recurrent weights, all steps at once by Newton's method (Danieli et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pararnn
import torch
from torch import Tensor

from .runner import Runner

UPDATE = 1  # the gate's place in torch.nn's order, r, z, n


class ParaRNN(Runner):
    """Its update gate is 1 - z: σ of the pre-activation's negative, so that gate's weights change their sign."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        units = arrays["x"].shape[-1]
        cell = pararnn.ParaGRU(units, units, max_recurrent_norm=None)
        of_input, recurrent = (
            torch.from_numpy(arrays[name]).unflatten(0, (3, -1)).clone()
            for name in ("weight_ih", "weight_hh")
        )
        with torch.no_grad():
            for weights in (of_input, recurrent):
                weights[UPDATE] *= -1
            cell.W_x.weight.copy_(of_input[[UPDATE, 0, 2]].flatten(0, 1))
            for parameter, weight in zip((cell.a_r, cell.a_z, cell.a_n), recurrent, strict=True):
                parameter.copy_(weight)
            cell.W_x.bias.zero_()
        cell.W_x.bias.requires_grad_(False)
        self.layer = pararnn.ParaRNN(cell, batch_first=False).to(device)
        self.x, self.delta = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "delta"))
        self.weights = [cell.W_x.weight, cell.a_r, cell.a_z, cell.a_n]
        self.note = f"Newton, at most {self.layer.config.max_iters} rounds"

    def run(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self.layer(self.x), self.weights, self.delta)

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        of_input, *recurrent = (gradient.cpu() for gradient in result)
        z, r, n = of_input.chunk(3)
        a_r, a_z, a_n = recurrent
        return {"weight_ih": torch.cat([r, -z, n]).numpy(), "weight_hh": torch.cat([a_r, -a_z, a_n]).numpy()}
