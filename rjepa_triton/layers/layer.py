"""A recurrent layer of any two-point cell. The layers with names, such as RGC and LSTM, are in `named`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._autograd import once_differentiable
from .._device import autocast_is_on, without_autocast
from ..cells.two_point import Cell, Matrix, verify
from ..rules.exactness import Exactness, exactness
from . import functional, parallel, transforms

Recurrence = Literal["dense", "diagonal"]
Init = Literal["zeros", "uniform"]
State = Tensor | tuple[Tensor, ...]
Device = torch.device | str | None
Dtype = torch.dtype | None


class TwoPointRNN(nn.Module):
    """A recurrent layer of a two-point cell (`cells.two_point.Cell`), which runs over sequences as torch.nn.LSTM does.

        c(t) = F(c(t-1), {W_k c_k(t-1)}, {W_j u(t) + b_j}),     output(t) = the cell's first state

    Args:
        cell: the cell. A numerical check makes sure that it is two-point.
        hidden_size: N, the number of hidden units.
        input_size: I, the number of features of the layer's input u. None: the cell has one input, and that is u
            itself, of N features.
        recurrence: "dense", with recurrent weights (N, N); or "diagonal", (N,), for which RFP is exact.
        heads: H, or None. With heads the recurrent weights are block-diagonal, (H, b, b) with b = N/H: a unit reads
            only units of its own head, and exact RTRL takes S·b·Σ_k N·M_k numbers a batch row.
        learning: how gradients are found: "rfp", "bptt", "rtrl", "eprop", "rflo" or "snap0" (`functional.two_point`).
        refine: how many rounds refine RFP's credits, 0 for none, or "exact" (`functional.two_point`).
        forward: how the states of a sequence are found: "auto", "sequential" or "parallel" in time
            (`functional.two_point`).
        recompute: keep only the states of a sequence until backward(), which then computes the gates again: less
            memory, one more product for each matrix. It makes no difference to an `OnlineLearner`, which keeps no
            sequence.
        init: of the recurrent weights: "uniform", U(-1/√N, 1/√N), or "zeros".
        bias: whether a bias enters each of the cell's inputs; only with input_size.
        batch_first: whether inputs and outputs are (B, T, ·) instead of (T, B, ·).
        device, dtype: of the parameters.

    Parameters: weight_<matrix> for each matrix of the cell; with input_size, weight_in (N, I) and bias (N,), or
    weight_in_<input> and bias_<input> for a cell with several inputs; and the cell's own parameters (N,).

    Raises TypeError or ValueError for an argument out of its range, naming it, and for a cell that isn't two-point,
    with the reason.
    """

    def __init__(
        self,
        cell: Cell,
        hidden_size: int,
        *,
        input_size: int | None = None,
        recurrence: Recurrence = "dense",
        heads: int | None = None,
        learning: functional.Learning = "rfp",
        refine: int | Literal["exact"] = 0,
        forward: parallel.Forward = "auto",
        recompute: bool = False,
        init: Init = "uniform",
        bias: bool = True,
        batch_first: bool = False,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell must be a two_point.Cell, got {type(cell).__name__}")
        verify(cell)
        self.hidden_size = check.integer("hidden_size", hidden_size, 1)
        self.input_size = None if input_size is None else check.integer("input_size", input_size, 1)
        if input_size is None and len(cell.inputs) != 1:
            raise ValueError(
                f"input_size must be given: {type(cell).__name__} has {len(cell.inputs)} inputs a unit, got None"
            )
        check.one_of("recurrence", recurrence, ("dense", "diagonal"))
        check.one_of("init", init, ("zeros", "uniform"))
        self.heads = None if heads is None else _heads(heads, hidden_size, recurrence)
        functional.rule("learning", learning, refine)
        check.one_of("forward", forward, parallel.FORWARD)
        self.forward_mode = forward  # `forward` is the module's method
        self.recurrence, self.learning, self.refine = recurrence, learning, refine
        self.recompute = check.boolean("recompute", recompute)
        self.init, self.batch_first, self.cell = init, check.boolean("batch_first", batch_first), cell
        check.boolean("bias", bias)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape: tuple[int, ...] = (hidden_size, hidden_size) if recurrence == "dense" else (hidden_size,)
        if self.heads is not None:
            shape = (self.heads, hidden_size // self.heads, hidden_size // self.heads)
        self._names: list[str] = []
        for matrix in cell.matrices:
            self._add(f"weight_{matrix.name}", shape, factory)
        matrices = list(cell.matrices)
        if input_size is not None:
            for j, name in enumerate(cell.inputs):
                suffix = f"_{name}" if len(cell.inputs) > 1 else ""
                self._add(f"weight_in{suffix}", (hidden_size, input_size), factory)
                matrices.append(Matrix(f"in{suffix}", ("input", j), "input"))
                if bias:
                    self._add(f"bias{suffix}", (hidden_size,), factory)
                    matrices.append(Matrix(f"bias{suffix}", ("input", j), "one"))
        for j, name in enumerate(cell.parameters, start=len(cell.inputs)):
            self._add(name, (hidden_size,), factory)
            matrices.append(Matrix(name, ("input", j), "one"))
        if not matrices:
            raise ValueError(
                f"input_size must be given: without it {type(cell).__name__} has nothing to learn"
            )
        self.matrices: Sequence[Matrix] = tuple(matrices)
        self.reset_parameters()

    def _add(self, name: str, shape: tuple[int, ...], factory: dict[str, Any]) -> None:
        kind = type(self.cell).__name__
        if name in self._names:
            raise ValueError(
                f"{kind}'s matrices, inputs and parameters must each have a parameter of their own, got two named "
                f"{name!r} (matrices {[m.name for m in self.cell.matrices]}, inputs {list(self.cell.inputs)}, "
                f"parameters {list(self.cell.parameters)})"
            )
        if hasattr(self, name) or name == "matrices" or not name.isidentifier():
            why = "is not a Python name" if not name.isidentifier() else "is an attribute of the layer"
            raise ValueError(f"{kind} can't have a parameter named {name!r}, which {why}")
        self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
        self._names.append(name)

    def reset_parameters(self) -> None:
        """Draw all parameters: recurrent weights as `init` says, weight_in and bias as torch.nn.Linear does."""
        if all(parameter.is_meta for parameter in self.parameters()):
            return  # there is nothing to draw, and what a cell draws of its own would have memory
        with torch.no_grad():
            bound = 1 / math.sqrt(self.hidden_size)
            for weight in self.recurrent_weights():
                if self.init == "zeros":
                    weight.zero_()
                else:
                    weight.uniform_(-bound, bound)
            with torch.device("cpu"):
                own = self.cell.initial_parameters(self.hidden_size)
            for name, value in own.items():
                getattr(self, name).copy_(value)
            if self.input_size is not None:
                bound = 1 / math.sqrt(self.input_size)
                for name in self._names[len(self.cell.matrices) :]:
                    if name not in own:
                        getattr(self, name).uniform_(-bound, bound)

    @property
    def fan_in(self) -> int:
        """How many features the layer's input has."""
        return self.hidden_size if self.input_size is None else self.input_size

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of `matrices`, in that order: all those to which a learning rule gives a gradient."""
        own = self._parameters
        # The dictionary is faster than `getattr`, and a small layer calls this several times a step. A parametrized
        # weight is not in it.
        return tuple([own[name] if name in own else getattr(self, name) for name in self._names])  # type: ignore[misc]

    def like(self) -> Tensor:
        """A parameter, which has the dtype and the device of all weights. A parametrized weight would be computed."""
        name = self._names[0]
        return self._parameters[name] if name in self._parameters else next(self.parameters())  # type: ignore[return-value]

    def recurrent_weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the cell's own matrices, which come first in `weights`."""
        return self.weights()[: len(self.cell.matrices)]

    def drive(
        self, x: Tensor, weights: Sequence[Tensor] | None = None, resets: Tensor | None = None
    ) -> Tensor:
        """The cell's per-unit inputs (J, T, B, N) from the layer's input (T, B, fan_in).

        weights: as `weights` gives them, for a caller that has read them: a parametrization may draw them anew each
        time.
        With resets the weights' gradients leave out the steps that no credit reaches, even where x is NaN there.
        """
        inputs, parameters = self.cell.inputs, self.cell.parameters
        weights = self.weights() if weights is None else weights
        if self.input_size is None:
            driven = x[None]
        else:
            given: dict[str, list[Tensor]] = {"input": [], "one": []}
            for matrix, weight in zip(self.matrices, weights, strict=True):
                if matrix.reads in ("input", "one") and matrix.into[1] < len(inputs):
                    given[str(matrix.reads)].append(weight)
            bias = _joined(given["one"]) if given["one"] else None
            weight = _joined(given["input"])
            driven = project(x, weight, bias, selects=resets is not None)
            driven = driven.unflatten(-1, (len(inputs), -1)).movedim(-2, 0)
        if not parameters:
            return driven
        own = torch.stack(list(weights[len(weights) - len(parameters) :]))[:, None, None]
        return torch.cat([driven, own.expand(-1, *driven.shape[1:])])

    def input_gradient(self, per_unit: Tensor, input_weights: Sequence[Tensor]) -> Tensor:
        """Gradient of the layer's input (T, B, fan_in) from that of the per-unit inputs (J, T, B, N).

        input_weights: those that read the layer's input, in the order of `matrices`; none if x is the cell's own input.
        """
        if not input_weights:
            return per_unit[0]
        into = [matrix.into[1] for matrix in self.matrices if matrix.reads == "input"]
        parts = [per_unit[j] @ weight for j, weight in zip(into, input_weights, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def readout(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer's output from the cell's outputs (…, N) each and the layer's input (…, fan_in) of that step.

        A subclass may compute its output here; it is not part of the recurrence, and autograd differentiates it.
        """
        return states[0]

    def zero_state(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """The S states (B, N) that a sequence starts from where none are given."""
        return tuple(like.new_zeros(batch, self.hidden_size) for _ in self.cell.states)

    def forward(
        self, x: Tensor, state: State | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run over a sequence, as torch.nn.LSTM does.

        Args:
            x: (T, B, F), or (B, T, F) with batch_first; or (T, F) without a batch. F is input_size or N.
            state: the cell's states, each (B, N), or (N,) without a batch: a tuple, or one tensor for a cell with one
                state. Zero if None.
            resets: bool, of x's shape without F: True starts a new episode at that step.

        Returns:
            the output, in x's layout with N features; and the last state, in the form of `state`, which has memory of
            its own.

        The gradients of all parameters, x and state are those of `learning`. Under autocast everything runs in the
        parameters' own dtype, since gates are sums over many units, and states over many steps. Raises TypeError or
        ValueError as `functional.two_point` does.
        """
        x, names = check.tensor("x", x), self.cell.states
        given: tuple[Tensor, ...] | None = None
        if state is not None:
            joined = (state,) if len(names) == 1 and isinstance(state, Tensor) else state
            given = functional.state_tuple(joined, names)
        if autocast_is_on(x.device):
            with without_autocast(x.device):
                dtype = next(self.parameters()).dtype
                cast = None if given is None else tuple(value.to(dtype) for value in given)
                return self(x.to(dtype), cast, resets)
        if x.dim() not in (2, 3):
            raise ValueError(f"x must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
        check.shape("x", x, (*("T", "B")[: x.dim() - 1], self.fan_in), "to match the layer")
        weights = self.weights()
        check.like("x", x, "the layer", weights[0])
        batched = x.dim() == 3
        time_first = not (batched and self.batch_first)
        if resets is not None:
            resets = check.mask("resets", resets, x.shape[:-1], x.device)
        if not batched:
            x = x[:, None]
            given = None if given is None else tuple(value[None] for value in given)
            resets = None if resets is None else resets[:, None]
        if not time_first:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        start = self.zero_state(x.shape[1], x) if given is None else given
        states = functional.two_point(
            self.cell,
            self.drive(x, weights, resets),
            weights[: len(self.cell.matrices)],
            start,
            resets=resets,
            learning=self.learning,
            refine=self.refine,
            forward=self.forward_mode,
            recompute=self.recompute,
        )
        output = self.readout([states[nu] for nu in self.cell.outputs], x)
        output = output if time_first else output.transpose(0, 1)
        # copies, with memory of their own: a state that is kept or saved keeps no sequence, and the caller may change
        # it or the output
        last = tuple((value[-1] if batched else value[-1, 0]).clone() for value in states)
        if not batched:
            output = output[:, 0]
        return output, last if len(last) > 1 else last[0]

    def exactness(self) -> Exactness:
        """Whether this layer's gradient is exact, and why or why not: print it, or use it as a condition.

        It speaks of the layer on sequences. `OnlineLearner.exactness` speaks of what a learner runs.
        """
        return exactness(self.cell, self.recurrent_weights(), self.learning, self.refine)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        parts = [str(self.hidden_size)]
        if self.input_size is not None:
            parts.append(f"input_size={self.input_size}")
        if self.heads is not None:
            parts.append(f"heads={self.heads}")
        parts += [f"recurrence={self.recurrence!r}", f"learning={self.learning!r}"]
        if self.refine:
            parts.append(f"refine={self.refine!r}")
        if self.forward_mode != "auto":
            parts.append(f"forward={self.forward_mode!r}")
        if self.recompute:
            parts.append("recompute=True")
        if self.batch_first:
            parts.append("batch_first=True")
        return ", ".join(parts)


def local(weight: Tensor) -> Tensor:
    """The part of a weight that lies in this process: its rows here where it is a DTensor, else the weight itself."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _heads(heads: int, hidden_size: int, recurrence: str) -> int:
    """`heads`, checked against the other two. Raises TypeError or ValueError."""
    check.integer("heads", heads, 1)
    if hidden_size % heads:
        raise ValueError(f"heads must divide hidden_size, {hidden_size}, got {heads}")
    if recurrence == "diagonal":
        raise ValueError(
            f"heads={heads} can't go with recurrence='diagonal', which is heads={hidden_size}: give one of the two"
        )
    return heads


def project(x: Tensor, weight: Tensor, bias: Tensor | None, *, selects: bool = False) -> Tensor:
    """x Wᵀ + b, as torch.nn.functional.linear, but for its backward pass: that has the dtype of the forward pass, under
    autocast too.

    selects: a step of x without gradient has no part in W's gradient, even if it is NaN, since a reset forgets.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transforms.active():
        return _Projection.apply(x, weight, bias, selects)
    return nn.functional.linear(x, weight, bias)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, selects: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.selects = selects
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if ctx.selects:
            x = x.masked_fill((grad == 0).all(-1, keepdim=True), 0)
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if needs_x else None,
            rows.mT @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all weights in one tensor. A single weight is not copied."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
