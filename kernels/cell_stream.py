"""Online learning of a layer with a linear readout: all steps of forward pass, Γ, loss, gradient and optimizer in one
launch, with weights, Γ and the optimizer's moments in registers.

For a cell (`_cell.CellFunctions`) and each step t of one batch row, with W as the step before left it:

    p = Σ_k W^k c(t-1), x = W_in u(t) + b, c(t) = F(c(t-1), p, x), o = W_o c^out(t) + b_o, L = loss(o, target)
    Γ^{ν,k} ← Σ_ν' M^{νν'} Γ^{ν',k} + φ^{ν,k} y^kᵀ,    ∂L/∂W^k = δ Γ^{out,k},  δ = ∂L/∂c^out

and the optimizer's step of all weights, at each or at every C-th step, as `rjepa_triton.Stream` says.

Grid: networks times TEAM. A program owns ROWS units of one network: their rows of W and of Γ. If that is all units, no
program waits for another. Else the programs of a network, its team, exchange their new states through memory and wait
for each other once a step; each keeps the readout whole, and they all take the same steps of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import kept, part
from ._launch import check_runnable
from ._stream import (
    INPUT,
    ONE,
    blocks_of,
    gamma_after,
    load_block,
    loss_of,
    meet,
    pointer,
    stepped_by,
    store_block,
)
from .stream_layout import Config, Problem, constants


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. Rows are read once a call.
@triton.jit(do_not_specialize=["T", "position", "begins"])
def _stream_kernel(
    table_ptr,  # [networks, A]: addresses, in the order that `stream_layout.addresses` says
    rates_ptr,  # [networks, groups + 2, T]: rates of each group of weights, and `stepped_by`'s scales
    exchange_ptr,  # [networks, 2, S + 1, BLOCK]: new states, and sums of squares; None without a team
    counter_ptr,  # [networks]: zeros; None without a team
    settings,  # beta1, 1 - beta1, beta2, 1 - beta2, eps, weight decay, Huber's delta, largest norm
    T,
    position,  # steps since the optimizer's last one
    begins,  # whether it has taken none
    UPDATE: tl.constexpr,
    PARTIALS: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,  # matrices of the cell, the first of the layer's
    FOUND: tl.constexpr,  # partials that PARTIALS finds
    SAVES: tl.constexpr,
    OUT: tl.constexpr,  # the state that the readout reads
    PASSES: tl.constexpr,  # whether the layer's input is the cell's first
    LINKS: tl.constexpr,  # for each ν and ν', whether M^{νν'} may be other than zero
    DIAGONAL: tl.constexpr,  # whether M counts recurrent weights (RFP)
    READS: tl.constexpr,  # for each of the layer's matrices: the state that it reads, INPUT or ONE
    OF_GATE: tl.constexpr,  # whether it enters a gate, or an input,
    INTO: tl.constexpr,  # and which
    PHI: tl.constexpr,  # for each state, the place of φ among the found and the saved; -1 where it is zero
    COLUMNS: tl.constexpr,  # its fan-in, a power of 2 or more than it needs; 1 for a vector
    SLOTS: tl.constexpr,  # of each block of weights: whose it is, in the table's order,
    LEARNS: tl.constexpr,  # whether it learns,
    NTH: tl.constexpr,  # how many blocks before it do,
    GROUPS: tl.constexpr,  # and the optimizer's group
    BIAS: tl.constexpr,  # whether the readout has one
    KIND: tl.constexpr,
    MOMENTS: tl.constexpr,  # how many moments a weight has
    DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr,
    EVERY: tl.constexpr,
    CLIPS: tl.constexpr,
    LOSS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    RATES: tl.constexpr,  # how many groups of weights
    A: tl.constexpr,  # addresses of a network
    FIRST: tl.constexpr,  # of these before those of weights
    BYTES: tl.constexpr,  # of each block: 16 where that divides the address of each row, else 4
    N: tl.constexpr,
    F: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    TEAM: tl.constexpr,
    ROWS: tl.constexpr,  # units of a program
    BLOCK: tl.constexpr,  # N or more, a power of 2
    FEATURES: tl.constexpr,  # F or more
    OUTPUTS: tl.constexpr,  # O or more
):
    EACH: tl.constexpr = 4 + S  # of a weight: itself, two moments, the gradient's sum, and Γ of each state
    SUMS: tl.constexpr = EVERY > 1 or CLIPS
    network = tl.program_id(0) // TEAM
    rank = tl.program_id(0) % TEAM
    table_ptr += network * A
    rates_ptr += network.to(tl.int64) * (RATES + 2) * T
    row = rank * ROWS + tl.arange(0, ROWS)
    unit = tl.arange(0, BLOCK)
    feature = tl.arange(0, FEATURES)
    place = tl.arange(0, OUTPUTS)
    here, there, given, shown = row < N, unit < N, feature < F, place < O
    leads = rank == 0

    x_ptr, target_ptr = pointer(table_ptr, 0), pointer(table_ptr, 1)
    outputs_ptr, losses_ptr, state_ptr = (
        pointer(table_ptr, 2),
        pointer(table_ptr, 4),
        pointer(table_ptr, 7),
    )
    classes_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.int64))
    hidden_ptr = pointer(table_ptr, 3)
    resets_ptr = tl.load(table_ptr + 5).to(tl.pointer_type(tl.uint8))
    mask_ptr = tl.load(table_ptr + 6).to(tl.pointer_type(tl.uint8))

    BEFORE: tl.constexpr = 1 + (TEAM > 1) + BIAS  # blocks of the readout's
    places, inside = blocks_of(rank, N, F, O, READS, COLUMNS, BIAS, TEAM, ROWS, BLOCK, OUTPUTS)
    weights, moments, totals, gammas = (), (), (), ()
    for block in tl.static_range(BEFORE + len(READS)):
        weights = weights + (
            load_block(table_ptr, FIRST + SLOTS[block] * EACH, BYTES[block], places[block], inside[block]),
        )
        if LEARNS[block]:
            for m in tl.static_range(MOMENTS):
                moments = moments + (
                    load_block(
                        table_ptr,
                        FIRST + SLOTS[block] * EACH + 1 + m,
                        BYTES[block],
                        places[block],
                        inside[block],
                    ),
                )
            if SUMS:
                totals = totals + (
                    load_block(
                        table_ptr, FIRST + SLOTS[block] * EACH + 3, BYTES[block], places[block], inside[block]
                    ),
                )
        if block >= BEFORE:
            for nu in tl.static_range(S):
                gammas = gammas + (
                    load_block(
                        table_ptr,
                        FIRST + SLOTS[block] * EACH + 4 + nu,
                        BYTES[block],
                        places[block],
                        inside[block],
                    ),
                )

    c, full = (), ()
    for nu in tl.static_range(S):
        c = c + (tl.load(state_ptr + nu * N + row, mask=here, other=0.0),)
        if TEAM > 1:
            full = full + (tl.load(state_ptr + nu * N + unit, mask=there, other=0.0),)
    if TEAM > 1:
        exchange_ptr += network * 2 * (S + 1) * BLOCK
        counter_ptr += network
    met = 0
    at_step = position
    first = begins != 0

    for t in range(T):
        at = tl.cast(t, tl.int64)  # a long call has more than 2³¹ numbers of x
        x = tl.load(x_ptr + at * F + feature, mask=given, other=0.0)
        keep = True
        if HAS_RESETS:
            keep = tl.load(resets_ptr + t) == 0
            c = kept(keep, c)
            full = kept(keep, full)
        seen = full if TEAM > 1 else c

        products, signals, own = (), (), ()
        for k in tl.static_range(len(READS)):
            weight = weights[BEFORE + k]
            if READS[k] == ONE:
                products = products + (weight,)
                signals = signals + (weight,)  # in its place: nothing is read
            elif COLUMNS[k] == 1:
                y = tl.load(x_ptr + at * F) if READS[k] == INPUT else c[READS[k]]
                products = products + (weight * y,)
                signals = signals + (y,)
            else:
                y = x if READS[k] == INPUT else seen[READS[k]]
                products = products + (tl.sum(weight * y[None, :], 1),)
                signals = signals + (y,)
            if k < K:
                if not DIAGONAL:
                    own = own + (tl.zeros([ROWS], tl.float32),)
                elif COLUMNS[k] == 1:
                    own = own + (weight,)
                else:
                    own = own + (tl.sum(tl.where(row[:, None] == unit[None, :], weight, 0.0), 1),)
        gates, inputs = (), ()
        for g in tl.static_range(G):
            total = tl.zeros([ROWS], tl.float32)
            for k in tl.static_range(len(READS)):
                if OF_GATE[k] and INTO[k] == g:
                    total += products[k]
            gates = gates + (total,)
        for j in tl.static_range(J):
            total = tl.zeros([ROWS], tl.float32)
            if PASSES and j == 0:
                total += tl.load(x_ptr + at * F + row, mask=here, other=0.0)
            for k in tl.static_range(len(READS)):
                if not OF_GATE[k] and INTO[k] == j:
                    total += products[k]
            inputs = inputs + (total,)

        updated = UPDATE(c, gates, inputs)
        saved = part(updated, S, SAVES)
        partials = PARTIALS(c, saved, inputs, own)
        c = kept(here, part(updated, 0, S))
        if HAS_HIDDEN:
            tl.store(hidden_ptr + at * N + row, c[OUT], mask=here)
        if TEAM > 1:
            new_ptr = exchange_ptr + (t % 2) * (S + 1) * BLOCK
            for nu in tl.static_range(S):
                tl.store(new_ptr + nu * BLOCK + row, c[nu], mask=here)
            met += 1
            meet(counter_ptr, met * TEAM)
            full = ()
            for nu in tl.static_range(S):
                full = full + (
                    tl.load(new_ptr + nu * BLOCK + unit, mask=there, other=0.0, cache_modifier=".cg"),
                )
        read = full[OUT] if TEAM > 1 else c[OUT]

        o = tl.sum(weights[0] * read[None, :], 1)
        if BIAS:
            o += weights[BEFORE - 1]
        tl.store(outputs_ptr + at * O + place, o, mask=shown & leads)
        aim, wanted = o, 0
        if LOSS == 1:
            wanted = tl.load(classes_ptr + t).to(tl.int32)
        else:
            aim = tl.load(target_ptr + at * O + place, mask=shown, other=0.0)
        loss, error = loss_of(o, aim, wanted, shown, O, settings[6], LOSS)
        if HAS_MASK:
            counts = tl.load(mask_ptr + t) != 0
            loss, error = tl.where(counts, loss, 0.0), tl.where(counts, error, 0.0)
        tl.store(losses_ptr + t, loss, mask=leads)
        delta = tl.sum(weights[1 if TEAM > 1 else 0] * error[:, None], 0)

        # Block by block Γ, the gradient, and the optimizer's step, lest they all wait in registers.
        scale1 = tl.load(rates_ptr + RATES * T + t)
        scale2 = tl.load(rates_ptr + (RATES + 1) * T + t)
        acts = at_step == EVERY - 1
        stepped, after, ahead, added = (), (), (), ()
        square = 0.0
        for block in tl.static_range(BEFORE + len(READS)):
            if block >= BEFORE:
                now = ()
                for nu in tl.static_range(S):
                    now = now + (
                        gamma_after(
                            gammas,
                            partials,
                            saved,
                            signals[block - BEFORE],
                            keep,
                            nu,
                            block - BEFORE,
                            S,
                            FOUND,
                            LINKS,
                            READS,
                            PHI,
                            HAS_RESETS,
                            ROWS,
                            COLUMNS[block - BEFORE],
                        ),
                    )
                ahead = ahead + now
                gradient = delta * now[OUT] if COLUMNS[block - BEFORE] == 1 else delta[:, None] * now[OUT]
            elif SLOTS[block] == 1:
                gradient = error
            elif block == 0:
                gradient = error[:, None] * read[None, :]
            else:
                gradient = error[:, None] * c[OUT][None, :]
            if not LEARNS[block]:
                stepped = stepped + (weights[block],)
            elif SUMS:
                gradient += tl.where(at_step == 0, 0.0, totals[NTH[block]])
                added = added + (gradient,)
                if CLIPS:
                    squares = gradient * gradient
                    if len(gradient.shape) == 2:
                        squares = tl.sum(squares, 1 if block >= BEFORE else 0)
                    if block >= BEFORE:
                        square += tl.sum(tl.where(here, squares, 0.0), 0)
                    elif block == 0 or SLOTS[block] == 1:
                        square += tl.where(leads, tl.sum(squares, 0), 0.0)
            else:
                weight, new = stepped_by(
                    weights[block],
                    part(moments, NTH[block] * MOMENTS, MOMENTS),
                    gradient,
                    tl.load(rates_ptr + GROUPS[block] * T + t),
                    scale1,
                    scale2,
                    first,
                    settings,
                    KIND,
                    DECAYS,
                    NESTEROV,
                )
                stepped = stepped + (weight,)
                after = after + new
        gammas = ahead
        if SUMS:
            scale = 1.0
            if CLIPS:
                if TEAM > 1:
                    sums_ptr = exchange_ptr + (t % 2 * (S + 1) + S) * BLOCK
                    tl.store(sums_ptr + rank, square)
                    met += 1
                    meet(counter_ptr, met * TEAM)
                    member = tl.arange(0, BLOCK)
                    parts = tl.load(sums_ptr + member, mask=member < TEAM, other=0.0, cache_modifier=".cg")
                    square = tl.sum(parts, 0)
                scale = tl.minimum(1.0, settings[7] / (tl.sqrt_rn(square) + 1e-6))
            totals, stepped = added, ()
            for block in tl.static_range(BEFORE + len(READS)):
                weight = weights[block]
                if LEARNS[block]:
                    old = part(moments, NTH[block] * MOMENTS, MOMENTS)
                    weight, new = stepped_by(
                        weight,
                        old,
                        totals[NTH[block]] * scale,
                        tl.load(rates_ptr + GROUPS[block] * T + t),
                        scale1,
                        scale2,
                        first,
                        settings,
                        KIND,
                        DECAYS,
                        NESTEROV,
                    )
                    weight = tl.where(acts, weight, weights[block])
                    for m in tl.static_range(MOMENTS):
                        after = after + (tl.where(acts, new[m], old[m]),)
                stepped = stepped + (weight,)
        weights, moments = stepped, after
        first = first & (acts == 0)
        at_step = tl.where(acts, 0, at_step + 1)

    for nu in tl.static_range(S):
        tl.store(state_ptr + nu * N + row, c[nu], mask=here)
    # The places are found again, from a number that the compiler can't foresee, lest they take registers all along.
    again = tl.where(at_step < 0, 1, rank)
    places, inside = blocks_of(again, N, F, O, READS, COLUMNS, BIAS, TEAM, ROWS, BLOCK, OUTPUTS)
    for block in tl.static_range(BEFORE + len(READS)):
        mine = inside[block]
        if block < BEFORE:
            mine = mine & leads
        if LEARNS[block] and (block == 0 or block >= BEFORE or SLOTS[block] == 1):
            store_block(
                table_ptr, FIRST + SLOTS[block] * EACH, BYTES[block], places[block], weights[block], mine
            )
            for m in tl.static_range(MOMENTS):
                moment = moments[NTH[block] * MOMENTS + m]
                store_block(
                    table_ptr, FIRST + SLOTS[block] * EACH + 1 + m, BYTES[block], places[block], moment, mine
                )
            if SUMS:
                store_block(
                    table_ptr,
                    FIRST + SLOTS[block] * EACH + 3,
                    BYTES[block],
                    places[block],
                    totals[NTH[block]],
                    mine,
                )
        if block >= BEFORE:
            for nu in tl.static_range(S):
                gamma = gammas[(block - BEFORE) * S + nu]
                store_block(
                    table_ptr, FIRST + SLOTS[block] * EACH + 4 + nu, BYTES[block], places[block], gamma, mine
                )


class Room(NamedTuple):
    """Where teams meet: new states and sums of squares (networks, 2, S + 1, BLOCK), and a count, zeros (networks,)."""

    exchange: Tensor | None
    counter: Tensor | None

    @classmethod
    def of(cls, problem: Problem, config: Config, networks: int, device: torch.device) -> Room:
        """Room for one call; none where a program has all units."""
        if config.team == 1:
            return cls(None, None)
        block = triton.next_power_of_2(problem.units)
        exchange = torch.empty(networks, 2, problem.cell.states + 1, block, device=device)
        return cls(exchange, torch.zeros(networks, dtype=torch.int32, device=device))


@torch.no_grad()
def cell_stream(
    problem: Problem,
    config: Config,
    table: Tensor,
    rates: Tensor,
    room: Room,
    settings: Sequence[float],
    steps: int,
    position: int,
    begins: bool,
    *,
    resets: bool,
    mask: bool,
    hidden: bool,
    alignment: int,
) -> None:
    """Learn from T steps of some networks, in one launch (equations at the top).

    The cost of a step of an RGC with SGD on sm_90, counted from the machine code. 32 units, one program of four
    warps: 742 instructions a warp, one warp a scheduler; 16 barriers of some 30 clocks; sums over lanes, some 28 of
    the 57 shuffles one after the other. In all 1,900 clocks, at 1.7 GHz predicted 1.1 µs. 64 units, two programs of
    eight warps: 1,670 clocks for 835 instructions of two warps, 21 barriers, 37 of 74 shuffles, and three trips to
    the L2 cache of some 0.4 µs, to store and count, to see the count, and to load: predicted 3.1 µs.

    Args:
        problem, config: what and how; of a team all programs must run at once.
        table: (networks, `stream_layout.addresses(problem)`) int64, of tensors on the GPU that stay alive: float32 and
            contiguous, but for classes int64, resets and mask of one byte a step.
        rates: (networks, groups + 2, T) float32: learning rates, and Adam's 1 / (1 - beta1ⁿ) and 1 / √(1 - beta2ⁿ).
        room: of the same networks, not used before.
        settings: beta1 (RMSprop's alpha, SGD's momentum), 1 - beta1, beta2, 1 - beta2 (1 - dampening), eps, weight
            decay, Huber's delta, the largest norm.
        steps, position: T ≥ 1; how many steps have run since the optimizer's last.
        begins: whether the optimizer has taken no step.
        resets, mask, hidden: which of these are given.
        alignment: 16, or 4 where that is not a divisor of each address of weights, moments and Γ.

    Mutates what the table names. Raises ValueError where kernels can't run.
    """
    check_runnable(_stream_kernel, "table", table)
    fixed = constants(problem, config, resets=resets, mask=mask, hidden=hidden, alignment=alignment)
    options: dict[str, Any] = {"num_warps": config.num_warps}
    if config.team > 1:
        options["launch_cooperative_grid"] = True
    with torch.cuda.device_of(table):
        _stream_kernel[(len(table) * config.team,)](
            table,
            rates,
            room.exchange,
            room.counter,
            tuple(settings),
            steps,
            position,
            int(begins),
            **fixed,
            **options,
        )
