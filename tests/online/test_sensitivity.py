"""What a learner carries forward, by rule, against autograd of plain loops: RTRL, UORO, truncated BPTT, carry."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Sequence
from typing import Any

import kernels_here
import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import GRU, LSTM, RGC, RNN, OnlineLearner, TwoPointRNN
from rjepa_triton.backend import triton_backend
from rjepa_triton.cells import weights as weight_ops
from rjepa_triton.online.sensitivity import Exact

F64 = torch.float64

LAYERS: dict[str, Any] = {
    "rgc": lambda **o: RGC(4, input_size=3, init="uniform", dtype=F64, **o),
    "rgc-without-input": lambda **o: RGC(4, init="uniform", dtype=F64, **o),
    "rgc-heads": lambda **o: RGC(4, init="uniform", dtype=F64, heads=2, **o),
    "lstm": lambda **o: LSTM(3, 4, dtype=F64, **o),
    "gru": lambda **o: GRU(3, 4, dtype=F64, **o),
}
by_layer = pytest.mark.parametrize("name", LAYERS)


class Loop:
    """The layer as a plain loop under autograd, from a state, with the layer's weights or others at each step."""

    def __init__(self, layer: TwoPointRNN, batch: int) -> None:
        self.layer = layer
        self.c = [torch.zeros(batch, layer.hidden_size, dtype=F64) for _ in layer.cell.states]

    def step(self, x: Tensor, weights: Sequence[Tensor], through: str | int = "full") -> Tensor:
        cell, layer = self.layer.cell, self.layer
        p = [torch.zeros_like(self.c[0]) for _ in cell.gates]
        drive = [torch.zeros_like(self.c[0]) for _ in cell.per_unit]
        if layer.input_size is None:
            drive[0] = x
        for matrix, weight in zip(layer.matrices, weights, strict=True):
            kind, index = matrix.into
            if isinstance(matrix.reads, int):
                value = oracle.matvec(weight, self.c[matrix.reads], through)
            else:
                value = x @ weight.T if matrix.reads == "input" else weight.expand_as(self.c[0])
            target = p if kind == "gate" else drive
            target[index] = target[index] + value
        self.c = list(cell.update(self.c, p, drive))
        return self.c[0]


def leaves(layer: TwoPointRNN) -> list[Tensor]:
    return [weight.detach().clone().requires_grad_() for weight in layer.weights()]


def grads(layer: TwoPointRNN) -> list[Tensor]:
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in layer.weights()]


