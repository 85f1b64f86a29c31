"""The forward pass in parallel in time against the loop: states, gradients, rounds, and what happens where it diverges."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
from every_cell import CELLS, SHAPES, SharedGate, by_cell, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rjepa_triton import LRU, LSTM, RGC, functional
from rjepa_triton.backend import native_backend, operations
from rjepa_triton.cells.builtin import LRUCell, LSTMCell, RGCCell, TimeDecayCell
from rjepa_triton.cells.two_point import Cell, Trajectory
from rjepa_triton.layers import parallel
from rjepa_triton.planning import cost, devices
from rjepa_triton.rules import rfp

F32, F64 = torch.float32, torch.float64
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = GPU if torch.cuda.is_available() else CPU  # where kernels run: interpreted without a GPU
# The tolerance of the rounds in float64, and how far what is left of a correction may spread.
NEAR = 1e-9
by_shape = pytest.mark.parametrize("shape", SHAPES)


def mild(
    cell: Cell, shape: str, steps: int, batch: int = 2
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """As `problem`, with weights that the rounds converge for: RGC takes smaller ones than other cells do."""
    x, weights, state, delta = problem(cell, shape, steps, batch)
    with torch.no_grad():
        for weight in weights:
            weight *= 0.2
        for j, name in enumerate(cell.parameters, start=len(cell.inputs)):
            if name == "tau":
                x[j].sigmoid_()
    return x, weights, state, delta


def circuit(
    scale: float, steps: int, units: int = 64, batch: int = 4
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """RGC: x ~ N(0, 1), W ~ scale·N(0, 1)/√N, from zero."""
    weights = [torch.randn(units, units, dtype=F64) * scale / units**0.5 for _ in range(4)]
    return torch.randn(1, steps, batch, units, dtype=F64), weights, [torch.zeros(batch, units, dtype=F64)] * 2


def by_the_loop(x: Tensor, weights: list[Tensor], state: list[Tensor]) -> Trajectory:
    """By the backend that a layer takes: here the dynamics are chaotic, and another one's rounding is another path."""
    backend = operations.choose_scan("auto", x.device, x.dtype)
    return operations.scan(RGCCell(), x, weights, state, None, backend=backend)


@by_cell
@by_shape
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("learning", ["rfp", "bptt"])
def test_states_and_gradients_are_the_loops(cell: Cell, shape: str, reset: bool, learning: Any) -> None:
    x, weights, state, delta = mild(cell, shape, 31)
    resets = torch.rand(31, 2) < 0.1 if reset else None
    leaves = [x, *state, *weights]
    found = []
    for forward in ("sequential", "parallel"):
        out = torch.stack(
            functional.two_point(
                cell,
                x,
                weights,
                state,
                resets=resets,
                learning=learning,
                forward=forward,  # type: ignore[arg-type]
            )
        )
        found.append((out, torch.autograd.grad((out * delta).sum(), leaves)))
    (loop, of_loop), (rounds, of_rounds) = found
    torch.testing.assert_close(rounds, loop, rtol=NEAR, atol=NEAR)
    assert oracle.relative(of_rounds, of_loop) < NEAR


@by_cell
@by_shape
@pytest.mark.parametrize("steps", [1, 2, 63])
def test_a_trajectory_is_laid_out_as_the_loops(cell: Cell, shape: str, steps: int) -> None:
    x, weights, state, _ = mild(cell, shape, steps, batch=3)
    resets = torch.rand(steps, 3) < 0.2
    want = cell.scan(x.detach(), weights, state, resets)
    made = parallel.attempt(cell, x.detach(), weights, state, resets)
    got = made.trajectory
    assert got is not None
    assert made.rounds <= steps + 1
    assert got.resets is resets
    for a, b in ((got.x, want.x), (got.states, want.states), (got.saved, want.saved)):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=NEAR, atol=NEAR)
    assert torch.equal(got.states[:, 0], torch.stack(state))


