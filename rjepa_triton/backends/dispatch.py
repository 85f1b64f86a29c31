"""What runs the recursions: plain torch, code compiled for the CPU, or Triton kernels.

torch    anywhere, in any floating dtype: an operation a pass over memory
compile  CPU, with a C++ compiler (`_native`), which runs for some seconds once. Γ of one or two states a unit, float32
         or float64: one pass over it a step, or a chunk. In float32 as one call each: the loops over time of RGC,
         LSTM, GRU and Elman cells with dense weights, their linearisation and exact credits, and the reverse scan of
         a small layer; elsewhere torch
triton   CUDA and ROCm tensors in float32 (Γ may be bfloat16); elsewhere under TRITON_INTERPRET=1, for tests
auto     triton where it can run, on a GPU; compile where it can, on the CPU; else torch

A kernel that can't be launched, or code that can't be compiled, gives way to torch for good, with one warning that
says why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _checks as check
from ..cells import weights as weight_ops
from ..cells.builtin import RGCCell
from ..cells.two_point import ByState, Cell, Linearization, Matrix, Trajectory
from ..rules import bptt, rfp
from .native import calls as _native
from .room import Room

OfStates = Tensor | Sequence[Tensor | None]  # (S, T, B, N), or (T, B, N) of each state, None for zeros

BACKENDS = ("auto", "torch", "compile", "triton")
HEAD_UNITS = 64  # of a head, that the exact kernel takes
# Of an RGC, up to which one launch runs all steps of its loop: of any number of rows, and of no more than the GPU has
# multiprocessors.
SMALL_UNITS, ON_CHIP_UNITS = 64, 128
STEP_ROWS = 8  # of the batch, up to which a step of an RGC and its linearisation are one launch
SCAN_STATES = 2  # states a unit that kernels scan; more are torch's
# Up to how many units and rows a loop is compiled code's: as far as it was timed, and faster than torch's. Of fewer
# than FEW_STEPS, for which weights are laid out anew or read as they are, up to few rows, or units.
LOOP_UNITS, LOOP_ROWS = 2048, 128
FEW_STEPS, FEW_ROWS, FEW_UNITS = 4, 8, 128
# Numbers of B·N up to which the reverse scan is compiled code's: where torch runs a step of two states by one thread.
REVERSE_NUMBERS = 1 << 14


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return _native.compiler()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels can't serve tensors of this device and dtype, or None if they can."""
    if not _has_triton():
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"kernels need a CUDA or ROCm tensor, or TRITON_INTERPRET=1 from the start, got {device}"
    if dtype != torch.float32:
        return f"kernels compute in float32, got {dtype}"
    return None


