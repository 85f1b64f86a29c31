"""Peak memory against T, N and B, measured and predicted: where BPTT needs more than the rules that carry
sensitivities.

A case that keeps a history runs all T steps. One that carries sensitivities forward keeps no more after its first steps
(a test lets it run on), so it runs at most `STREAMED` steps. A case that wouldn't fit, or would take too long, is
predicted and not run.
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

from ... import _checks as check
from ..harness import measure, progress, record
from ..harness.device import MEMORY_SHARE, check_device, failure
from ..harness.record import Record
from ..harness.settings import check_above_zero
from ..harness.statistics import crossovers
from ..harness.tables import bytes_text, seconds_text
from . import cases
from .cases import CASES, Case, Size

FILE = "memory.jsonl"
STREAMED = 40  # the most steps of a case that takes steps one by one, or in chunks
PROFILED = (
    4  # the profiler, which sees the allocations, is assumed to make a run at most this many times as long
)
ALGORITHMS = (
    "bptt-autograd",
    "bptt",
    "tbptt",
    "rfp-step",
    "rfp-chunk",
    "rfp-history",
    "rfp-dual",
    "rtrl-heads",
    "rtrl",
)
# Each of N, B and T is swept with the other two as in BASE.
BASE = {"N": 128, "B": 8, "T": 128}
SWEEPS: dict[str, tuple[int, ...]] = {
    "T": (8, 16, 32, 64, 128, 256, 512, 1024),
    "N": (32, 64, 128, 256, 512),
    "B": (1, 2, 4, 8, 16, 32),
}
# Pairs of algorithms whose memory is compared: from which T (or N, or B) on does the first take more?
PASSES = tuple((a, b) for a in ("bptt-autograd", "bptt") for b in ("rfp-step", "rfp-chunk", "rtrl-heads"))


@dataclass(frozen=True)
class Settings:
    """Values of T, N and B, each swept with the others as in `base`. budget: seconds a case may take at a point."""

    sweeps: dict[str, tuple[int, ...]]
    base: dict[str, int]
    algorithms: tuple[str, ...] = ALGORITHMS
    chunk: int = 16
    device: str = "cpu"
    backend: str = "auto"
    seed: int = 0
    budget: float = 10.0

    def __post_init__(self) -> None:
        cases.check_names(self.algorithms)
        for what, values in self.sweeps.items():
            check.one_of("sweeps", what, BASE)
            if not values:
                raise ValueError(f"the sweep of {what} must have at least one value, got none")
            for value in values:
                check.integer(what, value, 2 if what == "T" else 1)
        for what in BASE:
            check.integer(what, self.base[what], 2 if what == "T" else 1)
        check.integer("chunk", self.chunk, 1)
        cases.check_backend(self.backend)
        check_above_zero(self, "budget")
        check_device(self.device)

    def points(self) -> list[dict[str, int]]:
        """N, B and T of every point, each point once."""
        found = [{**self.base, what: value} for what, values in self.sweeps.items() for value in values]
        return list({tuple(point.values()): point for point in found}.values())

    def size(self, point: dict[str, int]) -> Size:
        return Size(point["N"], point["B"], point["T"], min(self.chunk, point["T"]))

    def params(self, point: dict[str, int]) -> dict[str, Any]:
        """The parameters that identify a point, as its records have them."""
        return {
            **point,
            "C": min(self.chunk, point["T"]),
            "dtype": "float32",
            "device": torch.device(self.device).type,
            "backend": self.backend,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
        }


def run_steps(case: type[Case], problem: cases.Problem, most: int) -> None:
    """Build a case and run the problem's steps, but at most `most` if one run covers only a part of them."""
    built = case(problem)
    for _ in range(max(1, min(problem.steps, max(most, built.covers)) // built.covers)):
        built.run()


def measure_case(
    case: type[Case], problem: cases.Problem, size: Size, settings: Settings, rate: float
) -> dict[str, Any]:
    """Check a case at a point and measure its peak, if it fits and isn't too slow; the fields of its record."""
    device = torch.device(settings.device)
    predicted = cases.predicted_seconds(case, size, rate)
    found: dict[str, Any] = {
        "state_bytes": case.state_bytes(size),
        "predicted_peak_bytes": case.peak_bytes(size),
        "predicted_seconds": predicted,
    }
    needs, available = case.peak_bytes(size), measure.available_bytes(device)
    if available is not None and needs > MEMORY_SHARE * available:
        message = f"predicted: needs {bytes_text(needs)}, {bytes_text(available)} available"
        return {**found, "status": "oom", "message": message}
    most = min(STREAMED, int(settings.budget / (PROFILED * predicted))) if predicted else STREAMED
    if most < 2:
        message = f"predicted: {seconds_text(predicted)} a step, budget {settings.budget:g} s"
        return {**found, "status": "over_budget", "message": message}
    try:
        case(problem).run()  # whatever must be compiled is compiled here
        begin = time.perf_counter()
        run_steps(case, problem, most)
        spent = time.perf_counter() - begin
        if PROFILED * spent > settings.budget:
            message = f"{seconds_text(spent)} without the profiler, budget {settings.budget:g} s with it"
            return {**found, "status": "over_budget", "message": message}
        cases.verify(case, problem)
        peak = measure.peak_bytes(lambda: run_steps(case, problem, most), device)
    except Exception as error:
        status, message = failure(error)
        return {**found, "status": status, "message": message}
    return {**found, "status": "ok", "peak_bytes": peak}


def sweep(settings: Settings, path: Path, on_record: Callable[[Record], None] = lambda made: None) -> int:
    """Measure what the file at `path` lacks, and append the records to it; returns how many were already there."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = record.started("memory", device)
    done = record.measured(path)
    rate = measure.flop_rate(device, torch.float32)
    kept = 0
    for point in settings.points():
        size = settings.size(point)
        common = {**shared, "params": settings.params(point)}
        missing = [
            name
            for name in settings.algorithms
            if record.key(Record(algorithm=name, status="ok", time="", **common)) not in done
        ]
        kept += len(settings.algorithms) - len(missing)
        if not missing:
            continue
        problem = cases.problem(
            size,
            kind="noise",
            scale=0.1,
            seed=settings.seed,
            backend=settings.backend,
            like=torch.empty(0, device=device),
        )
        for name in missing:
            fields = measure_case(CASES[name], problem, size, settings, rate)
            made = Record(algorithm=name, time=record.now(), **common, **fields)
            record.append(path, made)
            on_record(made)
    return kept


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`sweep` with progress on `console`; returns the file's records of these settings."""
    points = settings.points()
    total = len(points) * len(settings.algorithms)
    progress.shown("memory", total, functools.partial(sweep, settings, path), console, tell=("error",))
    wanted = [settings.params(point) for point in points]
    found = record.here(path, "memory", settings.device)
    return [r for r in found if r.params in wanted and r.algorithm in settings.algorithms]


def base_of(records: Sequence[Record]) -> dict[str, int]:
    """The N, B and T that most records have: the values at which each stays while another one is swept."""
    found = {}
    for what in BASE:
        values = [r.params[what] for r in records]
        found[what] = max(sorted(set(values)), key=values.count)
    return found


def swept(records: Sequence[Record], what: str) -> list[Record]:
    """The records of the sweep of `what` ("T", "N" or "B"), sorted by it."""
    base = base_of(records)
    others = [name for name in BASE if name != what]
    mine = [r for r in records if all(r.params[name] == base[name] for name in others)]
    return sorted(mine, key=lambda r: r.params[what])


def curve(records: Sequence[Record], what: str, algorithm: str, field: str) -> dict[int, float]:
    """Bytes of an algorithm by `what` ("T", "N" or "B"). field: "peak_bytes" or "predicted_peak_bytes"."""
    mine = [r for r in swept(records, what) if r.algorithm == algorithm]
    return {r.params[what]: getattr(r, field) for r in mine if getattr(r, field)}


def passes(records: Sequence[Record], what: str) -> list[tuple[str, str, float | None, float | None]]:
    """(a, b, measured, predicted) for each of `PASSES`: the value of `what` above which a takes more memory than b."""
    out = []
    for a, b in PASSES:
        found = []
        for field in ("peak_bytes", "predicted_peak_bytes"):
            crossing = crossovers(curve(records, what, a, field), curve(records, what, b, field))
            found.append(crossing[0][0] if crossing else None)
        if found != [None, None]:
            out.append((a, b, found[0], found[1]))
    return out


def tables(records: Sequence[Record]) -> list[Table]:
    """Tables of peak bytes against T, N and B (in brackets if predicted), of predicted / measured, and of `passes`."""
    mine = [r for r in records if r.benchmark == "memory"]
    if not mine:
        return []
    base, out = base_of(mine), []
    algorithms = [name for name in CASES if any(r.algorithm == name for r in mine)]
    for what in BASE:
        at = swept(mine, what)
        if len({r.params[what] for r in at}) < 2:
            continue
        fixed = ", ".join(f"{name} = {base[name]}" for name in BASE if name != what)
        table = Table(title=f"peak bytes (predicted) against {what}, {fixed}")
        for heading in (what, *algorithms):
            table.add_column(heading, justify="right", no_wrap=True)
        cells = {(r.params[what], r.algorithm): _cell(r) for r in at}
        for value in sorted({r.params[what] for r in at}):
            table.add_row(str(value), *(cells.get((value, name), "") for name in algorithms))
        out.append(table)
    return [*out, _quality(mine, algorithms), _passing(mine)]


def _cell(made: Record) -> str:
    if made.peak_bytes is not None:
        return bytes_text(made.peak_bytes)
    return f"({bytes_text(made.predicted_peak_bytes or 0)})"


def _quality(records: Sequence[Record], algorithms: Sequence[str]) -> Table:
    table = Table(title="predicted peak / measured peak")
    for heading in ("algorithm", "points", "least", "median", "most"):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for name in algorithms:
        ratios = sorted(
            r.predicted_peak_bytes / r.peak_bytes
            for r in records
            if r.algorithm == name and r.peak_bytes and r.predicted_peak_bytes
        )
        if ratios:
            shown = (ratios[0], ratios[len(ratios) // 2], ratios[-1])
            table.add_row(name, str(len(ratios)), *(f"{ratio:.2f}" for ratio in shown))
    return table


def _passing(records: Sequence[Record]) -> Table:
    base = base_of(records)
    table = Table(title="where memory passes")
    for heading in ("of", "that of", "measured", "predicted", "at"):
        table.add_column(
            heading, justify="left" if heading in ("of", "that of", "at") else "right", no_wrap=True
        )
    for what in BASE:
        fixed = ", ".join(f"{name} = {base[name]}" for name in BASE if name != what)
        for a, b, *values in passes(records, what):
            shown = ("" if value is None else f"{what} = {value:.0f}" for value in values)
            table.add_row(a, b, *shown, fixed)
    return table
