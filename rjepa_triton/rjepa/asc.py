"""Fixations from EyeLink's .asc files, which edf2asc makes of recordings.

Fixations are the lines EFIX, in ms and in pixels of the screen. A trial goes from a message TRIALID to the next; a file
without any is one trial. Messages say which movie was shown and when it began.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from . import delimited
from .columns import Names
from .fixations import with_values
from .report import FixationError, Problem
from .rows import Fixations, checked
from .sidecar import Column, Sidecar

MESSAGE = re.compile(r"MSG\s+(\d+(?:\.\d+)?)\s+(.*)")
DELAY = re.compile(r"(-?\d+)\s+(?=\S)")  # of a message: it was sent so many ms after what it tells of
FIELDS = ("eye", "start", "end", "duration", "x", "y")  # of a fixation, after EFIX


@dataclass
class _Trial:
    """A trial: the rows at which messages named a movie, and at which they gave its start, with what they said."""

    began: float | None = None  # when recording did
    movies: list[tuple[int, str]] = field(default_factory=list)
    starts: list[tuple[int, float]] = field(default_factory=list)
    fixations: list[tuple[int, list[str]]] = field(default_factory=list)


def read(path: Path, said: Sidecar, *, policy: str, eye: str | None) -> Fixations:
    """The fixations of an .asc file, which may be compressed by gzip.

    The sidecar's `messages` has regular expressions: "movie", whose first group, or else the whole match, names the
    movie, and "start", a message at the time at which the movie began. A fixation belongs to the last movie named in
    its trial before it, or else to the first one named after it, as where trial variables follow the recording.
    Without "start" the time is counted from the START of recording, in the trial or that the trial is in. `movie_start`
    of the sidecar adds to either. Without "movie", columns: {movie: {value: …}} must name it. The participant is the
    file's name without its endings, or columns: {participant: {value: …}}.

    Fixations of trials in which no movie is named are left out and counted. Raises what `rows.checked` raises, and
    FixationError if there are no fixations, if positions aren't gaze, or if no message matches.
    """
    valued = {key: one for key, one in said.columns.items() if one.value is not None}
    if len(valued) < len(said.columns):
        named = next(key for key in said.columns if key not in valued)
        raise ValueError(f"{said.source}: columns.{named} must have a value: an .asc file has no columns")
    if ("movie" in said.messages) == ("movie" in valued):
        raise ValueError(
            f"{said.source}: one of messages: {{movie: …}} and columns: {{movie: {{value: …}}}} must say which movie "
            "was shown"
        )
    trials, problems = _trials(path, said)
    for key in said.messages:
        if not any(trial.movies if key == "movie" else trial.starts for trial in trials):
            pattern = said.messages[key].pattern
            raise FixationError(f"{path}: no message matches {said.source}: messages.{key}, {pattern!r}")
    rows, cells = [], []
    for trial in trials:
        for row, fields in trial.fixations:
            movie = _last(trial.movies, row) or ""
            zero = _last(trial.starts, row) if "start" in said.messages else trial.began
            values = dict(zip(FIELDS, fields, strict=False))
            rows.append(row)
            cells.append(
                (movie, values["start"], zero, values["duration"], values["x"], values["y"], values["eye"])
            )
    if not cells and not problems:
        raise FixationError(f"{path}: has no fixations, which are lines that begin with EFIX")
    movie, onset, zero, duration, x, y, eyes = zip(*cells, strict=True) if cells else ((),) * 7
    arrow = pa.table(
        {
            "onset": pa.array([_less(a, b) for a, b in zip(onset, zero, strict=True)], pa.string()),
            "duration": pa.array(duration, pa.string()),
            "x": pa.array(x, pa.string()),
            "y": pa.array(y, pa.string()),
            "eye": pa.array(eyes, pa.string()),
        }
    )
    names = Names(offset=None, name=None)
    left_out = {}
    if "movie" not in valued:
        arrow = arrow.append_column("movie", pa.array(movie, pa.string()))
        unnamed = np.array([one == "" for one in movie], dtype=bool)
        left_out["no message names a movie in the trial"] = unnamed
    if "participant" not in valued:
        valued["participant"] = Column(None, path.name.partition(".")[0])
    said = replace(said, columns=valued)
    return checked(
        with_values(arrow, names, said, path),
        names,
        said,
        source=str(path),
        rows=np.array(rows, dtype=np.int64),
        problems=problems,
        policy=policy,
        eye=eye,
        unit="ms",
        left_out=left_out,
    )


def _trials(path: Path, said: Sidecar) -> tuple[list[_Trial], list[Problem]]:
    """The trials of a file, and fixations that can't be read."""
    refused = {begin: what for begin, what in delimited.OTHERS.items() if not begin.startswith(b"**")}
    trials, problems, known = [_Trial()], [], False
    running: float | None = None  # since when
    for row, line in enumerate(delimited.lines_of(path, said.encoding, refused), 1):
        word = line.split(None, 1)[0] if line[:1].isalpha() else ""
        if word == "EFIX":
            known = True
            fields = line.split()[1:]
            if len(fields) < len(FIELDS):
                told = f"has {len(fields)} fields after EFIX, a fixation has at least {len(FIELDS)}"
                problems.append(Problem(row, "wrong number of fields", told))
            else:
                trials[-1].fixations.append((row, fields))
        elif word == "START":
            running = _number(line.split()[1:2])
            trials[-1].began = running if trials[-1].began is None else trials[-1].began
        elif word == "END":
            running = None
        elif word == "EVENTS" and line.split()[1:2] != ["GAZE"]:
            raise FixationError(
                f"{path}: row {row}: positions of events must be GAZE, pixels of the screen, got {line.split()[1:2]}"
            )
        elif (found := MESSAGE.match(line)) is not None:
            known = True
            time, text = float(found[1]), found[2]
            delay = DELAY.match(text)
            if delay is not None:
                time, text = time - int(delay[1]), text[delay.end() :]
            if text.startswith("TRIALID"):
                trials.append(_Trial(running))
            _note(trials[-1], said, row, time, text)
    if not known:
        raise FixationError(f"{path}: not an .asc file: no line begins with EFIX or MSG")
    return trials, problems


def _note(trial: _Trial, said: Sidecar, row: int, time: float, text: str) -> None:
    """Note what a message says of the movie."""
    if "movie" in said.messages and (found := said.messages["movie"].search(text)):
        trial.movies.append((row, str(found[1] if found.re.groups else found[0]).strip()))
    if "start" in said.messages and said.messages["start"].search(text):
        trial.starts.append((row, time))


def _last(said: list[tuple[int, str]] | list[tuple[int, float]], row: int) -> Any:
    """What was said last before a row, or else first after it; None if nothing was."""
    if not said:
        return None
    at = bisect_right([where for where, _ in said], row)
    return said[max(at - 1, 0)][1]


def _number(words: list[str]) -> float | None:
    return float(words[0]) if words and re.fullmatch(r"\d+(\.\d+)?", words[0]) else None


def _less(time: str, zero: float | None) -> str | None:
    """A time in the file, since another; None if that isn't known; what isn't a number stays as it is."""
    number = _number([time])
    return time if number is None else None if zero is None else repr(number - zero)
