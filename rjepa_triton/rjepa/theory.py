"""Linear R-JEPA in expectation: Theorem 1 (paper, Section 3.1, Appendix A) and Appendix B's moments, in float64.

The encoder is a stack of Time Decay Units, c_l(t) = τ_l c_l(t-1) + P_l c_{l-1}(t) with c_0 = x and h = c_N (paper,
A.4), with one number τ_l for each area. A number commutes with every matrix, so h(t) = P z(t), where P = P_N … P_1 and
z is the input after the decays of all areas. The expected loss and its gradients therefore need only two covariances of
z, and learning is a flow without sampling noise. docs/theory.md has the derivations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

DTYPE = torch.float64


class Process(NamedTuple):
    """A stationary Gaussian input: x(t) = A x(t-1) + e(t), E[e eᵀ] = Q.

    transition  A [d, d], of spectral radius < 1
    noise       Q [d, d]
    """

    transition: Tensor
    noise: Tensor


def white(size: int, seed: int) -> Process:
    """E[x xᵀ] = I; the correlation between successive steps is .8 in every direction."""
    return Process(0.8 * torch.eye(size, dtype=DTYPE), 0.36 * torch.eye(size, dtype=DTYPE))


def white_uneven(size: int, seed: int) -> Process:
    """E[x xᵀ] = I; correlations from .5 to .95 in random directions, so that z, after a decay, is not white."""
    turn = _rotation(size, seed)
    transition = turn * torch.linspace(0.5, 0.95, size, dtype=DTYPE) @ turn.mT
    return Process(transition, torch.eye(size, dtype=DTYPE) - transition @ transition.mT)


def coloured(size: int, seed: int) -> Process:
    """Variances from .1 to 1 in random directions, with correlation .8 in all: covariances at all lags commute."""
    turn = _rotation(size, seed)
    return Process(0.8 * torch.eye(size, dtype=DTYPE), 0.36 * turn * _decade(size) @ turn.mT)


def coloured_rotating(size: int, seed: int) -> Process:
    """Coloured noise through a random A of spectral radius .85: covariances at lags 0 and 1 don't commute."""
    turn = _rotation(size, seed)
    drive = torch.randn(size, size, dtype=DTYPE, generator=torch.Generator().manual_seed(seed + 1000))
    transition = 0.85 * drive / torch.linalg.eigvals(drive).abs().max()
    return Process(transition, turn * _decade(size) @ turn.mT)


INPUTS: dict[str, Callable[[int, int], Process]] = {
    "white": white,
    "white, uneven rates": white_uneven,
    "coloured": coloured,
    "coloured, non-commuting": coloured_rotating,
}


def _rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=DTYPE, generator=generator))[0]


def _decade(size: int) -> Tensor:
    return torch.logspace(0, -1, size, dtype=DTYPE)


def stationary(transition: Tensor, noise: Tensor) -> Tensor:
    """The solution X of X = A X Aᵀ + Q, from the linear system (I - A⊗A) vec(X) = vec(Q). A, Q and X are [n, n]."""
    n = len(transition)
    system = torch.eye(n * n, dtype=transition.dtype) - torch.kron(transition, transition)
    return torch.linalg.solve(system, noise.reshape(-1)).reshape(n, n)


class Covariances(NamedTuple):
    """Covariances of the decayed input z, [..., d, d] each.

    The gradient multiplies ∂E/∂h(t) with q(t): q = z in the exact gradient, q = x in the paper's "first-order
    approximation of BPTT" (A.4).

    now, next              Σ₀ = E[z(t) z(t)ᵀ], Σ₁ = E[z(t+1) z(t)ᵀ]
    credit, credit_next    E[z(t) q(t)ᵀ], E[z(t+1) q(t)ᵀ]
    """

    now: Tensor
    next: Tensor
    credit: Tensor
    credit_next: Tensor


