"""How near RFP's gradient is to BPTT's of the same network: equal for diagonal recurrence, not for dense.

Loss on s alone, float64, inputs N(0, 1): gradients of W_mm and W_sm suffer most, since their way to s leads
through off-diagonal W_ms, which RFP drops.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from .. import _checks as check
from .. import functional
from ..cells import RGCCell
from . import inputs, record
from .record import Record

FILE = "exactness.jsonl"
RECURRENCE = ("diagonal", "dense")
SCALES = (0.1, 0.3, 0.5, 1.0)
MATRICES = tuple(matrix.name for matrix in RGCCell.matrices)


def measure(recurrence: str, scale: float, units: int, steps: int, seeds: int) -> dict[str, dict[str, float]]:
    """By matrix: mean and standard deviation over seeds of cosine and relative error of RFP against BPTT.

    recurrence "dense": W ~ scale·N(0, 1)/√N, (N, N); "diagonal": scale·N(0, 1), (N,).
    """
    check.one_of("recurrence", recurrence, RECURRENCE)
    like = torch.empty(0, dtype=torch.float64)
    cosine: dict[str, list[float]] = {name: [] for name in MATRICES}
    relative: dict[str, list[float]] = {name: [] for name in MATRICES}
    for seed in range(seeds):
        x = inputs.inputs("noise", steps, 1, units, seed, like)
        delta = inputs.normal(x.shape, seed, 3, like)
        drawn = inputs.weights(units, scale, seed, like, diagonal=recurrence == "diagonal")
        weights = ss, ms, mm, sm = tuple(w.requires_grad_() for w in drawn)
        rfp = torch.autograd.grad(functional.rgc(x, ss, ms, mm, sm, learning="rfp")[0], weights, delta)
        bptt = torch.autograd.grad(functional.rgc(x, ss, ms, mm, sm, learning="bptt")[0], weights, delta)
        for name, a, b in zip(MATRICES, rfp, bptt, strict=True):
            cosine[name].append(float((a * b).sum() / (a.norm() * b.norm())))
            relative[name].append(float((a - b).norm() / b.norm()))
    return {
        name: {
            "cosine": statistics.fmean(cosine[name]),
            "cosine_sd": statistics.pstdev(cosine[name]),
            "relative": statistics.fmean(relative[name]),
            "relative_sd": statistics.pstdev(relative[name]),
        }
        for name in MATRICES
    }


def run(path: Path, units: int = 120, steps: int = 100, seeds: int = 5) -> list[Record]:
    """Measure every recurrence and scale, append a record of each to `path`, and return them."""
    for name, value in (("hidden", units), ("steps", steps), ("seeds", seeds)):
        check.integer(name, value, 1)
    device, started = torch.device("cpu"), record.now()
    versions, git = record.versions(), record.git_revision()
    made = []
    for recurrence in RECURRENCE:
        for scale in SCALES:
            found = measure(recurrence, scale, units, steps, seeds)
            made.append(
                Record(
                    benchmark="exactness",
                    algorithm="rfp",
                    params={
                        "N": units,
                        "B": 1,
                        "T": steps,
                        "recurrence": recurrence,
                        "scale": scale,
                        "seeds": seeds,
                        "dtype": "float64",
                        "device": device.type,
                        "input": "noise",
                    },
                    status="ok",
                    device=record.device_name(device),
                    versions=versions,
                    git=git,
                    run=started,
                    time=record.now(),
                    payload=found,
                )
            )
            record.append(path, made[-1])
    return made


HEADINGS = ("recurrent weights", *(f"W_{name}" for name in MATRICES))


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Under `HEADINGS`, by recurrence and scale: cosine ± its deviation (relative error)."""
    out = []
    for r in records:
        size = f"{r.params['scale']:g}"
        which = "diagonal, " + size if r.params["recurrence"] == "diagonal" else f"dense, {size}/√N"
        found = [r.payload[name] for name in MATRICES]
        cells = (f"{f['cosine']:.3f} ± {f['cosine_sd']:.3f} ({f['relative']:.1e})" for f in found)
        out.append([which, *cells])
    return out


def markdown(records: Sequence[Record]) -> str:
    """The table for the docs."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(records: Sequence[Record]) -> Table:
    """The table for a terminal."""
    out = Table(*HEADINGS, title="RFP against BPTT: cosine ± deviation over seeds (relative error)")
    for row in rows(records):
        out.add_row(*row)
    return out
