"""The recurrent encoder (paper, Section 2.2): a ResNet's stages, a recurrent circuit after each, and one at the top.

    c_l(t) = C_l(c_l(t-1), x_l(t)),   x_l(t) = F_l(c_{l-1}(t) + φ_l(⊕_{k>l} S(c_k(t-1))))    low areas, l = 1 … 5   (1)
    c^High(t) = C_H(c^High(t-1), x^High(t)),   x^High(t) = MLP(AvgPool(c_5(t)))              the top area           (2)
    h(t) = F(c^High(t))                                                                      the embedding

Every circuit C is an RGC with the states s and m, of which it passes s on. There are two presets: "initial", as in the
paper's experiments, has a frozen backbone and recurrence in the top area alone; "full" has recurrence and feedback in
every area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange, reduce
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
    """The MLP of eq. 2: x^High = norm(V₂ relu(V₁ (f - μ)/σ + b₁) + b₂), (…, N), of features f (…, D).

    μ and σ are mean and standard deviation of each feature; they are 0 and 1 until `calibrate_` sets them. norm is a
    BatchNorm without gain and offset. If `trainable` is False (the default), the weights are frozen and norm keeps the
    statistics that `calibrate_` set; if True, norm takes them from each batch while training.
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
        """As `nn.Module.train`, except that a frozen head stays in evaluation mode, which norm depends on."""
        return super().train(mode and self.trainable)

    def forward(self, features: Tensor) -> Tensor:
        x = self._mixed(features)
        return self.norm(x.flatten(0, -2)).view(x.shape)

    def _mixed(self, features: Tensor) -> Tensor:
        return self.second(F.relu(self.first((features - self.mean) / self.std)))

    @torch.no_grad()
    def calibrate_(self, features: Tensor) -> None:
        """Set μ, σ and the norm's statistics, in place, to those of features (…, D)."""
        rows = rearrange(features, "... d -> (...) d")
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0) + 1e-3 * rows.std())
        x = self._mixed(rows)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(x.mean(0))
        self.norm.running_var.copy_(x.var(0))


@dataclass
class State:
    """The encoder's state between steps: (s, m) of each low area, (B, C, H, W) each, and of the top area, (B, N)."""

    areas: tuple[Pair, ...]
    top: Pair

    def detached(self) -> State:
        """The same state, detached from the graph: gradients stop here when a sequence is cut into chunks."""
        return State(
            tuple((s.detach(), m.detach()) for s, m in self.areas),
            (self.top[0].detach(), self.top[1].detach()),
        )


@dataclass
class Encoding:
    """What the encoder returns.

    h      (T, B, E) the embeddings
    x      (T, B, N) x^High, the top circuit's input
    s, m   (T, B, N) the top circuit's states
    state  of all circuits after the last step
    """

    h: Tensor
    x: Tensor
    s: Tensor
    m: Tensor
    state: State


