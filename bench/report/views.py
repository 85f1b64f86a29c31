"""What is shown of each benchmark's records: tables and pictures, for `rjepa bench table`, `plot` and `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..harness.record import Record, latest
from ..kernels import plot as roofline_plot
from ..kernels import timing as kernels
from ..learning import curves, fidelity, frontier, learn
from ..peers import plot as peers_plot
from ..peers import run as peers
from ..scaling import forward, memory, memory_plot, plot, selfcheck
from ..scaling import tables as scaling_tables
from ..streams import latency, online

Tables = Callable[[Sequence[Record]], Sequence[Table]]
Draw = Callable[[Sequence[Record], Path], Sequence[Path]]


@dataclass(frozen=True)
class View:
    """One benchmark: its heading, what it is about in a sentence, its command, its tables, its pictures."""

    title: str
    about: str
    command: str
    tables: Tables
    draw: Draw | None
    points: int = 1  # different N, B and T of which there must be as many for a picture to say something

    def says_something(self, records: Sequence[Record]) -> bool:
        """Whether there is a picture, and enough was measured for it."""
        measured = {tuple(r.params.get(name) for name in "NBT") for r in records if r.status == "ok"}
        return self.draw is not None and len(measured) >= self.points


def _scaling(records: Sequence[Record], path: Path) -> list[Path]:
    """A picture for each B and T of which there are 3 N or more; the one with most N has `path` itself."""
    sizes: dict[tuple[int, int], set[int]] = {}
    for r in records:
        sizes.setdefault((r.params["B"], r.params["T"]), set()).add(r.params["N"])
    order = sorted(sizes, key=lambda at: (-len(sizes[at]), at))
    written: list[Path] = []
    for index, (batch, steps) in enumerate(order):
        if index == 0 or len(sizes[batch, steps]) >= 3:
            here = [r for r in records if (r.params["B"], r.params["T"]) == (batch, steps)]
            target = path.with_suffix("") if index == 0 else path.with_name(f"{path.stem}-B{batch}-T{steps}")
            written += plot.draw(here, target)
    return written


def _one(table: Callable[[Sequence[Record]], Table]) -> Tables:
    return lambda records: [table(records)]


VIEWS: dict[str, View] = {
    "scaling": View(
        "Complexity",
        "Time of a training step and memory against hidden size: what grows as N², what as N³ and N⁴.",
        "rjepa bench scaling",
        scaling_tables.tables,
        _scaling,
        points=3,
    ),
    "peers": View(
        "Peers",
        "The same gradient, or the nearest, from what else one could pick; each checked against float64 first.",
        "rjepa bench peers",
        peers.tables,
        peers_plot.draw,
    ),
    "kernels": View(
        "Kernels under the roof",
        "Each kernel against the least time that its bytes and its arithmetic allow on this device.",
        "rjepa bench kernels",
        _one(kernels.table),
        roofline_plot.draw,
    ),
    "online": View(
        "Latency of an online step",
        "Every step of a stream timed by itself: forward, gradient, learning, SGD.",
        "rjepa bench online",
        _one(online.table),
        latency.draw,
    ),
    "memory": View(
        "Memory",
        "Peak bytes against T, N and B, measured on what is predicted; where BPTT's pass the others'.",
        "rjepa bench memory",
        memory.tables,
        memory_plot.draw,
        points=2,
    ),
    "fidelity": View(
        "Cheap against exact",
        "How near each rule's gradient comes to the exact one, and what it costs.",
        "rjepa bench fidelity",
        fidelity.tables,
        frontier.draw,
    ),
    "learn": View(
        "Learning online",
        "What every rule learns on three streams that never end.",
        "rjepa bench learn",
        learn.tables,
        curves.draw,
    ),
    "forward": View(
        "The forward pass in parallel in time",
        "The loop against rounds over all steps at once.",
        "rjepa bench forward",
        _one(forward.table),
        None,
    ),
    "selfcheck": View(
        "The benchmark against itself",
        "The same sweep again and again: changes that are seen where there are none, and slopes that repeat.",
        "rjepa bench selfcheck",
        _one(selfcheck.table),
        None,
    ),
}


def of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The last records of each benchmark that has a view, in the views' order."""
    known = latest(records)
    found = {name: [r for r in known if r.benchmark == name] for name in VIEWS}
    return {name: mine for name, mine in found.items() if mine}


def tables(records: Sequence[Record]) -> list[Table]:
    """All tables of all benchmarks in `records`. Raises ValueError if there is none that has any."""
    found = [table for name, mine in of(records).items() for table in VIEWS[name].tables(mine)]
    if not found:
        raise ValueError(f"there are no records of {', '.join(VIEWS)}")
    return found


def draw(records: Sequence[Record], path: Path) -> list[Path]:
    """All pictures of all benchmarks in `records`, at `path`; with the benchmark's name added where there are several.

    Raises ValueError if there is nothing to draw.
    """
    found = {name: mine for name, mine in of(records).items() if VIEWS[name].draw is not None}
    if not found:
        drawn = ", ".join(name for name, view in VIEWS.items() if view.draw is not None)
        raise ValueError(f"there are no records of {drawn} to draw")
    written: list[Path] = []
    for name, mine in found.items():
        picture = VIEWS[name].draw
        assert picture is not None
        written += picture(mine, path if len(found) == 1 else path.with_name(f"{path.stem}-{name}"))
    return written
