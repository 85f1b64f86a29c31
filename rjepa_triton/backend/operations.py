"""The operations that learning is made of, each declared once: its contract, and what it does in plain torch.

`backend` names what should run an operation: "torch", "compile" (`native_backend`) or "triton" (`triton_backend`), as
`choose_scan` and `choose_gamma` give it. Where that backend doesn't serve the arguments, the body below runs (`table`).

Letters: T steps, C steps of a chunk, B batch rows, N hidden units, S states a unit, J per-unit inputs, K matrices of
one shape, M the fan-in of a matrix, I features of the layer's input (`docs/glossary.md`). M(t) is also the S×S
transition of each unit, δ the loss's own gradient, λ the credit, φ the immediate sensitivity, y what a matrix reads, Γ
the sensitivity that is carried forward. Their equations are those of `rules.rfp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..cells import weights as weight_ops
from ..cells.two_point import Cell, Linearization, Matrix, Trajectory, state_read
from ..rules import bptt, rfp
from ..rules.rtrl import ExactSensitivity
from . import native_backend, table, triton_backend
from .buffers import ReusedMemory
from .descent import Descent
from .table import operation

# An array (S, T, B, N), or one (T, B, N) for each state, None for zeros.
StateArrays = Tensor | Sequence[Tensor | None]
OfStates = StateArrays  # its name in version 0.1

# A backend registers itself when its file is imported; "auto" asks them in this order.
_FILES = (native_backend, triton_backend)
BACKENDS = table.names()


def choose_scan(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of loops over time, which have no Γ: "torch", "compile" or "triton".

    Raises ValueError if `backend` is unknown, or was asked for by name and can't run on this device and dtype.
    """
    return table.choose(backend, device, lambda candidate: candidate.no_loops(device, dtype))[0]


def choose_gamma(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    gamma_dtype: torch.dtype,
    states: int,
    *,
    blocks: bool = False,
) -> tuple[str, str]:
    """The backend of the Γ recursion and why: ("torch" | "compile" | "triton", reason).

    dtype: the weights'; gamma_dtype: Γ's; states: S; blocks: whether the matrices are block-diagonal, of which torch
    takes Γ on a GPU even if "triton" is asked for. Raises ValueError as `choose_scan` does.
    """
    found = table.choose(
        backend, device, lambda candidate: candidate.no_gamma(device, dtype, gamma_dtype, states)
    )
    if blocks and found[0] == triton_backend.TRITON.name:
        return "torch", "kernels take dense matrices, not blocks"
    return found


@operation
def scan(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    keep: bool = True,
    backend: str = "torch",
) -> Trajectory:
    """The forward loop over T steps, as `Cell.scan`.

    x (J, T, B, N), state S of (B, N), resets (T, B) bool or None. keep: whether the trajectory has `saved`, what the
    backward pass would else compute again.
    """
    trajectory = cell.scan(x, weights, state, resets)
    return trajectory if keep else trajectory.without_saved()


