"""Recurrent layers as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from .cells import Cell, Matrix, RGCCell


class TwoPointLayer(nn.Module):
    """What a learning rule needs to know of a recurrent layer, whatever its cell.

    cell       the two-point cell
    matrices   all of the layer's matrices: the cell's, then those that read the layer's input
    """

    cell: Cell
    matrices: Sequence[Matrix]
    hidden_size: int
    input_size: int | None

    @property
    def fan_in(self) -> int:
        """Features of the layer's input."""
        return self.hidden_size if self.input_size is None else self.input_size

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of `matrices`, in their order."""
        return tuple(
            getattr(self, matrix.name if matrix.reads == "one" else f"weight_{matrix.name}")
            for matrix in self.matrices
        )

    def recurrent_weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the cell's matrices."""
        return self.weights()[: len(self.cell.matrices)]

    def drive(self, x: Tensor) -> Tensor:
        """The cell's per-unit inputs (J, T, B, N) from the layer's input (T, B, fan_in)."""
        raise NotImplementedError

    def input_gradient(self, per_unit: Tensor, readers: Sequence[Tensor]) -> Tensor:
        """Gradient of the layer's input (T, B, fan_in) from that of the per-unit inputs (J, T, B, N).

        readers: the weights of the matrices that read the layer's input, in order; none if it is x itself.
        """
        if not readers:
            return per_unit[0]
        into = [matrix.into[1] for matrix in self.matrices if matrix.reads == "input"]
        parts = [per_unit[j] @ weight for j, weight in zip(into, readers, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class RGC(TwoPointLayer):
    """Reciprocal gated circuit: a recurrent layer with two states a unit (paper, Section 2.2).

        s(t) = (1 - tanh(W_ms m(t-1))) x(t) + tanh(W_ss s(t-1)) s(t-1)
        m(t) = (1 - tanh(W_sm s(t-1))) x(t) + tanh(W_mm m(t-1)) m(t-1)

    x(t) is the layer's input, of N = hidden_size features, or W_in u(t) + b if input_size is given.

    Args:
        hidden_size: N, units.
        input_size: I, features of the input u; None: the input is x itself, N features.
        recurrence: "dense", weights (N, N); or "diagonal", weights (N,), for which RFP is exact.
        learning: "rfp" | "bptt" | "rtrl", as in `functional.rgc`.
        init: of the recurrent weights: "zeros" (the paper's: no dynamics at first) or "uniform",
            U(-1/√N, 1/√N). weight_in and bias start as in torch.nn.Linear.
        batch_first: inputs and outputs are (B, T, ·) instead of (T, B, ·).
        device, dtype: of the parameters.

    Parameters: weight_ss, weight_ms, weight_mm, weight_sm; weight_in (N, I) and bias (N,) with input_size.

    Raises ValueError or TypeError for an argument out of its range, naming it.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        input_size: int | None = None,
        recurrence: Literal["dense", "diagonal"] = "dense",
        learning: functional.Learning = "rfp",
        init: Literal["zeros", "uniform"] = "zeros",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = check.integer("hidden_size", hidden_size, 1)
        self.input_size = None if input_size is None else check.integer("input_size", input_size, 1)
        check.one_of("recurrence", recurrence, ("dense", "diagonal"))
        check.one_of("learning", learning, functional.LEARNING)
        check.one_of("init", init, ("zeros", "uniform"))
        self.recurrence, self.learning, self.init = recurrence, learning, init
        self.batch_first = batch_first
        self.cell = RGCCell()
        shape = (hidden_size, hidden_size) if recurrence == "dense" else (hidden_size,)
        for matrix in self.cell.matrices:
            weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(f"weight_{matrix.name}", weight)
        self.matrices = self.cell.matrices
        if input_size is not None:
            self.weight_in = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
            read_input = (Matrix("in", ("input", 0), "input"), Matrix("bias", ("input", 0), "one"))
            self.matrices = (*self.matrices, *read_input)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says."""
        with torch.no_grad():
            for weight in self.recurrent_weights():
                if self.init == "zeros":
                    weight.zero_()
                else:
                    weight.uniform_(-1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))
            if self.input_size is not None:
                bound = 1 / math.sqrt(self.input_size)
                self.weight_in.uniform_(-bound, bound)
                self.bias.uniform_(-bound, bound)

    def drive(self, x: Tensor) -> Tensor:
        return (x if self.input_size is None else nn.functional.linear(x, self.weight_in, self.bias))[None]

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence, as torch.nn.LSTM does.

        Args:
            x: (T, B, F), or (B, T, F) with batch_first; or (T, F) without a batch. F is input_size or N.
            state: (s0, m0), each (B, N), or (N,) without a batch; zero if None.
            resets: bool, x's shape without F: a new episode starts at that step.

        Returns:
            output, of x's layout with N features: s; and (s_T, m_T), each (B, N), or (N,) without a batch.

        Gradients of all parameters, x and state are by `learning`. Raises as `functional.rgc`.
        """
        x = check.tensor("x", x)
        if x.dim() not in (2, 3):
            raise ValueError(f"x must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
        check.shape("x", x, (*("T", "B")[: x.dim() - 1], self.fan_in), "to match the layer")
        check.like("x", x, "the layer", self.weights()[0])
        batched = x.dim() == 3
        time_first = not (batched and self.batch_first)
        if not batched:
            x = x[:, None]
            state = None if state is None else (state[0][None], state[1][None])
            resets = None if resets is None else resets[:, None]
        if not time_first:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        (u,) = self.drive(x)
        ss, ms, mm, sm = self.recurrent_weights()
        s, m = functional.rgc(u, ss, ms, mm, sm, state, resets=resets, learning=self.learning)
        output = s if time_first else s.transpose(0, 1)
        last = (s[-1], m[-1])
        if not batched:
            return output[:, 0], (last[0][0], last[1][0])
        return output, last

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        parts = [str(self.hidden_size)]
        if self.input_size is not None:
            parts.append(f"input_size={self.input_size}")
        parts += [f"recurrence={self.recurrence!r}", f"learning={self.learning!r}"]
        if self.batch_first:
            parts.append("batch_first=True")
        return ", ".join(parts)
