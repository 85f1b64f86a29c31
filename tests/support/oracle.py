"""Independent oracles: the equations written once more as plain loops, differentiated by autograd.

They share nothing with the package but the order of arguments. `through` says through which entries of a recurrent
matrix autograd passes gradients to the state that it multiplies; the weights always get theirs.

    "full"  all entries: the network itself
    "own"   the diagonal alone: the graph whose exact gradient is RFP's (docs/math.md)
    "none"  none: e-prop's
    b       an int: those of the diagonal's blocks of b units

A weight is dense (N, N), block-diagonal (H, b, b), or diagonal (N,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def matvec(weight: Tensor, c: Tensor, through: str | int) -> Tensor:
    """W c (B, N), with gradients to c through the entries that `through` names."""
    if weight.dim() == 1:
        return (c.detach() if through == "none" else c) * weight
    if weight.dim() == 3:
        weight = torch.block_diag(*weight)
    if isinstance(through, int):
        within = torch.block_diag(*torch.ones(len(weight) // through, through, through)).to(weight)
        return c @ (weight * within).T + c.detach() @ (weight * (1 - within)).T
    if through == "full":
        return c @ weight.T
    if through == "none":
        return c.detach() @ weight.T
    return c.detach() @ weight.T + weight.diagonal().detach() * (c - c.detach())


def rgc(
    x: Tensor,
    weights: Sequence[Tensor],
    state: tuple[Tensor, Tensor],
    resets: Tensor | None = None,
    through: str | int = "full",
) -> tuple[Tensor, Tensor]:
    """s and m (T, B, N) after each step. weights: in the order ss, ms, mm, sm, or one such sequence per step."""
    s, m = state
    out_s, out_m = [], []
    for t in range(x.shape[0]):
        ss, ms, mm, sm = weights[t] if isinstance(weights[0], (list, tuple)) else weights
        if resets is not None:
            s = torch.where(resets[t][:, None], torch.zeros_like(s), s)
            m = torch.where(resets[t][:, None], torch.zeros_like(m), m)
        a_s, b_s = torch.tanh(matvec(ms, m, through)), torch.tanh(matvec(ss, s, through))
        a_m, b_m = torch.tanh(matvec(sm, s, through)), torch.tanh(matvec(mm, m, through))
        s, m = (1 - a_s) * x[t] + b_s * s, (1 - a_m) * x[t] + b_m * m
        out_s.append(s)
        out_m.append(m)
    return torch.stack(out_s), torch.stack(out_m)


def equation_14(x: Tensor, weights: Sequence[Tensor], delta_s: Tensor) -> list[Tensor]:
    """The paper's eq. 14 in its own indices (k = 0 … 3 for ss, ms, mm, sm), where its I(t) is taken to be x(t).

    x and delta_s are (T, B, N), the initial state is zero, and the loss depends on s alone. Returns the four gradients,
    summed over T and B.
    """
    steps, batch, units = x.shape
    c = [x.new_zeros(batch, units), x.new_zeros(batch, units)]
    gamma = {(nu, k): x.new_zeros(batch, units, units) for nu in range(2) for k in range(4)}
    gradient = [x.new_zeros(units, units) for _ in range(4)]
    for t in range(steps):
        a = [torch.tanh(c[1 - nu] @ weights[2 * nu + 1].T) for nu in range(2)]
        b = [torch.tanh(c[nu] @ weights[2 * nu].T) for nu in range(2)]
        new = {}
        for nu in range(2):
            mu0 = (1 - b[nu] ** 2) * c[nu] * weights[2 * nu].diagonal() + b[nu]
            mu1 = -(1 - a[nu] ** 2) * x[t] * weights[2 * nu + 1].diagonal()
            j0 = ((1 - b[nu] ** 2) * c[nu])[:, :, None] * c[nu][:, None, :]
            j1 = (-(1 - a[nu] ** 2) * x[t])[:, :, None] * c[1 - nu][:, None, :]
            for k in range(4):
                new[nu, k] = mu0[..., None] * gamma[nu, k] + mu1[..., None] * gamma[1 - nu, k]
                if k // 2 == nu:
                    new[nu, k] = new[nu, k] + (j0, j1)[k % 2]
        gamma = new
        c = [(1 - a[nu]) * x[t] + b[nu] * c[nu] for nu in range(2)]
        for k in range(4):
            gradient[k] += (delta_s[t][..., None] * gamma[0, k]).sum(0)
    return gradient


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest ‖g - w‖ / ‖w‖ of any pair of tensors; where w is zero, ‖g‖."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        scale = float(w.detach().double().norm())
        gap = float((g.detach().double() - w.detach().double()).norm())
        worst = max(worst, gap / scale if scale else gap)
    return worst


def problem(
    steps: int,
    batch: int,
    units: int,
    *,
    diagonal: bool = False,
    scale: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    """x, weights and state, which require gradients; δ of s and δ of m."""
    shape = (units,) if diagonal else (units, units)
    spread = 1.0 if diagonal else scale / units**0.5
    weights = [(torch.randn(shape, dtype=dtype) * spread).requires_grad_() for _ in range(4)]
    x = torch.randn(steps, batch, units, dtype=dtype, requires_grad=True)
    state = tuple(torch.randn(batch, units, dtype=dtype).requires_grad_() for _ in range(2))
    delta = [torch.randn(steps, batch, units, dtype=dtype) for _ in range(2)]
    return x, weights, state, delta[0], delta[1]  # type: ignore[return-value]
