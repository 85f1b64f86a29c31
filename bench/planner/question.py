"""What is to be planned: a layer, its sizes, and on which device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ... import _checks as check
from ...layers import named as nn
from ...layers.layer import TwoPointRNN

DTYPES = {"float32": torch.float32, "float64": torch.float64}
GAMMA_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MOST = 10**9  # of each size: the bytes of larger matrices have no number of 64 bits
# What makes a layer, by name, from (I, N, options of TwoPointRNN). Only an RGC can do without input weights (I = None).
CELLS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda size, units, **options: nn.RGC(units, input_size=size, **options),
    "rnn": lambda size, units, **options: nn.RNN(size or units, units, **options),
    "ctrnn": lambda size, units, **options: nn.CTRNN(size or units, units, **options),
    "lstm": lambda size, units, **options: nn.LSTM(size or units, units, **options),
    "gru": lambda size, units, **options: nn.GRU(size or units, units, **options),
    "indrnn": lambda size, units, **options: nn.IndRNN(size or units, units, **options),
    "elstm": lambda size, units, **options: nn.ELSTM(size or units, units, **options),
    "lru": lambda size, units, **options: nn.LRU(size or units, units, **options),
}


@dataclass(frozen=True)
class Question:
    """What is to be trained: a layer, its sizes, and on what terms.

    hidden, batch, steps   N, B and T; steps None: a stream without end
    chunk                  C, steps for which the weights may stay as they are
    cell                   a name of `CELLS`
    input_size             I; None: N, and for an RGC x itself without input weights
    gamma_dtype            dtype in which Γ is kept; None: `dtype`
    cuda_graph             whether the form "step" runs as a CUDA graph
    exact                  whether only ways with an exact gradient will do
    heads                  blocks of the recurrent weights; None: dense
    population             P, independent networks of one `Stream`
    block                  b, units of a block within which RTRL is predicted too; None: not

    Raises ValueError or TypeError naming the argument.
    """

    hidden: int
    batch: int = 1
    steps: int | None = None
    chunk: int = 16
    cell: str = "rgc"
    input_size: int | None = None
    dtype: str = "float32"
    gamma_dtype: str | None = None
    cuda_graph: bool = False
    exact: bool = False
    heads: int | None = None
    population: int = 1
    block: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "chunk", "steps", "input_size", "heads", "population", "block"):
            value = getattr(self, name)
            if value is not None or name in ("hidden", "batch", "chunk", "population"):
                check.integer(name, value, 1)
                if value > MOST:
                    raise ValueError(f"{name} must be at most {MOST:,}, got {value:,}")
        check.one_of("cell", self.cell, CELLS)
        check.one_of("dtype", self.dtype, DTYPES)
        if self.gamma_dtype is not None:
            check.one_of("gamma_dtype", self.gamma_dtype, GAMMA_DTYPES)
        if self.heads is not None and self.hidden % self.heads:
            raise ValueError(f"heads must divide hidden = {self.hidden}, got {self.heads}")
        if self.block is not None and (head := self.hidden // (self.heads or 1)) % self.block:
            raise ValueError(f"block must divide the {head} units of a head, got {self.block}")

    @property
    def kept_in(self) -> torch.dtype:
        """The dtype in which Γ is kept."""
        return GAMMA_DTYPES[self.gamma_dtype or self.dtype]

    def layer(self, heads: int | None = None) -> TwoPointRNN:
        """The layer, on the meta device: its parameters have shapes and no memory. heads: in place of its own.

        Raises ValueError for heads of a cell without recurrent matrices.
        """
        blocks = self.heads if heads is None else heads
        return _layer(self.cell, self.input_size, self.hidden, self.dtype, blocks)


@functools.lru_cache(64)  # made once for all batches that are tried
def _layer(cell: str, input_size: int | None, units: int, dtype: str, heads: int | None) -> TwoPointRNN:
    options: dict[str, Any] = {} if heads is None else {"heads": heads}
    return CELLS[cell](input_size, units, device="meta", dtype=DTYPES[dtype], **options)
