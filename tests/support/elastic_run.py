"""A run on one or several ranks that saves and goes on (`online.elastic`), and what it must come to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rjepa_triton import RGC, OnlineLearner

F64 = torch.float64
STEPS = 12
X = torch.randn(STEPS, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def made(mesh: DeviceMesh | None, form: str = "chunk", size: int = 10) -> dict[str, Any]:
    torch.manual_seed(1)
    layer = RGC(size, input_size=3, init="uniform", dtype=F64)
    learner = OnlineLearner(layer, 2, mesh=mesh, form=form, update_every=3 if form == "chunk" else 1)
    head = nn.Linear(size, 1, dtype=F64)
    return {
        "layer": layer,
        "learner": learner,
        "head": head,
        "optimizer": torch.optim.Adam(layer.parameters(), lr=0.05),
        "of_head": torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9),
    }


def run(parts: dict[str, Any], first: int, last: int) -> None:
    learner = parts["learner"]
    for t in range(first, last, 3):
        if t == 6:
            learner.reset(torch.tensor([True, False]))
        for xs in [X[t : t + 3]] if learner.form == "chunk" else X[t : t + 3].split(1):
            output = learner.chunk(xs) if learner.form == "chunk" else learner.step(xs[0])
            parts["head"](output).square().mean().backward()
            for optimizer in (parts["optimizer"], parts["of_head"]):
                optimizer.step()
                optimizer.zero_grad()


def result(parts: dict[str, Any]) -> list[Tensor]:
    tensors = [*parts["layer"].parameters(), *parts["head"].parameters(), *parts["learner"].state]
    tensors += parts["learner"].state_dict()["gamma"]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]
