"""The backend "triton": kernels for CUDA and ROCm GPUs (`rjepa_triton.kernels`).

It computes in float32; Γ may be kept in bfloat16. Under TRITON_INTERPRET=1 kernels also take CPU tensors, for tests.
Triton and the kernels are imported when they are first needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.trace import by_kind, traced
from ..cells.two_point import (
    ByState,
    Cell,
    Linearization,
    Matrix,
    Partials,
    Products,
    Trajectory,
    state_read,
)
from ..rules import rfp
from ..rules.rtrl import ExactSensitivity
from . import triton_cells
from .buffers import ReusedMemory
from .descent import Descent
from .table import Backend, Reason, Refusal, not_in_memory

if TYPE_CHECKING:
    from .operations import GammaSteps, StateArrays

HEAD_UNITS = 64  # hidden units of a head that the kernel of exact RTRL takes
HEAD_ROWS = 128  # states times units of such a head
MAX_STATES = 4  # states a unit that kernels take
# One launch runs the whole loop up to SMALL_UNITS units whatever the batch, up to ON_CHIP_UNITS where there are no more
# batch rows than the GPU has multiprocessors; WEIGHT_REGISTERS: registers of a thread that all weights may take.
SMALL_UNITS, ON_CHIP_UNITS, WEIGHT_REGISTERS = 64, 128, 128
STEP_ROWS = 8  # batch rows up to which a step and its linearization are one launch
MULTIPROCESSORS = 132  # of the GPU for which work is counted where there is none, an H100

NOT_DENSE = Refusal("the kernel takes dense recurrent weights")
UNTRACED = Refusal("the cell can't be traced")
NOT_RFP = Refusal("kernels linearize by RFP's rule")
MANY_STATES = Refusal(f"kernels take up to {MAX_STATES} states a unit")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def no_triton(device: torch.device, dtype: torch.dtype) -> Reason:
    """Why kernels can't serve tensors of this device and dtype, or None if they can."""
    if not _has_triton():
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"kernels need a CUDA or ROCm tensor, or TRITON_INTERPRET=1 from the start, got {device}"
    if dtype != torch.float32:
        return f"kernels compute in float32, got {dtype}"
    return None


def _no_gamma(device: torch.device, dtype: torch.dtype, gamma_dtype: torch.dtype, states: int) -> Reason:
    reason = no_triton(device, dtype)
    if reason is None and gamma_dtype not in (torch.float32, torch.bfloat16):
        return f"kernels take Γ in float32 or bfloat16, got {gamma_dtype}"
    if reason is None and states > MAX_STATES:
        return f"kernels take up to {MAX_STATES} states a unit, got {states}"
    return reason


