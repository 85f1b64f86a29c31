"""The rows of a table of fixations: every row is kept, left out, or named with what is wrong with it.

`checked` turns a table, whose columns have the names in `Names`, into `Fixations`. Where tables come from is the
concern of `fixations`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from .. import _checks as check
from .columns import Names, Numbers, as_numbers, as_text, find
from .report import SHOWN, FixationError, Problem, Report
from .sidecar import TIMES, UNITS, Movie, Shown, Sidecar
from .video import VideoError

POLICIES = ("refuse", "skip")
ROUNDING = 1e-6  # seconds, and pixels, that arithmetic may be off at a limit: less than any tracker resolves
OVERLAP = 1e-3  # seconds by which fixations may overlap: trackers round times to their samples
DISAGREEMENT = 5e-3  # seconds between offset - onset and duration: trackers count the last sample or don't
DURATIONS = (0.03, 3.0)  # seconds: a median duration outside of this range is in another unit
# Median durations from one onset to the next: outside of this range the two are in different units. With fewer than
# SEVERAL onsets it isn't looked at.
PACE, SEVERAL = (0.5, 50.0), 10
TYPICAL = 0.3  # seconds, about the median duration of a fixation: tells which unit was meant


@dataclass(frozen=True, eq=False)
class Fixations:
    """Checked fixations, as read-only arrays (n,) in which those of one participant and movie are consecutive.

    participant, movie   names
    onset, duration      seconds; onset is measured from when frame 0 of the movie was shown
    x, y                 pixels of the movie's frame from its upper left corner: x to the right, y down
    row                  number of the row in the table, as messages give it
    movies               what is known of each movie, by name
    report               what became of every row of the table
    """

    participant: np.ndarray
    movie: np.ndarray
    onset: np.ndarray
    duration: np.ndarray
    x: np.ndarray
    y: np.ndarray
    row: np.ndarray
    movies: Mapping[str, Movie]
    report: Report

    def __post_init__(self) -> None:
        for array in self._arrays().values():
            array.setflags(write=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a pickle gives arrays back writable

    def __len__(self) -> int:
        return len(self.onset)

    def __repr__(self) -> str:
        return f"Fixations({len(self)} of {len(self.pairs())} participant–movie pairs, {self.report.source})"

    def pairs(self) -> dict[tuple[str, str], slice]:
        """The slice of the arrays that belongs to each (participant, movie)."""
        if not len(self):
            return {}
        new = (self.participant[1:] != self.participant[:-1]) | (self.movie[1:] != self.movie[:-1])
        starts = [0, *(np.flatnonzero(new) + 1).tolist(), len(self)]
        return {
            (str(self.participant[a]), str(self.movie[a])): slice(a, b) for a, b in itertools.pairwise(starts)
        }

    def select(self, which: np.ndarray) -> Fixations:
        """The fixations that a mask (n,) or an array of increasing indices picks."""
        return replace(self, **{name: array[which] for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("participant", "movie", "onset", "duration", "x", "y", "row")
        return {name: getattr(self, name) for name in names}


def checked(
    arrow: pa.Table,
    names: Names,
    sidecar: Sidecar,
    *,
    source: str,
    rows: np.ndarray,
    problems: list[Problem],
    policy: str,
    eye: str | None,
    event: str = "fixation",
    unit: str | None = None,
    left_out: Mapping[str, np.ndarray] | None = None,
) -> Fixations:
    """The fixations of a table whose every row was checked. Of a bad row, the first problem that is found is noted.

    source     the table's name in messages
    rows       (n,) the number of each row of `arrow` in the file
    problems   of rows that are not in `arrow` because they couldn't be split into fields
    policy, eye, event   as in `fixations.read`
    unit       the unit of time that this kind of table always has; None: the sidecar's
    left_out   masks (n,) of rows that aren't asked for, by reason

    Raises FixationError, and what `Sidecar.unit` and `Sidecar.shown` raise.
    """
    check.one_of("policy", policy, POLICIES)
    seconds = sidecar.unit(unit)
    columns = find(arrow, names, source)
    state = _State(source, rows, problems)
    participant, movie = as_text(columns["participant"]), as_text(columns["movie"])
    numbers: dict[str, Numbers] = {
        key: as_numbers(columns[key], sidecar.decimal)
        for key in ("onset", "offset", "duration", "x", "y")
        if key in columns
    }
    units = {key: sidecar.unit(unit, key) for key in TIMES if key in numbers}
    for reason, mask in (left_out or {}).items():
        state.leave_out(mask, reason)
    _leave_out(state, columns, names, participant, movie, numbers, eye, event)
    # each check may count on a row being good: none has to do with a table that has no such row
    _check_missing(state, columns, participant, movie, numbers)
    state.check_any_good()
    onset, duration = _times(state, {key: values for key, (values, _) in numbers.items()}, units, sidecar)
    state.check_any_good()
    pair = _codes(participant, movie)
    _check_pace(state, pair, onset, duration)
    known = _movies(state, sidecar, movie, policy)
    state.check_any_good()
    x, y = numbers["x"][0], numbers["y"][0]
    onset, x, y = _in_the_movie(state, known, participant, movie, onset, x, y, seconds)
    state.check_any_good()
    _check_places(state, known, movie, onset, duration, x, y)
    state.check_any_good()
    _check_repeats(state, pair, (onset, duration, x, y))
    _check_order(state, pair, onset, duration)

    report = state.report()
    if report.problems and policy == "refuse":
        raise state.refuse(_refusal(report))
    kept = _together(pair, np.flatnonzero(state.good))
    movies = {name: how.movie for name, how in known.items() if name in set(movie[kept].tolist())}
    return Fixations(
        participant[kept],
        movie[kept],
        onset[kept],
        duration[kept],
        x[kept],
        y[kept],
        rows[kept],
        movies,
        report,
    )


class _State:
    """What is known of each row while the table is checked: whether it is good, was left out, or has a problem."""

    def __init__(self, source: str, numbers: np.ndarray, problems: list[Problem]) -> None:
        self.source = source
        self.numbers = numbers
        self.good = np.ones(len(numbers), dtype=bool)
        self.problems = list(problems)
        self.left_out: dict[str, int] = {}
        self.total = len(numbers) + len(problems)

    def leave_out(self, which: np.ndarray, reason: str) -> None:
        """Drop the rows of a mask, which aren't asked for."""
        which = which & self.good
        if which.any():
            self.left_out[reason] = int(which.sum())
            self.good &= ~which

    def mark(self, which: np.ndarray, kind: str, detail: str | Callable[[int], str]) -> int:
        """Note a problem with each row of a mask that has none yet; return how many these are."""
        found = np.flatnonzero(which & self.good).tolist()
        return self.mark_each(kind, {i: detail if isinstance(detail, str) else detail(i) for i in found})

    def mark_each(self, kind: str, details: Mapping[int, str]) -> int:
        """Note a problem with each row that is a key of `details`, if it has none yet; return how many these are."""
        found = [i for i in details if self.good[i]]
        self.problems += [Problem(int(self.numbers[i]), kind, details[i]) for i in found]
        self.good[found] = False
        return len(found)

    def report(self) -> Report:
        problems = tuple(sorted(self.problems, key=lambda problem: problem.row))
        return Report(self.source, self.total, int(self.good.sum()), problems, dict(self.left_out))

    def check_any_good(self) -> None:
        """Refuse the table if no row is good, saying what became of all, and what is wrong with the first ones."""
        if self.good.any():
            return
        report = self.report()
        told = [f"{count} left out: {reason}" for reason, count in report.left_out.items()]
        told += [_told(report.problems)] if report.problems else []
        why = f" ({_kinds(report)}): " if report.problems else ": " if told else ""
        raise self.refuse(f"none of its {self.total} rows can be used{why}{'; '.join(told)}")

    def refuse(self, why: str) -> FixationError:
        return FixationError(f"{self.source}: {why}", self.report())


