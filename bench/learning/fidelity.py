"""How close each learning rule's gradient is to the exact one, and what it costs: the frontier from cheap to exact.

Cosine and relative error are against the exact gradient of the same network, in float64; seconds a time step and bytes
of learning state are in float32. Rules are compared by cell, scale c of the recurrent weights c·N(0, 1)/√fan-in, N and
T.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ... import _checks as check
from ...layers.functional import Learning
from ...layers.layer import TwoPointRNN
from ...layers.named import LSTM, RGC
from ...online import fidelity as comparison
from ...online.learner import OnlineLearner
from ...rules.refine import Divergence
from ..harness import inputs, measure, record
from ..harness.record import Record
from ..harness.statistics import bootstrap
from ..harness.tables import bytes_text, seconds_text
from ..scaling.cases import head_size

FILE = "fidelity.jsonl"
CELLS = ("rgc", "lstm")
INPUTS = ("stream", "noise")


@dataclass(frozen=True)
class Method:
    """A way to compute a gradient.

    label    its name in tables
    kind     what its marker in the plot shows; short: its label there
    online   options of an `OnlineLearner`; None for a whole sequence, with the layer's options `learning` and `refine`
    shape    of the recurrent weights: "dense", "diagonal", or "heads" of b ≈ √N units
    """

    label: str
    kind: str
    short: str
    online: Mapping[str, Any] | None = None
    learning: Learning = "rfp"
    refine: Any = 0
    shape: str = "dense"


def _methods() -> dict[str, Method]:
    found = {
        "snap0": Method("SnAp-0", "parts of M", "SnAp-0", {"learning": "snap0", "form": "step"}),
        "rflo": Method("RFLO", "parts of M", "RFLO", {"learning": "rflo", "form": "step"}),
        "eprop": Method("e-prop", "parts of M", "e-prop", {"learning": "eprop", "form": "step"}),
        "rfp": Method("RFP", "RFP", "RFP", {"learning": "rfp", "form": "step"}),
        "uoro": Method("UORO", "UORO", "UORO", {"learning": "uoro"}),
    }
    for c in (1, 5, 10, 20):
        options: dict[str, Any] = {"learning": "tbptt", "update_every": c}
        found[f"tbptt-{c}"] = Method(f"TBPTT, C = {c}", "TBPTT", f"C={c}", options)
    for c in (1, 5, 10, 20):
        options = {"learning": "rfp", "credit": "carry", "update_every": c}
        found[f"carry-{c}"] = Method(f"carry, C = {c}", "carry", f"C={c}", options)
    options = {"learning": "rfp", "refine": 2, "update_every": 20}
    found["carry-20-refined"] = Method("carry, C = 20, 2 rounds", "carry", "C=20, r=2", options)
    for r in (1, 2, 4):
        found[f"refine-{r}"] = Method(f"RFP, {r} round{'s' * (r > 1)}", "refined", f"r={r}", refine=r)
    found["refine-exact"] = Method("RFP, refined to the end", "refined", "to the end", refine="exact")
    for b in (2, 4, 8, 16):
        options = {"learning": "rtrl", "block": b}
        found[f"block-{b}"] = Method(f"RTRL in blocks of {b}", "blocks", f"b={b}", options)
    found["rtrl"] = Method("RTRL", "exact", "RTRL", {"learning": "rtrl"})
    found["bptt"] = Method("BPTT", "exact", "BPTT", learning="bptt")
    found["heads"] = Method(
        "RTRL, heads of √N", "other network", "heads", {"learning": "rtrl"}, shape="heads"
    )
    found["diagonal"] = Method(
        "RFP, diagonal", "other network", "diagonal", {"learning": "rfp"}, shape="diagonal"
    )
    return found


METHODS = _methods()


@dataclass(frozen=True)
class Point:
    """A point at which methods are compared: cell, sizes, scale c of the recurrent weights, kind of input."""

    cell: str = "rgc"
    units: int = 64
    steps: int = 100
    batch: int = 1
    scale: float = 0.3
    input: str = "stream"

    def params(self) -> dict[str, Any]:
        return {
            "cell": self.cell,
            "N": self.units,
            "T": self.steps,
            "B": self.batch,
            "scale": self.scale,
            "input": self.input,
        }


@dataclass(frozen=True)
class Sweep:
    """Points, the methods that are compared at each, the number of seeds, and whether methods are timed."""

    points: Sequence[Point]
    methods: Sequence[str]
    seeds: int
    timed: bool = False


CARRY = tuple(f"{kind}-{c}" for c in (1, 5, 10, 20) for kind in ("tbptt", "carry"))
SCALES = (0.1, 0.3, 0.5, 1.0)
SWEEPS: dict[str, Sweep] = {
    "frontier": Sweep(
        [Point(cell, scale=c) for cell in CELLS for c in (0.1, 0.3, 0.5)], tuple(METHODS), 5, timed=True
    ),
    "carry": Sweep([Point(cell, 32, 60, 2, c) for cell in CELLS for c in (0.1, 0.3, 0.5)], CARRY, 10),
    "matrices": Sweep(
        [Point("rgc", 120, 100, 1, c, "noise") for c in SCALES],
        ("diagonal", "rfp", "refine-1", "refine-2", "refine-4"),
        5,
    ),
    "sizes": Sweep(
        [Point("rgc", n, 100) for n in (16, 32, 64, 128, 256)]
        + [Point("rgc", 64, t) for t in (20, 50, 200, 400)],
        ("eprop", "rfp", "refine-2", "carry-20", "tbptt-20"),
        5,
    ),
}


def layer_of(point: Point, shape: str, seed: int, dtype: torch.dtype) -> TwoPointRNN:
    """Draw a layer with recurrent weights c·N(0, 1)/√fan-in (1 for a diagonal); an LSTM reads N features."""
    options: dict[str, Any] = {"dtype": dtype}
    if shape == "heads":
        options["heads"] = point.units // head_size(point.units)
    elif shape == "diagonal":
        options["recurrence"] = "diagonal"
    torch.manual_seed(seed)
    made: TwoPointRNN = (
        RGC(point.units, **options) if point.cell == "rgc" else LSTM(point.units, point.units, **options)
    )
    with torch.no_grad():
        for k, weight in enumerate(made.recurrent_weights()):
            fan_in = 1 if weight.dim() == 1 else weight.shape[-1]
            drawn = inputs.normal(weight.shape, seed, 10 + k, weight)
            weight.copy_(drawn * point.scale / math.sqrt(fan_in))
    return made


def data_of(point: Point, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw x (T, B, N), and the loss's gradient with respect to each output (T, B, N), which is N(0, 1).

    With input "noise", x is N(0, 1); with "stream" it is 0.5·N(0, 1) at each step plus an N(0, 1) of each row and unit
    that stays the same at all steps.
    """
    check.one_of("input", point.input, INPUTS)
    like = torch.empty(0, dtype=dtype)
    size = (point.steps, point.batch, point.units)
    x = inputs.inputs("noise", *size, seed, like)
    if point.input == "stream":
        x = 0.5 * x + inputs.normal((1, *size[1:]), seed, 4, like)
    return x, inputs.normal(size, seed, 3, like)