def stream(layer: TwoPointRNN, steps: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(steps, batch, layer.fan_in, dtype=F64), torch.randn(
        steps, batch, layer.hidden_size, dtype=F64
    )


def change(layer: TwoPointRNN, seed: int) -> None:
    """What an optimizer does between steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.weights():
            weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=F64).to(weight)


@by_layer
def test_blocks_reach_from_rfp_to_the_exact_gradient(name: str) -> None:
    layer = LAYERS[name]()
    x, delta = stream(layer, 6)
    resets = torch.rand(6, 2) < 0.2
    head = OnlineLearner(layer, 2, learning="rtrl").block
    for block, options in ((1, {"learning": "rfp"}), (head, {"learning": "rtrl"})):
        torch.manual_seed(1)
        learner = OnlineLearner(layer, 2, learning="rtrl", block=block)
        assert learner.block == block
        assert learner.exactness().exact == (block == head)
        want = rtrl_by(copy.deepcopy(layer), x, delta, resets, "torch", **options)
        got = rtrl_by(copy.deepcopy(layer), x, delta, resets, "torch", learning="rtrl", block=block)
        assert oracle.relative(got, want) < 1e-13


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (6, 2), (6, 3), (1, 3)], ids=str)
def test_blocks_of_a_weight_in_heads(sizes: tuple[int, int]) -> None:
    """A weight of heads of `own` units as blocks of others: what of its matrix is on the diagonal's blocks."""
    own, block = sizes
    weight = torch.randn(6 // own, own, own) if own < 6 else torch.randn(6, 6)
    whole = torch.block_diag(*weight) if own < 6 else weight
    want = [whole[i : i + block, i : i + block] for i in range(0, 6, block)]
    torch.testing.assert_close(weight_ops.in_heads(weight, 6 // block), torch.stack(want), rtol=0, atol=0)


@by_layer
@pytest.mark.parametrize("block", [None, 1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_rtrl_is_autograds_while_weights_change(name: str, lag: int, block: int | None) -> None:
    """The gradient at the weights that ran each step, as if all had moved together; within blocks, if there are some."""
    layer = LAYERS[name]()
    x, delta = stream(layer, 7)
    learner = OnlineLearner(layer, 2, learning="rtrl", block=block, lag=lag)
    loop, shift = Loop(layer, 2), [torch.zeros_like(w).requires_grad_() for w in layer.weights()]
    earlier: list[tuple[Tensor, Tensor]] = []
    for t in range(7):
        used = [w.detach() + s for w, s in zip(layer.weights(), shift, strict=True)]
        ours, plain = learner.step(x[t]), loop.step(x[t], [w.clone() for w in used], block or "full")
        layer.zero_grad()
        earlier.append((ours, plain))
        loss_ours, loss_plain = (
            sum((pair[i] * delta[t]).sum() for pair in earlier[-1 - lag :]) for i in (0, 1)
        )
        loss_ours.backward(retain_graph=lag > 0)
        want = torch.autograd.grad(loss_plain, shift, retain_graph=True, materialize_grads=True)
        assert oracle.relative(grads(layer), want) < 1e-12, t
        change(layer, t)


@by_layer
@pytest.mark.parametrize("by", ["chunk", "step"])
@pytest.mark.parametrize("every", [1, 3])
def test_tbptt_is_autograd_cut_at_the_chunks(name: str, by: str, every: int) -> None:
    layer = LAYERS[name]()
    x, delta = stream(layer, 9)
    learner = OnlineLearner(layer, 2, learning="tbptt", update_every=every)
    loop = Loop(layer, 2)
    for start in range(0, 9, every):
        weights = leaves(layer)
        loop.c = [value.detach() for value in loop.c]
        layer.zero_grad()
        part = slice(start, start + every)
        want = torch.autograd.grad(
            sum((loop.step(x[t], weights) * delta[t]).sum() for t in range(start, start + every)),
            weights,
            materialize_grads=True,
        )
        if by == "chunk":
            (learner.chunk(x[part]) * delta[part]).sum().backward()
        else:
            losses = [(learner.step(x[t]) * delta[t]).sum() for t in range(start, start + every)]
            torch.stack(losses).sum().backward()
        assert oracle.relative(grads(layer), want) < 1e-12
        change(layer, start)


def test_tbptt_refuses_what_it_has_forgotten() -> None:
    layer = LAYERS["rgc"]()
    learner = OnlineLearner(layer, 2, learning="tbptt", update_every=1)
    s = learner.step(torch.randn(2, 3, dtype=F64))
    learner.step(torch.randn(2, 3, dtype=F64))
    with pytest.raises(RuntimeError, match="comes too late"):
        s.sum().backward()


def own_sensitivities(layer: TwoPointRNN, x: Tensor, state: int) -> list[Tensor]:
    """Γ^{ν,k} after x from zero, (B, rows, columns) of each weight, as the derivative of the detach graph."""

    def last(*weights: Tensor) -> Tensor:
        loop = Loop(layer, x.shape[1])
        for t in range(x.shape[0]):
            loop.step(x[t], weights, "own")
        return loop.c[state]

    weights = tuple(w.detach() for w in layer.weights())
    found = []
    for jacobian in torch.autograd.functional.jacobian(last, weights):
        by_unit = jacobian.flatten(2, -2) if jacobian.dim() > 3 else jacobian[..., None]
        found.append(by_unit.diagonal(dim1=1, dim2=2).mT)  # the row of each unit
    return found


@by_layer
@pytest.mark.parametrize("by", ["chunk", "step"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("refine", [0, "exact"])
def test_carry_is_the_exact_chunk_and_gamma_before_it(name: str, by: str, every: int, refine: Any) -> None:
    layer = LAYERS[name]()
    x, delta = stream(layer, 9)
    learner = OnlineLearner(layer, 2, update_every=every, credit="carry", refine=refine)
    assert learner.form == "chunk"
    for start in range(0, 9, every):
        layer.zero_grad()
        part = slice(start, start + every)
        if by == "chunk":
            (learner.chunk(x[part]) * delta[part]).sum().backward()
        else:
            torch.stack(
                [(learner.step(x[t]) * delta[t]).sum() for t in range(start, start + every)]
            ).sum().backward()
        weights = leaves(layer)
        loop = Loop(layer, 2)
        with torch.no_grad():
            for t in range(start):
                loop.step(x[t], weights)
        begin = [value.detach().requires_grad_() for value in loop.c]
        loop.c = begin
        total = sum((loop.step(x[t], weights) * delta[t]).sum() for t in range(start, start + every))
        *want, = torch.autograd.grad(total, [*weights, *begin], materialize_grads=True)  # fmt: skip
        gradient, credit = want[: len(weights)], want[len(weights) :]
        if start:
            for nu, passed in enumerate(credit):
                for k, gamma in enumerate(own_sensitivities(layer, x[:start], nu)):
                    gradient[k] = gradient[k] + (passed[..., None] * gamma).sum(0).view(gradient[k].shape)
        assert oracle.relative(grads(layer), gradient) < (1e-8 if refine else 1e-12)


def test_carry_with_lag_reaches_into_the_chunk_before() -> None:
    """With one chunk and lag 1, the loss of a step and of the one before: the exact gradient, weights unchanged."""
    layer = LAYERS["rgc"]()
    x, delta = stream(layer, 6)
    learner = OnlineLearner(layer, 2, form="chunk", update_every=1, credit="carry", lag=1)
    loop, weights = Loop(layer, 2), leaves(layer)
    shown = [(learner.step(x[t]), loop.step(x[t], weights)) for t in range(2)]
    ours, plain = (sum((pair[i] * delta[t]).sum() for t, pair in enumerate(shown)) for i in (0, 1))
    ours.backward()
    want = torch.autograd.grad(plain, weights, materialize_grads=True)
    assert oracle.relative(grads(layer), want) < 1e-12


@pytest.mark.parametrize("learning", ["eprop", "rflo", "snap0"])
@pytest.mark.parametrize(("form", "every"), [("step", 1), ("lazy", 1), ("chunk", 4), ("history", 1)])
def test_rules_that_drop_parts_of_m_have_one_gradient_in_all_forms(
    learning: str, form: str, every: int
) -> None:
    layer = LAYERS["lstm"](learning=learning)
    x, delta = stream(layer, 8)
    (layer(x)[0] * delta).sum().backward()
    want = [g.clone() for g in grads(layer)]
    layer.zero_grad()
    learner = OnlineLearner(layer, 2, form=form, update_every=every)
    for start in range(0, 8, every):
        (learner.chunk(x[start : start + every]) * delta[start : start + every]).sum().backward()
    assert oracle.relative(grads(layer), want) < 1e-12


def test_uoro_is_unbiased_over_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over every pattern of signs that three steps of two units can draw is the exact gradient."""
    layer = RNN(1, 2, dtype=F64)
    x, delta = torch.randn(3, 1, 1, dtype=F64), torch.randn(3, 1, 2, dtype=F64)
    weights, loop = leaves(layer), Loop(layer, 1)
    want = torch.autograd.grad(sum((loop.step(x[t], weights) * delta[t]).sum() for t in range(3)), weights)
    total = [torch.zeros_like(w) for w in weights]
    patterns = list(itertools.product([0, 1], repeat=6))
    for pattern in patterns:
        drawn = iter(torch.tensor(pattern).view(3, 1, 1, 2))
        monkeypatch.setattr(torch, "randint", lambda *_, drawn=drawn, **__: next(drawn))
        layer.zero_grad()
        learner = OnlineLearner(layer, 1, learning="uoro")
        for t in range(3):
            (learner.step(x[t]) * delta[t]).sum().backward()
        total = [a + g for a, g in zip(total, grads(layer), strict=True)]
    assert oracle.relative([a / len(patterns) for a in total], want) < 1e-12


@pytest.mark.parametrize("name", ["rgc", "rgc-heads", "lstm"])
def test_uoro_is_unbiased_on_average(name: str) -> None:
    layer = LAYERS[name]()
    x, delta = stream(layer, 4, batch=500)
    x, delta = x[:, :1].expand(-1, 500, -1), delta[:, :1].expand(-1, 500, -1)
    weights, loop = leaves(layer), Loop(layer, 1)
    total = sum((loop.step(x[t, :1], weights) * delta[t, :1]).sum() for t in range(4))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(total, weights, materialize_grads=True)])
    draws = []
    for seed in range(20):
        layer.zero_grad()
        learner = OnlineLearner(layer, 500, learning="uoro", seed=seed)
        for t in range(4):
            (learner.step(x[t]) * delta[t]).sum().backward()
        draws.append(torch.cat([g.flatten() for g in grads(layer)]) / 500)
    made = torch.stack(draws)
    error = made.std(0) / len(draws) ** 0.5
    assert (((made.mean(0) - want) / (error + 1e-12)).square().mean() < 2.5) or float(error.max()) == 0
    assert float((made.mean(0) - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"learning": "rtrl"},
        {"learning": "rtrl", "lag": 1},
        {"learning": "uoro"},
        {"learning": "tbptt", "update_every": 3},
        {"credit": "carry", "update_every": 3},
        {"learning": "eprop"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_learner_goes_on_as_if_never_stopped(options: dict[str, Any], stop: int) -> None:
    layer = LAYERS["rgc"]()
    x, delta = stream(layer, 9)

    def run(learner: OnlineLearner, steps: range) -> list[Tensor]:
        layer.zero_grad()
        losses: list[Tensor] = []
        for t in steps:
            if t == 4:
                learner.reset(torch.tensor([True, False]))
            losses.append((learner.step(x[t]) * delta[t]).sum())
            if len(losses) == options.get("update_every", 1) or t == steps[-1]:
                torch.stack(losses).sum().backward()
                losses = []
        return [g.clone() for g in grads(layer)]

    whole = OnlineLearner(layer, 2, **options)
    run(whole, range(stop))
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    want = run(whole, range(stop, 9))
    resumed = OnlineLearner(layer, 2, **options)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert oracle.relative(run(resumed, range(stop, 9)), want) < 1e-12


def test_memory_does_not_grow() -> None:
    for options in ({"learning": "rtrl"}, {"learning": "uoro"}, {"credit": "carry", "update_every": 2}):
        layer = LAYERS["rgc"]()
        learner = OnlineLearner(layer, 2, **options)
        sizes = []
        for t in range(12):
            learner.step(torch.randn(2, 3, dtype=F64)).sum().backward(retain_graph=t % 2 == 0)
            sizes.append(learner.nbytes)
        assert sizes[-1] == sizes[-3] == sizes[3]


@pytest.mark.parametrize(
    ("layer", "options", "says"),
    [
        ({"learning": "bptt"}, {}, "the layer's learning='bptt' needs the whole sequence.*nearest online are learning='tbptt'"),
        ({}, {"learning": "bptt"}, "^learning='bptt' needs the whole sequence"),
        ({}, {"learning": "adam"}, "learning must be one of 'rfp', 'eprop', 'rflo', 'snap0', 'rtrl', 'uoro', 'tbptt'"),
        ({}, {"learning": "rtrl", "form": "chunk", "update_every": 4}, "learning='rtrl' runs in form='step' only, got form='chunk'"),
        ({}, {"learning": "uoro", "form": "history"}, "learning='uoro' runs in form='step' only"),
        ({}, {"learning": "tbptt", "form": "step"}, "learning='tbptt' runs in form='chunk' only"),
        ({}, {"learning": "rtrl", "credit": "carry"}, "credit='carry' goes with learning='rfp'.*exact without"),
        ({}, {"learning": "eprop", "refine": 2}, "refine=2 goes with learning='rfp'"),
        ({}, {"credit": "carry", "form": "step"}, "credit='carry' runs in form='chunk' only, got form='step'"),
        ({}, {"credit": "carry", "form": "history"}, "credit='carry' runs in form='chunk' only"),
        ({}, {"credit": "full"}, "credit must be one of 'own', 'carry', got 'full'"),
        ({}, {"refine": "twice"}, "refine must be a number of rounds or 'exact', got 'twice'"),
        ({}, {"refine": -1}, "refine must be at least 0, got -1"),
        ({}, {"block": 2}, "block goes with learning='rtrl', got learning='rfp'"),
        ({}, {"learning": "rtrl", "block": 3}, "block must divide the 4 units that recurrent weights connect, got 3"),
        ({"heads": 2}, {"learning": "rtrl", "block": 4}, "block must divide the 2 units .*, got 4"),
        ({}, {"learning": "rtrl", "block": 0}, "block must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_are_named(
    layer: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        OnlineLearner(LAYERS["rgc"](**layer), 2, **options)


@pytest.mark.parametrize("block", [None, 1])
@pytest.mark.parametrize(("units", "heads", "batch"), [(16, None, 1), (16, None, 3), (16, 4, 1), (18, 6, 2)])
def test_bytes_are_as_predicted(units: int, heads: int | None, batch: int, block: int | None) -> None:
    layer = RGC(units, heads=heads)
    learner = OnlineLearner(layer, batch, learning="rtrl", block=block)
    learner.step(torch.randn(batch, units))
    state_and_step = 2 * batch * units * 4 + learner._past._tape.nbytes
    assert learner.nbytes - state_and_step == learner.carried_bytes


def test_heads_of_the_root_cost_little_more_than_gamma() -> None:
    """b = √N: γ takes as many numbers as the Γ of a dense layer, and an eighth for the second buffer."""
    exact = OnlineLearner(RGC(256, heads=16), 1, learning="rtrl").carried_bytes
    assert exact / OnlineLearner(RGC(256), 1).carried_bytes == 1.125


def test_the_layers_own_rule_runs_if_none_is_given() -> None:
    assert OnlineLearner(LAYERS["rgc"](learning="eprop"), 2).learning == "eprop"
    assert OnlineLearner(LAYERS["rgc"](learning="rtrl"), 2).form == "step"


def test_explain_tells_what_is_carried(capsys: pytest.CaptureFixture[str]) -> None:
    OnlineLearner(RGC(4), 2, learning="rtrl").explain()
    said = capsys.readouterr().out
    assert "learning = 'rtrl'" in said
    assert f"carried: {(2 + 1) * 8 * 4**3 * 4:,} bytes; form = 'step', the only one for 'rtrl'" in said


def test_rtrl_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"learning='rtrl' in form='step' carries sensitivities of 64,000,000,000,000 bytes"
    ):
        OnlineLearner(RGC(10_000), 1, learning="rtrl")


def rtrl_by(
    layer: TwoPointRNN,
    x: Tensor,
    delta: Tensor,
    resets: Tensor,
    backend: str,
    learning: Any = "rtrl",
    **options: Any,
) -> list[Tensor]:
    """Gradients of each step of a stream, weights changing after every one, and of its inputs."""
    learner, found = OnlineLearner(layer, x.shape[1], learning=learning, backend=backend, **options), []
    assert isinstance(learner._past.sensitivity, Exact) or learning != "rtrl"
    for t in range(len(x)):
        learner.reset(resets[t])
        layer.zero_grad()
        (learner.step(x[t]) * delta[t]).sum().backward()
        found += [g.clone() for g in grads(layer)]
        change(layer, t)
    return found


@pytest.mark.parametrize("units", [1, 17, 68])
# the third has an input matrix of the recurrent ones' shape, whose γ lies with theirs
@pytest.mark.parametrize("options", [{}, {"input_size": 3}, {"input_size": -1}], ids=str)
def test_dense_rtrl_by_its_own_kernels(
    units: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """J and R by `kernels.rtrl_step` against float64, with resets and weights that change at every step."""
    kernels_here.go()
    from rjepa_triton.kernels import rtrl_step

    if options.get("input_size") == -1:
        options = {"input_size": units}
    if units == 68 and options:
        pytest.skip("γ of 68 units once is enough")
    calls: list[str] = []
    for name in ("rtrl_jacobian", "rtrl_immediate_"):
        launch = getattr(rtrl_step, name)
        monkeypatch.setattr(
            rtrl_step, name, lambda *a, launch=launch, name=name: (calls.append(name), launch(*a))[1]
        )
    monkeypatch.setattr(triton_backend, "HEAD_UNITS", 0)
    wide = RGC(units, init="uniform", dtype=F64, **options)
    narrow = RGC(units, dtype=torch.float32, **options)
    narrow.load_state_dict(wide.state_dict())
    steps = 3 if units == 68 else 6
    x, delta = torch.randn(steps, 2, wide.fan_in, dtype=F64), torch.randn(steps, 2, units, dtype=F64)
    resets = torch.rand(steps, 2) < 0.3
    resets[-1] = torch.tensor([True, False])
    want = rtrl_by(wide, x, delta, resets, "torch")
    got = rtrl_by(narrow, x.float(), delta.float(), resets, "triton")
    # of one unit, a gradient's terms may nearly cancel: torch in float32 was found to be 1.8e-5 off
    assert oracle.relative(got, want) < (5e-5 if units == 1 else 1e-5)
    joint = options.get("input_size") == units
    assert (calls.count("rtrl_jacobian"), calls.count("rtrl_immediate_")) == (steps, 0 if joint else steps)


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_rtrl_in_one_pass_over_gamma(name: str, block: int | None) -> None:
    """By `kernels.rtrl_heads`, as any layer of up to 64 units a head or block."""
    kernels_here.go()
    wide = LAYERS[name]()
    narrow = LAYERS[name]().to(torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x, delta = stream(wide, 5)
    resets = torch.rand(5, 2) < 0.3
    want = rtrl_by(wide, x, delta, resets, "torch", block=block)
    got = rtrl_by(narrow, x.float(), delta.float(), resets, "triton", block=block)
    assert oracle.relative(got, want) < 1e-5


def test_large_blocks_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of dense layers make J of all units."""
    kernels_here.go()
    monkeypatch.setattr(triton_backend, "HEAD_UNITS", 2)
    wide = RGC(8, init="uniform", dtype=F64)
    narrow = RGC(8, dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x, delta = torch.randn(5, 2, 8, dtype=F64), torch.randn(5, 2, 8, dtype=F64)
    resets = torch.rand(5, 2) < 0.3
    want = rtrl_by(wide, x, delta, resets, "torch", block=4)
    assert oracle.relative(rtrl_by(narrow, x.float(), delta.float(), resets, "triton", block=4), want) < 1e-5


def test_dense_rtrl_that_can_not_launch_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_here.go()
    from triton.runtime.errors import OutOfResources

    from rjepa_triton.kernels import rtrl_step

    def refuse(*_: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_backend, "HEAD_UNITS", 0)
    monkeypatch.setattr(triton_backend.TRITON, "failed", {})
    layer, twin = RGC(5, init="uniform", dtype=torch.float32), RGC(5, dtype=torch.float32)
    twin.load_state_dict(layer.state_dict())
    x, delta, resets = torch.randn(4, 2, 5), torch.randn(4, 2, 5), torch.zeros(4, 2, dtype=torch.bool)
    want = rtrl_by(layer, x, delta, resets, "torch")
    for name in ("rtrl_jacobian", "rtrl_immediate_"):
        monkeypatch.setattr(rtrl_step, name, refuse)
    with pytest.warns(UserWarning, match="can't run rtrl_.* here, torch runs it from now on") as told:
        got = rtrl_by(twin, x, delta, resets, "triton")
    assert len([w for w in told if "rtrl_" in str(w.message)]) == 2
    assert oracle.relative(got, want) < 1e-6
