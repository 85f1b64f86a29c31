"""What each learning rule learns online on three streams, with the same network and optimizer for all rules, over
seeds.

For each seed, every rule starts from the same weights and sees the same stream. Adam's learning rate is chosen for each
rule and task from a small grid, on separate seeds, in half as many steps. Rules that work in chunks change their
weights every C steps, the others every step; curves are against steps of the stream.

A loss above `CAP` times chance counts as `CAP` times chance wherever losses are compared, tabled or drawn, and so do a
loss that is not finite and all later ones of its run. Otherwise one run that blows up would decide the mean over seeds.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from ... import _checks as check
from ..._processes import Workers
from ...layers.layer import TwoPointRNN
from ...layers.named import GRU, LSTM, RGC
from ...online.learner import OnlineLearner
from ...online.streams import Stream
from ...rules.refine import Divergence
from ..harness import record
from ..harness.measure import timing
from ..harness.record import Record
from ..harness.statistics import interval
from ..harness.tables import place
from .tasks import TASKS
from .tasks import Stream as Data

FILE = "learn.jsonl"
CELLS: dict[str, Callable[..., TwoPointRNN]] = {"LSTM": LSTM, "GRU": GRU, "RGC": RGC}
CELL_OF = {"recall": "LSTM", "adding": "GRU", "lorenz": "RGC"}
HEADS = 4
LEARNING_RATES = (0.003, 0.01, 0.03)
CLIP = 1.0  # the gradient's largest norm, all parameters together
TUNING_SEEDS = (100, 101)
# A run is divided into WINDOWS windows, and its curve is the mean loss in each. A tuning run has the first half of
# them. The final loss is the mean over the LAST windows.
WINDOWS, TUNING_WINDOWS, LAST = 20, 10, 4
CAP = 2.0
# The rule with which the table compares the others.
BASELINE = "rfp"


@dataclass(frozen=True)
class Rule:
    """A learning rule: its name in plots, options of the learner, whether it takes chunks, and whether heads."""

    label: str
    options: dict[str, Any]
    chunked: bool = False
    heads: bool = False

    @property
    def streams(self) -> bool:
        """Whether a `Stream` runs it as compiled code, where there is a compiler."""
        return not self.chunked and self.options.get("learning") != "uoro"


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

    steps: T of the stream, a multiple of WINDOWS · chunk such that every window has a scored step. jobs: how many
    processes, each with one thread.
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
        """A run of these sizes; of half the length if `tuning`."""
        window = self.steps // WINDOWS
        windows = TUNING_WINDOWS if tuning else WINDOWS
        chunk = self.chunk if RULES[rule].chunked else 1
        return Run(task, rule, seed, rate, window, windows, self.hidden, self.batch, chunk)


@dataclass(frozen=True)
class Run:
    """One training run: everything that it depends on."""

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
        """The parameters of its record. "stage" tells the runs that choose a learning rate from those that count."""
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
    """Draw a layer. With heads > 1 its recurrent weights are the diagonal blocks of those of the dense layer."""
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
    """Do one run on one thread; returns the fields of its record.

    Its payload has
        curve        the mean loss over the scored steps in each window
        final        the mean of the last `LAST` windows
        updates      how often the weights changed
        fallbacks    how often refinement diverged, so that the exact credit was used
        cpu_seconds  of the whole run
    A run whose loss is not finite ends there, with status "error" and the curve so far.
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


def _curve(
    run: Run, *, by_stream: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[float], int]:
    """The mean loss and the seconds of each window, up to the first that is not finite; and bytes of learning state.

    by_stream: whether a `Stream` runs the rules that it can.
    """
    task, rule = TASKS[run.task], RULES[run.rule]
    data = task.make(run.window * run.windows, run.batch, run.seed)
    target = data.target.to(dtype) if data.target.is_floating_point() else data.target
    data = Data(data.x.to(dtype), target, data.scored)
    model = layer(CELL_OF[run.task], task.features, run.hidden, HEADS if rule.heads else 1, run.seed).to(
        dtype
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed + 1)
        readout = nn.Linear(run.hidden, task.outputs).to(dtype)
    parameters = [*model.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=run.rate, fused=True)
    way = _by_stream if by_stream and rule.streams else _by_learner
    learn_window, learner = way(run, model, readout, optimizer)
    curve: list[float] = []
    seconds: list[float] = []
    for first in range(0, len(data.x), run.window):
        begin, now = time.perf_counter(), slice(first, first + run.window)
        total = learn_window(data, now)
        seconds.append(time.perf_counter() - begin)
        curve.append(total / int(data.scored[now].sum()))
        if not math.isfinite(curve[-1]):
            break
    return curve, seconds, learner.nbytes


