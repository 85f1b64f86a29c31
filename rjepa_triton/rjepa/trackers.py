"""Fixations from files of eye trackers' own programs: exports of Tobii, SMI, Pupil Labs and pymovements.

`read` takes each of `formats.FORMATS`; EyeLink's .asc files and BIDS are in files of their own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import _checks as check
from . import asc, bids, delimited, fixations
from .columns import Names, as_numbers, as_text
from .fixations import beside, existing, read_table, sidecar_of, with_axes, with_values
from .formats import FORMATS, KINDS, Called, Kind
from .report import FixationError, Problem
from .rows import Fixations, checked
from .sidecar import Column, Sidecar

IDF = (
    "Table Header for Fixations:"  # in files of SMI's event detector, above the names of a fixation's columns
)
ENOUGH = 3  # fixations from which the unit of their onsets can be told
SLOW = 50.0  # so many durations from one onset to the next, at the median, don't occur in a recording


def read(
    format: str,
    table: str | Path,
    sidecar: Sidecar | str | Path | None = None,
    *,
    movie: str = "movie",
    policy: str = "refuse",
    eye: str | None = None,
) -> Fixations:
    """Read fixations from a file of one of `FORMATS`, with every row checked as `fixations.read` does.

    movie: of a report of EyeLink Data Viewer, the column that names the movie. Other formats know what columns are
    called, and in which units they are; what the sidecar's `columns` says comes first, and it has to name what the file
    doesn't hold, such as columns: {movie: {value: film}}.

    - Rows of samples, as Tobii has them, are gathered to fixations: the first row of each counts, the others are left
      out and counted, as are fixations while no movie was shown, and those beside the picture of Pupil Labs.
    - "Recording timestamp" of Tobii Pro Lab, which has no unit, is in ms or µs, by the fixations' durations.

    Raises ValueError for another format, for columns of the movie's frame with a sidecar that has a screen, and what
    `fixations.read` raises.
    """
    check.one_of("format", format, FORMATS)
    options: dict[str, Any] = {"policy": policy, "eye": eye}
    if format == "eyelink":
        return fixations.from_eyelink(table, sidecar, movie=movie, **options)
    if format == "table":
        return fixations.read(table, sidecar, **options)
    path = existing(table)
    said = sidecar_of(beside(path) if sidecar is None else sidecar)
    if said.order:
        raise ValueError(
            f"{said.source}: order goes with a table of one's own, got format={format!r}, which has onsets"
        )
    if format == "asc":
        return asc.read(path, said, **options)
    if format == "bids":
        return bids.read(path, said, **options)
    return _of_kind(path, said, KINDS[format], options)


def _of_kind(path: Path, said: Sidecar, kind: Kind, options: Mapping[str, Any]) -> Fixations:
    wanted = [one.name for names in kind.columns.values() for one in names]
    wanted += [one.name for one in said.columns.values() if one.name]
    if kind is KINDS["smi"] and said.header == 1 and (found := _idf(path, said)) is not None:
        arrow, rows, malformed, kind = found
    else:
        arrow, rows, malformed = read_table(path, wanted, said)
    arrow = with_axes(arrow)
    there = {plain(name): name for name in arrow.column_names}
    said, names = _columns(path, arrow, said, kind, there)
    arrow = with_values(arrow, names, said, path)
    event, fixation = _event(path, arrow, names, kind)
    left_out = _left_out(path, arrow, names, kind, there, fixation)
    kept = fixation & ~np.any([*left_out.values(), ~fixation], axis=0)
    said = _with_unit(path, arrow.filter(pa.array(kept)), said, names)
    return checked(
        arrow,
        names,
        said,
        source=str(path),
        rows=rows,
        problems=malformed,
        event=event,
        left_out=left_out,
        **options,
    )


def plain(name: str) -> str:
    """A column's name without what differs between versions of a program: case, double spaces, and which µ it is."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _columns(
    path: Path, arrow: pa.Table, said: Sidecar, kind: Kind, there: Mapping[str, str]
) -> tuple[Sidecar, Names]:
    """The sidecar with the columns that the table has, and their names in it."""
    chosen: dict[str, Column] = {}
    for key, called in kind.columns.items():
        found = next((one for one in called if plain(one.name) in there), None)
        if key in said.columns:
            chosen[key] = said.columns[key]
        elif key == "offset" and "duration" in chosen:
            continue
        elif found is not None:
            _check_frame(path, said, found)
            chosen[key] = Column(there[plain(found.name)], None, found.unit, found.up)
        elif key not in ("eye", "name") and not (key == "duration" and "offset" in kind.columns):
            told = f"none of {', '.join(repr(one.name) for one in called)}" if called else "no such column"
            value = f"; say columns: {{{key}: …}} in {said.source}" if key in ("participant", "movie") else ""
            raise FixationError(
                f"{path}: no {key}: it has {told}{value}; there are {', '.join(arrow.column_names[:20])}"
            )
    chosen |= {key: one for key, one in said.columns.items() if key not in chosen}
    names = Names(offset=None, duration=None, eye=None, name=None)
    names = replace(names, **{key: one.name or key for key, one in chosen.items()})
    return replace(said, columns=chosen), names


