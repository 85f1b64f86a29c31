"""A lab's own fixations: read from a table, checked row by row, in seconds of the movie and pixels of its frame."""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from .. import _checks as check
from .sidecar import UNITS, Movie, Shown, Sidecar
from .video import VideoError

POLICIES = ("refuse", "skip")
BLANK = ("", ".", "NA", "N/A", "NaN", "nan", "null", "None")  # cells that say nothing; "." is EyeLink's
OVERLAP = 1e-3  # seconds two fixations may share: trackers round times to their samples
DISAGREEMENT = 5e-3  # seconds between offset - onset and duration: trackers count the last sample or don't
DURATIONS = (0.03, 3.0)  # seconds: a median fixation outside of this is in another unit
TYPICAL = 0.3  # seconds, about a median fixation: tells which unit was meant
SHOWN = 8  # problems told one by one in a message


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row. row: as in the file, where a CSV's header is row 1."""

    row: int
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What became of every row of a table: rows = kept + those left out + those with a problem.

    left_out   rows that weren't asked for (another eye, another event, blank lines), by reason
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
        """The rows that have a problem of this kind."""
        return tuple(problem.row for problem in self.problems if problem.kind == kind)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows, {self.kept} kept"]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out.items()]
        for kind, count in self.counts.items():
            lines.append(f"  {count} with a problem: {kind} (row {_listed(self.rows_with(kind))})")
        return "\n".join(lines)


