"""Loops over time compiled for the CPU: `loops.c`, built on first use and called through ctypes.

Where a layer is small, a step of a loop in torch is a few calls that cost microseconds each whatever they work on; here
a whole loop is one. The library is built for this processor by the C++ compiler that torch.compile would use, in well
under a second, and kept in the user's cache directory ($XDG_CACHE_HOME, or ~/.cache) under a name that tells source,
flags, compiler and processor. ctypes releases the GIL while a loop runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("loops.c")
# None of these lets a value be anything else than C says, as -ffast-math would; a product and a sum may be one FMA.
FLAGS = (
    *("-x", "c", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wno-psabi", "-shared", "-fPIC"),  # vectors are passed within the file alone
)
PANEL = 32  # as in loops.c
SECONDS = 60  # that a compiler may take


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops, or None, with one warning that says why, where they can't be built or loaded."""
    found = compiler()
    if found is None:
        return None
    try:
        return _declared(_built(found))
    except (
        OSError,
        subprocess.SubprocessError,
        AttributeError,
        RuntimeError,
    ) as error:  # the last: no home directory
        cause = getattr(error, "stderr", None) or error
        warnings.warn(
            f"loops for the CPU can't be built by {found} or loaded, torch runs in their place from now on: {cause}",
            stacklevel=2,
        )
        return None


def rgc_scan(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The loop of an RGC with dense weights: `RGCCell.scan`'s states (2, T + 1, B, N) and gates (2, T, B, 2, N).

    x (T, B, N), weights ss, ms, mm, sm (N, N), state two of (B, N), resets (T, B) bool or None; float32, on the CPU.
    Nothing is mutated. None where there is no library.
    """
    loops = library()
    if loops is None:
        return None
    steps, batch, units = x.shape
    states = x.new_empty(2, steps + 1, batch, units)
    states[0, 0], states[1, 0] = state
    gates = x.new_empty(2, steps, batch, 2, units)
    packed = -(-2 * units // PANEL) * PANEL * units
    scratch = x.new_empty(2 * packed + (0 if resets is None else 2 * batch * units))
    x, dense = x.contiguous(), [weight.contiguous() for weight in weights]
    marks = None if resets is None else resets.contiguous()
    loops.rgc_scan(
        x.data_ptr(),
        *[weight.data_ptr() for weight in dense],
        None if marks is None else marks.data_ptr(),
        states.data_ptr(),
        gates.data_ptr(),
        scratch.data_ptr(),
        steps,
        batch,
        units,
    )
    return states, gates


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """`rfp.reverse_scan`: m (S, S, T, B, N), delta (S, T, B, N), carry (S, B, N) or None; float32, on the CPU.

    Returns λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N); None where there is no library. Nothing is mutated.
    """
    loops = library()
    if loops is None:
        return None
    count, steps, batch, units = delta.shape
    m, delta = m.contiguous(), delta.contiguous()
    carry = None if carry is None else carry.contiguous()
    credit, first = torch.empty_like(delta), delta.new_empty(count, batch, units)
    loops.reverse_scan(
        m.data_ptr(),
        delta.data_ptr(),
        None if carry is None else carry.data_ptr(),
        credit.data_ptr(),
        first.data_ptr(),
        count,
        steps,
        batch * units,
    )
    return credit, first


def tanh_(values: Tensor) -> bool:
    """The loops' tanh of contiguous float32 numbers on the CPU, in place; whether there is a library."""
    loops = library()
    if loops is not None:
        loops.tanh_all(values.data_ptr(), values.numel())
    return loops is not None


def _declared(loops: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_long
    for function, pointers, counts in (
        (loops.rgc_scan, 9, 3),
        (loops.reverse_scan, 5, 3),
        (loops.tanh_all, 1, 1),
    ):
        function.argtypes, function.restype = [pointer] * pointers + [count] * counts, None
    return loops


def _built(found: str) -> ctypes.CDLL:
    """The library from the cache, or compiled into it; where nothing can be written there, into a folder of its own.

    Raises OSError or SubprocessError.
    """
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = (*FLAGS, native)
    version = subprocess.run(
        [found, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    told = "\0".join((SOURCE.read_text(), *flags, found, version, _processor()))
    target = _cache() / f"loops-{hashlib.sha256(told.encode()).hexdigest()[:32]}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = target.parent if os.access(target.parent, os.W_OK) else None
    except OSError:
        parent = None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [found, *flags, "-o", str(made), str(SOURCE)],
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS,
        )
        loaded = ctypes.CDLL(str(made))
        # only now, so that no process ever finds half a file, or one that can't be loaded
        if parent is not None:
            os.replace(made, target)
        return loaded


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "rjepa_triton"


def _processor() -> str:
    """What a library that is compiled for this processor may not be run without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    found = [next((line for line in lines if line.startswith(kind)), "") for kind in kinds]
    return "\n".join((platform.machine(), platform.processor(), *found))
