"""OnlineLearner: every form gives RFP's gradient, also while the weights change; episodes, checkpoints, refusals.

This is one long file because it holds every form and rule of one class, and every way to use it, to one oracle.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from typing import Any

import kernels_here
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton import GRU, LSTM, RGC, OnlineLearner, TwoPointRNN
from rjepa_triton.backend import operations
from rjepa_triton.online import counting
from rjepa_triton.planning import cost

F64 = torch.float64


def layer(units: int = 5, scale: float = 0.5, **options: Any) -> RGC:
    options.setdefault("dtype", F64)
    made = RGC(units, **options)
    with torch.no_grad():
        for weight in made.recurrent_weights():
            weight.normal_(0, 1.0 if weight.dim() == 1 else scale / units**0.5)
    return made


def gradients(made: RGC) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in made.weights()]


def oracle_gradients(made: RGC, x: Tensor, delta: Tensor, resets: Tensor | None = None) -> list[Tensor]:
    """RFP's gradient of all the layer's weights by the detach oracle: inputs included, zero initial state."""
    weights = [w.detach().clone().requires_grad_() for w in made.weights()]
    drive = x if made.input_size is None else x @ weights[4].T + weights[5]
    zero = x.new_zeros(x.shape[1], made.hidden_size)
    s, _ = oracle.rgc(drive, weights[:4], (zero, zero), resets, "own")
    return list(torch.autograd.grad((s * delta).sum(), weights, materialize_grads=True))


def run(
    made: RGC,
    x: Tensor,
    delta: Tensor,
    how: str,
    *,
    every: int = 1,
    resets: Tensor | None = None,
    **options: Any,
) -> OnlineLearner:
    """Feed x to a learner by `how`, with loss Σ δ s, adding up gradients in the layer."""
    learner = OnlineLearner(made, x.shape[1], update_every=every, **options)
    if how == "chunk":
        for start in range(0, x.shape[0], every):
            part = None if resets is None else resets[start : start + every]
            s = learner.chunk(x[start : start + every], part)
            (s * delta[start : start + every]).sum().backward()
        return learner
    pending: list[Tensor] = []
    for t in range(x.shape[0]):
        if resets is not None and bool(resets[t].any()):
            learner.reset(resets[t])
        pending.append((learner.step(x[t]) * delta[t]).sum())
        if how == "each" or len(pending) == every or t == x.shape[0] - 1:
            torch.stack(pending).sum().backward()
            pending = []
    return learner


# form, how it is driven, update_every
WAYS = [
    ("step", "each", 1),
    ("step", "chunk", 4),
    ("lazy", "each", 1),
    ("lazy", "together", 4),
    ("lazy", "each", 4),
    ("lazy", "chunk", 3),
    ("chunk", "chunk", 4),
    ("chunk", "together", 4),
    ("chunk", "each", 4),
    ("history", "each", 1),
    ("history", "together", 4),
    ("history", "chunk", 3),
    ("auto", "each", 1),
    ("auto", "together", 4),
]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("options", [{}, {"recurrence": "diagonal"}, {"input_size": 3}], ids=str)
@pytest.mark.parametrize(("form", "how", "every"), WAYS)
def test_every_form_gives_one_gradient(
    form: str, how: str, every: int, options: dict[str, Any], reset: bool, lag: int
) -> None:
    made = layer(**options)
    x, delta = torch.randn(11, 3, made.fan_in, dtype=F64), torch.randn(11, 3, 5, dtype=F64)
    resets = torch.rand(11, 3) < 0.2 if reset else None
    run(made, x, delta, how, every=every, resets=resets, form=form, lag=lag)
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta, resets)) < 1e-12


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("rewrite_every", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("way", [w for w in WAYS if w[0] == "lazy"], ids=str)
def test_lazy_gives_it_however_often_gamma_is_rewritten(
    way: tuple[str, str, int], rewrite_every: int, lag: int
) -> None:
    form, how, every = way
    made = layer(input_size=3)
    x, delta = torch.randn(11, 3, 3, dtype=F64), torch.randn(11, 3, 5, dtype=F64)
    resets = torch.rand(11, 3) < 0.2
    options: dict[str, Any] = {"form": form, "lag": lag, "rewrite_every": rewrite_every}
    learner = run(made, x, delta, how, every=every, resets=resets, **options)
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta, resets)) < 1e-12
    assert learner.rewrite_every == rewrite_every
    if rewrite_every == 100:  # Γ was never written
        assert not any(bool(t.any()) for t in learner.state_dict()["gamma"])


@pytest.mark.parametrize("form", ["lazy", "history"])
def test_steps_between_two_updates_may_each_have_a_backward_after_the_last(form: str) -> None:
    made = layer()
    x, delta = torch.randn(12, 2, 5, dtype=F64), torch.randn(12, 2, 5, dtype=F64)
    options: dict[str, Any] = {"form": form, **({"rewrite_every": 4} if form == "lazy" else {})}
    learner = OnlineLearner(made, 2, update_every=3, **options)
    for start in range(0, 12, 3):
        outputs = [learner.step(row) for row in x[start : start + 3]]
        for s, d in zip(outputs, delta[start : start + 3], strict=True):
            (s * d).sum().backward()
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta)) < 1e-12


@pytest.mark.parametrize("rewrite_every", [1, 2, 3, 8])
def test_lazy_rewrites_gamma_once_in_so_many_steps(
    rewrite_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads it once a step, in the same pass where it is rewritten; what is kept is R steps at the most."""
    passes: list[str] = []

    def counted(name: str) -> None:
        function = getattr(operations, name)

        def call(*arguments: Any, **named: Any) -> Any:
            passes.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(operations, name, call)

    made = layer()
    OnlineLearner(made, 2, form="lazy")  # a first one counts calls, for the cost model
    for name in ("gamma_step_of_", "gamma_chunk_of_", "gamma_read"):
        counted(name)
    x, delta = torch.randn(24, 2, 5, dtype=F64), torch.randn(24, 2, 5, dtype=F64)
    learner = run(made, x, delta, "each", form="lazy", rewrite_every=rewrite_every)
    assert passes == (["gamma_read"] * (rewrite_every - 1) + ["gamma_chunk_of_"]) * (24 // rewrite_every)
    gamma_alone = OnlineLearner(made, 2, form="step").nbytes
    assert learner.nbytes == gamma_alone
    sizes = []
    for row in x:
        learner.step(row).sum().backward()
        sizes.append(learner.nbytes)
    kept = 12 * 2 * 5 * 8  # bytes a step: 4 + 4 + 2 + 2 numbers a unit, of M, φ, the states read and ∂F/∂x
    assert max(sizes) <= gamma_alone + 2 * rewrite_every * kept


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(WAYS),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 1),
    st.integers(0, 2**31),
)
def test_any_size(way: tuple[str, str, int], steps: int, batch: int, units: int, lag: int, seed: int) -> None:
    torch.manual_seed(seed)
    made = layer(units)
    x, delta = torch.randn(steps, batch, units, dtype=F64), torch.randn(steps, batch, units, dtype=F64)
    form, how, every = way
    run(made, x, delta, how, every=every, form=form, lag=lag)
    for got, want in zip(gradients(made), oracle_gradients(made, x, delta), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize(("form", "how", "every"), [w for w in WAYS if w[1] != "chunk"])
def test_a_reset_of_all_rows_keeps_what_its_chunk_still_owes(
    form: str, how: str, every: int, at: int, lag: int
) -> None:
    made = layer(input_size=3)
    x, delta = torch.randn(11, 2, 3, dtype=F64), torch.randn(11, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2, form=form, update_every=every, lag=lag)
    losses: list[Tensor] = []
    for t in range(11):
        if t == at:
            learner.reset()
        losses.append((learner.step(x[t]) * delta[t]).sum())
        if how == "each" or len(losses) == every or t == 10:
            torch.stack(losses).sum().backward()
            losses = []
    resets = torch.zeros(11, 2, dtype=torch.bool)
    resets[at] = True
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta, resets)) < 1e-12


