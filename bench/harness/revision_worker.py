"""Runs cases of one revision and answers lines of JSON. It has to run beside any revision, so it imports none of it.

The program is given to `python -c` in the folder of the revision, whose modules therefore come first. Messages:

    {"load": FILE}                            the names of its CASES
    {"build": NAME, "seconds": s}             make the case, warm it up; how many calls take s seconds
    {"time": NAME, "calls": n}                seconds a call
    {"count": NAME, "calls": n}               instructions of n calls by the processor's counter, outside of the kernel
    {"run": NAME, "calls": n}                 only run it
    {"trace": NAME, "calls": n, "file": F}    run it under torch's profiler, which writes F
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import runpy
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

# linux/perf_event.h: the counter of instructions, without those of the kernel and of a hypervisor.
HARDWARE, INSTRUCTIONS, WITHOUT_KERNEL = 0, 1, 0b1100000
SIZE = 112
SYSCALL = {"x86_64": 298, "aarch64": 241, "riscv64": 241}


def counter(kind: int = HARDWARE, event: int = INSTRUCTIONS) -> int:
    """A file from which the count of this thread's events is read. Raises OSError where there is no such counter."""
    if sys.platform != "linux" or platform.machine() not in SYSCALL:
        raise OSError("performance counters are Linux's")
    asked = struct.pack("IIQQQQQ", kind, SIZE, event, 0, 0, 0, WITHOUT_KERNEL).ljust(SIZE, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(SYSCALL[platform.machine()], asked, 0, -1, -1, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "the processor's counter of instructions can't be read")
    return int(found)


def value(descriptor: int) -> int:
    """The count so far."""
    return int(struct.unpack("Q", os.read(descriptor, 8))[0])


def warm(function: Callable[[], object], seconds: float) -> int:
    """Call for half a second, and at least twice; how many calls take `seconds`."""
    best, begin, turns = float("inf"), time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - begin < 0.5:
        start = time.perf_counter()
        function()
        best, turns = min(best, time.perf_counter() - start), turns + 1
    return max(1, round(seconds / max(best, 1e-9)))


def check_origin(folder: str) -> None:
    """Raise ImportError if a package that the folder has was loaded from another place."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in name or not file or not os.path.exists(os.path.join(folder, name, "__init__.py")):
            continue
        if not os.path.realpath(file).startswith(os.path.realpath(folder) + os.sep):
            raise ImportError(f"{name} was loaded from {file}, not from the revision")


def times(function: Callable[[], object], calls: int) -> None:
    """Call it so often."""
    for _ in range(calls):
        function()


class Cases:
    """The cases of a file, and those that were built."""

    def __init__(self) -> None:
        self.known: dict[str, Callable[[], Callable[[], object]]] = {}
        self.built: dict[str, Callable[[], object]] = {}

    def answer(self, what: str, name: str, calls: int, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message."""
        if what == "load":
            self.known = runpy.run_path(name)["CASES"]
            check_origin(os.getcwd())
            return {"cases": list(self.known)}
        if what == "build":
            self.built[name] = self.known[name]()
            calls = warm(self.built[name], asked["seconds"])
            check_origin(os.getcwd())
            gc.collect()
            gc.disable()  # a collection in the middle of a sample would count as its time
            return {"calls": calls}
        function = self.built[name]
        if what == "time":
            function()  # since the last sample, the other revision has filled the caches
            begin = time.perf_counter()
            times(function, calls)
            return {"value": (time.perf_counter() - begin) / calls}
        if what == "count":
            descriptor = counter()
            before = value(descriptor)
            times(function, calls)
            found = value(descriptor) - before
            os.close(descriptor)
            return {"value": found}
        if what == "trace":
            import torch

            with torch.profiler.profile(record_shapes=True) as profiler:
                times(function, calls)
            profiler.export_chrome_trace(asked["file"])
        else:
            times(function, calls)
        return {}


def main() -> None:
    """Answer lines of stdin until it ends. stdout itself becomes stderr, so that nothing is printed among answers."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cases = Cases()
    for line in sys.stdin:
        asked = json.loads(line)
        (what, name), *_ = asked.items()
        try:
            reply = cases.answer(what, name, asked.get("calls", 0), asked)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
