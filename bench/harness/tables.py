"""Texts for tables: bytes, seconds, what a record was measured at, and a table as Markdown."""

from __future__ import annotations

from rich.table import Table

from .record import Record

# The parameters that tell a benchmark's records of one algorithm apart, if they aren't N and B.
SWEPT = {
    "fidelity": ("cell", "N", "T", "B", "scale"),
    "learn": ("task", "stage", "lr", "seed"),
    "pays": ("task", "cell", "N", "optimizer"),
    "forward": ("cell", "N", "B", "T"),
    "forward-predicted": ("N", "B", "T"),
    "online": ("N", "B"),
    "memory": ("N", "B", "T"),
    "peers": ("task", "N", "B", "T"),
}


def place(made: Record) -> str:
    """The algorithm and point of a record: "rfp-step N=64 B=1", or with what else its benchmark sweeps."""
    swept = SWEPT.get(made.benchmark, ("N", "B"))
    return " ".join([made.algorithm, *(f"{name}={made.params.get(name)}" for name in swept)])


def bytes_text(count: float) -> str:
    """Bytes to three digits, with powers of 1000: 512 B, 1.5 MB, 34.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds_text(value: float) -> str:
    """Seconds to three digits: 12.3 µs, 4.56 ms, 1.2 s."""
    if value < 999.5e-6:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 999.5e-3 else f"{value:.3g} s"


def markdown(table: Table) -> str:
    """A table as Markdown, its title above it."""
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    cells = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    rows += [list(row) for row in cells]
    lines = (
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows
    )
    return "\n".join([f"**{table.title}**", "", *lines])
