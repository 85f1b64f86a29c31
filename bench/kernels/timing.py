"""Each kernel's time against its floor: the time that its bytes and its arithmetic take at the device's rates.

The floor is max(bytes / copy bandwidth, FLOP / GEMM rate); both rates are measured on the device in the same run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ... import _checks as check
from ..harness import measure, record
from ..harness.device import MEMORY_SHARE, check_device, failure
from ..harness.record import Record
from ..harness.settings import check_above_zero, check_chosen, check_points
from ..harness.tables import bytes_text, seconds_text
from .cases import BY, KERNELS, MATRICES, STATES, Given, Kernel, Runner, problem

FILE = "kernels.jsonl"
# Default points (N, B) by kind of device. Γ in float32 takes 32·B·N² bytes: 67 MB to 2.1 GB on a GPU.
POINTS = {
    "cpu": ((64, 1), (256, 1), (1024, 1)),
    "cuda": ((512, 8), (1024, 8), (1024, 64), (4096, 4)),
}
# A relative error in norm above this can't be rounding: of float32 sums, of Γ kept in bfloat16, of TF32 products.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "tf32": 2.0**-9}


@dataclass(frozen=True)
class Settings:
    """Kernels at points (N, B).

    steps: T of the scans; case_seconds: for how long each runner is sampled at least; by: which runners.
    """

    points: tuple[tuple[int, int], ...]
    kernels: tuple[str, ...] = tuple(KERNELS)
    steps: int = 64
    device: str = "cpu"
    seed: int = 0
    case_seconds: float = 0.3
    by: tuple[str, ...] = BY

    def __post_init__(self) -> None:
        check_chosen("kernels", self.kernels, KERNELS)
        check_chosen("by", self.by, BY)
        check_points(self.points)
        check.integer("steps", self.steps, 2)
        check_above_zero(self, "case_seconds")
        check_device(self.device)

    def params(self, kernel: Kernel, by: str, units: int, batch: int) -> dict[str, Any]:
        """The parameters that identify a measurement, as its record has them."""
        return {
            "kernel": kernel.name,
            "by": by,
            "N": units,
            "B": batch,
            "S": STATES,
            "K": MATRICES,
            "T": kernel.steps or self.steps,
            "dtype": kernel.dtype,
            "device": torch.device(self.device).type,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
        }


def floor(moved: float, flop: float, copy_rate: float, flop_rate: float) -> tuple[float, str]:
    """The least seconds of a call at these rates, and which of "bytes" and "flop" determines them."""
    by_bytes, by_flop = moved / copy_rate, flop / flop_rate
    return max(by_bytes, by_flop), "bytes" if by_bytes >= by_flop else "flop"


def device_rates(device: torch.device) -> dict[str, float]:
    """Measured rates of a device: "copy" in bytes/s; "float32", and on a GPU "tf32", in FLOP/s."""
    rates = {"copy": measure.copy_rate(device), "float32": measure.flop_rate(device, torch.float32)}
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            rates["tf32"] = measure.flop_rate(device, torch.float32)
        finally:
            torch.set_float32_matmul_precision(before)
    return rates


def verify(kernel: Kernel, run: Runner, given: Given, want: Sequence[Tensor]) -> float:
    """The largest relative error against float64. Raises ArithmeticError if it is larger than rounding explains."""
    got = run(given.copy())
    worst = 0.0
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        of_gamma = index < len(given.gammas)
        tolerance = TOLERANCE[kernel.rate if kernel.rate == "tf32" else kernel.dtype] if of_gamma else 1e-5
        error = float((g.double() - w).norm() / w.norm())
        if not error <= tolerance:
            what = f"Γ of state {index}" if of_gamma else f"result {index}"
            raise ArithmeticError(f"{what} differs from float64 by {error:.1e} (tolerance {tolerance:.0e})")
        worst = max(worst, error)
    return worst


def measure_kernel(
    kernel: Kernel, names: Sequence[str], units: int, batch: int, settings: Settings, rates: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Check and time the runners `names` of a kernel at one point; the fields of each one's record, by name."""
    device, steps = torch.device(settings.device), kernel.steps or settings.steps
    moved, flop = kernel.bytes(units, batch, steps), kernel.flop(units, batch, steps)
    seconds, bound = floor(moved, flop, rates["copy"], rates[kernel.rate])
    about = {
        "bytes": moved,
        "flop": flop,
        "copy_bytes_per_second": rates["copy"],
        "gemm_flop_per_second": rates[kernel.rate],
        "floor_seconds": seconds,
        "bound": bound,
    }
    found: dict[str, dict[str, Any]] = {
        name: {"predicted_seconds": seconds, "payload": dict(about)} for name in names
    }
    needs, available = kernel.peak_bytes(units, batch, steps), measure.available_bytes(device)
    if available is not None and needs > MEMORY_SHARE * available:
        message = f"predicted: needs {bytes_text(needs)}, {bytes_text(available)} available"
        for fields in found.values():
            fields.update(status="oom", message=message)
        return found
    runs: dict[str, Callable[[], object]] = {}
    try:
        given = problem(kernel, units, batch, steps, settings.seed, device)
        want = kernel.reference(given.copy(torch.float64))
    except Exception as error:
        for fields in found.values():
            fields["status"], fields["message"] = failure(error)
        return found
    for name in names:
        run = kernel.runners(device)[name]
        begin = time.perf_counter()
        try:
            found[name]["payload"]["error"] = verify(kernel, run, given, want)
        except Exception as error:
            found[name]["status"], found[name]["message"] = failure(error)
            continue
        if name != "torch":
            found[name]["compile_seconds"] = time.perf_counter() - begin
        runs[name] = functools.partial(run, given)
    del want
    for name, timing in measure.interleave(runs, device, case_seconds=settings.case_seconds).items():
        fields = found[name]
        if isinstance(timing, Exception):
            fields["status"], fields["message"] = failure(timing)
            continue
        fields.update(status="ok", timing=timing)
        fields["payload"].update(
            bytes_per_second=moved / timing.median,
            flop_per_second=flop / timing.median,
            fraction=seconds / timing.median,
        )
    return found


