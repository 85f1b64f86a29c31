"""The compiled library: built once, kept where no one else can write, found whole or built anew, and done without."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rjepa_triton import RGC, _processes
from rjepa_triton.backend import native_backend, operations
from rjepa_triton.backend.native import generated, library
from rjepa_triton.cells.builtin import RGCCell

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX"),
]

FUNCTIONS = (
    *(
        f"{name}_{real}"
        for name in ("reverse_scan", "exact_credits", "activate", "gamma_pass")
        for real in ("float", "double")
    ),
    *("gamma_arriving", "not_finite"),
)
PACKAGE = Path(library.__file__).parents[2]
# What a process runs to import the library's module alone: torch takes seconds.
ALONE = f"""
import importlib, sys, types, warnings
from pathlib import Path
for name in ("", "/backend", "/backend/native"):
    made = types.ModuleType("rjepa_triton" + name.replace("/", "."))
    made.__path__ = [{str(PACKAGE)!r} + name]
    sys.modules[made.__name__] = made
library = importlib.import_module("rjepa_triton.backend.native.library")
_processes = importlib.import_module("rjepa_triton._processes")
library.SOURCES = Path(sys.argv[1])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a library of functions that do nothing, which is looked for anew, now and after the test."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "all.cpp").write_text("".join(f'extern "C" void {name}() {{}}\n' for name in FUNCTIONS))
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    library.gamma.cache_clear()
    yield tmp_path / "cache" / "rjepa_triton"
    library.library.cache_clear()
    library.gamma.cache_clear()


def found_again() -> object:
    library.library.cache_clear()
    library.gamma.cache_clear()
    return library.library()


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def builds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's builds from now on."""
    run, commands = _processes.run, []

    def noted(command: list[str], **options: object) -> object:
        if "-o" in command:
            commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(_processes, "run", noted)
    return commands


def test_a_library_is_kept_closed_to_others_and_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = builds(monkeypatch)
    umask = os.umask(0)
    try:
        assert library.library() is not None
    finally:
        os.umask(umask)
    (file,) = kept(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in cache.iterdir()) == ["lock", file.name]
    assert found_again() is not None
    assert len(made) == 1


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_of_version_0_1_is_closed(cache: Path, umask: int) -> None:
    cache.parent.mkdir()
    cache.mkdir()
    cache.chmod(0o777 & ~umask)
    assert library.library() is not None
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never loaded: a library that is cut short kills the process that runs it."""
    library.library()
    (file,) = kept(cache)
    whole = file.read_bytes()
    file.unlink()  # this process may have it mapped
    file.write_bytes(DAMAGES[damage](whole))
    file.chmod(0o600)
    made = builds(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found_again() is not None
        assert found_again() is not None
    assert len(made) == 1
    (again,) = kept(cache)
    assert library._is_whole(again)


@pytest.mark.parametrize(
    "how", ["writable by others", "writable by the group", "a link", "a folder", "another owner's"]
)
def test_a_library_that_others_may_have_put_there_is_not_loaded(
    cache: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library.library()
    (file,) = kept(cache)
    if how.startswith("writable"):
        file.chmod(0o602 if how.endswith("others") else 0o620)
    elif how == "a link":
        file.rename(tmp_path / "planted.so")
        file.symlink_to(tmp_path / "planted.so")
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        pytest.skip("only root gives files away")
    made = builds(monkeypatch)
    assert found_again() is not None
    assert len(made) == 1


@pytest.mark.parametrize("why", ["a file", "a link", "another owner's", "no home", "full"])
def test_where_nothing_can_be_kept_one_warning_says_why(
    cache: Path, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says = "No space left"
    if why == "full":

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(library.os, "fsync", full)
    elif why == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(library.Path, "home", homeless)
        says = "home directory"
    else:
        cache.parent.mkdir()
        if why == "a file":
            cache.write_text("")
            says = "is not a folder"
        elif why == "a link":
            (tmp_path / "elsewhere").mkdir()
            cache.symlink_to(tmp_path / "elsewhere")
            says = "is not a folder, or a link to one"
        else:
            if os.geteuid():
                pytest.skip("only root gives folders away")
            cache.mkdir()
            os.chown(cache, 12345, -1)
            says = "belongs to another user"
    with pytest.warns(UserWarning, match=f"can't be kept, so each process compiles it anew.*{says}") as told:
        assert library.library() is not None
    assert len(told) == 1
    assert not kept(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.library()


def test_a_folder_that_can_not_be_written_and_one_that_is_no_absolute_path(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for given in ("cache", "./cache", "~", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert library._cache() == tmp_path / "home" / ".cache" / "rjepa_triton"
    assert not (tmp_path / "cache").exists()
    if os.geteuid():
        (tmp_path / "home" / ".cache" / "rjepa_triton").rmdir()
        (tmp_path / "home" / ".cache").chmod(0o500)
        with pytest.warns(UserWarning, match=r"can't be kept.*Permission denied"):
            assert library.library() is not None


def test_what_a_library_depends_on_makes_another(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.library()
    machine = library._machine
    for changed in ("version", "macros", "C library"):
        monkeypatch.setattr(library, "_machine", lambda *a, more=changed: [*machine(*a), more])
        assert found_again() is not None
    monkeypatch.setattr(library, "_machine", machine)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
    assert found_again() is not None
    (library.SOURCES / "more.h").write_text("// Γ\n", encoding="utf-8")
    assert found_again() is not None
    assert len(kept(cache)) == 6


def test_the_compiler_says_what_the_processor_has() -> None:
    """The flags of another processor have other macros, whatever /proc/cpuinfo tells."""
    found = library.compiler()
    assert found is not None
    native, none = (library._machine(found, flags) for flags in (("-march=native",), ()))
    assert native == library._machine(found, ("-march=native",))
    assert native[0] == none[0]
    assert "__VERSION__" in native[1]
    if native[1] == none[1]:
        pytest.skip("this processor has nothing beyond the compiler's default")


def run_alone(cache: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ALONE + code, str(library.SOURCES)], stdout=subprocess.PIPE, text=True
    )


def test_many_builders_build_once(cache: Path) -> None:
    code = """
