"""How the records of this wing's benchmark are shown."""

from __future__ import annotations

from ..harness.view import View
from . import plot, run

VIEWS = {
    "peers": View(
        "Peers",
        "The same gradient, or the nearest, from what else one could pick; each checked against float64 first.",
        "rjepa bench peers",
        run.tables,
        plot.draw,
    ),
}
