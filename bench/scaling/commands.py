"""The commands of this wing: `rjepa bench scaling`, `selfcheck`, `forward` and `memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ... import _checks as check
from ...backend import operations
from ..harness import options
from ..harness.terminal import plain_console, print_tables, show
from ..harness.view import show_records
from . import cases, forward, memory, selfcheck
from . import tables as scaling_tables
from . import timing as scaling
from .views import VIEWS, draw_sizes

Algorithms = Annotated[str, typer.Option(help=", ".join(cases.CASES))]
GammaBackend = Annotated[str, typer.Option(help=f"What runs Γ: {', '.join(operations.BACKENDS)}")]


@options.resumes
def scaling_command(
    hidden: options.Hidden = "",
    batch: options.Batch = "",
    steps: options.Steps = 50,
    chunk: Annotated[int, typer.Option(help="C, steps in a chunk.")] = 16,
    dtype: Annotated[str, typer.Option(help=", ".join(cases.DTYPES))] = "float32",
    device: options.Device = "auto",
    algorithms: Algorithms = ",".join(cases.DEFAULT),
    input: options.Input = "photo",
    scale: options.Scale = 0.1,
    backend: GammaBackend = "auto",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    budget: Annotated[
        float, typer.Option(help="The most seconds that a case may be predicted to take at a point.")
    ] = 30,
    sample: options.Sample = 0.5,
    passes: options.Passes = 3,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of scaling.jsonl.")] = options.OUT,
) -> None:
    """Measure time per step and memory of every algorithm against N."""
    options.use_threads(threads)
    settings = scaling.Settings(
        points=scaling.points(options.integers("hidden", hidden), options.integers("batch", batch)),
        algorithms=options.names(algorithms),
        steps=steps,
        chunk=chunk,
        dtype=dtype,
        device=options.chosen_device(device),
        input=input,
        scale=scale,
        backend=backend,
        seed=check.integer("--seed", seed, 0),
        budget=budget,
        case_seconds=sample,
        passes=passes,
    )
    file = options.file_in(out, scaling.FILE, fresh)
    records = scaling.run(settings, file, plain_console(stderr=True))
    show(scaling_tables.tables(records))
    typer.echo(f"records: {file}")
    for written in draw_sizes(records, file):
        typer.echo(f"plot:    {written}")


def selfcheck_command(
    runs: Annotated[int, typer.Option(help="How often the sweep runs.")] = 21,
    hidden: options.HiddenList = "128,256,384,512,768,1024,1536",
    batch: Annotated[int, typer.Option(help="B, rows of the batch.")] = 1,
    algorithms: Algorithms = "rfp-step,rfp-step-gamma,rfp-chunk,rfp-dual,bptt,bptt-autograd",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    sample: options.Sample = 0.5,
    passes: options.Passes = 3,
    markdown: options.Markdown = False,
    out: Annotated[
        Path, typer.Option(help="Folder of selfcheck.jsonl, and of the runs' own files.")
    ] = options.OUT,
) -> None:
    """Run the scaling sweep again and again: does `compare` see changes where there are none, and do slopes repeat?

    The command continues where an earlier run with the same options stopped.
    """
    options.use_threads(threads)
    settings = scaling.Settings(
        points=scaling.points(options.integers("hidden", hidden), (batch,)),
        algorithms=options.names(algorithms),
        device=options.chosen_device(device),
        case_seconds=sample,
        passes=passes,
    )
    progress = plain_console(stderr=True)
    made = selfcheck.run(settings, runs, out, lambda line: progress.print(line, highlight=False))
    print_tables([selfcheck.table(made)], markdown)
    for change in (change for r in made for change in r.payload["changes"]):
        typer.echo(f"seen as a change: {change}", err=markdown)


def forward_command(
    hidden: options.HiddenList = "64,256",
    batch: options.BatchList = "1,8",
    steps: options.StepsList = "1024,4096",
    cells: Annotated[str, typer.Option(help="Which cells, with commas between.")] = ",".join(forward.CELLS),
    scale: options.Scale = 0.1,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    budget: Annotated[
        float, typer.Option(help="Seconds that a call may take; a slower one isn't timed.")
    ] = 3,
    sample: Annotated[float, typer.Option(help="Seconds for which each mode is sampled at a point.")] = 0.2,
    markdown: options.Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of forward.jsonl.")] = options.OUT,
) -> None:
    """Time the forward pass in parallel in time against the loop, and predict a training step on a GPU."""
    options.use_threads(threads)
    settings = forward.Settings(
        hidden=options.integers("hidden", hidden),
        batches=options.integers("batch", batch),
        steps=options.integers("steps", steps),
        cells=options.names(cells),
        scale=scale,
        device=options.chosen_device(device),
        seed=check.integer("--seed", seed, 0),
        budget=budget,
        case_seconds=sample,
    )
    out.mkdir(parents=True, exist_ok=True)
    file = out / forward.FILE
    records = forward.run(file, settings)
    predicted = forward.record_prediction(file, scale, seed)
    if markdown:
        typer.echo(f"{forward.markdown(records)}\n\n{forward.predicted_markdown(predicted)}")
    else:
        show([forward.table(records), forward.predicted_table(predicted)])
    typer.echo(f"records: {file}", err=markdown)


@options.resumes
def memory_command(
    steps: options.StepsList = options.text_of(memory.SWEEPS["T"]),
    hidden: options.HiddenList = options.text_of(memory.SWEEPS["N"]),
    batch: options.BatchList = options.text_of(memory.SWEEPS["B"]),
    base: Annotated[
        str, typer.Option(help="N,B,T: the values that stay while another one is swept.")
    ] = options.text_of(tuple(memory.BASE.values())),
    chunk: Annotated[int, typer.Option(help="C of the cases that take chunks.")] = 16,
    algorithms: Algorithms = ",".join(memory.ALGORITHMS),
    device: options.Device = "auto",
    backend: GammaBackend = "auto",
    budget: Annotated[float, typer.Option(help="The most seconds that a case may take at a point.")] = 10,
    markdown: options.Markdown = False,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of memory.jsonl and the plot.")] = options.OUT,
) -> None:
    """Measure and predict peak memory against T, N and B, and find where BPTT needs more than the others."""
    fixed = options.integers("base", base)
    if len(fixed) != len(memory.BASE):
        raise ValueError(f"--base must be N,B,T, such as 128,8,128, got {base!r}")
    settings = memory.Settings(
        sweeps={
            "T": options.integers("steps", steps),
            "N": options.integers("hidden", hidden),
            "B": options.integers("batch", batch),
        },
        base=dict(zip(memory.BASE, fixed, strict=True)),
        algorithms=options.names(algorithms),
        chunk=chunk,
        device=options.chosen_device(device),
        backend=backend,
        budget=budget,
    )
    file = options.file_in(out, memory.FILE, fresh)
    show_records(VIEWS["memory"], memory.run(settings, file, plain_console(stderr=True)), file, markdown)
