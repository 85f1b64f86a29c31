"""What a machine with a GPU is asked, in under nine minutes: install, tests, kernels, scaling, plots.

    python3 -m rjepa_triton.bench.gpu_check --out DIR        from the root of a checkout

Stages run one after the other, each with a time limit. One that fails or runs out of time is recorded, and
the next one runs. `summary.json` in DIR is written anew as each stage starts and ends, and stages append to
their own files as they go: a run that is cut off leaves what it had, and benchmarks go on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from . import record

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = "summary.json"
TOTAL_SECONDS = 510.0  # the rest of nine minutes is for starting, and for stopping a last stage
STOP_SECONDS = 8.0  # that a stage which was told to stop may take to write what it has


@dataclass(frozen=True)
class Stage:
    """A command, run in the checkout's root, with its output in `<name>.log`.

    seconds: its time limit. must_finish: whether running out of time is a failure, as it is of tests.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    must_finish: bool = False


@dataclass
class Result:
    """What became of a stage: "running", "ok", "failed", "cut off" by its limit, or "skipped": no time."""

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
    total_seconds: float = TOTAL_SECONDS,
    about: dict[str, Any] | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Run the stages; 0, or 1 if one failed, or was cut off or skipped that must finish."""
    deadline = time.monotonic() + total_seconds
    results: list[Result] = []
    bad = False
    for stage in stages:
        limit = min(stage.seconds, deadline - time.monotonic())
        result = Result(stage.name, " ".join(stage.command), round(limit, 1))
        results.append(result)
        if limit < 1:
            result.status = "skipped"
        else:
            _write(out, about, results)
            _run(stage, limit, out, result)
        bad |= result.status == "failed" or (stage.must_finish and result.status != "ok")
        _write(out, about, results)
        counts = "".join(f", {number} {what}" for what, number in result.counts.items())
        tell(f"{stage.name}: {result.status} in {result.seconds:.0f} s{counts}")
    return int(bad)


def _run(stage: Stage, limit: float, out: Path, result: Result) -> None:
    """One stage; adds to `result`."""
    # kernels are to run on the GPU, and the checkout's code is to be found even if installing it failed
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    (out / f"{stage.name}.xml").unlink(missing_ok=True)  # an earlier run's
    begin = time.monotonic()
    log = out / f"{stage.name}.log"
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            result.status, result.tail = "failed", [str(error)]
            return
        try:
            result.code = process.wait(limit)
            result.status = "ok" if result.code == 0 else "failed"
        except subprocess.TimeoutExpired:
            result.status = "cut off"
            result.code = _stop(process)
        except BaseException:  # an interrupt is for this process; the stage is in a process group of its own
            _stop(process)
            raise
    result.seconds = round(time.monotonic() - begin, 1)
    result.tail = log.read_text(errors="replace").splitlines()[-15:]
    result.counts = counts(out / f"{stage.name}.xml")


def _heed_interrupts() -> None:
    """A shell starts what it runs in the background with interrupts ignored, and so would every stage."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a stage as a terminal would, then kill what is left of its processes; its exit code."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def counts(report: Path) -> dict[str, int]:
    """tests, failures, errors and skipped of a JUnit report; nothing if there is none or it was cut off."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return {}
    return {
        what: sum(int(suite.get(what, 0)) for suite in suites)
        for what in ("tests", "failures", "errors", "skipped")
    }


def _write(out: Path, about: dict[str, Any] | None, results: Sequence[Result]) -> None:
    """The summary as it is now: whole, or the one before."""
    text = json.dumps({**(about or {}), "stages": [asdict(result) for result in results]}, indent=1)
    part = out / (SUMMARY + ".part")
    part.write_text(text + "\n")
    part.replace(out / SUMMARY)


def files_of_tests(root: Path) -> list[str]:
    """Tests that a GPU changes something about, the most telling first."""
    kernels = sorted((root / "tests").glob("test_kernels_*.py"))
    names = [file.name for file in kernels if file.name != "test_kernels_static.py"]
    return [f"tests/{name}" for name in ("test_gpu.py", *names, "test_ops.py")]


def stages(out: Path) -> list[Stage]:
    """What is asked of a GPU, with files in `out`."""
    python, folder = sys.executable, ("--out", str(out))
    bench = (python, "-c", "from rjepa_triton.cli import main; main()", "bench")
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
    tests = (python, "-m", "pytest", "-v", f"--junitxml={out / 'tests.xml'}", *files_of_tests(ROOT))
    # compiling a scan for comparison unrolls its steps: 32 of them, or it would take all the time there is
    kernels = (*bench, "kernels", "--device", "cuda", "--steps", "32", "--sample", "0.15", *folder)
    scaling = (*bench, "scaling", "--device", "cuda", "--sample", "0.2", "--budget", "5", *folder)
    sizes = {1: "64,128,256,512,1024,2048,4096", 32: "128,256,512,1024,2048"}
    return [
        Stage("install", install, 45),
        Stage("tests", tests, 180, must_finish=True),
        Stage("kernels", kernels, 140),
        *(
            Stage(f"scaling-B{batch}", (*scaling, "--hidden", hidden, "--batch", str(batch)), seconds)
            for (batch, hidden), seconds in zip(sizes.items(), (70, 50), strict=True)
        ),
        # drawn once more, since a sweep that is cut off draws nothing
        *(Stage(f"plot-B{batch}", (*bench, *_plot(out, batch)), 12) for batch in sizes),
    ]


def _plot(out: Path, batch: int) -> tuple[str, ...]:
    """Arguments that draw a sweep's records of one batch size."""
    target = str(out / f"scaling-B{batch}")
    return "plot", str(out / "scaling.jsonl"), "--batch", str(batch), "--out", target


def check(out: Path) -> int:
    """Run it all, files into `out`; 0, 1 if something failed, 2 without a GPU.

    Raises ValueError outside of a checkout.
    """
    if not torch.cuda.is_available():
        print(
            f"error: gpu-check needs a GPU, and torch {torch.__version__} finds none here",
            file=sys.stderr,
        )
        return 2
    if not (ROOT / "tests").is_dir():
        raise ValueError(
            f"gpu-check runs in a checkout, and there are no tests beside {Path(__file__).parent}"
        )
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": record.device_name(torch.device("cuda")),
        "capability": list(torch.cuda.get_device_capability()),
        "versions": record.versions(),
        "cuda": torch.version.cuda,
        "git": record.git_revision(),
        "started": record.now(),
    }
    code = run_stages(stages(out), out, about=about)
    print(f"summary: {out / SUMMARY}")
    return code


def main() -> None:
    """The command line: `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out"), help="folder of logs, records, summary"
    )
    arguments = parser.parse_args()
    try:
        sys.exit(check(arguments.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
