"""What a kernel of the benchmark is: what it is given and must move, its reference, and what runs it.

Every kernel is of an RGC: S = 2 states, K = 4 matrices, fan-in M = N; with heads M = b units.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backend.native.library import library
from ...rules import rfp

STATES, MATRICES = 2, 4
BY = ("triton", "torch", "compile")


@dataclass(frozen=True)
class Given:
    """What a kernel is given. gammas: the tensors of Γ or γ that it advances in place, if any."""

    gammas: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Any:
        """A copy whose Γ may be advanced; all tensors in `dtype` if one is given."""
        if dtype is None:
            return replace(self, gammas=[g.clone() for g in self.gammas])
        others = {name: a.to(dtype) for name, a in vars(self).items() if isinstance(a, Tensor)}
        return replace(self, gammas=[g.to(dtype, copy=True) for g in self.gammas], **others)


@dataclass(frozen=True)
class Problem(Given):
    """What Γ's kernels and scans are given.

    gammas            S tensors (B, K, N, M)
    m                 transition M, (S, S, T, B, N)
    phi, y            immediate sensitivities φ (S, T, B, K, N) and presynaptic signals (T, B, K, M)
    delta, credit     δ (S, T, B, N), and a credit that reads Γ (S, B, N)
    suffix, whole     suffix products R(t) of M, shape as m, and the product over all steps (S, S, B, N)
    arriving          U = R φ, shape as phi
    partials          (K + S, T, B, N): φ of each matrix in the one state that it enters, then ∂F_ν/∂x of each state
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


Runner = Callable[[Any], Sequence[Tensor]]


class Kernel(ABC):
    """One kernel: what it is given and must move, what it computes, and what runs it.

    name    its name in options and records
    dtype   "float32" or "bfloat16": the dtype in which Γ is kept
    rate    "float32" or "tf32": the GEMM rate that its arithmetic is compared with
    steps   T of one call; None if the option --steps gives it
    takes   names of the tensors that it reads, Γ not among them
    """

    name: str
    takes: tuple[str, ...]
    has_gamma = True
    dtype: str = "float32"
    rate: str = "float32"
    steps: int | None = None

    @abstractmethod
    def flop(self, units: int, batch: int, steps: int) -> float:
        """Additions and multiplications of one call; with a Γ the S×S products per unit are not counted."""

    @abstractmethod
    def written(self, units: int, batch: int, steps: int) -> int:
        """Numbers that one call must write, Γ itself not counted. All are float32."""

    @abstractmethod
    def reference(self, problem: Any) -> Sequence[Tensor]:
        """The results of one call, in plain torch and the problem's own dtype: first Γ as advanced, if there is one."""

    @abstractmethod
    def runners(self, device: torch.device) -> dict[str, Runner]:
        """The functions that run it on a device, under the names of `BY`. Each returns what `reference` returns."""

    def fits(self, units: int, multiprocessors: int) -> bool:
        """Whether a GPU with so many multiprocessors can run it at N units."""
        return True

    def gamma_numbers(self, units: int, batch: int) -> int:
        """How many numbers Γ has: S·K·B·N²."""
        return STATES * MATRICES * batch * units**2 if self.has_gamma else 0

    def shapes(self, units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors that it is given, except Γ."""
        return shapes(units, batch, steps)

    def draw(
        self, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
    ) -> Given:
        """Draw at random what it is given, so that Γ stays bounded however often it is advanced."""
        return _problem(self, units, batch, steps, generator, device)

    def bytes(self, units: int, batch: int, steps: int) -> int:
        """Bytes that one call must move: Γ in and out, arrays in, results out, each once."""
        sizes = self.shapes(units, batch, steps)
        read = sum(torch.Size(sizes[name]).numel() for name in self.takes)
        gamma = 2 * self.gamma_numbers(units, batch) * getattr(torch, self.dtype).itemsize
        return gamma + 4 * (read + self.written(units, batch, steps))

    def peak_bytes(self, units: int, batch: int, steps: int) -> int:
        """About the most bytes alive during its check: Γ, a copy, the float64 reference, and their difference."""
        numbers = sum(torch.Size(s).numel() for s in self.shapes(units, batch, steps).values())
        return self.gamma_numbers(units, batch) * (8 + 4 * 8) + numbers * (4 + 3 * 8)


class WithoutGamma(Kernel):
    """A kernel without Γ, which returns all its results.

    function   in eager torch
    pure       for torch.compile
    launch     by Triton
    loop       by code compiled for the CPU, if there is any; it returns None where nothing can be compiled
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
            if loop is None or library() is None:
                return {"torch": self.reference}

            def looped(p: Any) -> Sequence[Tensor]:
                made = loop(*arguments(p))
                assert made is not None
                return made

            return {"torch": self.reference, "compile": looped}
        return {
            "triton": lambda p: self.launch(*arguments(p)),
            "torch": self.reference,
            "compile": lambda p: compiled(self.pure)(*arguments(p)),
        }


def shapes(units: int, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `Problem`, except Γ."""
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
    """Draw what a kernel is given, on the device; the same for the same seed."""
    return kernel.draw(units, batch, steps, torch.Generator(device).manual_seed(seed), device)


def _problem(
    kernel: Kernel, units: int, batch: int, steps: int, generator: torch.Generator, device: torch.device
) -> Problem:
    """A `Problem` whose M has norm below 1, so that Γ stays bounded."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    size = shapes(units, batch, steps)
    # diagonal of M in 0.6 to 0.85, the rest in -0.1 to 0.1
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
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function, once for each function."""
    return torch.compile(function, dynamic=True)
