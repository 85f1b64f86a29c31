"""How the records of this wing's benchmark are shown."""

from __future__ import annotations

from ..harness.view import View, one_table
from . import latency, online

VIEWS = {
    "online": View(
        "Latency of an online step",
        "Every step of a stream timed by itself: forward, gradient, learning, SGD.",
        "rjepa bench online",
        one_table(online.table),
        latency.draw,
    ),
}
