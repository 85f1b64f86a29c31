"""The algorithms that the scaling benchmark times: each one training pass of an RGC layer, loss on s alone.

A case is told the problem (inputs, weights, δ(t) = ∂L/∂s(t)) and does in `run()` everything a user pays
for: forward, linearise, learn. Each predicts its memory and arithmetic before it is built, so that what can't
fit is not tried, and each is checked against float64 before it is timed.

Letters: T time, B batch, N units; RGC has S = 2 states (s, m) and K = 4 matrices (ss, ms, mm, sm).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import _checks as check
from ...backends import dispatch as ops
from ...cells.builtin import RGCCell
from ...cells.two_point import Linearization
from ...layers import functional
from ...online.sensitivity import PerUnit
from ...online.tape import Block, Tape, linearized
from ...rules import rfp, rtrl
from ...rules.rtrl import ExactSensitivity
from ..harness import inputs

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Relative error of a gradient that rounding can't explain.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
CHECK_STEPS = 8


@dataclass(frozen=True)
class Size:
    """N units, B rows, T steps, C steps a chunk, and e bytes a number."""

    units: int
    batch: int
    steps: int
    chunk: int
    itemsize: int = 4


@dataclass(frozen=True)
class Problem:
    """What all cases of a point share.

    x, delta (T, B, N); state: (s0, m0), each (B, N); weights: ss, ms, mm, sm, each (N, N).
    chunk: C. backend: what `PerUnit` and the loops over time are asked for.
    """

    x: Tensor
    delta: Tensor
    state: tuple[Tensor, Tensor]
    weights: list[Tensor]
    chunk: int
    backend: str

    @property
    def steps(self) -> int:
        return self.x.shape[0]

    @functools.cached_property
    def deltas(self) -> Tensor:
        """δ of both states (2, T, B, N): the loss is on s alone, so zero on m."""
        return torch.stack([self.delta, torch.zeros_like(self.delta)])

    def first(self, steps: int, chunk: int) -> Problem:
        """The same problem over its first steps, in other chunks."""
        return Problem(self.x[:steps], self.delta[:steps], self.state, self.weights, chunk, self.backend)


def problem(size: Size, *, kind: str, scale: float, seed: int, backend: str, like: Tensor) -> Problem:
    """Draw a problem; the same for the same arguments, in the dtype and on the device of `like`."""
    shape = (size.batch, size.units)
    return Problem(
        x=inputs.inputs(kind, size.steps, size.batch, size.units, seed, like),
        delta=inputs.normal((size.steps, *shape), seed, 3, like),
        state=(0.5 * inputs.normal(shape, seed, 4, like), 0.5 * inputs.normal(shape, seed, 5, like)),
        weights=inputs.weights(size.units, scale, seed, like),
        chunk=min(size.chunk, size.steps),
        backend=backend,
    )


class Case(ABC):
    """One algorithm on one problem.

    name, label   as in options and records, and as in plots
    exact         True if its gradient is BPTT's, False if RFP's, None if it has none
    truncated     whether credit stops where a run begins
    covers        time steps that one `run()` covers
    backend       what runs the Γ recursion, and why; None for a case that has none
    """

    name: str
    label: str
    exact: bool | None
    truncated = False
    covers: int
    backend: str | None = None

    @abstractmethod
    def __init__(self, problem: Problem) -> None: ...

    @staticmethod
    def entries(matrix: Tensor) -> Tensor:
        """What of an (N, N) matrix the case's network has: all of it, or its blocks (H, b, b)."""
        return matrix

    @abstractmethod
    def run(self) -> Sequence[Tensor]:
        """One pass over the next `covers` steps; the four gradients summed over them."""

    @staticmethod
    @abstractmethod
    def state_bytes(size: Size) -> int:
        """Bytes of learning state: what is kept from step to step so as to learn."""

    @classmethod
    @abstractmethod
    def peak_bytes(cls, size: Size) -> int:
        """About the most bytes alive at once, problem not counted."""

    @staticmethod
    @abstractmethod
    def flop(size: Size) -> float:
        """FLOP a time step of what grows fastest with N; elementwise work along a sequence is left out."""


# --- RFP with Γ: online ------------------------------------------------------------------------------------


def _gamma_bytes(size: Size) -> int:
    """Γ: S·K·B·N² numbers."""
    return 8 * size.batch * size.units**2 * size.itemsize


def _gradients(size: Size) -> int:
    """The gradients of all four matrices: 4·N² numbers."""
    return 4 * size.units**2 * size.itemsize


