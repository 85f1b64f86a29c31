"""The ways of torch itself: an eager loop under autograd, `torch.compile` of it, and torch.nn's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .runner import Runner
from .tasks import states

Pair = tuple[Tensor, Tensor]


def step(x: Tensor, s: Tensor, m: Tensor, ss: Tensor, ms: Tensor, mm: Tensor, sm: Tensor) -> Pair:
    """One step of an RGC, as a torch user would write it."""
    return (
        (1 - torch.tanh(m @ ms.t())) * x + torch.tanh(s @ ss.t()) * s,
        (1 - torch.tanh(s @ sm.t())) * x + torch.tanh(m @ mm.t()) * m,
    )


def loop(one: Callable[..., Pair], x: Tensor, s: Tensor, m: Tensor, *weights: Tensor) -> Tensor:
    """s (T, B, N) of the whole sequence, with `one` called for each step."""
    out = []
    for u in x.unbind():
        s, m = one(u, s, m, *weights)
        out.append(s)
    return torch.stack(out)


class Eager(Runner):
    """Autograd of a Python loop over an RGC's steps."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.x, self.delta, *self.state = (
            torch.from_numpy(a).to(device)
            for a in (arrays["x"], arrays["delta"], *states(self.network, arrays))
        )
        self.weights = [
            torch.from_numpy(arrays[p]).to(device).requires_grad_() for p in self.network.parameters
        ]

    def forward(self) -> Tensor:
        return loop(step, self.x, *self.state, *self.weights)

    def run(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self.forward(), self.weights, self.delta)

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy() for name, g in zip(self.network.parameters, result, strict=True)}


class Compiled(Eager):
    """`torch.compile` of the whole loop, which it unrolls into one forward and one backward graph."""

    note = "the whole loop as one graph"

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.compiled = torch.compile(lambda *given: loop(step, *given), fullgraph=True, dynamic=False)

    def forward(self) -> Tensor:
        return self.compiled(self.x, *self.state, *self.weights)


class CompiledScan(Eager):
    """`torch.compile` of torch's operator `scan`, which has a loop in its graph."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        from torch._higher_order_ops.scan import scan

        def whole(x: Tensor, *given: Tensor) -> Tensor:
            *state, ss, ms, mm, sm = given

            def one(before: Pair, u: Tensor) -> tuple[Pair, Tensor]:
                after = step(u, before[0], before[1], ss, ms, mm, sm)
                return after, after[0].clone()

            return scan(one, tuple(state), x, dim=0)[1]

        self.compiled = torch.compile(whole, fullgraph=True, dynamic=False)
        self.note = "torch._higher_order_ops.scan, one loop in the graph"

    def forward(self) -> Tensor:
        return self.compiled(self.x, *self.state, *self.weights)


class CompiledStep(Eager):
    """A Python loop over `torch.compile` of one step."""

    note = "one step as a graph"

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def forward(self) -> Tensor:
        return loop(self.compiled, self.x, *self.state, *self.weights)


class Builtin(Runner):
    """torch.nn.LSTM or torch.nn.GRU, which on a GPU are cuDNN's."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        units = arrays["x"].shape[-1]
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[self.task.network]
        self.layer = kind(units, units)
        self.layer.load_state_dict(
            {f"{name}_l0": torch.from_numpy(arrays[name]) for name in self.network.parameters}
        )
        self.layer.to(device)
        self.x, self.delta = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "delta"))
        self.weights = [self.layer.get_parameter(f"{name}_l0") for name in self.network.parameters]
        if device != "cpu":
            self.note = f"cuDNN {torch.backends.cudnn.version()}"

    def run(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self.layer(self.x)[0], self.weights, self.delta)

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy() for name, g in zip(self.network.parameters, result, strict=True)}
