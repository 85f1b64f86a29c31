"""Recurrent layers as modules, by name. Each is a `TwoPointRNN` of one cell, which describes what they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cells import builtin as cells
from ..cells.builtin import Nonlinearity
from .layer import Device, Dtype, Init, TwoPointRNN, project

__all__ = [
    "ALIF",
    "CTRNN",
    "ELSTM",
    "GRU",
    "LIF",
    "LRU",
    "LSTM",
    "MGU",
    "RGC",
    "RNN",
    "IndRNN",
    "MinGRU",
    "MinLSTM",
    "TimeDecay",
    "TwoPointRNN",
]


class RGC(TwoPointRNN):
    """Reciprocal gated circuit: a recurrent layer with two states a unit (paper, Section 2.2).

        s(t) = (1 - tanh(W_ms m(t-1))) x(t) + tanh(W_ss s(t-1)) s(t-1)
        m(t) = (1 - tanh(W_sm s(t-1))) x(t) + tanh(W_mm m(t-1)) m(t-1)

    x(t) is the layer's input, of N = hidden_size features, or W_in u(t) + b if input_size is given. The output is s,
    the state (s, m). init is "zeros", as in the paper, which passes x through at first. Other arguments:
    `TwoPointRNN`.

    Parameters: weight_ss, weight_ms, weight_mm, weight_sm; weight_in and bias with input_size.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        init: Init = "zeros",
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(cells.RGCCell(), hidden_size, init=init, device=device, dtype=dtype, **options)


