"""The energy that a device has used, where it has a counter: NVML for NVIDIA GPUs, RAPL for processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """A counter of joules. It counts for the whole device, whichever program uses it.

    source    "NVML" or "RAPL" and what it counts for, or why there is no counter
    read      joules since some fixed time; None without a counter
    wraps     joules after which the counter starts again from 0; None if it doesn't
    """

    source: str
    read: Callable[[], float | None]
    wraps: float | None = None

    def between(self, before: float | None, after: float | None) -> float | None:
        """Joules between two readings that are less than `wraps` apart; None without a counter."""
        if before is None or after is None:
            return None
        return after - before + (self.wraps or 0.0) * (after < before)


def meter(device: torch.device, powercap: Path = POWERCAP) -> Meter:
    """The counter of a device."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _nvml(device: torch.device) -> Meter:
    try:
        import pynvml
    except ModuleNotFoundError:
        return Meter("none: NVML is read by pynvml, which is not installed", lambda: None)
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # pynvml's own exceptions; any of them means that there is no counter
        return Meter(f"none: NVML says {error}", lambda: None)
    return Meter("NVML, the whole GPU", lambda: 1e-3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _rapl(powercap: Path) -> Meter:
    # only whole packages: their parts (cores, memory controller) have a second number in their names, intel-rapl:0:0
    zones = [zone for zone in sorted(powercap.glob("*-rapl:*")) if zone.name.count(":") == 1]
    try:
        for zone in zones:
            _number(zone / "energy_uj")
        wraps = [_number(zone / "max_energy_range_uj") for zone in zones]
    except (OSError, ValueError) as error:
        return Meter(f"none: RAPL can't be read ({error})", lambda: None)
    if not zones:
        return Meter(f"none: no RAPL counter in {powercap}", lambda: None)
    return Meter(
        f"RAPL, {len(zones)} processor package{'s' * (len(zones) > 1)}",
        lambda: 1e-6 * sum(_number(zone / "energy_uj") for zone in zones),
        # with several packages, the sum drops by the range of the one whose counter started again
        1e-6 * min(wraps),
    )


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))
