"""BPTT as jax users write it: `jax.grad` through `jax.lax.scan`, under `jax.jit`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .runner import Runner
from .tasks import states

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
                joined = state[0] @ parameters["weight_hh"].T + parameters["bias_hh"]
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
                x = x @ parameters["weight_ih"].T + parameters["bias_ih"]
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