class FixationError(ValueError):
    """A table that is refused. `report` tells every row that is bad; None if it never came to rows."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, eq=False)
class Fixations:
    """Checked fixations, (n,) arrays that can't be written to; those of one participant and movie lie together.

    participant, movie   names
    onset, duration      seconds; onset after frame 0 of the movie was shown
    x, y                 pixels of the movie's frame, from its upper left corner: x to the right, y down
    row                  of the table, as messages name it
    movies               what is known of each movie, by name
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
        self.__post_init__()  # arrays come out of a pickle writable

    def __len__(self) -> int:
        return len(self.onset)

    def __repr__(self) -> str:
        return f"Fixations({len(self)} of {len(self.pairs())} participant–movie pairs, {self.report.source})"

    def pairs(self) -> dict[tuple[str, str], slice]:
        """Where the fixations of each (participant, movie) lie."""
        if not len(self):
            return {}
        new = (self.participant[1:] != self.participant[:-1]) | (self.movie[1:] != self.movie[:-1])
        starts = [0, *(np.flatnonzero(new) + 1).tolist(), len(self)]
        return {
            (str(self.participant[a]), str(self.movie[a])): slice(a, b) for a, b in itertools.pairwise(starts)
        }

    def select(self, which: np.ndarray) -> Fixations:
        """Those that a mask (n,) or an array of increasing indices picks."""
        return replace(self, **{name: array[which] for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("participant", "movie", "onset", "duration", "x", "y", "row")
        return {name: getattr(self, name) for name in names}


def read(
    table: str | Path,
    sidecar: Sidecar | str | Path | None = None,
    *,
    policy: str = "refuse",
    eye: str | None = None,
    event: str = "fixation",
) -> Fixations:
    """Fixations from a CSV or parquet file with one row a fixation.

    Columns: participant, movie, onset, offset or duration (or both), x, y; others may be there. With a column eye,
    `eye` ("left", "right", …) picks one; with a column name, `event` picks the rows that have that name. In a CSV,
    fields are separated by comma, semicolon or tab. sidecar: units and the like (docs/data.md), by default
    TABLE.yaml beside the table.

    policy: a bad row is counted and named, and then the whole table is refused ("refuse") or the row left out
    ("skip"), as `report` of the result tells. Bad: a field missing or not a number, a duration that isn't positive
    or isn't offset - onset, a movie that the sidecar doesn't list or whose film can't be read, a position outside
    the frame, an onset before the movie, a midpoint after it, and, within a participant and movie, a repeated row,
    an onset before that of an earlier row, and an overlap with an earlier row. Under either policy a table is
    refused where most rows tell that its units or its sidecar are wrong, or where no row is good.

    Raises FixationError naming file and row, ValueError for a sidecar that is wrong, VideoError for a film whose
    head can't be read, FileNotFoundError.
    """
    table = Path(table)
    if sidecar is None:
        sidecar = _beside(table)
    arrow, rows, malformed = _read_file(table)
    return _checked(
        arrow,
        Names(),
        _sidecar(sidecar),
        source=str(table),
        rows=rows,
        problems=malformed,
        policy=policy,
        eye=eye,
        event=event,
    )


def from_eyelink(
    report: str | Path,
    sidecar: Sidecar | str | Path | None = None,
    *,
    movie: str,
    participant: str = "RECORDING_SESSION_LABEL",
    policy: str = "refuse",
    eye: str | None = None,
) -> Fixations:
    """Fixations from a fixation report of EyeLink Data Viewer (text, tab between fields, times in ms).

    movie, participant: the report's columns that name them. Beyond those it needs CURRENT_FIX_START,
    CURRENT_FIX_DURATION or CURRENT_FIX_END, CURRENT_FIX_X and CURRENT_FIX_Y; EYE_USED is used if it is there.
    Data Viewer counts CURRENT_FIX_START from the start of the trial: `movie_start` in the sidecar is then the time
    within the trial at which frame 0 was shown. Else as `read`.
    """
    path = Path(report)
    if sidecar is None:
        sidecar = _beside(path)
    names = Names(
        participant=participant,
        movie=movie,
        onset="CURRENT_FIX_START",
        offset="CURRENT_FIX_END",
        duration="CURRENT_FIX_DURATION",
        x="CURRENT_FIX_X",
        y="CURRENT_FIX_Y",
        eye="EYE_USED",
        name=None,
    )
    arrow, rows, malformed = _read_csv(path, names.texts(), delimiter="\t")
    if (
        names.duration in arrow.column_names
    ):  # the end of a fixation is its last sample's time: use the duration
        names = replace(names, offset=None)
    return _checked(
        arrow,
        names,
        _sidecar(sidecar),
        source=str(path),
        rows=rows,
        problems=malformed,
        policy=policy,
        eye=eye,
        unit="ms",
    )


def from_pymovements(
    events: Any,
    sidecar: Sidecar | str | Path,
    *,
    movie: str,
    participant: str,
    policy: str = "refuse",
    eye: str | None = None,
    event: str = "fixation",
) -> Fixations:
    """Fixations from pymovements' events: its `Events`, or their polars frame; times in ms.

    movie, participant: the columns (of the trial) that name them. Rows with name == `event` are taken; the position
    is `location_x` and `location_y`, or the list column `location`, in pixels of the screen. Rows are counted from
    1. Else as `read`.
    """
    frame = getattr(events, "frame", events)
    if not hasattr(frame, "to_arrow"):
        raise TypeError(
            f"events must be a polars frame or pymovements' Events, got {type(events).__name__}, "
            "which has no to_arrow()"
        )
    arrow = frame.to_arrow()
    if "location" in arrow.column_names and "location_x" not in arrow.column_names:
        pairs = arrow.column("location").to_pylist()
        for axis, column in enumerate(("location_x", "location_y")):
            values = [None if pair is None or len(pair) < 2 else pair[axis] for pair in pairs]
            arrow = arrow.append_column(column, pa.array(values, pa.float64()))
    names = Names(participant=participant, movie=movie, x="location_x", y="location_y")
    rows = np.arange(1, arrow.num_rows + 1)
    return _checked(
        arrow,
        names,
        _sidecar(sidecar),
        source="events",
        rows=rows,
        problems=[],
        policy=policy,
        eye=eye,
        event=event,
        unit="ms",
    )


@dataclass(frozen=True)
class Names:
    """What the columns are called in a table; None for one that isn't to be looked for."""

    participant: str = "participant"
    movie: str = "movie"
    onset: str = "onset"
    offset: str | None = "offset"
    duration: str | None = "duration"
    x: str = "x"
    y: str = "y"
    eye: str | None = "eye"
    name: str | None = "name"

    def texts(self) -> tuple[str, ...]:
        """Columns that are text even where they look like numbers: a participant 007 isn't 7."""
        return tuple(column for column in (self.participant, self.movie, self.eye, self.name) if column)


def _beside(table: Path) -> Path:
    for path in (table.with_name(table.name + ".yaml"), table.with_suffix(".yaml")):
        if path.exists():
            return path
    raise FileNotFoundError(f"{table}: no sidecar {table.name}.yaml beside it, and none was given")


def _sidecar(sidecar: Sidecar | str | Path) -> Sidecar:
    return sidecar if isinstance(sidecar, Sidecar) else Sidecar.read(sidecar)


def _read_file(table: Path) -> tuple[pa.Table, np.ndarray, list[Problem]]:
    """The table, the number of each row, and the rows that couldn't be split into fields."""
    if table.suffix.lower() not in (".parquet", ".pq"):
        return _read_csv(table, Names().texts())
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file")
    try:
        arrow = pyarrow.parquet.read_table(table)
    except pa.ArrowException as error:
        raise FixationError(f"{table}: not a parquet file that can be read: {error}") from error
    return arrow, np.arange(1, arrow.num_rows + 1), []


def _read_csv(
    table: Path, texts: Sequence[str], delimiter: str | None = None
) -> tuple[pa.Table, np.ndarray, list[Problem]]:
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file")
    with table.open("rb") as body:
        encoding = "utf-16" if body.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        with table.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as text:
            first = text.readline()
    except UnicodeDecodeError as error:
        raise FixationError(f"{table}: not text in UTF-8 or UTF-16: {error}") from error
    if not first.strip():
        raise FixationError(f"{table}: its first row, which names the columns, is empty")
    if delimiter is None:
        delimiter = max(",;\t", key=first.count)
    header = [name.strip() for name in next(csv.reader([first.rstrip("\r\n")], delimiter=delimiter))]
    malformed: list[Problem] = []

    def note(row: Any) -> str:
        detail = f"has {row.actual_columns} fields, the header has {row.expected_columns}"
        malformed.append(Problem(int(row.number), "wrong number of fields", detail))
        return "skip"

    try:
        arrow = pyarrow.csv.read_csv(
            table,
            # one thread, or rows that are skipped come without their number
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, encoding=encoding, column_names=header, skip_rows=1
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, ignore_empty_lines=False, invalid_row_handler=note
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in texts if name in header}, null_values=BLANK
            ),
        )
    except pa.ArrowException as error:
        raise FixationError(f"{table}: not a CSV file that can be read: {error}") from error
    bad = {problem.row for problem in malformed}
    total = arrow.num_rows + len(bad)
    rows = np.array([row for row in range(2, total + 2) if row not in bad], dtype=np.int64)
    return arrow, rows, malformed


