"""A plugin of pytest for tests on a GPU: what one test breaks costs that test alone, and a rerun goes on.

    pytest -p rjepa_triton.bench.report.gpu_tests -n 4 …

After a CUDA error such as an illegal access, whatever the process asks of its GPU fails. A worker of pytest-xdist that
finds its GPU so ends itself after the test, and pytest-xdist starts another. Each test's outcome is added to the file
that $RJEPA_GPU_TESTS names as soon as it is known, and tests that passed according to that file are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

LOG = "RJEPA_GPU_TESTS"
PASSED = "passed"


def usable() -> bool:
    """Whether this process can still use its GPU, if there is one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def outcomes(log: Path) -> dict[str, str]:
    """The last outcome of each test in a file of outcomes."""
    found: dict[str, str] = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                test, outcome = json.loads(line)
            except ValueError:  # a line that was cut off
                continue
            found[test] = outcome
    return found


def passed(log: Path) -> set[str]:
    """The tests that passed, according to a file of outcomes."""
    return {test for test, outcome in outcomes(log).items() if outcome == PASSED}


def _log() -> Path | None:
    return Path(os.environ[LOG]) if os.environ.get(LOG) else None


def _done(log: Path) -> Path:
    """The tests to leave out: fixed as a run begins, since all workers must find the same tests."""
    return log.with_suffix(".done")


def pytest_configure(config: pytest.Config) -> None:
    """Fix which tests are left out."""
    log = _log()
    if log is not None and not hasattr(config, "workerinput"):
        _done(log).write_text("\n".join(sorted(passed(log))), encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what an earlier run has passed."""
    log = _log()
    if log is None or not _done(log).exists():
        return
    done = set(_done(log).read_text(encoding="utf-8").split("\n"))
    kept = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """End a worker whose GPU a test has left unusable, once that test's reports are sent."""
    result = yield
    if hasattr(item.config, "workerinput") and not usable():
        os._exit(70)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's outcome to the file."""
    log = _log()
    if log is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != PASSED:
        line = json.dumps([report.nodeid, report.outcome]) + "\n"
        with log.open("a", encoding="utf-8") as opened:
            opened.write(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run from which every test is left out has nothing against it."""
    if _log() is not None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
