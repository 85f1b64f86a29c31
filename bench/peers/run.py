"""The comparison with peers: each is checked in a process of its own, then timed in turn with all others of its task.

The workers of a point are alive at the same time and only one runs at a time, so disturbances of the machine affect all
alike, and a ratio compares samples of the same rounds. One record for each peer is appended when its point is done. A
peer that can't be run, fails, hangs or gives a wrong gradient gets a record as well.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import _checks as check
from ... import _processes
from ..harness import inputs, measure, record
from ..harness.device import check_device
from ..harness.record import Record
from ..harness.statistics import bootstrap, ratio_of_medians
from ..harness.tables import place, seconds_text
from ..harness.worker import Worker, WorkerFailed, environment, pinned
from ..scaling import cases
from . import tasks
from .registry import DEFAULT, PEERS, Peer
from .tasks import TASKS

FILE = "peers.jsonl"
DTYPE = "float32"
WORKER = (sys.executable, "-m", f"{__package__}.worker")


@dataclass(frozen=True)
class Settings:
    """What is compared, and where.

    threads         CPU threads of each worker, which may use as many processors
    rounds          samples of each peer
    sample_seconds  the least seconds of a sample
    limit           seconds that a worker may take for its first gradients, compilation included, and for any sample
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    peers: tuple[str, ...] = DEFAULT
    hidden: tuple[int, ...] = (64, 256)
    batches: tuple[int, ...] = (1,)
    steps: int = 50
    threads: int = 1
    device: str = "cpu"
    input: str = "photo"
    scale: float = 0.1
    seed: int = 0
    rounds: int = 25
    sample_seconds: float = 0.02
    limit: float = 300.0

    def __post_init__(self) -> None:
        for name, chosen, known in (("tasks", self.tasks, TASKS), ("peers", self.peers, PEERS)):
            if not chosen:
                raise ValueError(f"{name} must name at least one of {', '.join(known)}")
            for one in chosen:
                check.one_of(name, one, known)
        if not any(task in PEERS[peer].tasks for task in self.tasks for peer in self.peers):
            raise ValueError(
                f"peers must serve a task of {', '.join(self.tasks)}; {', '.join(self.peers)} serve "
                f"{', '.join(dict.fromkeys(t for p in self.peers for t in PEERS[p].tasks))}"
            )
        for name, sizes in (("hidden", self.hidden), ("batch", self.batches)):
            if not sizes:
                raise ValueError(f"{name} must name at least one size")
            for size in sizes:
                check.integer(name, size, 1)
        check.integer("steps", self.steps, 2)
        check.integer("threads", self.threads, 1)
        check.integer("rounds", self.rounds, 2)
        check.one_of("input", self.input, inputs.INPUTS)
        for name in ("scale", "sample_seconds", "limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_device(self.device)

    def points(self) -> Iterator[tuple[str, int, int]]:
        """Every (task, N, B)."""
        return ((t, n, b) for t in self.tasks for b in self.batches for n in self.hidden)

    def params(self, task: str, units: int, batch: int) -> dict[str, Any]:
        """The parameters that identify a point, as its records have them."""
        return {
            "task": task,
            "N": units,
            "B": batch,
            "T": self.steps,
            "dtype": DTYPE,
            "device": torch.device(self.device).type,
            "input": self.input,
            "scale": self.scale,
            "seed": self.seed,
            "threads": self.threads,
        }


# --- one point ---------------------------------------------------------------------------------------------


def ratio(samples: Sequence[float], of_ours: Sequence[float]) -> list[float]:
    """The ratio of two medians and its 95 % bootstrap interval: [value, low, high]. It resamples whole rounds."""
    return [ratio_of_medians(samples, of_ours).item(), *bootstrap(ratio_of_medians, samples, of_ours)]


class Point:
    """The peers of one task at one size. They are started one after the other, then sampled in turn."""

    def __init__(
        self, settings: Settings, task: str, units: int, batch: int, peers: Mapping[str, Peer], folder: Path
    ) -> None:
        self.settings, self.task, self.peers, self.folder = settings, task, peers, folder
        self.arrays = tasks.problem(
            task, units, batch, settings.steps, kind=settings.input, scale=settings.scale, seed=settings.seed
        )
        np.savez(folder / "problem.npz", **self.arrays)  # type: ignore[arg-type] # as in worker.py
        self.references: dict[str, dict[str, np.ndarray]] = {}
        self.cpus = pinned(settings.threads)
        self.found: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, list[float]] = {}

    def measure(self, command: Sequence[str] = WORKER) -> dict[str, dict[str, Any]]:
        """Start, check and time the peers; the fields of each one's record, by name."""
        with _processes.ending_on_signals(), contextlib.ExitStack() as workers:
            started: dict[str, Worker] = {}
            for name in self.peers:
                worker = Worker(
                    command,
                    environment(self.settings.threads, self.settings.device),
                    self.cpus,
                    self.folder / f"{name}.log",
                )
                workers.callback(worker.close)
                with self.failing(name, worker):
                    self.prepare(name, worker)
                    started[name] = worker
            for turn in range(self.settings.rounds):
                names = list(started)
                first = turn % max(1, len(names))  # so that no peer always follows the same one
                for name in names[first:] + names[:first]:
                    with self.failing(name, started[name], started):
                        asked = {"calls": self.found[name]["payload"]["calls"]}
                        took = started[name].ask(asked, self.settings.limit)["seconds"]
                        self.samples.setdefault(name, []).append(took)
        for name in started:
            self.summarise(name, [other for other in TASKS[self.task].ours if other in started])
        return self.found

    @contextlib.contextmanager
    def failing(self, name: str, worker: Worker, started: dict[str, Worker] | None = None) -> Iterator[None]:
        """If something goes wrong with one peer, end its worker, and keep the message for its record."""
        try:
            yield
        except (WorkerFailed, ArithmeticError, ValueError, KeyError, OSError) as error:
            worker.close()
            message = (
                str(error)
                if isinstance(error, (WorkerFailed, ArithmeticError))
                else f"{type(error).__name__}: {error}"
            )
            oom = isinstance(error, WorkerFailed) and error.oom
            self.found.setdefault(name, {}).update(status="oom" if oom else "error", message=message)
            if started is not None:
                del started[name]

    def prepare(self, name: str, worker: Worker) -> None:
        """Have a worker build a peer, check its gradients, warm it up. Raises ArithmeticError for wrong gradients."""
        peer, limit = self.peers[name], self.settings.limit
        gradient = peer.tasks[self.task]
        answers = self.folder / f"{name}.npz"
        payload: dict[str, Any] = {"gradient": gradient, "packages": peer.versions()}
        self.found[name] = {"payload": payload}
        job = {
            "module": peer.module,
            "runner": peer.runner,
            "task": self.task,
            "device": self.settings.device,
            "threads": self.settings.threads,
            "problem": str(self.folder / "problem.npz"),
            "gradients": str(answers),
        }
        about = worker.ask(job, limit)
        payload.update({key: about[key] for key in ("first_seconds", "covers", "torch_threads", "cpus")})
        self.found[name]["backend"] = about["note"]
        if peer.compiles:
            self.found[name]["compile_seconds"] = about["first_seconds"]
        if gradient not in self.references:
            self.references[gradient] = tasks.oracle(self.task, self.arrays, gradient)
        with np.load(answers) as got:
            error, where = tasks.difference(dict(got), self.references[gradient])
        tolerance = cases.TOLERANCE[cases.DTYPES[DTYPE]]
        if not error <= tolerance:
            raise ArithmeticError(
                f"gradient of {where} differs from {gradient}'s in float64 by {error:.1e} relative "
                f"(tolerance {tolerance:.0e})"
            )
        payload["error"] = error
        payload["calls"] = worker.ask({"warm": self.settings.sample_seconds}, limit)["calls"]

    def summarise(self, name: str, ours: Sequence[str]) -> None:
        """Add to a peer's record its timing, seconds a time step, and ratios to this package's ways (`ours`)."""
        timing = measure.timing(self.samples[name])
        payload = self.found[name]["payload"]
        payload.update(
            samples=self.samples[name],
            step_seconds=timing.median / payload["covers"],
            ratios={other: ratio(self.samples[name], self.samples[other]) for other in ours if other != name},
        )
        self.found[name].update(status="ok", timing=timing)


