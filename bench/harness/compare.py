"""Compare two files of records: what became faster or slower beyond noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from .record import Record, Timing, key, latest
from .tables import place, seconds_text

FLOOR = 0.03  # what counts as noise on a machine that is perfectly steady
SPELL = math.log(1.15)  # that a yardstick is off its median by where others have the machine for a while


@dataclass(frozen=True)
class Change:
    """B against A at one key: the ratio B/A of medians, and what of it the machine explains.

    noise    the ratio either way that noise explains here (`noise_of`)
    apart    whether the samples' intervals p20–p80 are disjoint, and the medians' bootstrap intervals if both have one
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
    """Changes of what both files timed; what only one of them did."""

    changes: list[Change]
    only_a: list[Record]
    only_b: list[Record]


def unsteadiness(timings: Iterable[Timing]) -> float:
    """How far apart two timings of one thing come, by a run's yardsticks: 2 robust deviations of the logarithm of one
    at a point, times √2; or the most that it was off its median, times √2, where that is beyond `SPELL`.

    A yardstick at a point is the median of its passes, as what is timed there. What others do on a machine comes in
    spells: one point in five may be twice as slow, and the rest steady, so that no deviation tells of it. The least
    steady yardstick counts. 0 with fewer than 4 times of it: nothing is known.
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
    """How far apart two timings of a case come, by the widest of its medians' 95 % intervals: of two like it, half the
    width of its logarithm, times √2; or all of it, where that is beyond `SPELL`, as of times that have two levels.

    Where points were timed in several passes it has in it what differs from process to process, such as where memory
    lies, which takes one point and not the next, and no yardstick. 0 where there are no intervals.
    """
    found = max(
        (math.log(t.high / t.low) for t in timings if t.low is not None and t.high is not None), default=0.0
    )
    return found if found > SPELL else found / math.sqrt(2)


def noise_of(a: Timing, b: Timing, floor: float, unsteady: float) -> float:
    """The ratio of two medians, either way, that noise explains: (1 + floor) · exp(unsteady + drift).

    drift: the largest change of a yardstick between the two, work that is the same in both: what it changed by, the
    machine did; 0 if it isn't larger than what an unsteady machine shows. floor: what counts as noise where both
    machines were perfectly steady.
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
    """Match timed records by key, versions left aside. Raises ValueError for a floor that is negative."""
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
    """One row a matched point."""
    out = Table(title="B against A, seconds per time step")
    for heading in ("point", "A", "B", "B / A", "noise up to", "beyond noise"):
        out.add_column(heading, justify="left" if heading == "point" else "right")
    for change in comparison.changes:
        times = (seconds_text(r.timing.median) for r in (change.a, change.b) if r.timing)
        out.add_row(place(change.a), *times, f"{change.ratio:.3f}", f"{change.noise:.3f}", change.verdict)
    return out
