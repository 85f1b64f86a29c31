"""Kernels of exact RTRL: the dense Jacobian of a step, and a step of γ by heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...backend import triton_backend
from ...cells.builtin import RGCCell
from ...cells.two_point import state_read
from .kernel import MATRICES, STATES, Given, Kernel, Runner, compiled
from .rgc import OfCircuit


class RTRLJacobian(OfCircuit):
    """The dense Jacobian J of one step (2N, 2N) of each batch row, by which exact RTRL multiplies γ."""

    steps = 1

    def __init__(self) -> None:
        super().__init__("rtrl-jacobian", ("own", "phi", "weights"), _jacobian, _jacobian, _launch_jacobian)

    def flop(self, units: int, batch: int, steps: int) -> float:
        return MATRICES * batch * units**2 + STATES * batch * units

    def written(self, units: int, batch: int, steps: int) -> int:
        return STATES**2 * batch * units**2


def _jacobian(own: Tensor, phi: Tensor, weights: Tensor) -> tuple[Tensor]:
    ss, ms, mm, sm = phi[:, :, :, None] * weights[:, None]
    of_s = torch.cat([ss + torch.diag_embed(own[0]), ms], 2)
    return (torch.cat([of_s, torch.cat([sm, mm + torch.diag_embed(own[1])], 2)], 1),)


def _launch_jacobian(own: Tensor, phi: Tensor, weights: Tensor) -> Sequence[Tensor]:
    from ...kernels import rtrl_step

    (of_s, of_m), (ss, ms, mm, sm) = own.unbind(0), phi.unbind(0)
    entering = [ss, ms, None, None, None, None, mm, sm]  # state by state
    reads = [state_read(matrix) for matrix in RGCCell.matrices]
    return (rtrl_step.rtrl_jacobian([of_s, None, None, of_m], entering, reads, weights.unbind(0)),)


@dataclass(frozen=True)
class HeadsStep(Given):
    """What a step of exact RTRL by heads is given: one γ, and the step's linearization.

    gammas: one tensor (B, H, S, b, K, b, b). jacobian (B, H, S·b, S·b), phi (S, B, K, N), y (B, K, H, b),
    delta (S, B, N).
    """

    jacobian: Tensor
    phi: Tensor
    y: Tensor
    delta: Tensor


def head_units(units: int) -> int:
    """b, the units of a head: the largest divisor of N that is at most √N and at most the kernel's limit, 64."""
    return next(b for b in range(min(math.isqrt(units), triton_backend.HEAD_UNITS), 0, -1) if units % b == 0)


class RTRLHeads(Kernel):
    """Advance γ of exact RTRL by one step, with heads of `head_units` units, and read the gradient.

    With b = √N, γ has as many numbers as Γ.
    """

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
        # for each number of γ: a row of J times a column, and a product added to the gradient; φ y is added to one
        # number of γ for each state, matrix, row, unit and unit that it reads
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
            "compile": lambda p: [p.gammas[0], compiled(_heads_step_)(*self._arguments(p))],
        }


def _heads_step_(gamma: Tensor, jacobian: Tensor, phi: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """γ ← J γ + φ yᵀ (in place), and the gradient (H, K, b, M) that δ reads from it."""
    batch, heads, states, b, matrices = gamma.shape[:5]
    new = (jacobian @ gamma.flatten(4).flatten(2, 3)).view(gamma.shape)
    own = new.diagonal(dim1=3, dim2=5)  # (B, H, S, K, M, b)
    entering = phi.view(states, batch, matrices, heads, b).permute(1, 3, 0, 2, 4)[..., None, :]
    own += entering * y.permute(0, 2, 1, 3)[:, :, None, :, :, None]
    gamma.copy_(new)
    by_head = delta.view(states, batch, heads, b)
    return torch.einsum("sbhr,bhsrkij->hkij", by_head, new)


KERNELS: tuple[Kernel, ...] = (RTRLJacobian(), RTRLHeads())
