"""The tables of addresses, numbers and options that a stream's compiled code (`backend/native/stream.h`) reads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

Tables = tuple[list[int], list[int], list[float]]
FORWARD, LEARN = 1, 2  # phases
FIRST = (
    "x",
    "kept",
    "target",
    "outputs",
    "hidden",
    "losses",
    "resets",
    "mask",
    "rates",
)  # the first addresses, which a call gives
# Places in the table of addresses, and in that of numbers, which begins with those of networks, threads and options.
X, TARGET = FIRST.index("x"), FIRST.index("target")
PHASE, POSITION, DONE = 3, 12, 15


def packed(networks: Sequence[Tables], threads: int) -> tuple[Any, Any, Any]:
    """The tables of some networks as C arrays."""
    arrays = [address for network in networks for address in network[0]]
    numbers = [
        len(networks),
        threads,
        len(networks[0][2]),
        *(n for network in networks for n in network[1]),
    ]
    options = [value for network in networks for value in network[2]]
    return (
        (ctypes.c_void_p * len(arrays))(*arrays),
        (ctypes.c_long * len(numbers))(*numbers),
        (ctypes.c_double * len(options))(*options),
    )


def address(tensor: Tensor | None) -> int:
    """Where the tensor's numbers begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
