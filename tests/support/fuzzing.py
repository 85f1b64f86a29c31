"""How many cases a fuzz test runs: some in `make test`, always the same ones; many, drawn anew, in `make soak`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings

from rjepa_triton.layers import parallel
from rjepa_triton.rules import refine

SOAK = os.environ.get("RJEPA_SOAK") == "1"


def cases(few: int, many: int) -> Callable[[Any], Any]:
    """Settings of a fuzz test: `few` cases in `make test`, `many` in `make soak`."""
    return settings(
        max_examples=many if SOAK else few,
        derandomize=not SOAK,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Every warning is an error, but that rounds diverged: the sequential pass gives the same numbers then, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for told in (refine.Divergence, parallel.Divergence):
            warnings.simplefilter("ignore", told)
        yield


class Count:
    """Counts what a test did. `made` says how often each thing happened, for the summary (`conftest.py`)."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record, self.made = record, {}  # type: dict[str, int]

    def add(self, what: str, times: int = 1) -> None:
        self.made[what] = self.made.get(what, 0) + times

    def __enter__(self) -> Count:
        return self

    def __exit__(self, *_: object) -> None:
        for what, times in self.made.items():
            self._record(f"count of {what}", times)
