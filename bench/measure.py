"""Time and memory of a call: interleaved samples, medians and their intervals; peak allocator bytes; rates.

The statistics of every benchmark are here and in `fit` and `compare`: warm up until stable, take samples of several
functions in turn, give the median with its bootstrap interval, and time pieces of work that never change beside them.
"""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .._device import available_bytes as available_bytes
from .record import Timing

# The profiler's library reports its start, and the lack of a GPU driver, on stderr. It reads this once, when
# first used; 6 is above its highest level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

SAMPLE_SECONDS = 2e-3  # a sample is at least this long: 1e4 times the clock's resolution
STABLE = 0.05  # warm when the best of three calls is within this of the best of the three before
WARM_SECONDS = 0.5  # and warm enough after this long in any case
LEAST_ROUNDS = 5
MOST_ROUNDS = 40
RESAMPLES = 1000  # of a bootstrap
GAUGE_SECONDS = 0.05  # that each yardstick is sampled before what is timed, and again after it


def seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds a call, over `calls` calls in a row. On CUDA from events around them, so launches overlap."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def warm_up(function: Callable[[], object], device: torch.device) -> float:
    """Call until three calls are no faster, to 5 %, than the three before, or 0.5 s are over; the fastest call."""
    begin, taken = time.perf_counter(), [seconds(function, 1, device)]
    while time.perf_counter() - begin < WARM_SECONDS:
        taken.append(seconds(function, 1, device))
        if len(taken) >= 6 and min(taken[-3:]) > (1 - STABLE) * min(taken[-6:-3]):
            break
    return min(taken)


def timing(samples: Sequence[float]) -> Timing:
    """Median, 20th/80th percentiles and the median's 95 % bootstrap interval; the same for the same samples."""
    values = np.asarray(samples, dtype=np.float64)
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    if len(values) < 2:
        return Timing(median, p20, p80, len(values))
    low, high = np.quantile(medians(values), [0.025, 0.975]).tolist()
    return Timing(median, p20, p80, len(values), low, high)


def medians(samples: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Medians of `RESAMPLES` draws, with replacement, of as many samples as there are."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def yardsticks(device: torch.device) -> dict[str, Callable[[], object]]:
    """Work that is the same in every version of this package, and what of the machine it feels.

    calls     64 additions to 16 numbers: what it costs to call torch
    product   one product of matrices, 2·512³ FLOP on the CPU and 2·4096³ on a GPU
    copy      one copy of 16 MB on the CPU, of 1 GB on a GPU
    """
    large = device.type == "cuda"
    small = torch.zeros(16, device=device)
    a = torch.full((4096, 4096) if large else (512, 512), 1e-3, device=device)
    source = torch.ones(1 << (28 if large else 22), device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)

    def calls() -> None:
        for _ in range(64):
            small.add_(1e-3)

    return {
        "calls": calls,
        "product": lambda: torch.mm(a, a, out=product),
        "copy": lambda: target.copy_(source),
    }


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    case_seconds: float = 0.5,
) -> dict[str, Timing | Exception]:
    """Seconds a call of several functions, sampled in turn: what disturbs the machine disturbs all alike.

    Each round takes one sample of each; a sample is as many calls as take 2 ms. A function leaves the rounds
    when it has had 5 samples and `case_seconds`, or 40 samples. One that raises gives its exception instead.

    The `yardsticks` are sampled before the rounds and after them: in between they would drive the functions' data out
    of the caches.
    """
    if not functions:
        return {}
    gauges = yardsticks(device)
    gc.collect()
    gc.disable()  # a collection in the middle of a sample would be charged to whoever ran
    try:
        before = _rounds(gauges, device, GAUGE_SECONDS)
        results = _rounds(functions, device, case_seconds)
        after = _rounds(gauges, device, GAUGE_SECONDS)
    finally:
        gc.enable()
    drift = {name: _middle(before[name], after[name]) for name in gauges}
    return {
        name: found if isinstance(found, Exception) else replace(found, yardsticks=drift)
        for name, found in results.items()
    }


def _middle(*found: Timing | Exception) -> float:
    """Mean of medians of what can't fail."""
    medians = []
    for timing in found:
        if isinstance(timing, Exception):
            raise timing
        medians.append(timing.median)
    return float(np.mean(medians))


def _rounds(
    functions: Mapping[str, Callable[[], object]], device: torch.device, case_seconds: float
) -> dict[str, Timing | Exception]:
    results: dict[str, Timing | Exception] = {}
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        try:
            calls[name] = max(1, math.ceil(SAMPLE_SECONDS / warm_up(function, device)))
        except Exception as error:
            results[name] = error
    for _ in range(MOST_ROUNDS):
        for name, function in functions.items():
            spent = sum(samples[name]) * calls.get(name, 0)
            if name in results or (len(samples[name]) >= LEAST_ROUNDS and spent >= case_seconds):
                continue
            try:
                samples[name].append(seconds(function, calls[name], device))
            except Exception as error:
                results[name] = error
    for name, values in samples.items():
        if name not in results:
            results[name] = timing(values)
    return results


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes alive at once during one call, above what was alive before it.

    So that what an algorithm keeps from call to call counts, `function` should build it, then run it. These
    are bytes of torch's allocator, as the profiler sees them on the CPU and `torch.cuda.max_memory_allocated`
    on CUDA; not the process's resident memory, which includes torch itself, and not what a library such as
    MKL takes by itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        function()
    # Every allocation is in the exported trace; the profiler's `events()` folds most into their operators.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


def flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product: what predictions of time divide by."""
    size = 8192 if device.type == "cuda" else 1024  # enough to fill a GPU
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, 2 * size, dtype=dtype, device=device)
    return 2 * size * size * 2 * size / min(seconds(lambda: a @ b, 1, device) for _ in range(4))


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written ones together: what traffic is held against."""
    numbers = 1 << (28 if device.type == "cuda" else 25)  # beyond caches, so far as memory allows
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 1, device) for _ in range(6))
