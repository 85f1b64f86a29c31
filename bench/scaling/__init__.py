"""Time and memory of every algorithm against hidden size, batch and length."""

from .timing import (
    DEFAULT_BATCHES,
    DEFAULT_HIDDEN,
    DEFAULT_POINTS,
    FILE,
    MEMORY_SHARE,
    RUNS_BEFORE,
    Settings,
    check_device,
    default_device,
    failure,
    measure_point,
    own_process,
    points,
    refused,
    run,
    sweep,
)

__all__ = [
    "DEFAULT_BATCHES",
    "DEFAULT_HIDDEN",
    "DEFAULT_POINTS",
    "FILE",
    "MEMORY_SHARE",
    "RUNS_BEFORE",
    "Settings",
    "check_device",
    "default_device",
    "failure",
    "measure_point",
    "own_process",
    "points",
    "refused",
    "run",
    "sweep",
]
