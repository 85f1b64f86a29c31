"""Check the benchmark against itself: run the scaling sweep again and again while nothing changes.

It counts how many changes `compare` reports between one run and the next, and how often a slope falls into the interval
that the run before gave for it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ... import _checks as check
from ..harness import record
from ..harness.compare import Comparison, compare
from ..harness.record import Record
from ..harness.tables import place
from . import timing as scaling
from .powers import slopes

FOLDER, FILE = "selfcheck", "selfcheck.jsonl"


@dataclass(frozen=True)
class Found:
    """What was found of one case.

    slopes    the slope of time in each run; None if there were too few points
    matched   for each pair of consecutive runs, how many points both have
    changes   for each such pair, the points at which `compare` reports a change
    """

    slopes: list[Any]
    matched: list[int]
    changes: list[list[str]]

    @property
    def pairs_of_slopes(self) -> int:
        return sum(a is not None and b is not None for a, b in itertools.pairwise(self.slopes))

    @property
    def within(self) -> int:
        """The number of pairs of runs in which the later slope is in the earlier one's interval."""
        return sum(
            abs(b.value - a.value) <= a.half_width
            for a, b in itertools.pairwise(self.slopes)
            if a is not None and b is not None
        )


def run(
    settings: scaling.Settings, runs: int, out: Path, tell: Callable[[str], None] = lambda line: None
) -> list[Record]:
    """Sweep `runs` times, compare each with the one before; a record a case is appended to `out`/selfcheck.jsonl.

    The sweeps' own files are in `out`/selfcheck; one that is whole is kept, so that an interrupted check goes on.
    Raises ValueError for fewer than 2 runs.
    """
    check.integer("runs", runs, 2)
    about, folder = record.started("selfcheck", torch.device(settings.device)), out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"run-{i:02d}.jsonl" for i in range(runs)]
    for i, file in enumerate(files):
        scaling.sweep(settings, file)
        tell(f"run {i + 1} of {runs}")
    loaded = [record.latest(record.load(file)) for file in files]
    compared = [compare(a, b) for a, b in itertools.pairwise(loaded)]
    made = []
    for name in settings.algorithms:
        found = _found(name, loaded, compared)
        made.append(
            Record(
                **about,
                algorithm=name,
                params=_params(settings),
                status="ok",
                time=record.now(),
                payload={
                    "runs": runs,
                    "matched": sum(found.matched),
                    "changes": [change for pair in found.changes for change in pair],
                    "slopes": [None if s is None else [s.value, s.half_width] for s in found.slopes],
                    "pairs_of_slopes": found.pairs_of_slopes,
                    "within": found.within,
                    "largest_ratio": _largest(name, compared),
                    "noise": _noise(name, compared),
                },
            )
        )
        record.append(out / FILE, made[-1])
    return made


def _params(settings: scaling.Settings) -> dict[str, Any]:
    """The parameters of a record; "N" and "B" are those of the first point."""
    shared = settings.params(*settings.points[0])
    return {**shared, "points": [list(point) for point in settings.points]}


def _found(name: str, runs: Sequence[Sequence[Record]], compared: Sequence[Comparison]) -> Found:
    batch = runs[0][0].params["B"]
    mine = [[change for change in c.changes if change.a.algorithm == name] for c in compared]
    return Found(
        [slopes(records, name, batch)["time"] for records in runs],
        [len(changes) for changes in mine],
        [[f"{place(c.a)}: {c.ratio:.3f}" for c in changes if c.beyond_noise] for changes in mine],
    )


def _largest(name: str, compared: Sequence[Comparison]) -> float:
    """The largest ratio of two medians, up or down."""
    ratios = [abs(math.log(c.ratio)) for made in compared for c in made.changes if c.a.algorithm == name]
    return math.exp(max(ratios, default=0.0))


def _noise(name: str, compared: Sequence[Comparison]) -> float | None:
    """The median of the ratios that `compare` took for noise: half of the time a smaller change would not be seen."""
    taken = [c.noise for made in compared for c in made.changes if c.a.algorithm == name]
    return statistics.median(taken) if taken else None


def table(records: Sequence[Record]) -> Table:
    """By case: changes reported though nothing changed, the largest ratio, the ratio that counted as noise, and how
    many slopes were in the interval of the run before."""
    runs = records[0].payload["runs"] if records else 0
    out = Table(title=f"{runs} runs of one sweep, each compared with the one before")
    for heading in (
        "algorithm",
        "comparisons",
        "changes seen",
        "largest ratio",
        "noise (median)",
        "slopes within the interval",
    ):
        out.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for r in records:
        p = r.payload
        within = f"{p['within']} of {p['pairs_of_slopes']}" if p["pairs_of_slopes"] else ""
        noise = "" if p.get("noise") is None else f"{p['noise']:.3f}"
        out.add_row(
            r.algorithm, str(p["matched"]), str(len(p["changes"])), f"{p['largest_ratio']:.3f}", noise, within
        )
    return out
