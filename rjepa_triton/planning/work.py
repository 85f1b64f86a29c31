"""`Work`, what a computation consists of; `Rates`, what a device does in a second; and the seconds that follow.

    seconds = calls · s/call + FLOP / rate + bytes / bandwidth + scan steps · s/step + fresh bytes · s/byte

The terms are added up, as if nothing overlapped. On a CPU the bandwidth depends on the working set, which is all the
memory that a phase touches before it touches the same bytes again: the share of it that fits in the last cache is read
at the cache's rate, the rest at main memory's. A matrix in the cache that is multiplied with a few rows is read at a
rate of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._device import device_name
from ..backend import buffers
from . import devices


@dataclass(frozen=True)
class Rates:
    """The rates of a device that predictions are made with.

    bytes_per_second        of memory, counting bytes read and bytes written
    flop_per_second         of matrix products in the layer's dtype
    seconds_per_call        the least time that one call of a torch operator takes
    seconds_per_scan_step   of a scan kernel, whose steps depend on one another
    cache_bytes             size of the CPU's last cache; 0: cache and memory are not told apart
    cache_bytes_per_second  of memory that is in that cache
    matrix_bytes_per_second of a matrix in the cache that is multiplied with a few rows, which is slower than a plain
                            pass over it
    seconds_per_fresh_byte  of memory that the operating system maps anew
    seconds_per_view        of a call that makes a view or allocates an array; 0 on a GPU, which doesn't wait for it
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    seconds_per_call: float
    seconds_per_scan_step: float = 0.0
    cache_bytes: float = 0.0
    cache_bytes_per_second: float = 0.0
    matrix_bytes_per_second: float = 0.0
    seconds_per_fresh_byte: float = 0.0
    seconds_per_view: float = 0.0

    def bandwidth(self, working_set: float, matrix: bool = False) -> float:
        """Bytes per second of a phase that touches `working_set` bytes before it touches the same ones again.

        matrix: whether the bytes are a matrix's that is multiplied with a few rows.
        """
        cached = self.matrix_bytes_per_second if matrix else self.cache_bytes_per_second
        if not self.cache_bytes or not cached:
            return self.bytes_per_second
        held = min(1.0, self.cache_bytes / working_set) if working_set > 0 else 1.0
        return 1 / (held / cached + (1 - held) / self.bytes_per_second)


def rates(
    device: devices.Device, dtype: str = "float32", *, cuda_graph: bool = False, threads: int | None = None
) -> Rates:
    """The rates of a device's profile.

    dtype: "float32" or "float64"; cuda_graph: whether the calls are launches inside a CUDA graph; threads: how many a
    CPU works with (None: one per core), since with fewer threads than cores it reaches that share of its rates.
    """
    share = 1.0 if threads is None or device.cores is None else min(1.0, threads / device.cores)
    return Rates(
        device.name,
        bytes_per_second=device.rate("copy"),
        flop_per_second=share * device.rate(dtype),
        seconds_per_call=device.rate("graph_call" if cuda_graph else "call"),
        seconds_per_scan_step=device.rate("scan_step"),
        cache_bytes=device.cache_bytes,
        cache_bytes_per_second=share * device.rate("cache"),
        matrix_bytes_per_second=share * device.rate("matrix"),
        seconds_per_fresh_byte=device.rate("fresh"),
        seconds_per_view=device.rate("view"),
    )


CPU = rates(devices.generic("cpu"))
GPU = rates(devices.generic("gpu"))


def rates_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of a device of this machine: those of the profile that matches its name, else assumed ones.

    A device that isn't there (CUDA without a GPU, "meta") gets the rates assumed of a GPU.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return GPU
    kind = "cpu" if device.type == "cpu" else "gpu"
    profile = devices.find(device_name(device), kind)
    threads = torch.get_num_threads() if kind == "cpu" else None
    return rates(profile, "float64" if dtype == torch.float64 else "float32", threads=threads)


@dataclass(frozen=True)
class Work:
    """What a piece of computation consists of; works add up, and a number times a work repeats it.

    calls         of torch operators, or launches of kernels
    flop          of matrix products
    bytes         read and written
    scan_steps    of scan kernels, each of which waits for the one before
    matrix_bytes  of matrices that are multiplied with a few rows; not counted in `bytes`
    fresh_bytes   of arrays so large that the operating system maps them anew each time (`fresh_bytes_of`)
    views         calls that make a view of an array or allocate one; not counted in `calls`
    """

    calls: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    scan_steps: float = 0.0
    matrix_bytes: float = 0.0
    fresh_bytes: float = 0.0
    views: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.calls + other.calls,
            self.flop + other.flop,
            self.bytes + other.bytes,
            self.scan_steps + other.scan_steps,
            self.matrix_bytes + other.matrix_bytes,
            self.fresh_bytes + other.fresh_bytes,
            self.views + other.views,
        )

    def __mul__(self, count: float) -> Work:
        return Work(
            self.calls * count,
            self.flop * count,
            self.bytes * count,
            self.scan_steps * count,
            self.matrix_bytes * count,
            self.fresh_bytes * count,
            self.views * count,
        )

    def parts(self, rates: Rates, working_set: float = math.inf) -> dict[str, float]:
        """Predicted seconds, by what they are spent on.

        working_set: bytes touched before the same ones are touched again; infinite: everything comes from memory.
        """
        return {
            "calls": self.calls * rates.seconds_per_call + self.views * rates.seconds_per_view,
            "arithmetic": self.flop / rates.flop_per_second,
            "bytes moved": self.bytes / rates.bandwidth(working_set)
            + self.matrix_bytes / rates.bandwidth(working_set, matrix=True),
            "dependent steps": self.scan_steps * rates.seconds_per_scan_step,
            "memory mapped anew": self.fresh_bytes * rates.seconds_per_fresh_byte,
        }

    def seconds(self, rates: Rates, working_set: float = math.inf) -> float:
        """The sum of `parts`: predicted seconds, as if nothing overlapped."""
        return sum(self.parts(rates, working_set).values())


# What calling compiled code takes beside its arithmetic: allocating arrays, making views, passing arguments
# (`backend.native.calls`). Loop and linearization are fitted to a step's time below N = 256
# (scaling-one-thread-cpu.jsonl), so that what a learner does between the calls is in them.
COMPILED_LOOP, COMPILED_REVERSE = Work(calls=3, views=5), Work(calls=1, views=2)
COMPILED_LINEARIZE, COMPILED_EXACT = Work(calls=8, views=20), Work(calls=4, views=8)
COMPILED_DUAL = Work(calls=2, views=8)
COMPILED_PASS, COMPILED_ARRIVING = Work(calls=1, views=3), Work(calls=1, views=2)


def fresh_bytes_of(array: float, count: float = 1) -> float:
    """Bytes that are mapped anew each time `count` arrays of `array` bytes are made: all of them if large, else 0."""
    return count * array if array > buffers.MAPPED else 0.0


@dataclass(frozen=True)
class Phase:
    """A part of a training step: its work in one time step, and its working set in bytes."""

    name: str
    work: Work
    working_set: float = math.inf

    def seconds(self, rates: Rates) -> float:
        """Predicted seconds of one time step."""
        return self.work.seconds(rates, self.working_set)


def seconds(phases: Sequence[Phase], rates: Rates) -> float:
    """Predicted seconds of all phases, one after the other."""
    return sum(phase.seconds(rates) for phase in phases)
