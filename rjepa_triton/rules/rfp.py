"""Recurrent Forward Propagation in plain torch, for any floating dtype and any device.

The recursion (paper, eq. 14 and 18, for S states a unit and any K matrices):

    M^{νν'} = A^{νν'} + Σ_{k reads ν'} φ^{ν,k} diag(W^k)                                     per unit
    Γ^{ν,k}(t) = Σ_ν' M^{νν'}(t) ⊙_rows Γ^{ν',k}(t-1) + φ^{ν,k}(t) y^k(t)ᵀ
    ∂E/∂W^k   = Σ_{t,b,ν} δ^ν(t) ⊙_rows Γ^{ν,k}(t),        δ^ν(t) = ∂L(t)/∂c^ν(t), instantaneous

The same gradient without Γ (the "dual" form): credit runs backward in time, each unit on its own, with no matrix in
the loop,

    λ(t) = δ(t) + M(t+1)ᵀ λ(t+1),       E^k = Σ_ν λ^ν φ^{ν,k},       ∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ

and over a chunk of C steps that starts from Γ₀, with suffix products R(t) = M(C) … M(t+1):

    Γ ← R(0) ⊙_rows Γ₀ + Σ_t (R(t) φ(t)) y(t)ᵀ,       ∂E/∂W = Σ_b (M(1)ᵀλ(1)) ⊙_rows Γ₀ + Σ_{t,b} E(t) y(t)ᵀ

M can be zero or negative, so the products R are made as suffix products, never as ratios of prefix products or by
logarithms.

A reset forgets, whatever there was, so it selects and never multiplies: 0 · NaN is NaN. M is zero where a batch row is
reset, and a sensitivity is taken as zero where all of M that it meets is zero, and where the credit that reads it is
zero (`_unless_forgotten`; the compiled code and the kernels do the same, but for Γ's step on a GPU, whose reset rows
are set to zero by a launch of their own). Credit that comes back to a reset stops there, NaN included: `reverse_scan`
is told of resets, and compiled code and kernels see M's zeros. Of the steps before a reset, those whose credit is zero
because no loss reaches them are emptied before the backward pass (`without_credit`), and before Γ moves over a chunk
all of them are (`before_a_reset`).

Layout: per-unit arrays are (S, T, B, N), and transitions (S, S, T, B, N), where the first index is the row ν. Γ is one
tensor (B, K, N, M) per state, for K matrices of one shape; M is 1 for diagonal matrices and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from ..cells import weights as weight_ops
from ..cells.two_point import Linearization, Matrix, Trajectory, state_read
from .rounding import round_stochastically

# The learning rules that are this recursion with all of M or part of it (`transition`).
RULES = ("rfp", "eprop", "rflo", "snap0")


@torch.no_grad()
def transition(
    lin: Linearization, matrices: Sequence[Matrix], weights: Sequence[Tensor], rule: str = "rfp"
) -> Tensor:
    """M (S, S, T, B, N), each unit's own S×S transition, zero where the state was reset.

    matrices and weights: the recurrent ones, dense, block-diagonal or diagonal (`weights.py`); of a weight only its
    diagonal is used, so that may be given in its place.
    rule: which part of M is kept; the rest is zero.
        "rfp"    all of it: SnAp-1 (Menick et al. 2021) with each unit's S×S block
        "eprop"  A, the path through no matrix (the eligibility trace of e-prop, Bellec et al. 2020)
        "rflo"   the diagonal of A, each state's own leak (the trace of random-feedback local online learning, Murray
                 2019; the random feedback is the caller's)
        "snap0"  none of it: the gradient reads each step's immediate sensitivity alone
    """
    states = range(lin.before.shape[0])
    terms: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    if rule == "rfp":
        for matrix, weight in zip(matrices, weights, strict=True):
            for nu, phi in lin.immediate(matrix).items():
                terms.setdefault((nu, state_read(matrix)), []).append((phi, weight_ops.own(weight)))
    m = lin.before.new_empty(len(states), *lin.before.shape)
    for nu in states:
        for source in states:
            kept = rule in ("rfp", "eprop") or (rule == "rflo" and nu == source)
            own, out = lin.partials.own[source].get(nu) if kept else None, m[nu, source]
            entering = terms.get((nu, source), [])
            if own is not None and entering:
                torch.addcmul(own, *entering.pop(), out=out)
            elif entering:
                torch.mul(*entering.pop(), out=out)
            elif own is not None:
                out.copy_(own)
            else:
                out.zero_()
            for phi, diagonal in entering:
                out.addcmul_(phi, diagonal)
    return m if lin.resets is None else m.masked_fill_(lin.resets[..., None], 0)


def reverse_scan(
    m: Tensor, delta: Tensor, carry: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Credits λ(t) = δ(t) + M(t+1)ᵀ λ(t+1), and the credit that the first step passes to the state before it.

    m (S, S, T, B, N); delta (S, T, B, N); carry: credit that the steps after the last pass to it, (S, B, N), or None.
    resets (T, B) bool or None: where M is zero since the state was reset, and nothing passes back, not even NaN.
    Returns λ (S, T, B, N), which is delta itself for a single step without carry, and M(1)ᵀ λ(1) (S, B, N). Nothing is
    mutated.
    """
    count, steps = delta.shape[:2]
    starts = None if resets is None else resets[..., None].unbind(0)

    def first(credit: Tensor) -> Tensor:
        return pass_back(m[:, :, 0], credit if starts is None else credit.masked_fill(starts[0], 0))

    if steps == 1:
        credit = delta if carry is None else delta + carry[:, None]
        return credit, first(credit[:, 0])
    credit = torch.empty_like(delta)
    rows = [m[nu].unbind(1) for nu in range(count)]
    credit_at, delta_at = credit.unbind(1), delta.unbind(1)
    if carry is None:
        credit_at[-1].copy_(delta_at[-1])
    else:
        torch.add(delta_at[-1], carry, out=credit_at[-1])
    # make the views of all steps before the loop: in a small layer, making one costs as much as a product
    by_state = [credit[nu].unbind(0) for nu in range(count)]
    for t in range(steps - 2, -1, -1):
        now, later = credit_at[t], [of_state[t + 1] for of_state in by_state]
        if starts is not None:
            later = [of_state.masked_fill(starts[t + 1], 0) for of_state in later]
        torch.addcmul(delta_at[t], rows[0][t + 1], later[0], out=now)
        for nu in range(1, count):
            now.addcmul_(rows[nu][t + 1], later[nu])
    return credit, first(credit[:, 0])