def _fits(kernel: Kernel, units: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return kernel.fits(units, torch.cuda.get_device_properties(device).multi_processor_count)


def sweep(settings: Settings, path: Path, on_record: Callable[[Record], None] = lambda made: None) -> int:
    """Measure what the file at `path` lacks, and append it there; returns how many records were kept.

    As in `scaling.sweep`, a measurement ("ok") under the same key is kept, and the rest is tried again. A kernel for
    which the GPU is too small is left out.
    """
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = record.started("kernels", device)
    done = record.measured(path)
    rates: dict[str, float] = {}
    kept = 0
    for name in settings.kernels:
        kernel = KERNELS[name]
        for units, batch in settings.points:
            if not _fits(kernel, units, device):
                continue
            missing = {}
            for by in [by for by in kernel.runners(device) if by in settings.by]:
                params = settings.params(kernel, by, units, batch)
                common = {**shared, "algorithm": f"{name}/{by}", "params": params}
                if record.key(Record(status="ok", time="", **common)) in done:
                    kept += 1
                else:
                    missing[by] = common
            if not missing:
                continue
            rates = rates or device_rates(device)
            found = measure_kernel(kernel, tuple(missing), units, batch, settings, rates)
            for by, common in missing.items():
                made = Record(time=record.now(), **common, **found[by])
                record.append(path, made)
                on_record(made)
    return kept


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`sweep`, with a line on `console` for each record; returns the file's records of these settings."""

    def tell(made: Record) -> None:
        at = f"{made.algorithm} N={made.params['N']} B={made.params['B']}"
        said = made.status if made.timing is None else seconds_text(made.timing.median)
        console.print(
            f"{at}: {said}" + (f": {made.message}" if made.message else ""), highlight=False, soft_wrap=True
        )

    kept = sweep(settings, path, tell)
    if kept:
        console.print(f"kept {kept} records measured earlier; --fresh measures them again", highlight=False)
    device = torch.device(settings.device)
    wanted = [
        settings.params(KERNELS[name], by, n, b)
        for name in settings.kernels
        for by in KERNELS[name].runners(device)
        for n, b in settings.points
    ]
    return [r for r in record.here(path, "kernels", settings.device) if r.params in wanted]


def rate_text(value: float, unit: str) -> str:
    """A rate to three digits: 12.3 GB/s, 4.56 TFLOP/s (powers of 1000)."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}/s"
        value /= 1000
    return f"{value:.3g} T{unit}/s"


def table(records: Sequence[Record]) -> Table:
    """By kernel and point: the floor, what determines it, and for each runner time, bytes/s and floor / time."""
    runners = [by for by in BY if any(r.params["by"] == by for r in records)]
    devices = ", ".join(sorted({r.device for r in records}))
    out = Table(
        title=f"one call on {devices}: time, rate at which the bytes it must move are moved, floor / time",
        caption="floor: max(bytes / copy bandwidth, FLOP / GEMM rate), measured in the same run; "
        "over 100 %: data stayed in a cache, or was written where it was read, unlike a copy's",
    )
    for heading in ("kernel", "N", "B", "T", "floor", "set by", *runners):
        out.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    rows: dict[tuple[str, int, int, int], dict[str, Record]] = {}
    for r in records:
        rows.setdefault(tuple(r.params[name] for name in ("kernel", "N", "B", "T")), {})[r.params["by"]] = r
    order = list(KERNELS)
    for (name, *at), by in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1:])):
        about = next(iter(by.values())).payload
        cells = [_cell(by[runner]) if runner in by else "" for runner in runners]
        numbers = (str(value) for value in at)
        out.add_row(name, *numbers, seconds_text(about["floor_seconds"]), about["bound"], *cells)
    return out


def _cell(made: Record) -> str:
    if made.timing is None:
        return made.status
    rate = rate_text(made.payload["bytes_per_second"], "B")
    return f"{seconds_text(made.timing.median)}  {rate}  {made.payload['fraction']:4.0%}"
