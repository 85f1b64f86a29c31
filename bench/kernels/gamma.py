"""Γ's kernels: a step, a reading by a credit, a chunk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...backend import native_backend, operations
from ...backend.native.library import library
from ...rules import rfp
from .kernel import MATRICES, STATES, Kernel, Problem, Runner, compiled, entered


class GammaStep(Kernel):
    """Advance Γ by one step, Γ ← M ⊙_rows Γ + φ yᵀ; with `gradient` also dW = Σ_b δ ⊙_rows Γ.

    rounding is the Triton kernel's; torch rounds to nearest in any case.
    """

    def __init__(
        self, dtype: str, gradient: bool, rounding: Literal["nearest", "stochastic"] = "nearest"
    ) -> None:
        self.dtype, self.gradient, self.rounding, self.steps = dtype, gradient, rounding, 1
        short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        mode = "gradient" if gradient else "advance"
        self.name = f"step-{short}-{mode if rounding == 'nearest' else rounding}"
        self.takes = ("m", "phi", "y", "delta") if gradient else ("m", "phi", "y")

    def flop(self, units: int, batch: int, steps: int) -> float:
        # for each number of Γ: S products and S - 1 additions, φ y added; for the gradient, one more product added
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
        def by_compiler(p: Problem) -> Sequence[Tensor]:
            m, phi, y, delta = self._arguments(p)
            return self._outputs(p, compiled(_whole_step_)(p.gammas, m, phi, y, delta))

        def by_ops(backend: str) -> Runner:
            return lambda p: self._outputs(
                p, operations.gamma_step_(p.gammas, *self._arguments(p), backend=backend)
            )

        if device.type == "cuda":
            from ...kernels import gamma_step

            @functools.cache
            def rng_state(where: torch.device) -> Tensor | None:
                return None if self.rounding == "nearest" else torch.zeros(2, dtype=torch.int64, device=where)

            def launched(p: Problem) -> Sequence[Tensor]:
                drawn = rng_state(p.m.device)
                m, phi, y, delta = self._arguments(p)
                # as views, without the zero blocks: so a learner passes them
                there = [
                    phi[nu, :, k] if entered(k) == nu else None
                    for nu in range(STATES)
                    for k in range(MATRICES)
                ]
                total = gamma_step.gamma_step_(p.gammas, m, there, y, delta, rng_state=drawn)
                return self._outputs(p, total)

            return {"triton": launched, "torch": self.reference, "compile": by_compiler}
        # compiled CPU code takes Γ only in the dtype of the other tensors
        backends = (
            ("torch", "compile") if self.dtype == "float32" and native_backend.cpp_compiler() else ("torch",)
        )
        return {backend: by_ops(backend) for backend in backends}


class GammaRead(Kernel):
    """The gradient that a credit λ reads from Γ: Σ_b Σ_ν λ^ν ⊙_rows Γ^ν. Γ itself stays as it is."""

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
            if self.dtype != "float32" or library() is None:
                return {"torch": self.reference}
            return {
                "torch": self.reference,
                "compile": lambda p: [
                    *p.gammas,
                    operations.gamma_read(p.gammas, p.credit, backend="compile"),
                ],
            }
        from ...kernels import gamma_read

        return {
            "triton": lambda p: [*p.gammas, gamma_read.gamma_read(p.gammas, p.credit)],
            "torch": self.reference,
            "compile": lambda p: [*p.gammas, compiled(_whole_read)(p.gammas, p.credit)],
        }


class GammaChunk(Kernel):
    """Advance Γ by a chunk of C steps, and read the past's part of the gradient.

    On a GPU it is given U and R(0); on the CPU it makes them of φ and M.
    """

    takes = ("whole", "arriving", "y", "credit")

    def __init__(self, steps: int, precision: Literal["ieee", "tf32"]) -> None:
        self.steps, self.precision = steps, precision
        self.rate = "tf32" if precision == "tf32" else "float32"
        self.name = f"chunk-C{steps}-{precision}"

    def flop(self, units: int, batch: int, steps: int) -> float:
        # for each number of Γ: S products and S - 1 additions carry it, one read, C outer products added
        return (2 * STATES - 1 + 2 + 2 * steps) * self.gamma_numbers(units, batch)

    def written(self, units: int, batch: int, steps: int) -> int:
        return MATRICES * units**2

    def reference(self, problem: Any) -> Sequence[Tensor]:
        p = problem
        total = rfp.gamma_chunk_(p.gammas, p.suffix, p.whole, p.phi, p.y, p.credit)
        assert total is not None
        return [*p.gammas, total]

    def _allowed(self, runner: Runner) -> Runner:
        """The runner, with torch's own matrix products in this kernel's precision."""
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
        def by_compiler(p: Problem) -> Sequence[Tensor]:
            arguments = (p.gammas, p.whole, p.arriving, p.y, p.credit)
            return [*p.gammas, compiled(_whole_chunk_)(*arguments)]

        def by_ops(backend: str) -> Runner:
            def run(p: Problem) -> Sequence[Tensor]:
                total = operations.gamma_chunk_(p.gammas, p.m, p.phi, p.y, p.credit, backend=backend)
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
                "compile": self._allowed(by_compiler),
            }
        if self.precision == "tf32":  # a CPU has no TF32
            return {}
        backends = ("torch", "compile") if native_backend.cpp_compiler() else ("torch",)
        return {backend: by_ops(backend) for backend in backends}


# For torch.compile: the functions of `rules.rfp` loop over blocks of batch rows, and here Γ is one operand, which the
# compiler may cut up as it likes.


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


KERNELS: tuple[Kernel, ...] = (
    *(GammaStep(dtype, gradient) for dtype in ("float32", "bfloat16") for gradient in (True, False)),
    GammaStep("bfloat16", True, "stochastic"),
    *map(GammaRead, ("float32", "bfloat16")),
    GammaChunk(8, "ieee"),  # the launch of "tf32" is the same at C = 8
    GammaChunk(64, "ieee"),
    GammaChunk(64, "tf32"),
)
