"""The scaling sweep: every algorithm at every (N, B) is checked, then timed in several passes within one run.

Each pass is a process of its own that visits every point. Where a process happens to have its memory, and what other
programs do for half a minute, then affects one pass and not the next. As soon as a pass is done with a point, a record
of each algorithm is appended, with the samples of the earlier passes, so an interrupted sweep continues where it
stopped. Algorithms should be compared within a point, whose cases are sampled in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ... import _checks as check
from ..._processes import Workers
from ..harness import inputs, measure, record
from ..harness.device import MEMORY_SHARE, check_device, default_device, failure
from ..harness.record import Record
from ..harness.tables import bytes_text, place, seconds_text
from . import cases
from .cases import CASES, Case, Problem, Size
from .work import count

__all__ = [
    "DEFAULT_BATCHES",
    "DEFAULT_HIDDEN",
    "DEFAULT_POINTS",
    "FILE",
    "MEMORY_SHARE",
    "RUNS_BEFORE",
    "Settings",
    "check_device",
    "default_device",
    "failure",
    "measure_point",
    "own_process",
    "points",
    "refused",
    "run",
    "sweep",
]

FILE = "scaling.jsonl"
# The default N by B: many at B = 1, to show slopes; a few at B = 8, to show ratios if a batch shares each product.
DEFAULT_HIDDEN = (16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 1792, 2048)
DEFAULT_BATCHES = {1: DEFAULT_HIDDEN, 8: (64, 256, 512)}
# How often a case runs before it is timed: for the first time, for its check, and for its peak.
RUNS_BEFORE = 3


@dataclass(frozen=True)
class Settings:
    """A sweep: points (N, B), what all points share, and where it runs.

    budget: the most seconds that a case may be predicted to take at a point, for its check and all samples.
    case_seconds: for how long it is sampled at least, over all passes.
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
    passes: int = 3

    def __post_init__(self) -> None:
        cases.check_names(self.algorithms)
        for units, batch in self.points:
            check.integer("hidden", units, 1)
            check.integer("batch", batch, 1)
        check.integer("steps", self.steps, 2)
        check.integer("chunk", self.chunk, 1)
        check.integer("passes", self.passes, 1)
        check.one_of("dtype", self.dtype, cases.DTYPES)
        check.one_of("input", self.input, inputs.INPUTS)
        cases.check_backend(self.backend)
        for name in ("scale", "budget", "case_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_device(self.device)

    def params(self, units: int, batch: int) -> dict[str, Any]:
        """The parameters that identify a point, as its records have them."""
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
    """Every N at every B, as (N, B). If neither is given: `default`; if only one is: B = 1, or the N of `default`."""
    if not hidden and not batches:
        return tuple(default)
    return tuple((n, b) for b in batches or (1,) for n in hidden or dict.fromkeys(n for n, _ in default))


class _Process:
    """A process that measures one point after the other. If it dies, a new one is started for the next point.

    Leaving the context ends it.
    """

    def __init__(self, start: Callable[[], Executor]) -> None:
        self._start = start
        self._executor: Executor | None = None

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Call the function in the process. Raises what it raises, or BrokenExecutor if the process dies."""
        if self._executor is None:
            self._executor = self._start().__enter__()
        try:
            return self._executor.submit(function, *arguments).result()
        except BrokenExecutor as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *exception: Any) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.__exit__(*exception)


def own_process() -> Executor:
    """Start a new process, with this one's number of threads."""
    return Workers(1, torch.set_num_threads, [torch.get_num_threads()])


def sweep(
    settings: Settings,
    path: Path,
    on_point: Callable[[str], None] = lambda point: None,
    on_record: Callable[[Record], None] = lambda made: None,
    start: Callable[[], Executor] = own_process,
) -> int:
    """Measure what the file at `path` lacks, and append the records to it; returns how many were already complete.

    A measurement ("ok") in the file under the same key is kept if it has as many passes; one with fewer passes, by the
    same revision, is continued. A case that ran out of memory or of its budget, or failed, is tried again. The last
    record of a key counts. start: makes the process of each pass.
    """
    device, dtype = torch.device(settings.device), cases.DTYPES[settings.dtype]
    shared = record.started("scaling", device)
    found = {record.key(r): r for r in record.load(path)} if path.exists() else {}
    common = {at: {**shared, "params": settings.params(*at)} for at in settings.points}
    made: dict[tuple[int, int], dict[str, Record]] = {at: {} for at in settings.points}
    kept = 0
    for at in settings.points:
        for name in settings.algorithms:
            earlier = found.get(record.key(Record(algorithm=name, status="ok", time="", **common[at])))
            whole = _passes(earlier) >= settings.passes
            kept += whole
            if earlier is not None and (whole or (_passes(earlier) and earlier.git == shared["git"])):
                made[at][name] = earlier
    rate = None
    for number in range(settings.passes):
        with _Process(start) as process:
            for at in settings.points:
                on_point(f"N={at[0]} B={at[1]}, pass {number + 1}")
                due = {
                    name: name in made[at]
                    for name in settings.algorithms
                    if name not in made[at]
                    or (made[at][name].status == "ok" and _passes(made[at][name]) == number)
                }
                if not due:
                    continue
                try:
                    rate = rate or process.call(measure.flop_rate, device, dtype)
                    results = process.call(measure_point, settings, *at, due, rate)
                except BrokenExecutor:
                    message = "the process that measured this point died; did the system run out of memory?"
                    results = {name: {"status": "error", "message": message} for name in due}
                for name, result in results.items():
                    new = Record(algorithm=name, time=record.now(), **common[at], **result)
                    made[at][name] = _after(made[at].get(name), new)
                    record.append(path, made[at][name])
                    on_record(made[at][name])
    return kept


def _after(before: Record | None, new: Record) -> Record:
    """A case's record after one more pass: joined with the passes before, if both they and this one have times."""
    if before is None or before.timing is None or new.timing is None:
        return new
    return replace(before, timing=measure.pooled(before.timing, new.timing), time=new.time, run=new.run)


def _passes(made: Record | None) -> int:
    """In how many passes a record's samples were taken; 0 if it isn't a measurement with samples."""
    return len(made.timing.samples) if made is not None and made.status == "ok" and made.timing else 0


def measure_point(
    settings: Settings, units: int, batch: int, known: dict[str, bool], rate: float
) -> dict[str, dict[str, Any]]:
    """One pass at one point: check (if due) and time the cases; the fields of each one's record, "status" among them.

    known: the names of the cases, with whether an earlier pass has checked each and measured its peak.
    """
    device, dtype = torch.device(settings.device), cases.DTYPES[settings.dtype]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    size = Size(units, batch, settings.steps, settings.chunk, dtype.itemsize)
    results: dict[str, dict[str, Any]] = {}
    shared: Problem | None = None
    built: dict[str, Case] = {}
    for name, checked in known.items():
        case = CASES[name]
        predicted = cases.predicted_seconds(case, size, rate)
        found: dict[str, Any] = {
            "state_bytes": case.state_bytes(size),
            "predicted_peak_bytes": case.peak_bytes(size),
            "predicted_seconds": predicted,
        }
        results[name] = found
        try:
            if not checked:
                found["payload"] = _counted(case, size, device)
        except Exception as error:
            found["status"], found["message"] = failure(error)
            continue
        runs = RUNS_BEFORE + settings.passes * (1 + measure.least_rounds(settings.passes))
        refusal = refused(case, size, predicted, runs, settings.budget, measure.available_bytes(device))
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
            built[name] = case(shared) if checked else _prepare(case, shared, device, found)
        except Exception as error:
            found["status"], found["message"] = failure(error)

    timings = measure.interleave(
        {name: case.run for name, case in built.items()},
        device,
        case_seconds=settings.case_seconds,
        passes=settings.passes,
    )
    for name, timing in timings.items():
        found = results[name]
        if isinstance(timing, Exception):
            found["status"], found["message"] = failure(timing)
        else:
            made = built[name]
            found.update(status="ok", timing=timing.per(made.covers))
            if made.backend is not None:
                found["backend"] = made.backend  # once more, since a kernel may have failed meanwhile
    return results


def _counted(case: type[Case], size: Size, device: torch.device) -> dict[str, Any]:
    """A record's payload: "flop" and "bytes" of a step, as counted, and "levels", bytes of each cache."""
    work = count(case, size)
    counted = {} if work is None else {"flop": work.flop, "bytes": work.bytes}
    return {**counted, "levels": measure.cache_levels(device, torch.get_num_threads())}


def refused(
    case: type[Case], size: Size, predicted: float, runs: int, budget: float, available: int | None
) -> tuple[str, str] | None:
    """("oom" or "over_budget", why) if `runs` runs of a case are predicted not to fit; None if it may be tried."""
    needs = case.peak_bytes(size)
    if available is not None and needs > MEMORY_SHARE * available:
        return "oom", f"predicted: needs {bytes_text(needs)}, {bytes_text(available)} available"
    total = predicted * runs
    if total > budget:
        return "over_budget", (
            f"predicted: {seconds_text(predicted)} a step and {total:.0f} s in all, budget {budget:g} s"
        )
    return None


def _prepare(case: type[Case], shared: Problem, device: torch.device, found: dict[str, Any]) -> Case:
    """Check a case, measure its peak, and build it; adds to `found`. Raises ArithmeticError for a wrong gradient."""
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


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`sweep` with progress on `console`; returns the file's records of these settings."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("scaling", total=len(settings.points) * settings.passes)
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
