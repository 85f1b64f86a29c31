"""Measure time and memory of calls: interleaved samples, medians with intervals, peak allocator bytes, rates.

All benchmarks measure in the same way: warm up until times are stable, sample several functions in turn, give the
median with its bootstrap interval, and time work that never changes beside them. `statistics` and `compare` interpret
the results.
"""

from __future__ import annotations

import ctypes
import functools
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

from ..._device import available_bytes as available_bytes
from .record import Timing, rounded
from .statistics import RESAMPLES, bootstrap

# The profiler's library reports its start, and a missing GPU driver, on stderr. It reads this level once, when it is
# first used; 6 is above its highest level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

SAMPLE_SECONDS = 2e-3  # a sample takes at least this long: 1e4 times the clock's resolution
STABLE = (
    0.05  # a function is warm when the best of three calls is within this of the best of the three before
)
WARM_SECONDS = 0.5  # and after this long in any case
LEAST_ROUNDS = 7  # with fewer samples, one that is disturbed widens the interval
LEAST_OF_A_PASS = 5  # the same for each of several passes
LONG_ROUNDS = 3  # enough for a pass if they are long: each is a mean over many steps by itself
MOST_ROUNDS = 40
GAUGE_SAMPLES = 4  # samples of each yardstick, each time that they are due
COPIED = 1 << 22  # numbers of float32 that the yardstick "copy" copies on a CPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees. Returns whether its C library could be told to.

    By default glibc returns large blocks to the system, which maps each page anew when it is next written. How often
    that happens depends on what else is allocated, so it differs from process to process of the same code, and it can
    take longer than the work that is timed.
    """
    try:
        told = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(told(M_MMAP_MAX, 0) and told(M_TRIM_THRESHOLD, -1))


def seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds a call, over `calls` calls in a row. On CUDA they are timed by events, so launches overlap with work."""
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


def least_rounds(passes: int) -> int:
    """The least number of samples that `interleave` takes of each function, in each of so many passes."""
    return LEAST_ROUNDS if passes == 1 else LEAST_OF_A_PASS


def warm_up(function: Callable[[], object], device: torch.device) -> float:
    """Call until the best of three calls is within 5 % of the best of the three before, or for 0.5 s.

    Returns the seconds of the fastest call.
    """
    begin, taken = time.perf_counter(), [seconds(function, 1, device)]
    while time.perf_counter() - begin < WARM_SECONDS:
        taken.append(seconds(function, 1, device))
        if len(taken) >= 6 and min(taken[-3:]) > (1 - STABLE) * min(taken[-6:-3]):
            break
    return min(taken)


def timing(*passes: Sequence[float] | np.ndarray) -> Timing:
    """The median, the 20th and 80th percentiles, and the median's 95 % bootstrap interval of samples taken in passes.

    Each pass has the same weight, however many samples it has. The bootstrap draws passes with replacement, and samples
    of each pass drawn, so the interval contains what differs from pass to pass. It is deterministic.
    """
    taken = [np.sort(np.asarray(samples, dtype=np.float64)) for samples in passes]
    most = max(map(len, taken))
    places = (np.arange(most) + 0.5) / most
    values = np.concatenate([np.quantile(samples, places, method="hazen") for samples in taken])
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    repeats = sum(map(len, taken))
    if repeats < 2:
        return Timing(median, p20, p80, repeats)
    low, high = (
        bootstrap(np.median, taken[0])
        if len(taken) == 1
        else np.quantile(_medians_of_passes(taken), [0.025, 0.975]).tolist()
    )
    return Timing(median, p20, p80, repeats, low, high)


