"""NaN, infinities and exploding sensitivities: found in every form and by every rule, told once, done as asked."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rjepa_triton import GRU, LRU, LSTM, RGC, RNN, OnlineLearner, Stack, StackLearner, TwoPointRNN
from rjepa_triton.backend import native_backend
from rjepa_triton.online import nonfinite
from rjepa_triton.online.nonfinite import Watch, largest_sensitivity, scale_back_
from rjepa_triton.planning import cost

NAN, INF = math.nan, math.inf

# Options of a learner, and how many steps it takes in one call, 0 for step().
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "step": ({"form": "step"}, 0),
    "step-by-chunk": ({"form": "step"}, 3),
    "step-torch": ({"form": "step", "backend": "torch"}, 0),
    "step-lr": ({"form": "step", "lr": 0.01}, 0),
    "step-lag": ({"form": "step", "lag": 1}, 0),
    "step-bfloat16": ({"form": "step", "gamma_dtype": torch.bfloat16}, 0),
    "lazy": ({"form": "lazy", "rewrite_every": 4}, 0),
    "chunk": ({"form": "chunk", "update_every": 3}, 3),
    "chunk-by-step": ({"form": "chunk", "update_every": 3}, 0),
    "carry": ({"credit": "carry", "update_every": 3}, 3),
    "history": ({"form": "history"}, 0),
    "history-by-chunk": ({"form": "history"}, 3),
    "eprop": ({"learning": "eprop", "form": "step"}, 0),
    "rflo": ({"learning": "rflo", "form": "lazy"}, 0),
    "snap0": ({"learning": "snap0", "form": "chunk", "update_every": 3}, 3),
    "rtrl": ({"learning": "rtrl"}, 0),
    "uoro": ({"learning": "uoro"}, 0),
    "tbptt": ({"learning": "tbptt", "update_every": 3}, 3),
}
by_way = pytest.mark.parametrize("way", WAYS)


def run(learner: OnlineLearner, x: Tensor, steps: int, resets: dict[int, Tensor] | None = None) -> Tensor:
    """Steps on x (T, B, F) with a loss each, or on the sum of a chunk's. resets: before the steps of these numbers."""
    outputs, losses = [], []
    for t in range(0, len(x), max(1, steps)):
        if resets and t in resets:
            learner.reset(resets[t])
        output = learner.chunk(x[t : t + steps]) if steps else learner.step(x[t])[None]
        outputs.append(output.detach().clone())
        losses.append(output.square().sum())
        if (t + 1) % learner.update_every == 0 or steps:
            torch.stack(losses).sum().backward()
            losses = []
    return torch.cat(outputs)


def layers(make: Callable[[], TwoPointRNN], count: int) -> list[TwoPointRNN]:
    first = make()
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def gradients(layer: TwoPointRNN) -> list[Tensor | None]:
    return [weight.grad for weight in layer.weights()]


def same(a: TwoPointRNN, b: TwoPointRNN) -> bool:
    """Whether weights and gradients of two layers are equal, bit for bit."""
    pairs = zip([*a.weights(), *gradients(a)], [*b.weights(), *gradients(b)], strict=True)
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def rgc() -> RGC:
    return RGC(5, input_size=4, init="uniform")


def exploding(units: int = 5) -> RNN:
    """Grows by 1.5 a step, and Γ of the bias with it: at a tiny input Γ passes 1.8e19 where the state is still tiny."""
    layer = RNN(2, units, nonlinearity="relu")
    with torch.no_grad():
        for weight, matrix in zip(layer.weights(), layer.matrices, strict=True):
            reads = matrix.reads
            weight.copy_(torch.eye(units) * 1.5) if isinstance(reads, int) else weight.zero_()
            if reads == "input":
                weight.fill_(1e-20)
    return layer


def step_alone(text: str) -> int:
    found = re.search(r"at step (\d+)", text)
    assert found is not None, text
    return int(found[1])


# What is told


def told_once(learner: OnlineLearner, x: Tensor, steps: bool | int) -> str:
    """The one warning of these steps, which must name this file."""
    with pytest.warns(RuntimeWarning) as told:
        run(learner, x, steps)
    (only,) = told
    assert only.filename == __file__
    return str(only.message)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@by_way
