"""The problem that all algorithms of the scaling benchmark share, and its gradients by float64 autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..harness import inputs


@dataclass(frozen=True)
class Size:
    """N units, B batch rows, T steps, C steps a chunk, and the bytes of a number."""

    units: int
    batch: int
    steps: int
    chunk: int
    itemsize: int = 4


@dataclass(frozen=True)
class Problem:
    """What all cases at one point are given.

    x, delta    inputs, and δ(t) = ∂L/∂s(t) (T, B, N)
    state       (s, m) before the first step, each (B, N)
    weights     ss, ms, mm, sm, each (N, N)
    chunk       C
    backend     the backend that `PerUnit` and the loops over time are asked to use
    """

    x: Tensor
    delta: Tensor
    state: tuple[Tensor, Tensor]
    weights: list[Tensor]
    chunk: int
    backend: str

    @property
    def steps(self) -> int:
        return self.x.shape[0]

    @functools.cached_property
    def deltas(self) -> Tensor:
        """δ of both states (2, T, B, N). That of m is zero, since the loss is on s alone."""
        return torch.stack([self.delta, torch.zeros_like(self.delta)])

    def first(self, steps: int, chunk: int) -> Problem:
        """The same problem over its first `steps` steps, with another C."""
        return Problem(self.x[:steps], self.delta[:steps], self.state, self.weights, chunk, self.backend)


def problem(size: Size, *, kind: str, scale: float, seed: int, backend: str, like: Tensor) -> Problem:
    """Draw a problem in the dtype and on the device of `like`; the same for the same arguments."""
    shape = (size.batch, size.units)
    return Problem(
        x=inputs.inputs(kind, size.steps, size.batch, size.units, seed, like),
        delta=inputs.normal((size.steps, *shape), seed, 3, like),
        state=(0.5 * inputs.normal(shape, seed, 4, like), 0.5 * inputs.normal(shape, seed, 5, like)),
        weights=inputs.weights(size.units, scale, seed, like),
        chunk=min(size.chunk, size.steps),
        backend=backend,
    )


def eager(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The RGC (paper eq. 13) as a plain loop: s (T, B, N), and the last s and m. product(W, c) computes W c."""
    ss, ms, mm, sm = weights
    s, m = state
    out = []
    for u in x.unbind():
        s, m = (
            (1 - product(ms, m).tanh()) * u + product(ss, s).tanh() * s,
            (1 - product(sm, s).tanh()) * u + product(mm, m).tanh() * m,
        )
        out.append(s)
    return torch.stack(out), (s, m)


def dense(w: Tensor, c: Tensor) -> Tensor:
    """W c for each batch row c."""
    return c @ w.t()


def own_path_only(w: Tensor, c: Tensor) -> Tensor:
    """W c, through which gradients pass along W's diagonal alone. With it autograd's gradient is RFP's."""
    return c.detach() @ w.t() + (c - c.detach()) * w.diagonal()


def oracle(problem: Problem, exact: bool, truncated: bool = False) -> Sequence[Tensor]:
    """The four gradients by float64 autograd of the eager loop: BPTT's if `exact`, else RFP's.

    truncated: whether credit stops at the beginning of each chunk.
    """
    weights = [w.double().detach().requires_grad_() for w in problem.weights]
    state: Sequence[Tensor] = [c.double() for c in problem.state]
    parts = []
    for x in problem.x.double().split(problem.chunk if truncated else problem.steps):
        s, state = eager(x, weights, state, dense if exact else own_path_only)
        parts.append(s)
        if truncated:
            state = [c.detach() for c in state]
    return torch.autograd.grad(torch.cat(parts), weights, problem.delta.double())
