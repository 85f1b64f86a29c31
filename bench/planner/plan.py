"""What each algorithm and form would cost on a device, which fit, and which to take: `rjepa bench plan`.

All is predicted by the model by which the online learner itself chooses its form (`planning.cost`), from a device's
profile (`planning.devices`). Nothing is run but a layer of a few units, whose calls are counted, and with --device here
some seconds of measuring the device's own rates. `check` compares the model with committed records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ... import _files
from ...planning import cost, devices
from ...planning.cost import Phase
from ...planning.devices import Device
from ...rules.exactness import exactness
from ..harness.device import MEMORY_SHARE
from ..harness.tables import bytes_text, seconds_text
from ..scaling import cases
from .check import ERRORS, LARGE_FROM, Checked, against, check_table, median_error, predict_record
from .here import profile as measured_profile
from .model import (
    BACKWARD_ARRAYS,
    CPU,
    EAGER_NEAR_PASSES,
    EAGER_PASSES,
    FORMS,
    LEARNING,
    ONE_PASS_ARRAYS,
    RTRL_NEAR_PASSES,
    RTRL_PASSES,
    SEQUENCE,
    TOUCHED_ARRAYS,
    Model,
    model_of,
)
from .question import CELLS, DTYPES, GAMMA_DTYPES, Question

__all__ = [
    "BACKWARD_ARRAYS",
    "CELLS",
    "CPU",
    "DTYPES",
    "EAGER_NEAR_PASSES",
    "EAGER_PASSES",
    "FORMS",
    "GAMMA_DTYPES",
    "HEADINGS",
    "HERE",
    "LARGE_FROM",
    "LEARNING",
    "ONE_PASS_ARRAYS",
    "RTRL_NEAR_PASSES",
    "RTRL_PASSES",
    "SEQUENCE",
    "TOUCHED_ARRAYS",
    "USE",
    "Advice",
    "Checked",
    "Model",
    "Predicted",
    "Question",
    "advise",
    "against",
    "check_table",
    "device_of",
    "median_error",
    "predict_record",
    "predictions",
    "rows_that_fit",
    "save",
    "table",
]

HERE = "here"


@dataclass(frozen=True)
class Predicted:
    """One way to train on one device, with its predicted cost.

    exact, why     whether its gradient is exact, and why or why not
    every          steps between gradients; None: one gradient a sequence
    seconds        of a time step, forward pass and learning; phases: its parts
    state_bytes    of learning state, kept from one gradient to the next, with the layer's own states
    peak_bytes     the most at once: state, new gradients and temporary arrays
    weight_bytes   of the layer's weights; their gradients take as many again
    other_network  whether the network has another shape than the one asked for
    """

    algorithm: str
    exact: bool
    why: str
    every: int | None
    seconds: float
    phases: tuple[Phase, ...]
    state_bytes: int
    peak_bytes: int
    weight_bytes: int
    other_network: bool = False

    @property
    def needs(self) -> int:
        """Bytes needed in all: peak, weights, and the weights' gradients."""
        return self.peak_bytes + 2 * self.weight_bytes

    @property
    def compared(self) -> float:
        """Seconds a step by which ways are compared (`cost.compared_seconds`)."""
        return cost.compared_seconds("lazy" if self.algorithm == FORMS["lazy"] else "", self.seconds)

    def fits(self, device: Device) -> bool:
        """Whether the device has the memory for it, with a tenth left over."""
        return self.needs <= MEMORY_SHARE * device.memory_bytes