@pytest.mark.parametrize(("scale", "about"), [(0.02, 4), (0.1, 8), (0.3, 17)])
def test_rounds_depend_on_the_weights_and_not_on_the_length(scale: float, about: int) -> None:
    taken = []
    for steps in (100, 400):
        made = parallel.attempt(RGCCell(), *circuit(scale, steps), tolerance=1e-5)
        assert made.trajectory is not None
        assert made.change <= 1e-5
        taken.append(made.rounds)
    assert all(abs(rounds - about) <= 1 + about // 8 for rounds in taken), taken
    assert abs(taken[1] - taken[0]) <= 1 + about // 8, taken


@pytest.mark.parametrize("cell", [TimeDecayCell(), LRUCell()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("dtype", "near"), [(F64, 1e-12), (F32, 2e-5)])
def test_an_affine_cell_takes_one_round_and_one_that_finds_nothing(
    cell: Cell, dtype: torch.dtype, near: float
) -> None:
    """In float32 what the second finds is rounding, up to a memory of a thousand steps."""
    assert cell.affine
    x = torch.randn(len(cell.per_unit), 500, 2, 16, dtype=dtype)
    for j, value in enumerate(cell.initial_parameters(16).values(), start=len(cell.inputs)):
        x[j] = value
    state = [torch.randn(2, 16, dtype=dtype) for _ in cell.states]
    resets = torch.rand(500, 2) < 0.01
    made = parallel.attempt(cell, x, [], state, resets)
    assert made.trajectory is not None
    assert made.rounds == 2
    torch.testing.assert_close(
        made.trajectory.states, cell.scan(x, [], state, resets).states, rtol=near, atol=near
    )
    assert made.change < near
    assert not LRUCell("relu").affine


def test_where_units_do_not_meet_convergence_is_quadratic() -> None:
    x, weights, state, _ = mild(CELLS["lstm"], "diagonal", 400)
    assert parallel.attempt(CELLS["lstm"], x.detach(), weights, state).rounds <= 5


@pytest.mark.parametrize("reset", [False, True])
def test_windows_of_time_make_one_trajectory(reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, state = circuit(0.1, 50, units=6)
    state = [torch.randn(4, 6, dtype=F64) for _ in state]
    resets = torch.rand(50, 4) < 0.1 if reset else None
    monkeypatch.setattr(parallel, "WINDOW", 24 * 7 + 5)
    lengths = []
    one_round = parallel.one_round

    def watched(*args: Any) -> Any:
        lengths.append(args[1].shape[1])
        return one_round(*args)

    monkeypatch.setattr(parallel, "one_round", watched)
    for cell in (RGCCell(), SharedGate(), LRUCell("tanh")):
        given = (x.expand(len(cell.per_unit), -1, -1, -1), weights[: len(cell.matrices)], state)
        made, want = parallel.attempt(cell, *given, resets), cell.scan(*given, resets)
        assert made.trajectory is not None
        torch.testing.assert_close(made.trajectory.states, want.states, rtol=NEAR, atol=NEAR)
        torch.testing.assert_close(made.trajectory.saved, want.saved, rtol=NEAR, atol=NEAR)
        assert made.rounds < 25
    assert set(lengths) == {7, 1}
    monkeypatch.setattr(parallel, "WINDOW", 1)  # less than a step has
    assert parallel.attempt(RGCCell(), x, weights, state, resets).rounds <= 2


def test_float32_is_as_near_to_float64_as_the_loop() -> None:
    x, weights, state = circuit(0.1, 300)
    want = RGCCell().scan(x, weights, state).states
    low = (x.float(), [w.float() for w in weights], [c.float() for c in state])
    made = parallel.attempt(RGCCell(), *low)
    assert made.trajectory is not None
    of_loop = oracle.relative([RGCCell().scan(*low).states], [want])
    assert oracle.relative([made.trajectory.states], [want]) < 1.5 * of_loop + 1e-7


def test_large_weights_fall_back_to_the_loop_with_one_warning() -> None:
    x, weights, state = circuit(1.5, 200)
    made = parallel.attempt(RGCCell(), x, weights, state)
    assert made.trajectory is None
    assert made.rounds < 20
    assert not made.change <= made.first
    layer = RGC(64, forward="parallel", dtype=F64)
    layer.load_state_dict({f"weight_{m.name}": w for m, w in zip(RGCCell.matrices, weights, strict=True)})
    with pytest.warns(
        parallel.Divergence, match=r"did not converge in \d+ rounds: the last changed the states by"
    ) as told:
        s, (last_s, last_m) = layer(x[0])
    assert len(told) == 1
    want = by_the_loop(x, weights, state)
    assert torch.equal(s, want.after[0])
    assert torch.equal(torch.stack([last_s, last_m]), want.after[:, -1])


def test_too_few_rounds_and_values_that_are_not_finite_end_without_a_trajectory() -> None:
    x, weights, state = circuit(0.1, 50)
    made = parallel.attempt(RGCCell(), x, weights, state, max_rounds=3)
    assert (made.trajectory, made.rounds) == (None, 3)
    assert made.change > 1e-10
    x[0, 7, 1, 5] = torch.inf
    assert parallel.attempt(RGCCell(), x, weights, state).trajectory is None
    with pytest.warns(parallel.Divergence):
        got = parallel.forward(RGCCell(), x, weights, state, mode="parallel", backend="torch")
    assert torch.equal(got.states.nan_to_num(), RGCCell().scan(x, weights, state).states.nan_to_num())


def test_auto_falls_back_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(parallel, "rounds_worth", lambda *_: tried.append(1) or 12)
    for scale in (1.5, 0.02):
        x, weights, state = circuit(scale, 60)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            s, m = functional.rgc(x[0], *weights)
        want = by_the_loop(x, weights, state).after
        if scale > 1:
            assert torch.equal(torch.stack([s, m]), want)
        else:
            torch.testing.assert_close(torch.stack([s, m]), want, rtol=NEAR, atol=NEAR)
    assert len(tried) == 2


def test_auto_is_a_choice_by_sizes_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        devices, "find", lambda name, kind: devices.generic(kind)
    )  # on every machine the same
    weights = [torch.empty(64, 64, device="meta")] * 4
    rgc = RGCCell()

    def rounds(
        cell: Cell, sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype = F32
    ) -> int:
        given = [torch.empty(sizes[2], sizes[2], device="meta")] * len(cell.matrices)
        return parallel.rounds_worth(cell, given, sizes, device, dtype, dtype == F32 and device == GPU)

    # A loop in one launch leaves rounds nothing to save.
    assert parallel.rounds_worth(rgc, weights, (4096, 1, 64), GPU, F32, True) == 0
    assert rounds(rgc, (4096, 132, 128), GPU) == 0
    assert rounds(rgc, (4096, 1, 129), GPU) >= parallel.ASSUMED_ROUNDS
    assert rounds(rgc, (4096, 1, 64), GPU, F64) >= parallel.ASSUMED_ROUNDS
    assert rounds(LSTMCell(), (4096, 1, 64), GPU) == 0
    assert rounds(LSTMCell(), (4096, 1, 65), GPU) >= parallel.ASSUMED_ROUNDS
    assert rounds(LRUCell(), (4096, 1, 64), GPU) >= parallel.ASSUMED_ROUNDS
    for units in (8, 64, 256, 1024):
        for batch in (1, 8, 64):
            for steps in (1, 50, 4096):
                for cell in (rgc, LSTMCell(), LRUCell()):
                    assert rounds(cell, (steps, batch, units), CPU) == 0
    # An affine cell's rounds are known: one thread does them sooner than a loop that isn't compiled, until arithmetic
    # outweighs calls.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert rounds(LRUCell(), (1024, 1, 64), CPU) == 0
    monkeypatch.setattr(native_backend.NATIVE, "no_loops", lambda *_: "it is switched off")
    assert rounds(LRUCell(), (1024, 1, 64), CPU) >= parallel.AFFINE_ROUNDS
    assert rounds(LRUCell(), (1024, 8, 256), CPU) == rounds(LRUCell(), (8, 1, 64), CPU) == 0
    assert rounds(rgc, (4096, 1, 8), CPU) == rounds(LRUCell("relu"), (4096, 1, 8), CPU) == 0
    # Few steps are soon gone through; much work a step hides the launches.
    assert rounds(rgc, (1, 1, 64), GPU) == rounds(rgc, (20, 1, 64), GPU) == 0
    assert rounds(rgc, (4096, 64, 4096), GPU) == 0
    # What a few bits can't hold is left to the loop.
    assert rounds(rgc, (4096, 1, 64), GPU, torch.bfloat16) == 0
    assert rounds(rgc, (4096, 1, 64), torch.device("meta")) == 0


def test_the_model_counts_what_torch_is_called_for() -> None:
    x, weights, state = circuit(0.1, 9, units=6)
    few = cost.counted(lambda: RGCCell().scan(x[:, :5], weights, state))
    more = cost.counted(lambda: RGCCell().scan(x, weights, state))
    told = parallel.forward_problem(RGCCell(), weights, (9, 4, 6), F64, False)
    assert told.step.calls == (more.calls - few.calls) / 4 == 16
    assert told.step.bytes * 4 * 6 * 4 == more.bytes - few.bytes
    assert told.weight_numbers == 4 * 36
    states = torch.zeros(2, 10, 4, 6, dtype=F64)
    round_ = cost.counted(lambda: parallel.one_round(RGCCell(), x, weights, states, None, lambda m, r: r))
    assert told.round.calls == round_.calls
    loop, rounds = cost.forward_seconds(told, 3, cost.CPU)
    flop, moved = 9 * 2 * 4 * 144, 9 * (told.step.bytes * 24 + 8 * 144)
    assert loop == pytest.approx(9 * 16 * 2e-6 + flop / 1e11 + moved / 2e10)
    assert rounds == pytest.approx(3 * told.one_round().seconds(cost.CPU))
    assert told.one_round().flop == flop


@pytest.mark.parametrize("states", [1, 2, 3])
def test_the_models_scan_is_the_one_that_runs(states: int) -> None:
    for steps in (32, 40, 128, 300):
        m, r = torch.randn(states, states, steps, 1, 8), torch.randn(states, steps, 1, 8)
        want = cost.counted(lambda m=m, r=r: rfp.affine_scan(m, r))
        told = cost.scan_work(states, steps, 8, 4, kernel=False)
        assert told.calls == want.calls
        assert told.bytes == pytest.approx(want.bytes, rel=0.25)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33, 64, 100])
