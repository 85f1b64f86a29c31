"""How the records of this wing's benchmarks are shown."""

from __future__ import annotations

from ..harness.view import View
from . import curves, fidelity, frontier, learn, pays, pays_plot

VIEWS = {
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
    "pays": View(
        "Does Γ pay?",
        "What each rule from no trace to exact RTRL learns, by task, cell, size and optimizer.",
        "rjepa bench pays",
        pays.tables,
        pays_plot.draw,
    ),
}
