"""Long commands, ended at any moment: no process is left, what is written can be read, and a rerun goes on from it."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import ROOT
from children import left, until
from fuzzing import SOAK

from rjepa_triton.bench.harness import record
from rjepa_triton.rjepa import config, storage

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")

WAYS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
KILLS = 100 if SOAK else 2
SMALL = (
    *("data.train=6", "data.test=4", "data.steps=6", "data.stride=0"),
    *("model.units=8", "model.backbone=gabor"),
    *("train.batch=3", "train.updates=2"),
)
# Each would run for minutes and more.
COMMANDS = {
    "scaling": ("bench", "scaling", "--hidden", "8,16,32", "--batch", "1"),
    "learn": ("bench", "learn", "--steps", "4000", "--jobs", "2"),
    "online": ("bench", "online", "--hidden", "16,32", "--batch", "1"),
    "fidelity": ("bench", "fidelity", "--seeds", "3"),
    "all": ("bench", "all", "--budget", "5min"),
    "ranks": ("bench", "ranks", "--hidden", "64", "--rounds", "1000000"),
    "train": ("train", *SMALL, "train.epochs=100000"),
    "demo": ("demo", "--rules", "rfp", "--seeds", "40", "--jobs", "2", *SMALL, "train.epochs=40"),
}
WRITES_NOTHING = ("ranks",)


def read(folder: Path) -> int:
    """How many records and checkpoints there are, all of which must be readable."""
    found = 0
    for file in folder.rglob("*.jsonl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a last line that was interrupted
            found += len(record.load(file))
    for file in folder.rglob("*.pt"):
        storage.unpickled(file)
        found += 1
    for file in folder.rglob("config.yaml"):
        config.read(file)
    return found


@pytest.mark.parametrize("name", COMMANDS if SOAK else ["online", "train"])
def test_kills(
    name: str,
    marked: dict[str, str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The folder is the same for all: each run goes on from what those before it have left."""
    draw = random.Random(name)
    environment = {**marked, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out_at = [] if name in WRITES_NOTHING else ["--out", str(tmp_path / "out")]
    seen = 0
    for kill in range(KILLS):
        way = WAYS[kill % len(WAYS)] if SOAK else (signal.SIGKILL, signal.SIGTERM)[kill]
        log = tmp_path / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "rjepa_triton", *COMMANDS[name], *out_at],
                env=environment, stdout=out, stderr=out, cwd=tmp_path, preexec_fn=heed_signals,
            )  # fmt: skip
            if not SOAK and kill:  # at least one run gets to write
                until(functools.partial(has_written, tmp_path / "out", process), 120)
            else:
                # a start takes seconds; some runs get so far that they write, and those after them go on from it
                time.sleep(draw.uniform(0.2, draw.choice((5, 8, 8, 20)) if kill else 5))
        said = log.read_text(encoding="utf-8", errors="replace")
        if process.poll() is not None:  # it has done all that there was to do
            assert process.returncode == 0, said
        process.send_signal(way)
        assert until(functools.partial(none_left, marked, process), 5), f"{name} left processes"
        process.wait(10)
        assert "Traceback" not in said, said
        now = read(tmp_path / "out")
        assert now >= seen, f"{name}: {seen} records and checkpoints became {now}"
        seen = now
        record_property("count of kills", 1)
    if not SOAK:
        assert seen


def none_left(environment: dict[str, str], process: subprocess.Popen[bytes]) -> bool:
    return not [each for each in left(environment) if each != process.pid]


def has_written(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has written something, or ended."""
    return process.poll() is not None or read(folder) > 0


def heed_signals() -> None:
    """As in a terminal: what is ignored where the tests run, as SIGHUP under nohup, a program would go on ignoring."""
    for way in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(way, signal.SIG_DFL)
    os.setsid()
