"""Check a machine with a GPU in at most seven minutes: smoke test, tests, kernels, scaling, plots.

    python3 -m rjepa_triton.bench.report.gpu_check --out DIR        from the root of a checkout

Stages run one after the other, each with a time limit (`harness.stages`), in a folder of the system's. After each, and
when the run is ended, all that was found is written to DIR as three files: `results.md`, a page to read;
`summary.json`, the same for programs; `results.tar.gz`, every log, record and picture. So a run that is cut off leaves
what it had. A rerun into the same DIR unpacks the archive and goes on: stages that went well and tests that passed are
left out, and benchmarks measure what they lack. After a change of source, device or versions all runs again.

With REHEARSE=1 in the environment all of it runs on the CPU, with small sizes and few tests in place of the GPU's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import _files, _processes
from ..harness import record
from ..harness.device import default_device
from ..harness.stages import SUMMARY, Result, Stage, load_results, run_stages
from ..harness.tables import seconds_text
from . import gpu_tests

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 390.0  # the rest of seven minutes is left for starting, and for stopping the last stage
REHEARSAL = 4.0  # times as long each stage may take on a CPU, which may have other things to do
TEST_SECONDS = 60  # of one test, after which its process is ended
ARCHIVE, PAGE = "results.tar.gz", "results.md"
MOST_BYTES = 15 << 20  # in the archive before it is compressed, so that the file stays below 16 MiB
MOST_OF_LOG = 1 << 18  # the end of a longer log is kept
# In this order files are put into the archive, so that pictures are what is left out.
WEIGHTY = (SUMMARY, ".jsonl", ".xml", ".tests", ".done", ".log", ".md", ".svg", ".html", ".png")


def files_of_tests(root: Path) -> list[str]:
    """The test files for which a GPU makes a difference, the most telling ones first."""
    kernels = sorted((root / "tests" / "kernels").glob("test_*.py"))
    names = [f"kernels/{file.name}" for file in kernels]
    return [f"tests/{name}" for name in ("test_gpu.py", *names, "backend/test_operations.py")]


def rehearsal() -> bool:
    """Whether the environment asks for a rehearsal."""
    return os.environ.get("REHEARSE", "0") not in ("", "0")


def pytest_stage(
    name: str, files: Sequence[str], out: Path, seconds: float, *, workers: int, limit: float = TEST_SECONDS
) -> Stage:
    """A stage of tests: in processes of their own, each test with a time limit, where pytest's plugins are there."""
    options: list[str] = []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "1000"]
    if importlib.util.find_spec("pytest_timeout"):
        # by a thread that ends the process: a signal waits for CUDA to return
        options += [f"--timeout={limit:g}", "--timeout-method=thread"]
    command = (
        *("env", f"{gpu_tests.LOG}={out / f'{name}.tests'}"),
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            gpu_tests.__name__,
            f"--junitxml={out / f'{name}.xml'}",
        ),
        *options,
        *files,
    )
    return Stage(name, command, seconds, must_finish=True)


