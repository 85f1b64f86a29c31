"""What a device has, and what is switched on for it."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, or None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        return None
    return None


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# Asked once: torch.compile of torch 2.11 can't trace the question.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia") if torch.amp.is_autocast_available(kind)
)


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled here for tensors of `device`."""
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which autocast is off for tensors of `device`."""
    return torch.autocast(device.type, enabled=False)