def before_a_reset(resets: Tensor) -> Tensor:
    """The steps of each batch row after which it is reset, (T, B) bool: resets (T, B) bool."""
    later = torch.zeros_like(resets)
    if len(resets) > 1:
        later[:-1] = resets[1:].flip(0).cummax(0).values.flip(0)
    return later


def without_credit(
    resets: Tensor, delta: Tensor | Sequence[Tensor | None], carry: Tensor | None = None
) -> Tensor:
    """The steps of each batch row that no loss reaches, (T, B) bool: its own has no gradient, nor has a later one
    before the next reset.

    resets (T, B) bool; delta (S, T, B, N), or (T, B, N) of each state, None for zeros; carry (S, B, N) or None: the
    credit that the steps after the last pass to it.
    """
    steps, batch = resets.shape
    reached = torch.zeros(steps + 1, batch, dtype=torch.bool, device=resets.device)
    for of_state in delta:
        if of_state is not None:
            reached[:-1] |= (of_state != 0).any(-1)
    if carry is not None:
        reached[-1] = (carry != 0).any(-1).any(0)
    # how many losses there are from each step on, less those from the next reset on
    from_here = reached.flip(0).cumsum(0).flip(0)
    counted = torch.cat([from_here, torch.zeros_like(from_here[:1])])
    next_reset = torch.full((steps, batch), steps + 1, device=resets.device)
    step = torch.arange(1, steps, device=resets.device)[:, None]
    next_reset[:-1] = torch.where(resets[1:], step, next_reset[:-1])
    next_reset = next_reset.flip(0).cummin(0).values.flip(0)
    return counted[:steps] == counted.gather(0, next_reset)