def _failures() -> tuple[type[BaseException], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


TRITON = Backend("triton", "cuda", "one pass over Γ a step", no_triton, _no_gamma, failures=_failures)


def is_dense(cell: Cell, weights: Sequence[Tensor]) -> bool:
    """Whether the cell has recurrent weights, and all of them are dense."""
    return bool(cell.matrices) and all(weight.dim() == 2 for weight in weights)


def one_launch(cell: Cell, weights: Sequence[Tensor], batch: int) -> bool:
    """Whether the loop over `batch` rows is one launch for all steps, with the weights on chip.

    As `kernels.cell_on_chip.on_chip` decides for the weights' GPU; for an H100 if the weights lie elsewhere.
    """
    if not is_dense(cell, weights) or traced(cell) is None:
        return False
    units, device, count = weights[0].shape[0], weights[0].device, len(weights)
    if not 0 < units <= ON_CHIP_UNITS or count * units**2 > 4 * ON_CHIP_UNITS**2:
        return False
    warp, multiprocessors = 32, MULTIPROCESSORS
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        warp, multiprocessors = about.warp_size, about.multi_processor_count
    block = max(warp, 1 << (units - 1).bit_length())
    all_held = 16 * block * count <= WEIGHT_REGISTERS * warp
    return (all_held and units <= SMALL_UNITS) or (
        (all_held or len(cell.per_unit) == 1) and batch <= multiprocessors
    )


def step_calls(cell: Cell) -> int:
    """Calls a step of a loop that isn't one launch: the matrix products, and a launch.

    The products of all states are one call where each is read by as many matrices (`Products`).
    """
    readers = Counter(state_read(matrix) for matrix in cell.matrices)
    return (1 if len(set(readers.values())) == 1 else len(readers)) + 1


def _unusable(*tensors: Tensor | None) -> Refusal | None:
    """Why kernels can't be given the addresses of tensors that may be as a user or autograd made them, or None."""
    return None if torch.compiler.is_compiling() else not_in_memory(*tensors)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@TRITON.implements("scan")
def scan(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    keep: bool = True,
) -> Trajectory | Refusal:
    if refusal := _unusable(x, resets, *weights, *state):
        return refusal
    if not one_launch(cell, weights, x.shape[2]):
        return _scan_by_step(cell, x, weights, state, resets, keep)
    made = triton_cells.kernels_of(cell)
    assert made is not None
    from ..kernels import cell_on_chip as kernels

    given, initial = ([a.contiguous() for a in group] for group in (weights, state))
    x = x.contiguous()
    states, saved = kernels.cell_forward(made.functions, x, given, initial, _contiguous(resets), save=keep)
    return Trajectory(x, states, x.new_empty(0) if saved is None else saved.movedim(2, 0), resets)


def _scan_by_step(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None,
    keep: bool,
) -> Trajectory | Refusal:
    """Each step is a product for each state that matrices read, by torch, and one launch."""
    made = triton_cells.kernels_of(cell)
    if made is None:
        return UNTRACED
    from ..kernels import cell_forward as kernels

    _, steps, batch, units = x.shape
    x = x.contiguous()
    states = x.new_empty(len(state), steps + 1, batch, units)
    for nu, initial in enumerate(state):
        states[nu, 0] = initial
    saved = x.new_empty(steps, batch, made.functions.saves, units) if keep else x.new_empty(0)
    products = Products(cell, weights, states[0, 0], steps)
    x_at, states_at = x.unbind(1), states.unbind(1)
    saved_at = saved.unbind(0) if keep and made.functions.saves else [None] * steps
    before = states_at[0] if resets is None else states_at[0].masked_fill(resets[0, :, None], 0)
    for t in range(steps):
        products.multiply(before)
        marks = None if resets is None or t == steps - 1 else resets[t + 1].contiguous()
        kernels.cell_pointwise_(
            made.functions,
            products.products,
            x_at[t],
            before,
            states_at[t + 1],
            saved_at[t],
            marks,
            None if marks is None else before,
        )
        if resets is None:
            before = states_at[t + 1]
    return Trajectory(x, states, saved.movedim(2, 0) if keep else saved, resets)


@TRITON.implements("linearize")
def linearize(
    cell: Cell, trajectory: Trajectory, weights: Sequence[Tensor], rule: str = "rfp"
) -> tuple[Linearization, Tensor] | Refusal:
    if rule != "rfp":
        return NOT_RFP
    if refusal := _unusable(trajectory.x, *weights):
        return refusal
    return _linearize(cell, trajectory, weights)


def _linearize(
    cell: Cell, trajectory: Trajectory, weights: Sequence[Tensor]
) -> tuple[Linearization, Tensor] | Refusal:
    made = triton_cells.kernels_of(cell)
    if made is None:
        return UNTRACED
    from ..kernels import cell_partials as kernels

    given = _of_trajectory(trajectory, weights)
    out = kernels.cell_linearize(made.functions, *given)
    new, states = made.functions.partials_found, made.functions.states
    found = [*out[:new].unbind(0), *[trajectory.saved[k] for k in made.known]]
    lin = Linearization(Partials(*by_kind(made.entries, found)), trajectory.before, trajectory.resets)
    return lin, out[new:].unflatten(0, (states, states))


def _of_trajectory(
    trajectory: Trajectory, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor | None]:
    """What `kernels.cell_partials` takes: x, saved, states before, own weights and resets."""
    before = trajectory.states[:, :-1]
    return (
        trajectory.x.contiguous(),
        trajectory.saved.movedim(0, 2).contiguous(),
        before if before[0].is_contiguous() else before.contiguous(),
        [weight_ops.own(weight) for weight in weights],
        _contiguous(trajectory.resets),
    )


@TRITON.implements("step")
def step(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None = None,
    rule: str = "rfp",
) -> tuple[Tensor, Linearization, Tensor] | Refusal:
    if x.shape[1] != 1 or x.shape[2] > STEP_ROWS or rule != "rfp":
        return Refusal(f"the kernel takes one step of up to {STEP_ROWS} batch rows, by RFP's rule")
    if not is_dense(cell, weights):
        return NOT_DENSE
    if refusal := _unusable(x, state, resets, *weights):
        return refusal
    made = triton_cells.kernels_of(cell)
    if made is None:
        return UNTRACED
    from ..kernels import cell_step as kernels

    dense, marks = [w.contiguous() for w in weights], None if resets is None else resets[0].contiguous()
    found = kernels.cell_step(made.functions, x[:, 0].contiguous(), dense, state.contiguous(), marks)
    partials, m = partials_of_step(made, found.partials[:, None])
    return found.after[:, None], Linearization(partials, found.before[:, None], resets), m


def partials_of_step(made: triton_cells.Kernels, planes: Tensor) -> tuple[Partials, Tensor]:
    """Partials and M (S, S, …, N) as views of the arrays (P + S², …, N) that `kernels.cell_step` writes.

    Those of the states through no matrix are left out: RFP needs them in M alone.
    """
    values: dict[int, Tensor] = dict(zip(made.needed, planes, strict=False))
    gate, by_input = by_kind(made.entries[1:], values)
    states = made.functions.states
    m = planes[len(made.needed) :].unflatten(0, (states, states))
    return Partials(own=[], gate=gate, input=by_input), m


@TRITON.implements("exact")
def exact(
    cell: Cell, trajectory: Trajectory, lin: Linearization, weights: Sequence[Tensor], delta: Tensor
) -> tuple[Iterable[Tensor], Tensor, Tensor] | Refusal:
    if not is_dense(cell, weights):
        return NOT_DENSE
    if refusal := _unusable(delta, trajectory.x, *weights):
        return refusal
    made = triton_cells.kernels_of(cell)
    if made is None:
        return UNTRACED
    from ..kernels import cell_backward as kernels

    x, saved, _, _, resets = _of_trajectory(trajectory, weights)
    before = lin.before if lin.before[0].is_contiguous() else lin.before.contiguous()
    dense = [weight.contiguous() for weight in weights]
    credits = kernels.cell_credits(made.functions, x, saved, before, dense, delta.contiguous(), resets)
    place = {k: at for at, k in enumerate(made.functions.order)}
    in_turn = (credits.entering[:, :, place[k]] for k in range(len(weights)))
    return in_turn, credits.for_input, credits.passed


@TRITON.implements("reverse_scan")
def reverse_scan(
    m: Tensor, delta: Tensor, carry: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor] | Refusal:
    if delta.shape[1] == 1:
        return Refusal("a scan of one step is two products")
    if delta.shape[0] > MAX_STATES:
        return MANY_STATES
    if refusal := _unusable(m, delta, carry):
        return refusal
    from ..kernels import reverse_scan as kernels

    return kernels.reverse_scan(m.contiguous(), delta.contiguous(), _contiguous(carry))


@TRITON.implements("affine_scan")
def affine_scan(m: Tensor, r: Tensor) -> Tensor | Refusal:
    """The scan forward in time is the one backward, with time turned round and M transposed.

    λ(t') = c(T + 1 - t') for t' = 1 … T: there M(t' + 1)ᵀ does to the credit what M(T + 1 - t') does to c.
    """
    steps = r.shape[1]
    if steps == 1:
        return Refusal("a scan of one step is two products")
    order = torch.arange(steps, 0, -1, device=r.device) % steps
    made = reverse_scan(m.transpose(0, 1).index_select(2, order), r.flip(1))
    return made if isinstance(made, Refusal) else made[0].flip(1)


@TRITON.implements("dual_of")
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
    if learning != "rfp":
        return NOT_RFP
    if refusal := _unusable(*delta, carry, trajectory.x, *weights):
        return refusal
    return _dual_of(cell, trajectory, weights, delta, inputs, carry)


def _dual_of(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: StateArrays,
    inputs: int,
    carry: Tensor | None,
) -> tuple[Iterable[Tensor], Tensor, Tensor] | Refusal:
    made = triton_cells.kernels_of(cell)
    if made is None:
        return UNTRACED
    from ..kernels import cell_partials as kernels

    x, saved, before, own, resets = _of_trajectory(trajectory, weights)
    by_matrix, by_input, written = made.planes.make(x)
    source = [_contiguous(one) for one in delta]
    first = kernels.cell_dual(
        made.functions, x, saved, before, own, source, written, resets, _contiguous(carry)
    )
    return by_matrix, by_input[:inputs], first


@TRITON.implements("dual")
def dual(
    lin: Linearization,
    m: Tensor,
    delta: Tensor,
    matrices: Sequence[Matrix],
    inputs: int,
    carry: Tensor | None = None,
) -> tuple[Iterable[Tensor], Tensor, Tensor] | Refusal:
    """One pass, in which λ is not written, and what a matrix and an input share is written once."""
    if carry is not None:
        return Refusal("the kernel takes no credit from later steps")
    if delta.shape[0] > MAX_STATES:
        return MANY_STATES
    if refusal := _unusable(delta):
        return refusal
    from ..kernels import reverse_scan as kernels

    given = [_all_contiguous(by_state) for by_state in lin.partials.input[:inputs]]
    # several matrices may enter one gate, and an input may drive a gate as well: each place is computed once
    place = {id(by_state): j for j, by_state in enumerate(lin.partials.input[:inputs])}
    apart: list[ByState] = []
    for matrix in matrices:
        by_state = lin.immediate(matrix)
        if id(by_state) not in place:
            place[id(by_state)] = inputs + len(apart)
            apart.append(_all_contiguous(by_state))
    entering, for_inputs, first = kernels.reverse_scan_entering(
        m.contiguous(), delta.contiguous(), apart, given
    )
    found = [*for_inputs.unbind(0), *entering.unbind(0)]
    return [found[place[id(lin.immediate(matrix))]] for matrix in matrices], for_inputs, first


def _all_contiguous(by_state: ByState) -> ByState:
    return {nu: partial.contiguous() for nu, partial in by_state.items()}


@TRITON.implements("gamma_step_")
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
    if refusal := _unusable(m, phi, y, delta):
        return refusal
    from ..kernels import gamma_step as kernels

    return kernels.gamma_step_(gammas, m, phi, y.contiguous(), delta, rng_state=rng_state)


@TRITON.implements("gamma_step_of_")
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
    if refusal := _unusable(steps.inputs, steps.delta, *written):
        return refusal
    from ..kernels import gamma_step as kernels

    if steps.lin.resets is not None:
        kernels.forget_(gammas, steps.lin.resets[t].contiguous())
    weights = None
    if descent is not None:
        weights = [w if w is None else w.view(len(w), -1) for w in descent.weights]
    return kernels.gamma_step_(
        gammas,
        steps.m.select(2, t),
        _even_rows([None if each is None else each[t] for each in steps.phi_apart]),
        _even_rows([each[t] for each in steps.y_apart]),
        steps.delta_of(t),
        weights=weights,
        lr=None if descent is None else descent.lr,
        rng_state=rng_state,
    )


_Array = TypeVar("_Array", Tensor, Tensor | None)


def _even_rows(arrays: Sequence[_Array]) -> list[_Array]:
    """(B, ·) arrays with contiguous rows that lie equally far apart in all: as they are, or copied."""
    there = [a for a in arrays if a is not None]
    if len({a.stride(0) for a in there}) <= 1 and all(a.stride(-1) == 1 or a.shape[-1] == 1 for a in there):
        return list(arrays)
    return [None if a is None else a.contiguous() for a in arrays]


@TRITON.implements("gamma_chunk_")
def gamma_chunk_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
) -> Tensor | Refusal | None:
    if y.shape[-1] != gammas[0].shape[-1]:
        return Refusal("each row of Γ reads a number of its own")
    if refusal := _unusable(m, phi, y, credit):
        return refusal
    from ..kernels import gamma_chunk, reverse_scan

    arriving, whole = reverse_scan.arriving(m.contiguous(), phi)
    return gamma_chunk.gamma_chunk_(gammas, whole, arriving, y.contiguous(), _contiguous(credit))


