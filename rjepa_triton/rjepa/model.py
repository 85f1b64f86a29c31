"""R-JEPA (paper, Section 2.1): an encoder, a predictor of its next embedding, and the losses.

h(t) = F(C(x(t), c(t-1)))            the encoder
â(t) = A(c(t))                       the action predictor, if there is one
ĥ(t+1) = G(h(t), a(t))               the representation predictor
L_R(t) = d_R(stop[h(t)], ĥ(t))       for t ≥ 2, since nothing predicts the first embedding
L_A(t) = d_A(a(t), â(t))
E = Σ_t ψ(t, λ₁ L_R(t) + λ₂ L_A(t))  Appendices A and E

The target of L_R is h(t) in the paper, through which no gradient goes. It may also be the context-free embedding, what
the encoder says of the patch alone, from a zero state; or that of a teacher, whose weights are a running average of the
encoder's. For comparison, the gradient may go through h(t), and a regularizer (`regularizers`) be added to E.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from . import regularizers
from .encoder import Encoder, Encoding, State

Distance = Literal["square", "cosine"]
DISTANCES = ("square", "cosine")
Actions = Literal["none", "given", "predicted"]
ACTIONS = ("none", "given", "predicted")
Target = Literal["h", "context_free", "ema"]
TARGETS = ("h", "context_free", "ema")
PREDICTORS = ("mlp", "linear")
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


class LinearPredictor(nn.Module):
    """G(h, a) = W_Gh h + W_Ga a (paper, Appendix A), as Theorem 1 has it. W_Gh = I and W_Ga = 0 before training.

    Args:
        size: E, of h (…, E). actions: A, of a (…, A); 0 if the prediction depends on h alone.
    """

    def __init__(self, size: int, actions: int = 0) -> None:
        super().__init__()
        self.of_h = nn.Linear(size, size, bias=False)
        self.of_a = nn.Linear(actions, size, bias=False) if actions else None
        nn.init.eye_(self.of_h.weight)
        if self.of_a is not None:
            nn.init.zeros_(self.of_a.weight)

    def forward(self, h: Tensor, a: Tensor | None = None) -> Tensor:
        predicted = self.of_h(h)
        return predicted if a is None or self.of_a is None else predicted + self.of_a(a)


def distance(kind: Distance, prediction: Tensor, target: Tensor) -> Tensor:
    """d_R over the last dimension: "square" is the mean square, "cosine" is 1 - cosine."""
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
    target          (T, B, E) what is to be predicted, without gradient
    yardstick       (T - 1, B) the error of the yardstick's predictor for t = 2 … T, or None if no yardstick was given
    weights         λ₁ and λ₂
    regularizer     what the model's regularizer adds to E, or None
    """

    representation: Tensor
    action: Tensor | None
    encoding: Encoding
    target: Tensor
    yardstick: Tensor | None = None
    weights: tuple[float, float] = (1.0, 1.0)
    regularizer: Tensor | None = None

    def total(self, psi: Psi) -> Tensor:
        """E, a scalar. The yardstick's error adds to it, which trains the yardstick's predictor and nothing else."""
        total = self.weights[0] * psi(self.representation)
        if self.action is not None:
            total = total + self.weights[1] * psi(self.action)
        if self.regularizer is not None:
            total = total + self.regularizer
        return total if self.yardstick is None else total + psi(self.yardstick)


