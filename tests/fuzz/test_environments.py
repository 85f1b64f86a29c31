"""Where the package runs: any locale, umask and home, with and without a compiler, and on a disk that is full.

Each case is a process of its own, in an environment that is drawn. It ends with exit code 0 and what it gives elsewhere,
or, where the disk is full, with exit code 2 and a message that names the file; never with a traceback.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
import torch
from checkout import RESULTS, ROOT
from fuzzing import SOAK

from rjepa_triton import LSTM, OnlineLearner

pytestmark = pytest.mark.skipif(os.name != "posix", reason="umask, limits and locales of POSIX")

# A learner in float32, which runs compiled code where there is some; its gradient is printed to four digits. Then a
# checkpoint, a configuration and a record, written and read.
PROGRAM = """
import sys, torch
from pathlib import Path
from rjepa_triton import LSTM, OnlineLearner
from rjepa_triton._command import user_errors
from rjepa_triton.bench.harness import record
from rjepa_triton.rjepa import config, storage
from rjepa_triton import _files
torch.manual_seed(0)
layer = LSTM(3, 64)
learner = OnlineLearner(layer, 4, form="step")
for _ in range(5):
    learner.step(torch.ones(4, 3)).sum().backward()
print("gradient", f"{sum(float(p.grad.double().abs().sum()) for p in layer.parameters()):.4e}", flush=True)
folder = Path(sys.argv[1])
try:
    storage.save(folder / "learner.pt", learner.state_dict())
    _files.write_text(folder / "run.yaml", config.text(config.read(None, ["data.held_out=[Γé]"])))
    learner.load_state_dict(storage.unpickled(folder / "learner.pt"))
    config.read(folder / "run.yaml")
except OSError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""
LOCALES: dict[str, dict[str, str]] = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX, unset": {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "cp1252": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "cp1252"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
}
HOMES: dict[str, str | None] = {
    "own": "",
    "none": None,
    "a file": "/dev/null",
    "read-only": "/proc/self",
    "gone": "/proc/nowhere",
}
UMASKS = (0o000, 0o022, 0o077)
COMPILERS = (True, False)
DISKS = ("room", "room", "room", "full")
LITTLE = ("--steps", "160", "--tasks", "recall", "--rules", "rfp", "--seeds", "2", "--jobs", "1")
WHAT = ("program", "program", "plan", "table", "check", "learn")


def commands(folder: Path) -> dict[str, list[str]]:
    made = tables.write(folder, tables.GOOD)
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    main = ["-m", "rjepa_triton"]
    records = next(path for path in sorted(RESULTS.glob("*.jsonl")))
    return {
        "program": [str(folder / "program.py"), str(folder)],
        "plan": [*main, "bench", "plan", "--hidden", "64"],
        "table": [*main, "bench", "table", str(records)],
        "check": [*main, "fixations", "check", str(made)],
        "learn": [*main, "bench", "learn", *LITTLE, "--out", str(folder / "out")],
    }


def environment(locale: str, home: str, compiler: bool, folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
    # python's own files of compiled code are not what is tried here
    found = {**kept, **LOCALES[locale], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    found["PATH"] = os.environ["PATH"] if compiler else str(folder)
    at = HOMES[home]
    if at is not None:
        (folder / "home").mkdir(exist_ok=True)
        found["HOME"] = at or str(folder / "home")
    return found


def drawn() -> list[tuple[str, str, int, bool, str, str]]:
    every = list(itertools.product(LOCALES, HOMES, UMASKS, COMPILERS, DISKS, WHAT))
    return [
        ("C", "own", 0o077, True, "full", "program"),
        ("C", "none", 0o000, False, "room", "program"),
        ("ascii", "a file", 0o022, False, "room", "plan"),
        ("POSIX, unset", "read-only", 0o022, False, "full", "learn"),
        *random.Random(1).sample(every, 90 if SOAK else 4),
    ]


@pytest.mark.parametrize(("locale", "home", "umask", "compiler", "disk", "what"), drawn())
def test_environments(
    locale: str,
    home: str,
    umask: int,
    compiler: bool,
    disk: str,
    what: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    command = commands(tmp_path)[what]
    (tmp_path / "learner.pt").write_bytes(b"as it was")

    def begin() -> None:
        import resource

        os.umask(umask)
        if disk == "full":  # no file may grow beyond this, as none can on a disk without room
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [sys.executable, *command],
        env=environment(locale, home, compiler, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        preexec_fn=begin,
        timeout=500,
    )
    record_property("count of environments", 1)
    told = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in told, told
    if disk == "room":
        assert done.returncode == 0, told
    else:
        assert done.returncode in (0, 2), told
    if done.returncode == 2:
        assert "error: " in told
        assert str(tmp_path) in told
        assert "File too large" in told
        assert (tmp_path / "learner.pt").read_bytes() == b"as it was"
        assert not list(tmp_path.rglob("*.part"))
    if what == "program":
        word, number = done.stdout.decode().split()
        assert word == "gradient"
        assert float(number) == pytest.approx(gradient(), rel=1e-3)
        assert done.returncode == (2 if disk == "full" else 0)
        cache = tmp_path / "home" / ".cache" / "rjepa_triton"
        if cache.exists():
            assert cache.stat().st_mode & 0o777 == 0o700


@functools.cache
def gradient() -> float:
    """What the program's learner finds, in float64."""
    torch.manual_seed(0)
    layer = LSTM(3, 64).double()
    learner = OnlineLearner(layer, 4, form="step")
    for _ in range(5):
        learner.step(torch.ones(4, 3).double()).sum().backward()
    return sum(float(p.grad.abs().sum()) for p in layer.parameters() if p.grad is not None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("what", ["plan", "table"])
def test_output_to_a_full_disk(what: str, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, *commands(tmp_path)[what]],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=500,
        )
    told = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 2, told
    assert "Traceback" not in told
    assert "No space left on device" in told
