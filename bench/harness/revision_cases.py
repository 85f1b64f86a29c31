"""What `rjepa bench compare-revisions` times unless told otherwise, by public names that every revision should have.

`CASES` has by name what makes a case: a function without arguments that returns what is called and timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import rjepa_triton


def _inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def forward() -> Callable[[], object]:
    """A forward pass of an LSTM over 50 steps."""
    layer, x = rjepa_triton.LSTM(64, 64), _inputs(50, 4, 64)

    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def sequence(learning: str) -> Callable[[], Callable[[], object]]:
    """What makes a forward and backward pass of an RGC over 50 steps by a learning rule."""

    def make() -> Callable[[], object]:
        layer, x = rjepa_triton.RGC(64, learning=learning), _inputs(50, 4, 64)
        return lambda: layer(x)[0].sum().backward()

    return make


def step() -> Callable[[], object]:
    """An online step of an RGC with its gradient."""
    learner, x = rjepa_triton.OnlineLearner(rjepa_triton.RGC(64), 4), _inputs(4, 64)
    return lambda: learner.step(x).sum().backward()


def chunk() -> Callable[[], object]:
    """Ten online steps of an RGC in one call, with their gradient."""
    learner = rjepa_triton.OnlineLearner(rjepa_triton.RGC(64), 4, update_every=10, form="chunk")
    x = _inputs(10, 4, 64)
    return lambda: learner.chunk(x).sum().backward()


def stream() -> Callable[[], object]:
    """A call of a stream over 50 steps."""
    layer, readout = rjepa_triton.RGC(64), torch.nn.Linear(64, 1)
    parameters = [*layer.parameters(), *readout.parameters()]
    made = rjepa_triton.Stream(layer, readout, 4, optimizer=torch.optim.SGD(parameters, lr=1e-6))
    x, target = _inputs(50, 4, 64), _inputs(50, 4, 1)
    return lambda: made.run(x, target)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "forward": forward,
    "sequence-rfp": sequence("rfp"),
    "sequence-bptt": sequence("bptt"),
    "step": step,
    "chunk": chunk,
    "stream": stream,
}
