"""Run every benchmark within a total time: first the points that tell most, then those that complete the curves.

Each stage is a command that appends to its records as it goes. A stage that an earlier run in the same folder has
finished is not run again, and one that was cut off continues where it stopped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..harness import record
from ..harness.device import check_device
from ..harness.stages import Result, Stage, load_results, run_stages
from . import page as report

REPORT_SECONDS = 25.0  # reserved for writing the report
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# (name, arguments of `rjepa bench`, seconds that it may take), in the order in which stages are run.
ORDER: tuple[tuple[str, str, float], ...] = (
    ("scaling-1", "scaling --hidden 64,256,1024 --batch 1", 80),
    ("online-1", "online --hidden 256 --batch 1", 60),
    ("peers-1", "peers --hidden 256 --tasks rgc-sequence,rgc-online --rounds 12", 150),
    (
        "memory-1",
        "memory --steps 16,128,512 --hidden 128 --batch 8 --algorithms bptt-autograd,rfp-step,rtrl-heads",
        90,
    ),
    ("kernels-1", "kernels --hidden 64,256 --batch 1 --sample 0.15", 60),
    ("scaling-2", "scaling --hidden 128,512 --batch 1", 60),
    ("forward-1", "forward --hidden 64 --batch 1 --steps 1024", 40),
    ("scaling-3", "scaling --hidden 32,384,768,2048 --batch 1", 120),
    ("fidelity-1", "fidelity --sweeps frontier", 300),
    ("online-2", "online --hidden 64,1024 --batch 1", 120),
    ("kernels-2", "kernels --hidden 1024 --batch 1 --sample 0.15", 90),
    ("scaling-4", "scaling --hidden 48,96,192,1536 --batch 1", 120),
    ("memory-2", "memory", 180),
    ("scaling-5", "scaling --hidden 64,256,512 --batch 8", 120),
    ("peers-2", "peers --hidden 64,256", 600),
    ("fidelity-2", "fidelity", 400),
    ("learn", "learn", 900),
    ("selfcheck", "selfcheck --runs 5", 600),
)


def seconds_of(text: str) -> float:
    """The seconds of a text such as "8min", "90s" or "1.5h". Raises ValueError for another text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--budget must be a time such as 8min, 90s or 1h, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def stages(out: Path, device: str, threads: int) -> list[Stage]:
    """All stages, which write their records to `out`."""
    made = []
    for name, text, seconds in ORDER:
        command, *options = text.split()
        # these two always run on the CPU, and choose their own threads
        where = [] if command in ("fidelity", "learn") else ["--device", device]
        # "memory" has no option for threads
        pinned = (
            ["--threads", str(threads)] if threads and command not in ("fidelity", "learn", "memory") else []
        )
        arguments = (command, *options, *where, *pinned, "--out", str(out))
        made.append(Stage(name, (sys.executable, "-m", "rjepa_triton", "bench", *arguments), seconds))
    return made


def run(
    budget: float, out: Path, *, device: str, threads: int = 0, tell: Callable[[str], None] = print
) -> tuple[int, list[Path]]:
    """Run the stages that earlier runs in `out` haven't finished, within `budget` seconds, and write the report.

    Returns 1 if a stage failed, else 0, and the files of the report. Raises ValueError for a device that can't be used,
    and OSError if `out` can't be written.
    """
    check_device(device)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": record.device_name(torch.device(device)),
        "versions": record.versions(),
        "git": record.git_revision(),
    }
    head, results = load_results(out)
    same = all(head.get(what) == about[what] for what in ("device", "versions"))
    finished = [result for result in results if result.status == "ok"] if same else []
    left = [stage for stage in stages(out, device, threads) if not _among(stage, finished)]
    if finished:
        tell(f"kept from an earlier run: {', '.join(result.name for result in finished)}")
    code = run_stages(
        left, out, total_seconds=max(0.0, budget - REPORT_SECONDS), about={**about, "started": record.now()},
        earlier=finished, tell=tell,
    )  # fmt: skip
    return code, report.write([out], out / "report")


def _among(stage: Stage, finished: Sequence[Result]) -> bool:
    return any((result.name, result.command) == (stage.name, " ".join(stage.command)) for result in finished)
