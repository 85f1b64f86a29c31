"""What the learning rules learn online: three streams, one network and one optimiser for all rules, seeds.

Every rule starts from the same weights and sees the same stream, seed by seed. Adam's learning rate is chosen for
each rule and task from one small grid, on seeds of its own, in half as many steps. Rules that work in chunks change
their weights every C steps, the others every step; curves are against steps of the stream.

A loss above `CAP` times chance counts as that, in whatever is chosen, tabled or drawn, and so do losses that are not
finite and those after them: a mean over seeds would otherwise be that of the one that blew up.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from ... import _checks as check
from ...layers.layer import TwoPointRNN
from ...layers.named import GRU, LSTM, RGC
from ...online.learner import OnlineLearner
from ...rules.refine import Divergence
from ..harness import record
from ..harness import statistics as fit
from ..harness.measure import timing
from ..harness.record import Record
from ..harness.tables import place
from .tasks import TASKS

FILE = "learn.jsonl"
CELLS: dict[str, Callable[..., TwoPointRNN]] = {"LSTM": LSTM, "GRU": GRU, "RGC": RGC}
CELL_OF = {"recall": "LSTM", "adding": "GRU", "lorenz": "RGC"}
HEADS = 4
LEARNING_RATES = (0.003, 0.01, 0.03)
CLIP = 1.0  # the gradient's largest norm, all parameters together
TUNING_SEEDS = (100, 101)
# A run's losses are means over so many windows; a tuning run is the first half. The final loss is that of the
# last windows.
WINDOWS, TUNING_WINDOWS, LAST = 20, 10, 4
CAP = 2.0
# What the table compares with.
BASELINE = "rfp"


@dataclass(frozen=True)
class Rule:
    """A learning rule: its name in plots, the learner's options, and whether it takes chunks, and heads."""

    label: str
    options: dict[str, Any]
    chunked: bool = False
    heads: bool = False


RULES = {
    "rtrl": Rule("RTRL, exact", {"learning": "rtrl"}),
    "rtrl-heads": Rule("RTRL, exact, heads", {"learning": "rtrl"}, heads=True),
    "rfp": Rule("RFP", {"form": "step"}),
    "rfp-chunk": Rule("RFP, chunks", {"form": "chunk"}, chunked=True),
    "carry": Rule("carry, chunks", {"credit": "carry"}, chunked=True),
    "refine-2": Rule("refine = 2, chunks", {"refine": 2}, chunked=True),
    "tbptt": Rule("truncated BPTT, chunks", {"learning": "tbptt"}, chunked=True),
    "eprop": Rule("e-prop", {"learning": "eprop", "form": "step"}),
    "rflo": Rule("RFLO's trace", {"learning": "rflo", "form": "step"}),
    "snap0": Rule("SnAp-0, no trace", {"learning": "snap0", "form": "step"}),
    "uoro": Rule("UORO", {"learning": "uoro"}),
}


