"""Every kernel, at every tile its launcher can pick, compiled for four GPUs: is the machine code what it should be?

A GPU that isn't here can't time a kernel, but its compiler says whether registers were spilled, whether Γ goes
through 128-bit accesses, and whether matrix products run on tensor cores.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shared import made_once

pytest.importorskip("triton")

import triton

from rjepa_triton.bench.kernels.builds import (
    cell_builds,
    chunk_build,
    heads_build,
    read_build,
    rtrl_build,
    scan_build,
    step_build,
    stream_build,
    suffix_build,
)
from rjepa_triton.bench.kernels.static import (
    SHARED_LIMIT,
    TARGETS,
    WARP,
    Build,
    Facts,
    compile_all,
    cuobjdump,
)
from rjepa_triton.kernels import (
    cell_on_chip,
    gamma_chunk,
    gamma_step,
    rtrl_heads,
    rtrl_step,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Config = gamma_step.Config | gamma_chunk.Config


@dataclass(frozen=True)
class Case:
    """A build and the requirements on its machine code.

    registers    the most registers per thread on NVIDIA, where they decide how many programs share a multiprocessor
    wide_loads   the least number of 128-bit loads; all stores must have 128 bits then. 0 where rows allow neither
    tensor_core  whether there must be matrix instructions
    rounded      whether there must be conversions to bfloat16 that round to nearest
    in_lanes     whether scalar registers may be spilled to lanes of vector registers, which takes no memory
    narrow       how many stores of fewer than 128 bits there may be, beside those of `NARROW_STORES`
    """

    build: Build
    registers: int
    wide_loads: int
    tensor_core: bool = False
    rounded: bool = False
    narrow: int = 0
    in_lanes: bool = False


# How many stores of fewer than 128 bits a case may have, by the start of its name, and why.
NARROW_STORES = {
    # A matrix product leaves four numbers in a row to a lane: 128 bits of float32, 64 of bfloat16.
    "chunk-gfx942-64x32x32-bf16": 8,
    # φ y goes to one row per state in each column, and a column has one gradient, so numbers are stored singly.
    "rtrl-heads": 3,
}


def _configs(pick: Callable[..., Config], *choices: Iterable[object]) -> list[Config]:
    """All configurations that `pick` returns over the sizes, the fan-ins and the choices."""
    sizes = (1, 63, 64, 128, 256, 512, 1000, 4096)
    return sorted({pick(*arguments) for arguments in itertools.product(sizes, sizes, *choices)})


STATES = (1, 2, 3, 4)
# By dtype and states.
STEP_CONFIGS = {
    (name, states): _configs(gamma_step.pick_config, [dtype], [False], [states])
    for (name, dtype), states in itertools.product(DTYPES.items(), STATES)
}
STOCHASTIC_CONFIGS = {
    states: _configs(gamma_step.pick_config, [torch.bfloat16], [True], [states]) for states in STATES
}
CHUNK_CONFIGS = {
    (name, states): _configs(gamma_chunk.pick_config, (1, 31, 32, 100), [dtype], ("ieee", "tf32"), [states])
    for (name, dtype), states in itertools.product(DTYPES.items(), STATES)
}
# Of one to three states, with and without matrices and parameters, spikes among them.
CELL_CASES = [
    *itertools.product(("RGCCell", "LSTMCell"), (4, 1)),
    *((cell, 4) for cell in ("GRUCell", "MGUCell", "ElmanCell", "ALIFCell", "LRUCell")),
]
# Most registers of an RGC's kernels, by their vectors: as its own kernels took before they were cases of a
# template, but for scans by single numbers, which took 192 and 128.
RGC_LIMITS = {
    "pointwise": {4: 64, 1: 64},
    "linearize": {4: 64, 1: 96},
    "dual": {4: 96, 1: 208},
    "dual-summary": {4: 96, 1: 152},
    "step": {4: 128, 1: 128},
    "backward": {4: 96, 1: 96},
}
# The least 128-bit loads of an RGC's kernels: gates, states and input, and credits, of each step under way.
RGC_LOADS = {"pointwise": 7, "linearize": 7, "step": 4, "backward": 9}

# Whole streams, of networks that one program holds and of teams: cell, N, F, and options of `Stream`.
STREAMS: dict[str, tuple[str, int, int | None, dict[str, Any]]] = {
    **{f"RGC-{n}": ("RGCCell", n, None, {}) for n in (32, 63, 64, 128, 512)},
    "RGC-64-resets": ("RGCCell", 64, None, {"resets": True}),
    "RGC-64-adam-clipped": (
        "RGCCell",
        64,
        None,
        {"optimizer": "adam", "clip_norm": 1.0, "update_every": 4, "loss": "cross_entropy"},
    ),
    "LSTM-32": ("LSTMCell", 32, 8, {}),
    "LSTM-64-adamw": ("LSTMCell", 64, 8, {"optimizer": "adamw", "resets": True}),
    "GRU-64-rmsprop": ("GRUCell", 64, 3, {"optimizer": "rmsprop", "loss": "cosine"}),
}

RTRL_CONFIGS = sorted({rtrl_step.pick_config(n) for n in range(1, 257)})

HEADS_CONFIGS = {
    precision: sorted(
        {
            rtrl_heads.pick_config(rows, columns, precision)
            for rows in range(1, 129)
            for columns in (1, 6, 16, 1024)
        }
    )
    for precision in rtrl_heads.PRECISIONS
}

# Scans of credits alone, and of credits that a cell's outputs use: the states, and for each output the states whose
# partials it has.
SCANS: dict[str, tuple[int, list[list[int]]]] = {
    "S1": (1, []),
    "S2": (2, []),
    "rgc": (2, [[0], [0], [1], [1], [0, 1]]),
    "lstm": (2, [[0, 1], [0, 1], [0, 1], [0]]),
    "gru": (1, [[0], [0], [0], [0]]),
    "many": (2, [[0, 1]] * 10),
    "alif": (3, [[0], [0, 1, 2]]),
    "S4": (4, []),
}


def _cases() -> Iterator[tuple[str, Case]]:
    """All cases: two states on every target; others, and lighter modes, which take fewer registers, on one target.

    VECTOR divides the sizes and 16 doesn't, which is the least that the compiler is ever told about a wide row.
    """

    def vectors(config: Config) -> int:
        """The number of 128-bit loads by which a thread reads its part of one batch row's tile of Γ."""
        if config.vector == 1:
            return 0
        per_thread = config.block_n * config.block_m // (WARP[target] * config.num_warps)
        return states * per_thread // config.vector

    for target, (precision, configs) in itertools.product(TARGETS, HEADS_CONFIGS.items()):
        if precision == "tf32x3" and target.startswith("gfx"):
            continue  # only NVIDIA has this precision
        for config in configs:
            # A product's rows of γ are read 128 bits at a time.
            tile = config.block_k * config.block_p // (WARP[target] * config.num_warps)
            name = f"rtrl-heads-{target}-{config.block_r}x{config.block_p}-v{config.vector}{config.vector_j}-{precision}"
            for gradient in (True, False) if target == "sm_90" else (True,):
                build = heads_build(target, config, precision, gradient=gradient)
                loads = tile // 4 if config.vector == 4 else 0
                yield name + "-gradient" * gradient, Case(build, config.registers, loads)
    for target in TARGETS:
        for dtype, states in itertools.product(DTYPES, STATES if target == "sm_90" else (2,)):
            rounded = dtype == "bf16" and not target.startswith("gfx")
            for config in STEP_CONFIGS[dtype, states]:
                for mode in (
                    ("gradient", "weight", "advance") if target == "sm_90" else ("gradient", "weight")
                ):
                    build = step_build(target, config, dtype, states, mode)
                    name = f"step-{target}-{config.block_n}x{config.block_m}-{dtype}-S{states}-{mode}"
                    # Three programs of four warps must fit. On an A100 two suffice: the loads that they have under way
                    # are three times what its memory's bandwidth needs. So do they of three states and four.
                    limit = 192 if target == "sm_80" or states > 2 else 168
                    yield name, Case(build, limit, vectors(config), rounded=rounded)
                    if config.block_m == 1:
                        own = step_build(target, config, dtype, states, mode, own=True)
                        yield name + "-own", Case(own, limit, vectors(config), rounded=rounded)
                    if mode == "weight":
                        full = step_build(target, config, dtype, states, mode, both=True)
                        yield name + "-both", Case(full, limit, vectors(config), rounded=rounded)
                        alone = step_build(target, config, dtype, states, mode, matrices=1)
                        yield name + "-alone", Case(alone, limit, vectors(config), rounded=rounded)
            for config in STOCHASTIC_CONFIGS[states] if dtype == "bf16" else ():
                build = step_build(target, config, dtype, states, rounding="stochastic")
                name = f"step-{target}-{config.block_n}x{config.block_m}-stochastic-S{states}"
                yield name, Case(build, 168, vectors(config))
                if config.vector == 1:
                    own = step_build(target, config, dtype, states, rounding="stochastic", own=True)
                    yield name + "-own", Case(own, 168, 0)
            for config in STEP_CONFIGS[dtype, states]:
                build = read_build(target, config, dtype, states)
                name = f"read-{target}-{config.block_n}x{config.block_m}-{dtype}-S{states}"
                # Six programs of four warps must fit.
                yield name, Case(build, 80, vectors(config))
            for config in CHUNK_CONFIGS[dtype, states]:
                build, product = chunk_build(target, config, dtype, states), config.block_c > 1
                tile = f"{config.block_n}x{config.block_m}x{config.block_c}"
                # A product's operands take registers, so on two targets only two programs of four warps fit.
                limit = 255 if product and target in ("sm_80", "sm_100") else 168
                case = Case(build, limit, vectors(config), tensor_core=product, rounded=rounded)
                yield f"chunk-{target}-{tile}-{dtype}-S{states}", case
                if product and dtype == "fp32" and states == 2:
                    # Where 4 doesn't divide the number of units, U is read one number at a time, but Γ isn't.
                    odd = dataclasses.replace(build, constants={**build.constants, "VECTOR_U": 1})
                    yield (
                        f"chunk-{target}-{tile}-odd-units",
                        dataclasses.replace(case, build=odd, registers=255),
                    )
        for states, matrices in ((2, 0), (2, 4), (2, 9), (1, 4), (3, 2), (4, 4)):
            build = suffix_build(target, states, matrices)
            loads = states * states + states * matrices if states <= 2 else 0  # of 64 bits beyond
            yield f"suffix-{target}-S{states}-K{matrices}", Case(build, 128 if states <= 2 else 168, loads)
        for (cell, (states, partials)), steps in itertools.product(SCANS.items(), (64, 4096)):
            # The last of two launches, or the only one, reads the steps' arrays and the summaries of blocks of time.
            *summary, build = scan_build(target, states, partials, steps=steps, units=64)
            assert len(summary) == (steps == 4096)
            loads = (1 + len(summary)) * (states * states + states) + sum(map(len, partials))
            loads = loads if states <= 2 else 0  # they are of 64 bits
            by = "blocks" if summary else "one-pass"
            yield f"reverse-scan-{target}-{cell}-{by}", Case(build, 96 if states <= 2 else 168, loads)
        for states in STATES:
            build = scan_build(target, states, steps=4096, units=64)[0]
            loads = states * states + states if states <= 2 else 0
            yield f"block-summary-{target}-S{states}", Case(build, 96 if states <= 2 else 168, loads)
        for cell, vector in CELL_CASES:
            yield from _cell_cases(target, cell, vector)
        for name, (cell, units, features, options) in STREAMS.items():
            # Rows are read once a call; the state and each step's loss and outputs are single numbers.
            stream = stream_build(target, cell, units, features=features, **options)
            assert stream is not None
            # Addresses and masks of many blocks of weights take more scalar registers than AMD's GPUs have.
            yield f"stream-{target}-{name}", Case(stream, 255, 0, in_lanes=target.startswith("gfx"))
        for kernel, config in itertools.product(("jacobian", "immediate"), RTRL_CONFIGS):
            # It reads tiles of four matrices.
            per_thread = config.block_n * config.block_m // (WARP[target] * config.num_warps)
            loads = 0 if config.vector == 1 else 4 * per_thread // config.vector
            yield (
                f"rtrl-{kernel}-{target}-{config.vector}",
                Case(rtrl_build(target, kernel, config), 168, loads),
            )
            of_lstm = rtrl_build(target, kernel, config, "LSTMCell")
            yield f"rtrl-{kernel}-{target}-{config.vector}-LSTMCell", Case(of_lstm, 168, loads)


