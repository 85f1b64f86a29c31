"""What a device has, and what is switched on for it."""

from __future__ import annotations

import torch


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, or None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        return None
    return None


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled here for tensors of `device`."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which autocast is off for tensors of `device`."""
    return torch.autocast(device.type, enabled=False)