def _step(size: Size, arrays: float) -> int:
    """So many arrays of (B, N)."""
    return round(arrays * size.batch * size.units * size.itemsize)


def _window(size: Size, arrays: float) -> int:
    """So many arrays of (C, B, N)."""
    return size.chunk * _step(size, arrays)


def _sequence(size: Size, arrays: float) -> int:
    """So many arrays of (T, B, N)."""
    return size.steps * _step(size, arrays)


class _Stream(Case):
    """A case that carries the state from run to run, and takes its steps from x in turn."""

    exact: bool | None = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cell = RGCCell()
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        asked = "auto" if problem.backend == "compile" else problem.backend  # as OnlineLearner does
        self.loops = ops.choose_scan(asked, problem.x.device, problem.x.dtype)

    def record(self, steps: int) -> tuple[Block, Tensor]:
        """Run the layer on: the next `steps` steps, and their δ (S, C, B, N)."""
        begin = self.position
        x, delta = self.problem.x[begin : begin + steps], self.problem.deltas[:, begin : begin + steps]
        trajectory = ops.scan(self.cell, x[None], self.problem.weights, self.state, backend=self.loops)
        self.state = trajectory.states[:, -1].unbind()
        # start over where fewer steps are left than a run takes: a stream has no end
        self.position = begin + steps if begin + 2 * steps <= self.problem.steps else 0
        weights = self.problem.weights
        return linearized(self.cell, trajectory, weights, None, backend=self.loops), delta

    def advance(self, steps: int) -> tuple[Linearization, Tensor, Tensor]:
        """Run the layer on: linearisation, transition M and δ (S, C, B, N) of the next `steps` steps."""
        block, delta = self.record(steps)
        return block.lin, block.m, delta


class _Online(_Stream):
    """A case that carries Γ as well."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch = problem.x.shape[1]
        self.sensitivity = PerUnit(
            self.cell.matrices, problem.weights, 2, batch, problem.x.dtype, problem.backend
        )
        (group,) = self.sensitivity.groups
        self.backend = f"{group.backend}: {group.why}"

    @staticmethod
    def state_bytes(size: Size) -> int:
        return _gamma_bytes(size)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # plain torch, where there is no compiler, takes some blocks of Γ's rows beside
        return _gamma_bytes(size) + _gradients(size) + _step(size, 35)

    @staticmethod
    def flop(size: Size) -> float:
        # forward products; Γ's two products and an addition a state, its outer product, and the reading
        return size.batch * size.units**2 * (8 + 8 * 3 + 4 * 2 + 8 * 2)


class RfpStep(_Online):
    """Recurrent Forward Propagation one step at a time, a gradient every step: 8·B·N² numbers."""

    name, label = "rfp-step", "RFP, every step"
    covers = 1

    def run(self) -> Sequence[Tensor]:
        block, delta = self.record(1)
        gradient = self.sensitivity.step_(block, delta)
        assert gradient is not None
        return gradient


class RfpStepGamma(_Online):
    """Γ's advance and the gradient of one step, from M, φ and y: what the recursion itself costs."""

    name, label = "rfp-step-gamma", "RFP, Γ alone"
    exact = None
    covers = 1

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        lin, m, delta = self.advance(1)
        (self.group,) = self.sensitivity.groups
        self.step = [a.contiguous() for a in (m[:, :, 0], rfp.immediates(self.group.matrices, lin)[:, 0])]
        self.step += [rfp.signals(self.group.matrices, lin, None)[0], delta[:, 0].contiguous()]

    def run(self) -> Sequence[Tensor]:
        m, phi, y, delta = self.step
        gradient = ops.gamma_step_(self.group.gammas, m, phi, y, delta, backend=self.group.backend)
        assert gradient is not None
        return [gradient]


class Copy(Case):
    """A copy that moves the bytes that one step of Γ must: read and write Γ, and the gradient. Its floor.

    64·B·N² + 32·N² bytes in float32, half of them read and half written.
    """

    name, label = "copy", "copy of as many bytes"
    exact = None
    covers = 1

    def __init__(self, problem: Problem) -> None:
        _, batch, units = problem.x.shape
        self.source = torch.ones(8 * batch + 4, units, units, dtype=problem.x.dtype, device=problem.x.device)
        self.target = torch.empty_like(self.source)

    def run(self) -> Sequence[Tensor]:
        return [self.target.copy_(self.source)]

    @staticmethod
    def state_bytes(size: Size) -> int:
        return 0

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return 2 * (8 * size.batch + 4) * size.units**2 * size.itemsize

    @staticmethod
    def flop(size: Size) -> float:
        return 0