class _Rows:
    """The rows of a table: which are left out and why, and the first problem found with each."""

    def __init__(self, source: str, numbers: np.ndarray, problems: list[Problem]) -> None:
        self.source = source
        self.numbers = numbers
        self.good = np.ones(len(numbers), dtype=bool)
        self.problems = list(problems)
        self.left_out: dict[str, int] = {}
        self.total = len(numbers) + len(problems)

    def leave_out(self, which: np.ndarray, reason: str) -> None:
        """Drop rows that aren't asked for."""
        which = which & self.good
        if which.any():
            self.left_out[reason] = int(which.sum())
            self.good &= ~which

    def mark(self, which: np.ndarray, kind: str, detail: str | Callable[[int], str]) -> int:
        """Note a problem with the rows of a mask that have none yet; return how many."""
        found = np.flatnonzero(which & self.good).tolist()
        return self.mark_each(kind, {i: detail if isinstance(detail, str) else detail(i) for i in found})

    def mark_each(self, kind: str, details: Mapping[int, str]) -> int:
        """Note a problem with the rows that `details` tells of, if they have none yet; return how many."""
        found = [i for i in details if self.good[i]]
        self.problems += [Problem(int(self.numbers[i]), kind, details[i]) for i in found]
        self.good[found] = False
        return len(found)

    def report(self) -> Report:
        problems = tuple(sorted(self.problems, key=lambda problem: problem.row))
        return Report(self.source, self.total, int(self.good.sum()), problems, dict(self.left_out))

    def refuse(self, why: str) -> FixationError:
        return FixationError(f"{self.source}: {why}", self.report())


