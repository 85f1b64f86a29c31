"""Latency of whole online steps: the layer, the loss's gradient, learning, and the optimizer's step.

A stream waits for single steps, and their mean says little: with form "chunk" most steps are cheap and the last one of
a chunk pays for all. So every step is timed by itself, over 10,000 steps and more, and the result is a distribution.
The forms of `Stream.run` take many steps in one call, which is what is timed: a step's time is the call's over its
steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ... import _checks as check
from ...layers.named import RGC
from ...online.learner import OnlineLearner
from ...online.streams import Stream as OneCall
from ..harness import energy, inputs, measure, progress, record
from ..harness.device import check_device, failure
from ..harness.record import Record
from ..harness.settings import check_above_zero, check_chosen, check_points
from ..harness.tables import bytes_text, seconds_text
from ..scaling import cases

FILE = "online.jsonl"
LEAST_STEPS = 10_000
WARM_STEPS = 200
LEARNING_RATE = 1e-4
INPUTS_KEPT = 64  # steps of x and δ that a stream repeats, so that they fit in a cache however long it is
STREAM_STEPS = 200  # most steps of a call of the forms that take all steps in one call
# The forms that can be timed, with their options of `OnlineLearner`, or of `Stream` for those that begin with "stream".
FORMS: dict[str, dict[str, Any]] = {
    "step": {"form": "step"},
    "step-lr": {"form": "step", "lr": LEARNING_RATE},
    "lazy": {"form": "lazy"},
    "chunk": {"form": "chunk"},
    "carry": {"form": "chunk", "credit": "carry"},
    "tbptt": {"learning": "tbptt"},
    "step-graph": {"form": "step", "cuda_graph": True},
    "step-graph-lr": {"form": "step", "cuda_graph": True, "lr": LEARNING_RATE},
    "stream": {"optimizer": "sgd"},
    "stream-adam": {"optimizer": "adam"},
    "stream-P": {"optimizer": "sgd"},
}
CHUNKED = ("chunk", "carry", "tbptt")
STREAMS = ("stream", "stream-adam", "stream-P")
EXACT_AT_FIRST = ("carry", "tbptt")  # forms whose gradient of the first chunk is BPTT's
POINTS = {"cpu": ((64, 1), (256, 1), (1024, 1)), "cuda": ((64, 1), (256, 1), (1024, 1), (2048, 1), (256, 32))}
DEFAULT_FORMS = {
    "cpu": ("step", "step-lr", "chunk"),
    "cuda": ("stream", "step", "step-graph", "step-graph-lr", "chunk"),
}
# The quantiles that are recorded: from the fastest step to the slowest, and densely at the slow end.
QUANTILES = (
    0.0,
    *(i / 20 for i in range(1, 20)),
    0.97,
    0.98,
    0.99,
    0.995,
    0.998,
    0.999,
    0.9995,
    0.9998,
    0.9999,
    1.0,
)


@dataclass(frozen=True)
class Settings:
    """Points (N, B), forms, and the number of steps for which each is timed; chunk: C of the forms that take chunks.

    budget: the most seconds that a form may take at a point, as predicted from its first steps.
    population: P, the number of networks of the form "stream-P".
    """

    points: tuple[tuple[int, int], ...]
    forms: tuple[str, ...]
    steps: int = LEAST_STEPS
    chunk: int = 16
    device: str = "cpu"
    scale: float = 0.1
    seed: int = 0
    budget: float = 120.0
    population: int = 8

    def __post_init__(self) -> None:
        check_chosen("forms", self.forms, FORMS)
        check_points(self.points)
        check.integer("steps", self.steps, 100)
        check.integer("chunk", self.chunk, 2)
        check.integer("population", self.population, 1)
        check_above_zero(self, "scale", "budget")
        check_device(self.device)

    def params(self, form: str, units: int, batch: int) -> dict[str, Any]:
        """The parameters that identify a measurement, as its record has them."""
        return {
            "N": units,
            "B": batch,
            "C": self.chunk if form in CHUNKED else 1,
            "steps": self.steps,
            "cell": "rgc",
            "optimizer": "Adam" if form == "stream-adam" else "SGD",
            "dtype": "float32",
            "device": torch.device(self.device).type,
            "scale": self.scale,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            **({"P": self.population} if form == "stream-P" else {}),
        }


class Stream:
    """An RGC that learns online: `step()` takes one whole step.

    The loss is Σ δ(t)·s(t) with a given δ, so no readout adds to the cost. Weights change by SGD after every step, or
    after the last step of a chunk: by an optimizer, or if the form has `lr` by backward() itself.
    """

    def __init__(
        self, form: str, units: int, batch: int, settings: Settings, rate: float = LEARNING_RATE
    ) -> None:
        device = torch.device(settings.device)
        like = torch.empty(0, device=device)
        self.layer = RGC(units).to(device)
        with torch.no_grad():
            drawn = inputs.weights(units, settings.scale, settings.seed, like)
            for weight, value in zip(self.layer.recurrent_weights(), drawn, strict=True):
                weight.copy_(value)
        self.every = settings.chunk if form in CHUNKED else 1
        self.learner = OnlineLearner(self.layer, batch, update_every=self.every, **FORMS[form])
        self.optimizer: torch.optim.SGD | None = None
        if self.learner.lr is None:
            self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=rate)
        else:
            self.learner.lr = rate
        self.x = inputs.inputs("noise", INPUTS_KEPT, batch, units, settings.seed, like)
        self.delta = inputs.normal((INPUTS_KEPT, batch, units), settings.seed, 3, like)
        self.at = 0
        self.outputs: list[Tensor] = []
        self.deltas: list[Tensor] = []

    def step(self) -> Tensor:
        """Take one step, and at the end of a chunk learn from its steps; returns the layer's output."""
        now = self.at % INPUTS_KEPT
        shown = self.learner.step(self.x[now])
        self.outputs.append(shown)
        self.deltas.append(self.delta[now])
        self.at += 1
        if self.at % self.every == 0:
            torch.autograd.backward(self.outputs, self.deltas)
            self.outputs.clear()
            self.deltas.clear()
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return shown