@dataclass(frozen=True)
class Settings:
    """Which tasks and rules, how many seeds, and the sizes that all runs share.

    steps: T of the stream, a multiple of WINDOWS · chunk, with a scored step in every window. jobs: processes, each of
    one thread.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    rules: tuple[str, ...] = tuple(RULES)
    seeds: int = 5
    steps: int = 1600
    hidden: int = 16
    batch: int = 8
    chunk: int = 4
    jobs: int = 2

    def __post_init__(self) -> None:
        for what, names, known in (("task", self.tasks, tuple(TASKS)), ("rule", self.rules, tuple(RULES))):
            if not names:
                raise ValueError(f"{what}s must name at least one of {', '.join(known)}")
            for name in names:
                check.one_of(what, name, known)
        for what in ("steps", "hidden", "batch", "jobs"):
            check.integer(what, getattr(self, what), 1)
        check.integer("chunk", self.chunk, 2)
        check.integer("seeds", self.seeds, 2)
        if self.seeds > TUNING_SEEDS[0]:
            raise ValueError(f"seeds must be at most {TUNING_SEEDS[0]}, got {self.seeds}")
        if self.steps % (WINDOWS * self.chunk):
            raise ValueError(
                f"steps must be a multiple of {WINDOWS} windows × {self.chunk} steps a chunk, "
                f"{WINDOWS * self.chunk}, got {self.steps}"
            )
        least = max(WINDOWS * TASKS[task].period for task in self.tasks)
        if self.steps < least:
            raise ValueError(
                f"steps must be at least {least}, {WINDOWS} windows in which something is scored, got {self.steps}"
            )
        if self.hidden % HEADS:
            raise ValueError(f"hidden must be a multiple of {HEADS} heads, got {self.hidden}")

    def run(self, task: str, rule: str, seed: int, rate: float, *, tuning: bool) -> Run:
        """One run of these sizes."""
        window = self.steps // WINDOWS
        windows = TUNING_WINDOWS if tuning else WINDOWS
        chunk = self.chunk if RULES[rule].chunked else 1
        return Run(task, rule, seed, rate, window, windows, self.hidden, self.batch, chunk)


@dataclass(frozen=True)
class Run:
    """One training run: what identifies its record, and all that it takes to make it."""

    task: str
    rule: str
    seed: int
    rate: float
    window: int
    windows: int
    hidden: int
    batch: int
    chunk: int

    @property
    def params(self) -> dict[str, Any]:
        """As recorded. "stage" tells the runs that chose a learning rate from those that count."""
        return {
            "task": self.task,
            "cell": CELL_OF[self.task],
            "N": self.hidden,
            "B": self.batch,
            "C": self.chunk,
            "T": self.window * self.windows,
            "heads": HEADS if RULES[self.rule].heads else 1,
            "stage": "tuning" if self.seed in TUNING_SEEDS else "learning",
            "seed": self.seed,
            "lr": self.rate,
            "window": self.window,
            "optimizer": f"Adam, gradient norm up to {CLIP:g}",
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        }


def layer(cell: str, features: int, units: int, heads: int, seed: int) -> TwoPointRNN:
    """A layer drawn from `seed`. With heads > 1, the diagonal blocks of the dense layer's recurrent weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = CELLS[cell](hidden_size=units, input_size=features)
        if heads == 1:
            return dense
        blocks = CELLS[cell](hidden_size=units, input_size=features, heads=heads)
    size = units // heads
    with torch.no_grad():
        for target, source in zip(blocks.weights(), dense.weights(), strict=True):
            if target.dim() == 3:
                target.copy_(torch.stack([source[i : i + size, i : i + size] for i in range(0, units, size)]))
            else:
                target.copy_(source)
    return blocks


def train(run: Run) -> dict[str, Any]:
    """Do one run, on one thread; what was found, as fields of its record.

    payload: curve, the mean loss over what is scored in each window; final, that of the last `LAST` windows;
    updates, how often the weights changed; fallbacks, how often refinement gave way to the exact credit;
    cpu_seconds, of all of it. A run whose loss is not finite ends there, with status "error" and the curve so far.
    """
    begin, threads = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Divergence)
            curve, seconds, state_bytes = _curve(run)
            fallbacks = sum(issubclass(warning.category, Divergence) for warning in caught)
    finally:
        torch.set_num_threads(threads)
    payload: dict[str, Any] = {
        "curve": [float(f"{value:.5g}") for value in curve if math.isfinite(value)],
        "cpu_seconds": round(time.process_time() - begin, 3),
        "fallbacks": fallbacks,
        "updates": len(curve) * run.window // run.chunk,
    }
    if not math.isfinite(curve[-1]):
        reason = f"the loss is not finite in the {run.window} steps to {len(curve) * run.window}"
        return {"status": "error", "message": reason, "payload": payload}
    return {
        "status": "ok",
        "timing": timing(seconds).per(run.window),
        "state_bytes": state_bytes,
        "payload": {**payload, "final": float(f"{statistics.fmean(curve[-LAST:]):.5g}")},
    }


