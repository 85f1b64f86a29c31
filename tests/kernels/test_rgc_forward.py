"""The RGC's forward kernels against the float64 cell: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Trajectory

pytest.importorskip("triton")

import rgc_problems
from kernel_problems import DEVICE, check_error, poison
from rgc_problems import FORWARD_ERRORS, TOLERANCE, assert_near, gates_of, problem, random, reference

from rjepa_triton.kernels import rgc_forward as kernels
from rjepa_triton.kernels._launch import DeviceSizes
from rjepa_triton.kernels.rgc_forward import (
    PointwiseConfig,
    SmallConfig,
    in_quarters,
    on_chip,
    pick_pointwise_config,
    pick_small_config,
    rgc_forward,
    rgc_forward_small,
    rgc_pointwise_,
)

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


SHAPES = [(1, 1), (5, 3)]  # T, B


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize(("steps", "batch"), SHAPES)
@pytest.mark.parametrize("units", [1, 17, 63, 64, 65, 100, 127, 128, 130])
def test_forward_is_that_of_the_cell(monkeypatch, units, steps, batch, with_resets):
    given = problem(steps, batch, units, with_resets)
    want = reference(*given)
    poison(monkeypatch)
    states, gates = rgc_forward(*given)
    assert_near(states, want.states)
    assert_near(gates, gates_of(want.saved))


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("units", [1, 17, 63])
def test_steps_one_by_one_are_those_of_one_launch(monkeypatch, units, with_resets):
    given = problem(5, 3, units, with_resets)
    want = reference(*given)
    poison(monkeypatch)
    monkeypatch.setattr(kernels, "on_chip", lambda *_: False)
    states, gates = rgc_forward(*given)
    assert_near(states, want.states)
    assert_near(gates, gates_of(want.saved))


@pytest.mark.parametrize("units", [17, 65, 100, 127, 128, 130])
def test_gates_need_not_be_saved(monkeypatch, units):
    given = problem(5, 3, units, True)
    states, gates = rgc_forward(*given)
    poison(monkeypatch)
    again, none = rgc_forward(*given, save_gates=False)
    assert none is None
    assert torch.equal(states, again)
    # One product over all steps makes the gates again.
    before = states[:, :-1].masked_fill(given[3][..., None], 0)
    product = before.flatten(1, 2) @ kernels.joined_by_source(given[1]).mT
    again = product.tanh().view(2, 5, 3, 2, units).movedim(0, 2)
    torch.testing.assert_close(again, gates, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("units", [17, 68, 130])
def test_parameters_are_weights_and_nothing_is_differentiated(units):
    rgc_problems.check_parameters(rgc_forward, units)


@pytest.mark.parametrize("units", [17, 68, 130])
def test_what_is_saved_linearises(units):
    x, weights, state, resets = problem(5, 2, units, True)
    states, gates = rgc_forward(x, weights, state, resets)
    cell, exact = RGCCell(), reference(x, weights, state, resets)
    got = cell.linearize(Trajectory(x[None], states, gates.flatten(2, 3).movedim(2, 0), resets))
    want = cell.linearize(exact)
    for k in range(4):
        for nu, value in want.partials.gate[k].items():
            assert_near(got.partials.gate[k][nu], value)
    assert_near(got.before, want.before)


@pytest.mark.parametrize("units", [63, 68, 130])
def test_state_carries_over_and_two_runs_agree_in_every_bit(units):
    rgc_problems.check_repeats_and_continues(rgc_forward, units)


# NumPy warns of an overflow, which the test shows to be harmless.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_large_pre_activations_saturate():
    x, weights, state, _ = problem(1, 1, 17, False)
    states, gates = rgc_forward(x, [1e3 * w for w in weights], state)
    assert states.isfinite().all()
    assert gates.abs().max() == 1


@pytest.mark.parametrize("units", [1, 17, 64, 130])
@pytest.mark.parametrize("resets_next", [False, True])
def test_pointwise(units, resets_next):
    """One step on strided arrays, where the state for the next step overwrites the one that this step read."""
    batch = 3
    gates = torch.full((4 * batch * units + 1,), math.nan, device=DEVICE)
    pre = gates[:-1].view(batch, 2, 2, units).normal_()
    before, u = random(2, batch, units), random(batch, units)
    after = torch.full((2, 4, batch, units), math.nan, device=DEVICE)
    resets = torch.tensor([False, True, False], device=DEVICE)

    want_gates = pre.double().tanh()
    (ss, sm), (mm, ms) = (by_source.unbind(1) for by_source in want_gates.unbind(1))
    s, m = before.double()
    want = torch.stack([(1 - ms) * u + ss * s, (1 - sm) * u + mm * m])
    if resets_next:
        rgc_pointwise_(pre, before, u, after[:, 1], resets, before)
        assert_near(before, want.masked_fill(resets[:, None], 0))
    else:
        kept = before.clone()
        rgc_pointwise_(pre, before, u, after[:, 1])
        assert torch.equal(before, kept)
    assert_near(pre, want_gates)
    assert_near(after[:, 1], want)
    # Nothing outside these arrays is written.
    assert gates[-1].isnan()
    assert after[:, [0, 2, 3]].isnan().all()


def test_pick_config():
    assert pick_small_config(1, 32) == pick_small_config(32, 32) == SmallConfig(32, True, 2)
    assert pick_small_config(33, 32) == pick_small_config(64, 32) == SmallConfig(64, True, 4)
    assert pick_small_config(65, 32) == pick_small_config(128, 32) == SmallConfig(128, False, 8)
    assert pick_small_config(1, 64) == pick_small_config(64, 64) == SmallConfig(64, True, 4)
    assert pick_small_config(65, 64) == pick_small_config(128, 64) == SmallConfig(128, True, 8)
    assert pick_pointwise_config(512, 32) == PointwiseConfig(128, 4)
    assert pick_pointwise_config(511, 64) == PointwiseConfig(256, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 3)},
            ValueError,
            r"x must have shape \(T, B, N\), none of them 0, got \(2, 3\)",
        ),
        *FORWARD_ERRORS,
        (
            {"x": torch.zeros(2, 3, 5).double()},
            TypeError,
            "x must have dtype torch.float32, got torch.float64",
        ),
        ({"weights": [torch.zeros(5, 5)] * 3}, ValueError, "weights must hold 4 tensors, got 3"),
        ({"state": [torch.zeros(3, 5), torch.zeros(5, 3).mT]}, ValueError, r"state\[1\] must be contiguous"),
        ({"resets": torch.zeros(2, 4).bool()}, ValueError, r"resets must have shape \(2, 3\)"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = dict(zip(("x", "weights", "state", "resets"), problem(2, 3, 5, True), strict=True))
    check_error(rgc_forward, arguments, change, error, message)


def test_small_says_how_small():
    with pytest.raises(ValueError, match="x must have at most 128 units, got 129"):
        rgc_forward_small(*problem(1, 1, 129, False))


def test_on_chip():
    assert on_chip(64, 10_000, 132)
    assert on_chip(65, 132, 132)
    assert on_chip(128, 132, 132)
    assert not on_chip(65, 133, 132)
    assert not on_chip(129, 1, 132)


@pytest.mark.skipif(DEVICE == "cuda", reason="the lanes of a GPU are its own")
@pytest.mark.parametrize("units", [17, 65, 128])
def test_warps_of_64_lanes(monkeypatch, units):
    monkeypatch.setattr(kernels, "device_sizes", lambda _: DeviceSizes(64, 304))
    given = problem(2, 2, units, True)
    want = reference(*given)
    poison(monkeypatch)
    states, gates = rgc_forward_small(*given)
    assert_near(states, want.states)
    assert_near(gates, gates_of(want.saved))


def test_more_rows_than_multiprocessors_go_by_step(monkeypatch):
    monkeypatch.setattr(kernels, "device_sizes", lambda _: DeviceSizes(32, 2))
    monkeypatch.setattr(kernels, "_small", lambda *_: "on chip")
    monkeypatch.setattr(kernels, "_by_step", lambda *_: "by step")
    assert rgc_forward(*problem(1, 2, 65, False)) == "on chip"
    assert rgc_forward(*problem(1, 3, 65, False)) == "by step"
    assert rgc_forward(*problem(1, 3, 64, False)) == "on chip"


@pytest.mark.parametrize(("units", "lanes"), [(1, 32), (63, 32), (100, 32), (128, 64)])
def test_quarters_hold_every_weight(units, lanes):
    """Multiply in the order of the kernel's layout: quarter, group of columns, warp, threads, rows, columns."""
    block = pick_small_config(units, lanes).block
    weights = [random(units, units) for _ in range(4)]
    parts = in_quarters(weights, block, lanes)
    tiles = parts.view(4, 4, block // lanes, block // 16, 8, lanes // 8, 2, 2)
    state = torch.nn.functional.pad(random(units), (0, block - units))
    by_column = state.view(4, block // lanes, lanes // 8, 2)
    ss, ms, mm, sm = weights
    for matrix, weight in zip(tiles, (ss, sm, mm, ms), strict=True):
        product = torch.einsum("qgwrlab,qglb->wra", matrix.double(), by_column.double()).flatten()
        assert_near(product[:units].float(), weight.double() @ state[:units].double())
        assert product[units:].eq(0).all()


def test_pointwise_needs_both_or_neither():
    pre, before, u = random(1, 2, 2, 3), random(2, 1, 3), random(1, 3)
    with pytest.raises(ValueError, match="next_resets and next_before must be given together"):
        rgc_pointwise_(pre, before, u, torch.empty_like(before), next_before=before)
    with pytest.raises(ValueError, match=r"pre must have shape \(1, 2, 2, 3\), got \(1, 2, 1, 3\)"):
        rgc_pointwise_(pre[:, :, :1].contiguous(), before, u, before)
