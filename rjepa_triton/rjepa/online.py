"""R-JEPA's updates at every step (train.updates=1) on a whole batch of sequences, in one call a network.

The top circuit with its predictor is a `Stream` that predicts itself. What learns from states alone, the yardstick's
predictor and those of a control whose recurrence can't learn, is the readout of a stream whose layer passes its input
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cells.two_point import Cell, Matrix
from ..layers.layer import TwoPointRNN
from ..online.options import Learning
from ..online.stream_readout import Residual
from ..online.streams import Loss, Stream
from ..rules import rfp
from .model import RJEPA, LinearPredictor, Predictor

LOSSES: dict[str, Loss] = {"square": "mse", "cosine": "cosine"}  # of each distance d_R


class PassingCell(Cell):
    """h = x + offset. A frozen layer of it passes its input on to a readout."""

    states = ("h",)
    gates: Sequence[str] = ()
    parameters = ("offset",)
    matrices: Sequence[Matrix] = ()

    def update(self, c: Sequence[Tensor], p: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (x[0] + x[1],)


class Streams:
    """Learns from batches of sequences as the steps of `train.Trainer` would, one update for each step.

    For t = 2 … T, with h(t) of the weights of that step:

        L(t) = d_R(target(t), G(h(t-1))) + d_R(yardstick(t), Y(stop[h(t-1)]))

    and after each t the optimizer takes a step. The target is stop[h(t)], or what the encoder says of the patch
    alone (`RJEPA.targets`), which doesn't depend on recurrent weights. Y is the yardstick's predictor. The parts
    share no weights, so each takes its steps for itself.

    Mutates the model's weights and the optimizer's state. `of` makes it where compiled code serves.
    """

    def __init__(
        self, model: RJEPA, optimizer: torch.optim.Optimizer, batch: int, backend: str = "compile"
    ) -> None:
        self.model, self.optimizer, self.batch, self.backend = model, optimizer, batch, backend
        circuit, predictor = model.encoder.circuit, readout_of(model.predictor)
        self.learns = any(p.requires_grad for p in circuit.parameters())
        self.own = self._stream(circuit, predictor, True) if self.learns else self._passing(predictor)
        self.yardstick: Stream | None = None
        if model.yardstick is not model.predictor:
            self.yardstick = self._passing(readout_of(model.yardstick))

    @classmethod
    def of(cls, model: RJEPA, optimizer: torch.optim.Optimizer, batch: int) -> Streams | str:
        """Streams of a model that learns with B = `batch` sequences at once, or why a loop over steps must do it."""
        circuit = model.encoder.circuit
        if model.target == "ema":
            return "the target is 'ema', whose network moves with each update"
        if model.target == "context_free" and any(not isinstance(one.reads, int) for one in circuit.matrices):
            return "the target is 'context_free', which moves with the circuit's input weights or biases"
        if circuit.learning not in rfp.RULES:
            return f"the rule is {circuit.learning!r}"
        try:
            return cls(model, optimizer, batch)
        except ValueError as reason:  # of backend="compile", which names it
            return str(reason)

    def _stream(self, layer: TwoPointRNN, readout: nn.Module, self_prediction: bool) -> Stream:
        """A stream whose optimizer has the groups and the state of the model's, of these weights alone."""
        own = [*layer.parameters(), *readout.parameters()]
        mine, groups = set(map(id, own)), []
        for group in self.optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) in mine]
            mine -= set(map(id, kept))
            if kept:
                groups.append({**group, "params": kept})
        frozen = [p for p in own if id(p) in mine]
        assert not any(p.requires_grad for p in frozen)
        if frozen:
            groups.append({**self.optimizer.param_groups[0], "params": frozen})
        kind: Any = type(self.optimizer)
        optimizer: torch.optim.Optimizer = kind(groups)
        optimizer.state = self.optimizer.state
        learning: Learning = layer.learning  # type: ignore[assignment]
        return Stream(
            layer,
            readout,
            self.batch,
            loss=LOSSES[self.model.kind],
            optimizer=optimizer,
            learning=learning,
            self_prediction=self_prediction,
            backend=self.backend,
        )

    def _passing(self, readout: nn.Module) -> Stream:
        """A stream of a readout alone."""
        weight = next(readout.parameters())
        layer = TwoPointRNN(PassingCell(), self.model.encoder.circuit.hidden_size)
        layer.to(weight).requires_grad_(False)
        return self._stream(layer, readout, False)

    def learn(self, x: Tensor, yardstick: Tensor) -> None:
        """Learn from x^High (T, B, N) and the yardstick (T, B, E) of the same patches, from a zero state."""
        given = None if self.model.target == "h" else self.model.encoder.context_free(x).detach()
        if self.learns:
            self.own.reset()
            h = self.own.run(x, given, hidden=True).hidden
            assert h is not None
        else:
            with torch.no_grad():
                h = self.model.encoder.encode(x, None).h
            self._learn_from(self.own, h, h if given is None else given)
        if self.yardstick is not None:
            self._learn_from(self.yardstick, h, yardstick)

    @staticmethod
    def _learn_from(stream: Stream, h: Tensor, target: Tensor) -> None:
        if len(h) > 1:
            stream.run(h[:-1], target[1:])


def readout_of(predictor: nn.Module) -> nn.Module:
    """A predictor as the readout of a stream. It has the predictor's own weights."""
    if isinstance(predictor, Predictor):
        return Residual(nn.Sequential(predictor.first, nn.ReLU(), predictor.second))
    assert isinstance(predictor, LinearPredictor)
    return predictor.of_h


def optimizer_in(wrapped: Any) -> torch.optim.Optimizer:
    """The optimizer that Lightning Fabric has wrapped."""
    found: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
    return found
