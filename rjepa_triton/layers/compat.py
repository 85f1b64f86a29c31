"""LSTM, GRU and RNN that stand in for torch.nn's: its constructors, its calls, its parameters, and a learning rule.

    from rjepa_triton.compat import LSTM                     # in place of torch.nn

Each is torch.nn's class of that name, so that isinstance, state_dict, initialisation, device and dtype moves are
torch's own. With learning="bptt", the default, a call is torch.nn's as well, and its gradient is exact. With another
rule the same forward pass runs by `functional.two_point`, layer by layer and direction by direction.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import _checks as check
from .._device import autocast_is_on, without_autocast
from ..cells import builtin as cells
from ..cells.two_point import Cell
from . import functional, transforms
from .layer import project

__all__ = ["GRU", "LSTM", "RNN"]

States = tuple[Tensor, ...]


class _Lengths:
    """How many steps each batch row of a padded sequence (T, B, F) has; all T of them unless a PackedSequence says."""

    def __init__(self, steps: int, lengths: Tensor | None, device: torch.device) -> None:
        self.lengths = lengths  # on the CPU, as torch packs by them
        self.equal = lengths is None or bool((lengths == steps).all())
        self.beyond: Tensor | None = None  # (T, B) bool: the padding
        if not self.equal:
            assert lengths is not None
            times, own = torch.arange(steps, device=device)[:, None], lengths.to(device)
            self.beyond = times >= own
            self._last = own - 1
            self._reversed = torch.where(self.beyond, times, self._last - times)

    def reverse(self, x: Tensor) -> Tensor:
        """x (T, B, ·) with each row's own steps in reverse; the padding stays where it is."""
        return x.flip(0) if self.equal else x.gather(0, self._reversed[..., None].expand_as(x))

    def last(self, x: Tensor) -> Tensor:
        """x (T, B, ·) at each row's last step, (B, ·)."""
        if self.equal:
            return x[-1]
        return x.gather(0, self._last[None, :, None].expand(1, *x.shape[1:]))[0]

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Dropout of x (T, B, ·), which draws what torch.nn draws: none for the padding."""
        if self.lengths is None:
            return nn.functional.dropout(x, probability)
        data, sizes, _, _ = pack_padded_sequence(x, self.lengths)
        return pad_packed_sequence(PackedSequence(nn.functional.dropout(data, probability), sizes))[0]


def _rows(state: Tensor, order: Tensor | None) -> Tensor:
    """A state (L·D, B, ·) with its batch rows in this order."""
    return state if order is None else state.index_select(1, order)


class _LearningRule(nn.RNNBase):
    """What the three layers share: the argument `learning`, and the call with a rule that isn't torch.nn's."""

    # of the class too, for a module that torch.nn's own pickle has made
    learning: functional.Learning = "bptt"
    refine: int | Literal["exact"] = 0

    def __init__(
        self,
        *args: Any,
        learning: functional.Learning = "bptt",
        refine: int | Literal["exact"] = 0,
        **kwargs: Any,
    ) -> None:
        functional.rule("learning", learning, refine)
        super().__init__(*args, **kwargs)
        self.learning, self.refine = learning, refine

    def _cell(self) -> Cell:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:  # the names are torch's
        """As torch.nn's. With another rule than "bptt" the gradient is that rule's, and can't be differentiated again.

        With another rule everything runs in the parameters' own dtype under autocast.
        """
        # torch.nn's code can't go under vmap over weights
        if self.learning == "bptt" and not transforms.active():
            return super().forward(input, hx)
        data = input.data if isinstance(input, PackedSequence) else check.tensor("input", input)
        # torch.nn says what is wrong without a step; without a row there is no gradient
        if 0 in data.shape[:-1]:
            return super().forward(input, hx)
        if autocast_is_on(data.device):
            dtype = self._parameter("weight_hh_l0").dtype
            with without_autocast(data.device):
                given = hx.to(dtype) if isinstance(hx, Tensor) else hx
                given = tuple(value.to(dtype) for value in hx) if isinstance(hx, (tuple, list)) else given
                return self._by_rule(input.to(dtype), given)
        return self._by_rule(input, hx)

    def _by_rule(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        """`forward` with the rule: to padded, batched, time-major sequences and back."""
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            data, sizes, order, inverse = input
            states = self._states(data, hx, sizes, order)
            x, lengths = pad_packed_sequence(PackedSequence(data, sizes))
            rows = _Lengths(x.shape[0], lengths, x.device)
            output, last = self._run(x, states, rows)
            packed, _, _, _ = pack_padded_sequence(output, lengths)
            last = tuple(_rows(value, inverse) for value in last)
            return PackedSequence(packed, sizes, order, inverse), last if len(last) > 1 else last[0]
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}'s input must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = self._batched(hx)
        elif hx is not None:
            for value in hx if isinstance(hx, (tuple, list)) else (hx,):
                if isinstance(value, Tensor) and value.dim() != 3:
                    raise RuntimeError(
                        f"{name}'s hx must have 3 dimensions, (layers and directions, B, N), for an input with 3, got "
                        f"shape {tuple(value.shape)}"
                    )
        states = self._states(input, hx, None, None)
        x = input.transpose(0, 1) if self.batch_first else input
        output, last = self._run(x, states, _Lengths(x.shape[0], None, x.device))
        if not batched:
            output, last = output[:, 0], tuple(value[:, 0] for value in last)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, last if len(last) > 1 else last[0]

    def _batched(self, hx: Any) -> Any:
        """hx of an input without a batch, with a batch of one."""
        if hx is None:
            return None
        if isinstance(hx, Tensor) and hx.dim() == 3 and len(hx) > 1 and len(self._cell().states) == 2:
            hx = hx[0], hx[1]  # torch.nn.LSTM takes h and c in one tensor here
        given = hx if isinstance(hx, (tuple, list)) else (hx,)
        for value in given:
            if check.tensor("hx", value).dim() != 2:
                raise RuntimeError(
                    f"{type(self).__name__}'s hx must have 2 dimensions, (layers and directions, N), for an input with "
                    f"2, got shape {tuple(value.shape)}"
                )
        rows = tuple(value.unsqueeze(1) for value in given)
        return rows if isinstance(hx, (tuple, list)) else rows[0]

    def _states(self, input: Tensor, hx: Any, sizes: Tensor | None, order: Tensor | None) -> States:
        """The states to start from, (L·D, B, ·) each, checked by torch.nn's own checks."""
        count = len(self._cell().states)
        self.check_input(input, sizes)
        _, batch, units = self.get_expected_hidden_size(input, sizes)
        directed = self.num_layers * (2 if self.bidirectional else 1)
        widths = (units, self.hidden_size)[:count]
        if hx is None:
            return tuple(input.new_zeros(directed, batch, width) for width in widths)
        if isinstance(hx, Tensor):
            hx = (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != count:
            wanted = "a tuple of two tensors (h, c)" if count > 1 else "a tensor"
            got = f"{len(hx)} tensors" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise RuntimeError(f"{type(self).__name__}'s hx must be {wanted}, got {got}")
        for value, width in zip(hx, widths, strict=True):
            self.check_hidden_size(check.tensor("hx", value), (directed, batch, width))
            check.like("hx", value, "the input", input)
        return tuple(_rows(value, order) for value in hx)

    def _run(self, x: Tensor, states: States, rows: _Lengths) -> tuple[Tensor, States]:
        """All layers and directions over x (T, B, F): the output (T, B, ·), and the last states, (L·D, B, ·) each."""
        check.like("the input", x, "the layer", self._parameter("weight_hh_l0"))
        last: list[States] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = rows.dropout(x, self.dropout)
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                start = tuple(value[len(last)] for value in states)
                driven = rows.reverse(x) if reverse else x
                output, end = self._one(driven, start, rows, f"_l{layer}" + "_reverse" * reverse)
                outputs.append(rows.reverse(output) if reverse else output)
                last.append(end)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, tuple(torch.stack(of_state) for of_state in zip(*last, strict=True))

    def _one(self, x: Tensor, start: States, rows: _Lengths, suffix: str) -> tuple[Tensor, States]:
        """One direction of one layer over x (T, B, F) from states (B, ·): output (T, B, ·) and last states (B, ·)."""
        cell = self._cell()
        weight_hh = self._parameter(f"weight_hh{suffix}")
        bias, own = self._biases(suffix)
        drive = project(x, self._parameter(f"weight_ih{suffix}"), bias)
        down = self._parameter(f"weight_hr{suffix}") if self.proj_size else None
        if down is not None:
            # W_hh reads the projected state W_hr h. The two make one matrix of units; what the first step reads is
            # given as it is, so it enters with the input.
            first = nn.functional.linear(start[0], weight_hh)
            drive = torch.cat([drive[:1] + first, drive[1:]])
            weight_hh = weight_hh @ down
            start = (torch.zeros_like(start[1]), *start[1:])
        inputs = drive.unflatten(-1, (-1, self.hidden_size)).movedim(-2, 0)
        if own is not None:
            inputs = torch.cat([inputs, own.expand(1, *inputs.shape[1:])])
        states = functional.two_point(
            cell,
            inputs,
            weight_hh.chunk(len(cell.matrices)),
            start,
            resets=rows.beyond,  # a state of the padding reaches nothing, and doesn't grow from step to step
            learning=self.learning,
            refine=self.refine,
        )
        output = states[0] if down is None else nn.functional.linear(states[0], down)
        return output, (rows.last(output), *(rows.last(value) for value in states[1:]))

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        """The bias (G·N,) of the gates' inputs, and the one (N,) that is the cell's own parameter, if it has any."""
        if not self.bias:
            return None, None
        return self._parameter(f"bias_ih{suffix}") + self._parameter(f"bias_hh{suffix}"), None

    def _parameter(self, name: str) -> Tensor:
        """A weight by its name, parametrized or replaced as it may be."""
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value

    def extra_repr(self) -> str:
        refine = f", refine={self.refine!r}" if self.refine else ""
        return super().extra_repr() + f", learning={self.learning!r}{refine}"


class LSTM(_LearningRule, nn.LSTM):
    """torch.nn.LSTM with a learning rule: its arguments, calls, parameters and initialisation.

        i, f, o = σ(W_ih u + b_ih + W_hh h' + b_hh), g = tanh(…);    c = f c' + i g;    h = o tanh(c)

    Args:
        *args, **kwargs: of torch.nn.LSTM: input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype.
        learning: "bptt", the exact gradient, by torch.nn's own code; or another rule of `functional.two_point`, such as
            "rfp", of which each layer and direction has its own.
        refine: rounds of refinement of "rfp" (`functional.two_point`).

    A call takes what torch.nn.LSTM's takes: (T, B, F), (B, T, F) with batch_first, (T, F) without a batch, or a
    PackedSequence, and (h, c), (L·D, B, N) each. It mutates nothing.

    With proj_size the recurrent matrix of a rule is W_hh W_hr, (N, N) for each gate: RFP keeps its diagonal, and its
    gradient passes to W_hh and W_hr by the chain rule.

    Raises TypeError, ValueError or RuntimeError of torch.nn's kind for an argument that doesn't fit, and as
    `functional.two_point` does for a combination of learning and refine.
    """

    def _cell(self) -> Cell:
        return cells.LSTMCell()


class GRU(_LearningRule, nn.GRU):
    """torch.nn.GRU with a learning rule: its arguments, calls, parameters and initialisation.

        r, z = σ(W_ih u + b_ih + W_hh h' + b_hh)
        n = tanh(W_in u + b_in + r (W_hn h' + b_hn));    h = (1 - z) n + z h'

    Args and errors: as for `LSTM`, but for proj_size, which torch.nn.GRU has not; the state is h.
    """

    def _cell(self) -> Cell:
        return cells.GRUCell(self.bias)

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        if not self.bias:
            return None, None
        for_input, recurrent = self._parameter(f"bias_ih{suffix}"), self._parameter(f"bias_hh{suffix}")
        gates = 2 * self.hidden_size  # r and z; the reset gate multiplies the recurrent bias of n
        return (
            torch.cat([for_input[:gates] + recurrent[:gates], for_input[gates:]]),
            recurrent[gates:],
        )


class RNN(_LearningRule, nn.RNN):
    """torch.nn.RNN with a learning rule: its arguments, calls, parameters and initialisation.

        h = f(W_ih u + b_ih + W_hh h' + b_hh),    f = "tanh" or "relu", the argument `nonlinearity`

    Args and errors: as for `LSTM`, but for proj_size, which torch.nn.RNN has not; the state is h.
    """

    def _cell(self) -> Cell:
        return cells.ElmanCell("relu" if self.nonlinearity == "relu" else "tanh")
