"""Run commands one after the other, each with a time limit, within a total time: for `gpu-check` and `all`.

A command that fails or runs out of time is recorded, and the next one runs. `summary.json` is rewritten as each command
starts and ends, and each has a log of its own, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ... import _files, _processes

SUMMARY = "summary.json"
STOP_SECONDS = 8.0  # a stage that is told to stop may take this long to write what it has
END_SECONDS = 3.0  # the same of a stage whose run is ended as a whole


@dataclass(frozen=True)
class Stage:
    """A command, whose output goes to `<name>.log`.

    seconds: its time limit. must_finish: whether running out of time is a failure, as it is for tests.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    must_finish: bool = False


@dataclass
class Result:
    """How a stage ended. status: "running", "ok", "failed", "cut off" by its limit, or "skipped" for lack of time.

    code: exit code. counts: of tests, by outcome. tail: the last lines of its log.
    """

    name: str
    command: str
    limit: float
    status: str = "running"
    seconds: float = 0.0
    code: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    *,
    total_seconds: float,
    about: dict[str, Any] | None = None,
    checkout: Path | None = None,
    earlier: Sequence[Result] = (),
    tell: Callable[[str], None] = print,
) -> int:
    """Run the stages. Returns 1 if one failed, or one that must finish didn't, else 0.

    about     what the summary says first
    checkout  the folder in which they run, and from which they import the package even if it isn't installed; None:
              this process's own folder
    earlier   results that the summary lists before those of the stages
    tell      is given a line for each stage that ended
    """
    deadline = time.monotonic() + total_seconds
    results: list[Result] = list(earlier)
    bad = False
    for stage in stages:
        limit = min(stage.seconds, deadline - time.monotonic())
        result = Result(stage.name, " ".join(stage.command), round(limit, 1))
        results.append(result)
        if limit < 1:
            result.status = "skipped"
        else:
            _write(out, about, results)
            with _processes.ending_on_signals():
                _run(stage, limit, out, checkout, result)
        bad |= result.status == "failed" or (stage.must_finish and result.status != "ok")
        _write(out, about, results)
        counts = "".join(f", {number} {what}" for what, number in result.counts.items())
        tell(f"{stage.name}: {result.status} in {result.seconds:.0f} s{counts}")
    return int(bad)


def _run(stage: Stage, limit: float, out: Path, checkout: Path | None, result: Result) -> None:
    """Run one stage, and fill in `result`."""
    # kernels are to run on the real device
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if checkout is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(checkout), os.environ.get("PYTHONPATH")))
        )
    (out / f"{stage.name}.xml").unlink(missing_ok=True)  # left by an earlier run
    begin = time.monotonic()
    log = out / f"{stage.name}.log"
    with log.open("wb") as file:
        try:
            process = _processes.start(
                stage.command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            result.status, result.tail = "failed", [str(error)]
            return
        try:
            result.code = process.wait(limit)
            result.status = "ok" if result.code == 0 else "failed"
        except subprocess.TimeoutExpired:
            result.status = "cut off"
            result.code = _processes.end(process, STOP_SECONDS)
        except BaseException:  # an interrupt reaches only this process: the stage has its own process group
            _processes.end(process, END_SECONDS)
            raise
        _processes.end(process)  # what it left running
    result.seconds = round(time.monotonic() - begin, 1)
    result.tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    result.counts = counts(out / f"{stage.name}.xml")


def counts(report: Path) -> dict[str, int]:
    """The numbers of tests, failures, errors and skipped tests in a JUnit report; {} if there is no whole report."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {}
    return {
        what: sum(int(suite.get(what, 0)) for suite in suites)
        for what in ("tests", "failures", "errors", "skipped")
    }


def load_results(out: Path) -> tuple[dict[str, Any], list[Result]]:
    """The head and the results of an earlier summary in the folder; both empty if none can be read."""
    try:
        told = json.loads(_files.read_text(out / SUMMARY))
        return told, [Result(**result) for result in told.pop("stages")]
    except (OSError, ValueError, TypeError, KeyError):
        return {}, []


def _write(out: Path, about: dict[str, Any] | None, results: Sequence[Result]) -> None:
    """Write the summary as it is now. If writing fails, the one before stays whole."""
    text = json.dumps({**(about or {}), "stages": [asdict(result) for result in results]}, indent=1)
    _files.write_text(out / SUMMARY, text + "\n")