@pytest.mark.parametrize(("lag", "every"), [(0, 1), (1, 1), (0, 3)])
def test_a_reset_of_all_rows_frees_the_history(lag: int, every: int) -> None:
    learner = OnlineLearner(layer(), 2, form="history", lag=lag, update_every=every)
    sizes = []
    for _ in range(6):
        for _ in range(7):
            learner.step(torch.randn(2, 5, dtype=F64))
        learner.reset()
        sizes.append(learner.nbytes)
    assert max(sizes) <= 3 * sizes[0]


def test_rfp_online_equals_bptt_for_a_diagonal_layer() -> None:
    made = layer(recurrence="diagonal", input_size=3)
    exact = layer(recurrence="diagonal", input_size=3, learning="bptt")
    exact.load_state_dict(made.state_dict())
    x, delta = torch.randn(15, 2, 3, dtype=F64), torch.randn(15, 2, 5, dtype=F64)
    run(made, x, delta, "each")
    (exact(x)[0] * delta).sum().backward()
    assert oracle.relative(gradients(made), gradients(exact)) < 1e-12


@pytest.mark.parametrize(("form", "how", "every"), [w for w in WAYS if w[1] != "each" or w[0] != "chunk"])
def test_weights_may_change_after_any_backward(form: str, how: str, every: int) -> None:
    """The sensitivities of a step are those of the weights it ran with: eq. 14 along the changing weights."""
    made, plain = layer(), layer()
    plain.load_state_dict(made.state_dict())
    x, delta = torch.randn(8, 2, 5, dtype=F64), torch.randn(8, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2, update_every=every, form=form)
    seen: list[list[Tensor]] = []
    for start in range(0, 8, every):
        part = slice(start, min(start + every, 8))
        if how == "chunk":
            s = learner.chunk(x[part])
        else:
            s = torch.stack([learner.step(row) for row in x[part]])
        for p in made.parameters():
            p.grad = None
        (s * delta[part]).sum().backward()
        # the oracle: every step's weights are leaves of their own; RFP sums over the past ones
        seen += [[w.detach().clone().requires_grad_() for w in made.weights()] for _ in range(s.shape[0])]
        zero = x.new_zeros(2, 5)
        out, _ = oracle.rgc(x[: len(seen)], seen, (zero, zero), None, "own")
        leaves = [w for step in seen for w in step]
        parts = torch.autograd.grad((out[part] * delta[part]).sum(), leaves, allow_unused=True)
        want = [sum(p for p in parts[k::4] if p is not None) for k in range(4)]
        want = [w if isinstance(w, Tensor) else torch.zeros(5, 5, dtype=F64) for w in want]
        assert oracle.relative(gradients(made), want) < 1e-12
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("form", ["step", "lazy", "history"])
def test_a_loss_over_two_steps_needs_lag_1(form: str) -> None:
    made = layer()
    x = torch.randn(9, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2, form=form, lag=1)
    previous = None
    for row in x:
        s = learner.step(row)
        if previous is not None:
            (previous * s).sum().backward(retain_graph=True)
        previous = s
    weights = [w.detach().clone().requires_grad_() for w in made.weights()]
    zero = x.new_zeros(2, 5)
    s, _ = oracle.rgc(x, weights, (zero, zero), None, "own")
    want = torch.autograd.grad((s[:-1] * s[1:]).sum(), weights)
    assert oracle.relative(gradients(made), want) < 1e-12


