"""Measure, in some seconds, the rates of the device that this process runs on; a plan for it divides by them."""

from __future__ import annotations

import math
import os

import torch

from ..._device import device_name
from ...planning import cost, devices
from ...planning.devices import Rate
from ..harness.measure import cache_bytes, copy_rate, flop_rate, seconds
from ..harness.record import now
from ..scaling import cases


def profile(device: torch.device) -> devices.Device:
    """A profile with the key "here": the device's rates as measured now.

    Rates that aren't measured (on a GPU those of launches in a graph and of scan steps) come, with their basis, from
    the known profile that matches the device's name. On a CPU Γ's pass is compiled once, which takes some seconds more.
    """
    gpu = device.type == "cuda"
    like = devices.find(device_name(device), "gpu" if gpu else "cpu")
    per_call = _seconds_per_call(device)
    found = {
        "copy": copy_rate(device),
        "float64": flop_rate(device, torch.float64),
        "float32": flop_rate(device, torch.float32),
        "call": per_call,
    }
    cache = 0 if gpu else cache_bytes()
    if gpu:
        found["bfloat16"] = flop_rate(device, torch.bfloat16)
    else:
        found.update(view=per_call, fresh=_seconds_per_fresh_byte())
        if cache:
            found.update(matrix=_matrix_rate(cache), cache=_gamma_rate(cache, per_call))
    rates = {name: Rate(value, "measured") for name, value in found.items()}
    taken = {name: like.rates[name] for name in ("graph_call", "scan_step", "latency") if name in like.rates}
    if gpu:
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return devices.Device(
        key="here",
        name=device_name(device),
        kind="gpu" if gpu else "cpu",
        matches=(device_name(device),),
        memory_bytes=float(memory),
        rates={**(taken if gpu else {}), **rates},
        cores=None if gpu else torch.get_num_threads(),
        cache_bytes=float(cache),
        sources=f"rjepa bench plan --device here, {now()}",
    )


def _seconds_per_call(device: torch.device) -> float:
    """Seconds of a call: of the package's own code on a few units (the dual form over 50 steps); on a GPU of `add_`."""
    if device.type == "cuda":
        a = torch.zeros(64, device=device)
        return min(seconds(lambda: a.add_(a), 1000, device) for _ in range(5))
    size = cases.Size(units=8, batch=1, steps=50, chunk=16)
    like = torch.empty(0)
    made = cases.RfpDual(cases.problem(size, kind="noise", scale=0.1, seed=0, backend="torch", like=like))
    counted = cost.counted(made.run)
    return min(seconds(made.run, 3, device) for _ in range(20)) / (counted.calls + counted.views)


def _matrix_rate(cache: int) -> float:
    """Bytes a second at which a matrix in the cache is multiplied by one row."""
    size = math.isqrt(cache // 16)
    matrix, row, out = torch.ones(size, size), torch.ones(1, size), torch.empty(1, size)
    cpu = torch.device("cpu")
    return matrix.nbytes / min(seconds(lambda: torch.mm(row, matrix.t(), out=out), 3, cpu) for _ in range(8))


def _gamma_rate(cache: int, per_call: float) -> float:
    """Bytes a second of Γ's step where Γ takes half of the cache, by the backend that runs here."""
    size = cases.Size(units=math.isqrt(cache // 96), batch=1, steps=2, chunk=2)
    given = cases.problem(size, kind="noise", scale=0.1, seed=0, backend="auto", like=torch.empty(0))
    made = cases.RfpStepGamma(given)
    moved = 2 * made.state_bytes(size) + sum(weight.nbytes for weight in given.weights)
    made.run()
    cpu = torch.device("cpu")
    spent = min(seconds(made.run, 3, cpu) for _ in range(8))
    calls = cost.COMPILED_PASS.calls + cost.COMPILED_PASS.views
    return moved / max(spent - calls * per_call, spent / 2)


def _seconds_per_fresh_byte() -> float:
    """Seconds a byte for memory that the system maps anew when it is first written."""
    cpu, numbers = torch.device("cpu"), 1 << 24
    kept = torch.empty(numbers)
    new = min(seconds(lambda: torch.empty(numbers).fill_(1), 1, cpu) for _ in range(6))
    again = min(seconds(lambda: kept.fill_(1), 1, cpu) for _ in range(6))
    return max(new - again, 1e-3 * again) / kept.nbytes
