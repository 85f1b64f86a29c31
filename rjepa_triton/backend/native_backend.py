"""The backend "compile": C++ for the CPU, built on first use (`native/`).

It serves Γ of up to four states a unit by one pass over memory a step or chunk. As one call each it also serves the
loops over time of every cell that can be traced, which C++ is written for (`native/generated.py`), their linearization,
dual form and exact credit, and the reverse scan of a small layer; all in float32 and float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cells.trace import traced
from ..cells.two_point import Cell, Linearization, Matrix, Trajectory
from . import table
from .buffers import ReusedMemory
from .descent import Descent
from .native import calls, generated, library
from .table import Backend, Reason, Refusal

if TYPE_CHECKING:
    from .operations import GammaSteps, StateArrays

# A loop over time is one call of compiled code up to so many batch rows: as far as it was timed, and faster than
# torch's. With fewer steps than FEW_STEPS, for which the weights are laid out anew or read as they are, it must also
# have few rows, or few units.
LOOP_ROWS = 128
FEW_STEPS, FEW_ROWS, FEW_UNITS = 4, 8, 128
# The reverse scan is compiled code's up to so many numbers B·N, where torch runs a step of two states on one thread.
REVERSE_NUMBERS = 1 << 14


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return library.compiler()


def _no_loops(device: torch.device, dtype: torch.dtype) -> Reason:
    if device.type != "cpu":
        return f"compiled code serves CPU tensors, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"compiled loops compute in float32 or float64, got {dtype}"
    # under torch.compile torch runs, and no program is looked for
    return None if torch.compiler.is_compiling() else _no_compiler()


def _no_compiler() -> Reason:
    if cpp_compiler():
        return None
    library.tell_of_no_compiler()
    return "no C++ compiler was found"


def _no_gamma(device: torch.device, dtype: torch.dtype, gamma_dtype: torch.dtype, states: int) -> Reason:
    if device.type != "cpu":
        return f"compiled code serves CPU tensors, got {device}"
    if gamma_dtype != dtype:
        return "gamma_dtype differs from the layer's dtype"
    if dtype not in (torch.float32, torch.float64):
        return f"compiled code takes Γ in float32 or float64, got {dtype}"
    if states > calls.MOST_STATES:
        return f"compiled code takes up to {calls.MOST_STATES} states a unit, got {states}"
    return _no_compiler()


NATIVE = Backend("compile", "cpu", "one pass over Γ a step", _no_loops, _no_gamma, traceable=False)


def compiled_loop(cell: Cell, weights: Sequence[Tensor], steps: int, batch: int) -> bool:
    """Whether the cell's loop over T = `steps`, B = `batch` is one call. Of the weights only the shapes count."""
    if batch > LOOP_ROWS or not compiled_partials(cell):
        return False
    if steps >= FEW_STEPS or batch <= FEW_ROWS:
        return True
    units = (weight.shape[0] * (weight.shape[1] if weight.dim() == 3 else 1) for weight in weights)
    return max(units, default=1) <= FEW_UNITS


def compiled_partials(cell: Cell) -> bool:
    """Whether the cell's linearization is one call: whether the cell can be traced."""
    return traced(cell) is not None


def one_pass(cell: Cell, learning: str, backend: str) -> bool:
    """Whether `operations.dual_of` is one call of compiled code."""
    return backend == NATIVE.name and learning == "rfp" and compiled_partials(cell)


def compiled_reverse(numbers: int) -> bool:
    """Whether the reverse scan over `numbers` of B·N is one call."""
    return numbers <= REVERSE_NUMBERS


def _unusable(
    *tensors: Tensor | None, given: Sequence[Tensor | None] = (), states: int = 1
) -> Refusal | None:
    """Why compiled code can't be given the addresses of these tensors, or None. states: of a unit, in passes over Γ.

    given: those that may be as a user or autograd made them, which takes longer to check. The others this package made
    of them, by operations of torch, which give tensors with memory of their own.
    """
    # `all` of a generator takes longer, and a step of a small layer asks three times
    for group in (tensors, given):
        for tensor in group:
            if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
                return Refusal(
                    f"compiled code takes tensors with memory of their own, got {type(tensor).__name__}"
                )
    if refusal := table.not_in_memory(*given):
        return refusal
    return None if library.gamma(states) is not None else Refusal("the library could not be built")


def _loops(cell: Cell) -> generated.Loops | Refusal:
    """The cell's compiled loops."""
    found = generated.loops(cell)
    if found is None:
        return Refusal("the cell can't be traced")
    return found if found.code is not None else Refusal("the cell's loops could not be built")