@TRITON.implements("gamma_chunk_of_")
def gamma_chunk_of_(
    gammas: Sequence[Tensor],
    steps: GammaSteps,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
) -> Tensor | Refusal | None:
    return gamma_chunk_(gammas, steps.m, steps.phi, steps.y, credit)


@TRITON.implements("gamma_read")
def gamma_read(
    gammas: Sequence[Tensor], credit: Tensor, *, memory: ReusedMemory | None = None
) -> Tensor | Refusal:
    if refusal := _unusable(credit):
        return refusal
    from ..kernels import gamma_read as kernels

    return kernels.gamma_read(gammas, credit.contiguous())


def _fits_heads(gamma: ExactSensitivity) -> bool:
    """Whether the kernel of exact RTRL by heads takes these sensitivities."""
    size = gamma.units // gamma.heads
    # a diagonal recurrent matrix has no place in the kernel, unless each head is one unit
    diagonal = any(
        len(shape) == 1 and isinstance(gamma.matrices[index].reads, int)
        for shape, indices in gamma.groups
        for index in indices
    )
    # nor have recurrent matrices whose own heads are joined
    joined = any(len(shape) == 3 and shape[0] != gamma.heads for shape, _ in gamma.groups)
    fits = size <= HEAD_UNITS and gamma.states * size <= HEAD_ROWS and gamma.states <= MAX_STATES
    return fits and not (diagonal and size > 1) and not joined


