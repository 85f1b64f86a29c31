"""RFP online: with Γ advanced every step, in chunks, or rewritten once in C steps, or with the history in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...backend import operations, table
from ...cells.builtin import RGCCell
from ...cells.two_point import Linearization
from ...layers.named import RGC
from ...online.sensitivity import PerUnit
from ...online.stream_code import PANELS_BELOW, copies_panels
from ...online.streams import Stream
from ...online.tape import Block, Tape, linearized
from ...rules import rfp
from .case import Case, gamma_bytes, gradient_bytes, sequence_bytes, step_bytes, window_bytes
from .problem import Problem, Size


class _Stream(Case):
    """A case that carries the layer's state from run to run, and takes the next steps of x in each."""

    exact: bool | None = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cell = RGCCell()
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        asked = "auto" if problem.backend == "compile" else problem.backend  # as OnlineLearner does
        self.loops = operations.choose_scan(asked, problem.x.device, problem.x.dtype)

    def record(self, steps: int) -> tuple[Block, Tensor]:
        """Run the layer over the next `steps` steps; returns their linearized block, and their δ (S, C, B, N)."""
        begin = self.position
        x, delta = self.problem.x[begin : begin + steps], self.problem.deltas[:, begin : begin + steps]
        trajectory = operations.scan(self.cell, x[None], self.problem.weights, self.state, backend=self.loops)
        self.state = trajectory.states[:, -1].unbind()
        # a stream has no end: x starts over where it has fewer steps left than a run takes
        self.position = begin + steps if begin + 2 * steps <= self.problem.steps else 0
        weights = self.problem.weights
        return linearized(self.cell, trajectory, weights, None, backend=self.loops), delta

    def advance(self, steps: int) -> tuple[Linearization, Tensor, Tensor]:
        """Run the layer over the next `steps` steps; returns linearization, transition M and δ (S, C, B, N)."""
        block, delta = self.record(steps)
        return block.lin, block.m, delta


class _Online(_Stream):
    """A case that carries Γ from run to run as well."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch = problem.x.shape[1]
        self.sensitivity = PerUnit(
            self.cell.matrices, problem.weights, 2, batch, problem.x.dtype, problem.backend
        )

    @property
    def backend(self) -> str:
        (group,) = self.sensitivity.groups
        return ": ".join(group.serving())

    @staticmethod
    def state_bytes(size: Size) -> int:
        return gamma_bytes(size)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # without a compiler plain torch needs some blocks of Γ's batch rows beside these
        return gamma_bytes(size) + gradient_bytes(size) + step_bytes(size, 35)

    @staticmethod
    def flop(size: Size) -> float:
        # forward products; for each number of Γ two products and an addition, the outer product φ yᵀ, and the read
        return size.batch * size.units**2 * (8 + 8 * 3 + 4 * 2 + 8 * 2)


class RfpStep(_Online):
    """Recurrent Forward Propagation one step at a time, with a gradient every step. Γ has 8·B·N² numbers."""

    name, label = "rfp-step", "RFP, every step"
    covers = 1

    def run(self) -> Sequence[Tensor]:
        block, delta = self.record(1)
        gradient = self.sensitivity.step_(block, delta)
        assert gradient is not None
        return gradient


class RfpStepGamma(_Online):
    """Γ's step and its gradient alone, from given M, φ and y: what the recursion itself costs."""

    name, label = "rfp-step-gamma", "RFP, Γ alone"
    exact = None
    covers = 1

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        lin, m, delta = self.advance(1)
        (self.group,) = self.sensitivity.groups
        self.step = [a.contiguous() for a in (m[:, :, 0], rfp.immediates(self.group.matrices, lin)[:, 0])]
        self.step += [rfp.signals(self.group.matrices, lin, None)[0], delta[:, 0].contiguous()]

    @property
    def backend(self) -> str:
        return ": ".join(table.serving(self.group.backend, self.group.why, operations.gamma_step_))

    def run(self) -> Sequence[Tensor]:
        m, phi, y, delta = self.step
        gradient = operations.gamma_step_(self.group.gammas, m, phi, y, delta, backend=self.group.backend)
        assert gradient is not None
        return [gradient]