def _check_frame(path: Path, said: Sidecar, found: Called) -> None:
    """Raise ValueError if positions are of the movie's frame, and the sidecar takes them for those of a screen."""
    if found.of_frame and (
        "screen" in said.common or any("screen" in one for one in (said.movies or {}).values())
    ):
        raise ValueError(
            f"{said.source}: screen must be left out, since {found.name!r} of {path} is a position in the movie's "
            "frame; or columns must name a position on the screen"
        )


def _event(path: Path, arrow: pa.Table, names: Names, kind: Kind) -> tuple[str, np.ndarray]:
    """What fixations are called, and which rows are of one."""
    if names.name is None or names.name not in arrow.column_names:
        return "", np.ones(arrow.num_rows, dtype=bool)
    kinds = as_text(arrow.column(names.name))
    present = sorted(set(kinds.tolist()))
    called = [event for event in kind.events if event in present]
    like = [name for name in present if any(name.startswith((f"{one}_", f"{one}.")) for one in kind.events)]
    if not called and len(like) > 1:
        raise FixationError(f"{path}: fixations by several detectors, {', '.join(like)}; keep those of one")
    event = (called or like or [*kind.events, ""])[0]
    return event, kinds == event


def _left_out(
    path: Path, arrow: pa.Table, names: Names, kind: Kind, there: Mapping[str, str], fixation: np.ndarray
) -> dict[str, np.ndarray]:
    """Masks of rows that aren't asked for, by reason: later rows of a fixation, no movie, not on the picture."""
    left: dict[str, np.ndarray] = {}
    beside_it = np.zeros(len(fixation), dtype=bool)
    for name in kind.true:
        if plain(name) in there:
            said = np.char.lower(as_text(arrow.column(there[plain(name)]).cast(pa.string())))
            strange = sorted(set(said.tolist()) - {"true", "false", "1", "0"})
            if strange:
                raise FixationError(f"{path}: {name!r} must say true or false, got {strange[0]!r}")
            beside_it |= ~np.isin(said, ("true", "1"))
    if beside_it.any():
        left["not on the picture"] = fixation & beside_it
    index = next((there[plain(name)] for name in kind.index if plain(name) in there), None)
    if index is not None:
        within = [there[plain(name)] for name in kind.within if plain(name) in there]
        texts = [as_text(arrow.column(name)) for name in (index, *within, names.participant)]
        if names.eye in arrow.column_names:
            texts.append(as_text(arrow.column(names.eye)))
        which = np.flatnonzero(fixation & ~beside_it & (texts[0] != ""))
        _, first = np.unique(np.array([text[which] for text in texts]), axis=1, return_index=True)
        later = np.zeros(len(fixation), dtype=bool)
        later[np.delete(which, first)] = True
        if later.any():
            left["another row of a fixation"] = later
    movie = as_text(arrow.column(names.movie)) == ""
    if (fixation & movie).any():
        left["no movie was shown"] = fixation & movie
    return left


