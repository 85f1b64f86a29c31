"""A lab's own fixations, from a table, an EyeLink report or pymovements' events.

Every way of reading gives `Fixations`: times in seconds of the movie and positions in pixels of its frame, with every
row checked (`rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from . import delimited
from .columns import BLANK, Names, as_numbers, as_text, find
from .report import SHOWN, FixationError, Problem, Report
from .rows import (
    DISAGREEMENT,
    DURATIONS,
    OVERLAP,
    POLICIES,
    TYPICAL,
    Fixations,
    checked,
)
from .sidecar import Column, Sidecar
from .video import VideoError

LASTING = 0.25  # seconds of a fixation whose duration isn't known

__all__ = [
    "BLANK",
    "DISAGREEMENT",
    "DURATIONS",
    "OVERLAP",
    "POLICIES",
    "SHOWN",
    "TYPICAL",
    "FixationError",
    "Fixations",
    "Names",
    "Problem",
    "Report",
    "from_eyelink",
    "from_pymovements",
    "read",
]


def read(
    table: str | Path,
    sidecar: Sidecar | str | Path | None = None,
    *,
    policy: str = "refuse",
    eye: str | None = None,
    event: str = "fixation",
) -> Fixations:
    """Read a CSV or parquet file that has one row per fixation.

    The columns participant, movie, x, y, onset, and offset or duration (or both) are needed; others may be there. If
    there is a column eye, `eye` ("left", "right", …) picks the rows of one eye; if there is a column name, `event`
    picks the rows of that name. `delimited.read` says which text files are read. sidecar: the file that gives units and
    the like (docs/data.md), by default TABLE.yaml beside the table; it may also say what columns are called, in which
    units they are, in which row their names stand and how the text is encoded. With order: true in it, the table has no
    onset, and need not have durations (`with_onsets`).

    policy: what becomes of bad rows, which are counted and named in any case. "refuse" refuses the whole table; "skip"
    leaves them out, and the result's `report` names them. A row is bad if

    - it can't be split into as many fields as there are columns, or a field is missing or not a number,
    - its duration isn't positive or isn't offset - onset,
    - the sidecar doesn't list its movie, or the movie's film can't be read,
    - its position is outside the frame, its onset before the movie's start or its midpoint after the movie's end,
    - within a participant and movie, it repeats an earlier row, begins before one, or overlaps with one.

    A table is refused under either policy if most of its rows show that its units or its sidecar are wrong, or if no
    row is good.

    Raises FixationError, which names file and rows; ValueError for a wrong sidecar; VideoError for a film whose header
    can't be read; FileNotFoundError.
    """
    table = existing(table)
    if sidecar is None:
        sidecar = beside(table)
    said = sidecar_of(sidecar)
    names = replace(Names(), **{key: one.name or key for key, one in said.columns.items()})
    arrow, rows, malformed = read_table(table, names.all(), said)
    arrow = with_values(arrow, names, said, table)
    if said.order:
        arrow, said = with_onsets(arrow, names, said, table)
    return checked(
        arrow,
        names,
        said,
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
    """Read a fixation report of EyeLink Data Viewer: text with tabs, or commas, between fields; times in ms.

    movie, participant: the columns that name them. Beside those, the report needs CURRENT_FIX_START, CURRENT_FIX_X,
    CURRENT_FIX_Y, and CURRENT_FIX_DURATION or CURRENT_FIX_END; EYE_USED is used if it is there. Data Viewer counts
    CURRENT_FIX_START from the start of the trial, so `movie_start` in the sidecar is the time within the trial at which
    frame 0 was shown. All else is as in `read`.
    """
    path = existing(report)
    if sidecar is None:
        sidecar = beside(path)
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
    said = _without_columns(sidecar_of(sidecar))
    arrow, rows, malformed = read_table(path, names.all(), said)
    if names.duration in arrow.column_names:
        # The end of a fixation is the time of its last sample, so the two differ by a sample: the duration is right.
        names = replace(names, offset=None)
    return checked(
        arrow,
        names,
        said,
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
    """Take fixations from pymovements' `Events` or their polars frame; times are in ms.

    movie, participant: the (trial) columns that name them. Rows whose name is `event` are taken. The position is in
    pixels of the screen, in the columns `location_x` and `location_y` or in the list column `location`. Rows are
    numbered from 1. All else is as in `read`.

    Raises also TypeError if `events` is of another type.
    """
    frame = getattr(events, "frame", events)
    if not hasattr(frame, "to_arrow"):
        raise TypeError(
            f"events must be a polars frame or pymovements' Events, got {type(events).__name__}, "
            "which has no to_arrow()"
        )
    arrow = with_axes(frame.to_arrow())
    names = Names(participant=participant, movie=movie, x="location_x", y="location_y")
    rows = np.arange(1, arrow.num_rows + 1)
    return checked(
        arrow,
        names,
        _without_columns(sidecar_of(sidecar)),
        source="events",
        rows=rows,
        problems=[],
        policy=policy,
        eye=eye,
        event=event,
        unit="ms",
    )


def with_values(arrow: pa.Table, names: Names, said: Sidecar, table: Path) -> pa.Table:
    """The table with the columns of which the sidecar says the value. Raises FixationError if it has one of them."""
    for key, one in said.columns.items():
        if one.value is not None:
            if getattr(names, key) in arrow.column_names:
                raise FixationError(f"{table}: has a column {key!r}, for which {said.source} has a value")
            values = pa.array([one.value] * arrow.num_rows, pa.string())
            arrow = arrow.append_column(getattr(names, key), values)
    return arrow


def with_onsets(arrow: pa.Table, names: Names, said: Sidecar, table: str | Path) -> tuple[pa.Table, Sidecar]:
    """A table of pictures whose rows are in order with an onset, and the sidecar with its unit.

    A participant's fixations of a picture follow one another without a gap. Without durations each lasts `LASTING`.

    Raises FixationError if the table has an onset, lacks participant or movie, or has rows of a film, whose frames need
    a time.
    """
    if names.onset in arrow.column_names or names.offset in arrow.column_names:
        there = names.onset if names.onset in arrow.column_names else names.offset
        raise FixationError(
            f"{table}: has a column {there!r}, and {said.source} says order: true, which has no clock"
        )
    find(arrow, names, str(table), without=("onset", "duration"))
    who, movie = (as_text(arrow.column(name)) for name in (names.participant, names.movie))
    for name in sorted(set(movie.tolist()) - {""}):
        try:
            how = said.shown(name)
        except VideoError:
            continue  # named with its rows, or raised, by the checks of all tables
        if how is not None and math.isfinite(how.movie.end):
            raise FixationError(
                f"{table}: {name!r} is a film, and order: true goes with pictures: a film needs onsets"
            )
    columns = dict(said.columns)
    if names.duration not in arrow.column_names:
        assert names.duration is not None
        arrow = arrow.append_column(names.duration, pa.array([LASTING] * len(who), pa.float64()))
        columns["duration"] = Column(names.duration, unit="s")
    unit = replace(said, columns=columns).unit(None, "duration")
    lasting = np.clip(
        np.nan_to_num(as_numbers(arrow.column(names.duration), said.decimal)[0] * unit), 0, None
    )
    onset = np.empty(len(lasting))
    now: dict[tuple[str, str], float] = {}
    for i, pair in enumerate(zip(who.tolist(), movie.tolist(), strict=True)):
        onset[i] = now.get(pair, 0.0)
        now[pair] = onset[i] + lasting[i]
    columns["onset"] = Column(names.onset, unit="s")
    return arrow.append_column(names.onset, pa.array(onset)), replace(said, columns=columns)


def with_axes(arrow: pa.Table) -> pa.Table:
    """Events of pymovements with location_x and location_y, if they have the list location."""
    if "location" in arrow.column_names and "location_x" not in arrow.column_names:
        pairs = arrow.column("location").to_pylist()
        for axis, column in enumerate(("location_x", "location_y")):
            values = [None if pair is None or len(pair) < 2 else pair[axis] for pair in pairs]
            arrow = arrow.append_column(column, pa.array(values, pa.float64()))
    return arrow


def existing(table: str | Path) -> Path:
    """The path. Raises FileNotFoundError if it isn't a file, before anything is said of its sidecar."""
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file" if not table.exists() else f"{table}: not a file")
    return table


