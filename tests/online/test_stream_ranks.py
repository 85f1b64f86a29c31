"""Streams on several ranks: rows of one network, and networks of a population, equal to those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rjepa_triton import GRU, LSTM, RGC, Stream
from rjepa_triton.online import elastic
from rjepa_triton.online.stream_code import Result

F64 = torch.float64
STEPS, BATCH, OUTPUTS = 12, 2, 3
LAYERS: dict[str, Callable[[], Any]] = {
    "rgc": lambda: RGC(7, input_size=4, init="uniform", dtype=F64),
    "lstm": lambda: LSTM(4, 6, dtype=F64),
    "heads": lambda: GRU(4, 8, heads=4, dtype=F64),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("rgc", {"optimizer_options": {"momentum": 0.9}}),
    "adam": ("lstm", {"loss": "cross_entropy", "optimizer": "adam", "clip_norm": 0.05, "update_every": 2}),
    "rmsprop": ("heads", {"loss": "huber", "optimizer": "rmsprop", "mean": "all", "clip_norm": 100.0}),
    "given": ("rgc", {"loss": "delta", "optimizer": "adamw", "learning": "eprop", "nonfinite": "skip"}),
}


def made(name: str, mesh: DeviceMesh | None, **further: Any) -> Stream:
    torch.manual_seed(1)
    kind, options = CASES[name]
    layer = LAYERS[kind]()
    readout: nn.Module = nn.Linear(layer.hidden_size, OUTPUTS, dtype=F64)
    if name == "rmsprop":
        readout = nn.Sequential(
            nn.Linear(8, 5, dtype=F64), nn.Tanh(), nn.Linear(5, OUTPUTS, bias=False, dtype=F64)
        )
    if mesh is not None and mesh.get_local_rank():
        with torch.no_grad():
            for parameter in (*layer.parameters(), *readout.parameters()):
                parameter.normal_()  # the first rank's count
    return Stream(layer, readout, BATCH, **{"lr": 0.02, "mesh": mesh, **options, **further})


def given(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS, BATCH, 4, dtype=F64, generator=generator)
    target = torch.randn(STEPS, BATCH, OUTPUTS, dtype=F64, generator=generator)
    if name == "adam":
        target = target.argmax(-1)
    if name == "given":
        x[5, 1, 2] = torch.nan
    resets = torch.rand(STEPS, BATCH, generator=generator) < 0.2
    mask = torch.rand(STEPS, BATCH, generator=generator) < 0.8
    lr = torch.linspace(0.02, 0.01, STEPS)
    return {"x": x, "target": target, "resets": resets, "mask": mask, "lr": lr}


def whole(tensors: Any) -> list[Tensor]:
    return [(each.full_tensor() if isinstance(each, DTensor) else each).detach().clone() for each in tensors]


def learned(mesh: DeviceMesh | None, name: str) -> dict[str, Any]:
    """What two calls of run and some steps give."""
    stream, every = made(name, mesh), given(name)
    found = []
    for part in (slice(0, 4), slice(4, STEPS)):
        result = stream.run(**{key: value[part] for key, value in every.items()}, hidden=True)
        assert result.hidden is not None
        found += [result.losses, result.outputs, result.hidden, *result.state]
    steps: list[float] = []
    for t in range(2):
        found.append(stream.step(every["x"][t]))
        steps.append(stream.learn(every["target"][t]))
    assert stream.backend == ("compile" if mesh is None else "torch")
    return {"found": found, "steps": steps, "weights": whole(stream.parameters)}


SEEDS, RATES = [4, 0, 7, 1, 2], [0.01, 0.02, 0.03, 0.04, 0.05]


def population(mesh: DeviceMesh | None) -> Stream:
    return made("adam", mesh, population=5, seeds=SEEDS, lr=RATES)


def together(result: Result) -> list[Tensor]:
    assert result.hidden is not None
    return [result.losses, result.outputs, result.hidden, *(each for one in result.state for each in one)]


def apart(every: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stream of its own for each network."""
    return {**every, "x": torch.stack([every["x"] + k for k in range(5)])}


def many(mesh: DeviceMesh | None) -> tuple[list[Tensor], int]:
    """A population on one stream for all, then on streams of their own."""
    stream, every = population(mesh), given("adam")
    lr = every.pop("lr")
    found = together(stream.run(**every, hidden=True))
    found += together(stream.run(**apart(every), lr=lr, hidden=True))
    assert stream.members is not None
    assert [member.backend for member in stream.members] == ["compile"] * len(stream.members)
    return found, len(stream.members)


