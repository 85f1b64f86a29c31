"""Argument checks: every message names the argument, what was wanted, and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(name: str, value: object) -> Tensor:
    """Return `value`, or raise TypeError if it is not a tensor, or a sparse, mkldnn or nested one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got {kind}")
    return value


def shape(name: str, value: Tensor, want: Sequence[int | str], why: str = "") -> None:
    """Raise ValueError unless `value` has the shape `want`; a str stands for any size (≥ 1)."""
    got = tuple(value.shape)
    if got == want:  # numbers alone, as it mostly is: the rest takes longer
        return
    fits = len(got) == len(want) and all(
        g >= 1 if isinstance(w, str) else g == w for g, w in zip(got, want, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(map(str, want)) + ("," if len(want) == 1 else "") + ")"
        note = f" {why}" if why else ""
        raise ValueError(f"{name} must have shape {wanted}{note}, got {got}")


def floating(name: str, value: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless the dtype of `value` is one of `dtypes`."""
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {wanted}, got {value.dtype}")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless `value` has the dtype (TypeError) and the device (ValueError) of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def boolean(name: str, value: object) -> bool:
    """Return `value`, or raise TypeError if it is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def integer(name: str, value: object, least: int) -> int:
    """Return `value`, or raise TypeError if it is not an int and ValueError if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def number(name: str, value: object) -> None:
    """Raise TypeError if `value` is not a real number, of Python or numpy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def finite(name: str, value: Tensor) -> None:
    """Raise ValueError if `value` has a NaN or an infinity.

    One reduction: a sum is finite iff no entry is NaN or infinite and it does not overflow, so only a
    sum that isn't finite is looked at again, entry by entry. It waits for the device. Values that aren't known pass.
    """
    if not values_known(value):
        return
    value = value.detach()
    if not math.isfinite(value.sum().item()):  # the number's own test: torch's is four calls
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {value.numel()} entries")


def values_known(value: Tensor) -> bool:
    """Whether a tensor has values that Python may read: not on the meta device, nor fake, nor while code is traced."""
    return not (value.is_meta or isinstance(value, FakeTensor) or torch.compiler.is_compiling())


def mask(name: str, value: object, want: Sequence[int | str], device: torch.device) -> Tensor:
    """Return `value` if it is a bool tensor of the shape `want` on `device`, else raise."""
    value = tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {value.dtype}")
    shape(name, value, want)
    if value.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {value.device}")
    return value