class Calls:
    """An RGC that learns online by `Stream.run`, many steps in one call: `call()` takes `steps` of them.

    The loss is Σ δ(t) o(t) with a given δ, of a readout of one output, o(t) = w·s(t), which learns as the layer does.
    Of "stream-P" there are P networks, with the same weights at first, and all take a step of the same stream.
    """

    def __init__(
        self,
        form: str,
        units: int,
        batch: int,
        settings: Settings,
        rate: float = LEARNING_RATE,
        steps: int = STREAM_STEPS,
        update_every: int = 1,
    ) -> None:
        self.form, self.steps = form, steps
        layer = Stream("step", units, batch, settings).layer
        like = layer.recurrent_weights()[0].detach()
        readout = torch.nn.Linear(units, 1, bias=False, device=like.device)
        self.stream = OneCall(
            layer, readout, batch, loss="delta", lr=rate, update_every=update_every,
            population=settings.population if form == "stream-P" else None, **FORMS[form],
        )  # fmt: skip
        self.networks = self.stream.members or [self.stream]
        self.kept = [weight.detach().clone() for weight in layer.recurrent_weights()]
        self.of_output = inputs.normal((1, units), settings.seed, 4, like)
        with torch.no_grad():
            for one in self.networks:
                torch._foreach_copy_(list[Tensor](one.parameters), [*self.kept, self.of_output])
        self.state_bytes = sum(one.learner.nbytes for one in self.networks)
        self.x = inputs.inputs("noise", steps, batch, units, settings.seed, like)
        self.delta = inputs.normal((steps, batch, 1), settings.seed, 3, like)

    def call(self) -> None:
        """Take `steps` steps."""
        self.stream.run(self.x, self.delta)

    def gradients(self) -> list[list[Tensor]]:
        """For each network the sum of the gradients of all steps of one call, with the weights held still until its
        end. They and the optimizers must be new.
        """
        self.call()
        found = []
        for one in self.networks:
            weights = one.layer.recurrent_weights()
            if FORMS[self.form]["optimizer"] == "sgd":  # of a learning rate of 1
                changed = zip(self.kept, weights, strict=True)
                found.append([kept - weight.detach() for kept, weight in changed])
            else:
                (first_beta, _) = one.optimizer.param_groups[0]["betas"]
                moments = [one.optimizer.state[weight]["exp_avg"] for weight in weights]
                found.append([moment / (1 - first_beta) for moment in moments])
        return found


