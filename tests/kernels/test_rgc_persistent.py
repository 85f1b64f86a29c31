"""The persistent RGC kernel against the float64 cell: interpreted as one program, and as several that wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

pytest.importorskip("triton")

import rgc_problems
from kernel_problems import check_error, poison
from rgc_problems import FORWARD_ERRORS, TOLERANCE, assert_near, gates_of, problem, reference

from rjepa_triton.kernels import rgc_persistent as kernels
from rjepa_triton.kernels.rgc_forward import rgc_forward
from rjepa_triton.kernels.rgc_persistent import (
    COUNTER_STRIDE,
    WEIGHT_BYTES,
    Config,
    most_units,
    pick_config,
    rgc_forward_persistent,
)

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="takes programs apart")


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (5, 3), (2, 17)])
@pytest.mark.parametrize("units", [1, 63, 127, 130])
def test_forward_is_that_of_the_cell(monkeypatch, units, steps, batch, with_resets):
    given = problem(steps, batch, units, with_resets)
    want = reference(*given)
    poison(monkeypatch)
    states, gates = rgc_forward_persistent(*given)
    assert_near(states, want.states)
    assert_near(gates, gates_of(want.saved))


def test_gates_need_not_be_saved(monkeypatch):
    given = problem(5, 3, 68, True)
    states, _ = rgc_forward_persistent(*given)
    poison(monkeypatch)
    again, none = rgc_forward_persistent(*given, save_gates=False)
    assert none is None
    assert torch.equal(states, again)


def test_parameters_are_weights_and_nothing_is_differentiated():
    rgc_problems.check_parameters(rgc_forward_persistent, 68)


@pytest.mark.parametrize("units", [63, 68])
def test_state_carries_over_and_two_runs_agree_in_every_bit(units):
    rgc_problems.check_repeats_and_continues(rgc_forward_persistent, units)


@pytest.mark.parametrize(("change", "error", "message"), FORWARD_ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(zip(("x", "weights", "state", "resets"), problem(2, 3, 5, True), strict=True))
    check_error(rgc_forward_persistent, arguments, change, error, message)


# --- how units and batch rows are divided among programs ---------------------------------------------------

MULTIPROCESSORS = (1, 2, 46, 108, 114, 132, 148, 304)


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_every_unit_and_row_is_some_programs_and_no_others(multiprocessors):
    for units in range(1, most_units(multiprocessors) + 1):
        for batch in (1, 2, 3, 4, 5, 17, 64, 1000):
            c = pick_config(units, batch, multiprocessors, 32)
            assert (c.slices - 1) * c.units < units <= c.slices * c.units
            assert (c.parts - 1) * c.rows < batch <= c.parts * c.rows
            assert c.slices * c.parts <= multiprocessors
            assert c.chunks * c.lanes >= units
            assert 16 * c.units * c.chunks * c.lanes <= WEIGHT_BYTES
            assert c.tile_rows < 2 * c.rows


def test_pick_config():
    # units, slices, parts, rows, tile_rows, chunks, lanes, num_warps
    assert pick_config(1024, 1, 132, 32) == Config(8, 128, 1, 1, 1, 32, 32, 8)
    assert pick_config(1024, 8, 132, 32) == Config(8, 128, 1, 8, 4, 32, 32, 8)
    assert pick_config(1000, 3, 304, 64) == Config(8, 125, 2, 2, 2, 16, 64, 8)
    assert pick_config(512, 2, 132, 32) == Config(8, 64, 2, 1, 1, 16, 32, 8)
    assert pick_config(256, 6, 132, 32) == Config(8, 32, 3, 2, 2, 8, 32, 8)
    assert pick_config(1, 500, 132, 32) == Config(8, 1, 125, 4, 4, 8, 32, 8)


def test_weights_that_do_not_fit_are_refused():
    assert [most_units(m) for m in (108, 132, 304)] == [864, 1024, 1024]
    with pytest.raises(
        ValueError,
        match=r"1025 units can't stay on chip: those of 8 units take 262144 bytes .* there are 131072 for them",
    ):
        pick_config(1025, 1, 304, 64)
    with pytest.raises(
        ValueError, match=r"865 units can't stay on chip: they need 109 multiprocessors, .* and there are 108"
    ):
        pick_config(865, 1, 108, 32)


@needs_interpreter
def test_the_launcher_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    with pytest.raises(ValueError, match="weights of 1025 units can't stay on chip"):
        rgc_forward_persistent(
            torch.zeros(1, 1, 1025), [torch.zeros(1025, 1025)] * 4, [torch.zeros(1, 1025)] * 2
        )


# --- several programs --------------------------------------------------------------------------------------


def _outputs(x: Tensor, state: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Arrays for states and gates, NaN where the kernel must write."""
    steps, batch, units = x.shape
    states = torch.full((2, steps + 1, batch, units), math.nan)
    states[:, 0] = torch.stack(state)
    return states, torch.full((steps, batch, 2, 2, units), math.nan)