@dataclass
class Found:
    """One method's comparison for each seed, and for how many of them refinement diverged, so that BPTT ran."""

    results: list[comparison.Fidelity] = field(default_factory=list)
    diverged: int = 0


def compared(point: Point, methods: Sequence[str], seeds: int) -> dict[str, Found]:
    """Compare each method's gradient with the exact one of the same network, for each seed."""
    found = {name: Found() for name in methods}
    for seed in range(seeds):
        x, delta = data_of(point, seed, torch.float64)
        exact: dict[str, Mapping[str, Tensor]] = {}
        for name in methods:
            method = METHODS[name]
            layer = layer_of(point, method.shape, seed, torch.float64)
            if method.shape not in exact:
                exact[method.shape] = comparison.gradients(layer, x, delta, learning="bptt")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", Divergence)
                made = _gradients(layer, method, x, delta, seed)
            found[name].results.append(comparison.compare(made, exact[method.shape]))
            found[name].diverged += any(issubclass(w.category, Divergence) for w in caught)
    return found


def _gradients(
    layer: TwoPointRNN, method: Method, x: Tensor, delta: Tensor, seed: int
) -> Mapping[str, Tensor]:
    if method.online is None:
        return comparison.gradients(layer, x, delta, learning=method.learning, refine=method.refine)
    return comparison.gradients(layer, x, delta, online={**method.online, "seed": seed})


def costs(point: Point, methods: Sequence[str], case_seconds: float) -> tuple[dict[str, Any], dict[str, int]]:
    """By method, the interleaved timings of a whole sequence, and the bytes of learning state; in float32."""
    x, delta = data_of(point, 0, torch.float32)
    layers = {name: layer_of(point, METHODS[name].shape, 0, torch.float32) for name in methods}
    runs: dict[str, Callable[[], object]] = {
        name: functools.partial(_gradients, layers[name], METHODS[name], x, delta, 0) for name in methods
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Divergence)  # `compared` counts it
        timings = measure.interleave(runs, torch.device("cpu"), case_seconds=case_seconds)
    return dict(timings), {name: state_bytes(layers[name], METHODS[name], x) for name in methods}