def covariances(process: Process, decays: Sequence[float], first_order: bool = False) -> Covariances:
    """Exact covariances of the input after areas with the decays τ_l, scaled so that tr Σ₀ = d.

    The chain (x, z_1, …, z_N) is one linear process, z_l(t) = τ_l z_l(t-1) + z_{l-1}(t). first_order: for the
    first-order gradient, which is defined here for one area; ValueError for more.
    """
    if first_order and len(decays) != 1:
        raise ValueError(f"the first-order gradient is for one area, got {len(decays)}")
    size, levels = len(process.noise), 1 + len(decays)
    chain = torch.zeros(levels, size, levels, size, dtype=DTYPE)
    chain[0, :, 0] = process.transition
    for level, decay in enumerate(decays, 1):
        chain[level] = chain[level - 1]
        chain[level, :, level] += decay * torch.eye(size, dtype=DTYPE)
    joint = rearrange(chain, "to i source j -> (to i) (source j)")
    now = stationary(joint, process.noise.repeat(levels, levels))
    now = now * size / now[-size:, -size:].trace()
    following = joint @ now
    q = slice(0, size) if first_order else slice((levels - 1) * size, None)
    return Covariances(now[-size:, -size:], following[-size:, -size:], now[-size:, q], following[-size:, q])


def stack(several: Sequence[Covariances]) -> Covariances:
    """The covariances of several inputs as one batch, [B, d, d]."""
    return Covariances(*(torch.stack(parts) for parts in zip(*several, strict=True)))


class Weights(NamedTuple):
    """The weights of a batch of linear R-JEPAs.

    predictor  W [B, m, m]
    areas      P_1 [B, n_1, d], …, P_N [B, m, n_{N-1}]
    """

    predictor: Tensor
    areas: tuple[Tensor, ...]

    @property
    def encoder(self) -> Tensor:
        """P = P_N … P_1, [B, m, d]: h = P z."""
        product = self.areas[0]
        for area in self.areas[1:]:
            product = area @ product
        return product

    def plus(self, other: Weights, factor: float) -> Weights:
        """These weights plus `factor` times the others."""
        areas = tuple(a + factor * b for a, b in zip(self.areas, other.areas, strict=True))
        return Weights(self.predictor + factor * other.predictor, areas)


