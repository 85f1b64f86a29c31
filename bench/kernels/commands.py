"""The commands of this wing: `rjepa bench kernels`, `roofline` and `targets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ... import _checks as check
from ..harness import options, record
from ..harness.terminal import plain_console, print_tables, show
from ..harness.view import show_records
from ..scaling.timing import points
from . import cases, roofline, targets
from . import timing as kernels
from .views import VIEWS


@options.resumes
def kernels_command(
    hidden: options.Hidden = "",
    batch: options.Batch = "",
    steps: Annotated[int, typer.Option(help="T of the scans.")] = 64,
    which: Annotated[str, typer.Option("--kernels", help="Which kernels, with commas between.")] = ",".join(
        cases.KERNELS
    ),
    by: Annotated[str, typer.Option(help="By what each is run, with commas between.")] = ",".join(cases.BY),
    device: options.Device = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    sample: Annotated[float, typer.Option(help="Seconds for which each runner is sampled at a point.")] = 0.3,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of kernels.jsonl.")] = options.OUT,
) -> None:
    """Time each kernel against the least time that its bytes and FLOP allow on this device."""
    options.use_threads(threads)
    where = options.chosen_device(device)
    settings = kernels.Settings(
        points=points(
            options.integers("hidden", hidden),
            options.integers("batch", batch),
            default=kernels.POINTS[torch.device(where).type],
        ),
        kernels=options.names(which),
        by=options.names(by),
        steps=steps,
        device=where,
        seed=check.integer("--seed", seed, 0),
        case_seconds=sample,
    )
    file = options.file_in(out, kernels.FILE, fresh)
    show_records(VIEWS["kernels"], kernels.run(settings, file, plain_console(stderr=True)), file)


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
    ] = options.OUT,
) -> None:
    """Show kernels against the roofline: measured by `rjepa bench kernels`, or with --predict predicted."""
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
    sizes = (options.integers("hidden", hidden), options.integers("batch", batch))
    file = out / roofline.FILE
    show(roofline.tables(roofline.run(file, gpu, roofline.points(*sizes), steps)))
    typer.echo(f"records: {file}")


def targets_command(
    results: Annotated[
        Path | None, typer.Argument(help="Folder of a GPU's records, to show beside the predictions.")
    ] = None,
    gpu: Annotated[str, typer.Option(help=", ".join(roofline.GPUS))] = "h100",
    markdown: options.Markdown = False,
) -> None:
    """Show what the kernels are meant to reach on a GPU: predicted, and beside it measured if there are records."""
    measured = [] if results is None else record.load_all(results)
    print_tables([targets.table(gpu, [r for r in measured if r.params.get("device") == "cuda"])], markdown)
