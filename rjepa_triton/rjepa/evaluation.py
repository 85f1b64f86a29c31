"""All diagnostics of a model on its test sequences: for `rjepa evaluate`, and for each epoch of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import diagnostics, evidence
from .sequences import Data, Sequences, encoding, losses, taken

EPOCH_RIDGE = 100.0  # of the probes of each epoch; those of a whole evaluation choose theirs
BINS = 40  # of the density of h on its first two principal components, each way
# Curves by step that have one number in `scalars`: the mean of their late part.
MEANS = (
    "loss",
    "normalised",
    "control",
    "control_normalised",
    "yardstick",
    "yardstick_control",
    "variance",
    "input_gain",
)


class Evaluator:
    """Evaluates a model and its control. What depends on x^High alone is computed once, unless x^High learns."""

    def __init__(self, data: Data, kind: Any) -> None:
        self.data, self.kind = data, kind
        self._kept: dict[tuple[str, bool], dict[str, evidence.Explained]] = {}

    @torch.no_grad()
    def __call__(self, model: Any, control: Any, *, whole: bool = True) -> dict[str, Any]:
        """Diagnostics on the test sequences: curves by step, spectra, and single numbers (docs/rjepa.md lists them).

        whole: else without R² by step and the ceiling's, and with a ridge that isn't chosen.
        """
        data, kind = self.data, self.kind
        test, own = (_encoded(one, data.test) for one in (model, control))
        h, target = test["h"], test["target"]
        before = torch.cat([torch.zeros_like(test["m"][:1]), test["m"][:-1]])
        weight = next(model.parameters())
        gain = 1 - model.encoder.input_gate(before.to(weight)).cpu().float()
        loss, control_loss = test["loss"].mean(1), own["loss"].mean(1)
        constant, constant_control, constant_yardstick = (
            diagnostics.constant_loss(kind, one)[1:] for one in (target, own["target"], data.test.yardstick)
        )
        of_x = self._of_x("test", data.test, control, whole)
        of_h = self._explained(embedded(model, data.train, "h"), h, data.test, whole, of_x["x"].ridge)
        centred = h - h.mean((0, 1))
        flat = rearrange(centred, "t n d -> (t n) d")
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :2]
        across, along = (flat @ axes).T.numpy()
        density, *edges = np.histogram2d(across, along, bins=BINS)
        return {
            "loss": loss.tolist(),
            "normalised": (loss / constant).tolist(),
            "control": control_loss.tolist(),
            "control_normalised": (control_loss / constant_control).tolist(),
            "yardstick": (test["yardstick"].mean(1) / constant_yardstick).tolist(),
            "yardstick_control": (own["yardstick"].mean(1) / constant_yardstick).tolist(),
            "variance": h.var(1, correction=0).mean(-1).tolist(),
            "input_gain": gain.mean((1, 2)).tolist(),
            "spectrum": diagnostics.spectrum(h).tolist(),
            "correlation_spectrum": diagnostics.spectrum(h, correlation=True).tolist(),
            "participation_ratio": diagnostics.participation_ratio(h),
            "correlation_participation_ratio": diagnostics.participation_ratio(h, correlation=True),
            "rankme": diagnostics.rankme(h),
            **evidence.curves({"h": of_h, **of_x}),
            "trajectories": rearrange(centred[:, :4] @ axes, "t n d -> n t d").tolist(),
            "density": density.astype(int).tolist(),
            "density_extent": [float(edge[end]) for edge in edges for end in (0, -1)],
        }

    @torch.no_grad()
    def gain(self, model: Any, control: Any) -> float:
        """R² of the next patch from h less that from x, late, on the sequences that are held out to choose by."""
        chosen_by = self.data.validation
        assert chosen_by is not None
        h = [embedded(model, side, "h") for side in (self.data.train, chosen_by)]
        of_h = self._explained(h[0], h[1], chosen_by, False)
        return of_h.late_next - self._of_x("validation", chosen_by, control, False)["x"].late_next

    def _of_x(self, name: str, side: Sequences, control: Any, whole: bool) -> dict[str, evidence.Explained]:
        """The evidence from the control's x^High, and if `whole` that of the ceiling."""
        found = self._kept.get((name, whole))
        if found is None:
            train, test = (embedded(control, one, "x") for one in (self.data.train, side))
            found = {"x": self._explained(train, test, side, whole)}
            if whole:
                seen = (evidence.with_averages(train), evidence.with_averages(test))
                found["ceiling"] = self._explained(*seen, side, whole)
            if self.data.train.x is not None:
                self._kept[name, whole] = found
        return found

    def _explained(
        self, train: Tensor, test: Tensor, side: Sequences, whole: bool, ridge: float | None = None
    ) -> evidence.Explained:
        return evidence.explained(
            (train, self.data.train.targets),
            (test, side.targets),
            late_only=not whole,
            ridge=ridge if whole else EPOCH_RIDGE,
            sources=self.data.train.sources,
        )


@torch.no_grad()
def embedded(model: Any, data: Sequences, name: str, size: int = 64) -> Tensor:
    """x^High or h, as `name` says, of all sequences (T, n, ·), without what losses need."""
    if name == "x" and data.x is not None:
        return data.x
    parts = []
    for which in torch.arange(len(data)).split(size):
        made = encoding(model, taken(data, which, model))
        parts.append(made.x if name == "x" else made.h)
    return torch.cat(parts, dim=1).cpu().float()


def _encoded(model: Any, data: Sequences, size: int = 64) -> dict[str, Tensor]:
    """Of all sequences: h, m, x and what is to be predicted, (T, n, ·) each; "loss" and "yardstick", (T - 1, n)."""
    parts = []
    for which in torch.arange(len(data)).split(size):
        found = losses(model, taken(data, which, model))
        made = found.encoding
        assert found.yardstick is not None
        parts.append(
            {
                "h": made.h,
                "m": made.m,
                "x": made.x,
                "target": found.target,
                "loss": found.representation,
                "yardstick": found.yardstick,
            }
        )
    return {name: torch.cat([part[name] for part in parts], dim=1).cpu().float() for name in parts[0]}


def scalars(found: Mapping[str, Any]) -> dict[str, float]:
    """One number for each diagnostic; of a curve, its mean over the steps from `evidence.LATE` on.

    The ceiling's, which not every epoch has, are left out.
    """
    out = {}
    for name, value in found.items():
        if isinstance(value, float) and "ceiling" not in name:
            out[name] = value
        elif name in MEANS:
            out[name] = evidence.late(value)
    return out


def warnings(found: Mapping[str, float], before: Mapping[str, Any]) -> list[str]:
    """What is wrong with a representation, by its `scalars` and an evaluation before training; empty if nothing is."""
    told = []
    for name, least in (("participation_ratio", 0.6), ("rankme", 0.6)):
        share = found[name] / max(float(before[name]), 1e-12)
        if share < least:
            told.append(
                f"h collapses: its {name.replace('_', ' ')} is {share:.0%} of what it was before training"
            )
    if found["input_gain"] < 0.5:
        told.append(f"the input is gated off: {found['input_gain']:.0%} of it passes")
    lost = found["next_from_h"] - found["next_from_x"]
    if lost < -0.005:
        told.append(f"h says less of the next patch than x does: R² {lost:+.3f}, whatever the loss says")
    return told
