"""The tasks of the peers: a problem, the float64 reference of its gradients, and how a peer's gradients are compared.

For a stream that is learned from, the answer is what the weights have changed by. Arrays are numpy's, so that no peer
needs another one's library. Each network is written once, as a step from
pre-activations to the next state, for any library with tanh and sigmoid: peers differ in how they run and learn it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scaling import cases
from ..scaling.cases import Size

# step(library, products of the recurrent matrices, the input's part, state) -> the next state
Step = Callable[[Any, Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, ...]]

STATE = ("state_0", "state_1")


def _rgc(lib: Any, recurrent: Sequence[Any], given: Sequence[Any], state: Sequence[Any]) -> tuple[Any, ...]:
    (ss, ms, mm, sm), (x,), (s, m) = recurrent, given, state
    return (
        (1 - lib.tanh(ms)) * x + lib.tanh(ss) * s,
        (1 - lib.tanh(sm)) * x + lib.tanh(mm) * m,
    )


def _lstm(lib: Any, recurrent: Sequence[Any], given: Sequence[Any], state: Sequence[Any]) -> tuple[Any, ...]:
    i, f, g, o = (a + b for a, b in zip(recurrent, given, strict=True))
    c = lib.sigmoid(f) * state[1] + lib.sigmoid(i) * lib.tanh(g)
    return lib.sigmoid(o) * lib.tanh(c), c


def _gru(lib: Any, recurrent: Sequence[Any], given: Sequence[Any], state: Sequence[Any]) -> tuple[Any, ...]:
    (r, z, n), (r_in, z_in, n_in), (h,) = recurrent, given, state
    update = lib.sigmoid(z + z_in)
    return ((1 - update) * lib.tanh(n_in + lib.sigmoid(r + r_in) * n) + update * h,)


@dataclass(frozen=True)
class Network:
    """A recurrent layer: its parameters and one step. Its output is its first state.

    reads       for each recurrent matrix, the state that it multiplies
    states      the number of states
    step        see `Step`
    parameters  names in order: an RGC's matrices, or those of torch.nn's layer, with its gates joined as there
    diagonal    whether recurrent matrices are diagonal, (N,), where RFP is exact; else they are (N, N)
    """

    reads: tuple[int, ...]
    states: int
    step: Step
    parameters: tuple[str, ...]
    diagonal: bool = False

    @property
    def has_input_weights(self) -> bool:
        return "weight_ih" in self.parameters

    def matrices(self, arrays: Mapping[str, Any]) -> list[Any]:
        """The recurrent matrices, each by itself."""
        if not self.has_input_weights:
            return [arrays[name] for name in self.parameters]
        return self.gates(arrays["weight_hh"])

    def gates(self, joined: Any) -> list[Any]:
        """Split a joined parameter (G·N, …) into those of the G gates."""
        size = joined.shape[0] // len(self.reads)
        return [joined[k * size : (k + 1) * size] for k in range(len(self.reads))]


_JOINED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
NETWORKS = {
    "rgc": Network((0, 1, 1, 0), 2, _rgc, ("weight_ss", "weight_ms", "weight_mm", "weight_sm")),
    "lstm": Network((0, 0, 0, 0), 2, _lstm, _JOINED),
    "gru": Network((0, 0, 0), 1, _gru, _JOINED),
    "gru-diagonal": Network((0, 0, 0), 1, _gru, _JOINED[:2], diagonal=True),
}


@dataclass(frozen=True)
class Task:
    """The gradients of a network over a sequence, or if `online` after every step of it.

    ours    this package's own peers, by whose times those of the others are divided
    learns  the weights change after every step: by `RATE`, to lessen the squared error of a linear readout of `OUTPUTS`
            numbers. In place of gradients the answer is the change of every weight, and the loss of every step
    """

    network: str
    online: bool
    ours: tuple[str, ...]
    title: str
    learns: bool = False


OUTPUTS, RATE = 4, 3e-4
READOUT = ("readout_weight", "readout_bias")
# What a stream's answers are named after: the optimizer is SGD unless the name says another.
OPTIMIZERS: dict[str, type[torch.optim.SGD] | type[torch.optim.Adam]] = {
    "rfp": torch.optim.SGD,
    "rfp-adam": torch.optim.Adam,
}

TASKS = {
    "rgc-sequence": Task("rgc", False, ("rfp-dual", "bptt"), "RGC, a training step over T steps"),
    "rgc-online": Task("rgc", True, ("rfp-step", "rfp-learner"), "RGC, one step online and its gradient"),
    "lstm-sequence": Task("lstm", False, ("rfp-dual", "bptt"), "LSTM, a training step over T steps"),
    "gru-sequence": Task("gru", False, ("rfp-dual", "bptt"), "GRU, a training step over T steps"),
    "gru-diagonal-sequence": Task(
        "gru-diagonal",
        False,
        ("rfp-dual",),
        "GRU of diagonal recurrent weights without biases, where RFP is exact, a training step over T steps",
    ),
    "rgc-stream": Task(
        "rgc", False, ("stream",), "RGC and a linear readout, T steps, learning after every step", learns=True
    ),
}


def problem(
    task: str, units: int, batch: int, steps: int, *, kind: str, scale: float, seed: int
) -> dict[str, np.ndarray]:
    """Draw the arrays of a task, in float32; the same for the same arguments.

    x, delta            inputs, and ∂L/∂output (T, B, N)
    state_0, state_1    initial states (B, N); zero for a stream and, as is torch.nn's default, for LSTM and GRU
    parameters          by name: an RGC's weights are scale·N(0, 1)/√N; an LSTM's or GRU's, with N inputs, are
                        U(-1/√N, 1/√N), as torch.nn draws them
    of a stream that is learned from, in place of delta: target (T, B, O), readout_weight (O, N), N(0, 1)/√N, and
    readout_bias (O,), zero
    """
    asked = TASKS[task]
    network = NETWORKS[asked.network]
    size = Size(units, batch, steps, chunk=1)
    drawn = cases.problem(size, kind=kind, scale=scale, seed=seed, backend="auto", like=torch.empty(0))
    arrays = {"x": drawn.x.numpy(), "delta": drawn.delta.numpy()}
    if asked.learns:
        rng = np.random.default_rng([seed, 7])
        arrays = {
            "x": drawn.x.numpy(),
            "target": rng.standard_normal((steps, batch, OUTPUTS)).astype(np.float32),
        }
        arrays["readout_weight"] = (rng.standard_normal((OUTPUTS, units)) / units**0.5).astype(np.float32)
        arrays["readout_bias"] = np.zeros(OUTPUTS, np.float32)
    zero = asked.online or asked.learns or network.has_input_weights
    for name, state in zip(STATE[: network.states], drawn.state, strict=False):
        arrays[name] = np.zeros((batch, units), np.float32) if zero else state.numpy()
    if not network.has_input_weights:
        arrays.update(zip(network.parameters, (w.numpy() for w in drawn.weights), strict=True))
        return arrays
    gates, rng = len(network.reads), np.random.default_rng([seed, 6])
    for name in network.parameters:
        is_vector = name.startswith("bias") or (name == "weight_hh" and network.diagonal)
        shape = (gates * units,) if is_vector else (gates * units, units)
        arrays[name] = rng.uniform(-(units**-0.5), units**-0.5, shape).astype(np.float32)
    return arrays


def states(network: Network, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The initial states, (B, N) each."""
    return tuple(arrays[name] for name in STATE[: network.states])


