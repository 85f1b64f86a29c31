"""This package's own ways to the gradients, as peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...layers import functional
from ...layers import named as nn
from ...online.learner import OnlineLearner
from ..scaling import cases
from .runner import Runner
from .tasks import STATE


def _problem(arrays: Mapping[str, np.ndarray], parameters: Sequence[str], device: str) -> cases.Problem:
    def on(name: str) -> Tensor:
        return torch.from_numpy(arrays[name]).to(device)

    s, m = map(on, STATE)
    return cases.Problem(on("x"), on("delta"), (s, m), [on(p) for p in parameters], chunk=1, backend="auto")


class _Sequence(Runner):
    """The backward pass of a layer over the whole sequence: RGC as a function, LSTM and GRU as modules."""

    learning: functional.Learning

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.case: cases.Case | None = None
        if not self.network.has_input_weights:
            case = cases.RfpDual if self.learning == "rfp" else cases.Bptt
            self.case = case(_problem(arrays, self.network.parameters, device))
            return
        units = arrays["x"].shape[-1]
        name, _, diagonal = self.task.network.partition("-")
        kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}[name]
        options = {"recurrence": "diagonal", "bias": False} if diagonal else {}
        self.layer = kind(units, units, learning=self.learning, **options)
        self.layer.load_state_dict(
            {f"{name}_l0": torch.from_numpy(arrays[name]) for name in self.network.parameters}
        )
        self.layer.to(device)
        self.x, self.delta = (torch.from_numpy(arrays[name]).to(device) for name in ("x", "delta"))
        self.parameters = dict(self.layer.named_parameters())

    def run(self) -> Sequence[Tensor]:
        if self.case is not None:
            return self.case.run()
        return torch.autograd.grad(self.layer(self.x)[0], list(self.parameters.values()), self.delta)

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        found: list[np.ndarray] = [g.cpu().numpy() for g in result]
        if self.case is not None:
            return dict(zip(self.network.parameters, found, strict=True))
        by_name = dict(zip(self.parameters, found, strict=True))
        gates = ("i", "f", "g", "o") if self.task.network == "lstm" else ("r", "z", "n")
        # torch.nn adds two biases where this package has one
        recurrent = [f"bias_h{g}" if f"bias_h{g}" in by_name else f"bias_{g}" for g in gates]
        joined = {
            "weight_ih": [f"weight_in_{g}" for g in gates],
            "weight_hh": [f"weight_h{g}" for g in gates],
            "bias_ih": [f"bias_{g}" for g in gates],
            "bias_hh": recurrent,
        }
        return {
            name: np.concatenate([by_name[gate] for gate in joined[name]]) for name in self.network.parameters
        }


class Dual(_Sequence):
    """RFP's gradient by one reverse scan."""

    learning: functional.Learning = "rfp"


class Bptt(_Sequence):
    """Backpropagation through time with a hand-written backward pass."""

    learning: functional.Learning = "bptt"


class Step(Runner):
    """One step of Γ and its gradient, without autograd, as the scaling benchmark calls it."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        self.case = cases.RfpStep(_problem(arrays, self.network.parameters, device))
        self.note = self.case.backend

    def run(self) -> Sequence[Tensor]:
        return self.case.run()

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy().copy() for name, g in zip(self.network.parameters, result, strict=True)}


class Learner(Runner):
    """`OnlineLearner.step` and the loss's `backward()`, as a user writes them."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        given = _problem(arrays, self.network.parameters, device)
        _, batch, units = given.x.shape
        layer = nn.RGC(units).to(device)
        self.parameters = [layer.get_parameter(name) for name in self.network.parameters]
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, given.weights, strict=True):
                parameter.copy_(weight)
        self.learner = OnlineLearner(layer, batch, learning="rfp")
        self.note = f"form {self.learner.form}"
        self.x, self.delta = given.x.unbind(), given.delta.unbind()
        self.position = 0

    def run(self) -> Sequence[Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        self.learner.step(self.x[self.position]).backward(self.delta[self.position])
        self.position = (self.position + 1) % self.steps
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def named(self, result: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {name: g.cpu().numpy().copy() for name, g in zip(self.network.parameters, result, strict=True)}
