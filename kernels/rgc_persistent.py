"""RGC forward in time in one launch, the weights of up to 1,024 units spread over the GPU's multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import device_sizes, vector_width
from .rgc_forward import checked, tanh

# Units of one program: a warp's each, so that no sum leaves its warp.
UNITS = NUM_WARPS = 8
# Bytes of weights that one program may hold: half of a multiprocessor's registers, as the sums take some too.
WEIGHT_BYTES = 128 * 1024
# Columns of the weights that a program has room for at least: fewer would be kernels of their own to compile.
LEAST_COLUMNS = 256
# Batch rows under way at once: their loads wait together, and more of them would spill.
MOST_ROWS = 4
# Counters lie a cache line apart.
COUNTER_STRIDE = 16


# A step's states are read by programs that didn't write them. Why they can't read what was there before:
#
# 1.  Each thread stores its states. A thread's arrival comes after all stores of those that it counts for:
#     -   On NVIDIA one thread arrives for its program. The barrier within the program puts the others' stores
#         before its arrival, and a release holds for all that came before it, whichever thread it was of.
#     -   On AMD a barrier within a program waits for no store on its way to memory, and what a wave releases
#         is what this wave has stored. So each wave arrives, and counts one.
# 2.  Arrivals and polls are atomics on one counter, at the scope of the GPU. All arrivals after the first are
#     read-modify-write and continue what the first has released, so whoever reads the full count by an acquire
#     has all stores of all arrivals before it. The acquire also drops what the multiprocessor's own cache
#     (and on AMD, that of its die) has kept.
# 3.  One thread polls. The barrier within the program puts what the others load after its acquire.
#
# The states' loads go past the multiprocessor's cache (".cg") as well: a line there would not be read again.
# Two steps don't share a place in memory, so nothing is overwritten that a slow program has yet to read, and
# the count never goes back: a program that polls late finds it at what it waits for, or beyond.
@triton.jit
def _wait_for_all(arrived_ptr, count, ARRIVALS: tl.constexpr, LANES: tl.constexpr):
    """Until `count` arrivals; this program makes ARRIVALS of them: 1, or one a warp of LANES."""
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
    # [ROWS, UNITS]. Chunks add up in a thread, and what is left of a unit are the lanes of its warp.
    by_lane = tl.sum(weight[None, :, :, :] * state[:, :, None, :], axis=1)
    return tl.sum(by_lane, axis=2)


@triton.jit(do_not_specialize=["T", "B", "rows"])
def _rgc_persistent_kernel(
    x_ptr,  # [T, B, N]
    ss_ptr,  # [N, N]
    ms_ptr,  # [N, N]
    mm_ptr,  # [N, N]
    sm_ptr,  # [N, N]
    resets_ptr,  # [T, B], or None
    states_ptr,  # [2, T + 1, B, N], the first step given
    gates_ptr,  # [2, T, B, 2, N], or None
    arrived_ptr,  # [parts, COUNTER_STRIDE], zero
    T,
    B,
    N,
    rows,  # of the batch, in one part
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,  # of LANES columns: N or more
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    ARRIVALS: tl.constexpr,
    COUNTER_STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # One program: UNITS units of one part of the batch, all steps. Programs of a part wait for one another.
    N = N // VECTOR * VECTOR  # N itself, and the compiler sees what divides it
    slices = tl.cdiv(N, UNITS)
    part = tl.program_id(0) // slices
    unit = (tl.program_id(0) % slices) * UNITS + tl.arange(0, UNITS)
    mine = unit < N
    column = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = column < N
    at = unit[None, :, None] * N + column[:, None, :]
    mask = mine[None, :, None] & inside[:, None, :]
    w_ss = tl.load(ss_ptr + at, mask=mask, other=0.0)
    w_ms = tl.load(ms_ptr + at, mask=mask, other=0.0)
    w_mm = tl.load(mm_ptr + at, mask=mask, other=0.0)
    w_sm = tl.load(sm_ptr + at, mask=mask, other=0.0)

    step = tl.cast(B, tl.int64) * N
    plane = step * (T + 1)
    gates_plane = step * 2 * T
    arrived_ptr += part * COUNTER_STRIDE
    arrivals = tl.cast(slices, tl.int64) * ARRIVALS
    first = part * rows
    last = tl.minimum(first + rows, B)
    for t in range(T):
        for start in range(first, last, ROWS):
            row = start + tl.arange(0, ROWS)
            there = row < last
            offset = row.to(tl.int64) * N
            all_at = states_ptr + offset[:, None, None] + column[None, :, :]
            all_mask = there[:, None, None] & inside[None, :, :]
            own_at = states_ptr + offset[:, None] + unit[None, :]
            own_mask = there[:, None] & mine[None, :]
            all_s = tl.load(all_at, mask=all_mask, other=0.0, cache_modifier=".cg")
            all_m = tl.load(all_at + plane, mask=all_mask, other=0.0, cache_modifier=".cg")
            s = tl.load(own_at, mask=own_mask, other=0.0, cache_modifier=".cg")
            m = tl.load(own_at + plane, mask=own_mask, other=0.0, cache_modifier=".cg")
            u = tl.load(x_ptr + offset[:, None] + unit[None, :], mask=own_mask, other=0.0)
            if resets_ptr is not None:
                keep = tl.load(resets_ptr + row, mask=there, other=1) == 0
                all_s = tl.where(keep[:, None, None], all_s, 0.0)
                all_m = tl.where(keep[:, None, None], all_m, 0.0)
                s = tl.where(keep[:, None], s, 0.0)
                m = tl.where(keep[:, None], m, 0.0)
            ss = tanh(_product(w_ss, all_s))
            sm = tanh(_product(w_sm, all_s))
            mm = tanh(_product(w_mm, all_m))
            ms = tanh(_product(w_ms, all_m))
            if gates_ptr is not None:
                gates_at = gates_ptr + 2 * offset[:, None] + unit[None, :]
                tl.store(gates_at, ss, mask=own_mask)
                tl.store(gates_at + N, sm, mask=own_mask)
                tl.store(gates_at + gates_plane, mm, mask=own_mask)
                tl.store(gates_at + gates_plane + N, ms, mask=own_mask)
            tl.store(own_at + step, (1.0 - ms) * u + ss * s, mask=own_mask)
            tl.store(own_at + step + plane, (1.0 - sm) * u + mm * m, mask=own_mask)
        x_ptr += step
        states_ptr += step
        if resets_ptr is not None:
            resets_ptr += B
        if gates_ptr is not None:
            gates_ptr += 2 * step
        if t < T - 1:
            _wait_for_all(arrived_ptr, arrivals * (t + 1), ARRIVALS, LANES)


# One program after the other can't wait for the next: interpreted, there is one.
_INTERPRETED = not isinstance(_rgc_persistent_kernel, triton.JITFunction)


class Config(NamedTuple):
    """How units and batch rows are dealt out.

    units      of one program
    slices     of units, together all of them
    parts      of the batch; slices · parts programs
    rows       of one part
    tile_rows  of those, under way at once
    chunks     of `lanes` columns, N or more
    lanes      of a warp
    num_warps  of a program
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
    """Units whose weights so many multiprocessors can hold. Pure."""
    return min(WEIGHT_BYTES // (16 * UNITS), UNITS * multiprocessors)


def pick_config(N: int, B: int, multiprocessors: int, warp_size: int) -> Config:
    """For a layer of N units and B batch rows. Pure.

    Eight units a program, whatever N: more would save arrivals, and take longer. Multiprocessors that are then
    left take a part of the batch each: the parts, which hold the same weights, don't wait for one another.

    Raises ValueError where the weights can't all be held at once.
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
    """All units and rows. Pure."""
    chunks = triton.next_power_of_2(triton.cdiv(N, 32))
    return Config(triton.next_power_of_2(N), 1, 1, B, MOST_ROWS, chunks, 32, NUM_WARPS)


def arrivals(num_warps: int, amd: bool) -> int:
    """What a program adds to the count of those that have stored a step. Pure; why: `_wait_for_all`."""
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
    """`rgc_forward` in one launch for all steps, of a layer whose weights fit on the GPU's multiprocessors.

    Each program keeps eight units' rows of all four matrices in its registers, takes them through all steps,
    and after each step waits until the others have written their units' states. Products are sums of float32
    products, whatever torch's precision for them, in an order that sizes and the GPU alone set: two runs agree
    in every bit.

    Nothing else calls it: whether it beats a launch or two a step, and up to which N and B, is for `rjepa bench
    kernels` to say on a GPU (`rgc-forward-persistent` beside `rgc-forward`). It is meant for 128 < N ≤ 1,024 and
    few batch rows, where launches are what takes time.

    Programs wait without a bound, because none can wait for ever: the launch is cooperative, so that it fails at
    once if not all programs fit on the GPU together, and otherwise starts when they do. There are no more of
    them than multiprocessors, and a program that faults ends them all.

    Args, returns and raises as `rgc_forward`; ValueError as well for more units than fit: 1,024, or eight a
    multiprocessor where that is less.
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
        gates = torch.empty(2, steps, batch, 2, units, dtype=torch.float32, device=x.device)
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