@TRITON.implements("rtrl_step_")
def rtrl_step_(
    cell: Cell,
    gamma: ExactSensitivity,
    group: int,
    jacobian: Tensor,
    lin: Linearization,
    t: int,
    inputs: Tensor | None,
    delta: Tensor | None,
) -> Tensor | Refusal | None:
    if not _fits_heads(gamma):
        return Refusal(f"the kernel takes heads of up to {HEAD_UNITS} units and {HEAD_ROWS} states in all")
    matrices = [gamma.matrices[i] for i in gamma.groups[group][1]]
    fan_in = gamma.gammas[group].shape[-1]
    y = rfp.signals(matrices, lin, inputs)[t]
    if y.shape[-1] != fan_in:  # each head reads its own units; a bias reads 1
        biases = fan_in == 1 and gamma.heads < gamma.units
        y = y[..., :1] if biases else y.unflatten(-1, (gamma.heads, fan_in))
    phi = rfp.immediates(matrices, lin).select(1, t)
    return rtrl_heads_(gamma.gammas[group], jacobian.contiguous(), phi, y.contiguous(), delta)


def rtrl_heads_(
    gamma: Tensor, jacobian: Tensor, phi: Tensor, y: Tensor, delta: Tensor | None
) -> Tensor | None:
    """`kernels.rtrl_heads.rtrl_heads_`. Mutates gamma."""
    from ..kernels import rtrl_heads as kernels

    return kernels.rtrl_heads_(gamma, jacobian, phi, y, delta)