def _medians_of_passes(passes: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """The medians of `RESAMPLES` bootstrap resamples of the passes, and of the samples of each pass that is drawn.

    SciPy's bootstrap draws on one level alone.
    """
    rng = np.random.default_rng(seed)
    counts, most = np.array([len(samples) for samples in passes]), max(map(len, passes))
    table = np.stack([np.resize(samples, most) for samples in passes])
    chosen = rng.integers(len(passes), size=(RESAMPLES, len(passes), 1))
    places = (rng.random((RESAMPLES, len(passes), most)) * counts[chosen]).astype(int)
    return np.median(table[chosen, places].reshape(RESAMPLES, -1), axis=1)


def pooled(earlier: Timing, later: Timing) -> Timing:
    """Join two timings as passes of one measurement. Both must have samples, and the same yardsticks."""
    samples = [*earlier.samples, *later.samples]
    gauges = {name: [*earlier.yardsticks[name], *later.yardsticks[name]] for name in later.yardsticks}
    return replace(timing(*samples), yardsticks=gauges, samples=samples)


def yardsticks(device: torch.device) -> dict[str, Callable[[], object]]:
    """Functions whose work is the same in every version of this package; each is sensitive to one part of the machine.

    calls     64 additions to 16 numbers: the cost of calling torch
    product   one matrix product, 2·512³ FLOP on the CPU and 2·4096³ on a GPU: arithmetic
    copy      one copy of 16 MB on the CPU, of 1 GB on a GPU: memory
    cache     a matrix of 8 MB times a vector: the part of the last cache, where a layer's weights lie, that other
              programs leave free
    """
    large = device.type == "cuda"
    small = torch.zeros(16, device=device)
    a = torch.full((4096, 4096) if large else (512, 512), 1e-3, device=device)
    source = torch.ones(1 << 28 if large else COPIED, device=device)
    product, target = torch.empty_like(a), torch.empty_like(source)
    matrix, vector = torch.full((1448, 1448), 1e-3, device=device), torch.ones(1448, device=device)
    read = torch.empty_like(vector)

    def calls() -> None:
        for _ in range(64):
            small.add_(1e-3)

    return {
        "calls": calls,
        "product": lambda: torch.mm(a, a, out=product),
        "copy": lambda: target.copy_(source),
        "cache": lambda: torch.mv(matrix, vector, out=read),
    }


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    case_seconds: float = 0.5,
    passes: int = 1,
) -> dict[str, Timing | Exception]:
    """Seconds a call of several functions, sampled in turn so that disturbances of the machine affect all alike.

    Each round takes one sample of each function; a sample is as many calls as take 2 ms. A function is done when it has
    7 samples and `case_seconds` of them, or 40 samples. If this is one of several `passes` (`pooled`), it is done when
    it has 5 samples and its share of `case_seconds`, or 3 samples and all of `case_seconds`, or its share of the 40. A
    function that raises gives its exception as the result.

    The `yardsticks` are sampled in the first round, in rounds 2, 4, 8, … and after the last, so they meet the same
    disturbances. They push the functions' data out of the caches, so in those rounds each function is called once,
    untimed, before its sample.
    """
    if not functions:
        return {}
    keep_freed_memory()
    gauges = {name: _Sampled(function, device) for name, function in yardsticks(device).items()}
    cases = {name: _Sampled(function, device) for name, function in functions.items()}
    gc.collect()
    gc.disable()  # a collection in the middle of a sample would count as time of the function that ran
    try:
        for each in (*gauges.values(), *cases.values()):
            each.warm()
        least = least_rounds(passes)
        for round_ in range(max(least, math.ceil(MOST_ROUNDS / passes))):
            due = [case for case in cases.values() if not case.done(case_seconds, passes)]
            gauging = not due or (round_ != 1 and round_ & (round_ - 1) == 0)
            for gauge in gauges.values() if gauging else ():
                for _ in range(GAUGE_SAMPLES):
                    gauge.sample(again=False)
            if not due:
                break
            for case in due:
                case.sample(again=gauging)
    finally:
        gc.enable()
    drift: dict[str, list[float]] = {}
    for name, gauge in gauges.items():
        if gauge.error is not None:
            raise gauge.error
        drift[name] = [float(np.median(gauge.samples))]
    return {
        name: case.error
        if case.error is not None
        else replace(timing(case.samples), yardsticks=drift, samples=[rounded(case.samples)])
        for name, case in cases.items()
    }


