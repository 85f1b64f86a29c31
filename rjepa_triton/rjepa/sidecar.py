"""The sidecar: a YAML file that says what a table of fixations doesn't.

That is the table's units, where on the screen each movie was shown, and when it began (docs/data.md).
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import plain_yaml
from .video import probe

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # in seconds
COLUMNS = ("participant", "movie", "onset", "offset", "duration", "x", "y", "eye", "name")
TIMES, PLACES = ("onset", "offset", "duration"), ("x", "y")
# Units of positions. The last two are of the screen; of the frame, where the sidecar has no screen.
PARTS = ("px", "fraction", "percent")
PER_MOVIE = ("px_per_degree", "screen", "frame_size", "movie_start", "fps")
KEYS = ("time_unit", "movies", "columns", "header", "encoding", "decimal", "order", "messages", *PER_MOVIE)
STRETCH = (
    0.02  # up to this, one px_per_degree is taken for both directions of a frame stretched on the screen
)


@dataclass(frozen=True)
class Movie:
    """A movie as it was shown.

    size            (width, height), in pixels, of the frame in which fixations are given
    px_per_degree   pixels of that frame per degree of visual angle
    file            its film or picture; None if unknown
    fps             frames per second at which it was shown; None: as the file's time stamps say
    end             its length in seconds; infinite if unknown
    """

    name: str
    size: tuple[int, int]
    px_per_degree: float
    file: Path | None = None
    fps: float | None = None
    end: float = math.inf


@dataclass(frozen=True)
class Shown:
    """A movie, and how a table's times and positions are converted to the movie's.

    seconds = (time - start) · unit, position in the frame = (position - offset) · scale. start: one number, or one for
    each participant.
    """

    movie: Movie
    offset: tuple[float, float]
    scale: tuple[float, float]
    start: float | Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """What a table calls one of COLUMNS, or the value that it has in all rows.

    name, value   one of the two; the other is None
    unit          of a time, a key of UNITS, or of a position, one of PARTS; None: the sidecar's time_unit, or pixels
    up            of y: whether it grows upwards, from the lower edge
    """

    name: str | None
    value: str | None = None
    unit: str | None = None
    up: bool = False


@dataclass(frozen=True)
class Sidecar:
    """The checked content of a sidecar.

    source     its name in messages
    folder     the folder that names of files are relative to
    time_unit  the table's unit of time, a key of UNITS; None if not given
    common     what it says about all movies
    movies     what it says about each movie, by name; None if it lists none
    columns    what the table calls its columns, where it doesn't call them as COLUMNS does
    header     the number of the row that names the columns; rows above it aren't read
    encoding   of the text; None: UTF-8, or UTF-16 with a byte order mark
    decimal    what stands before a number's decimals: "." or ","
    order      whether the table has no onsets, and its rows are in the order in which they were
    messages   regular expressions for a recording's messages, by "movie" and "start" (`asc.read`)
    """

    source: str
    folder: Path
    time_unit: str | None
    common: Mapping[str, Any] = field(repr=False)
    movies: Mapping[str, Mapping[str, Any]] | None = field(repr=False)
    columns: Mapping[str, Column] = field(default_factory=dict, repr=False)
    header: int = 1
    encoding: str | None = None
    decimal: str = "."
    order: bool = False
    messages: Mapping[str, re.Pattern[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Sidecar:
        """Read a YAML file. Raises ValueError, which names the file and the wrong key; FileNotFoundError."""
        path = Path(path)
        return cls.from_dict(plain_yaml.read(path), source=str(path), folder=path.parent)

    @classmethod
    def from_dict(cls, content: object, source: str = "sidecar", folder: str | Path = ".") -> Sidecar:
        """Check the content of a sidecar; docs/data.md lists its keys. Raises ValueError naming a wrong key."""
        content = _mapping(content, source)
        _known(content, KEYS, source)
        unit = content.get("time_unit")
        if unit is not None and unit not in UNITS:
            raise ValueError(f"{source}: time_unit must be one of {', '.join(UNITS)}, got {unit!r}")
        movies: dict[str, Mapping[str, Any]] | None = None
        if "movies" in content:
            movies = {}
            for name, entry in _named(_mapping(content["movies"], f"{source}: movies"), f"{source}: movies"):
                where = f"{source}: movies.{name}"
                entry = {"file": entry} if isinstance(entry, str) else _mapping(entry, where)
                _known(entry, ("file", *PER_MOVIE), where)
                movies[name] = entry
        common = {key: value for key, value in content.items() if key in PER_MOVIE}
        header = content.get("header", 1)
        if not (isinstance(header, int) and not isinstance(header, bool) and header >= 1):
            raise ValueError(f"{source}: header must be the number of a row, 1 or more, got {header!r}")
        columns = {
            key: _column(key, entry, f"{source}: columns.{key}")
            for key, entry in _mapping(content.get("columns", {}), f"{source}: columns").items()
        }
        encoding = _encoding(content.get("encoding"), f"{source}: encoding")
        decimal = content.get("decimal", ".")
        if decimal not in (".", ","):
            raise ValueError(f"{source}: decimal must be '.' or ',', got {decimal!r}")
        order = content.get("order", False)
        if not isinstance(order, bool):
            raise ValueError(f"{source}: order must be true or false, got {order!r}")
        clocked = [
            key for one in (common, *(movies or {}).values()) for key in ("movie_start", "fps") if key in one
        ]
        if order and clocked:
            raise ValueError(f"{source}: {clocked[0]} must be left out with order: true, which has no clock")
        messages = _messages(content.get("messages", {}), f"{source}: messages")
        return cls(
            source, Path(folder), unit, common, movies, columns, header, encoding, decimal, order, messages
        )

    def unit(self, given: str | None = None, column: str = "onset") -> float:
        """The unit of time of a column, in seconds.

        given: the unit that this kind of table always has. Raises ValueError if there is no unit, or another than
        `given`.
        """
        own = self.columns.get(column)
        if given is None and own is not None and own.unit is not None:
            return UNITS[own.unit]
        if given is not None and self.time_unit not in (None, given):
            raise ValueError(
                f"{self.source}: time_unit must be {given} for such a table, got {self.time_unit}"
            )
        named = given or self.time_unit
        if named is None:
            raise ValueError(f"{self.source}: time_unit is missing; it must be one of {', '.join(UNITS)}")
        return UNITS[named]

    def shown(self, name: str) -> Shown | None:
        """How the movie `name` was shown; None if the sidecar lists movies and this isn't one of them.

        Raises ValueError if a key is missing or wrong, `VideoError` if the film's header can't be read.
        """
        own: Mapping[str, Any] = {}
        if self.movies is not None:
            if name not in self.movies:
                return None
            own = self.movies[name]
        said = {**self.common, **own}

        def where(key: str) -> str:
            return f"{self.source}: movies.{name}.{key}" if key in own else f"{self.source}: {key}"

        if "px_per_degree" not in said:
            raise ValueError(f"{self.source}: px_per_degree is missing")
        per_degree = _positive(said["px_per_degree"], where("px_per_degree"))
        fps = _positive(said["fps"], where("fps")) if "fps" in said else None
        file, size, end = None, None, math.inf
        if "file" in said:
            if not isinstance(said["file"], str):
                raise ValueError(f"{where('file')} must be the name of a file, got {said['file']!r}")
            file = self.folder / said["file"]
        if "frame_size" in said:
            width, height = _pair(said["frame_size"], where("frame_size"))
            if not (width >= 1 and height >= 1 and width.is_integer() and height.is_integer()):
                raise ValueError(
                    f"{where('frame_size')} must be [width, height] in pixels, got {said['frame_size']}"
                )
            size = (int(width), int(height))
        elif file is not None:
            info = probe(file)
            size = (info.width, info.height)
            if info.duration is not None and fps is None:
                end = info.duration
        else:
            raise ValueError(
                f"{self.source}: the frame's size is unknown; give the file of movie {name!r} under movies, "
                "or frame_size"
            )
        offset, scale = _transform(said.get("screen"), size, where("screen"))
        stretch = abs(scale[0] / scale[1] - 1)
        if stretch > STRETCH:
            raise ValueError(
                f"{where('screen')} stretches the frame by {stretch:.0%} in one direction; px_per_degree holds for "
                f"both only up to {STRETCH:.0%}: check the rectangle, or give a film with square pixels"
            )
        start = _start(said.get("movie_start", 0), where("movie_start"), name)
        degree = per_degree * (scale[0] * scale[1]) ** 0.5
        offset, scale = self._as_in_the_table(offset, scale, said.get("screen"), size, where("screen"))
        return Shown(Movie(name, size, degree, file, fps, end), offset, scale, start)

    def _as_in_the_table(
        self,
        offset: tuple[float, float],
        scale: tuple[float, float],
        screen: object,
        size: tuple[int, int],
        where: str,
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """(offset, scale) for positions as the table has them, from those for pixels that grow downwards.

        With y' = L - u·y for a y that grows upwards, (y' - o)·s is (y - (L - o)/u)·(-u·s).
        """
        columns = [self.columns.get(key) for key in PLACES]
        if not any(one is not None and (one.up or one.unit not in (None, "px")) for one in columns):
            return offset, scale
        whole: tuple[float, float] = (float(size[0]), float(size[1]))
        if isinstance(screen, Mapping):
            if "size" not in screen:
                raise ValueError(
                    f"{where}.size must be given with columns that are parts of the screen or grow upwards"
                )
            whole = _pair(screen["size"], f"{where}.size")
        new = []
        for one, o, s, length in zip(columns, offset, scale, whole, strict=True):
            unit = "px" if one is None or one.unit is None else one.unit
            factor = {"px": 1.0, "fraction": length, "percent": length / 100}[unit]
            new.append(
                ((length - o) / factor, -factor * s)
                if one is not None and one.up
                else (o / factor, factor * s)
            )
        return (new[0][0], new[1][0]), (new[0][1], new[1][1])


def _column(key: str, entry: object, where: str) -> Column:
    """An entry of `columns`: a name, or a mapping with name, or value, and unit and up."""
    if key not in COLUMNS:
        raise ValueError(f"{where}: unknown column; known are {', '.join(COLUMNS)}")
    if isinstance(entry, str):
        return Column(entry)
    entry = _mapping(entry, where)
    _known(entry, ("name", "value", "unit", "up"), where)
    if ("name" in entry) == ("value" in entry):
        raise ValueError(f"{where} must have either name or value")
    text = entry.get("name", entry.get("value"))
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} must have a text as name or value, got {text!r}")
    if "value" in entry and key not in ("participant", "movie"):
        raise ValueError(f"{where}.value goes with participant and movie alone")
    unit, units = entry.get("unit"), tuple(UNITS) if key in TIMES else PARTS if key in PLACES else ()
    if unit is not None and unit not in units:
        told = f"one of {', '.join(units)}" if units else "left out"
        raise ValueError(f"{where}.unit must be {told}, got {unit!r}")
    up = entry.get("up", False)
    if not isinstance(up, bool) or (up and key != "y"):
        raise ValueError(f"{where}.up must be true or false, and goes with y alone, got {up!r}")
    return Column(entry.get("name"), entry.get("value"), unit, up)


def _messages(entries: object, where: str) -> dict[str, re.Pattern[str]]:
    """The regular expressions of messages."""
    found = {}
    content = _mapping(entries, where)
    _known(content, ("movie", "start"), where)
    for key, text in content.items():
        try:
            found[key] = re.compile(str(text))
        except re.error as error:
            raise ValueError(f"{where}.{key} must be a regular expression, got {text!r}: {error}") from None
    return found


def _encoding(name: object, where: str) -> str | None:
    if name is None:
        return None
    try:
        return codecs.lookup(str(name)).name
    except LookupError:
        raise ValueError(
            f"{where} must be an encoding that Python knows, such as latin-1, got {name!r}"
        ) from None


def _transform(
    screen: object, size: tuple[int, int], where: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(offset, scale), from the keys of that name, or from the rectangle on the screen that the frame filled."""
    if screen is None:
        return (0.0, 0.0), (1.0, 1.0)
    screen = _mapping(screen, where)
    _known(screen, ("offset", "scale", "size", "frame"), where)
    if "frame" not in screen:
        if "size" in screen:
            raise ValueError(f"{where}.size can be given only with {where}.frame, which is missing")
        scale = screen.get("scale", 1)
        pair = (scale, scale) if isinstance(scale, int | float) else scale
        sx, sy = _pair(pair, f"{where}.scale")
        return _pair(screen.get("offset", (0, 0)), f"{where}.offset"), (
            _positive(sx, f"{where}.scale"),
            _positive(sy, f"{where}.scale"),
        )
    if "offset" in screen or "scale" in screen:
        raise ValueError(f"{where} must have either frame, or offset and scale, got both")
    rectangle = screen["frame"]
    if not (isinstance(rectangle, list | tuple) and len(rectangle) == 4 and all(map(_number, rectangle))):
        raise ValueError(f"{where}.frame must be [left, top, width, height] on the screen, got {rectangle!r}")
    left, top, width, height = map(float, rectangle)
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}.frame must have a positive width and height, got {rectangle}")
    if "size" in screen:
        right, bottom = _pair(screen["size"], f"{where}.size")
        if left < 0 or top < 0 or left + width > right or top + height > bottom:
            raise ValueError(
                f"{where}.frame {rectangle} must lie on the screen of {right:g} × {bottom:g} pixels"
            )
    return (left, top), (size[0] / width, size[1] / height)


