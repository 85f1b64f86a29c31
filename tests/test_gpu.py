"""On a GPU only: layer and learner by Triton kernels against float64, repeatability, offsets beyond 2³¹, CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from rjepa_triton import ELSTM, GRU, LRU, LSTM, RGC, OnlineLearner, Stream, TwoPointRNN
from rjepa_triton.layers.functional import rgc
from rjepa_triton.rules import rfp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
F32, F64 = torch.float32, torch.float64
# float32 against float64: some dozen steps of sums of a few hundred terms, each rounded by 2⁻²⁴.
TOLERANCE = 1e-5


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("steps", "batch", "units"), [(1, 1, 1), (7, 3, 63), (12, 2, 256)])
def test_a_sequences_gradient_is_float64s(steps: int, batch: int, units: int, diagonal: bool) -> None:
    x, weights, state, ds, dm = oracle.problem(steps, batch, units, diagonal=diagonal)
    found = []
    for dtype, backend in ((F64, "oracle"), (F32, "triton"), (F32, "triton")):
        given = leaves([x, *weights, *state], dtype)
        first, ws, initial = given[0], given[1:5], (given[5], given[6])
        if backend == "oracle":
            s, m = oracle.rgc(first, ws, initial, through="own")
        else:
            s, m = rgc(first, ws[0], ws[1], ws[2], ws[3], initial, backend=backend)
        loss = (s * ds.to(s)).sum() + (m * dm.to(m)).sum()
        found.append([s.detach(), m.detach(), *torch.autograd.grad(loss, given)])
    assert oracle.relative(found[1], found[0]) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


FORMS: list[tuple[str, str, int]] = [
    ("step", "each", 1),
    ("lazy", "each", 1),
    ("chunk", "chunk", 4),
    ("chunk", "chunk", 32),
    ("chunk", "together", 4),
    ("history", "each", 1),
]


def learned(
    layer: RGC, x: Tensor, delta: Tensor, form: str, how: str, every: int, **options: Any
) -> list[Tensor]:
    """The layer's outputs and the gradients of a stream, as one list."""
    layer.zero_grad()
    learner = OnlineLearner(layer, x.shape[1], form=form, update_every=every, **options)  # type: ignore[arg-type]
    steps, outputs, losses = x.shape[0], [], []
    for t in range(0, steps, every if how == "chunk" else 1):
        if how == "chunk":
            s = learner.chunk(x[t : t + every])
            (s * delta[t : t + every]).sum().backward()
            outputs.append(s.detach())
            continue
        s = learner.step(x[t])
        outputs.append(s.detach()[None])
        losses.append((s * delta[t]).sum())
        if how == "each" or len(losses) == every or t == steps - 1:
            torch.stack(losses).sum().backward()
            losses = []
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert len(grads) == len(list(layer.parameters()))
    return [torch.cat(outputs), *grads]


@pytest.mark.parametrize(("form", "how", "every"), FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"input_size": 5}, {"recurrence": "diagonal"}], ids=["dense", "input", "diagonal"]
)
@pytest.mark.parametrize("units", [33, 512])
def test_the_learner_is_float64s_and_repeats_in_every_bit(
    form: str, how: str, every: int, options: dict[str, Any], units: int
) -> None:
    layer = RGC(units, init="uniform", **options).to(DEVICE)
    wide = RGC(units, **options).to(DEVICE, F64)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(35, 2, layer.fan_in, device=DEVICE)
    delta = torch.randn(35, 2, units, device=DEVICE)
    want = learned(wide, x.double(), delta.double(), form, how, every, backend="torch")
    first = learned(layer, x, delta, form, how, every, backend="triton")
    again = learned(layer, x, delta, form, how, every, backend="triton")
    assert oracle.relative(first, want) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bfloat16_gamma_is_near_float64s() -> None:
    layer, wide = RGC(256, init="uniform").to(DEVICE), RGC(256).to(DEVICE, F64)
    wide.load_state_dict(layer.state_dict())
    x, delta = torch.randn(20, 2, 256, device=DEVICE), torch.randn(20, 2, 256, device=DEVICE)
    want = learned(wide, x.double(), delta.double(), "step", "each", 1, backend="torch")
    got = learned(layer, x, delta, "step", "each", 1, backend="triton", gamma_dtype=torch.bfloat16)
    # Γ is rounded by 2⁻⁹ a step, and forgets: a few roundings add up.
    assert 1e-4 < oracle.relative(got, want) < 2.0**-6


