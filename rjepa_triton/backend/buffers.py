"""Memory of one large array on the CPU that is made anew at every step, such as a gradient."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# What glibc gives back when it is freed, the system has to find again page by page, and to fill with zeros, when it is
# next written: that takes longer than the writing. It gives back blocks of more than MAPPED bytes (the upper limit of
# M_MMAP_THRESHOLD), and smaller ones by what was freed before (M_TRIM_THRESHOLD): arrays from LARGE bytes on are kept
# here.
MAPPED, LARGE = 32 << 20, 1 << 20


class ReusedMemory:
    """Lends the memory of one array, and lends it again once no tensor uses it any more.

    The memory belongs to the tensor that `empty` returned and to whatever shares its storage. While that is alive,
    `empty` allocates new memory.
    """

    def __init__(self) -> None:
        self._free: np.ndarray | None = None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized CPU tensor of this shape and of the dtype of `like`."""
        count, item = math.prod(shape), like.element_size()
        if count * item <= LARGE:
            return like.new_empty(tuple(shape))
        memory, self._free = self._free, None
        if memory is None or memory.nbytes != count * item:
            # allocated by torch, so that its allocator counts the bytes
            memory = torch.empty(count * item, dtype=torch.uint8, device="cpu").numpy()
        lent = memory[:]  # a view, which dies with the tensor's storage
        weakref.finalize(lent, _give_back, weakref.ref(self), memory).atexit = False
        return torch.from_numpy(lent).view(like.dtype).view(*shape)


def _give_back(lender: weakref.ref[ReusedMemory], memory: np.ndarray) -> None:
    owner = lender()
    if owner is not None:
        owner._free = memory
