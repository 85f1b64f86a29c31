"""What every launcher checks before it launches. Each message names the argument, the wish and what came."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int],
    like: Tensor,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    any_stride: int = 0,
) -> None:
    """Raise unless `value` is a contiguous tensor of `shape`, of one of `dtypes`, on the device of `like`.

    The first `any_stride` dimensions may have any stride: what they index must each be contiguous.
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
    """The sizes of `value`; raise unless it is a tensor of one dimension a letter, none of them empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != len(letters) or 0 in value.shape:
        wanted = ", ".join(letters)
        raise ValueError(f"{name} must have shape ({wanted}), none of them 0, got {tuple(value.shape)}")
    return tuple(value.shape)


def check_gammas(gammas: object) -> tuple[int, int, int, int]:
    """(B, K, N, M) of Γ; raise unless it is one or two contiguous float32 or bfloat16 tensors of one kind."""
    if not isinstance(gammas, (tuple, list)):
        raise TypeError(f"gammas must be a tuple or a list of tensors, got {type(gammas).__name__}")
    if len(gammas) not in (1, 2):
        raise ValueError(f"gammas must hold one tensor a state, 1 or 2, got {len(gammas)}")
    sizes = check_dims("gammas[0]", gammas[0], "BKNM")
    check_tensor("gammas[0]", gammas[0], sizes, gammas[0], (torch.float32, torch.bfloat16))
    for nu, gamma in enumerate(gammas[1:], start=1):
        check_tensor(f"gammas[{nu}]", gamma, sizes, gammas[0], (gammas[0].dtype,))
        if gamma.data_ptr() == gammas[0].data_ptr():
            raise ValueError(f"gammas must not share memory: gammas[{nu}] starts where gammas[0] does")
    batch, matrices, units, fan_in = sizes
    return batch, matrices, units, fan_in


def vector_width(size: int, dtype: torch.dtype) -> int:
    """Numbers in 128 bits if they divide rows of `size`, else 1. Pure.

    Triton learns of an argument only that 16 divides it: a kernel that is told this as a constant, and
    computes size // width * width, keeps wide accesses at sizes like 1,000 as well.
    """
    width = 16 // dtype.itemsize
    return width if size % width == 0 else 1


# One multiprocessor's share of the bytes that must be under way to fill the memory's bandwidth: on an H100
# 132 · 16 KiB, at 3.0 TB/s 0.7 µs, about what a load takes. Estimated, not measured.
IN_FLIGHT = 16 * 1024
# Rows that a part of the batch must have at least: the second pass costs about as much as a few of them.
LEAST_ROWS = 8


def split_rows(row_bytes: int, batch: int, multiprocessors: int) -> int:
    """Batch rows that one program takes, all of them or fewer. Pure: bits depend on sizes and the GPU alone.

    Programs that walk the batch have one of its rows of Γ under way at a time, `row_bytes` of all states.
    Where that is too little to fill the GPU, the batch is split into parts of one size: a count of rows that
    the compiler can't take from an argument costs 40 registers a thread. So a prime batch is never split.
    """
    most = max(1, min(IN_FLIGHT * multiprocessors // row_bytes, batch // LEAST_ROWS))
    parts = next(parts for parts in range(most, 0, -1) if batch % parts == 0)
    return batch // parts


class DeviceSizes(NamedTuple):
    """Lanes of a warp, and multiprocessors."""

    warp: int
    multiprocessors: int


def device_sizes(value: Tensor) -> DeviceSizes:
    """Of the GPU of `value`; an H100's where kernels are interpreted."""
    return _device_sizes(value.device) if value.is_cuda else DeviceSizes(32, 132)


@functools.cache
def _device_sizes(device: torch.device) -> DeviceSizes:
    about = torch.cuda.get_device_properties(device)
    return DeviceSizes(about.warp_size, about.multi_processor_count)


def check_runnable(kernel: object, name: str, value: Tensor) -> None:
    """Raise unless `kernel` can run on the device of `value`."""
    if not value.is_cuda and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{name} must be on a GPU, got {value.device}: Triton kernels need a GPU tensor, or "
            "TRITON_INTERPRET=1 set before triton is imported"
        )
