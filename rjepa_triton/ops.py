"""What runs the recursions: plain torch, code compiled for the CPU, or Triton kernels.

torch    anywhere, in any floating dtype: an operation a pass over memory
compile  CPU, with a C++ compiler. Γ: the same functions by torch.compile, one pass over Γ a step; compiling takes some
         seconds once. Loops over time, float32: RGC's with dense weights and the reverse scan as one call each
         (`_loops`), where a layer is so small that torch's calls are what costs; elsewhere torch
triton   CUDA and ROCm tensors in float32 (Γ may be bfloat16); elsewhere under TRITON_INTERPRET=1, for tests
auto     triton where it can run; compile on the CPU, for Γ where it is large; else torch

A kernel that can't be launched, or a loop that can't be compiled, gives way to torch for good, with one warning that
says why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import _loops
from .cells import RGCCell
from .reference import bptt, rfp
from .two_point import ByState, Cell, Linearization, Matrix, Trajectory

BACKENDS = ("auto", "torch", "compile", "triton")
# Numbers of Γ^ν a batch row from which one pass over it outweighs the cost of compiling (N = 128 for RGC).
COMPILE_FROM = 1 << 16
HEAD_UNITS = 64  # of a head, that the exact kernel takes
ON_CHIP_UNITS = 64  # of an RGC, up to which one launch runs all steps of its loop
SCAN_STATES = 2  # states a unit that kernels scan; more are torch's
# Up to how many units, and numbers of B·N, RGC's loop is compiled code's, which one thread runs: beyond, torch's
# products by all threads may be faster. Of one step, for which weights are laid out anew, up to fewer units.
LOOP_UNITS, LOOP_NUMBERS, STEP_UNITS = 256, 2048, 128
# The same of the reverse scan, up to where torch runs a step of two states by one thread.
REVERSE_NUMBERS = 1 << 14


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return _loops.compiler()


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
    if not is_dense_rgc(cell, weights):
        return False
    units = weights[0].shape[0]
    return units <= (LOOP_UNITS if steps > 1 else STEP_UNITS) and batch * units <= LOOP_NUMBERS


def compiled_reverse(numbers: int) -> bool:
    """Whether "compile" runs the reverse scan over `numbers` of B·N as one call."""
    return numbers <= REVERSE_NUMBERS


def _has_memory(*tensors: Tensor | None) -> bool:
    """Whether compiled loops can be given these tensors' addresses: not while torch.compile or a mode traces them."""
    return not torch.compiler.is_compiling() and all(
        tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors
    )


def choose_gamma(
    backend: str, device: torch.device, dtype: torch.dtype, gamma_dtype: torch.dtype, row_numbers: int
) -> tuple[str, str]:
    """("torch" | "compile" | "triton", why), for Γ^ν of `row_numbers` a batch row.

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
    elif cpp_compiler() is None:
        no_compile = "no C++ compiler was found"
    obstacle = {"triton": no_triton, "compile": no_compile}.get(backend)
    if obstacle:
        raise ValueError(f"backend={backend!r} can't run: {obstacle}; use backend='torch'")
    if backend != "auto":
        return backend, "asked for"
    if device.type == "cuda":
        return ("torch", no_triton) if no_triton else ("triton", "one pass over Γ a step")
    if no_compile:
        return "torch", no_compile
    if row_numbers < COMPILE_FROM:
        return "torch", f"Γ has {row_numbers:,} numbers a row and state, compiled from {COMPILE_FROM:,}"
    return "compile", f"Γ has {row_numbers:,} numbers a row and state: one pass over it a step"


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
        found = _loops.rgc_scan(x[0], weights, state, resets)
        if found is not None:
            return Trajectory(x, found[0], found[1] if keep else x.new_empty(0), resets)
    if backend == "triton" and is_dense_rgc(cell, weights):
        from .kernels import rgc_forward as kernels

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


def one_launch(cell: Cell, weights: Sequence[Tensor]) -> bool:
    """Whether Triton's loop is one launch for all steps, with the weights on chip."""
    return is_dense_rgc(cell, weights) and weights[0].shape[0] <= ON_CHIP_UNITS


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
        from .kernels import rgc_backward as kernels

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
    credit, first = bptt.credits(lin, cell.matrices, weights, delta)
    in_turn = (rfp.entering_credit(matrix, lin, credit) for matrix in cell.matrices)
    return in_turn, rfp.input_gradient(lin, credit, len(cell.per_unit)), first


