"""What did that commit change? Two revisions, in worktrees and processes of their own, run the same cases in turn."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ... import _checks as check
from ... import _processes
from . import compare
from .statistics import interval
from .tables import seconds_text
from .worker import Worker, WorkerFailed, environment

CASES = Path(__file__).parent / "revision_cases.py"
SCRIPT = (Path(__file__).parent / "revision_worker.py").read_text(encoding="utf-8")
COUNTS = ("instructions",)
# Counts hardly differ from run to run: what does is where things lie in memory.
COUNT_FLOOR = 0.002
REPEATS = 5  # of a count
CALLGRIND = ("valgrind", "--tool=callgrind", "--instr-atstart=no")


@dataclass(frozen=True)
class Settings:
    """What is compared, and how.

    a, b        revisions of the git repository that `repository` lies in
    cases       a Python file with `CASES`, as `revision_cases.py`; only: the names to run, all of them if empty
    count       "" for time; "instructions"
    processes   pairs of processes, one of each revision; rounds: samples of each case in each of them
    seconds     the least time of a sample; limit: how many seconds an answer may take
    floor       the change that counts as noise in any case; None: 3 % of time, 0.2 % of instructions
    threads     of each process
    """

    a: str
    b: str
    repository: Path = Path()
    cases: Path = CASES
    only: tuple[str, ...] = ()
    count: str = ""
    processes: int = 5
    rounds: int = 11
    seconds: float = 0.02
    floor: float | None = None
    threads: int = 1
    limit: float = 1800.0

    def __post_init__(self) -> None:
        if self.count:
            check.one_of("count", self.count, COUNTS)
        check.integer("processes", self.processes, 2)
        check.integer("rounds", self.rounds, 2)
        check.integer("threads", self.threads, 1)
        if self.floor is not None and not self.floor >= 0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")
        if not self.cases.is_file():
            raise ValueError(f"cases must be a Python file, got {self.cases}, which is none")


@dataclass(frozen=True)
class Row:
    """One case: the values of A and B a call, and their ratio B/A with its 95 % interval; or why there is none."""

    case: str
    a: float = math.nan
    b: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    floor: float = 0.0
    message: str = ""

    @property
    def verdict(self) -> str:
        """ "more" or "less" if the whole interval lies beyond the floor, else "same"; or the message."""
        if self.message:
            return self.message
        if self.low > 1 + self.floor:
            return "more"
        return "less" if self.high < 1 / (1 + self.floor) else "same"


@contextlib.contextmanager
def worktrees(repository: Path, revisions: Sequence[str]) -> Iterator[list[Path]]:
    """Check revisions out into folders, removed in the end. Raises ValueError for one that git doesn't know."""
    if shutil.which("git") is None:
        raise ValueError("compare-revisions needs git, which is not installed")

    def git(*words: str | Path) -> str:
        done = _processes.run(["git", "-C", str(repository), *map(str, words)])
        if done.returncode:
            raise ValueError(f"{repository}: git {words[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    commits = [
        git("rev-parse", "--verify", "--end-of-options", revision + "^{commit}") for revision in revisions
    ]
    with tempfile.TemporaryDirectory(prefix="rjepa-revisions-") as temporary, _processes.ending_on_signals():
        folders = [Path(temporary, name) for name in "ab"]
        try:
            for folder, commit in zip(folders, commits, strict=True):
                git("worktree", "add", "--detach", folder, commit)
            yield folders
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            git("worktree", "prune")


def compilers(folder: Path) -> Path:
    """A folder of the C++ compilers that are here, by their names, for code that valgrind can run: without AVX-512."""
    folder.mkdir()
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            option = " -mno-avx512f" if platform.machine() in ("x86_64", "AMD64") else ""
            (folder / name).write_text(
                f'#!/bin/sh\nexec {shlex.quote(found)} "$@"{option}\n', encoding="utf-8"
            )
            (folder / name).chmod(0o755)
    return folder