def _codes(participant: np.ndarray, movie: np.ndarray) -> np.ndarray:
    """(n,) a number for each (participant, movie)."""
    people, who = np.unique(participant, return_inverse=True)
    _, what = np.unique(movie, return_inverse=True)
    return what * len(people) + who


def _together(pair: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept rows, those of a pair one after the other, pairs in the order in which they first appear."""
    first: dict[int, int] = {}
    for code in pair[kept].tolist():
        first.setdefault(code, len(first))
    return kept[np.argsort([first[code] for code in pair[kept].tolist()], kind="stable")]


# --- checks, in the order in which one needs another -----------------------------------------------------------


def _leave_out(
    state: _State,
    columns: Mapping[str, pa.ChunkedArray],
    names: Names,
    participant: np.ndarray,
    movie: np.ndarray,
    numbers: Mapping[str, Numbers],
    eye: str | None,
    event: str,
) -> None:
    """Leave out blank lines, other events and the other eye."""
    blank = (participant == "") & (movie == "")
    for values, texts in numbers.values():
        blank &= np.isnan(values)
        blank[list(texts)] = False
    state.leave_out(blank, "blank line")
    if "name" in columns:
        kinds = as_text(columns["name"])
        if event not in kinds:
            found = ", ".join(sorted(set(kinds.tolist()))[:SHOWN])
            raise FixationError(
                f"{state.source}: no row has the name {event!r}; names that are there: {found}"
            )
        state.leave_out(kinds != event, f"name isn't {event}")
    if "eye" in columns:
        _pick_eye(state, as_text(columns["eye"]), participant, eye)
    elif eye is not None:
        raise FixationError(
            f"{state.source}: eye={eye!r} was asked for, but there is no column {names.eye!r}"
        )


def _pick_eye(state: _State, eyes: np.ndarray, participant: np.ndarray, eye: str | None) -> None:
    """Leave out the other eye. If no eye was chosen, refuse a table in which a participant has fixations of both."""

    def short(name: str) -> str:
        return name[:1].upper() if name.lower() in ("left", "right", "l", "r") else name

    eyes = np.array([short(name) for name in eyes.tolist()], dtype=np.str_)
    if eye is not None:
        state.leave_out(eyes != short(eye), f"eye isn't {eye}")
        if not state.good.any():
            raise state.refuse(
                f"no row is of the eye {eye!r}; there are {', '.join(sorted(set(eyes.tolist())))}"
            )
        return
    for who in sorted(set(participant[state.good].tolist())):
        there = sorted(set(eyes[(participant == who) & state.good].tolist()))
        if len(there) > 1:
            raise state.refuse(
                f"participant {who!r} has fixations of the eyes {', '.join(there)}, which overlap: "
                f"say which to take, as eye={there[0]!r} (--eye {there[0]}; of rjepa train, data.eye={there[0]})"
            )


def _check_missing(
    state: _State,
    columns: Mapping[str, pa.ChunkedArray],
    participant: np.ndarray,
    movie: np.ndarray,
    numbers: Mapping[str, Numbers],
) -> None:
    """Mark rows without a name, and rows in which a number is missing or isn't one."""

    def held(key: str, i: int) -> str:
        value = columns[key][i].as_py()
        return f": the cell holds {value!r}" if value is not None and str(value).strip() else ""

    def nameless(key: str) -> Callable[[int], str]:
        return lambda i: f"has no {key}{held(key, i)}"

    def numberless(key: str) -> Callable[[int], str]:
        return lambda i: f"{key} is missing or not finite{held(key, i)}"

    for key, names in (("participant", participant), ("movie", movie)):
        state.mark(names == "", f"{key} missing", nameless(key))
    for key, (_, texts) in numbers.items():
        state.mark_each("not a number", {i: f"{key} is {text!r}" for i, text in texts.items()})
    for kind, keys in (("time", ("onset", "offset", "duration")), ("position", ("x", "y"))):
        for key in keys:
            if key in numbers:
                state.mark(~np.isfinite(numbers[key][0]), f"{kind} missing", numberless(key))


def _times(
    state: _State, values: Mapping[str, np.ndarray], units: Mapping[str, float], sidecar: Sidecar
) -> tuple[np.ndarray, np.ndarray]:
    """Onset, as the table counts it, and duration, in seconds. Marks durations that can't be right.

    units: seconds in one unit of each column's time.
    """
    time = {key: values[key] * units[key] for key in TIMES if key in values}
    onset = time["onset"]
    duration = time["duration"] if "duration" in time else time["offset"] - onset
    _check_unit(state, duration[state.good], units["duration" if "duration" in time else "offset"], sidecar)
    state.mark(~(duration > 0), "duration not positive", lambda i: f"lasts {duration[i]:g} s")
    if "duration" in time and "offset" in time:
        gap = time["offset"] - onset - duration
        state.mark(
            ~(np.abs(gap) <= DISAGREEMENT + ROUNDING),
            "offset and duration disagree",
            lambda i: f"offset - onset is {time['offset'][i] - onset[i]:g} s, duration {duration[i]:g} s",
        )
    return onset, duration


def _check_unit(state: _State, durations: np.ndarray, seconds: float, sidecar: Sidecar) -> None:
    """Refuse the table if its median duration isn't a fixation's, and say which unit seems to be meant."""
    median = float(np.median(durations))
    if DURATIONS[0] <= median <= DURATIONS[1]:
        return
    used = next(name for name, size in UNITS.items() if size == seconds)
    raw = median / seconds
    hint = ""
    if raw > 0:
        meant = min(UNITS, key=lambda name: abs(math.log(raw * UNITS[name] / TYPICAL)))
        if DURATIONS[0] <= raw * UNITS[meant] <= DURATIONS[1]:
            hint = f"; times seem to be in {meant}: set time_unit: {meant} in {sidecar.source}"
    raise state.refuse(
        f"the median fixation lasts {raw:g} {used}, and a fixation lasts {DURATIONS[0]:g} to {DURATIONS[1]:g} s{hint}"
    )


def _check_pace(state: _State, pair: np.ndarray, onset: np.ndarray, duration: np.ndarray) -> None:
    """Refuse the table if fixations follow one another at a pace at which, lasting as they do, they can't.

    Their onsets are then in another unit than their durations, as where a program has µs beside ms.
    """
    rows = np.flatnonzero(state.good)
    rows = rows[np.argsort(pair[rows], kind="stable")]
    gaps = np.diff(onset[rows])[pair[rows][1:] == pair[rows][:-1]]
    if len(gaps) < SEVERAL:
        return
    apart, lasting = float(np.median(gaps)), float(np.median(duration[rows]))
    if PACE[0] * lasting <= apart <= PACE[1] * lasting:
        return
    raise state.refuse(
        f"the median fixation lasts {lasting:g} s, and the next one begins {apart:g} s after it began: onset and "
        "duration must be in the units that the sidecar says; columns may say one for each"
    )


def _movies(state: _State, sidecar: Sidecar, movie: np.ndarray, policy: str) -> dict[str, Shown]:
    """How each movie was shown. Marks rows of unknown movies and, under policy "skip", of films that can't be read."""
    known: dict[str, Shown] = {}
    for name in sorted(set(movie[state.good].tolist())):
        try:
            how = sidecar.shown(name)
        except VideoError as error:
            if policy == "refuse":
                raise
            state.mark(movie == name, "film missing or broken", str(error))
            continue
        if how is not None:
            known[name] = how
    state.mark(
        np.array([name not in known for name in movie.tolist()], dtype=bool),
        "unknown movie",
        lambda i: f"movie {str(movie[i])!r} isn't listed in {sidecar.source}",
    )
    return known


def _in_the_movie(
    state: _State,
    known: Mapping[str, Shown],
    participant: np.ndarray,
    movie: np.ndarray,
    onset: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    seconds: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Onsets since the movie's start, and positions in its frame. Marks rows for which no start is known."""
    onset, x, y = onset.copy(), x.copy(), y.copy()
    for name, how in known.items():
        of_movie = movie == name
        x[of_movie] = (x[of_movie] - how.offset[0]) * how.scale[0]
        y[of_movie] = (y[of_movie] - how.offset[1]) * how.scale[1]
        for place, most in ((x, how.movie.size[0]), (y, how.movie.size[1])):
            near = of_movie & (place >= -ROUNDING) & (place <= most + ROUNDING)
            place[near] = np.clip(place[near], 0, most)
        if not isinstance(how.start, Mapping):
            onset[of_movie] -= how.start * seconds
            continue
        start = np.array([how.start.get(str(who), np.nan) for who in participant[of_movie]])
        onset[of_movie] -= start * seconds
    onset[(onset < 0) & (onset >= -ROUNDING)] = 0
    state.mark(
        np.isnan(onset),
        "movie start missing",
        lambda i: f"movie_start has no time for movie {str(movie[i])!r}, participant {str(participant[i])!r}",
    )
    return onset, x, y


def _check_places(
    state: _State,
    known: Mapping[str, Shown],
    movie: np.ndarray,
    onset: np.ndarray,
    duration: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Mark rows outside the frame or the movie. Refuse the table if these are most, or if all lie close together."""
    movies = {name: how.movie for name, how in known.items()}
    sizes = np.array([movies[m].size if m in movies else (0, 0) for m in movie.tolist()], dtype=float)
    ends = np.array([movies[m].end if m in movies else 0 for m in movie.tolist()])
    candidates = state.good.copy()
    outside = ~((x >= 0) & (x <= sizes[:, 0]) & (y >= 0) & (y <= sizes[:, 1]))
    found = state.mark(
        outside,
        "outside the frame",
        lambda i: (
            f"({x[i]:.6g}, {y[i]:.6g}) is outside the frame of {sizes[i, 0]:g} × {sizes[i, 1]:g} pixels"
        ),
    )
    if 2 * found > candidates.sum():
        raise state.refuse(
            f"{found} of {candidates.sum()} fixations lie outside the frame: in frame pixels, x goes from "
            f"{x[candidates].min():.6g} to {x[candidates].max():.6g}, y from {y[candidates].min():.6g} to "
            f"{y[candidates].max():.6g}; x and y must be pixels, and the sidecar's screen must say where on the "
            "screen the frame was"
        )
    extent = max(float(np.ptp(x[candidates])), float(np.ptp(y[candidates])))
    smallest = float(sizes[candidates].min())
    if candidates.sum() >= 10 and 0 < extent < 0.02 * smallest:
        raise state.refuse(
            f"all fixations lie within {extent:.3g} pixels of a frame of {sizes[candidates][0, 0]:g} × "
            f"{sizes[candidates][0, 1]:g}; x and y must be in pixels, not in degrees or parts of the screen"
        )
    candidates = state.good.copy()
    found = state.mark(onset < 0, "before the movie", lambda i: f"begins {-onset[i]:.6g} s before the movie")
    if 2 * found > candidates.sum():
        raise state.refuse(
            f"{found} of {candidates.sum()} fixations begin before their movie, the first at "
            f"{onset[candidates].min():.6g} s; movie_start must be in the table's time unit"
        )
    middle = onset + duration / 2
    found = state.mark(
        middle >= ends,
        "after the movie",
        lambda i: f"has its middle at {middle[i]:.6g} s, the movie ends at {ends[i]:.6g} s",
    )
    if 2 * found > candidates.sum():
        raise state.refuse(
            f"{found} of {candidates.sum()} fixations lie after the end of their movie; movie_start must be the "
            "time in the table at which frame 0 was shown"
        )


def _check_repeats(state: _State, pair: np.ndarray, values: tuple[np.ndarray, ...]) -> None:
    """Mark rows that have the same pair and values as an earlier row."""
    rows = np.flatnonzero(state.good)
    keys = np.stack([pair.astype(float), *values], 1)[rows]
    order = np.lexsort((rows, *keys.T[::-1]))  # among equal rows, the first in the file comes first
    same = np.concatenate([[False], (keys[order][1:] == keys[order][:-1]).all(1)])
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    original = np.zeros(len(pair), dtype=np.int64)
    original[rows[order]] = state.numbers[rows[first]]
    repeated = np.zeros(len(pair), dtype=bool)
    repeated[rows[order[same]]] = True
    state.mark(repeated, "duplicate", lambda i: f"repeats row {original[i]}")


def _check_order(state: _State, pair: np.ndarray, onset: np.ndarray, duration: np.ndarray) -> None:
    """Mark rows that begin before the last good row of the same pair, earlier in the file, has ended."""
    rows = np.flatnonzero(state.good)
    rows = rows[np.argsort(pair[rows], kind="stable")]
    end = onset + duration
    early = np.flatnonzero(
        (pair[rows][1:] == pair[rows][:-1]) & (onset[rows][1:] < end[rows][:-1] - OVERLAP - ROUNDING)
    )
    # A marked row is not compared with the rows after it, so a pair with a fault is gone through row by row.
    faulty = np.unique(pair[rows][early])
    back: dict[int, str] = {}
    over: dict[int, str] = {}
    for code in faulty:
        last = -1
        for i in rows[pair[rows] == code].tolist():
            if last >= 0 and onset[i] < onset[last]:
                gap = onset[last] - onset[i]
                back[i] = (
                    f"begins {gap:.6g} s before row {state.numbers[last]}, which comes earlier in the file"
                )
            elif last >= 0 and onset[i] < end[last] - OVERLAP - ROUNDING:
                over[i] = f"begins {end[last] - onset[i]:.6g} s before row {state.numbers[last]} ends"
            else:
                last = i
    state.mark_each("unordered", back)
    state.mark_each("overlap", over)


# --- messages ------------------------------------------------------------------------------------------------


def _refusal(report: Report) -> str:
    return (
        f"{len(report.problems)} of its {report.rows} rows are bad ({_kinds(report)}): {_told(report.problems)}. "
        "Correct them, or leave them out with policy='skip'"
    )


def _kinds(report: Report) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in report.counts.items())


def _told(bad: Sequence[Problem]) -> str:
    """What is wrong with the first rows, and how many more there are."""
    told = "; ".join(f"row {problem.row}: {problem.detail}" for problem in bad[:SHOWN])
    return told + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
