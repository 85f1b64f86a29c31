"""The options that several commands of `rjepa bench` have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ParamSpec

import torch
import typer

from ... import _checks as check
from . import device as devices
from . import inputs

__all__ = [
    "OUT",
    "Batch",
    "BatchList",
    "Device",
    "Fresh",
    "Hidden",
    "HiddenList",
    "Input",
    "Markdown",
    "Passes",
    "Sample",
    "Scale",
    "Seed",
    "Steps",
    "StepsList",
    "Threads",
    "chosen_device",
    "file_in",
    "integers",
    "names",
    "resumes",
    "text_of",
    "use_threads",
]

P = ParamSpec("P")

# The folder that records and pictures go to unless --out names another.
OUT = Path("bench-out")

Hidden = Annotated[str, typer.Option(help="N, with commas between; the defaults if left out.")]
Batch = Annotated[str, typer.Option(help="B, with commas between; 1 if only --hidden is given.")]
# The same of commands whose default is a list of their own.
HiddenList = Annotated[str, typer.Option(help="N, with commas between.")]
BatchList = Annotated[str, typer.Option(help="B, with commas between.")]
StepsList = Annotated[str, typer.Option(help="T, with commas between.")]
Steps = Annotated[int, typer.Option(help="T, steps of the sequence.")]
Input = Annotated[str, typer.Option(help=", ".join(inputs.INPUTS))]
Scale = Annotated[float, typer.Option(help="c in W ~ c·N(0, 1)/√N.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:<index>, or auto: cuda where there is one")]
Threads = Annotated[int, typer.Option(help="CPU threads; torch's own choice if 0.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete earlier records first.")]
Sample = Annotated[
    float, typer.Option(help="Seconds for which a case is sampled at a point, over all passes.")
]
Passes = Annotated[int, typer.Option(help="Processes, one after the other, each of which times every point.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]


def resumes(command: Callable[P, None]) -> Callable[P, None]:
    """Add to the help of a command, which is its docstring, that it continues an earlier run's file of records."""
    command.__doc__ = (
        f"{command.__doc__}\n\nThe command continues where an earlier run with the same options stopped, "
        "and keeps its records."
    )
    return command


def integers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a text such as "32,64". Raises ValueError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--{name} must be integers, such as 32,64, got {text!r}") from None


def text_of(numbers: Sequence[int]) -> str:
    """The text that `integers` reads as these numbers."""
    return ",".join(map(str, numbers))


def names(text: str) -> tuple[str, ...]:
    """The names of a text such as "rfp,rtrl"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def use_threads(threads: int) -> None:
    """Set torch's number of threads, unless it is 0. Raises ValueError for a negative number."""
    if check.integer("--threads", threads, 0):
        torch.set_num_threads(threads)


def chosen_device(text: str) -> str:
    """The device that the option names; "auto" is cuda where there is one. Raises ValueError if it can't be used."""
    device = devices.default_device() if text == "auto" else text
    devices.check_device(device)
    return device


def file_in(out: Path, name: str, fresh: bool) -> Path:
    """The path of a file of records in the folder `out`, which is made. If `fresh`, an earlier file is deleted."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / name
    if fresh:
        file.unlink(missing_ok=True)
    return file