def test_the_current_steps_gradient_goes_on_to_the_input() -> None:
    for form in ("step", "lazy", "history"):
        made = layer(input_size=3)
        learner = OnlineLearner(made, 2, form=form)
        for _ in range(3):
            below = torch.randn(2, 3, dtype=F64, requires_grad=True)
            s0, m0 = (v.clone() for v in learner.state)
            delta = torch.randn(2, 5, dtype=F64)
            (learner.step(below.tanh()) * delta).sum().backward()
            again = below.detach().clone().requires_grad_()
            drive = again.tanh() @ made.weight_in.T + made.bias
            s, _ = oracle.rgc(drive[None], made.weights()[:4], (s0, m0))
            (want,) = torch.autograd.grad((s[0] * delta).sum(), [again])
            torch.testing.assert_close(below.grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["step", "lazy", "chunk", "history"])
def test_a_chunks_input_gradient_is_the_dual_forms(form: str) -> None:
    made = layer()
    x = torch.randn(6, 2, 5, dtype=F64, requires_grad=True)
    delta = torch.randn(6, 2, 5, dtype=F64)
    (OnlineLearner(made, 2, update_every=6, form=form).chunk(x) * delta).sum().backward()
    again = x.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad((made(again)[0] * delta).sum(), [again])
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)


def test_steps_equal_the_layers_forward() -> None:
    made = layer(input_size=4)
    x = torch.randn(7, 3, 4, dtype=F64)
    output, state = made(x)
    learner = OnlineLearner(made, 3)
    torch.testing.assert_close(torch.stack([learner.step(row) for row in x]), output)
    for got, want in zip(learner.state, state, strict=True):
        torch.testing.assert_close(got, want)


def test_steps_without_a_loss_still_count() -> None:
    made = layer()
    x, delta = torch.randn(9, 2, 5, dtype=F64), torch.randn(9, 2, 5, dtype=F64)
    delta[[0, 1, 4, 6, 7]] = 0
    for form, lag in (("step", 0), ("step", 1), ("lazy", 0), ("lazy", 1), ("history", 0)):
        made.zero_grad()
        learner = OnlineLearner(made, 2, form=form, lag=lag)
        for t, row in enumerate(x):
            s = learner.step(row)
            if bool(delta[t].any()):
                (s * delta[t]).sum().backward()
        assert oracle.relative(gradients(made), oracle_gradients(made, x, delta)) < 1e-12


def test_hooks_see_the_gradient_and_frozen_weights_get_none() -> None:
    made = layer()
    made.weight_mm.requires_grad_(False)
    seen = []
    made.weight_ss.register_hook(lambda g: seen.append(g.clone()))
    learner = OnlineLearner(made, 2)
    learner.step(torch.randn(2, 5, dtype=F64))
    learner.step(torch.randn(2, 5, dtype=F64)).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], made.weight_ss.grad)
    assert made.weight_mm.grad is None


@pytest.mark.parametrize("options", [{"form": "step"}, {"form": "lazy", "rewrite_every": 2}], ids=str)
def test_a_second_backward_at_the_same_step_is_served(options: dict[str, Any]) -> None:
    made = layer()
    x = torch.randn(4, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2, **options)
    for row in x:
        s = learner.step(row)
        s.sum().backward(retain_graph=True)
        (2 * s).sum().backward()
    assert oracle.relative(gradients(made), oracle_gradients(made, x, torch.full_like(x, 3))) < 1e-12


def test_an_output_changed_in_place_does_not_touch_the_learner() -> None:
    made = layer()
    x = torch.randn(6, 2, 5, dtype=F64)
    first, second = OnlineLearner(made, 2, update_every=3, form="chunk"), OnlineLearner(made, 2)
    for start in (0, 3):
        s = first.chunk(x[start : start + 3])
        s.detach().zero_()
    for row in x:
        second.step(row)
    torch.testing.assert_close(first.state, second.state)