@pytest.mark.parametrize("states", [1, 2, 3])
@pytest.mark.parametrize("until", [1, 2, 32])
def test_the_scan_is_its_recursion(states: int, steps: int, until: int) -> None:
    m, r = (
        0.7 * torch.randn(states, states, steps, 2, 3, dtype=F64),
        torch.randn(states, steps, 2, 3, dtype=F64),
    )
    m[torch.rand_like(m) < 0.1] = 0  # nothing may be divided by
    kept = m.clone(), r.clone()
    c, want = torch.zeros(states, 2, 3, dtype=F64), []
    for t in range(steps):
        c = torch.einsum("ij...,j...->i...", m[:, :, t], c) + r[:, t]
        want.append(c)
    torch.testing.assert_close(
        rfp.affine_scan(m, r, until=until), torch.stack(want, 1), rtol=1e-11, atol=1e-11
    )
    assert torch.equal(m, kept[0])
    assert torch.equal(r, kept[1])


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("states", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 41])
def test_the_scan_by_triton(states: int, steps: int) -> None:
    pytest.importorskip("triton")
    m, r = (
        0.5 * torch.randn(states, states, steps, 2, 5, device=HERE),
        torch.randn(states, steps, 2, 5, device=HERE),
    )
    want = rfp.affine_scan(m.double(), r.double())
    got = operations.affine_scan(m, r, backend="triton")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_the_layers_states_by_triton() -> None:
    pytest.importorskip("triton")
    x, weights, state = circuit(0.1, 40, units=6)
    low = (x.to(HERE, F32), [w.to(HERE, F32) for w in weights], [c.to(HERE, F32) for c in state])
    got = parallel.forward(RGCCell(), *low, mode="parallel", backend="triton")
    torch.testing.assert_close(got.states, RGCCell().scan(*low).states, rtol=1e-5, atol=1e-5)


