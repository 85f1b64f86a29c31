"""Compile Triton kernels for GPUs that aren't there, and read what became of them from the machine code.

A kernel is only compiled in a process that imports triton without TRITON_INTERPRET; `compile_all` starts one:
this module, which reads builds and writes facts as JSON. The last part says what this package's launchers
would have compiled: `step_build`, `read_build`, `chunk_build`, `scan_build`, `suffix_build`, `rgc_small_build`,
`rgc_persistent_build`, `rgc_step_build`, `rgc_pointwise_build`, `rgc_backward_build`, `rgc_linearize_build`,
`rgc_dual_build`, `rtrl_build`, `heads_build`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # triton need not be there to import this
    from ...kernels import (
        gamma_chunk,
        gamma_step,
        rgc_forward,
        rgc_persistent,
        rgc_step,
        rtrl_heads,
        rtrl_step,
    )

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WARP = {target: size for target, (_, _, size) in TARGETS.items()}
# Bytes of shared memory that one program may ask for.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Matrix instructions: of a warp on sm_80, of a warp group on sm_90, of the newest unit on sm_100.
TENSOR_CORE = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Build:
    """A kernel for one target, at one set of argument types, constants and options.

    kernel     "module:name"
    types      argument → Triton type ("*fp32", "i32", …), for at least those that aren't constants; of a tuple, the
               types of its items, None for a pointer that isn't given
    constants  argument → compile-time value, None for a pointer that isn't given
    divisible  integer arguments that are multiples of 16, as a launch would find; pointers always are
    """

    target: str
    kernel: str
    types: Mapping[str, str | Sequence[str | None]]
    constants: dict[str, Any]
    divisible: Sequence[str] = ()
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the machine code says. Wide accesses are of 128 bits, narrow ones of fewer.

    instructions: how many there are in the code, each once, however often it runs; no-operations not counted.
    """

    registers: int
    spills: bool
    shared: int
    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    tensor_core: int
    bf16_rounded: int | None  # packed conversions to bfloat16 that round to nearest; None where not told


def cuobjdump() -> Path | None:
    """The disassembler that comes with triton, if it does."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def compile_all(builds: Sequence[Build]) -> list[Facts | str]:
    """Facts of each build, or what its compilation raised; by as many processes as there are cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "rjepa_triton.bench.kernels.static"],
        input=json.dumps([dataclasses.asdict(build) for build in builds]),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the compiling process failed:\n{done.stderr}")
    results = json.loads(done.stdout.splitlines()[-1])
    return [result if isinstance(result, str) else Facts(**result) for result in results]


