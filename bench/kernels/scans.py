"""Scans backward in time: credits λ, suffix products R, and the products of either with partials."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...backend.native import calls
from ...rules import rfp
from .kernel import MATRICES, STATES, Kernel, WithoutGamma, entered


class Scan(WithoutGamma):
    """A scan backward in time, of credits λ(t) = δ(t) + M(t+1)ᵀ λ(t+1) or of suffix products R(t) = R(t+1) M(t+1).

    Some return products of these with partials in their place. flop, written: of one unit and one step.
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
        # and what remains after the last step: M(1)ᵀ λ(1), or R(0)
        last = STATES if "delta" in self.takes else STATES**2
        return (self._written * steps + last) * units * batch


def _outputs(credit: Tensor, partials: Tensor) -> tuple[Tensor, Tensor]:
    """The credit that enters each matrix, E^k = Σ_ν λ^ν φ^{ν,k} (K, T, B, N), and that of the input (1, T, B, N)."""
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
    """A launcher of `kernels.reverse_scan` by name. It is imported at the first call, since that needs triton."""

    def launch(*arguments: Tensor) -> Sequence[Tensor]:
        from ...kernels import reverse_scan

        return getattr(reverse_scan, launcher)(*arguments)

    return launch


def _arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    suffix, whole = rfp.suffix_products(m)
    return rfp.arriving(suffix, phi), whole


def _loop_scan(m: Tensor, delta: Tensor) -> Sequence[Tensor] | None:
    return calls.reverse_scan(m, delta, None)


# For torch.compile: the eager functions of `rules.rfp` write in place to save passes over memory; these don't.


def pure_scan(m: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Credits λ (S, T, B, N), and M(1)ᵀ λ(1) (S, B, N), without a write in place."""
    credits = [delta[:, -1]]
    for t in range(delta.shape[1] - 1, 0, -1):
        credits.append(delta[:, t - 1] + (m[:, :, t] * credits[-1][:, None]).sum(0))
    return torch.stack(credits[::-1], 1), (m[:, :, 0] * credits[-1][:, None]).sum(0)


def _pure_scan_entering(m: Tensor, delta: Tensor, partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    credit, passed = pure_scan(m, delta)
    return *_outputs(credit, partials), passed


def _pure_arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    suffix, whole = rfp.suffix_products(m)
    return (suffix[:, :, :, :, None] * phi).sum(1), whole


# FLOP: λ adds δ to Mᵀλ; E takes a product a matrix, and S products and S - 1 additions for the input; R is a product of
# S×S matrices; U = R φ.
KERNELS: tuple[Kernel, ...] = (
    Scan("scan", ("m", "delta"), 8, 2, rfp.reverse_scan, pure_scan, _launch("reverse_scan"), _loop_scan),
    Scan("scan-entering", ("m", "delta", "partials"), 8 + MATRICES + 2 * STATES - 1, MATRICES + 1,
         _scan_entering, _pure_scan_entering, _launch_entering),
    Scan("suffix", ("m",), 12, 4, rfp.suffix_products, rfp.suffix_products, _launch("suffix_products")),
    Scan("arriving", ("m", "phi"), 12 + 6 * MATRICES, 2 * MATRICES, _arriving, _pure_arriving,
         _launch("arriving")),
)  # fmt: skip
