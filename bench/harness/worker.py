"""A process that answers lines of JSON, held to some processors: how a benchmark runs what isn't its own code."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import _processes


class WorkerFailed(Exception):
    """A worker that answered with an error, or not at all."""

    def __init__(self, message: str, oom: bool = False) -> None:
        super().__init__(message)
        self.oom = oom


class Worker:
    """A process that answers lines of JSON by lines of JSON. `close()` ends it and whatever it started.

    cpus: the processors that it may use, if the system can restrict it to them. log: the file for its stderr.
    cwd: the folder that it starts in.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cpus: Sequence[int],
        log: Path,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as stderr, held_to(cpus):
            self.process = _processes.start(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                cwd=cwd,
            )
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, message: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The answer to a message.

        Raises WorkerFailed if the worker answers with an error, with something else than a JSON object, or not within
        `limit` seconds, or if it has ended.
        """
        assert self.process.stdin is not None
        # a process that has ended can't be written to; reading its answer then tells how it ended
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((json.dumps(message) + "\n").encode())
            self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            raise WorkerFailed(f"no answer within {limit:g} s{self._last_words()}") from None
        if line is None:
            code = self.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise WorkerFailed(f"its process ended with {how}{self._last_words()}")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise WorkerFailed(f"not an answer: {line.decode(errors='replace').strip()[:80]!r}")
        if "error" in reply:
            raise WorkerFailed(str(reply["error"]), bool(reply.get("oom")))
        return reply

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"; last said: {said[-1][:200]}" if said else ""

    def close(self) -> None:
        """End the process and whatever it started."""
        _processes.end(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # data that a dead process never read is lost
                    pipe.close()


@contextlib.contextmanager
def held_to(cpus: Sequence[int]) -> Iterator[None]:
    """Restrict this process, and processes started meanwhile, to these processors, if the system can do that."""
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pinned(threads: int) -> list[int]:
    """The processors to which a worker with so many threads is restricted; none if the system can't list them."""
    return sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else []


def environment(threads: int, device: str) -> dict[str, str]:
    """The environment of a worker: the same number of threads for every library, and where it finds this package."""
    pinning = {
        name: str(threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")  # NPROC: XLA's
    }
    if device == "cpu":
        pinning["JAX_PLATFORMS"] = "cpu"
    return {**os.environ, **pinning, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