def _is_dense(gamma: ExactSensitivity) -> bool:
    """Whether these are sensitivities to dense recurrent matrices, too large for the kernel by heads."""
    recurrent = [shape for shape, indices in gamma.groups if not set(indices).isdisjoint(gamma.recurrent)]
    dense = bool(recurrent) and all(len(shape) == 2 for shape in recurrent) and gamma.heads == 1
    return dense and not _fits_heads(gamma)


@TRITON.implements("rtrl_jacobian")
def rtrl_jacobian(
    cell: Cell, gamma: ExactSensitivity, lin: Linearization, t: int, weights: Sequence[Tensor]
) -> Tensor | Refusal:
    if not _is_dense(gamma):
        return NOT_DENSE
    from ..kernels import rtrl_step as kernels

    states = range(gamma.states)
    own = [lin.partials.own[source].get(nu) for nu in states for source in states]
    return kernels.rtrl_jacobian(
        [None if one is None else one[t].contiguous() for one in own],
        _phi_of_gates(cell, lin, t),
        [state_read(matrix) for matrix in cell.matrices],
        [weight.contiguous() for weight in weights],
        None if lin.resets is None else lin.resets[t].contiguous(),
    )[:, None]


@TRITON.implements("rtrl_immediate_")
def rtrl_immediate_(
    cell: Cell, gamma: ExactSensitivity, group: int, lin: Linearization, t: int, inputs: Tensor | None
) -> Refusal | None:
    if not _is_dense(gamma) or gamma.groups[group][1] != gamma.recurrent:
        return NOT_DENSE
    from ..kernels import rtrl_step as kernels

    rows = gamma.gammas[group].flatten(4).flatten(1, 3)
    reads = [state_read(matrix) for matrix in cell.matrices]
    kernels.rtrl_immediate_(rows, _phi_of_gates(cell, lin, t), reads, lin.before[:, t].contiguous())
    return None


def _phi_of_gates(cell: Cell, lin: Linearization, t: int) -> list[Tensor | None]:
    """φ^{ν,k}(t) of the cell's matrices, state by state; None for zeros."""
    entering = [lin.immediate(matrix) for matrix in cell.matrices]
    found = [by_state.get(nu) for nu in range(len(cell.states)) for by_state in entering]
    return [None if one is None else one[t].contiguous() for one in found]