def _compile(build: Build) -> Facts | str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(build.constants)
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, a in enumerate(kernel.arg_names):
        kind = "constexpr" if a in build.constants else build.types[a]
        at: dict[tuple[int, ...], str]
        if isinstance(kind, str):
            signature[a], at = kind, {(position,): kind}
        else:
            signature[a] = tuple(item or "constexpr" for item in kind)
            at = {(position, index): item for index, item in enumerate(signature[a])}
            constants |= {(position, index): None for index, item in enumerate(kind) if item is None}
        for path, item in at.items():
            if item.startswith("*") or a in build.divisible:
                aligned[path] = [["tt.divisibility", 16]]
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget(*TARGETS[build.target]),
            options=dict(build.options),
        )
    except Exception as error:  # whatever it is, it belongs to this build alone
        return f"{type(error).__name__}: {error}"
    return _amd_facts(compiled) if build.target.startswith("gfx") else _nvidia_facts(compiled, build.target)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _nvidia_facts(compiled: Any, target: str) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [str(cuobjdump()), flag, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    return Facts(
        registers=registers,
        spills=stack > 0 or _count(r"\b(?:LDL|STL)\b", sass) > 0,
        shared=compiled.metadata.shared,
        instructions=_count(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)[@A-Z]", sass),
        # Straight to registers, or copied to shared memory behind the arithmetic's back.
        wide_loads=_count(r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b", sass),
        wide_stores=_count(r"\bSTG\.[\w.]*\b128\b", sass),
        narrow_stores=_count(r"\bSTG\b(?!\.[\w.]*\b128\b)", sass),
        tensor_core=_count(TENSOR_CORE[target], sass),
        bf16_rounded=_count(r"\bF2FP\.BF16\.(?![\w.]*\bRZ\b)", sass),
    )


def _amd_facts(compiled: Any) -> Facts:
    asm = compiled.asm["amdgcn"]

    def of(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", asm)
        assert found, name
        return int(found[1])

    return Facts(
        registers=of("vgpr_count"),
        spills=any(map(of, ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"))),
        shared=compiled.metadata.shared,
        instructions=_count(r"(?m)^\t[svdbg]\w*_(?!nop\b)", asm),
        wide_loads=_count(r"\b(?:buffer|global)_load_dwordx4\b", asm),
        wide_stores=_count(r"\b(?:buffer|global)_store_dwordx4\b", asm),
        narrow_stores=_count(r"\b(?:buffer|global)_store_(?!dwordx4)\w+", asm),
        tensor_core=_count(r"\bv_mfma_\w+", asm),
        bf16_rounded=None,
    )


def _gamma_types(
    dtype: str, pointers: Sequence[str], integers: Sequence[str]
) -> dict[str, str | Sequence[str | None]]:
    return {
        "gamma0_ptr": f"*{dtype}",
        "gamma1_ptr": f"*{dtype}",
        **{f"{name}_ptr": "*fp32" for name in pointers},
        **dict.fromkeys(integers, "i32"),
    }


def step_build(
    target: str,
    config: gamma_step.Config,
    dtype: str = "fp32",
    states: int = 2,
    mode: str = "gradient",
    divisible: Sequence[str] = (),
    rounding: str = "nearest",
    matrices: int = 4,
    own: bool = False,
    both: bool = False,
) -> Build:
    """Γ's step. mode: "advance", "gradient", or "weight", which takes the weights' step as well.

    Each matrix enters one state, as an RGC's do, or both, as an LSTM's. own: each row reads its own number.
    """
    absent = {
        "advance": ["delta_ptr", "grad_ptr", "weight_ptrs", "lr_ptr"],
        "gradient": ["weight_ptrs", "lr_ptr"],
        "weight": ["grad_ptr"],
    }[mode]
    if states == 1:
        absent.append("gamma1_ptr")
    if rounding == "nearest":
        absent.append("rng_state_ptr")
    tile: dict[str, Any] = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "VECTOR": config.vector,
        "DIAGONAL": own,
    }
    integers = (
        "ROWS",
        "N",
        "M",
        "stride_phi_b",
        "stride_y_b",
        "stride_m_to",
        "stride_m_from",
        "stride_delta",
    )
    entered = [k * states // matrices for k in range(matrices)]
    tuples: dict[str, Sequence[str | None]] = {
        "phi_ptrs": [
            "*fp32" if both or nu == entered[k] else None for nu in range(states) for k in range(matrices)
        ],
        "y_ptrs": ["*fp32"] * matrices,
        "weight_ptrs": ["*fp32"] * matrices,
    }
    return Build(
        target,
        "rjepa_triton.kernels.gamma_step:_gamma_step_kernel",
        types={
            **_gamma_types(dtype, ("m", "delta", "grad", "lr"), integers),
            **tuples,
            "rng_state_ptr": "*i64",
        },
        constants={**dict.fromkeys(absent), **tile},
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def read_build(
    target: str,
    config: gamma_step.Config,
    dtype: str = "fp32",
    states: int = 2,
    divisible: Sequence[str] = (),
) -> Build:
    """What a credit reads from Γ, in the step's tiles."""
    absent = ["gamma1_ptr"] if states == 1 else []
    tile = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "VECTOR": config.vector}
    integers = ("ROWS", "K", "N", "M", "stride_credit")
    return Build(
        target,
        "rjepa_triton.kernels.gamma_read:_gamma_read_kernel",
        types=_gamma_types(dtype, ("credit", "grad"), integers),
        constants={**dict.fromkeys(absent), **tile},
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def chunk_build(
    target: str,
    config: gamma_chunk.Config,
    dtype: str = "fp32",
    states: int = 2,
    divisible: Sequence[str] = (),
    vector_u: int | None = None,
) -> Build:
    """Γ's chunk, with credit. vector_u: numbers of U in one access; 4, or 1 where Γ has 1, if None."""
    absent = ["gamma1_ptr"] if states == 1 else []
    tile = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "VECTOR": config.vector,
        "VECTOR_U": vector_u or (4 if config.vector > 1 else 1),
    }
    return Build(
        target,
        "rjepa_triton.kernels.gamma_chunk:_gamma_chunk_kernel",
        types=_gamma_types(dtype, ("whole", "u", "y", "credit", "grad"), "CBKNM"),
        constants={**dict.fromkeys(absent), **tile},
        divisible=divisible,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def scan_build(
    target: str,
    states: int,
    partials: Sequence[Sequence[int]] = (),
    *,
    steps: int = 64,
    units: int = 1024,
    multiprocessors: int = 132,
    carry: bool = True,
    vector: int = 4,
    divisible: Sequence[str] = (),
) -> list[Build]:
    """Credits of `steps` steps of `units` units, B·N: λ, or if there are partials, an output each instead.

    partials: the states that each output has partials of. One build, or where blocks of time are scanned side by
    side, their summary's and the scan's.
    """
    from ...kernels import reverse_scan

    count = sum(map(len, partials))
    written = len(partials) or states
    config = reverse_scan.pick_scan_config(
        steps, units, states, count, written, WARP[target], multiprocessors
    )
    tile = {"STATES": states, "BLOCK": config.block, "STAGES": config.stages, "VECTOR": vector}
    pointers = ("m", "delta", "carry", "product", "local", "credit", "passed")
    types: dict[str, str | Sequence[str | None]] = {
        **{f"{name}_ptr": "*fp32" for name in pointers},
        **dict.fromkeys(("T", "block_steps", "BN"), "i32"),
        "partial_ptrs": ["*fp32" if nu in of else None for of in partials for nu in range(states)],
        "output_ptrs": ["*fp32"] * len(partials),
    }
    absent = ["credit_ptr"] if partials else []
    if not carry:
        absent.append("carry_ptr")
    module, options = "rjepa_triton.kernels.reverse_scan", {"num_warps": 1}
    if config.steps == steps:
        absent += ["product_ptr", "local_ptr"]
    scan = Build(
        target, f"{module}:_reverse_scan_kernel", types, {**dict.fromkeys(absent), **tile}, divisible, options
    )
    if config.steps == steps:
        return [scan]
    return [Build(target, f"{module}:_block_summary_kernel", types, tile, divisible, options), scan]


def suffix_build(
    target: str, states: int, matrices: int, vector: int = 4, divisible: Sequence[str] = ()
) -> Build:
    """Suffix products, or if there are matrices, what they make of φ instead."""
    from ...kernels import reverse_scan

    config = reverse_scan.pick_config(matrices, WARP[target])
    return Build(
        target,
        "rjepa_triton.kernels.reverse_scan:_suffix_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("m", "phi", "suffix", "arriving", "whole")},
            **dict.fromkeys(["C", "BN", "N"], "i32"),
        },
        constants={
            **dict.fromkeys(["suffix_ptr"] if matrices else ["phi_ptr", "arriving_ptr"]),
            "STATES": states,
            "MATRICES": matrices,
            "BLOCK": config.block,
            "STAGES": config.stages,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_small_build(
    target: str, config: rgc_forward.SmallConfig, *, resets: bool = True, gates: bool = True
) -> Build:
    """All steps of an RGC whose weights are on chip."""
    absent = [name for name, given in (("resets_ptr", resets), ("gates_ptr", gates)) if not given]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_forward:_rgc_small_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("x", "weight", "states", "gates")},
            "resets_ptr": "*u8",
            **dict.fromkeys("TBN", "i32"),
        },
        constants={
            **dict.fromkeys(absent),
            "BLOCK": config.block,
            "LANES": WARP[target],
            "ALL_KEPT": config.all_kept,
        },
        options={"num_warps": config.num_warps},
    )


def rgc_persistent_build(
    target: str,
    config: rgc_persistent.Config,
    vector: int,
    *,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> Build:
    """All steps of an RGC whose weights lie on many multiprocessors."""
    from ...kernels import rgc_persistent

    return Build(
        target,
        "rjepa_triton.kernels.rgc_persistent:_rgc_persistent_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("x", "ss", "ms", "mm", "sm", "states", "gates")},
            "resets_ptr": "*u8",
            "arrived_ptr": "*i64",
            **dict.fromkeys(("T", "B", "N", "rows"), "i32"),
        },
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
            "UNITS": config.units,
            "CHUNKS": config.chunks,
            "LANES": config.lanes,
            "ROWS": config.tile_rows,
            "ARRIVALS": rgc_persistent.arrivals(config.num_warps, amd=target.startswith("gfx")),
            "COUNTER_STRIDE": rgc_persistent.COUNTER_STRIDE,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps, "launch_cooperative_grid": True},
    )


def rgc_step_build(
    target: str, config: rgc_step.Config, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """One step of an RGC and its linearisation."""
    absent = [] if resets else ["resets_ptr", "before_ptr"]
    arrays = ("u", "ss", "ms", "mm", "sm", "state", "before", "after", "partials")
    return Build(
        target,
        "rjepa_triton.kernels.rgc_step:_rgc_step_kernel",
        types={**{f"{name}_ptr": "*fp32" for name in arrays}, "resets_ptr": "*u8", "B": "i32", "N": "i32"},
        constants={
            **dict.fromkeys(absent),
            "UNITS": config.units,
            "COLUMNS": config.columns,
            "ROWS": config.rows,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def rgc_pointwise_build(
    target: str, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """What an RGC's step does beside its products."""
    from ...kernels import rgc_forward

    config = rgc_forward.pick_pointwise_config(512, WARP[target])
    strides = [f"stride_{name}" for name in ("gates", "before", "after", "next")]
    absent = [] if resets else ["resets_ptr", "next_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_forward:_rgc_pointwise_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("gates", "before", "u", "after", "next")},
            "resets_ptr": "*u8",
            **dict.fromkeys(["N", *strides], "i32"),
        },
        constants={**dict.fromkeys(absent), "BLOCK": config.block, "VECTOR": vector},
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_backward_build(
    target: str, vector: int, last: bool = False, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """What an RGC's step backward does beside its product. last: no step is after it."""
    from ...kernels import rgc_backward

    config = rgc_backward.pick_config(512, WARP[target])
    arrays = ("gates", "before", "delta", "credit", "entering", "passed")
    absent = [] if resets else ["resets_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_backward:_rgc_backward_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in (*arrays, "u")},
            "resets_ptr": "*u8",
            **dict.fromkeys(["N", *(f"stride_{name}" for name in arrays)], "i32"),
        },
        constants={**dict.fromkeys(absent), "LAST": last, "BLOCK": config.block, "VECTOR": vector},
        divisible=divisible,
        options={"num_warps": 1},
    )


_OWN = ("ss", "ms", "mm", "sm")
_PARTIALS_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in ("gates", "before", "u", *_OWN)},
    **dict.fromkeys(["T", "BN", "N", *(f"stride_{name}" for name in ("before", *_OWN))], "i32"),
}


def rgc_linearize_build(
    target: str, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """An RGC's partials and M from its gates."""
    from ...kernels import rgc_partials

    return Build(
        target,
        "rjepa_triton.kernels.rgc_partials:_linearize_kernel",
        types={**_PARTIALS_TYPES, "out_ptr": "*fp32", "resets_ptr": "*u8", "steps": "i32"},
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
            "BLOCK": rgc_partials.pick_config(1, 1, WARP[target], 1).block,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_dual_build(
    target: str,
    vector: int,
    *,
    steps: int = 64,
    units: int = 1024,
    multiprocessors: int = 132,
    resets: bool = True,
    carry: bool = True,
    divisible: Sequence[str] = (),
) -> list[Build]:
    """RFP's dual form of an RGC over `steps` steps of `units` units, B·N.

    One build, or where blocks of time are scanned side by side, their summary's and the scan's.
    """
    from ...kernels import rgc_partials

    config = rgc_partials.pick_dual_config(steps, units, WARP[target], multiprocessors)
    module, options = "rjepa_triton.kernels.rgc_partials", {"num_warps": 1}
    pointers = ("delta", "product", "local", "carry", "entering", "for_input", "passed")
    types = {
        **_PARTIALS_TYPES,
        **{f"{name}_ptr": "*fp32" for name in pointers},
        "resets_ptr": "*i32",
        "block_steps": "i32",
    }
    shared = {
        **dict.fromkeys([] if resets else ["resets_ptr"]),
        "BLOCK": config.block,
        "STAGES": config.stages,
        "VECTOR": vector,
    }
    absent = [] if carry else ["carry_ptr"]
    if config.steps == steps:
        absent += ["product_ptr", "local_ptr"]
    scan = Build(
        target, f"{module}:_dual_kernel", types, {**dict.fromkeys(absent), **shared}, divisible, options
    )
    if config.steps == steps:
        return [scan]
    return [Build(target, f"{module}:_dual_summary_kernel", types, shared, divisible, options), scan]


def rtrl_build(
    target: str,
    kernel: str,
    config: rtrl_step.Config,
    *,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> Build:
    """Exact RTRL's "jacobian" or "immediate" term of a dense RGC."""
    phi = ("phi_ss", "phi_ms", "phi_mm", "phi_sm")
    pointers, strides = {
        "jacobian": (("own_s", "own_m", *phi, "ss", "ms", "mm", "sm", "jacobian"), ("own_s", "own_m")),
        "immediate": (("gamma", *phi, "before"), ("before",)),
    }[kernel]
    return Build(
        target,
        f"rjepa_triton.kernels.rtrl_step:_rtrl_{kernel}_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in pointers},
            **({"resets_ptr": "*u8"} if kernel == "jacobian" else {}),
            **dict.fromkeys(["N", *(f"stride_{name}" for name in strides)], "i32"),
        },
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "VECTOR": config.vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def heads_build(
    target: str, config: rtrl_heads.Config, precision: str = "ieee", *, gradient: bool = True, states: int = 2
) -> Build:
    """Exact RTRL of heads, each reading its own units."""
    absent = [] if gradient else ["delta_ptr", "grad_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rtrl_heads:_rtrl_heads_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("gamma", "jacobian", "phi", "y", "delta", "grad")},
            **dict.fromkeys(("B", "H", "b", "K", "M", "stride_phi", "stride_delta"), "i32"),
        },
        constants={
            **dict.fromkeys(absent),
            "S": states,
            "PER_HEAD": True,
            "PRECISION": precision,
            "BLOCK_R": config.block_r,
            "BLOCK_P": config.block_p,
            "BLOCK_K": config.block_k,
            "VECTOR": config.vector,
            "VECTOR_J": config.vector_j,
        },
        options={
            "num_warps": config.num_warps,
            "num_stages": 1,
            **({} if target.startswith("gfx") else {"maxnreg": config.registers}),
        },
    )


if __name__ == "__main__":
    wanted = [Build(**build) for build in json.load(sys.stdin)]
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(_compile, wanted))
    print(json.dumps([f if isinstance(f, str) else dataclasses.asdict(f) for f in found]))
