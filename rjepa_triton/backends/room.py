"""Room for one large array on the CPU that is made anew again and again: a gradient of every step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The largest block that glibc keeps when it is freed (M_MMAP_THRESHOLD's upper limit). Beyond, memory is given back and
# each page is found and filled with zeros anew when it is next written, which takes longer than what is written.
LARGE = 32 << 20


class Room:
    """Lends the memory of one array, and lends it again once no tensor has it any more.

    What it has lent belongs to the tensor and whatever shares its storage; while that is alive, new memory is lent.
    """

    def __init__(self) -> None:
        self._free: np.ndarray | None = None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape and of the dtype of `like`, on the CPU; its values are anything."""
        count, item = math.prod(shape), like.element_size()
        if count * item <= LARGE:
            return like.new_empty(tuple(shape))
        memory, self._free = self._free, None
        if memory is None or memory.nbytes != count * item:
            # by torch, whose allocator's bytes are what is counted
            memory = torch.empty(count * item, dtype=torch.uint8).numpy()
        lent = memory[:]  # an array of its own, which dies with the tensor's storage
        weakref.finalize(lent, _give_back, weakref.ref(self), memory).atexit = False
        return torch.from_numpy(lent).view(like.dtype).view(*shape)


def _give_back(room: weakref.ref[Room], memory: np.ndarray) -> None:
    owner = room()
    if owner is not None:
        owner._free = memory
