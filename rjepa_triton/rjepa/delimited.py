"""Tables as text: every line is a row, and is either split into as many fields as there are columns or named.

A field may be quoted, but ends with its line: a quote that is never closed then spoils one row, not all that follow.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from .report import FixationError, Problem

DELIMITERS = ",;\t"
LOOKED_AT = 200  # so many lines are searched for the columns' names if the first line doesn't have them
SHOWN_CHARACTERS = 40
# What other files begin with, and what to do about them.
OTHERS = {
    b"PK\x03\x04": "it is a workbook or a zip archive; save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "it is a workbook; save the sheet as CSV",
    b"SREYELINK": "it is an EyeLink recording; export a fixation report from Data Viewer",
    b"** CONVERTED FROM": "it is an EyeLink .asc file, which has the format 'asc'",
}


def read(
    table: Path, wanted: Sequence[str], *, header_row: int = 1, encoding: str | None = None
) -> tuple[pa.Table, np.ndarray, list[Problem]]:
    """A text table, all of whose cells are text; the number of each of its rows; and the rows that it doesn't have.

    Fields are separated by comma, semicolon or tab: by the one that gives the header the most of the columns `wanted`.
    The text is UTF-8, or UTF-16 with a byte order mark, unless `encoding` is given; it may be compressed by gzip. The
    header is row `header_row`, and rows above it aren't read.

    A quoted field has to be closed before its line ends. In a table with tabs a quote that isn't is a character like
    others; in one with commas or semicolons its row is a `Problem`, as is a row with too few or too many fields.

    Raises FixationError if the file isn't such a table; OSError.
    """
    lines = lines_of(table, encoding)
    if len(lines) < header_row or not lines[header_row - 1].strip():
        which = "its first row" if header_row == 1 else f"row {header_row}"
        raise FixationError(f"{table}: {which}, which names the columns, is empty")
    delimiter, header = _header(lines[header_row - 1], wanted)
    if not set(wanted) & set(header):
        _check_preamble(table, lines, wanted)
    rows: list[int] = []
    cells: list[list[str]] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines[header_row:], header_row + 1):
        fields = _fields(line, delimiter, len(header))
        if isinstance(fields, list) and len(fields) == len(header):
            rows.append(number)
            cells.append(fields)
        elif isinstance(fields, list):
            detail = f"has {len(fields)} fields, the header has {len(header)}"
            problems.append(Problem(number, "wrong number of fields", detail))
        else:
            problems.append(
                Problem(number, "open quote", f"has a quote that its line doesn't close: {fields}")
            )
    columns = zip(*cells, strict=True) if cells else ((),) * len(header)
    arrow = pa.Table.from_arrays([pa.array(list(column), pa.string()) for column in columns], header)
    return arrow, np.array(rows, dtype=np.int64), problems


def lines_of(table: Path, encoding: str | None = None, refused: Mapping[bytes, str] = OTHERS) -> list[str]:
    """The lines of a text file, without what ends them. refused: what files begin with that aren't taken, and why.

    Raises FixationError; OSError.
    """
    body = table.read_bytes()
    if body.startswith(b"\x1f\x8b"):
        try:
            body = gzip.decompress(body)
        except (OSError, EOFError, zlib.error) as error:
            raise FixationError(f"{table}: not a gzip file that can be read: {error}") from None
    for begin, what in refused.items():
        if body.startswith(begin):
            raise FixationError(f"{table}: not a table: {what}")
    utf16 = body.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = body.decode(encoding or ("utf-16" if utf16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise FixationError(f"{table}: not text in {encoding}: {error}") from None
        row = len(re.findall(rb"\r\n|\r|\n", body[: error.start])) + 1
        where = f"row {row} has the byte 0x{body[error.start]:02x}" if not utf16 else str(error)
        raise FixationError(
            f"{table}: not text in UTF-8 or UTF-16: {where}; save it as UTF-8, or name "
            "its encoding in the sidecar, as encoding: latin-1"
        ) from None
    if "\0" in text:
        row = len(re.findall(r"\r\n|\r|\n", text[: text.index("\0")])) + 1
        raise FixationError(f"{table}: not text in UTF-8 or UTF-16: row {row} has a character 0")
    lines = re.split(r"\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def _header(line: str, wanted: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter, and the names of the columns that it gives."""
    found = {}
    for delimiter in DELIMITERS:
        fields = _fields(line, delimiter, 0)
        if isinstance(fields, list):
            found[delimiter] = [name.strip() for name in fields]
    if not found:
        return ",", [line.strip()]
    best = max(found, key=lambda one: (len(set(wanted) & set(found[one])), len(found[one])))
    return best, found[best]


def _check_preamble(table: Path, lines: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise FixationError if a later line names the columns."""
    for number, line in enumerate(lines[:LOOKED_AT], 1):
        if len(set(wanted) & set(_header(line, wanted)[1])) >= 2:
            raise FixationError(
                f"{table}: row {number} names the columns, and the first row must; remove the rows before it, or say "
                f"header: {number} in the sidecar"
            )


def _fields(line: str, delimiter: str, count: int) -> list[str] | str:
    """The fields of a line, of a blank one `count` empty ones; or the start of what an open quote leaves unclear."""
    if not line.strip():
        return [""] * count
    plain = line.split(delimiter)
    if '"' not in line:
        return plain
    try:
        (quoted,) = csv.reader([line], delimiter=delimiter, strict=True)
    except csv.Error:
        quoted = []
    if quoted and (len(quoted) == count or not count):
        return quoted
    if delimiter == "\t" and (len(plain) == count or not count):
        return plain
    if quoted:
        return quoted
    at = line.index('"')
    return repr(line[at : at + SHOWN_CHARACTERS])
