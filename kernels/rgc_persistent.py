"""Run an RGC forward in time in one launch, with the weights of up to 1,024 units spread over the multiprocessors.

Recursion (paper, eq. 13; a prime is the step before, u the layer's input):

    s(t) = (1 - tanh(W_ms m')) u + tanh(W_ss s') s'
    m(t) = (1 - tanh(W_sm s')) u + tanh(W_mm m') m'

Grid: (slices of UNITS of the N units) · (parts of the batch), launched cooperatively: all programs run at once.
A program owns UNITS units of one part of the batch for all T steps, with its rows of all four matrices in registers.
Per step and batch row it reads the whole state of N units, which the programs of its part have written, and u of its
own units; it writes their new states and, if wanted, gates. Then it waits until all programs of its part have done so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import device_sizes, vector_width
from .rgc_forward import checked, tanh

# Units of one program, and its warps: each unit has a warp of its own, so that no sum crosses warps.
UNITS = NUM_WARPS = 8
# Most bytes of weights that one program holds: half of a multiprocessor's registers, because sums take some too.
WEIGHT_BYTES = 128 * 1024
# Fewest columns of the weights that a program has room for: each smaller size would be one more kernel to compile.
LEAST_COLUMNS = 256
# Most batch rows that a program works on at once: their loads wait together, and more rows would spill.
MOST_ROWS = 4
# Counters of the grid barrier, 8 bytes each, lie a cache line apart.
COUNTER_STRIDE = 16


# Programs read states that other programs have written. Why none can read what was in memory before:
#
# 1.  Each thread stores its states, and then a thread "arrives" by adding one to a counter. An arrival comes after
#     all stores of the threads that it counts for:
#     -   On NVIDIA one thread arrives for its program. The barrier within the program orders the other threads'
#         stores before the arrival, and a release covers all that comes before it, whichever thread did it.
#     -   On AMD a barrier within a program doesn't wait for stores on their way to memory, and a release covers the
#         stores of its own wave alone. So each wave arrives, and counts one.
# 2.  Arrivals and polls are atomics on one counter, at the scope of the GPU. All arrivals after the first are
#     read-modify-write operations and continue the release sequence of the first, so whoever reads the full count with
#     an acquire sees all stores that precede all arrivals. The acquire also invalidates the multiprocessor's own
#     cache (and on AMD, that of its die).
# 3.  One thread polls. The barrier within the program orders the other threads' loads after its acquire.
#
# The loads of the states bypass the multiprocessor's cache (".cg") as well, where a line would not be read twice.
# No two steps share a place in memory, so nothing is overwritten that a slow program has yet to read, and the count
# never goes back: a program that polls late finds the count that it waits for, or a larger one.
@triton.jit
def _wait_for_all(arrived_ptr, count, ARRIVALS: tl.constexpr, LANES: tl.constexpr):
    """Arrive, then wait until the counter has reached `count`: a barrier across the programs of one part of the batch.

    ARRIVALS: how many this program adds, 1, or one per warp of LANES threads.
    """
    tl.debug_barrier()
    if ARRIVALS == 1:
        tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    else:
        lane = tl.arange(0, ARRIVALS * LANES)
        tl.atomic_add(arrived_ptr + 0 * lane, 1, mask=lane % LANES == 0, sem="release", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _product(
    weight,  # [CHUNKS, UNITS, LANES]
    state,  # [ROWS, CHUNKS, LANES]
):
    # W c, [ROWS, UNITS]: a thread sums over chunks, and then a warp over its lanes.
    by_lane = tl.sum(weight[None, :, :, :] * state[:, :, None, :], axis=1)
    return tl.sum(by_lane, axis=2)


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on T, B
# or rows, so for those it would be wasted work.
@triton.jit(do_not_specialize=["T", "B", "rows"])
def _rgc_persistent_kernel(
    x_ptr,  # [T, B, N]
    ss_ptr,  # [N, N]
    ms_ptr,  # [N, N]
    mm_ptr,  # [N, N]
    sm_ptr,  # [N, N]
    resets_ptr,  # [T, B], or None
    states_ptr,  # [2, T + 1, B, N]: the first step is given, the others are written
    gates_ptr,  # [T, B, 2, 2, N]: written; or None
    arrived_ptr,  # [parts, COUNTER_STRIDE]: zero at first; the barrier's counters
    T,
    B,
    N,
    rows,  # batch rows of one part
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of LANES columns; CHUNKS · LANES is N or more
    LANES: tl.constexpr,  # threads of a warp
    ROWS: tl.constexpr,  # batch rows worked on at once
    ARRIVALS: tl.constexpr,  # what one program adds to the counter per step
    COUNTER_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N
):
    N = N // VECTOR * VECTOR  # leaves N as it is, and shows the compiler what divides it
    slices = tl.cdiv(N, UNITS)
    part = tl.program_id(0) // slices
    unit = (tl.program_id(0) % slices) * UNITS + tl.arange(0, UNITS)
    unit_mask = unit < N
    column = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    column_mask = column < N
    at = unit[None, :, None] * N + column[:, None, :]
    mask = unit_mask[None, :, None] & column_mask[:, None, :]
    w_ss = tl.load(ss_ptr + at, mask=mask, other=0.0)
    w_ms = tl.load(ms_ptr + at, mask=mask, other=0.0)
    w_mm = tl.load(mm_ptr + at, mask=mask, other=0.0)
    w_sm = tl.load(sm_ptr + at, mask=mask, other=0.0)

    step = tl.cast(B, tl.int64) * N
    plane = step * (T + 1)
    arrived_ptr += part * COUNTER_STRIDE
    arrivals = tl.cast(slices, tl.int64) * ARRIVALS
    first = part * rows
    last = tl.minimum(first + rows, B)
    for t in range(T):
        for start in range(first, last, ROWS):
            row = start + tl.arange(0, ROWS)
            row_mask = row < last
            offset = row.to(tl.int64) * N
            all_at = states_ptr + offset[:, None, None] + column[None, :, :]
            all_mask = row_mask[:, None, None] & column_mask[None, :, :]
            own_at = states_ptr + offset[:, None] + unit[None, :]
            own_mask = row_mask[:, None] & unit_mask[None, :]
            all_s = tl.load(all_at, mask=all_mask, other=0.0, cache_modifier=".cg")
            all_m = tl.load(all_at + plane, mask=all_mask, other=0.0, cache_modifier=".cg")
            s = tl.load(own_at, mask=own_mask, other=0.0, cache_modifier=".cg")
            m = tl.load(own_at + plane, mask=own_mask, other=0.0, cache_modifier=".cg")
            u = tl.load(x_ptr + offset[:, None] + unit[None, :], mask=own_mask, other=0.0)
            if resets_ptr is not None:
                keep = tl.load(resets_ptr + row, mask=row_mask, other=1) == 0
                all_s = tl.where(keep[:, None, None], all_s, 0.0)
                all_m = tl.where(keep[:, None, None], all_m, 0.0)
                s = tl.where(keep[:, None], s, 0.0)
                m = tl.where(keep[:, None], m, 0.0)
            ss = tanh(_product(w_ss, all_s))
            sm = tanh(_product(w_sm, all_s))
            mm = tanh(_product(w_mm, all_m))
            ms = tanh(_product(w_ms, all_m))
            if gates_ptr is not None:
                gates_at = gates_ptr + 4 * offset[:, None] + unit[None, :]
                tl.store(gates_at, ss, mask=own_mask)
                tl.store(gates_at + N, sm, mask=own_mask)
                tl.store(gates_at + 2 * N, mm, mask=own_mask)
                tl.store(gates_at + 3 * N, ms, mask=own_mask)
            tl.store(own_at + step, (1.0 - ms) * u + ss * s, mask=own_mask)
            tl.store(own_at + step + plane, (1.0 - sm) * u + mm * m, mask=own_mask)
        x_ptr += step
        states_ptr += step
        if resets_ptr is not None:
            resets_ptr += B
        if gates_ptr is not None:
            gates_ptr += 4 * step
        if t < T - 1:
            _wait_for_all(arrived_ptr, arrivals * (t + 1), ARRIVALS, LANES)


# The interpreter runs one program after the other; the first would wait for ever for the next, so it gets only one.
_INTERPRETED = not isinstance(_rgc_persistent_kernel, triton.JITFunction)


class Config(NamedTuple):
    """How units and batch rows are divided among slices · parts programs.

    units      units of one program
    slices     programs that together have all units
    parts      parts of the batch
    rows       batch rows of one part
    tile_rows  of those, how many are worked on at once
    chunks     chunks of `lanes` columns; chunks · lanes is N or more
    lanes      threads of a warp
    num_warps  warps of a program
    """

    units: int
    slices: int
    parts: int
    rows: int
    tile_rows: int
    chunks: int
    lanes: int
    num_warps: int


def most_units(multiprocessors: int) -> int:
    """The largest N whose weights so many multiprocessors can hold. A pure function."""
    return min(WEIGHT_BYTES // (16 * UNITS), UNITS * multiprocessors)


def pick_config(N: int, B: int, multiprocessors: int, warp_size: int) -> Config:
    """The layout for a layer of N units and B batch rows. A pure function.

    A program has eight units, whatever N: with more there would be fewer arrivals at the barrier, but each step would
    take longer. Where multiprocessors are left over, the batch is split into parts. Each part has its own copy of the
    weights, and parts don't wait for one another.

    Raises ValueError where the multiprocessors can't hold all weights at once.
    """
    columns, slices = max(LEAST_COLUMNS, triton.next_power_of_2(N)), triton.cdiv(N, UNITS)
    weight_bytes = 16 * UNITS * columns
    if weight_bytes > WEIGHT_BYTES:
        raise ValueError(
            f"weights of {N} units can't stay on chip: those of {UNITS} units take {weight_bytes} bytes of a "
            f"multiprocessor's registers, and there are {WEIGHT_BYTES} for them"
        )
    if slices > multiprocessors:
        raise ValueError(
            f"weights of {N} units can't stay on chip: they need {slices} multiprocessors, one for {UNITS} "
            f"units, and there are {multiprocessors}"
        )
    rows = triton.cdiv(B, min(B, multiprocessors // slices))
    tile_rows = min(MOST_ROWS, triton.next_power_of_2(rows))
    parts, chunks = triton.cdiv(B, rows), columns // warp_size
    return Config(UNITS, slices, parts, rows, tile_rows, chunks, warp_size, NUM_WARPS)


def _one_program(N: int, B: int) -> Config:
    """The layout with all units and batch rows in one program, for the interpreter. A pure function."""
    chunks = triton.next_power_of_2(triton.cdiv(N, 32))
    return Config(triton.next_power_of_2(N), 1, 1, B, MOST_ROWS, chunks, 32, NUM_WARPS)


def arrivals(num_warps: int, amd: bool) -> int:
    """What one program adds to the barrier's counter per step; the comment on `_wait_for_all` says why. Pure."""
    return num_warps if amd else 1