class RfpChunk(_Online):
    """Recurrent Forward Propagation in chunks of C steps: one pass over Γ a chunk."""

    name, label = "rfp-chunk", "RFP, chunks"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.covers = problem.chunk

    def run(self) -> Sequence[Tensor]:
        block, delta = self.record(self.covers)
        credit, first = ops.reverse_scan(block.m, delta, backend=self.loops)
        past = self.sensitivity.chunk_(block, first)
        own = rfp.weight_gradients(block.lin, self.cell.matrices, self.problem.weights, credit)
        assert past is not None
        return [a.add_(b) for a, b in zip(own, past, strict=True)]

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the chunk's own part of the gradient beside Γ's part
        return _gamma_bytes(size) + 2 * _gradients(size) + _window(size, 30)

    @staticmethod
    def flop(size: Size) -> float:
        passes = 8 * 3 + 8 * 2  # carried, and read, once a chunk
        return size.batch * size.units**2 * (8 + 16 + 8 + passes / size.chunk)


def _through_kept(case: _Stream, tape: Tape) -> tuple[Block, Sequence[Tensor], Tensor]:
    """Run a step on: the steps kept, their own part of its gradient, and the credit at the state before them."""
    lin, m, delta = case.advance(1)
    tape.append(Block(lin, m, None))
    (block,) = tape.blocks()
    since = torch.zeros_like(block.lin.before)
    since[:, -1:] = delta
    credit, first = ops.reverse_scan(block.m, since, backend=case.loops)
    own = rfp.weight_gradients(block.lin, case.cell.matrices, case.problem.weights, credit)
    return block, own, first


class RfpLazy(_Online):
    """Recurrent Forward Propagation with Γ read every step and rewritten once in C: a gradient every step."""

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
        return _gamma_bytes(size) + _window(size, RfpHistory.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the sum of gradients and the kept steps' own part beside Γ's; twice the steps kept where their buffer grows,
        # and what the fold makes of each step
        return super().peak_bytes(size) + _window(size, 4 * RfpHistory.KEPT) + 2 * _gradients(size)

    @staticmethod
    def flop(size: Size) -> float:
        # forward products, Γ read and a rank-C update every step, the kept steps' own part; Γ carried once in C
        return size.batch * size.units**2 * (8 + 16 + 16 + 4 * (size.chunk + 1) + 24 / size.chunk)


class RfpHistory(_Stream):
    """Recurrent Forward Propagation from the recorded steps since reset: no Γ, a gradient every step.

    One run is an episode of T steps, so the time a step is the mean over 1 … T steps since reset.
    """

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
        # the tape has as much spare room, or the scan as many temporaries
        return 2 * cls.state_bytes(size) + 3 * _gradients(size)

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8 * (size.steps + 1) / 2)


# --- over a whole sequence ---------------------------------------------------------------------------------


class _Sequence(Case):
    """Gradients of a whole sequence by `functional.rgc` and autograd."""

    learning: functional.Learning
    KEPT = 6  # arrays of (T, B, N) kept for the backward pass: two states and four gates
    MOST = 23  # arrays of (T, B, N) alive at once in the backward pass

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.covers = problem.steps
        self.weights = [w.detach().requires_grad_() for w in problem.weights]

    def run(self) -> Sequence[Tensor]:
        ss, ms, mm, sm = self.weights
        s, _ = functional.rgc(self.problem.x, ss, ms, mm, sm, self.problem.state, learning=self.learning)
        return torch.autograd.grad(s, self.weights, self.problem.delta)

    @classmethod
    def state_bytes(cls, size: Size) -> int:
        return _sequence(size, cls.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return _sequence(size, cls.MOST) + _gradients(size)

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8)


class RfpDual(_Sequence):
    """Recurrent Forward Propagation's gradient of a sequence, by one reverse scan: `loss.backward()`'s."""

    name, label = "rfp-dual", "RFP, whole sequence"
    learning: functional.Learning = "rfp"
    exact = False
    BY_WINDOWS = 9.4  # arrays of (T, B, N) alive at once where the backward pass goes by windows of time

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        whole = super().peak_bytes(size)
        large, window = functional.LARGE[size.itemsize == 4]
        if size.steps * size.batch * size.units <= large:
            return whole
        windows = 15 * window * size.itemsize
        return min(whole, _sequence(size, cls.BY_WINDOWS) + windows + _gradients(size))


class Bptt(_Sequence):
    """Backpropagation through time by hand."""

    name, label = "bptt", "BPTT, by hand"
    learning: functional.Learning = "bptt"
    exact = True
    MOST = 19

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8 + 8)


