"""What became of each row of a table of fixations: `Problem`, `Report`, and the error that refuses a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 8  # at most so many problems are listed one by one in a message


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row.

    row: its number in the file, where a CSV's header is row 1; kind: one of a few phrases; detail: the values.
    """

    row: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What became of every row of a table: `rows` is the sum of rows kept, rows left out, and rows with a problem.

    source     the table's name
    left_out   how many rows weren't asked for, by reason (another eye, another event, a blank line)
    problems   one for each bad row, in the order of the file
    """

    source: str
    rows: int
    kept: int
    problems: tuple[Problem, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each kind of problem."""
        return dict(Counter(problem.kind for problem in self.problems))

    def rows_with(self, kind: str) -> tuple[int, ...]:
        """The numbers of the rows that have a problem of this kind."""
        return tuple(problem.row for problem in self.problems if problem.kind == kind)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows, {self.kept} kept"]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out.items()]
        for kind, count in self.counts.items():
            lines.append(f"  {count} with a problem: {kind} (row {listed(self.rows_with(kind))})")
        return "\n".join(lines)


class FixationError(ValueError):
    """A table is refused. `report` names every bad row; it is None if the table as a whole couldn't be read."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


def listed(rows: Sequence[int]) -> str:
    """The first SHOWN of some row numbers as text, and how many more there are."""
    more = f", … {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(map(str, rows[:SHOWN])) + more
