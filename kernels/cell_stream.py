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

from ._cell import CellFunctions, kept
from ._launch import check_runnable

# As stream.h counts them.
INPUT, ONE = -1, -2
ADDRESSES = (
    "x",
    "target",
    "outputs",
    "hidden",
    "losses",
    "resets",
    "mask",
    "state",
)  # the first ones of a network
# Most numbers of a thread, of 255 registers, by `registers`: of SGD, and of optimizers that have moments, whose roots
# and divisions take registers of their own. Beyond, kernels were found to spill.
PLAIN_NUMBERS, NUMBERS_WITH_MOMENTS = 200, 120
WARPS, LEAST_ROWS = (1, 2, 4, 8), 2


@triton.jit
def _pointer(table_ptr, INDEX: tl.constexpr):
    """The address of float32 numbers that the table has at INDEX."""
    return tl.load(table_ptr + INDEX).to(tl.pointer_type(tl.float32))


@triton.jit
def _pointers(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places):
    """The addresses of a block's numbers. BYTES: a multiple of 16 bytes is each row's first one's, or 4."""
    pointers = _pointer(table_ptr, INDEX) + places
    if len(places.shape) == 2 and BYTES == 16:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 16]), [1, 4])
    return pointers


@triton.jit
def _load(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places, inside):
    return tl.load(_pointers(table_ptr, INDEX, BYTES, places), mask=inside, other=0.0)


@triton.jit
def _store(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places, block, inside):
    tl.store(_pointers(table_ptr, INDEX, BYTES, places), block, mask=inside)


