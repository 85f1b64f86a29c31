"""Tables that say something of movies, or of stretches of them: labels of scenes, recorded responses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .columns import as_numbers, as_text
from .fixations import existing, read_table
from .patches import FixationSequences
from .report import SHOWN, FixationError

TIMES = ("start", "end")


@dataclass(frozen=True, eq=False)
class Annotations:
    """The rows of a table, each of which belongs to a stretch of a movie.

    source     the table's name in messages
    movie      (k,) the movie of each stretch; stretches are in the order in which they first appear
    start, end    (k,) seconds of the movie: a stretch is from start to before end; -inf and inf where it has no bound
    stretch    (n,) the number of each row's stretch
    row        (n,) the number of each row in the file
    columns    the table's other columns, by name, n entries each
    """

    source: str
    movie: np.ndarray
    start: np.ndarray
    end: np.ndarray
    stretch: np.ndarray
    row: np.ndarray
    columns: Mapping[str, pa.ChunkedArray]

    def at(self, sequences: FixationSequences) -> np.ndarray:
        """(T, n): the number of the stretch in which each fixation of n sequences has its middle; -1: none."""
        middles = sequences.middles()
        found = np.full(middles.shape, -1)
        for name in set(self.movie.tolist()) & set(sequences.movie.tolist()):
            mine = np.flatnonzero(self.movie == name)
            mine = mine[np.argsort(self.start[mine], kind="stable")]
            of_movie = sequences.movie == name
            time = middles[:, of_movie]
            last = np.searchsorted(self.start[mine], time, side="right") - 1
            inside = (last >= 0) & (time < self.end[mine][last])
            found[:, of_movie] = np.where(inside, mine[last], -1)
        return found


def read(file: str | Path, apart: Sequence[str] = ()) -> Annotations:
    """Read a table with a column movie and, if rows are of stretches of it, start and end in seconds of the movie.

    CSV (`delimited.read` says which text) or parquet. An empty start is the movie's beginning, an empty end its end.
    Blank lines are left out.

    apart: columns that tell rows of the same stretch apart; those that the table doesn't have are not needed.

    Raises FixationError, naming file and rows, for a table without movie or with a column twice, and for rows that
    can't be read, repeat another one or overlap with another stretch; FileNotFoundError.
    """
    path = existing(file)
    arrow, rows, malformed = read_table(path, ("movie", *TIMES, *apart))
    names = arrow.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FixationError(f"{path}: {names.count(twice)} columns are called {twice!r}")
    if "movie" not in names:
        raise FixationError(f"{path}: no column 'movie'; there are {', '.join(names)}")
    filled = ~np.all([as_text(arrow.column(name)) == "" for name in names], axis=0)
    arrow, rows = arrow.filter(pa.array(filled)), rows[filled]
    if not len(rows) and not malformed:
        raise FixationError(f"{path}: has no rows")
    wrong = {problem.row: problem.detail for problem in malformed}
    movie = as_text(arrow.column("movie"))
    wrong |= {int(row): "has no movie" for row in rows[movie == ""]}
    bounds = {}
    for key, missing in zip(TIMES, (-np.inf, np.inf), strict=True):
        values, texts = as_numbers(arrow.column(key)) if key in names else (np.full(len(rows), np.nan), {})
        bounds[key] = np.where(np.isnan(values), missing, values)
        wrong |= {int(rows[i]): f"{key} is {text!r}" for i, text in texts.items()}
    start, end = bounds["start"], bounds["end"]
    empty = np.flatnonzero(~(start < end))
    wrong |= {int(rows[i]): f"goes from {start[i]:g} to {end[i]:g} s" for i in empty}
    _check(path, wrong)

    keys = list(zip(movie.tolist(), start.tolist(), end.tolist(), strict=True))
    number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    found = Annotations(
        str(path),
        np.array([key[0] for key in number], dtype=np.str_),
        np.array([key[1] for key in number]),
        np.array([key[2] for key in number]),
        np.array([number[key] for key in keys]),
        rows,
        {name: arrow.column(name) for name in names if name not in ("movie", *TIMES)},
    )
    _check(path, _repeats(found, apart) | _overlaps(found))
    return found


def _repeats(found: Annotations, apart: Sequence[str]) -> dict[int, str]:
    """What is wrong with rows that have stretch and `apart` of an earlier one."""
    told = [as_text(found.columns[name]).tolist() for name in apart if name in found.columns]
    first: dict[tuple[object, ...], int] = {}
    wrong = {}
    for row, *key in zip(found.row.tolist(), found.stretch.tolist(), *told, strict=True):
        if first.setdefault(tuple(key), row) != row:
            wrong[row] = f"is of the same stretch as row {first[tuple(key)]}"
    return wrong


def _overlaps(found: Annotations) -> dict[int, str]:
    """What is wrong with rows whose stretch begins before another one of the movie, that began earlier, has ended."""
    order = np.lexsort((found.end, found.start, found.movie))
    wrong = {}
    for a, b in itertools.pairwise(order.tolist()):
        if found.movie[a] == found.movie[b] and found.start[b] < found.end[a]:
            one, other = (int(found.row[found.stretch == k][0]) for k in (a, b))
            wrong[other] = (
                f"begins at {found.start[b]:g} s, and the stretch of row {one} ends at {found.end[a]:g} s"
            )
    return wrong


def _check(path: Path, wrong: Mapping[int, str]) -> None:
    """Raise FixationError for rows by what is wrong with them, if there are any."""
    if not wrong:
        return
    told = "; ".join(f"row {row}: {wrong[row]}" for row in sorted(wrong)[:SHOWN])
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise FixationError(f"{path}: {told}{more}")
