"""A lab's own fixations, from a table, an EyeLink report or pymovements' events.

Every way of reading gives `Fixations`: times in seconds of the movie and positions in pixels of its frame, with every
row checked (`rows`).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from .report import SHOWN, FixationError, Problem, Report
from .rows import (
    BLANK,
    DISAGREEMENT,
    DURATIONS,
    OVERLAP,
    POLICIES,
    TYPICAL,
    Fixations,
    Names,
    checked,
)
from .sidecar import Sidecar

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
    picks the rows of that name. The fields of a CSV are separated by comma, semicolon or tab. sidecar: the file that
    gives units and the like (docs/data.md), by default TABLE.yaml beside the table.

    policy: what becomes of bad rows, which are counted and named in any case. "refuse" refuses the whole table; "skip"
    leaves them out, and the result's `report` names them. A row is bad if

    - a field is missing or not a number,
    - its duration isn't positive or isn't offset - onset,
    - the sidecar doesn't list its movie, or the movie's film can't be read,
    - its position is outside the frame, its onset before the movie's start or its midpoint after the movie's end,
    - within a participant and movie, it repeats an earlier row, begins before one, or overlaps with one.

    A table is refused under either policy if most of its rows show that its units or its sidecar are wrong, or if no
    row is good.

    Raises FixationError, which names file and rows; ValueError for a wrong sidecar; VideoError for a film whose header
    can't be read; FileNotFoundError.
    """
    table = Path(table)
    if sidecar is None:
        sidecar = _beside(table)
    arrow, rows, malformed = _read_file(table)
    return checked(
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
    """Read a fixation report of EyeLink Data Viewer: text with tabs between fields, times in ms.

    movie, participant: the columns that name them. Beside those, the report needs CURRENT_FIX_START, CURRENT_FIX_X,
    CURRENT_FIX_Y, and CURRENT_FIX_DURATION or CURRENT_FIX_END; EYE_USED is used if it is there. Data Viewer counts
    CURRENT_FIX_START from the start of the trial, so `movie_start` in the sidecar is the time within the trial at which
    frame 0 was shown. All else is as in `read`.
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
    if names.duration in arrow.column_names:
        # The end of a fixation is the time of its last sample, so the two differ by a sample: the duration is right.
        names = replace(names, offset=None)
    return checked(
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
    arrow = frame.to_arrow()
    if "location" in arrow.column_names and "location_x" not in arrow.column_names:
        pairs = arrow.column("location").to_pylist()
        for axis, column in enumerate(("location_x", "location_y")):
            values = [None if pair is None or len(pair) < 2 else pair[axis] for pair in pairs]
            arrow = arrow.append_column(column, pa.array(values, pa.float64()))
    names = Names(participant=participant, movie=movie, x="location_x", y="location_y")
    rows = np.arange(1, arrow.num_rows + 1)
    return checked(
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


def _beside(table: Path) -> Path:
    for path in (table.with_name(table.name + ".yaml"), table.with_suffix(".yaml")):
        if path.exists():
            return path
    raise FileNotFoundError(f"{table}: no sidecar {table.name}.yaml beside it, and none was given")


def _sidecar(sidecar: Sidecar | str | Path) -> Sidecar:
    return sidecar if isinstance(sidecar, Sidecar) else Sidecar.read(sidecar)


def _read_file(table: Path) -> tuple[pa.Table, np.ndarray, list[Problem]]:
    """The table, the number of each of its rows in the file, and problems of rows that aren't in it.

    Those are rows that couldn't be split into fields.
    """
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
    """As `_read_file`, of a text file in UTF-8 or UTF-16.

    texts: columns that are read as text; delimiter: None for the one of comma, semicolon and tab that the header has
    most of.
    """
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
            # with several threads, skipped rows come without their number
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
