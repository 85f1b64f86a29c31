"""RGC forward in time: one launch for up to 128 units, a product and a pointwise pass a step for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width

# Units up to which one program takes a row through all steps: of MOST the weights are 256 KiB, as many bytes as a
# multiprocessor has registers on NVIDIA. Up to SMALL two rows or more share one.
SMALL, MOST = 64, 128


@triton.jit
def tanh(x):
    # With exp(-2x) it would be NaN at large negative x.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _quarter(weight_ptr, INDEX: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """A quarter of a matrix's columns, [BLOCK, BLOCK // 4], as `in_quarters` lays it out.

    A warp has 16 rows, a lane two of them and in each two columns of every LANES / 4: one access moves two by two
    numbers, and a sum over columns ends with LANES / 8 lanes.
    """
    size: tl.constexpr = BLOCK * BLOCK // 4
    flat = tl.load(weight_ptr + INDEX * size + tl.arange(0, size), eviction_policy="evict_last")
    tile = tl.reshape(flat, [BLOCK // LANES, BLOCK // 16, 8, LANES // 8, 2, 2])
    return tl.reshape(tl.permute(tile, [1, 2, 4, 0, 3, 5]), [BLOCK, BLOCK // 4])


@triton.jit
def _quarters(weight_ptr, MATRIX: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    return (
        _quarter(weight_ptr, 4 * MATRIX, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 1, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 2, BLOCK, LANES),
        _quarter(weight_ptr, 4 * MATRIX + 3, BLOCK, LANES),
    )


@triton.jit
def _split(state, BLOCK: tl.constexpr):
    """The four quarters of a state."""
    low, high = tl.split(tl.permute(tl.reshape(state, [2, 2, BLOCK // 4]), [2, 1, 0]))
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@triton.jit
def _product(
    kept,  # four of [BLOCK, BLOCK // 4]
    state,  # four of [BLOCK // 4]
    weight_ptr,
    MATRIX: tl.constexpr,
    KEPT: tl.constexpr,  # whether `kept` is in registers, else it is read again
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    # Quarters add up in a thread by fused operations, what is left by a tree.
    total = tl.zeros([BLOCK, BLOCK // 4], tl.float32)
    for index in tl.static_range(4):
        if KEPT:
            weight = kept[index]
        else:
            weight = _quarter(weight_ptr, 4 * MATRIX + index, BLOCK, LANES)
        total = tl.fma(weight, tl.broadcast_to(state[index][None, :], [BLOCK, BLOCK // 4]), total)
    return tl.sum(total, axis=1)


# B, T and N set no layout, so they shall not compile the kernel anew when they are 1 or multiples of 16.
@triton.jit(do_not_specialize=["T", "B", "N"])
def _rgc_small_kernel(
    x_ptr,  # [T, B, N]
    weight_ptr,  # `in_quarters`: ss, sm, mm, ms
    resets_ptr,  # [T, B], or None
    states_ptr,  # [2, T + 1, B, N], the first step given
    gates_ptr,  # [2, T, B, 2, N], or None
    T,
    B,
    N,
    BLOCK: tl.constexpr,  # N or more
    LANES: tl.constexpr,  # of a warp
    ALL_KEPT: tl.constexpr,  # whether all weights are in registers; else sm and ms are read on each step
):
    # One program: one batch row, all of its units, all steps. A product of a matrix and a vector on each
    # step: its latency is what a step takes, and a matrix product's tile would waste 15 rows in 16. Weights that
    # aren't kept are 128 KiB at most, which the multiprocessor's own cache holds beside what goes through it.
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
        gates_ptr += b * 2 * N
        gates_at = unit[:, None, None] + pair[None, :, None] * (step * 2 * T) + pair[None, None, :] * N

    s = tl.load(states_ptr + unit, mask=inside, other=0.0)
    m = tl.load(states_ptr + plane + unit, mask=inside, other=0.0)
    u = tl.load(x_ptr + unit, mask=inside, other=0.0)
    for t in range(T):
        # What the next step takes from memory, asked for now.
        x_ptr += step
        next_u = tl.load(x_ptr + unit, mask=inside & (t + 1 < T), other=0.0)
        if resets_ptr is not None:
            keep = reset == 0
            s = tl.where(keep, s, 0.0)
            m = tl.where(keep, m, 0.0)
            resets_ptr += B
            reset = tl.load(resets_ptr, mask=t + 1 < T, other=0)
        # What is read comes first: in the other order it was found to spill on sm_100.
        of_m = _split(m, BLOCK)
        ms = tanh(_product(w_ms, of_m, weight_ptr, 3, ALL_KEPT, BLOCK, LANES))
        mm = tanh(_product(w_mm, of_m, weight_ptr, 2, True, BLOCK, LANES))
        of_s = _split(s, BLOCK)
        sm = tanh(_product(w_sm, of_s, weight_ptr, 1, ALL_KEPT, BLOCK, LANES))
        ss = tanh(_product(w_ss, of_s, weight_ptr, 0, True, BLOCK, LANES))
        # Joined, they go through shared memory to where they are stored from in one round.
        if gates_ptr is not None:
            gates = tl.permute(tl.join(tl.join(ss, sm), tl.join(mm, ms)), [0, 2, 1])
            tl.store(gates_ptr + gates_at, gates, mask=inside[:, None, None])
            gates_ptr += 2 * step
        s = (1.0 - ms) * u + ss * s
        m = (1.0 - sm) * u + mm * m
        u = next_u
        states_ptr += step
        tl.store(states_ptr + states_at, tl.join(s, m), mask=inside[:, None])


@triton.jit(do_not_specialize=["stride_gates", "stride_before", "stride_after", "stride_next"])
def _rgc_pointwise_kernel(
    gates_ptr,  # [2, B, 2, N]: pre-activations, then their tanh
    before_ptr,  # [2, B, N]
    u_ptr,  # [B, N]
    after_ptr,  # [2, B, N]
    resets_ptr,  # [B], or None with next_ptr
    next_ptr,  # [2, B, N], or None
    N,
    stride_gates,
    stride_before,
    stride_after,
    stride_next,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of N: numbers that one access moves
):
    # One program: BLOCK units of one batch row.
    N = N // VECTOR * VECTOR  # N itself, and the compiler sees what divides it
    stride_gates = tl.cast(stride_gates, tl.int64) // VECTOR * VECTOR
    stride_before = tl.cast(stride_before, tl.int64) // VECTOR * VECTOR
    stride_after = tl.cast(stride_after, tl.int64) // VECTOR * VECTOR
    tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < N
    at = b * N + unit
    gates_ptr += b * 2 * N

    s = tl.load(before_ptr + at, mask=mask, other=0.0)
    m = tl.load(before_ptr + stride_before + at, mask=mask, other=0.0)
    u = tl.load(u_ptr + at, mask=mask, other=0.0)
    ss = tanh(tl.load(gates_ptr + unit, mask=mask, other=0.0))
    sm = tanh(tl.load(gates_ptr + N + unit, mask=mask, other=0.0))
    mm = tanh(tl.load(gates_ptr + stride_gates + unit, mask=mask, other=0.0))
    ms = tanh(tl.load(gates_ptr + stride_gates + N + unit, mask=mask, other=0.0))
    tl.store(gates_ptr + unit, ss, mask=mask)
    tl.store(gates_ptr + N + unit, sm, mask=mask)
    tl.store(gates_ptr + stride_gates + unit, mm, mask=mask)
    tl.store(gates_ptr + stride_gates + N + unit, ms, mask=mask)

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
    """Units of one program, N or more; whether all weights are in registers; and warps."""

    block: int
    all_kept: bool
    num_warps: int


def pick_small_config(N: int, warp_size: int) -> SmallConfig:
    """For a layer of N ≤ 128 units. Pure.

    All weights are kept where a lane has at most 128 of its 255 registers for them, as it has at 128 units where
    warps have 64 lanes (AMD, with twice as many registers a multiprocessor). Where they have 32, half of them are
    kept: a program takes all of a multiprocessor's registers, and three matrices were found to spill on sm_100.
    """
    block = max(warp_size, triton.next_power_of_2(N))
    return SmallConfig(block, all_kept=block <= 2 * warp_size, num_warps=block // 16)


def on_chip(N: int, B: int, multiprocessors: int) -> bool:
    """Whether one launch takes B rows of N units through all steps. Pure.

    Beyond 64 units a program has a multiprocessor to itself, and must be faster than two launches for all rows: so
    there are no more rows than multiprocessors. Up to 64 any number goes.
    """
    return N <= SMALL or (N <= MOST and multiprocessors >= B)


class PointwiseConfig(NamedTuple):
    """Units of one program, which is one warp, and the numbers that one access moves."""

    block: int
    vector: int


def pick_pointwise_config(N: int, warp_size: int) -> PointwiseConfig:
    """For a layer of N units. Pure.

    Four units a lane make 128-bit accesses, and one warp makes as many programs as there can be.
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
    """What an RGC step does beside its matrix products, in one pass (paper, eq. 13).

        s(t) = (1 - tanh ms) u + tanh(ss) s'          m(t) = (1 - tanh sm) u + tanh(mm) m'

    A step's products read the state before it, zero in the rows that it resets. So the step before writes it:
    `after` is the state, next_before the same with the rows of next_resets zeroed. In place of `before` is
    allowed, as this step's products have been made.

    Args:
        pre: pre-activations by source, (2, B, 2, N) float32: ss and sm of source s, mm and ms of source m.
            Mutated: their tanh.
        before: the state that the products read, s and m, (2, B, N) float32.
        u: the layer's input, (B, N) float32, contiguous.
        after: the new state, (2, B, N) float32. Mutated.
        next_resets: (B,) bool or uint8, rows that the next step resets, or None. It needs next_before.
        next_before: (2, B, N) float32, or None. Mutated. It needs next_resets.

    The first index of pre, before, after and next_before may have any stride; what it indexes must be
    contiguous. Fast where four divides N, and those strides.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device or stride; one of next_resets and
            next_before without the other; tensors that aren't on a GPU, where kernels aren't interpreted.
    """
    _, batch, _, units = check_dims("pre", pre, "SBSN")
    check_tensor("pre", pre, (2, batch, 2, units), pre, any_stride=1)
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
    """`rgc_pointwise_` of arguments that are known to be right, next_resets in uint8."""
    batch, units = u.shape
    strides = [0 if a is None else a.stride(0) for a in (pre, before, after, next_before)]
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
    """Run an RGC over time (paper, eq. 13; prime is the step before, zero in the rows that are reset).

        s(t) = (1 - tanh(W_ms m')) x + tanh(W_ss s') s'
        m(t) = (1 - tanh(W_sm s')) x + tanh(W_mm m') m'

    Up to 64 units, and up to 128 of as many rows as the GPU has multiprocessors, all steps are one launch,
    `rgc_forward_small`; beyond, a step is one matrix product for both sources, by torch and in torch's precision
    for float32 products, and one pointwise pass. No step waits for the host.

    Args:
        x: the layer's per-unit input, (T, B, N) float32, contiguous.
        weights: W_ss, W_ms, W_mm, W_sm, (N, N) float32 each, contiguous.
        state: s and m before the first step, (B, N) float32 each, contiguous.
        resets: (T, B) bool or uint8, contiguous: rows whose state counts as zero before that step. Or None.
        save_gates: whether to return the gates. Without them memory is halved and more, and a product over
            all of T and B makes them again: tanh of before @ Wᵀ.

    Nothing is mutated, and nothing differentiated.

    Returns:
        The states (2, T + 1, B, N), first the given ones, as they were before resets, and the gates
        (2, T, B, 2, N): tanh of ss and sm by source s, of mm and ms by source m; or None. Float32.

    Raises:
        TypeError: an argument that isn't a tensor, or a wrong dtype.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
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
    """`rgc_forward` of at most 128 units, in one launch for all steps.

    A program takes one batch row through all steps, with the weights in its registers, or half of them there and
    half in the multiprocessor's own cache. Products are sums of float32 products, whatever torch's precision for
    them.

    A step of 128 units on sm_90, counted from the machine code: 65,536 multiply-adds, of which the peak takes 512
    clocks; 570 instructions of each of eight warps, 1,140 clocks of four schedulers; 128 KiB of weights from the
    cache, 1,024 clocks, behind which 16 shuffles and 16 loads from shared memory of each warp take about 400. Predicted
    from that, at 1.7 GHz: 0.9 to 1.1 µs; two launches in a CUDA graph are taken for 3 µs.

    Args, returns and raises as `rgc_forward`; ValueError for more than 128 units as well.
    """
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] > MOST:
        raise ValueError(f"x must have at most {MOST} units, got {x.shape[2]}")
    return _small(*checked(x, weights, state, resets), save_gates)


def checked(
    x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], resets: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor, Tensor | None]:
    """x, weights, an array of states with its first one written, and resets in uint8."""
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
        gates = torch.empty(2, steps, batch, 2, units, dtype=torch.float32, device=x.device)
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
    gates = torch.empty(2, steps if save_gates else 1, batch, 2, units, dtype=torch.float32, device=x.device)
    joined = joined_by_source(weights).mT
    products_at = gates.flatten(-2).unbind(1)
    x_at, state_at, gates_at = x.unbind(0), states.unbind(1), gates.unbind(1)
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
    """(2, 2N, N): what source s drives, W_ss above W_sm, and what source m drives, W_mm above W_ms."""
    ss, ms, mm, sm = weights
    return torch.stack([ss, sm, mm, ms]).unflatten(0, (2, 2)).flatten(1, 2)


def in_quarters(weights: Sequence[Tensor], block: int, lanes: int) -> Tensor:
    """Weights as `_quarter` reads them, zero beyond their units: (4, 4, block² / 4) by matrix and quarter of columns.

    Within a quarter: block // lanes groups of columns, block // 16 warps, eight and lanes // 8 lanes, two rows, two
    columns.
    """
    units = weights[0].shape[0]
    beyond = block - units
    padded = torch.nn.functional.pad(joined_by_source(weights).view(4, units, units), (0, beyond, 0, beyond))
    tiles = padded.view(4, block // 16, 8, 2, 4, block // lanes, lanes // 8, 2)
    return tiles.permute(0, 4, 5, 1, 2, 6, 3, 7).reshape(4, 4, block * block // 4)