def reverse_scan(
    m: Tensor, delta: Tensor, carry: Tensor | None = None, *, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """`rfp.reverse_scan` by the chosen backend; where Triton would, torch does one step, which is two products."""
    if (
        backend == "compile"
        and compiled_reverse(delta.shape[2] * delta.shape[3])
        and _has_memory(m, delta, carry)
    ):
        made = _loops.reverse_scan(m, delta, carry)
        if made is not None:
            return made
    if backend == "triton" and delta.shape[1] > 1 and delta.shape[0] <= SCAN_STATES:
        from .kernels import reverse_scan as kernels

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


def dual(
    lin: Linearization,
    m: Tensor,
    delta: Tensor,
    matrices: Sequence[Matrix],
    inputs: int,
    *,
    backend: str = "torch",
) -> tuple[Iterable[Tensor], Tensor, Tensor]:
    """From δ to all that the dual form's gradients are made of, by the chosen backend.

    m (S, S, T, B, N), delta (S, T, B, N). Returns the credit that enters each matrix, E^k (T, B, N), to be taken one
    after the other; the gradient of the first `inputs` = J per-unit inputs (J, T, B, N); and M(1)ᵀ λ(1) (S, B, N).
    Torch makes λ, and of λ these. Triton makes them in one pass, once what a matrix and an input share, and λ not at
    all.
    """
    if backend == "triton" and delta.shape[0] <= SCAN_STATES:
        from .kernels import reverse_scan as kernels

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
    credit, first = reverse_scan(m, delta, backend=backend)
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
) -> Tensor | None:
    """`rfp.gamma_step_` by the chosen backend; "compile" rounds to nearest. Mutates gammas, not rng_state."""
    if backend == "triton":
        from .kernels import gamma_step as kernels

        def launch() -> tuple[Tensor | None]:
            return (kernels.gamma_step_(gammas, m, phi, y.contiguous(), delta, rng_state=rng_state),)

        done = _launched("gamma_step", launch)
        if done is not None:
            return done[0]
    if backend != "compile":
        return rfp.gamma_step_(gammas, m, phi, y, delta, rng_state)
    total: Tensor | None = None
    per_row = [(m, 2), (phi, 1), (y, 0)] + ([] if delta is None else [(delta, 1)])
    for block, arrays in _row_blocks(gammas, per_row):
        if delta is None:
            _compiled(_advance_)(block, *arrays)
        elif total is None:
            total = _compiled(_step_)(block, *arrays)
        else:
            _compiled(_step_into_)(block, *arrays, total)
    return total


def rtrl_heads_(
    gamma: Tensor, jacobian: Tensor, phi: Tensor, y: Tensor, delta: Tensor | None
) -> tuple[Tensor | None] | None:
    """`kernels.rtrl_heads.rtrl_heads_`: a tuple of the gradient or None; None if the kernel can't be launched, and
    nothing done. Mutates gamma."""
    from .kernels import rtrl_heads as kernels

    return _launched("rtrl_heads", lambda: (kernels.rtrl_heads_(gamma, jacobian, phi, y, delta),))


def rtrl_jacobian(lin: Linearization, t: int, weights: Sequence[Tensor]) -> Tensor | None:
    """J(t) (B, 1, 2N, 2N) of an RGC with dense weights, by `kernels.rtrl_step`; None if it can't be launched."""
    from .kernels import rtrl_step as kernels

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
    from .kernels import rtrl_step as kernels

    def launch() -> tuple[()]:
        kernels.rtrl_immediate_(
            gamma.flatten(4).flatten(1, 3), _entering_gates(lin, t), lin.before[:, t].contiguous()
        )
        return ()

    return _launched("rtrl_immediate", launch) is not None


def _entering_gates(lin: Linearization, t: int) -> list[Tensor]:
    """φ(t) of an RGC's ss, ms, mm and sm, for the state that each enters."""
    return [next(iter(by_state.values()))[t].contiguous() for by_state in lin.partials.gate]


def learn_step_(
    cell: Cell,
    matrices: Sequence[Sequence[Matrix]],
    gammas: Sequence[Sequence[Tensor]],
    trajectory: Trajectory,
    diagonals: Sequence[Tensor],
    inputs: Tensor | None,
    delta: Tensor,
    rule: str = "rfp",
) -> tuple[list[Tensor], Tensor]:
    """One step, compiled as one function: linearise it, advance Γ and read the gradients. Mutates gammas.

    matrices and gammas: by group of one shape. trajectory: of one step, without resets. diagonals: of the
    recurrent weights, (N,) each. inputs (1, B, I) or None; delta (S, 1, B, N); rule as in `rfp.transition`.
    Returns the groups' gradients (K, N, M), and that of the per-unit inputs (J, 1, B, N).
    """
    return _compiled(_learn_step_)(
        cell,
        [list(group) for group in matrices],
        [list(group) for group in gammas],
        (trajectory.x, trajectory.states, trajectory.saved),
        list(diagonals),
        inputs,
        delta,
        rule,
    )


