"""Compare two files of records: what became faster or slower by more than noise explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from .record import Record, Timing, key, latest
from .tables import place, seconds_text

FLOOR = 0.03  # a change that counts as noise even on a perfectly steady machine
# The logarithm by which a yardstick is off its median when other programs have the machine for a while.
SPELL = math.log(1.15)


@dataclass(frozen=True)
class Change:
    """B compared with A at one key: the ratio B/A of their medians, and the ratio that noise explains.

    noise    the largest ratio, up or down, that noise explains here (`noise_of`)
    apart    whether the intervals p20–p80 of the samples are disjoint, and so are the medians' bootstrap
             intervals, if both have one
    """

    a: Record
    b: Record
    ratio: float
    noise: float
    apart: bool

    @property
    def beyond_noise(self) -> bool:
        return self.apart and max(self.ratio, 1 / self.ratio) > self.noise

    @property
    def verdict(self) -> str:
        if not self.beyond_noise:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


@dataclass(frozen=True)
class Comparison:
    """The changes of what both files timed, and the records of what only one of them timed."""

    changes: list[Change]
    only_a: list[Record]
    only_b: list[Record]


def unsteadiness(timings: Iterable[Timing]) -> float:
    """How far apart (as a logarithm) two timings of the same work come on this machine, by a run's yardsticks.

    For each yardstick the values are its logarithms at the points, each the median over passes, like what is timed
    there. The result is √2 times 2 robust standard deviations of these; or √2 times the largest distance from their
    median, if that is more than `SPELL`. Other programs slow a machine down in spells: one point in five may be twice
    as slow and the rest steady, which a deviation doesn't show. The least steady yardstick counts; one with fewer than
    4 values counts as 0, since nothing is known.
    """
    values: dict[str, set[float]] = {}
    for timing in timings:
        for name, by_pass in timing.yardsticks.items():
            values.setdefault(name, set()).add(math.log(statistics.median(by_pass)))
    found = 0.0
    for logs in values.values():
        if len(logs) >= 4:
            middle = statistics.median(logs)
            off = [abs(value - middle) for value in logs]
            deviation = 1.4826 * statistics.median(off)
            found = max(found, math.sqrt(2) * (max(off) if max(off) > SPELL else 2 * deviation))
    return found


def widest(timings: Iterable[Timing]) -> float:
    """How far apart (as a logarithm) two timings of a case come, by the widest 95 % interval of its medians.

    For two intervals of that width it is √2 times half the width of the logarithm; or the whole width if that is more
    than `SPELL`, as for times that have two levels. If points were timed in several passes, the intervals contain what
    differs from process to process, such as where memory lies: it affects one point and not the next, and no yardstick
    shows it. 0 if there are no intervals.
    """
    found = max(
        (math.log(t.high / t.low) for t in timings if t.low is not None and t.high is not None), default=0.0
    )
    return found if found > SPELL else found / math.sqrt(2)


def noise_of(a: Timing, b: Timing, floor: float, unsteady: float) -> float:
    """The ratio of two medians, up or down, that noise explains: (1 + floor) · exp(unsteady + drift).

    floor     the change that counts as noise even if both machines were perfectly steady
    unsteady  `unsteadiness` of the machine, or `widest` of the case
    drift     the largest change (as a logarithm) of a yardstick between the two. Yardsticks do the same work in both,
              so the machine caused it. It counts only if it is larger than `unsteady`.
    """
    was, now = ({name: statistics.median(t.yardsticks[name]) for name in t.yardsticks} for t in (a, b))
    drift = max((abs(math.log(now[name] / was[name])) for name in was.keys() & now.keys()), default=0.0)
    return (1 + floor) * math.exp(unsteady + (drift if drift > unsteady else 0.0))


def _apart(a: Timing, b: Timing) -> bool:
    if not (b.p20 > a.p80 or b.p80 < a.p20):
        return False
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return True
    return b.low > a.high or b.high < a.low


def compare(a: Sequence[Record], b: Sequence[Record], floor: float = FLOOR) -> Comparison:
    """Match timed records by key, without versions, and compare them. Raises ValueError for a negative floor."""
    if not floor >= 0:
        raise ValueError(f"floor must be at least 0, got {floor}")
    timed_a, timed_b = ({key(r, versions=False): r for r in latest(file) if r.timing} for file in (a, b))
    machine = max(unsteadiness(r.timing for r in timed.values() if r.timing) for timed in (timed_a, timed_b))
    by_case: dict[str, list[Timing]] = {}
    for r in (*timed_a.values(), *timed_b.values()):
        if r.timing:
            by_case.setdefault(r.algorithm, []).append(r.timing)
    unsteady = {name: max(machine, widest(timings)) for name, timings in by_case.items()}
    changes = []
    for identity in timed_a.keys() & timed_b.keys():
        old, new = timed_a[identity], timed_b[identity]
        was, now = old.timing, new.timing
        assert was is not None
        assert now is not None
        noise = noise_of(was, now, floor, unsteady[old.algorithm])
        changes.append(Change(old, new, now.median / was.median, noise, _apart(was, now)))
    return Comparison(
        sorted(changes, key=lambda c: (c.a.algorithm, c.a.params.get("B", 0), c.a.params.get("N", 0))),
        [r for identity, r in timed_a.items() if identity not in timed_b],
        [r for identity, r in timed_b.items() if identity not in timed_a],
    )


def table(comparison: Comparison) -> Table:
    """A table with one row for each matched point."""
    out = Table(title="B against A, seconds per time step")
    for heading in ("point", "A", "B", "B / A", "noise up to", "beyond noise"):
        out.add_column(heading, justify="left" if heading == "point" else "right")
    for change in comparison.changes:
        times = (seconds_text(r.timing.median) for r in (change.a, change.b) if r.timing)
        out.add_row(place(change.a), *times, f"{change.ratio:.3f}", f"{change.noise:.3f}", change.verdict)
    return out