@pytest.mark.parametrize("input_size", [3, None])
@pytest.mark.parametrize(("form", "how", "every"), WAYS)
def test_the_input_may_be_overwritten_once_a_step_returned(
    form: str, how: str, every: int, input_size: int | None
) -> None:
    made = layer(input_size=input_size)
    x, delta = torch.randn(8, 2, made.fan_in, dtype=F64), torch.randn(8, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2, form=form, update_every=every)
    buffer = torch.empty(4 if how == "chunk" else 1, 2, made.fan_in, dtype=F64)
    losses = []
    for start in range(0, 8, len(buffer)):
        buffer.copy_(x[start : start + len(buffer)])
        s = learner.chunk(buffer) if how == "chunk" else learner.step(buffer[0])[None]
        buffer.fill_(float("nan"))
        losses.append((s * delta[start : start + len(buffer)]).sum())
        if how != "together" or len(losses) == every:
            torch.stack(losses).sum().backward()
            losses = []
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta)) < 1e-12


@pytest.mark.parametrize(
    ("form", "every", "options"),
    [("step", 1, {}), ("chunk", 4, {}), ("history", 1, {}), ("lazy", 1, {"rewrite_every": 2})],
)
def test_a_late_backward_is_refused(form: str, every: int, options: dict[str, Any]) -> None:
    learner = OnlineLearner(layer(), 2, form=form, update_every=every, **options)
    x = torch.randn(2, 5, dtype=F64)
    s = learner.step(x)
    if form == "history":
        learner.reset()
        learner.step(x)
    else:
        for _ in range(2 * every):
            learner.step(x)
    with pytest.raises(RuntimeError, match="comes too late"):
        s.sum().backward()


@pytest.mark.parametrize("form", ["step", "lazy", "history"])
def test_a_late_backward_of_a_step_before_a_reset_is_refused(form: str) -> None:
    """Not served from a past that has forgotten the rows which were reset."""
    learner = OnlineLearner(layer(), 2, form=form)
    x = torch.randn(2, 5, dtype=F64)
    s = learner.step(x)
    learner.reset(torch.tensor([True, False]))
    learner.step(x)
    with pytest.raises(RuntimeError, match="comes too late: their past was reset or replaced"):
        s.sum().backward()


def test_a_backward_after_reset_and_before_the_next_step_is_served() -> None:
    made = layer()
    x = torch.randn(3, 2, 5, dtype=F64)
    learner = OnlineLearner(made, 2)
    for row in x:
        s = learner.step(row)
    learner.reset()
    s.sum().backward()
    delta = torch.zeros_like(x)
    delta[-1] = 1
    assert oracle.relative(gradients(made), oracle_gradients(made, x, delta)) < 1e-12
    assert all(bool((v == 0).all()) for v in learner.state)


def test_reset_forgets_even_a_diverged_row() -> None:
    for form, every in (("step", 1), ("lazy", 1), ("chunk", 2), ("history", 1)):
        made = layer()
        learner = OnlineLearner(made, 2, form=form, update_every=every, nonfinite="ignore")
        x = torch.randn(2, 5, dtype=F64)
        x[0] = float("inf")
        for _ in range(2):
            learner.step(x)
        learner.reset(torch.tensor([True, False]))
        good = torch.randn(4, 2, 5, dtype=F64)
        losses = [learner.step(row)[0].sum() for row in good[:every]]
        torch.stack(losses).sum().backward()
        assert all(bool(torch.isfinite(g).all()) for g in gradients(made)), form


