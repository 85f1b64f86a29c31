"""Stochastic rounding to bfloat16: right in the mean, where rounding to nearest loses small contributions to Γ."""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele et al. 2014) as signed numbers: int64 products wrap around as unsigned ones do.
_GOLDEN, _MIX1, _MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def round_stochastically(value: Tensor, rng_state: Tensor, first: int, total: int) -> Tensor:
    """Round `value` to one of its two bfloat16 neighbours at random, so that the mean is right to 1/65,536 of the gap.

    bfloat16 numbers stay as they are, NaN and infinity too. Values of more than 32 bits are first rounded to float32,
    to nearest. Nothing is mutated.

    Args:
        value: any floating tensor.
        rng_state: a seed and a step, (2,) int64. The random bits of a number depend on these and on its place alone
            (a counter-based generator), so a replayed CUDA graph draws anew if it advances the step.
        first: the place of value's first number.
        total: how many places one step has.
    """
    value = value.float()
    seed, step = rng_state.unbind(0)
    place = torch.arange(first, first + value.numel(), device=value.device).view(value.shape)
    z = (place + step * total) * _GOLDEN + seed
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    random = _shifted(z, 48).to(torch.int32)
    # A carry out of the low half makes the high half the next bfloat16 away from zero; a NaN must not carry at all.
    bits = value.view(torch.int32)
    bits = torch.where(value.isnan(), bits, bits + random)
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: zeros come in from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
