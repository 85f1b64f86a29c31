"""The `rjepa` command: help, missing extra packages, and readers that go away."""

from __future__ import annotations

import codecs
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import RESULTS, ROOT
from typer.testing import CliRunner

from rjepa_triton import cli
from rjepa_triton._command import PIPE_CLOSED, plain
from rjepa_triton.bench.cli import bench


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    code = end.value.code
    return code if isinstance(code, int) else 0


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "bench", "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("scaling", "plot", "compare", "fidelity"))


SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:
    pass
print("went on", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such signals")
@pytest.mark.parametrize("module", ["torch", "typer"])
def test_ctrl_c_isnt_lost_where_an_import_swallows_it(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SWALLOWS)
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    heeds = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)}
    command = [sys.executable, "-m", "rjepa_triton", "train", "--help"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=100, **heeds)  # type: ignore[call-overload]
    assert done.returncode == -signal.SIGINT, done.stdout + done.stderr
    assert "went on" not in done.stdout
    alone = subprocess.run(
        [sys.executable, "-c", f"import rjepa_triton, {module}"],
        **{**heeds, "env": given},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )  # type: ignore[call-overload]
    assert "went on" in alone.stdout  # who imports the package has Ctrl-C as it was


LOSES = {
    "a hook of a fork": """
os.register_at_fork(after_in_parent=interrupt)
if os.fork() == 0:
    os._exit(0)
""",
    "a finalizer": """
class Finalized:
    def __del__(self): interrupt()
Finalized()
""",
    "a weak reference's callback": """
import weakref
class Object: pass
one = Object()
kept = weakref.ref(one, lambda _: interrupt())
del one
""",
    "a callback of the garbage collector": """
import gc
gc.callbacks.append(lambda phase, info: interrupt())
gc.collect()
""",
}


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such signals")
@pytest.mark.parametrize("where", LOSES)
def test_ctrl_c_isnt_lost_where_python_can_raise_nothing(where: str) -> None:
    script = f"""
import os, signal
import rjepa_triton
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100): pass
{LOSES[where]}
print("went on")
"""
    heeds = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)}
    for command, want in ((["-m", "rjepa_triton"], ""), ([], "went on")):
        done = subprocess.run(
            [sys.executable, "-c", script, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100,
            **heeds,
        )  # type: ignore[call-overload]
        assert done.stdout.strip() == want, done.stderr
        if command:
            assert done.returncode == -signal.SIGINT


def test_an_unknown_command_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "bench", "juggle") == 2
    assert "juggle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("scaling --speed 9", "No such option"),
        ("scaling --algorithms rfp-dual,magic", "algorithms must be one of 'rfp-stream'"),
        ("scaling --algorithms ''", "algorithms must name at least one of rfp-stream"),
        ("scaling --dtype int8", "dtype must be one of 'float32', 'float64', got 'int8'"),
        ("scaling --input film", "input must be one of 'photo', 'noise', got 'film'"),
        ("scaling --backend magic", "backend must be one of"),
        ("scaling --device tpu", "device must be 'cpu', 'cuda' or 'cuda:<index>', got 'tpu'"),
        ("scaling --hidden 8,x", "--hidden must be integers, such as 32,64, got '8,x'"),
        ("scaling --hidden 0", "hidden must be at least 1, got 0"),
        ("scaling --steps 1", "steps must be at least 2, got 1"),
        ("scaling --passes 0", "passes must be at least 1, got 0"),
        ("scaling --budget 0", "budget must be above 0, got 0"),
        ("scaling --threads -1", "--threads must be at least 0, got -1"),
        ("learn --tasks juggling", "task must be one of 'recall', 'adding', 'lorenz', got 'juggling'"),
        ("learn --rules hebb", "rule must be one of 'rtrl', 'rtrl-heads', 'rfp',"),
        ("learn --rules ,", "rules must name at least one of rtrl"),
        ("learn --steps 100", "steps must be a multiple of 20 windows × 4 steps a chunk, 80, got 100"),
        ("learn --steps 160", "steps must be at least 240, 20 windows in which something is scored, got 160"),
        ("learn --hidden 6", "hidden must be a multiple of 4 heads, got 6"),
        ("learn --seeds 1", "seeds must be at least 2, got 1"),
        ("learn --seeds 101", "seeds must be at most 100, got 101"),
        ("learn --chunk 1", "chunk must be at least 2, got 1"),
        ("learn --jobs -1", "--jobs must be at least 0, got -1"),
        ("forward --hidden ,", "hidden must name at least one size"),
        ("forward --hidden 0", "hidden must be at least 1, got 0"),
        ("forward --cells lstm", "cells must be one of 'rgc', 'lru', got 'lstm'"),
        ("forward --cells ''", "cells must name at least one"),
        ("forward --budget 0", "budget must be above 0"),
        ("forward --steps many", "--steps must be integers"),
        ("forward --device tpu", "device must be"),
        ("memory --base 1,2", "--base must be N,B,T"),
        ("memory --steps 1", "T must be at least 2, got 1"),
        ("memory --hidden ''", "the sweep of N must have at least one value"),
        ("memory --algorithms bptt,x", "algorithms must be one of"),
        ("kernels --by magic", "by must be one of 'triton', 'torch', 'compile', got 'magic'"),
        ("online --forms stop", "forms must be one of"),
        ("online --steps 9", "steps must be at least 100, got 9"),
        ("online --hidden x", "--hidden must be integers"),
        ("fidelity --sweeps all", "sweep must be one of"),
        ("fidelity --seeds 1", "seeds must be at least 2, got 1"),
    ],
)
def test_user_errors_exit_2(line: str, says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, [*shlex.split(line), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", ["compare a.jsonl b.jsonl", "compare b.jsonl a.jsonl", "table a.jsonl", "plot a.jsonl"]
)
def test_a_file_without_records_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).touch()
    result = CliRunner().invoke(bench, line.split())
    assert result.exit_code == 2
    assert f"{line.split()[1]} has no records" in result.output