class BpttAutograd(_Sequence):
    """Backpropagation through time as torch users write it: a Python loop, and autograd."""

    name, label = "bptt-autograd", "BPTT, autograd"
    exact = True
    MOST = 7  # arrays of (T, B, N): what was saved goes as it is used, and δ comes in its place

    def run(self) -> Sequence[Tensor]:
        s, _ = eager(self.problem.x, self.weights, self.problem.state, dense)
        return torch.autograd.grad(s, self.weights, self.problem.delta)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # the gradients, and of one matrix what a step adds to its sum, and the sum
        return _sequence(size, cls.MOST) + 3 * _gradients(size) // 2

    @staticmethod
    def flop(size: Size) -> float:
        return size.batch * size.units**2 * (8 + 8 + 8)


class Tbptt(Case):
    """Truncated BPTT as torch users write it: autograd over C steps from a detached state. Exact within them."""

    name, label = "tbptt", "BPTT, truncated"
    exact = True
    truncated = True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.covers = problem.chunk
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        self.weights = [w.detach().requires_grad_() for w in problem.weights]

    def run(self) -> Sequence[Tensor]:
        now = slice(self.position, self.position + self.covers)
        s, state = eager(self.problem.x[now], self.weights, self.state, dense)
        self.state = [c.detach() for c in state]
        self.position = now.stop if now.stop + self.covers <= self.problem.steps else 0
        return torch.autograd.grad(s, self.weights, self.problem.delta[now])

    @staticmethod
    def state_bytes(size: Size) -> int:
        return _window(size, BpttAutograd.KEPT)

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        return _window(size, BpttAutograd.MOST) + 3 * _gradients(size) // 2

    @staticmethod
    def flop(size: Size) -> float:
        return BpttAutograd.flop(size)


# --- exact, online -----------------------------------------------------------------------------------------


class Rtrl(Case):
    """Exact real-time recurrent learning with dense weights: 8·B·N³ numbers, 32·B·N⁴ FLOP a step."""

    name, label = "rtrl", "RTRL, exact"
    exact = True
    covers = 1

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cell = RGCCell()
        self.state: Sequence[Tensor] = problem.state
        self.position = 0
        self.weights = [self.entries(weight).contiguous() for weight in problem.weights]
        self.sensitivity = ExactSensitivity(self.cell.matrices, self.weights, 2, problem.x.shape[1])
        self.no_delta = torch.zeros_like(problem.delta[0])

    def run(self) -> Sequence[Tensor]:
        t = self.position
        trajectory = self.cell.scan(self.problem.x[None, t : t + 1], self.weights, self.state)
        self.sensitivity.step_(self.cell.linearize(trajectory), 0, self.weights)
        self.state = trajectory.states[:, -1].unbind()
        self.position = (t + 1) % self.problem.steps
        return self.sensitivity.read(torch.stack([self.problem.delta[t], self.no_delta]))

    @staticmethod
    def state_bytes(size: Size) -> int:
        return 8 * size.batch * size.units**3 * size.itemsize

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # γ, the rows that are made of the next one at once, the Jacobian and its parts, and a gradient a row
        state, rows = cls.state_bytes(size), rtrl.rows_at_once(size.batch)
        return state + state * rows // size.batch + (8 + 4) * size.batch * size.units**2 * size.itemsize

    @staticmethod
    def flop(size: Size) -> float:
        return 32 * size.batch * size.units**4


class RtrlHeads(Rtrl):
    """Exact real-time recurrent learning with heads of b ≈ √N units: 8·B·N·b² numbers, 32·B·N·b³ FLOP a step."""

    name, label = "rtrl-heads", "RTRL, heads of √N"

    @staticmethod
    def entries(matrix: Tensor) -> Tensor:
        size = head_size(matrix.shape[0])
        blocks = matrix.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (H, b, H, b)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    @staticmethod
    def state_bytes(size: Size) -> int:
        return 8 * size.batch * size.units * head_size(size.units) ** 2 * size.itemsize

    @classmethod
    def peak_bytes(cls, size: Size) -> int:
        # γ and an eighth for the next, the Jacobian and its parts, and a gradient a row
        head = head_size(size.units)
        return 9 * cls.state_bytes(size) // 8 + (8 + 4) * size.batch * size.units * head * size.itemsize

    @staticmethod
    def flop(size: Size) -> float:
        return 32 * size.batch * size.units * head_size(size.units) ** 3


