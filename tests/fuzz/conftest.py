"""`make soak` takes hours, so its longest tests begin first, and a failure is told when it comes, not at the end."""

import os

import pytest
from fuzzing import SOAK

LONGEST = ("test_a_long_run[torch]", "test_kills[", "test_a_long_run[", "test_surface.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, each core has something to do."""

    def rank(item: pytest.Item) -> int:
        return next((at for at, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST))

    if SOAK:
        items.sort(key=rank)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure in the process that hears of all."""
    if SOAK and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed:\n{report.longreprtext}", flush=True)
