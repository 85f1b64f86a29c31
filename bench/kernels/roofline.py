"""Predictions without a GPU: what a kernel's launch would consist of, and the least time that it takes.

Each kernel is compiled at the configuration that its launcher picks, and its registers and accesses are read from the
machine code (`static`). The predicted time is a floor, max(bytes / copy rate, FLOP / rate, waits): the cost of
launching, and how near a kernel comes to its floor, are not predicted. Waits are loads whose latency nothing hides. A
scan waits for memory at every step, however little it moves: one latency for as many steps as have their loads under
way together. A pass over Γ waits once for each batch row's tile.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.table import Table

from ... import _checks as check
from ...planning import devices
from ...planning.devices import Rate
from ..harness import record
from ..harness.record import Record
from ..harness.tables import bytes_text, seconds_text
from . import builds, static
from .cases import (
    KERNELS,
    MATRICES,
    STATES,
    GammaChunk,
    GammaRead,
    GammaStep,
    Kernel,
    OfCircuit,
    RTRLHeads,
    entered,
    head_units,
)
from .timing import floor, rate_text

if TYPE_CHECKING:  # triton need not be there to import this
    from ...kernels.reverse_scan import ScanConfig

FILE = "roofline.jsonl"
DEFAULT_HIDDEN, DEFAULT_BATCHES = (64, 256, 1001, 1024, 4096), (8,)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its rates, and what a multiprocessor has for the programs that it runs at once.

    registers   32-bit registers of a multiprocessor, a quarter for each of its four schedulers
    shared      bytes of shared memory of a multiprocessor
    latency     seconds from a load to the use of what it loads, with the arithmetic of one step of a scan
    """

    name: str
    target: str
    copy: Rate
    float32: Rate
    tf32: Rate
    bfloat16: Rate
    latency: Rate
    multiprocessors: int
    shared: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32


def _gpus() -> dict[str, Gpu]:
    """The known devices whose kernels can be predicted: NVIDIA's, since their machine code can be read."""
    found = {}
    for key, device in devices.known().items():
        if device.kernels:
            rate = device.rates
            found[key] = Gpu(
                name=device.name,
                copy=rate["copy"],
                float32=rate["float32"],
                tf32=rate["tf32"],
                bfloat16=rate["bfloat16"],
                latency=rate["latency"],
                **device.kernels,
            )
    return found


GPUS = _gpus()
# A warp gets registers in units of REGISTERS_AT_ONCE from one scheduler; each program costs SHARED_PER_PROGRAM bytes of
# shared memory beside its own.
SCHEDULERS, REGISTERS_AT_ONCE, SHARED_PER_PROGRAM = 4, 256, 1024


@dataclass(frozen=True)
class Launch:
    """What a launcher would launch.

    build      the kernel at its types and constants; config: the configuration, in words
    programs   how many are launched, with `warps` warps each
    numbers    how many a program works on: numbers of Γ (both states) or of J in its tile, or units of a scan or loop
    waits      loads that a program waits for, one after the other: a batch row's tile of Γ each, or a step of a scan or
               loop each. Programs of Γ that don't fit on the GPU together wait for their turn as well.
    again      bytes moved beside those that a call must move: blocks of time are read twice, and summarized
    """

    build: static.Build
    config: str
    programs: int
    numbers: int
    warps: int
    waits: float = 0
    again: int = 0