# --- the reference -----------------------------------------------------------------------------------------


def _eprop(w: Tensor, c: Tensor) -> Tensor:
    """W c, through which no gradient passes back to c. Only each unit's own-state path through no matrix is left."""
    return c.detach() @ w.t()


def _of_diagonal(w: Tensor, c: Tensor) -> Tensor:
    return c * w


# For each rule, the product W c with which autograd of the plain loop gives the rule's gradient: see docs/exactness.md.
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bptt": cases.dense,
    "rfp": cases.own_path_only,
    "eprop": _eprop,
}


def oracle(task: str, arrays: Mapping[str, np.ndarray], gradient: str) -> dict[str, np.ndarray]:
    """The gradients of all parameters by float64 autograd of a plain loop. gradient: a rule of `GRADIENTS`.

    For a stream they are the sums over its steps. For one that is learned from, see `learned`.
    """
    if TASKS[task].learns:
        return learned(task, arrays, gradient)
    network, product = NETWORKS[TASKS[task].network], GRADIENTS[gradient]
    if network.diagonal:
        product = _of_diagonal if gradient != "eprop" else lambda w, c: _of_diagonal(w, c.detach())
    given = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    parameters = {name: given[name].requires_grad_() for name in network.parameters}
    state, outputs = states(network, given), []
    matrices = network.matrices(parameters)
    for x in given["x"]:
        entering = [product(w, state[read]) for w, read in zip(matrices, network.reads, strict=True)]
        from_input = [x]
        if network.has_input_weights:
            joined = x @ parameters["weight_ih"].t()
            from_input = list(joined.chunk(len(network.reads), 1))
        if "bias_ih" in parameters:
            for terms, name in ((from_input, "bias_ih"), (entering, "bias_hh")):
                biases = network.gates(parameters[name])
                terms[:] = [term + bias for term, bias in zip(terms, biases, strict=True)]
        state = network.step(torch, entering, from_input, state)
        outputs.append(state[0])
    found = torch.autograd.grad(
        torch.stack(outputs), list(parameters.values()), given["delta"], materialize_grads=True
    )
    return {name: g.numpy() for name, g in zip(parameters, found, strict=True)}


