"""The kernels that `rjepa bench kernels` measures: what each is given and must move, its reference, and what runs it.

Every kernel is of an RGC: S = 2 states, K = 4 matrices, M = N, or in heads M = b units. On a GPU the launchers of
`kernels/` run it, and the same function by eager torch and torch.compile; on the CPU the backends of `ops`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...backends import dispatch as ops
from ...backends.native import calls as _native
from ...cells.builtin import RGCCell
from ...cells.two_point import Partials, Trajectory
from ...rules import rfp

STATES, MATRICES = 2, 4
BY = ("triton", "torch", "compile")


@dataclass(frozen=True)
class Given:
    """What a kernel is given: a tensor of Γ or γ for each that it advances, none of them or more."""

    gammas: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Any:
        """The same with a Γ of its own; all of it in `dtype` if given."""
        if dtype is None:
            return replace(self, gammas=[g.clone() for g in self.gammas])
        others = {name: a.to(dtype) for name, a in vars(self).items() if isinstance(a, Tensor)}
        return replace(self, gammas=[g.to(dtype, copy=True) for g in self.gammas], **others)


@dataclass(frozen=True)
class Problem(Given):
    """What Γ's kernels and scans are given.

    gammas S of (B, K, N, M), m (S, S, T, B, N), phi (S, T, B, K, N), y (T, B, K, M), delta (S, T, B, N),
    credit (S, B, N); and made of m and φ: suffix as m, whole (S, S, B, N), arriving as φ.
    partials (K + S, T, B, N): φ of each matrix in the one state that it enters, and ∂F_ν/∂x of each state.
    """

    m: Tensor
    phi: Tensor
    y: Tensor
    delta: Tensor
    credit: Tensor
    suffix: Tensor
    whole: Tensor
    arriving: Tensor
    partials: Tensor


@dataclass(frozen=True)
class Circuit(Given):
    """What an RGC's own kernels are given.

    x (T, B, N), weights (4, N, N) and a view of their diagonals (4, N), state (2, B, N), gates (2, T, B, 2, N), before
    and delta (2, T, B, N); and of one step, own (2, B, N) and phi (4, B, N).
    """

    x: Tensor
    weights: Tensor
    diagonals: Tensor
    state: Tensor
    gates: Tensor
    before: Tensor
    delta: Tensor
    own: Tensor
    phi: Tensor


@dataclass(frozen=True)
class HeadsStep(Given):
    """What exact RTRL by heads is given: one γ (B, H, S, b, K, b, b), and of a step, jacobian (B, H, S·b, S·b), phi
    (S, B, K, N), y (B, K, H, b), delta (S, B, N)."""

    jacobian: Tensor
    phi: Tensor
    y: Tensor
    delta: Tensor


Runner = Callable[[Any], Sequence[Tensor]]


class Kernel(ABC):
    """One kernel: what it is given and must move, what it computes, and what runs it.

    name    as in options and records
    dtype   "float32" or "bfloat16": what Γ is kept in
    rate    "float32" or "tf32": the GEMM rate that its arithmetic is held against
    steps   of a chunk; None where the option says it
    takes   names of the tensors that it reads of what it is given, Γ not among them
    """

    name: str
    takes: tuple[str, ...]
    has_gamma = True
    dtype: str = "float32"
    rate: str = "float32"
    steps: int | None = None

    @abstractmethod
    def flop(self, units: int, batch: int, steps: int) -> float:
        """Additions and multiplications of one call, S×S products per unit left out where there is a Γ."""

    @abstractmethod
    def written(self, units: int, batch: int, steps: int) -> int:
        """Numbers that one call must write, Γ itself not counted. All are float32."""

    @abstractmethod
    def reference(self, problem: Any) -> Sequence[Tensor]:
        """What one call gives, in the problem's own dtype by `reference`: Γ's states first, if any."""

    @abstractmethod
    def runners(self, device: torch.device) -> dict[str, Runner]:
        """What runs it on a device, by the names of `BY`. Each returns what `reference` does."""

    def fits(self, units: int, multiprocessors: int) -> bool:
        """Whether a GPU of so many can run it at N units."""
        return True

    def gamma_numbers(self, units: int, batch: int) -> int:
        """Numbers of Γ, all states: S·K·B·N²."""
        return STATES * MATRICES * batch * units**2 if self.has_gamma else 0

    def shapes(self, units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all that it is given, but Γ."""
        return shapes(units, batch, steps)

    def draw(
        self, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
    ) -> Given:
        """Given at random. Γ stays bounded however often it is advanced."""
        return _problem(self, units, batch, steps, generator, device)

    def bytes(self, units: int, batch: int, steps: int) -> int:
        """Bytes that one call must move: Γ in and out, arrays in, results out, each once."""
        sizes = self.shapes(units, batch, steps)
        read = sum(torch.Size(sizes[name]).numel() for name in self.takes)
        gamma = 2 * self.gamma_numbers(units, batch) * getattr(torch, self.dtype).itemsize
        return gamma + 4 * (read + self.written(units, batch, steps))

    def peak_bytes(self, units: int, batch: int, steps: int) -> int:
        """About the most alive while it is checked: Γ, a copy, float64's, and the comparison's."""
        numbers = sum(torch.Size(s).numel() for s in self.shapes(units, batch, steps).values())
        return self.gamma_numbers(units, batch) * (8 + 4 * 8) + numbers * (4 + 3 * 8)


