"""The commands of this wing: `rjepa bench kernels`, `roofline` and `targets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ... import _checks as check
from ..._command import user_errors
from ..harness import record
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
from ..harness.terminal import print_tables, show
from ..harness.view import tell_files
from ..scaling.timing import points
from . import cases, roofline, targets
from . import timing as kernels
from .views import VIEWS


def kernels_command(
    hidden: Hidden = "",
    batch: Batch = "",
    steps: Annotated[int, typer.Option(help="T of the scans.")] = 64,
    which: Annotated[str, typer.Option("--kernels", help="Which kernels, with commas between.")] = ",".join(
        cases.KERNELS
    ),
    device: Device = "auto",
    threads: Threads = 0,
    seed: Seed = 0,
    sample: Annotated[float, typer.Option(help="Seconds for which each runner is sampled at a point.")] = 0.3,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of kernels.jsonl.")] = OUT,
) -> None:
    """Time each kernel against the least time that its bytes and FLOP allow on this device.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        use_threads(threads)
        where = chosen_device(device)
        settings = kernels.Settings(
            points=points(
                integers("hidden", hidden),
                integers("batch", batch),
                default=kernels.POINTS[torch.device(where).type],
            ),
            kernels=names(which),
            steps=steps,
            device=where,
            seed=check.integer("--seed", seed, 0),
            case_seconds=sample,
        )
        file = file_in(out, kernels.FILE, fresh)
        records = kernels.run(settings, file, Console(stderr=True))
        show([kernels.table(records)])
        tell_files(VIEWS["kernels"], records, file)


def roofline_command(
    predict: Annotated[
        bool, typer.Option("--predict", help="Compile for --gpu and predict; no GPU is needed.")
    ] = False,
    gpu: Annotated[str, typer.Option(help=f"With --predict, the GPU: {', '.join(roofline.GPUS)}")] = "h100",
    hidden: Annotated[str, typer.Option(help="With --predict, N, with commas between.")] = "",
    batch: Annotated[str, typer.Option(help="With --predict, B, with commas between.")] = "",
    steps: Annotated[int, typer.Option(help="With --predict, T of the scans.")] = 64,
    out: Annotated[
        Path, typer.Option(help="Folder of kernels.jsonl; with --predict, of roofline.jsonl.")
    ] = OUT,
) -> None:
    """Show kernels against the roofline: measured by `rjepa bench kernels`, or with --predict predicted."""
    with user_errors():
        if not predict:
            if not (out / kernels.FILE).exists():
                raise ValueError(
                    f"{out / kernels.FILE} isn't there: run `rjepa bench kernels` first, or give --predict"
                )
            measured = record.latest(r for r in record.load(out / kernels.FILE) if r.benchmark == "kernels")
            show([kernels.table([r for r in measured if r.device == name]) for name in
                  sorted({r.device for r in measured})])  # fmt: skip
            return
        out.mkdir(parents=True, exist_ok=True)
        sizes = (integers("hidden", hidden), integers("batch", batch))
        file = out / roofline.FILE
        show(roofline.tables(roofline.run(file, gpu, roofline.points(*sizes), steps)))
        typer.echo(f"records: {file}")


def targets_command(
    results: Annotated[
        Path | None, typer.Argument(help="Folder of a GPU's records, to show beside the predictions.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=", ".join(roofline.GPUS))] = "h100",
    markdown: Markdown = False,
) -> None:
    """Show what the kernels are meant to reach on a GPU: predicted, and beside it measured if there are records."""
    with user_errors():
        measured = [] if results is None else record.load_all(results)
        print_tables(
            [targets.table(gpu, [r for r in measured if r.params.get("device") == "cuda"])], markdown
        )