def _ipc(body: BinaryIO) -> pa.Table:
    """A table in Arrow's file format, with text as plain strings: functions of pyarrow lack views of them."""
    arrow = pa.ipc.open_file(body).read_all()
    plain = [
        one.with_type(pa.large_string()) if one.type == pa.string_view() else one for one in arrow.schema
    ]
    return arrow.cast(pa.schema(plain))


def beside(table: Path) -> Path:
    for path in (table.with_name(table.name + ".yaml"), table.with_suffix(".yaml")):
        if path.exists():
            return path
    raise FileNotFoundError(f"{table}: no sidecar {table.name}.yaml beside it, and none was given")


def sidecar_of(sidecar: Sidecar | str | Path) -> Sidecar:
    return sidecar if isinstance(sidecar, Sidecar) else Sidecar.read(sidecar)


def _without_columns(said: Sidecar) -> Sidecar:
    """The sidecar. Raises ValueError if it says what columns are called, which this way of reading says already."""
    if said.columns or said.order:
        key = "columns" if said.columns else "order"
        raise ValueError(
            f"{said.source}: {key} doesn't go with this format, whose columns are known, but with a table (--format "
            "table)"
        )
    return said


def read_table(
    table: Path, wanted: Sequence[str], said: Sidecar | None = None
) -> tuple[pa.Table, np.ndarray, list[Problem]]:
    """The table, the number of each of its rows in the file, and problems of rows that aren't in it.

    Those are rows that couldn't be split into fields. Whether it is parquet, Arrow (feather) or text, its content says.
    wanted: names of columns, by which a text's delimiter is told.

    Raises FixationError if it can't be read; OSError.
    """
    with table.open("rb") as body:
        begin = body.read(6)
        kind = "a parquet" if begin[:4] == b"PAR1" or table.suffix.lower() in (".parquet", ".pq") else "text"
        kind = "an Arrow" if begin == b"ARROW1" or table.suffix.lower() in (".feather", ".arrow") else kind
        if kind == "text":
            header, encoding = (1, None) if said is None else (said.header, said.encoding)
            return delimited.read(table, wanted, header_row=header, encoding=encoding)
        body.seek(0)
        try:
            arrow = pyarrow.parquet.read_table(body) if kind == "a parquet" else _ipc(body)
            arrow.validate(full=True)  # which text that isn't UTF-8 and broken columns would pass otherwise
            arrow.column_names  # noqa: B018 - decodes them
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FixationError(f"{table}: not {kind} file that can be read: {error}") from error
    return arrow, np.arange(1, arrow.num_rows + 1), []
