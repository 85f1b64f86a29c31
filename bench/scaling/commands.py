"""The commands of this wing: `rjepa bench scaling`, `selfcheck`, `forward` and `memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ... import _checks as check
from ..._command import user_errors
from ...backends import operations
from ..harness import inputs
from ..harness.options import (
    OUT,
    Batch,
    Device,
    Fresh,
    Hidden,
    Markdown,
    Passes,
    Sample,
    Seed,
    Threads,
    chosen_device,
    file_in,
    integers,
    names,
    text_of,
    use_threads,
)
from ..harness.terminal import print_tables, show
from ..harness.view import tell_files
from . import cases, forward, memory, plot, selfcheck
from . import tables as scaling_tables
from . import timing as scaling
from .views import VIEWS


def scaling_command(
    hidden: Hidden = "",
    batch: Batch = "",
    steps: Annotated[int, typer.Option(help="T, steps of the sequence.")] = 50,
    chunk: Annotated[int, typer.Option(help="C, steps in a chunk.")] = 16,
    dtype: Annotated[str, typer.Option(help=", ".join(cases.DTYPES))] = "float32",
    device: Device = "auto",
    algorithms: Annotated[str, typer.Option(help=", ".join(cases.CASES))] = ",".join(cases.DEFAULT),
    input: Annotated[str, typer.Option(help=", ".join(inputs.INPUTS))] = "photo",
    scale: Annotated[float, typer.Option(help="c in W ~ c·N(0, 1)/√N.")] = 0.1,
    backend: Annotated[str, typer.Option(help=f"What runs Γ: {', '.join(operations.BACKENDS)}")] = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[
        float, typer.Option(help="The most seconds that a case may be predicted to take at a point.")
    ] = 30,
    sample: Sample = 0.5,
    passes: Passes = 3,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of scaling.jsonl.")] = OUT,
) -> None:
    """Measure time per step and memory of every algorithm against N.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        use_threads(threads)
        settings = scaling.Settings(
            points=scaling.points(integers("hidden", hidden), integers("batch", batch)),
            algorithms=names(algorithms),
            steps=steps,
            chunk=chunk,
            dtype=dtype,
            device=chosen_device(device),
            input=input,
            scale=scale,
            backend=backend,
            seed=check.integer("--seed", seed, 0),
            budget=budget,
            case_seconds=sample,
            passes=passes,
        )
        file = file_in(out, scaling.FILE, fresh)
        records = scaling.run(settings, file, Console(stderr=True))
        show(scaling_tables.tables(records))
        typer.echo(f"records: {file}")
        for batch in sorted({r.params["B"] for r in records}):
            here = [r for r in records if r.params["B"] == batch]
            for written in plot.draw(here, file.with_name(f"{file.stem}-B{batch}")):
                typer.echo(f"plot:    {written}")


def selfcheck_command(
    runs: Annotated[int, typer.Option(help="How often the sweep runs.")] = 21,
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "128,256,384,512,768,1024,1536",
    batch: Annotated[int, typer.Option(help="B, rows of the batch.")] = 1,
    algorithms: Annotated[
        str, typer.Option(help=", ".join(cases.CASES))
    ] = "rfp-step,rfp-step-gamma,rfp-chunk,rfp-dual,bptt,bptt-autograd",
    device: Device = "auto",
    threads: Threads = 0,
    sample: Sample = 0.5,
    passes: Passes = 3,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of selfcheck.jsonl, and of the runs' own files.")] = OUT,
) -> None:
    """Run the scaling sweep again and again: does `compare` see changes where there are none, and do slopes repeat?

    The command continues where an earlier run with the same options stopped.
    """
    with user_errors():
        use_threads(threads)
        settings = scaling.Settings(
            points=scaling.points(integers("hidden", hidden), (batch,)),
            algorithms=names(algorithms),
            device=chosen_device(device),
            case_seconds=sample,
            passes=passes,
        )
        progress = Console(stderr=True)
        made = selfcheck.run(settings, runs, out, lambda line: progress.print(line, highlight=False))
        print_tables([selfcheck.table(made)], markdown)
        for change in (change for r in made for change in r.payload["changes"]):
            typer.echo(f"seen as a change: {change}", err=markdown)


def forward_command(
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "64,256",
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = "1,8",
    steps: Annotated[str, typer.Option(help="T, with commas between.")] = "1024,4096",
    cells: Annotated[str, typer.Option(help="Which cells, with commas between.")] = ",".join(forward.CELLS),
    scale: Annotated[float, typer.Option(help="c in W ~ c·N(0, 1)/√N.")] = 0.1,
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    budget: Annotated[
        float, typer.Option(help="Seconds that a call may take; a slower one isn't timed.")
    ] = 3,
    sample: Annotated[float, typer.Option(help="Seconds for which each mode is sampled at a point.")] = 0.2,
    markdown: Markdown = False,
    out: Annotated[Path, typer.Option(help="Folder of forward.jsonl.")] = OUT,
) -> None:
    """Time the forward pass in parallel in time against the loop, and predict a training step on a GPU."""
    with user_errors():
        use_threads(threads)
        settings = forward.Settings(
            hidden=integers("hidden", hidden),
            batches=integers("batch", batch),
            steps=integers("steps", steps),
            cells=names(cells),
            scale=scale,
            device=chosen_device(device),
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


def memory_command(
    steps: Annotated[str, typer.Option(help="T, with commas between.")] = text_of(memory.SWEEPS["T"]),
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = text_of(memory.SWEEPS["N"]),
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = text_of(memory.SWEEPS["B"]),
    base: Annotated[
        str, typer.Option(help="N,B,T: the values that stay while another one is swept.")
    ] = text_of(tuple(memory.BASE.values())),
    chunk: Annotated[int, typer.Option(help="C of the cases that take chunks.")] = 16,
    algorithms: Annotated[str, typer.Option(help=", ".join(cases.CASES))] = ",".join(memory.ALGORITHMS),
    device: Device = "auto",
    backend: Annotated[str, typer.Option(help=f"What runs Γ: {', '.join(operations.BACKENDS)}")] = "auto",
    budget: Annotated[float, typer.Option(help="The most seconds that a case may take at a point.")] = 10,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of memory.jsonl and the plot.")] = OUT,
) -> None:
    """Measure and predict peak memory against T, N and B, and find where BPTT needs more than the others.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        fixed = integers("base", base)
        if len(fixed) != len(memory.BASE):
            raise ValueError(f"--base must be N,B,T, such as 128,8,128, got {base!r}")
        settings = memory.Settings(
            sweeps={
                "T": integers("steps", steps),
                "N": integers("hidden", hidden),
                "B": integers("batch", batch),
            },
            base=dict(zip(memory.BASE, fixed, strict=True)),
            algorithms=names(algorithms),
            chunk=chunk,
            device=chosen_device(device),
            backend=backend,
            budget=budget,
        )
        file = file_in(out, memory.FILE, fresh)
        records = memory.run(settings, file, Console(stderr=True))
        print_tables(memory.tables(records), markdown)
        tell_files(VIEWS["memory"], records, file, markdown)
