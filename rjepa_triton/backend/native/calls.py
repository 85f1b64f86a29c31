"""Calls of the compiled library: each gives the addresses of tensors to one function of the C++ sources in this folder.

Torch goes over Γ several times a step, and one step of a loop over time is a few calls of torch, each of which costs
microseconds whatever it works on. Here Γ's step is one pass over memory, and a whole loop is one call. ctypes releases
the GIL while compiled code runs.

Every function needs `library.library()` to be there, and tensors on the CPU that have memory of their own (no tensor of
torch.compile's or of a tensor mode): `native_backend` checks both before it calls.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...cells.builtin import ElmanCell, GRUCell, LSTMCell, RGCCell
from ...cells.two_point import Cell, Linearization, Matrix, Partials, Trajectory, state_read
from ...rules.rfp import Joined
from ..buffers import ReusedMemory
from .library import loaded

PANEL = 32  # as in products.h
PACKED_FROM = 16  # rows of all steps that pay for laying out weights anew
MOST_STATES = 2  # a unit, of Γ's pass


def rgc_scan(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loop of an RGC with dense weights: `RGCCell.scan`'s states (2, T + 1, B, N) and gates (2, T, B, 2, N).

    x (T, B, N), weights ss, ms, mm, sm (N, N), state two of (B, N), resets (T, B) bool or None; float32, on the CPU.
    Nothing is mutated.
    """
    code = loaded()
    steps, batch, units = x.shape
    states = x.new_empty(2, steps + 1, batch, units)
    gates = x.new_empty(2, steps, batch, 2, units)
    kept = None if resets is None else x.new_empty(2 * batch * units)
    packed = _room_to_pack(x, 2 * _packed_numbers(2, units))
    x, given = x.contiguous(), [a.contiguous() for a in (*weights, *state)]
    marks = None if resets is None else resets.contiguous()
    code.rgc_scan(
        x.data_ptr(),
        *[a.data_ptr() for a in given],
        _address(marks),
        states.data_ptr(),
        gates.data_ptr(),
        _address(kept),
        _address(packed),
        steps,
        batch,
        units,
        torch.get_num_threads(),
    )
    return states, gates