class Side:
    """One process of one revision. What fails is kept as the reason of the case, or of all of them.

    command: what the process is run by, as valgrind with its options.
    """

    def __init__(self, settings: Settings, folder: Path, callgrind: bool) -> None:
        self.settings, self.out = settings, folder.with_suffix(".out") if callgrind else None
        self.failed: dict[str, str] = {}
        self.all_failed = ""
        command: list[str] = []
        env = {**environment(settings.threads, "cpu"), "PYTHONHASHSEED": "0"}
        del env["PYTHONPATH"]  # this revision's
        if callgrind:
            command = [*CALLGRIND, f"--callgrind-out-file={self.out}"]
            env["PATH"] = os.pathsep.join((str(compilers(folder.with_suffix(".bin"))), env["PATH"]))
        program = [*command, sys.executable, "-c", SCRIPT]
        self.worker = Worker(program, env, (), folder.with_suffix(".log"), cwd=folder)

    def ask(self, what: str, name: str, **more: object) -> dict[str, Any]:
        """The answer to a message; {} if it failed, which is kept."""
        try:
            return self.worker.ask({what: name, **more}, self.settings.limit)
        except WorkerFailed as error:
            self.failed.setdefault(name, str(error))
            return {}

    def load(self) -> list[str]:
        """The names of the cases; none if the revision can't be loaded."""
        file = str(self.settings.cases.resolve())
        found = self.ask("load", file).get("cases", [])
        self.all_failed = self.failed.pop(file, "")
        return list(found)

    def why(self, case: str) -> str:
        """Why a case can't be compared; "" if it can."""
        return self.all_failed or self.failed.get(case, "")

    def instructions(self, case: str, calls: int) -> float:
        """The instructions of so many calls, by callgrind or by the processor's counter; NaN if that failed."""
        if self.out is None:
            return float(self.ask("count", case, calls=calls).get("value", math.nan))
        process = str(self.worker.process.pid)
        _processes.run(["callgrind_control", "-i", "on", process])
        self.ask("run", case, calls=calls)
        for words in (["-i", "off"], ["-d"]):
            _processes.run(["callgrind_control", *words, process])
        files = self.out.parent.glob(f"{self.out.name}.*")
        last = max(files, key=lambda file: int(file.suffix[1:]))
        return float(re.findall(r"^totals: (\d+)", last.read_text(encoding="utf-8"), re.MULTILINE)[-1])