@pytest.fixture
def new_objects_alone() -> Iterator[None]:
    """The garbage collector sees what the test makes, and not the hundreds of thousands of objects from before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_alone")
def test_a_long_stream_stays_finite_in_constant_memory() -> None:
    made = layer(4, scale=0.3, dtype=torch.float32)
    learner = OnlineLearner(made, 1)
    sizes, objects = set(), []
    x = torch.randn(1000, 1, 4)
    for t in range(20_000):
        s = learner.step(x[t % 1000])
        if t % 10 == 0:
            s.sum().backward()
        if t % 2_000 == 1_999:
            gc.collect()
            sizes.add(learner.nbytes)
            objects.append(len(gc.get_objects()))
    assert len(sizes) == 1
    assert objects[-1] < objects[0] + 200  # one object a step would be 18,000
    assert all(bool(torch.isfinite(g).all()) for g in gradients(made))


@pytest.mark.parametrize(
    ("form", "every", "how"),
    [("chunk", 4, "together"), ("step", 1, "each"), ("lazy", 1, "each"), ("chunk", 4, "chunk")],
)
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.usefixtures("new_objects_alone")
def test_no_graph_outlives_its_loss(form: str, every: int, how: str, lag: int) -> None:
    made = layer(4, scale=0.3)
    x, delta = torch.randn(24, 2, 4, dtype=F64), torch.randn(24, 2, 4, dtype=F64)
    counts = []
    for repeats in (1, 5):
        learner = run(
            made, x.repeat(repeats, 1, 1), delta.repeat(repeats, 1, 1), how, every=every, form=form, lag=lag
        )
        del learner
        gc.collect()
        counts.append(sum(type(o) in (Tensor, torch.nn.Parameter) for o in gc.get_objects()))
    assert counts[1] - counts[0] < 20


@pytest.mark.parametrize(
    ("form", "every", "more"),
    [
        ("step", 1, {}),
        ("lazy", 1, {"rewrite_every": 2}),
        ("lazy", 1, {"rewrite_every": 6}),
        ("lazy", 3, {"rewrite_every": 6}),
        ("chunk", 3, {}),
        ("history", 1, {}),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_checkpoint_resumes_exactly(
    form: str, every: int, more: dict[str, Any], at: int, lag: int, reset: bool
) -> None:
    made = layer(input_size=3)
    x, delta = torch.randn(9, 2, 3, dtype=F64), torch.randn(9, 2, 5, dtype=F64)
    options: dict[str, Any] = {"form": form, "update_every": every, "lag": lag, **more}
    learner = OnlineLearner(made, 2, **options)
    for row in x[:at]:
        learner.step(row)
    if reset:
        learner.reset(torch.tensor([True, False]))
    saved = io.BytesIO()
    torch.save(learner.state_dict(), saved)
    saved.seek(0)
    other = OnlineLearner(made, 2, **options)
    other.load_state_dict(torch.load(saved, weights_only=True))
    results = []
    for resumed in (learner, other):
        made.zero_grad()
        losses = []
        for t in range(at, 9):
            losses.append((resumed.step(x[t]) * delta[t]).sum())
            if (t + 1) % every == 0:
                torch.stack(losses).sum().backward()
                losses = []
        results.append([g.clone() for g in gradients(made)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpoint_of_another_learner_is_refused_unchanged() -> None:
    learner = OnlineLearner(layer(), 2)
    learner.step(torch.randn(2, 5, dtype=F64))
    before = [t.clone() for t in learner.state]
    others = [
        (OnlineLearner(layer(), 3), "batch_size must be the learner's, 2, got 3"),
        (OnlineLearner(layer(), 2, form="history"), "form must be the learner's, 'step', got 'history'"),
        (OnlineLearner(layer(6), 2), r"state's layer must be the learner's, .*ss., 5, 5.*, got .*ss., 6, 6"),
    ]
    for other, says in others:
        with pytest.raises(ValueError, match=says):
            learner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state must have the keys"):
        learner.load_state_dict({})
    with pytest.raises(TypeError, match="state must be a dict"):
        learner.load_state_dict([])  # type: ignore[arg-type]
    torch.testing.assert_close(list(learner.state), before)


@pytest.mark.parametrize("form", ["step", "lazy"])
def test_gamma_in_bfloat16_is_near_and_half_the_size(form: str) -> None:
    made = layer(16, dtype=torch.float32)
    x, delta = torch.randn(60, 2, 16), torch.randn(60, 2, 16)
    options: dict[str, Any] = {"form": form, **({"rewrite_every": 4} if form == "lazy" else {})}
    full = run(made, x, delta, "each", **options)
    want = [g.clone() for g in gradients(made)]
    made.zero_grad()
    half = run(made, x, delta, "each", gamma_dtype=torch.bfloat16, **options)
    assert oracle.relative(gradients(made), want) < 1e-2
    assert 0 < full.nbytes - half.nbytes == 8 * 2 * 16 * 16 * 2


STOCHASTIC: dict[str, Any] = {"gamma_dtype": torch.bfloat16, "gamma_rounding": "stochastic"}


def backends() -> list[str]:
    """Torch, and Triton where its kernels run."""
    return ["torch", "triton"] if kernels_here.absent() is None else ["torch"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "options", [{}, {"recurrence": "diagonal", "input_size": 9}, {"input_size": 3}], ids=str
)
def test_gamma_rounded_stochastically(backend: str, options: dict[str, Any]) -> None:
    """Near, and nearer in the mean over seeds; a seed gives the same bits again, another seed others."""
    if backend == "triton":
        kernels_here.go()
    made = layer(9, dtype=torch.float32, **options)
    steps, seeds = (
        (20, 12) if backend == "torch" else (3, 2)
    )  # Γ is zero after the first step; the interpreter is slow
    x, delta = torch.randn(steps, 2, made.fan_in), torch.randn(steps, 2, 9)
    run(made, x, delta, "each")
    want = torch.cat([g.flatten() for g in gradients(made)])
    found = []
    for seed in (0, *range(seeds)):
        made.zero_grad()
        run(made, x, delta, "each", backend=backend, seed=seed, **STOCHASTIC)
        found.append(torch.cat([g.flatten() for g in gradients(made)]))
    assert torch.equal(found[0], found[1])
    errors = [g - want for g in found[1:]]
    assert all(not torch.equal(found[1], other) for other in found[2:])
    one = torch.stack(errors).norm(dim=1).mean() / want.norm()
    of_mean = torch.stack(errors).mean(0).norm() / want.norm()
    assert one < 1e-2
    if seeds == 12:
        assert of_mean < 0.5 * one  # 1/√12 where draws are independent


@pytest.mark.parametrize("backend", backends())
def test_a_checkpoint_of_a_stochastic_learner_goes_on_in_every_bit(backend: str) -> None:
    if backend == "triton":
        kernels_here.go()
    made = layer(6, dtype=torch.float32, input_size=4)
    x = torch.randn(9, 2, 4)
    learner = OnlineLearner(made, 2, seed=3, backend=backend, **STOCHASTIC)
    for row in x[:5]:
        learner.step(row)
    saved = io.BytesIO()
    torch.save(learner.state_dict(), saved)
    saved.seek(0)
    other = OnlineLearner(made, 2, backend=backend, **STOCHASTIC)  # of another seed: the checkpoint's goes on
    other.load_state_dict(torch.load(saved, weights_only=True))
    results = []
    for resumed in (learner, other):
        made.zero_grad()
        for row in x[5:]:
            resumed.step(row).sum().backward()
        results.append([g.clone() for g in gradients(made)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    nearest = OnlineLearner(made, 2, gamma_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gamma_rounding must be the learner's, 'nearest', got 'stochastic'"):
        nearest.load_state_dict(learner.state_dict())


def test_a_new_episode_draws_on() -> None:
    """Two episodes alike don't round alike."""
    made = layer(6, dtype=torch.float32)
    learner = OnlineLearner(made, 1, **STOCHASTIC)
    found = []
    x = torch.randn(6, 1, 6)
    for _ in range(2):
        made.zero_grad()
        for row in x:
            s = learner.step(row)
        s.sum().backward()
        found.append(torch.cat([g.flatten() for g in gradients(made)]))
        learner.reset()
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.1, atol=0.02)


