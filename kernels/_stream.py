"""Device functions of the kernel of streams (`cell_stream`): blocks of weights, Γ's step, losses, optimizers, and where
programs wait for one another.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a matrix may read other than a state.
INPUT, ONE = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def pointer(table_ptr, INDEX: tl.constexpr):
    """The address of float32 numbers that the table has at INDEX."""
    return tl.load(table_ptr + INDEX).to(tl.pointer_type(tl.float32))


@triton.jit
def pointers_of(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places):
    """The addresses of a block's numbers. BYTES: a multiple of 16 bytes is each row's first one's, or 4."""
    pointers = pointer(table_ptr, INDEX) + places
    if len(places.shape) == 2 and BYTES == 16:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 16]), [1, 4])
    return pointers


@triton.jit
def load_block(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places, inside):
    return tl.load(pointers_of(table_ptr, INDEX, BYTES, places), mask=inside, other=0.0)


@triton.jit
def store_block(table_ptr, INDEX: tl.constexpr, BYTES: tl.constexpr, places, block, inside):
    tl.store(pointers_of(table_ptr, INDEX, BYTES, places), block, mask=inside)


@triton.jit
def meet(counter_ptr, count):
    """Wait until the team's programs have come here `count` times in all; what they wrote before is then seen."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def stepped_by(
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
def gamma_after(
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
        if READS[MATRIX] == ONE:
            total += phi
        elif vector:
            total += phi * signal
        else:
            total += phi[:, None] * signal[None, :]
    return total


@triton.jit
def loss_of(o, aim, wanted, inside, outputs, edge, LOSS: tl.constexpr):
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
def blocks_of(
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
            fan_in = F if READS[k] == INPUT else N
            column = tl.arange(0, COLUMNS[k])
            places = places + (row[:, None] * fan_in + column[None, :],)
            inside = inside + (here[:, None] & (column < fan_in)[None, :],)
    return places, inside
