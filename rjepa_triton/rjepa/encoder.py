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
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..layers import functional
from ..layers.conv import ConvRGC
from ..layers.layer import TwoPointRNN
from ..layers.named import RGC
from . import gates
from .backbone import Backbone, GaborBank
from .heads import Head, Kind
from .heads import make as make_head

__all__ = ["LEARNING", "PRESETS", "Encoder", "Encoding", "Head", "Learning", "Preset", "State"]

Preset = Literal["initial", "full"]
PRESETS = ("initial", "full")
Learning = Literal["rfp", "bptt", "rtrl", "eprop", "snap0"]
LEARNING = ("rfp", "bptt", "rtrl", "eprop", "snap0")
Pair = tuple[Tensor, Tensor]


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
        learning: how the circuits learn: "rfp", "bptt", "rtrl", or, for comparison, "eprop" or "snap0"; the low areas
            of "full" take "rfp" and "bptt" alone.
        refine: rounds that refine RFP's credits in the top circuit (`layers.functional.two_point`).
        head: what makes x^High of the features, "onoff", "components" or "mlp" (`heads`).
        gate: of the top circuit, "tanh", "affine" or "sigmoid" (`gates`).
        heads: H of the top circuit, whose recurrent weights are then block-diagonal; None: dense.
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
        refine: int = 0,
        head: Kind = "mlp",
        gate: gates.Gate = "tanh",
        heads: int | None = None,
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
        if preset == "full" and learning not in ("rfp", "bptt"):
            raise ValueError(
                f"preset='full' takes learning='rfp' or 'bptt', got {learning!r}; preset='initial' takes it"
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
        self.head = make_head(head, backbone.features, units, hidden, train_head)
        given: dict[str, Any] = {"learning": learning, "init": "zeros", "refine": refine, "heads": heads}
        self.circuit: TwoPointRNN = (
            RGC(units, **given) if gate == "tanh" else TwoPointRNN(gates.cell(gate), units, **given)
        )
        self.learning, self.gate = learning, gate
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
        circuit = self.circuit
        given = (x.new_zeros(x.shape[1:]),) * 2 if state is None else state.top
        s, m = functional.two_point(
            circuit.cell,
            circuit.drive(x),
            circuit.recurrent_weights(),
            given,
            learning=circuit.learning,
            refine=circuit.refine,
        )
        return Encoding(self.embedding(s), x, s, m, State((), (s[-1], m[-1])))

    def context_free(self, x: Tensor) -> Tensor:
        """The embeddings (T, B, E) of x^High (T, B, N), each from a zero state: what the encoder says of a patch alone.

        With the paper's gates that is F(x^High), by the direct passthrough.
        """
        alone = self.encode(rearrange(x, "t b n -> 1 (t b) n")).h
        return rearrange(alone, "1 (t b) e -> t b e", t=len(x))

    def input_gate(self, m: Tensor) -> Tensor:
        """a = g(W_ms m(t-1)) (…, N) of the states m(t-1) (…, N): the part of x^High that doesn't enter s."""
        return gates.input_gate(self.gate, self.circuit.weights(), m)

    def recurrent_parameters(self) -> list[nn.Parameter]:
        """The parameters without which there is no memory: of all circuits, and of the feedback."""
        return [p for part in (self.areas, self.feedback, self.circuit) for p in part.parameters()]

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