def test_nbytes_counts_gamma() -> None:
    learner = OnlineLearner(RGC(32), 2)
    assert learner.nbytes == 4 * (8 * 2 * 32 * 32 + 2 * 2 * 32)


def test_auto_chooses_by_cost(capsys: pytest.CaptureFixture[str]) -> None:
    made = RGC(64)
    assert OnlineLearner(made, 2).form == "step"
    assert OnlineLearner(made, 2, update_every=32).form == "chunk"
    assert OnlineLearner(RGC(256), 8, horizon=4).form == "history"
    OnlineLearner(made, 2, update_every=32).explain()
    printed = capsys.readouterr().out
    assert "form = 'chunk': the fastest that fits in memory" in printed
    assert "predicted" in printed


def test_auto_takes_lazy_where_gamma_is_large_and_bandwidth_dear() -> None:
    def taken(units: int, batch: int, rates: cost.Rates) -> str:
        layer = RGC(units, device="meta")
        problem = counting.problem(layer, batch, torch.float32, gpu=rates is cost.GPU)
        every = cost.rewrite_every(problem, rates)
        return cost.cheapest(cost.form_costs(problem, 1, None, rates, every), None).form

    assert taken(1024, 64, cost.GPU) == "lazy"
    assert taken(256, 8, cost.GPU) == taken(1024, 1, cost.GPU) == taken(1024, 64, cost.CPU) == "step"


@pytest.mark.parametrize("rates", [cost.CPU, cost.GPU], ids=str)
@pytest.mark.parametrize(("units", "batch"), [(64, 1), (256, 8), (1024, 64)])
def test_gamma_is_rewritten_as_often_as_the_model_says_is_best(
    units: int, batch: int, rates: cost.Rates
) -> None:
    layer = RGC(units, device="meta")
    problem = counting.problem(layer, batch, torch.float32, gpu=rates is cost.GPU)
    seconds = {}
    for every in range(1, 100):
        costs = cost.form_costs(problem, 1, None, rates, every)
        seconds[every] = next(each.seconds for each in costs if each.form == "lazy")
    best = cost.rewrite_every(problem, rates)
    assert seconds[best] <= 1.002 * min(seconds.values())


def test_explain_says_how_often_gamma_is_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    learner = OnlineLearner(RGC(64), 2, form="lazy")
    assert learner.rewrite_every > 1
    learner.explain()
    OnlineLearner(RGC(64), 2, form="lazy", rewrite_every=9).explain()
    printed = capsys.readouterr().out
    assert f"rewrite_every = {learner.rewrite_every}: by the cost model" in printed
    assert "rewrite_every = 9: asked for" in printed


def test_a_gamma_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        ValueError, match=r"carries sensitivities of 32,000,\d+,\d+ bytes.*form='history' takes"
    ):
        OnlineLearner(RGC(1000), 1000, form="step")


@pytest.mark.parametrize(
    ("form", "how", "every"), [("step", "each", 1), ("lazy", "each", 1), ("chunk", "chunk", 3)]
)
@pytest.mark.parametrize("options", [{}, {"input_size": 6}], ids=str)
def test_compiled_code_gives_the_same(form: str, how: str, every: int, options: dict[str, Any]) -> None:
    made = layer(17, dtype=torch.float32, **options)
    x, delta = torch.randn(9, 2, made.fan_in, requires_grad=True), torch.randn(9, 2, 17)
    for resets in (None, torch.rand(9, 2) < 0.2):
        results = []
        for backend in ("torch", "compile"):
            made.zero_grad()
            x.grad = None
            run(made, x, delta, how, every=every, form=form, backend=backend, resets=resets)
            assert x.grad is not None
            results.append([g.clone() for g in (*gradients(made), x.grad)])
        assert oracle.relative(results[1], results[0]) < 1e-5


