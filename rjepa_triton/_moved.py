"""Module names of version 0.1 that still import, each as the module it has become.

A finder serves them. It comes before the others, since an old folder that holds nothing but caches would pass for a
package. `import rjepa_triton.two_point` and `import rjepa_triton.cells.two_point` give the same module object.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
# A tuple: what was in one module is in several.
MOVED: dict[str, str | tuple[str, ...]] = {
    "two_point": "cells.two_point",
    "weights": "cells.weights",
    "reference": "rules",
    "reference.bptt": "rules.bptt",
    "reference.refine": "rules.refine",
    "reference.rfp": "rules.rfp",
    "reference.rounding": "rules.rounding",
    "reference.rtrl": "rules.rtrl",
    "exactness": "rules.exactness",
    "ops": (
        "backend.operations",
        "backend.native_backend",
        "backend.triton_backend",
        "backend.descent",
    ),
    "cost": "planning.cost",
    "devices": "planning.devices",
    "conv": "layers.conv",
    "functional": "layers.functional",
    "layer": "layers.layer",
    "nn": "layers.named",
    "parallel": "layers.parallel",
    "comparison": "online.fidelity",
    "counting": "online.counting",
    "library": "online.operators",
    "sensitivity": "online.sensitivity",
    "stack": "online.stack",
    "bench.cases": "bench.scaling.cases",
    "bench.compare": "bench.harness.compare",
    "bench.curves": "bench.learning.curves",
    "bench.energy": "bench.harness.energy",
    "bench.fidelity": "bench.learning.fidelity",
    "bench.fit": "bench.harness.statistics",
    "bench.forward": "bench.scaling.forward",
    "bench.frontier": "bench.learning.frontier",
    "bench.gpu_check": "bench.report.gpu_check",
    "bench.inputs": "bench.harness.inputs",
    "bench.kernel_cases": "bench.kernels.cases",
    "bench.latency": "bench.streams.latency",
    "bench.learn": "bench.learning.learn",
    "bench.measure": ("bench.harness.measure", "bench.planner.here"),
    "bench.memory": "bench.scaling.memory",
    "bench.memory_plot": "bench.scaling.memory_plot",
    "bench.online": "bench.streams.online",
    "bench.plan": "bench.planner.plan",
    "bench.plot": ("bench.scaling.plot", "bench.harness.style"),
    "bench.record": "bench.harness.record",
    "bench.roofline": "bench.kernels.roofline",
    "bench.roofline_plot": "bench.kernels.plot",
    "bench.selfcheck": "bench.scaling.selfcheck",
    "bench.stages": "bench.harness.stages",
    "bench.static": ("bench.kernels.static", "bench.kernels.builds"),
    "bench.suite": "bench.report.suite",
    "bench.summary": ("bench.scaling.tables", "bench.harness.tables"),
    "bench.targets": "bench.kernels.targets",
    "bench.tasks": "bench.learning.tasks",
    "bench.views": "bench.report.views",
}


class Moved(MetaPathFinder, Loader):
    """Finds a module by its old name and gives the module of its new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name, None of any other."""
        old = fullname.removeprefix(PACKAGE + ".")
        return ModuleSpec(fullname, self, is_package=old == "reference") if old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the empty one that the import system made.

        Of a name that is now several modules, the empty one stays and finds its names in them.
        """
        now = MOVED[module.__name__.removeprefix(PACKAGE + ".")]
        if isinstance(now, str):
            sys.modules[module.__name__] = importlib.import_module(f"{PACKAGE}.{now}")
            return
        parts = [importlib.import_module(f"{PACKAGE}.{part}") for part in now]

        def found(name: str) -> object:
            for part in parts:
                if hasattr(part, name):
                    return getattr(part, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = found


def install() -> None:
    """Let the old names be imported."""
    sys.meta_path.insert(0, Moved())