def shapes(units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `Problem`, but Γ."""
    return {
        "m": (STATES, STATES, steps, batch, units),
        "phi": (STATES, steps, batch, MATRICES, units),
        "y": (steps, batch, MATRICES, units),
        "delta": (STATES, steps, batch, units),
        "credit": (STATES, batch, units),
        "suffix": (STATES, STATES, steps, batch, units),
        "whole": (STATES, STATES, batch, units),
        "arriving": (STATES, steps, batch, MATRICES, units),
        "partials": (MATRICES + STATES, steps, batch, units),
    }


def problem(kernel: Kernel, units: int, batch: int, steps: int, seed: int, device: torch.device) -> Any:
    """Draw on the device what a kernel is given."""
    return kernel.draw(units, batch, steps, torch.Generator(device).manual_seed(seed), device)


def _problem(
    kernel: Kernel, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
) -> Problem:
    """|M| is below 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    size = shapes(units, batch, steps)
    # own path 0.6 to 0.85, cross path up to 0.1 either way
    draw = torch.rand(size["m"], generator=generator, device=device)
    own = torch.eye(STATES, device=device)[:, :, None, None, None]
    m = own * (0.6 + 0.25 * draw) + (1 - own) * (0.2 * draw - 0.1)
    phi = 0.3 * normal(*size["phi"])
    for nu in range(STATES):
        phi[nu, :, :, [k for k in range(MATRICES) if entered(k) != nu]] = 0
    entering = [phi[entered(k), :, :, k] for k in range(MATRICES)]
    suffix, whole = rfp.suffix_products(m)
    gammas = []
    if kernel.has_gamma:
        shape, dtype = (batch, MATRICES, units, units), getattr(torch, kernel.dtype)
        gammas = [normal(*shape).to(dtype) for _ in range(STATES)]
    return Problem(
        gammas=gammas,
        m=m,
        phi=phi,
        y=normal(*size["y"]),
        delta=normal(*size["delta"]),
        credit=normal(*size["credit"]),
        suffix=suffix,
        whole=whole,
        arriving=rfp.arriving(suffix, phi),
        partials=torch.stack([*entering, *normal(STATES, steps, batch, units)]),
    )


def entered(k: int) -> int:
    """The one state that matrix k of an RGC enters."""
    return k // 2


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


# The whole of Γ at once, for the compiler to cut up: `rfp`'s own functions go by blocks of batch rows.


def _whole_step_(
    gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor | None
) -> Tensor | None:
    new = rfp.advanced(gammas, m, phi, y)
    total = None if delta is None else rfp.read_rows(new, delta).sum(0)
    for target, value in zip(gammas, new, strict=True):
        target.copy_(value)
    return total


def _whole_read(gammas: list[Tensor], credit: Tensor) -> Tensor:
    return rfp.read_rows(gammas, credit).sum(0)


def _whole_chunk_(gammas: list[Tensor], whole: Tensor, arriving: Tensor, y: Tensor, credit: Tensor) -> Tensor:
    total = rfp.read_rows(gammas, credit).sum(0)
    new = rfp.carried(gammas, whole)
    for nu, (target, value) in enumerate(zip(gammas, new, strict=True)):
        rfp.add_arriving_(value, arriving[nu], y)
        target.copy_(value)
    return total


def _outputs(credit: Tensor, partials: Tensor) -> tuple[Tensor, Tensor]:
    """E (K, T, B, N) and ∂E/∂x (1, T, B, N)."""
    entering = torch.stack([credit[entered(k)] * partials[k] for k in range(MATRICES)])
    return entering, (credit * partials[MATRICES:]).sum(0, keepdim=True)


def _scan_entering(m: Tensor, delta: Tensor, partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    credit, passed = rfp.reverse_scan(m, delta)
    return *_outputs(credit, partials), passed


def _launch_entering(m: Tensor, delta: Tensor, partials: Tensor) -> Sequence[Tensor]:
    from ...kernels import reverse_scan

    matrices = [{entered(k): partials[k]} for k in range(MATRICES)]
    by_state = dict(enumerate(partials[MATRICES:].unbind(0)))
    return reverse_scan.reverse_scan_entering(m, delta, matrices, [by_state])


def _launch(launcher: str) -> Callable[..., Sequence[Tensor]]:
    """A launcher of `kernels.reverse_scan` by its name, found when it is called: it needs triton."""

    def launch(*arguments: Tensor) -> Sequence[Tensor]:
        from ...kernels import reverse_scan

        return getattr(reverse_scan, launcher)(*arguments)

    return launch


def _arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    suffix, whole = rfp.suffix_products(m)
    return rfp.arriving(suffix, phi), whole


# For torch.compile, without the writes in place by which the eager functions save passes over memory.


def _pure_scan(m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    credits = [delta[:, -1]]
    for t in range(delta.shape[1] - 1, 0, -1):
        credits.append(delta[:, t - 1] + (m[:, :, t] * credits[-1][:, None]).sum(0))
    return torch.stack(credits[::-1], 1), (m[:, :, 0] * credits[-1][:, None]).sum(0)


def _pure_scan_entering(m: Tensor, delta: Tensor, partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    credit, passed = _pure_scan(m, delta)
    return *_outputs(credit, partials), passed


def _pure_arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    suffix, whole = rfp.suffix_products(m)
    return (suffix[:, :, :, :, None] * phi).sum(1), whole


class GammaStep(Kernel):
    """Γ one step on, and with a gradient what the step reads from it. Torch rounds to nearest in any case."""

    def __init__(
        self, dtype: str, gradient: bool, rounding: Literal["nearest", "stochastic"] = "nearest"
    ) -> None:
        self.dtype, self.gradient, self.rounding, self.steps = dtype, gradient, rounding, 1
        short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        mode = "gradient" if gradient else "advance"
        self.name = f"step-{short}-{mode if rounding == 'nearest' else rounding}"
        self.takes = ("m", "phi", "y", "delta") if gradient else ("m", "phi", "y")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a number of Γ: S products and S - 1 additions, φ y added; and in the gradient, a product added
        each = 2 * STATES + 1 + 2 * self.gradient
        return each * self.gamma_numbers(units, batch)

    def written(self, units: int, batch: int, steps: int) -> int:
        return self.gradient * MATRICES * units**2

    def _arguments(self, p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return p.m[:, :, 0], p.phi[:, 0], p.y[0], p.delta[:, 0] if self.gradient else None

    def _outputs(self, p: Problem, total: Tensor | None) -> Sequence[Tensor]:
        return [*p.gammas, *([] if total is None else [total])]

    def reference(self, problem: Any) -> Sequence[Tensor]:
        m, phi, y, delta = self._arguments(problem)
        return self._outputs(problem, rfp.gamma_step_(problem.gammas, m, phi, y, delta))

    def runners(self, device: torch.device) -> dict[str, Runner]:
        def compiled(p: Problem) -> Sequence[Tensor]:
            m, phi, y, delta = self._arguments(p)
            return self._outputs(p, _compiled(_whole_step_)(p.gammas, m, phi, y, delta))

        def by_ops(backend: str) -> Runner:
            return lambda p: self._outputs(p, ops.gamma_step_(p.gammas, *self._arguments(p), backend=backend))

        if device.type == "cuda":
            from ...kernels import gamma_step

            @functools.cache
            def rng_state(where: torch.device) -> Tensor | None:
                return None if self.rounding == "nearest" else torch.zeros(2, dtype=torch.int64, device=where)

            def launched(p: Problem) -> Sequence[Tensor]:
                drawn = rng_state(p.m.device)
                m, phi, y, delta = self._arguments(p)
                # where they lie, without the zeros, as a learner's
                there = [
                    phi[nu, :, k] if entered(k) == nu else None
                    for nu in range(STATES)
                    for k in range(MATRICES)
                ]
                total = gamma_step.gamma_step_(p.gammas, m, there, y, delta, rng_state=drawn)
                return self._outputs(p, total)

            return {"triton": launched, "torch": self.reference, "compile": compiled}
        # compiled code of `ops` takes Γ in the dtype of the rest alone
        backends = ("torch", "compile") if self.dtype == "float32" and ops.cpp_compiler() else ("torch",)
        return {backend: by_ops(backend) for backend in backends}


class GammaRead(Kernel):
    """What a credit reads from Γ, which stays as it is."""

    takes = ("credit",)

    def __init__(self, dtype: str) -> None:
        self.dtype, self.steps = dtype, 1
        self.name = f"read-{'fp32' if dtype == 'float32' else 'bf16'}"

    def flop(self, units: int, batch: int, steps: int) -> float:
        return 2 * self.gamma_numbers(units, batch)

    def written(self, units: int, batch: int, steps: int) -> int:
        return MATRICES * units**2

    def bytes(self, units: int, batch: int, steps: int) -> int:
        not_written = self.gamma_numbers(units, batch) * getattr(torch, self.dtype).itemsize
        return super().bytes(units, batch, steps) - not_written

    def reference(self, problem: Any) -> Sequence[Tensor]:
        return [*problem.gammas, rfp.gamma_read(problem.gammas, problem.credit)]

    def runners(self, device: torch.device) -> dict[str, Runner]:
        if device.type != "cuda":
            if self.dtype != "float32" or _native.library() is None:
                return {"torch": self.reference}
            return {
                "torch": self.reference,
                "compile": lambda p: [
                    *p.gammas,
                    ops.gamma_read(p.gammas, p.credit, backend="compile"),
                ],
            }
        from ...kernels import gamma_read

        return {
            "triton": lambda p: [*p.gammas, gamma_read.gamma_read(p.gammas, p.credit)],
            "torch": self.reference,
            "compile": lambda p: [*p.gammas, _compiled(_whole_read)(p.gammas, p.credit)],
        }


class GammaChunk(Kernel):
    """Γ over C steps, and the past's part of the gradient; from U and R(0), on the CPU from φ and M."""

    takes = ("whole", "arriving", "y", "credit")

    def __init__(self, steps: int, precision: Literal["ieee", "tf32"]) -> None:
        self.steps, self.precision = steps, precision
        self.rate = "tf32" if precision == "tf32" else "float32"
        self.name = f"chunk-C{steps}-{precision}"

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a number of Γ: carried by S products and S - 1 additions, read once, C outer products added
        return (2 * STATES - 1 + 2 + 2 * steps) * self.gamma_numbers(units, batch)

    def written(self, units: int, batch: int, steps: int) -> int:
        return MATRICES * units**2

    def reference(self, problem: Any) -> Sequence[Tensor]:
        p = problem
        total = rfp.gamma_chunk_(p.gammas, p.suffix, p.whole, p.phi, p.y, p.credit)
        assert total is not None
        return [*p.gammas, total]

    def _allowed(self, runner: Runner) -> Runner:
        """The same with torch's own products in this kernel's precision."""
        if self.precision == "ieee":
            return runner

        def run(p: Problem) -> Sequence[Tensor]:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            try:
                return runner(p)
            finally:
                torch.set_float32_matmul_precision(before)

        return run

    def runners(self, device: torch.device) -> dict[str, Runner]:
        def compiled(p: Problem) -> Sequence[Tensor]:
            arguments = (p.gammas, p.whole, p.arriving, p.y, p.credit)
            return [*p.gammas, _compiled(_whole_chunk_)(*arguments)]

        def by_ops(backend: str) -> Runner:
            def run(p: Problem) -> Sequence[Tensor]:
                total = ops.gamma_chunk_(p.gammas, p.m, p.phi, p.y, p.credit, backend=backend)
                assert total is not None
                return [*p.gammas, total]

            return run

        if device.type == "cuda":
            from ...kernels import gamma_chunk

            def launched(p: Problem) -> Sequence[Tensor]:
                total = gamma_chunk.gamma_chunk_(
                    p.gammas, p.whole, p.arriving, p.y, p.credit, precision=self.precision
                )
                assert total is not None
                return [*p.gammas, total]

            return {
                "triton": launched,
                "torch": self._allowed(self.reference),
                "compile": self._allowed(compiled),
            }
        if self.precision == "tf32":  # `ops` has one precision
            return {}
        backends = ("torch", "compile") if ops.cpp_compiler() else ("torch",)
        return {backend: by_ops(backend) for backend in backends}


class WithoutGamma(Kernel):
    """A kernel that returns all it makes. function, pure: eager, and to be compiled. launch: by Triton.

    loop: one call of code that is compiled for the CPU, if there is any; None from it where it can't be compiled.
    """

    has_gamma = False
    loop: Callable[..., Sequence[Tensor] | None] | None = None

    def __init__(
        self,
        name: str,
        takes: tuple[str, ...],
        function: Callable[..., Sequence[Tensor]],
        pure: Callable[..., Sequence[Tensor]],
        launch: Callable[..., Sequence[Tensor]],
    ) -> None:
        self.name, self.takes, self.function, self.pure, self.launch = name, takes, function, pure, launch

    def reference(self, problem: Any) -> Sequence[Tensor]:
        return self.function(*(getattr(problem, name) for name in self.takes))

    def runners(self, device: torch.device) -> dict[str, Runner]:
        def arguments(p: Any) -> list[Tensor]:
            return [getattr(p, name) for name in self.takes]

        if device.type != "cuda":
            loop = self.loop
            if loop is None or _native.library() is None:
                return {"torch": self.reference}

            def looped(p: Any) -> Sequence[Tensor]:
                made = loop(*arguments(p))
                assert made is not None
                return made

            return {"torch": self.reference, "compile": looped}
        return {
            "triton": lambda p: self.launch(*arguments(p)),
            "torch": self.reference,
            "compile": lambda p: _compiled(self.pure)(*arguments(p)),
        }


class Scan(WithoutGamma):
    """A scan backward in time: credits λ or suffix products R, or what partials make of them in their place.

    flop and written: of one unit and one step.
    """

    def __init__(
        self,
        name: str,
        takes: tuple[str, ...],
        flop: int,
        written: int,
        function: Callable[..., Sequence[Tensor]],
        pure: Callable[..., Sequence[Tensor]],
        launch: Callable[..., Sequence[Tensor]],
        loop: Callable[..., Sequence[Tensor] | None] | None = None,
    ) -> None:
        super().__init__(name, takes, function, pure, launch)
        self._flop, self._written, self.loop = flop, written, loop

    def flop(self, units: int, batch: int, steps: int) -> float:
        return self._flop * units * batch * steps

    def written(self, units: int, batch: int, steps: int) -> int:
        # and after the last step, M(1)ᵀ λ(1) or R(0)
        last = STATES if "delta" in self.takes else STATES**2
        return (self._written * steps + last) * units * batch


def _circuit_shapes(units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of `Circuit`."""
    return {
        "x": (steps, batch, units),
        "weights": (MATRICES, units, units),
        "diagonals": (MATRICES, units),
        "state": (STATES, batch, units),
        "gates": (2, steps, batch, 2, units),
        "before": (STATES, steps, batch, units),
        "delta": (STATES, steps, batch, units),
        "own": (STATES, batch, units),
        "phi": (MATRICES, batch, units),
    }


class OfCircuit(WithoutGamma):
    """A kernel of an RGC that has no Γ."""

    def shapes(self, units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
        return _circuit_shapes(units, batch, steps)

    def draw(
        self, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
    ) -> Circuit:
        size = self.shapes(units, batch, steps)
        drawn = {name: torch.randn(size[name], generator=generator, device=device) for name in size}
        drawn["weights"] *= 0.3 / math.sqrt(units)
        drawn["diagonals"] = drawn["weights"].diagonal(dim1=1, dim2=2)
        drawn["gates"].tanh_()
        return Circuit(gammas=[], **drawn)


class RGCForward(OfCircuit):
    """All steps of an RGC; a product a step and a pass beside it, or one launch for all steps of few units."""

    def __init__(self, name: str, launch: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__(name, ("x", "weights", "state"), _forward, _pure_forward, launch)
        self.loop = _loop_forward

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a unit: four products with N numbers; four tanh of five operations each, and eight
        return batch * steps * units * (8 * units + 28)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (STATES * (steps + 1) + MATRICES * steps) * batch * units


class RGCForwardPersistent(RGCForward):
    """The same in one launch, the weights spread over the multiprocessors. What else runs it, `RGCForward` times."""

    def __init__(self) -> None:
        super().__init__("rgc-forward-persistent", _launch_persistent)

    def fits(self, units: int, multiprocessors: int) -> bool:
        from ...kernels import rgc_persistent

        return units <= rgc_persistent.most_units(multiprocessors)

    def runners(self, device: torch.device) -> dict[str, Runner]:
        return {by: run for by, run in super().runners(device).items() if by == "triton"}


class RGCStep(OfCircuit):
    """One step of an RGC and its linearisation: the first launch of an online step."""

    steps = 1

    def __init__(self) -> None:
        super().__init__("rgc-step", ("x", "weights", "state"), _step, _pure_step, _launch_step)
        self.loop = functools.partial(_step, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a step as above; φ: three a matrix; the input's, one a state; M: a product a matrix, and two sums
        return batch * units * (8 * units + 28 + 3 * MATRICES + STATES + MATRICES + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (STATES + MATRICES + STATES + STATES**2) * batch * units


class RGCBackward(OfCircuit):
    """Exact credits of an RGC, backward in time, and what enters each matrix."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "weights", "delta")
        super().__init__("rgc-backward", takes, _backward, _pure_backward, _launch_backward)
        self.loop = functools.partial(_backward, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a unit: four products with N numbers; credits added, E of four matrices, two own paths
        return batch * steps * units * (8 * units + 2 + 4 * MATRICES + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (STATES * (steps + 1) + MATRICES * steps) * batch * units


class RGCLinearize(OfCircuit):
    """Partials of an RGC and RFP's M, from its gates."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "diagonals")
        super().__init__("rgc-linearize", takes, _linearize, _pure_linearize, _launch_linearize)
        self.loop = functools.partial(_linearize, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # φ: three a matrix; the input's, one a state; M: a product a matrix, and two sums
        return batch * steps * units * (3 * MATRICES + STATES + MATRICES + 2)

    def written(self, units: int, batch: int, steps: int) -> int:
        return (MATRICES + STATES + STATES**2) * batch * steps * units


class RGCDual(OfCircuit):
    """RFP's dual form of an RGC, from its gates: what enters each matrix, and the input's gradient."""

    def __init__(self) -> None:
        takes = ("gates", "before", "x", "diagonals", "delta")
        super().__init__("rgc-dual", takes, _dual, _pure_dual, _launch_dual)
        self.loop = functools.partial(_dual, backend="compile")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # partials as above; δ added to Mᵀλ, E: a product a matrix, and S products and S - 1 additions for x
        return batch * steps * units * (4 * MATRICES + STATES + 2 + 8 + MATRICES + 2 * STATES - 1)

    def written(self, units: int, batch: int, steps: int) -> int:
        return ((MATRICES + 1) * steps + STATES) * batch * units


class RTRLJacobian(OfCircuit):
    """J of one step, dense: what exact RTRL multiplies γ by."""

    steps = 1

    def __init__(self) -> None:
        super().__init__("rtrl-jacobian", ("own", "phi", "weights"), _jacobian, _jacobian, _launch_jacobian)

    def flop(self, units: int, batch: int, steps: int) -> float:
        return MATRICES * batch * units**2 + STATES * batch * units

    def written(self, units: int, batch: int, steps: int) -> int:
        return STATES**2 * batch * units**2


def _forward(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    made = RGCCell().scan(x[None], weights.unbind(0), state.unbind(0))
    return made.states, made.saved


def _pure_forward(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    ss, ms, mm, sm = weights.mT
    (s, m), states, gates = state.unbind(0), [state], []
    for u in x:
        by_s, by_m = [(s @ ss).tanh(), (s @ sm).tanh()], [(m @ mm).tanh(), (m @ ms).tanh()]
        s, m = (1 - by_m[1]) * u + by_s[0] * s, (1 - by_s[1]) * u + by_m[0] * m
        states.append(torch.stack([s, m]))
        gates.append(torch.stack([torch.stack(by_s, -2), torch.stack(by_m, -2)]))
    return torch.stack(states, 1), torch.stack(gates, 1)


def _step(x: Tensor, weights: Tensor, state: Tensor, backend: str = "torch") -> tuple[Tensor, ...]:
    cell, dense = RGCCell(), weights.unbind(0)
    trajectory = ops.scan(cell, x[None, :1], dense, state.unbind(0), backend=backend)
    lin, m = ops.linearize(cell, trajectory, dense, backend=backend)
    return trajectory.states[:, 1], *_parts(lin.partials, m)


def _pure_step(x: Tensor, weights: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    states, gates = _pure_forward(x[:1], weights, state)
    own = weights.diagonal(dim1=1, dim2=2)
    return states[:, 1], *_pure_linearize(gates, state[:, None], x[:1], own)


def _launch_step(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor]:
    from ...kernels import rgc_step

    after, _, planes = rgc_step.rgc_step(x[0], weights.unbind(0), state)
    return after, *_parts(*RGCCell.partials_in(planes[:, None]))


def _loop_forward(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor] | None:
    return _native.rgc_scan(x, weights.unbind(0), state.unbind(0), None)


def _loop_scan(m: Tensor, delta: Tensor) -> Sequence[Tensor] | None:
    return _native.reverse_scan(m, delta, None)


def _launch_forward(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor]:
    from ...kernels import rgc_forward

    states, gates = rgc_forward.rgc_forward(x, weights.unbind(0), state.unbind(0))
    assert gates is not None
    return states, gates


def _launch_persistent(x: Tensor, weights: Tensor, state: Tensor) -> Sequence[Tensor]:
    from ...kernels import rgc_persistent

    states, gates = rgc_persistent.rgc_forward_persistent(x, weights.unbind(0), state.unbind(0))
    assert gates is not None
    return states, gates


def _trajectory(gates: Tensor, before: Tensor, x: Tensor) -> Trajectory:
    return Trajectory(x[None], torch.cat([before, before[:, -1:]], 1), gates)  # the last is read by no step


def _backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    cell, dense = RGCCell(), weights.unbind(0)
    lin = ops.linearize(cell, _trajectory(gates, before, x), dense, backend=backend)[0]
    credit, passed = ops.exact_credits(cell, lin, dense, delta, backend=backend)
    ss, ms, mm, sm = (rfp.entering_credit(matrix, lin, credit) for matrix in cell.matrices)
    return credit, passed, torch.stack([torch.stack([ss, sm], -2), torch.stack([mm, ms], -2)])


def _pure_backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    w_ss, w_ms, w_mm, w_sm = weights
    passed = torch.zeros_like(delta[:, 0])
    credits, entering = [], []
    for t in range(x.shape[0] - 1, -1, -1):
        (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in gates[:, t])
        (s, m), credit = before[:, t], delta[:, t] + passed
        from_ss, from_ms = credit[0] * (1 - ss * ss) * s, credit[0] * (ms * ms - 1) * x[t]
        from_mm, from_sm = credit[1] * (1 - mm * mm) * m, credit[1] * (sm * sm - 1) * x[t]
        to_s = ss * credit[0] + from_ss @ w_ss + from_sm @ w_sm
        to_m = mm * credit[1] + from_mm @ w_mm + from_ms @ w_ms
        passed = torch.stack([to_s, to_m])
        credits.append(credit)
        entering.append(
            torch.stack([torch.stack([from_ss, from_sm], -2), torch.stack([from_mm, from_ms], -2)])
        )
    return torch.stack(credits[::-1], 1), passed, torch.stack(entering[::-1], 1)


def _launch_backward(
    gates: Tensor, before: Tensor, x: Tensor, weights: Tensor, delta: Tensor
) -> Sequence[Tensor]:
    from ...kernels import rgc_backward

    return rgc_backward.bptt_credits(gates, before, x, weights.unbind(0), delta)


def _parts(partials: Partials, m: Tensor) -> tuple[Tensor, ...]:
    """φ of ss, ms, mm and sm, the input's partials of s and m, and M."""
    phi, by_input = (next(iter(by_state.values())) for by_state in partials.gate), partials.input[0]
    return *phi, by_input[0], by_input[1], m


def _linearize(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, backend: str = "torch"
) -> tuple[Tensor, ...]:
    trajectory = _trajectory(gates, before, x)
    lin, m = ops.linearize(RGCCell(), trajectory, diagonals.unbind(0), backend=backend)
    return _parts(lin.partials, m)


def _pure_linearize(gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor) -> tuple[Tensor, ...]:
    (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in gates.unbind(0))
    w_ss, w_ms, w_mm, w_sm = diagonals
    by_ss, by_ms = (1 - ss * ss) * before[0], (ms * ms - 1) * x
    by_mm, by_sm = (1 - mm * mm) * before[1], (sm * sm - 1) * x
    m = torch.stack([ss + by_ss * w_ss, by_ms * w_ms, by_sm * w_sm, mm + by_mm * w_mm])
    return by_ss, by_ms, by_mm, by_sm, 1 - ms, 1 - sm, m.view(STATES, STATES, *x.shape)


def _launch_linearize(gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor) -> Sequence[Tensor]:
    from ...kernels import rgc_partials

    planes = rgc_partials.rgc_linearize(gates, before, x, diagonals.unbind(0))
    return _parts(*RGCCell.partials_in(planes, gates))


def _dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor, backend: str = "torch"
) -> tuple[Tensor, ...]:
    cell, trajectory = RGCCell(), _trajectory(gates, before, x)
    entering, for_input, passed = ops.dual_of(
        cell, trajectory, diagonals.unbind(0), delta, cell.matrices, 1, "rfp", backend=backend
    )
    return *entering, for_input[0], passed


def _pure_dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor
) -> tuple[Tensor, ...]:
    *phi, of_s, of_m, m = _pure_linearize(gates, before, x, diagonals)
    credit, passed = _pure_scan(m, delta)
    entering = [credit[entered(k)] * phi[k] for k in range(MATRICES)]
    return *entering, credit[0] * of_s + credit[1] * of_m, passed


def _launch_dual(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Tensor, delta: Tensor
) -> Sequence[Tensor]:
    from ...kernels import rgc_partials

    entering, for_input, passed = rgc_partials.rgc_dual(gates, before, x, diagonals.unbind(0), delta)
    (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in entering.unbind(0))
    return ss, ms, mm, sm, for_input, passed


def _jacobian(own: Tensor, phi: Tensor, weights: Tensor) -> tuple[Tensor]:
    ss, ms, mm, sm = phi[:, :, :, None] * weights[:, None]
    of_s = torch.cat([ss + torch.diag_embed(own[0]), ms], 2)
    return (torch.cat([of_s, torch.cat([sm, mm + torch.diag_embed(own[1])], 2)], 1),)


def _launch_jacobian(own: Tensor, phi: Tensor, weights: Tensor) -> Sequence[Tensor]:
    from ...kernels import rtrl_step

    return (rtrl_step.rtrl_jacobian(own.unbind(0), phi.unbind(0), weights.unbind(0)),)


def head_units(units: int) -> int:
    """b of the heads that N units are cut into: the largest divisor of N that is at most √N, and 64."""
    return next(b for b in range(min(math.isqrt(units), ops.HEAD_UNITS), 0, -1) if units % b == 0)


class RTRLHeads(Kernel):
    """γ of exact RTRL one step on, of heads of `head_units` units, and the gradient: as many numbers as Γ's at √N."""

    name, takes, steps = "rtrl-heads", ("jacobian", "phi", "y", "delta"), 1

    def shapes(self, units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
        size = head_units(units)
        return {
            "jacobian": (batch, units // size, STATES * size, STATES * size),
            "phi": (STATES, batch, MATRICES, units),
            "y": (batch, MATRICES, units // size, size),
            "delta": (STATES, batch, units),
        }

    def gamma_numbers(self, units: int, batch: int) -> int:
        return STATES * MATRICES * batch * units * head_units(units) ** 2

    def flop(self, units: int, batch: int, steps: int) -> float:
        # a number of γ: a row of J times a column, and a product added to the gradient; φ y added to N·b of each
        own = STATES * MATRICES * batch * units * head_units(units)
        return (2 * STATES * head_units(units) + 2) * self.gamma_numbers(units, batch) + 2 * own

    def written(self, units: int, batch: int, steps: int) -> int:
        return MATRICES * units * head_units(units)

    def draw(
        self, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
    ) -> HeadsStep:
        b = head_units(units)
        size = {**self.shapes(units, batch, steps), "gamma": (batch, units // b, STATES, b, MATRICES, b, b)}
        drawn = {name: torch.randn(size[name], generator=generator, device=device) for name in size}
        drawn["jacobian"] *= 0.3 / math.sqrt(STATES * b)
        return HeadsStep(gammas=[drawn.pop("gamma")], **drawn)

    def _arguments(self, p: HeadsStep) -> tuple[Tensor, ...]:
        return p.gammas[0], p.jacobian, p.phi, p.y, p.delta

    def reference(self, problem: Any) -> Sequence[Tensor]:
        return [problem.gammas[0], _heads_step_(*self._arguments(problem))]

    def runners(self, device: torch.device) -> dict[str, Runner]:
        if device.type != "cuda":
            return {"torch": self.reference}
        from ...kernels import rtrl_heads

        def launched(p: HeadsStep) -> Sequence[Tensor]:
            gradient = rtrl_heads.rtrl_heads_(*self._arguments(p))
            assert gradient is not None
            return [p.gammas[0], gradient]

        return {
            "triton": launched,
            "torch": self.reference,
            "compile": lambda p: [p.gammas[0], _compiled(_heads_step_)(*self._arguments(p))],
        }


def _heads_step_(gamma: Tensor, jacobian: Tensor, phi: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """γ ← J γ + R and its gradient (H, K, b, M)."""
    batch, heads, states, b, matrices = gamma.shape[:5]
    new = (jacobian @ gamma.flatten(4).flatten(2, 3)).view(gamma.shape)
    own = new.diagonal(dim1=3, dim2=5)  # (B, H, S, K, M, b)
    entering = phi.view(states, batch, matrices, heads, b).permute(1, 3, 0, 2, 4)[..., None, :]
    own += entering * y.permute(0, 2, 1, 3)[:, :, None, :, :, None]
    gamma.copy_(new)
    by_head = delta.view(states, batch, heads, b)
    return torch.einsum("sbhr,bhsrkij->hkij", by_head, new)


_KERNELS: tuple[Kernel, ...] = (
    *(GammaStep(dtype, gradient) for dtype in ("float32", "bfloat16") for gradient in (True, False)),
    GammaStep("bfloat16", True, "stochastic"),
    *map(GammaRead, ("float32", "bfloat16")),
    GammaChunk(8, "ieee"),  # in "tf32" its launch is the same
    GammaChunk(64, "ieee"),
    GammaChunk(64, "tf32"),
    # λ: δ added to Mᵀλ; E: a product a matrix, and S and S - 1 additions for x; R: a product of S×S matrices; U: R φ
    Scan("scan", ("m", "delta"), 8, 2, rfp.reverse_scan, _pure_scan, _launch("reverse_scan"), _loop_scan),
    Scan("scan-entering", ("m", "delta", "partials"), 8 + MATRICES + 2 * STATES - 1, MATRICES + 1,
         _scan_entering, _pure_scan_entering, _launch_entering),
    Scan("suffix", ("m",), 12, 4, rfp.suffix_products, rfp.suffix_products, _launch("suffix_products")),
    Scan("arriving", ("m", "phi"), 12 + 6 * MATRICES, 2 * MATRICES, _arriving, _pure_arriving,
         _launch("arriving")),
    RGCForward("rgc-forward", _launch_forward),
    RGCForwardPersistent(),
    RGCStep(),
    RGCBackward(),
    RGCLinearize(),
    RGCDual(),
    RTRLJacobian(),
    RTRLHeads(),
)  # fmt: skip
KERNELS = {kernel.name: kernel for kernel in _KERNELS}
