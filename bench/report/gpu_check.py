"""Check a machine with a GPU in under nine minutes: install, tests, kernels, scaling, plots.

    python3 -m rjepa_triton.bench.report.gpu_check --out DIR        from the root of a checkout

Stages run one after the other, each with a time limit (`harness.stages`), and append to their own files as they go. A
run that is cut off leaves what it had, and benchmarks continue from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..harness import record
from ..harness.stages import SUMMARY, Stage, run_stages

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 510.0  # the rest of nine minutes is left for starting, and for stopping the last stage


def files_of_tests(root: Path) -> list[str]:
    """The test files for which a GPU makes a difference, the most telling ones first."""
    kernels = sorted((root / "tests" / "kernels").glob("test_*.py"))
    names = [f"kernels/{file.name}" for file in kernels]
    return [f"tests/{name}" for name in ("test_gpu.py", *names, "backends/test_operations.py")]


def stages(out: Path) -> list[Stage]:
    """The stages, which write their files to `out`."""
    python, folder = sys.executable, ("--out", str(out))
    bench = (python, "-m", "rjepa_triton", "bench")
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", ".")
    tests = (python, "-m", "pytest", "-v", f"--junitxml={out / 'tests.xml'}", *files_of_tests(ROOT))
    # 32 steps, since torch.compile unrolls a scan for comparison, and with more it would take all the time there is
    kernels = (*bench, "kernels", "--device", "cuda", "--steps", "32", "--sample", "0.15", *folder)
    scaling = (
        *bench,
        "scaling",
        "--device",
        "cuda",
        "--sample",
        "0.2",
        "--passes",
        "1",
        "--budget",
        "5",
        *folder,
    )
    sizes = {1: "64,128,256,512,1024,2048,4096", 32: "128,256,512,1024,2048"}
    online = (*bench, "online", "--device", "cuda", "--budget", "15", *folder)
    return [
        Stage("install", install, 45),
        Stage("tests", tests, 180, must_finish=True),
        Stage("kernels", kernels, 125),
        *(
            Stage(f"scaling-B{batch}", (*scaling, "--hidden", hidden, "--batch", str(batch)), seconds)
            for (batch, hidden), seconds in zip(sizes.items(), (60, 40), strict=True)
        ),
        Stage("online", online, 40),
        # drawn here from all records, since a benchmark that is cut off draws nothing by itself
        Stage("report", (*bench, "report", str(out), "--out", str(out / "report")), 20),
    ]


def check(out: Path) -> int:
    """Run all stages. Returns 0, 1 if something failed, or 2 without a GPU. Raises ValueError outside of a checkout."""
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
    code = run_stages(stages(out), out, total_seconds=TOTAL_SECONDS, about=about, checkout=ROOT)
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