def ordinary(size: int, hidden: int, areas: int, seed: int, scale: float = 1.0) -> Weights:
    """Gaussian weights of variance scale²/fan-in, as a batch of one."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(1, rows, columns, dtype=DTYPE, generator=generator)
        return drawn * scale / columns**0.5

    predictor = matrix(hidden, hidden)
    return Weights(predictor, tuple(matrix(hidden, size if not n else hidden) for n in range(areas)))


def velocity(weights: Weights, z: Covariances, decay: Tensor, stop_gradient: bool = True) -> Weights:
    """dW/ds and dP_l/ds of gradient flow with weight decay η (paper, eqs. 5-7), where s = learning rate × steps.

        E = ½ E_t ‖stop[h(t+1)] - W h(t)‖²,   G = E_t[(h(t+1) - W h(t)) q(t)ᵀ]
        dW/ds = G Pᵀ - η W,   dP/ds = Wᵀ G - η P

    P = P_N … P_1, and each dP_l/ds follows from dP/ds by the chain rule. decay: η [B, 1, 1]. stop_gradient: if False,
    -E_t[(h(t+1) - W h(t)) z(t+1)ᵀ] is added to dP/ds.
    """
    w, p = weights.predictor, weights.encoder
    error = p @ z.next - w @ (p @ z.now)
    credit = w.mT @ (p @ z.credit_next - w @ (p @ z.credit))
    if not stop_gradient:
        credit = credit - (p @ z.now - w @ (p @ z.next.mT))
    areas: list[Tensor] = []
    above = credit
    for n in range(len(weights.areas) - 1, -1, -1):
        below = above
        for earlier in reversed(weights.areas[:n]):
            below = below @ earlier.mT
        areas.insert(0, below - decay * weights.areas[n])
        above = weights.areas[n].mT @ above
    return Weights(error @ p.mT - decay * w, tuple(areas))


def flow(
    weights: Weights,
    z: Covariances,
    decay: Tensor,
    times: Sequence[float],
    stop_gradient: bool = True,
    tolerance: float = 1e-7,
) -> list[Weights]:
    """The weights at each of the increasing learning times s, starting from `weights` at s = 0.

    The flow is integrated by the Runge-Kutta pair of Bogacki and Shampine, with one step size for the whole batch;
    `tolerance` bounds the estimated error of any weight in a step. Raises ArithmeticError if some weight grows without
    bound.
    """

    def rate(at: Weights) -> Weights:
        return velocity(at, z, decay, stop_gradient)

    now, step, found = 0.0, 1e-3, []
    k1 = rate(weights)
    for until in times:
        while now < until:
            dt = min(step, until - now)
            k2 = rate(weights.plus(k1, dt / 2))
            k3 = rate(weights.plus(k2, 3 * dt / 4))
            after = weights.plus(k1, 2 * dt / 9).plus(k2, dt / 3).plus(k3, 4 * dt / 9)
            k4 = rate(after)
            error = max(
                float((-5 * a / 72 + b / 12 + c / 9 - d / 8).abs().max()) * dt
                for a, b, c, d in zip(_flat(k1), _flat(k2), _flat(k3), _flat(k4), strict=True)
            )
            if error <= tolerance:
                now = until if dt == until - now else now + dt
                weights, k1 = after, k4
            if not error < float("inf") or dt < 1e-9:
                raise ArithmeticError(f"the weights grow without bound at s = {now:g}")
            grown = dt * min(3.0, max(0.2, 0.9 * (tolerance / max(error, 1e-30)) ** (1 / 3)))
            # a step that was shortened to end at `until` is no reason to give up the longer one
            step = max(step, grown) if error <= tolerance and dt < step else grown
        found.append(weights)
    return found


def _flat(weights: Weights) -> tuple[Tensor, ...]:
    return weights.predictor, *weights.areas


def gram(weights: Weights) -> tuple[Tensor, Tensor]:
    """WᵀW and P_N P_Nᵀ, [B, m, m], which weight decay makes equal."""
    last = weights.areas[-1]
    return weights.predictor.mT @ weights.predictor, last @ last.mT


def representation(weights: Weights, z: Covariances) -> Tensor:
    """HHᵀ = E_t[h hᵀ] = P Σ₀ Pᵀ, [B, m, m]."""
    p = weights.encoder
    return p @ z.now @ p.mT


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ / ‖a‖‖b‖ [B] of matrices [B, m, m]. It is 1 if and only if one is a positive multiple of the other."""
    return (a * b).sum((-2, -1)) / (a.norm(dim=(-2, -1)) * b.norm(dim=(-2, -1)))


def surviving(correlation: float, decay: float, variance: float = 1.0) -> tuple[float, float] | None:
    """The singular values (ρ ± √(ρ² - 4η/σ))/2 of W and P at which learning can rest, with one area; the larger first.

    They belong to a direction of z with variance σ and correlation ρ between steps. The larger one attracts; the
    smaller one separates its basin of attraction from that of zero. If η > σρ²/4, only zero is left: None.
    """
    root = correlation**2 - 4 * decay / variance
    if root < 0:
        return None
    return (correlation + root**0.5) / 2, (correlation - root**0.5) / 2


def collapse_rate(z: Covariances) -> Tensor:
    """λ [...], with one area: without stop-gradient, tr PPᵀ falls to at most exp(-2(λ + η)s) of its first value.

    λ is the smallest eigenvalue of Σ₀ - Σ₁ Σ₀⁻¹ Σ₁ᵀ, the covariance of what no linear predictor can predict of z(t+1).
    """
    unpredictable = z.now - z.next @ torch.linalg.solve(z.now, z.next.mT)
    return torch.linalg.eigvalsh(unpredictable)[..., 0]


class FourthMoments(NamedTuple):
    """E[c_i(t) c_j(t-Δ₁) c_m(t-Δ₂) c_n(t-Δ₃)] for Δ = (0, 0, 0), (0, 1, 1) and (1, 2, 2); each [n, n, n, n]."""

    t000: Tensor
    t011: Tensor
    t122: Tensor