def device_of(text: str) -> Device:
    """The device that --device names: "here" (this machine's, measured now), a known key, or a file ending in .json.

    Raises ValueError for another text, naming the known keys; OSError for a file that can't be read.
    """
    if text == HERE:
        return measured_profile(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if text.endswith(".json"):
        found = list(devices.load(Path(text)).values())
        if len(found) != 1:
            raise ValueError(f"{text} must have the profile of one device, got {len(found)}")
        return found[0]
    if text not in devices.known():
        known = ", ".join(devices.known())
        raise ValueError(f"device must be {HERE}, a file ending in .json, or one of {known}, got {text!r}")
    return devices.by_key(text)


def save(device: Device, path: Path) -> None:
    """Write a device's profile to a JSON file, in the format of `devices.json`, which --device reads."""
    _files.write_text(path, json.dumps({device.key: device.to_dict()}, indent=2) + "\n")


def predictions(question: Question, device: Device, batch: int | None = None) -> list[Predicted]:
    """Every way to train what is asked for, sorted by predicted seconds a step. batch replaces the question's, if
    given.

    Raises ValueError if the question has cuda_graph and the device is a CPU.
    """
    rows = question.batch if batch is None else batch
    if question.cuda_graph and device.kind != "gpu":
        raise ValueError(f"cuda_graph=True needs a GPU, got device {device.key!r}")
    eager = _rates(question, device)
    graph = cost.rates(device, question.dtype, cuda_graph=True) if question.cuda_graph else eager
    model = _model(question, device, rows)
    if question.population > 1 and not model.compiled:
        raise ValueError(
            f"population is predicted where a Stream is compiled C++, on a CPU with a compiler, got {device.key!r}"
        )
    names = ["rfp-step", "rfp-lazy", "tbptt"]
    names += ["rfp-chunk"] if model.chunk > 1 else []
    names += ["rfp-history", *SEQUENCE] if question.steps is not None else []
    names += ["stream"] if model.compiled else []
    models = dict.fromkeys(names, model)
    if not model.layer.cell.matrices:  # the eager loop is written only for layers with recurrent weights
        models.pop("bptt-autograd", None)
    if any(weight.dim() > 1 for weight in model.layer.recurrent_weights()):
        models["rtrl"] = model
        if question.block is not None:
            models["rtrl-block"] = model
        if question.heads is None and 1 < cases.head_size(question.hidden) < question.hidden:
            models["rtrl-heads"] = _model(question, device, rows, "rtrl-heads")
    if question.population > 1:
        models = {"stream": model}
    every = {"tbptt": model.chunk, "rfp-chunk": model.chunk, **dict.fromkeys(SEQUENCE)}
    found = []
    for name, of in models.items():
        weights = list(of.layer.recurrent_weights())
        block = question.block if name == "rtrl-block" else None
        told = exactness(of.layer.cell, weights, LEARNING[name], block=block)
        phases = of.phases(name)
        found.append(
            Predicted(
                algorithm=name,
                exact=told.exact,
                why=told.why,
                every=every.get(name, 1),
                seconds=cost.seconds(phases, graph if name == "rfp-step" else eager),
                phases=tuple(phases),
                state_bytes=of.state_bytes(name),
                peak_bytes=of.peak_bytes(name),
                weight_bytes=of.weight_bytes,
                other_network=name == "rtrl-heads",
            )
        )
    return sorted(found, key=lambda one: one.seconds)


def _rates(question: Question, device: Device) -> cost.Rates:
    threads = torch.get_num_threads() if device.key == HERE and device.kind != "gpu" else None
    return cost.rates(device, question.dtype, threads=threads)


def _model(question: Question, device: Device, batch: int, algorithm: str = "") -> Model:
    """The model by which an algorithm is predicted: that of the layer asked for, or of one with heads of √N units."""
    heads = question.hidden // cases.head_size(question.hidden) if algorithm == "rtrl-heads" else None
    return model_of(question, batch, _rates(question, device), gpu=device.kind == "gpu", heads=heads)


def rows_that_fit(question: Question, device: Device, algorithm: str) -> int:
    """The largest batch, up to the one asked for, that one device has the memory for; 0 if not even one row fits."""

    def fits(batch: int) -> bool:
        needs = _model(question, device, batch, algorithm).needs(algorithm)
        return needs <= MEMORY_SHARE * device.memory_bytes

    if not fits(1):
        return 0
    low, high = 1, question.batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- which to take -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """The algorithm to take, and why, in words. algorithm: None if nothing fits.

    devices: over how many the batch must be divided.
    """

    algorithm: str | None
    devices: int
    text: str


# How each algorithm is used, in code.
USE = {
    "rfp-step": 'OnlineLearner(layer, B, form="step")',
    "rfp-lazy": 'OnlineLearner(layer, B, form="lazy")',
    "rfp-chunk": 'OnlineLearner(layer, B, update_every=C, form="chunk")',
    "rfp-history": 'OnlineLearner(layer, B, horizon=T, form="history")',
    "rfp-dual": 'the layer itself, learning="rfp"',
    "tbptt": 'OnlineLearner(layer, B, learning="tbptt", update_every=C)',
    "bptt": 'the layer itself, learning="bptt"',
    "bptt-autograd": "a Python loop under autograd",
    "stream": "Stream(layer, readout, B).run(x, target)",
    "rtrl": 'OnlineLearner(layer, B, learning="rtrl")',
    "rtrl-block": 'OnlineLearner(layer, B, learning="rtrl", block=b)',
    "rtrl-heads": 'a layer with heads, and OnlineLearner(layer, B, learning="rtrl")',
}


def advise(question: Question, device: Device, found: Sequence[Predicted]) -> Advice:
    """Which of the predicted ways to take on the device, and why.

    If the question wants exact gradients, only ways that give them are considered. Another network than the one asked
    for is advised only if nothing else fits; truncated BPTT, which forgets, only if no other way to train the network
    asked for does.
    """
    wanted = [one for one in found if one.exact or not question.exact]
    if not wanted:
        kind = "exact gradients" if question.exact else "the layer"
        return Advice(None, 0, f"nothing here gives {kind} of this network")
    fitting = [one for one in wanted if one.fits(device)]
    if not fitting:
        return _share(question, device, wanted)
    ranks = {one.algorithm: (one.other_network, one.algorithm == "tbptt", one.compared) for one in fitting}
    best, *others = sorted(fitting, key=lambda one: ranks[one.algorithm])
    where = (
        "a stream without end" if question.steps is None else f"a sequence of {question.steps} steps at hand"
    )
    reasons = [
        f"for {where}" + (", with an exact gradient," if question.exact else ",") + f" take {best.algorithm}"
    ]
    reasons.append(f"{USE[best.algorithm]}: predicted {seconds_text(best.seconds)} a step")
    peers = [one for one in others if not one.other_network and one.algorithm != "tbptt"]
    # "rfp-lazy" may be predicted to be faster, but by less than the margin at which it is chosen
    beaten = [one for one in peers if one.seconds >= best.seconds]
    if beaten:
        second = min(beaten, key=lambda one: one.seconds)
        reasons.append(f"{second.seconds / best.seconds:.1f} times as fast as {second.algorithm}")
    if best.phases:
        rates = cost.rates(device, question.dtype)
        longest = max(best.phases, key=lambda phase: phase.seconds(rates))
        reasons.append(f"most of it {longest.name}, {_bound(longest, rates)}")
    text = (
        "; ".join(reasons)
        + ". "
        + ("Its gradient is exact" if best.exact else "Not exact")
        + f": {best.why}."
    )
    slower = [one for one in peers if not one.exact or best.exact or question.exact]
    if best.every is None and slower:
        text += " One gradient a sequence: where weights must change within it, take an online form."
    elif best.algorithm == "rfp-chunk":
        text += f" Weights wait {best.every} steps for a gradient; where they can't, take rfp-step."
    elif best.algorithm == "stream" and peers:
        text += (
            " Readout, loss and optimizer are a Stream's, and all steps of a call are there before it runs; the "
            "readout's time is not counted. For any other loss take "
            f"{min(peers, key=lambda one: one.compared).algorithm}."
        )
    if best.other_network:
        text += " It is another network: recurrent weights in blocks."
    if best.algorithm == "tbptt":
        carried = [one for one in wanted if one.algorithm != "tbptt"]
        text += (
            f" What carries the past is too large for one device: {_share(question, device, carried).text}."
        )
    return Advice(best.algorithm, 1, text)


def _bound(phase: Phase, rates: cost.Rates) -> str:
    """What takes most of a phase's predicted time, in words."""
    parts = phase.work.parts(rates, phase.working_set)
    return "its " + max(parts, key=lambda name: parts[name])


def _share(question: Question, device: Device, wanted: Sequence[Predicted]) -> Advice:
    """The advice where nothing fits on one device: over how many to divide the batch, or that not even one row fits."""
    rows = {one.algorithm: rows_that_fit(question, device, one.algorithm) for one in wanted}
    able = [one for one in wanted if rows[one.algorithm] and not one.other_network]
    has = f"{device.name} has {bytes_text(device.memory_bytes)}"
    if not able:
        alone = min(
            (one for one in predictions(question, device, 1) if one.algorithm in rows),
            key=lambda one: one.needs,
        )
        return Advice(
            None,
            0,
            f"nothing fits: {alone.algorithm}, which takes least, needs {bytes_text(alone.needs)} for one row, and "
            f"{has}, so sharing the batch out doesn't help: take fewer hidden units"
            + ("" if question.steps is None else ", or shorter sequences"),
        )
    best = min(able, key=lambda one: (-rows[one.algorithm], one.compared))
    each = rows[best.algorithm]
    count = math.ceil(question.batch / each)
    return Advice(
        best.algorithm,
        count,
        f"{best.algorithm} needs {bytes_text(best.needs)}, and {has}; with the batch's {question.batch} rows over "
        f"{count} of them, at most {each} each, it fits (adding the gradients up over devices is not predicted)",
    )


HEADINGS = ("algorithm", "gradient", "every", "a step", "off by", "a sequence", "state", "peak", "fits")


def table(question: Question, device: Device, found: Sequence[Predicted]) -> Table:
    """Every way with its predicted cost on the device, and by how much the model has been off, as a table."""
    size = f"{question.cell} N = {question.hidden}, B = {question.batch}"
    size += f", T = {question.steps}" if question.steps is not None else ", no end"
    size += f", {question.population} networks" if question.population > 1 else ""
    errors = json.loads(_files.read_text(ERRORS)).get(device.kind, {})
    out = Table(
        title=f"predicted, on {device.name}: {size}, C = {question.chunk}, {question.dtype}",
        caption="off by: the median error of time against the committed records of such devices, N ≥ 128; ? without "
        f"records. Nothing measured here; rates: {device.basis()}"
        + (f" ({device.sources})" if device.sources else ""),
    )
    for heading in HEADINGS:
        out.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", no_wrap=True)
    for one in found:
        whole = "" if question.steps is None else seconds_text(one.seconds * question.steps)
        kind = (
            "exact"
            if one.exact
            else {"tbptt": "truncated", "rtrl-block": "in blocks"}.get(one.algorithm, "RFP")
        )
        out.add_row(
            one.algorithm + (" (another network)" if one.other_network else ""),
            kind,
            "sequence" if one.every is None else "step" if one.every == 1 else f"{one.every} steps",
            seconds_text(one.seconds),
            f"{errors[one.algorithm]:.0%}" if one.algorithm in errors else "?",
            whole,
            bytes_text(one.state_bytes),
            bytes_text(one.peak_bytes),
            "yes" if one.fits(device) else "no",
        )
    return out