def gamma_chunk_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    backend: str = "torch",
) -> Tensor | None:
    """`rfp.gamma_chunk_` by the chosen backend, from M (S, S, C, B, N) itself. Mutates gammas."""
    if backend == "triton":
        from .kernels import gamma_chunk, reverse_scan

        def launch() -> tuple[Tensor | None]:
            arriving, whole = reverse_scan.arriving(m.contiguous(), phi)
            past = None if credit is None else credit.contiguous()
            return (gamma_chunk.gamma_chunk_(gammas, whole, arriving, y.contiguous(), past),)

        done = _launched("gamma_chunk", launch)
        if done is not None:
            return done[0]
    suffix, whole = rfp.suffix_products(m)
    if backend != "compile" or credit is None:
        return rfp.gamma_chunk_(gammas, suffix, whole, phi, y, credit)
    total: Tensor | None = None
    for block, arrays in _row_blocks(gammas, [(whole, 2), (credit, 1)]):
        if total is None:
            total = _compiled(_fold_)(block, *arrays)
        else:
            _compiled(_fold_into_)(block, *arrays, total)
    arriving = rfp.arriving(suffix, phi)
    for nu, gamma in enumerate(gammas):
        rfp.add_arriving_(gamma, arriving[nu], y)
    return total


def gamma_read(gammas: Sequence[Tensor], credit: Tensor, *, backend: str = "torch") -> Tensor:
    """`rfp.gamma_read` by the chosen backend."""
    if backend == "triton":
        from .kernels import gamma_read as kernels

        done = _launched("gamma_read", lambda: (kernels.gamma_read(gammas, credit.contiguous()),))
        if done is not None:
            return done[0]
    if backend != "compile":
        return rfp.gamma_read(gammas, credit)
    total: Tensor | None = None
    for block, (part,) in _row_blocks(gammas, [(credit.contiguous(), 1)]):
        if total is None:
            total = _compiled(_read)(block, part)
        else:
            _compiled(_read_into_)(block, part, total)
    assert total is not None
    return total


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


# Numbers of Γ^ν that compiled code is given at once at the most, or one batch row. With several rows it sums
# over them in a second pass, which is cheap while they are in cache.
BLOCK = 1 << 18


def is_one_block(gamma: Tensor) -> bool:
    """Whether compiled code takes all batch rows of Γ^ν at once."""
    return gamma.shape[0] == 1 or gamma.numel() <= BLOCK


def _row_blocks(
    gammas: Sequence[Tensor], per_row: Sequence[tuple[Tensor, int]]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Γ and the arrays of `per_row`, each with the dimension of its batch, by blocks of batch rows."""
    if is_one_block(gammas[0]):  # a slice costs a microsecond or two
        yield list(gammas), [array for array, _ in per_row]
        return
    batch = gammas[0].shape[0]
    rows = max(1, BLOCK * batch // gammas[0].numel())
    for b in range(0, batch, rows):
        count = min(rows, batch - b)
        # small arrays are copied: strides and offsets that differ by block would have it compiled anew
        small = [a.narrow(dim, b, count).clone(memory_format=torch.contiguous_format) for a, dim in per_row]
        yield [g.narrow(0, b, count) for g in gammas], small


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


# In place on some batch rows. For the compiler to write Γ where it read it, without a copy, its states must
# be separate tensors, and a single row must be indexed, not summed over.


def _read(gammas: Sequence[Tensor], credit: Tensor) -> Tensor:
    rows = rfp.read_rows(gammas, credit)
    return rows[0] if rows.shape[0] == 1 else rows.sum(0)


def _read_into_(gammas: Sequence[Tensor], credit: Tensor, total: Tensor) -> None:
    total.add_(_read(gammas, credit))


def _write_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _advance_(gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor) -> None:
    _write_(gammas, rfp.advanced(gammas, m, phi, y))


def _step_(gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    new = rfp.advanced(gammas, m, phi, y)
    total = _read(new, delta)
    _write_(gammas, new)
    return total


def _step_into_(
    gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor, total: Tensor
) -> None:
    new = rfp.advanced(gammas, m, phi, y)
    total.add_(_read(new, delta))
    _write_(gammas, new)


def _fold_(gammas: list[Tensor], whole: Tensor, credit: Tensor) -> Tensor:
    total = _read(gammas, credit)
    _write_(gammas, rfp.carried(gammas, whole))
    return total


def _fold_into_(gammas: list[Tensor], whole: Tensor, credit: Tensor, total: Tensor) -> None:
    total.add_(_read(gammas, credit))
    _write_(gammas, rfp.carried(gammas, whole))


def _learn_step_(
    cell: Cell,
    matrices: list[list[Matrix]],
    gammas: list[list[Tensor]],
    trajectory: tuple[Tensor, Tensor, Tensor],
    diagonals: list[Tensor],
    inputs: Tensor | None,
    delta: Tensor,
    rule: str,
) -> tuple[list[Tensor], Tensor]:
    lin = cell.linearize(Trajectory(*trajectory))
    m = rfp.transition(lin, cell.matrices, diagonals, rule).select(2, 0)
    totals = []
    for group, states in zip(matrices, gammas, strict=True):
        phi = rfp.immediates(group, lin).select(1, 0)
        y = rfp.signals(group, lin, inputs)[0]
        new = rfp.advanced(states, m, phi, y)
        totals.append(_read(new, delta.select(1, 0)))
        _write_(states, new)
    return totals, rfp.input_gradient(lin, delta, len(cell.inputs))
