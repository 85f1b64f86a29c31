"""Run a cell with few units forward in time, all steps in one launch, with the weights in one multiprocessor.

For a cell (`_cell.CellFunctions`) with S states, J inputs and K dense matrices of up to 128 units:

    p^g(t) = Σ of W^k c^ν(t-1) over the matrices that enter gate g,    c(t) = F(c(t-1), p(t), x(t))

Grid: B. A program owns one batch row, all units and all steps, with all or some of the weights and all states in
registers. Per step it reads J inputs and writes S states and, if wanted, the F numbers that the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import kept, load_planes, part
from ._cell import CellFunctions, check_matrices, pre_activations
from ._launch import check_dims, check_runnable, check_tensor, device_sizes

# Largest layers that one program takes through all steps; up to SMALL units, two programs or more share a
# multiprocessor.
SMALL, MOST = 64, 128
# Most registers of a thread, of 255, that weights take; as many as the four matrices of an RGC take at 64 units.
WEIGHT_REGISTERS = 128


@triton.jit
def _quarter(weight_ptr, INDEX: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Load a quarter of a matrix's columns, [BLOCK, BLOCK // 4], from where `in_quarters` has put it.

    INDEX: 4 · matrix + quarter. A warp holds 16 rows; each of its threads (lanes) two of them, and in each of those two
    columns out of every LANES / 4. So one memory access moves two by two numbers, and a sum over columns ends with a
    sum over LANES / 8 lanes.
    """
    size: tl.constexpr = BLOCK * BLOCK // 4
    flat = tl.load(weight_ptr + INDEX * size + tl.arange(0, size), eviction_policy="evict_last")
    tile = tl.reshape(flat, [BLOCK // LANES, BLOCK // 16, 8, LANES // 8, 2, 2])
    return tl.reshape(tl.permute(tile, [1, 2, 4, 0, 3, 5]), [BLOCK, BLOCK // 4])


@triton.jit
def _quarters(weight_ptr, MATRIX: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Load all four quarters of the columns of one matrix."""
    return (
        _quarter(weight_ptr, 4 * MATRIX, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 1, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 2, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 3, BLOCK, LANES),
    )


@triton.jit
def _split(state, BLOCK: tl.constexpr):
    """The four quarters [BLOCK // 4] of a state [BLOCK], as the matrices' columns are split."""
    low, high = tl.split(tl.permute(tl.reshape(state, [2, 2, BLOCK // 4]), [2, 1, 0]))
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
def _product(
    kept_quarters,  # four of [BLOCK, BLOCK // 4]: the matrix; or () if it isn't kept in registers, but loaded again
    state,  # four of [BLOCK // 4]
    weight_ptr,
    MATRIX: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    # W c, [BLOCK]: a thread sums over the quarters by fused multiply-adds; a tree sums what is left.
    total = tl.zeros([BLOCK, BLOCK // 4], tl.float32)
    for index in tl.static_range(4):
        if len(kept_quarters) == 4:
            weight = kept_quarters[index]
        else:
            weight = _quarter(weight_ptr, 4 * MATRIX + index, BLOCK, LANES)
        total = tl.fma(weight, tl.broadcast_to(state[index][None, :], [BLOCK, BLOCK // 4]), total)
    return tl.sum(total, axis=1)


@triton.jit
def _products(weights, c, weight_ptr, SOURCES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The K products, in the order of SOURCES, made from the last to the first.

    Matrices that are loaded at each step are made first: in the other order an RGC's kernel was found to spill on
    sm_100.
    """
    products = ()
    for place in tl.static_range(len(SOURCES) - 1, -1, -1):
        quarters = _split(c[SOURCES[place]], BLOCK)
        products = (_product(weights[place], quarters, weight_ptr, place, BLOCK, LANES),) + products
    return products


@triton.jit
def _store(ptr, unit, plane, blocks, FIRST: tl.constexpr, COUNT: tl.constexpr, mask):
    """Store COUNT of the blocks, from the FIRST on, each `plane` numbers behind the one before.

    Two or four are joined, so that they are rearranged for the store by one round through shared memory.
    """
    pair = tl.arange(0, 2)
    if COUNT == 4:
        at = unit[:, None, None] + pair[None, :, None] * (2 * plane) + pair[None, None, :] * plane
        low, high = tl.join(blocks[FIRST], blocks[FIRST + 1]), tl.join(blocks[FIRST + 2], blocks[FIRST + 3])
        tl.store(ptr + at, tl.permute(tl.join(low, high), [0, 2, 1]), mask=mask[:, None, None])
    elif COUNT == 2:
        both = tl.join(blocks[FIRST], blocks[FIRST + 1])
        tl.store(ptr + unit[:, None] + pair[None, :] * plane, both, mask=mask[:, None])
    else:
        for k in tl.static_range(COUNT):
            tl.store(ptr + k * plane + unit, blocks[FIRST + k], mask=mask)


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on B, T
# or N, so it would be wasted work.
@triton.jit(do_not_specialize=["T", "B", "N"])
def _on_chip_kernel(
    x_ptr,  # [J, T, B, N]
    weight_ptr,  # [K, 4, BLOCK² / 4]: the matrices by the state that they read, as `in_quarters` lays them out
    resets_ptr,  # [T, B], or None
    states_ptr,  # [S, T + 1, B, N]: the first step is given, the others are written
    saved_ptr,  # [T, B, F, N]: written; or None
    T,
    B,
    N,
    UPDATE: tl.constexpr,
    SOURCES: tl.constexpr,  # for each of the K matrices, the state that it reads
    ENTERING: tl.constexpr,  # for each gate, which of them enter it
    S: tl.constexpr,
    J: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,  # N or more, a power of 2
    LANES: tl.constexpr,  # threads of a warp
    HELD: tl.constexpr,  # how many matrices stay in registers; the others are loaded at each step
):
    # A step is K products of a matrix and a vector, whose latency is what it takes. `tl.dot` would waste 15 of the 16
    # rows of its tile. Weights that aren't kept in registers lie in the multiprocessor's own cache, beside the data
    # that streams through it.
    b = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK)
    inside = unit < N
    weights = ()
    for k in tl.static_range(len(SOURCES)):
        if k % (len(SOURCES) // HELD) == 0 and k // (len(SOURCES) // HELD) < HELD:
            weights = weights + (_quarters(weight_ptr, k, BLOCK, LANES),)
        else:
            weights = weights + ((),)

    step = tl.cast(B, tl.int64) * N
    x_plane, plane = step * T, step * (T + 1)
    x_ptr += b * N
    states_ptr += b * N
    if resets_ptr is not None:
        resets_ptr += b
        reset = tl.load(resets_ptr)
    if saved_ptr is not None:
        saved_ptr += b * F * N

    c = load_planes(states_ptr, unit, plane, inside, S)
    x = load_planes(x_ptr, unit, x_plane, inside, J)
    for t in range(T):
        # Load the next step's inputs and reset now, so that they have arrived when they are needed.
        x_ptr += step
        next_x = load_planes(x_ptr, unit, x_plane, inside & (t + 1 < T), J)
        if resets_ptr is not None:
            c = kept(reset == 0, c)
            resets_ptr += B
            reset = tl.load(resets_ptr, mask=t + 1 < T, other=0)
        products = _products(weights, c, weight_ptr, SOURCES, BLOCK, LANES)
        found = UPDATE(c, pre_activations(products, ENTERING, unit), x)
        if saved_ptr is not None:
            _store(saved_ptr, unit, N, found, S, F, inside)
            saved_ptr += F * step
        c = part(found, 0, S)
        x = next_x
        states_ptr += step
        _store(states_ptr, unit, plane, c, 0, S, inside)


class Config(NamedTuple):
    """How one program is laid out.

    block      units that it has room for, N or more
    held       how many of the matrices stay in registers
    num_warps  Triton's option
    """

    block: int
    held: int
    num_warps: int


def pick_config(N: int, matrices: int, warp_size: int) -> Config:
    """The layout for a layer of N ≤ 128 units and K matrices. A pure function.

    All weights stay in registers where that takes at most 128 of the 255 registers of a thread. So do those of an RGC's
    four matrices up to 64 units where warps have 32 threads, and 128 where they have 64 (AMD). Beyond, half of the
    matrices stay: a program then takes all registers of a multiprocessor, and keeping three of four was found to spill
    on sm_100.
    """
    block = max(warp_size, triton.next_power_of_2(N))
    held = matrices
    if _registers(block, matrices, warp_size) > WEIGHT_REGISTERS:
        held = max(1, matrices // 2)
    return Config(block, held, num_warps=block // 16)


def _registers(block: int, matrices: int, warp_size: int) -> int:
    """Registers of a thread that the weights take: 16 rows a warp."""
    return 16 * block * matrices // warp_size


def on_chip(N: int, B: int, matrices: int, inputs: int, multiprocessors: int, warp_size: int = 32) -> bool:
    """Whether one launch takes B batch rows of N units, K matrices and J inputs through all steps. A pure function.

    Where all weights stay in registers and N is at most 64, it does for any B. Beyond, each program has a
    multiprocessor to itself; one launch beats two per step only if all rows run at once, so there may be no more rows
    than multiprocessors. Where weights must be loaded at each step, those of four matrices of 128 units fit in the
    cache, and a unit may have one input: an LSTM's and a GRU's kernels were found to spill on sm_100.
    """
    if not 0 < N <= MOST or not 0 < matrices * N**2 <= 4 * MOST**2:
        return False
    all_held = pick_config(N, matrices, warp_size).held == matrices
    return (all_held and N <= SMALL) or ((all_held or inputs == 1) and multiprocessors >= B)


@torch.no_grad()
def cell_forward(
    cell: CellFunctions,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    save: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run a cell of at most 128 units over time, in one launch for all steps (equations at the top).

    A program takes one batch row through all steps, with the weights in its registers, or some of them there and
    the rest in the multiprocessor's own cache. Matrix products are in full float32, whatever torch's precision for them
    is set to. `on_chip` says where this is the fastest way.

    The cost of a step of an RGC of 128 units on sm_90, counted from the machine code of its own kernel before it was a
    case of this one: 65,536 multiply-adds, which take 512 clocks at peak; 570 instructions of each of eight warps,
    1,140 clocks of four schedulers; 128 KiB of weights from the cache, 1,024 clocks; beside these, 16 shuffles and 16
    loads from shared memory of each warp, about 400 clocks. Predicted from that, at 1.7 GHz: 0.9 to 1.1 µs. Two
    launches in a CUDA graph are taken to cost 3 µs.

    Args:
        x: per-unit inputs, (J, T, B, N) float32, contiguous.
        weights: the K matrices, (N, N) float32 each, contiguous.
        state: the S states before the first step, (B, N) float32 each, contiguous.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state counts as zero before that step. Or None.
        save: whether to return what the backward pass needs of the pre-activations.

    Nothing is mutated, and autograd doesn't follow it.

    Returns:
        The states (S, T + 1, B, N), starting with the given ones, each as it was before the next step's resets. And
        what is saved (T, B, F, N), or None. Float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them, or more than 128 units), device or stride; or
            tensors that aren't on a GPU while kernels aren't interpreted.
    """
    _, steps, batch, units = check_dims("x", x, "JTBN")
    if units > MOST:
        raise ValueError(f"x must have at most {MOST} units, got {units}")
    check_tensor("x", x, (cell.inputs, steps, batch, units), x)
    check_matrices(cell, weights, units, x)
    if len(state) != cell.states:
        raise ValueError(f"state must hold {cell.states} tensors, got {len(state)}")
    for index, value in enumerate(state):
        check_tensor(f"state[{index}]", value, (batch, units), x)
    if resets is not None:
        check_tensor("resets", resets, (steps, batch), x, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_on_chip_kernel, "x", x)

    states = torch.empty(cell.states, steps + 1, batch, units, dtype=torch.float32, device=x.device)
    for nu, value in enumerate(state):
        states[nu, 0] = value
    saved = None
    if save:
        saved = torch.empty(steps, batch, cell.saves, units, dtype=torch.float32, device=x.device)
    warp = device_sizes(x).warp
    config = pick_config(units, cell.matrices, warp)
    with torch.cuda.device_of(x):
        _on_chip_kernel[(batch,)](
            x,
            in_quarters([weights[k] for k in cell.order], config.block, warp),
            resets,
            states,
            saved if cell.saves else None,
            steps,
            batch,
            units,
            UPDATE=cell.update,
            SOURCES=tuple(cell.reads[k] for k in cell.order),
            ENTERING=cell.entering,
            S=cell.states,
            J=cell.inputs,
            F=cell.saves,
            BLOCK=config.block,
            LANES=warp,
            HELD=config.held,
            num_warps=config.num_warps,
        )
    return states, saved


def in_quarters(weights: Sequence[Tensor], block: int, lanes: int) -> Tensor:
    """The weights in the order in which `_quarter` loads them, (K, 4, block² / 4): by matrix and quarter of columns.

    Each matrix is padded with zeros to block × block. The order within a quarter is, from slow to fast: block // lanes
    groups of columns, block // 16 warps, eight by lanes // 8 threads of a warp, two rows, two columns.
    """
    beyond = block - weights[0].shape[0]
    padded = torch.nn.functional.pad(torch.stack(list(weights)), (0, beyond, 0, beyond))
    tiles = padded.view(len(weights), block // 16, 8, 2, 4, block // lanes, lanes // 8, 2)
    return tiles.permute(0, 4, 5, 1, 2, 6, 3, 7).reshape(len(weights), 4, block * block // 4)