def emptied(trajectory: Trajectory, delta: Tensor | Sequence[Tensor | None]) -> Trajectory:
    """The trajectory with zeros for the steps that no loss reaches (`without_credit`): no gradient depends on them.

    With a NaN or an infinity there it would, since zero times NaN is NaN. It is the trajectory itself where
    there are no resets. delta: as for `without_credit`.
    """
    if trajectory.resets is None:
        return trajectory
    dead = without_credit(trajectory.resets, delta)
    if dead.device.type == "cpu" and check.values_known(dead) and not dead.any():
        return trajectory
    states = trajectory.states.clone()
    states[:, :-1].masked_fill_(dead[..., None], 0)
    saved = trajectory.saved
    if saved.dim() > 1:
        saved = saved.masked_fill(dead.view(*dead.shape, *(1,) * (saved.dim() - 3)), 0)
    x = trajectory.x.masked_fill(dead[..., None], 0)
    return Trajectory(x, states, saved, trajectory.resets)


def pass_back(m: Tensor, credit: Tensor) -> Tensor:
    """Mᵀ λ of one step, the credit that it passes to the step before: m (S, S, B, N), credit (S, B, N)."""
    out = m[0] * credit[0]
    for nu in range(1, m.shape[0]):
        out.addcmul_(m[nu], credit[nu])
    return out


SERIAL_STEPS = (
    16  # up to this many steps, solving them one by one takes fewer calls than halving their number
)