def _packed_numbers(count: int, units: int) -> int:
    """As in products.h."""
    return -(-count * units // PANEL) * PANEL * units


def _room_to_pack(x: Tensor, numbers: int) -> Tensor | None:
    """Where the rows of all steps of x (…, T, B, N) pay for it."""
    return x.new_empty(numbers) if x.shape[-3] * x.shape[-2] >= PACKED_FROM else None


def gated_cell(cell: Cell) -> int | None:
    """The number that `native/gated.cpp` has of a cell, or None."""
    if type(cell) is ElmanCell:
        return 1 if cell.nonlinearity == "relu" else 0
    return {LSTMCell: 2, GRUCell: 3}.get(type(cell))


def gated_scan(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loop of a `gated_cell` with dense weights: `Cell.scan`'s states (S, T + 1, B, N) and `saved` (G, T, B, N).

    x (J, T, B, N), weights G of (N, N), state S of (B, N), resets (T, B) bool or None; float32, on the CPU. Nothing is
    mutated.
    """
    code = loaded()
    _, steps, batch, units = x.shape
    x = _units_together(x)
    states = x.new_empty(len(state), steps + 1, batch, units)
    sums = x.new_empty(steps, batch, len(weights), units)
    kept = None if resets is None else x.new_empty(len(state) * batch * units)
    packed = _room_to_pack(x, _packed_numbers(len(weights), units))
    marks = None if resets is None else resets.contiguous()
    dense, start = [a.contiguous() for a in weights], [a.contiguous() for a in state]
    code.gated_scan(
        x.data_ptr(),
        _longs(x.stride()[:3]),
        _addresses(dense),
        _addresses(start),
        _address(marks),
        states.data_ptr(),
        sums.data_ptr(),
        _address(kept),
        _address(packed),
        gated_cell(cell),
        *x.shape,
        torch.get_num_threads(),
    )
    return states, sums.movedim(2, 0)


def gated_linearize(
    cell: Cell, trajectory: Trajectory, before: Tensor, weights: Sequence[Tensor]
) -> tuple[Partials, Tensor]:
    """The partials of a `gated_cell`, and RFP's M, of T steps, in one pass.

    trajectory: as `gated_scan` makes it; before (S, T, B, N): the states that its steps read; weights of the G
    matrices, (N, N), or their own parts (N,); float32, on the CPU. Returns the partials, and M (S, S, T, B, N), zero
    where reset. Nothing is mutated.
    """
    code = loaded()
    kind = gated_cell(cell)
    assert kind is not None
    x, sums = _units_together(trajectory.x), trajectory.saved.movedim(0, 2).contiguous()
    if not before[0].is_contiguous():
        before = before.contiguous()
    marks = None if trajectory.resets is None else trajectory.resets.contiguous()
    states, distinct = len(before), DISTINCT[kind]
    out = x.new_empty(distinct + states**2, *x.shape[1:])
    code.gated_linearize(
        x.data_ptr(),
        _longs(x.stride()[:3]),
        sums.data_ptr(),
        before.data_ptr(),
        _address(marks),
        *_own(weights),
        out.data_ptr(),
        kind,
        len(x),
        before.stride(0),
        *x.shape[1:],
        torch.get_num_threads(),
    )
    m = out[distinct:].view(states, states, *x.shape[1:])
    return _partials(kind, out.unbind(0)[:distinct], len(x)), m


# Numbers of one unit that partials are made of, by `gated_cell`.
DISTINCT = {0: 1, 1: 1, 2: 9, 3: 5}


def _partials(kind: int, found: Sequence[Tensor], inputs: int) -> Partials:
    """The partials that `native/gated.cpp` found."""
    if kind == 2:
        i, f, g, h_i, h_f, h_g, h_o, to_h, to_c = found
        gates = [{0: h_i, 1: i}, {0: h_f, 1: f}, {0: h_g, 1: g}, {0: h_o}]
        return Partials(own=[{}, {0: to_h, 1: to_c}], gate=gates, input=gates)
    if kind == 3:
        r, z, hn, n, own = ({0: value} for value in found)
        return Partials(own=[own], gate=[r, z, hn], input=[r, z, n, hn][:inputs])
    slope = {0: found[0]}
    return Partials(own=[{}], gate=[slope], input=[slope])


def _units_together(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only where it isn't."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> bytes:
    return _places([_address(tensor) for tensor in tensors])


def _places(addresses: Sequence[int | None]) -> bytes:
    return struct.pack(f"{len(addresses)}P", *[address or 0 for address in addresses])


def _longs(values: Sequence[int]) -> bytes:
    return struct.pack(f"{len(values)}l", *values)


def rgc_linearize(
    cell: Cell, trajectory: Trajectory, before: Tensor, weights: Sequence[Tensor]
) -> tuple[Partials, Tensor]:
    """`gated_linearize` of an RGC; weights ss, ms, mm and sm."""
    code = loaded()
    gates, x = trajectory.saved.contiguous(), trajectory.x[0].contiguous()
    if not before[0].is_contiguous():
        before = before.contiguous()
    marks = None if trajectory.resets is None else trajectory.resets.contiguous()
    out = x.new_empty(10, *x.shape)
    code.rgc_linearize(
        gates.data_ptr(),
        before.data_ptr(),
        x.data_ptr(),
        _address(marks),
        *_own(weights),
        out.data_ptr(),
        before.stride(0),
        *x.shape,
        torch.get_num_threads(),
    )
    return RGCCell.partials_in(out, gates)


def _own(weights: Sequence[Tensor]) -> tuple[bytes, bytes]:
    """Addresses of the own parts of weights (N, N) or (N,), and how far their numbers lie apart."""
    return _addresses(weights), _longs([sum(weight.stride()) for weight in weights])


def dual(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: Tensor | Sequence[Tensor | None],
    carry: Tensor | None = None,
) -> tuple[Joined, Tensor, Tensor]:
    """`operations.dual_of` of a `gated_cell` or an RGC, in one pass: E^k of all the cell's matrices, and all J inputs'.

    trajectory: as `gated_scan` or `rgc_scan` makes it; weights as `gated_linearize` takes them; delta (S, T, B, N), or
    (T, B, N) of each state, None for zeros; carry (S, B, N) or None; float32, on the CPU. Nothing is
    mutated.
    """
    code = loaded()
    kind = gated_cell(cell)
    x, states, saved = (_units_together(a) for a in (trajectory.x, trajectory.states, trajectory.saved))
    source = [None if one is None else _units_together(one) for one in delta]
    marks = None if trajectory.resets is None else trajectory.resets.contiguous()
    carry = None if carry is None else carry.contiguous()
    inputs, steps, batch, units = x.shape
    if kind is None:
        kind = RGC
        made, for_x = x.new_empty(2, steps, batch, 2, units), x.new_empty(x.shape)
        arrays = made.flatten(3)
        places: Sequence[tuple[int, int]] = RGCCell.CREDIT_PLACES
        gates = _by_gate(saved)
        out: list[int | None] = [*_by_gate(made), for_x.data_ptr()]
        row, last_row = 2 * units, units
    else:
        order, count = PLANES[kind], saved.shape[0]
        planes = inputs + 1 if kind == 3 else count
        made = x.new_empty(steps, batch, planes, units)
        arrays = made.flatten(2)[None, :, :, : count * units]
        places = [(0, k) for k in order[:count]]
        for_x = made[:, :, planes - inputs :].movedim(2, 0)
        first = made.data_ptr()
        gates = _each(saved)
        out = [first + 4 * units * k if k < planes else None for k in order]
        row = last_row = planes * units
    passed = x.new_empty(states.shape[0], batch, units)
    apart = [
        *x.stride()[1:3] * inputs,
        *saved.stride()[1:3] * len(gates),
        *states.stride()[1:3] * len(source),
    ]
    for one in source:
        apart += (0, 0) if one is None else one.stride()[:2]
    code.dual_pass(
        _places([*_each(x), *gates, *_each(states), *[_address(one) for one in source]]),
        _longs(apart),
        _places(out),
        _longs((batch * row, row) * (len(out) - 1) + (batch * last_row, last_row)),
        *_own(weights),
        _address(carry),
        _address(marks),
        passed.data_ptr(),
        kind,
        inputs,
        steps,
        batch,
        units,
        torch.get_num_threads(),
    )
    return Joined(arrays, places, units), for_x, passed


def _each(array: Tensor) -> list[int]:
    """Where each of the float32 arrays begins that an array is made of."""
    first, apart = array.data_ptr(), 4 * array.stride(0)
    return [first + apart * k for k in range(array.shape[0])]


def _by_gate(array: Tensor) -> list[int]:
    """Where ss, ms, mm and sm begin in an array (2, T, B, 2, N) by source, as `rgc_scan` has gates."""
    first, source, gate = array.data_ptr(), 4 * array.stride(0), 4 * array.stride(3)
    return [first, first + source + gate, first + source, first + gate]


# Number of an RGC in `native/dual.cpp`, beside those of `gated_cell`, and where E^k of its matrices are put, as in
# `Joined`. Of the other cells, the planes of what enters gates, then inputs: those of gates first, of inputs last.
RGC = 4
PLANES = {0: (0,), 1: (0,), 2: (0, 1, 2, 3), 3: (1, 2, 0, 3, 4)}


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rfp.reverse_scan`: m (S, S, T, B, N), delta (S, T, B, N), carry (S, B, N) or None; float32, on the CPU.

    Returns λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N). Nothing is mutated.
    """
    code = loaded()
    count, steps, batch, units = delta.shape
    m, delta = m.contiguous(), delta.contiguous()
    carry = None if carry is None else carry.contiguous()
    credit, first = torch.empty_like(delta), delta.new_empty(count, batch, units)
    code.reverse_scan(
        m.data_ptr(),
        delta.data_ptr(),
        _address(carry),
        credit.data_ptr(),
        first.data_ptr(),
        count,
        steps,
        batch * units,
    )
    return credit, first


def exact_credits(
    lin: Linearization,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`bptt.credits` of dense weights: λ (S, T, B, N), and what goes on to the initial state (S, B, N).

    float32, on the CPU. Nothing is mutated.
    """
    code = loaded()
    states, steps, batch, units = delta.shape
    order = sorted(range(len(matrices)), key=lambda k: state_read(matrices[k]))
    readers = [sum(state_read(matrix) == nu for matrix in matrices) for nu in range(states)]
    dense = [weights[k].contiguous() for k in order]
    own_at = [lin.partials.own[source].get(nu) for source in range(states) for nu in range(states)]
    phi_at = [lin.immediate(matrices[k]).get(nu) for k in order for nu in range(states)]
    (own, own_next), (phi, phi_next) = (zip(*map(_evenly, group), strict=True) for group in (own_at, phi_at))
    delta = delta.contiguous()
    carry = None if carry is None else carry.contiguous()
    marks = None if lin.resets is None else lin.resets.contiguous()
    credit, first = torch.empty_like(delta), delta.new_empty(states, batch, units)
    packed = delta.new_empty(len(dense) * _packed_numbers(1, units))
    code.exact_credits(
        _addresses(dense),
        _longs(readers),
        _addresses(own),
        _longs(own_next),
        _addresses(phi),
        _longs(phi_next),
        delta.data_ptr(),
        _address(carry),
        _address(marks),
        credit.data_ptr(),
        first.data_ptr(),
        packed.data_ptr(),
        states,
        steps,
        batch,
        units,
        torch.get_num_threads(),
    )
    return credit, first


def _evenly(array: Tensor | None) -> tuple[Tensor | None, int]:
    """(T, B, N) whose T·B rows lie one stride apart, copied where they don't, and that stride."""
    if array is None:
        return None, 0
    next_step, next_row, next_unit = array.stride()
    if array.shape[1] == 1:  # else it can be anything
        next_row = next_step
    if next_unit == 1 and next_step == array.shape[1] * next_row:
        return array, next_row
    return array.contiguous(), array.shape[2]


def gamma_pass(
    gammas: Sequence[Tensor],
    m: Tensor | None,
    entering: Tensor | None,
    y: Tensor | None,
    credit: Tensor | None = None,
    *,
    before: bool = False,
    memory: ReusedMemory | None = None,
) -> Tensor | None:
    """Γ ← M Γ + Σ_t U(t) y(t)ᵀ, and Σ_{b,ν} credit ⊙_rows Γ (K, N, M), in one pass over Γ, by torch's threads.

    gammas: S ≤ `MOST_STATES` of (B, K, N, M), contiguous; m (S, S, B, N), or None where Γ is only read; entering
    (S, C, B, K, N), y (C, B, K, Y), Y as in `rfp.rows_read`; credit (S, B, N) or None. All on the CPU, of one dtype,
    float32 or float64. before: Γ is read before it moves. memory: of the gradient.

    Returns the gradient, or None without credit. Mutates gammas, where m is given.
    """
    batch, count, units, _ = gammas[0].shape
    m, entering, y, credit = [None if a is None else a.contiguous() for a in (m, entering, y, credit)]
    item, steps, reads = gammas[0].element_size(), 1, 1
    immediates = signals = credits = None
    if entering is not None and y is not None:
        steps, reads = len(y), y.shape[3]
        state, begin = steps * batch * count * units, entering.data_ptr()
        immediates = _places(
            [begin + (nu * state + k * units) * item for nu in range(len(gammas)) for k in range(count)]
        )
        begin = y.data_ptr()
        signals = _places([begin + k * reads * item for k in range(count)])
    if credit is not None:
        begin = credit.data_ptr()
        credits = _places([begin + nu * batch * units * item for nu in range(len(gammas))])
    apart = (batch * units, batch * count * units, count * units, batch * count * reads, count * reads)
    return _pass(gammas, m, immediates, signals, credits, apart, steps, reads, before, memory)


def gamma_step(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Sequence[Tensor | None],
    y: Sequence[Tensor],
    delta: Tensor | None,
    t: int,
    memory: ReusedMemory | None = None,
    descent: tuple[Sequence[Tensor | None], float] | None = None,
) -> Tensor | None:
    """`gamma_pass` by step t of T, whose arrays lie apart, as linearisation leaves them.

    m (S, S, T, B, N); phi S·K of (T, B, N), state by state, None: zeros; y K of (T, B, Y); delta (S, T, B, N) or None.
    descent: K weights of N·M numbers, contiguous, None for one that stays, and a rate: they take a step down the
    gradient, which is None then. Mutates gammas, and those.
    """
    m, phi, y = (
        m.contiguous(),
        [None if a is None else a.contiguous() for a in phi],
        [a.contiguous() for a in y],
    )
    rows, reads, item = m.shape[3] * m.shape[4], y[0].shape[1] * y[0].shape[2], m.element_size()
    credit = None
    if delta is not None:
        delta = delta.contiguous()
        credit = _places(
            [delta.data_ptr() + (nu * delta.shape[1] + t) * rows * item for nu in range(len(delta))]
        )
    return _pass(
        gammas,
        m,
        _places([None if a is None else a.data_ptr() + t * rows * item for a in phi]),
        _places([a.data_ptr() + t * reads * item for a in y]),
        credit,
        (m.shape[2] * rows, rows, m.shape[4], reads, y[0].shape[2]),
        1,
        y[0].shape[2],
        False,
        memory,
        t * rows * item,
        descent,
    )


def _pass(
    gammas: Sequence[Tensor],
    m: Tensor | None,
    entering: Any,
    y: Any,
    credit: Any,
    apart: Sequence[int],
    steps: int,
    reads: int,
    before: bool,
    memory: ReusedMemory | None,
    skipped: int = 0,
    descent: tuple[Sequence[Tensor | None], float] | None = None,
) -> Tensor | None:
    """`gamma_pass` of tables of addresses and distances, as in `native/gamma.cpp`; skipped: bytes of m."""
    code = loaded()
    first = gammas[0]
    batch, *shape = first.shape
    total = None
    weights, rate = descent or (None, 0.0)
    if credit is not None and weights is None:
        total = first.new_empty(shape) if memory is None else memory.empty(shape, first)
    code.gamma_pass(
        _addresses(gammas),
        None if m is None else m.data_ptr() + skipped,
        entering,
        y,
        credit,
        _address(total),
        None if weights is None else _addresses(weights),
        _longs(apart),
        rate,
        len(gammas),
        steps,
        batch,
        *shape,
        reads,
        before,
        first.element_size(),
        torch.get_num_threads(),
    )
    return total


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """`rfp.arriving` and R(0) of `rfp.suffix_products`: m (S, S, C, B, N), phi (S, C, B, K, N), S ≤ `MOST_STATES`.

    Returns U (S, C, B, K, N) and M(C) … M(1) (S, S, B, N). Of one dtype, float32 or float64, on the
    CPU. Nothing is mutated.
    """
    code = loaded()
    states, steps, batch, matrices, units = phi.shape
    m, phi = m.contiguous(), phi.contiguous()
    arrived, whole = torch.empty_like(phi), m.new_empty(states, states, batch, units)
    arrays = [a.data_ptr() for a in (m, phi, arrived, whole)]
    code.gamma_arriving(*arrays, states, steps, batch, matrices, units, m.element_size())
    return arrived, whole


def activate_(values: Tensor, *, sigmoid: bool = False) -> None:
    """The loops' tanh, or sigmoid, of contiguous float32 numbers on the CPU, in place."""
    loaded().activate(values.data_ptr(), values.numel(), sigmoid)