def _curve(run: Run) -> tuple[list[float], list[float], int]:
    """Mean loss and seconds of each window, up to the first whose loss is not finite; bytes of learning state."""
    task, rule = TASKS[run.task], RULES[run.rule]
    stream = task.make(run.window * run.windows, run.batch, run.seed)
    scored = stream.scored.float()
    model = layer(CELL_OF[run.task], task.features, run.hidden, HEADS if rule.heads else 1, run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed + 1)
        readout = nn.Linear(run.hidden, task.outputs)
    learner = OnlineLearner(model, run.batch, update_every=run.chunk, seed=run.seed, **rule.options)
    parameters = [*model.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=run.rate, fused=True)
    curve: list[float] = []
    seconds: list[float] = []
    for first in range(0, len(scored), run.window):
        begin, total = time.perf_counter(), torch.zeros(())
        for t in range(first, first + run.window, run.chunk):
            now = slice(t, t + run.chunk)
            shown = learner.chunk(stream.x[now]) if rule.chunked else learner.step(stream.x[t])[None]
            loss = (task.losses(readout(shown), stream.target[now]) * scored[now]).sum()
            (loss / (run.batch * run.chunk)).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        seconds.append(time.perf_counter() - begin)
        curve.append(float(total / scored[first : first + run.window].sum()))
        if not math.isfinite(curve[-1]):
            break
    return curve, seconds, learner.nbytes


