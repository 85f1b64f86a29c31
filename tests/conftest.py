"""Shared by all tests."""

import os
from collections.abc import Iterator

# A worker of `pytest -n` and the processes that its tests start take their share of the cores, and two threads at most:
# threads that wait for a core cost more than they bring. Read when torch is first imported.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# By the user, or in a worker by the process that started it.
_ASKED = int(os.environ.get("OMP_NUM_THREADS", "2"))
os.environ["OMP_NUM_THREADS"] = str(max(1, min(_ASKED, 2, _CORES // _WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402
from children import marked  # noqa: E402, F401 # a fixture

if not torch.cuda.is_available():
    # Read when triton is first imported: kernels run in Python, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.do_once()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():
        torch.set_default_device(None)  # as `kernels_here.go` may have left it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fuzz tests counted, of all processes together (`fuzzing.Count`)."""
    made: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, times in getattr(report, "user_properties", ()):
                if name.startswith("count of ") and getattr(report, "when", "") == "call":
                    what = name.removeprefix("count of ")
                    made[what] = made.get(what, 0) + times
    if made:
        terminalreporter.section("counts")
        for what, times in sorted(made.items()):
            terminalreporter.write_line(f"{times:>10,} {what}")