def run(
    settings: Settings, *, profile: Path | None = None, tell: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Compare two revisions, case by case. profile: a folder for traces of torch's profiler.

    Raises ValueError, before anything is built, for a revision that git doesn't know, a case that neither has, or if
    instructions can't be counted on this machine.
    """
    callgrind = bool(settings.count) and not counter_works()
    if callgrind:
        if not all(map(shutil.which, (CALLGRIND[0], "callgrind_control"))):
            raise ValueError(
                "count='instructions' needs a processor whose counters Linux lets programs read, or valgrind, and "
                "neither is here: install valgrind (apt-get install valgrind)"
            )
        tell("counting by callgrind, under which torch takes minutes to start")
    values: dict[str, tuple[list[list[float]], list[list[float]]]] = {}
    failed: dict[str, str] = {}
    with worktrees(settings.repository, (settings.a, settings.b)) as folders:
        for turn in range(1 if settings.count else settings.processes):
            tell(f"processes {turn + 1}")
            with contextlib.ExitStack() as stack:
                sides = []
                for folder in folders:
                    side = Side(settings, folder, callgrind)
                    stack.callback(side.worker.close)
                    sides.append(side)
                names = _names(settings, sides)
                taken = (
                    _counted(settings, sides, names)
                    if settings.count
                    else _timed(settings, sides, names, turn)
                )
                for name in names:
                    whose = zip((settings.a, settings.b), sides, strict=True)
                    reasons = [f"{revision}: {side.why(name)}" for revision, side in whose if side.why(name)]
                    if reasons:
                        failed.setdefault(name, "; ".join(reasons))
                    else:
                        for kept, new in zip(values.setdefault(name, ([], [])), taken[name], strict=True):
                            kept.append(new)
                if profile is not None and turn == 0:
                    _traces(sides, names, profile)
    floor = settings.floor if settings.floor is not None else COUNT_FLOOR if settings.count else compare.FLOOR
    return [
        Row(name, message=failed[name]) if name in failed else row(name, *values[name], floor)
        for name in dict.fromkeys((*failed, *values))
    ]


def row(case: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], floor: float) -> Row:
    """The ratio of B to A from paired rounds, a list of them for each pair of processes.

    A pair's ratio is the median over its rounds, in which both were sampled one right after the other. The interval is
    Student's t of the pairs' logarithms, so it has what differs from process to process, such as where memory lies. A
    single pair (counts, which hardly differ) gives that of its rounds.
    """
    logs = [np.log(np.divide(there, here)) for here, there in zip(a, b, strict=True)]
    middle, half = interval([float(np.median(one)) for one in logs] if len(logs) > 1 else logs[0].tolist())
    here, there = (float(np.median([np.median(one) for one in values])) for values in (a, b))
    ratio, low, high = (math.exp(middle + half * sign) for sign in (0, -1, 1))
    return Row(case, here, there, ratio, low, high, floor)


def _names(settings: Settings, sides: Sequence[Side]) -> list[str]:
    """The cases to run: those of both sides, or of the one that can be loaded."""
    with ThreadPoolExecutor() as pool:
        known = list(pool.map(Side.load, sides))
    names = list(dict.fromkeys(name for one in known for name in one))
    for name in settings.only if names else ():
        check.one_of("only", name, names)
    for side, own in zip(sides, known, strict=True):
        side.failed.update(
            {name: "it has no such case" for name in names if name not in own and not side.all_failed}
        )
    return (
        [name for name in names if not settings.only or name in settings.only]
        or list(settings.only)
        or ["all cases"]
    )


def _build(sides: Sequence[Side], name: str, seconds: float) -> int:
    """Build a case on both sides; the calls of a sample, or 0 if either failed."""
    if any(side.why(name) for side in sides):
        return 0
    found = [side.ask("build", name, seconds=seconds).get("calls", 0) for side in sides]
    return 0 if any(side.why(name) for side in sides) else max(found)


def _timed(
    settings: Settings, sides: Sequence[Side], names: Sequence[str], turn: int
) -> dict[str, list[list[float]]]:
    """Seconds a call of each case on both sides, in rounds; which goes first alternates."""
    calls = {name: _build(sides, name, settings.seconds) for name in names}
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for round_ in range(turn, turn + settings.rounds):
        for name in names:
            for at in (round_ % 2, 1 - round_ % 2):
                if calls[name] and not any(side.why(name) for side in sides):
                    answer = sides[at].ask("time", name, calls=calls[name])
                    taken[name][at].append(answer.get("value", math.nan))
    return taken


def _counted(settings: Settings, sides: Sequence[Side], names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Instructions a call, `REPEATS` times on both sides, less those of a sample without calls."""
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for name in names:
        calls = _build(sides, name, settings.seconds)
        for at in (0, 1) if calls else ():
            sides[at].instructions(name, calls)
            empty = sides[at].instructions(name, 0)
            counts = [sides[at].instructions(name, calls) for _ in range(REPEATS)]
            taken[name][at] = [(count - empty) / calls for count in counts]
    return taken


def counter_works() -> bool:
    """Whether this process may read the processor's counter of instructions."""
    test = SCRIPT.replace('if __name__ == "__main__":\n    main()', "value(counter())")
    return subprocess.run([sys.executable, "-c", test], capture_output=True, check=False).returncode == 0


def _traces(sides: Sequence[Side], names: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for letter, side in zip("AB", sides, strict=True):
            if not side.why(name):
                side.ask("trace", name, calls=3, file=str((folder / f"{name}-{letter}.json").resolve()))
                side.failed.pop(name, None)  # a case without torch has no trace, and was compared


def table(settings: Settings, rows: Sequence[Row]) -> Table:
    """A row for each case."""
    what = settings.count or "seconds"
    out = Table(title=f"B = {settings.b} against A = {settings.a}, {what} a call")
    for heading in ("case", "A", "B", "B / A", "95 % interval", "found"):
        out.add_column(heading, justify="left" if heading in ("case", "found") else "right", overflow="fold")
    text = (lambda value: f"{value:,.0f}") if settings.count else seconds_text
    for one in rows:
        told = (
            ("", "", "", "")
            if one.message
            else (text(one.a), text(one.b), f"{one.ratio:.4f}", f"{one.low:.4f}–{one.high:.4f}")
        )
        words = {
            "more": f"more {what}",
            "less": f"fewer {what}" if settings.count else f"less {what}",
            "same": "no change",
        }
        out.add_row(one.case, *told, words.get(one.verdict, one.verdict))
    return out
