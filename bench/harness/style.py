"""The common style of all plots, and the checks of the records that they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ... import _files
from .record import Record, latest

Dashes = tuple[float, Sequence[float]]
SOLID: Dashes = (0, ())
DASHED: Dashes = (0, (4, 2))
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "rjepa-triton",  # the same records give the same file
}


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    colour: str
    marker: str
    line: Dashes = SOLID


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, close it, and return the paths. `path` may end in .png, .svg or .jsonl."""
    stem = path.with_suffix("") if path.suffix in (".png", ".svg", ".jsonl") else path
    written = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    try:
        for file in written:
            with _files.replacing(file) as temporary:
                kind = file.suffix[1:]
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    finally:
        plt.close(figure)
    return written


def unmixed(records: Sequence[Record], benchmark: str, alike: Mapping[str, str]) -> list[Record]:
    """The last record of each key of one benchmark, checked to be of one device and alike in some parameters.

    alike: names of parameters, by what messages call them. Raises ValueError if there are no records, or if several
    devices or values of such a parameter are mixed.
    """
    mine = [r for r in latest(records) if r.benchmark == benchmark]
    if not mine:
        raise ValueError(f"there are no records of the benchmark {benchmark!r} to draw")
    found = {"devices": {r.device for r in mine}}
    found |= {what: {r.params[name] for r in mine} for what, name in alike.items()}
    for what, values in found.items():
        if len(values) > 1:
            raise ValueError(f"one plot can't mix {what}, got {', '.join(map(str, sorted(values)))}")
    return mine


def where(records: Sequence[Record]) -> str:
    """The device of records that all have the same one, and on a CPU the number of threads."""
    threads = sorted({r.params["threads"] for r in records})
    on_cpu = records[0].params["device"] == "cpu"
    count = f"{'/'.join(map(str, threads))} thread{'s' * (threads != [1])}"
    return records[0].device + (f", {count}" if on_cpu else "")
