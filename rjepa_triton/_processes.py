"""Child processes that end with the process that started them, however that one ends.

`start` starts a program, `Workers` is a pool of processes that call Python functions. On Linux the kernel kills such a
child as soon as the thread that started it is gone, by SIGKILL too (PR_SET_PDEATHSIG); elsewhere the pool's workers
notice it within a second. A child leads a process group of its own, so that it can be ended with whatever it started
(`end`), and it inherits no pipe of its parent but stderr. What a program itself starts (g++ starts cc1plus) ends with
the process that called `run`, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import queue
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from types import FrameType
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
_KILL = getattr(signal, "SIGKILL", 0)  # which Windows lacks
# Looked up once, here: a child that was just forked should do as little as it can.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_LENGTH = struct.Struct("!Q")
# Runs a program, its arguments, and ends its whole process group when told to. An asynchronous command of a shell has
# /dev/null as stdin unless it is given another.
_GUARD = 'trap "kill -s KILL 0" TERM; exec 3<&0; "$@" <&3 3<&- & exec 3<&-; wait $!'


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that ends with the thread that calls this. options: of subprocess.Popen. Raises OSError."""
    return _start(command, _KILL, options)


def _start(command: Sequence[str], number: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """number: of the signal that the kernel sends the program at the end of the thread that calls this."""
    if os.name != "posix":
        return subprocess.Popen(list(command), **options)
    parent = os.getpid()

    def prepare() -> None:
        if _LIBC is not None:
            die_with(parent, number)
        # a shell starts background jobs with interrupts ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(list(command), start_new_session=True, preexec_fn=prepare, **options)


def end(process: subprocess.Popen[bytes], seconds: float = 0.0) -> int:
    """End a process of `start` and whatever it started, and return its exit code.

    seconds: how long it may go on after an interrupt such as a terminal's; 0: it gets none and is killed.
    """
    if os.name != "posix":
        process.kill()
        return process.wait()
    if seconds:
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run(
    command: Sequence[str], *, input: str = "", timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program of `start` to its end, as subprocess.run with captured text does, and end what it started.

    Raises OSError, or subprocess.TimeoutExpired.
    """
    options.update(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))
    if _LIBC is None:
        process = start(command, **options)
    elif shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, "no program of this name can be run", command[0])
    else:
        process = _start(["/bin/sh", "-c", _GUARD, "sh", *command], signal.SIGTERM, options)
    try:
        out, told = process.communicate(input.encode(), timeout)
    except BaseException:
        end(process)
        raise
    texts = [data.decode("utf-8", "replace") for data in (out, told)]
    return subprocess.CompletedProcess(list(command), process.returncode, *texts)


def die_with(parent: int, number: int = _KILL) -> None:
    """Let this process end with its parent, a process's number: what a pool of multiprocessing calls in each worker.

    number: of the signal that Linux sends it then.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    elif os.name == "posix":
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit(128 + number) meanwhile, so that what started children ends them.

    A signal that is ignored (nohup) or handled by someone else already stays as it is. Outside of the main thread
    nothing changes.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


class Workers(Executor):
    """A pool of processes that call functions, which are found by name in their modules, as pickle does.

    As ProcessPoolExecutor with the start method "spawn", except that the main module isn't imported, that no worker
    outlives the thread that made the pool, and that leaving the context by an exception kills what still runs. A worker
    that dies breaks the pool: what isn't done yet raises BrokenExecutor.

    count: of processes. initializer: called with `initargs` in each before anything else; what it raises, each call
    raises.
    """

    def __init__(
        self, count: int, initializer: Callable[..., object] | None = None, initargs: Sequence[Any] = ()
    ) -> None:
        self._first = None if initializer is None else pickle.dumps((initializer, tuple(initargs), {}))
        self._tasks: queue.SimpleQueue[tuple[Future[Any], bytes] | None] = queue.SimpleQueue()
        self._broken = self._closed = False
        self._lock = threading.Lock()
        self._signals = contextlib.ExitStack()
        # by this thread, at whose end the kernel ends them
        self._processes = [self._start() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._serve, args=(process,), daemon=True) for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        path = os.pathsep.join(part for part in sys.path if part)
        # the file itself, since importing the package would import torch before the parent is watched
        command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": path}
        return start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function in the next free process. Raises BrokenExecutor, or RuntimeError after `shutdown`."""
        told = pickle.dumps((fn, args, kwargs))
        with self._lock:
            if self._broken:
                raise BrokenExecutor("a process of the pool has died")
            if self._closed:
                raise RuntimeError("the pool is shut down")
            future: Future[Any] = Future()
            self._tasks.put((future, told))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes once what was submitted is done; cancel_futures: once what runs is done."""
        with self._lock:
            if not self._closed:
                self._closed = True
                if cancel_futures:
                    self._drain(None)
                for _ in self._processes:
                    self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def kill(self) -> None:
        """End the processes at once, and break what isn't done."""
        self._break()
        for process in self._processes:
            end(process)
        self.shutdown()

    def __enter__(self) -> Workers:
        self._signals.enter_context(ending_on_signals())
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._signals:
            if kind is None:
                self.shutdown()
            else:
                self.kill()

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Give tasks to one process until there are no more."""
        assert process.stdin is not None
        assert process.stdout is not None
        failed: BaseException | None = None
        prepared = self._first is None
        while task := self._tasks.get():
            future, told = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if not prepared:
                    assert self._first is not None
                    _, failed = _ask(process.stdin, process.stdout, self._first)
                    prepared = True
                value, error = (None, failed) if failed else _ask(process.stdin, process.stdout, told)
            except (OSError, EOFError, pickle.UnpicklingError):
                code = end(process)
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                future.set_exception(BrokenExecutor(f"a process of the pool ended {how}"))
                self._break()
                break
            except BaseException as unreadable:  # an answer whose class can't be found here
                value, error = None, unreadable
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait()
        process.stdout.close()

    def _break(self) -> None:
        with self._lock:
            self._broken = True
            self._drain(BrokenExecutor("a process of the pool has died"))
            for _ in self._processes:
                self._tasks.put(None)

    def _drain(self, error: BaseException | None) -> None:
        """Give up what no process has begun: cancelled, or failed with an error."""
        with contextlib.suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    if error is None:
                        task[0].cancel()
                    if task[0].set_running_or_notify_cancel():
                        task[0].set_exception(error)


def _ask(to: IO[bytes], answers: IO[bytes], told: bytes) -> tuple[Any, BaseException | None]:
    """Send a pickled call, and read (value, None) or (None, what it raised). Raises OSError or EOFError."""
    to.write(_LENGTH.pack(len(told)) + told)
    to.flush()
    value, error, trace = pickle.loads(_read(answers))
    if error is not None and trace:
        error.__cause__ = _Remote(trace)
    return value, error


class _Remote(Exception):
    """The traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _read(source: IO[bytes]) -> bytes:
    """One message. Raises EOFError."""
    length = source.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(length)
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _watch(parent: int) -> None:
    """End this process when its parent is gone, where the kernel doesn't."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(parent: int) -> None:
    """Answer calls on stdin until it ends. stdout itself becomes stderr, so that nothing is printed among answers."""
    if _LIBC is None:
        die_with(parent)
    answers, calls = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    while True:
        try:
            told = _read(calls)
        except EOFError:
            return
        try:
            function, args, kwargs = pickle.loads(told)
            answer = pickle.dumps((function(*args, **kwargs), None, ""))
        except Exception as error:
            trace = traceback.format_exc()
            try:
                answer = pickle.dumps((None, error, trace))
                pickle.loads(answer)  # some exceptions can be written and not read
            except Exception:
                answer = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    if sys.path[:1] == [str(Path(__file__).parent)]:
        sys.path.pop(0)  # this file's own folder, whose modules would hide others of their names
    _work(int(sys.argv[1]))
