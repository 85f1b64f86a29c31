"""A learner whose rows lie on ranks of this machine, against one process that has them all: `rjepa bench ranks`.

Each rank is a process with one thread, joined to the others by gloo. In every round the first rank times an update of
a learner of its own while the others wait, and then all time an update of the sharded learner, so that whatever else
the machine does meets both. Both updates are a chunk of C steps, its backward pass and SGD, from the same weights and
inputs; their outputs are compared before anything is timed.
"""

from __future__ import annotations

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
    """Of one rank: seconds of an update in each round, alone (of the first rank) and together; bytes of Γ likewise."""

    alone: list[float]
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

    whole, alone = made(False) if rank == 0 else (None, None)
    shared, together = made(True)
    for _ in range(2):  # which also warms up
        found = together()
        if alone is not None:
            torch.testing.assert_close(found, alone())
    taken, shared_taken = [], []
    for _ in range(question.rounds):
        torch.distributed.barrier()
        if alone is not None:
            taken.append(_seconds(alone))
        torch.distributed.barrier()
        shared_taken.append(_seconds(together))
    return Timed(taken, shared_taken, 0 if whole is None else whole.carried_bytes, shared.carried_bytes)


def _seconds(update: Callable[[], object]) -> float:
    begin = time.perf_counter()
    update()
    return time.perf_counter() - begin


def table(question: Question, found: list[Timed]) -> Table:
    """Both learners in a table: the median time of an update, of the slowest rank in each round, and Γ of a rank."""
    shared = [max(times) for times in zip(*(rank.together for rank in found), strict=True)]
    alone = found[0].alone
    ratio = measure.timing([a / b for a, b in zip(alone, shared, strict=True)])
    low, high = ratio.p20, ratio.p80
    out = Table(
        title=f"rgc N = {question.hidden}, B = {question.batch}, C = {question.chunk}, float32, one thread a process",
        caption=f"{question.ranks} ranks are {ratio.median:.2f} times as fast as one process (p20 {low:.2f}, p80 "
        f"{high:.2f}, of {question.rounds} rounds in turn)",
    )
    for heading in ("processes", "an update", "a step", "Γ of a rank"):
        out.add_column(heading, justify="right")
    for count, taken, gamma in (
        (1, alone, found[0].gamma_alone),
        (question.ranks, shared, max(rank.gamma for rank in found)),
    ):
        seconds = measure.timing(taken).median
        out.add_row(
            str(count), seconds_text(seconds), seconds_text(seconds / question.chunk), bytes_text(gamma)
        )
    return out
