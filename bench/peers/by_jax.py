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
    """The input's part of an LSTM or GRU is one product for all steps, and its gates are one product a step."""

    def __init__(self, task: str, arrays: Mapping[str, np.ndarray], device: str) -> None:
        super().__init__(task, arrays, device)
        if device != "cpu":
            # the default takes TF32 there, and the values are to be float32's
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
        # put on the device once: what is timed moves nothing between host and device
        self.given = jax.device_put((parameters, arrays["x"], arrays["delta"], states(network, arrays)))

    def run(self) -> Any:
        return jax.block_until_ready(self.function(*self.given))

    def named(self, result: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(result[name]) for name in self.network.parameters}
