"""Run an RGC forward in time: one launch for all steps up to 128 units, a product and a pointwise pass per step beyond.

Recursion (paper, eq. 13; a prime is the step before, u the layer's input):

    s(t) = (1 - tanh(W_ms m')) u + tanh(W_ss s') s'
    m(t) = (1 - tanh(W_sm s')) u + tanh(W_mm m') m'

`_rgc_small_kernel`, all steps of up to 128 units. Grid: B. A program owns one batch row, all units and all steps,
with all or half of the weights and both states in registers. Per step it reads u and writes both states and, if
wanted, the four gates.

`_rgc_pointwise_kernel`, one step of any number of units after torch has multiplied the matrices. Grid: B · (tiles of
BLOCK of the N units). A program, one warp, owns BLOCK units of one batch row. It reads four pre-activations, two
states and u; it writes four gates and two states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width

# Largest layers that one program takes through all steps. The weights of MOST units are 256 KiB, as many bytes as a
# multiprocessor of NVIDIA's has registers; up to SMALL units, two programs or more share a multiprocessor.
SMALL, MOST = 64, 128


@triton.jit
def tanh(x):
    # tanh by exp(2x): the form with exp(-2x) is NaN at large negative x.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


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
    kept,  # four of [BLOCK, BLOCK // 4]: the matrix
    state,  # four of [BLOCK // 4]
    weight_ptr,
    MATRIX: tl.constexpr,
    KEPT: tl.constexpr,  # whether the matrix is kept in registers as `kept`; else it is loaded again
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    # W c, [BLOCK]: a thread sums over the quarters by fused multiply-adds; a tree sums what is left.
    total = tl.zeros([BLOCK, BLOCK // 4], tl.float32)
    for index in tl.static_range(4):
        if KEPT:
            weight = kept[index]
        else:
            weight = _quarter(weight_ptr, 4 * MATRIX + index, BLOCK, LANES)
        total = tl.fma(weight, tl.broadcast_to(state[index][None, :], [BLOCK, BLOCK // 4]), total)
    return tl.sum(total, axis=1)


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. No memory layout depends on B, T
# or N, so it would be wasted work.
@triton.jit(do_not_specialize=["T", "B", "N"])
def _rgc_small_kernel(
    x_ptr,  # [T, B, N]
    weight_ptr,  # [4, 4, BLOCK² / 4]: W_ss, W_sm, W_mm, W_ms, as `in_quarters` lays them out
    resets_ptr,  # [T, B], or None
    states_ptr,  # [2, T + 1, B, N]: the first step is given, the others are written
    gates_ptr,  # [T, B, 2, 2, N]: written; or None
    T,
    B,
    N,
    BLOCK: tl.constexpr,  # N or more, a power of 2
    LANES: tl.constexpr,  # threads of a warp
    ALL_KEPT: tl.constexpr,  # whether all weights stay in registers; else W_sm and W_ms are loaded at each step
):
    # Each step is four products of a matrix and a vector, whose latency is what a step takes. `tl.dot` would waste 15
    # of the 16 rows of its tile. Weights that aren't kept in registers are 128 KiB at most, which the multiprocessor's
    # own cache holds beside the data that streams through it.
    b = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK)
    inside = unit < N
    w_ss = _quarters(weight_ptr, 0, BLOCK, LANES)
    w_sm = _quarters(weight_ptr, 1, BLOCK, LANES)
    w_mm = _quarters(weight_ptr, 2, BLOCK, LANES)
    w_ms = _quarters(weight_ptr, 3, BLOCK, LANES)

    step = tl.cast(B, tl.int64) * N
    plane = step * (T + 1)
    x_ptr += b * N
    states_ptr += b * N
    pair = tl.arange(0, 2)
    states_at = unit[:, None] + pair[None, :] * plane
    if resets_ptr is not None:
        resets_ptr += b
        reset = tl.load(resets_ptr)
    if gates_ptr is not None:
        gates_ptr += b * 4 * N
        gates_at = unit[:, None, None] + pair[None, :, None] * (2 * N) + pair[None, None, :] * N

    s = tl.load(states_ptr + unit, mask=inside, other=0.0)
    m = tl.load(states_ptr + plane + unit, mask=inside, other=0.0)
    u = tl.load(x_ptr + unit, mask=inside, other=0.0)
    for t in range(T):
        # Load the next step's input and reset now, so that they have arrived when they are needed.
        x_ptr += step
        next_u = tl.load(x_ptr + unit, mask=inside & (t + 1 < T), other=0.0)
        if resets_ptr is not None:
            keep = reset == 0
            s = tl.where(keep, s, 0.0)
            m = tl.where(keep, m, 0.0)
            resets_ptr += B
            reset = tl.load(resets_ptr, mask=t + 1 < T, other=0)
        # Matrices that may be loaded come first: in the other order the kernel was found to spill on sm_100.
        m_quarters = _split(m, BLOCK)
        ms = tanh(_product(w_ms, m_quarters, weight_ptr, 3, ALL_KEPT, BLOCK, LANES))
        mm = tanh(_product(w_mm, m_quarters, weight_ptr, 2, True, BLOCK, LANES))
        s_quarters = _split(s, BLOCK)
        sm = tanh(_product(w_sm, s_quarters, weight_ptr, 1, ALL_KEPT, BLOCK, LANES))
        ss = tanh(_product(w_ss, s_quarters, weight_ptr, 0, True, BLOCK, LANES))
        # Joined, the gates are rearranged for the store by one round through shared memory instead of four.
        if gates_ptr is not None:
            gates = tl.permute(tl.join(tl.join(ss, sm), tl.join(mm, ms)), [0, 2, 1])
            tl.store(gates_ptr + gates_at, gates, mask=inside[:, None, None])
            gates_ptr += 4 * step
        s = (1.0 - ms) * u + ss * s
        m = (1.0 - sm) * u + mm * m
        u = next_u
        states_ptr += step
        tl.store(states_ptr + states_at, tl.join(s, m), mask=inside[:, None])


@triton.jit(do_not_specialize=["stride_before", "stride_after", "stride_next"])
def _rgc_pointwise_kernel(
    gates_ptr,  # [B, 2, 2, N]: read, pre-activations; then written, their tanh
    before_ptr,  # [2, B, N]: the state that the products read
    u_ptr,  # [B, N]
    after_ptr,  # [2, B, N]: written, the new state
    resets_ptr,  # [B]: whether the next step resets the batch row; or None with next_ptr
    next_ptr,  # [2, B, N]: written, the new state with those rows zeroed; or None
    N,
    stride_before,
    stride_after,
    stride_next,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # numbers that one memory access moves; divides N
):
    N = N // VECTOR * VECTOR  # leaves N and the strides as they are, and shows the compiler what divides them
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    stride_after = tl.cast(stride_after, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < N
    at = b * N + unit
    gates_ptr += b * 4 * N

    s = tl.load(before_ptr + at, mask=mask, other=0.0)
    m = tl.load(before_ptr + stride_before + at, mask=mask, other=0.0)
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    ss = tanh(tl.load(gates_ptr + unit, mask=mask, other=0.0))
    sm = tanh(tl.load(gates_ptr + N + unit, mask=mask, other=0.0))
    mm = tanh(tl.load(gates_ptr + 2 * N + unit, mask=mask, other=0.0))
    ms = tanh(tl.load(gates_ptr + 3 * N + unit, mask=mask, other=0.0))
    tl.store(gates_ptr + unit, ss, mask=mask)
    tl.store(gates_ptr + N + unit, sm, mask=mask)
    tl.store(gates_ptr + 2 * N + unit, mm, mask=mask)
    tl.store(gates_ptr + 3 * N + unit, ms, mask=mask)

    s = (1.0 - ms) * u + ss * s
    m = (1.0 - sm) * u + mm * m
    tl.store(after_ptr + at, s, mask=mask)
    tl.store(after_ptr + stride_after + at, m, mask=mask)
    if next_ptr is not None:
        stride_next = tl.cast(stride_next, tl.int64) // VECTOR * VECTOR
        keep = tl.load(resets_ptr + b) == 0
        tl.store(next_ptr + at, tl.where(keep, s, 0.0), mask=mask)
        tl.store(next_ptr + stride_next + at, tl.where(keep, m, 0.0), mask=mask)


class SmallConfig(NamedTuple):
    """How one program of `_rgc_small_kernel` is laid out.

    block      units that it has room for, N or more
    all_kept   whether all weights stay in registers; else half of them
    num_warps  Triton's option
    """

    block: int
    all_kept: bool
    num_warps: int


def pick_small_config(N: int, warp_size: int) -> SmallConfig:
    """The layout for a layer of N ≤ 128 units. A pure function.

    All weights stay in registers where that takes at most 128 of the 255 registers of a thread. At 128 units that is so
    where warps have 64 threads (AMD, with twice as many registers per multiprocessor). Where warps have 32, half of
    the weights stay: a program then takes all registers of a multiprocessor, and keeping three matrices was found to
    spill on sm_100.
    """
    block = max(warp_size, triton.next_power_of_2(N))
    return SmallConfig(block, all_kept=block <= 2 * warp_size, num_warps=block // 16)


def on_chip(N: int, B: int, multiprocessors: int) -> bool:
    """Whether `rgc_forward` takes B batch rows of N units through all steps in one launch. A pure function.

    Up to 64 units it does for any B. Beyond, each program has a multiprocessor to itself; one launch beats two per
    step only if all rows run at once, so there may be no more rows than multiprocessors.
    """
    return N <= SMALL or (N <= MOST and multiprocessors >= B)


class PointwiseConfig(NamedTuple):
    """How one program, of one warp, of `_rgc_pointwise_kernel` is laid out.

    block   units that it owns
    vector  numbers that one memory access moves
    """

    block: int
    vector: int


def pick_pointwise_config(N: int, warp_size: int) -> PointwiseConfig:
    """The layout for a layer of N units. A pure function.

    Four units per thread make 128-bit accesses, and one warp per program makes as many programs as possible.
    """
    return PointwiseConfig(4 * warp_size, vector_width(N, torch.float32))


def rgc_pointwise_(
    pre: Tensor,
    before: Tensor,
    u: Tensor,
    after: Tensor,
    next_resets: Tensor | None = None,
    next_before: Tensor | None = None,
) -> None:
    """One step of an RGC from its pre-activations, in one pass: what follows its matrix products (paper, eq. 13).

        s(t) = (1 - tanh p_ms) u + tanh(p_ss) s'          m(t) = (1 - tanh p_sm) u + tanh(p_mm) m'

    The products of the next step read the new state, zeroed in the batch rows that the next step resets. This pass
    writes both: the new state to `after`, the zeroed copy to next_before. next_before may be `before` itself, because
    this step's products have already read it.

    Args:
        pre: pre-activations p by the state that their matrices read, (B, 2, 2, N) float32, contiguous: [:, 0] is ss and
            sm, which read s, [:, 1] mm and ms, which read m. Mutated: replaced by their tanh.
        before: the state that the products read, s and m, (2, B, N) float32.
        u: the layer's input, (B, N) float32, contiguous.
        after: (2, B, N) float32. Mutated: receives the new state.
        next_resets: (B,) bool or uint8, batch rows that the next step resets, or None. It needs next_before.
        next_before: (2, B, N) float32, or None. Mutated: receives the new state with those rows zeroed. It needs
            next_resets.

    The first dimension of before, after and next_before may have any stride; the rest must be contiguous. Fast
    where four divides N and those strides.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; one of next_resets and
            next_before without the other; or tensors that aren't on a GPU while kernels aren't interpreted.
    """
    batch, _, _, units = check_dims("pre", pre, "BSSN")
    check_tensor("pre", pre, (batch, 2, 2, units), pre)
    check_tensor("before", before, (2, batch, units), pre, any_stride=1)
    check_tensor("u", u, (batch, units), pre)
    check_tensor("after", after, (2, batch, units), pre, any_stride=1)
    if (next_resets is None) != (next_before is None):
        raise ValueError("next_resets and next_before must be given together, got one of them")
    if next_resets is not None:
        assert next_before is not None
        check_tensor("next_resets", next_resets, (batch,), pre, (torch.bool, torch.uint8))
        check_tensor("next_before", next_before, (2, batch, units), pre, any_stride=1)
        next_resets = next_resets.view(torch.uint8)
    check_runnable(_rgc_pointwise_kernel, "pre", pre)
    _pointwise(pre, before, u, after, next_resets, next_before)


def _pointwise(
    pre: Tensor,
    before: Tensor,
    u: Tensor,
    after: Tensor,
    next_resets: Tensor | None,
    next_before: Tensor | None,
) -> None:
    """`rgc_pointwise_` without its checks; next_resets in uint8."""
    batch, units = u.shape
    strides = [0 if a is None else a.stride(0) for a in (before, after, next_before)]
    config = pick_pointwise_config(units, device_sizes(u).warp)
    vector = config.vector if all(stride % config.vector == 0 for stride in strides) else 1
    with torch.cuda.device_of(u):
        _rgc_pointwise_kernel[(batch * triton.cdiv(units, config.block),)](
            pre,
            before,
            u,
            after,
            next_resets,
            next_before,
            units,
            *strides,
            BLOCK=config.block,
            VECTOR=vector,
            num_warps=1,
        )


@torch.no_grad()
def rgc_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run an RGC over time (paper, eq. 13; a prime is the step before, zero in batch rows that are reset).

        s(t) = (1 - tanh(W_ms m')) x + tanh(W_ss s') s'
        m(t) = (1 - tanh(W_sm s')) x + tanh(W_mm m') m'

    Up to 64 units, and up to 128 where there are no more batch rows than multiprocessors, all steps take one launch,
    `rgc_forward_small`. Beyond, each step takes one batched matrix product, by torch and in torch's precision for
    float32 products, and one pointwise pass. No step waits for the host.

    Args:
        x: the layer's per-unit input, (T, B, N) float32, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous.
        state: s and m before the first step, (B, N) float32 each, contiguous.
        resets: (T, B) bool or uint8, contiguous: batch rows whose state counts as zero before that step. Or None.
        save_gates: whether to return the gates. Without them less than half the memory is used, and they can be made
            again by one product over all of T and B: tanh of before @ Wᵀ.

    Nothing is mutated, and autograd doesn't follow it.

    Returns:
        The states (2, T + 1, B, N), starting with the given ones, each as it was before the next step's resets. And
        the gates (T, B, 2, 2, N), tanh of the pre-activations: [:, :, 0] of ss and sm, which read s, [:, :, 1] of mm
        and ms, which read m; or None. Float32.

    Raises:
        TypeError: an argument isn't a tensor, or has another dtype.
        ValueError: a wrong shape (a dimension of size 0 among them), device or stride; or tensors that aren't on a
            GPU while kernels aren't interpreted.
    """
    given = checked(x, weights, state, resets)
    _, batch, units = x.shape
    run = _small if on_chip(units, batch, device_sizes(x).multiprocessors) else _by_step
    return run(*given, save_gates)


