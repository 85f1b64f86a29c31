"""Compare two files of records: what became faster or slower beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from .record import Record, key, latest
from .summary import place, seconds_text


@dataclass(frozen=True)
class Change:
    """B against A at one key: the ratio B/A of medians, and whether it is beyond noise.

    Beyond noise: the ratio is further from 1 than the noise floor, and the intervals p20–p80 are disjoint.
    """

    a: Record
    b: Record
    ratio: float
    beyond_noise: bool

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


def compare(a: Sequence[Record], b: Sequence[Record], floor: float = 0.05) -> Comparison:
    """Match timed records by key, versions left aside. Raises ValueError for a floor that is negative."""
    if not floor >= 0:
        raise ValueError(f"floor must be at least 0, got {floor}")
    timed_a, timed_b = ({key(r, versions=False): r for r in latest(file) if r.timing} for file in (a, b))
    changes = []
    for identity in timed_a.keys() & timed_b.keys():
        old, new = timed_a[identity], timed_b[identity]
        was, now = old.timing, new.timing
        assert was is not None
        assert now is not None
        ratio = now.median / was.median
        disjoint = now.p20 > was.p80 or now.p80 < was.p20
        # a change of 5 % either way: slower by 1.05, faster by 1 / 1.05
        beyond = max(ratio, 1 / ratio) > 1 + floor
        changes.append(Change(old, new, ratio, disjoint and beyond))
    return Comparison(
        sorted(changes, key=lambda c: (c.a.algorithm, c.a.params.get("B", 0), c.a.params.get("N", 0))),
        [r for identity, r in timed_a.items() if identity not in timed_b],
        [r for identity, r in timed_b.items() if identity not in timed_a],
    )


def table(comparison: Comparison) -> Table:
    """One row a matched point."""
    out = Table(title="B against A, seconds per time step")
    for heading in ("point", "A", "B", "B / A", "beyond noise"):
        out.add_column(heading, justify="left" if heading == "point" else "right")
    for change in comparison.changes:
        times = (seconds_text(r.timing.median) for r in (change.a, change.b) if r.timing)
        out.add_row(place(change.a), *times, f"{change.ratio:.3f}", change.verdict)
    return out