def test_the_models_steps_are_those_of_the_scans_kernel() -> None:
    kernels = pytest.importorskip("rjepa_triton.kernels.reverse_scan")
    for steps in (1, 255, 256, 1000, 4096, 100_000):
        cut = kernels.pick_scan_config(steps, 64, 2, 8, 5, 32, 132).steps
        blocks = -(-steps // cut)
        dependent = steps if blocks == 1 else 2 * cut + blocks
        assert cost.kernel_steps(steps) == pytest.approx(dependent, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(CELLS)),
    steps=st.integers(1, 20),
    batch=st.integers(1, 3),
    shape=st.sampled_from(sorted(SHAPES)),
    reset=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_small_problem(name: str, steps: int, batch: int, shape: str, reset: bool, seed: int) -> None:
    torch.manual_seed(seed)
    cell = CELLS[name]
    x, weights, state, _ = mild(cell, shape, steps, batch)
    resets = torch.rand(steps, batch) < 0.3 if reset else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parallel.Divergence)  # the loop's states are right too
        got = parallel.forward(cell, x.detach(), weights, state, resets, mode="parallel")
    torch.testing.assert_close(
        got.states, cell.scan(x.detach(), weights, state, resets).states, rtol=NEAR, atol=NEAR
    )


def test_a_layer_takes_and_shows_the_option() -> None:
    assert "forward" not in repr(LSTM(3, 6))
    layer = LSTM(3, 6, forward="parallel", dtype=F64)
    assert "forward='parallel'" in repr(layer)
    assert "forward='sequential'" in repr(LRU(3, 6, forward="sequential"))
    other = LSTM(3, 6, forward="sequential", dtype=F64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(40, 2, 3, dtype=F64)
    torch.testing.assert_close(layer(x), other(x), rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize(
    "build",
    [
        lambda: LSTM(3, 6, forward="scan"),
        lambda: functional.two_point(
            TimeDecayCell(), torch.zeros(2, 3, 1, 2), [], [torch.zeros(1, 2)], forward="scan"
        ),
        lambda: functional.rgc(torch.zeros(3, 1, 2), *[torch.zeros(2, 2)] * 4, forward="scan"),
    ],
)
def test_a_bad_value_is_named(build: Any) -> None:
    with pytest.raises(
        ValueError, match="forward must be one of 'auto', 'sequential', 'parallel', got 'scan'"
    ):
        build()


def test_torch_compile_stays_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds end by a value, which no graph has."""
    monkeypatch.setattr(parallel, "attempt", lambda *_, **__: pytest.fail("tried in parallel"))
    layer = RGC(5, forward="parallel", init="uniform")
    x = torch.randn(4, 2, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], functional.rgc(x, *layer.weights(), forward="sequential")[0])


def test_a_cell_with_automatic_partials() -> None:
    cell = SharedGate()
    x, weights, state, _ = mild(cell, "dense", 30)
    made = parallel.attempt(cell, x.detach(), weights, state)
    assert made.trajectory is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_auto_runs_an_affine_layer_in_parallel_with_one_thread(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    made: list[parallel.Attempt] = []
    attempt = parallel.attempt

    def watched(*args: Any, **options: Any) -> parallel.Attempt:
        made.append(attempt(*args, **options))
        return made[-1]

    monkeypatch.setattr(parallel, "attempt", watched)
    monkeypatch.setattr(native_backend.NATIVE, "no_loops", lambda *_: "it is switched off")
    layer, other = LRU(3, 6, dtype=F64), LRU(3, 6, dtype=F64, forward="sequential")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(300, 1, 3, dtype=F64)
    torch.testing.assert_close(layer(x), other(x), rtol=NEAR, atol=NEAR)
    assert [one.rounds for one in made] == ([2] if threads == 1 else [])