def affine_scan(m: Tensor, r: Tensor, *, until: int = SERIAL_STEPS) -> Tensor:
    """Solve c(t) = M(t) c(t-1) + r(t) from c(0) = 0 for each unit, in about log₂ T passes (odd-even reduction).

    Each pass joins two steps into one, c(2k) = M(2k) M(2k-1) c(2k-2) + M(2k) r(2k-1) + r(2k), a recursion of half as
    many steps whose solution is every second c. One more product gives those in between, so the work is O(T). When at
    most `until` steps are left, they are solved one by one.

    m (S, S, T, B, N), of which step 1 isn't read because c(0) = 0; r (S, T, B, N), T ≥ 1. Returns c (S, T, B, N).
    """
    steps = r.shape[1]
    if steps <= max(1, until):
        return _affine_steps(m, r)
    paired = steps // 2 * 2
    early, late = slice(0, paired, 2), slice(1, paired, 2)
    c_late = affine_scan(
        _matmul(m[:, :, late], m[:, :, early]),
        _advanced(m[:, :, late], r[:, early], r[:, late]),
        until=until,
    )
    c = torch.empty_like(r)
    c[:, late] = c_late
    c[:, 0] = r[:, 0]
    between = slice(2, None, 2)
    c[:, between] = _advanced(m[:, :, between], c_late[:, : (steps - 1) // 2], r[:, between])
    return c


def _affine_steps(m: Tensor, r: Tensor) -> Tensor:
    """`affine_scan`, solved step by step."""
    c = torch.empty_like(r)
    columns = [m[:, nu].unbind(1) for nu in range(r.shape[0])]
    c_at, r_at = c.unbind(1), r.unbind(1)
    c_at[0].copy_(r_at[0])
    for t in range(1, r.shape[1]):
        now, before = c_at[t], c_at[t - 1]
        torch.addcmul(r_at[t], columns[0][t], before[0], out=now)
        for nu in range(1, len(columns)):
            now.addcmul_(columns[nu][t], before[nu])
    return c


def _advanced(m: Tensor, c: Tensor, r: Tensor) -> Tensor:
    """M c + r for any number of steps: m (S, S, …), c and r (S, …)."""
    out = torch.addcmul(r, m[:, 0], c[0])
    for nu in range(1, m.shape[1]):
        out.addcmul_(m[:, nu], c[nu])
    return out


def suffix_products(m: Tensor) -> tuple[Tensor, Tensor]:
    """R(t) = M(C) … M(t+1) of m (S, S, C, B, N): for t = 1 … C as (S, S, C, B, N), and R(0) (S, S, B, N)."""
    count = m.shape[1]
    identity = torch.eye(count, dtype=m.dtype, device=m.device)[:, :, None, None]
    products = [identity.expand_as(m[:, :, 0])]
    for step in reversed(m.unbind(2)):
        products.append(_matmul(products[-1], step))
    whole = products.pop()
    return torch.stack(products[::-1], dim=2), whole


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of S×S matrices of each unit: a and b (S, S, B, N)."""
    out = a[:, :1] * b[:1]
    for j in range(1, a.shape[1]):
        out = torch.addcmul(out, a[:, j : j + 1], b[j : j + 1])
    return out


def signal(matrix: Matrix, before: Tensor, inputs: Tensor | None) -> Tensor:
    """y^k (T, B, M), what a matrix reads at each step: a state of `before` (S, T, B, N), the layer's input, or ones.

    inputs: the layer's input (T, B, I), or None. Raises ValueError if the matrix reads the input and there is none.
    """
    if isinstance(matrix.reads, int):
        return before[matrix.reads]
    if matrix.reads == "one":
        return torch.ones_like(before[0])
    if inputs is None:
        raise ValueError(f"inputs must be given: matrix {matrix.name!r} reads the layer's input")
    return inputs if matrix.columns is None else inputs[..., slice(*matrix.columns)]


def immediates(matrices: Sequence[Matrix], lin: Linearization) -> Tensor:
    """φ of these K matrices as one array (S, T, B, K, N), zero where a matrix doesn't enter a state."""
    zero = torch.zeros_like(lin.before[0])
    entries = [lin.immediate(matrix) for matrix in matrices]
    states = len(lin.before)
    stacked = torch.stack([by.get(nu, zero) for nu in range(states) for by in entries], dim=2)
    return stacked.view(*stacked.shape[:2], states, len(entries), -1).movedim(2, 0).contiguous()


def signals(matrices: Sequence[Matrix], lin: Linearization, inputs: Tensor | None) -> Tensor:
    """y of these K matrices, which have one shape, as one array (T, B, K, Y); `rows_read` says what Y is."""
    return torch.stack([signal(matrix, lin.before, inputs) for matrix in matrices], dim=2)


def entering_credit(matrix: Matrix, lin: Linearization, credit: Tensor) -> Tensor:
    """E^k = Σ_ν λ^ν φ^{ν,k} (T, B, N), contiguous: the gradient to what matrix k enters. credit λ (S, T, B, N)."""
    out: Tensor | None = None
    for nu, phi in lin.immediate(matrix).items():
        out = credit[nu] * phi if out is None else out.addcmul_(credit[nu], phi)
    return torch.zeros_like(credit[0]) if out is None else out


def weight_gradients(
    lin: Linearization,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    credit: Tensor,
    inputs: Tensor | None = None,
) -> list[Tensor]:
    """∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ for each matrix, one product each over all of (T, B). credit λ (S, T, B, N)."""
    entering = (entering_credit(matrix, lin, credit) for matrix in matrices)
    return outer_products(lin.before, matrices, weights, entering, inputs)


@dataclass(frozen=True)
class Joined:
    """E^k of the recurrent matrices, where those of matrices that read one state lie side by side in one array.

    arrays  (S', T, B, ·): for each of the first S' states, E^k (T, B, N) of the matrices that read it, side by side
    places  for each matrix, the state that it reads and its place among the matrices that read it
    units   N

    Iterating over it gives E^k (T, B, N) of each matrix.
    """

    arrays: Tensor
    places: Sequence[tuple[int, int]]
    units: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self.arrays[nu].narrow(-1, k * self.units, self.units) for nu, k in self.places)

    def outer(self, before: Tensor) -> list[Tensor]:
        """Σ_{t,b} E^k(t) y^k(t)ᵀ (N, N) of each matrix, by one product per state; they are views of one array."""
        read = before[: self.arrays.shape[0]].flatten(1, 2)
        made = torch.bmm(self.arrays.flatten(1, 2).mT, read)
        found, readers = made.view(-1, self.units, self.units).unbind(0), made.shape[1] // self.units
        return [found[nu * readers + k] for nu, k in self.places]


def outer_products(
    before: Tensor,
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    entering: Iterable[Tensor],
    inputs: Tensor | None = None,
) -> list[Tensor]:
    """Σ_{t,b} E^k(t) y^k(t)ᵀ of each matrix, in its weight's shape.

    before (S, T, B, N): the states that the steps read. entering: E^k (T, B, N) of each matrix; an iterator makes each
    only when it is used. inputs: the layer's input, as in `signal`.
    """
    if isinstance(entering, Joined) and all(weight.dim() == 2 for weight in weights):
        return entering.outer(before)
    return [
        weight_ops.outer(credit, signal(matrix, before, inputs), weight)
        for matrix, weight, credit in zip(matrices, weights, entering, strict=True)
    ]


def input_gradient(lin: Linearization, credit: Tensor, count: int) -> Tensor:
    """∂E/∂x^j = Σ_ν λ^ν ∂F_ν/∂x^j (J, T, B, N) for the first J = `count` per-unit inputs. credit λ (S, T, B, N)."""
    out = credit.new_zeros(count, *credit.shape[1:])
    for j, entries in enumerate(lin.partials.input[:count]):
        for nu, partial in entries.items():
            out[j].addcmul_(credit[nu], partial)
    return out


def _rows(gammas: Sequence[Tensor], limit: int = 1 << 20) -> range:
    """Where blocks of batch rows start. A block has at most `limit` numbers of Γ^ν, or one row, to fit in cache."""
    batch = gammas[0].shape[0]
    return range(0, batch, max(1, limit // max(1, gammas[0][0].numel())))


def _over_rows(per_unit: Tensor) -> Tensor:
    """Reshape a factor per unit, (B, N), to (B, 1, N, 1), which broadcasts against Γ (B, K, N, M)."""
    return per_unit[:, None, :, None]


def carried(gammas: Sequence[Tensor], m: Tensor) -> list[Tensor]:
    """Σ_ν' M^{νν'} ⊙_rows Γ^{ν'} for each ν, as new tensors: gammas S of (B, K, N, M), m (S, S, B, N).

    Γ^{ν'} counts as zero in the rows where M^{νν'} is zero for all ν, whatever is there.
    """
    kept = [
        _unless_forgotten(gamma, (m[:, source] == 0).all(0), m.dtype) for source, gamma in enumerate(gammas)
    ]
    out = []
    for nu in range(len(gammas)):
        total = _over_rows(m[nu, 0]) * kept[0]
        for source in range(1, len(gammas)):
            total.addcmul_(_over_rows(m[nu, source]), kept[source])
        out.append(total)
    return out


def _unless_forgotten(gamma: Tensor, forgotten: Tensor, dtype: torch.dtype) -> Tensor:
    """Γ^ν (B, K, N, M) in this dtype, zero in the rows where `forgotten` (B, N) is True, even where Γ is NaN there."""
    return torch.where(_over_rows(forgotten), gamma.new_zeros(()), gamma).to(dtype)


def rows_read(y: Tensor, fan_in: int) -> Tensor:
    """y (B, K, Y) in a shape that broadcasts against Γ (B, K, N, M), M = fan_in: what each row of Γ reads.

    Where Y = M, all rows read the same, and the result is (B, K, 1, M). Otherwise Y = N, and each row reads the M
    numbers of its head, (B, K, N, M); a diagonal weight and a bias are the case M = 1.
    """
    if y.shape[-1] == fan_in:
        return y[..., None, :]
    if fan_in == 1:
        return y[..., None]
    by_head = y.unflatten(-1, (-1, 1, fan_in))
    return by_head.expand(*by_head.shape[:-2], fan_in, fan_in).flatten(-3, -2)


def advanced(gammas: Sequence[Tensor], m: Tensor, phi: Tensor, y: Tensor) -> list[Tensor]:
    """Γ after one step, as new tensors: `carried` plus φ yᵀ. phi (S, B, K, N); y (B, K, Y), Y as in `rows_read`."""
    read = rows_read(y, gammas[0].shape[-1])
    return [kept.addcmul_(phi[nu][..., None], read) for nu, kept in enumerate(carried(gammas, m))]


def read_rows(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    """The gradient Σ_ν λ^ν ⊙_rows Γ^ν of each batch row, (B, K, N, M), for a credit (S, B, N)."""
    total = _over_rows(credit[0]) * gammas[0].to(credit.dtype)
    for nu in range(1, len(gammas)):
        total.addcmul_(_over_rows(credit[nu]), gammas[nu].to(credit.dtype))
    return total


def _read_where_credit(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    """`read_rows` of a Γ that counts as zero in the rows whose credit is zero."""
    kept = [
        _unless_forgotten(gamma, of_state == 0, credit.dtype)
        for gamma, of_state in zip(gammas, credit, strict=True)
    ]
    return read_rows(kept, credit)


def gamma_read(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    """The gradient Σ_{b,ν} λ^ν ⊙_rows Γ^ν, (K, N, M), for a credit (S, B, N).

    Rows that no credit reads count as zero, whatever is there.
    """
    rows = _rows(gammas)
    total = None
    for b in rows:
        part = _read_where_credit([g[b : b + rows.step] for g in gammas], credit[:, b : b + rows.step]).sum(0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    rng_state: Tensor | None = None,
) -> Tensor | None:
    """Advance Γ in place by one step; with delta (S, B, N), return Σ_{b,ν} δ^ν ⊙_rows Γ^ν, (K, N, M) (eq. 14).

    gammas, m, phi and y are those of `advanced`; gammas are mutated. Γ may have fewer bits than m: arithmetic is in m's
    dtype, and the gradient is read before Γ is rounded. Γ is rounded to nearest, or with rng_state (2,) int64 a
    bfloat16 Γ stochastically (`rounding`). Returns None without delta.
    """
    rows = _rows(gammas)
    row_numbers = gammas[0][0].numel()
    total = None
    for b in rows:
        block = slice(b, b + rows.step)
        old = [g[block] for g in gammas]
        new = advanced(old, m[:, :, block], phi[:, block], y[block])
        if delta is not None:
            part = read_rows(new, delta[:, block]).sum(0)
            total = part if total is None else total.add_(part)
        for nu, (target, value) in enumerate(zip(old, new, strict=True)):
            if rng_state is not None:
                first = nu * gammas[0].numel() + b * row_numbers
                value = round_stochastically(value, rng_state, first, len(gammas) * gammas[0].numel())
            target.copy_(value)
    return total


def gamma_chunk_(
    gammas: Sequence[Tensor],
    suffix: Tensor,
    whole: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
) -> Tensor | None:
    """Advance Γ in place by C steps; with credit M(1)ᵀλ(1) (S, B, N), return Σ_{b,ν} credit ⊙_rows Γ₀, (K, N, M).

    gammas: Γ₀, S of (B, K, N, M), mutated. suffix (S, S, C, B, N) and whole (S, S, B, N): as `suffix_products` returns
    them. phi (S, C, B, K, N); y (C, B, K, Y), Y as in `rows_read`. Returns None without credit.
    """
    entering = arriving(suffix, phi)
    rows = _rows(gammas)
    total = None
    for b in rows:
        block = slice(b, b + rows.step)
        old = [g[block] for g in gammas]
        if credit is not None:
            part = _read_where_credit(old, credit[:, block]).sum(0)
            total = part if total is None else total.add_(part)
        new = carried(old, whole[:, :, block])
        for nu, value in enumerate(new):
            add_arriving_(value, entering[nu][:, block], y[:, block])
        for target, value in zip(old, new, strict=True):
            target.copy_(value)
    return total


def arriving(suffix: Tensor, phi: Tensor) -> Tensor:
    """U^{ν,k}(t) = Σ_ν' R^{νν'}(t) φ^{ν',k}(t), what φ of step t has become at the chunk's end, (S, C, B, K, N)."""
    out = torch.zeros_like(phi)
    for nu in range(phi.shape[0]):
        for source in range(phi.shape[0]):
            out[nu].addcmul_(suffix[nu, source][:, :, None], phi[source])
    return out


def add_arriving_(gamma: Tensor, entering: Tensor, y: Tensor) -> None:
    """Γ += Σ_t U(t) y(t)ᵀ for one state. gamma (B, K, N, M), mutated; entering: U (C, B, K, N); y (C, B, K, Y)."""
    fan_in = gamma.shape[-1]
    if y.shape[-1] == fan_in:
        left, right = entering.permute(1, 2, 3, 0), y.permute(1, 2, 0, 3)
        gamma.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    elif fan_in == 1:
        gamma.add_((entering * y).sum(0)[..., None])
    else:
        by_head = (a.unflatten(-1, (-1, fan_in)) for a in (entering, y))
        gamma.add_(torch.einsum("cbkhi,cbkhj->bkhij", *by_head).flatten(2, 3))
