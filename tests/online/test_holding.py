"""Steps of some batch rows: each row does what a learner of its own does, and a row that is held stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from every_learner import LEARNERS
from row_by_row import RowByRow
from torch import Tensor

from rjepa_triton import ELSTM, LRU, LSTM, RGC, RNN, IndRNN, OnlineLearner, Stack, StackLearner, TwoPointRNN

F64 = torch.float64
RULES = {**LEARNERS, **{rule: {"learning": rule} for rule in ("eprop", "rflo", "snap0")}}
LAYERS = {
    "RGC": lambda: RGC(4, input_size=3, init="uniform", dtype=F64),
    "heads": lambda: RGC(4, input_size=3, heads=2, init="uniform", dtype=F64),
    "LSTM": lambda: LSTM(3, 4, dtype=F64),  # ∂h/∂h is zero for all arguments, and so isn't recorded
    "RNN": lambda: RNN(3, 4, dtype=F64),
    "IndRNN": lambda: IndRNN(3, 4, dtype=F64),
    "ELSTM": lambda: ELSTM(3, 4, dtype=F64),  # with a readout
    "LRU": lambda: LRU(3, 4, dtype=F64),
}


def made(name: str = "RGC") -> TwoPointRNN:
    torch.manual_seed(1)
    return LAYERS[name]()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", [name for name in RULES if name != "uoro"])
def test_each_row_is_a_learner_of_its_own(name: str, layer: str) -> None:
    both, random = RowByRow(made(layer), 4, **RULES[name]), np.random.default_rng(0)
    for _ in range(5):
        for _ in range(both.learner.update_every):
            if random.random() < 0.3:
                both.reset(torch.tensor(random.random(4) < 0.3))
            active = torch.tensor(random.random(4) < 0.6)
            both.step(None if random.random() < 0.2 else active)
        both.update()


@pytest.mark.parametrize("backend", ["torch", "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_on_each_backend(backend: str, dtype: torch.dtype) -> None:
    for options in (
        {"form": "step"},
        {"form": "chunk", "update_every": 3},
        {"form": "lazy", "rewrite_every": 2},
    ):
        both = RowByRow(made().to(dtype), 3, backend=backend, **options)
        for t in range(4):
            for k in range(both.learner.update_every):
                both.step(torch.arange(3) != (t + k) % 3)
            both.update()


@pytest.mark.parametrize("layer", ["RGC", "LSTM", "RNN"])
@pytest.mark.parametrize(
    "options",
    [
        {"learning": "rtrl"},
        {"learning": "tbptt", "update_every": 6},
        {"credit": "carry", "update_every": 6},
        {"refine": "exact", "update_every": 6},
    ],
    ids=str,
)
def test_losses_of_held_rows_are_those_of_the_state_that_stays(layer: str, options: dict[str, Any]) -> None:
    """BPTT of a loop whose state is torch.where(active, new, old), through a layer on single steps, is the oracle."""
    learner = OnlineLearner(made(layer), 2, **options)
    oracle = made(layer)
    oracle.learning = "bptt"
    x = torch.randn(6, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    active = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]], dtype=torch.bool)
    state = oracle.zero_state(2, x)
    losses, exact = [], torch.zeros((), dtype=F64)
    for t in range(6):
        losses.append(learner(x[t], active[t]).square().sum())
        _, new = oracle(x[t : t + 1], state)
        new = (new,) if isinstance(new, Tensor) else new
        state = tuple(torch.where(active[t][:, None], a, b) for a, b in zip(new, state, strict=True))
        exact = exact + state[0].square().sum()
        if learner.update_every == 1:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
        assert not x.grad[~active].any()
    exact.backward()
    for a, b in zip(learner.layer.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def random_steps(count: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x (C, 4, 3), NaN where no step is taken, resets and active (C, 4)."""
    random = np.random.default_rng(seed)
    resets, active = (torch.tensor(random.random((count, 4)) < share) for share in (0.2, 0.6))
    x = torch.tensor(random.standard_normal((count, 4, 3)))
    return x.masked_fill(~active[..., None], torch.nan), resets, active


