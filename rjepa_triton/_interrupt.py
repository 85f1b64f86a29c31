"""Ctrl-C while the command imports its modules.

It raises KeyboardInterrupt wherever Python is. In the middle of a library's import, the library may take it for a
reason to go on without something (torch's does), and the command would run on. So the command ends at once then, by the
signal itself. What a command writes is whole however it ends, and its children end with it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath
from types import FrameType


def heed() -> None:
    """Let Ctrl-C end this process at once while it imports, if it is the `rjepa` command; else do nothing."""
    given = sys.orig_argv
    is_command = "rjepa_triton" in given[1:] and given[given.index("rjepa_triton") - 1] == "-m"
    is_command = is_command or any(PurePath(argument).stem == "rjepa" for argument in given[:2])
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        at = at.f_back
    raise KeyboardInterrupt
