"""How fast a GPU's clocks run and what holds them back, for the records of what was timed there."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from typing import Any

import torch

from ... import _processes

# What nvidia-smi is asked, and the names under which a record has the answers.
ASKED = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "most_sm_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "power.limit": "most_watts",
    "clocks_throttle_reasons.active": "throttled",
}
SECONDS = 3.0  # records of so short a time share one answer, which takes a tenth of a second
IDLE = 0x1  # the bit of "throttled" which says that nothing runs


def now(device: torch.device | str) -> dict[str, Any]:
    """The clocks of a CUDA device of the last seconds: {} for another device, {"why": …} if they can't be read.

    throttled: what holds the clocks back, as NVML's bits: 0x4 the power limit, 0x8 slowdown by hardware, 0x20 and 0x40
    heat, 0x80 the power brake.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    return _asked(index, int(time.monotonic() / SECONDS))


@functools.lru_cache(16)
def _asked(index: int, _: int) -> dict[str, Any]:
    """What nvidia-smi says, once for each span of time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"why": "nvidia-smi was not found"}
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(index).uuid}"
    command = [program, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", gpu]
    try:
        done = _processes.run(command, timeout=10, env={**os.environ, "LC_ALL": "C"})
        done.check_returncode()
        return read(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"why": f"nvidia-smi: {error}"}


def read(line: str) -> dict[str, Any]:
    """The values of one line of nvidia-smi's; what isn't known there is left out. Raises ValueError."""
    cells = [cell.strip() for cell in line.strip().split(",")]
    if len(cells) != len(ASKED):
        raise ValueError(f"asked for {len(ASKED)} values, got {line.strip()!r}")
    found: dict[str, Any] = {}
    for name, cell in zip(ASKED.values(), cells, strict=True):
        if name == "throttled":
            if cell.startswith("0x"):
                found[name] = f"{int(cell, 16) & ~IDLE:#x}"
        elif cell.replace(".", "", 1).isdigit():
            found[name] = float(cell)
    return found
