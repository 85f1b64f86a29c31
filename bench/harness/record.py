"""The record of one measurement, and files of records: JSON Lines, one record a line, to which lines are only added.

A line is written whole or not at all, so a run that was interrupted, or met a full disk, leaves a file that the next
run continues.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.errors import ConsoleError

from ... import _files
from ..._device import device_name as device_name
from . import clocks

SCHEMA = 3
# Schema 1 has timings without intervals and yardsticks; schema 2 without samples, and with one time of each yardstick.
READABLE = (1, 2, 3)
# What a record's fields are in JSON, and which of its params are whole numbers.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("benchmark", "algorithm", "device", "run", "time", "message", "command"), (str,)),
    **dict.fromkeys(("git", "backend"), (str, type(None))),
    **dict.fromkeys(("state_bytes", "peak_bytes", "predicted_peak_bytes"), (int, float, type(None))),
    **dict.fromkeys(("predicted_seconds", "compile_seconds"), (int, float, type(None))),
    **dict.fromkeys(("params", "versions", "payload"), (dict,)),
}
COUNTS = ("N", "B", "T", "C", "threads", "seed", "steps", "window")
STATUSES = ("ok", "oom", "error", "over_budget", "missing")


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the 20th and 80th percentiles of `repeats` samples.

    low, high     the ends of the median's 95 % bootstrap interval; None for one sample, and in records of schema 1
    yardsticks    seconds of work that never changes (`measure.yardsticks`), timed among the samples, by pass. If they
                  differ from those of another record, the machine differed. Empty in records of schema 1.
    samples       the samples of each pass, to 4 digits, if cases were sampled in turn (`measure.interleave`)
    """

    median: float
    p20: float
    p80: float
    repeats: int
    low: float | None = None
    high: float | None = None
    yardsticks: dict[str, list[float]] = field(default_factory=dict)
    samples: list[list[float]] = field(default_factory=list)

    def per(self, count: int) -> Timing:
        """The timing of one of `count` equal parts of what was timed."""
        low, high = (None if end is None else end / count for end in (self.low, self.high))
        parts = (self.median / count, self.p20 / count, self.p80 / count)
        samples = [rounded(one / count for one in taken) for taken in self.samples]
        return Timing(*parts, self.repeats, low, high, self.yardsticks, samples)


@dataclass(frozen=True)
class Record:
    """One measurement of one algorithm at one point.

    benchmark, algorithm    "scaling" and a case's name, "fidelity" and a method, "learn" and a learning rule,
                            "kernels" and kernel/runner, "roofline" and a kernel, "forward" and a mode,
                            "forward-predicted" and a way to take a training step, or "peers" and a peer
    params                  the parameters asked for: N, B, T, C, dtype, device, input, scale, threads, …
    status, message         "ok"; or "oom", "error", "over_budget", "missing" (a package or a device), and why
    timing                  seconds per time step, in "kernels", "forward" and "peers" per call; None unless "ok"
    state_bytes             bytes of learning state, computed from its formula
    peak_bytes              peak bytes as measured: see `measure.peak_bytes`
    predicted_peak_bytes    known before anything is built, as is
    predicted_seconds       for a time step; in "kernels" and "roofline" for a call, in "forward-predicted" for a
                            training step
    compile_seconds         wall time of the first call if something was compiled, that call included
    backend                 what ran Γ's recursion, and why; None for a case without Γ
    device                  name of the processor or GPU
    versions, git           versions of python, torch, …; revision of the checkout, "-dirty" if changed, or None
    run, time               ISO times of the sweep's start and of this record
    command                 the command line that made it; "" in records of schema 1, and in other programs
    payload                 results that are not times, different for each benchmark
    """

    benchmark: str
    algorithm: str
    params: dict[str, Any]
    status: str
    device: str
    versions: dict[str, str | None]
    git: str | None
    run: str
    time: str
    message: str = ""
    timing: Timing | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    predicted_seconds: float | None = None
    compile_seconds: float | None = None
    backend: str | None = None
    payload: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    schema: int = SCHEMA


def rounded(seconds: Iterable[float]) -> list[float]:
    """Round to 4 digits, so that a line with all samples stays short; no clock or machine is more precise."""
    return [float(f"{one:.4g}") for one in seconds]


