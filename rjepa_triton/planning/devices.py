"""Profiles of devices: how fast each is, and where every number comes from. The data is in `devices.json`.

Each rate has a basis:

    measured    on such a device; `sources` says by which benchmark
    fitted      to committed records, which `sources` names
    nominal     from the vendor's data sheet: an upper limit that programs rarely reach
    estimated   from what is known of similar devices
    assumed     for an unknown device: the order of magnitude

The rates, by name:

    copy        bytes/s, read and written ones together
    float64, float32, tf32, bfloat16   FLOP/s of dense matrix products
    call        seconds: the least time of one call of a torch operator
    graph_call  seconds: the same of a launch inside a CUDA graph
    scan_step   seconds of one dependent step of a scan kernel
    latency     seconds from a load to its use

and of a CPU also

    cache       bytes/s of memory in its last cache
    matrix      bytes/s of a matrix in that cache that is multiplied with a few rows
    fresh       seconds per byte of memory that the operating system maps anew
    view        seconds of a call that only makes a view of an array
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import _checks as check
from .. import _files

# What fields of a profile must be in JSON; the others are text.
KINDS: dict[str, type | tuple[type, ...]] = {
    "matches": list,
    "rates": dict,
    "kernels": dict,
    "memory_bytes": (int, float),
    "cache_bytes": (int, float),
    "cores": (int, type(None)),
}
BASES = ("measured", "fitted", "nominal", "estimated", "assumed")
NEEDED = ("copy", "float64", "float32", "call")
OPTIONAL = ("tf32", "bfloat16", "graph_call", "scan_step", "latency", "cache", "matrix", "fresh", "view")


@dataclass(frozen=True)
class Rate:
    """A number (bytes or FLOP per second, or seconds) and its basis."""

    value: float
    basis: str


@dataclass(frozen=True)
class Device:
    """A device's profile.

    key, name      its name in options, and its name in words
    kind           "gpu" or "cpu"
    matches        `fnmatch` patterns for the name that torch or /proc/cpuinfo gives it
    memory_bytes   memory of the whole device
    rates          by name, as listed above
    cores          for a CPU: with how many cores its rates hold
    cache_bytes    for a CPU: the size of its last cache
    sources        where measured and fitted rates come from
    kernels        for a GPU: compile target, multiprocessors, bytes of shared memory each (`bench.kernels.roofline`)
    """

    key: str
    name: str
    kind: str
    matches: tuple[str, ...]
    memory_bytes: float
    rates: Mapping[str, Rate]
    cores: int | None = None
    cache_bytes: float = 0.0
    sources: str = ""
    kernels: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, name: str, default: float = 0.0) -> float:
        """The value of a rate, or `default` where the device has none."""
        found = self.rates.get(name)
        return default if found is None else found.value

    def basis(self) -> str:
        """Where the rates come from, in words, such as "measured: copy, float32; estimated: call"."""
        by: dict[str, list[str]] = {}
        for name, rate in self.rates.items():
            by.setdefault(rate.basis, []).append(name)
        return "; ".join(f"{basis}: {', '.join(by[basis])}" for basis in sorted(by))

    def to_dict(self) -> dict[str, Any]:
        """The profile as the dict that `parse` takes."""
        rates = {name: [rate.value, rate.basis] for name, rate in self.rates.items()}
        made: dict[str, Any] = {**asdict(self), "matches": list(self.matches), "rates": rates}
        del made["key"]
        return {name: value for name, value in made.items() if value not in (None, "", {}, 0.0)}


def parse(key: str, data: object, where: str) -> Device:
    """The profile that parsed JSON describes. Raises ValueError, which names `where` (the file) and what is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: device {key!r} must be an object, got {type(data).__name__}")
    known = {name for name in Device.__dataclass_fields__ if name != "key"}
    unknown = sorted(set(data) - known)
    missing = sorted({"name", "kind", "matches", "memory_bytes", "rates"} - set(data))
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise ValueError(f"{where}: device {key!r} has {what} fields: {', '.join(names)}")
    check.one_of(f"{where}: kind of device {key!r}", data["kind"], ("gpu", "cpu"))
    for name, value in data.items():
        if not isinstance(value, KINDS.get(name, str)) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} of device {key!r} can't be {value!r}")
    if not all(isinstance(pattern, str) for pattern in data["matches"]):
        raise ValueError(f"{where}: matches of device {key!r} must be texts, got {data['matches']!r}")
    rates = {}
    for name, given in data["rates"].items():
        check.one_of(f"{where}: a rate of device {key!r}", name, (*NEEDED, *OPTIONAL))
        if not (isinstance(given, list) and len(given) == 2 and isinstance(given[0], int | float)):
            raise ValueError(f"{where}: {name} of device {key!r} must be [value, basis], got {given!r}")
        value, basis = given
        check.one_of(f"{where}: basis of {name} of device {key!r}", basis, BASES)
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: {name} of device {key!r} must be above 0, got {value}")
        rates[name] = Rate(float(value), basis)
    lacking = [name for name in NEEDED if name not in rates]
    if lacking:
        raise ValueError(f"{where}: device {key!r} lacks the rates {', '.join(lacking)}")
    return Device(key, **{**data, "matches": tuple(data["matches"]), "rates": rates})


def load(path: Path) -> dict[str, Device]:
    """The profiles of a JSON file, by key.

    Raises ValueError if the file isn't JSON or a profile is wrong, OSError if it can't be read.
    """
    try:
        data = json.loads(_files.read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: devices must be an object of profiles by key, got {type(data).__name__}")
    return {key: parse(key, value, str(path)) for key, value in data.items()}


@functools.cache
def known() -> dict[str, Device]:
    """The profiles that come with the package."""
    return load(Path(__file__).with_name("devices.json"))


def generic(kind: str) -> Device:
    """The profile that is assumed for an unknown device of this kind, "gpu" or "cpu"."""
    return known()[kind]


@functools.cache
def find(name: str, kind: str) -> Device:
    """The profile whose patterns match the device's own name; if there is none, `generic`."""
    for device in known().values():
        if device.kind == kind and any(fnmatch.fnmatchcase(name, pattern) for pattern in device.matches):
            return device
    return generic(kind)


def by_key(key: str) -> Device:
    """The profile of this key. Raises ValueError, which lists the known keys, if there is none."""
    check.one_of("device", key, known())
    return known()[key]
