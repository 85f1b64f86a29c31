"""What the tests of several kernels share: sizes, new memory full of NaN, and errors that name an argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# S, B, K, N, M of Γ. Sizes that leave tails in each dimension, or fill whole tiles, of one program and of several.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 1, 2, 63, 65),
    (2, 3, 4, 65, 63),
    (1, 3, 3, 127, 1),
    (2, 3, 1, 1, 127),
    (2, 1, 4, 64, 64),
]
# Sizes of Γ, S of (B, K, N, M), for `given`; and a seed.
SIZES = {
    "states": st.integers(1, 4),
    "batch": st.integers(1, 3),
    "matrices": st.integers(1, 4),
    "units": st.integers(1, 20),
    "fan_in": st.integers(1, 70),
}
SEEDS = st.integers(0, 1000)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty fill new memory with NaN, so that a number that isn't written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@contextmanager
def gammas_amid_nan(*shape: int, states: int = 2) -> Iterator[list[Tensor]]:
    """A random Γ (B, K, N, M) for each state, with 64 NaN on either side, which must still be there at the end."""
    buffers = [torch.full((math.prod(shape) + 128,), math.nan, device=DEVICE) for _ in range(states)]
    yield [b[64:-64].view(shape).normal_() for b in buffers]
    for buffer in buffers:
        assert buffer[:64].isnan().all()
        assert buffer[-64:].isnan().all()
        assert not buffer[64:-64].isnan().any()


def on_device(value: Any) -> Any:
    """Tensors of the CPU, one or a list of them, on the device of the tests; anything else as it is."""
    if isinstance(value, list):
        return [on_device(each) for each in value]
    return value.to(DEVICE) if isinstance(value, Tensor) and value.is_cpu else value


def check_error(
    call: Callable[..., object],
    arguments: Mapping[str, Any],
    change: Mapping[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """Check that the call raises `error` with `message` when some of its arguments are changed."""
    changed = {name: on_device(value) for name, value in change.items()}
    with pytest.raises(error, match=message):
        call(**{**arguments, **changed})
