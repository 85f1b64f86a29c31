"""Each kernel's time against what its bytes and FLOP allow; and without a GPU, its machine code and predicted time."""

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
