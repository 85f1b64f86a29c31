"""The command of this wing: `rjepa bench online`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ... import _checks as check
from ..._command import user_errors
from ..harness.options import (
    OUT,
    Batch,
    Device,
    Fresh,
    Hidden,
    Markdown,
    Seed,
    Threads,
    chosen_device,
    file_in,
    integers,
    names,
    use_threads,
)
from ..harness.terminal import print_tables
from ..harness.view import tell_files
from ..scaling.timing import points
from . import online
from .views import VIEWS


def online_command(
    hidden: Hidden = "",
    batch: Batch = "",
    forms: Annotated[
        str, typer.Option(help=f"{', '.join(online.FORMS)}; the device's defaults if left out.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Steps for which each form is timed.")] = online.LEAST_STEPS,
    chunk: Annotated[int, typer.Option(help="C, steps between updates of the forms that take chunks.")] = 16,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[float, typer.Option(help="The most seconds that a form may take at a point.")] = 120,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of online.jsonl and the plot.")] = OUT,
) -> None:
    """Time whole online steps, each by itself: percentiles of the latency, throughput, energy.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        use_threads(threads)
        where = chosen_device(device)
        kind = torch.device(where).type
        given = integers("hidden", hidden), integers("batch", batch)
        settings = online.Settings(
            points=points(*given, default=online.POINTS[kind]),
            forms=names(forms) or online.DEFAULT_FORMS[kind],
            steps=steps,
            chunk=chunk,
            device=where,
            seed=check.integer("--seed", seed, 0),
            budget=budget,
        )
        file = file_in(out, online.FILE, fresh)
        records = online.run(settings, file, Console(stderr=True))
        print_tables([online.table(records)], markdown)
        tell_files(VIEWS["online"], records, file, markdown)
