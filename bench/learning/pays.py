"""Does Γ pay? What each rule from no trace to exact RTRL learns online, by task, cell, size and optimizer, over seeds.

Every network learns from one row of a stream, a step at a time, as networks of one `Stream`: Adam or RMSprop at every
step, a linear readout, the gradient's norm clipped. Rules start from the same weights and see the same streams, seed by
seed. The learning rate of each is the best of `RATES` by the mean final loss over seeds of their own, in half as many
steps. A step's loss is of the prediction made before its update; a final loss is the mean over the last fifth, and
counts as at most `CAP` times chance.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from ... import _checks as check
from ...layers.layer import TwoPointRNN
from ...layers.named import GRU, LSTM, RNN
from ...online.streams import Stream
from ..harness import record
from ..harness.record import Record
from ..harness.statistics import bootstrap, interval
from .probes import PROBES
from .tasks import Stream as Data

FILE = "pays.jsonl"
CELLS: dict[str, Callable[..., TwoPointRNN]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
OPTIMIZERS = ("adam", "rmsprop")
RATES = (0.0003, 0.001, 0.003, 0.01)
TUNING_SEEDS = (1000, 1001, 1002)
CLIP, CAP = 1.0, 2.0
WINDOWS = 20  # of a curve; the final loss is the mean of the last fifth of them
# Two rules are alike where the interval of their difference lies within this share of chance, to either side.
MARGIN = 0.02
SMALLEST_BLOCK = 16  # N / 16 units: what block-1/16 keeps of the Jacobian is 1/16 of it


@dataclass(frozen=True)
class Rule:
    """A rule: its name in tables, options of the `Stream` for N units, and the largest N that it is run at."""

    label: str
    options: Callable[[int], dict[str, Any]]
    largest: int | None = None


RULES = {
    "snap0": Rule("no trace (SnAp-0)", lambda n: {"learning": "snap0"}),
    "eprop": Rule("e-prop", lambda n: {"learning": "eprop"}),
    "rfp": Rule("RFP", lambda n: {"learning": "rfp"}),
    "block": Rule(
        "RTRL in blocks of N/16", lambda n: {"learning": "rtrl", "block": max(1, n // SMALLEST_BLOCK)}
    ),
    "rtrl": Rule("RTRL, exact", lambda n: {"learning": "rtrl"}, 32),
}


@dataclass(frozen=True)
class Settings:
    """What is run: names of tasks, cells, rules and optimizers, sizes N, T steps, and how many seeds."""

    tasks: tuple[str, ...] = tuple(PROBES)
    cells: tuple[str, ...] = ("RNN", "GRU")
    rules: tuple[str, ...] = tuple(RULES)
    optimizers: tuple[str, ...] = OPTIMIZERS
    hidden: tuple[int, ...] = (32,)
    steps: int = 20_000
    seeds: int = 10

    def __post_init__(self) -> None:
        for what, names, known in (
            ("task", self.tasks, PROBES),
            ("cell", self.cells, CELLS),
            ("rule", self.rules, RULES),
            ("optimizer", self.optimizers, OPTIMIZERS),
        ):
            if not names:
                raise ValueError(f"{what}s must name at least one of {', '.join(known)}")
            for name in names:
                check.one_of(what, name, tuple(known))
        if not self.hidden:
            raise ValueError("hidden must have at least one number of units")
        for units in self.hidden:
            if check.integer("hidden", units, 1) % SMALLEST_BLOCK:
                raise ValueError(f"hidden must be a multiple of {SMALLEST_BLOCK}, got {units}")
        check.integer("seeds", self.seeds, 2)
        if self.seeds > TUNING_SEEDS[0]:
            raise ValueError(f"seeds must be at most {TUNING_SEEDS[0]}, got {self.seeds}")
        least = 2 * WINDOWS * max(PROBES[task].period for task in self.tasks)
        if self.steps < least or self.steps % (2 * WINDOWS):
            raise ValueError(
                f"steps must be a multiple of {2 * WINDOWS} and at least {least}, {WINDOWS} windows of half as many in "
                f"which something is scored, got {self.steps}"
            )

    def cases(self) -> list[Case]:
        """All that is run, in order: a task's rules one after the other."""
        return [
            Case(task, cell, rule, optimizer, units, self.steps, self.seeds)
            for units in self.hidden
            for cell in self.cells
            for optimizer in self.optimizers
            for task in self.tasks
            for rule in self.rules
            if units <= (RULES[rule].largest or units)
        ]


