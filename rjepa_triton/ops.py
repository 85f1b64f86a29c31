"""Which implementation of the Γ recursion runs: plain torch, or the same functions compiled for the CPU.

Compiled code reads and writes Γ once a step where plain torch makes a pass an operation. Compiling takes some
seconds once (and a C++ compiler), so "auto" compiles only where Γ is large, and says so through `choose`.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from .reference import rfp

BACKENDS = ("auto", "torch", "compile")
# Numbers of Γ^ν a batch row from which one pass over it outweighs the cost of compiling (N = 256 for RGC).
COMPILE_FROM = 1 << 18


@functools.cache
def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def choose(backend: str, device: torch.device, row_numbers: int, gamma_is_compute: bool) -> tuple[str, str]:
    """("torch" | "compile", why), for Γ^ν of `row_numbers` a batch row.

    Raises ValueError if `backend` is unknown, or is "compile" where that can't run.
    """
    check.one_of("backend", backend, BACKENDS)
    obstacle = None
    if device.type != "cpu":
        obstacle = f"it serves CPU tensors, got {device}"
    elif not gamma_is_compute:
        obstacle = "gamma_dtype differs from the layer's dtype"
    elif cpp_compiler() is None:
        obstacle = "no C++ compiler was found"
    if backend == "compile" and obstacle:
        raise ValueError(f"backend='compile' can't run: {obstacle}; use backend='torch'")
    if backend == "auto":
        if obstacle:
            return "torch", obstacle
        if row_numbers < COMPILE_FROM:
            return "torch", f"Γ has {row_numbers:,} numbers a row and state, compiled from {COMPILE_FROM:,}"
        return "compile", f"Γ has {row_numbers:,} numbers a row and state; one pass a step"
    return backend, "asked for"


def gamma_step_(
    gammas: Sequence[Tensor],
    m: Tensor,
    phi: Tensor,
    y: Tensor,
    delta: Tensor | None = None,
    *,
    backend: str = "torch",
) -> Tensor | None:
    """`rfp.gamma_step_` by the chosen backend. Mutates gammas."""
    if backend == "torch":
        return rfp.gamma_step_(gammas, m, phi, y, delta)
    if gammas[0].shape[0] == 1:
        args = (list(gammas), m, phi, y)
        return _compiled(_advance_row_)(*args) if delta is None else _compiled(_step_row_)(*args, delta)
    total: Tensor | None = None
    for b in range(gammas[0].shape[0]):
        row = slice(b, b + 1)
        args = ([g[row] for g in gammas], m[:, :, row], phi[:, row], y[row])
        if delta is None:
            _compiled(_advance_row_)(*args)
        elif total is None:
            total = _compiled(_step_row_)(*args, delta[:, row])
        else:
            _compiled(_step_row_into_)(*args, delta[:, row], total)
    return total


def gamma_chunk_(
    gammas: Sequence[Tensor],
    suffix: Tensor,
    whole: Tensor,
    phi: Tensor,
    y: Tensor,
    credit: Tensor | None = None,
    *,
    diagonal: bool = False,
    backend: str = "torch",
) -> Tensor | None:
    """`rfp.gamma_chunk_` by the chosen backend. Mutates gammas."""
    if backend == "torch" or diagonal or credit is None:
        return rfp.gamma_chunk_(gammas, suffix, whole, phi, y, credit, diagonal=diagonal)
    total: Tensor | None = None
    for b in range(gammas[0].shape[0]):
        row = slice(b, b + 1)
        args = ([g[row] for g in gammas], whole[:, :, row], credit[:, row])
        if total is None:
            total = _compiled(_fold_row_)(*args)
        else:
            _compiled(_fold_row_into_)(*args, total)
    arriving = rfp.arriving(suffix, phi)
    for nu, gamma in enumerate(gammas):
        rfp.add_arriving_(gamma, arriving[nu], y, diagonal)
    return total


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


# In place on one batch row. For the compiler to write Γ where it read it, without a copy, its states must be
# separate tensors, and the row must be indexed, not summed over.


def _write_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _advance_row_(gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor) -> None:
    _write_(gammas, rfp.advanced(gammas, m, phi, y))


def _step_row_(gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    new = rfp.advanced(gammas, m, phi, y)
    total = rfp.read_rows(new, delta)[0]
    _write_(gammas, new)
    return total


def _step_row_into_(
    gammas: list[Tensor], m: Tensor, phi: Tensor, y: Tensor, delta: Tensor, total: Tensor
) -> None:
    new = rfp.advanced(gammas, m, phi, y)
    total.add_(rfp.read_rows(new, delta)[0])
    _write_(gammas, new)


def _fold_row_(gammas: list[Tensor], whole: Tensor, credit: Tensor) -> Tensor:
    total = rfp.read_rows(gammas, credit)[0]
    _write_(gammas, rfp.carried(gammas, whole))
    return total


def _fold_row_into_(gammas: list[Tensor], whole: Tensor, credit: Tensor, total: Tensor) -> None:
    total.add_(rfp.read_rows(gammas, credit)[0])
    _write_(gammas, rfp.carried(gammas, whole))
