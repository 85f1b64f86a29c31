"""The scaling sweep: every algorithm at every (N, B), checked, then timed within one run.

One record an algorithm and point is appended as soon as the point is done, so that an interrupted sweep goes
on where it stopped. Ratios between algorithms are meant within a point: its cases are sampled in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import _checks as check
from . import cases, inputs, measure, record
from .cases import CASES, Case, Problem, Size
from .record import Record
from .summary import bytes_text, place, seconds_text

FILE = "scaling.jsonl"
# N for B = 1, to show slopes; and a few N at B = 8, to show ratios where a batch shares each matrix product.
DEFAULT_HIDDEN = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
DEFAULT_BATCHES = {1: DEFAULT_HIDDEN, 8: (64, 256, 512)}
# Runs of a case before its rounds: for the check, the peak, and warming up.
RUNS_BEFORE = 4
# Leave this much of what the system says is available.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """A sweep: points (N, B), what all points share, and where it runs.

    budget: seconds that a case may be predicted to take, its check and all its samples; case_seconds: how
    long it is sampled at least.
    """

    points: tuple[tuple[int, int], ...]
    algorithms: tuple[str, ...] = cases.DEFAULT
    steps: int = 50
    chunk: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    input: str = "photo"
    scale: float = 0.1
    backend: str = "auto"
    seed: int = 0
    budget: float = 30.0
    case_seconds: float = 0.5

    def __post_init__(self) -> None:
        cases.check_names(self.algorithms)
        for units, batch in self.points:
            check.integer("hidden", units, 1)
            check.integer("batch", batch, 1)
        check.integer("steps", self.steps, 2)
        check.integer("chunk", self.chunk, 1)
        check.one_of("dtype", self.dtype, cases.DTYPES)
        check.one_of("input", self.input, inputs.INPUTS)
        cases.check_backend(self.backend)
        for name in ("scale", "budget", "case_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_device(self.device)

    def params(self, units: int, batch: int) -> dict[str, Any]:
        """What identifies a point's measurement, as recorded."""
        return {
            "N": units,
            "B": batch,
            "T": self.steps,
            "C": min(self.chunk, self.steps),
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "input": self.input,
            "scale": self.scale,
            "backend": self.backend,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
        }


DEFAULT_POINTS = tuple((n, b) for b, sizes in DEFAULT_BATCHES.items() for n in sizes)


def points(
    hidden: Sequence[int], batches: Sequence[int], default: Sequence[tuple[int, int]] = DEFAULT_POINTS
) -> tuple[tuple[int, int], ...]:
    """(N, B), every N at every B. Neither given: the defaults; only one given: B = 1, or the default N."""
    if not hidden and not batches:
        return tuple(default)
    return tuple((n, b) for b in batches or (1,) for n in hidden or dict.fromkeys(n for n, _ in default))