def test_an_input_is_told_once_with_step_row_and_unit(way: str, value: float) -> None:
    options, steps = WAYS[way]
    learner = OnlineLearner(rgc(), 3, **options)
    x = torch.randn(12, 3, 4)
    x[7, 2, 1] = value
    text = told_once(learner, torch.cat([x, x]), steps)
    assert f"at step 8 input x is {value} in batch row 2, feature 1; state s is " in text
    assert re.search(r"state s is -?(nan|inf) in batch row 2, unit \d", text)


@pytest.mark.parametrize(
    "make", [lambda: LSTM(4, 5), lambda: GRU(4, 5), lambda: RNN(4, 5), lambda: LRU(4, 5)]
)
def test_an_input_is_told_even_where_units_saturate(make: Callable[[], TwoPointRNN]) -> None:
    learner = OnlineLearner(make(), 2)
    x = torch.randn(4, 2, 4)
    x[2, 1, 3] = INF
    with pytest.warns(RuntimeWarning, match="at step 3 input x is inf in batch row 1, feature 3"):
        run(learner, x, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_spoiled_are_named(dtype: torch.dtype) -> None:
    layer = RGC(5, init="uniform", dtype=dtype)
    learner = OnlineLearner(layer, 2)
    run(learner, torch.randn(2, 2, 5, dtype=dtype), 0)
    with torch.no_grad():
        layer.weights()[2][3, 1] = NAN
    with pytest.warns(
        RuntimeWarning, match="state m is nan in batch row 0, unit 3; nor are .* weights mm finite"
    ):
        run(learner, torch.randn(4, 2, 5, dtype=dtype), 0)


EXPLODING = {
    "step": {"form": "step"},
    "step-torch": {"form": "step", "backend": "torch"},
    "step-bfloat16": {"form": "step", "gamma_dtype": torch.bfloat16},
    "lazy": {"form": "lazy", "rewrite_every": 5},
    "chunk": {"form": "chunk", "update_every": 4},
    "carry": {"credit": "carry", "update_every": 4},
    "rtrl": {"learning": "rtrl"},
    "eprop": {"learning": "rfp", "form": "step", "lag": 1},
}


def feed_exploding(learner: OnlineLearner, steps: int = 200) -> None:
    x = torch.zeros(4, 2, 2)
    x[:, 1] = 1e-10
    for _ in range(steps // 4):
        if learner.form == "chunk":
            learner.chunk(x)
        else:
            for row in x:
                learner.step(row)


@pytest.mark.parametrize("name", EXPLODING)
def test_an_exploding_sensitivity_is_told_before_it_overflows(name: str) -> None:
    learner = OnlineLearner(exploding(), 2, **EXPLODING[name])
    with pytest.warns(RuntimeWarning) as told:
        feed_exploding(learner)
    (only,) = told
    number = r"before step 1\d\d (Γ|γ) of \w+ is up to (\S+) in batch row \d, unit \d: it explodes, beyond 1.8e\+19"
    found = re.search(number, str(only.message))
    assert found is not None, only.message
    assert largest_sensitivity(torch.float32) < float(found[2]) < INF


def test_an_exploding_product_of_uoro_is_told() -> None:
    learner = OnlineLearner(exploding(), 2, learning="uoro")
    with pytest.warns(RuntimeWarning, match="(c̃|θ̃ of \\w+) is up to .* it explodes"):
        feed_exploding(learner, 400)


def test_a_healthy_stream_is_told_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options, steps in WAYS.values():
            run(OnlineLearner(rgc(), 2, **options), torch.randn(72, 2, 4), steps)


# What is done


@pytest.mark.parametrize("way", [way for way in WAYS if way != "chunk-by-step"])
def test_a_step_that_raises_has_not_run(way: str) -> None:
    """The learner goes on with the right input, bit for bit as if it had never seen the other."""
    options, steps = WAYS[way]
    made, other = layers(rgc, 2)
    learner = OnlineLearner(made, 3, nonfinite="raise", **options)
    never = OnlineLearner(other, 3, nonfinite="ignore", **options)
    x, mask = torch.randn(24, 3, 4), torch.tensor([False, True, False])
    bad = x[12 : 12 + max(1, steps)].clone()
    bad[-1, 1, 2] = NAN
    run(learner, x[:12], steps)
    run(never, x[:12], steps)
    for both in (learner, never):
        both.reset(mask)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="input x is nan in batch row 1, feature 2"):
            run(learner, bad, steps)
    assert torch.equal(run(learner, x[12:], steps), run(never, x[12:], steps))
    assert same(made, other)


def test_a_step_that_raises_in_the_middle_of_a_chunk() -> None:
    made, other = layers(rgc, 2)
    options: dict[str, Any] = {"form": "chunk", "update_every": 4}
    learner = OnlineLearner(made, 3, nonfinite="raise", **options)
    never = OnlineLearner(other, 3, **options)
    x = torch.randn(4, 3, 4)
    losses = [learner.step(row).square().sum() for row in x[:2]]
    with pytest.raises(FloatingPointError, match="at step 3 "):
        learner.step(x[2] * NAN)
    losses += [learner.step(row).square().sum() for row in x[2:]]
    torch.stack(losses).sum().backward()
    run(never, x, 0)
    assert same(made, other)


@pytest.mark.parametrize("value", [NAN, INF])
@by_way
def test_by_clip_a_row_starts_anew(way: str, value: float) -> None:
    """Bit for bit as a learner that resets the row at that step and is fed zeros there."""
    options, steps = WAYS[way]
    made, other = layers(rgc, 2)
    learner = OnlineLearner(made, 3, nonfinite="clip", **options)
    never = OnlineLearner(other, 3, nonfinite="ignore", **options)
    x = torch.randn(24, 3, 4)
    x[12, 1, 2] = value
    with pytest.warns(RuntimeWarning, match=f"at step 13 input x is {value} in batch row 1") as told:
        clipped = run(learner, x, steps)
    assert len(told) == 1
    x[12, 1, 2] = 0
    # a reset in the call, as by chunk(), reaches the sensitivities by another way than reset() does
    starts = torch.zeros(24, 3, dtype=torch.bool)
    starts[12, 1] = True
    first = run(never, x[:12], steps)
    if steps:
        output = never.chunk(x[12 : 12 + steps], starts[12 : 12 + steps])
        output.square().sum().backward()
        rest = [output.detach(), run(never, x[12 + steps :], steps)]
    else:
        rest = [run(never, x[12:], steps, {0: starts[12]})]
    assert torch.equal(clipped, torch.cat([first, *rest]))
    for a, b in zip([*made.weights(), *gradients(made)], [*other.weights(), *gradients(other)], strict=True):
        if a is not None and b is not None:
            assert a.isfinite().all()
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_by_clip_a_row_that_was_reset_learns_as_if_it_had_never_been_otherwise() -> None:
    made, other = layers(rgc, 2)
    learner = OnlineLearner(made, 2, form="step", nonfinite="clip")
    never = OnlineLearner(other, 2, form="step")
    x = torch.randn(9, 2, 4)
    bad = x.clone()
    bad[3:, 0] = NAN
    with pytest.warns(RuntimeWarning):
        run(learner, bad, 0)
    run(never, x, 0)
    for each in (learner, never):
        each.reset()
        each.layer.zero_grad()
        run(each, x, 0)
    assert same(made, other)


def test_by_clip_weights_that_are_not_finite_are_refused() -> None:
    layer = rgc()
    learner = OnlineLearner(layer, 2, nonfinite="clip")
    with torch.no_grad():
        layer.weights()[0][0, 0] = NAN
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(FloatingPointError, match=r"weights ss finite.*start anew"),
    ):
        learner.step(torch.randn(2, 4))


