"""The command of this wing: `rjepa bench peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ... import _checks as check
from ..harness import options
from ..harness.terminal import plain_console
from ..harness.view import show_records
from . import run as peers
from .registry import DEFAULT, PEERS
from .tasks import TASKS
from .views import VIEWS


@options.resumes
def peers_command(
    hidden: options.HiddenList = "64,256",
    batch: options.BatchList = "1",
    steps: options.Steps = 50,
    which: Annotated[str, typer.Option("--tasks", help=", ".join(TASKS))] = ",".join(TASKS),
    chosen: Annotated[str, typer.Option("--peers", help=", ".join(PEERS))] = ",".join(DEFAULT),
    threads: Annotated[int, typer.Option(help="CPU threads of each peer; torch's own choice if 0.")] = 0,
    device: options.Device = "auto",
    input: options.Input = "photo",
    scale: Annotated[float, typer.Option(help="c in an RGC's W ~ c·N(0, 1)/√N.")] = 0.1,
    seed: options.Seed = 0,
    rounds: Annotated[int, typer.Option(help="Samples of each peer, taken in turn.")] = 25,
    sample: Annotated[float, typer.Option(help="The least seconds of a sample.")] = 0.02,
    limit: Annotated[
        float, typer.Option(help="Seconds that a peer may take for its first gradient, compilation included.")
    ] = 300,
    markdown: options.Markdown = False,
    fresh: options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of peers.jsonl.")] = options.OUT,
) -> None:
    """Compare with other libraries' ways to the same gradient: each is checked in its own process and timed in turn."""
    settings = peers.Settings(
        tasks=options.names(which),
        peers=options.names(chosen),
        hidden=options.integers("hidden", hidden),
        batches=options.integers("batch", batch),
        steps=steps,
        threads=check.integer("--threads", threads, 0) or torch.get_num_threads(),
        device=options.chosen_device(device),
        input=input,
        scale=scale,
        seed=check.integer("--seed", seed, 0),
        rounds=rounds,
        sample_seconds=sample,
        limit=limit,
    )
    file = options.file_in(out, peers.FILE, fresh)
    show_records(VIEWS["peers"], peers.report(settings, file, plain_console(stderr=True)), file, markdown)