class _TorchWeights(TwoPointRNN):
    """A layer that also loads the state_dict of the torch.nn layer of its kind, of one layer and one direction."""

    def to_torch(self) -> nn.RNNBase:
        """The torch.nn layer of this kind, with copies of the weights: it computes the same outputs.

        torch.nn has two biases a gate; the second is zero where one of them is enough. Raises ValueError for a layer
        with heads or a diagonal recurrence, which torch.nn has not.
        """
        name, first = type(self).__name__, self.weights()[0]
        if first.dim() != 2:
            wanted = "recurrence='dense' and no heads"
            got = "recurrence='diagonal'" if self.heads is None else f"heads={self.heads}"
            raise ValueError(f"to_torch() needs {wanted}, as torch.nn's layers have, got {got} in {name}")
        made = self._torch_layer(
            self.fan_in,
            self.hidden_size,
            bias=any(own.startswith("bias") for own in self._names),
            batch_first=self.batch_first,
            device=first.device,
            dtype=first.dtype,
        )
        made.load_state_dict(self._to_torch())
        return made.train(self.training)

    def _torch_layer(self, *args: Any, **options: Any) -> nn.RNNBase:
        """torch.nn's layer of this kind."""
        raise NotImplementedError

    def _to_torch(self) -> dict[str, Tensor]:
        """torch.nn's parameters from ours."""
        suffixes = [f"_{name}" for name in self.cell.inputs] if len(self.cell.inputs) > 1 else [""]
        ours = dict(zip(self._names, [weight.detach() for weight in self.weights()], strict=True))
        theirs = {
            "weight_ih_l0": torch.cat([ours[f"weight_in{suffix}"] for suffix in suffixes]),
            "weight_hh_l0": torch.cat([ours[f"weight_{matrix.name}"] for matrix in self.cell.matrices]),
        }
        if f"bias{suffixes[0]}" in ours:
            theirs["bias_ih_l0"] = torch.cat([ours[f"bias{suffix}"] for suffix in suffixes])
            theirs["bias_hh_l0"] = torch.zeros_like(theirs["bias_ih_l0"])
        return theirs

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        theirs = {
            key: state_dict.pop(prefix + key)
            for key in [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
            if key.startswith(("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l"))
        }
        if theirs:
            deeper = sorted(key for key in theirs if not key.endswith("_l0"))
            if deeper:
                raise ValueError(
                    f"state_dict must be of one layer and one direction of torch.nn, got {', '.join(deeper)}; "
                    "load each layer into its own"
                )
            for key, value in self._from_torch(theirs).items():
                state_dict[prefix + key] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _from_torch(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters from torch.nn's, which stacks the gates' weights in one tensor, and has two biases a gate."""
        inputs, count = self.cell.inputs, len(self.cell.inputs)
        suffixes = [f"_{name}" for name in inputs] if count > 1 else [""]
        ours: dict[str, Tensor] = {}
        for suffix, value in zip(suffixes, theirs["weight_ih_l0"].chunk(count), strict=True):
            ours[f"weight_in{suffix}"] = value
        for matrix, value in zip(self.cell.matrices, theirs["weight_hh_l0"].chunk(count), strict=True):
            ours[f"weight_{matrix.name}"] = value
        if "bias_ih_l0" in theirs:
            for_input, recurrent = theirs["bias_ih_l0"].chunk(count), theirs["bias_hh_l0"].chunk(count)
            for j, suffix in enumerate(suffixes):
                ours[f"bias{suffix}"] = for_input[j] + recurrent[j]
        return ours


class RNN(_TorchWeights):
    """Elman network, h = f(W_hh h' + W_in u + b), as torch.nn.RNN: f = "tanh" or "relu".

    Output and state are h. Loads the state_dict of a one-layer torch.nn.RNN. Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: Nonlinearity = "tanh",
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.ElmanCell(nonlinearity),
            hidden_size,
            input_size=input_size,
            device=device,
            dtype=dtype,
            **options,
        )

    def _torch_layer(self, *args: Any, **options: Any) -> nn.RNNBase:
        assert isinstance(self.cell, cells.ElmanCell)
        return nn.RNN(*args, nonlinearity=self.cell.nonlinearity, **options)


class IndRNN(TwoPointRNN):
    """Independently recurrent network (Li et al. 2018): h = f(w ⊙ h' + W_in u + b), f = "relu" or "tanh".

    The recurrence is diagonal, so RFP is exact. w is drawn from U(0, 1). Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: Nonlinearity = "relu",
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        cell = cells.ElmanCell(nonlinearity)
        super().__init__(
            cell,
            hidden_size,
            input_size=input_size,
            recurrence="diagonal",
            device=device,
            dtype=dtype,
            **options,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.get_parameter("weight_hh").uniform_(0, 1)


class CTRNN(TwoPointRNN):
    """Leaky, or continuous-time, network, by Euler steps α = dt/τ: h = (1 - α) h' + α f(W_hh h' + W_in u + b).

    Output and state are h. alpha in (0, 1]; f = "tanh" or "relu". Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        alpha: float = 0.1,
        nonlinearity: Nonlinearity = "tanh",
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.LeakyCell(alpha, nonlinearity),
            hidden_size,
            input_size=input_size,
            device=device,
            dtype=dtype,
            **options,
        )


