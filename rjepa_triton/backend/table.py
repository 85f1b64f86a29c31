"""The table of backends: which backend implements which operation, when it serves, and why not where it doesn't.

An operation is declared once in `operations`: its signature and docstring are the contract, its body is the
implementation in plain torch, which serves everywhere. A backend is a file that makes a `Backend` and registers faster
implementations of some operations:

    NATIVE = Backend("compile", device_type="cpu", ...)

    @NATIVE.implements("reverse_scan")
    def reverse_scan(m, delta, carry=None, resets=None):
        if delta.shape[2] > 1000:
            return Refusal("torch is as fast on so many rows")
        ...

An implementation takes the operation's arguments but for `backend`. Where it doesn't serve them it returns a `Refusal`
with the reason, before it has changed anything, and torch runs. An implementation that fails to compile or launch gives
way to torch from then on, with one warning that says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import _checks as check

P = ParamSpec("P")
R = TypeVar("R")
Reason = str | None


class Refusal(str):
    """Why an implementation doesn't serve the arguments that it was called with."""


def not_in_memory(*tensors: Tensor | None) -> Refusal | None:
    """Why these tensors' values aren't what lies at their addresses, or None. Two quick calls for each tensor."""
    for tensor in tensors:
        if tensor is not None:
            if tensor.is_neg():
                return Refusal("torch is to negate the numbers of a tensor when it reads them")
            if (
                not tensor.data_ptr()
            ):  # torch's own tensors of zeros, tensors on meta, a storage that was freed
                return Refusal("a tensor has no memory")
    return None


@dataclass
class Backend:
    """A way to run operations faster than plain torch.

    name            what users pass as `backend=`
    device_type     backend="auto" gives this backend the tensors of such devices
    gain            what the Γ recursion gains by it, for `OnlineLearner.explain`
    no_loops        (device, dtype) → why it can't run loops over time there, or None
    no_gamma        (device, dtype, Γ's dtype, states a unit) → why it can't run the Γ recursion, or None
    traceable       whether torch.compile can trace the implementations; where it can't, torch runs under it
    failures        the exceptions which say that an implementation can't be compiled or launched on this machine;
                    they are raised before anything is changed
    failed          operations that gave way to torch, with the reason
    """

    name: str
    device_type: str
    gain: str
    no_loops: Callable[[torch.device, torch.dtype], Reason]
    no_gamma: Callable[[torch.device, torch.dtype, torch.dtype, int], Reason]
    traceable: bool = True
    failures: Callable[[], tuple[type[BaseException], ...]] = tuple
    implementations: dict[str, Callable[..., Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        BACKENDS[self.name] = self

    def implements(self, operation: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function for an operation."""

        def register(run: Callable[P, R]) -> Callable[P, R]:
            self.implementations[operation] = run
            return run

        return register


BACKENDS: dict[str, Backend] = {}


class Operation(Generic[P, R]):
    """An operation of the table. Call it as the function it was declared as; `backend` names what should run it."""

    def __init__(self, in_torch: Callable[P, R]) -> None:
        self.in_torch = in_torch
        self.name = in_torch.__name__
        functools.update_wrapper(self, in_torch)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        name: Any = kwargs.pop("backend", "torch")
        backend = BACKENDS.get(name)
        if (
            backend is not None
            and self.name in backend.implementations
            and self.name not in backend.failed
            and (backend.traceable or not torch.compiler.is_compiling())
        ):
            try:
                made = backend.implementations[self.name](*args, **kwargs)
                if type(made) is not Refusal:
                    return made
            except backend.failures() as error:
                _give_way(backend, self.name, error)
        kwargs["backend"] = name
        return self.in_torch(*args, **kwargs)


def _give_way(backend: Backend, operation: str, error: BaseException) -> None:
    backend.failed[operation] = str(error)
    warnings.warn(
        f"backend {backend.name!r} can't run {operation} here, torch runs it from now on: {error}",
        stacklevel=3,
    )


def operation(in_torch: Callable[P, R]) -> Operation[P, R]:
    """Declare an operation: the decorated function is its contract and its implementation in plain torch."""
    return Operation(in_torch)


def names() -> tuple[str, ...]:
    """What `backend=` may be."""
    return ("auto", "torch", *BACKENDS)


def serving(backend: str, why: str, *operations: Operation[Any, Any]) -> tuple[str, str]:
    """(backend that runs these operations, why), when `backend` was chosen for the reason `why`.

    That is torch once the backend's implementation of one of them has failed. Records of the benchmark and
    `OnlineLearner.explain` tell this.
    """
    failed = BACKENDS[backend].failed if backend in BACKENDS else {}
    for operation in operations:
        if operation.name in failed:
            return "torch", f"backend {backend!r} failed: {failed[operation.name]}"
    return backend, why


def choose(backend: str, device: torch.device, obstacle: Callable[[Backend], Reason]) -> tuple[str, str]:
    """(name of the backend that is to run, why).

    "auto" takes the first backend made for tensors of `device` against which `obstacle` finds nothing, else torch.

    Raises ValueError if `backend` is unknown, or if it was asked for by name and can't run.
    """
    check.one_of("backend", backend, names())
    if backend == "torch":
        return backend, "asked for"
    if backend != "auto":
        reason = obstacle(BACKENDS[backend])
        if reason:
            raise ValueError(f"backend={backend!r} can't run: {reason}; use backend='torch'")
        return backend, "asked for"
    reasons = []
    for candidate in BACKENDS.values():
        if candidate.device_type == device.type:
            reason = obstacle(candidate)
            if not reason:
                return candidate.name, candidate.gain
            reasons.append(reason)
    return "torch", "; ".join(reasons) or f"no other backend serves tensors on {device}"