def _start(start: object, where: str, movie: str) -> float | dict[str, float]:
    """The time at which the movie began: one number, or one for each participant.

    The mapping `start` has times by movie, by participant, or by movie and then participant.
    """
    if isinstance(start, Mapping):
        start = dict(_named(start, where))
        if movie in start:
            start, where = start[movie], f"{where}.{movie}"
    if _number(start):
        return float(start)  # type: ignore[arg-type]
    if not isinstance(start, Mapping):
        raise ValueError(f"{where} must be a time, or times by movie or participant, got {start!r}")
    times = {who: time for who, time in _named(start, where) if not isinstance(time, Mapping)}
    for who, time in times.items():
        if not _number(time):
            raise ValueError(f"{where}.{who} must be a time, got {time!r}")
    return {who: float(time) for who, time in times.items()}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any, where: str) -> float:
    if not (_number(value) and value > 0):
        raise ValueError(f"{where} must be a positive number, got {value!r}")
    return float(value)


def _pair(value: Any, where: str) -> tuple[float, float]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_number, value))):
        raise ValueError(f"{where} must be two numbers, [x, y], got {value!r}")
    return float(value[0]), float(value[1])


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, got {type(value).__name__}")
    return value


def _named(content: Mapping[Any, Any], where: str) -> list[tuple[str, Any]]:
    """The entries by name: a name that Python code gives as a number is text here. Raises ValueError for one twice."""
    names = [str(name) for name in content]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is there twice")
    return list(zip(names, content.values(), strict=True))


def _known(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    unknown = [str(key) for key in content if key not in keys]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(keys)}")