@triton.jit
def _part(blocks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the blocks, from the FIRST on."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (blocks[FIRST + k],)
    return found


@triton.jit
def _meet(counter_ptr, count):
    """Wait until the team's programs have come here `count` times in all; what they wrote before is then seen."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _stepped(
    weight,
    moments,
    gradient,
    lr,
    scale1,
    scale2,
    begins,
    settings,  # beta1, 1 - beta1, beta2, 1 - beta2, eps, weight decay
    KIND: tl.constexpr,
    DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """A block of weights, and its moments, after torch.optim's step. KIND: 0 SGD, 1 Adam, 2 AdamW, 3 RMSprop."""
    if KIND == 2:
        weight = weight * (1.0 - lr * settings[5])
    elif DECAYS:
        gradient = gradient + settings[5] * weight
    found = ()
    if KIND == 0:
        if len(moments):
            momentum = tl.where(begins, gradient, settings[0] * moments[0] + settings[3] * gradient)
            found = (momentum,)
            gradient = gradient + settings[0] * momentum if NESTEROV else momentum
        weight = weight - lr * gradient
    elif KIND == 3:
        square = settings[0] * moments[0] + settings[1] * gradient * gradient
        found = (square,)
        weight = weight - lr * gradient / (tl.sqrt_rn(square) + settings[4])
    else:
        momentum = moments[0] + settings[1] * (gradient - moments[0])
        square = settings[2] * moments[1] + settings[3] * gradient * gradient
        found = (momentum, square)
        weight = weight - lr * scale1 * momentum / (tl.sqrt_rn(square) * scale2 + settings[4])
    return weight, found


@triton.jit
def _gamma(
    gammas,
    partials,
    saved,
    signal,
    keep,
    NU: tl.constexpr,
    MATRIX: tl.constexpr,
    S: tl.constexpr,
    FOUND: tl.constexpr,
    LINKS: tl.constexpr,
    READS: tl.constexpr,
    PHI: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # of its block; 1 for a vector
):
    """Γ^{ν,k} of a matrix after the step: Σ_ν' M^{νν'} Γ^{ν',k} + φ^{ν,k} yᵀ."""
    vector: tl.constexpr = WIDTH == 1
    if vector:
        total = tl.zeros([ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS, WIDTH], tl.float32)
    for source in tl.static_range(S):
        if LINKS[NU * S + source]:
            was = gammas[MATRIX * S + source]
            if HAS_RESETS:
                was = tl.where(keep, was, 0.0)
            by = tl.zeros([ROWS], tl.float32) + partials[FOUND + NU * S + source]
            total += by * was if vector else by[:, None] * was
    if PHI[MATRIX][NU] >= 0:
        if PHI[MATRIX][NU] < FOUND:
            phi = tl.zeros([ROWS], tl.float32) + partials[PHI[MATRIX][NU]]
        else:
            phi = tl.zeros([ROWS], tl.float32) + saved[PHI[MATRIX][NU] - FOUND]
        if READS[MATRIX] == -2:
            total += phi
        elif vector:
            total += phi * signal
        else:
            total += phi[:, None] * signal[None, :]
    return total


@triton.jit
def _loss(o, aim, wanted, inside, outputs, edge, LOSS: tl.constexpr):
    """The loss of outputs o, and its gradient. LOSS: 0 mse, 1 cross-entropy, 2 Huber, 3 cosine, 4 the gradient given.

    aim: the target; wanted: the class, or None.
    """
    if LOSS == 1:
        place = tl.arange(0, o.shape[0])
        most = tl.max(tl.where(inside, o, float("-inf")), 0)
        shares = tl.where(inside, tl.exp(o - most), 0.0)
        total = tl.sum(shares, 0)
        loss = tl.log(total) + most - tl.sum(tl.where(place == wanted, o, 0.0), 0)
        error = shares / total - tl.where(place == wanted, 1.0, 0.0)
    elif LOSS == 3:
        along, ours, theirs = tl.sum(o * aim, 0), tl.sum(o * o, 0), tl.sum(aim * aim, 0)
        by, of = tl.maximum(tl.sqrt_rn(ours), 1e-8), tl.maximum(tl.sqrt_rn(theirs), 1e-8)
        cosine = along / (by * of)
        loss = 1.0 - cosine
        error = tl.where(by > 1e-8, cosine * o / (by * by), 0.0) - aim / (by * of)
    elif LOSS == 4:
        loss, error = tl.sum(aim * o, 0), aim
    else:
        off = tl.where(inside, o - aim, 0.0)
        if LOSS == 0:
            loss, error = tl.sum(off * off, 0) / outputs, 2.0 * off / outputs
        else:
            size = tl.abs(off)
            near = size <= edge
            loss = tl.sum(tl.where(near, 0.5 * off * off, edge * (size - 0.5 * edge)), 0) / outputs
            error = tl.where(near, off, tl.where(off > 0, edge, -edge)) / outputs
    return loss, error


@triton.jit
def _blocks(
    rank,
    N: tl.constexpr,
    F: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    TEAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Where each block of weights lies in its tensor, and which of its places are inside of it.

    The blocks: the readout's weight; its columns of this program's units, if they aren't all; its bias; this program's
    rows of the layer's matrices.
    """
    row = rank * ROWS + tl.arange(0, ROWS)
    unit, place = tl.arange(0, BLOCK), tl.arange(0, OUTPUTS)
    here, shown = row < N, place < O
    places = (place[:, None] * N + unit[None, :],)
    inside = (shown[:, None] & (unit < N)[None, :],)
    if TEAM > 1:
        places = places + (place[:, None] * N + row[None, :],)
        inside = inside + (shown[:, None] & here[None, :],)
    if BIAS:
        places = places + (place,)
        inside = inside + (shown,)
    for k in tl.static_range(len(READS)):
        if COLUMNS[k] == 1:
            places = places + (row,)
            inside = inside + (here,)
        else:
            fan_in = F if READS[k] == -1 else N
            column = tl.arange(0, COLUMNS[k])
            places = places + (row[:, None] * fan_in + column[None, :],)
            inside = inside + (here[:, None] & (column < fan_in)[None, :],)
    return places, inside


# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. Rows are read once a call.
@triton.jit(do_not_specialize=["T", "position", "begins"])
def _stream_kernel(
    table_ptr,  # [networks, A]: addresses, in the order of `ADDRESSES`, then of `Slots`
    rates_ptr,  # [networks, groups + 2, T]: rates of each group of weights, and `_stepped`'s scales
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
    FIRST: tl.constexpr = 8  # addresses before those of weights
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

    x_ptr, target_ptr = _pointer(table_ptr, 0), _pointer(table_ptr, 1)
    outputs_ptr, losses_ptr, state_ptr = (
        _pointer(table_ptr, 2),
        _pointer(table_ptr, 4),
        _pointer(table_ptr, 7),
    )
    classes_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.int64))
    hidden_ptr = _pointer(table_ptr, 3)
    resets_ptr = tl.load(table_ptr + 5).to(tl.pointer_type(tl.uint8))
    mask_ptr = tl.load(table_ptr + 6).to(tl.pointer_type(tl.uint8))

    BEFORE: tl.constexpr = 1 + (TEAM > 1) + BIAS  # blocks of the readout's
    places, inside = _blocks(rank, N, F, O, READS, COLUMNS, BIAS, TEAM, ROWS, BLOCK, OUTPUTS)
    weights, moments, totals, gammas = (), (), (), ()
    for block in tl.static_range(BEFORE + len(READS)):
        weights = weights + (
            _load(table_ptr, FIRST + SLOTS[block] * EACH, BYTES[block], places[block], inside[block]),
        )
        if LEARNS[block]:
            for m in tl.static_range(MOMENTS):
                moments = moments + (
                    _load(
                        table_ptr,
                        FIRST + SLOTS[block] * EACH + 1 + m,
                        BYTES[block],
                        places[block],
                        inside[block],
                    ),
                )
            if SUMS:
                totals = totals + (
                    _load(
                        table_ptr, FIRST + SLOTS[block] * EACH + 3, BYTES[block], places[block], inside[block]
                    ),
                )
        if block >= BEFORE:
            for nu in tl.static_range(S):
                gammas = gammas + (
                    _load(
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
            if READS[k] == -2:
                products = products + (weight,)
                signals = signals + (weight,)  # in its place: nothing is read
            elif COLUMNS[k] == 1:
                y = tl.load(x_ptr + at * F) if READS[k] == -1 else c[READS[k]]
                products = products + (weight * y,)
                signals = signals + (y,)
            else:
                y = x if READS[k] == -1 else seen[READS[k]]
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
        saved = _part(updated, S, SAVES)
        partials = PARTIALS(c, saved, inputs, own)
        c = kept(here, _part(updated, 0, S))
        if HAS_HIDDEN:
            tl.store(hidden_ptr + at * N + row, c[OUT], mask=here)
        if TEAM > 1:
            new_ptr = exchange_ptr + (t % 2) * (S + 1) * BLOCK
            for nu in tl.static_range(S):
                tl.store(new_ptr + nu * BLOCK + row, c[nu], mask=here)
            met += 1
            _meet(counter_ptr, met * TEAM)
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
        loss, error = _loss(o, aim, wanted, shown, O, settings[6], LOSS)
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
                        _gamma(
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
                weight, new = _stepped(
                    weights[block],
                    _part(moments, NTH[block] * MOMENTS, MOMENTS),
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
                    _meet(counter_ptr, met * TEAM)
                    member = tl.arange(0, BLOCK)
                    parts = tl.load(sums_ptr + member, mask=member < TEAM, other=0.0, cache_modifier=".cg")
                    square = tl.sum(parts, 0)
                scale = tl.minimum(1.0, settings[7] / (tl.sqrt_rn(square) + 1e-6))
            totals, stepped = added, ()
            for block in tl.static_range(BEFORE + len(READS)):
                weight = weights[block]
                if LEARNS[block]:
                    old = _part(moments, NTH[block] * MOMENTS, MOMENTS)
                    weight, new = _stepped(
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
    places, inside = _blocks(again, N, F, O, READS, COLUMNS, BIAS, TEAM, ROWS, BLOCK, OUTPUTS)
    for block in tl.static_range(BEFORE + len(READS)):
        mine = inside[block]
        if block < BEFORE:
            mine = mine & leads
        if LEARNS[block] and (block == 0 or block >= BEFORE or SLOTS[block] == 1):
            _store(table_ptr, FIRST + SLOTS[block] * EACH, BYTES[block], places[block], weights[block], mine)
            for m in tl.static_range(MOMENTS):
                moment = moments[NTH[block] * MOMENTS + m]
                _store(
                    table_ptr, FIRST + SLOTS[block] * EACH + 1 + m, BYTES[block], places[block], moment, mine
                )
            if SUMS:
                _store(
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
                _store(
                    table_ptr, FIRST + SLOTS[block] * EACH + 4 + nu, BYTES[block], places[block], gamma, mine
                )


class Problem(NamedTuple):
    """What one build of the kernel serves: a layer with N units and F features, O outputs, an optimizer and a loss.

    cell            its functions
    links           for each ν and ν', whether M^{νν'} may be other than zero by the rule
    diagonal        whether M counts recurrent weights, as RFP's does
    out             the state that the readout reads
    passes          whether no matrix reads the layer's input, which is the cell's own
    reads           for each matrix of the layer, the state that it reads, INPUT or ONE
    of_gate, into   whether it enters a gate or an input, and which
    phi             for each of its states, the place of φ among the partials that `cell.partials` finds, or, so many
                    further on, among the saved numbers; -1 where it is zero
    fan_in          of each: N, F, or 1 of a vector
    learns, groups  of the readout's weight, its bias, and each matrix: whether it learns, the optimizer's group
    bias            whether the readout has one
    kind            0 SGD, 1 Adam, 2 AdamW, 3 RMSprop, with so many `moments` of each weight; `decays`, `nesterov`
    every           steps from one of the optimizer's to the next; clips: whether the gradient's norm is limited
    loss            0 squared, 1 cross-entropy, 2 Huber's, 3 cosine, 4 the gradient given
    """

    cell: CellFunctions
    links: tuple[bool, ...]
    diagonal: bool
    out: int
    passes: bool
    reads: tuple[int, ...]
    of_gate: tuple[bool, ...]
    into: tuple[int, ...]
    phi: tuple[tuple[int, ...], ...]
    fan_in: tuple[int, ...]
    learns: tuple[bool, ...]
    groups: tuple[int, ...]
    bias: bool
    kind: int
    moments: int
    decays: bool
    nesterov: bool
    every: int
    clips: bool
    loss: int
    units: int
    features: int
    outputs: int


class Config(NamedTuple):
    """How a network is laid out: `team` programs of `rows` units and `num_warps` warps each."""

    team: int
    rows: int
    num_warps: int


def registers(problem: Problem, rows: int, warps: int, warp_size: int) -> int:
    """About how many numbers a thread has of a program of so many units: weights, moments, sums and Γ, and of each of
    its units partials and M. The compiler adds what it needs in between.
    """
    cell, block = problem.cell, triton.next_power_of_2(problem.units)
    of_weight = 1 + problem.moments + (problem.every > 1 or problem.clips)
    threads, columns = warps * warp_size, [triton.next_power_of_2(fan_in) for fan_in in problem.fan_in]
    # A warp reads rows of four numbers a thread where these lie at multiples of 16 bytes, else of single numbers.
    lanes = min(warp_size, block // 4 if problem.units % 4 == 0 and block >= 4 else block)
    across = 1 if problem.units % 4 == 0 else min(warps, max(1, block // lanes))
    units = max(1, rows // (warp_size // lanes * (warps // across)))  # of a thread
    found = 0
    for fan_in in columns:
        each = units if fan_in == 1 else max(1, rows * fan_in // threads)
        found += each * (of_weight + cell.states)
    readout = triton.next_power_of_2(problem.outputs)
    for width in (block, *[rows] * (rows < block), *[1] * problem.bias):
        found += max(1, readout * width // threads) * of_weight
    vectors = cell.states**2 + cell.states + len({k for phi in problem.phi for k in phi}) + cell.inputs + 4
    return found + units * (vectors + 2 * len(cell.entering))


def whole(problem: Problem) -> Config:
    """One program for all units."""
    return Config(1, triton.next_power_of_2(problem.units), WARPS[-1])


def pick_config(problem: Problem, warp_size: int, multiprocessors: int) -> Config | None:
    """The largest programs whose numbers fit in registers; None where no team fits on the GPU. A pure function."""
    most = NUMBERS_WITH_MOMENTS if problem.moments else PLAIN_NUMBERS
    rows = whole(problem).rows
    least = min(rows, LEAST_ROWS)
    while rows >= least:
        team = -(-problem.units // rows)
        if team > multiprocessors:
            return None
        for warps in WARPS:
            if registers(problem, rows, warps, warp_size) <= most:
                return Config(team, rows, warps)
        rows //= 2
    return None


def constants(
    problem: Problem, config: Config, *, resets: bool, mask: bool, hidden: bool, alignment: int = 16
) -> dict[str, Any]:
    """The kernel's constants."""
    cell, before = problem.cell, 1 + (config.team > 1) + problem.bias
    # the blocks of weights, by whose they are
    slots = [0, *[0] * (config.team > 1), *[1] * problem.bias, *range(2, 2 + len(problem.reads))]
    fan_ins = [*[problem.units] * before, *problem.fan_in]
    learns = [problem.learns[slot] for slot in slots]
    assert len(slots) == before + len(problem.reads)
    return {
        "UPDATE": cell.update,
        "PARTIALS": cell.partials,
        "S": cell.states,
        "G": len(cell.entering),
        "J": cell.inputs,
        "K": cell.matrices,
        "FOUND": cell.partials_found,
        "SAVES": cell.saves,
        "OUT": problem.out,
        "PASSES": problem.passes,
        "LINKS": problem.links,
        "DIAGONAL": problem.diagonal,
        "READS": problem.reads,
        "OF_GATE": problem.of_gate,
        "INTO": problem.into,
        "PHI": problem.phi,
        "COLUMNS": tuple(map(triton.next_power_of_2, problem.fan_in)),
        "SLOTS": tuple(slots),
        "LEARNS": tuple(learns),
        "NTH": tuple(sum(learns[:block]) for block in range(len(slots))),
        "GROUPS": tuple(problem.groups[slot] for slot in slots),
        "BIAS": problem.bias,
        "KIND": problem.kind,
        "MOMENTS": problem.moments,
        "DECAYS": problem.decays,
        "NESTEROV": problem.nesterov,
        "EVERY": problem.every,
        "CLIPS": problem.clips,
        "LOSS": problem.loss,
        "HAS_RESETS": resets,
        "HAS_MASK": mask,
        "HAS_HIDDEN": hidden,
        "RATES": 1 + max(problem.groups),
        "A": addresses(problem),
        "BYTES": tuple(alignment if fan_in % 4 == 0 else 4 for fan_in in fan_ins),
        "N": problem.units,
        "F": problem.features,
        "O": problem.outputs,
        "TEAM": config.team,
        "ROWS": config.rows,
        "BLOCK": triton.next_power_of_2(problem.units),
        "FEATURES": triton.next_power_of_2(problem.features),
        "OUTPUTS": triton.next_power_of_2(problem.outputs),
    }


def addresses(problem: Problem) -> int:
    """How many addresses the table has of a network: `ADDRESSES`, then of the readout's weight and bias and of each
    matrix itself, two moments, the gradient's sum, and Γ of each state; 0 for what there isn't.
    """
    return len(ADDRESSES) + (4 + problem.cell.states) * (2 + len(problem.reads))


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
        table: (networks, `addresses(problem)`) int64, of tensors on the GPU that stay alive: float32 and
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