def verify(form: str, units: int, batch: int, settings: Settings) -> None:
    """Raise ArithmeticError unless the gradient summed over a chunk, with the weights held still, is the oracle's.

    The oracle (`cases.oracle`) is float64 autograd of RFP, or of BPTT for a form that is exact within its first chunk.
    """
    steps = min(settings.chunk, cases.CHECK_STEPS) if form not in CHUNKED else settings.chunk
    if form in STREAMS:
        calls = Calls(form, units, batch, settings, 1.0, steps, update_every=steps)
        x, kept = calls.x, calls.kept
        delta = calls.delta * calls.of_output  # of the states
        found = calls.gradients()
    else:
        stream = Stream(form, units, batch, settings, rate=1.0)
        layer, x, delta = stream.layer, stream.x, stream.delta
        kept = [weight.detach().clone() for weight in layer.recurrent_weights()]
        found = [_summed(stream, steps, kept)]
    zero = x.new_zeros(batch, units)
    short = cases.Problem(x[:steps], delta[:steps], (zero, zero), kept, settings.chunk, "auto")
    wanted = cases.oracle(short, form in EXACT_AT_FIRST)
    for gradients in found:
        for name, got, want in zip(("ss", "ms", "mm", "sm"), gradients, wanted, strict=True):
            error = float((got.double() - want).norm() / want.norm())
            if not error <= cases.TOLERANCE[torch.float32]:
                raise ArithmeticError(
                    f"{form}'s gradient of W_{name} differs from float64 by {error:.1e} relative"
                )


