"""OnlineLearner as a torch.nn.Module: parameters, buffers, moves, copies, and checkpoints within another module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_learner import LEARNERS
from torch import Tensor, nn

from rjepa_triton import LSTM, RGC, OnlineLearner

F64 = torch.float64


class Model(nn.Module):
    """A module that holds a learner, as one does who writes a training loop around it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = RGC(4, input_size=3, init="uniform", dtype=options.pop("dtype", F64))
        self.learner = OnlineLearner(layer, 2, **options)
        self.readout = nn.Linear(4, 1, dtype=layer.weight_in.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.learner(x))


def train(model: Model, steps: int, seed: int = 5) -> list[Tensor]:
    """The gradients of so many steps, whose losses are summed between updates of the learner's C steps."""
    dtype = model.readout.weight.dtype
    made, total = torch.Generator().manual_seed(seed), torch.zeros((), dtype=dtype)
    model.zero_grad()
    for t in range(steps):
        total = total + model(torch.randn(2, 3, generator=made, dtype=F64).to(dtype)).square().sum()
        if (t + 1) % model.learner.update_every == 0:
            total.backward()
            total = torch.zeros((), dtype=dtype)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_parameters_and_buffers_are_the_layer_s_and_what_is_carried() -> None:
    layer = LSTM(3, 4)
    learner = OnlineLearner(layer, 2, form="step")
    assert dict(learner.named_parameters()) == {f"layer.{n}": p for n, p in layer.named_parameters()}
    assert list(learner.children()) == [layer]
    buffers = dict(learner.named_buffers())
    carried = learner._past.sensitivity
    assert carried is not None
    assert [buffers[f"gamma_{i}"] for i in range(len(buffers) - 1)] == carried.tensors()
    output = learner(torch.ones(2, 3))
    torch.testing.assert_close(output, learner.state[0])
    torch.testing.assert_close(dict(learner.named_buffers())["_state"], torch.stack(learner.state))
    assert sum(buffer.nbytes for buffer in learner.buffers()) <= learner.nbytes


def test_forward_is_step_and_runs_hooks() -> None:
    learner, twin = (Model().learner for _ in range(2))
    seen: list[Tensor] = []
    learner.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(learner(x), twin.step(x), rtol=0, atol=0)
    assert len(seen) == 1


def test_repr_says_layer_rule_form_backend_and_bytes() -> None:
    learner = OnlineLearner(RGC(4, input_size=3), 2, form="step", backend="torch")
    lines = repr(learner).splitlines()
    assert lines == [
        "OnlineLearner(",
        f"  batch_size=2, learning='rfp', form='step', backend='torch', {learner.nbytes:,} bytes",
        f"  (layer): {learner.layer!r}",
        ")",
    ]
    assert "backend='" in repr(OnlineLearner(RGC(4), 2, learning="tbptt", update_every=2))


@pytest.mark.parametrize("steps", [0, 3, 6])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_module_s_checkpoint_holds_its_learner(name: str, steps: int) -> None:
    model, twin = Model(**LEARNERS[name]), Model(**LEARNERS[name])
    train(model, steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    train(twin, 3, seed=9)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(train(model, 6), train(twin, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_learner_s_own_checkpoint_is_as_before_and_both_load() -> None:
    model = Model()
    train(model, 3)
    own = model.learner.state_dict()
    assert own["version"] == 2
    assert isinstance(own["gamma"], list)
    whole = {k.removeprefix("learner."): v for k, v in model.state_dict().items() if k.startswith("learner.")}
    assert set(whole) == {"_extra_state", *(f"layer.{name}" for name in model.learner.layer.state_dict())}
    for state in (own, whole):
        twin = Model()
        twin.load_state_dict(model.state_dict())
        twin.learner.reset()
        twin.learner.load_state_dict(copy.deepcopy(state))
        for a, b in zip(train(copy.deepcopy(model), 3), train(twin, 3), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", LEARNERS)
def test_copies_go_on_and_their_buffers_are_what_they_carry(name: str, copied: Callable[[Any], Any]) -> None:
    model = Model(**LEARNERS[name])
    train(model, 6)
    twin = copied(model)
    for made in (model, twin):
        carried = made.learner._past.sensitivity
        own = [] if carried is None else carried.numbers()
        listed = [tensor for key, tensor in made.learner.named_buffers() if key != "_state"]
        assert [tensor.data_ptr() for tensor in listed] == [tensor.data_ptr() for tensor in own]
    for a, b in zip(train(model, 3), train(twin, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_move_takes_all_that_is_carried(name: str) -> None:
    """A learner of float32 that is moved to float64 goes on as one does that was made so and loads the same past."""
    model = Model(dtype=torch.float32, **LEARNERS[name])
    train(model, 7 if model.learner.update_every == 1 else 6)
    old = [tensor.double() for tensor in model.learner.buffers()]
    model.double()
    assert all(tensor.dtype == F64 for tensor in [*model.learner.buffers(), *model.parameters()])
    torch.testing.assert_close(list(model.learner.buffers()), old, rtol=0, atol=0)
    twin = Model(**LEARNERS[name])
    twin.load_state_dict(model.state_dict())
    grads = train(model, 6)
    for a, b in zip(grads, train(twin, 6), strict=True):
        torch.testing.assert_close(a, b)
    assert train(model.float(), 3)[0].dtype == torch.float32


def test_a_move_that_changes_nothing_keeps_the_graph() -> None:
    learner = Model().learner
    output = learner(torch.randn(2, 3, dtype=F64))
    assert learner.to("cpu").to(F64) is learner
    output.sum().backward()
    assert learner.layer.weight_ss.grad is not None


def test_gamma_in_bfloat16_stays_so() -> None:
    model = Model(dtype=torch.float32, form="step", gamma_dtype=torch.bfloat16)
    train(model, 3)
    model.double()
    assert model.learner.get_buffer("gamma_0").dtype == torch.bfloat16
    train(model, 3)


def test_a_dtype_in_which_no_learner_runs_is_refused_and_nothing_changes() -> None:
    learner = Model().learner
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(TypeError, match=r"runs in float64 or float32, got torch\.float16"):
        learner.half()
    assert learner.layer.weight_ss.dtype == F64
    after = learner.state_dict()
    torch.testing.assert_close((after["state"], after["gamma"]), (before["state"], before["gamma"]))


def test_the_learning_rate_moves() -> None:
    learner = Model(dtype=torch.float32, lr=0.1).learner.double()
    before = learner.layer.weight_in.detach().clone()
    learner(torch.ones(2, 3, dtype=F64)).sum().backward()
    assert learner.lr == pytest.approx(0.1)
    assert not torch.equal(learner.layer.weight_in, before)