def _cell_cases(target: str, cell: str, vector: int) -> Iterator[tuple[str, Case]]:
    """Every kernel of a cell, at every layout that its launcher can pick."""
    # hidden, batch: of each layout of a step; a million units fill a GPU, so that a scan is one pass
    made = {f"{k}-{n}x{b}": v for n, b in ((64, 1), (512, 2), (1024, 8)) for k, v in
            cell_builds(target, cell, vector, hidden=n, batch=b).items() if k == "step"}  # fmt: skip
    whole = cell_builds(target, cell, vector, hidden=1024, batch=1024)
    made |= {k: v for k, v in whole.items() if k != "step"}
    made |= {
        f"{k}-blocks": v
        for k, v in cell_builds(target, cell, vector, hidden=64, batch=1, steps=4096).items()
        if "dual" in k
    }
    if "backward" in made:
        made["backward-last"] = cell_builds(target, cell, vector, last=True)["backward"]
    for units, resets, save in itertools.product((32, 64, 128), (True, False), (True, False)):
        if vector == 4 and (units == 128 or (resets and save)):
            found = cell_builds(target, cell, vector, hidden=units, resets=resets, save=save).get("on-chip")
            if found is not None:
                made[f"on-chip-{units}{'-resets' * resets}{'-saved' * save}"] = found
    for kernel, build in made.items():
        kind = "on-chip" if kernel.startswith("on-chip") else kernel
        kind = next(
            (each for each in ("dual-summary", "dual", "step", "backward") if kind.startswith(each)), kind
        )
        limit, loads = 255, 1 if vector == 4 else 0
        letters = build.constants
        narrow = 0
        if kind == "on-chip":
            # A thread stores the saved numbers and states of a unit one at a time; an RGC's four and two lie joined.
            narrow = 3 if cell == "RGCCell" else letters["S"] + letters["F"]
        elif kind == "step":
            # Each unit and row stores the states as read and as computed, partials, and M, each number once.
            narrow = 2 * letters["S"] + len(letters["WRITTEN"]) + letters["S"] ** 2
        if cell == "RGCCell" and kind == "on-chip":
            # Weights are read 128 bits at a time, either once for all steps, or half before the loop and half in it.
            block = build.constants["BLOCK"]
            loads = block**2 // (WARP[target] * build.options["num_warps"])
            limit = {32: 128, 64: 208, 128: 255}[block]
        elif cell == "RGCCell":
            limit = RGC_LIMITS[kind][vector]
            if kernel == "dual-blocks" and target == "sm_80" and vector == 4:
                limit = 128  # there the compiler keeps the addresses of the summaries
            if vector == 4:
                stages = build.constants.get("STAGES", 0)
                summaries = 6 * (kernel == "dual-blocks")
                by_kind = {"dual": stages * (9 + summaries) + 2, "dual-summary": stages * 9, **RGC_LOADS}
                loads = by_kind[kind] + 2 * (kernel == "backward")
        yield f"cell-{kernel}-{target}-{cell}-{vector}", Case(build, limit, loads, narrow=narrow)