def state_bytes(layer: TwoPointRNN, method: Method, x: Tensor) -> int:
    """Bytes kept for learning at the end of a chunk or step; for a whole sequence those of its trajectory."""
    if method.online is None:
        trajectory = layer.cell.scan(
            layer.drive(x).detach(), layer.recurrent_weights(), layer.zero_state(x.shape[1], x)
        )
        return trajectory.x.nbytes + trajectory.states.nbytes + trajectory.saved.nbytes
    learner = OnlineLearner(layer, x.shape[1], **method.online)
    learner.chunk(x[: learner.update_every])
    return learner.nbytes


@dataclass(frozen=True)
class Settings:
    """What to run: sweeps by name, seeds (each sweep's own if None), seconds for which a timed method is sampled."""

    sweeps: Sequence[str] = tuple(SWEEPS)
    seeds: int | None = None
    case_seconds: float = 0.3
    plan: Mapping[str, Sweep] = field(default_factory=lambda: SWEEPS)


def run(settings: Settings, path: Path, report: Callable[[str], None] = lambda line: None) -> list[Record]:
    """Compare all methods at all points; append a record of each to `path`, and return the records.

    report: is given a line for each point that is done. Raises ValueError for an unknown sweep or fewer than 2 seeds.
    """
    for name in settings.sweeps:
        check.one_of("sweep", name, settings.plan)
    if settings.seeds is not None:
        check.integer("seeds", settings.seeds, 2)  # an interval needs two
    about = record.started("fidelity", torch.device("cpu"))
    made = []
    for name in settings.sweeps:
        sweep = settings.plan[name]
        seeds = settings.seeds or sweep.seeds
        for point in sweep.points:
            found = compared(point, sweep.methods, seeds)
            timings, sizes = costs(point, sweep.methods, settings.case_seconds) if sweep.timed else ({}, {})
            for method, given in found.items():
                timing = timings.get(method)
                failed = isinstance(timing, Exception)
                made.append(
                    Record(
                        **about,
                        algorithm=method,
                        params={
                            **point.params(),
                            "sweep": name,
                            "seeds": seeds,
                            "dtype": "float64",
                            "device": "cpu",
                            "threads": torch.get_num_threads(),
                        },
                        status="error" if failed else "ok",
                        message=str(timing) if failed else "",
                        time=record.now(),
                        timing=None if timing is None or failed else timing.per(point.steps),
                        state_bytes=sizes.get(method),
                        payload=_payload(given),
                    )
                )
                record.append(path, made[-1])
            report(f"{name}: {point.cell}, N = {point.units}, T = {point.steps}, c = {point.scale:g}")
    return made