class Pass(Case):
    """A pass in place over as many numbers as Γ has: 64·B·N² bytes in float32, half read and half written.

    Γ's step must read and write them, too, and they meet the same caches. So its time is given as a multiple of this
    one's: what is left of its growth with N is its own.
    """

    name, label = "pass", "a pass over Γ's bytes"
    exact = None
    covers = 1

    def __init__(self, problem: Problem) -> None:
        _, batch, units = problem.x.shape
        self.numbers = torch.ones(8 * batch, units, units, dtype=problem.x.dtype, device=problem.x.device)
        # a call of torch takes as long as a pass over the numbers of a small layer; numpy's takes a tenth
        alone = self.numbers.device.type == "cpu" and torch.get_num_threads() == 1
        self.array = self.numbers.numpy() if alone else None

    def run(self) -> Sequence[Tensor]:
        if self.array is None:
            return [self.numbers.mul_(1.0)]
        np.multiply(self.array, 1.0, out=self.array)
        return [self.numbers]

    @staticmethod
    def state_bytes(size: Size) -> int:
        return gamma_bytes(size)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return gamma_bytes(size)

    @staticmethod
    def flop(size: Size) -> float:
        return 8 * size.batch * size.units**2


class RfpStream(Case):
    """Recurrent Forward Propagation of a whole stream in one call of `Stream`, with a step of SGD at every step.

    A readout of one output passes the gradient on: δ(t) = W_out ∂L/∂o(t). The learning rate is 0, so that each call
    meets the same weights; the arithmetic is the same. For its check the optimizer steps once a run, at rate 1, and
    the change of the weights is the gradient, which `run()` gives then alone.
    """

    name, label = "rfp-stream", "RFP, a stream in one call"
    exact = False
    countable = False
    LEAST = 1 << 22  # numbers of Γ that a run goes through at least: what a call costs is little beside them

    def __init__(self, problem: Problem, *, check: bool = False) -> None:
        steps, batch, units = problem.x.shape
        self.check = check
        again = 1 if check else self._again(units, batch, steps)
        self.covers = again * steps
        self.x = problem.x.repeat(again, 1, 1)
        self.target = problem.delta[..., :1].repeat(again, 1, 1)
        with torch.device(problem.x.device):
            layer = RGC(units, dtype=problem.x.dtype)
            readout = torch.nn.Linear(units, 1, bias=False, dtype=problem.x.dtype)
        self.weights = list(layer.weights())
        with torch.no_grad():
            for parameter, weight in zip(self.weights, problem.weights, strict=True):
                parameter.copy_(weight)
        self.readout = readout.weight
        self.stream = Stream(
            layer, readout, batch, loss="delta", lr=float(check), update_every=steps if check else 1
        )
        self.stream.learner.state = problem.state

    @classmethod
    def _again(cls, units: int, batch: int, steps: int) -> int:
        """How often one run goes through the problem's steps."""
        return max(1, cls.LEAST // (8 * batch * units**2 * steps))

    @classmethod
    def checked(cls, problem: Problem) -> tuple[Case, Problem]:
        made = cls(problem, check=True)
        return made, replace(problem, delta=problem.delta[..., :1] * made.readout.detach())

    @property
    def backend(self) -> str:
        return self.stream.why

    def run(self) -> Sequence[Tensor]:
        if not self.check:
            self.stream.run(self.x, self.target)
            return []
        before = [weight.detach().clone() for weight in self.weights]
        self.stream.run(self.x, self.target)
        return [old - new.detach() for old, new in zip(before, self.weights, strict=True)]

    @staticmethod
    def state_bytes(size: Size) -> int:
        return gamma_bytes(size)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # Γ; copies of the weights, and of both in panels; x, as it is given and as it is laid out
        again = cls._again(size.units, size.batch, size.steps)
        panels = size.units < PANELS_BELOW and copies_panels(size.units, size.batch, again * size.steps)
        copies = 7 if panels else 1
        return gamma_bytes(size) + copies * gradient_bytes(size) + 2 * again * sequence_bytes(size, 1)

    @staticmethod
    def flop(size: Size) -> float:
        return _Online.flop(size)


class RfpChunk(_Online):
    """Recurrent Forward Propagation in chunks of C steps, with one pass over Γ for each chunk."""

    name, label = "rfp-chunk", "RFP, chunks"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.covers = problem.chunk

    def run(self) -> Sequence[Tensor]:
        block, delta = self.record(self.covers)
        credit, first = operations.reverse_scan(block.m, delta, backend=self.loops)
        past = self.sensitivity.chunk_(block, first)
        own = rfp.weight_gradients(block.lin, self.cell.matrices, self.problem.weights, credit)
        assert past is not None
        return [a.add_(b) for a, b in zip(own, past, strict=True)]

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the gradient of credit inside the chunk, beside the one that is read from Γ
        return gamma_bytes(size) + 2 * gradient_bytes(size) + window_bytes(size, 30)

    @staticmethod
    def flop(size: Size) -> float:
        passes = 8 * 3 + 8 * 2  # Γ is carried, and read, once a chunk
        return size.batch * size.units**2 * (8 + 16 + 8 + passes / size.chunk)


def _through_kept(case: _Stream, tape: Tape) -> tuple[Block, Sequence[Tensor], Tensor]:
    """Run one step and keep it on the tape.

    Returns the block of all steps kept, the part of this step's gradient whose credit stays within them, and the credit
    at the state before them, which reads Γ.
    """
    lin, m, delta = case.advance(1)
    tape.append(Block(lin, m, None))
    (block,) = tape.blocks()
    since = torch.zeros_like(block.lin.before)
    since[:, -1:] = delta
    credit, first = operations.reverse_scan(block.m, since, backend=case.loops)
    own = rfp.weight_gradients(block.lin, case.cell.matrices, case.problem.weights, credit)
    return block, own, first


class RfpLazy(_Online):
    """Recurrent Forward Propagation with Γ read every step but rewritten once in C steps; a gradient every step."""

    name, label = "rfp-lazy", "RFP, Γ rewritten once in C steps"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.covers = problem.chunk

    def run(self) -> Sequence[Tensor]:
        tape, total = Tape(), [torch.zeros_like(w) for w in self.problem.weights]
        for step in range(1, self.covers + 1):
            block, own, first = _through_kept(self, tape)
            full = step == self.covers
            past = self.sensitivity.chunk_(block, first) if full else self.sensitivity.read(first)
            assert past is not None
            for sum_, *parts in zip(total, own, past, strict=True):
                for part in parts:
                    sum_.add_(part)
        return total

    @staticmethod
    def state_bytes(size: Size) -> int:
        return gamma_bytes(size) + window_bytes(size, RfpHistory.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # beside the gradient read from Γ: the sum of gradients, and the part of the kept steps; the kept steps twice
        # while their buffer grows, and the arrays that the rewriting of Γ makes of each step
        return super().peak_bytes(size) + window_bytes(size, 4 * RfpHistory.KEPT) + 2 * gradient_bytes(size)

    @staticmethod
    def flop(size: Size) -> float:
        # forward products, Γ read every step, the rank-C update, the kept steps' part of the gradient; Γ carried once
        # in C
        return size.batch * size.units**2 * (8 + 16 + 16 + 4 * (size.chunk + 1) + 24 / size.chunk)


class RfpHistory(_Stream):
    """Recurrent Forward Propagation from the recorded steps since reset, without Γ; a gradient every step.

    One run is an episode of T steps, so its time a step is the mean over 1 … T steps since reset.
    """

    countable = False
    name, label = "rfp-history", "RFP, history"
    KEPT = 10  # arrays of (T, B, N): M, φ and the states read

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.covers = problem.steps

    def run(self) -> Sequence[Tensor]:
        self.state = self.problem.state
        tape, total = Tape(), [torch.zeros_like(w) for w in self.problem.weights]
        for _ in range(self.covers):
            for sum_, part in zip(total, _through_kept(self, tape)[1], strict=True):
                sum_.add_(part)
        return total

    @staticmethod
    def state_bytes(size: Size) -> int:
        return RfpHistory.KEPT * size.steps * size.batch * size.units * size.itemsize

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the tape has as much space again while it grows, or the scan as many temporary arrays
        return 2 * cls.state_bytes(size) + 3 * gradient_bytes(size)

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8 * (size.steps + 1) / 2)