CASES = dict(_cases())

# What the compiler of Triton 3.6 makes otherwise than that of 3.7: machine code of the same kernels that spills, or that
# takes up to 20 registers more than the case allows. Results are the same; these builds are slower there.
WORSE_BEFORE_3_7 = {
    "spills": (
        *(
            f"rtrl-heads-sm_100-{tile}-v{vectors}-{precision}-gradient"
            for tile, vectors, precision in itertools.product(
                ("64x64", "128x32"), (41, 44), ("tf32", "tf32x3")
            )
        ),
        *(
            f"rtrl-heads-gfx942-{tile}-{precision}-gradient"
            for tile, precision in itertools.product(
                ("32x128-v11", "32x128-v41", "32x128-v44", "64x32-v11"), ("ieee", "tf32")
            )
        ),
        "step-sm_90-16x64-fp32-S3-weight-both",
        "step-sm_90-4x64-bf16-S4-weight",
        "chunk-sm_100-64x32x32-bf16-S2",
    ),
    "registers": (
        "chunk-sm_80-32x64x1-fp32-S2",
        "chunk-sm_90-32x64x1-fp32-S2",
        "chunk-sm_100-32x64x1-fp32-S2",
        "chunk-sm_90-64x32x32-fp32-S2",
        "step-sm_100-8x64-fp32-S2-weight-alone",
    ),
}
BEFORE_3_7 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)