def stages(out: Path, rehearse: bool = False) -> list[Stage]:
    """The stages, which write their files to `out`."""
    python, folder = sys.executable, ("--out", str(out))
    bench = (python, "-m", "rjepa_triton", "bench")
    device = ("--device", "cpu" if rehearse else "cuda")
    workers = 2 if rehearse else min(6, os.cpu_count() or 1)
    small = ("--hidden", "16", "--batch", "1")
    install: tuple[str, ...]
    if rehearse:
        install, tests, sizes = (python, "-m", "pip", "--version"), ["tests/test_gpu.py"], {1: "16", 2: "16"}
        of_kernels: tuple[str, ...] = (*small, "--steps", "4", "--sample", "0.001")
        of_scaling: tuple[str, ...] = ("--algorithms", "rfp-step,rfp-dual", "--sample", "0.001")
        of_online: tuple[str, ...] = (*small, "--steps", "100", "--budget", "5")
    else:
        install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
        tests = files_of_tests(ROOT)
        sizes = {1: "64,128,256,512,1024,2048,4096", 32: "128,256,512,1024,2048"}
        # 32 steps, since torch.compile unrolls a scan for comparison, and with more it would take all the time there is
        of_kernels = ("--steps", "32", "--sample", "0.15")
        of_scaling = ("--sample", "0.2", "--budget", "5")
        of_online = ("--budget", "15")
    kernels = (*bench, "kernels", *device, *of_kernels, *folder)
    scaling = (*bench, "scaling", *device, "--passes", "1", *of_scaling, *folder)
    online = (*bench, "online", *device, *of_online, *folder)
    first, *others = sizes
    longer = REHEARSAL if rehearse else 1.0
    made = [
        Stage("install", install, 25),
        pytest_stage("smoke", ["tests/test_smoke.py"], out, 60, workers=workers),
        Stage("kernels", (*kernels, "--by", "triton,compile" if rehearse else "triton"), 60),
        pytest_stage("tests", tests, out, 100, workers=workers),
        Stage(f"scaling-B{first}", (*scaling, "--hidden", sizes[first], "--batch", str(first)), 45),
        *(
            Stage(f"scaling-B{batch}", (*scaling, "--hidden", sizes[batch], "--batch", str(batch)), 25)
            for batch in others
        ),
        Stage("online", online, 25),
        Stage("rivals", (*kernels, "--by", "torch" if rehearse else "torch,compile"), 35),
        # drawn here from all records, since a benchmark that is cut off draws nothing by itself
        Stage("report", (*bench, "report", str(out), "--out", str(out / "report")), 15),
    ]
    return [dataclasses.replace(stage, seconds=longer * stage.seconds) for stage in made]


def source(root: Path) -> str:
    """The hash of what is checked: the package's files, and its tests'."""
    found = hashlib.sha256()
    for top in ("rjepa_triton", "kernels", "bench", "tests"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                found.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return found.hexdigest()


def check(out: Path, make: Callable[[Path, bool], list[Stage]] = stages) -> int:
    """Run all stages that an earlier run into `out` hasn't finished. make: gives the stages.

    Returns 0, 1 if something failed, or 2 without a GPU. Raises ValueError outside of a checkout.
    """
    rehearse = rehearsal()
    if not rehearse and not torch.cuda.is_available():
        print(
            f"error: gpu-check needs a GPU, and torch {torch.__version__} finds none here (REHEARSE=1 runs all of it "
            "on the CPU, with stand-ins)",
            file=sys.stderr,
        )
        return 2
    if not (ROOT / "tests").is_dir():
        raise ValueError(
            f"gpu-check runs in a checkout, and there are no tests beside {Path(__file__).parent}"
        )
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, total = time.monotonic(), TOTAL_SECONDS * (REHEARSAL if rehearse else 1.0)
    device = torch.device("cpu" if rehearse else default_device())
    about: dict[str, Any] = {
        "rehearsal": rehearse,
        "device": record.device_name(device),
        "versions": record.versions(),
        "cuda": torch.version.cuda,
        "git": record.git_revision(),
        "source": source(ROOT),
    }
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder, _processes.ending_on_signals():
        work = Path(folder)
        earlier = unpack(out / ARCHIVE, work, about)
        made = make(work, rehearse)
        finished = [result for result in earlier if result.status == "ok" and result.name != "report"]
        left = [stage for stage in made if stage.name not in {result.name for result in finished}]
        if finished:
            print(f"kept from an earlier run: {', '.join(result.name for result in finished)}", flush=True)

        def tell(line: str) -> None:
            print(line, flush=True)
            write(work, out)

        try:
            code = run_stages(
                left, work, total_seconds=total - (time.monotonic() - begin),
                about={**about, "started": record.now()}, checkout=ROOT, earlier=finished, tell=tell,
            )  # fmt: skip
        finally:
            write(work, out)
    print(f"results: {out / PAGE}, {out / ARCHIVE}")
    return code


def unpack(archive: Path, work: Path, about: dict[str, Any]) -> list[Result]:
    """Unpack an earlier run's archive, and return its results; nothing if it is damaged or checked something else."""
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                path, data = (work / member.name).resolve(), opened.extractfile(member)
                if data is None or not path.is_relative_to(work.resolve()):
                    raise ValueError(f"{member.name} is no file of an archive that gpu-check writes")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data.read())
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        if archive.exists():
            print(f"the earlier run is left out: {archive} can't be read: {error}", flush=True)
        _empty(work)
        return []
    head, results = load_results(work)
    if any(head.get(what) != about[what] for what in ("rehearsal", "device", "versions", "source")):
        print("the earlier run is left out: the source, the device or a version has changed", flush=True)
        _empty(work)
        return []
    return results


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write(work: Path, out: Path) -> None:
    """Write the three files of `out` anew, each as a whole or not at all."""
    head, results = load_results(work)
    _files.write_text(out / PAGE, page(head, results, work))
    _files.write_text(
        out / SUMMARY, json.dumps({**head, "stages": [vars(r) for r in results]}, indent=1) + "\n"
    )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        left = MOST_BYTES
        for path in sorted(filter(Path.is_file, work.rglob("*")), key=_weight):
            data = path.read_bytes()
            if path.suffix == ".log":
                data = data[-MOST_OF_LOG:]
            if len(data) <= left:
                left -= len(data)
                about = tarfile.TarInfo(str(path.relative_to(work)))
                about.size, about.mtime = len(data), int(path.stat().st_mtime)
                archive.addfile(about, io.BytesIO(data))
    _files.write_bytes(out / ARCHIVE, packed.getbuffer())