@torch.no_grad()
def rgc_forward_persistent(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`rgc_forward` in one launch for all steps, for a layer whose weights fit on the GPU's multiprocessors (eq. 13).

    Each program keeps eight units' rows of all four matrices in its registers, takes these units through all steps,
    and after each step waits until the other programs have written their units' states. Matrix products are in full
    float32, whatever torch's precision for them is set to, and summed in an order that depends on the sizes and the GPU
    alone: two runs agree in every bit.

    No layer calls this function yet. Whether it beats one or two launches per step, and up to which N and B, is for
    `rjepa bench kernels` to measure on a GPU (`rgc-forward-persistent` beside `rgc-forward`). It is meant for
    128 < N ≤ 1,024 and few batch rows, where launches take most of the time.

    The programs' wait has no time limit, and needs none: the launch is cooperative, so it fails at once if not all
    programs fit on the GPU together, and otherwise starts when they do. There are no more programs than
    multiprocessors, and a program that faults ends them all.

    Arguments, results and errors are those of `rgc_forward`; also ValueError for more units than fit: 1,024, or eight
    per multiprocessor where that is less.
    """
    x, weights, states, resets = checked(x, weights, state, resets)
    steps, batch, units = x.shape
    sizes = device_sizes(x)
    config = (
        _one_program(units, batch)
        if _INTERPRETED
        else pick_config(units, batch, sizes.multiprocessors, sizes.warp)
    )
    gates = None
    if save_gates:
        gates = torch.empty(steps, batch, 2, 2, units, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(config.parts, COUNTER_STRIDE, dtype=torch.int64, device=x.device)
    _launch(x, weights, states, resets, gates, arrived, config)
    return states, gates


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    states: Tensor,
    resets: Tensor | None,
    gates: Tensor | None,
    arrived: Tensor,
    config: Config,
) -> None:
    with torch.cuda.device_of(x):
        _rgc_persistent_kernel[(config.slices * config.parts,)](
            x,
            *weights,
            resets,
            states,
            gates,
            arrived,
            *x.shape,
            config.rows,
            UNITS=config.units,
            CHUNKS=config.chunks,
            LANES=config.lanes,
            ROWS=config.tile_rows,
            ARRIVALS=arrivals(config.num_warps, amd=torch.version.hip is not None),
            COUNTER_STRIDE=COUNTER_STRIDE,
            VECTOR=vector_width(x.shape[2], torch.float32),
            num_warps=config.num_warps,
            launch_cooperative_grid=True,
        )