def _summed(stream: Stream, steps: int, kept: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of so many steps, with the weights held at `kept` and a learning rate of 1."""
    gradients = [torch.zeros_like(weight) for weight in kept]
    for _ in range(steps):
        stream.step()
        if stream.at % stream.every:
            continue
        with torch.no_grad():  # the weights' decrease is the gradient
            for total, weight, before in zip(gradients, stream.layer.recurrent_weights(), kept, strict=True):
                total.add_(before - weight)
                weight.copy_(before)
    return gradients


def latencies(step: Callable[[], object], steps: int, device: torch.device) -> np.ndarray:
    """The seconds of each of `steps` consecutive steps; on a GPU until the work of the step is done."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    stamps = np.empty(steps + 1)
    wait()
    stamps[0] = time.perf_counter()
    for i in range(steps):
        step()
        wait()
        stamps[i + 1] = time.perf_counter()
    return np.diff(stamps)


def _timed(
    form: str, units: int, batch: int, settings: Settings
) -> tuple[Callable[[], object], int, int, str]:
    """What is timed, how many steps that takes, the bytes of learning state, and the learner's form."""
    if form in STREAMS:
        calls = Calls(form, units, batch, settings, steps=min(STREAM_STEPS, settings.steps))
        return calls.call, calls.steps, calls.state_bytes, calls.networks[0].learner.form
    stream = Stream(form, units, batch, settings)
    return stream.step, 1, stream.learner.nbytes, stream.learner.form


def measure_form(form: str, units: int, batch: int, settings: Settings) -> dict[str, Any]:
    """Check and time one form at one point; the fields of its record."""
    device = torch.device(settings.device)
    try:
        begin = time.perf_counter()
        _timed(form, units, batch, settings)[0]()
        first = time.perf_counter() - begin
        verify(form, units, batch, settings)
        step, steps, state_bytes, how = _timed(form, units, batch, settings)
        warm = latencies(step, max(1, WARM_STEPS // steps), device) / steps
        predicted = float(warm.mean()) * settings.steps
        if predicted > settings.budget:
            return {
                "status": "over_budget",
                "message": f"{seconds_text(float(warm.mean()))} a step, {predicted:.0f} s in all, "
                f"budget {settings.budget:g} s",
            }
        meter = energy.meter(device)
        before = meter.read()
        taken = latencies(step, settings.steps // steps, device) / steps
        joules = meter.between(before, meter.read())
        flowing = measure.seconds(step, max(1, settings.steps // steps // 10), device) / steps
    except Exception as error:
        status, message = failure(error)
        return {"status": status, "message": message}
    points = np.quantile(taken, QUANTILES).tolist()
    return {
        "status": "ok",
        "timing": measure.timing(taken),
        "state_bytes": state_bytes,
        "compile_seconds": first,
        "payload": {
            "quantiles": [[q, value] for q, value in zip(QUANTILES, points, strict=True)],
            "mean": float(taken.mean()),
            "steps_per_second": batch * (settings.population if form == "stream-P" else 1) / flowing,
            "joules_per_step": None if joules is None else joules / (len(taken) * steps),
            "energy": meter.source,
            "form": how,
        },
    }


def sweep(settings: Settings, path: Path, on_record: Callable[[Record], None] = lambda made: None) -> int:
    """Measure what the file at `path` lacks, and append the records to it; returns how many were already there."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = record.started("online", device)
    done = record.measured(path)
    kept = 0
    for units, batch in settings.points:
        for form in settings.forms:
            common = {**shared, "algorithm": form, "params": settings.params(form, units, batch)}
            if record.key(Record(status="ok", time="", **common)) in done:
                kept += 1
                continue
            made = Record(time=record.now(), **common, **measure_form(form, units, batch, settings))
            record.append(path, made)
            on_record(made)
    return kept


def run(settings: Settings, path: Path, console: Console) -> list[Record]:
    """`sweep` with progress on `console`; returns the file's records of these settings."""
    total = len(settings.points) * len(settings.forms)
    progress.shown("online", total, functools.partial(sweep, settings, path), console)
    wanted = [settings.params(form, *point) for point in settings.points for form in settings.forms]
    return [r for r in record.here(path, "online", settings.device) if r.params in wanted]


def quantile(made: Record, q: float) -> float:
    """The seconds that a part q of the steps don't exceed; q must be one of `QUANTILES`."""
    return dict(map(tuple, made.payload["quantiles"]))[q]


def table(records: Sequence[Record]) -> Table:
    """A table by point and form: quantiles of a step's latency, throughput, bytes of learning state, energy."""
    timed = [r for r in records if r.benchmark == "online"]
    meters = sorted({r.payload["energy"] for r in timed if r.timing})
    steps = sorted({r.params["steps"] for r in timed})
    out = Table(
        title=f"latency of one whole online step, over {', '.join(f'{n:,}' for n in steps)} steps",
        caption="steps/s: rows (of all networks) times steps, without waiting for each; "
        "stream: a call's time over its steps; energy: " + "; ".join(meters),
    )
    for heading in ("N", "B", "form", "C", "p50", "p90", "p99", "max", "steps/s", "state", "energy a step"):
        out.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    order = list(FORMS)
    for r in sorted(timed, key=lambda r: (r.params["B"], r.params["N"], order.index(r.algorithm))):
        form = r.algorithm + (f", P = {r.params['P']}" if "P" in r.params else "")
        at = [str(r.params["N"]), str(r.params["B"]), form, str(r.params["C"])]
        if r.timing is None:
            out.add_row(*at, r.status)
            continue
        joules = r.payload["joules_per_step"]
        out.add_row(
            *at,
            *(seconds_text(quantile(r, q)) for q in (0.5, 0.9, 0.99, 1.0)),
            f"{r.payload['steps_per_second']:,.0f}",
            bytes_text(r.state_bytes or 0),
            "" if joules is None else f"{1e3 * joules:.3g} mJ",
        )
    return out