def test_a_compiled_step_uses_the_weights_it_ran_with() -> None:
    made = layer(17, dtype=torch.float32)
    x = torch.randn(4, 1, 17)
    results = []
    start = {name: p.clone() for name, p in made.state_dict().items()}
    for backend in ("torch", "compile"):
        made.load_state_dict(start)
        made.zero_grad()
        learner = OnlineLearner(made, 1, backend=backend)
        for row in x[:3]:  # no loss: each is folded only when the next begins, after the weights changed
            learner.step(row)
            with torch.no_grad():
                for p in made.parameters():
                    p.mul_(0.5)
        learner.step(x[3]).sum().backward()
        results.append([g.clone() for g in gradients(made)])
    assert oracle.relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"layer": torch.nn.Linear(2, 2)},
            TypeError,
            "layer must be a recurrent layer such as RGC, got Linear",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1, got 0"),
        ({"form": "dual"}, ValueError, "form must be one of 'auto', 'step', 'lazy', 'chunk', 'history', got"),
        ({"form": "chunk"}, ValueError, "form='chunk' needs update_every ≥ 2"),
        ({"rewrite_every": 4}, ValueError, "rewrite_every goes with form='lazy', got form='auto'"),
        ({"form": "lazy", "rewrite_every": 0}, ValueError, "rewrite_every must be at least 1, got 0"),
        ({"form": "lazy", "rewrite_every": 2.5}, TypeError, "rewrite_every must be an int, got float"),
        (
            {"form": "lazy", "credit": "carry"},
            ValueError,
            "credit='carry' runs in form='chunk' only, got form='lazy'",
        ),
        (
            {"form": "lazy", "learning": "rtrl"},
            ValueError,
            "learning='rtrl' runs in form='step' only, got form='lazy'",
        ),
        ({**STOCHASTIC, "form": "lazy"}, ValueError, "goes with form='step', .* got form='lazy'"),
        ({"lag": 2}, ValueError, "lag must be 0 or 1, got 2"),
        ({"gamma_dtype": torch.int32}, TypeError, "gamma_dtype must be one of"),
        ({"gamma_rounding": "up"}, ValueError, "gamma_rounding must be one of 'nearest', 'stochastic'"),
        (
            {"gamma_rounding": "stochastic"},
            ValueError,
            "'stochastic' goes with gamma_dtype=torch.bfloat16, got gamma_dtype=torch.float32",
        ),
        ({**STOCHASTIC, "form": "history"}, ValueError, "goes with form='step', .* got form='history'"),
        ({**STOCHASTIC, "credit": "carry"}, ValueError, "goes with form='step', .* got form='chunk'"),
        ({**STOCHASTIC, "learning": "rtrl"}, ValueError, "goes with a rule of rfp, .* got learning='rtrl'"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
        ({"backend": "compile", "gamma_dtype": torch.bfloat16}, ValueError, "backend='compile' can't run"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"layer": RGC(3), "batch_size": 2, **change}
    with pytest.raises(error, match=says):
        OnlineLearner(arguments.pop("layer"), arguments.pop("batch_size"), **arguments)


def test_weights_that_are_not_finite_are_refused() -> None:
    made = RGC(3)
    with torch.no_grad():
        made.weight_ms[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer's ms must be finite, got 1 NaN or infinite of 9"):
        OnlineLearner(made, 1)


def test_bad_steps_change_nothing() -> None:
    learner = OnlineLearner(layer(), 2)
    learner.step(torch.randn(2, 5, dtype=F64))
    before = [t.clone() for t in learner.state]
    bad: list[tuple[Any, type[Exception], str]] = [
        (
            torch.randn(3, 5, dtype=F64),
            ValueError,
            r"x must have shape \(2, 5\) to match the learner, got \(3, 5\)",
        ),
        (torch.randn(2, 5), TypeError, "x must have the dtype of the layer"),
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
    ]
    for x, error, says in bad:
        with pytest.raises(error, match=says):
            learner.step(x)
    with pytest.raises(ValueError, match=r"x must have shape \(C, 2, 5\)"):
        learner.chunk(torch.randn(0, 2, 5, dtype=F64))
    with pytest.raises(ValueError, match="mask must have shape"):
        learner.reset(torch.tensor([True]))
    torch.testing.assert_close(list(learner.state), before)
    assert learner._past.now == 1


def test_weights_changed_inside_a_chunk_are_refused() -> None:
    made = layer()
    learner = OnlineLearner(made, 2, update_every=4, form="chunk")
    learner.step(torch.randn(2, 5, dtype=F64))
    with torch.no_grad():
        made.weight_ss.add_(1)
    with pytest.raises(ValueError, match="weights changed inside a chunk, after step 1 of update_every=4"):
        learner.step(torch.randn(2, 5, dtype=F64))


# backend and dtype, and how near the learner with lr comes to one with an optimizer
DESCENTS = [
    ("torch", F64, 1e-12),
    ("compile", F64, 1e-12),
    ("compile", torch.float32, 1e-5),
    *(("triton", torch.float32, 1e-5) for _ in backends()[1:]),
]


def descended(made: TwoPointRNN, x: Tensor, delta: Tensor, lr: float | None, **options: Any) -> list[Tensor]:
    """Outputs and input gradients of a stream with two losses at some steps; then the parameters.

    Without lr an optimizer changes them, by 0.05 at first and 0.02 later.
    """
    learner = OnlineLearner(made, x.shape[1], form="step", lr=lr, **options)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    found = []
    for t in range(len(x)):
        if t == 3:
            learner.reset(torch.arange(x.shape[1]) == 1)
        if t == 5:
            optimizer.param_groups[0]["lr"] = 0.02
            if lr is not None:
                learner.lr = 0.02
        given = x[t].clone().requires_grad_(t % 2 == 0)
        output = learner.step(given)
        found.append(output.detach().clone())
        if t != 6:  # no loss
            (output * delta[t]).sum().backward()
            if given.grad is not None:
                found.append(given.grad)
            if lr is None:
                optimizer.step()
                optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in made.parameters())]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), DESCENTS, ids=str)
