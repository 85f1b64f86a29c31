"""Batch rows that come and go: each is what a learner of its own would be, whatever comes and goes beside it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from every_learner import LEARNERS
from row_by_row import RowByRow
from torch import nn

from rjepa_triton import GRU, LSTM, RGC, OnlineLearner, TwoPointRNN

F64 = torch.float64


def made(kind: str = "RGC") -> TwoPointRNN:
    torch.manual_seed(1)
    return {
        "RGC": lambda: RGC(4, input_size=3, init="uniform", dtype=F64),
        "heads": lambda: RGC(4, input_size=3, heads=2, init="uniform", dtype=F64),
        "LSTM": lambda: LSTM(3, 4, dtype=F64),
        "GRU": lambda: GRU(3, 4, dtype=F64),
    }[kind]()


@pytest.mark.parametrize("layer", ["RGC", "heads", "LSTM", "GRU"])
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "uoro"])
def test_each_row_is_a_learner_of_its_own(name: str, layer: str) -> None:
    both, random = RowByRow(made(layer), 3, **LEARNERS[name]), np.random.default_rng(1)
    for _ in range(6):
        for _ in range(both.learner.update_every):
            both.step(torch.tensor(random.random(len(both.own)) < 0.8))
        both.update()
        if random.random() < 0.5:
            both.reset(torch.tensor(random.random(len(both.own)) < 0.3))
        if random.random() < 0.7:
            both.add_rows(int(random.integers(1, 3)))
        if random.random() < 0.7:
            goes = torch.tensor(random.random(len(both.own)) < 0.4)
            goes[random.integers(len(both.own))] = False
            both.remove_rows(goes)
        assert both.learner.batch_size == len(both.own)
        both.compare_states()


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_on_each_backend_and_without_resets(backend: str) -> None:
    for options in ({"form": "step"}, {"form": "chunk", "update_every": 3}, {"form": "history"}):
        both = RowByRow(made().float(), 2, backend=backend, **options)
        for k in range(3):
            for _ in range(both.learner.update_every):
                both.step()
            both.update()
            both.add_rows(1)
            both.remove_rows(torch.arange(3) == k)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_carried_of_the_rows_that_stay_is_theirs_bit_for_bit(name: str) -> None:
    learner = OnlineLearner(made(), 3, **LEARNERS[name])
    x = torch.randn(6, 3, 3, dtype=F64)
    for t in range(6):
        learner(x[t]).sum()
    before = learner.state_dict()
    learner.end_chunk()
    learner.add_rows()
    learner.remove_rows(torch.tensor([True, False, False, True]))
    after = learner.state_dict()
    assert (after["now"], after["base"], after["batch_size"]) == (before["now"], before["base"], 2)
    for old, new in zip(before["gamma"], after["gamma"], strict=True):
        if old.shape == new.shape:
            assert torch.equal(old, new)  # of a generator
        else:
            dim = [a == b for a, b in zip(old.shape, new.shape, strict=True)].index(False)
            assert torch.equal(old.narrow(dim, 1, 2), new)
    for old, new in zip(before["window"], after["window"], strict=True):
        for a, b in zip(old["tensors"], new["tensors"], strict=True):
            assert torch.equal(a.narrow(-2, 1, 2), b)
    buffers = dict(learner.named_buffers())
    assert [t.data_ptr() for k, t in buffers.items() if k != "_state"] == [
        t.data_ptr() for t in learner._sensitivities()
    ]


@pytest.mark.parametrize("options", [{"form": "step"}, {"form": "chunk", "update_every": 2}, {"form": "history"}, {"learning": "rtrl"}], ids=str)  # fmt: skip
def test_a_backward_of_the_steps_before_still_works(options: dict[str, Any]) -> None:
    found = []
    for when in ("before", "after"):
        learner = OnlineLearner(made(), 2, **options)
        x = torch.randn(6, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
        every = learner.update_every
        loss = sum(learner(x[t, :2]).square().sum() for t in range(every))
        if when == "before":
            loss.backward()
        learner.add_rows(2)
        learner.remove_rows(torch.tensor([1, 0, 0, 0]))
        if when == "after":
            loss.backward()
        sum(learner(x[t, 1:]).square().sum() for t in range(every, 2 * every)).backward()
        found.append([parameter.grad for parameter in learner.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_after_a_reset_a_set_state_and_in_eval_mode() -> None:
    learner = OnlineLearner(made(), 2)
    x = torch.randn(4, 3, 3, dtype=F64)
    learner(x[0, :2]).sum().backward()
    learner.reset()
    learner.add_rows()
    twin = OnlineLearner(learner.layer, 3)
    grads = []
    for each in (learner, twin):
        learner.layer.zero_grad()
        each(x[1]).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in learner.layer.parameters()])
    torch.testing.assert_close(*grads)
    learner.load_state_dict(copy.deepcopy(learner.state_dict()))
    learner.state = twin.state
    learner.remove_rows(np.array([0.0, 1.0, 0.0]))
    torch.testing.assert_close(learner.state[0], twin.state[0][[0, 2]])
    assert not any(trace.any() for trace in learner.traces().values())
    learner.eval().add_rows(2)
    assert learner(x[0, :1].expand(4, 3)).shape == (4, 4)


def test_within_a_model_with_an_optimizer_and_a_checkpoint() -> None:
    model = nn.ModuleList([OnlineLearner(made(), 1), nn.Linear(4, 1, dtype=F64)])
    learner = model[0]
    optimizer = torch.optim.Adam(model.parameters())
    for batch in (1, 3, 2):
        if batch == 3:
            learner.add_rows(2)
        if batch == 2:
            learner.remove_rows(torch.tensor([True, False, False]))
        model[1](learner(torch.ones(batch, 3, dtype=F64))).sum().backward()
        optimizer.step()
    twin = nn.ModuleList([OnlineLearner(made(), 2), nn.Linear(4, 1, dtype=F64)])
    twin.load_state_dict(model.state_dict())
    x = torch.ones(2, 3, dtype=F64)
    torch.testing.assert_close(twin[0](x), learner(x))
    with pytest.raises(ValueError, match="state's batch_size must be the learner's, 1, got 2"):
        OnlineLearner(made(), 1).load_state_dict(learner.state_dict())


def test_it_says_how_large_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    learner = OnlineLearner(made(), 2)
    carried = learner.carried_bytes
    learner.add_rows(2)
    assert (learner.batch_size, learner.carried_bytes) == (4, 2 * carried)
    assert "batch_size=4" in repr(learner)
    learner.explain()
    said = capsys.readouterr().out
    assert "B = 4" in said
    assert "chosen for batch_size=2, and kept" in said


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda learner: learner.add_rows(0), ValueError, "count must be at least 1, got 0"),
        (lambda learner: learner.add_rows(1.5), TypeError, "count must be an int, got float"),
        (lambda learner: learner.remove_rows(torch.ones(2)), ValueError, "mask must leave at least one batch row, got True in all 2"),
        (lambda learner: learner.remove_rows(torch.ones(3)), ValueError, r"mask must have shape \(2,\), got \(3,\)"),
        (lambda learner: learner.remove_rows([0]), TypeError, r"mask must be a torch\.Tensor, got list"),
        (lambda learner: learner.add_rows(10**12), ValueError, "carries sensitivities of .* bytes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(call: Any, error: type[Exception], words: str) -> None:
    learner = OnlineLearner(made(), 2)
    output = learner(torch.ones(2, 3, dtype=F64))
    with pytest.raises(error, match=words):
        call(learner)
    assert learner.batch_size == 2
    output.sum().backward()
    learner(torch.ones(2, 3, dtype=F64)).sum().backward()


def test_in_the_middle_of_a_chunk_it_is_refused() -> None:
    learner = OnlineLearner(made(), 2, update_every=3)
    learner(torch.ones(2, 3, dtype=F64))
    for call in (learner.add_rows, lambda: learner.remove_rows(torch.tensor([True, False]))):
        with pytest.raises(ValueError, match=r"after step 1 of update_every=3: .* call end_chunk"):
            call()
    learner.end_chunk()
    learner.add_rows()
    assert learner(torch.ones(3, 3, dtype=F64)).shape == (3, 4)


def test_with_cuda_graph_it_is_refused() -> None:
    learner = OnlineLearner(made(), 2, form="step")
    learner._graph = learner._graphed(capture=lambda function: (function(), function))
    with pytest.raises(ValueError, match="cuda_graph=True can't change its batch rows"):
        learner.add_rows()