# Arguments that are 1 are constants to the compiler: that other form of each kernel must compile as well.
OF_ONE = {
    f"{name} of one": dataclasses.replace(
        build, constants={**build.constants, **dict.fromkeys(units, 1), "VECTOR": 1}
    )
    for name, build, units in [
        ("step", step_build("sm_90", gamma_step.pick_config(1, 1, torch.float32)), ("N", "M")),
        (
            "step-stochastic",
            step_build("sm_90", gamma_step.Config(2, 64, 1, 1), "bf16", rounding="stochastic"),
            ("N", "M"),
        ),
        ("read", read_build("sm_90", gamma_step.pick_config(1, 1, torch.float32)), ("N", "M")),
        ("chunk", chunk_build("sm_90", CHUNK_CONFIGS["fp32", 2][0]), ("N", "M")),
        ("reverse_scan", scan_build("sm_90", 2, [[0], [0, 1], []])[0], ("BN",)),
        ("block_summary", scan_build("sm_90", 2, steps=4096, units=1)[0], ("BN",)),
        ("suffix", suffix_build("sm_90", 2, 2), ("BN", "N")),
        *(
            (f"cell-{k} of {cell}", build, ("N",))
            for cell in ("RGCCell", "LSTMCell")
            for k, build in cell_builds("sm_90", cell, 1, hidden=1, batch=1).items()
            if k != "on-chip"
        ),
        *(
            (f"cell-{k} by blocks", build, ("N", "BN"))
            for k, build in cell_builds("sm_90", "RGCCell", 1, hidden=1, batch=1, steps=4096).items()
            if "dual" in k
        ),
        ("rtrl-jacobian", rtrl_build("sm_90", "jacobian", rtrl_step.pick_config(1)), ("N",)),
        ("rtrl-immediate", rtrl_build("sm_90", "immediate", rtrl_step.pick_config(1)), ("N",)),
    ]
}

