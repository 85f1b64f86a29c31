"""One peer in a process of its own, `python -m rjepa_triton.bench.peers.worker`, which speaks JSON, one object a line.

The first line of input says what to build. Its answer comes when the peer's gradients have been written to a file, for
the parent to check. Each further line asks for a warm-up or a sample, and gets one answer. The end of input ends the
process, so no worker outlives its parent. What a peer prints goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
import time
from typing import Any

import numpy as np
import torch

from ..harness import measure
from ..harness.device import out_of_memory
from .runner import Runner


def build(job: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """Build a runner, write its gradients to the file job["gradients"], and return it with facts for its record."""
    torch.set_num_threads(job["threads"])
    measure.keep_freed_memory()
    with np.load(job["problem"]) as file:
        arrays = dict(file)
    begin = time.perf_counter()
    runner: Runner = getattr(importlib.import_module(job["module"]), job["runner"])(
        job["task"], arrays, job["device"]
    )
    found = runner.gradients()
    first = time.perf_counter() - begin
    np.savez(job["gradients"], **found)  # type: ignore[arg-type] # numpy's stub takes them for other arguments
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    about = {
        "first_seconds": first,
        "covers": runner.covers,
        "note": runner.note,
        "torch_threads": torch.get_num_threads(),
        "cpus": cpus,
    }
    return runner, about


def answer(runner: Runner, asked: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Answer {"warm": s} by how many calls make a sample of s seconds, {"calls": n} by a sample's seconds a call."""
    if "warm" in asked:
        return {"calls": max(1, math.ceil(asked["warm"] / measure.warm_up(runner.run, device)))}
    runner.run()  # since the last sample, other workers have filled the caches
    return {"seconds": measure.seconds(runner.run, asked["calls"], device)}


def main() -> None:
    """Answer lines of stdin until it ends. stdout itself becomes stderr, so that no peer prints among the answers."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    runner: Runner | None = None
    device = torch.device("cpu")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if runner is None:
                device = torch.device(asked["device"])
                runner, reply = build(asked)
                gc.collect()
                gc.disable()  # a collection in the middle of a sample would count as its time
            else:
                reply = answer(runner, asked, device)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "oom": out_of_memory(error)}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