@operation
def advance(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    products: Sequence[Tensor | None],
    state: Tensor,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """One step whose dense products are there: F(c, p, x) with p^g = Σ_{k into g} W^k c^{reads k}.

    x (J, B, N), state c (S, B, N). products[k] (B, N) is W^k c^{reads k}, or None where weights[k], (N,) or (H, b, b),
    still has to multiply. Returns the states after the step (S, B, N), and what `Cell.advance` keeps (·, B, N).
    """
    pre: list[Tensor | None] = [None] * len(cell.gates)
    for matrix, weight, given in zip(cell.matrices, weights, products, strict=True):
        product = weight_ops.multiply(weight, state[state_read(matrix)]) if given is None else given
        entered, gate = pre[matrix.into[1]], matrix.into[1]
        pre[gate] = product if entered is None else entered + product
    p = [torch.zeros_like(state[0]) if one is None else one for one in pre]
    after, kept = cell.advance(state.unbind(), p, x.unbind())
    return torch.stack(tuple(after)), torch.stack(tuple(kept)) if kept else state.new_empty(
        0, *state.shape[1:]
    )


@operation
def linearize(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    rule: str = "rfp",
    *,
    backend: str = "torch",
) -> tuple[Linearization, Tensor]:
    """The partial derivatives of each step, as `Cell.linearize`, and M (S, S, T, B, N), as `rfp.transition`.

    weights: the recurrent ones, of any shape, or their own parts (N,). rule: one of `rfp.RULES`.
    """
    lin = cell.linearize(trajectory)
    return lin, rfp.transition(lin, cell.matrices, weights, rule)


@operation
def step(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None = None,
    rule: str = "rfp",
    *,
    backend: str = "torch",
) -> tuple[Tensor, Linearization, Tensor]:
    """`scan` and then `linearize`: of one step, a backend may have both in one launch.

    x (J, T, B, N), state (S, B, N), resets (T, B) bool or None. Returns the states after each step (S, T, B, N), the
    linearization without the partials of the states through no matrix, which M has, and M (S, S, T, B, N).
    """
    trajectory = scan(cell, x, weights, state.unbind(0), resets, backend=backend)
    lin, m = linearize(cell, trajectory, weights, rule, backend=backend)
    return trajectory.after, lin.without_own(), m


@operation
def exact_of(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: StateArrays,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """Backpropagation through time of a trajectory: `linearize`, then `exact`, whose results it returns.

    A backend may have both in one pass, which writes no partial derivative. weights as for `linearize`; delta
    (S, T, B, N), or a (T, B, N) for each state with None for zeros. Nothing is mutated.
    """
    lin, _ = linearize(cell, trajectory, weights, backend=backend)
    return exact(cell, trajectory, lin, weights, joined_states(delta, trajectory), backend=backend)


@operation
def exact(
    cell: Cell,
    trajectory: Trajectory,
    lin: Linearization,
    weights: Sequence[Tensor],
    delta: Tensor,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """Backpropagation through time. Returns what `dual` does, of all matrices and inputs, by the exact credit.

    lin: the linearized trajectory; delta (S, T, B, N).
    """
    credit, first = exact_credits(cell, lin, weights, delta, backend=backend)
    in_turn = (rfp.entering_credit(matrix, lin, credit) for matrix in cell.matrices)
    return in_turn, rfp.input_gradient(lin, credit, len(cell.per_unit)), first


@operation
def exact_credits(
    cell: Cell,
    lin: Linearization,
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """The exact credit λ (S, T, B, N), and the gradient of the initial state (S, B, N), as `bptt.credits`.

    delta (S, T, B, N); carry (S, B, N): credit that later steps pass to the last one.
    """
    return bptt.credits(lin, cell.matrices, weights, delta, carry)


@operation
def reverse_scan(
    m: Tensor,
    delta: Tensor,
    carry: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """λ(t) = δ(t) + M(t+1)ᵀ λ(t+1), per unit, as `rfp.reverse_scan`. Returns λ (S, T, B, N), M(1)ᵀ λ(1) (S, B, N).

    m (S, S, T, B, N), delta (S, T, B, N); carry (S, B, N): credit that later steps pass to the last one. resets (T, B)
    bool or None: where M is zero since the state was reset. The other backends look at M itself.
    """
    return rfp.reverse_scan(m, delta, carry, resets)


@operation
def affine_scan(m: Tensor, r: Tensor, *, backend: str = "torch") -> Tensor:
    """c(t) = M(t) c(t-1) + r(t) from c(0) = 0, per unit, as `rfp.affine_scan`. m (S, S, T, B, N), r (S, T, B, N)."""
    return rfp.affine_scan(m, r)


def joined_states(given: StateArrays, trajectory: Trajectory) -> Tensor:
    """δ, or another array by state, as one (S, T, B, N)."""
    if isinstance(given, Tensor):
        return given
    like = trajectory.after[0]
    return torch.stack([torch.zeros_like(like) if one is None else one for one in given])


of_states = joined_states  # its name in version 0.1


@operation
def dual_of(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: StateArrays,
    matrices: Sequence[Matrix],
    inputs: int,
    learning: str,
    carry: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """The dual form of a trajectory by one of `rfp.RULES`: `linearize`, then `dual`.

    A backend may have both in one pass, which writes no partial derivative and returns the credit of all matrices as
    `rfp.Joined`, for one product a state. weights as for `linearize`, the rest as for `dual`.
    """
    lin, m = linearize(cell, trajectory, weights, learning, backend=backend)
    return dual(lin, m, joined_states(delta, trajectory), matrices, inputs, carry, backend=backend)


@operation
def dual(
    lin: Linearization,
    m: Tensor,
    delta: Tensor,
    matrices: Sequence[Matrix],
    inputs: int,
    carry: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """From δ to the credit that enters matrices and inputs: E^k = Σ_ν λ^ν φ^{ν,k}.

    m (S, S, T, B, N), delta (S, T, B, N), carry as for `reverse_scan`. Returns E^k (T, B, N) of each matrix, to be
    taken one after the other; the gradient of the first `inputs` per-unit inputs (inputs, T, B, N); M(1)ᵀ λ(1)
    (S, B, N).
    """
    credit, first = reverse_scan(m, delta, carry, lin.resets, backend=backend)
    in_turn = (rfp.entering_credit(matrix, lin, credit) for matrix in matrices)
    return in_turn, rfp.input_gradient(lin, credit, inputs), first


@operation
def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    *,
    rng_state: Tensor | None = None,
    memory: ReusedMemory | None = None,
    backend: str = "torch",
) -> Tensor | None:
    """Γ(t) = M(t) ⊙_rows Γ(t-1) + φ(t) y(t)ᵀ and, with delta, Σ_{b,ν} δ^ν ⊙_rows Γ^ν (K, N, M), as `rfp.gamma_step_`.

    memory: lends the gradient's memory on the CPU. Mutates gammas, not rng_state.
    """
    return rfp.gamma_step_(gammas, m, phi, y, delta, rng_state)


class GammaSteps:
    """What Γ of some matrices of one shape needs of T steps, in the two ways that backends take it.

    matrices: K of one shape; lin: the steps' linearization; inputs (T, B, I) if a matrix reads the layer's input;
    m (S, S, T, B, N); delta (S, T, B, N) or None.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        lin: Linearization,
        inputs: Tensor | None,
        m: Tensor,
        delta: Tensor | None,
    ) -> None:
        self.matrices, self.lin, self.inputs, self.m, self.delta = matrices, lin, inputs, m, delta

    @cached_property
    def phi_apart(self) -> list[Tensor | None]:
        """φ where linearization left it: S·K of (T, B, N), state by state, None for zeros."""
        entries = [self.lin.immediate(matrix) for matrix in self.matrices]
        return [by_state.get(nu) for nu in range(self.m.shape[0]) for by_state in entries]

    @cached_property
    def y_apart(self) -> list[Tensor]:
        """y where it lies: K of (T, B, ·)."""
        return [rfp.signal(matrix, self.lin.before, self.inputs) for matrix in self.matrices]

    @cached_property
    def phi(self) -> Tensor:
        """φ as one array (S, T, B, K, N)."""
        return rfp.immediates(self.matrices, self.lin)

    @cached_property
    def y(self) -> Tensor:
        """y as one array (T, B, K, ·)."""
        return rfp.signals(self.matrices, self.lin, self.inputs)

    def delta_of(self, t: int) -> Tensor | None:
        """δ(t) (S, B, N), or None."""
        return None if self.delta is None else self.delta.select(1, t)


@operation
def gamma_step_of_(
    gammas: Sequence[Tensor],
    steps: GammaSteps,
    t: int,
    *,
    rng_state: Tensor | None = None,
    memory: ReusedMemory | None = None,
    descent: Descent | None = None,
    backend: str = "torch",
) -> Tensor | None:
    """`gamma_step_` of step t of `steps`. With a descent the weights take the step of SGD, and None is returned.

    Mutates gammas and the descent's weights.
    """
    delta = steps.delta_of(t)
    gradient = rfp.gamma_step_(
        gammas, steps.m.select(2, t), steps.phi.select(1, t), steps.y[t], delta, rng_state
    )
    if descent is None or gradient is None:
        return gradient
    descent.apply_(gradient)
    return None


def gamma_steps_(
    gammas: Sequence[Tensor],
    matrices: Sequence[Matrix],
    lin: Linearization,
    inputs: Tensor | None,
    m: Tensor,
    delta: Tensor | None = None,
    *,
    rng_state: Tensor | None = None,
    memory: ReusedMemory | None = None,
    descent: Descent | None = None,
    backend: str = "torch",
) -> Tensor | None:
    """`gamma_step_` of each step of a linearization in turn, and the gradients' sum (K, N, M); None without delta.

    The arguments are those of `GammaSteps`. descent: the matrices' weights take each step's gradient, and None is
    returned: Γ doesn't depend on them here, so their steps add up to the step of the sum. Mutates gammas and the
    descent's weights, and counts the steps in rng_state.
    """
    steps = GammaSteps(matrices, lin, inputs, m, delta)
    if delta is None:
        descent = None
    total: Tensor | None = None
    for t in range(lin.steps):
        part = gamma_step_of_(
            gammas, steps, t, rng_state=rng_state, memory=memory, descent=descent, backend=backend
        )
        if rng_state is not None:
            rng_state[1] += 1
        total = part if total is None or part is None else total.add_(part)
    return total


@operation
def gamma_chunk_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
    backend: str = "torch",
) -> Tensor | None:
    """Γ ← R(0) ⊙_rows Γ₀ + Σ_t (R(t) φ(t)) y(t)ᵀ over a chunk, R the suffix products of M, as `rfp.gamma_chunk_`.

    m (S, S, C, B, N) is M itself; phi (S, C, B, K, N), y (C, B, K, ·); credit (S, B, N) or None: what the chunk passes
    back to Γ₀. Returns Σ_{b,ν} credit ⊙_rows Γ₀ (K, N, M), or None. Mutates gammas.
    """
    suffix, whole = rfp.suffix_products(m)
    return rfp.gamma_chunk_(gammas, suffix, whole, phi, y, credit)


@operation
def gamma_chunk_of_(
    gammas: Sequence[Tensor],
    steps: GammaSteps,
    credit: Tensor | None = None,
    *,
    memory: ReusedMemory | None = None,
    backend: str = "torch",
) -> Tensor | None:
    """`gamma_chunk_` over all steps of `steps`. Mutates gammas."""
    return gamma_chunk_.in_torch(gammas, steps.m, steps.phi, steps.y, credit)


@operation
def gamma_read(
    gammas: Sequence[Tensor], credit: Tensor, *, memory: ReusedMemory | None = None, backend: str = "torch"
) -> Tensor:
    """Σ_{b,ν} credit^ν ⊙_rows Γ^ν (K, N, M), as `rfp.gamma_read`. credit (S, B, N)."""
    return rfp.gamma_read(gammas, credit)


@operation
def rtrl_step_(
    cell: Cell,
    gamma: ExactSensitivity,
    group: int,
    jacobian: Tensor,
    lin: Linearization,
    t: int,
    inputs: Tensor | None,
    delta: Tensor | None,
    *,
    backend: str = "torch",
) -> Tensor | None:
    """γ ← J γ + R of the matrices of one shape, and with delta (S, B, N) their gradient (H, K, b, M).

    jacobian (B, H, S·b, S·b): J(t) of H heads of b units. Mutates gamma.
    """
    gamma.multiply_(group, jacobian)
    rtrl_immediate_(cell, gamma, group, lin, t, inputs, backend=backend)
    return None if delta is None else gamma.read_group(group, delta)


@operation
def rtrl_jacobian(
    cell: Cell,
    gamma: ExactSensitivity,
    lin: Linearization,
    t: int,
    weights: Sequence[Tensor],
    *,
    backend: str = "torch",
) -> Tensor:
    """J(t) (B, H, S·b, S·b). weights: the recurrent ones."""
    return gamma.jacobian(lin, t, weights)


@operation
def rtrl_immediate_(
    cell: Cell,
    gamma: ExactSensitivity,
    group: int,
    lin: Linearization,
    t: int,
    inputs: Tensor | None,
    *,
    backend: str = "torch",
) -> None:
    """γ ← γ + R(t) of the matrices of one shape: the immediate sensitivity. Mutates gamma."""
    gamma.enter_(group, lin, t, inputs)
