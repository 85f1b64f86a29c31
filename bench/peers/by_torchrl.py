"""TorchRL's recurrent modules with their Triton kernels, for a GPU.

It is written after their documentation and was never run: no CUDA device was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import GRUModule, LSTMModule

from .runner import Runner
from .tasks import STATE


class TorchRL(Runner):
    """`LSTMModule` or `GRUModule` over one trajectory for each batch row, with products in full float32."""

    note = 'recurrent_backend="triton", recurrent_matmul_precision="ieee"'

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        steps, batch, units = arrays["x"].shape
        kept = STATE[: self.network.states]
        kind: Any = {"lstm": LSTMModule, "gru": GRUModule}[self.task.network]
        self.module = kind(
            input_size=units,
            hidden_size=units,
            in_keys=["x", *kept],
            out_keys=["output", *(("next", name) for name in kept)],
            recurrent_backend="triton",
            recurrent_matmul_precision="ieee",
            default_recurrent_mode=True,
            device=device,
        )
        by_name = dict(self.module.named_parameters())
        self.weights = [
            next(value for key, value in by_name.items() if key.endswith(f"{name}_l0"))
            for name in self.network.parameters
        ]
        with torch.no_grad():
            for weight, name in zip(self.weights, self.network.parameters, strict=True):
                weight.copy_(torch.from_numpy(arrays[name]))
        first = torch.zeros(batch, steps, 1, dtype=torch.bool, device=device)
        first[:, 0] = True
        given = {"x": torch.from_numpy(arrays["x"]).to(device).transpose(0, 1).contiguous(), "is_init": first}
        for name in kept:  # (B, T, layers, N)
            given[name] = torch.zeros(batch, steps, 1, units, device=device)
        self.given = TensorDict(given, batch_size=[batch, steps], device=device)
        self.delta = torch.from_numpy(arrays["delta"]).to(device).transpose(0, 1).contiguous()

    def run(self) -> Sequence[Tensor]:
        output = self.module(self.given.copy())["output"]
        return torch.autograd.grad(output, self.weights, self.delta)

    def named(self, result: Any) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy() for name, g in zip(self.network.parameters, result, strict=True)}
