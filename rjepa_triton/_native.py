"""Code compiled for the CPU: `native/`, built on first use and called through ctypes.

Torch goes over Γ several times a step, and a step of a loop over time is a few of its calls, which cost microseconds
each whatever they work on; here Γ's step is one pass, and a whole loop one call. The library is built for this
processor by the C++ compiler that torch.compile would use, in some seconds, and kept in the user's cache directory
($XDG_CACHE_HOME, or ~/.cache) under a name that tells source, flags, compiler and processor. ctypes releases the GIL
while compiled code runs.
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

from ._room import Room

SOURCES = Path(__file__).with_name("native")
# None of these lets a value be anything else than C says, as -ffast-math would; a product and a sum may be one FMA.
FLAGS = (
    *("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wno-psabi", "-shared", "-fPIC"),  # vectors are passed within a file alone
)
THREADS = (
    "-fopenmp",
    "-fopenmp-simd",
)  # the first that the compiler takes; by the second there is one thread
PANEL = 32  # as in loops.c
PACKED_FROM = 16  # rows of all steps that pay for laying out weights anew
MOST_STATES = 2  # a unit, of Γ's pass
SECONDS = 60  # that a compiler may take


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None, with one warning that says why, where it can't be built or loaded."""
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
            f"code for the CPU can't be built by {found} or loaded, torch runs in its place from now on: {cause}",
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
    code = library()
    if code is None:
        return None
    steps, batch, units = x.shape
    states = x.new_empty(2, steps + 1, batch, units)
    gates = x.new_empty(2, steps, batch, 2, units)
    kept = None if resets is None else x.new_empty(2 * batch * units)
    packed = None
    if steps * batch >= PACKED_FROM:
        packed = x.new_empty(2 * -(-2 * units // PANEL) * PANEL * units)
    x, given = x.contiguous(), [a.contiguous() for a in (*weights, *state)]
    marks = None if resets is None else resets.contiguous()
    code.rgc_scan(
        x.data_ptr(),
        *[a.data_ptr() for a in given],
        None if marks is None else marks.data_ptr(),
        states.data_ptr(),
        gates.data_ptr(),
        None if kept is None else kept.data_ptr(),
        None if packed is None else packed.data_ptr(),
        steps,
        batch,
        units,
        torch.get_num_threads(),
    )
    return states, gates


def rgc_linearize(
    gates: Tensor, before: Tensor, x: Tensor, diagonals: Sequence[Tensor], resets: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """The partials of an RGC that aren't its gates, and RFP's M, of T steps, in one pass.

    gates (2, T, B, 2, N) as `RGCCell.scan` has them; before (2, T, B, N), x (T, B, N); diagonals of ss, ms, mm and sm,
    (N,) each; resets (T, B) bool or None; float32, on the CPU. Returns φ of ss, ms, mm, sm, ∂s/∂x and ∂m/∂x, (T, B, N)
    each, and M (2, 2, T, B, N), zero where reset; None where there is no library. Nothing is mutated.
    """
    code = library()
    if code is None:
        return None
    steps, batch, units = x.shape
    gates, x = gates.contiguous(), x.contiguous()
    if not before[0].is_contiguous():
        before = before.contiguous()
    marks = None if resets is None else resets.contiguous()
    out = x.new_empty(10, steps, batch, units)
    code.rgc_linearize(
        gates.data_ptr(),
        before.data_ptr(),
        x.data_ptr(),
        None if marks is None else marks.data_ptr(),
        (ctypes.c_void_p * 4)(*[diagonal.data_ptr() for diagonal in diagonals]),
        out.data_ptr(),
        (ctypes.c_long * 4)(*[diagonal.stride(0) for diagonal in diagonals]),
        before.stride(0),
        steps,
        batch,
        units,
        torch.get_num_threads(),
    )
    return out.unbind(0)[:6], out[6:].view(2, 2, steps, batch, units)


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """`rfp.reverse_scan`: m (S, S, T, B, N), delta (S, T, B, N), carry (S, B, N) or None; float32, on the CPU.

    Returns λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N); None where there is no library. Nothing is mutated.
    """
    code = library()
    if code is None:
        return None
    count, steps, batch, units = delta.shape
    m, delta = m.contiguous(), delta.contiguous()
    carry = None if carry is None else carry.contiguous()
    credit, first = torch.empty_like(delta), delta.new_empty(count, batch, units)
    code.reverse_scan(
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


def gamma_pass(
    gammas: Sequence[Tensor],
    m: Tensor | None,
    entering: Tensor | None,
    y: Tensor | None,
    credit: Tensor | None = None,
    *,
    before: bool = False,
    room: Room | None = None,
) -> tuple[Tensor | None] | None:
    """Γ ← M Γ + Σ_t U(t) y(t)ᵀ, and Σ_{b,ν} credit ⊙_rows Γ (K, N, M), in one pass over Γ, by torch's threads.

    gammas: S ≤ `MOST_STATES` of (B, K, N, M), contiguous; m (S, S, B, N), or None where Γ is only read; entering
    (S, C, B, K, N), y (C, B, K, Y), Y as in `rfp.rows_read`; credit (S, B, N) or None. All on the CPU, of one dtype,
    float32 or float64. before: Γ is read before it moves. room: of the gradient.

    Returns a tuple of the gradient, None without credit; None, and nothing is done, where there is no library. Mutates
    gammas, where m is given.
    """
    code = library()
    if code is None:
        return None
    first = gammas[0]
    batch, matrices, units, fan_in = first.shape
    shape = matrices, units, fan_in
    total = None
    if credit is not None:
        total = first.new_empty(shape) if room is None else room.empty(shape, first)
    given = [None if a is None else a.contiguous() for a in (m, entering, y, credit)]
    code.gamma_pass(
        (ctypes.c_void_p * len(gammas))(*[gamma.data_ptr() for gamma in gammas]),
        *[None if a is None else a.data_ptr() for a in (*given, total)],
        len(gammas),
        1 if y is None else len(y),
        batch,
        *shape,
        fan_in if y is None else y.shape[-1],
        before,
        first.element_size(),
        torch.get_num_threads(),
    )
    return (total,)


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor] | None:
    """`rfp.arriving` and R(0) of `rfp.suffix_products`: m (S, S, C, B, N), phi (S, C, B, K, N), S ≤ `MOST_STATES`.

    Returns U (S, C, B, K, N) and M(C) … M(1) (S, S, B, N); None where there is no library. Of one dtype, float32 or
    float64, on the CPU. Nothing is mutated.
    """
    code = library()
    if code is None:
        return None
    states, steps, batch, matrices, units = phi.shape
    m, phi = m.contiguous(), phi.contiguous()
    arrived, whole = torch.empty_like(phi), m.new_empty(states, states, batch, units)
    arrays = [a.data_ptr() for a in (m, phi, arrived, whole)]
    code.gamma_arriving(*arrays, states, steps, batch, matrices, units, m.element_size())
    return arrived, whole


def tanh_(values: Tensor) -> bool:
    """The loops' tanh of contiguous float32 numbers on the CPU, in place; whether there is a library."""
    code = library()
    if code is not None:
        code.tanh_all(values.data_ptr(), values.numel())
    return code is not None


def _declared(code: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_long
    for function, pointers, counts in (
        (code.rgc_scan, 12, 4),
        (code.rgc_linearize, 7, 5),
        (code.reverse_scan, 5, 3),
        (code.gamma_pass, 6, 10),
        (code.gamma_arriving, 4, 6),
        (code.tanh_all, 1, 1),
    ):
        function.argtypes, function.restype = [pointer] * pointers + [count] * counts, None
    return code


def _built(found: str) -> ctypes.CDLL:
    """The library from the cache, or compiled into it; where nothing can be written there, into a folder of its own.

    Raises OSError or SubprocessError.
    """
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    sources = [SOURCES / "loops.c", SOURCES / "gamma.cpp"]
    version = subprocess.run(
        [found, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    texts = [source.read_text() for source in sources]
    told = "\0".join((*texts, *flags, found, version, _processor()))
    target = _cache() / f"native-{hashlib.sha256(told.encode()).hexdigest()[:32]}.so"
    if target.exists():
        return ctypes.CDLL(str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = target.parent if os.access(target.parent, os.W_OK) else None
    except OSError:
        parent = None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        made = Path(folder) / target.name
        c, cpp = map(str, sources)
        files = (
            "-o",
            str(made),
            "-x",
            "c",
            c,
            "-x",
            "c++",
            "-std=c++17",
            "-fno-exceptions",
            "-fno-rtti",
            cpp,
        )
        for threads in THREADS:
            command = [found, *flags, threads, *files]
            tried = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if not tried.returncode:
                break
        tried.check_returncode()
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