@dataclass(frozen=True)
class Case:
    """One rule on one task: everything that its record depends on."""

    task: str
    cell: str
    rule: str
    optimizer: str
    units: int
    steps: int
    seeds: int

    @property
    def params(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "cell": self.cell,
            "N": self.units,
            "B": 1,
            "T": self.steps,
            "optimizer": self.optimizer,
            "seeds": self.seeds,
            "dtype": "float32",
            "device": "cpu",
        }


@functools.lru_cache(64)  # a Lorenz system of 20,000 samples takes seconds, and all rules see the same ones
def _data(task: str, steps: int, seed: int) -> Data:
    return PROBES[task].make(steps, 1, seed)


def learned(case: Case, seeds: Sequence[int], rates: Sequence[float], steps: int) -> np.ndarray:
    """The mean loss over the scored steps of each window, (P, WINDOWS), of networks with these seeds and rates.

    At most `CAP` times chance; exactly that where it isn't finite.
    """
    task, rule = PROBES[case.task], RULES[case.rule]
    data = [_data(case.task, steps, seed) for seed in seeds]
    x, target, scored = (
        torch.stack([getattr(one, name) for one in data]) for name in ("x", "target", "scored")
    )
    symbols = task.loss == "cross-entropy"
    stream = Stream(
        CELLS[case.cell](hidden_size=case.units, input_size=task.features),
        nn.Linear(case.units, task.outputs),
        1,
        loss="cross_entropy" if symbols else "mse",
        optimizer=case.optimizer,  # type: ignore[arg-type]
        lr=list(rates),
        clip_norm=CLIP,
        population=len(seeds),
        seeds=seeds,
        nonfinite="continue",
        **rule.options(case.units),
    )
    losses = stream.run(x, target if symbols else target[..., None], mask=scored).losses
    counted = scored[..., 0].view(len(seeds), WINDOWS, -1)
    in_windows = torch.where(counted, losses.view_as(counted), 0).double().sum(-1) / counted.sum(-1)
    cap = CAP * task.chance
    return np.minimum(np.nan_to_num(in_windows.numpy(), nan=cap, posinf=cap), cap)


