"""RGC forward in time: one launch for small layers, a product and a pointwise pass a step for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, device_sizes, vector_width

# Units up to which one program can hold the weights: of twice as many they are 256 KiB, as many as a
# multiprocessor has registers.
SMALL = 64


@triton.jit
def tanh(x):
    # With exp(-2x) it would be NaN at large negative x.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


# B, T and N set no layout, so they shall not compile the kernel anew when they are 1 or multiples of 16.
@triton.jit(do_not_specialize=["T", "B", "N"])
def _rgc_small_kernel(
    x_ptr,  # [T, B, N]
    weight_ptr,  # [4, BLOCK, BLOCK], zero beyond N: ss, sm, mm, ms
    resets_ptr,  # [T, B], or None
    states_ptr,  # [2, T + 1, B, N], the first step given
    gates_ptr,  # [2, T, B, 2, N], or None
    T,
    B,
    N,
    BLOCK: tl.constexpr,  # N or more
):
    # One program: one batch row, all of its units, all steps. A product of a matrix and a vector on each
    # step: its latency is what a step takes, and a matrix product's tile would waste 15 rows in 16.
    b = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK)
    inside = unit < N
    tile = unit[:, None] * BLOCK + unit[None, :]
    square: tl.constexpr = BLOCK * BLOCK
    w_ss = tl.load(weight_ptr + tile)
    w_sm = tl.load(weight_ptr + square + tile)
    w_mm = tl.load(weight_ptr + 2 * square + tile)
    w_ms = tl.load(weight_ptr + 3 * square + tile)

    step = tl.cast(B, tl.int64) * N
    plane = step * (T + 1)
    x_ptr += b * N
    states_ptr += b * N
    if resets_ptr is not None:
        resets_ptr += b
    if gates_ptr is not None:
        gates_ptr += b * 2 * N
        gates_plane = step * 2 * T

    s = tl.load(states_ptr + unit, mask=inside, other=0.0)
    m = tl.load(states_ptr + plane + unit, mask=inside, other=0.0)
    for _ in range(T):
        u = tl.load(x_ptr + unit, mask=inside, other=0.0)
        if resets_ptr is not None:
            keep = tl.load(resets_ptr) == 0
            s = tl.where(keep, s, 0.0)
            m = tl.where(keep, m, 0.0)
            resets_ptr += B
        ss = tanh(tl.sum(w_ss * s[None, :], axis=1))
        sm = tanh(tl.sum(w_sm * s[None, :], axis=1))
        mm = tanh(tl.sum(w_mm * m[None, :], axis=1))
        ms = tanh(tl.sum(w_ms * m[None, :], axis=1))
        if gates_ptr is not None:
            tl.store(gates_ptr + unit, ss, mask=inside)
            tl.store(gates_ptr + N + unit, sm, mask=inside)
            tl.store(gates_ptr + gates_plane + unit, mm, mask=inside)
            tl.store(gates_ptr + gates_plane + N + unit, ms, mask=inside)
            gates_ptr += 2 * step
        s = (1.0 - ms) * u + ss * s
        m = (1.0 - sm) * u + mm * m
        x_ptr += step
        states_ptr += step
        tl.store(states_ptr + unit, s, mask=inside)
        tl.store(states_ptr + plane + unit, m, mask=inside)


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
    """Units of one program, N or more, and warps."""

    block: int
    num_warps: int


def pick_small_config(N: int) -> SmallConfig:
    """For a layer of N ≤ 64 units. Pure.

    Where a warp has 32 lanes the weights are 32 or 64 numbers a lane, and a program takes at most 160
    registers a lane: a multiprocessor has room for one or two programs of eight warps.
    """
    block = max(16, triton.next_power_of_2(N))
    return SmallConfig(block, num_warps={16: 1, 32: 4, 64: 8}[block])


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

    Up to 64 units all steps are one launch, `rgc_forward_small`; beyond, a step is one matrix product for
    both sources, by torch and in torch's precision for float32 products, and one pointwise pass. No step
    waits for the host.

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
    small = isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] <= SMALL
    return (_small if small else _by_step)(*checked(x, weights, state, resets), save_gates)


@torch.no_grad()
def rgc_forward_small(
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    save_gates: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`rgc_forward` of at most 64 units, in one launch for all steps.

    A program takes one batch row through all steps, with the weights in its registers. Products are sums of
    float32 products, whatever torch's precision for them.

    Args, returns and raises as `rgc_forward`; ValueError for more than 64 units as well.
    """
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] > SMALL:
        raise ValueError(f"x must have at most {SMALL} units, got {x.shape[2]}")
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
    config = pick_small_config(units)
    beyond = config.block - units
    padded = torch.nn.functional.pad(joined_by_source(weights).view(4, units, units), (0, beyond, 0, beyond))
    with torch.cuda.device_of(x):
        _rgc_small_kernel[(batch,)](
            x,
            padded,
            resets,
            states,
            gates,
            steps,
            batch,
            units,
            BLOCK=config.block,
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
