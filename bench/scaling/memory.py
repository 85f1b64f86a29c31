"""Peak memory against T, N and B, measured and predicted: where BPTT's passes that of what is carried forward.

A case that keeps a history is built with all T steps; one that carries sensitivities forward keeps as much after its
first steps as ever (a test runs it on), and takes `STREAMED` of them at most. What would not fit, or would take too
long, is predicted alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ... import _checks as check
from ..harness import measure, record
from ..harness import statistics as fit
from ..harness.record import Record
from ..harness.tables import bytes_text, place, seconds_text
from . import cases
from . import timing as scaling
from .cases import CASES, Case, Size

FILE = "memory.jsonl"
STREAMED = 40  # steps at most of a case that takes them one by one, or in chunks
PROFILED = 4  # times as long as without it: what the profiler that sees allocations is taken to need, at most
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
# What is swept, and what stays as it is meanwhile.
BASE = {"N": 128, "B": 8, "T": 128}
SWEEPS: dict[str, tuple[int, ...]] = {
    "T": (8, 16, 32, 64, 128, 256, 512, 1024),
    "N": (32, 64, 128, 256, 512),
    "B": (1, 2, 4, 8, 16, 32),
}
# Whose memory against whose: from which T (or N, or B) on the first takes more.
PASSES = tuple((a, b) for a in ("bptt-autograd", "bptt") for b in ("rfp-step", "rfp-chunk", "rtrl-heads"))


@dataclass(frozen=True)
class Settings:
    """Values of T, N and B, each swept with the others as in `base`; budget: seconds that a case may take."""

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
        if not self.budget > 0:
            raise ValueError(f"budget must be above 0, got {self.budget}")
        scaling.check_device(self.device)

    def points(self) -> list[dict[str, int]]:
        """N, B and T of every point, each once."""
        found = [{**self.base, what: value} for what, values in self.sweeps.items() for value in values]
        return list({tuple(point.values()): point for point in found}.values())

    def size(self, point: dict[str, int]) -> Size:
        return Size(point["N"], point["B"], point["T"], min(self.chunk, point["T"]))

    def params(self, point: dict[str, int]) -> dict[str, Any]:
        """What identifies a point's measurement, as recorded."""
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
    """Build a case and take a problem's steps, `most` at most where a run covers a part of them."""
    built = case(problem)
    for _ in range(max(1, min(problem.steps, max(most, built.covers)) // built.covers)):
        built.run()


def measure_case(
    case: type[Case], problem: cases.Problem, size: Size, settings: Settings, rate: float
) -> dict[str, Any]:
    """What was found of a case at a point, as fields of its record."""
    device = torch.device(settings.device)
    predicted = cases.predicted_seconds(case, size, rate)
    found: dict[str, Any] = {
        "state_bytes": case.state_bytes(size),
        "predicted_peak_bytes": case.peak_bytes(size),
        "predicted_seconds": predicted,
    }
    needs, available = case.peak_bytes(size), measure.available_bytes(device)
    if available is not None and needs > scaling.MEMORY_SHARE * available:
        message = f"predicted: needs {bytes_text(needs)}, {bytes_text(available)} available"
        return {**found, "status": "oom", "message": message}
    most = min(STREAMED, int(settings.budget / (PROFILED * predicted))) if predicted else STREAMED
    if most < 2:
        message = f"predicted: {seconds_text(predicted)} a step, budget {settings.budget:g} s"
        return {**found, "status": "over_budget", "message": message}
    try:
        case(problem).run()  # what is compiled is compiled here
        begin = time.perf_counter()
        run_steps(case, problem, most)
        spent = time.perf_counter() - begin
        if PROFILED * spent > settings.budget:
            message = f"{seconds_text(spent)} without the profiler, budget {settings.budget:g} s with it"
            return {**found, "status": "over_budget", "message": message}
        cases.verify(case, problem)
        peak = measure.peak_bytes(lambda: run_steps(case, problem, most), device)
    except Exception as error:
        status, message = scaling.failure(error)
        return {**found, "status": status, "message": message}
    return {**found, "status": "ok", "peak_bytes": peak}


def sweep(settings: Settings, path: Path, on_record: Callable[[Record], None] = lambda made: None) -> int:
    """Measure what the file at `path` lacks, and append it there; returns how many records were kept."""
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
    """`sweep` with progress on `console`; the file's records of these settings afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    points = settings.points()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("memory", total=len(points) * len(settings.algorithms))

        def on_record(made: Record) -> None:
            progress.update(bar, description=f"memory {place(made)}", advance=1)
            if made.status == "error":
                progress.console.print(
                    f"{place(made)}: {made.status}: {made.message}", highlight=False, soft_wrap=True
                )

        kept = sweep(settings, path, on_record)
        progress.update(bar, description="memory", advance=kept)
    if kept:
        console.print(f"kept {kept} records measured earlier; --fresh measures them again", highlight=False)
    wanted = [settings.params(point) for point in points]
    found = record.here(path, "memory", settings.device)
    return [r for r in found if r.params in wanted and r.algorithm in settings.algorithms]


def base_of(records: Sequence[Record]) -> dict[str, int]:
    """N, B and T at which most records are: those that stay as they are while another is swept."""
    found = {}
    for what in BASE:
        values = [r.params[what] for r in records]
        found[what] = max(sorted(set(values)), key=values.count)
    return found


def swept(records: Sequence[Record], what: str) -> list[Record]:
    """The records of the sweep of "T", "N" or "B", in its order."""
    base = base_of(records)
    others = [name for name in BASE if name != what]
    mine = [r for r in records if all(r.params[name] == base[name] for name in others)]
    return sorted(mine, key=lambda r: r.params[what])


def curve(records: Sequence[Record], what: str, algorithm: str, field: str) -> dict[int, float]:
    """Bytes of an algorithm against "T", "N" or "B": field "peak_bytes" or "predicted_peak_bytes"."""
    mine = [r for r in swept(records, what) if r.algorithm == algorithm]
    return {r.params[what]: getattr(r, field) for r in mine if getattr(r, field)}


def passes(records: Sequence[Record], what: str) -> list[tuple[str, str, float | None, float | None]]:
    """(a, b, measured, predicted) for `PASSES`: the value of `what` from which on a takes more than b."""
    out = []
    for a, b in PASSES:
        found = []
        for field in ("peak_bytes", "predicted_peak_bytes"):
            crossing = fit.crossovers(curve(records, what, a, field), curve(records, what, b, field))
            found.append(crossing[0][0] if crossing else None)
        if found != [None, None]:
            out.append((a, b, found[0], found[1]))
    return out


def tables(records: Sequence[Record]) -> list[Table]:
    """For T, N and B: peak bytes measured, or predicted in brackets; how near predictions come; what passes what."""
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
