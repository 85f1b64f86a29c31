"""R-JEPA (paper, Section 2.1): an encoder, a predictor of its next embedding, and the losses.

h(t) = F(C(x(t), c(t-1)))            the encoder
â(t) = A(c(t))                       the action predictor, if there is one
ĥ(t+1) = G(h(t), a(t))               the representation predictor
L_R(t) = d_R(stop[h(t)], ĥ(t))       for t ≥ 2, since nothing predicts the first embedding
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
    """G(h, a) = h + V₂ relu(V₁ [h, a] + b₁) + b₂. V₂ and b₂ start at zero, so that ĥ(t+1) = h(t) before training.

    Args:
        size: E, of h (…, E). hidden: hidden units; None: 2·E.
        actions: A, of a (…, A); 0 if the prediction depends on h alone.
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
    """d_R over the last dimension: "square" is the mean square, "cosine" is 1 - cosine. The target gets no gradient."""
    target = target.detach()
    if kind == "square":
        return (prediction - target).square().mean(-1)
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


Psi = Callable[[Tensor], Tensor]


def mean_over_time(losses: Tensor) -> Tensor:
    """ψ(t, L) = L/T: the mean of losses (T, …)."""
    return losses.mean()


def last_only(losses: Tensor) -> Tensor:
    """ψ(t, L) = L in the last step, and 0 before."""
    return losses[-1].mean()


def weighted_by_time(losses: Tensor) -> Tensor:
    """ψ(t, L) ∝ t·L, with weights that sum to 1: late predictions, which have seen more, count more."""
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (losses.flatten(1).mean(1) * weights).sum() / weights.sum()


PSI: dict[str, Psi] = {"mean": mean_over_time, "last": last_only, "time": weighted_by_time}


@dataclass  # not frozen: Lightning Fabric rebuilds what a model returns
class Losses:
    """The losses of a batch of sequences.

    representation  (T - 1, B) L_R(t) for t = 2 … T
    action          (T - 1, B) L_A(t) for t = 1 … T - 1, or None if actions aren't predicted
    encoding        what the encoder returned
    """

    representation: Tensor
    action: Tensor | None
    encoding: Encoding

    def total(self, psi: Psi) -> Tensor:
        """E, a scalar."""
        total = psi(self.representation)
        return total if self.action is None else total + psi(self.action)


class RJEPA(nn.Module):
    """The whole model: encoder, representation predictor and, if asked for, action predictor.

    Args:
        encoder: the recurrent encoder.
        kind: the distance d_R, "square" or "cosine".
        hidden: hidden units of the representation predictor; None: 2·E.
        actions: "none"; "given": G sees a(t), the saccade from fixation t to t+1; "predicted": A predicts a(t) from the
            top area's c(t), with loss L_A, and G sees the prediction.

    Raises ValueError for an unknown `kind` or `actions`.
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
        """The losses of patches (T, B, 3, P, P).

        actions: (T, B, 2), the saccade after each fixation, unless the model has actions="none". The last saccade isn't
        used: the fixation that it leads to isn't in the sequence. state: to start from; None: zero.
        """
        return self.losses(self.encoder(patches, state), actions)

    def from_inputs(self, x: Tensor, actions: Tensor | None = None, state: State | None = None) -> Losses:
        """The losses of x^High (T, B, N), computed beforehand; other arguments as for `forward`."""
        return self.losses(self.encoder.encode(x, state), actions)

    def losses(self, encoding: Encoding, actions: Tensor | None = None) -> Losses:
        """The losses of an encoding. Raises ValueError if actions are missing, of a wrong shape, or not asked for."""
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