def measure(
    settings: Settings,
    path: Path,
    on_record: Callable[[Record, int, int], None] = lambda made, done, of: None,
) -> tuple[list[Record], int]:
    """Do the runs that the file at `path` lacks, and append a record of each as it ends.

    First those that choose learning rates, then those that count. on_record is told the record, and how many of how
    many runs are done. Returns the records of the latter, and how many runs were kept from an earlier time.
    """
    common = record.started("learn", torch.device("cpu"))
    runs_each = len(TUNING_SEEDS) * len(LEARNING_RATES) + settings.seeds
    of = len(settings.tasks) * len(settings.rules) * runs_each
    kept = done = 0

    def blank(run: Run) -> Record:
        return Record(algorithm=run.rule, params=run.params, status="ok", time="", **common)

    tuning = [
        settings.run(task, rule, seed, rate, tuning=True)
        for task in settings.tasks
        for seed in TUNING_SEEDS
        for rule in settings.rules
        for rate in LEARNING_RATES
    ]
    with _workers(settings.jobs) as results:

        def make(runs: Sequence[Run]) -> dict[Run, Record]:
            nonlocal kept, done
            earlier = {record.key(r): r for r in record.load(path)} if path.exists() else {}
            keys = {run: record.key(blank(run)) for run in runs}
            found = {run: earlier[key] for run, key in keys.items() if key in earlier}
            kept, done = kept + len(found), done + len(found)
            for run, result in results([run for run in runs if run not in found]):
                made = Record(algorithm=run.rule, params=run.params, time=record.now(), **common, **result)
                record.append(path, made)
                found[run], done = made, done + 1
                on_record(made, done, of)
            return found

        tried: dict[tuple[str, str], list[Record]] = {}
        for run, made in make(tuning).items():
            tried.setdefault((run.task, run.rule), []).append(made)
        counted = [
            settings.run(task, rule, seed, chosen_rate(tried[task, rule]), tuning=False)
            for task in settings.tasks
            for seed in range(settings.seeds)
            for rule in settings.rules
        ]
        found = make(counted)
    return [found[run] for run in counted], kept


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[[Sequence[Run]], Iterator[tuple[Run, dict[str, Any]]]]]:
    """A function of runs that gives (run, what `train` found) as they end; in this process if jobs is 1."""
    if jobs == 1:
        yield lambda runs: ((run, train(run)) for run in runs)
        return
    # forked workers would share this process's OpenMP state, which may hang
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def results(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        futures = {pool.submit(train, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield results
    finally:
        pool.shutdown(cancel_futures=True)


def chosen_rate(records: Sequence[Record]) -> float:
    """The learning rate of the least mean final loss over the tuning seeds, the least rate of several such."""
    by_rate: dict[float, list[float]] = {}
    for r in records:
        by_rate.setdefault(r.params["lr"], []).append(final(r))
    return min(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate]))


def final(made: Record) -> float:
    """The final loss, `CAP` times chance at most."""
    cap = CAP * TASKS[made.params["task"]].chance
    return min(made.payload.get("final", cap), cap)


def blew_up(made: Record) -> bool:
    """Whether the final loss is `CAP` times chance or more, or not finite."""
    return final(made) >= CAP * TASKS[made.params["task"]].chance


def curve(made: Record) -> np.ndarray:
    """Loss of each window, `CAP` times chance at most, and that from where a run was not finite on."""
    cap = CAP * TASKS[made.params["task"]].chance
    out = np.full(made.params["T"] // made.params["window"], cap)
    out[: len(made.payload["curve"])] = made.payload["curve"]
    return np.minimum(out, cap)


def default_jobs() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tables(records: Sequence[Record]) -> list[Table]:
    """Per task: final losses with intervals over seeds, and differences from RFP's on the same seeds."""
    counted = [r for r in records if r.benchmark == "learn" and r.params["stage"] == "learning"]
    out = []
    for task in [name for name in TASKS if any(r.params["task"] == name for r in counted)]:
        mine = [r for r in counted if r.params["task"] == task]
        p = mine[0].params
        table = Table(
            title=f"{task}: {TASKS[task].loss}, {p['cell']}, N = {p['N']}, B = {p['B']}, "
            f"T = {max(r.params['T'] for r in mine)}, {len({r.params['seed'] for r in mine})} seeds"
        )
        for heading in ("rule", "C", "lr", "final loss", f"less {BASELINE}'s", "blown up"):
            table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
        by_seed = {rule: {r.params["seed"]: r for r in mine if r.algorithm == rule} for rule in RULES}
        for rule, runs in by_seed.items():
            if runs:
                table.add_row(rule, *_cells(runs, by_seed[BASELINE] if rule != BASELINE else {}))
        table.add_row("chance", "", "", f"{TASKS[task].chance:.4f}", "", "")
        table.add_row("best possible", "", "", f"{TASKS[task].best:.4f}", "", "")
        out.append(table)
    return out


def _cells(runs: dict[int, Record], baseline: dict[int, Record]) -> list[str]:
    """C, learning rate, final loss, its difference from the baseline on the same seeds, how many runs blew up."""
    first = next(iter(runs.values()))
    losses = {seed: final(r) for seed, r in runs.items()}
    against = ""
    if baseline.keys() == runs.keys():
        change, width = fit.interval([losses[seed] - final(r) for seed, r in baseline.items()])
        against = f"{change:+.4f} ± {width:.4f}"
    return [
        str(first.params["C"]),
        f"{first.params['lr']:g}",
        "{:.4f} ± {:.4f}".format(*fit.interval(list(losses.values()))),
        against,
        str(sum(map(blew_up, runs.values())) or ""),
    ]


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`measure` with progress on `console`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("learn", total=None)

        def on_record(made: Record, done: int, of: int) -> None:
            progress.update(bar, description=f"learn {place(made)}", completed=done, total=of)
            if made.status != "ok":
                progress.console.print(
                    f"{place(made)}: {made.status}: {made.message}", highlight=False, soft_wrap=True
                )

        records, kept = measure(settings, path, on_record)
        progress.update(bar, description="learn")
    if kept:
        console.print(f"kept {kept} runs made earlier; --fresh makes them again", highlight=False)
    return records