def test_sizes_of_a_plan_without_end(tmp_path: Path) -> None:
    """The answer comes at once, and sizes whose bytes don't fit in 64 bits are refused."""
    begin = time.monotonic()
    for option in ("hidden", "batch", "steps", "chunk", "input-size"):
        size = {"hidden": "64", option: "1000000001"}
        line = ["plan", "--device", "h100", *(part for name, n in size.items() for part in (f"--{name}", n))]
        result = CliRunner().invoke(bench, line)
        assert result.exit_code == 2
        assert f"{option.replace('-', '_')} must be at most 1,000,000,000, got 1,000,000,001" in result.output
    result = CliRunner().invoke(bench, ["plan", "--device", "h100", "--hidden", "1000000000"])
    assert result.exit_code == 0
    assert "nothing fits" in result.output
    assert time.monotonic() - begin < 60


MISSING = """
import sys
from rjepa_triton.cli import main
for package in sys.argv[1:]:
    kept = sys.modules.get(package)
    sys.modules[package] = None
    try:
        main()
    except SystemExit as end:
        print(package, end.code)
    if kept is None:
        del sys.modules[package]
    else:
        sys.modules[package] = kept
"""


def test_missing_packages_are_named() -> None:
    """The check runs in a process of its own, since this one has imported all the packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    wanted = ["typer", "rich", "scipy", "matplotlib", "jinja2"]  # in the order in which they are imported
    done = subprocess.run(
        [sys.executable, "-c", MISSING, *wanted], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [word for package in wanted for word in (package, "2")]
    lines = [line for line in done.stderr.splitlines() if line.startswith("rjepa needs")]
    assert [line.split()[2].strip(",:") for line in lines] == wanted
    assert all("pip install 'rjepa-triton[bench]'" in line for line in lines)


TABLES = ("bench", "table", str(RESULTS / "peers-cpu.jsonl"))
PAGES = [
    TABLES,
    (*TABLES, "--markdown"),
    ("bench", "plan", "--hidden", "64", "--device", "h100"),
    ("bench", "plan", "--help"),
    ("theory", "--help"),
    ("fixations", "--help"),
    ("--help",),
]


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command and the environment of its process; the width is that of a wide terminal."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "160"}
    return [sys.executable, "-m", "rjepa_triton", *arguments], env


@pytest.mark.parametrize("arguments", PAGES, ids=" ".join)
def test_a_reader_that_goes_away_ends_the_command_quietly(arguments: tuple[str, ...]) -> None:
    words, env = command(*arguments)
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read().decode()
    assert (process.wait(), told) == (PIPE_CLOSED, "")


def test_head_gets_the_first_line_and_nothing_is_said(tmp_path: Path) -> None:
    """The pipe is a shell's own, and its reader leaves after the first of many lines."""
    words, env = command(*TABLES)
    line = f"{shlex.join(words)} 2>told | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *_, status = done.stdout.splitlines()
    assert int(status) in (0, PIPE_CLOSED)  # 0 if all of it was in the pipe before head left
    assert (tmp_path / "told").read_text() == ""