@pytest.mark.parametrize("layer", ["RGC", "LSTM", "ELSTM"])
@pytest.mark.parametrize("name", [*RULES, "refine"])
def test_a_chunk_is_its_steps(name: str, layer: str) -> None:
    """Of a chunk with masks and the loop of steps: outputs, gradients, states and what is carried."""
    options = {**RULES, "refine": {"refine": "exact", "update_every": 3}}[name]
    learner, twin = (OnlineLearner(made(layer), 4, **options) for _ in range(2))
    for seed in range(3):
        x, resets, active = random_steps(3, seed)
        outputs = learner.chunk(x, resets if seed else None, active)
        outputs.square().sum().backward()
        losses = []
        for t in range(3):
            if seed:
                twin.reset(resets[t])
            output = twin(x[t], active[t])
            torch.testing.assert_close(output, outputs[t])
            losses.append(output.square().sum())
            if twin.update_every == 1:
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        for (key, parameter), other in zip(learner.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(learner.state, twin.state)
        if name not in ("uoro", "tbptt"):
            torch.testing.assert_close(learner.traces(), twin.traces())


@pytest.mark.parametrize("layer", ["RGC", "LSTM", "LRU"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "uoro"])
def test_a_row_of_a_chunk_is_a_chunk_of_the_steps_that_it_takes(name: str, layer: str) -> None:
    learner = OnlineLearner(made(layer), 4, **RULES[name])
    x, resets, active = random_steps(7)
    x.requires_grad_()
    weight = torch.randn(7, 4, 4, dtype=F64) * active[..., None]
    outputs = learner.chunk(x, resets, active)
    (outputs * weight).sum().backward()
    summed = [torch.zeros_like(parameter) for parameter in learner.parameters()]
    for row in range(4):
        alone = OnlineLearner(made(layer), 1, **RULES[name])
        taken = active[:, row].nonzero()[:, 0]
        # what was reset since the step before that was taken
        counts = torch.cat([torch.zeros(1), resets[:, row].cumsum(0)])[taken + 1]
        starts = counts.diff(prepend=torch.zeros(1)) > 0
        own = x.detach()[taken, row : row + 1].requires_grad_()
        found = alone.chunk(own, starts[:, None])
        torch.testing.assert_close(outputs[taken, row : row + 1], found)
        (found * weight[taken, row : row + 1]).sum().backward()
        torch.testing.assert_close(x.grad[taken, row : row + 1], own.grad)
        for total, parameter in zip(summed, alone.parameters(), strict=True):
            total += parameter.grad
    assert not x.grad[~active].any()
    for total, parameter in zip(summed, learner.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, total)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("uoro", "tbptt")])
