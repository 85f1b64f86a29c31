"""The recurrent encoder (paper, Section 2.2): stages of a ResNet, a circuit at each area, one at the top.

    c_l(t) = C_l(c_l(t-1), x_l(t)),   x_l(t) = F_l(c_{l-1}(t) + φ_l(⊕_{k>l} S(c_k(t-1))))    low areas, l = 1 … 5   (1)
    c^High(t) = C_H(c^High(t-1), x^High(t)),   x^High(t) = MLP(AvgPool(c_5(t)))              the top area           (2)
    h(t) = F(c^High(t))                                                                      the embedding

Two presets. "initial", as in the paper's experiments: a frozen backbone, recurrence at the top alone. "full":
recurrence and feedback at every area. What passes on of a circuit's state is s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..layers.conv import ConvRGC
from ..layers.functional import rgc
from ..layers.named import RGC
from .backbone import Backbone, GaborBank

Preset = Literal["initial", "full"]
PRESETS = ("initial", "full")
Learning = Literal["rfp", "bptt", "rtrl"]
LEARNING = ("rfp", "bptt", "rtrl")
Pair = tuple[Tensor, Tensor]


class Head(nn.Module):
    """x^High = norm(V₂ relu(V₁ (f - μ)/σ + b₁) + b₂) of features f (…, D): (…, N), paper, eq. 2.

    μ and σ are the features' own, 0 and 1 until `calibrate_`. The norm is a BatchNorm without gain and offset. Frozen
    (`trainable` False, the default) it takes its statistics once, by `calibrate_`, and keeps them; learned, from each
    batch while training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, units: int, hidden: int = 512, trainable: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, units)
        self.norm = nn.BatchNorm1d(units, affine=False)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.trainable = trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    def train(self, mode: bool = True) -> Head:
        """As nn.Module's; frozen, the norm stays in evaluation."""
        return super().train(mode and self.trainable)

    def forward(self, features: Tensor) -> Tensor:
        x = self._mixed(features)
        return self.norm(x.flatten(0, -2)).view(x.shape)

    def _mixed(self, features: Tensor) -> Tensor:
        return self.second(F.relu(self.first((features - self.mean) / self.std)))

    @torch.no_grad()
    def calibrate_(self, features: Tensor) -> None:
        """Take μ, σ and the norm's statistics from features (…, D), in place of what they were."""
        rows = features.flatten(0, -2)
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0) + 1e-3 * rows.std())
        x = self._mixed(rows)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(x.mean(0))
        self.norm.running_var.copy_(x.var(0))


@dataclass
class State:
    """What goes on from one step to the next: (s, m) of each low area, (B, C, H, W) each, and of the top, (B, N)."""

    areas: tuple[Pair, ...]
    top: Pair

    def detached(self) -> State:
        """The same, without a way back: where a sequence is cut into chunks."""
        return State(
            tuple((s.detach(), m.detach()) for s, m in self.areas),
            (self.top[0].detach(), self.top[1].detach()),
        )


@dataclass
class Encoding:
    """h (T, B, E), the embeddings; x, s, m (T, B, N), what the top circuit was given and its states; the last state."""

    h: Tensor
    x: Tensor
    s: Tensor
    m: Tensor
    state: State