class RJEPA(nn.Module):
    """The whole model: encoder, representation predictor and, if asked for, action predictor.

    Beside the predictor G a second one like it, with G's first weights, learns to predict the yardstick from stop[h]:
    the next patch's context-free embedding by the encoder's first weights. That target is the same for a model, for its
    control, and throughout training; no gradient reaches the encoder from it.

    Args:
        encoder: the recurrent encoder.
        kind: the distance d_R, "square" or "cosine".
        hidden: hidden units of the representation predictor; None: 2·E.
        actions: "none"; "given": G sees a(t), the saccade from fixation t to t+1; "predicted": A predicts a(t) from the
            top area's c(t), with loss L_A, and G sees the prediction.
        target: what G predicts. "h": h(t+1), as in the paper; "context_free": the encoder's embedding of the next patch
            alone, from a zero state; "ema": h(t+1) of a teacher.
        momentum: μ of the teacher, in [0, 1): after each update its weights are μ times their own and 1 - μ times the
            encoder's (`follow_`).
        predictor: of G, "mlp" or "linear".
        weights: λ₁ of L_R and λ₂ of L_A.
        stop_gradient: whether the target h(t+1) gets no gradient, as in the paper.
        regularizer: "none", or what is added to E in training, over all h of a batch (`regularizers`).
        strength: the weight of that.

    Raises ValueError for an argument out of its range, for target="ema" with an encoder of which more learns than the
    top circuit and F, and for stop_gradient=False with a target that has no gradient.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: Distance = "cosine",
        hidden: int | None = None,
        actions: Actions = "none",
        target: Target = "h",
        momentum: float = 0.99,
        predictor: str = "mlp",
        weights: tuple[float, float] = (1.0, 1.0),
        stop_gradient: bool = True,
        regularizer: str = "none",
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        check.one_of("kind", kind, DISTANCES)
        check.one_of("actions", actions, ACTIONS)
        check.one_of("target", target, TARGETS)
        check.one_of("predictor", predictor, PREDICTORS)
        check.one_of("regularizer", regularizer, regularizers.KINDS)
        if not stop_gradient and target != "h":
            raise ValueError(
                f"stop_gradient=False goes with target='h', got {target!r}, which has no gradient"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.encoder, self.kind, self.actions, self.target = encoder, kind, actions, target
        self.momentum, self.loss_weights = momentum, weights
        self.stop_gradient, self.regularizer, self.strength = stop_gradient, regularizer, strength
        if (
            regularizer == "sigreg"
        ):  # how often directions were drawn: in checkpoints, so that runs go on alike
            self.drawn: Tensor
            self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        seen = 0 if actions == "none" else ACTION_SIZE
        size = encoder.embedding_size
        self.predictor: nn.Module = (
            Predictor(size, hidden, seen) if predictor == "mlp" else LinearPredictor(size, seen)
        )
        self.action_predictor: nn.Linear | None = None
        if actions == "predicted":
            self.action_predictor = nn.Linear(2 * encoder.circuit.hidden_size, ACTION_SIZE)
        self.yardstick: nn.Module = copy.deepcopy(self.predictor)
        self.teacher: nn.ModuleDict | None = None
        if target == "ema":
            parts = {"circuit": encoder.circuit, "embedding": encoder.embedding}
            own = {id(p) for part in parts.values() for p in part.parameters()}
            if any(id(p) not in own for p in encoder.trained_parameters()):
                raise ValueError(
                    "target='ema' goes with an encoder of which the top circuit and F alone learn (preset='initial', a "
                    "frozen head and backbone); the nearest is target='context_free'"
                )
            self.teacher = nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)

    def forward(
        self,
        patches: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        yardstick: Tensor | None = None,
    ) -> Losses:
        """The losses of patches (T, B, 3, P, P).

        actions: (T, B, 2), the saccade after each fixation, unless the model has actions="none". The last saccade isn't
        used: the fixation that it leads to isn't in the sequence. state: to start from; None: zero. yardstick: (T, B,
        E), the context-free embeddings of the same patches by the encoder's first weights.
        """
        return self.losses(self.encoder(patches, state), actions, yardstick)

    def from_inputs(
        self,
        x: Tensor,
        actions: Tensor | None = None,
        state: State | None = None,
        yardstick: Tensor | None = None,
    ) -> Losses:
        """The losses of x^High (T, B, N), computed beforehand; other arguments as for `forward`."""
        return self.losses(self.encoder.encode(x, state), actions, yardstick)

    def losses(
        self, encoding: Encoding, actions: Tensor | None = None, yardstick: Tensor | None = None
    ) -> Losses:
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
        target, _ = self.targets(encoding)
        if not self.stop_gradient:
            target = h
        own, error = self.errors(
            h[:-1],
            target[1:],
            None if seen is None else seen[:-1],
            None if yardstick is None else yardstick[1:],
        )
        return Losses(
            own, action_loss, encoding, target.detach(), error, self.loss_weights, self._regularized(h)
        )

    def _regularized(self, h: Tensor) -> Tensor | None:
        """What the regularizer adds in training; None if there is none, and in evaluations."""
        if self.regularizer == "none" or not (self.training and torch.is_grad_enabled()):
            return None
        count = 0
        if self.regularizer == "sigreg":
            count = int(self.drawn)
            self.drawn += 1
        return self.strength * regularizers.TERMS[self.regularizer](h, count)

    def errors(
        self, h: Tensor, target: Tensor, actions: Tensor | None = None, yardstick: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(…,) L_R of predictions from h (…, E) of `target`, and the yardstick's error, or None without a yardstick."""
        own = distance(self.kind, self.predictor(h, actions), target)
        if yardstick is None:
            return own, None
        if self.yardstick is self.predictor:  # and the target is the yardstick
            return own, own.detach()
        seen = None if actions is None else actions.detach()
        return own, distance(self.kind, self.yardstick(h.detach(), seen), yardstick)

    @torch.no_grad()
    def targets(self, encoding: Encoding, state: State | None = None) -> tuple[Tensor, State | None]:
        """What is to be predicted at each step of an encoding, (T, B, E), and the teacher's state after it.

        state: the teacher's before it; None: zero.
        """
        if self.teacher is not None:
            circuit = self.teacher["circuit"]
            top = None if state is None else state.top
            s, last = circuit(encoding.x, top)
            return self.teacher["embedding"](s), State((), last)
        if self.target == "context_free":
            return self.encoder.context_free(encoding.x), None
        return encoding.h.detach(), None

    @torch.no_grad()
    def follow_(self) -> None:
        """Move the teacher, if there is one, towards the encoder, in place. Call it after each update."""
        if self.teacher is None:
            return
        now = {"circuit": self.encoder.circuit, "embedding": self.encoder.embedding}
        for name, part in now.items():
            for its, own in zip(self.teacher[name].parameters(), part.parameters(), strict=True):
                its.lerp_(own, 1 - self.momentum)


def control_of(model: RJEPA) -> RJEPA:
    """A model like this one whose recurrence can't learn: what recurrence must beat.

    It has the same first weights, predictors, F, actions and target, and learns as the model does, but for its
    circuits and feedback, which keep the weights that they have now. A frozen backbone is shared.
    """
    shared = model.encoder.backbone
    frozen = not any(p.requires_grad for p in shared.parameters())
    made = copy.deepcopy(model, {id(shared): shared} if frozen else {})
    for parameter in made.encoder.recurrent_parameters():
        parameter.requires_grad_(False)
    encoder = made.encoder
    zero = not any(p.any() for p in encoder.circuit.parameters())
    if zero and not encoder.delay and not encoder.trained_parameters():
        # h(t) = x^High(t) for good: every target is the yardstick, and one predictor of it is enough
        made.yardstick = made.predictor
    return made