# --- all points --------------------------------------------------------------------------------------------


def run(
    settings: Settings,
    path: Path,
    on_point: Callable[[str], None] = lambda point: None,
    on_record: Callable[[Record], None] = lambda made: None,
    peers: Mapping[str, Peer] = PEERS,
    command: Sequence[str] = WORKER,
) -> list[Record]:
    """Measure what the file at `path` lacks, append it there, and return the file's records of these settings.

    A measurement ("ok") under the same key, with the same versions of the peer's packages, is kept. If anything is
    measured at a point, this package's own ways are measured with it, since ratios are within one run. peers may
    replace those that the settings name, and command the worker's.
    """
    shared = record.started("peers", torch.device(settings.device))
    earlier = record.latest(record.load(path)) if path.exists() else []
    known = {record.key(r): r for r in earlier}
    shown = []
    for task, units, batch in settings.points():
        params = settings.params(task, units, batch)
        results: dict[str, dict[str, Any]] = {}
        lacking = []
        together = [n for n in dict.fromkeys((*TASKS[task].ours, *settings.peers)) if task in peers[n].tasks]
        for name in together:
            key = record.key(Record(algorithm=name, params=params, status="ok", time="", **shared))
            shown.append(key)
            if name not in settings.peers:
                continue
            found, why = known.get(key), peers[name].missing(settings.device)
            if found is not None and found.status == "ok":
                if found.payload.get("packages") != peers[name].versions() and why is None:
                    lacking.append(name)
            elif why is None:
                lacking.append(name)
            elif found is None or (found.status, found.message) != ("missing", why):
                gradient = peers[name].tasks[task]
                results[name] = {"status": "missing", "message": why, "payload": {"gradient": gradient}}
        if lacking:
            on_point(f"{task} N={units} B={batch}")
            chosen = {n: peers[n] for n in together if n in lacking or n in TASKS[task].ours}
            with tempfile.TemporaryDirectory(prefix="rjepa-peers-") as folder:
                results.update(Point(settings, task, units, batch, chosen, Path(folder)).measure(command))
        for name in (n for n in together if n in results):
            made = Record(algorithm=name, params=params, time=record.now(), **shared, **results[name])
            record.append(path, made)
            on_record(made)
    latest = {record.key(r): r for r in record.load(path)} if path.exists() else {}
    return [latest[key] for key in shown if key in latest]