class _Alone:
    """The kernel, launched so that only program `index` of its grid runs."""

    def __init__(self, kernel: Any, index: int) -> None:
        self.kernel, self.index = kernel, index

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            from triton.runtime.interpreter import interpreter_builder as builder

            saved = builder.set_grid_dim, builder.set_grid_idx
            builder.set_grid_dim = lambda *_: saved[0](*grid, 1, 1)
            builder.set_grid_idx = lambda *_: saved[1](self.index, 0, 0)
            try:
                self.kernel[(1,)](*arguments, **options)
            finally:
                builder.set_grid_dim, builder.set_grid_idx = saved

        return launch


@needs_interpreter
@pytest.mark.parametrize(("units", "batch", "multiprocessors"), [(37, 5, 12), (64, 3, 8), (130, 2, 20)])
def test_each_number_is_written_by_one_program(monkeypatch, units, batch, multiprocessors):
    """With a single step no program waits: run each by itself into its own arrays, and all of them into shared ones."""
    x, weights, state, resets = problem(1, batch, units, True)
    config = pick_config(units, batch, multiprocessors, 32)
    programs = config.slices * config.parts
    assert programs > 4
    arrived = torch.zeros(config.parts, COUNTER_STRIDE, dtype=torch.int64)
    given = (x, weights, _outputs(x, state)[0], resets.view(torch.uint8))
    kernel, times = kernels._rgc_persistent_kernel, torch.zeros(1, batch, 2, 2, units)
    for index in range(programs):
        monkeypatch.setattr(kernels, "_rgc_persistent_kernel", _Alone(kernel, index))
        states, gates = _outputs(x, state)
        kernels._launch(x, weights, states, given[3], gates, arrived, config)
        assert torch.equal(states[:, 1].isnan(), gates[0, :, :, 0].movedim(1, 0).isnan())
        times += ~gates.isnan()
        kernels._launch(*given, None, arrived, config)
    assert (times == 1).all()
    assert (arrived == 0).all()
    want, _ = rgc_forward(x, weights, state, resets)
    torch.testing.assert_close(given[2], want, rtol=0, atol=TOLERANCE)


WHOLE_KERNEL = kernels._rgc_persistent_kernel


def _run_alone(index: int, arrivals: int, delay: float, *given: Any) -> None:
    """What each process runs: one program of the grid, after `delay` seconds."""
    kernels.arrivals = lambda *_, **__: arrivals
    kernels._rgc_persistent_kernel = _Alone(WHOLE_KERNEL, index)
    time.sleep(delay)
    kernels._launch(*given)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    """One for each of four programs; a process takes seconds to import what it needs."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        yield pool


@needs_interpreter
@pytest.mark.parametrize("arrivals", [1, 8])
def test_programs_wait_for_one_another(processes, arrivals):
    """Each program is interpreted by a process of its own, on shared memory, and some start late.

    A program that doesn't wait reads NaN. The batch has two parts, the second with one row less than the first.
    """
    x, weights, state, resets = problem(6, 3, 13, True)
    config = pick_config(13, 3, 5, 32)
    assert (config.slices, config.parts, config.rows) == (2, 2, 2)
    states, gates = (a.share_memory_() for a in _outputs(x, state))
    arrived = torch.zeros(config.parts, COUNTER_STRIDE, dtype=torch.int64).share_memory_()
    given = (x, weights, states, resets.view(torch.uint8), gates, arrived, config)
    jobs = [(index, arrivals, 0.5 * index, *given) for index in range(config.slices * config.parts)]
    processes.starmap_async(_run_alone, jobs, chunksize=1).get(timeout=120)
    want = reference(x, weights, state, resets)
    assert_near(states, want.states)
    assert_near(gates, gates_of(want.saved))
    # Both slices of each part have arrived before each step but the first.
    assert arrived[:, 0].tolist() == [2 * arrivals * 5] * 2
    assert not arrived[:, 1:].any()
