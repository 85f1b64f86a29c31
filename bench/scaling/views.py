"""How the records of this wing's benchmarks are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..harness.record import Record
from ..harness.view import View, one_table
from . import forward, headline, memory, memory_plot, plot, selfcheck
from . import tables as scaling_tables


def draw_sizes(records: Sequence[Record], path: Path) -> list[Path]:
    """Draw the sweep once for each (B, T) that has at least 3 values of N; returns the files.

    The first is the headline of the (B, T) with the most N, if its algorithms were timed. The picture of all algorithms
    there is at `path` itself, and is drawn however few N there are.
    """
    sizes: dict[tuple[int, int], set[int]] = {}
    for r in records:
        sizes.setdefault((r.params["B"], r.params["T"]), set()).add(r.params["N"])
    order = sorted(sizes, key=lambda at: (-len(sizes[at]), at))
    written: list[Path] = []
    for index, (batch, steps) in enumerate(order):
        if index == 0 or len(sizes[batch, steps]) >= 3:
            here = [r for r in records if (r.params["B"], r.params["T"]) == (batch, steps)]
            if index == 0 and not headline.missing(here):
                written += headline.draw(here, path.with_name(f"{path.stem}-headline"))
            target = path.with_suffix("") if index == 0 else path.with_name(f"{path.stem}-B{batch}-T{steps}")
            written += plot.draw(here, target)
    return written


VIEWS = {
    "scaling": View(
        "Complexity",
        "Time of a training step and memory against hidden size: what grows as N², what as N³ and N⁴.",
        "rjepa bench scaling",
        scaling_tables.tables,
        draw_sizes,
        points=3,
    ),
    "memory": View(
        "Memory",
        "Peak bytes against T, N and B, measured on what is predicted; where BPTT's pass the others'.",
        "rjepa bench memory",
        memory.tables,
        memory_plot.draw,
        points=2,
    ),
    "forward": View(
        "The forward pass in parallel in time",
        "The loop against rounds over all steps at once.",
        "rjepa bench forward",
        one_table(forward.table),
        None,
    ),
    "forward-predicted": View(
        "The forward pass in parallel in time: predicted for a GPU",
        "A training step of an RGC: work is counted by running the same code, rounds are those that it took on the "
        "CPU. Nothing is measured.",
        "rjepa bench forward",
        lambda records: [forward.predicted_table(r) for r in records],
        None,
    ),
    "selfcheck": View(
        "The benchmark against itself",
        "The same sweep again and again: changes that are seen where there are none, and slopes that repeat.",
        "rjepa bench selfcheck",
        one_table(selfcheck.table),
        None,
    ),
}
