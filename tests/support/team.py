"""A team of a stream's kernel as processes that share memory: each interprets one program, and they wait for each other.

`python team.py ROWS` compares a network whose programs have so many units with one that a single program has, and
prints the largest difference. Triton's interpreter runs one program after the other, so that a team in one process would
wait for ever. Its atomic operations are the processor's own, and hold between processes.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import traceback
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads can't be forked

import torch
from torch import Tensor, nn

from rjepa_triton import LSTM, RGC, Stream
from rjepa_triton.kernels import cell_stream, stream_layout
from rjepa_triton.online import stream_kernel

STEPS = 5
ROOM = cell_stream.Room.of


class _OneProgram:
    """The kernel, of which this process runs one program of the grid."""

    def __init__(self, kernel: Any, rank: int) -> None:
        from triton.runtime import interpreter

        self.kernel, builder = kernel, interpreter.interpreter_builder
        builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (rank, 0, 0))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, launch_cooperative_grid: bool, **options: Any) -> None:
            assert launch_cooperative_grid
            self.kernel[(1,)](*arguments, **options)

        return launch


def in_processes(stream: Stream, rows: int, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """`stream.run` of a team whose programs are processes. Returns losses and outputs."""
    calls = stream._compiled
    assert isinstance(calls, stream_kernel.InKernel)
    units = stream.layer.hidden_size
    config = stream_layout.Config(-(-units // rows), rows, 4)
    calls.layout = lambda problem: config  # type: ignore[method-assign]
    made: list[Tensor] = []

    def shared(tensor: Tensor) -> Tensor:
        made.append(tensor.share_memory_())
        return tensor

    state, sensitivity = stream.learner.lend()
    for tensor in [*stream.parameters, state, *(g for group in sensitivity.groups for g in group.gammas)]:
        shared(tensor.detach())
    calls.moments(stream.optimizer.param_groups[0])
    for moments in calls.new.values():
        for moment in moments.values():
            shared(moment)
    calls.totals = [shared(torch.zeros_like(parameter)) for parameter in calls.learned()]
    take = stream_kernel.InKernel.given
    tensors = take(calls, False, *given)
    for value in tensors.values():
        if value is not None:
            shared(value)
    calls.given = lambda hidden, *arguments: tensors  # type: ignore[method-assign]
    room = ROOM(calls.problem(), config, 1, torch.device("cpu"))
    assert room.exchange is not None
    assert room.counter is not None
    room.exchange.fill_(float("nan"))
    shared(room.exchange), shared(room.counter)
    cell_stream.Room.of = classmethod(lambda cls, *_: room)  # type: ignore[method-assign, assignment]
    # cooperative launches ask the GPU how many programs fit
    torch.cuda.get_device_properties = lambda device: type("About", (), {"multi_processor_count": 132})()
    children = []
    for rank in range(config.team):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                cell_stream._stream_kernel = _OneProgram(cell_stream._stream_kernel, rank)
                calls.run(*given, False)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            raise RuntimeError("a program failed")
    assert tensors["losses"] is not None
    assert tensors["outputs"] is not None
    return tensors["losses"], tensors["outputs"]


def difference(kind: str, rows: int, options: dict[str, Any]) -> float:
    torch.manual_seed(0)
    layer = {"rgc": lambda: RGC(10, init="uniform"), "lstm": lambda: LSTM(3, 10)}[kind]()
    readout = nn.Linear(10, 3)
    alone, team = (
        Stream(*copy.deepcopy((layer, readout)), backend="triton", lr=0.01, **options) for _ in range(2)
    )
    start = [parameter.detach().clone() for parameter in team.parameters]
    x, target = torch.randn(STEPS, 1, layer.fan_in), torch.randn(STEPS, 1, 3)
    resets = torch.tensor([[0], [0], [1], [0], [0]]) > 0
    want = alone.run(x, target, resets)
    got = in_processes(team, rows, (x, target, resets, None, [[0.01] * STEPS]))
    pairs = [(want.losses, got[0]), (want.outputs, got[1])]
    pairs += list(zip(alone.parameters, team.parameters, strict=True))
    (state, ours), (other, theirs) = alone.learner.lend(), team.learner.lend()
    pairs.append((state, other))
    for one, two in zip(ours.groups, theirs.groups, strict=True):
        pairs += list(zip(one.gammas, two.gammas, strict=True))
    found = torch.stack([(a - b).detach().abs().max() for a, b in pairs])
    moved = [(a - b).detach().abs().max() for a, b in zip(start, team.parameters, strict=True)]
    assert max(moved) > 0, "nothing was learned"
    return float(found.max())  # NaN if there is one


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = int(sys.argv[1])
    plain = {"optimizer": "sgd"}
    clipped = {"optimizer": "adam", "clip_norm": 0.1, "update_every": 2}
    print(max(difference("rgc", rows, plain), difference("lstm", rows, clipped)))