def report(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`run` with progress on `console`."""

    def on_record(made: Record) -> None:
        if made.status != "ok":
            console.print(
                f"{place(made)}: {made.status}: {made.message}", highlight=False, markup=False, soft_wrap=True
            )

    return run(settings, path, lambda point: console.print(f"peers {point}", highlight=False), on_record)


# --- tables ------------------------------------------------------------------------------------------------


def _ratio_cell(made: Record, other: str) -> str:
    if made.algorithm == other and made.timing is not None:
        return "1"
    found = made.payload.get("ratios", {}).get(other)
    return "" if found is None else "{:.2f} ({:.2f}–{:.2f})".format(*found)


def table(records: Sequence[Record]) -> Table:
    """A table of one task's peers at all sizes: times, ratios to ours with intervals, kind of gradient, its error."""
    p = records[0].params
    task = TASKS[p["task"]]
    title = f"{p['task']}: {task.title}; T = {p['T']}, {p['device']}, threads: {p['threads']}" + (
        "" if task.network != "rgc" else f", W ~ {p['scale']:g}/√N"
    )
    out = Table(title=title)
    headings = (
        "N",
        "B",
        "peer",
        "gradient",
        "time",
        "95 %",
        *(f"/ {name}" for name in task.ours),
        "first",
        "error",
    )
    for heading in (*headings, "note"):
        out.add_column(heading, justify="left" if heading in ("peer", "gradient", "note") else "right")
    for r in sorted(records, key=lambda r: (r.params["B"], r.params["N"])):
        time, interval = r.status, ""
        if r.timing is not None:
            time = seconds_text(r.timing.median)
            if r.timing.low is not None and r.timing.high is not None:
                interval = f"{seconds_text(r.timing.low)}–{seconds_text(r.timing.high)}"
        first, error = r.payload.get("first_seconds"), r.payload.get("error")
        out.add_row(
            str(r.params["N"]),
            str(r.params["B"]),
            r.algorithm,
            str(r.payload.get("gradient", "")),
            time,
            interval,
            *(_ratio_cell(r, name) for name in task.ours),
            "" if first is None else seconds_text(first),
            "" if error is None else f"{error:.0e}",
            Text(
                r.message if r.status != "ok" else ""
            ),  # as Text, since rich would take its brackets for markup
        )
    return out


def tables(records: Sequence[Record]) -> list[Table]:
    """A table for each task, T and number of threads."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        if r.benchmark == "peers":
            found.setdefault(tuple(r.params[name] for name in ("task", "T", "threads")), []).append(r)
    return [table(mine) for mine in found.values()]
