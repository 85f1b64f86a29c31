"""The RGC's partials, and the dual form that makes them on the fly, against float64: interpreted, or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_problems import DEVICE, check_error, poison
from rgc_problems import TRAJECTORY_ERRORS, assert_near, gates_of, problem, random, reference
from torch import Tensor

from rjepa_triton.cells import weights as weight_ops
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.cells.two_point import Linearization
from rjepa_triton.rules import rfp

pytest.importorskip("triton")

from rjepa_triton.kernels import rgc_partials as module
from rjepa_triton.kernels.reverse_scan import ScanConfig
from rjepa_triton.kernels.rgc_partials import (
    Config,
    Dual,
    pick_config,
    pick_dual_config,
    rgc_dual,
    rgc_linearize,
)

# Triton 3.6's interpreter converts one-element arrays to ints, which newer versions of NumPy will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# The arguments and each sum and product are rounded by 2⁻²⁴; an error of λ lasts some ten steps.
TOLERANCE = 4e-6
CELL = RGCCell()
# T, B, N. One unit; a tail; batch rows that four divides, or that end inside a program; more than one program.
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 3, 63), (5, 3, 1), (5, 2, 64), (7, 3, 20), (6, 2, 127), (5, 1, 132)], ids=str
)


def _problem(
    steps: int, batch: int, units: int, with_resets: bool, diagonal: bool = False
) -> tuple[dict[str, Any], Linearization, Tensor]:
    """The arguments of `rgc_dual`, rounded from a float64 trajectory; that trajectory's linearization and M.

    States before a reset are NaN, because they must not be read.
    """
    x, weights, state, resets = problem(steps, batch, units, with_resets)
    if diagonal:
        weights = [random(units) for _ in range(4)]
    trajectory = reference(x, weights, state, resets)
    lin = CELL.linearize(trajectory)
    before = trajectory.states[:, :-1].float()
    arguments = {
        "gates": gates_of(trajectory.saved.float()),
        "before": before if resets is None else before.masked_fill(resets[..., None], math.nan),
        "u": x,
        "own": [weight_ops.own(w) for w in weights],
        "delta": random(2, steps, batch, units),
        "resets": resets,
    }
    return arguments, lin, rfp.transition(lin, CELL.matrices, [w.double() for w in weights])


def _linearized(arguments: dict[str, Any]) -> Tensor:
    return rgc_linearize(**{name: arguments[name] for name in ("gates", "before", "u", "own", "resets")})


def _assert_is_dual(
    found: Dual, arguments: dict[str, Any], lin: Linearization, m: Tensor, tolerance: float = TOLERANCE
) -> None:
    carry = arguments.get("carry")
    delta = arguments["delta"].double()
    credit, passed = rfp.reverse_scan(m, delta, None if carry is None else carry.double())
    ss, ms, mm, sm = (rfp.entering_credit(matrix, lin, credit) for matrix in CELL.matrices)
    entering = torch.stack([torch.stack([ss, sm], -2), torch.stack([mm, ms], -2)], 2)
    assert_near(found.entering, entering, tolerance)
    assert_near(found.for_input, rfp.input_gradient(lin, credit, 1)[0], tolerance)
    assert_near(found.passed, passed, tolerance)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scan is split into blocks of three steps; the last may be shorter."""
    monkeypatch.setattr(module, "pick_dual_config", lambda *_: ScanConfig(128, 4, 3))


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@SHAPES
def test_partials_are_the_reference(
    shape: tuple[int, int, int], diagonal: bool, with_resets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, lin, m = _problem(*shape, with_resets, diagonal)
    poison(monkeypatch)
    found = _linearized(arguments)
    phi = [next(iter(lin.immediate(matrix).values())) for matrix in CELL.matrices]
    (by_state,) = lin.partials.input
    assert_near(found, torch.stack([*phi, by_state[0], by_state[1], *m.flatten(0, 1)]), TOLERANCE)


def test_a_program_of_partials_takes_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, _, _ = _problem(7, 2, 70, True)
    one = _linearized(arguments)
    monkeypatch.setattr(module, "pick_config", lambda *_: Config(128, 3))
    assert torch.equal(_linearized(arguments), one)


def _check_dual(shape: tuple[int, int, int], with_resets: bool, with_carry: bool, diagonal: bool) -> None:
    arguments, lin, m = _problem(*shape, with_resets, diagonal)
    if with_carry:
        arguments["carry"] = random(2, *shape[1:])
    _assert_is_dual(rgc_dual(**arguments), arguments, lin, m)


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
@SHAPES
def test_the_dual_form_is_the_reference(
    shape: tuple[int, int, int], with_resets: bool, with_carry: bool
) -> None:
    _check_dual(shape, with_resets, with_carry, diagonal=with_carry)


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
@SHAPES
@pytest.mark.usefixtures("by_blocks")
def test_blocks_of_time_are_the_reference(
    shape: tuple[int, int, int], with_resets: bool, with_carry: bool
) -> None:
    _check_dual(shape, with_resets, with_carry, diagonal=not with_carry)


@pytest.mark.parametrize("with_resets", [False, True])
def test_a_long_sequence(with_resets: bool) -> None:
    """The sequence is split into blocks of time as they are picked, and the last one is shorter."""
    assert pick_dual_config(300, 63, 32, 132).steps == 13
    _check_dual((300, 1, 63), with_resets, True, False)


def test_chunks_add_up_to_the_whole() -> None:
    arguments, _, _ = _problem(9, 2, 20, True)
    whole = rgc_dual(**arguments)
    at = {
        name: 0 if name in ("gates", "u", "resets") else 1
        for name in ("gates", "before", "u", "delta", "resets")
    }
    late, early = (
        {name: arguments[name].narrow(at[name], first, count).contiguous() for name in at}
        for first, count in ((4, 5), (0, 4))
    )
    after = rgc_dual(**late, own=arguments["own"])
    first = rgc_dual(**early, own=arguments["own"], carry=after.passed)
    assert_near(torch.cat([first.entering, after.entering]), whole.entering.double())
    assert_near(torch.cat([first.for_input, after.for_input]), whole.for_input.double())
    assert_near(first.passed, whole.passed.double())


def _check_reset() -> None:
    arguments, _, _ = _problem(7, 2, 5, False)
    arguments["resets"] = torch.zeros(7, 2, dtype=torch.bool, device=DEVICE)
    arguments["resets"][4] = True
    found = rgc_dual(**arguments)
    arguments["delta"][:, 4:] *= 1e30
    again = rgc_dual(**arguments)
    assert torch.equal(found.entering[:4], again.entering[:4])
    assert torch.equal(found.passed, again.passed)


def test_nothing_passes_a_reset_however_large() -> None:
    _check_reset()


@pytest.mark.usefixtures("by_blocks")
def test_nothing_passes_a_reset_from_block_to_block() -> None:
    _check_reset()


def _check_repeats(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
    """Runs on memory that was NaN, and with strided states and weights and resets in bytes, agree in every bit."""
    arguments["carry"] = random(2, *arguments["u"].shape[1:])
    kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    first = [_linearized(arguments), *rgc_dual(**arguments)]
    poison(monkeypatch)
    again = [_linearized(arguments), *rgc_dual(**arguments)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for name, value in kept.items():
        torch.testing.assert_close(arguments[name], value, rtol=0, atol=0, equal_nan=True)

    shape, numbers = arguments["u"].shape, arguments["u"].numel()
    for beyond in (1, 4):  # with 4, a stride that four divides stays one
        wide = torch.full((2, numbers + beyond), math.nan, device=DEVICE)
        wide[:, :numbers] = arguments["before"].flatten(1)
        strided = {
            **arguments,
            "before": wide[:, :numbers].view(2, *shape),
            "own": [torch.diag(w).diagonal() for w in arguments["own"][:3]]
            + [arguments["own"][3].contiguous()],
            "resets": arguments["resets"].to(torch.uint8),
        }
        found = [_linearized(strided), *rgc_dual(**strided)]
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("units", [20, 43])
def test_two_runs_agree_in_every_bit_whatever_the_strides(
    units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_repeats(monkeypatch, _problem(5, 3, units, True)[0])


@pytest.mark.parametrize("units", [20, 43])
@pytest.mark.usefixtures("by_blocks")
def test_two_runs_by_blocks_agree_too(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_repeats(monkeypatch, _problem(7, 3, units, True)[0])


@pytest.mark.parametrize(
    ("steps", "units", "picked"),
    [
        (1, 1, (128, 1)),
        # 32 programs for each of 132 multiprocessors
        (100, 32 * 1024, (128, 6)),
        (100, 8 * 1024, (128, 1)),
        (400, 64 * 1024, (128, 8)),
    ],
)
def test_pick_config(steps: int, units: int, picked: tuple[int, int]) -> None:
    assert pick_config(steps, units, 32, 132) == picked
    assert pick_config(1, 1, 64, 304) == (256, 1)


@pytest.mark.parametrize(
    ("steps", "units", "picked"),
    [
        (255, 1, (128, 4, 255)),
        (256, 1, (128, 4, 12)),
        (4096, 64, (128, 4, 46)),
        # 128 units move 128·23 numbers per step, and 132 multiprocessors 132·1024 while they wait for it: 45 programs
        (4096, 128 * 45, (128, 4, 179)),
        (4096, 128 * 46, (128, 4, 4096)),
        (100, 32 * 1024, (128, 4, 100)),
    ],
)
def test_pick_dual_config(steps: int, units: int, picked: tuple[int, int, int]) -> None:
    assert pick_dual_config(steps, units, 32, 132) == picked
    assert pick_dual_config(64, 64, 64, 304) == (256, 3, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *TRAJECTORY_ERRORS,
        ({"own": [torch.zeros(5)] * 3}, ValueError, "own must hold 4 tensors, got 3"),
        ({"own": [torch.zeros(5, 5)] * 4}, ValueError, r"own\[0\] must have shape \(5,\), got \(5, 5\)"),
        ({"carry": torch.zeros(3, 5)}, ValueError, r"carry must have shape \(2, 3, 5\)"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments, _, _ = _problem(2, 3, 5, True)
    calls: list[Callable[..., object]] = [rgc_dual]
    if not {"delta", "carry"} & change.keys():
        calls.append(lambda **given: _linearized(given))
    for call in calls:
        check_error(call, arguments, change, error, message)