def _payload(found: Found) -> dict[str, Any]:
    """The total cosine of each seed, the mean error, and both by parameter; None where a cosine is not defined."""
    results = found.results

    def mean(values: Sequence[float]) -> float | None:
        value = float(np.mean(values))
        return None if math.isnan(value) else value

    return {
        "cosines": [None if math.isnan(r.total_cosine) else r.total_cosine for r in results],
        "error": mean([r.total_error for r in results]),
        "diverged": found.diverged,
        "by_parameter": {
            name: {
                "cosine": mean([r.cosine[name] for r in results]),
                "error": mean([r.error[name] for r in results]),
            }
            for name in results[0].cosine
        },
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95 % interval (low, high) by 4,000 bootstrap resamples of the values. It is deterministic."""
    return (float(np.mean(values)), *bootstrap(np.mean, values, resamples=4000))


# --- tables ------------------------------------------------------------------------------------------------


def select(records: Sequence[Record], sweep: str) -> list[Record]:
    """The last record of each key of one sweep."""
    return [r for r in record.latest(records) if r.benchmark == "fidelity" and r.params["sweep"] == sweep]


def _cosine(made: Record) -> str:
    """The mean total cosine and half the width of its interval; with † if refinement diverged for some seed."""
    mean, low, high = interval(made.payload["cosines"])
    return f"{mean:.3f} ± {(high - low) / 2:.3f}" + " †" * (made.payload["diverged"] > 0)


Rows = tuple[str, list[str], list[list[str]]]


def frontier_rows(records: Sequence[Record], cell: str) -> Rows:
    """A table by method: total cosine at each scale, time a step, and bytes of learning state."""
    mine = [r for r in select(records, "frontier") if r.params["cell"] == cell]
    scales = sorted({r.params["scale"] for r in mine})
    by = {(r.algorithm, r.params["scale"]): r for r in mine}
    rows = []
    for name, method in METHODS.items():
        given = [by[name, scale] for scale in scales if (name, scale) in by]
        if not given or len(given) < len(scales):
            continue
        cosines = [_cosine(r) for r in given]
        middle = given[len(given) // 2]
        time = "–" if middle.timing is None else seconds_text(middle.timing.median)
        size = "–" if middle.state_bytes is None else bytes_text(middle.state_bytes)
        rows.append([method.label, *cosines, time, size])
    where = mine[0].params if mine else {}
    title = f"{cell.upper()}, N = {where.get('N')}, T = {where.get('T')}, B = {where.get('B')}"
    headings = ["gradient by", *(f"c = {scale:g}" for scale in scales), "a step", "state"]
    return title, headings, rows


def carry_rows(records: Sequence[Record], cell: str) -> Rows:
    """A table by scale and C: the total cosine of TBPTT, that of carry, and for how many seeds carry's is higher."""
    mine = [r for r in select(records, "carry") if r.params["cell"] == cell]
    by = {(r.algorithm, r.params["scale"]): r for r in mine}
    scales = sorted({r.params["scale"] for r in mine})
    rows = []
    for scale in scales:
        for c in (1, 5, 10, 20):
            cut, carried = by[f"tbptt-{c}", scale], by[f"carry-{c}", scale]
            pairs = list(zip(carried.payload["cosines"], cut.payload["cosines"], strict=True))
            mean, low, high = interval([a - b for a, b in pairs])
            wins = sum(a > b for a, b in pairs)
            rows.append(
                [
                    f"{scale:g}/√N",
                    str(c),
                    _cosine(cut),
                    _cosine(carried),
                    f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
                    f"{wins} of {len(pairs)}",
                ]
            )
    where = mine[0].params if mine else {}
    title = f"{cell.upper()}, N = {where.get('N')}, T = {where.get('T')}, B = {where.get('B')}"
    return title, ["W", "C", "TBPTT", "carry", "carry - TBPTT", "seeds where higher"], rows


def matrix_rows(records: Sequence[Record]) -> Rows:
    """A table of an RGC by scale and rounds of refinement: for each weight matrix, cosine (relative error)."""
    mine = select(records, "matrices")
    names = [f"weight_{name}" for name in ("ss", "ms", "mm", "sm")]
    rows = []
    for made in mine:
        kind = "c" if made.algorithm == "diagonal" else "c/√N"
        found = [made.payload["by_parameter"][name] for name in names]
        mark = " †" * (made.payload["diverged"] > 0)
        cells = [f"{f['cosine']:.3f} ({f['error']:.1e}){mark}" for f in found]
        rows.append([METHODS[made.algorithm].label, f"{kind} = {made.params['scale']:g}", *cells])
    where = mine[0].params if mine else {}
    title = f"RGC, N = {where.get('N')}, T = {where.get('T')}, B = {where.get('B')}"
    return title, ["gradient by", "weights", "W_ss", "W_ms", "W_mm", "W_sm"], rows


def size_rows(records: Sequence[Record]) -> Rows:
    """A table of the total cosine by N and T."""
    mine = select(records, "sizes")
    names = list(dict.fromkeys(r.algorithm for r in mine))
    by: dict[tuple[int, int], dict[str, Record]] = {}
    for made in mine:
        by.setdefault((made.params["N"], made.params["T"]), {})[made.algorithm] = made
    rows = [[str(n), str(t), *(_cosine(found[name]) for name in names)] for (n, t), found in by.items()]
    scale = mine[0].params["scale"] if mine else 0
    return f"RGC, c = {scale:g}", ["N", "T", *(METHODS[name].label for name in names)], rows


def all_rows(records: Sequence[Record]) -> list[Rows]:
    """All tables for which there are records."""
    tables = [frontier_rows(records, cell) for cell in CELLS] + [carry_rows(records, cell) for cell in CELLS]
    return [table for table in (*tables, matrix_rows(records), size_rows(records)) if table[2]]


def markdown(table: Rows) -> str:
    """A table for the docs, without its title."""
    _, headings, rows = table
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables for a terminal. Cosines are ± half the width of their 95 % interval over seeds."""
    out = []
    for title, headings, rows in all_rows(records):
        out.append(Table(*headings, title=title))
        for row in rows:
            out[-1].add_row(*row)
    return out