def _no_loops(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why compiled loops can't serve tensors of this device and dtype, or None if they can."""
    if device.type != "cpu":
        return f"compiled code serves CPU tensors, got {device}"
    if dtype != torch.float32:
        return f"compiled loops compute in float32, got {dtype}"
    # what is traced takes torch, and looks for no program
    if torch.compiler.is_compiling() or cpp_compiler():
        return None
    return "no C++ compiler was found"


def choose_scan(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch", "compile" or "triton", for what has no Γ: loops over time.

    Raises ValueError if `backend` is unknown, or asks for what can't run here.
    """
    check.one_of("backend", backend, BACKENDS)
    if backend == "auto":
        if device.type == "cpu":
            return "torch" if _no_loops(device, dtype) else "compile"
        return "triton" if device.type == "cuda" and not _no_triton(device, dtype) else "torch"
    obstacle = {"triton": _no_triton, "compile": _no_loops}.get(backend, lambda *_: None)(device, dtype)
    if obstacle:
        raise ValueError(f"backend={backend!r} can't run: {obstacle}; use backend='torch'")
    return backend


def compiled_loop(cell: Cell, weights: Sequence[Tensor], steps: int, batch: int) -> bool:
    """Whether "compile" runs `cell.scan` over T = `steps`, B = `batch` as one call; weights' shapes alone count."""
    known = isinstance(cell, RGCCell) or _native.gated_cell(cell) is not None
    if not known or any(weight.dim() != 2 for weight in weights):
        return False
    units = weights[0].shape[0]
    enough = steps >= FEW_STEPS or batch <= FEW_ROWS or units <= FEW_UNITS
    return enough and units <= LOOP_UNITS and batch <= LOOP_ROWS


def compiled_partials(cell: Cell) -> bool:
    """Whether "compile" linearises the cell in one call."""
    return isinstance(cell, RGCCell) or _native.gated_cell(cell) is not None


def one_pass(cell: Cell, learning: str, backend: str) -> bool:
    """Whether `dual_of` is one call of compiled code."""
    return backend == "compile" and learning == "rfp" and compiled_partials(cell)


def compiled_reverse(numbers: int) -> bool:
    """Whether "compile" runs the reverse scan over `numbers` of B·N as one call."""
    return numbers <= REVERSE_NUMBERS


def _has_memory(*tensors: Tensor | None) -> bool:
    """Whether compiled code can be given these tensors' addresses: not while torch.compile or a mode traces them."""
    if torch.compiler.is_compiling():
        return False
    # `all` of a generator takes longer, and a step of a small layer asks three times
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def choose_gamma(
    backend: str, device: torch.device, dtype: torch.dtype, gamma_dtype: torch.dtype, states: int
) -> tuple[str, str]:
    """("torch" | "compile" | "triton", why), for Γ of S = `states` a unit.

    Raises ValueError if `backend` is unknown, or asks for what can't run here.
    """
    check.one_of("backend", backend, BACKENDS)
    no_triton = _no_triton(device, dtype)
    if no_triton is None and gamma_dtype not in (torch.float32, torch.bfloat16):
        no_triton = f"kernels take Γ in float32 or bfloat16, got {gamma_dtype}"
    no_compile = None
    if device.type != "cpu":
        no_compile = f"compiled code serves CPU tensors, got {device}"
    elif gamma_dtype != dtype:
        no_compile = "gamma_dtype differs from the layer's dtype"
    elif dtype not in (torch.float32, torch.float64):
        no_compile = f"compiled code takes Γ in float32 or float64, got {dtype}"
    elif states > _native.MOST_STATES:
        no_compile = f"compiled code takes 1 or {_native.MOST_STATES} states a unit, got {states}"
    elif cpp_compiler() is None:
        no_compile = "no C++ compiler was found"
    obstacle = {"triton": no_triton, "compile": no_compile}.get(backend)
    if obstacle:
        raise ValueError(f"backend={backend!r} can't run: {obstacle}; use backend='torch'")
    if backend != "auto":
        return backend, "asked for"
    if device.type == "cuda":
        return ("torch", no_triton) if no_triton else ("triton", "one pass over Γ a step")
    return ("torch", no_compile) if no_compile else ("compile", "one pass over Γ a step")


def scan(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    resets: Tensor | None = None,
    *,
    backend: str = "torch",
    keep: bool = True,
) -> Trajectory:
    """`cell.scan` by the chosen backend, as `choose_scan` gives it; but for torch, of RGC with dense weights alone.

    keep: whether the trajectory has `saved`.
    """
    if (
        backend == "compile"
        and compiled_loop(cell, weights, x.shape[1], x.shape[2])
        and _has_memory(x, resets, *weights, *state)
    ):
        if isinstance(cell, RGCCell):
            found = _native.rgc_scan(x[0], weights, state, resets)
        else:
            found = _native.gated_scan(cell, x, weights, state, resets)
        if found is not None:
            return Trajectory(x, found[0], found[1] if keep else x.new_empty(0), resets)
    if backend == "triton" and is_dense_rgc(cell, weights):
        from ..kernels import rgc_forward as kernels

        def launch() -> tuple[Any, ...]:
            given, initial = ([a.contiguous() for a in group] for group in (weights, state))
            marks = None if resets is None else resets.contiguous()
            return kernels.rgc_forward(x[0].contiguous(), given, initial, marks, save_gates=keep)

        done = _launched("rgc_forward", launch)
        if done is not None:
            states, gates = done
            return Trajectory(x, states, x.new_empty(0) if gates is None else gates, resets)
    made = cell.scan(x, weights, state, resets)
    return made if keep else made.without_saved()


def linearize(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    rule: str = "rfp",
    *,
    backend: str = "torch",
) -> tuple[Linearization, Tensor]:
    """`cell.linearize` and `rfp.transition` by the chosen backend.

    In one pass by "compile", of `compiled_partials`, and by "triton", of an RGC; of RFP's rule alone.

    weights: the recurrent ones, of any shape, or their own parts (N,). Returns the linearisation and M (S, S, T, B, N).
    """
    if (
        backend == "compile"
        and rule == "rfp"
        and compiled_partials(cell)
        and _has_memory(trajectory.x, trajectory.states, trajectory.saved, trajectory.resets, *weights)
    ):
        before = trajectory.before
        find = _native.rgc_linearize if isinstance(cell, RGCCell) else _native.gated_linearize
        made = find(cell, trajectory, before, _own(weights))
        if made is not None:
            return Linearization(made[0], before, trajectory.resets), made[1]
    if backend == "triton" and rule == "rfp" and isinstance(cell, RGCCell):
        from ..kernels import rgc_partials as kernels

        def launch() -> tuple[Any, ...]:
            gates, before, u, own, resets = _of_circuit(trajectory, weights)
            return RGCCell.partials_in(kernels.rgc_linearize(gates, before, u, own, resets), gates)

        done = _launched("rgc_linearize", launch)
        if done is not None:
            return Linearization(done[0], trajectory.before, trajectory.resets), done[1]
    lin = cell.linearize(trajectory)
    return lin, rfp.transition(lin, cell.matrices, weights, rule)


def _of_circuit(
    trajectory: Trajectory, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor | None]:
    """What `kernels.rgc_partials` takes of an RGC's trajectory: gates, states, input, own parts and resets."""
    before, resets = trajectory.states[:, :-1], trajectory.resets
    return (
        trajectory.saved.contiguous(),
        before if before[0].is_contiguous() else before.contiguous(),
        trajectory.x[0].contiguous(),
        [weight_ops.own(weight) for weight in weights],
        None if resets is None else resets.contiguous(),
    )


def step(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Tensor,
    resets: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Linearization, Tensor] | None:
    """One step and its linearisation at once, where the backend has code for that: "triton", of an RGC with dense
    weights and few rows. Else None, and nothing is done.

    x (J, 1, B, N), state (S, B, N), resets (1, B) bool or None. Returns the states after it (S, 1, B, N), and what
    `linearize` does.
    """
    few = x.shape[1] == 1 and x.shape[2] <= STEP_ROWS
    if backend != "triton" or not few or not is_dense_rgc(cell, weights):
        return None
    from ..kernels import rgc_step as kernels

    def launch() -> tuple[Any, ...]:
        dense, marks = [w.contiguous() for w in weights], None if resets is None else resets[0].contiguous()
        return kernels.rgc_step(x[0, 0].contiguous(), dense, state.contiguous(), marks)

    done = _launched("rgc_step", launch)
    if done is None:
        return None
    after, before, arrays = done
    partials, m = RGCCell.partials_in(arrays[:, None])
    return after[:, None], Linearization(partials, before[:, None], resets), m


def one_launch(cell: Cell, weights: Sequence[Tensor], batch: int) -> bool:
    """Whether Triton's loop over `batch` rows is one launch for all steps, with the weights on chip.

    As `kernels.rgc_forward.on_chip` has it, of the weights' GPU; of an H100 if they lie elsewhere.
    """
    if not is_dense_rgc(cell, weights):
        return False
    units, device = weights[0].shape[0], weights[0].device
    if units <= SMALL_UNITS or units > ON_CHIP_UNITS:
        return units <= SMALL_UNITS
    on_gpu = device.type == "cuda"
    return batch <= (torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132)


def is_dense_rgc(cell: Cell, weights: Sequence[Tensor]) -> bool:
    """Whether these are the recurrent weights of an RGC, dense: what kernels of its own take."""
    return isinstance(cell, RGCCell) and all(weight.dim() == 2 for weight in weights)


def exact(
    cell: Cell,
    trajectory: Trajectory,
    lin: Linearization,
    weights: Sequence[Tensor],
    delta: Tensor,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """What `dual` returns, of all matrices and inputs, by the exact credits of backpropagation through time.

    lin: `trajectory` linearised; delta (S, T, B, N). Kernels run RGC with dense weights.
    """
    if backend == "triton" and is_dense_rgc(cell, weights):
        from ..kernels import rgc_backward as kernels

        def launch() -> tuple[Any, ...]:
            return kernels.bptt_credits(
                trajectory.saved.contiguous(),
                lin.before,
                trajectory.x[0].contiguous(),
                [weight.contiguous() for weight in weights],
                delta.contiguous(),
                None if trajectory.resets is None else trajectory.resets.contiguous(),
            )

        done = _launched("rgc_backward", launch)
        if done is not None:
            credit, first, entering = done
            (ss, sm), (mm, ms) = (by_source.unbind(-2) for by_source in entering.unbind(0))
            return (ss, ms, mm, sm), rfp.input_gradient(lin, credit, len(cell.per_unit)), first
    credit, first = exact_credits(cell, lin, weights, delta, backend=backend)
    in_turn = (rfp.entering_credit(matrix, lin, credit) for matrix in cell.matrices)
    return in_turn, rfp.input_gradient(lin, credit, len(cell.per_unit)), first


def exact_credits(
    cell: Cell,
    lin: Linearization,
    weights: Sequence[Tensor],
    delta: Tensor,
    carry: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """`bptt.credits` by the chosen backend; where Triton would, torch does."""
    _, steps, batch, _ = delta.shape
    if (
        backend == "compile"
        and steps * batch >= _native.PACKED_FROM
        and compiled_loop(cell, weights, steps, batch)
        and _has_memory(delta, carry, lin.before, lin.resets, *weights)
    ):
        made = _native.exact_credits(lin, cell.matrices, weights, delta, carry)
        if made is not None:
            return made
    return bptt.credits(lin, cell.matrices, weights, delta, carry)


def reverse_scan(
    m: Tensor, delta: Tensor, carry: Tensor | None = None, *, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """`rfp.reverse_scan` by the chosen backend; where Triton would, torch does one step, which is two products."""
    if (
        backend == "compile"
        and compiled_reverse(delta.shape[2] * delta.shape[3])
        and _has_memory(m, delta, carry)
    ):
        made = _native.reverse_scan(m, delta, carry)
        if made is not None:
            return made
    if backend == "triton" and delta.shape[1] > 1 and delta.shape[0] <= SCAN_STATES:
        from ..kernels import reverse_scan as kernels

        m, delta = m.contiguous(), delta.contiguous()
        carry = None if carry is None else carry.contiguous()
        done = _launched("reverse_scan", lambda: kernels.reverse_scan(m, delta, carry))
        if done is not None:
            return done
    return rfp.reverse_scan(m, delta, carry)


def affine_scan(m: Tensor, r: Tensor, *, backend: str = "torch") -> Tensor:
    """`rfp.affine_scan` by the chosen backend.

    A scan forward in time is one backward with time turned round and M transposed: λ(t') = c(T + 1 - t') for
    t' = 1 … T, where what M(t' + 1)ᵀ does to credit is what M(T + 1 - t') does to c.
    """
    if backend != "triton" or r.shape[0] > SCAN_STATES:
        return rfp.affine_scan(m, r)
    steps = r.shape[1]
    order = torch.arange(steps, 0, -1, device=r.device) % steps
    turned = m.transpose(0, 1).index_select(2, order)
    return reverse_scan(turned, r.flip(1), backend=backend)[0].flip(1)


def of_states(given: OfStates, trajectory: Trajectory) -> Tensor:
    """As one array (S, T, B, N)."""
    if isinstance(given, Tensor):
        return given
    like = trajectory.after[0]
    return torch.stack([torch.zeros_like(like) if one is None else one for one in given])


def dual_of(
    cell: Cell,
    trajectory: Trajectory,
    weights: Sequence[Tensor],
    delta: OfStates,
    matrices: Sequence[Matrix],
    inputs: int,
    learning: str,
    carry: Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """`dual` of a trajectory by one of `rfp.RULES`: `linearize` and then `dual`, or both in one pass.

    That is of RFP's rule, by "compile" of `compiled_partials` and by "triton" of an RGC; no partial is written then,
    and E^k are those of all matrices, for one product a state (`rfp.Joined`). weights as `linearize` takes them;
    carry (S, B, N): credit that later steps pass to the last.
    """
    if one_pass(cell, learning, backend) and _has_memory(
        *delta, carry, trajectory.x, trajectory.states, trajectory.saved, trajectory.resets, *weights
    ):
        made = _native.dual(cell, trajectory, _own(weights), delta, carry)
        if made is not None:
            return made
    if backend == "triton" and learning == "rfp" and isinstance(cell, RGCCell):
        from ..kernels import rgc_partials as kernels

        def launch() -> tuple[Any, ...]:
            gates, before, u, own, resets = _of_circuit(trajectory, weights)
            source, later = (
                of_states(delta, trajectory).contiguous(),
                None if carry is None else carry.contiguous(),
            )
            return kernels.rgc_dual(gates, before, u, own, source, resets, later)

        done = _launched("rgc_dual", launch)
        if done is not None:
            entering, for_input, first = done
            joined = rfp.Joined(entering.flatten(-2), _native.RGC_PLACES, for_input.shape[-1])
            return joined, for_input[None][:inputs], first
    lin, m = linearize(cell, trajectory, weights, learning, backend=backend)
    return dual(lin, m, of_states(delta, trajectory), matrices, inputs, carry, backend=backend)


def _own(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights as they are, but of heads their own parts alone."""
    return [weight if weight.dim() < 3 else weight_ops.own(weight) for weight in weights]


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
    """From δ to all that the dual form's gradients are made of, by the chosen backend.

    m (S, S, T, B, N), delta (S, T, B, N), carry as `reverse_scan` takes it, which Triton's kernel doesn't. Returns the
    credit that enters each matrix, E^k (T, B, N), to be taken one after the other; the gradient of the first `inputs` =
    J per-unit inputs (J, T, B, N); and M(1)ᵀ λ(1) (S, B, N). Torch makes λ, and of λ these. Triton makes them in one
    pass, once what a matrix and an input share, and λ not at all.
    """
    if backend == "triton" and carry is None and delta.shape[0] <= SCAN_STATES:
        from ..kernels import reverse_scan as kernels

        given = [_all_contiguous(by_state) for by_state in lin.partials.input[:inputs]]
        # by what a matrix enters: several may enter one gate, and what drives a gate may be an input as well
        place = {id(by_state): j for j, by_state in enumerate(lin.partials.input[:inputs])}
        apart: list[ByState] = []
        for matrix in matrices:
            by_state = lin.immediate(matrix)
            if id(by_state) not in place:
                place[id(by_state)] = inputs + len(apart)
                apart.append(_all_contiguous(by_state))
        done = _launched(
            "reverse_scan_entering",
            lambda: kernels.reverse_scan_entering(m.contiguous(), delta.contiguous(), apart, given),
        )
        if done is not None:
            entering, for_inputs, first = done
            found = [*for_inputs.unbind(0), *entering.unbind(0)]
            return [found[place[id(lin.immediate(matrix))]] for matrix in matrices], for_inputs, first
    credit, first = reverse_scan(m, delta, carry, backend=backend)
    in_turn = (rfp.entering_credit(matrix, lin, credit) for matrix in matrices)
    return in_turn, rfp.input_gradient(lin, credit, inputs), first


def _all_contiguous(by_state: ByState) -> ByState:
    return {nu: partial.contiguous() for nu, partial in by_state.items()}


def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    *,
    rng_state: Tensor | None = None,
    backend: str = "torch",
    room: Room | None = None,
) -> Tensor | None:
    """`rfp.gamma_step_` by the chosen backend; room: that "compile" takes for the gradient. Mutates gammas, not
    rng_state."""
    if backend == "triton":
        from ..kernels import gamma_step as kernels

        def launch() -> tuple[Tensor | None]:
            return (kernels.gamma_step_(gammas, m, phi, y.contiguous(), delta, rng_state=rng_state),)

        done = _launched("gamma_step", launch)
        if done is not None:
            return done[0]
    if backend == "compile" and _has_memory(*gammas, m, phi, y, delta):
        passed = _native.gamma_pass(gammas, m, phi[:, None], y[None], delta, room=room)
        if passed is not None:
            return passed[0]
    return rfp.gamma_step_(gammas, m, phi, y, delta, rng_state)


_Array = TypeVar("_Array", Tensor, Tensor | None)


@dataclass(frozen=True)
class Descent:
    """A step of SGD, W ← W - lr · G, taken where G is found: of weights, detached, None for one that stays.

    lr (1,), of the weights' dtype and device: what it is when G is found.
    """

    weights: Sequence[Tensor | None]
    lr: Tensor

    @classmethod
    def down(cls, weights: Sequence[Tensor], lr: Tensor) -> Descent:
        """Of those parameters that require a gradient."""
        return cls([weight.detach() if weight.requires_grad else None for weight in weights], lr)

    def taken(self) -> None:
        """Tell autograd that the weights have changed: kernels don't."""
        torch.autograd.graph.increment_version([weight for weight in self.weights if weight is not None])

    def of(self, indices: Sequence[int]) -> Descent:
        """Of some of the weights."""
        return Descent([self.weights[index] for index in indices], self.lr)

    def take_(self, gradients: Tensor | Sequence[Tensor]) -> None:
        """Take the step by these gradients, one a weight and of as many numbers."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            if weight is not None:
                weight.addcmul_(gradient.view(weight.shape), self.lr, value=-1)


def gamma_steps_(
    gammas: Sequence[Tensor],
    matrices: Sequence[Matrix],
    lin: Linearization,
    inputs: Tensor | None,
    m: Tensor,
    delta: Tensor | None = None,
    *,
    rng_state: Tensor | None = None,
    backend: str = "torch",
    room: Room | None = None,
    descent: Descent | None = None,
) -> Tensor | None:
    """`gamma_step_` by each step of a linearisation in turn, and the gradients' sum (K, N, M); None without delta.

    matrices: those of one shape whose Γ it is; inputs (T, B, I), if one reads the layer's; m (S, S, T, B, N), delta
    (S, T, B, N) or None. Compiled code and kernels take φ and y where they lie; else they are made one array each.
    descent: of the matrices' weights, which take each step's gradient, and None is returned: Γ doesn't depend on them
    here, so that their steps add up to that of the sum. Mutates gammas, counts steps in rng_state.
    """
    if delta is None:
        descent = None
    native = backend == "compile" and _has_memory(*gammas, m, lin.before, inputs, delta)
    apart: list[Tensor | None] = []
    read: list[Tensor] = []
    if native or backend == "triton":
        entries = [lin.immediate(matrix) for matrix in matrices]
        apart = [by.get(nu) for nu in range(len(gammas)) for by in entries]
        read = [rfp.signal(matrix, lin.before, inputs) for matrix in matrices]
    stacked: tuple[Tensor, Tensor] | None = None
    total: Tensor | None = None
    for t in range(lin.steps):
        done: tuple[Tensor | None] | None = None
        if native:
            taken = None if descent is None else (descent.weights, descent.lr.item())
            done = _native.gamma_step(gammas, m, apart, read, delta, t, room, taken)
        elif backend == "triton":
            done = _launched_step(gammas, m, apart, read, delta, t, rng_state, descent)
        if done is None:
            if stacked is None:
                stacked = rfp.immediates(matrices, lin), rfp.signals(matrices, lin, inputs)
            credit = None if delta is None else delta.select(1, t)
            part = rfp.gamma_step_(
                gammas, m.select(2, t), stacked[0].select(1, t), stacked[1][t], credit, rng_state
            )
            if descent is not None and part is not None:
                descent.take_(part)
                part = None
            done = (part,)
        if rng_state is not None:
            rng_state[1] += 1
        total = done[0] if total is None or done[0] is None else total.add_(done[0])
    return total


def _launched_step(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Sequence[Tensor | None],
    y: Sequence[Tensor],
    delta: Tensor | None,
    t: int,
    rng_state: Tensor | None,
    descent: Descent | None,
) -> tuple[Tensor | None] | None:
    """A tuple of the gradient of step t, or None with a descent; None if the kernel can't be launched, and nothing
    done."""
    from ..kernels import gamma_step as kernels

    def launch() -> tuple[Tensor | None]:
        step = kernels.gamma_step_(
            gammas,
            m.select(2, t),
            _evenly([None if each is None else each[t] for each in phi]),
            _evenly([each[t] for each in y]),
            None if delta is None else delta.select(1, t),
            weights=None
            if descent is None
            else [w if w is None else w.view(len(w), -1) for w in descent.weights],
            lr=None if descent is None else descent.lr,
            rng_state=rng_state,
        )
        return (step,)

    return _launched("gamma_step", launch)


def _evenly(arrays: Sequence[_Array]) -> list[_Array]:
    """(B, ·) arrays whose numbers are contiguous and rows as far apart in all: as they are, or copied."""
    there = [a for a in arrays if a is not None]
    if len({a.stride(0) for a in there}) <= 1 and all(a.stride(-1) == 1 or a.shape[-1] == 1 for a in there):
        return list(arrays)
    return [None if a is None else a.contiguous() for a in arrays]


def rtrl_heads_(
    gamma: Tensor, jacobian: Tensor, phi: Tensor, y: Tensor, delta: Tensor | None
) -> tuple[Tensor | None] | None:
    """`kernels.rtrl_heads.rtrl_heads_`: a tuple of the gradient or None; None if the kernel can't be launched, and
    nothing done. Mutates gamma."""
    from ..kernels import rtrl_heads as kernels

    return _launched("rtrl_heads", lambda: (kernels.rtrl_heads_(gamma, jacobian, phi, y, delta),))


def rtrl_jacobian(lin: Linearization, t: int, weights: Sequence[Tensor]) -> Tensor | None:
    """J(t) (B, 1, 2N, 2N) of an RGC with dense weights, by `kernels.rtrl_step`; None if it can't be launched."""
    from ..kernels import rtrl_step as kernels

    def launch() -> tuple[Tensor]:
        own = [lin.partials.own[nu][nu][t].contiguous() for nu in range(2)]
        resets = None if lin.resets is None else lin.resets[t]
        dense = [weight.contiguous() for weight in weights]
        return (kernels.rtrl_jacobian(own, _entering_gates(lin, t), dense, resets)[:, None],)

    done = _launched("rtrl_jacobian", launch)
    return None if done is None else done[0]


def rtrl_immediate_(gamma: Tensor, lin: Linearization, t: int) -> bool:
    """Add R(t) of an RGC's recurrent weights, dense, to their γ, by `kernels.rtrl_step`; whether it was launched.

    Mutates gamma (B, 1, 2, N, 4, N, N)."""
    from ..kernels import rtrl_step as kernels

    def launch() -> tuple[()]:
        kernels.rtrl_immediate_(
            gamma.flatten(4).flatten(1, 3), _entering_gates(lin, t), lin.before[:, t].contiguous()
        )
        return ()

    return _launched("rtrl_immediate", launch) is not None


def _entering_gates(lin: Linearization, t: int) -> list[Tensor]:
    """φ(t) of an RGC's ss, ms, mm and sm, for the state that each enters."""
    return [next(iter(by_state.values()))[t].contiguous() for by_state in lin.partials.gate]


def gamma_chunk_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    backend: str = "torch",
    room: Room | None = None,
) -> Tensor | None:
    """`rfp.gamma_chunk_` by the chosen backend, from M (S, S, C, B, N) itself; room as in `gamma_step_`.

    Mutates gammas.
    """
    same = y.shape[-1] == gammas[0].shape[-1]  # else each row of Γ reads its own number: little, and torch's
    if backend == "triton" and same:
        from ..kernels import gamma_chunk, reverse_scan

        def launch() -> tuple[Tensor | None]:
            arriving, whole = reverse_scan.arriving(m.contiguous(), phi)
            past = None if credit is None else credit.contiguous()
            return (gamma_chunk.gamma_chunk_(gammas, whole, arriving, y.contiguous(), past),)

        done = _launched("gamma_chunk", launch)
        if done is not None:
            return done[0]
    if backend == "compile" and _has_memory(*gammas, m, phi, y, credit):
        made = _native.arriving(m, phi)
        if made is not None:
            arrived, whole = made
            passed = _native.gamma_pass(gammas, whole, arrived, y, credit, before=True, room=room)
            assert passed is not None
            return passed[0]
    suffix, whole = rfp.suffix_products(m)
    return rfp.gamma_chunk_(gammas, suffix, whole, phi, y, credit)


def gamma_read(
    gammas: Sequence[Tensor], credit: Tensor, *, backend: str = "torch", room: Room | None = None
) -> Tensor:
    """`rfp.gamma_read` by the chosen backend; room as in `gamma_step_`."""
    if backend == "triton":
        from ..kernels import gamma_read as kernels

        done = _launched("gamma_read", lambda: (kernels.gamma_read(gammas, credit.contiguous()),))
        if done is not None:
            return done[0]
    if backend == "compile" and _has_memory(*gammas, credit):
        passed = _native.gamma_pass(gammas, None, None, None, credit, room=room)
        if passed is not None:
            assert passed[0] is not None
            return passed[0]
    return rfp.gamma_read(gammas, credit)


_failed: set[str] = set()


def _launched(name: str, launch: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """What `launch` gives; None if the kernel can't be compiled or launched, now or before."""
    if name in _failed:
        return None
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return launch()
    except (CompilationError, OutOfResources, PTXASError) as error:
        _failed.add(name)
        warnings.warn(
            f"Triton kernel {name} can't be launched, torch runs in its place from now on: {error}",
            stacklevel=2,
        )
        return None