def _checked(
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
) -> Fixations:
    """The fixations of a table: what is wrong with each row, in the order in which one check needs another."""
    check.one_of("policy", policy, POLICIES)
    seconds = sidecar.unit(unit)
    columns = _find(arrow, names, source)
    state = _Rows(source, rows, problems)

    participant, movie = _text(columns["participant"]), _text(columns["movie"])
    numbers: dict[str, tuple[np.ndarray, dict[int, str]]] = {
        key: _numbers(columns[key]) for key in ("onset", "offset", "duration", "x", "y") if key in columns
    }
    blank = (participant == "") & (movie == "")
    for values, texts in numbers.values():
        blank &= np.isnan(values)
        blank[list(texts)] = False
    state.leave_out(blank, "blank line")
    if "name" in columns:
        kinds = _text(columns["name"])
        if event not in kinds:
            found = ", ".join(sorted(set(kinds.tolist()))[:SHOWN])
            raise FixationError(f"{source}: no row has the name {event!r}; names that are there: {found}")
        state.leave_out(kinds != event, f"name isn't {event}")
    if "eye" in columns:
        _pick_eye(state, _text(columns["eye"]), participant, eye)
    elif eye is not None:
        raise FixationError(f"{source}: eye={eye!r} was asked for, but there is no column {names.eye!r}")

    for key, values in (("participant", participant), ("movie", movie)):
        state.mark(values == "", f"{key} missing", f"has no {key}")
    for key, (_, texts) in numbers.items():
        state.mark_each("not a number", {i: f"{key} is {text!r}" for i, text in texts.items()})
    time = {key: values * seconds for key, (values, _) in numbers.items() if key not in ("x", "y")}
    onset = time["onset"]
    duration = time["duration"] if "duration" in time else time["offset"] - onset
    for key, values in time.items():
        state.mark(~np.isfinite(values), "time missing", f"{key} is missing or not finite")
    for key in ("x", "y"):
        state.mark(~np.isfinite(numbers[key][0]), "position missing", f"{key} is missing or not finite")
    if not state.good.any():
        raise state.refuse(f"none of its {state.total} rows can be used\n{state.report()}")
    _check_unit(state, duration[state.good], seconds, sidecar)
    state.mark(~(duration > 0), "duration not positive", lambda i: f"lasts {duration[i]:g} s")
    if "duration" in time and "offset" in time:
        gap = time["offset"] - onset - duration
        state.mark(
            ~(np.abs(gap) <= DISAGREEMENT),
            "offset and duration disagree",
            lambda i: f"offset - onset is {time['offset'][i] - onset[i]:g} s, duration {duration[i]:g} s",
        )

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
    onset, x, y = _in_the_movie(
        state, known, participant, movie, onset, numbers["x"][0], numbers["y"][0], seconds
    )
    _check_places(state, known, movie, onset, duration, x, y)
    pair = _codes(participant, movie)
    _check_repeats(state, pair, (onset, duration, x, y))
    _check_order(state, pair, onset, duration)

    report = state.report()
    if report.problems and policy == "refuse":
        raise state.refuse(_refusal(report))
    if not report.kept:
        raise state.refuse(f"none of its {state.total} rows can be used\n{report}")
    kept = np.flatnonzero(state.good)
    first: dict[int, int] = {}
    for code in pair[kept].tolist():
        first.setdefault(code, len(first))
    kept = kept[np.argsort([first[code] for code in pair[kept].tolist()], kind="stable")]
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


def _find(arrow: pa.Table, names: Names, source: str) -> dict[str, pa.ChunkedArray]:
    """The columns that are there, by what they mean. Raises FixationError for one missing or there twice."""
    present = arrow.column_names
    columns = {}
    for key in ("participant", "movie", "onset", "offset", "duration", "x", "y", "eye", "name"):
        name = getattr(names, key)
        if name is None:
            continue
        if present.count(name) > 1:
            raise FixationError(f"{source}: {present.count(name)} columns are called {name!r}")
        if name in present:
            columns[key] = arrow.column(name)
        elif key not in ("offset", "duration", "eye", "name"):
            raise FixationError(f"{source}: no column {name!r}; there are {', '.join(present)}")
    if "offset" not in columns and "duration" not in columns:
        wanted = " or ".join(repr(name) for name in (names.offset, names.duration) if name)
        raise FixationError(f"{source}: no column {wanted}; there are {', '.join(present)}")
    return columns


