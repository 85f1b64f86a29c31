"""Stochastic rounding to bfloat16: right in the mean, where rounding to nearest loses what is small beside Γ."""

from __future__ import annotations

import torch
from torch import Tensor

# Of SplitMix64 (Steele et al. 2014), as signed numbers: int64 products wrap as unsigned ones do.
_GOLDEN, _MIX1, _MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def round_stochastically(value: Tensor, rng_state: Tensor, first: int, total: int) -> Tensor:
    """`value` in bfloat16: either neighbour, the one away from zero as often as the value is near it, in 1/65,536ths.

    rng_state (2,) int64: a seed and a step. The bits of a number are of these and of its place, first + its index in
    `value`, of `total` places in a step: by a counter, so that a CUDA graph that is replayed draws anew where it has
    advanced the step. bfloat16 numbers stay as they are, NaN and infinity too. Values of more than 32 bits are rounded
    to float32 first, to nearest.
    """
    value = value.float()
    seed, step = rng_state.unbind(0)
    place = torch.arange(first, first + value.numel(), device=value.device).view(value.shape)
    z = (place + step * total) * _GOLDEN + seed
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    random = _shifted(z, 48).to(torch.int32)
    # What carries out of the low half makes the high half the next bfloat16; a NaN must not carry into the sign.
    bits = value.view(torch.int32)
    bits = torch.where(value.isnan(), bits, bits + random)
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()


def _shifted(z: Tensor, bits: int) -> Tensor:
    """int64 shifted right, zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
