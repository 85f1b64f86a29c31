"""What the kernels are meant to reach on a GPU: predicted without one, beside what was measured on one.

A prediction adds up the roofline's floors (`roofline`), matrix products of torch's library at the device's rate, and
launches in a CUDA graph, as if none of them overlapped. How near a kernel comes to its floor is not predicted, so a
ratio of two floors says what the bytes and the arithmetic allow, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from ... import _checks as check
from ...backend import triton_backend
from ...cells.builtin import RGCCell
from ...planning import devices
from ..harness.record import Record
from ..harness.tables import seconds_text
from . import roofline, static
from .cases import KERNELS, MATRICES, STATES
from .roofline import GPUS, Gpu

# Nodes of the CUDA graphs of an online step of an RGC that takes x itself: two kernels, a copy of the state, three
# calls for the input's gradient (tests/online/test_cuda_graph.py counts them), and copies of input, output and δ.
STEP_NODES = 9
# Nodes of the dual form's backward pass: δ stacked, zeros made for it, the scan, and for each state one matrix product
# for all matrices that read it.
DUAL_NODES = 3 + STATES
# Seconds of a step of 128 units on chip with half of the weights read from the cache: the largest count from the
# machine code, at 1.7 GHz (`kernels.cell_on_chip.cell_forward`), which is longer than the latency of a load.
CACHED_STEP = 1.1e-6
# Seconds of a step of a stream in one launch, RGC, SGD, as counted in `kernels.cell_stream.cell_stream`.
STREAM_STEP = {32: 1.1e-6, 64: 3.1e-6}
# Launches of a step of an RGC's forward loop: in torch (tests/bench/kernels/test_targets.py counts them), and with
# kernels, one product for both states that are read and the pointwise pass.
EAGER_NODES, KERNEL_NODES = 16, 2


@dataclass(frozen=True)
class Times:
    """Predicted seconds on one GPU. floors: by (kernel, N, B, T); graph_call: seconds of one node of a CUDA graph."""

    gpu: Gpu
    floors: dict[tuple[str, int, int, int], float]
    graph_call: float

    def of(self, kernel: str, units: int, batch: int, steps: int = 1) -> float:
        """The roofline's floor of one call of a kernel."""
        return self.floors[kernel, units, batch, KERNELS[kernel].steps or steps]

    def copied(self, moved: float) -> float:
        """Seconds to move so many bytes, read and written ones together."""
        return moved / self.gpu.copy.value

    def product(self, flop: float, precision: str = "tf32") -> float:
        """Seconds of a matrix product of so many FLOP by torch's library."""
        return flop / getattr(self.gpu, precision).value

    def launches(self, count: float) -> float:
        """Seconds of so many nodes of a CUDA graph, each waiting for the one before."""
        return count * self.graph_call