class Encoder(nn.Module):
    """Encodes patches (T, B, 3, P, P) as embeddings (T, B, E); the equations are at the top of this module.

    Args:
        backbone: gives the stages F_l and standardises patches. "full" needs stages, which a GaborBank doesn't have.
        preset: "initial" or "full".
        units: N of the top circuit. hidden: hidden units of the MLP before it.
        learning: how the circuits learn, "rfp" | "bptt" | "rtrl"; the low areas of "full" can't take "rtrl".
        embedding: E of a linear F; None: F is the identity, so that h = s and E = N.
        kernel_size, depthwise: of the convolutions in the low circuits' gates.
        feedback: whether later areas feed back. Without it, each area of "full" processes the whole sequence before
            the next area does, and learns by RFP in its dual form.
        delay: use c_{l-1}(t-1) in place of c_{l-1}(t) for l > 1. That is what the text of eq. 1 says; a patch then
            reaches the top after four steps.
        train_head: whether the MLP learns. That may let the representation's rank fall (docs/rjepa.md).

    With "rfp", credit goes back in time within each unit, and from area to area within the same step. Feedback comes
    from the step before, so no credit goes through it to the areas it comes from. With "bptt" gradients are exact.
    Feedback φ_l is a 1×1 convolution of the later areas' s, which are bilinearly resized and concatenated. It is zero
    at the start of training and for the last area.

    Raises ValueError or TypeError, naming the argument, if one is out of its range or doesn't go with another.
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
                "preset='full' takes learning='rfp' or 'bptt', got 'rtrl', whose sensitivities of whole maps would not "
                "fit in memory; preset='initial' takes it for small N"
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
        """The backbone's features (T, B, D) of patches (T, B, 3, P, P), computed for `at_once` patches at a time.

        This is for preset "initial", whose frozen backbone gives the same features in every epoch; "full" raises
        ValueError.
        """
        if self.preset == "full":
            raise ValueError(
                "features can be made beforehand for preset='initial' alone: in 'full' every area recurs"
            )
        flat = rearrange(patches, "t b c h w -> (t b) c h w")
        features = torch.cat([self.backbone(part) for part in flat.split(at_once)])
        return rearrange(features, "(t b) d -> t b d", t=len(patches))

    def without_recurrence(self, patches: Tensor) -> Tensor:
        """x^High (T, B, N) of the feedforward network alone, as the encoder gives it while its circuits are zero."""
        features = self.backbone(rearrange(patches, "t b c h w -> (t b) c h w"))
        return self.head(rearrange(features, "(t b) d -> t b d", t=len(patches)))

    def forward(self, patches: Tensor, state: State | None = None) -> Encoding:
        """Encode patches (T, B, 3, P, P), uint8 or in [0, 1], starting from a state, or from zero. Mutates nothing."""
        if self.preset == "initial":
            return self.encode(self.head(self.features(patches)), state)
        low = self._low if self.feedback else self._low_at_once
        pooled, areas = low(patches, () if state is None else state.areas)
        made = self.encode(self.head(pooled), state)
        return replace(made, state=State(areas, made.state.top))

    def encode(self, x: Tensor, state: State | None = None) -> Encoding:
        """Run the top area alone, given x^High (T, B, N)."""
        given = (x.new_zeros(x.shape[1:]),) * 2 if state is None else state.top
        ss, ms, mm, sm = self.circuit.weights()
        s, m = rgc(x, ss, ms, mm, sm, given, learning=self.learning)
        return Encoding(self.embedding(s), x, s, m, State((), (s[-1], m[-1])))

    def _low(self, patches: Tensor, states: Sequence[Pair]) -> tuple[Tensor, tuple[Pair, ...]]:
        """Run the low areas step by step; returns AvgPool(c_5(t)) (T, B, D) and their last states."""
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
        """As `_low`, without feedback: each area processes all steps before the next one does."""
        assert isinstance(self.backbone, Backbone)
        given: Sequence[Pair | None] = states or [None] * len(self.areas)
        below, last = self.backbone.standardised(patches), []
        for stage, area, before in zip(self.backbone.stages, self.areas, given, strict=True):
            maps = stage(rearrange(below, "t b c h w -> (t b) c h w"))
            s, now = area(rearrange(maps, "(t b) c h w -> t b c h w", t=len(below)), before)
            last.append(now)
            below = torch.cat([_passed_on(s[0], before)[None], s[:-1]]) if self.delay else s
        return reduce(s, "t b c h w -> t b c", "mean"), tuple(last)

    def _from_above(self, level: int, like: Tensor, before: Sequence[Pair | None]) -> Tensor | float:
        """φ_l(⊕_{k>l} S(s_k(t-1))), as large as the area's input; zero in the first step and for the last area."""
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
        """The parameters that learn: circuits, feedback, F, and MLP and backbone unless they are frozen."""
        return [p for p in self.parameters() if p.requires_grad]


def _passed_on(s: Tensor, before: Pair | None) -> Tensor:
    """s of the step before; zero in the first step."""
    return torch.zeros_like(s) if before is None else before[0]
