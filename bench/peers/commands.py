"""The command of this wing: `rjepa bench peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ... import _checks as check
from ..._command import user_errors
from ..harness import inputs
from ..harness.options import OUT, Device, Fresh, Markdown, Seed, chosen_device, file_in, integers, names
from ..harness.terminal import print_tables
from ..harness.view import tell_files
from . import run as peers
from .registry import PEERS
from .tasks import TASKS
from .views import VIEWS


def peers_command(
    hidden: Annotated[str, typer.Option(help="N, with commas between.")] = "64,256",
    batch: Annotated[str, typer.Option(help="B, with commas between.")] = "1",
    steps: Annotated[int, typer.Option(help="T, steps of the sequence.")] = 50,
    which: Annotated[str, typer.Option("--tasks", help=", ".join(TASKS))] = ",".join(TASKS),
    chosen: Annotated[str, typer.Option("--peers", help=", ".join(PEERS))] = ",".join(PEERS),
    threads: Annotated[int, typer.Option(help="CPU threads of each peer; torch's own choice if 0.")] = 0,
    device: Device = "auto",
    input: Annotated[str, typer.Option(help=", ".join(inputs.INPUTS))] = "photo",
    scale: Annotated[float, typer.Option(help="c in an RGC's W ~ c·N(0, 1)/√N.")] = 0.1,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(help="Samples of each peer, taken in turn.")] = 25,
    sample: Annotated[float, typer.Option(help="The least seconds of a sample.")] = 0.02,
    limit: Annotated[
        float, typer.Option(help="Seconds that a peer may take for its first gradient, compilation included.")
    ] = 300,
    markdown: Markdown = False,
    fresh: Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder of peers.jsonl.")] = OUT,
) -> None:
    """Compare with other libraries' ways to the same gradient: each is checked, in its own process, and timed in turn.

    The command continues where an earlier run with the same options stopped, and keeps its records.
    """
    with user_errors():
        settings = peers.Settings(
            tasks=names(which),
            peers=names(chosen),
            hidden=integers("hidden", hidden),
            batches=integers("batch", batch),
            steps=steps,
            threads=check.integer("--threads", threads, 0) or torch.get_num_threads(),
            device=chosen_device(device),
            input=input,
            scale=scale,
            seed=check.integer("--seed", seed, 0),
            rounds=rounds,
            sample_seconds=sample,
            limit=limit,
        )
        file = file_in(out, peers.FILE, fresh)
        records = peers.report(settings, file, Console(stderr=True))
        print_tables(peers.tables(records), markdown)
        tell_files(VIEWS["peers"], records, file, markdown)
