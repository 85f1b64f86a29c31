"""Fixations from eye tracking in BIDS: events of a recording, and its samples, which have the positions.

    sub-01_task-film_recording-eye1_physioevents.tsv.gz    onset, duration and trial_type of each event
    sub-01_task-film_recording-eye1_physio.tsv.gz          timestamp, x_coordinate and y_coordinate of each sample

Neither has a header: JSON files of the same names, or of fewer entities and in folders above, have their columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import _files
from . import delimited
from .columns import Names, as_numbers
from .fixations import with_values
from .report import FixationError
from .rows import DURATIONS, Fixations, checked
from .sidecar import UNITS, Column, Sidecar

EVENTS, SAMPLES = "physioevents", "physio"
UP = 4  # so many folders above a file may have its JSON: datatype, session, subject, data set
SECONDS = {"s": "s", "second": "s", "seconds": "s", "ms": "ms", "us": "us", "µs": "us", "ns": "ns"}


def read(path: Path, said: Sidecar, *, policy: str, eye: str | None) -> Fixations:
    """The fixations of `..._physioevents.tsv.gz`, whose samples are beside it.

    A fixation's position is the mean of the samples from its onset to its end, in pixels of the screen. Onsets are time
    stamps in the unit that the samples' JSON gives, or that SamplingFrequency and their steps imply; durations may be
    in that unit or in seconds. They are counted from the first sample unless `movie_start` says when the movie began.

    The participant is the entity sub, the movie the entity task, the eye that of RecordedEye, unless the sidecar's
    `columns` gives a value for participant or movie.

    Raises what `rows.checked` raises, ValueError for other entries of `columns`, and FixationError for files that are
    missing, lack a column, or have positions that aren't pixels.
    """
    if not path.name.partition(".")[0].endswith(f"_{EVENTS}"):
        raise FixationError(f"{path}: must be a file …_{EVENTS}.tsv.gz, beside which is …_{SAMPLES}.tsv.gz")
    other = next((key for key, one in said.columns.items() if one.value is None), None)
    if other is not None:
        raise ValueError(
            f"{said.source}: columns.{other} must have a value: BIDS says what columns are called"
        )
    events, about = _table(path, EVENTS, ("onset", "duration", "trial_type"))
    samples_path = path.with_name(path.name.replace(f"_{EVENTS}.", f"_{SAMPLES}."))
    if not samples_path.is_file():
        raise FixationError(f"{path}: no {samples_path.name} beside it, which has the positions")
    samples, told = _table(samples_path, SAMPLES, ("timestamp", "x_coordinate", "y_coordinate"))
    for axis in ("x_coordinate", "y_coordinate"):
        unit = str(told.get(axis, {}).get("Units", told.get("SampleCoordinateUnits", "pixel")))
        if unit.lower() not in ("pixel", "pixels", "px"):
            raise FixationError(f"{samples_path}: {axis} must be in pixels, got {unit!r}")
    source = about.get("OnsetSource", about.get("ForeignIndexColumn", "timestamp"))
    if source != "timestamp":
        raise FixationError(f"{path}: OnsetSource must be 'timestamp', got {source!r}")

    time, x, y = (
        _numbers(samples_path, samples, name) for name in ("timestamp", "x_coordinate", "y_coordinate")
    )
    if len(time) < 2 or not (np.diff(time) > 0).all():
        raise FixationError(f"{samples_path}: timestamp must increase from row to row")
    unit = _unit(samples_path, told, time)
    onset, duration = (as_numbers(events.column(name))[0] for name in ("onset", "duration"))
    fixation = np.array([one == "fixation" for one in events.column("trial_type").to_pylist()], dtype=bool)
    lasting = UNITS[unit] * duration
    median = float(np.nanmedian(lasting[fixation])) if np.isfinite(lasting[fixation]).any() else np.nan
    if unit != "s" and not DURATIONS[0] <= median <= DURATIONS[1]:
        lasting = duration  # BIDS has seconds; what is neither is refused with the rows
    ends = onset + lasting / UNITS[unit]
    place = [_means(values, time, onset, ends) for values in (x, y)]

    entities = dict(part.partition("-")[::2] for part in path.name.split("_") if "-" in part)
    values = {"participant": entities.get("sub", ""), "movie": entities.get("task", "")}
    columns = {key: Column(None, value) for key, value in values.items()} | dict(said.columns)
    seconds = UNITS[unit] * (onset - time[0])
    arrow = pa.table(
        {
            "onset": pa.array(seconds, from_pandas=True),
            "duration": pa.array(lasting, from_pandas=True),
            "x": pa.array(place[0], from_pandas=True),
            "y": pa.array(place[1], from_pandas=True),
            "name": events.column("trial_type"),
            "eye": pa.array([str(told.get("RecordedEye", ""))] * len(onset), pa.string()),
        }
    )
    columns |= {key: Column(key, unit="s") for key in ("onset", "duration")}
    names = Names(offset=None)
    said = replace(said, columns=columns)
    return checked(
        with_values(arrow, names, said, path),
        names,
        said,
        source=str(path),
        rows=np.arange(1, arrow.num_rows + 1),
        problems=[],
        policy=policy,
        eye=eye,
    )


def _means(values: np.ndarray, time: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(n,) the mean of the values with start ≤ time < end, without those that are missing; NaN if there are none."""
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known)
    )
    first, last = (np.searchsorted(time, at, side="left") for at in (start, end))
    last = np.maximum(last, first)
    with np.errstate(invalid="ignore"):
        return np.where(counts[last] > counts[first], sums[last] - sums[first], np.nan) / (
            counts[last] - counts[first]
        )


