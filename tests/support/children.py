"""Processes that a test starts, and all that these start, found by a mark in their environment."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """An environment by which all processes that have it are found, and killed after the test."""
    environment = {**os.environ, "RJEPA_TEST_MARK": uuid.uuid4().hex}
    yield environment
    for process in left(environment):
        os.kill(process, signal.SIGKILL)


def left(environment: dict[str, str]) -> list[int]:
    """The processes that run in an environment."""
    mark, found = f"RJEPA_TEST_MARK={environment['RJEPA_TEST_MARK']}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended, or is someone else's
            pass
    return found


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it becomes true in this time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