def now() -> str:
    """The current time in UTC, as ISO 8601 to the millisecond."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def versions() -> dict[str, str | None]:
    """The versions of everything on which a time depends; None for a package that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    for package, name in (("triton", "triton"), ("rjepa_triton", "rjepa-triton")):
        try:
            found[package] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_revision() -> str | None:
    """The revision of the checkout, with "-dirty" if a tracked file was changed; None outside of a checkout."""
    here = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=here, capture_output=True, encoding="utf-8", errors="replace", check=True
        )
        return done.stdout.strip()

    try:
        # an installed copy may lie inside some other repository, whose revision says nothing about it
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def key(record: Record, *, versions: bool = True) -> str:
    """A text that is equal for two measurements of the same thing.

    It is made of benchmark, algorithm, params, device and, if `versions`, torch's version; never of the git revision.
    """
    parts: list[Any] = [record.benchmark, record.algorithm, record.params, record.device]
    if versions:
        parts.append(record.versions.get("torch"))
    return json.dumps(parts, sort_keys=True)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each key, in the order in which the keys first appear."""
    return list({key(record): record for record in records}.values())


def started(benchmark: str, device: torch.device | str) -> dict[str, Any]:
    """The fields that all records of one run share. device: a torch device, or the name of another one."""
    return {
        "benchmark": benchmark,
        "device": device if isinstance(device, str) else device_name(device),
        "versions": versions(),
        "git": git_revision(),
        "run": now(),
        "command": command(),
    }


def command() -> str:
    """The command line, as `rjepa …`, if this program is `rjepa` or `python -m rjepa_triton`; else ""."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    ours = path.name == "rjepa" or path.parts[-2:] == ("rjepa_triton", "__main__.py")
    return shlex.join(["rjepa", *arguments]) if ours else ""


def measured(path: Path) -> set[str]:
    """The keys whose last record in a file is a measurement ("ok"); none if there is no file."""
    earlier = latest(load(path)) if path.exists() else []
    return {key(record) for record in earlier if record.status == "ok"}


def here(path: Path, benchmark: str, device: str) -> list[Record]:
    """The last record of each key in a file, of one benchmark, on this device and with this version of torch."""
    name = device_name(torch.device(device))
    return [
        record
        for record in latest(load(path))
        if (record.benchmark, record.device) == (benchmark, name)
        and record.versions.get("torch") == torch.__version__
    ]


