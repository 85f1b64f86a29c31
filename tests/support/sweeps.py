"""Records of a scaling sweep that no machine ran, with the times that a test gives them."""

from __future__ import annotations

from typing import Any

from rjepa_triton.bench.harness.record import Record, Timing

LEVELS = {"L1": 32 << 10, "L2": 512 << 10, "L3": 32 << 20}


def made(algorithm: str, n: int, seconds: float | None, batch: int = 1, **fields: Any) -> Record:
    """A record of one algorithm at one N; None seconds: it didn't fit."""
    timing = None if seconds is None else Timing(seconds, seconds, seconds, 9, 0.99 * seconds, 1.01 * seconds)
    return Record(
        benchmark="scaling",
        algorithm=algorithm,
        params={"N": n, "B": batch, "T": 50, "dtype": "float32", "device": "cpu", "threads": 1},
        status="ok" if timing else "oom",
        device="a processor",
        versions={},
        git=None,
        run="a",
        time="",
        timing=timing,
        **{"state_bytes": 32 * n**2, "payload": {"levels": LEVELS}, **fields},
    )