def test_a_row_that_a_chunk_holds_stays_bit_for_bit(name: str) -> None:
    learner = OnlineLearner(made(), 2, **RULES[name])
    x = torch.randn(12, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    learner.chunk(x[:4]).sum().backward()
    if learner._past.sensitivity is not None:
        learner._past.fold()
    traces, state = learner.traces(), learner.state
    active = torch.tensor([[False, True]]).expand(4, 2)
    for start in (4, 8):
        learner.chunk(x[start : start + 4], None, active)
    for before, after in zip(
        [*state, *traces.values()], [*learner.state, *learner.traces().values()], strict=True
    ):
        rows = (0,) if before.dim() == 2 else (slice(None), 0)
        assert torch.equal(after[rows], before[rows])
        assert not torch.equal(after, before)


def test_a_chunk_s_mask_in_other_layouts_modes_and_dtypes() -> None:
    x, resets, active = random_steps(5)
    for name in LAYERS:
        steps, rows = (OnlineLearner(made(name), 4).eval() for _ in range(2))
        rows.layer.batch_first = True
        outputs = steps.chunk(x, resets, active.float())
        swapped = rows.chunk(x.transpose(0, 1), resets.T, active.T.numpy())
        torch.testing.assert_close(swapped.transpose(0, 1), outputs)
        torch.testing.assert_close(rows.state, steps.state)
        training = OnlineLearner(made(name), 4)
        torch.testing.assert_close(training.chunk(x, resets, active), outputs)
    deep, twin = (StackLearner(Stack(made("RGC"), LSTM(4, 2, dtype=F64)), 4, form="step") for _ in range(2))
    for a, b in zip(deep.parameters(), twin.parameters(), strict=True):
        b.data.copy_(a)
    outputs = deep.chunk(x, None, active)
    for t in range(5):
        torch.testing.assert_close(twin(x[t], active[t]), outputs[t])


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("uoro", "tbptt")])
def test_a_row_that_is_held_stays_bit_for_bit(name: str) -> None:
    learner = OnlineLearner(made(), 2, **RULES[name])
    x = torch.randn(20, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    for t in range(4):
        learner(x[t])
    learner.end_chunk()
    if learner._past.sensitivity is not None:
        learner._past.fold()  # so that the steps before are rounded as one from here on
    traces, state = learner.traces(), learner.state
    for t in range(4, 20):
        learner(x[t].masked_fill(torch.tensor([[True], [False]]), torch.inf), torch.tensor([False, True]))
    for before, after in zip(
        [*state, *traces.values()], [*learner.state, *learner.traces().values()], strict=True
    ):
        rows = (0,) if before.dim() == 2 else (slice(None), 0)
        assert torch.equal(after[rows], before[rows])
        assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "options",
    [
        {"learning": "uoro"},
        {"form": "step", "gamma_dtype": torch.bfloat16, "gamma_rounding": "stochastic"},
        {"form": "step", "gamma_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_what_is_random_or_rounded_stays_too(options: dict[str, Any]) -> None:
    learner = OnlineLearner(made().float(), 2, **options)
    x = torch.randn(8, 2, 3)
    for t in range(3):
        learner(x[t]).sum().backward()
    carried = learner._past.sensitivity
    assert carried is not None
    before = [tensor.clone() for tensor in carried.numbers()]
    for t in range(3, 8):
        learner(x[t], torch.tensor([True, False])).sum().backward()
    for old, new in zip(before, carried.numbers(), strict=True):
        rows = (
            (slice(None), 1)
            if old.shape[:2] == (2, 2) and old.dim() == 3 and new is carried.numbers()[0]
            else 1
        )
        assert torch.equal(old[rows], new[rows])
        assert not torch.equal(old, new)


def test_lr_takes_the_step_of_the_active_rows() -> None:
    learner, twin = (OnlineLearner(made(), batch, form="step", lr=0.1) for batch in (2, 1))
    x = torch.randn(5, 2, 3, dtype=F64)
    learner(x[0], torch.tensor([True, False])).square().sum().backward()
    for t in range(1, 5):
        learner(x[t], torch.tensor([False, True]))[1].square().sum().backward()
    twin(x[0, :1]).square().sum().backward()
    twin.reset()
    for t in range(1, 5):
        twin(x[t, 1:]).square().sum().backward()
    for a, b in zip(learner.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_in_eval_mode_and_by_an_environment_s_flags() -> None:
    for layer in LAYERS:
        learner = OnlineLearner(made(layer), 2).eval()
        x = torch.randn(3, 2, 3, dtype=F64)
        learner(x[0])
        before = learner.state
        twin = copy.deepcopy(learner)
        x[1, 0] = torch.nan
        for flags in (np.array([0.0, 1.0]), torch.tensor([0, 1])):
            held = copy.deepcopy(learner)
            output, want = held(x[1], flags), twin.peek(x[1])
            torch.testing.assert_close(output[1], want[1])
            assert output.isfinite().all()
            for old, new in zip(before, held.state, strict=True):
                assert torch.equal(old[0], new[0])
                assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize("policy", ["raise", "clip"])
def test_what_is_not_finite_in_a_held_row_is_not_looked_at(policy: str) -> None:
    learner = OnlineLearner(made(), 2, nonfinite=policy)
    x = torch.full((2, 3), torch.nan, dtype=F64)
    x[1] = 1
    output = learner(x, torch.tensor([False, True]))
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in learner.parameters())
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="batch row 0"):
            learner(x, torch.tensor([True, True]))
    else:
        with pytest.warns(RuntimeWarning, match="batch row 0"):
            learner(x, torch.tensor([True, False]))


@pytest.mark.parametrize("layer", ["RGC", "RNN"])
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "uoro"])
def test_a_checkpoint_between_such_steps(name: str, layer: str) -> None:
    learner, twin = (OnlineLearner(made(layer), 2, **LEARNERS[name]) for _ in range(2))
    x = torch.randn(8, 2, 3, dtype=F64)
    for t in range(4):
        learner(x[t], torch.tensor([t % 2 == 0, t != 1]))
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    copied = copy.deepcopy(learner)
    found = []
    for each in (learner, twin, copied):
        each.end_chunk()
        outputs = [each(x[t], torch.tensor([True, t != 5])) for t in range(4, 4 + each.update_every)]
        sum(output.square().sum() for output in outputs).backward()
        found.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("active", "error", "words"),
    [
        ([True, False], TypeError, r"active must be a torch\.Tensor, got list"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"active must have shape \(2,\), got \(3,\)"),
        (np.array(["a", "b"]), TypeError, "active must hold bools or numbers, got a numpy array"),
    ],
)
def test_a_mask_that_is_none_changes_nothing(active: Any, error: type[Exception], words: str) -> None:
    learner = OnlineLearner(made(), 2)
    with pytest.raises(error, match=words):
        learner(torch.ones(2, 3, dtype=F64), active)
    with pytest.raises(error, match=words.replace(r"\(2,\)", r"\(2, 2\)")):
        learner.chunk(torch.ones(2, 2, 3, dtype=F64), None, active)
    assert not any(state.any() for state in learner.state)


def test_under_torch_compile_and_with_cuda_graph_it_is_refused() -> None:
    learner = OnlineLearner(made(), 2)
    step = torch.compile(learner.step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"step\(x, active\) can't go under torch.compile"):
        step(torch.ones(2, 3, dtype=F64), torch.tensor([True, False]))
    chunk = torch.compile(learner.chunk, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"chunk\(x, active=…\) can't go under torch.compile"):
        chunk(torch.ones(3, 2, 3, dtype=F64), None, torch.ones(3, 2, dtype=torch.bool))
    learner = OnlineLearner(made(), 2, form="step")
    learner._graph = learner._graphed(capture=lambda function: (function(), function))
    with pytest.raises(ValueError, match="active can't go with cuda_graph=True"):
        learner.step(torch.ones(2, 3, dtype=F64), torch.tensor([True, False]))