def not_finite(a: Tensor, b: Tensor) -> bool | Refusal:
    """Whether one of the numbers of two clones is NaN or infinite, outside of torch.compile's tracing.

    A clone fills its memory, as `calls.not_finite` needs it.
    """
    if type(a) is not Tensor or type(b) is not Tensor or library.library() is None:
        return Refusal("compiled code takes tensors with memory of their own, and a library")
    return calls.not_finite(a, b)


def _loop_of(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> generated.Loops | Refusal:
    """The compiled loops that take these tensors over the steps of x (J, T, B, N)."""
    if not compiled_loop(cell, weights, x.shape[1], x.shape[2]):
        return Refusal("there is no compiled loop of this cell, or not of these sizes")
    return _unusable(given=(x, resets, *weights, *state)) or _loops(cell)


@NATIVE.implements("scan")
def scan(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    keep: bool = True,
) -> Trajectory | Refusal:
    code = _loop_of(cell, x, weights, state, resets)
    if isinstance(code, Refusal):
        return code
    states, saved = code.scan(x, weights, state, resets, keep)
    return Trajectory(x, states, saved, resets)


@NATIVE.implements("advance")
def advance(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], products: Sequence[Tensor | None], state: Tensor
) -> tuple[Tensor, Tensor] | Refusal:
    if not compiled_partials(cell):
        return Refusal("there is no compiled loop of this cell")
    if refusal := _unusable(given=(x, state, *weights, *products)):
        return refusal
    code = _loops(cell)
    return code if isinstance(code, Refusal) else code.advance(x, weights, products, state)


@NATIVE.implements("linearize")
def linearize(
    cell: Cell, trajectory: Trajectory, weights: Sequence[Tensor], rule: str = "rfp"
) -> tuple[Linearization, Tensor] | Refusal:
    if not compiled_partials(cell):
        return Refusal("there is no compiled linearization of this cell")
    if refusal := _unusable(
        trajectory.states, trajectory.saved, given=(trajectory.x, trajectory.resets, *weights)
    ):
        return refusal
    code = _loops(cell)
    if isinstance(code, Refusal):
        return code
    before = trajectory.before
    partials, m = code.linearize(trajectory, before, weights, rule)
    return Linearization(partials, before, trajectory.resets), m


@NATIVE.implements("step")
def step(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None = None,
    rule: str = "rfp",
) -> tuple[Tensor, Linearization, Tensor] | Refusal:
    """In one call, but for resets of several steps: then `scan` and `linearize` one after the other."""
    code = _loop_of(cell, x, weights, (state,), resets)
    if isinstance(code, Refusal):
        return code
    if resets is None or x.shape[1] == 1:
        return code.step(x, weights, state, resets, rule)
    trajectory = Trajectory(x, *code.scan(x, weights, state.unbind(0), resets), resets)
    before = trajectory.before
    partials, m = code.linearize(trajectory, before, weights, rule)
    return trajectory.after, Linearization(partials, before, resets).without_own(), m


def _no_exact_pass(cell: Cell, weights: Sequence[Tensor], steps: int, batch: int) -> Refusal | None:
    """Why BPTT's credits of these sizes aren't one call, or None."""
    dense = bool(weights) and all(weight.dim() == 2 for weight in weights)
    if dense and steps * batch >= calls.PACKED_FROM and compiled_loop(cell, weights, steps, batch):
        return None
    return Refusal("there is no compiled backward pass of this cell, or not of these sizes")


@NATIVE.implements("exact_credits")
def exact_credits(
    cell: Cell, lin: Linearization, weights: Sequence[Tensor], delta: Tensor, carry: Tensor | None = None
) -> tuple[Tensor, Tensor] | Refusal:
    refusal = _no_exact_pass(cell, weights, *delta.shape[1:3]) or _unusable(
        lin.before, given=(delta, carry, lin.resets, *weights)
    )
    return refusal or calls.exact_credits(lin, cell.matrices, weights, delta, carry)


@NATIVE.implements("exact_of")
def exact_of(
    cell: Cell, trajectory: Trajectory, weights: Sequence[Tensor], delta: StateArrays
) -> tuple[Iterable[Tensor], Tensor, Tensor] | Refusal:
    refusal = _no_exact_pass(cell, weights, *trajectory.x.shape[1:3]) or _unusable(
        trajectory.states, trajectory.saved, given=(*delta, trajectory.x, trajectory.resets, *weights)
    )
    if refusal:
        return refusal
    code = _loops(cell)
    return code if isinstance(code, Refusal) else code.exact(trajectory, weights, delta)


