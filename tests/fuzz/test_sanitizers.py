"""The compiled code under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds, nothing undefined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sanitized
from fuzzing import SOAK

if why := sanitized.missing():
    pytestmark = pytest.mark.skip(reason=f"the sanitizers can't run: {why}")

CASES = 1_000 if SOAK else 60
SEEDS = range(15) if SOAK else range(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of a session, so that the library is built once."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "sanitized"


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_problems(seed: int, cache: Path, record_property: Callable[[str, object], None]) -> None:
    threads = 1 + seed % 4 if SOAK else 2
    arguments = [str(CASES), str(seed), str(threads), "all" if SOAK else "few"]
    done = sanitized.run(["tests/support/sanitized.py", *arguments], cache, 3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CASES} cases" in done.stdout
    record_property("count of sanitized cases", CASES)


@pytest.mark.skipif(not SOAK, reason="minutes: part of `make soak`")
@pytest.mark.parametrize("tests", ["test_calls.py", "test_gamma.py", "test_stream.py"])
def test_the_compiled_codes_own_tests(tests: str, cache: Path) -> None:
    # a process that is spawned has the ordinary library, whose last bits are others
    spawned = "tests/backend/native/test_calls.py::test_in_other_processes[spawn]"
    arguments = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "sanitized",
        f"tests/backend/native/{tests}",
        "--deselect",
        spawned,
    ]
    done = sanitized.run(arguments, cache, 3000)
    assert done.returncode == 0, done.stdout + done.stderr


# What must be caught, so that a run without a report says something: numbers read and written past the end, before the
# beginning, after the memory is freed, and from an address that is no float's.
FAULTS = {
    "past the end": ("library.activate_float(x.data_ptr(), x.numel() + 1, 0)", "heap-buffer-overflow"),
    "before the beginning": ("library.activate_float(x.data_ptr() - 4, 1, 0)", "heap-buffer-overflow"),
    "freed": ("address = x.data_ptr(); del x; library.activate_float(address, 8, 0)", "heap-use-after-free"),
    "misaligned": (
        "a = x.data_ptr(); library.reverse_scan_float(a + 1, a, None, a + 400, a + 800, 1, 1, 8)",
        "runtime error: load of misaligned address",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, cache: Path) -> None:
    call, report = FAULTS[fault]
    script = f"""
import torch, sanitized
sanitized.use()
from rjepa_triton.backend.native.library import library as find
library = find()
x = torch.zeros(100_001)
library.activate_float(x.data_ptr(), x.numel(), 0)
print("so far", flush=True)
{call}
"""
    done = sanitized.run(["-c", script], cache, 600)
    assert "so far" in done.stdout, done.stderr
    assert done.returncode == 99
    assert report in done.stderr
