"""braintrace's online learners SnAp-1 and D-RTRL, for networks whose matrix products are its operators.

SnAp(n=1) keeps, for each unit, the block of the Jacobian by which its states depend on its own states. That is RFP's M,
so its gradient is RFP's. D_RTRL first removes every path through a recurrent matrix, and keeps what is left of that
block. Its gradient is e-prop's ("eprop"), in which an RGC's W_mm and W_sm get none from a loss on s.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import brainstate
import braintrace
import jax
import jax.numpy as jnp
import numpy as np

from .runner import Runner
from .tasks import Network, states

LIB = SimpleNamespace(tanh=jnp.tanh, sigmoid=jax.nn.sigmoid)


class Layer(brainstate.nn.Module):
    """A network with a matrix for each gate: a trace is kept for a matrix whose product enters each unit alone."""

    def __init__(self, network: Network, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.network, self.initial = network, [jnp.asarray(a) for a in states(network, arrays)]
        for k, matrix in enumerate(network.matrices(arrays)):
            setattr(self, f"weight_hh_{k}", brainstate.ParamState(jnp.asarray(matrix.T)))
        if network.has_input_weights:
            for name in ("weight_ih", "bias_ih", "bias_hh"):
                for k, part in enumerate(network.gates(arrays[name])):
                    setattr(self, f"{name}_{k}", brainstate.ParamState(jnp.asarray(part.T)))

    def init_state(self, batch_size: int | None = None, **_: Any) -> None:
        self.hidden_0 = brainstate.HiddenState(self.initial[0])
        if self.network.states == 2:
            self.hidden_1 = brainstate.HiddenState(self.initial[1])

    def hidden(self) -> list[Any]:
        return [getattr(self, f"hidden_{k}") for k in range(self.network.states)]

    def restart(self) -> None:
        """Set the states back to the initial ones."""
        for state, value in zip(self.hidden(), self.initial, strict=True):
            state.value = value

    def _product(self, c: Any, which: str, k: int) -> Any:
        weight = getattr(self, f"weight_{which}_{k}").value
        bias = getattr(self, f"bias_{which}_{k}").value if self.network.has_input_weights else None
        return braintrace.matmul(c, weight, bias)

    def update(self, x: Any) -> Any:
        before = [state.value for state in self.hidden()]
        recurrent = [self._product(before[read], "hh", k) for k, read in enumerate(self.network.reads)]
        given = [x]
        if self.network.has_input_weights:
            given = [self._product(x, "ih", k) for k in range(len(self.network.reads))]
        # The step is computed once for each state. If another state of the same step is made from a state, as an LSTM's
        # h is from c, braintrace 0.2.6 takes the latter for both a state and a path to the other, and counts its
        # gradient twice.
        for k, state in enumerate(self.hidden()):
            state.value = self.network.step(LIB, recurrent, given, before)[k]
        return self.hidden_0.value


class _Learner(Runner):
    """For a stream a jitted function of one step; for a sequence one jitted `etrace_grad`."""

    algorithm: Any
    options: Mapping[str, Any] = {}

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        if device != "cpu":
            jax.config.update("jax_default_matmul_precision", "highest")
        layer = Layer(self.network, arrays)
        x, delta = jnp.asarray(arrays["x"]), jnp.asarray(arrays["delta"])
        learner = braintrace.compile(layer, self.algorithm, x[0], batch_size=x.shape[1], **self.options)

        def loss(x_t: Any, delta_t: Any) -> Any:
            return jnp.sum(learner(x_t) * delta_t)

        def sequence(xs: Any, deltas: Any) -> Any:
            layer.restart()
            learner.reset_state(batch_size=xs.shape[1])
            return learner.etrace_grad(xs, deltas, step_fn=loss, reduction="sum")

        if self.task.online:
            self.function = brainstate.transform.jit(brainstate.transform.grad(loss, learner.param_states))
            self.given = [(x[t], delta[t]) for t in range(self.steps)]
        else:
            self.function = brainstate.transform.jit(sequence)
            self.given = [(x, delta)]
        self.position = 0

    def run(self) -> Any:
        result = jax.block_until_ready(self.function(*self.given[self.position]))
        self.position = (self.position + 1) % len(self.given)
        return result

    def named(self, result: Any) -> dict[str, np.ndarray]:
        by_name = {path[-1]: np.asarray(value).T for path, value in result.items()}
        if not self.network.has_input_weights:
            return {name: by_name[f"weight_hh_{k}"] for k, name in enumerate(self.network.parameters)}
        return {
            name: np.concatenate([by_name[f"{name}_{k}"] for k in range(len(self.network.reads))])
            for name in self.network.parameters
        }


class SnAp1(_Learner):
    """Sparse one-step approximation (Menick et al. 2021)."""

    algorithm, options = braintrace.SnAp, {"n": 1}


class DRTRL(_Learner):
    """Diagonal RTRL, braintrace's default."""

    algorithm = braintrace.D_RTRL
