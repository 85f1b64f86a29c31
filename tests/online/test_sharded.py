"""Learners whose rows lie on several ranks: equal to one that has them all, by gloo, in two and four processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rjepa_triton import ELSTM, GRU, LRU, LSTM, RGC, RNN, OnlineLearner, Stack, StackLearner, TwoPointRNN
from rjepa_triton.online import elastic
from rjepa_triton.planning import sharding

F64 = torch.float64
STEPS, BATCH = 9, 3
LAYERS: dict[str, Callable[[], TwoPointRNN]] = {
    "rgc": lambda: RGC(7, init="uniform", dtype=F64),
    "rgc-input": lambda: RGC(10, input_size=3, init="uniform", dtype=F64),
    "as-many": lambda: RGC(7, input_size=7, init="uniform", dtype=F64),
    "lstm": lambda: LSTM(3, 10, dtype=F64),
    "gru": lambda: GRU(3, 4, dtype=F64),
    "rnn": lambda: RNN(2, 7, dtype=F64),
    "heads": lambda: RGC(8, input_size=3, heads=4, init="uniform", dtype=F64),
    "diagonal": lambda: LSTM(3, 7, recurrence="diagonal", dtype=F64),
    "lru": lambda: LRU(3, 7, dtype=F64),
    "elstm": lambda: ELSTM(3, 7, dtype=F64),
}
STEP: dict[str, Any] = {"form": "step"}
CHUNK: dict[str, Any] = {"form": "chunk", "update_every": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{layer}-step": (layer, STEP) for layer in ("rgc", "rgc-input", "gru", "heads", "lru", "elstm")},
    **{f"{layer}-chunk": (layer, CHUNK) for layer in ("rgc", "as-many", "lstm", "rnn", "heads", "diagonal")},
    "lag": ("rgc", {"form": "step", "lag": 1}),
    "torch": ("lstm", {**CHUNK, "backend": "torch"}),
    "eprop": ("lstm", {**STEP, "learning": "eprop"}),
    "rflo-chunk": ("lstm", {**CHUNK, "learning": "rflo"}),
    "snap0-chunk": ("rgc-input", {**CHUNK, "learning": "snap0"}),
}
CHUNKED = ["rgc-chunk", "lstm-chunk", "heads-chunk"]  # those whose steps also run by chunk()


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [whole(parameter.detach()).clone() for parameter in module.parameters()]


def learned(name: str, mesh: DeviceMesh | None, by_chunks: bool = False) -> dict[str, Any]:
    """What a learner gives over steps of Adam, with resets, held rows, a step in eval mode, and x that learns."""
    kind, options = CASES[name]
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    x = torch.randn(STEPS, BATCH, layer.fan_in, dtype=F64)
    if mesh is not None and mesh.get_local_rank():
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_()  # the first rank's count
    learner = OnlineLearner(layer, BATCH, mesh=mesh, **options)
    into, out = nn.Linear(layer.fan_in, layer.fan_in, dtype=F64), nn.Linear(layer.hidden_size, 2, dtype=F64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*into.parameters(), *out.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) / 3)
    optimizers = [
        torch.optim.Adam(layer.parameters(), lr=0.03),
        torch.optim.SGD([*into.parameters(), *out.parameters()], lr=0.03),
    ]
    every, curve, gradients = options.get("update_every", 1), [], []
    for t in range(0, STEPS, every):
        if by_chunks:
            resets = torch.zeros(every, BATCH, dtype=torch.bool)
            resets[-1, 0] = t == 6
            active = torch.ones(every, BATCH, dtype=torch.bool)
            active[0, 1] = t != 3
            outputs = learner.chunk(into(x[t : t + every]), resets, active if t == 3 else None)
            loss = out(outputs).square().mean()
        else:
            losses = []
            for s in range(t, t + every):
                if s == 7:
                    learner.reset(torch.tensor([True, False, False]))
                active = torch.tensor([True, False, True]) if s == 4 else None
                losses.append(out(learner.step(into(x[s]), active)).square().mean())
            loss = torch.stack(losses).sum()
        curve.append(loss.detach())
        loss.backward()
        if t in (0, STEPS - every):
            gradients += [whole(p.grad).clone() for p in (*layer.parameters(), *into.parameters())]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    peeked = learner.peek(x[0])
    learner.eval()
    acted = learner.step(x[1])
    return {
        "curve": torch.stack(curve),
        "gradients": gradients,
        "parameters": parameters_of(layer) + parameters_of(into),
        "state": list(learner.state),
        "peeked and acted": [peeked, acted.detach()],
        "nbytes": learner.nbytes,
    }


def stacked(mesh: DeviceMesh | None) -> dict[str, Any]:
    torch.manual_seed(3)
    stack = Stack(RGC(7, input_size=3, init="uniform", dtype=F64), LSTM(7, 7, dtype=F64))
    learner = StackLearner(stack, BATCH, mesh=mesh, **CHUNK)
    optimizer, x = torch.optim.SGD(stack.parameters(), lr=0.1), torch.randn(9, BATCH, 3, dtype=F64)
    for t in range(0, 9, 3):
        learner.chunk(x[t : t + 3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": parameters_of(stack)}


def all_learned(mesh: DeviceMesh | None, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {name: learned(name, mesh) for name in names}
    found |= {f"{name} by chunks": learned(name, mesh, True) for name in names if name in CHUNKED}
    return {**found, "stack": stacked(mesh)}


@pytest.mark.parametrize(
    ("count", "names"),
    [(2, list(CASES)), (4, ["rgc-input-step", "lstm-chunk", "gru-step"])],
)
def test_ranks_learn_as_one_process_that_has_all_rows(count: int, names: list[str], tmp_path: Path) -> None:
    want = all_learned(None, names)
    for rank, found in enumerate(ranks.on_ranks(all_learned, count, tmp_path, names)):
        for name, whole_run in want.items():
            one = found[name]
            for what in whole_run:
                if what != "nbytes":
                    torch.testing.assert_close(
                        one[what],
                        whole_run[what],
                        rtol=1e-12,
                        atol=1e-12,
                        msg=lambda text, name=name, what=what, rank=rank: (
                            f"{name}, {what} on rank {rank}: {text}"
                        ),
                    )


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What each bad call says on this rank, and that it changed nothing."""
    first = mesh.get_local_rank() == 0

    def made(**options: Any) -> OnlineLearner:
        size, batch = options.pop("size", 6), options.pop("batch", 2)
        layer = options.pop("layer", None) or RGC(
            size, init="uniform", dtype=F64, heads=options.pop("heads", None)
        )
        before = [parameter.clone() for parameter in layer.parameters()]
        try:
            return OnlineLearner(layer, batch, **{"mesh": mesh, **options})
        except Exception:
            for parameter, old in zip(layer.parameters(), before, strict=True):
                assert type(parameter.data) is Tensor
                assert torch.equal(parameter, old)
            raise

    calls: dict[str, Callable[[], object]] = {
        "size": lambda: made(size=6 if first else 8),
        "batch": lambda: made(batch=2 if first else 3),
        "option": lambda: made(update_every=2 if first else 3),
        "one fails": lambda: made(batch=2 if first else 0),
        "code": lambda: with_other_code(made) if first else made(),
        "too many": lambda: made(size=1),
        "heads": lambda: made(size=9, heads=3),
        "kind": lambda: made(mesh="cpu"),
        **{
            f"{name}={value}": functools.partial(made, update_every=every, **{name: value})
            for name, value, every in (
                ("learning", "rtrl", 1),
                ("learning", "uoro", 1),
                ("learning", "tbptt", 2),
                ("credit", "carry", 2),
                ("form", "history", 1),
                ("form", "lazy", 1),
                ("nonfinite", "clip", 1),
                ("lr", 0.1, 1),
            )
        },
    }
    learner = made()
    x = torch.ones(2, 6, dtype=F64)
    learner.step(x)
    calls |= {
        "again": lambda: OnlineLearner(learner.layer, 2, mesh=mesh),
        "copy": lambda: __import__("copy").deepcopy(learner),
        "move": lambda: learner.float(),
        "rows": lambda: learner.add_rows(),
        "row gradients": lambda: learner.row_gradients(x),
        "compile": lambda: while_compiling(learner, x),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "nothing"
    traces, whole_gamma = learner.traces(), learner.state_dict()["gamma"][0]
    said["own rows"] = str([tuple(traces["weight_ss"].shape), tuple(whole_gamma.shape)])
    other = OnlineLearner(RGC(6, init="uniform", dtype=F64), 2)
    other.load_state_dict(
        {**learner.state_dict(), "gamma": [g.full_tensor() for g in learner.state_dict()["gamma"]]}
    )
    other.settle()
    made().load_state_dict(other.state_dict())  # rows of a whole Γ
    return said


def while_compiling(learner: OnlineLearner, x: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        learner.step(x)


def with_other_code(made: Callable[[], object]) -> object:
    from rjepa_triton.online import sharded

    kept, sharded.revision = sharded.revision, lambda: "another"  # type: ignore[assignment]
    try:
        return made()
    finally:
        sharded.revision = kept


SAYS = {
    "size": "ValueError: hidden_size must be the same on all 2 ranks of the mesh, got 6 on rank 0 and 8 on rank 1",
    "batch": "ValueError: batch_size must be the same on all 2 ranks of the mesh, got 2 on rank 0 and 3 on rank 1",
    "option": "ValueError: update_every must be the same on all 2 ranks",
    "code": "ValueError: the code must be the same on all 2 ranks of the mesh, got 'another' on rank 0",
    "too many": "ValueError: mesh must leave each rank some of the layer's 1 units, got 2 ranks",
    "heads": "ValueError: mesh must divide the layer's 3 heads, got 2 ranks",
    "kind": "TypeError: mesh must be a torch.distributed DeviceMesh, got str",
    "learning=rtrl": "ValueError: mesh goes with learning of 'rfp', 'eprop', 'rflo', 'snap0', got learning='rtrl'",
    "learning=uoro": "ValueError: mesh goes with learning",
    "learning=tbptt": "ValueError: mesh goes with learning",
    "credit=carry": "ValueError: mesh goes with credit of 'own', got credit='carry'",
    "form=history": "ValueError: mesh goes with form of 'auto', 'step', 'chunk', got form='history'",
    "form=lazy": "ValueError: mesh goes with form",
    "nonfinite=clip": "ValueError: mesh goes with nonfinite of 'warn', 'ignore', got nonfinite='clip'",
    "lr=0.1": "ValueError: mesh goes with lr of None, got lr=0.1",
    "again": "ValueError: mesh goes with a layer of plain parameters, got weight_ss, which is DTensor",
    "copy": "TypeError: an OnlineLearner with a mesh can't be copied",
    "move": "ValueError: to() can't go with mesh",
    "rows": "ValueError: changing batch rows can't go with mesh",
    "row gradients": "ValueError: row_gradients() can't go with mesh",
    "compile": "RuntimeError: a learner with a mesh",
    "own rows": "[(2, 2, 3, 6), (2, 4, 6, 6)]",
}


def test_what_ranks_disagree_in_is_named_on_each_before_anything_changes(tmp_path: Path) -> None:
    for rank, said in enumerate(ranks.on_ranks(refusals, 2, tmp_path)):
        for name, what in SAYS.items():
            assert said[name].startswith(what), (rank, name, said[name])
        own = "ValueError: batch_size must be at least 1, got 0"
        theirs = "ValueError: mesh: rank 1 of 2 can't go on: ValueError: batch_size must be at least 1, got 0"
        assert said["one fails"] == (own if rank else theirs)


class Traced(TorchDispatchMode):
    """The collectives that run meanwhile: names, and bytes that this rank gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = args[1] if func.overloadpacket.__name__ == "allgather_" else args[0]
            self.given.append((func.overloadpacket.__name__, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def sent(mesh: DeviceMesh, name: str, x_learns: bool) -> tuple[list[tuple[str, int]], int]:
    """The collectives of a chunk and its update, and the bytes of this rank's Γ."""
    kind, options = CASES[name]
    layer = LAYERS[kind]()
    learner = OnlineLearner(layer, BATCH, mesh=mesh, **options)
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.randn(options.get("update_every", 1), BATCH, layer.fan_in, dtype=F64, requires_grad=x_learns)
    with Traced() as traced:
        learner.chunk(x).square().sum().backward()
        optimizer.step()
    return traced.given, sum(t.nbytes for t in learner.traces().values())


SENT = ["rgc-chunk", "lstm-chunk", "heads-chunk", "diagonal-chunk", "rgc-input-step"]


def all_sent(mesh: DeviceMesh) -> dict[str, Any]:
    found: dict[str, Any] = {name: sent(mesh, name, False) for name in SENT}
    return {**found, "x": sent(mesh, "lstm-chunk", True), "left alone": left_alone(mesh)}


def left_alone(mesh: DeviceMesh) -> list[str]:
    """Rank 1 ends after two steps; what rank 0 is told at the third, and when it makes another learner."""
    learner = OnlineLearner(RGC(6, init="uniform", dtype=F64), 2, mesh=mesh)
    x = torch.ones(2, 6, dtype=F64)
    for _ in range(2):
        learner.step(x).sum().backward()
    if mesh.get_local_rank():
        return []
    before, said = learner.state, []
    calls = (lambda: learner.step(x), lambda: OnlineLearner(RGC(6, dtype=F64), 2, mesh=mesh))
    for call in calls:
        with pytest.raises(RuntimeError) as caught:
            call()
        said.append(str(caught.value))
    assert all(map(torch.equal, learner.state, before))
    return said


def test_what_ranks_send_is_what_the_planner_predicts_and_a_missing_rank_is_told_of(tmp_path: Path) -> None:
    found = ranks.on_ranks(all_sent, 2, tmp_path)
    for rank, name in itertools.product(range(2), SENT):
        kind, options = CASES[name]
        layer = LAYERS[kind]()
        dense = any(weight.dim() == 2 for weight in layer.recurrent_weights())
        states, steps = len(layer.cell.states), options.get("update_every", 1)
        want = sharding.gathered(2, layer.hidden_size, BATCH, states, 8, steps, dense)
        given, gamma = found[rank][name]
        assert {kind for kind, _ in given} == {"allgather_"}
        assert (len(given), sum(size for _, size in given)) == (want.calls, want.bytes)
        units = -(-layer.hidden_size // 2) if rank == 0 else layer.hidden_size // 2
        numbers = sum(weight.numel() for weight in layer.weights()) // layer.hidden_size
        assert gamma == 8 * states * BATCH * numbers * units
    *_, last = found[0]["x"][0]
    assert last == ("allreduce_", 8 * 3 * BATCH * 3)
    told = found[0]["left alone"]
    assert len(told) == 2
    for each in told:
        assert each.startswith("mesh: rank 0 of 2 got no answer from another rank"), told


def of_batch(mesh: DeviceMesh | None, form: dict[str, Any]) -> list[Tensor]:
    """Weights after updates of a learner with rows on mesh["rows"] and batch rows on mesh["batch"], or alone."""
    torch.manual_seed(1)
    layer, x = RGC(7, input_size=3, init="uniform", dtype=F64), torch.randn(STEPS, 4, 3, dtype=F64)
    rows = slice(None)
    if mesh is None:
        learner = OnlineLearner(layer, 4, **form)
    else:
        learner = OnlineLearner(layer, 2, mesh=mesh["rows"], **form)
        fully_shard(learner, mesh=mesh["batch"])
        first = 2 * mesh["batch"].get_local_rank()
        rows = slice(first, first + 2)
        with pytest.raises(RuntimeError, match="register_fsdp_forward_method"):
            learner.chunk(x[:3, rows])
        with pytest.raises(ValueError, match="learner must have a mesh of all 4 ranks, got one of 2"):
            elastic.save("/nowhere", 1, {"learner": learner})
    optimizer, every = torch.optim.Adam(layer.parameters(), lr=0.05), form.get("update_every", 1)
    for t in range(0, STEPS, every):
        losses = [learner(x[s, rows]).square().sum(-1).mean() for s in range(t, t + every)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(layer)


def both_of_batch(mesh: DeviceMesh | None) -> list[list[Tensor]]:
    return [of_batch(mesh, form) for form in (STEP, CHUNK)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_and_batch_rows_on_a_mesh_of_two_dimensions(tmp_path: Path) -> None:
    want = both_of_batch(None)
    for found in ranks.on_ranks(both_of_batch, 4, tmp_path, shape=(2, 2)):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