# Learns from the steps of a window, and returns the sum of their losses over scored steps and rows.
Window: TypeAlias = Callable[[Data, slice], float]


def _by_learner(
    run: Run, model: TwoPointRNN, readout: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Window, OnlineLearner]:
    """An `OnlineLearner`, step by step or chunk by chunk."""
    task, rule = TASKS[run.task], RULES[run.rule]
    learner = OnlineLearner(model, run.batch, update_every=run.chunk, seed=run.seed, **rule.options)
    parameters = [*model.parameters(), *readout.parameters()]

    def window(data: Data, steps: slice) -> float:
        total = torch.zeros((), dtype=data.x.dtype)
        for t in range(steps.start, steps.stop, run.chunk):
            now = slice(t, t + run.chunk)
            shown = learner.chunk(data.x[now]) if rule.chunked else learner.step(data.x[t])[None]
            loss = (task.losses(readout(shown), data.target[now]) * data.scored[now]).sum()
            (loss / (run.batch * run.chunk)).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return float(total)

    return window, learner


def _by_stream(
    run: Run, model: TwoPointRNN, readout: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Window, OnlineLearner]:
    """A `Stream`, a window in one call."""
    task, rule = TASKS[run.task], RULES[run.rule]
    symbols = task.loss == "cross-entropy"
    made = Stream(
        model,
        readout,
        run.batch,
        loss="cross_entropy" if symbols else "mse",
        optimizer=optimizer,
        learning=rule.options.get("learning"),
        clip_norm=CLIP,
        mean="all",
        nonfinite="continue",
    )

    def window(data: Data, steps: slice) -> float:
        target = data.target[steps]
        result = made.run(data.x[steps], target if symbols else target[..., None], mask=data.scored[steps])
        return float(result.losses.double().sum()) * run.batch

    return window, made.learner


def measure(
    settings: Settings,
    path: Path,
    on_record: Callable[[Record, int, int], None] = lambda made, done, of: None,
) -> tuple[list[Record], int]:
    """Do the runs that the file at `path` lacks, and append a record of each as it ends.

    The runs that choose learning rates come first, then those that count. on_record is given each record, how many runs
    are done, and how many there are. Returns the records of the runs that count, and how many runs were in the file
    before.
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
    """Give a function that does runs and yields (run, fields of its record) as each ends; in this process for 1 job."""
    if jobs == 1:
        yield lambda runs: ((run, train(run)) for run in runs)
        return
    with Workers(jobs) as pool:

        def results(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
            futures = {pool.submit(train, run): run for run in runs}
            for future in as_completed(futures):
                yield futures[future], future.result()

        yield results


def chosen_rate(records: Sequence[Record]) -> float:
    """The learning rate with the least mean final loss over the tuning seeds; of several such, the least rate."""
    by_rate: dict[float, list[float]] = {}
    for r in records:
        by_rate.setdefault(r.params["lr"], []).append(final(r))
    return min(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate]))


def final(made: Record) -> float:
    """The final loss of a run, at most `CAP` times chance."""
    cap = CAP * TASKS[made.params["task"]].chance
    return min(made.payload.get("final", cap), cap)


def blew_up(made: Record) -> bool:
    """Whether the final loss of a run is at least `CAP` times chance, or not finite."""
    return final(made) >= CAP * TASKS[made.params["task"]].chance


def curve(made: Record) -> np.ndarray:
    """The loss of each window, at most `CAP` times chance; exactly that from the first one that was not finite."""
    cap = CAP * TASKS[made.params["task"]].chance
    out = np.full(made.params["T"] // made.params["window"], cap)
    out[: len(made.payload["curve"])] = made.payload["curve"]
    return np.minimum(out, cap)


def default_jobs() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tables(records: Sequence[Record]) -> list[Table]:
    """A table for each task: final losses with intervals over seeds, and their differences from RFP's by seed."""
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
    """The cells of a row: C, learning rate, final loss, its difference from the baseline by seed, runs that blew up."""
    first = next(iter(runs.values()))
    losses = {seed: final(r) for seed, r in runs.items()}
    against = ""
    if baseline.keys() == runs.keys():
        change, width = interval([losses[seed] - final(r) for seed, r in baseline.items()])
        against = f"{change:+.4f} ± {width:.4f}"
    return [
        str(first.params["C"]),
        f"{first.params['lr']:g}",
        "{:.4f} ± {:.4f}".format(*interval(list(losses.values()))),
        against,
        str(sum(map(blew_up, runs.values())) or ""),
    ]


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`measure` with progress on `console`; returns the records of the runs that count."""
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
