"""What jax users write: BPTT, `jax.grad` through `jax.lax.scan`; and online learning, a scan whose carry has Γ."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .runner import Runner
from .tasks import RATE, READOUT, states

LIB = SimpleNamespace(tanh=jnp.tanh, sigmoid=jax.nn.sigmoid)


class Scan(Runner):
    """One jitted gradient of a sequence. LSTM and GRU take one product for all inputs, and one a step for the gates."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        if device != "cpu":
            # jax's default there is TF32, and the products are to be in float32
            jax.config.update("jax_default_matmul_precision", "highest")
        network = self.network

        def advance(parameters: dict[str, Any], state: Any, given: Any) -> Any:
            if network.has_input_weights:
                weight, bias = parameters["weight_hh"], parameters.get("bias_hh", 0.0)
                if network.diagonal:
                    joined = jnp.tile(state[0], (1, len(network.reads))) * weight + bias
                else:
                    joined = state[0] @ weight.T + bias
                recurrent = jnp.split(joined, len(network.reads), axis=1)
                given = jnp.split(given, len(network.reads), axis=1)
            else:
                weights = network.matrices(parameters)
                recurrent = [state[read] @ w.T for w, read in zip(weights, network.reads, strict=True)]
                given = (given,)
            state = network.step(LIB, recurrent, given, state)
            return state, state[0]

        def loss(parameters: dict[str, Any], x: Any, delta: Any, state: Any) -> Any:
            if network.has_input_weights:
                x = x @ parameters["weight_ih"].T + parameters.get("bias_ih", 0.0)
            _, output = jax.lax.scan(lambda carry, given: advance(parameters, carry, given), state, x)
            return jnp.sum(output * delta)

        self.function = jax.jit(jax.grad(loss))
        parameters = {name: arrays[name] for name in network.parameters}
        # put on the device once, so that no copy between host and device is timed
        self.given = jax.device_put((parameters, arrays["x"], arrays["delta"], states(network, arrays)))

    def run(self) -> Any:
        return jax.block_until_ready(self.function(*self.given))

    def named(self, result: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(result[name]) for name in self.network.parameters}


class Stream(Runner):
    """One jitted scan over the whole stream: an RGC's step, Γ, a linear readout, squared error, SGD after every step.

    Γ^{ν,k} is (B, N, N) for each state ν and matrix k, each an array of its own of the carry.
    """

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        if device != "cpu":
            jax.config.update("jax_default_matmul_precision", "highest")
        self.names = (*self.network.parameters, *READOUT)
        self.function = jax.jit(
            lambda weights, state, *stream: jax.lax.scan(learn, begun(weights, state), stream)
        )
        weights = {name: arrays[name] for name in self.names}
        self.given = jax.device_put((weights, states(self.network, arrays), arrays["x"], arrays["target"]))

    def run(self) -> Any:
        return jax.block_until_ready(self.function(*self.given))

    def named(self, result: Any) -> dict[str, np.ndarray]:
        (after, *_), losses = result
        before = self.given[0]
        found = {
            name: np.asarray(after[name], float) - np.asarray(before[name], float) for name in self.names
        }
        return {**found, "losses": np.asarray(losses)}


def begun(weights: Mapping[str, Any], state: Any) -> Any:
    """The carry before the first step: weights, states (s, m), and Γ of s and of m, for the matrices ss, ms, mm, sm."""
    batch, units = state[0].shape
    zero = jnp.zeros((batch, units, units), state[0].dtype)
    return weights, state, ((zero,) * 4, (zero,) * 4)


def learn(carry: Any, given: Any) -> Any:
    """One step: the carry after it, and the loss."""
    weights, (s, m), (of_s, of_m) = carry
    x, target = given
    ss, ms, mm, sm = (weights[f"weight_{name}"] for name in ("ss", "ms", "mm", "sm"))
    keep_s, gate_s = jnp.tanh(s @ ss.T), jnp.tanh(m @ ms.T)
    keep_m, gate_m = jnp.tanh(m @ mm.T), jnp.tanh(s @ sm.T)

    # φ of each matrix, and M of each pair of states
    phi_ss, phi_ms = (1 - keep_s**2) * s, -(1 - gate_s**2) * x
    phi_mm, phi_sm = (1 - keep_m**2) * m, -(1 - gate_m**2) * x
    by_ss, by_ms = keep_s + phi_ss * jnp.diagonal(ss), phi_ms * jnp.diagonal(ms)
    by_mm, by_sm = keep_m + phi_mm * jnp.diagonal(mm), phi_sm * jnp.diagonal(sm)

    def advanced(own: Any, of_own: Any, other: Any, of_other: Any) -> Any:
        return [own[..., None] * a + other[..., None] * b for a, b in zip(of_own, of_other, strict=True)]

    def outer(phi: Any, y: Any) -> Any:
        return phi[:, :, None] * y[:, None, :]

    next_s, next_m = advanced(by_ss, of_s, by_ms, of_m), advanced(by_mm, of_m, by_sm, of_s)
    next_s[0] += outer(phi_ss, s)
    next_s[1] += outer(phi_ms, m)
    next_m[2] += outer(phi_mm, m)
    next_m[3] += outer(phi_sm, s)
    s, m = (1 - gate_s) * x + keep_s * s, (1 - gate_m) * x + keep_m * m

    weight, bias = (weights[name] for name in READOUT)
    error = s @ weight.T + bias - target
    of_output = 2 * error / error.size
    delta = (of_output @ weight)[:, :, None]
    gradients = {
        name: jnp.sum(delta * gamma, 0)
        for name, gamma in zip(("weight_ss", "weight_ms", "weight_mm", "weight_sm"), next_s, strict=True)
    }
    gradients |= {"readout_weight": of_output.T @ s, "readout_bias": of_output.sum(0)}
    weights = {name: weight - RATE * gradients[name] for name, weight in weights.items()}
    return (weights, (s, m), (tuple(next_s), tuple(next_m))), jnp.mean(error**2)
