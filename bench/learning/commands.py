"""The commands of this wing: `rjepa bench fidelity` and `learn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ... import _checks as check
from ..._command import user_errors
from ..harness.options import OUT, Fresh, Markdown, file_in, names
from ..harness.terminal import print_tables, show
from ..harness.view import tell_files
from . import fidelity, frontier, learn, tasks
from .views import VIEWS


def fidelity_command(
    sweeps: Annotated[
        str, typer.Option(help="Which sweeps, with commas between: " + ", ".join(fidelity.SWEEPS))
    ] = ",".join(fidelity.SWEEPS),
    seeds: Annotated[int, typer.Option(help="Number of seeds; each sweep's own if 0.")] = 0,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of fidelity.jsonl and the plot.")] = OUT,
) -> None:
    """Compare each learning rule's gradient with the exact one, and its cost: tables, and the frontier's plot."""
    with user_errors():
        out.mkdir(parents=True, exist_ok=True)
        chosen = names(sweeps)
        settings = fidelity.Settings(chosen, seeds or None)
        progress = Console(stderr=True)
        records = fidelity.run(settings, out / fidelity.FILE, progress.print)
        if markdown:
            for table in fidelity.all_rows(records):
                typer.echo(f"{table[0]}\n\n{fidelity.markdown(table)}\n")
        else:
            show(fidelity.tables(records))
        if "frontier" in chosen:
            frontier.draw(records, out / "fidelity.png")


def learn_command(
    which: Annotated[str, typer.Option("--tasks", help=", ".join(tasks.TASKS))] = ",".join(tasks.TASKS),
    rules: Annotated[str, typer.Option(help=", ".join(learn.RULES))] = ",".join(learn.RULES),
    seeds: Annotated[int, typer.Option(help="Number of seeds, at least 2.")] = 5,
    steps: Annotated[
        int, typer.Option(help=f"T, steps of the stream, a multiple of {learn.WINDOWS} · C.")
    ] = 1600,
    hidden: Annotated[int, typer.Option(help=f"N, a multiple of the number of heads, {learn.HEADS}.")] = 16,
    batch: Annotated[int, typer.Option(help="B, rows of the stream.")] = 8,
    chunk: Annotated[int, typer.Option(help="C, steps between updates of the rules that take chunks.")] = 4,
    jobs: Annotated[int, typer.Option(help="Processes with one thread each; one for each core if 0.")] = 0,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of learn.jsonl and the plot.")] = OUT,
) -> None:
    """Learn online by each rule, on the CPU: loss curves, and final losses with intervals over seeds.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        settings = learn.Settings(
            tasks=names(which),
            rules=names(rules),
            seeds=seeds,
            steps=steps,
            hidden=hidden,
            batch=batch,
            chunk=chunk,
            jobs=check.integer("--jobs", jobs, 0) or learn.default_jobs(),
        )
        file = file_in(out, learn.FILE, fresh)
        records = learn.run(settings, file, Console(stderr=True))
        print_tables(learn.tables(records), markdown)
        tell_files(VIEWS["learn"], records, file, markdown)
