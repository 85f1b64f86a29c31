"""Launch every kernel in a process that imports triton without TRITON_INTERPRET, on a machine without a GPU.

python launches.py refuse    checks that each launcher says that its CPU tensors need a GPU or the interpreter
python launches.py compile   compiles each launch to machine code for sm_90, with a stand-in for the GPU driver, which
                             checks that kernels take what launchers pass, and that they compile
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import triton
from torch import zeros

from rjepa_triton import kernels
from rjepa_triton.backend import triton_cells
from rjepa_triton.cells.builtin import GRUCell, LSTMCell, RGCCell
from rjepa_triton.cells.two_point import Cell
from rjepa_triton.kernels import (
    cell_backward,
    cell_forward,
    cell_on_chip,
    cell_partials,
    cell_step,
    gamma_chunk,
    gamma_read,
    gamma_step,
    reverse_scan,
    rtrl_heads,
    rtrl_step,
)

# Every file of kernels; an underscore begins the name of what they share.
MODULES = tuple(
    importlib.import_module(f"{kernels.__name__}.{each.name}")
    for each in pkgutil.iter_modules(kernels.__path__)
    if not each.name.startswith("_")
)
REFUSAL = "Triton kernels need a GPU tensor, or TRITON_INTERPRET=1 set before triton is imported"


def calls(S: int, T: int, B: int, K: int, N: int, M: int) -> list[Callable[[], object]]:
    """A call of every launcher, with and without its options."""
    gammas = [zeros(B, K, N, M) for _ in range(S)]
    m, phi, y = zeros(S, S, T, B, N), zeros(S, T, B, K, N), zeros(T, B, K, M)
    delta, carry, weight = zeros(S, T, B, N), zeros(S, B, N), zeros(K, N, M)
    partial, long = zeros(T, B, N), 8 * T
    step = (gammas, m[:, :, 0], phi[:, 0], y[0])
    chunk = (gammas, zeros(S, S, B, N), phi, y)
    return [
        lambda: gamma_step.gamma_step_(*step),
        lambda: gamma_step.gamma_step_(*step, delta[:, 0]),
        lambda: gamma_step.gamma_step_(*step, delta[:, 0], weights=weight.unbind(0), lr=zeros(1)),
        lambda: gamma_step.gamma_step_([g.bfloat16() for g in gammas], *step[1:], rng_state=zeros(2).long()),
        lambda: gamma_read.gamma_read(gammas, carry),
        lambda: gamma_chunk.gamma_chunk_(*chunk),
        lambda: gamma_chunk.gamma_chunk_(*chunk, carry, precision="tf32"),
        lambda: reverse_scan.reverse_scan(m, delta),
        # with T = 64 this is long enough for blocks of time, which take two kernels
        lambda: reverse_scan.reverse_scan(zeros(S, S, long, B, N), zeros(S, long, B, N), carry),
        lambda: reverse_scan.reverse_scan_entering(
            m, delta, [{S - 1: partial}, {}], [dict.fromkeys(range(S), partial)], carry
        ),
        lambda: reverse_scan.suffix_products(m),
        lambda: reverse_scan.arriving(m, phi),
        *rtrl_calls(B, N),
        *(call for cell in (RGCCell(), LSTMCell(), GRUCell()) for call in cell_calls(cell, B, N)),
    ]


def rtrl_calls(B: int, N: int) -> list[Callable[[], object]]:
    """The same of exact RTRL, of an RGC: S = 2 and K = 4. Sensitivities have at most 64 units, to fit in memory."""
    n, one, square = min(N, 64), zeros(B, N), zeros(N, N)
    head = zeros(B, 1, 2, n, 4, n, n), zeros(B, 1, 2 * n, 2 * n), zeros(2, B, 4, n)
    reads, phi = (0, 1, 1, 0), [one, one, None, None, None, None, one, one]
    of_n = [None if each is None else each[:, :n].contiguous() for each in phi]
    return [
        lambda: rtrl_heads.rtrl_heads_(*head, zeros(B, 4, 1, n), zeros(2, B, n)),
        lambda: rtrl_heads.rtrl_heads_(*head, zeros(B, 4, n)),
        lambda: rtrl_step.rtrl_jacobian([one, None, None, one], phi, reads, [square] * 4, zeros(B).bool()),
        lambda: rtrl_step.rtrl_immediate_(zeros(B, 2 * n, 4 * n * n), of_n, reads, zeros(2, B, n)),
    ]


def cell_calls(cell: Cell, B: int, N: int) -> list[Callable[[], object]]:
    """The same of a cell."""
    made = triton_cells.kernels_of(cell)
    assert made is not None
    f = made.functions
    resets, square, n, long = zeros(2, B).bool(), zeros(N, N), min(N, 64), 512
    x, saved, both = zeros(f.inputs, 2, B, N), zeros(2, B, f.saves, N), zeros(f.states, 2, B, N)
    weights, own, state = [square] * f.matrices, [square.diagonal()] * f.matrices, both[:, 0].contiguous()
    small = zeros(f.inputs, 2, B, n), [zeros(n, n)] * f.matrices, [zeros(B, n)] * f.states
    pointwise = zeros(B, f.matrices, N), x[:, 0], both[:, 0], both[:, 1], saved[0]
    given, credits = (f, x, saved, both, own), list(zeros(f.credits, 2, B, N))
    return [
        lambda: cell_on_chip.cell_forward(f, *small),
        lambda: cell_on_chip.cell_forward(f, *small, resets, save=False),
        lambda: cell_step.cell_step(f, x[:, 0].contiguous(), weights, state),
        lambda: cell_step.cell_step(f, x[:, 0].contiguous(), weights, state, resets[0]),
        # one step is enough, because every step is the same launch
        lambda: cell_forward.cell_pointwise_(f, *pointwise),
        lambda: cell_forward.cell_pointwise_(f, *pointwise, resets[0], both[:, 0]),
        # two steps: the last of a sequence, and one with a step after it
        lambda: cell_backward.cell_credits(f, x, saved, both, weights, both, resets),
        lambda: cell_partials.cell_linearize(*given, resets),
        lambda: cell_partials.cell_linearize(*given),
        lambda: cell_partials.cell_dual(*given, list(both), credits, resets, state),
        # blocks of time, which take two kernels
        lambda: cell_partials.cell_dual(
            f,
            zeros(f.inputs, long, B, N),
            zeros(long, B, f.saves, N),
            zeros(f.states, long, B, N),
            own,
            list(zeros(f.states, long, B, N)),
            list(zeros(f.credits, long, B, N)),
        ),
    ]


def refuse() -> None:
    for call in calls(1, 3, 1, 1, 2, 2):
        with pytest.raises(ValueError, match=rf"^[a-z]+(\[0\])? must be on a GPU, got cpu: {REFUSAL}$"):
            call()


class _Driver:
    """The methods of a driver that Triton calls before it launches a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


class _CompileOnly:
    """A kernel whose launch compiles but doesn't run. made: what each launch has compiled."""

    made: ClassVar[list[Any]] = []

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **options: object) -> None:
            self.made.append(self.kernel.warmup(*arguments, grid=grid, **options))
            assert "cubin" in self.made[-1].asm

        return launch


def compile_() -> None:
    triton.runtime.driver.set_active(_Driver())
    for module in MODULES:
        module.check_runnable = lambda *_: None
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, _CompileOnly(value))
    # Sizes that 16 divides, and sizes of 1.
    for sizes in ((2, 64, 2, 4, 512, 512), (1, 1, 1, 1, 1, 1)):
        for call in calls(*sizes):
            call()
    assert len(_CompileOnly.made) == 111, len(_CompileOnly.made)


if __name__ == "__main__":
    {"refuse": refuse, "compile": compile_}[sys.argv[1]]()