@pytest.mark.parametrize("name", [name for name in EXPLODING if name not in ("chunk", "carry")])
def test_by_clip_sensitivities_stay_finite(name: str) -> None:
    learner = OnlineLearner(exploding(), 2, nonfinite="clip", **EXPLODING[name])
    with pytest.warns(RuntimeWarning, match="scaled back") as told:
        feed_exploding(learner, 216)
    assert len(told) == 1
    sensitivity = learner._past.sensitivity
    assert sensitivity is not None
    for numbers in sensitivity.numbers():
        assert numbers.abs().max() < largest_sensitivity(torch.float32) * 1.5**20


def test_by_raise_the_sensitivities_stop_the_stream_before_they_overflow() -> None:
    learner = OnlineLearner(exploding(), 2, form="step", nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"before step .* it explodes") as raised:
        feed_exploding(learner)
    state = learner.state
    assert all(each.isfinite().all() for each in state)
    assert "is up to inf" not in str(raised.value)
    learner.reset()
    feed_exploding(learner, 80)


def test_ignore_looks_at_nothing() -> None:
    learner = OnlineLearner(rgc(), 2, nonfinite="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(learner, torch.full((100, 2, 4), NAN), 0)
    assert learner.nonfinite == "ignore"


def test_a_row_is_scaled_so_that_its_largest_is_the_bound() -> None:
    numbers = torch.tensor([[1.0, -8.0], [2.0, 3.0], [0.0, 0.0]])
    scale_back_(numbers, 4.0)
    assert torch.equal(numbers, torch.tensor([[0.5, -4.0], [2.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize("value", ["stop", None, 1, True])
def test_another_policy_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="nonfinite must be one of 'warn', 'raise', 'clip', 'ignore', got "):
        OnlineLearner(rgc(), 2, nonfinite=value)  # type: ignore[arg-type]


def test_each_layer_of_a_stack_has_the_policy() -> None:
    learner = StackLearner(
        Stack(LSTM(4, 5), rgc_on_5()), 2, nonfinite="raise", each=[{}, {"nonfinite": "warn"}]
    )
    assert [each.nonfinite for each in learner.learners] == ["raise", "warn"]
    with pytest.raises(FloatingPointError, match="OnlineLearner of LSTM: at step 1 input x is nan"):
        learner.step(torch.full((2, 4), NAN))


def rgc_on_5() -> RGC:
    return RGC(5, input_size=5)


def test_copies_and_checkpoints_go_on_looking() -> None:
    learner = OnlineLearner(rgc(), 2, nonfinite="raise", form="step")
    run(learner, torch.randn(5, 2, 4), 0)
    loaded = OnlineLearner(rgc(), 2, nonfinite="raise", form="step")
    loaded.load_state_dict(learner.state_dict())
    for each in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), loaded):
        with pytest.raises(FloatingPointError, match="at step 6 "):
            each.step(torch.full((2, 4), NAN))
        each.step(torch.randn(2, 4))


def test_under_torch_compile() -> None:
    torch._dynamo.reset()
    learner = OnlineLearner(rgc(), 2, nonfinite="raise")

    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Tensor:
        return learner.step(x)

    call(torch.randn(2, 4)).sum().backward()
    with pytest.raises(FloatingPointError, match="at step 2 input x is nan in batch row 0"):
        call(torch.full((2, 4), NAN))
    call(torch.randn(2, 4)).sum().backward()
    torch._dynamo.reset()


# On a device that a step doesn't wait for, for which the CPU stands in


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "reads_at_once", lambda device: False)


class Reads(TorchDispatchMode):
    """Writes down the operations that make Python wait for the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "equal",
            "item",
        ):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["warn", "raise", "clip"])
@pytest.mark.parametrize("way", ["step", "lazy", "chunk", "history", "eprop"])
def test_no_step_on_a_device_waits(way: str, policy: str, far_away: None) -> None:
    options, steps = WAYS[way]
    learner = OnlineLearner(rgc(), 2, nonfinite=policy, **{**options, "backend": "torch"})  # type: ignore[arg-type]
    x = torch.randn(3, 2, 4)
    with Reads() as reads:
        for _ in range(60):
            for t in range(0, 3, max(1, steps)):
                output = learner.chunk(x) if steps else learner.step(x[t])
                output.square().sum().backward()
    assert reads.found == []


@pytest.mark.parametrize("way", ["step", "step-by-chunk", "lazy", "chunk", "history", "rtrl", "tbptt"])
def test_on_a_device_it_is_told_later_with_the_step(way: str, far_away: None) -> None:
    options, steps = WAYS[way]
    learner = OnlineLearner(rgc(), 3, **options)
    x = torch.randn(150, 3, 4)
    x[8, 2, 1] = NAN
    text = told_once(learner, x, steps)
    assert ("in steps 7 to 9" if steps else "at step 9 ") in text
    assert re.search(r"state s is nan in batch row 2, unit \d", text)


def test_on_a_device_what_is_forgotten_by_then_is_told_too(far_away: None) -> None:
    learner = OnlineLearner(rgc(), 3)
    x = torch.randn(150, 3, 4)
    x[8, 2, 1] = NAN
    with pytest.warns(RuntimeWarning, match="at step 9 .* which has been forgotten since"):
        run(learner, x, 0, {10: torch.tensor([False, False, True])})


def test_on_a_device_clip_resets_the_row_and_scales_back(far_away: None) -> None:
    learner = OnlineLearner(rgc(), 3, nonfinite="clip", form="step")
    x = torch.randn(40, 3, 4)
    x[9, 1, 0] = NAN
    with pytest.warns(RuntimeWarning, match="at step 10 ") as told:
        run(learner, x, 0)
    assert len(told) == 1
    assert all(each.isfinite().all() for each in learner.state)
    sensitivity = learner._past.sensitivity
    assert sensitivity is not None
    assert all(each.isfinite().all() for each in sensitivity.numbers())
    explodes = OnlineLearner(exploding(), 2, nonfinite="clip", form="step")
    with pytest.warns(RuntimeWarning, match="it explodes"):
        feed_exploding(explodes, 216)


def test_graphed_steps_leave_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph makes the flag itself, so that a step launches nothing for it."""
    learner = OnlineLearner(rgc(), 3, form="step")
    learner._watch = Watch("warn", learner._state, "torch", one_flag=True)

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        made = function()

        def replay() -> None:
            with torch.no_grad():
                for target, value in zip(made, function(), strict=True):
                    target.copy_(value)

        return made, replay

    learner._graph = learner._graphed(capture)
    marked: list[int] = []
    mark = Watch.mark
    monkeypatch.setattr(Watch, "mark", lambda *given: (marked.append(1), mark(*given)))
    x = torch.randn(150, 3, 4)
    x[69, 2, 1] = NAN
    with pytest.warns(RuntimeWarning, match="in steps 65 to 128 .* state s is nan in batch row 2") as told:
        run(learner, torch.cat([x, x]), 0)
    assert len(told) == 1
    assert len(marked) == 300  # all within the graph


def test_on_a_device_raise_stops_the_stream(far_away: None) -> None:
    learner = OnlineLearner(rgc(), 3, nonfinite="raise", form="step")
    x = torch.randn(40, 3, 4)
    x[9, 1, 0] = NAN
    with pytest.raises(FloatingPointError, match=r"at step 10 .* in batch row 1"):
        run(learner, x, 0)
    assert learner._past.now <= 9 + 2 * nonfinite.LOOK_EVERY["raise"]


# What it costs


@pytest.mark.parametrize(("backend", "added"), [("auto", 0), ("torch", 2)])
def test_a_step_makes_no_more_than_two_calls_of_torch_for_it(backend: str, added: int) -> None:
    """One makes the flag and one reads it; compiled code does without. A look takes some more for each tensor of Γ."""
    if added == 0 and native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")

    def calls(policy: str, steps: int) -> list[float]:
        learner = OnlineLearner(rgc(), 1, form="step", nonfinite=policy, backend=backend)  # type: ignore[arg-type]
        x = torch.randn(1, 4)
        return [cost.counted(lambda: learner.step(x)).calls for _ in range(steps)]

    more = [a - b for a, b in zip(calls("warn", 130), calls("ignore", 130), strict=True)]
    looks = [t for t, count in enumerate(more) if count > added]
    assert max(more[:64]) <= added
    assert len(looks) == 2
    assert all(more[t] <= added + 3 * 6 for t in looks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marking_leaves_the_tensors_as_they_are(dtype: torch.dtype) -> None:
    watch = Watch("warn", torch.zeros(1, dtype=dtype), "torch")
    numbers = torch.tensor([0.0, -0.0, 1e-44, 3.3, -7e37], dtype=dtype)
    kept, slot = numbers.clone(), torch.zeros(1)
    watch.mark(slot, [numbers])
    assert numbers.numpy().tobytes() == kept.numpy().tobytes()
    assert slot.item() == 0
    watch.mark(slot, [numbers, numbers * INF])
    watch.mark(slot, [kept])
    assert slot.item() == 1
