"""The commands of this wing: `rjepa bench online` and `rjepa bench ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ... import _checks as check
from ..harness import options
from ..harness.terminal import plain_console, print_tables
from ..harness.view import show_records
from ..scaling.timing import points
from . import online, ranks
from .views import VIEWS


@options.resumes
def online_command(
    hidden: options.Hidden = "",
    batch: options.Batch = "",
    forms: Annotated[
        str, typer.Option(help=f"{', '.join(online.FORMS)}; the device's defaults if left out.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Steps for which each form is timed.")] = online.LEAST_STEPS,
    chunk: Annotated[int, typer.Option(help="C, steps between updates of the forms that take chunks.")] = 16,
    population: Annotated[int, typer.Option(help="P, networks of the form stream-P.")] = 8,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    budget: Annotated[float, typer.Option(help="The most seconds that a form may take at a point.")] = 120,
    markdown: options.Markdown = False,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of online.jsonl and the plot.")] = options.OUT,
) -> None:
    """Time whole online steps, each by itself: percentiles of the latency, throughput, energy."""
    options.use_threads(threads)
    where = options.chosen_device(device)
    kind = torch.device(where).type
    given = options.integers("hidden", hidden), options.integers("batch", batch)
    settings = online.Settings(
        points=points(*given, default=online.POINTS[kind]),
        forms=options.names(forms) or online.DEFAULT_FORMS[kind],
        steps=steps,
        chunk=chunk,
        device=where,
        seed=check.integer("--seed", seed, 0),
        budget=budget,
        population=population,
    )
    file = options.file_in(out, online.FILE, fresh)
    show_records(VIEWS["online"], online.run(settings, file, plain_console(stderr=True)), file, markdown)


def ranks_command(
    hidden: Annotated[int, typer.Option(help="N, units of the layer.")] = 1024,
    batch: Annotated[int, typer.Option(help="B, rows of the batch.")] = 8,
    chunk: Annotated[int, typer.Option(help="C, steps between updates.")] = 16,
    count: Annotated[int, typer.Option("--ranks", help="R, processes that share the rows.")] = 2,
    rounds: Annotated[int, typer.Option(help="Updates that are timed.")] = 20,
    markdown: options.Markdown = False,
) -> None:
    """Time a learner whose rows lie on several processes of this CPU, by gloo, against one process with all rows."""
    question = ranks.Question(hidden, batch, chunk, count, rounds)
    print_tables([ranks.table(question, ranks.run(question))], markdown)
