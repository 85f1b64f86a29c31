"""R-JEPA (paper, Section 2.1): an encoder, a predictor of its next embedding, the losses between them.

h(t) = F(C(x(t), c(t-1)))            the encoder
â(t) = A(c(t))                       action predictor, where asked for
ĥ(t+1) = G(h(t), a(t))               representation predictor
L_R(t) = d_R(stop[h(t)], ĥ(t))       of t ≥ 2: nothing predicts the first
L_A(t) = d_A(a(t), â(t))
E = Σ_t ψ(t, L(t))                   Appendix E
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from .encoder import Encoder, Encoding, State

Distance = Literal["square", "cosine"]
DISTANCES = ("square", "cosine")
Actions = Literal["none", "given", "predicted"]
ACTIONS = ("none", "given", "predicted")
ACTION_SIZE = 2  # a saccade: degrees to the right and down


class Predictor(nn.Module):
    """G(h, a) = h + V₂ relu(V₁ [h, a] + b₁) + b₂, with V₂ and b₂ zero at first, so that ĥ(t+1) = h(t).

    h (…, E) and, with `actions` = A > 0, a (…, A). Hidden units default to 2·E.
    """

    def __init__(self, size: int, hidden: int | None = None, actions: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(size + actions, 2 * size if hidden is None else hidden)
        self.second = nn.Linear(self.first.out_features, size)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, a: Tensor | None = None) -> Tensor:
        joined = h if a is None else torch.cat([h, a], dim=-1)
        return h + self.second(F.relu(self.first(joined)))


def distance(kind: Distance, prediction: Tensor, target: Tensor) -> Tensor:
    """d_R over the last dimension, with no gradient to the target: mean square, or 1 - cosine."""
    target = target.detach()
    if kind == "square":
        return (prediction - target).square().mean(-1)
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


Psi = Callable[[Tensor], Tensor]


def mean_over_time(losses: Tensor) -> Tensor:
    """ψ(t, L) = L/T: of losses (T, …), their mean."""
    return losses.mean()


def last_only(losses: Tensor) -> Tensor:
    """ψ(t, L) = L at the last step, else 0."""
    return losses[-1].mean()


def weighted_by_time(losses: Tensor) -> Tensor:
    """ψ(t, L) ∝ t·L, of weights that sum to 1: late predictions, which have more to go by, count more."""
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (losses.flatten(1).mean(1) * weights).sum() / weights.sum()


PSI: dict[str, Psi] = {"mean": mean_over_time, "last": last_only, "time": weighted_by_time}


@dataclass  # not frozen: Lightning Fabric rebuilds what a model gives
class Losses:
    """representation (T - 1, B): L_R(t) of t = 2 … T; action (T - 1, B) or None: L_A; the encoding they are of."""

    representation: Tensor
    action: Tensor | None
    encoding: Encoding

    def total(self, psi: Psi) -> Tensor:
        """E, a scalar."""
        total = psi(self.representation)
        return total if self.action is None else total + psi(self.action)


class RJEPA(nn.Module):
    """The whole model.

    Args:
        encoder: the recurrent encoder.
        kind: of d_R, "square" or "cosine".
        hidden: units of the predictor's hidden layer, 2·E if None.
        actions: "none"; "given": G sees the saccade a(t) from t to t+1; "predicted": A predicts it from c(t) of the top
            area with L_A, and G sees its prediction.

    Raises ValueError for an argument out of its range, naming it.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: Distance = "cosine",
        hidden: int | None = None,
        actions: Actions = "none",
    ) -> None:
        super().__init__()
        check.one_of("kind", kind, DISTANCES)
        check.one_of("actions", actions, ACTIONS)
        self.encoder, self.kind, self.actions = encoder, kind, actions
        self.predictor = Predictor(encoder.embedding_size, hidden, 0 if actions == "none" else ACTION_SIZE)
        self.action_predictor: nn.Linear | None = None
        if actions == "predicted":
            self.action_predictor = nn.Linear(2 * encoder.circuit.hidden_size, ACTION_SIZE)

    def forward(self, patches: Tensor, actions: Tensor | None = None, state: State | None = None) -> Losses:
        """Losses of patches (T, B, 3, P, P); actions (T, B, 2), the saccade after each fixation, where used.

        The last one's isn't looked at: what it leads to isn't in the sequence.
        """
        return self.losses(self.encoder(patches, state), actions)

    def from_inputs(self, x: Tensor, actions: Tensor | None = None, state: State | None = None) -> Losses:
        """The same from x^High (T, B, N), made beforehand."""
        return self.losses(self.encoder.encode(x, state), actions)

    def losses(self, encoding: Encoding, actions: Tensor | None = None) -> Losses:
        """Of an encoding. Raises ValueError where actions are missing or not asked for, or of a wrong shape."""
        h = encoding.h
        if (actions is None) != (self.actions == "none"):
            wanted = "not be given" if self.actions == "none" else "be given"
            raise ValueError(f"actions must {wanted} to a model with actions={self.actions!r}")
        seen, action_loss = None, None
        if actions is not None:
            check.shape("actions", actions, (*h.shape[:2], ACTION_SIZE))
            seen = actions
        if self.action_predictor is not None:
            assert actions is not None
            seen = self.action_predictor(torch.cat([encoding.s, encoding.m], dim=-1))
            action_loss = (seen - actions)[:-1].square().mean(-1)
        predicted = self.predictor(h[:-1], None if seen is None else seen[:-1])
        return Losses(distance(self.kind, predicted, h[1:]), action_loss, encoding)
