"""Checks and sizes that all kernel launchers share.

Every error message names the argument, says what it must be, and what was given.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

MAX_STATES = 4  # states a unit that kernels take


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int],
    like: Tensor,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    any_stride: int = 0,
) -> None:
    """Check that `value` is a contiguous tensor of `shape`, of one of `dtypes`, on the device of `like`.

    The first `any_stride` dimensions may have any stride: only `value[i]` (for any_stride=1; `value[i, j]` for 2)
    has to be contiguous, so that a slice such as one step of a sequence needs no copy.

    Raises:
        TypeError: `value` isn't a tensor, or has another dtype.
        ValueError: its shape, device or strides are others.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the rest, got {value.device}")
    if not value[(0,) * any_stride].is_contiguous():
        beyond = f" beyond its first {any_stride} dimensions" if any_stride else ""
        raise ValueError(f"{name} must be contiguous{beyond}, got strides {value.stride()}")


def check_dims(name: str, value: object, letters: str) -> tuple[int, ...]:
    """The shape of `value`, a tensor with one dimension per letter of `letters`, for example "TBN".

    Raises:
        TypeError: `value` isn't a tensor.
        ValueError: it has another number of dimensions, or one of size 0.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != len(letters) or 0 in value.shape:
        wanted = ", ".join(letters)
        raise ValueError(f"{name} must have shape ({wanted}), none of them 0, got {tuple(value.shape)}")
    return tuple(value.shape)


def check_gammas(gammas: object) -> tuple[int, int, int, int]:
    """(B, K, N, M) of Γ, given as one tensor (B, K, N, M) per state.

    Raises:
        TypeError: `gammas` isn't a tuple or list of tensors, or one of them isn't float32 or bfloat16.
        ValueError: there are none or more than four; they aren't contiguous, differ in shape, dtype or device, or
            share memory.
    """
    if not isinstance(gammas, (tuple, list)):
        raise TypeError(f"gammas must be a tuple or a list of tensors, got {type(gammas).__name__}")
    if not 1 <= len(gammas) <= MAX_STATES:
        raise ValueError(f"gammas must hold one tensor a state, 1 to {MAX_STATES}, got {len(gammas)}")
    sizes = check_dims("gammas[0]", gammas[0], "BKNM")
    check_tensor("gammas[0]", gammas[0], sizes, gammas[0], (torch.float32, torch.bfloat16))
    starts = {gammas[0].data_ptr(): 0}
    for nu, gamma in enumerate(gammas[1:], start=1):
        check_tensor(f"gammas[{nu}]", gamma, sizes, gammas[0], (gammas[0].dtype,))
        other = starts.setdefault(gamma.data_ptr(), nu)
        if other != nu:
            raise ValueError(f"gammas must not share memory: gammas[{nu}] starts where gammas[{other}] does")
    batch, matrices, units, fan_in = sizes
    return batch, matrices, units, fan_in


def vector_width(size: int, dtype: torch.dtype) -> int:
    """How many numbers one memory access may move: as many as 128 bits hold where that divides `size`, else 1.

    Of an integer argument Triton's compiler learns only whether 16 divides it. A kernel that gets the width as a
    constant and computes `size // width * width` shows the compiler that the width divides the size, and so keeps
    128-bit accesses at sizes like 1,000 as well.
    """
    width = 16 // dtype.itemsize
    return width if size % width == 0 else 1


# Bytes of loads that each multiprocessor must have under way at once for the memory's bandwidth to be used in full.
# On an H100 132 · 16 KiB are 0.7 µs at 3.0 TB/s, about the time that one load takes. Estimated, not measured.
IN_FLIGHT = 16 * 1024
# Fewest batch rows in one part of a split batch: the second pass, which adds up the parts, costs as much as a few.
LEAST_ROWS = 8


def split_rows(row_bytes: int, batch: int, multiprocessors: int) -> int:
    """How many batch rows one program walks: the whole batch, or an equal part of it.

    Programs that loop over the batch have Γ of one batch row under way at a time, `row_bytes` counting all states.
    Where that is too little to fill the GPU, the batch is split into parts of equal size. The parts must be equal
    because a number of rows that a program computes, where it could be an argument, costs 40 registers a thread; so a
    prime batch is never split.

    A pure function: the order of the sum, and so each bit of the result, depends on the sizes and the GPU alone.
    """
    most = max(1, min(IN_FLIGHT * multiprocessors // row_bytes, batch // LEAST_ROWS))
    parts = next(parts for parts in range(most, 0, -1) if batch % parts == 0)
    return batch // parts


class DeviceSizes(NamedTuple):
    """What launchers need to know of a GPU.

    warp             threads in one warp (a wavefront on AMD)
    multiprocessors  how many there are
    """

    warp: int
    multiprocessors: int


def device_sizes(value: Tensor) -> DeviceSizes:
    """`DeviceSizes` of the GPU that holds `value`; an H100's for CPU tensors, on which kernels are interpreted."""
    return _device_sizes(value.device) if value.is_cuda else DeviceSizes(32, 132)


@functools.cache
def _device_sizes(device: torch.device) -> DeviceSizes:
    about = torch.cuda.get_device_properties(device)
    return DeviceSizes(about.warp_size, about.multi_processor_count)


def check_runnable(kernel: object, name: str, value: Tensor) -> None:
    """Raise ValueError unless `kernel` can run on the device of `value`: a GPU, or any under Triton's interpreter."""
    if not value.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{name} must be on a GPU, got {value.device}: Triton kernels need a GPU tensor, or "
            "TRITON_INTERPRET=1 set before triton is imported"
        )
