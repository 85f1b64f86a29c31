"""The model of cost checked against records: predicted / measured, of time and of bytes of state."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from ...backend import operations
from ...layers import parallel
from ...planning import cost, devices
from ...planning.cost import Phase, Work
from ..harness import measure
from ..harness.record import Record
from ..scaling import cases
from ..scaling.forward import CELLS as FORWARD_CELLS
from .model import CPU, LEARNING, model_of
from .question import Question


@dataclass(frozen=True)
class Checked:
    """A record compared with the model. seconds, state: predicted / measured, state None unless both counted it."""

    device: str
    algorithm: str
    units: int
    seconds: float
    state: float | None


def predict_record(made: Record) -> tuple[float, int | None] | None:
    """What the model predicts for a record: seconds a step ("forward": a call), and state bytes if it counts them.

    None if the model has nothing to say of the record's algorithm.
    """
    if made.benchmark == "forward":
        return _predict_forward(made)
    if made.benchmark == "peers":
        return _predict_stream(made)
    if made.benchmark != "scaling" or made.algorithm not in (*LEARNING, "rfp-step-gamma", "pass"):
        return None
    p = made.params
    gpu = p["device"] == "cuda"
    rates = _rates_of_record(made)
    head = cases.head_size(p["N"]) if made.algorithm == "rtrl-heads" else p["N"]
    heads = p["N"] // head if made.algorithm == "rtrl-heads" else None
    question = Question(p["N"], p["B"], p["T"], p["C"], dtype=p["dtype"])
    model = model_of(question, p["B"], rates, gpu=gpu, heads=heads if heads and heads < p["N"] else None)
    model.rewrite_every = p["C"]  # as the benchmark's case has it
    if made.backend is not None:
        model.problem = replace(model.problem, runs=made.backend.partition(":")[0])
    problem = model.problem
    w = float(problem.weight_bytes)
    if made.algorithm == "pass":
        moved = 2.0 * problem.gamma_bytes
        return Phase("pass", Work(calls=1, bytes=moved), problem.gamma_bytes).seconds(rates), None
    if made.algorithm == "rfp-step-gamma":
        touched = problem.gamma_bytes + w
        return Phase("Γ", cost.gamma_pass(problem), touched).seconds(rates), problem.gamma_bytes
    return cost.seconds(model.phases(made.algorithm), rates), model.state_bytes(made.algorithm)


def _rates_of_record(made: Record) -> cost.Rates:
    kind = "gpu" if made.params["device"] == "cuda" else "cpu"
    device = devices.find(made.device, kind)
    return cost.rates(device, made.params["dtype"], threads=made.params["threads"] if kind == "cpu" else None)


def _predict_stream(made: Record) -> tuple[float, None] | None:
    """A `Stream`'s call, with SGD: of one network, or of a population."""
    p = made.params
    named = re.fullmatch(r"stream(?:-(\d+))?(-one-thread)?", made.algorithm)
    if named is None or p["device"] != "cpu":
        return None
    rates = _rates_of_record(replace(made, params={**p, "threads": 1}) if named[2] else made)
    networks = int(named[1] or 1)
    question = Question(p["N"], p["B"], p["T"], 1, dtype=p["dtype"], population=networks)
    model = model_of(question, p["B"], rates, gpu=False)
    return cost.seconds(model.phases("stream"), rates) * made.payload["covers"] / networks, None


def _predict_forward(made: Record) -> tuple[float, None] | None:
    p = made.params
    cell = FORWARD_CELLS[p["cell"]]()
    weights = [torch.empty(p["N"], p["N"], device="meta")] * len(cell.matrices)
    gpu = p["device"] == "cuda"
    compiled = not gpu and operations.choose_scan("auto", CPU, torch.float32) == "compile"
    told = parallel.forward_problem(cell, weights, (p["T"], p["B"], p["N"]), torch.float32, gpu, compiled)
    rates, w = _rates_of_record(made), float(told.weight_numbers * told.item)
    if made.algorithm == "sequential":
        return told.sequential().seconds(rates, w), None
    if made.algorithm == "parallel":
        return told.one_round().seconds(rates) * made.payload["rounds"], None
    return None


