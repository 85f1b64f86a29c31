"""FlashRNN (Pöppel et al. 2024): LSTM and GRU in fused CUDA kernels.

It is written after the library's documentation and was never run: no CUDA device was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flashrnn
import numpy as np
import torch
from torch import Tensor

from .runner import Runner

# The order of gates. Its GRU has the part that the reset gate multiplies first; its LSTM has torch.nn's order.
ORDER = {"lstm": (0, 1, 2, 3), "gru": (2, 0, 1)}


class FlashRNN(Runner):
    """One head, so that recurrent matrices are dense. torch computes the input's product, for all steps at once."""

    note = 'backend "cuda_fused", float32'

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        given = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.x = given["x"].transpose(0, 1).contiguous()  # (B, T, N)
        self.delta = given["delta"].transpose(0, 1)[:, :, None].contiguous()  # (B, T, 1, N)
        self.weights = [given[name].requires_grad_() for name in self.network.parameters]

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wx (B, T, G, 1, N), R (G, 1, N, N) and b (G, 1, N) or, of a GRU, (4, 1, N)."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights
        batch, steps, units = self.x.shape
        order = ORDER[self.task.network]
        entering = torch.nn.functional.linear(self.x, weight_ih).view(batch, steps, -1, 1, units)
        recurrent = weight_hh.view(-1, 1, units, units)
        own, theirs = bias_ih.view(-1, 1, units), bias_hh.view(-1, 1, units)
        if self.task.network == "gru":
            bias = torch.stack([theirs[2], own[0] + theirs[0], own[1] + theirs[1], own[2]])
            recurrent = torch.stack([recurrent[k] for k in order])
        else:
            bias = own + theirs
        return entering, recurrent, bias

    def run(self) -> Sequence[Tensor]:
        states, _ = flashrnn.flashrnn(
            *self._joined(), function=self.task.network, backend="cuda_fused", dtype="float32"
        )
        return torch.autograd.grad(states[0], self.weights, self.delta)  # of [states, B, T, heads, N]

    def named(self, result: Any) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy() for name, g in zip(self.network.parameters, result, strict=True)}
