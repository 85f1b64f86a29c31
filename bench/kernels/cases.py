"""The kernels that `rjepa bench kernels` measures, by name.

On a GPU the launchers of `kernels/` run them, and the same function by eager torch and by torch.compile; on the CPU the
backends of `backend/` do.
"""

from __future__ import annotations

from . import gamma, rgc, rtrl, scans
from .gamma import GammaChunk, GammaRead, GammaStep
from .kernel import (
    BY,
    MATRICES,
    STATES,
    Given,
    Kernel,
    Problem,
    Runner,
    WithoutGamma,
    entered,
    problem,
    shapes,
)
from .rgc import (
    Circuit,
    OfCircuit,
    RGCBackward,
    RGCDual,
    RGCForward,
    RGCLinearize,
    RGCStep,
)
from .rtrl import HeadsStep, RTRLHeads, RTRLJacobian, head_units
from .scans import Scan

__all__ = [
    "BY",
    "KERNELS",
    "MATRICES",
    "STATES",
    "Circuit",
    "GammaChunk",
    "GammaRead",
    "GammaStep",
    "Given",
    "HeadsStep",
    "Kernel",
    "OfCircuit",
    "Problem",
    "RGCBackward",
    "RGCDual",
    "RGCForward",
    "RGCLinearize",
    "RGCStep",
    "RTRLHeads",
    "RTRLJacobian",
    "Runner",
    "Scan",
    "WithoutGamma",
    "entered",
    "head_units",
    "problem",
    "shapes",
]

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (*gamma.KERNELS, *scans.KERNELS, *rgc.KERNELS, *rtrl.KERNELS)
}