@dataclass(frozen=True)
class Target:
    """One target: a quantity, the sizes at which it is meant, and the bar that it is to reach.

    least      whether the bar is the least value, else it is the most
    predicted  the quantity from `Times`
    rests_on   what the prediction takes for granted, in words
    kernels    (name, N, B, T) of the kernels whose floors it needs
    measured   the quantity from records of a GPU; None if they don't tell it
    """

    what: str
    at: str
    least: bool
    bar: float
    unit: str
    predicted: Callable[[Times], float]
    rests_on: str
    kernels: tuple[tuple[str, int, int, int], ...]
    measured: Callable[[Sequence[Record]], float | None] = lambda records: None

    def text(self, value: float) -> str:
        """A value in the target's unit."""
        if self.unit == "s":
            return seconds_text(value)
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}×"

    def reached(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        return value >= self.bar if self.least else value <= self.bar


def _gamma_bytes(units: int, batch: int) -> float:
    return 4.0 * STATES * MATRICES * batch * units**2


def _weight_bytes(units: int) -> float:
    return 4.0 * MATRICES * units**2


def _step_fraction(times: Times) -> float:
    kernel = KERNELS["step-fp32-gradient"]
    return times.copied(kernel.bytes(1024, 8, 1)) / times.of("step-fp32-gradient", 1024, 8)


def _against_torch(times: Times) -> float:
    # Arrays of the size of one Γ^ν that eager torch reads or writes: a product for each of the four terms of M Γ, and
    # two sums; for each state φ yᵀ is made and added, and the result copied into Γ; δ Γ of each state, their sum, and
    # the sum over the batch.
    gamma = _gamma_bytes(1024, 8) / STATES
    passes = 4 * 2 + 2 * 3 + STATES * (1 + 3 + 2) + STATES * 2 + 3 + 1
    return times.copied(passes * gamma) / times.of("step-fp32-gradient", 1024, 8)


def _against_compiled(times: Times) -> float:
    moved = 3 * _gamma_bytes(1024, 8) + _weight_bytes(1024)
    return times.copied(moved) / times.of("step-fp32-gradient", 1024, 8)


def _chunk_fraction(times: Times) -> float:
    kernel = KERNELS["chunk-C64-tf32"]
    return times.copied(kernel.bytes(2048, 32, 64)) / times.of("chunk-C64-tf32", 2048, 32)


def _chunk_against_steps(times: Times) -> float:
    return 64 * times.of("step-fp32-gradient", 2048, 32) / times.of("chunk-C64-tf32", 2048, 32)


def _outer_products(times: Times) -> float:
    """Seconds of the products Σ E yᵀ of all matrices, N = 1024, B = 32, T = 100."""
    return times.product(2.0 * MATRICES * 32 * 100 * 1024**2)


def _dual(times: Times) -> float:
    return times.of("rgc-dual", 1024, 32, 100) + _outer_products(times) + times.launches(DUAL_NODES)


def _dual_against_floor(times: Times) -> float:
    kernel = KERNELS["rgc-dual"]
    return _dual(times) / (times.copied(kernel.bytes(1024, 32, 100)) + _outer_products(times))


def _dual_against_bptt(times: Times) -> float:
    step = times.product(2.0 * MATRICES * 32 * 1024**2) + times.launches(KERNEL_NODES)
    waits = 2 * 100 * times.gpu.latency.value
    return (100 * step + waits + _outer_products(times)) / _dual(times)


def _online(units: int) -> Callable[[Times], float]:
    def seconds(times: Times) -> float:
        # the step of the weights is fused: W is read and written, and the gradient never goes to memory
        gamma = times.of("step-fp32-gradient", units, 1) + times.copied(_weight_bytes(units))
        return times.of("rgc-step", units, 1) + gamma + times.launches(STEP_NODES)

    return seconds


def _online_against_floor(times: Times) -> float:
    floor = times.copied(2 * _gamma_bytes(2048, 1) + 3 * _weight_bytes(2048))
    return _online(2048)(times) / floor


def _known(seconds: float) -> Callable[[Times], float]:
    return lambda _: seconds


def _forward(units: int) -> Callable[[Times], float]:
    """The time of an eager loop divided by a kernel's, B = 32, T = 100, both as CUDA graphs, products in float32."""

    def ratio(times: Times) -> float:
        product = times.product(2.0 * MATRICES * 32 * units**2, "float32")
        eager = 100 * (product + times.launches(EAGER_NODES))
        ours = times.of("rgc-forward", units, 32, 100)
        weights = [torch.empty(units, units, device="meta")] * MATRICES
        if not triton_backend.one_launch(RGCCell(), weights, 32):  # a product and a pass a step
            ours = 100 * (product + times.launches(KERNEL_NODES))
        elif units > triton_backend.SMALL_UNITS:
            ours = max(ours, 100 * CACHED_STEP)
        return eager / ours

    return ratio


def _rtrl_fraction(times: Times) -> float:
    units = 512
    numbers = 2.0 * units * MATRICES * units**2
    product = max(times.product(2 * 2.0 * units * numbers), times.copied(8 * numbers))
    # the gradient reads γ once; J is made; φ yᵀ is added to one row of each state in each column
    rest = times.copied(4 * numbers) + times.of("rtrl-jacobian", units, 1) + times.copied(8 * numbers / units)
    return times.product(2 * 2.0 * units * numbers) / (product + rest + times.launches(8))


def _medians(records: Sequence[Record], benchmark: str, algorithm: str, **at: Any) -> float | None:
    for r in reversed(records):
        same = r.benchmark == benchmark and r.algorithm == algorithm and r.timing is not None
        if same and all(r.params.get(name) == value for name, value in at.items()):
            assert r.timing is not None
            return r.timing.median
    return None


def _measured_fraction(records: Sequence[Record]) -> float | None:
    found = [
        r.payload["fraction"]
        for r in records
        if r.benchmark == "kernels" and r.algorithm == "step-fp32-gradient/triton" and r.timing
        and (r.params["N"], r.params["B"]) == (1024, 8)
    ]  # fmt: skip
    return found[-1] if found else None


def _measured_ratio(other: str) -> Callable[[Sequence[Record]], float | None]:
    def ratio(records: Sequence[Record]) -> float | None:
        ours, theirs = (
            _medians(records, "kernels", f"step-fp32-gradient/{by}", N=1024, B=8) for by in ("triton", other)
        )
        return None if ours is None or theirs is None else theirs / ours

    return ratio


def _measured_online(records: Sequence[Record]) -> float | None:
    return _medians(records, "online", "step-graph-lr", N=256, B=1)


STEP, CHUNK, DUAL = (
    ("step-fp32-gradient", 1024, 8, 1),
    ("chunk-C64-tf32", 2048, 32, 64),
    ("rgc-dual", 1024, 32, 100),
)
TARGETS = (
    Target("Γ's step: part of the copy rate", "N = 1024, B = 8", True, 0.85, "%", _step_fraction,
           "bytes, and waits for them", (STEP,), _measured_fraction),
    Target("Γ's step against eager torch", "N = 1024, B = 8", True, 3, "×", _against_torch,
           "each call of torch moves its arrays", (STEP,), _measured_ratio("torch")),
    Target("Γ's step against torch.compile", "N = 1024, B = 8", True, 1.3, "×", _against_compiled,
           "the compiler's sum over the batch reads Γ once more", (STEP,), _measured_ratio("compile")),
    Target("Γ's chunk, TF32: part of the copy rate", "N = 2048, B = 32, C = 64", True, 0.6, "%", _chunk_fraction,
           "bytes, FLOP, and waits", (CHUNK,)),
    Target("Γ's chunk against as many steps", "N = 2048, B = 32, C = 64", True, 25, "×", _chunk_against_steps,
           "bytes", (("step-fp32-gradient", 2048, 32, 1), CHUNK)),
    Target("dual gradient against its floor", "N = 1024, B = 32, T = 100", False, 2, "×", _dual_against_floor,
           "scan, TF32 products, launches", (DUAL,)),
    Target("dual gradient against BPTT's backward pass", "N = 1024, B = 32, T = 100", True, 3, "×", _dual_against_bptt,
           "the same, and two launches and waits a step", (DUAL,)),
    Target("online step with SGD against its floor", "N = 2048, B = 1", False, 1.3, "×", _online_against_floor,
           f"bytes, {STEP_NODES} launches in graphs", (("step-fp32-gradient", 2048, 1, 1), ("rgc-step", 2048, 1, 1))),
    Target("online step with SGD", "N = 256, B = 1", False, 30e-6, "s", _online(256),
           f"bytes, {STEP_NODES} launches in graphs; not what the host takes",
           (("step-fp32-gradient", 256, 1, 1), ("rgc-step", 256, 1, 1)), _measured_online),
    *(
        Target("step of a stream in one launch, SGD", f"N = {units}, B = 1", False, 3e-6, "s", _known(seconds),
               "instructions, barriers and sums; a team's three trips to the L2 cache", ())
        for units, seconds in STREAM_STEP.items()
    ),
    Target("forward pass against an eager loop", "N = 128, B = 32, T = 100", True, 5, "×",
           _forward(128),
           f"{EAGER_NODES} launches a step, float32; {seconds_text(CACHED_STEP)} a step on chip, by its instructions",
           (("rgc-forward", 128, 32, 100),)),
    Target("forward pass against an eager loop", "N = 1024, B = 32, T = 100", True, 2, "×",
           _forward(1024),
           f"{EAGER_NODES} launches a step against {KERNEL_NODES}, the same product in float32",
           (("rgc-forward", 1024, 32, 100),)),
    Target("exact RTRL's step: part of the GEMM rate, TF32", "N = 512, B = 1", True, 0.5, "%", _rtrl_fraction,
           "product at full rate; γ read once more for the gradient", (("rtrl-jacobian", 512, 1, 1),)),
)  # fmt: skip


def times(gpu_name: str) -> Times:
    """The roofline's floors of all kernels that the targets need. Raises ValueError as `roofline.run` does."""
    check.one_of("gpu", gpu_name, GPUS)
    gpu = GPUS[gpu_name]
    roofline.needs_compiler()
    asked = sorted({kernel for target in TARGETS for kernel in target.kernels})
    made = {at: roofline.launch(KERNELS[at[0]], at[1], at[2], at[3], gpu) for at in asked}
    facts = static.compile_all([launch.build for launch in made.values()])
    floors = {}
    for (name, units, batch, steps), found in zip(made, facts, strict=True):
        if isinstance(found, str):
            raise ValueError(f"{name} can't be compiled for {gpu.name}: {found}")
        at = name, units, batch, steps
        payload = roofline.predict(gpu, KERNELS[name], (units, batch), steps, made[at], found)
        floors[at] = payload["seconds"]
    return Times(gpu, floors, devices.by_key(gpu_name).rate("graph_call"))


def table(gpu_name: str, records: Sequence[Record] = ()) -> Table:
    """All targets: predicted for a GPU, and measured where `records` of a GPU tell it."""
    found = times(gpu_name)
    out = Table(
        title=f"targets on {found.gpu.name}: predicted, not measured; measured where there are records",
        caption=f"predicted: floors of bytes, FLOP and waits, {seconds_text(found.graph_call)} a launch in a graph, "
        "as if nothing overlapped and every kernel came to its floor",
    )
    for heading in ("what", "at", "target", "predicted", "reached", "rests on", "measured"):
        out.add_column(heading, justify="right" if heading in ("target", "predicted", "measured") else "left")
    for target in TARGETS:
        predicted, measured = target.predicted(found), target.measured(records)
        out.add_row(
            target.what,
            target.at,
            f"{'≥' if target.least else '≤'} {target.text(target.bar)}",
            target.text(predicted),
            "yes" if target.reached(predicted) else "no",
            target.rests_on,
            "" if measured is None else target.text(measured),
        )
    return out