class LSTM(_TorchWeights):
    """Long short-term memory, as torch.nn.LSTM: the output is h, the state (h, c).

    Loads the state_dict of a one-layer torch.nn.LSTM, and then computes the same outputs. Parameters: weight_h<g> (N,
    N), weight_in_<g> (N, I), bias_<g> (N,) for the gates g = i, f, g, o. Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, device: Device = None, dtype: Dtype = None, **options: Any
    ) -> None:
        super().__init__(
            cells.LSTMCell(), hidden_size, input_size=input_size, device=device, dtype=dtype, **options
        )

    def _torch_layer(self, *args: Any, **options: Any) -> nn.RNNBase:
        return nn.LSTM(*args, **options)


class GRU(_TorchWeights):
    """Gated recurrent unit, as torch.nn.GRU: output and state are h.

    Loads the state_dict of a one-layer torch.nn.GRU, and then computes the same outputs. Parameters: weight_h<g> (N,
    N), weight_in_<g> (N, I), bias_<g> (N,) for g = r, z, n, and bias_hn (N,), which the reset gate multiplies. Other
    arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.GRUCell(bias),
            hidden_size,
            input_size=input_size,
            bias=bias,
            device=device,
            dtype=dtype,
            **options,
        )

    def _torch_layer(self, *args: Any, **options: Any) -> nn.RNNBase:
        return nn.GRU(*args, **options)

    def _to_torch(self) -> dict[str, Tensor]:
        theirs = super()._to_torch()
        if "bias_hh_l0" in theirs:
            theirs["bias_hh_l0"][2 * self.hidden_size :] = self.get_parameter("bias_hn").detach()
        return theirs

    def _from_torch(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = super()._from_torch(theirs)
        if "bias_ih_l0" in theirs:
            ours["bias_n"], ours["bias_hn"] = (theirs[f"bias_{k}_l0"].chunk(3)[2] for k in ("ih", "hh"))
        return ours


class MGU(TwoPointRNN):
    """Minimal gated unit (Zhou et al. 2016), with the gate after the product, as torch.nn.GRU has it:

        f = σ(W_hf h' + W_in_f u + b_f),    n = tanh(W_in_n u + b_n + f (W_hn h' + b_hn)),    h = (1 - f) h' + f n

    Output and state are h. Parameters: weight_h<g> (N, N), weight_in_<g> (N, I), bias_<g> (N,) for g = f, n, and
    bias_hn (N,). Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.MGUCell(bias),
            hidden_size,
            input_size=input_size,
            bias=bias,
            device=device,
            dtype=dtype,
            **options,
        )


class MinLSTM(TwoPointRNN):
    """minLSTM (Feng et al. 2024): an LSTM whose gates read the input alone.

        f = σ(F u) / (σ(F u) + σ(I u)),    h = f h' + (1 - f) P u

    There are no recurrent matrices, so RFP is exact, and the forward pass in parallel takes one round. Output and state
    are h. Parameters: weight_in_<g> (N, I) and bias_<g> (N,) for g = f, i, n. Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, device: Device = None, dtype: Dtype = None, **options: Any
    ) -> None:
        super().__init__(
            cells.MinLSTMCell(), hidden_size, input_size=input_size, device=device, dtype=dtype, **options
        )


