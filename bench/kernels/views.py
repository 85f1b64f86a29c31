"""How the records of this wing's benchmark are shown."""

from __future__ import annotations

from ..harness.view import View, one_table
from . import plot, timing

VIEWS = {
    "kernels": View(
        "Kernels under the roof",
        "Each kernel against the least time that its bytes and its arithmetic allow on this device.",
        "rjepa bench kernels",
        one_table(timing.table),
        plot.draw,
    ),
}
