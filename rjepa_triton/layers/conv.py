"""Reciprocal gated circuits over maps: one unit for each channel and pixel, convolutions in the gates (paper, 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from .. import _checks as check
from .._autograd import once_differentiable
from .._device import autocast_is_on, without_autocast
from ..backend import operations
from ..cells.builtin import RGCCell
from ..cells.two_point import Trajectory, state_read
from ..rules import rfp
from . import transforms

Learning = Literal["rfp", "bptt"]
LEARNING = ("rfp", "bptt")
_CELL = RGCCell()


class ConvRGC(nn.Module):
    """A reciprocal gated circuit at each channel and pixel of a map; * is a convolution that keeps the map's size.

        s(t) = (1 - tanh(W_ms * m')) x + tanh(W_ss * s') s'        prime = t-1, zero at first
        m(t) = (1 - tanh(W_sm * s')) x + tanh(W_mm * m') m'

    With learning="rfp" the credit of each unit passes back in time only through the unit's own S×S block of the
    Jacobian. From a convolution this block takes the middle tap of the unit's channel with itself. The weights'
    gradient is then that of one convolution over all steps. It is exact where no unit reads another (`depthwise` with
    kernel_size=1). Elsewhere it is an approximation, as for dense weights: credit between pixels and channels is left
    out (docs/exactness.md).

    Args:
        channels: C.
        kernel_size: of all four gates, odd.
        depthwise: whether the gates of a channel read that channel only.
        learning: "rfp", in its dual form; or "bptt", exact, by autograd.
        device, dtype: of the parameters.

    Parameters: weight_ss, weight_ms, weight_mm, weight_sm, (C, C, k, k), or (C, 1, k, k) depthwise; zero at first, so
    that the input passes through: s(t) = m(t) = x(t).

    Raises TypeError or ValueError for an argument out of its range, naming it.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        depthwise: bool = False,
        learning: Learning = "rfp",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = check.integer("channels", channels, 1)
        self.kernel_size = check.integer("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a unit has a middle tap, got {kernel_size}")
        check.one_of("learning", learning, LEARNING)
        check.boolean("depthwise", depthwise)
        self.depthwise, self.learning = depthwise, learning
        shape = (channels, 1 if depthwise else channels, kernel_size, kernel_size)
        for matrix in _CELL.matrices:
            weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            self.register_parameter(f"weight_{matrix.name}", weight)

    def weights(self) -> list[Tensor]:
        """The four weights, in the order ss, ms, mm, sm."""
        return [getattr(self, f"weight_{matrix.name}") for matrix in _CELL.matrices]

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence x (T, B, C, H, W). Returns s at all steps, (T, B, C, H, W), and the last (s, m).

        state: (s, m) before the first step, each (B, C, H, W); zero if None. resets (T, B) bool: rows whose state is
        set to zero before that step. Nothing is mutated. Under autocast everything runs in the parameters' own dtype.
        Raises TypeError or ValueError for a wrong shape, dtype or device.
        """
        check.shape("x", check.tensor("x", x), ("T", "B", self.channels, "H", "W"))
        if autocast_is_on(x.device):
            with without_autocast(x.device):
                return self(*self._cast(x, state), resets)
        s, m = self._state(state, x[0])
        if resets is not None:
            resets = check.mask("resets", resets, x.shape[:2], x.device)
        # the transforms of torch.func differentiate the loop below, which is RFP too
        if self.learning == "rfp" and not transforms.active():
            s_all, m_all = _Dual.apply(resets, x, s, m, *self.weights())
            return s_all, (s_all[-1].clone(), m_all[-1].clone())  # states with memory of their own
        outputs = []
        for t, now in enumerate(x.unbind(0)):
            if resets is not None:
                s, m = (c.masked_fill(resets[t, :, None, None, None], 0) for c in (s, m))
            s, m = self._advance(now, s, m)
            outputs.append(s)
        return torch.stack(outputs), (s, m)

    def step(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one step on x (B, C, H, W), under autograd. Returns s (B, C, H, W) and (s, m).

        Credit passes back as `learning` says. This is for networks in which the input depends on the past of later
        areas, so that the whole input sequence isn't known at once. state and errors are those of `forward`.
        """
        check.shape("x", check.tensor("x", x), ("B", self.channels, "H", "W"))
        if autocast_is_on(x.device):
            with without_autocast(x.device):
                return self.step(*self._cast(x, state))
        s, m = self._advance(x, *self._state(state, x))
        return s, (s.clone(), m)

    def _cast(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x and the state in the dtype of the parameters."""
        dtype = next(self.parameters()).dtype
        if state is None:
            return x.to(dtype), None
        s, m = (check.tensor(f"state[{at}]", value).to(dtype) for at, value in enumerate(state))
        return x.to(dtype), (s, m)

    def _state(self, state: Sequence[Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
        check.like("x", like, "the weights", next(self.parameters()))
        if state is None:
            return torch.zeros_like(like), torch.zeros_like(like)
        s, m = state
        for name, value in (("state[0]", s), ("state[1]", m)):
            check.shape(name, check.tensor(name, value), like.shape)
            check.like(name, value, "x", like)
        return s, m

    def _advance(self, x: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        gates = []
        for weight, signal in zip(self.weights(), (s, m, m, s), strict=True):
            if self.learning == "rfp":
                # The value is that of the convolution, but its gradient passes through each unit's own tap only.
                own = _own(weight)[:, None, None] * (signal - signal.detach())
                gates.append(_convolve(weight, signal.detach()) + own)
            else:
                gates.append(_convolve(weight, signal))
        ss, ms, mm, sm = gates
        return _CELL.update((s, m), (ss, sm, mm, ms), (x,))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        depthwise = ", depthwise=True" if self.depthwise else ""
        return f"{self.channels}, kernel_size={self.kernel_size}{depthwise}, learning={self.learning!r}"


def _own(weight: Tensor) -> Tensor:
    """The weight by which each unit reads its own state: the middle tap of its channel with itself, (C,)."""
    middle = weight.shape[-1] // 2
    taps = weight[:, :, middle, middle]
    return taps[:, 0] if weight.shape[1] == 1 else taps.diagonal()


def _convolve(weight: Tensor, signal: Tensor) -> Tensor:
    """The convolution weight * signal, padded to the signal's shape (B, C, H, W)."""
    groups = signal.shape[1] // weight.shape[1]
    return F.conv2d(signal, weight, padding=weight.shape[-1] // 2, groups=groups)


class _Dual(torch.autograd.Function):
    """Runs a sequence; the backward pass is RFP's dual form. Outside the convolutions, maps are flat: N = C·H·W."""

    @staticmethod
    def forward(
        ctx: Any, resets: Tensor | None, x: Tensor, s: Tensor, m: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        steps, batch, *maps = x.shape
        units = math.prod(maps)
        flat = x.reshape(steps, batch, units)
        states = x.new_empty(2, steps + 1, batch, units)
        states[0, 0], states[1, 0] = s.reshape(batch, units), m.reshape(batch, units)
        saved = x.new_empty(steps, batch, _CELL.saves, units)
        by_gate = sorted(zip(_CELL.matrices, weights, strict=True), key=lambda pair: pair[0].into[1])
        for t in range(steps):
            before = states[:, t]
            if resets is not None:
                before = before.masked_fill(resets[t, :, None], 0)
            p = [
                _convolve(weight, before[state_read(matrix)].view(batch, *maps)).view(batch, units)
                for matrix, weight in by_gate
            ]
            after, kept = _CELL.advance(before.unbind(), p, (flat[t],))
            torch.stack(tuple(after), out=states[:, t + 1])
            torch.stack(tuple(kept), 1, out=saved[t])
        ctx.maps = maps
        ctx.save_for_backward(flat, states, saved.movedim(2, 0), resets, *weights)
        return states[0, 1:].view(x.shape), states[1, 1:].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor, grad_m: Tensor) -> tuple[Tensor | None, ...]:
        flat, states, saved, resets, *weights = ctx.saved_tensors
        maps = ctx.maps
        delta = torch.stack([grad_s, grad_m]).reshape(2, *flat.shape)
        trajectory = rfp.emptied(Trajectory(flat[None], states, saved, resets), delta)
        pixels = maps[1] * maps[2]
        own = [_own(weight).repeat_interleave(pixels) for weight in weights]
        backend = operations.choose_scan("auto", delta.device, delta.dtype)
        entering, for_x, first = operations.dual_of(
            _CELL, trajectory, own, delta, _CELL.matrices, 1, "rfp", backend=backend
        )
        by_weight = []
        for credit, signal, weight in zip(
            entering,
            (trajectory.before[state_read(matrix)] for matrix in _CELL.matrices),
            weights,
            strict=True,
        ):
            by_weight.append(
                conv2d_weight(
                    signal.reshape(-1, *maps),
                    weight.shape,
                    credit.reshape(-1, *maps),
                    padding=weight.shape[-1] // 2,
                    groups=maps[0] // weight.shape[1],
                )
            )
        steps, batch = flat.shape[:2]
        first = first.view(2, batch, *maps)
        return None, for_x[0].view(steps, batch, *maps), first[0], first[1], *by_weight