class MinGRU(TwoPointRNN):
    """minGRU (Feng et al. 2024): a GRU whose gate reads the input alone.

        z = σ(Z u),    h = (1 - z) h' + z P u

    There are no recurrent matrices, so RFP is exact, and the forward pass in parallel takes one round. Output and state
    are h. Parameters: weight_in_<g> (N, I) and bias_<g> (N,) for g = z, n. Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, device: Device = None, dtype: Dtype = None, **options: Any
    ) -> None:
        super().__init__(
            cells.MinGRUCell(), hidden_size, input_size=input_size, device=device, dtype=dtype, **options
        )


class ELSTM(TwoPointRNN):
    """Element-wise LSTM (Irie et al. 2024), whose gates read the input by the same weights as those of an LSTM:

        f = σ(w_f c' + F u),    z = tanh(w_z c' + Z u),    c = f c' + (1 - f) z
        o = σ(O u + W_o c),     output h = o c

    The recurrence is diagonal, so RFP is exact for the weights that enter c. O and W_o lie outside the recurrence;
    their gradient is that of the step itself, which is exact. The state is c. Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, device: Device = None, dtype: Dtype = None, **options: Any
    ) -> None:
        super().__init__(
            cells.ELSTMCell(),
            hidden_size,
            input_size=input_size,
            recurrence="diagonal",
            device=device,
            dtype=dtype,
            **options,
        )
        like = self.get_parameter("weight_in_f")
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.output_in = nn.Linear(input_size, hidden_size, **factory)
        self.output_cell = nn.Linear(hidden_size, hidden_size, bias=False, **factory)

    def readout(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        (c,) = states
        return torch.sigmoid(_applied(self.output_in, x) + _applied(self.output_cell, c)) * c


class TimeDecay(TwoPointRNN):
    """Time-decay units (paper, Appendix A.4): c = τ c' + P u, where each unit learns its own decay τ.

    It is linear and has no recurrent matrices, so RFP is exact. Output and state are c. Parameters: weight_in (P),
    bias, and tau (N,), which is drawn from U(0, 1). Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        super().__init__(
            cells.TimeDecayCell(), hidden_size, input_size=input_size, device=device, dtype=dtype, **options
        )


class LRU(TwoPointRNN):
    """Linear recurrent unit (Orvieto et al. 2023); with a nonlinearity, recurrent trace units (Elelimy et al. 2024).

        z = λ z' + √(1 - |λ|²) B u,    output y = Re(C z) + D u,    λ = exp(-exp(ν) + i exp(θ)) for each unit

    N complex units; B and C are complex, D is real, y has N features. The recurrence is diagonal, so RFP is exact. The
    state is (re, im) of z. r_min, r_max, max_phase: the range that |λ| and its phase are drawn from at first.
    nonlinearity: None, "tanh" or "relu", which re and im pass through.

    Parameters: weight_in_re and weight_in_im (B), their biases, nu, theta; outside the recurrence output_re and
    output_im (C), and skip (D). Other arguments: `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: Nonlinearity | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        cell = cells.LRUCell(nonlinearity, r_min, r_max, max_phase)
        super().__init__(cell, hidden_size, input_size=input_size, device=device, dtype=dtype, **options)
        like = self.get_parameter("nu")
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.output_re = nn.Linear(hidden_size, hidden_size, bias=False, **factory)
        self.output_im = nn.Linear(hidden_size, hidden_size, bias=False, **factory)
        self.skip = nn.Linear(input_size, hidden_size, bias=False, **factory)

    def readout(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        re, im = states
        return _applied(self.output_re, re) - _applied(self.output_im, im) + _applied(self.skip, x)


class LIF(TwoPointRNN):
    """Spiking network of leaky integrate-and-fire neurons (Bellec et al. 2020).

        v = α v' + W_hz z' + W_in u + b - θ z',    z = 1 where v > θ, else 0

    The output is the spikes z, the state (z, v). α = decay, θ = threshold; dampening scales the pseudo-derivative that
    stands for that of the step from 0 to 1 (`LIFCell`). learning="eprop" gives e-prop with symmetric feedback, "bptt"
    the surrogate gradient through time. Parameters: weight_hz (N, N), weight_in (N, I), bias. Other arguments:
    `TwoPointRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        decay: float = 0.95,
        threshold: float = 1.0,
        dampening: float = 0.3,
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        cell = cells.LIFCell(decay, threshold, dampening)
        super().__init__(cell, hidden_size, input_size=input_size, device=device, dtype=dtype, **options)


class ALIF(TwoPointRNN):
    """Spiking network of neurons whose thresholds adapt (Bellec et al. 2020): LIF, and

        a = ρ a' + z',    z = 1 where v > θ + β a, else 0

    The output is the spikes z, the state (z, v, a). ρ = adaptation_decay, β = adaptation; the rest as in `LIF`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        decay: float = 0.95,
        threshold: float = 1.0,
        dampening: float = 0.3,
        adaptation_decay: float = 0.995,
        adaptation: float = 0.18,
        *,
        device: Device = None,
        dtype: Dtype = None,
        **options: Any,
    ) -> None:
        cell = cells.ALIFCell(decay, threshold, dampening, adaptation_decay, adaptation)
        super().__init__(cell, hidden_size, input_size=input_size, device=device, dtype=dtype, **options)


def _applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x): its own call where that does more, as with the hooks of pruning and of the older weight_norm."""
    if type(linear) is not nn.Linear or linear._forward_pre_hooks or linear._forward_hooks:
        return linear(x)
    return project(x, linear.weight, linear.bias)
