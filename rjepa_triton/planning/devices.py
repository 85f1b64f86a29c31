"""Devices as data: what each is known to do a second, and where every number is from. The data is `devices.json`.

A basis is one of

    measured    on a device of the kind; `sources` says by what
    fitted      to committed records, which `sources` names
    nominal     the vendor's data sheet: what nothing exceeds, and what programs rarely reach
    estimated   from what is known of such devices
    assumed     for a device that isn't known: the order of magnitude

Rates, by name: "copy" bytes/s, read and written together; "float64", "float32", "tf32", "bfloat16" FLOP/s of products,
dense; "call" seconds that one call of torch takes at least; "graph_call" the same of a launch in a CUDA graph;
"scan_step" seconds a dependent step of a scan kernel; "latency" seconds from a load to its use; and of a CPU, "cache"
bytes/s of what its last cache holds, "matrix" the same of a matrix that is multiplied with a few rows, "fresh" seconds
a byte of memory that the system maps anew, and "view" seconds that a call takes which only makes a view of an array.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import _checks as check

BASES = ("measured", "fitted", "nominal", "estimated", "assumed")
NEEDED = ("copy", "float64", "float32", "call")
OPTIONAL = ("tf32", "bfloat16", "graph_call", "scan_step", "latency", "cache", "matrix", "fresh", "view")


@dataclass(frozen=True)
class Rate:
    """Bytes or FLOP per second, or seconds, and the number's basis."""

    value: float
    basis: str


@dataclass(frozen=True)
class Device:
    """A device's profile.

    key, name      as in options, and in words
    kind           "gpu" or "cpu"
    matches        patterns (`fnmatch`) of its name as torch or /proc/cpuinfo gives it
    memory_bytes   of the whole device
    rates          by name, as above
    cores          of a CPU, that its rates are of; cache_bytes: of its last cache
    sources        where what is measured or fitted is from
    kernels        what compiled kernels share out of a GPU (`bench.roofline`)
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
        """Where the rates are from, in words: measured: copy, float32; estimated: call."""
        by: dict[str, list[str]] = {}
        for name, rate in self.rates.items():
            by.setdefault(rate.basis, []).append(name)
        return "; ".join(f"{basis}: {', '.join(by[basis])}" for basis in sorted(by))

    def to_dict(self) -> dict[str, Any]:
        """The profile as `parse` takes it."""
        rates = {name: [rate.value, rate.basis] for name, rate in self.rates.items()}
        made: dict[str, Any] = {**asdict(self), "matches": list(self.matches), "rates": rates}
        del made["key"]
        return {name: value for name, value in made.items() if value not in (None, "", {}, 0.0)}


def parse(key: str, data: object, where: str) -> Device:
    """A profile from parsed JSON. Raises ValueError naming `where` and the fault."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: device {key!r} must be an object, got {type(data).__name__}")
    known = {name for name in Device.__dataclass_fields__ if name != "key"}
    unknown = sorted(set(data) - known)
    missing = sorted({"name", "kind", "matches", "memory_bytes", "rates"} - set(data))
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise ValueError(f"{where}: device {key!r} has {what} fields: {', '.join(names)}")
    check.one_of(f"{where}: kind of device {key!r}", data["kind"], ("gpu", "cpu"))
    rates = {}
    for name, given in data["rates"].items():
        check.one_of(f"{where}: a rate of device {key!r}", name, (*NEEDED, *OPTIONAL))
        value, basis = given
        check.one_of(f"{where}: basis of {name} of device {key!r}", basis, BASES)
        if not value > 0:
            raise ValueError(f"{where}: {name} of device {key!r} must be above 0, got {value}")
        rates[name] = Rate(float(value), basis)
    lacking = [name for name in NEEDED if name not in rates]
    if lacking:
        raise ValueError(f"{where}: device {key!r} lacks the rates {', '.join(lacking)}")
    return Device(key, **{**data, "matches": tuple(data["matches"]), "rates": rates})


def load(path: Path) -> dict[str, Device]:
    """The profiles of a JSON file, by key. Raises ValueError for what isn't one; OSError if unreadable."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: devices must be an object of profiles by key, got {type(data).__name__}")
    return {key: parse(key, value, str(path)) for key, value in data.items()}


@functools.cache
def known() -> dict[str, Device]:
    """The profiles that the package comes with."""
    return load(Path(__file__).with_name("devices.json"))


def generic(kind: str) -> Device:
    """What is assumed of a device that isn't known; kind "gpu" or "cpu"."""
    return known()[kind]


@functools.cache
def find(name: str, kind: str) -> Device:
    """The profile whose patterns match a device's own name, or `generic`'s."""
    for device in known().values():
        if device.kind == kind and any(fnmatch.fnmatchcase(name, pattern) for pattern in device.matches):
            return device
    return generic(kind)


def by_key(key: str) -> Device:
    """A profile by its key. Raises ValueError naming the known ones."""
    check.one_of("device", key, known())
    return known()[key]
