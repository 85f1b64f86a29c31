"""Processes of a gloo group, for tests: each call runs one function in every rank, and starts the ranks once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SECONDS = 20  # of the group's timeout


def _in_rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    folder: str,
    shape: tuple[int, ...],
    args: tuple[Any, ...],
) -> Any:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        rank=rank,
        world_size=ranks,
        init_method=f"file://{folder}/store",
        timeout=timedelta(seconds=SECONDS),
    )
    names = ("rows", "batch")[: len(shape)]
    mesh: DeviceMesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    try:
        return function(mesh, *args)
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(
    function: Callable[..., Any], ranks: int, folder: Path, *args: Any, shape: tuple[int, ...] = ()
) -> list[Any]:
    """What function(mesh, *args) returns on each rank. shape: of a mesh of more dimensions than one."""
    folder.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        given = [(function, rank, ranks, str(folder), shape or (ranks,), args) for rank in range(ranks)]
        calls = [pool.apply_async(_in_rank, one) for one in given]
        return [call.get(300) for call in calls]
