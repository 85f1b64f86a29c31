"""The commands of this wing: `rjepa bench fidelity`, `learn` and `pays`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ... import _checks as check
from ..harness import options
from ..harness.tables import place
from ..harness.terminal import plain_console, show
from ..harness.view import show_records
from . import fidelity, frontier, learn, pays, probes, tasks
from .views import VIEWS


def fidelity_command(
    sweeps: Annotated[
        str, typer.Option(help="Which sweeps, with commas between: " + ", ".join(fidelity.SWEEPS))
    ] = ",".join(fidelity.SWEEPS),
    seeds: Annotated[int, typer.Option(help="Number of seeds; each sweep's own if 0.")] = 0,
    markdown: options.Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of fidelity.jsonl and the plot.")] = options.OUT,
) -> None:
    """Compare each learning rule's gradient with the exact one, and its cost: tables, and the frontier's plot."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = options.names(sweeps)
    settings = fidelity.Settings(chosen, seeds or None)
    progress = plain_console(stderr=True)
    records = fidelity.run(settings, out / fidelity.FILE, progress.print)
    if markdown:
        for table in fidelity.all_rows(records):
            typer.echo(f"{table[0]}\n\n{fidelity.markdown(table)}\n")
    else:
        show(fidelity.tables(records))
    if "frontier" in chosen:
        frontier.draw(records, out / "fidelity.png")


@options.resumes
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
    markdown: options.Markdown = False,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of learn.jsonl and the plot.")] = options.OUT,
) -> None:
    """Learn online by each rule, on the CPU: loss curves, and final losses with intervals over seeds."""
    settings = learn.Settings(
        tasks=options.names(which),
        rules=options.names(rules),
        seeds=seeds,
        steps=steps,
        hidden=hidden,
        batch=batch,
        chunk=chunk,
        jobs=check.integer("--jobs", jobs, 0) or learn.default_jobs(),
    )
    file = options.file_in(out, learn.FILE, fresh)
    show_records(VIEWS["learn"], learn.run(settings, file, plain_console(stderr=True)), file, markdown)


@options.resumes
def pays_command(
    which: Annotated[str, typer.Option("--tasks", help=", ".join(probes.PROBES))] = ",".join(probes.PROBES),
    cells: Annotated[str, typer.Option(help=", ".join(pays.CELLS))] = "RNN,GRU",
    rules: Annotated[str, typer.Option(help=", ".join(pays.RULES))] = ",".join(pays.RULES),
    optimizers: Annotated[str, typer.Option(help=", ".join(pays.OPTIMIZERS))] = ",".join(pays.OPTIMIZERS),
    hidden: Annotated[
        str, typer.Option(help="Sizes N, with commas between; rtrl runs up to 32 units.")
    ] = "32",
    steps: Annotated[int, typer.Option(help="T, steps of the stream.")] = 20_000,
    seeds: Annotated[int, typer.Option(help="Number of seeds, at least 2.")] = 10,
    markdown: options.Markdown = False,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of pays.jsonl and the plot.")] = options.OUT,
) -> None:
    """Ask on which tasks a sensitivity pays: no trace, e-prop, RFP, blocks and exact RTRL, over seeds, on the CPU."""
    settings = pays.Settings(
        options.names(which),
        options.names(cells),
        options.names(rules),
        options.names(optimizers),
        options.integers("hidden", hidden),
        steps,
        seeds,
    )
    file = options.file_in(out, pays.FILE, fresh)
    console = plain_console(stderr=True)
    records = pays.measure(
        settings,
        file,
        lambda made, done, of: console.print(
            f"{done} of {of}: {place(made)}{': ' + made.message if made.message else ''}", highlight=False
        ),
    )
    show_records(VIEWS["pays"], records, file, markdown)
