"""Child processes: what a pool of them does, and that none is left, however the process ends that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, as_completed
from pathlib import Path

import pytest
from children import left, until

from rjepa_triton import _processes
from rjepa_triton._processes import Workers

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
WAYS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL]


def test_calls_and_what_they_raise() -> None:
    with Workers(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        futures = [pool.submit(pow, n, 2) for n in range(20)]
        assert sorted(future.result() for future in as_completed(futures)) == [n**2 for n in range(20)]
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        with pytest.raises(ZeroDivisionError) as raised:
            pool.submit(divmod, 1, 0).result()
        assert "Traceback" in str(raised.value.__cause__)
        # what a worker prints goes to stderr, and it has nothing to read
        assert pool.submit(print, "among answers").result() is None
        assert pool.submit(eval, "__import__('sys').stdin.read()").result() == ""
        assert pool.submit(pow, 2, 5).result() == 32
        with pytest.raises(ModuleNotFoundError):
            pool.submit(eval, "__import__('nowhere')").result()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(pow, 2, 2)


def test_an_initializer_runs_first_in_each_and_what_it_raises_every_call_does() -> None:
    with Workers(2, os.chdir, ["/"]) as pool:
        assert {pool.submit(os.getcwd).result() for _ in range(4)} == {"/"}
    with Workers(1, os.chdir, ["/dev/null/nowhere"]) as pool:
        for _ in range(2):
            with pytest.raises(NotADirectoryError):
                pool.submit(os.getcwd).result()


def test_a_worker_that_dies_breaks_the_pool() -> None:
    with Workers(1) as pool:
        dead, waiting = pool.submit(os._exit, 3), pool.submit(os.getpid)
        with pytest.raises(BrokenExecutor, match="exit code 3"):
            dead.result()
        with pytest.raises(BrokenExecutor):
            waiting.result()
        with pytest.raises(BrokenExecutor):
            pool.submit(os.getpid)


def test_leaving_by_an_exception_kills_what_runs() -> None:
    begin = time.monotonic()
    pool = Workers(2)

    def leave() -> None:
        with pool:
            futures.extend(pool.submit(time.sleep, 60) for _ in range(3))
            raise KeyboardInterrupt

    futures: list = []
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert time.monotonic() - begin < 20
    assert all(isinstance(future.exception(), BrokenExecutor) for future in futures)


def test_shutdown_can_cancel_what_waits() -> None:
    pool = Workers(1)
    running, waiting = pool.submit(time.sleep, 0.3), pool.submit(os.getpid)
    time.sleep(0.1)
    pool.shutdown(cancel_futures=True)
    assert running.result() is None
    assert waiting.cancelled()


def test_a_program_runs_to_its_end_or_its_limit() -> None:
    done = _processes.run(["cat"], input="Γ")
    assert (done.stdout, done.returncode) == ("Γ", 0)
    assert _processes.run(["sh", "-c", "echo why >&2; exit 3"]).stderr == "why\n"
    with pytest.raises(subprocess.TimeoutExpired):
        _processes.run(["sh", "-c", "sleep 60 & sleep 60"], timeout=0.2)
    assert _processes.run(["sh", "-c", "kill -s KILL $$"]).returncode != 0
    with pytest.raises(OSError, match="nowhere"):
        _processes.run(["/nowhere/program"])


# The module by itself, without torch.
LOAD = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("_processes", {_processes.__file__!r})
processes = importlib.util.module_from_spec(spec)
sys.modules["_processes"] = processes
spec.loader.exec_module(processes)
"""
PARENTS = {
    "a program": 'processes.start(["sleep", "60"]); time.sleep(60)',
    "a program with a limit": 'processes.run(["sleep", "60"], timeout=50)',
    "a program's own program": 'processes.run(["sh", "-c", "sleep 60; true"])',
    "a worker's compiler": (
        "with processes.Workers(2) as pool:\n"
        "    pool.submit(processes.run, ['sh', '-c', 'sleep 60; true']).result()"
    ),
    "busy and idle workers": "with processes.Workers(3) as pool:\n    pool.submit(time.sleep, 60).result()",
    "a busy parent": "pool = processes.Workers(2)\nwhile True: pass",
    "a worker's program": (
        "with processes.Workers(2) as pool:\n"
        "    pool.submit(eval, \"__import__('os').system('true') or __import__('time').sleep(60)\").result()"
    ),
}


def skip_if_ignored(way: signal.Signals) -> None:
    if way is not signal.SIGKILL and signal.getsignal(way) is signal.SIG_IGN:
        pytest.skip(f"{way.name} is ignored here, as nohup has it, and so by every program that is started")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("what", PARENTS)
def test_nothing_is_left(what: str, way: signal.Signals, marked: dict[str, str]) -> None:
    skip_if_ignored(way)
    parent = subprocess.Popen(
        [sys.executable, "-c", LOAD + PARENTS[what]],
        env=marked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert until(lambda: len(left(marked)) > 1, 20)
    time.sleep(0.2)
    parent.send_signal(way)
    assert until(lambda: not [p for p in left(marked) if p != parent.pid], 5)
    parent.wait(10)
    assert parent.stdout is not None
    assert parent.stdout.read() == b""  # no one holds the pipe, so whoever reads it comes to its end


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _processes.ending_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(SystemExit) as ended:
                os.kill(os.getpid(), signal.SIGTERM)
            assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


SMALL = ("--hidden", "16", "--batch", "1")
# What each command is given, and how many processes it then starts.
COMMANDS = {
    "scaling": (("scaling", *SMALL, "--sample", "60"), 1),
    "learn": (("learn", "--steps", "1000000", "--jobs", "2"), 2),
    "all": (("all", "--budget", "5min"), 2),
}


@pytest.mark.parametrize(
    ("name", "way"), [("scaling", signal.SIGKILL), ("learn", signal.SIGTERM), ("all", signal.SIGHUP)]
)
def test_no_command_leaves_a_process(
    name: str, way: signal.Signals, marked: dict[str, str], tmp_path: Path
) -> None:
    skip_if_ignored(way)
    arguments, children = COMMANDS[name]
    log = (tmp_path / "log").open("wb")
    parent = subprocess.Popen(
        [sys.executable, "-m", "rjepa_triton", "bench", *arguments, "--out", str(tmp_path)],
        env=marked, stdout=log, stderr=log,
    )  # fmt: skip
    assert until(lambda: len(left(marked)) > children, 120), (tmp_path / "log").read_text()
    parent.send_signal(way)
    assert until(lambda: not [p for p in left(marked) if p != parent.pid], 5)
    parent.wait(5)