def _text(column: pa.ChunkedArray) -> np.ndarray:
    """Values as text without spaces around; "" for one that is missing."""
    values = ["" if value is None else str(value).strip() for value in column.to_pylist()]
    return np.array(["" if value in BLANK else value for value in values], dtype=np.str_)


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, dict[int, str]]:
    """Values as float64, NaN for one that is missing, and the text of those that aren't numbers."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64), {}
    values = np.full(len(column), np.nan)
    texts: dict[int, str] = {}
    for i, value in enumerate(column.to_pylist()):
        if value is None or str(value).strip() in BLANK:
            continue
        try:
            values[i] = float(value)
        except (TypeError, ValueError):
            texts[i] = str(value)
    return values, texts


def _pick_eye(state: _Rows, eyes: np.ndarray, participant: np.ndarray, eye: str | None) -> None:
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
                f"say which to take, as eye={there[0]!r}"
            )


def _check_unit(state: _Rows, durations: np.ndarray, seconds: float, sidecar: Sidecar) -> None:
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


def _in_the_movie(
    state: _Rows,
    known: Mapping[str, Shown],
    participant: np.ndarray,
    movie: np.ndarray,
    onset: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    seconds: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Onsets since the movie's start, and positions in its frame."""
    onset, x, y = onset.copy(), x.copy(), y.copy()
    for name, how in known.items():
        of_movie = movie == name
        x[of_movie] = (x[of_movie] - how.offset[0]) * how.scale[0]
        y[of_movie] = (y[of_movie] - how.offset[1]) * how.scale[1]
        if not isinstance(how.start, Mapping):
            onset[of_movie] -= how.start * seconds
            continue
        start = np.array([how.start.get(str(who), np.nan) for who in participant[of_movie]])
        onset[of_movie] -= start * seconds
    state.mark(
        np.isnan(onset),
        "movie start missing",
        lambda i: f"movie_start has no time for movie {str(movie[i])!r}, participant {str(participant[i])!r}",
    )
    return onset, x, y


def _check_places(
    state: _Rows,
    known: Mapping[str, Shown],
    movie: np.ndarray,
    onset: np.ndarray,
    duration: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> None:
    """Within the movie in time and in its frame in space."""
    movies = {name: how.movie for name, how in known.items()}
    sizes = np.array([movies[m].size if m in movies else (0, 0) for m in movie.tolist()], dtype=float)
    ends = np.array([movies[m].end if m in movies else 0 for m in movie.tolist()])
    candidates = state.good.copy()
    if not candidates.any():
        return
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


def _codes(participant: np.ndarray, movie: np.ndarray) -> np.ndarray:
    """A number for each (participant, movie)."""
    people, who = np.unique(participant, return_inverse=True)
    _, what = np.unique(movie, return_inverse=True)
    return what * len(people) + who


def _check_repeats(state: _Rows, pair: np.ndarray, values: tuple[np.ndarray, ...]) -> None:
    rows = np.flatnonzero(state.good)
    keys = np.stack([pair.astype(float), *values], 1)[rows]
    order = np.lexsort((rows, *keys.T[::-1]))  # of equal rows, the first in the file comes first
    same = np.concatenate([[False], (keys[order][1:] == keys[order][:-1]).all(1)])
    first = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    original = np.zeros(len(pair), dtype=np.int64)
    original[rows[order]] = state.numbers[rows[first]]
    repeated = np.zeros(len(pair), dtype=bool)
    repeated[rows[order[same]]] = True
    state.mark(repeated, "duplicate", lambda i: f"repeats row {original[i]}")


def _check_order(state: _Rows, pair: np.ndarray, onset: np.ndarray, duration: np.ndarray) -> None:
    """Within a pair: each row begins after the last good one before it in the file has ended."""
    rows = np.flatnonzero(state.good)
    rows = rows[np.argsort(pair[rows], kind="stable")]
    end = onset + duration
    early = np.flatnonzero((pair[rows][1:] == pair[rows][:-1]) & (onset[rows][1:] < end[rows][:-1] - OVERLAP))
    # a row that is skipped changes which one the next is held against: only pairs with a fault are gone through
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
            elif last >= 0 and onset[i] < end[last] - OVERLAP:
                over[i] = f"begins {end[last] - onset[i]:.6g} s before row {state.numbers[last]} ends"
            else:
                last = i
    state.mark_each("unordered", back)
    state.mark_each("overlap", over)


def _refusal(report: Report) -> str:
    bad = report.problems
    told = "; ".join(f"row {problem.row}: {problem.detail}" for problem in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    return (
        f"{len(bad)} of its {report.rows} rows are bad ({kinds}): {told}{more}. Correct them, or leave them out with "
        "policy='skip'"
    )


def _listed(rows: Sequence[int]) -> str:
    more = f", … {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(map(str, rows[:SHOWN])) + more
