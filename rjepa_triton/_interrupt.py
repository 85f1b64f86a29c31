"""Ctrl-C where its KeyboardInterrupt would be lost.

It raises KeyboardInterrupt wherever Python is. In the middle of a library's import, the library may take it for a
reason to go on without something (torch's does). In a finalizer, a callback of the garbage collector or a hook of a
fork, nobody can be told of an exception, and Python prints it and goes on. The command would run on. So it ends at once
then, by the signal itself. What a command writes is whole however it ends, and its children end with it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def heed() -> None:
    """Let Ctrl-C end this process wherever Python is, if it is the `rjepa` command; else do nothing."""
    given = sys.orig_argv
    is_command = "rjepa_triton" in given[1:] and given[given.index("rjepa_triton") - 1] == "-m"
    is_command = is_command or any(PurePath(argument).stem == "rjepa" for argument in given[:2])
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
        sys.unraisablehook = _unraisable


def _end() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _unraisable(what: UnraisableHookArgs) -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(what)


def _interrupted(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        at = at.f_back
    raise KeyboardInterrupt