@torch.no_grad()
def rgc_forward_small(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`rgc_forward` for at most 128 units, in one launch for all steps (paper, eq. 13).

    A program takes one batch row through all steps, with the weights in its registers, or half of them there and
    half in the multiprocessor's own cache. Matrix products are in full float32, whatever torch's precision for them
    is set to.

    The cost of a step of 128 units on sm_90, counted from the machine code: 65,536 multiply-adds, which take 512
    clocks at peak; 570 instructions of each of eight warps, 1,140 clocks of four schedulers; 128 KiB of weights from
    the cache, 1,024 clocks; beside these, 16 shuffles and 16 loads from shared memory of each warp, about 400 clocks.
    Predicted from that, at 1.7 GHz: 0.9 to 1.1 µs. Two launches in a CUDA graph are taken to cost 3 µs.

    Arguments, results and errors are those of `rgc_forward`; also ValueError for more than 128 units.
    """
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] > MOST:
        raise ValueError(f"x must have at most {MOST} units, got {x.shape[2]}")
    return _small(*checked(x, weights, state, resets), save_gates)


def checked(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor, Tensor | None]:
    """The checked arguments of a forward pass: x, weights, states (2, T + 1, B, N) whose first step is `state`, and
    resets in uint8.

    Raises TypeError or ValueError as `rgc_forward` does.
    """
    steps, batch, units = check_dims("x", x, "TBN")
    check_tensor("x", x, (steps, batch, units), x)
    for name, values, shape, count in (
        ("weights", weights, (units, units), 4),
        ("state", state, (batch, units), 2),
    ):
        if len(values) != count:
            raise ValueError(f"{name} must hold {count} tensors, got {len(values)}")
        for index, value in enumerate(values):
            check_tensor(f"{name}[{index}]", value, shape, x)
    if resets is not None:
        check_tensor("resets", resets, (steps, batch), x, (torch.bool, torch.uint8))
        resets = resets.view(torch.uint8)
    check_runnable(_rgc_small_kernel, "x", x)
    states = torch.empty(2, steps + 1, batch, units, dtype=torch.float32, device=x.device)
    states[0, 0], states[1, 0] = state
    return x, weights, states, resets


def _small(
    x: Tensor, weights: Sequence[Tensor], states: Tensor, resets: Tensor | None, save_gates: bool
) -> tuple[Tensor, Tensor | None]:
    steps, batch, units = x.shape
    gates = None
    if save_gates:
        gates = torch.empty(steps, batch, 2, 2, units, dtype=torch.float32, device=x.device)
    warp = device_sizes(x).warp
    config = pick_small_config(units, warp)
    with torch.cuda.device_of(x):
        _rgc_small_kernel[(batch,)](
            x,
            in_quarters(weights, config.block, warp),
            resets,
            states,
            gates,
            steps,
            batch,
            units,
            BLOCK=config.block,
            LANES=warp,
            ALL_KEPT=config.all_kept,
            num_warps=config.num_warps,
        )
    return states, gates


def _by_step(
    x: Tensor, weights: Sequence[Tensor], states: Tensor, resets: Tensor | None, save_gates: bool
) -> tuple[Tensor, Tensor | None]:
    steps, batch, units = x.shape
    gates = torch.empty(steps if save_gates else 1, batch, 2, 2, units, dtype=torch.float32, device=x.device)
    joined = joined_by_source(weights).mT
    products_at = gates.flatten(-2).transpose(1, 2).unbind(0)
    x_at, state_at, gates_at = x.unbind(0), states.unbind(1), gates.unbind(0)
    signal = None if resets is None else states[:, 0].masked_fill(resets[0, :, None] != 0, 0)
    for t in range(steps):
        before = state_at[t] if signal is None else signal
        at = t if save_gates else 0
        torch.bmm(before, joined, out=products_at[at])
        next_resets = None if resets is None or t == steps - 1 else resets[t + 1]
        _pointwise(
            gates_at[at],
            before,
            x_at[t],
            state_at[t + 1],
            next_resets,
            None if next_resets is None else signal,
        )
    return states, gates if save_gates else None


def joined_by_source(weights: Sequence[Tensor]) -> Tensor:
    """The weights by the state that they read, (2, 2N, N): [0] W_ss above W_sm, which read s; [1] W_mm above W_ms."""
    ss, ms, mm, sm = weights
    return torch.stack([ss, sm, mm, ms]).unflatten(0, (2, 2)).flatten(1, 2)


def in_quarters(weights: Sequence[Tensor], block: int, lanes: int) -> Tensor:
    """The weights in the order in which `_quarter` loads them, (4, 4, block² / 4): by matrix and quarter of columns.

    Each matrix is padded with zeros to block × block. The order within a quarter is, from slow to fast: block // lanes
    groups of columns, block // 16 warps, eight by lanes // 8 threads of a warp, two rows, two columns.
    """
    units = weights[0].shape[0]
    beyond = block - units
    padded = torch.nn.functional.pad(joined_by_source(weights).view(4, units, units), (0, beyond, 0, beyond))
    tiles = padded.view(4, block // 16, 8, 2, 4, block // lanes, lanes // 8, 2)
    return tiles.permute(0, 4, 5, 1, 2, 6, 3, 7).reshape(4, 4, block * block // 4)
