"""The compiled library: built on first use by a C++ compiler, kept in the user's cache, loaded through ctypes.

It is built for this processor by the C++ compiler that torch.compile would use, which takes some seconds, and kept in
the user's cache directory ($XDG_CACHE_HOME, or ~/.cache) under a name made of source, flags, compiler and processor.
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
from pathlib import Path

SOURCES = Path(__file__).parent
# No flag changes values beyond what C++ allows, as -ffast-math would; a product and a sum may become one FMA.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti"),
    *("-Wno-psabi", "-shared", "-fPIC"),  # vectors are passed within a file alone
)
# The first that the compiler takes is used; with the second the code runs on one thread.
THREADS = ("-fopenmp", "-fopenmp-simd")
SECONDS = (
    300  # the compiler's time limit: it takes some 5 s alone, and minutes on a machine with much else to do
)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None without a compiler, and, with one warning that says why, where building or loading fails."""
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


def loaded() -> ctypes.CDLL:
    """The library, which must be there: `library()` has been asked before."""
    code = library()
    assert code is not None
    return code


def _declared(code: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_long
    for function, pointers, counts in (
        (code.rgc_scan, 12, 4),
        (code.rgc_linearize, 7, 5),
        (code.dual_pass, 9, 6),
        (code.reverse_scan, 5, 3),
        (code.exact_credits, 12, 5),
        (code.gamma_arriving, 4, 6),
        (code.activate, 1, 2),
        (code.gated_scan, 9, 6),
        (code.gated_linearize, 8, 7),
    ):
        function.argtypes, function.restype = [pointer] * pointers + [count] * counts, None
    code.gamma_pass.argtypes, code.gamma_pass.restype = [pointer] * 8 + [ctypes.c_double] + [count] * 10, None
    return code


def _built(found: str) -> ctypes.CDLL:
    """The library from the cache, or compiled into it; where nothing can be written there, into a folder of its own.

    Raises OSError or SubprocessError.
    """
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    sources, headers = sorted(SOURCES.glob("*.cpp")), sorted(SOURCES.glob("*.h"))
    version = subprocess.run(
        [found, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    texts = [source.read_text() for source in (*sources, *headers)]
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
        files = ("-o", str(made), *map(str, sources))
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