def head_size(units: int) -> int:
    """b, the divisor of N nearest to √N; the smaller of two that are as near."""
    sizes = [b for b in range(1, units + 1) if units % b == 0]
    return min(sizes, key=lambda b: max(b * b / units, units / (b * b)))


_ALL: tuple[type[Case], ...] = (
    RfpStep, RfpStepGamma, Copy, RfpLazy, RfpChunk, RfpHistory, RfpDual, Bptt, BpttAutograd, Tbptt, Rtrl, RtrlHeads
)  # fmt: skip
CASES = {case.name: case for case in _ALL}


# --- the check ---------------------------------------------------------------------------------------------


def eager(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """s (T, B, N) by paper eq. 13, one operation after the other, and the last s and m; product(W, c) is for W c."""
    ss, ms, mm, sm = weights
    s, m = state
    out = []
    for u in x.unbind():
        s, m = (
            (1 - product(ms, m).tanh()) * u + product(ss, s).tanh() * s,
            (1 - product(sm, s).tanh()) * u + product(mm, m).tanh() * m,
        )
        out.append(s)
    return torch.stack(out), (s, m)


def dense(w: Tensor, c: Tensor) -> Tensor:
    """W c of rows c."""
    return c @ w.t()


def own_path_only(w: Tensor, c: Tensor) -> Tensor:
    """W c, through which gradients pass along W's diagonal alone: what makes autograd's gradient RFP's."""
    return c.detach() @ w.t() + (c - c.detach()) * w.diagonal()


def oracle(problem: Problem, exact: bool, truncated: bool = False) -> Sequence[Tensor]:
    """The four gradients by float64 autograd of the eager loop: BPTT's if exact, else RFP's.

    truncated: credit stops at the beginning of each chunk.
    """
    weights = [w.double().detach().requires_grad_() for w in problem.weights]
    state: Sequence[Tensor] = [c.double() for c in problem.state]
    parts = []
    for x in problem.x.double().split(problem.chunk if truncated else problem.steps):
        s, state = eager(x, weights, state, dense if exact else own_path_only)
        parts.append(s)
        if truncated:
            state = [c.detach() for c in state]
    return torch.autograd.grad(torch.cat(parts), weights, problem.delta.double())


def check_steps(case: type[Case], steps: int) -> int:
    """How many steps the check of a case takes; of RTRL, whose steps are slow, the fewest that test J."""
    return min(steps, 2 if case is Rtrl else CHECK_STEPS)


def verify(case: type[Case], problem: Problem) -> None:
    """Raise ArithmeticError unless the case's gradients over a few steps agree with `oracle`."""
    if case.exact is None:
        return
    steps = check_steps(case, problem.steps)
    # in chunks of half of that, so that Γ carried from one chunk to the next is checked too
    chunk = max(1, steps // 2)
    short = problem.first(steps - steps % chunk, chunk)
    built = case(short)
    entries = [case.entries(w).double() for w in problem.weights]
    total = [torch.zeros_like(part) for part in entries]
    for _ in range(short.steps // built.covers):
        for sum_, part in zip(total, built.run(), strict=True):
            sum_.add_(part)
    tolerance = TOLERANCE[problem.x.dtype]
    network = replace(short, weights=[w if w.dim() == 2 else torch.block_diag(*w) for w in entries])
    for matrix, got, whole in zip(
        RGCCell.matrices, total, oracle(network, case.exact, case.truncated), strict=True
    ):
        want = case.entries(whole)
        error = float((got - want).norm() / want.norm())
        if not error <= tolerance:
            raise ArithmeticError(
                f"gradient of W_{matrix.name} differs from float64 by {error:.1e} relative "
                f"(tolerance {tolerance:.0e}) after {short.steps} steps"
            )


def predicted_seconds(case: type[Case], size: Size, rate: float) -> float:
    """Seconds a time step at `rate` FLOP/s: a lower bound, and close for RTRL."""
    return case.flop(size) / rate


def out_of_memory(error: BaseException) -> bool:
    """Is it the allocator's failure? torch has no class of its own for that on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told)


# By name alone: lazy, whose gradient is step's; history, which is not for long streams; and truncated BPTT, which costs
# what BPTT does.
DEFAULT = tuple(name for name in CASES if name not in ("rfp-lazy", "rfp-history", "tbptt"))


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not a case's, or for none."""
    if not names:
        raise ValueError(f"algorithms must name at least one of {', '.join(CASES)}")
    for name in names:
        check.one_of("algorithms", name, CASES)


def check_backend(backend: str) -> None:
    """Raise ValueError for a backend that PerUnit doesn't have."""
    check.one_of("backend", backend, ops.BACKENDS)