class Encoder(nn.Module):
    """Patches in, embeddings out; see the module for the equations.

    Args:
        backbone: its stages F_l, and what patches are standardised by. "full" needs stages, which a GaborBank has not.
        preset: "initial" or "full".
        units: N of the top circuit. hidden: of the MLP before it.
        learning: of the circuits. "rfp" | "bptt" | "rtrl"; the low areas of "full" take "rfp" or "bptt".
        embedding: E of a linear F; None: F is the identity, h = s, E = N.
        kernel_size, depthwise: of the low circuits' gates.
        feedback: whether later areas feed back. Without it each area of "full" goes through the whole sequence at once,
            by RFP in its dual form.
        delay: c_{l-1}(t-1) in place of c_{l-1}(t) for l > 1, which is eq. 1 to the letter: a patch then reaches the
            top after four steps.
        train_head: whether the MLP learns. It may let the representation's rank fall (docs/rjepa.md).

    With "rfp", credit goes back in time within a unit alone, and from area to area at the step at hand: feedback, which
    is of the step before, is given no credit through the areas that it comes from. With "bptt" all of it is exact.
    Feedback φ_l is a 1×1 convolution of the later areas' s, bilinearly resized and joined, zero at first and where no
    area is above.

    Raises ValueError or TypeError for an argument out of its range or a combination that can't be, naming it.
    """

    def __init__(
        self,
        backbone: Backbone | GaborBank,
        *,
        preset: Preset = "initial",
        units: int = 120,
        hidden: int = 512,
        learning: Learning = "rfp",
        embedding: int | None = None,
        kernel_size: int = 3,
        depthwise: bool = False,
        feedback: bool = True,
        delay: bool = False,
        train_head: bool = False,
    ) -> None:
        super().__init__()
        check.one_of("preset", preset, PRESETS)
        check.one_of("learning", learning, LEARNING)
        if preset == "full" and not isinstance(backbone, Backbone):
            raise ValueError(
                "preset='full' needs a backbone of several stages, got a GaborBank; the nearest is preset='initial'"
            )
        if preset == "full" and learning == "rtrl":
            raise ValueError(
                "preset='full' takes learning='rfp' or 'bptt', got 'rtrl', whose sensitivities of maps would not fit; "
                "preset='initial' takes it for small N"
            )
        if delay and preset != "full":
            raise ValueError("delay is for preset='full', whose low areas recur, got preset='initial'")
        self.preset, self.delay, self.backbone = preset, delay, backbone
        self.areas, self.feedback = nn.ModuleList(), nn.ModuleList()  # none for "initial"
        if isinstance(backbone, Backbone) and preset == "full":
            for level, width in enumerate(backbone.widths):
                rule: Literal["rfp", "bptt"] = "bptt" if learning == "bptt" else "rfp"
                self.areas.append(ConvRGC(width, kernel_size=kernel_size, depthwise=depthwise, learning=rule))
                above = sum(backbone.widths[level + 1 :])
                if above and feedback:
                    below = backbone.widths[level - 1] if level else 3
                    joined = nn.Conv2d(above, below, 1, bias=False)
                    nn.init.zeros_(joined.weight)
                    self.feedback.append(joined)
        self.head = Head(backbone.features, units, hidden, train_head)
        self.circuit = RGC(units, learning=learning, init="zeros")
        self.learning = learning
        self.embedding: nn.Module = nn.Identity() if embedding is None else nn.Linear(units, embedding)
        self.embedding_size = units if embedding is None else embedding

    def features(self, patches: Tensor, at_once: int = 512) -> Tensor:
        """(T, B, D): what a frozen backbone makes of patches (T, B, 3, P, P), `at_once` of them at a time.

        For preset "initial", where they are the same in every epoch. Raises ValueError for "full".
        """
        if self.preset == "full":
            raise ValueError(
                "features can be made beforehand for preset='initial' alone: in 'full' every area recurs"
            )
        flat = patches.flatten(0, 1)
        return torch.cat([self.backbone(part) for part in flat.split(at_once)]).unflatten(
            0, patches.shape[:2]
        )

    def without_recurrence(self, patches: Tensor) -> Tensor:
        """x^High (T, B, N) as a feedforward network gives it: that of the whole encoder while its circuits are zero."""
        return self.head(self.backbone(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]))

    def forward(self, patches: Tensor, state: State | None = None) -> Encoding:
        """Encode patches (T, B, 3, P, P), uint8 or in [0, 1], from a state; from zero if None. Nothing is mutated."""
        if self.preset == "initial":
            return self.encode(self.head(self.features(patches)), state)
        low = self._low if self.feedback else self._low_at_once
        pooled, areas = low(patches, () if state is None else state.areas)
        made = self.encode(self.head(pooled), state)
        return replace(made, state=State(areas, made.state.top))

    def encode(self, x: Tensor, state: State | None = None) -> Encoding:
        """The top area alone, given x^High (T, B, N)."""
        given = (x.new_zeros(x.shape[1:]),) * 2 if state is None else state.top
        ss, ms, mm, sm = self.circuit.weights()
        s, m = rgc(x, ss, ms, mm, sm, given, learning=self.learning)
        return Encoding(self.embedding(s), x, s, m, State((), (s[-1], m[-1])))

    def _low(self, patches: Tensor, states: Sequence[Pair]) -> tuple[Tensor, tuple[Pair, ...]]:
        """The low areas step by step: AvgPool(c_5(t)) (T, B, D), and their last states."""
        assert isinstance(self.backbone, Backbone)
        now: list[Pair | None] = list(states) or [None] * len(self.areas)
        pooled = []
        for frame in self.backbone.standardised(patches).unbind(0):
            before, below = list(now), frame
            for level, (stage, area) in enumerate(zip(self.backbone.stages, self.areas, strict=True)):
                x = stage(below + self._from_above(level, below, before))
                assert isinstance(area, ConvRGC)
                s, now[level] = area.step(x, before[level])
                below = _passed_on(s, before[level]) if self.delay else s
            pooled.append(s.mean((-2, -1)))
        return torch.stack(pooled), tuple(pair for pair in now if pair is not None)

    def _low_at_once(self, patches: Tensor, states: Sequence[Pair]) -> tuple[Tensor, tuple[Pair, ...]]:
        """The same without feedback: each area over all steps before the next."""
        assert isinstance(self.backbone, Backbone)
        given: Sequence[Pair | None] = states or [None] * len(self.areas)
        below, last = self.backbone.standardised(patches), []
        for stage, area, before in zip(self.backbone.stages, self.areas, given, strict=True):
            s, now = area(stage(below.flatten(0, 1)).unflatten(0, below.shape[:2]), before)
            last.append(now)
            below = torch.cat([_passed_on(s[0], before)[None], s[:-1]]) if self.delay else s
        return s.mean((-2, -1)), tuple(last)

    def _from_above(self, level: int, like: Tensor, before: Sequence[Pair | None]) -> Tensor | float:
        """φ_l(⊕_{k>l} S(s_k(t-1))), of the size of the area's input; zero at the first step and with nothing above."""
        if level == len(self.feedback) or before[-1] is None:
            return 0.0
        size = like.shape[-2:]
        resized = []
        for pair in before[level + 1 :]:
            assert pair is not None
            s = pair[0] if self.learning == "bptt" else pair[0].detach()
            resized.append(F.interpolate(s, size=size, mode="bilinear", align_corners=False))
        return self.feedback[level](torch.cat(resized, dim=1))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What learns in the encoder: circuits, feedback, and what of F, the MLP and the backbone is trained."""
        return [p for p in self.parameters() if p.requires_grad]


def _passed_on(s: Tensor, before: Pair | None) -> Tensor:
    """s of the step before, zero at the first."""
    return torch.zeros_like(s) if before is None else before[0]
