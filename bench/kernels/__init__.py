"""Kernels against what their bytes and FLOP allow; their machine code without a GPU."""

from .timing import (
    FILE,
    POINTS,
    TOLERANCE,
    Settings,
    device_rates,
    floor,
    measure_kernel,
    rate_text,
    run,
    sweep,
    table,
    verify,
)

__all__ = [
    "FILE",
    "POINTS",
    "TOLERANCE",
    "Settings",
    "device_rates",
    "floor",
    "measure_kernel",
    "rate_text",
    "run",
    "sweep",
    "table",
    "verify",
]
