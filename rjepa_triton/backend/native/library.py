"""The compiled library: built on first use by a C++ compiler, kept in the user's cache, loaded through ctypes.

It is built for this processor by the C++ compiler that torch.compile would use, which takes some seconds, and kept as
`native-KEY-SHA256.so` in $XDG_CACHE_HOME/rjepa_triton, or in ~/.cache/rjepa_triton if that variable isn't an absolute
path. KEY is the hash of what the library depends on: source, flags, compiler, the macros that the compiler defines
for this processor, and the C and OpenMP libraries. SHA256 is the hash of the file's content.

The folder is the user's own and closed to others (0700). A file in it is loaded only if it is a regular file of the
user that no one else may write, with the content that its name tells; another one is removed, and the library is built
anew. Of several processes that need it at once, one builds it and the others wait. Where nothing can be kept, each
process builds a library of its own, after one warning that says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from ..._files import read_text, sync

try:
    import fcntl
except ImportError:  # Windows, where builders don't wait for each other
    fcntl = None  # type: ignore[assignment]

SOURCES = Path(__file__).parent
# No flag changes values beyond what C++ allows, as -ffast-math would; a product and a sum may become one FMA.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti"),
    *("-Wno-psabi", "-shared", "-fPIC"),  # vectors are passed within a file alone
)
# The first that the compiler takes, and whose library can be loaded, is used; with the second the code runs on one
# thread.
THREADS = ("-fopenmp", "-fopenmp-simd")
# The compiler's time limit: it takes some 5 s alone, and minutes on a machine with much else to do.
SECONDS = 300
ROOM = (
    1 << 22
)  # bytes that must be free to build: the library takes a tenth, the compiler's own files some more
HELD = "lock"  # the file that a builder holds while it builds
BUILD = "build-"  # the folders of builds, one each


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


@functools.cache
def tell_of_no_compiler() -> None:
    """Warn, once a process, that there is no compiler."""
    warnings.warn(
        "no C++ compiler (g++, clang++ or c++) was found: torch runs on the CPU in place of compiled code, with the "
        "same results and slower",
        stacklevel=2,
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None without a compiler, and, with one warning that says why, where building or loading fails."""
    found = compiler()
    if found is None:
        return None
    try:
        return _declared(_found_or_built(found))
    except (OSError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        cause = getattr(error, "stderr", None) or error
        warnings.warn(
            f"code for the CPU can't be built by {found} or loaded, torch runs in its place from now on: {cause}",
            stacklevel=2,
        )
        return None


# The library, which must be there: `library()` has been asked before. The same function, so that a call costs no more.
loaded = cast(Callable[[], ctypes.CDLL], library)


def _declared(code: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_long
    for function, pointers, counts in (
        (code.reverse_scan_float, 5, 3),
        (code.reverse_scan_double, 5, 3),
        (code.exact_credits_float, 12, 5),
        (code.exact_credits_double, 12, 5),
        (code.activate_float, 1, 2),
        (code.activate_double, 1, 2),
    ):
        function.argtypes, function.restype = [pointer] * pointers + [count] * counts, None
    code.not_finite.argtypes, code.not_finite.restype = [pointer] * 2 + [count] * 3, count
    return _gamma_declared(code)


def _gamma_declared(code: ctypes.CDLL) -> ctypes.CDLL:
    pointer, count = ctypes.c_void_p, ctypes.c_long
    code.gamma_arriving.argtypes, code.gamma_arriving.restype = [pointer] * 4 + [count] * 8, None
    for function in (code.gamma_pass_float, code.gamma_pass_double):
        function.argtypes, function.restype = [pointer] * 2 + [ctypes.c_double], None
    return code


@functools.cache
def gamma(states: int) -> ctypes.CDLL | None:
    """The library with gamma.cpp for S = `states`: `library()` up to 2, else one of its own, built at first use.

    Few cells have more than two states, and the others shouldn't wait for theirs.
    """
    if states <= 2:
        return library()
    code = generated(f"#define STATES {states}\n{read_text(SOURCES / 'gamma.cpp')}")
    return None if code is None else _gamma_declared(code)


@functools.cache
def generated(text: str) -> ctypes.CDLL | None:
    """A library from C++ that includes headers of this folder, such as one cell's loops; else as `library`."""
    found = compiler()
    if found is None:
        return None
    try:
        return _found_or_built(found, text)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        cause = getattr(error, "stderr", None) or error
        warnings.warn(
            f"the compiled code of a cell can't be built by {found} or loaded, torch runs in its place: {cause}",
            stacklevel=2,
        )
        return None


def _found_or_built(found: str, text: str | None = None) -> ctypes.CDLL:
    """The library from the cache, or compiled into it; where nothing can be kept there, into a folder of its own.

    Raises OSError, ValueError or SubprocessError.
    """
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native")
    sources, headers = sorted(SOURCES.glob("*.cpp")) if text is None else [], sorted(SOURCES.glob("*.h"))
    texts = [text or "", *(read_text(source) for source in (*sources, *headers))]
    told = "\0".join((*texts, *flags, found, *_machine(found, flags)))
    key = hashlib.sha256(told.encode()).hexdigest()[:32]
    try:
        folder = _cache()
        code = _kept(folder, key)
        if code is not None:
            return code
        with _alone(folder):
            code = _kept(folder, key)  # another process may have built it
            if code is not None:
                return code
            _remove_leftovers(folder)
            _check_room(folder)
            return _built(found, flags, text or sources, folder, key)
    except _NotKept as reason:
        warnings.warn(
            f"the compiled code for the CPU can't be kept, so each process compiles it anew: {reason}",
            stacklevel=3,
        )
        return _built(found, flags, text or sources, None, key)


class _NotKept(Exception):
    """Why nothing can be kept in the cache."""


def _built(
    found: str, flags: Sequence[str], sources: Sequence[Path] | str, cache: Path | None, key: str
) -> ctypes.CDLL:
    """The library, compiled from files or from a text, and kept in the folder `cache` if there is one.

    Raises OSError or SubprocessError if it can't be compiled or loaded, and _NotKept if it can't be moved into `cache`.
    """
    from ... import _processes  # here: only a machine that compiles needs it

    with tempfile.TemporaryDirectory(prefix=BUILD, dir=cache) as folder:
        made = Path(folder) / f"native-{key}.so"
        if isinstance(sources, str):
            (written := Path(folder) / "cell.cpp").write_text(sources, encoding="utf-8")
            sources = [written]
        for threads in THREADS:
            command = [found, *flags, threads, f"-I{SOURCES}", "-o", str(made), *map(str, sources)]
            # the compiler's own files lie there too, and are removed with it
            done = _processes.run(command, timeout=SECONDS, env={**os.environ, "TMPDIR": folder})
            try:
                done.check_returncode()
                code = ctypes.CDLL(str(made))
                break
            except (OSError, subprocess.SubprocessError):
                if threads == THREADS[-1]:
                    raise
        # only now, whole and on the disk, so that no process ever finds half a file, or one that can't be loaded
        if cache is not None:
            try:
                made.chmod(0o600)
                sync(made)
                os.replace(made, cache / f"native-{key}-{hashlib.sha256(made.read_bytes()).hexdigest()}.so")
                with contextlib.suppress(OSError):  # some file systems can't sync a folder
                    sync(cache)
            except OSError as error:
                raise _NotKept(error) from error
        return code


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library that the folder has for a key. Files of that key that are not to be trusted are removed."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        if _is_whole(path):
            with contextlib.suppress(
                OSError
            ):  # as without an OpenMP library that was there when it was built
                return ctypes.CDLL(str(path))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file is a regular one of this user, which no one else may write, with the content its name tells."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as opened:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or not _is_own(about):
                return False
            return hashlib.sha256(opened.read()).hexdigest() == path.stem.rpartition("-")[2]
    except OSError:
        return False


def _is_own(about: os.stat_result) -> bool:
    """Whether this user owns a file that no one else may write."""
    return os.name != "posix" or (about.st_uid == os.geteuid() and not about.st_mode & 0o022)


def _cache() -> Path:
    """The folder of the library, which is made if need be and closed to others. Raises _NotKept."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        parent = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:
        raise _NotKept(error) from error
    folder = parent / "rjepa_triton"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode):
            raise _NotKept(f"{folder} is not a folder, or a link to one")
        if os.name == "posix" and about.st_uid != os.geteuid():
            raise _NotKept(f"{folder} belongs to another user (number {about.st_uid})")
        if os.name == "posix" and stat.S_IMODE(about.st_mode) != 0o700:
            folder.chmod(0o700)  # as version 0.1 left it; what others put there is not loaded
    except OSError as error:
        raise _NotKept(error) from error
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process builds in the folder, for `SECONDS` at most. Raises _NotKept."""
    try:
        descriptor = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise _NotKept(error) from error
    try:
        until = time.monotonic() + SECONDS
        while not _holds(descriptor):
            if time.monotonic() > until:
                raise _NotKept(f"another process has held {folder / HELD} for {SECONDS} s")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _holds(descriptor: int) -> bool:
    """Whether this process now holds the open file, or files can't be held here."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (
        OSError
    ):  # a file system without locks: two may build at once, and the later one replaces the earlier's
        return True
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of builds that were killed, by the process that alone may build."""
    for left in folder.glob(f"{BUILD}*"):
        shutil.rmtree(left, ignore_errors=True)


def _check_room(folder: Path) -> None:
    """Raise _NotKept unless a build's files can be written to the folder."""
    try:
        with tempfile.TemporaryFile(prefix=BUILD, dir=folder) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _NotKept(error) from error


@functools.cache
def _machine(found: str, flags: tuple[str, ...]) -> list[str]:
    """What a library that is compiled here may not be run without: the compiler's own answer, and its libraries'.

    Raises OSError or SubprocessError.
    """

    from ... import _processes

    def answer(*options: str) -> str:
        done = _processes.run([found, *options], timeout=SECONDS, env={**os.environ, "LC_ALL": "C"})
        done.check_returncode()
        return done.stdout

    threads = [Path(answer(f"-print-file-name={name}").strip()) for name in ("libgomp.so.1", "libomp.so")]
    libraries = [hashlib.sha256(path.read_bytes()).hexdigest() for path in threads if path.is_file()]
    # of the processor, the macros say which instructions -march=native takes, and __VERSION__ is the compiler's
    return [answer("--version"), answer(*flags, "-dM", "-E", "-x", "c++", "-"), *libraries, _c_library()]


def _c_library() -> str:
    """The C library and its version, such as "glibc 2.36"."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # not a GNU system
        return " ".join(platform.libc_ver())