def points(hidden: Sequence[int], batches: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Every N at every B, as (N, B); the defaults for what isn't given."""
    return tuple((n, b) for b in batches or DEFAULT_BATCHES for n in hidden or DEFAULT_HIDDEN)


def launch(kernel: Kernel, units: int, batch: int, steps: int, gpu: Gpu) -> Launch:
    """What a kernel's launcher would launch on a GPU at N units, B batch rows and T steps of a scan. Needs triton."""
    from ...kernels import gamma_chunk, gamma_step, reverse_scan
    from ...kernels._launch import split_rows, vector_width

    target, parts = gpu.target, 1
    if isinstance(kernel, RTRLHeads):
        return heads_launch(units, target)
    if isinstance(kernel, OfCircuit):
        return circuit_launch(kernel.name, units, batch, steps, gpu)
    dtype, short = getattr(torch, kernel.dtype), {"float32": "fp32", "bfloat16": "bf16"}[kernel.dtype]
    if kernel.has_gamma:
        aligned: tuple[str, ...] = ("N", "M") if units % 16 == 0 else ()
        config: gamma_step.Config | gamma_chunk.Config
        if isinstance(kernel, (GammaStep, GammaRead)):
            stochastic = isinstance(kernel, GammaStep) and kernel.rounding == "stochastic"
            config = step = gamma_step.pick_config(units, units, dtype, stochastic)
            if isinstance(kernel, GammaRead):
                build = builds.read_build(target, step, short, STATES, aligned)
            else:
                mode = "gradient" if kernel.gradient else "advance"
                build = builds.step_build(target, step, short, STATES, mode, aligned, kernel.rounding)
            words = f"{step.block_n}×{step.block_m}"
            row_bytes = kernel.gamma_numbers(units, 1) * dtype.itemsize
            parts = batch // split_rows(row_bytes, batch, gpu.multiprocessors)
        else:
            assert isinstance(kernel, GammaChunk)
            assert kernel.steps is not None
            config = chunk = gamma_chunk.pick_config(units, units, kernel.steps, dtype, kernel.precision)
            width = vector_width(units, torch.float32)
            build = builds.chunk_build(target, chunk, short, STATES, aligned, width)
            words = f"{chunk.block_n}×{chunk.block_m}×{chunk.block_c}"
        tiles = -(-units // config.block_n) * -(-units // config.block_m)
        return Launch(
            build,
            f"{words} w{config.num_warps} v{config.vector}",
            tiles * MATRICES * parts,
            STATES * config.block_n * config.block_m,
            config.num_warps,
            batch // parts if isinstance(kernel, (GammaStep, GammaRead)) else batch,
        )
    total = batch * units
    aligned = tuple(name for name, value in (("BN", total), ("N", units)) if value % 16 == 0)
    if "delta" in kernel.takes:
        return scan_launch(kernel, total, steps, gpu)
    matrices = MATRICES if "phi" in kernel.takes else 0
    width = vector_width(units if matrices else total, torch.float32)
    picked = reverse_scan.pick_config(matrices, STATES, static.WARP[target])
    build = builds.suffix_build(target, STATES, matrices, width, aligned)
    words = f"{picked.block} w1 v{width} s{picked.stages}"
    waits = steps / max(1, picked.stages - 1)
    return Launch(build, words, -(-total // picked.block), picked.block, 1, waits)


def scan_launch(kernel: Kernel, total: int, steps: int, gpu: Gpu) -> Launch:
    """As `launch`, for the reverse scan of credits of `total` = B·N units; without a carry, as for a last chunk."""
    from ...kernels import reverse_scan
    from ...kernels._launch import vector_width

    warp, width = static.WARP[gpu.target], vector_width(total, torch.float32)
    partials: list[list[int]] = []
    if "partials" in kernel.takes:
        partials = [*([entered(k)] for k in range(MATRICES)), list(range(STATES))]
    count, written = sum(map(len, partials)), len(partials) or STATES
    picked = reverse_scan.pick_scan_config(steps, total, STATES, count, written, warp, gpu.multiprocessors)
    build = builds.scan_build(
        gpu.target,
        STATES,
        partials,
        steps=steps,
        units=total,
        multiprocessors=gpu.multiprocessors,
        carry=False,
        vector=width,
        divisible=("BN",) if total % 16 == 0 else (),
    )[-1]
    return by_blocks(build, picked, total, steps, width, STATES**2 + STATES)


def by_blocks(
    build: static.Build, picked: ScanConfig, total: int, steps: int, width: int, read: int
) -> Launch:
    """As `launch`, for a scan in one pass, or in blocks of time, which read `read` numbers a unit and step twice."""
    tiles, blocks = -(-total // picked.block), -(-steps // picked.steps)
    words, under_way = f"{picked.block} w1 v{width} s{picked.stages}", max(1, picked.stages - 1)
    if blocks == 1:
        return Launch(build, words, tiles, picked.block, 1, steps / under_way)
    # all blocks but the first are read twice; the summary of each is written once and read again
    again = 4 * total * (read * (steps - picked.steps) + 2 * (STATES**2 + STATES) * (blocks - 1))
    waits = (2 * picked.steps + blocks - 1) / under_way
    return Launch(build, f"{words} t{picked.steps}", tiles * blocks, picked.block, 1, waits, again)


def heads_launch(units: int, target: str) -> Launch:
    """As `launch`, for a step of exact RTRL by heads."""
    from ...kernels import rtrl_heads

    b = head_units(units)
    columns = MATRICES * b * b
    config = rtrl_heads.pick_config(STATES * b, columns, "ieee")
    words = f"{config.block_r}×{config.block_p} w{config.num_warps} v{config.vector}"
    programs = units // b * -(-columns // config.block_p)
    numbers = config.block_r * config.block_p
    return Launch(builds.heads_build(target, config), words, programs, numbers, config.num_warps)


def circuit_launch(name: str, units: int, batch: int, steps: int, gpu: Gpu) -> Launch:
    """As `launch`, for the kernels of a cell, with an RGC's functions; of one step, where each step is a launch.

    Waits: a step that is a launch waits for its matrix product, which isn't compiled here, and then for its pointwise
    pass. A step on chip waits for its input. Partials wait at each step of a program, the dual form waits as scans do,
    and a single step waits for each block of columns.
    """
    from ...kernels import cell_forward, cell_on_chip, cell_partials, cell_step, rtrl_step
    from ...kernels._launch import vector_width

    target, warp, total = gpu.target, static.WARP[gpu.target], batch * units
    width = vector_width(units, torch.float32)
    divisible = ("N",) if units % 16 == 0 else ()
    if name == "rtrl-jacobian":
        square = rtrl_step.pick_config(units)
        build = builds.rtrl_build(target, "jacobian", square, resets=False, divisible=divisible)
        tiles = -(-units // square.block_n) * -(-units // square.block_m)
        words = f"{square.block_n}×{square.block_m} w{square.num_warps} v{square.vector}"
        numbers = MATRICES * square.block_n * square.block_m
        return Launch(build, words, batch * tiles, numbers, square.num_warps)
    made = builds.cell_builds(
        target,
        "RGCCell",
        width,
        hidden=units,
        batch=batch,
        steps=steps,
        multiprocessors=gpu.multiprocessors,
        resets=False,
        last=steps == 1,
        carry=False,
        divisible=(*divisible, *(("BN",) if total % 16 == 0 else ())),
    )
    if name == "rgc-forward" and cell_on_chip.on_chip(units, batch, MATRICES, 1, gpu.multiprocessors, warp):
        small = cell_on_chip.pick_config(units, MATRICES, warp)
        words = f"{small.block} w{small.num_warps}"
        return Launch(made["on-chip"], words, batch, small.block, small.num_warps, steps)
    if name == "rgc-step":
        some_rows = cell_step.pick_config(units, batch, MATRICES, warp)
        words = f"{some_rows.units}×{some_rows.rows} w{some_rows.num_warps} v{width}"
        programs = -(-units // some_rows.units) * -(-batch // some_rows.rows)
        # the loads of blocks of columns come one after the other, then those of the unit's own numbers
        waits = -(-units // some_rows.columns) + 1
        return Launch(made["step"], words, programs, some_rows.units, some_rows.num_warps, waits)
    if name == "rgc-dual":
        read, written = MATRICES + STATES + 1 + STATES, MATRICES + 1
        picked = cell_partials.pick_dual_config(steps, total, read, written, warp, gpu.multiprocessors)
        return by_blocks(made["dual"], picked, total, steps, width, read)
    if name == "rgc-linearize":
        some = cell_partials.pick_config(steps, total, warp, gpu.multiprocessors)
        programs = -(-total // some.block) * -(-steps // some.steps)
        words = f"{some.block} w1 v{width} t{some.steps}"
        return Launch(made["linearize"], words, programs, some.block, 1, some.steps)
    config = cell_forward.pick_pointwise_config(units, warp)
    build = made["pointwise" if name == "rgc-forward" else "backward"]
    programs = batch * -(-units // config.block)
    return Launch(build, f"{config.block} w1 v{config.vector}", programs, config.block, 1, 2 * steps)


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """How many programs fit on a multiprocessor at once, and which resource limits them."""
    per_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = gpu.registers // SCHEDULERS // per_warp * SCHEDULERS // warps
    limits = {
        "registers": by_registers,
        "shared memory": gpu.shared // (shared + SHARED_PER_PROGRAM),
        "warps": gpu.warps // warps,
        "programs": gpu.programs,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def predict(
    gpu: Gpu, kernel: Kernel, at: tuple[int, int], steps: int, made: Launch, facts: static.Facts
) -> dict[str, Any]:
    """All that is predicted for one kernel at one (N, B), as the payload of its record."""
    size = (*at, kernel.steps or steps)
    moved, flop = kernel.bytes(*size) + made.again, kernel.flop(*size)
    rate: Rate = getattr(gpu, kernel.rate)
    seconds, bound = floor(moved, flop, gpu.copy.value, rate.value)
    fit, limit = occupancy(gpu, facts.registers, facts.shared, made.warps)
    turns = -(-made.programs // (fit * gpu.multiprocessors)) if kernel.has_gamma else 1
    waiting = made.waits * turns * gpu.latency.value
    if waiting > seconds:
        seconds, bound = waiting, "waits"
    return {
        "predicted": True,
        "config": made.config,
        **dataclasses.asdict(facts),
        "static_instructions_per_number": facts.instructions * 32 * made.warps / made.numbers,
        "programs": made.programs,
        "programs_per_multiprocessor": fit,
        "limited_by": limit,
        "bytes": moved,
        "flop": flop,
        "copy_bytes_per_second": gpu.copy.value,
        "copy_basis": gpu.copy.basis,
        "flop_per_second": rate.value,
        "flop_basis": rate.basis,
        "waits": made.waits * turns,
        "latency_seconds": gpu.latency.value,
        "latency_basis": gpu.latency.basis,
        "seconds": seconds,
        "bound": bound,
    }


def run(path: Path, gpu_name: str, at: Sequence[tuple[int, int]], steps: int = 64) -> list[Record]:
    """Predict every kernel at every (N, B), append a record of each to `path`, and return the records.

    Where the launcher would scan credits by blocks of time, a scan in one pass is predicted as well, as "scan-one-pass"
    and so on. A kernel for which the GPU is too small is left out.

    Raises ValueError for an unknown GPU or size, and where triton or its disassembler is missing.
    """
    check.one_of("gpu", gpu_name, GPUS)
    for units, batch in at:
        check.integer("hidden", units, 1)
        check.integer("batch", batch, 1)
    check.integer("steps", steps, 2)
    needs_compiler()
    gpu = GPUS[gpu_name]
    launches: dict[tuple[str, str, int, int], Launch] = {}
    for name, kernel in KERNELS.items():
        for units, batch in at:
            if not kernel.fits(units, gpu.multiprocessors):
                continue
            made = launch(kernel, units, batch, steps, gpu)
            launches[name, name, units, batch] = made
            if made.again:
                # without a multiprocessor to fill, the launcher picks one pass
                one_pass = launch(kernel, units, batch, steps, dataclasses.replace(gpu, multiprocessors=0))
                launches[f"{name}-one-pass", name, units, batch] = one_pass
    by_text = {_text(made.build): made.build for made in launches.values()}
    compiled = dict(zip(by_text, static.compile_all(list(by_text.values())), strict=True))
    shared = record.started("roofline", f"{gpu.name} (predicted)")
    records = []
    for (algorithm, name, units, batch), made in launches.items():
        kernel, facts = KERNELS[name], compiled[_text(made.build)]
        params = {
            "gpu": gpu_name, "N": units, "B": batch, "S": STATES, "K": MATRICES,
            "T": kernel.steps or steps, "dtype": kernel.dtype,
        }  # fmt: skip
        about: dict[str, Any] = {**shared, "algorithm": algorithm, "params": params, "time": record.now()}
        if isinstance(facts, str):
            records.append(Record(status="error", message=facts, **about))
        else:
            payload = predict(gpu, kernel, (units, batch), steps, made, facts)
            records.append(
                Record(status="ok", predicted_seconds=payload["seconds"], payload=payload, **about)
            )
        record.append(path, records[-1])
    return records


def needs_compiler() -> None:
    """Raise ValueError unless kernels can be compiled here, and their machine code read."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "a prediction compiles the kernels, which needs triton: pip install 'rjepa-triton[triton]'"
        )
    if static.cuobjdump() is None:
        raise ValueError("a prediction reads machine code by cuobjdump, and this triton comes without it")


def _text(build: static.Build) -> str:
    """A text that is equal for equal builds."""
    return json.dumps(dataclasses.asdict(build), sort_keys=True)


def tables(records: Sequence[Record]) -> list[Table]:
    """Two tables of one GPU's records: what the compiler made of the kernels, and the predicted time of a call."""
    gpu = GPUS[records[0].params["gpu"]]
    where = f"predicted for {gpu.name} ({gpu.target})"
    code = Table(
        title=f"{where}: the machine code at the configuration that is picked",
        caption="w: warps, v: numbers in one access, s: stages of loads, t: steps of a block of time; "
        "static instr. / number: instructions in the code, each once, times threads, by numbers of Γ in a tile "
        "(scans: by units); programs: that fit on a multiprocessor at once, and what limits them",
    )
    numbers = (
        "N", "B", "registers", "spills", "shared", "128-bit loads", "128-bit stores",
        "static instr. / number", "programs",
    )  # fmt: skip
    for heading in ("kernel", "N", "B", "configuration", *numbers[2:], "limited by"):
        justify: Literal["left", "right"] = "right" if heading in numbers else "left"
        code.add_column(heading, justify=justify, no_wrap=heading in ("kernel", "configuration"))
    latency = f"latency {seconds_text(gpu.latency.value)} {gpu.latency.basis}"
    rates = ", ".join(
        f"{what} {rate_text(rate.value, unit)} {rate.basis}"
        for what, rate, unit in (
            ("copy", gpu.copy, "B"), ("fp32", gpu.float32, "FLOP"), ("TF32", gpu.tf32, "FLOP"),
            ("bf16", gpu.bfloat16, "FLOP"),
        )
    )  # fmt: skip
    times = Table(
        title=f"{where}: time of a call, max(bytes / copy rate, FLOP / rate, waits · latency)",
        caption=f"{rates}, {latency}",
    )
    for heading in (
        "kernel",
        "N",
        "B",
        "T",
        "programs launched",
        "bytes",
        "FLOP",
        "predicted time",
        "set by",
    ):
        times.add_column(
            heading, justify="left" if heading in ("kernel", "set by") else "right", no_wrap=True
        )
    for r in records:
        at = [r.algorithm, str(r.params["N"]), str(r.params["B"])]
        if r.status != "ok":
            code.add_row(*at, r.message.splitlines()[0])
            continue
        p = r.payload
        code.add_row(
            *at, p["config"], str(p["registers"]), "yes" if p["spills"] else "no", bytes_text(p["shared"]),
            str(p["wide_loads"]), str(p["wide_stores"]), f"{p['static_instructions_per_number']:.1f}",
            str(p["programs_per_multiprocessor"]), p["limited_by"],
        )  # fmt: skip
        times.add_row(
            *at, str(r.params["T"]), str(p["programs"]), bytes_text(p["bytes"]), f"{p['flop']:.3g}",
            seconds_text(p["seconds"]), p["bound"],
        )  # fmt: skip
    return [code, times]
