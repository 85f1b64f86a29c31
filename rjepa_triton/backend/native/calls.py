"""Calls into the compiled library: each function passes the addresses of tensors to one of the C++ sources' functions.

With torch's operations, one step of Γ reads and writes Γ several times, and one step of a loop over time takes a few
calls, each of which costs microseconds however little it computes. Here a step of Γ is one pass over memory, and a
whole loop over time is one call. ctypes releases the GIL while compiled code runs.

Every function needs a compiled library (`library.library()`) and CPU tensors with memory of their own, so neither the
fake tensors of torch.compile nor those of a tensor mode. `native_backend` checks both before it calls.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...cells.two_point import Linearization, Matrix, state_read
from ..buffers import ReusedMemory
from . import library
from .library import loaded

PANEL = 32  # the PANEL of products.h for float32; it is half as many for float64
PACKED_FROM = 16  # the T·B from which a loop over packed weights, here that of exact credits, saves time
LARGE_UNITS, LARGE_PACKED_FROM = 256, 48  # packing large weights takes as long as some steps
MOST_STATES = 4  # states per unit that passes over Γ take


def _of(like: Tensor, single: Any, double: Any) -> Any:
    """The one of two functions that computes in the dtype of `like`."""
    return single if like.dtype == torch.float32 else double


def packs(rows: int, units: int) -> bool:
    """Whether packing dense weights saves time in T·B = rows products."""
    return rows >= (PACKED_FROM if units < LARGE_UNITS else LARGE_PACKED_FROM)


def packed_numbers(count: int, units: int) -> int:
    """At least the numbers that `count` packed matrices take: `packed_numbers` of products.h."""
    return -(-count * units // PANEL) * PANEL * units


def _address(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first number; None becomes a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> bytes:
    """A C array with the tensors' addresses, null for None."""
    return struct.pack(
        f"{len(tensors)}P", *[0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    )


def _longs(values: Sequence[int]) -> bytes:
    """A C array of longs."""
    return struct.pack(f"{len(values)}l", *values)


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rfp.reverse_scan`: the credits λ(t) = δ(t) + M(t+1)ᵀ λ(t+1).

    Takes m (S, S, T, B, N), delta (S, T, B, N), and carry (S, B, N) or None; on the CPU. Returns λ
    (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N). Nothing is mutated.
    """
    code = loaded()
    count, steps, batch, units = delta.shape
    m, delta = m.contiguous(), delta.contiguous()
    carry = None if carry is None else carry.contiguous()
    credit, first = torch.empty_like(delta), delta.new_empty(count, batch, units)
    _of(delta, code.reverse_scan_float, code.reverse_scan_double)(
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
    """`bptt.credits` with dense weights (N, N), in the order of `matrices`; on the CPU.

    Returns λ (S, T, B, N), and the credit that the first step passes to the initial state (S, B, N). Nothing is
    mutated.
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
    packed = delta.new_empty(len(dense) * packed_numbers(1, units))
    _of(delta, code.exact_credits_float, code.exact_credits_double)(
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
    """array (T, B, N), copied unless its T·B rows lie evenly apart, and the distance of its rows in numbers."""
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

    gammas holds S ≤ `MOST_STATES` contiguous tensors (B, K, N, M); m is (S, S, B, N), or None where Γ is only read;
    entering is U (S, C, B, K, N) and y (C, B, K, Y), with Y as in `rfp.rows_read`; credit is (S, B, N) or None. All are
    on the CPU and have one dtype, float32 or float64. With `before`, the gradient is read before Γ moves. The gradient
    is allocated from `memory`, if given.

    Returns the gradient, or None without credit. Mutates gammas if m is given.
    """
    batch, count, units, _ = gammas[0].shape
    m, entering, y, credit = [None if a is None else a.contiguous() for a in (m, entering, y, credit)]
    item, steps, reads = gammas[0].element_size(), 1, 1
    immediates, signals, credits = None, [], None
    if entering is not None and y is not None:
        steps, reads = len(y), y.shape[3]
        immediates, begin = _by_matrix(entering), y.data_ptr()
        signals = [begin + k * reads * item for k in range(count)]
    if credit is not None:
        begin = credit.data_ptr()
        credits = [begin + nu * batch * units * item for nu in range(len(gammas))]
    apart = (batch * units, batch * count * units, count * units, batch * count * reads, count * reads)
    at = None if m is None else m.data_ptr()
    return _pass(gammas, at, immediates, signals, credits, apart, steps, reads, before, memory)


def gamma_step(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Sequence[int | None],
    y: Sequence[int],
    reads: int,
    delta: Tensor | None,
    t: int,
    memory: ReusedMemory | None = None,
    descent: tuple[Sequence[Tensor | None], float] | None = None,
) -> Tensor | None:
    """`gamma_pass` for step t alone, whose operands are read where the linearization of T steps left them.

    m is (S, S, T, B, N); phi holds the addresses of S·K arrays (T, B, N), those of state 0 first, None for zeros; y
    those of K arrays (T, B, Y), Y = `reads`; delta is (S, T, B, N) or None. descent holds the K weights, contiguous
    with N·M numbers each or None for a weight that stays, and a rate: W -= rate · gradient. The gradient itself is then
    not returned. Mutates gammas and the weights of descent.
    """
    m = m.contiguous()
    _, _, steps, batch, units = m.shape
    rows, item = batch * units, m.element_size()
    skipped, credit = t * rows * item, None
    if delta is not None:
        delta = delta.contiguous()
        begin = delta.data_ptr() + skipped
        credit = [begin + nu * steps * rows * item for nu in range(len(gammas))]
    return _pass(
        gammas,
        m.data_ptr() + skipped,
        [None if address is None else address + skipped for address in phi],
        [address + t * batch * reads * item for address in y],
        credit,
        (steps * rows, rows, units, batch * reads, reads),
        1,
        reads,
        False,
        memory,
        descent,
    )


def gamma_chunk(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Sequence[int | None],
    y: Sequence[int],
    reads: int,
    credit: Tensor | None,
    memory: ReusedMemory | None = None,
) -> Tensor | None:
    """`gamma_pass` for all C steps of a chunk, whose operands are read where the linearization left them.

    The arguments are those of `gamma_step`, but for credit (S, B, N) or None: of Γ before the chunk. Mutates gammas.
    """
    _, _, steps, batch, units = m.shape
    item, count = m.element_size(), len(y)
    arrived, whole = _arriving(m.contiguous(), phi, batch * units, units)
    credits = None
    if credit is not None:
        credit = credit.contiguous()
        credits = [credit.data_ptr() + nu * batch * units * item for nu in range(len(gammas))]
    apart = (batch * units, batch * count * units, count * units, batch * reads, reads)
    entering = _by_matrix(arrived)
    return _pass(gammas, whole.data_ptr(), entering, y, credits, apart, steps, reads, True, memory)


def _pass(
    gammas: Sequence[Tensor],
    m: int | None,
    entering: Sequence[int | None] | None,
    y: Sequence[int],
    credit: Sequence[int] | None,
    apart: Sequence[int],
    steps: int,
    reads: int,
    before: bool,
    memory: ReusedMemory | None,
    descent: tuple[Sequence[Tensor | None], float] | None = None,
) -> Tensor | None:
    """Call `gamma_pass` of gamma.cpp with the addresses of arrays, and distances."""
    code = library.gamma(len(gammas))
    assert code is not None
    first = gammas[0]
    batch, *shape = first.shape
    total = None
    weights, rate = descent or (None, 0.0)
    if credit is not None and weights is None:
        total = first.new_empty(shape) if memory is None else memory.empty(shape, first)
    arrays = [gamma.data_ptr() for gamma in gammas]
    arrays += m or 0, 0 if total is None else total.data_ptr()
    if entering is not None:
        arrays += [address or 0 for address in entering]
        arrays += y
    if credit is not None:
        arrays += credit
    if weights is not None:
        arrays += [0 if weight is None else weight.data_ptr() for weight in weights]
    given = (entering is not None, credit is not None, weights is not None)
    numbers = (len(gammas), steps, batch, *shape, reads, before, torch.get_num_threads(), *given, *apart)
    run = code.gamma_pass_float if first.dtype == torch.float32 else code.gamma_pass_double
    run(struct.pack(f"{len(arrays)}P", *arrays), struct.pack(f"{len(numbers)}l", *numbers), rate)
    return total


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """U(t) = M(C) … M(t+1) φ(t), as `rfp.arriving` has it, and M(C) … M(1), which is R(0) of `rfp.suffix_products`.

    Takes m (S, S, C, B, N) and phi (S, C, B, K, N) on the CPU, S ≤ `MOST_STATES`, of one dtype, float32 or float64.
    Returns U (S, C, B, K, N) and the full product (S, S, B, N). Nothing is mutated.
    """
    _, _, batch, matrices, units = phi.shape
    phi, row = phi.contiguous(), matrices * units
    return _arriving(m.contiguous(), _by_matrix(phi), batch * row, row)


def _by_matrix(array: Tensor) -> list[int]:
    """The addresses of the S·K arrays of one state and matrix in a contiguous (S, C, B, K, N), state by state."""
    states, _, _, matrices, units = array.shape
    begin, item, apart = array.data_ptr(), array.element_size(), array.stride(0)
    return [begin + (nu * apart + k * units) * item for nu in range(states) for k in range(matrices)]


def _arriving(m: Tensor, phi: Sequence[int | None], step: int, row: int) -> tuple[Tensor, Tensor]:
    """`arriving` with m contiguous and the addresses of φ, S·K, whose steps and batch rows are so far apart."""
    states, _, steps, batch, units = m.shape
    code = library.gamma(states)
    assert code is not None
    matrices = len(phi) // states
    arrived = m.new_empty(states, steps, batch, matrices, units)
    whole = m.new_empty(states, states, batch, units)
    at = struct.pack(f"{len(phi)}P", *[address or 0 for address in phi])
    sizes = (step, row, states, steps, batch, matrices, units, m.element_size())
    code.gamma_arriving(m.data_ptr(), at, arrived.data_ptr(), whole.data_ptr(), *sizes)
    return arrived, whole


def not_finite(a: Tensor, b: Tensor) -> bool:
    """Whether one of the numbers of two tensors of one dtype, float32 or float64, is NaN or infinite.

    Each must fill its memory, in any order of its dimensions.
    """
    found: int = loaded().not_finite(a.data_ptr(), b.data_ptr(), a.numel(), b.numel(), a.element_size())
    return found != 0


def activate_(values: Tensor, function: str) -> None:
    """Replace contiguous numbers on the CPU by their "tanh", "sigmoid" or "exp", as the compiled loops compute them."""
    run = _of(values, loaded().activate_float, loaded().activate_double)
    run(values.data_ptr(), values.numel(), ("tanh", "sigmoid", "exp").index(function))