def gaussian_fourth(covariance: Tensor) -> Tensor:
    """E[b_i b_j b_m b_n] = Σ_ij Σ_mn + Σ_im Σ_jn + Σ_in Σ_jm (paper, Appendix B), [n, n, n, n], for Gaussian b."""
    s = covariance
    return _pairs("ij,mn", s, s) + _pairs("im,jn", s, s) + _pairs("in,jm", s, s)


def fourth_moments(recurrence: Tensor, noise: Tensor) -> FourthMoments:
    """Exact moments of c(t) = U c(t-1) + b(t); b is Gaussian with covariance Σ, independent in time (paper, eq. 9).

        vec T(0,0,0) = (I - U⊗U⊗U⊗U)⁻¹ vec(T^B + X)        X: the six terms E[(Uc)(Uc)] E[bb]
        T(0,1,1) = (U⊗U⊗I⊗I) T(0,0,0) + Σ ⊗ R₀              R₀ = E[c cᵀ]
        T(1,2,2) = (U⊗I⊗I⊗I) T(0,1,1)

    recurrence, noise: U, Σ [n, n]. The paper's equations 10-12 lack X and Σ ⊗ R₀.
    """
    now = stationary(recurrence, noise)
    passed = recurrence @ now @ recurrence.mT
    cross = sum(
        _pairs(p, a, b) for p in ("ij,mn", "im,jn", "in,jm") for a, b in ((passed, noise), (noise, passed))
    )
    t000 = _solve_fourth(recurrence, gaussian_fourth(noise) + cross)
    t011 = torch.einsum("ik,jl,klmn->ijmn", recurrence, recurrence, t000) + _pairs("ij,mn", noise, now)
    return FourthMoments(t000, t011, torch.einsum("ik,kjmn->ijmn", recurrence, t011))


def papers_fourth_moments(recurrence: Tensor, noise: Tensor) -> FourthMoments:
    """The moments according to the paper's equations 10, 11 and 12."""
    t000 = _solve_fourth(recurrence, gaussian_fourth(noise))
    t011 = torch.einsum("ik,jl,klmn->ijmn", recurrence, recurrence, t000)
    return FourthMoments(t000, t011, torch.einsum("ik,kjmn->ijmn", recurrence, t011))


def connected(moments: FourthMoments, recurrence: Tensor, noise: Tensor) -> FourthMoments:
    """The moments minus E[c_i c_j] E[c_m c_n] at the same lags: how the two pairs of factors depend on each other."""
    now = stationary(recurrence, noise)
    same, lagged = _pairs("ij,mn", now, now), _pairs("ij,mn", recurrence @ now, now)
    return FourthMoments(moments.t000 - same, moments.t011 - same, moments.t122 - lagged)


def sampled_fourth_moments(
    recurrence: Tensor,
    noise: Tensor,
    entry: tuple[int, int, int, int],
    samples: int,
    seed: int,
    burn_in: int = 20,
) -> Tensor:
    """[3, samples]: samples of one entry of each of the three moments, from independent chains that start at zero.

    burn_in: steps before the chains are read.
    """
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(noise)
    chain = [torch.zeros(samples, len(noise), dtype=DTYPE)]
    for _ in range(burn_in + 3):
        fresh = torch.randn(samples, len(noise), dtype=DTYPE, generator=generator)
        chain = [*chain[-2:], chain[-1] @ recurrence.mT + fresh @ root.mT]
    i, j, m, n = entry
    before, last, now = chain
    return torch.stack(
        [
            now[:, i] * now[:, j] * now[:, m] * now[:, n],
            now[:, i] * now[:, j] * last[:, m] * last[:, n],
            now[:, i] * last[:, j] * before[:, m] * before[:, n],
        ]
    )


def _pairs(indices: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum(f"{indices}->ijmn", a, b)


def _solve_fourth(recurrence: Tensor, right: Tensor) -> Tensor:
    twice = torch.kron(recurrence, recurrence)
    system = torch.eye(right.numel(), dtype=right.dtype) - torch.kron(twice, twice)
    return torch.linalg.solve(system, right.reshape(-1)).reshape(right.shape)