def final(curves: np.ndarray) -> np.ndarray:
    """The final loss of each network, (P,), of curves (P, WINDOWS)."""
    return curves[:, -WINDOWS // 5 :].mean(1)


def run_case(case: Case) -> dict[str, Any]:
    """Choose the rate, then learn; returns the fields of the record. Its payload has

    rate      of the optimizer; tuning: by each rate the mean final loss over the tuning seeds
    finals    the final loss of each seed
    curve     the mean over seeds of the loss in each window
    seconds   of all
    """
    begin = time.perf_counter()
    each = len(TUNING_SEEDS)
    rates = [rate for rate in RATES for _ in range(each)]
    tried = final(learned(case, TUNING_SEEDS * len(RATES), rates, case.steps // 2)).reshape(-1, each).mean(1)
    rate = RATES[int(tried.argmin())]
    curves = learned(case, range(case.seeds), [rate] * case.seeds, case.steps)
    return {
        "status": "ok",
        "payload": {
            "rate": rate,
            "tuning": {f"{r:g}": float(f"{loss:.5g}") for r, loss in zip(RATES, tried, strict=True)},
            "finals": [float(f"{loss:.5g}") for loss in final(curves)],
            "curve": [float(f"{loss:.5g}") for loss in curves.mean(0)],
            "seconds": round(time.perf_counter() - begin, 2),
        },
    }


def measure(
    settings: Settings,
    path: Path,
    on_record: Callable[[Record, int, int], None] = lambda made, done, of: None,
) -> list[Record]:
    """Do the cases that the file at `path` lacks, and append a record of each as it ends; returns all of them.

    A case that fails is a record with status "error" and its message.
    """
    common = record.started("pays", torch.device("cpu"))
    earlier = {record.key(r): r for r in record.load(path)} if path.exists() else {}
    found, cases = [], settings.cases()
    for done, case in enumerate(cases, 1):
        blank = Record(algorithm=case.rule, params=case.params, status="ok", time="", **common)
        made = earlier.get(record.key(blank))
        if made is None or made.status != "ok":
            try:
                result = run_case(case)
            except ModuleNotFoundError as error:
                result = {"status": "error", "message": str(error)}
            made = Record(algorithm=case.rule, params=case.params, time=record.now(), **common, **result)
            record.append(path, made)
        found.append(made)
        on_record(made, done, len(cases))
    return found


@dataclass(frozen=True)
class Verdict:
    """Whether the better of two rules pays on a task.

    gain, half   the mean over seeds of the worse rule's final loss less the better's, and half of its 95 % interval
    share        which part of exact RTRL's gain over no trace this is, with its interval; None where there is none
    word         "pays", "harms", "alike" (both within `MARGIN` of chance) or "open"
    """

    gain: float
    half: float
    share: tuple[float, float, float] | None
    word: str


def verdict(
    better: Sequence[float], worse: Sequence[float], exact: Sequence[float] | None, chance: float
) -> Verdict:
    """Compare final losses seed by seed. exact: of exact RTRL, if it ran; worse is then the one without a trace."""
    gains = [w - b for w, b in zip(worse, better, strict=True)]
    gain, half = interval(gains)
    margin = MARGIN * chance
    alike = abs(gain) + half < margin
    word = "alike" if alike else "pays" if gain > half else "harms" if -gain > half else "open"
    share = None
    if exact is not None:
        whole = [w - e for w, e in zip(worse, exact, strict=True)]
        mean, width = interval(whole)
        if mean > width and mean > margin:  # there is a gain to have a share of
            share = (gain / mean, *bootstrap(_ratio_of_means, gains, whole))
    return Verdict(gain, half, share, word)


def _ratio_of_means(a: Any, b: Any, axis: int = -1) -> Any:
    return np.mean(a, axis=axis) / np.mean(b, axis=axis)


def groups(records: Sequence[Record]) -> dict[tuple[str, str, int, str], dict[str, Record]]:
    """The last records of this benchmark by (task, cell, N, optimizer), and in each by rule."""
    out: dict[tuple[str, str, int, str], dict[str, Record]] = {}
    for r in record.latest(records):
        if r.benchmark == "pays" and r.status == "ok":
            p = r.params
            out.setdefault((p["task"], p["cell"], p["N"], p["optimizer"]), {})[r.algorithm] = r
    return out


def verdicts(by_rule: Mapping[str, Record]) -> dict[str, Verdict]:
    """Of each rule but "snap0" the verdict against it."""
    if "snap0" not in by_rule:
        return {}
    finals = {rule: r.payload["finals"] for rule, r in by_rule.items()}
    chance = PROBES[by_rule["snap0"].params["task"]].chance
    exact = finals.get("rtrl")
    return {
        rule: verdict(losses, finals["snap0"], exact, chance)
        for rule, losses in finals.items()
        if rule != "snap0"
    }


def tables(records: Sequence[Record]) -> list[Table]:
    """Two tables for each cell, N and optimizer: final losses by rule; whether Γ pays, and shares of RTRL's gain."""
    by = groups(records)
    out = []
    for cell, units, optimizer in dict.fromkeys(key[1:] for key in by):
        here = {key[0]: of for key, of in by.items() if key[1:] == (cell, units, optimizer)}
        tasks = [name for name in PROBES if name in here]
        rules = [rule for rule in RULES if any(rule in of for of in here.values())]
        p = next(iter(here[tasks[0]].values())).params
        title = f"{cell}, N = {units}, {optimizer}"
        losses = Table(title=f"{title}: final loss, B = 1, T = {p['T']}, {p['seeds']} seeds")
        _columns(losses, "task", "chance", *rules)
        gains = Table(
            title=f"{title}: does Γ pay? The loss without a trace less that of RFP, and shares of RTRL's gain"
        )
        _columns(gains, "task", "Γ", "gain of RFP", "RFP's share", "share of blocks", "rates")
        for task in tasks:
            of, told = here[task], verdicts(here[task])
            cells = [_number(*interval(of[r].payload["finals"])) if r in of else "" for r in rules]
            losses.add_row(task, f"{PROBES[task].chance:.3f}", *cells)
            if (rfp := told.get("rfp")) is not None:
                rates = " ".join(f"{of[r].payload['rate']:g}" if r in of else "–" for r in rules)
                shares = [_share(told.get(rule)) for rule in ("rfp", "block")]
                gains.add_row(task, rfp.word, _number(rfp.gain, rfp.half, "+"), *shares, rates)
        out += [losses, gains] if gains.rows else [losses]
    return out


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)


def _number(value: float, half: float, sign: str = "") -> str:
    return f"{value:{sign}.4f} ± {half:.4f}"


def _share(told: Verdict | None) -> str:
    if told is None or told.share is None:
        return ""
    value, low, high = told.share
    return f"{value:.0%} ({low:.0%} to {high:.0%})"