run = _processes.run
_processes.run = lambda c, **o: ("-o" in c and print("built"), run(c, **o))[1]
warnings.simplefilter("error")
assert library.library() is not None
"""
    at_once = [run_alone(cache, code) for _ in range(6)]
    told = [process.communicate(timeout=120)[0] for process in at_once]
    assert [process.returncode for process in at_once] == [0] * 6
    assert "".join(told).split() == ["built"]
    assert len(kept(cache)) == 1


def test_what_a_killed_build_leaves_is_removed_by_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = """
def run(command, **options):
    if "-o" in command:
        Path(command[command.index("-o") + 1]).write_bytes(b"half")
        print("building", flush=True)
        import time; time.sleep(60)
    return RUN(command, **options)
RUN, _processes.run = _processes.run, run
library.library()
"""
    killed = run_alone(cache, slow)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "building\n"
    (left,) = cache.glob("build-*")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    begin = time.monotonic()
    assert library.library() is not None
    assert time.monotonic() - begin < 30  # the lock of a process that is gone holds no one up
    assert not left.exists()
    assert sorted(path.name for path in cache.iterdir()) == ["lock", kept(cache)[0].name]


def test_a_library_that_can_not_be_loaded_any_more_is_built_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose OpenMP library is gone: whole, and of no use."""
    library.library()
    (file,) = kept(cache)
    data, key = b"not a library", file.name.split("-")[1]
    file.unlink()
    planted = cache / f"native-{key}-{library.hashlib.sha256(data).hexdigest()}.so"
    planted.write_bytes(data)
    planted.chmod(0o600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found_again() is not None
    assert not planted.exists()


@pytest.mark.parametrize("broken", ["source", "compiler", "library"])
def test_what_can_not_be_built_gives_way_to_torch_with_one_warning(
    broken: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if broken == "source":
        (library.SOURCES / "all.cpp").write_text("not C++")
    else:
        false = tmp_path / "cc"
        false.write_text(
            "#!/bin/sh\nexit 1\n"
            if broken == "compiler"
            else '#!/bin/sh\nfor a; do [ "$b" = -o ] && echo text > "$a"; b=$a; done\nexit 0\n'
        )
        false.chmod(0o755)
        monkeypatch.setattr(library, "compiler", lambda: str(false))
    cell, x = RGCCell(), torch.randn(1, 4, 1, 5)
    weights, state = [torch.randn(5, 5) for _ in range(4)], [torch.randn(1, 5) for _ in range(2)]
    says = {"source": "error", "compiler": "exit status 1", "library": "too short"}[broken]
    with pytest.warns(
        UserWarning, match=f"(?s)can't be built by .* torch runs in its place from now on.*{says}"
    ):
        got = operations.scan(cell, x, weights, state, backend="compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = operations.scan(cell, x, weights, state, backend="compile")
    want = cell.scan(x, weights, state)
    torch.testing.assert_close([got.states, again.saved], [want.states, want.saved], rtol=0, atol=0)
    assert not kept(cache)
    assert not list(cache.glob("build-*"))


def test_without_a_compiler_torch_runs_and_one_warning_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "compiler", lambda: None)
    library.tell_of_no_compiler.cache_clear()
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler .* torch runs on the CPU") as told:
        RGC(5)(torch.randn(3, 1, 5))[0].sum().backward()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RGC(5)(torch.randn(3, 1, 5))[0].sum().backward()
    assert library.library() is None
    assert native_backend.NATIVE.no_loops(torch.device("cpu"), torch.float32) == "no C++ compiler was found"


def test_streams_need_openmp_s_header_only_with_openmp(tmp_path: Path) -> None:
    """Else they could not be built by a compiler that doesn't have it, whose code runs on one thread."""
    (tmp_path / "a.cpp").write_text(f'{generated.source(RGCCell())}\n#include "stream.h"\n')
    found = []
    for threads in library.THREADS:
        command = [str(library.compiler()), "-std=c++17", threads, f"-I{library.SOURCES}", "-M", "a.cpp"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "stream.h" in done.stdout
        found.append("omp.h" in done.stdout)
    assert found == [True, False]