def default_device() -> str:
    """cuda where torch finds one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ValueError unless this torch can use the device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} can't be used: torch finds no CUDA device here")


def sweep(
    settings: Settings,
    path: Path,
    on_point: Callable[[str], None] = lambda point: None,
    on_record: Callable[[Record], None] = lambda made: None,
) -> int:
    """Measure what the file at `path` lacks, and append it there; returns how many records were kept.

    What the file has measured ("ok") under the same key is kept. What ran out of memory or of its budget, or
    failed, is tried again; the later record of a key counts.
    """
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    kept = 0
    shared = record.started("scaling", device)
    done = record.measured(path)
    rate = measure.flop_rate(device, cases.DTYPES[settings.dtype])
    for units, batch in settings.points:
        on_point(f"N={units} B={batch}")
        common = {**shared, "params": settings.params(units, batch)}
        missing = [
            name
            for name in settings.algorithms
            if record.key(Record(algorithm=name, status="ok", time="", **common)) not in done
        ]
        kept += len(settings.algorithms) - len(missing)
        results = measure_point(settings, units, batch, missing, rate)
        for name in missing:
            made = Record(algorithm=name, time=record.now(), **common, **results[name])
            record.append(path, made)
            on_record(made)
    return kept


def measure_point(
    settings: Settings, units: int, batch: int, names: Iterable[str], rate: float
) -> dict[str, dict[str, Any]]:
    """What was found of each case at one point, as fields of its record."""
    device, dtype = torch.device(settings.device), cases.DTYPES[settings.dtype]
    size = Size(units, batch, settings.steps, settings.chunk, dtype.itemsize)
    results: dict[str, dict[str, Any]] = {}
    shared: Problem | None = None
    built: dict[str, Case] = {}
    for name in names:
        case = CASES[name]
        predicted = cases.predicted_seconds(case, size, rate)
        found: dict[str, Any] = {
            "state_bytes": case.state_bytes(size),
            "predicted_peak_bytes": case.peak_bytes(size),
            "predicted_seconds": predicted,
        }
        results[name] = found
        refusal = refused(case, size, predicted, settings.budget, measure.available_bytes(device))
        if refusal is not None:
            found["status"], found["message"] = refusal
            continue
        try:
            if shared is None:
                shared = cases.problem(
                    size,
                    kind=settings.input,
                    scale=settings.scale,
                    seed=settings.seed,
                    backend=settings.backend,
                    like=torch.empty(0, dtype=dtype, device=device),
                )
            built[name] = _prepare(case, shared, device, found)
        except Exception as error:
            found["status"], found["message"] = failure(error)

    timings = measure.interleave(
        {name: case.run for name, case in built.items()}, device, case_seconds=settings.case_seconds
    )
    for name, timing in timings.items():
        found = results[name]
        if isinstance(timing, Exception):
            found["status"], found["message"] = failure(timing)
        else:
            found.update(status="ok", timing=timing.per(built[name].covers))
    return results


def refused(
    case: type[Case], size: Size, predicted: float, budget: float, available: int | None
) -> tuple[str, str] | None:
    """("oom" | "over_budget", why) if a case is predicted not to fit; None if it may be tried."""
    needs = case.peak_bytes(size)
    if available is not None and needs > MEMORY_SHARE * available:
        return "oom", f"predicted: needs {bytes_text(needs)}, {bytes_text(available)} available"
    total = predicted * (RUNS_BEFORE + measure.LEAST_ROUNDS)
    if total > budget:
        return "over_budget", (
            f"predicted: {seconds_text(predicted)} a step and {total:.0f} s in all, budget {budget:g} s"
        )
    return None


def _prepare(case: type[Case], shared: Problem, device: torch.device, found: dict[str, Any]) -> Case:
    """Check a case, measure its peak, and build it; adds to `found`. Raises if its gradient is wrong."""
    begin = time.perf_counter()
    first = case(shared)
    first.run()
    first_call = time.perf_counter() - begin
    del first
    cases.verify(case, shared)
    found["peak_bytes"] = measure.peak_bytes(lambda: case(shared).run(), device)
    made = case(shared)
    found["backend"] = made.backend
    if made.backend is not None and not made.backend.startswith("torch"):
        found["compile_seconds"] = first_call
    return made


def failure(error: Exception) -> tuple[str, str]:
    """Status and message of a case that raised."""
    return ("oom" if cases.out_of_memory(error) else "error"), f"{type(error).__name__}: {error}"


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`sweep` with progress on `console`; the file's records of these settings afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("scaling", total=len(settings.points))
        seen = 0

        def on_point(point: str) -> None:
            nonlocal seen
            progress.update(task, description=f"scaling {point}", completed=seen)
            seen += 1

        def on_record(made: Record) -> None:
            if made.status != "ok":
                progress.console.print(
                    f"{place(made)}: {made.status}: {made.message}", highlight=False, soft_wrap=True
                )

        kept = sweep(settings, path, on_point, on_record)
        progress.update(task, description="scaling", completed=seen)
    if kept:
        console.print(f"kept {kept} records measured earlier; --fresh measures them again", highlight=False)
    wanted = [settings.params(n, b) for n, b in settings.points]
    found = record.here(path, "scaling", settings.device)
    return [r for r in found if r.params in wanted and r.algorithm in settings.algorithms]