class _Sampled:
    """A function, its samples, and the exception that it raised, if any."""

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self._function, self._device, self._calls = function, device, 1
        self.samples: list[float] = []
        self.error: Exception | None = None

    def warm(self) -> None:
        """Call the function until it is warm, and set how many calls make a sample."""
        try:
            self._calls = max(1, math.ceil(SAMPLE_SECONDS / warm_up(self._function, self._device)))
        except Exception as error:
            self.error = error

    def done(self, case_seconds: float, passes: int) -> bool:
        spent, count = sum(self.samples) * self._calls, len(self.samples)
        usual = count >= least_rounds(passes) and spent >= case_seconds / passes
        long = passes > 1 and count >= LONG_ROUNDS and spent >= case_seconds
        return self.error is not None or usual or long

    def sample(self, again: bool) -> None:
        """Take a sample. again: call the function once before, untimed, if a sample is several calls."""
        try:
            if again and self._calls > 1:
                self._function()
            self.samples.append(seconds(self._function, self._calls, self._device))
        except Exception as error:
            self.error = error


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes alive at once during one call, beyond those alive before it.

    `function` should build an algorithm and then run it, so that what the algorithm keeps from call to call counts. The
    bytes are those of torch's allocator, as the profiler sees them on the CPU, and `torch.cuda.max_memory_allocated` on
    CUDA. They aren't the process's resident memory, which includes torch itself, and don't include memory that a
    library such as MKL allocates by itself.
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
    # The exported trace has every allocation; the profiler's `events()` merges most of them into their operators.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same normally distributed numbers in every process. The global random state stays as it is."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator)


def flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product: the rate by which predictions of time divide.

    Its numbers are random. With numbers all alike few bits change, so a GPU takes less power and runs at a higher clock
    than with what anyone multiplies.
    """
    size = 8192 if device.type == "cuda" else 1024  # enough to fill a GPU
    a, b = (_random((size, count * size), dtype, device) for count in (1, 2))
    return 2 * size * size * 2 * size / min(seconds(lambda: a @ b, 1, device) for _ in range(4))


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy of random numbers, read and written bytes together.

    Traffic is compared with this rate.
    """
    numbers = 1 << (28 if device.type == "cuda" else 25)  # larger than the caches, as far as memory allows
    source = _random((numbers,), torch.float32, device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 1, device) for _ in range(6))


def cache_levels(device: torch.device, threads: int = 1) -> dict[str, int]:
    """Bytes of each level of cache, "L1" first, that so many threads have, each on a core of its own.

    A CPU's are those that Linux reports, and empty if it doesn't; a GPU's is its "L2".
    """
    if device.type == "cuda":
        return {"L2": int(torch.cuda.get_device_properties(device).L2_cache_size)}
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        files = [folder / name for name in _ABOUT_CACHE]
        if not all(file.is_file() for file in files):
            continue
        about = {file.name: file.read_text(encoding="utf-8").strip() for file in files}
        size = about["size"]
        if about["type"] == "Instruction" or size[-1:] not in ("K", "M") or not size[:-1].isdigit():
            continue
        sharing = max(1, len(_cpus(about["shared_cpu_list"])))
        caches = -(-threads // sharing)
        found[f"L{about['level']}"] = (int(size[:-1]) << (10 if size[-1] == "K" else 20)) * caches
    return found


_ABOUT_CACHE = ("level", "type", "size", "shared_cpu_list")


def _cpus(listed: str) -> set[int]:
    """The processors of a list of Linux, such as "0-3,8"."""
    ends = [part.partition("-") for part in listed.split(",") if part]
    return {cpu for first, _, last in ends for cpu in range(int(first), int(last or first) + 1)}


def cache_bytes() -> int:
    """Bytes of the processor's last-level cache, as Linux reports them; 0 if it doesn't."""
    return max(cache_levels(torch.device("cpu")).values(), default=0)