def _with_unit(path: Path, arrow: pa.Table, said: Sidecar, names: Names) -> Sidecar:
    """The sidecar with a unit of onsets: its own, or that in which fixations follow one another as they do."""
    onset, duration = said.columns["onset"], said.columns.get("duration")
    if onset.unit is not None or said.time_unit is not None or duration is None or names.duration is None:
        return said
    assert onset.name is not None
    times, lasting = (
        as_numbers(arrow.column(name), said.decimal)[0] for name in (onset.name, names.duration)
    )
    who = as_text(arrow.column(names.participant))
    gaps = np.diff(times)[who[1:] == who[:-1]]
    gaps = gaps[gaps > 0]
    if len(gaps) < ENOUGH - 1 or not (median := float(np.nanmedian(lasting))) > 0:
        raise FixationError(
            f"{path}: the unit of {onset.name!r} can't be told from {len(times)} fixations; say columns: {{onset: "
            f"{{name: {onset.name}, unit: …}}}} in {said.source}"
        )
    ratio = float(np.median(gaps)) / median  # 1 and a little if both are in ms
    unit = "ms" if ratio < SLOW else "us"
    return replace(said, columns={**said.columns, "onset": replace(onset, unit=unit)})


def _idf(path: Path, said: Sidecar) -> tuple[pa.Table, np.ndarray, list[Problem], Kind] | None:
    """Fixations of a file of SMI's event detector; None if it is another file.

    Times are in µs. The eye stands in the event's type ("Fixation L"). The movie is the last message before the
    fixation, or its trial's number if there are no messages.
    """
    if path.read_bytes()[:4] in (b"PAR1", b"ARRO"):
        return None
    lines = delimited.lines_of(path, said.encoding)
    at = next((i for i, line in enumerate(lines) if line.strip() == IDF), None)
    if at is None or at + 1 >= len(lines):
        return None
    header = [plain(name) for name in lines[at + 1].split("\t")]
    needed = ("event type", "trial", "start", "duration", "location x", "location y")
    missing = [name for name in needed if name not in header]
    if missing:
        raise FixationError(
            f"{path}: row {at + 2} must name the columns of fixations, but has no {missing[0]!r}"
        )
    place = {name: header.index(name) for name in needed}
    said_of = (re.match(r"(?:## )?Subject:\t(.+)", line) for line in lines[:at])
    subject = next((found[1] for found in said_of if found), path.name.partition(".")[0])
    shown, rows, cells, problems = "", [], [], []
    for number, line in enumerate(lines, 1):
        fields = line.rstrip().split("\t")
        if fields[0] == "UserEvent" and "# Message: " in line:
            shown = line.split("# Message: ", 1)[1].strip()
        if fields[0] not in ("Fixation L", "Fixation R"):
            continue
        if len(fields) <= max(place.values()):
            told = f"has {len(fields)} fields, a fixation has {len(header)}"
            problems.append(Problem(number, "wrong number of fields", told))
            continue
        values = {name: fields[i].strip() for name, i in place.items()}
        rows.append(number)
        cells.append(
            (
                subject.strip(),
                shown or values["trial"],
                *(values[name] for name in ("start", "duration", "location x", "location y")),
                values["event type"][-1],
            )
        )
    named = ("participant", "movie", "onset", "duration", "x", "y", "eye")
    columns: Sequence[Sequence[str]] = list(zip(*cells, strict=True)) if cells else [()] * len(named)
    arrow = pa.Table.from_arrays([pa.array(list(column), pa.string()) for column in columns], list(named))
    kind = Kind({name: (Called(name, "us" if name in ("onset", "duration") else None),) for name in named})
    return arrow, np.array(rows, dtype=np.int64), problems, kind
