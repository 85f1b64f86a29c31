"""A learner whose rows lie on ranks of this machine, against one process that has them all: `rjepa bench ranks`.

Each rank is a process with one thread, joined to the others by gloo, and has a whole learner too. In every round

1. the first rank times an update of its whole learner while the others wait,
2. all ranks do that at once, which says how much work the machine's processors do together where nothing is shared,
3. all time an update of the sharded learner,

so that whatever else the machine does meets all three. A rank stays on a processor of its own, as launchers of such
programs have it, where the system can be told: else two ranks may meet on one while another rests. An update is a
chunk of C steps, its backward pass and SGD, from the same weights and inputs; outputs are compared before anything is
timed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ... import _checks as check
from ... import _processes
from ...layers.named import RGC
from ...online.learner import OnlineLearner
from ..harness import measure
from ..harness.tables import bytes_text, seconds_text

SECONDS = timedelta(minutes=5)  # of a rank that is waited for


@dataclass(frozen=True)
class Question:
    """N, B, C, R, and how many rounds are timed. Raises TypeError or ValueError, naming the option."""

    hidden: int
    batch: int
    chunk: int
    ranks: int
    rounds: int

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("batch", 1), ("chunk", 2), ("ranks", 1), ("rounds", 1)):
            check.integer(f"--{name}", getattr(self, name), least)


@dataclass(frozen=True)
class Timed:
    """Of one rank: seconds of an update in each round and bytes of Γ.

    alone: of the whole learner while the others wait, of the first rank only. at_once: of the whole learner while all
    ranks do the same. together: of the sharded learner.
    """

    alone: list[float]
    at_once: list[float]
    together: list[float]
    gamma_alone: int
    gamma: int


def run(question: Question) -> list[Timed]:
    """Time both learners in processes of their own. Raises what a rank raises."""
    with tempfile.TemporaryDirectory() as folder, _processes.Workers(question.ranks) as pool:
        calls = [
            pool.submit(_rank, question, rank, f"file://{folder}/store") for rank in range(question.ranks)
        ]
        return [call.result() for call in calls]


def _rank(question: Question, rank: int, store: str) -> Timed:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # not on macOS and Windows
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[rank % len(allowed)]})
    measure.keep_freed_memory()
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=question.ranks, init_method=store, timeout=SECONDS
    )
    try:
        return _timed(question, rank)
    finally:
        torch.distributed.destroy_process_group()


def _timed(question: Question, rank: int) -> Timed:
    mesh = init_device_mesh("cpu", (question.ranks,))
    x = torch.randn(
        question.chunk, question.batch, question.hidden, generator=torch.Generator().manual_seed(1)
    )

    def made(sharded: bool) -> tuple[OnlineLearner, Callable[[], Tensor]]:
        torch.manual_seed(0)
        layer = RGC(question.hidden)
        options = {"form": "chunk", "update_every": question.chunk, "mesh": mesh if sharded else None}
        learner = OnlineLearner(layer, question.batch, **options)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

        def update() -> Tensor:
            output = learner.chunk(x)
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return output.detach()

        return learner, update

    (whole, alone), (shared, together) = made(False), made(True)
    for _ in range(2):  # which also warms up
        torch.testing.assert_close(together(), alone())
    timed = Timed([], [], [], whole.carried_bytes, shared.carried_bytes)
    for _ in range(question.rounds):
        torch.distributed.barrier()
        if rank == 0:
            timed.alone.append(_seconds(alone))
        torch.distributed.barrier()
        timed.at_once.append(_seconds(alone))
        torch.distributed.barrier()
        timed.together.append(_seconds(together))
    return timed


def _seconds(update: Callable[[], object]) -> float:
    begin = time.perf_counter()
    update()
    return time.perf_counter() - begin


def table(question: Question, found: list[Timed]) -> Table:
    """The three in a table: the median time of an update, of the slowest rank in each round, and Γ of a rank."""
    alone = found[0].alone
    at_once, together = (
        [max(times) for times in zip(*each, strict=True)]
        for each in ([rank.at_once for rank in found], [rank.together for rank in found])
    )
    out = Table(
        title=f"rgc N = {question.hidden}, B = {question.batch}, C = {question.chunk}, float32, one thread a process",
        caption=f"{question.ranks} ranks are {_ratio(alone, together)} times as fast as one process (p20 to p80, of "
        f"{question.rounds} rounds in turn). As many processes that share nothing do "
        f"{_ratio([question.ranks * seconds for seconds in alone], at_once)} times the work of one.",
    )
    for heading in ("processes", "learner", "an update", "a step", "Γ of a rank"):
        out.add_column(heading, justify="right")
    for count, what, taken, gamma in (
        (1, "whole", alone, found[0].gamma_alone),
        (question.ranks, "whole, each its own", at_once, found[0].gamma_alone),
        (question.ranks, "sharded", together, max(rank.gamma for rank in found)),
    ):
        seconds = measure.timing(taken).median
        step = seconds_text(seconds / question.chunk)
        out.add_row(str(count), what, seconds_text(seconds), step, bytes_text(gamma))
    return out


def _ratio(before: list[float], after: list[float]) -> str:
    found = measure.timing([a / b for a, b in zip(before, after, strict=True)])
    return f"{found.median:.2f} ({found.p20:.2f} to {found.p80:.2f})"