@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize(
    "build",
    [
        lambda dtype: RGC(9, input_size=3, init="uniform", dtype=dtype),
        lambda dtype: RGC(9, recurrence="diagonal", init="uniform", dtype=dtype),
        lambda dtype: LSTM(3, 8, heads=4, dtype=dtype),
        lambda dtype: GRU(3, 5, dtype=dtype),
    ],
    ids=["rgc", "rgc-diagonal", "lstm-heads", "gru"],
)
def test_lr_is_what_sgd_does(
    build: Any, batch: int, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    if backend == "triton":
        kernels_here.go()
    if backend == "triton" and batch > 2:
        pytest.skip("a split batch is the kernel's test; the interpreter takes its time")
    plain, twin = build(dtype), build(dtype)
    twin.load_state_dict(plain.state_dict())
    plain.weights()[1].requires_grad_(False)
    twin.weights()[1].requires_grad_(False)
    x = torch.randn(9, batch, plain.fan_in, dtype=dtype)
    delta = torch.randn(9, batch, plain.hidden_size, dtype=dtype)
    want = descended(plain, x, delta, None, backend=backend)
    got = descended(twin, x, delta, 0.05, backend=backend)
    assert oracle.relative(got, want) < tolerance
    assert all(p.grad is None for p in twin.parameters())


@pytest.mark.parametrize("learning", ["eprop", "rtrl", "uoro"])
def test_lr_with_other_rules(learning: str) -> None:
    plain, twin = (LSTM(3, 5, dtype=F64) for _ in range(2))
    twin.load_state_dict(plain.state_dict())
    x, delta = torch.randn(9, 2, 3, dtype=F64), torch.randn(9, 2, 5, dtype=F64)
    want = descended(plain, x, delta, None, learning=learning)
    assert oracle.relative(descended(twin, x, delta, 0.05, learning=learning), want) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_two_losses_of_a_step_take_two_steps_and_other_graphs_see_them(backend: str) -> None:
    made, x = layer(), torch.randn(2, 2, 5, dtype=F64)
    before = [w.detach().clone() for w in made.weights()]
    want = gradients(run(layer_like(made), x[:1], torch.ones(1, 2, 5, dtype=F64), "each").layer)
    learner = OnlineLearner(made, 2, lr=0.1, backend=backend)
    penalty = made.weight_ss.square().sum()
    s = learner.step(x[0])
    s.sum().backward(retain_graph=True)
    s.sum().backward()
    for weight, old, gradient in zip(made.weights(), before, want, strict=True):
        torch.testing.assert_close(weight.detach(), old - 0.2 * gradient, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def layer_like(made: RGC) -> RGC:
    twin = layer()
    twin.load_state_dict(made.state_dict())
    return twin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr must be a finite number ≥ 0, got -0\.1"),
        ({"lr": float("nan")}, "lr must be a finite number ≥ 0, got nan"),
        ({"lr": "0.1"}, "lr must be a finite number ≥ 0, got '0.1'"),
        (
            {"form": "lazy"},
            "lr goes with form='step', whose weights may change at every step, got form='lazy'",
        ),
        ({"learning": "tbptt"}, "lr goes with form='step'.*got form='chunk'"),
        ({"lag": 1}, "lr goes with lag=0: backward\\(\\) changes the weights, got lag=1"),
        ({"update_every": 4}, "lr goes with update_every=1"),
    ],
    ids=str,
)
def test_where_lr_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineLearner(layer(), 2, **{"lr": 0.1, **options})


def test_lr_is_refused_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = OnlineLearner(layer(), 2, lr=0.1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match=r"lr can't go under torch\.compile"):
        learner.step(torch.randn(2, 5, dtype=F64))


def test_lr_of_a_learner_without() -> None:
    learner = OnlineLearner(layer(), 2)
    assert learner.lr is None
    with pytest.raises(ValueError, match=r"lr can't be set to 0\.1 in a learner that was made without it"):
        learner.lr = 0.1
    learner = OnlineLearner(layer(), 2, lr=0.5)
    assert learner.lr == 0.5
    made = layer()
    made.weight_ms.data = made.weight_ms.data.t()
    with pytest.raises(ValueError, match=r"lr goes with contiguous weights, got ms with strides \(1, 5\)"):
        OnlineLearner(made, 2, lr=0.1)