# --- the step's kernel alone -------------------------------------------------------------------------------


def arrays(states: int, batch: int, matrices: int, units: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, phi, y, delta; m below 1, so that Γ stays bounded."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    m = 0.9 * torch.rand(states, states, batch, units, device=DEVICE) / states
    return m, draw(states, batch, matrices, units), draw(batch, matrices, units), draw(states, batch, units)


def test_gamma_of_more_than_2_to_the_31_numbers() -> None:
    from rjepa_triton.kernels.gamma_step import gamma_step_

    batch, units = 513, 2048
    numbers = batch * units**2
    assert numbers > 2**31
    needs = 4 * numbers + (1 << 30)
    if torch.cuda.mem_get_info()[0] < needs:
        pytest.skip(f"needs {needs:,} free bytes")
    gamma = torch.zeros(batch, 1, units, units, device=DEVICE)
    m, phi, y, delta = arrays(1, batch, 1, units)
    rows = [0, 511, 512]  # the last starts at 2³¹, the one before ends there
    before = torch.randn(len(rows), 1, units, units, device=DEVICE)
    gamma[rows] = before
    gradient = gamma_step_([gamma], m, phi, y, delta)
    assert gradient is not None

    def wide(a: Tensor) -> Tensor:
        return a.double()

    (want,) = rfp.advanced([wide(before)], wide(m[:, :, rows]), wide(phi[:, rows]), wide(y[rows]))
    assert oracle.relative([gamma[rows]], [want]) < TOLERANCE
    # a row that was zero is φ yᵀ
    outer = phi[0, 300, 0].double()[:, None] * y[300, 0].double()
    assert oracle.relative([gamma[300, 0]], [outer]) < TOLERANCE
    entering = wide(delta[0] * phi[0, :, 0]).T @ wide(y[:, 0])
    carried = (wide(delta[0, rows] * m[0, 0, rows])[:, :, None] * wide(before[:, 0])).sum(0)
    assert oracle.relative([gradient[0]], [entering + carried]) < TOLERANCE


@pytest.mark.parametrize("with_delta", [False, True])
def test_a_cuda_graph_of_the_step(with_delta: bool) -> None:
    """Capturing runs nothing: Γ is as before. Each replay is one step, with what the inputs hold by then."""
    from rjepa_triton.kernels.gamma_step import gamma_step_

    states, batch, matrices, units, steps = 2, 3, 4, 132, 4
    start = [torch.randn(batch, matrices, units, units, device=DEVICE) for _ in range(states)]
    inputs = [arrays(states, batch, matrices, units) for _ in range(steps)]
    gammas, held = [g.clone() for g in start], [a.clone() for a in inputs[0]]

    def step(target: list[Tensor], given: Sequence[Tensor]) -> Tensor | None:
        m, phi, y, delta = given
        return gamma_step_(target, m, phi, y, delta if with_delta else None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step([g.clone() for g in start], held)  # compiles, which must not happen in a capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step(gammas, held)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(gammas, start, strict=True))

    plain = [g.clone() for g in start]
    for given in inputs:
        for target, value in zip(held, given, strict=True):
            target.copy_(value)
        graph.replay()
        want = step(plain, given)
        assert all(torch.equal(a, b) for a, b in zip(gammas, plain, strict=True))
        if with_delta:
            assert gradient is not None
            assert want is not None
            assert torch.equal(gradient, want)


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
@pytest.mark.parametrize("units", [64, 200])  # the loop is one launch, and one a step
def test_a_layer_as_cuda_graphs_by_torch(units: int, learning: Any) -> None:
    """Each replay, forward and backward, is of the inputs and weights that there are by then."""
    layer = LSTM(16, units, learning=learning, device=DEVICE)
    plain = copy.deepcopy(layer)
    sample = torch.randn(20, 4, 16, device=DEVICE, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(layer, (sample,))
    for _ in range(3):
        x, delta = torch.randn(20, 4, 16, device=DEVICE), torch.randn(20, 4, units, device=DEVICE)
        found = []
        for one in (graphed, plain):
            given = x.clone().requires_grad_()
            parameters = list(one.parameters())
            output, state = one(given)
            loss = (output * delta).sum() + sum(s.square().sum() for s in state)
            found.append([output, *state, *torch.autograd.grad(loss, [given, *parameters])])
            with torch.no_grad():
                for parameter, gradient in zip(parameters, found[-1][4:], strict=True):
                    parameter -= 0.01 * gradient
        assert oracle.relative(found[0], found[1]) < TOLERANCE


@pytest.mark.parametrize("units", [17, 64, 128, 200])
@pytest.mark.parametrize("name", ["RGCCell", "LSTMCell", "GRUCell", "MGUCell"])
def test_every_kernel_of_a_cell(name: str, units: int) -> None:
    """Loop on chip or by steps, a step with its linearization, dual form and exact pass, against torch in float64."""
    from rjepa_triton.backend import operations
    from rjepa_triton.cells import builtin

    cell, steps, batch = getattr(builtin, name)(), 30, 3
    x = torch.randn(len(cell.per_unit), steps, batch, units, device=DEVICE)
    weights = [torch.randn(units, units, device=DEVICE) * (0.3 / units**0.5) for _ in cell.matrices]
    state = [torch.randn(batch, units, device=DEVICE) for _ in cell.states]
    resets = torch.rand(steps, batch, device=DEVICE) < 0.05
    delta = torch.randn(len(cell.states), steps, batch, units, device=DEVICE)
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton"), (torch.float32, "triton")):
        ws, c = [w.to(dtype) for w in weights], [s.to(dtype) for s in state]
        made = operations.scan(cell, x.to(dtype), ws, c, resets, backend=backend)
        lin, m = operations.linearize(cell, made, ws, backend=backend)
        first, _, of_step = operations.step(
            cell, x[:, :1].to(dtype), ws, torch.stack(c), resets[:1], backend=backend
        )
        dual = operations.dual_of(
            cell, made, ws, delta.to(dtype), cell.matrices, x.shape[0], "rfp", backend=backend
        )
        exact = operations.exact(cell, made, lin, ws, delta.to(dtype), backend=backend)
        found.append([made.states, m, first, of_step, *dual[0], *dual[1:], *exact[0], *exact[1:]])
    assert oracle.relative(found[1], found[0]) < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


@pytest.mark.parametrize("units", [17, 32, 64, 100, 256, 512])
@pytest.mark.parametrize("options", [{}, {"optimizer": "adam", "clip_norm": 1.0, "update_every": 3}], ids=str)
def test_a_stream_in_one_launch_is_the_loop(units: int, options: dict[str, Any]) -> None:
    """Of one program and of teams that wait for one another, alone and as a population of more than run at once."""
    layer = RGC(units, init="uniform").to(DEVICE)
    readout = torch.nn.Linear(units, 3).to(DEVICE)
    wide = copy.deepcopy((layer, readout))
    loop = Stream(*(module.double() for module in wide), backend="torch", lr=1e-3, **options)
    many = Stream(layer, readout, backend="triton", lr=1e-3, population=5, seeds=[0] * 5, **options)
    stream = Stream(layer, readout, lr=1e-3, **options)
    assert stream.backend == "triton"
    x, target = torch.randn(40, 1, units, device=DEVICE), torch.randn(40, 1, 3, device=DEVICE)
    resets = torch.rand(40, 1, device=DEVICE) < 0.1
    want = loop.run(x.double(), target.double(), resets)
    found = stream.run(x, target, resets)
    assert oracle.relative([found.losses, found.outputs], [want.losses, want.outputs]) < TOLERANCE
    assert oracle.relative(stream.parameters, loop.parameters) < TOLERANCE
    every = many.run(x, target, resets).losses
    assert all(torch.equal(every[0], each) for each in every)


@pytest.mark.parametrize("family", ["step", "chunk", "scan"])
def test_kernels_repeat_in_every_bit(family: str) -> None:
    from rjepa_triton.kernels import gamma_chunk, gamma_step, reverse_scan

    states, steps, batch, matrices, units = 2, 40, 3, 4, 512
    parts = [arrays(states, batch, matrices, units) for _ in range(steps)]
    m, phi, delta = (torch.stack([p[i] for p in parts], d).contiguous() for i, d in ((0, 2), (1, 1), (3, 1)))
    y = torch.stack([p[2] for p in parts])
    start = [torch.randn(batch, matrices, units, units, device=DEVICE) for _ in range(states)]

    def by_step() -> list[Tensor | None]:
        gammas = [g.clone() for g in start]
        return [gamma_step.gamma_step_(gammas, *parts[0]), *gammas]

    def by_chunk() -> list[Tensor | None]:
        gammas = [g.clone() for g in start]
        arriving, whole = reverse_scan.arriving(m, phi)
        credit = delta[:, 0].contiguous()
        total = gamma_chunk.gamma_chunk_(gammas, whole, arriving, y, credit, precision="tf32")
        return [total, *gammas]

    def by_scan() -> list[Tensor | None]:
        entries = [phi[nu, :, :, k].contiguous() for nu in range(states) for k in range(matrices)]
        by_state = [{0: entries[k], 1: entries[matrices + k]} for k in range(matrices)]
        long_m, long_delta = (a.repeat_interleave(16, dim=-3)[..., :1, :].contiguous() for a in (m, delta))
        return [
            *reverse_scan.reverse_scan_entering(m, delta, by_state[:3], by_state[3:]),
            *reverse_scan.reverse_scan(long_m, long_delta),
        ]

    runs: dict[str, Callable[[], list[Tensor | None]]] = {"step": by_step, "chunk": by_chunk, "scan": by_scan}
    for a, b in zip(runs[family](), runs[family](), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["step", "chunk"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: LSTM(12, 96, **o),
        lambda **o: GRU(12, 96, **o),
        lambda **o: ELSTM(12, 96, **o),
        lambda **o: LRU(12, 96, **o),
        lambda **o: LSTM(12, 96, heads=6, learning="rtrl", **o),
        lambda **o: RGC(96, init="uniform", heads=6, learning="rtrl", **o),
        lambda **o: RGC(96, init="uniform", learning="rtrl", **o),
    ],
)
def test_other_layers_gradients_are_float64s(make: Callable[..., TwoPointRNN], form: str) -> None:
    wide, narrow = make(dtype=F64), make(device=DEVICE, dtype=F32)
    if wide.learning == "rtrl" and form == "chunk":
        pytest.skip("exact RTRL goes step by step")
    narrow.load_state_dict(wide.state_dict())
    x, delta = torch.randn(8, 2, wide.fan_in, dtype=F64), torch.randn(8, 2, 96, dtype=F64)
    every = 4 if form == "chunk" else 1
    for layer in (wide, narrow):
        like = layer.weights()[0]
        learner = OnlineLearner(layer, 2, form=form, update_every=every)  # type: ignore[arg-type]
        for start in range(0, 8, every):
            output = learner.chunk(x[start : start + every].to(like))
            (output * delta[start : start + every].to(like)).sum().backward()
    grads = [[p.grad.cpu() for p in layer.parameters() if p.grad is not None] for layer in (narrow, wide)]
    assert oracle.relative(*grads) < 10 * TOLERANCE


@pytest.mark.parametrize(
    "rounding",
    [{}, {"gamma_dtype": torch.bfloat16, "gamma_rounding": "stochastic"}],
    ids=["fp32", "stochastic"],
)
@pytest.mark.parametrize("units", [64, 256])
def test_a_learner_by_cuda_graphs_is_the_plain_one(units: int, rounding: dict[str, Any]) -> None:
    layer = RGC(units, init="uniform", device=DEVICE)
    x, delta = (torch.randn(12, 2, units, device=DEVICE) for _ in range(2))
    found = []
    for options in ({}, {"cuda_graph": True}):
        layer.zero_grad()
        learner = OnlineLearner(layer, 2, form="step", **options, **rounding)  # type: ignore[arg-type]
        outputs = []
        for t in range(12):
            if t == 7:
                learner.reset(torch.tensor([True, False], device=DEVICE))
            outputs.append(learner.step(x[t]))
            (outputs[-1] * delta[t]).sum().backward()
        found.append(
            [
                torch.stack(outputs).detach(),
                *(p.grad.clone() for p in layer.parameters() if p.grad is not None),
            ]
        )
    assert oracle.relative(found[1], found[0]) < TOLERANCE


def test_the_full_rjepa_at_its_full_size_trains() -> None:
    """ResNet-50, six areas, feedback: a step of RFP moves every circuit, and its loss and gradients are finite."""
    backbone = pytest.importorskip("rjepa_triton.rjepa.backbone")
    from rjepa_triton.rjepa.encoder import Encoder
    from rjepa_triton.rjepa.model import PSI, RJEPA

    torch.manual_seed(0)
    model = RJEPA(Encoder(backbone.load("random"), preset="full")).to(DEVICE)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    patches = torch.randint(0, 255, (6, 4, 3, 50, 50), dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        loss = model(patches).total(PSI["mean"])
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    for area in model.encoder.areas:
        assert area.weight_ss.abs().max() > 0