def test_another_pipe_that_breaks_is_an_error() -> None:
    """Only a broken stdout or stderr ends a command quietly; an error from another pipe is reported."""
    code = """
import sys
from rjepa_triton._command import quiet_end_of_pipe, user_errors
with quiet_end_of_pipe(), user_errors():
    raise BrokenPipeError(32, "Broken pipe")
"""
    _, env = command()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != PIPE_CLOSED
    assert "Broken pipe" in done.stderr


def test_what_is_written_is_what_it_was_without_the_guard() -> None:
    """A table goes to a pipe with its lines in order, and in UTF-8 whatever the locale says."""
    words, env = command("bench", "plan", "--hidden", "64", "--device", "h100")
    done = subprocess.run(words, env={**env, "PYTHONIOENCODING": "utf-8"}, capture_output=True, check=True)
    told = done.stdout.decode("utf-8")
    assert "┏" in told
    assert told.rstrip().splitlines()[-1].endswith(".")


# Each command has the encoding of its streams, and text that only the replacement of what the encoding lacks gives.
ELSEWHERE: dict[tuple[str, ...], tuple[str, str]] = {
    ("bench", "plan", "--hidden", "64", "--device", "h100"): ("cp1252", "+---"),
    TABLES: ("ascii", "us"),
    ("bench", "scaling", "--help"): ("gbk", "Γ"),
}


@pytest.mark.parametrize("arguments", ELSEWHERE, ids=" ".join)
def test_output_is_whole_in_plain_letters_where_the_stream_has_no_others(arguments: tuple[str, ...]) -> None:
    encoding, said = ELSEWHERE[arguments]
    words, env = command(*arguments)
    whole = subprocess.run(words, env={**env, "PYTHONIOENCODING": "utf-8"}, capture_output=True, check=True)
    done = subprocess.run(words, env={**env, "PYTHONIOENCODING": encoding}, capture_output=True, check=True)
    shown, plain = whole.stdout.decode("utf-8"), done.stdout.decode(encoding.partition(":")[0])
    assert done.stderr == b""
    assert len(plain.splitlines()) == len(shown.splitlines())
    assert plain.count("?") == shown.count("?")
    assert said in plain


def test_an_error_is_told_whole_too(tmp_path: Path) -> None:
    words, env = command("bench", "table", str(tmp_path / "Γ×….jsonl"))
    done = subprocess.run(words, env={**env, "PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 2
    assert "Gamma×….jsonl" in done.stderr.decode("cp1252")


@pytest.mark.parametrize(
    ("text", "encoding", "written"),
    [
        ("Γ γ λ ς Ω", "ascii", b"Gamma gamma lambda final Omega"),
        ("≥ … → √2 4 µs · × ± é ½", "ascii", b">= ... -> sqrt2 4 us * x +- e 12"),
        ("≥ … → √2 4 µs · × ± é ½", "cp1252", b">= \x85 -> sqrt2 4 \xb5s \xb7 \xd7 \xb1 \xe9 \xbd"),
        ("┏━┃ 漢 \ud800", "ascii", b"+-| ? ?"),
        (os.fsdecode(b"caf\xe9.csv"), "utf-8", b"caf\xe9.csv"),
    ],
)
def test_plain_letters(text: str, encoding: str, written: bytes) -> None:
    codecs.register_error("rjepa-plain-test", plain)
    assert text.encode(encoding, "rjepa-plain-test") == written