def _weight(path: Path) -> tuple[int, str]:
    place = next((at for at, end in enumerate(WEIGHTY) if path.name.endswith(end)), len(WEIGHTY))
    return place, str(path)


def page(head: dict[str, Any], results: Sequence[Result], work: Path) -> str:
    """The results as Markdown: the stages, what failed and how, and what each record says."""
    title = "Rehearsal of gpu-check" if head.get("rehearsal") else "gpu-check"
    lines = [
        f"# {title}: {head.get('device', '')}",
        "",
        f"Started {head.get('started')}, git {head.get('git')}.",
        "",
    ]
    lines += ["| stage | status | seconds | of | tests |", "| --- | --- | ---: | ---: | --- |"]
    for r in results:
        counts = ", ".join(f"{number} {what}" for what, number in r.counts.items())
        lines.append(f"| {r.name} | {r.status} | {r.seconds:g} | {r.limit:g} | {counts} |")
    for log in sorted(work.glob("*.tests")):
        told = [
            json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("]")
        ]
        last = dict(told)
        failed = [test for test, outcome in last.items() if outcome == "failed"]
        skipped = sum(outcome == "skipped" for outcome in last.values())
        lines += [
            "",
            f"## {log.name.partition('.')[0]}: {len(last)} told, {len(failed)} failed, {skipped} skipped",
            "",
        ]
        lines += [f"- {test}" for test in failed]
    for r in results:
        if r.status not in ("ok", "running"):
            lines += ["", f"## {r.name}: {r.status}, exit code {r.code}", "", "```", *r.tail, "```"]
    for path in sorted(work.glob("*.jsonl")):
        lines += ["", f"## {path.name}", "", *_of_records(path)]
    return "\n".join(lines) + "\n"


def _of_records(path: Path) -> list[str]:
    """A file's records as a table in Markdown."""
    try:
        records = record.latest(record.load(path))
    except (ValueError, OSError) as error:  # the archive has it, for someone to mend
        return [_files.first_line(error)]
    lines = ["| what | N | B | status | time | of the floor | MHz | message |"]
    lines += ["| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |"]
    for made in records:
        took = "" if made.timing is None else seconds_text(made.timing.median)
        part, told = made.payload.get("fraction"), made.payload.get("clocks", {})
        cells = (
            *(made.algorithm, made.params.get("N", ""), made.params.get("B", ""), made.status, took),
            *("" if part is None else f"{part:.2f}", told.get("sm_mhz", "")),
            made.message.replace("|", "\\|").replace("\n", " ")[:200],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    """The command line: `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of the results")
    arguments = parser.parse_args()
    try:
        sys.exit(check(arguments.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
