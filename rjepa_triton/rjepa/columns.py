"""Columns of a table of fixations: their names, and their cells as text and as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .report import FixationError

# Cells without a value: "." is EyeLink's, "-" SMI's.
BLANK = ("", ".", "-", "NA", "N/A", "n/a", "NaN", "nan", "null", "None")
# A number in ASCII, without what Python's float takes besides: 1_0, or digits of other scripts.
NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?|nan)", re.ASCII | re.IGNORECASE)
# A column's values as float64, NaN where there is none, and the text of values that aren't numbers, by index.
Numbers = tuple[np.ndarray, dict[int, str]]


@dataclass(frozen=True)
class Names:
    """The names of a table's columns; None for a column that is not looked for."""

    participant: str = "participant"
    movie: str = "movie"
    onset: str = "onset"
    offset: str | None = "offset"
    duration: str | None = "duration"
    x: str = "x"
    y: str = "y"
    eye: str | None = "eye"
    name: str | None = "name"

    def all(self) -> tuple[str, ...]:
        """All columns that are looked for."""
        return tuple(column for column in vars(self).values() if column)


def find(
    arrow: pa.Table, names: Names, source: str, without: Sequence[str] = ()
) -> dict[str, pa.ChunkedArray]:
    """The table's columns, by the field of `Names`, but for those that it may be without.

    Raises FixationError if one is missing or there twice.
    """
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
        elif key not in ("offset", "duration", "eye", "name", *without):
            raise FixationError(f"{source}: no column {name!r}; there are {', '.join(present)}")
    if "offset" not in columns and "duration" not in columns and "duration" not in without:
        wanted = " or ".join(repr(name) for name in (names.offset, names.duration) if name)
        raise FixationError(f"{source}: no column {wanted}; there are {', '.join(present)}")
    return columns


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values. Dates and times are Arrow's text of them: Python has none for some."""
    found: list[Any] = (column.cast(pa.string()) if pa.types.is_temporal(column.type) else column).to_pylist()
    return found


def as_text(column: pa.ChunkedArray) -> np.ndarray:
    """A column's values as text without surrounding spaces; "" where there is none."""
    values = ["" if value is None else str(value).strip() for value in _values(column)]
    return np.array(["" if value in BLANK else value for value in values], dtype=np.str_)


def as_numbers(column: pa.ChunkedArray, decimal: str = ".") -> Numbers:
    """A column's values (n,) as float64, NaN where there is none, and the text of what isn't a number, by index."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type):
        # an integer above 2⁵³ becomes the nearest float64, as the same text does
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64), {}
    values = np.full(len(column), np.nan)
    texts: dict[int, str] = {}
    for i, value in enumerate(_values(column)):
        if value is None or str(value).strip() in BLANK:
            continue
        text = str(value).strip()
        if decimal != ".":
            text = text.replace(".", " ").replace(decimal, ".")  # so that 1.5 isn't a number there
        if NUMBER.fullmatch(text):
            values[i] = float(text)
        else:
            texts[i] = str(value)
    return values, texts