# Builds that the gate must reject, by the complaint that it must make. They show that the gate can fail at all.
CONTROLS = {
    # These are compiled as if rows might not start on 16 bytes, so accesses are narrow.
    "wide loads": Case(step_build("sm_90", gamma_step.Config(8, 64, vector=1, num_warps=1)), 255, 8),
    "narrow stores": Case(step_build("gfx942", gamma_step.Config(8, 64, vector=1, num_warps=1)), 255, 8),
    # A thread has four times as many numbers, as if one program took all four matrices of an RGC.
    "spills": Case(step_build("sm_90", gamma_step.Config(128, 64, vector=4, num_warps=4)), 255, 32),
    # The product of a warp group takes 64 rows; with 32 the compiler falls back to that of a warp.
    "tensor-core": Case(
        chunk_build("sm_90", gamma_chunk.Config(32, 64, 32, vector=4, num_warps=4, num_stages=1)),
        255,
        8,
        tensor_core=True,
    ),
    "registers": Case(step_build("sm_90", gamma_step.Config(32, 64, vector=4, num_warps=4)), 64, 8),
}


def complaints(name: str, case: Case, facts: Facts) -> list[str]:
    """The requirements of `case` that `facts` doesn't meet; empty if it meets all."""
    target = case.build.target
    narrow = case.narrow + next((n for start, n in NARROW_STORES.items() if name.startswith(start)), 0)
    found = {
        "spills": facts.spills and not (case.in_lanes and facts.scratch == 0),
        f"shared {facts.shared} > {SHARED_LIMIT[target]}": facts.shared > SHARED_LIMIT[target],
        f"registers {facts.registers} > {case.registers}": (
            not target.startswith("gfx") and facts.registers > case.registers
        ),
        f"wide loads {facts.wide_loads} < {case.wide_loads}": facts.wide_loads < case.wide_loads,
        f"narrow stores {facts.narrow_stores} > {narrow}": case.wide_loads > 0
        and facts.narrow_stores > narrow,
        "no tensor-core instruction": case.tensor_core and facts.tensor_core == 0,
        "no rounding to bfloat16": case.rounded and not facts.bf16_rounded,
    }
    return [what for what, is_so in found.items() if is_so]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts | str]:
    if cuobjdump() is None:
        pytest.skip("this triton comes without cuobjdump")
    builds = {
        **{name: case.build for name, case in CASES.items()},
        **{f"control {name}": case.build for name, case in CONTROLS.items()},
        **OF_ONE,
    }

    def make() -> list[dict[str, Any] | str]:
        results = compile_all(list(builds.values()))
        return [result if isinstance(result, str) else dataclasses.asdict(result) for result in results]

    results = made_once("static", make, tmp_path_factory)
    facts = [result if isinstance(result, str) else Facts(**result) for result in results]
    return dict(zip(builds, facts, strict=True))