def all_learned(mesh: DeviceMesh | None) -> tuple[dict[str, Any], tuple[list[Tensor], int]]:
    return {name: learned(mesh, name) for name in CASES}, many(mesh)


def test_ranks_learn_as_one_process(tmp_path: Path) -> None:
    rows, (networks, _) = all_learned(None)
    for rank, (found, (of_all, own)) in enumerate(ranks.on_ranks(all_learned, 2, tmp_path)):
        for name, want in rows.items():
            torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12)
        assert own == [3, 2][rank]
        torch.testing.assert_close(of_all, networks, rtol=0, atol=0)


def begun(mesh: DeviceMesh, folder: str) -> None:
    stream, every = made("adam", mesh), given("adam")
    five = population(mesh)
    for one in (stream, five):
        one.run(**{key: value[:4] for key, value in every.items()})
    parts = {"stream": stream, "five": five}
    elastic.save(folder, 4, parts)
    stream.run(every["x"][:1], every["target"][:1])
    with pytest.raises(ValueError, match="stream must be between two updates, got a step that waits"):
        elastic.save(folder, 5, parts)
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(TypeError, match="a Stream with a mesh can't be copied"):
        stream.__getstate__()


def gone_on(mesh: DeviceMesh | None, folder: str) -> list[Tensor]:
    parts = {"stream": made("adam", mesh), "five": population(mesh)}
    if folder:
        assert elastic.load(folder, parts) == 4
    return rest(parts)


def rest(parts: dict[str, Stream]) -> list[Tensor]:
    every = {key: value[4:] for key, value in given("adam").items()}
    first = parts["stream"].run(**every, hidden=True)
    found = [*together(first), *whole(parts["stream"].parameters)]
    return found + together(parts["five"].run(**apart(every), hidden=True))


def test_streams_of_two_ranks_go_on_on_three_and_on_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    ranks.on_ranks(begun, 2, tmp_path / "two", folder)
    parts = {"stream": made("adam", None), "five": population(None)}
    for one in parts.values():
        one.run(**{key: value[:4] for key, value in given("adam").items()})
    want = rest(parts)
    for found in [*ranks.on_ranks(gone_on, 3, tmp_path / "three", folder), gone_on(None, folder)]:
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"stream must be a population as in .*, which has none, got 5"):
        elastic.load(folder, {"stream": population(None), "five": population(None)})


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    first = mesh.get_local_rank() == 0
    layer, readout = RGC(6, input_size=4, dtype=F64), nn.Linear(6, OUTPUTS, dtype=F64)
    stream, five, every = made("sgd", mesh), population(mesh), given("sgd")
    x, target = every["x"], every["target"]

    def new(**options: Any) -> Stream:
        return Stream(layer, readout, **{"mesh": mesh, **options})

    calls: dict[str, Callable[[], object]] = {
        "loss must be the same": lambda: new(loss="mse" if first else "huber"),
        "batch_size must be": lambda: new(batch_size=1 if first else 0),
        "optimizer must be a name": lambda: new(optimizer=torch.optim.SGD(layer.parameters())),
        "Invalid momentum": lambda: new(optimizer_options={"momentum": -1}),
        "self_prediction doesn't go with mesh": lambda: new(self_prediction=True),
        "mesh goes with backend='auto' or 'torch'": lambda: new(backend="compile"),
        "mesh goes with learning of": lambda: new(learning="rtrl"),
        "mesh must be a torch.distributed DeviceMesh": lambda: new(mesh="cpu"),
        "mesh must leave each rank some of the 1 networks": lambda: new(population=1),
        "lr must be 3 numbers": lambda: new(population=3, lr=[0.1, 0.2]),
        "x must be the same on all 2 ranks": lambda: stream.run(x[: 3 + first], target[: 3 + first]),
        "hidden must be the same": lambda: stream.run(x, target, hidden=first),
        "x must hold finite": lambda: stream.run(x if first else x / 0, target),
        "target must have 2 dimensions": lambda: five.run(x, target),
        "x must have 3 dimensions": lambda: five.run(x[0], target.argmax(-1)),
        "state must be of a population": lambda: five.load_state_dict({"members": []}),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    assert type(layer.weight_ss.data) is Tensor
    assert float(stream.run(x, target).losses.sum()) > 0  # the ranks still go together
    return {name: said.get(name, "nothing") for name in calls}


def test_what_doesnt_go_with_a_mesh_or_differs_is_named_on_each_rank(tmp_path: Path) -> None:
    for said in ranks.on_ranks(refusals, 2, tmp_path):
        for name, text in said.items():
            assert name in text, f"{name}: {text}"
