"""Batch rows that don't take part in a step, or in some of a chunk, as environments that step apart need it.

In a row that is held, the step is the identity: the state stays, M is the identity matrix, and nothing enters,

    c(t) = c(t-1),    M(t) = 1,    φ(t) = 0    ⇒    Γ(t) = Γ(t-1), γ(t) = γ(t-1),    λ(t-1) = δ(t-1) + λ(t)

So every form and rule goes on by its own formula, and what they carry of such a row stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cells.two_point import ByState, Partials
from .tape import Block


def held(
    after: Tensor, block: Block, state: Tensor, active: Tensor, resets: Tensor | None
) -> tuple[Tensor, Block]:
    """One step as `tape.recorded` gives it, with the rows held where active (B,) is False. Nothing is mutated.

    after (S, 1, B, N); state (S, B, N): the states before. resets (1, B) bool or None: a row that is reset and held is
    zero after the step, and has no past.
    """
    idle = ~active[:, None]  # (B, 1), which broadcasts against (…, B, N)
    kept, before = idle, state
    if resets is not None:
        starts = resets[0, :, None]
        kept, before = idle & ~starts, state.masked_fill(starts, 0)
    after = torch.where(idle, before[:, None], after)
    one = torch.eye(len(state), dtype=state.dtype, device=state.device)[:, :, None, None, None]
    lin, weights = block.lin, block.weights
    if weights is not None:
        block = with_own(block)
        if block.lin is not lin:
            # an array more than other steps have: a tuple of its own is a run of its own (`Tape`)
            weights = (*weights,)
        lin = block.lin
    own = [
        {nu: torch.where(idle, one[nu, source], value) for nu, value in by_state.items()}
        for source, by_state in enumerate(lin.partials.own)
    ]
    partials = Partials(own, _without(lin.partials.gate, idle), _without(lin.partials.input, idle))
    # what the matrices read counts as zero there, so that nothing enters even where the state is NaN
    lin = replace(lin, partials=partials, before=lin.before.masked_fill(idle, 0))
    inputs = None if block.inputs is None else block.inputs.masked_fill(idle, 0)
    return after, Block(lin, torch.where(kept, one, block.m), inputs, weights)


def _without(group: Sequence[ByState], idle: Tensor) -> list[ByState]:
    return [{nu: value.masked_fill(idle, 0) for nu, value in by_state.items()} for by_state in group]


def with_own(block: Block) -> Block:
    """The block with ∂F_ν/∂c^ν of every state, zeros where the cell has none; itself where none is missing.

    A step that holds rows needs a one there, for rules that need the full Jacobian.
    """
    partials = block.lin.partials
    if all(source in by_state for source, by_state in enumerate(partials.own)):
        return block
    zero = torch.zeros_like(block.lin.before[0])
    own = [
        by_state if source in by_state else {**by_state, source: zero}
        for source, by_state in enumerate(partials.own)
    ]
    return replace(block, lin=replace(block.lin, partials=replace(partials, own=own)))
