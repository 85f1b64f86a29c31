"""Compile Triton kernels for GPUs that aren't there, and read from the machine code what the compiler made of them.

A kernel is only compiled in a process that imports triton without TRITON_INTERPRET. `compile_all` starts one, which
runs this module as a program: it reads `Build`s and writes `Facts`, both as JSON. What this package's own launchers
would have compiled is in `builds`.
"""

from __future__ import annotations

import bisect
import dataclasses
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import _processes

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WARP = {target: size for target, (_, _, size) in TARGETS.items()}
# The most bytes of shared memory that one program may ask for.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Tensor-core instructions: a warp's on sm_80, a warp group's on sm_90, tcgen05's on sm_100.
TENSOR_CORE = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Build:
    """A kernel for one target, at one set of argument types, constants and options.

    kernel     "module:name"
    types      argument → Triton type ("*fp32", "i32", …) for every argument that isn't a constant; for a tuple the
               types of its items, None for a pointer that isn't given
    constants  argument → compile-time value, None for a pointer that isn't given; for a function of a cell the names
               of the cell's class and of the function
    divisible  names of the integer arguments that a launch would find to be multiples of 16; pointers always are
    options    options of the compiler, such as num_warps
    """

    target: str
    kernel: str
    types: Mapping[str, str | Sequence[str | None]]
    constants: dict[str, Any]
    divisible: Sequence[str] = ()
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the machine code says of a kernel.

    registers, spills, shared   registers a thread, whether any are spilled, bytes of shared memory
    scratch                     bytes of memory a thread for what is spilled; 0 where AMD's scalar registers are spilled
                                to lanes of vector registers
    instructions                in the code, each counted once however often it runs, without no-operations
    wide_…, narrow_…            global memory accesses of 128 bits, and of fewer
    tensor_core                 tensor-core instructions
    bf16_rounded                packed conversions to bfloat16 that round to nearest; None where they can't be told
    """

    registers: int
    spills: bool
    scratch: int
    shared: int
    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    tensor_core: int
    bf16_rounded: int | None


def cuobjdump() -> Path | None:
    """The disassembler that comes with triton; None if this triton has none."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def compile_all(builds: Sequence[Build]) -> list[Facts | str]:
    """The facts of each build, or the message of what its compilation raised. Uses one process a core.

    Raises RuntimeError with its stderr if the compiling process itself fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = _processes.run(
        [sys.executable, "-m", "rjepa_triton.bench.kernels.static"],
        input=json.dumps([dataclasses.asdict(build) for build in builds]),
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"the compiling process failed:\n{done.stderr}")
    results = json.loads(done.stdout.splitlines()[-1])
    return [result if isinstance(result, str) else Facts(**result) for result in results]


def constant_of(value: Any) -> Any:
    """A constant as a kernel takes it: JSON knows no tuple and no function."""
    if isinstance(value, dict):
        from ...backend import triton_cells
        from ...cells import builtin

        made = triton_cells.kernels_of(getattr(builtin, value["cell"])())
        assert made is not None
        return getattr(made.functions, value["function"])
    return tuple(map(constant_of, value)) if isinstance(value, list | tuple) else value


def _compile(build: Build) -> Facts | _Code | str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {name: constant_of(value) for name, value in build.constants.items()}
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
    except Exception as error:  # any error is this build's alone; the others go on
        return f"{type(error).__name__}: {error}"
    return _amd_facts(compiled) if build.target.startswith("gfx") else _nvidia_code(compiled)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@dataclass(frozen=True)
class _Code:
    """A kernel's instructions for an NVIDIA GPU, as numbers, and what is known of it before they are read.

    architecture: as the assembler was told, such as "sm_90a".
    """

    architecture: str
    instructions: bytes
    registers: int
    stack: int
    shared: int


def _nvidia_code(compiled: Any) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    architecture = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert architecture, compiled.asm["ptx"][:200]
    return _Code(
        architecture=architecture[1],
        instructions=_instructions(compiled.asm["cubin"]),
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
    )


def _instructions(cubin: bytes) -> bytes:
    """The contents of the sections `.text.*` of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    names = headers[of_names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names + name)
    )


def _nvidia_facts(target: str, codes: Sequence[_Code]) -> list[Facts]:
    """Facts of kernels for one target, read by one process: it takes longer to start than to read a kernel."""
    program, architecture = cuobjdump(), codes[0].architecture.replace("sm_", "SM")
    assert program is not None
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code.instructions for code in codes))
        file.flush()
        command = [str(program.with_name("nvdisasm")), "--no-dataflow", "--binary", architecture, file.name]
        lines = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.splitlines()
    ends = list(itertools.accumulate(len(code.instructions) for code in codes))
    texts: list[list[str]] = [[] for _ in codes]
    for line in lines:
        if place := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            texts[bisect.bisect_right(ends, int(place[1], 16))].append(line)
    assert all(texts), f"no instructions of {texts.count([])} kernels"
    return [_facts_of_code(target, code, "\n".join(text)) for code, text in zip(codes, texts, strict=True)]


def _facts_of_code(target: str, code: _Code, sass: str) -> Facts:
    return Facts(
        registers=code.registers,
        spills=code.stack > 0 or _count(r"\b(?:LDL|STL)\b", sass) > 0,
        scratch=code.stack,
        shared=code.shared,
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
        scratch=of("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        instructions=_count(r"(?m)^\t[svdbg]\w*_(?!nop\b)", asm),
        wide_loads=_count(r"\b(?:buffer|global)_load_dwordx4\b", asm),
        wide_stores=_count(r"\b(?:buffer|global)_store_dwordx4\b", asm),
        narrow_stores=_count(r"\b(?:buffer|global)_store_(?!dwordx4)\w+", asm),
        tensor_core=_count(r"\bv_mfma_\w+", asm),
        bf16_rounded=None,
    )


if __name__ == "__main__":
    wanted = [Build(**build) for build in json.load(sys.stdin)]
    with ProcessPoolExecutor(initializer=_processes.die_with, initargs=(os.getpid(),)) as pool:
        found = list(pool.map(_compile, wanted))
        codes: dict[str, dict[int, _Code]] = {}
        for place, result in enumerate(found):
            if isinstance(result, _Code):
                codes.setdefault(wanted[place].target, {})[place] = result
        read = pool.map(_nvidia_facts, codes, [list(those.values()) for those in codes.values()])
        for those, facts in zip(codes.values(), read, strict=True):
            for place, fact in zip(those, facts, strict=True):
                found[place] = fact
    print(json.dumps([f if isinstance(f, str) else dataclasses.asdict(f) for f in found]))