@NATIVE.implements("reverse_scan")
def reverse_scan(
    m: Tensor, delta: Tensor, carry: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor] | Refusal:
    if not compiled_reverse(delta.shape[2] * delta.shape[3]):
        return Refusal("torch is as fast on so many rows and units")
    if refusal := _unusable(given=(m, delta, carry)):
        return refusal
    return calls.reverse_scan(m, delta, carry)


@NATIVE.implements("dual_of")
def dual_of(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: StateArrays,
    matrices: Sequence[Matrix],
    inputs: int,
    learning: str,
    carry: Tensor | None = None,
) -> tuple[Iterable[Tensor], Tensor, Tensor] | Refusal:
    if not one_pass(cell, learning, NATIVE.name):
        return Refusal("there is no compiled dual form of this cell or rule")
    if refusal := _unusable(
        trajectory.states, trajectory.saved, given=(*delta, carry, trajectory.x, trajectory.resets, *weights)
    ):
        return refusal
    code = _loops(cell)
    return code if isinstance(code, Refusal) else code.dual(trajectory, weights, delta, carry)


@NATIVE.implements("gamma_step_")
def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    *,
    rng_state: Tensor | None = None,
    memory: ReusedMemory | None = None,
) -> Tensor | Refusal | None:
    if refusal := _unusable(*gammas, given=(m, phi, y, delta), states=len(gammas)):
        return refusal
    return calls.gamma_pass(gammas, m, phi[:, None], y[None], delta, memory=memory)


def _read_by(
    gammas: Sequence[Tensor], steps: GammaSteps, given: Sequence[Tensor | None]
) -> tuple[list[int | None], list[int], int, list[Tensor | None]] | Refusal:
    """The addresses of φ, S·K of (T, B, N), and of y, K of (T, B, Y), Y, and the tensors that they are of."""
    lin, matrices = steps.lin, steps.matrices
    states = [matrix.reads for matrix in matrices if isinstance(matrix.reads, int)]
    if (
        isinstance(lin, generated.JoinedLinearization)
        and lin.made is not None
        and len(states) == len(matrices)
    ):
        refusal = _unusable(*gammas, steps.m, lin.made, given=given, states=len(gammas))
        return refusal or (
            lin.phi_at(matrices), [lin.state_at(nu) for nu in states], steps.m.shape[4], [lin.made]
        )  # fmt: skip
    given = (steps.inputs, *given)
    if refusal := _unusable(*gammas, steps.m, lin.before, given=given, states=len(gammas)):
        return refusal
    phi = [None if a is None else a.contiguous() for a in steps.phi_apart]
    y = [a.contiguous() for a in steps.y_apart]
    return generated.addresses(phi), [a.data_ptr() for a in y], y[0].shape[2], [*phi, *y]


@NATIVE.implements("gamma_step_of_")
def gamma_step_of_(
    gammas: Sequence[Tensor],
    steps: GammaSteps,
    t: int,
    *,
    rng_state: Tensor | None = None,
    memory: ReusedMemory | None = None,
    descent: Descent | None = None,
) -> Tensor | Refusal | None:
    written = () if descent is None else descent.weights
    found = _read_by(gammas, steps, (steps.delta, *written))
    if isinstance(found, Refusal):
        return found
    phi, y, reads, _held = found  # whose memory isn't freed before the call is over
    taken = None if descent is None else (descent.weights, descent.lr.item())
    return calls.gamma_step(gammas, steps.m, phi, y, reads, steps.delta, t, memory, taken)


@NATIVE.implements("gamma_chunk_of_")
def gamma_chunk_of_(
    gammas: Sequence[Tensor],
    steps: GammaSteps,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
) -> Tensor | Refusal | None:
    found = _read_by(gammas, steps, (credit,))
    if isinstance(found, Refusal):
        return found
    phi, y, reads, _held = found
    return calls.gamma_chunk(gammas, steps.m, phi, y, reads, credit, memory)


@NATIVE.implements("gamma_chunk_")
def gamma_chunk_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
) -> Tensor | Refusal | None:
    if refusal := _unusable(*gammas, given=(m, phi, y, credit), states=len(gammas)):
        return refusal
    arrived, whole = calls.arriving(m, phi)
    return calls.gamma_pass(gammas, whole, arrived, y, credit, before=True, memory=memory)


@NATIVE.implements("gamma_read")
def gamma_read(
    gammas: Sequence[Tensor], credit: Tensor, *, memory: ReusedMemory | None = None
) -> Tensor | Refusal:
    if refusal := _unusable(*gammas, given=(credit,), states=len(gammas)):
        return refusal
    gradient = calls.gamma_pass(gammas, None, None, None, credit, memory=memory)
    assert gradient is not None
    return gradient