# A machine of the same name may be slower, or busy. A record whose yardsticks show less than this part of the rate at
# which the device copies says nothing of the model, and is left out.
LEAST_RATE = 0.5


def _as_fast_as_told(made: Record) -> bool:
    copies = made.timing.yardsticks.get("copy") if made.timing else None
    if not copies or made.params["device"] != "cpu":
        return True
    rate = 2 * 4 * measure.COPIED / statistics.median(copies)  # read and written
    return rate >= LEAST_RATE * devices.find(made.device, "cpu").rate("copy")


def against(records: Iterable[Record]) -> list[Checked]:
    """Compare every timed record of which the model has a prediction, but for those of slower machines."""
    out = []
    for made in records:
        if made.timing is None or not _as_fast_as_told(made):
            continue
        told = predict_record(made)
        if told is None:
            continue
        seconds, state = told
        counted = made.state_bytes if made.benchmark == "scaling" else None
        name = f"forward, {made.algorithm}" if made.benchmark == "forward" else made.algorithm
        if made.benchmark == "peers":
            name = "stream, population" if re.match(r"stream-\d", name) else "stream"
        out.append(
            Checked(
                made.device,
                name,
                made.params["N"],
                seconds / made.timing.median,
                state / counted if state and counted else None,
            )
        )
    return out


# Layers from this N on are summed up apart: there the work outweighs the calls.
LARGE_FROM = 512


def median_error(ratios: Sequence[float]) -> float | None:
    """Median |predicted / measured - 1|; None if there are no ratios."""
    return statistics.median(abs(ratio - 1) for ratio in ratios) if ratios else None


# By kind of device and algorithm, what `errors` says of the committed records. Renewed by
# `rjepa bench plan --check bench/results --save bench/planner/errors.json`.
ERRORS = Path(__file__).parent / "errors.json"


def errors(checked: Sequence[Checked]) -> dict[str, dict[str, float]]:
    """The median error of time by kind of device and algorithm, over all records of N ≥ 128."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in checked:
        if one.units >= 128:
            kind = "cpu" if devices.find(one.device, "cpu").matches else "gpu"
            found.setdefault(kind, {}).setdefault(one.algorithm, []).append(one.seconds)
    return {
        kind: {name: round(median_error(ratios) or 0.0, 3) for name, ratios in sorted(named.items())}
        for kind, named in found.items()
    }


def check_table(checked: Sequence[Checked]) -> Table:
    """By device and algorithm: median errors, numbers of records, and the ratio that is farthest from 1.

    A last row for each device sums up all algorithms but the copy.
    """
    out = Table(
        title="the model against records: median |predicted / measured - 1| (records), slower machines left out"
    )
    headings = (
        "device",
        "algorithm",
        f"N ≥ {LARGE_FROM}",
        "all N",
        "farthest at N ≥ " + str(LARGE_FROM),
        "state bytes",
    )
    for heading in headings:
        out.add_column(heading, justify="left" if heading in headings[:2] else "right", no_wrap=True)

    def text(ratios: Sequence[float]) -> str:
        error = median_error(ratios)
        return "" if error is None else f"{error:.0%} ({len(ratios)})"

    for device in dict.fromkeys(one.device for one in checked):
        mine = [one for one in checked if one.device == device]
        for name in [*dict.fromkeys(one.algorithm for one in mine), None]:
            of = [one for one in mine if one.algorithm == name or (name is None and one.algorithm != "pass")]
            large = [one.seconds for one in of if one.units >= LARGE_FROM]
            far = max(large, key=lambda ratio: abs(math.log(ratio)), default=None)
            state = median_error([one.state for one in of if one.state is not None])
            out.add_row(
                device,
                "all algorithms" if name is None else name,
                text(large),
                text([one.seconds for one in of]),
                "" if far is None else f"{far:.2f} ×",
                "" if state is None else f"{state:.1%}",
            )
    return out
