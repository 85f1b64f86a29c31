"""A history of records: at which run the time of a case stepped up or down, and stayed.

A case's time in a run is divided by how fast the machine was then: the median, over the yardsticks, of each one's time
over its median in all runs. Steps are found by circular binary segmentation (Olshen et al. 2004): the segment of the
logarithms that differs most from the rest has steps at its ends if in fewer than `LEVEL` of chance orders of the runs
some segment differs as much; then all parts are searched.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads scipy.stats, which takes a second, when it is first used
from rich.table import Table

from .record import Record, key
from .statistics import ratio_of_medians
from .tables import place, seconds_text

LEVEL = 0.01  # the chance that a history without a step shows one, at each search
ORDERS = 2000  # chance orders of the runs that a segment is compared with
FLOOR = 0.03  # a smaller change is not told
FEWEST = 10  # runs: of fewer, no step is rarer than `LEVEL`


@dataclass(frozen=True)
class Step:
    """A change that stayed.

    before, after  the records of the last run before it and of the first after it
    seconds        the medians before and after it, on a machine of the history's median speed
    ratio          after / before, and its 95 % interval by resampling runs
    chance         how often a chance order of the runs separates them as well
    """

    before: Record
    after: Record
    seconds: tuple[float, float]
    ratio: tuple[float, float, float]
    chance: float


@dataclass(frozen=True)
class History:
    """One case's records, one for each run, in the order of time; its times on the median machine; its steps."""

    records: Sequence[Record]
    seconds: Sequence[float]
    steps: Sequence[Step]


def histories(records: Sequence[Record], floor: float = FLOOR) -> list[History]:
    """Of each case that was timed at least `FEWEST` times, with its steps of more than `floor`.

    Cases are told apart by key, without versions. Of several records of one run the last counts. Raises ValueError for
    a negative floor.
    """
    if not floor >= 0:
        raise ValueError(f"floor must be at least 0, got {floor}")
    by_case: dict[str, dict[str, Record]] = {}
    for r in sorted(records, key=lambda r: r.run):
        if r.timing is not None:
            by_case.setdefault(key(r, versions=False), {})[r.run] = r
    out = []
    for runs in by_case.values():
        if len(runs) >= FEWEST:
            mine = list(runs.values())
            seconds = on_the_median_machine(mine)
            cuts = steps_in(np.log(seconds), math.log1p(floor))
            ends = [0, *(at for at, _ in cuts), len(mine)]
            steps = [_step(mine, seconds, ends[i], *cut, ends[i + 2]) for i, cut in enumerate(cuts)]
            out.append(History(mine, seconds, steps))
    return out


def on_the_median_machine(records: Sequence[Record]) -> list[float]:
    """The medians of one case's timings, each divided by how slow the machine was in that run."""
    timings = [r.timing for r in records if r.timing is not None]
    logs = [{name: math.log(statistics.median(of)) for name, of in t.yardsticks.items()} for t in timings]
    middle = {
        name: statistics.median(each[name] for each in logs) for name in set.intersection(*map(set, logs))
    }
    slow = [
        statistics.median(each[name] - middle[name] for name in middle) if middle else 0.0 for each in logs
    ]
    return [t.median / math.exp(by) for t, by in zip(timings, slow, strict=True)]


def steps_in(values: np.ndarray, least: float = 0.0) -> list[tuple[int, float]]:
    """The steps in a series: (first place after the step, chance), in order.

    least: the smallest difference of the medians of both sides that counts.
    """
    found = _cuts(values, 0)
    while found:
        places = [0, *(at for at, _ in found), len(values)]
        medians = [np.median(values[a:b]) for a, b in itertools.pairwise(places)]
        sizes = np.abs(np.diff(medians))
        if sizes.min() > least:
            break
        found.pop(int(sizes.argmin()))
    return found


def _cuts(values: np.ndarray, begin: int) -> list[tuple[int, float]]:
    """Cuts before the least that counts: ends of the segment that differs most from the rest, and of those inside."""
    size = len(values)
    if size < FEWEST:
        return []
    first, last, contrast = _best_segment(values[None])
    rng, above = np.random.default_rng(0), 0
    for _ in range(ORDERS // 100):
        orders = rng.permuted(np.tile(values, (100, 1)), axis=1)
        above += int((_best_segment(orders)[2] >= contrast[0] - 1e-12).sum())
    chance = (1 + above) / (ORDERS + 1)
    if chance >= LEVEL:
        return []
    ends = sorted({0, int(first[0]), int(last[0]), size})
    inside = [_cuts(values[a:b], begin + a) for a, b in itertools.pairwise(ends)]
    cuts = [(begin + at, chance) for at in ends[1:-1]]
    return sorted(sum(inside, cuts))


def _best_segment(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the segment [first, last) that differs most from the rest, |difference of means| · √(a b / (a + b)).

    No part of a row, before, in or after the segment, has a single value. Also returns the difference.
    """
    size = rows.shape[1]
    place = np.array([0, *range(2, size - 1), size])
    firsts, lasts = (each.ravel() for each in np.meshgrid(place, place, indexing="ij"))
    inside = lasts - firsts
    kept = (inside >= 2) & (inside < size)
    firsts, lasts, inside = firsts[kept], lasts[kept], inside[kept]
    sums = np.hstack([np.zeros((len(rows), 1)), rows.cumsum(1)])
    within = sums[:, lasts] - sums[:, firsts]
    apart = np.abs(within / inside - (sums[:, -1:] - within) / (size - inside))
    contrast = apart * np.sqrt(inside * (size - inside) / size)
    best = contrast.argmax(1)
    return firsts[best], lasts[best], contrast[np.arange(len(rows)), best]


def _step(
    records: Sequence[Record], seconds: Sequence[float], begin: int, cut: int, chance: float, end: int
) -> Step:
    before, after = seconds[begin:cut], seconds[cut:end]
    interval = scipy.stats.bootstrap(
        (after, before), ratio_of_medians, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Step(
        records[cut - 1],
        records[cut],
        (statistics.median(before), statistics.median(after)),
        (float(ratio_of_medians(after, before)), float(interval.low), float(interval.high)),
        chance,
    )


def table(found: Sequence[History]) -> Table:
    """All steps, the largest first."""
    steps = [(one, step) for one in found for step in one.steps]
    out = Table(
        title=f"{len(steps)} step{'s' * (len(steps) != 1)} in {len(found)} histories",
        caption="times on a machine of the history's median speed, as the yardsticks tell it",
    )
    for heading in ("case", "runs", "before", "after", "ratio", "first run after it", "revision", "chance"):
        out.add_column(heading, justify="left" if heading in ("case", "revision") else "right", no_wrap=True)
    for one, step in sorted(steps, key=lambda pair: -abs(math.log(pair[1].ratio[0]))):
        value, low, high = step.ratio
        out.add_row(
            place(step.after),
            str(len(one.records)),
            *map(seconds_text, step.seconds),
            f"{value:.2f} ({low:.2f} to {high:.2f})",
            step.after.run[:16],
            f"{(step.before.git or '?')[:9]}..{(step.after.git or '?')[:9]}",
            f"{step.chance:.4f}",
        )
    return out