def _marked() -> Iterator[Any]:
    """The cases, of which those of `WORSE_BEFORE_3_7` must fail there."""
    worse = {name: what for what, names in WORSE_BEFORE_3_7.items() for name in names}
    assert worse.keys() <= CASES.keys()
    for name in CASES:
        known = name in worse and BEFORE_3_7
        reason = f"{worse.get(name)}: the compiler of Triton {triton.__version__}"
        yield pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=reason)] * known)


@pytest.mark.parametrize("name", _marked())
def test_machine_code(compiled, name):
    facts = compiled[name]
    assert isinstance(facts, Facts), facts
    assert complaints(name, CASES[name], facts) == [], facts


@pytest.mark.parametrize("name", OF_ONE)
def test_sizes_of_one_compile(compiled, name):
    facts = compiled[name]
    assert isinstance(facts, Facts), facts
    assert not facts.spills


@pytest.mark.parametrize("name", CONTROLS)
def test_negative_controls_are_caught(compiled, name):
    facts = compiled[f"control {name}"]
    assert isinstance(facts, Facts), facts
    assert any(name in complaint for complaint in complaints(name, CONTROLS[name], facts)), facts


def test_what_does_not_compile_says_why():
    build = CONTROLS["registers"].build
    (result,) = compile_all([dataclasses.replace(build, constants={**build.constants, "BLOCK_N": 33})])
    assert isinstance(result, str)
    assert "power of 2" in result


def test_every_configuration_is_built():
    assert [len(configs) for configs in STEP_CONFIGS.values()] == [4] * 8
    assert [len(configs) for configs in CHUNK_CONFIGS.values()] == [4, 4, 3, 3] * 2
    assert len(RTRL_CONFIGS) == 2
    for warp, blocks in ((32, {32, 64, 128}), (64, {64, 128})):
        assert {cell_on_chip.pick_config(n, 4, warp).block for n in range(1, cell_on_chip.MOST + 1)} == blocks
    for target in TARGETS:
        assert sum(name.startswith(f"step-{target}") and "S2-gradient" in name for name in CASES) == 10
        assert sum(name.startswith(f"step-{target}") and "stochastic-S2" in name for name in CASES) == 4
        assert sum(name.startswith(f"read-{target}") and "S2" in name for name in CASES) == 8
        assert sum(name.startswith(f"chunk-{target}") and "S2" in name for name in CASES) == 8
