"""Learners in DistributedDataParallel and by fully_shard: two processes with half of the batch rows each, by gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rjepa_triton import ELSTM, LSTM, RGC, OnlineLearner, Stack, StackLearner

F64 = torch.float64
LEARNERS: dict[str, dict[str, Any]] = {
    "step": {"form": "step"},
    "chunk": {"form": "chunk", "update_every": 2},
    "rtrl": {"learning": "rtrl"},
    "tbptt": {"learning": "tbptt", "update_every": 2},
}
X = torch.randn(8, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A learner with a head, and a normalization whose buffers the processes share."""

    def __init__(self, learner: OnlineLearner | StackLearner) -> None:
        super().__init__()
        self.learner, self.head = learner, nn.Linear(4, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.learner(x))


def made(name: str, batch: int, layer: str = "RGC") -> nn.Module:
    torch.manual_seed(1)
    if layer == "stack":
        stack = Stack(RGC(5, input_size=3, init="uniform", dtype=F64), LSTM(5, 4, dtype=F64))
        return StackLearner(stack, batch, **LEARNERS[name])
    kind = RGC(4, input_size=3, init="uniform", dtype=F64) if layer == "RGC" else ELSTM(3, 4, dtype=F64)
    learner = OnlineLearner(kind, batch, **LEARNERS[name])
    return Model(learner) if layer == "held" else learner


def run(model: Any, x: Tensor, every: int) -> list[Tensor]:
    """The weights after steps of SGD, and the outputs."""
    optimizer, losses, outputs = torch.optim.SGD(model.parameters(), lr=0.1), [], []
    for t in range(len(x)):
        output = model(x[t])
        outputs.append(output.detach())
        losses.append(output.square().sum(-1).mean())
        if (t + 1) % every == 0:
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses = []
    weights = [parameter.detach() for parameter in model.parameters()]
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    return [torch.stack(outputs), *whole]


def of_one_process(rank: int, folder: str) -> dict[str, list[Tensor]]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store"
    )
    mesh = init_device_mesh("cpu", (2,))
    rows, found = slice(2 * rank, 2 * rank + 2), {}
    try:
        for name in LEARNERS:
            for layer in ("RGC", "held", "stack") if name == "step" else ("RGC",):
                options = {"broadcast_buffers": False} if layer == "held" else {}
                model = DistributedDataParallel(made(name, 2, layer), **options)
                every = LEARNERS[name].get("update_every", 1)
                found[f"{name}-{layer}"] = run(model, X[:, rows], every)
                found[f"{name}-{layer}-sharded"] = run(
                    fully_shard(made(name, 2, layer), mesh=mesh), X[:, rows], every
                )
    finally:
        torch.distributed.destroy_process_group()
    return found


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        calls = [pool.apply_async(of_one_process, (rank, str(tmp_path))) for rank in range(2)]
        first, second = (call.get(300) for call in calls)
    for key in first:
        name, layer, *_ = key.split("-")
        want = run(made(name, 4, layer), X, LEARNERS[name].get("update_every", 1))
        outputs = torch.cat([first[key][0], second[key][0]], 1)
        torch.testing.assert_close(
            [outputs, *first[key][1:]], want, msg=lambda text, key=key: f"{key}: {text}"
        )
        torch.testing.assert_close(second[key][1:], first[key][1:], rtol=0, atol=0)


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_layer_that_is_wrapped_without_its_learner_is_refused() -> None:
    layer = LSTM(3, 4)
    learner = OnlineLearner(layer, 2)
    OnlineLearner(LSTM(3, 4), 2, lr=0.1).step(torch.randn(2, 3))
    learner.step(torch.randn(2, 3))
    wrapped = DistributedDataParallel(nn.Sequential(layer))
    says = "layer must not be in a DistributedDataParallel"
    for options in ({}, {"lr": 0.1}):
        with pytest.raises(ValueError, match=says):
            OnlineLearner(layer, 2, **options)
    with pytest.raises(ValueError, match=says):
        StackLearner(Stack(layer), 2)
    other = OnlineLearner(LSTM(3, 4), 2)
    wrapped_after = DistributedDataParallel(nn.Sequential(other.layer))
    with pytest.raises(ValueError, match=says):
        other.step(torch.randn(2, 3))
    del wrapped, wrapped_after


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("steps", [0, 2])
def test_what_processes_would_share_or_not_average_is_refused(steps: int) -> None:
    learner = made("step", 4)
    model = Model(learner)
    for t in range(steps):
        learner(X[t])
    wrapped = DistributedDataParallel(model)
    with pytest.raises(
        ValueError, match=r"broadcast_buffers must be False .*learner\._state, learner\.gamma_0"
    ):
        wrapped(X[0])
    wrapped = DistributedDataParallel(OnlineLearner(LSTM(3, 4, dtype=F64), 4, lr=0.1))
    with pytest.raises(ValueError, match="lr can't go in a DistributedDataParallel"):
        wrapped(X[0])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("whole", [True, False], ids=["learner", "what holds it"])
def test_fully_shard_of_a_learner_with_lr_is_refused(whole: bool) -> None:
    """Its copies of the weights would take the step, and be thrown away."""
    learner = OnlineLearner(RGC(4, input_size=3, init="uniform"), 2, lr=0.1, form="step")
    model = learner if whole else nn.Sequential(learner)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"lr and cuda_graph=True can't go with fully_shard"):
        model(torch.randn(2, 3))