def learned(task: str, arrays: Mapping[str, np.ndarray], gradient: str) -> dict[str, np.ndarray]:
    """What a stream's weights have changed by after T steps, and the losses (T,), in float64; by RFP's recursion.

        Γ^{ν,k} ← Σ_ν' M^{νν'} Γ^{ν',k} + φ^{ν,k} y^kᵀ,  M^{νν'} = ∂c^ν_i/∂c^ν'_i,  φ^{ν,k} = ∂c^ν_i/∂(W^k y^k)_i

    with M and φ by autograd of one step, and torch.optim's step after each. gradient: a name of `OPTIMIZERS`. Raises
    KeyError for another.
    """
    network = NETWORKS[TASKS[task].network]
    given = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    names = (*network.parameters, *READOUT)
    weights = {name: given[name].clone().requires_grad_() for name in names}
    optimizer = OPTIMIZERS[gradient](list(weights.values()), lr=RATE)
    state: Sequence[Tensor] = states(network, given)
    gamma: list[list[Tensor | float]] = [[0.0] * len(network.reads) for _ in state]
    losses = []
    for x, target in zip(given["x"], given["target"], strict=True):
        before = [c.detach().requires_grad_() for c in state]
        matrices = [w.detach() for w in network.matrices(weights)]
        entering = [
            cases.own_path_only(w, before[read]) for w, read in zip(matrices, network.reads, strict=True)
        ]
        state = network.step(torch, entering, [x], before)
        sources = [*before, *entering]
        rows = [
            torch.autograd.grad(c.sum(), sources, retain_graph=True, materialize_grads=True) for c in state
        ]
        gamma = [
            [
                sum(m[..., None] * past[k] for m, past in zip(row, gamma, strict=False))
                + row[len(before) + k][..., None] * before[read].detach()[:, None]
                for k, read in enumerate(network.reads)
            ]
            for row in rows
        ]
        shown = state[0].detach().requires_grad_()
        output = shown @ weights["readout_weight"].t() + weights["readout_bias"]
        loss = torch.nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        assert shown.grad is not None
        for k, name in enumerate(network.parameters):
            weights[name].grad = (shown.grad[..., None] * gamma[0][k]).sum(0)
        optimizer.step()
        losses.append(loss.item())
    found = {name: weights[name].detach().numpy() - arrays[name] for name in names}
    return {**found, "losses": np.array(losses)}


def difference(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative difference, in norm, of a parameter's gradient, and that parameter's name.

    If a reference is zero, its difference is relative to the norm of all gradients. The result is infinite if a
    gradient isn't finite. Raises ValueError for a missing gradient, or one of another shape.
    """
    whole = float(np.sqrt(sum(np.square(w).sum() for w in want.values())))
    worst, where = 0.0, ""
    for name, reference in want.items():
        if name not in got:
            raise ValueError(f"gradients must be of {', '.join(want)}, got {', '.join(got) or 'none'}")
        if got[name].shape != reference.shape:
            raise ValueError(f"gradient of {name} must have shape {reference.shape}, got {got[name].shape}")
        norm = float(np.linalg.norm(reference)) or whole
        error = float(np.linalg.norm(got[name].astype(np.float64) - reference)) / norm
        if not math.isfinite(error):
            return math.inf, name
        if error >= worst:
            worst, where = error, name
    return worst, where