def append(path: Path, record: Record) -> None:
    """Add a record to the file as one line, and sync it. If that fails, the file stays as it was.

    A record of what a GPU has just done gets the GPU's clocks as payload["clocks"] (`clocks.now`).

    What an interrupted write left after the last newline is cut off first, with a warning. Raises OSError if the line
    can't be written whole.
    """
    if record.params.get("device") == "cuda" and torch.cuda.is_available():
        record = replace(record, payload={**record.payload, "clocks": clocks.now("cuda")})
    line = (json.dumps(asdict(record), sort_keys=True, allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = _cut_broken_tail(descriptor, path)
        try:
            written = os.write(descriptor, line)
            # Where there was room for a part, the next try raises with the system's reason.
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(f"could not add a record to {path}: {error}") from error
    finally:
        os.close(descriptor)


def _cut_broken_tail(descriptor: int, path: Path) -> int:
    """Truncate the file after its last whole line; returns its size."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        body = file.read()
    kept = body.rfind(b"\n") + 1
    last = body[:kept].splitlines(keepends=True)[-1:]
    if last and not _is_json(last[0]):
        kept -= len(last[0])
    if kept < len(body):
        os.ftruncate(descriptor, kept)
        warnings.warn(
            f"{path}: cut off the last {len(body) - kept} bytes, which an interrupted write had left",
            stacklevel=3,
        )
    return kept


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def load(path: Path | str) -> list[Record]:
    """All records of a file, in order.

    A last line that an interrupted write broke is left out, with a warning. Raises ValueError, naming the file, the
    line and the fault, for a broken line elsewhere, an unknown schema, missing or unknown fields, or values of another
    type; OSError if the file can't be read. What `params` and `payload` of a record lack raises such a ValueError when
    it is asked for.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True)
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        whole = line.endswith(b"\n") and _is_json(line)
        if not whole and number == len(lines):
            warnings.warn(f"{where}: left out, an interrupted write broke it", stacklevel=2)
        elif not whole:
            raise ValueError(f"{where}: not a line of JSON: {line[:60].decode('utf-8', 'replace')!r}")
        else:
            records.append(_record(json.loads(line), where))
    return records


def load_all(path: Path) -> list[Record]:
    """The last record of each key of a file, or of each file of records in a folder.

    Raises ValueError if there are none, and what `load` raises.
    """
    found = [r for file in files_of(path) for r in latest(load(file))]
    if not found:
        raise ValueError(f"{path} has no records of a benchmark")
    return found


def files_of(path: Path) -> list[Path]:
    """The file itself; or the files of records in a folder, which may hold other files as well."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("*.jsonl")) if _holds_records(file)]


def _holds_records(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return '"benchmark"' in lines.readline()


def _record(data: object, where: str) -> Record:
    """Make a record of parsed JSON. Raises ValueError, naming `where`."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a record must be a JSON object, got {type(data).__name__}")
    schema = data.get("schema")
    if schema not in READABLE:
        newer = isinstance(schema, int) and schema > SCHEMA
        hint = "; a newer rjepa-triton wrote it" if newer else ""
        wanted = f"{', '.join(map(str, READABLE[:-1]))} or {READABLE[-1]}"
        raise ValueError(f"{where}: schema must be {wanted}, got {schema!r}{hint}")
    data = {"command": "", **data} if schema == 1 else data
    known = {f.name for f in fields(Record)}
    for kind, names in (("missing", known - data.keys()), ("unknown", data.keys() - known)):
        if names:
            raise ValueError(f"{where}: {kind} fields: {', '.join(sorted(names))}")
    if data["status"] not in STATUSES:
        raise ValueError(f"{where}: status must be one of {', '.join(STATUSES)}, got {data['status']!r}")
    for name, kinds in KINDS.items():
        if kinds == (dict,) and not isinstance(data[name], dict):
            raise ValueError(f"{where}: {name} must be an object, got {type(data[name]).__name__}")
        if not _is(data[name], kinds):
            raise ValueError(f"{where}: {name} can't be {data[name]!r:.60}")
    for name, value in data["params"].items():
        if name in COUNTS and not _is(value, (int,)):
            raise ValueError(f"{where}: {name} in params must be a whole number, got {value!r:.60}")
    timing = data["timing"]
    if timing is not None:
        try:
            if schema == 2:  # it has one time of each yardstick
                timing = {**timing, "yardsticks": {name: [one] for name, one in timing["yardsticks"].items()}}
            timing = Timing(**timing)
            _check_timing(timing)
        except (TypeError, KeyError, AttributeError, ValueError):
            raise ValueError(
                f"{where}: timing must have median, p20, p80, repeats, each above 0, got {timing!r:.200}"
            ) from None
    told = f"this record of {data['benchmark']!r} has no"
    params, payload = (_Named(data[name], where, f"{told} {name}.") for name in ("params", "payload"))
    return Record(**{**data, "timing": timing, "params": params, "payload": payload})


class _Named(dict[str, Any]):
    """A dict that was read from a file: a key that is missing is an error of the file, and named as such."""

    def __init__(
        self, content: Any = (), where: str = "records", told: str = "a key that isn't there: "
    ) -> None:
        super().__init__(content)
        self.where, self._told = where, told

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.where}: {self._told}{key}")


@contextmanager
def named_errors(records: Sequence[Record]) -> Iterator[None]:
    """In a block that shows records that were read: a value of a type that it can't take is a ValueError of their file.

    What a benchmark's payload holds is known to the benchmark alone, so it isn't checked when a file is read.
    """
    try:
        yield
    except (
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
        ValueError,
        ConsoleError,
    ) as error:
        where, told = source(records), _files.first_line(error)
        if isinstance(error, ValueError):
            if told.startswith(where):
                raise
            raise ValueError(f"{where}: {told}") from error
        names = ", ".join(sorted({r.benchmark for r in records}))
        raise ValueError(
            f"{where}: the records of {names} hold what can't be shown: {type(error).__name__}: {told}"
        ) from error


def source(records: Iterable[Record]) -> str:
    """The files that records were read from, as messages name them."""
    return ", ".join(sorted({getattr(r.params, "where", "records").partition(", line ")[0] for r in records}))


def _is(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value of JSON is of one of these types; a truth value is no number, nor is NaN."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return isinstance(value, kinds)


def _check_timing(timing: Timing) -> None:
    """Raise ValueError if what should be seconds isn't."""
    times: list[Any] = [timing.median, timing.p20, timing.p80, timing.repeats]
    times += [end for end in (timing.low, timing.high) if end is not None]
    for group in (*timing.yardsticks.values(), *timing.samples):
        times += group
    if not all(_is(one, (int, float)) and one > 0 for one in times):
        raise ValueError
    if not all(timing.yardsticks.values()):
        raise ValueError