def _unit(path: Path, told: dict[str, Any], time: np.ndarray) -> str:
    """The unit of time stamps: as their JSON says, or by the sampling frequency."""
    said = told.get("timestamp", {}).get("Units")
    if said in SECONDS:
        return SECONDS[said]
    rate = told.get("SamplingFrequency")
    if not isinstance(rate, int | float) or not rate > 0:
        raise FixationError(
            f"{path}: its JSON must have timestamp.Units or SamplingFrequency, got {said!r} and {rate!r}"
        )
    step = float(np.median(np.diff(time)))
    unit = min(UNITS, key=lambda name: abs(np.log(step * UNITS[name] * rate)))
    if abs(step * UNITS[unit] * rate - 1) > 0.1:
        raise FixationError(f"{path}: time stamps are {step:g} apart, which fits {rate:g} Hz in no unit")
    return unit


def _table(path: Path, suffix: str, wanted: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
    """A table without a header, all of whose cells are text, and what its JSON files say."""
    about = _about(path, suffix)
    names = about.get("Columns")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FixationError(f"{path}: no JSON beside or above it has its Columns")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FixationError(f"{path}: no column {missing[0]!r}; its JSON has {', '.join(names)}")
    cells = []
    for row, line in enumerate(delimited.lines_of(path), 1):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise FixationError(f"{path}: row {row} has {len(fields)} fields, its JSON {len(names)} columns")
        cells.append(fields)
    columns: Sequence[Sequence[str]] = list(zip(*cells, strict=True)) if cells else [()] * len(names)
    return pa.Table.from_arrays([pa.array(list(one), pa.string()) for one in columns], names), about


def _about(path: Path, suffix: str) -> dict[str, Any]:
    """What the JSON files say that go with a file: of the same suffix, and with no entity that it lacks.

    Nearer ones come first, and of a folder those with more entities.
    """
    entities = set(path.name.partition(".")[0].split("_")[:-1])
    found: list[Path] = []
    for folder in list(path.absolute().parents)[: UP + 1]:
        fits = [
            one
            for one in folder.glob(f"*{suffix}.json")
            if one.name.removesuffix(".json").split("_")[-1] == suffix
            and set(one.name.removesuffix(".json").split("_")[:-1]) <= entities
        ]
        found += sorted(fits, key=lambda one: -len(one.name.split("_")))
        if (folder / "dataset_description.json").is_file():
            break
    about: dict[str, Any] = {}
    for one in reversed(found):
        try:
            content = json.loads(_files.read_text(one))
        except ValueError as error:
            raise FixationError(f"{one}: not JSON that can be read: {_files.first_line(error)}") from None
        if not isinstance(content, dict):
            raise FixationError(f"{one}: must be a mapping, got {type(content).__name__}")
        about |= content
    return about


def _numbers(path: Path, table: pa.Table, name: str) -> np.ndarray:
    values, texts = as_numbers(table.column(name))
    if texts:
        row, text = next(iter(texts.items()))
        raise FixationError(f"{path}: row {row + 1}: {name} must be a number, got {text!r}")
    return values
