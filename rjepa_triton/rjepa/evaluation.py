"""All diagnostics of a model on its test sequences: for `rjepa evaluate`, and for each epoch of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from . import diagnostics
from .model import distance
from .sequences import Data, Sequences, losses

PROBE_FROM = 20  # the first step that probes use: by then h holds as much of the past as it will


def evaluate(model: Any, control: nn.Module, data: Data, kind: Any, device: torch.device) -> dict[str, Any]:
    """Diagnostics on the test sequences: lists by step, spectra, and single numbers (docs/rjepa.md lists them).

    control: the predictor that learns on x^High alone. kind: the distance d_R. Probes are fitted on the training
    sequences.
    """
    train, test = _encoded(model, data.train, device), _encoded(model, data.test, device)
    h, plain = test["h"], test["plain"]
    control_loss = distance(kind, control(plain[:-1].to(device)).cpu(), plain[1:]).mean(1)
    w_ms = model.encoder.circuit.weights()[1].cpu()
    before = torch.cat([torch.zeros_like(test["m"][:1]), test["m"][:-1]])
    gain = 1 - torch.tanh(before @ w_ms.T)
    loss = test["loss"].mean(1)
    constant, constant_x = (diagnostics.constant_loss(kind, one)[1:] for one in (h, plain))

    def rows(tensor: Tensor, steps: slice) -> Tensor:
        return rearrange(tensor[steps], "t n d -> (t n) d")

    steps = len(h)
    first = min(PROBE_FROM, steps - 2)
    seen, coming = slice(first, steps - 1), slice(first + 1, steps)

    def explained(name: str, target: slice) -> float:
        pairs = [
            (rows(side[name], seen), rows(sequences.targets, target))
            for side, sequences in ((train, data.train), (test, data.test))
        ]
        return diagnostics.explained(pairs[0], pairs[1])

    centred = h - h.mean((0, 1))
    flat = rearrange(centred, "t n d -> (t n) d")
    axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :2]
    return {
        "loss": loss.tolist(),
        "normalised": (loss / constant).tolist(),
        "control": control_loss.tolist(),
        "control_normalised": (control_loss / constant_x).tolist(),
        "variance": h.var(1, correction=0).mean(-1).tolist(),
        "input_gain": gain.mean((1, 2)).tolist(),
        "spectrum": diagnostics.spectrum(h).tolist(),
        "correlation_spectrum": diagnostics.spectrum(h, correlation=True).tolist(),
        "participation_ratio": diagnostics.participation_ratio(h),
        "correlation_participation_ratio": diagnostics.participation_ratio(h, correlation=True),
        "next_from_h": explained("h", coming),
        "next_from_x": explained("plain", coming),
        "current_from_h": explained("h", seen),
        "current_from_x": explained("plain", seen),
        "trajectories": rearrange(centred[:, :4] @ axes, "t n d -> n t d").tolist(),
    }


def _encoded(model: Any, data: Sequences, device: torch.device, size: int = 64) -> dict[str, Tensor]:
    """Of all sequences: h, m and x^High without recurrence ("plain"), (T, n, ·) each, and "loss" (T - 1, n)."""
    parts = []
    for batch in torch.arange(len(data)).split(size):
        found, plain = losses(model, data, batch, device)
        made = found.encoding
        parts.append({"h": made.h, "m": made.m, "plain": plain, "loss": found.representation})
    return {name: torch.cat([part[name] for part in parts], dim=1).cpu() for name in parts[0]}


def scalars(found: Mapping[str, Any]) -> dict[str, float]:
    """One number for each diagnostic; of a curve, its mean over the steps from PROBE_FROM on."""
    out = {}
    for name, value in found.items():
        if isinstance(value, float):
            out[name] = value
        elif name in ("loss", "normalised", "control", "control_normalised", "variance", "input_gain"):
            late = value[min(PROBE_FROM, len(value) - 1) :]
            out[name] = sum(late) / len(late)
    return out
