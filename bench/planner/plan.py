"""What each algorithm and form would cost on a device, which fit, and which to take: `rjepa bench plan`.

All is predicted by the model that the online learner itself chooses its form by (`cost`), from a device's profile
(`devices`): nothing is run but a layer of a few units, whose calls are counted, and with --device here the device's own
rates. `check` holds the model against committed records.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ... import _checks as check_that
from ...backends import dispatch as ops
from ...layers import functional, parallel
from ...layers import named as nn
from ...layers.layer import TwoPointRNN
from ...online import counting
from ...planning import cost, devices
from ...planning.cost import Phase, Problem, Work, fresh_bytes_of
from ...planning.devices import Device
from ...rules.exactness import exactness
from ...rules.rtrl import rows_at_once
from ..harness.record import Record
from ..harness.tables import bytes_text, seconds_text
from ..scaling import cases
from ..scaling.forward import CELLS as FORWARD_CELLS
from ..scaling.timing import MEMORY_SHARE
from .here import profile as measured_profile

HERE = "here"
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
GAMMA_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Layers by name: (I, N, options of TwoPointRNN). An RGC alone can do without input weights.
CELLS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda size, units, **options: nn.RGC(units, input_size=size, **options),
    "rnn": lambda size, units, **options: nn.RNN(size or units, units, **options),
    "ctrnn": lambda size, units, **options: nn.CTRNN(size or units, units, **options),
    "lstm": lambda size, units, **options: nn.LSTM(size or units, units, **options),
    "gru": lambda size, units, **options: nn.GRU(size or units, units, **options),
    "indrnn": lambda size, units, **options: nn.IndRNN(size or units, units, **options),
    "elstm": lambda size, units, **options: nn.ELSTM(size or units, units, **options),
    "lru": lambda size, units, **options: nn.LRU(size or units, units, **options),
}
# By which rule an algorithm learns.
LEARNING = {
    "rfp-step": "rfp",
    "rfp-lazy": "rfp",
    "rfp-chunk": "rfp",
    "rfp-history": "rfp",
    "rfp-dual": "rfp",
    "tbptt": "tbptt",
    "bptt": "bptt",
    "bptt-autograd": "bptt",
    "rtrl": "rtrl",
    "rtrl-heads": "rtrl",
}
FORMS = {"step": "rfp-step", "lazy": "rfp-lazy", "chunk": "rfp-chunk", "history": "rfp-history"}
SEQUENCE = ("rfp-dual", "bptt", "bptt-autograd")
# Arrays of T·B·N numbers that a backward pass holds at once beside what was kept.
BACKWARD_ARRAYS = 12
# Arrays of that size that the dual form's backward touches, a window of time after the other where that is large.
TOUCHED_ARRAYS = 20
# The same where it is one pass of compiled code: what is read, and what is written.
ONE_PASS_ARRAYS = 14
# Passes over W's bytes a step of an eager loop under autograd, beside its reading forward and backward: the sum of
# gradients is read and written; each new one, of one matrix, is written where the last one was, and read right away.
EAGER_PASSES, EAGER_NEAR_PASSES = 2.0, 2.0
# Passes over γ: read and written by its product, and read for the gradient; with heads each piece goes through a small
# buffer, which is written and read.
RTRL_PASSES, RTRL_NEAR_PASSES = 3.0, 2.0


@dataclass(frozen=True)
class Question:
    """What is to be trained: N, B, T (None: a stream without end), C, and of what layer.

    input_size I: None for an RGC whose input is x itself, else N's. exact: only exact gradients will do.
    Raises ValueError or TypeError naming the argument.
    """

    hidden: int
    batch: int = 1
    steps: int | None = None
    chunk: int = 16
    cell: str = "rgc"
    input_size: int | None = None
    dtype: str = "float32"
    gamma_dtype: str | None = None
    cuda_graph: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_that.integer("hidden", self.hidden, 1)
        check_that.integer("batch", self.batch, 1)
        check_that.integer("chunk", self.chunk, 1)
        for name, value in (("steps", self.steps), ("input_size", self.input_size)):
            if value is not None:
                check_that.integer(name, value, 1)
        check_that.one_of("cell", self.cell, CELLS)
        check_that.one_of("dtype", self.dtype, DTYPES)
        if self.gamma_dtype is not None:
            check_that.one_of("gamma_dtype", self.gamma_dtype, GAMMA_DTYPES)

    @property
    def kept_in(self) -> torch.dtype:
        """What Γ is kept in."""
        return GAMMA_DTYPES[self.gamma_dtype or self.dtype]

    def layer(self, heads: int | None = None) -> TwoPointRNN:
        """The layer, without memory for its parameters."""
        options: dict[str, Any] = {} if heads is None else {"heads": heads}
        return CELLS[self.cell](
            self.input_size, self.hidden, device="meta", dtype=DTYPES[self.dtype], **options
        )


@dataclass(frozen=True)
class Predicted:
    """One way to train on one device; all of it predicted.

    exact, why     whether its gradient is exact, and why or why not
    every          steps between gradients; None: once a sequence
    seconds        a time step: the layer's and the learning's; phases: what it is made of
    state_bytes    of learning state, kept from one gradient to the next; the layer's own states are in it
    peak_bytes     the most at once: state, gradients and what a pass needs beside them
    weight_bytes   of the layer's weights, and as many again of their gradients, which `needs` counts as well
    other_network  whether it is for a network of another shape than the one asked for
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
        """Bytes in all: peak, weights and their gradients."""
        return self.peak_bytes + 2 * self.weight_bytes

    @property
    def compared(self) -> float:
        """Seconds a step as ways are compared by (`cost.compared_seconds`)."""
        return cost.compared_seconds("lazy" if self.algorithm == FORMS["lazy"] else "", self.seconds)

    def fits(self, device: Device) -> bool:
        """Whether the device holds it, with a tenth of its memory left."""
        return self.needs <= MEMORY_SHARE * device.memory_bytes


class Model:
    """The cost of every algorithm for one layer, N, B, T, C and R (of "rfp-lazy"), on one kind of device."""

    def __init__(
        self,
        layer: TwoPointRNN,
        problem: Problem,
        steps: int | None,
        chunk: int,
        rewrite_every: int,
        *,
        gpu: bool,
    ) -> None:
        self.layer, self.problem, self.steps, self.gpu = layer, problem, steps, gpu
        self.chunk = chunk if steps is None else min(chunk, steps)
        self.rewrite_every = rewrite_every
        self.kernel = gpu and problem.item == 4
        self.compiled = not gpu and ops.choose_scan("auto", CPU, layer.weights()[0].dtype) == "compile"

    @property
    def weight_bytes(self) -> int:
        return self.problem.weight_bytes

    # --- phases, of one time step ---

    def _forward(self, steps: int) -> Phase:
        """The layer's loop over a sequence."""
        problem, layer = self.problem, self.layer
        sizes = (steps, problem.batch, problem.units)
        dtype = layer.weights()[0].dtype
        recurrent = list(layer.recurrent_weights())
        told = parallel.forward_problem(layer.cell, recurrent, sizes, dtype, self.kernel, self.compiled)
        work = told.sequential() * (1 / steps)
        own = sum(weight.numel() for weight in layer.weights()) - told.weight_numbers
        # weights that read the input: one product over all steps
        rest = Work(flop=2.0 * problem.batch * own, bytes=own * problem.item / steps)
        joined = Work(bytes=2.0 * told.weight_numbers * told.item / steps)
        return Phase("forward", work + rest + joined, self.weight_bytes)

    def _outer(self, steps: int) -> Work:
        """The products Σ E yᵀ over a sequence, with linearisation and what E is made of."""
        problem = self.problem
        return (
            problem.linearize(steps) + problem.pointwise(problem.calls.outer, steps) + self._products(steps)
        )

    def _products(self, steps: int) -> Work:
        """The products Σ E yᵀ over a sequence."""
        problem, count = self.problem, max(1, len(self.problem.fan_ins))
        work = Work(flop=2.0 * problem.batch * problem.weight_numbers * steps, bytes=self.weight_bytes)
        return work + Work(fresh_bytes=fresh_bytes_of(self.weight_bytes / count, count))

    def _touched(self, steps: int, *, one_pass: bool = False) -> float:
        numbers = steps * self.problem.batch * self.problem.units
        large, window = functional.LARGE[one_pass]
        if not self.gpu and numbers > large:
            numbers = window
        return float((ONE_PASS_ARRAYS if one_pass else TOUCHED_ARRAYS) * numbers * self.problem.item)

    def _credits(self, steps: int) -> Phase:
        """BPTT's credits: a product a matrix and step."""
        problem = self.problem
        w = sum(weight.numel() for weight in self.layer.recurrent_weights()) * problem.item
        work = problem.exact(steps) * (1 / steps)
        work += Work(flop=2.0 * problem.batch * w / problem.item, matrix_bytes=float(w))
        return Phase("credits", work, float(w))

    def _dual(self) -> list[Phase]:
        steps, problem = self._length(), self.problem
        if problem.partials:  # one product for all recurrent matrices, one for each of the others
            count = 1 + len(self.layer.matrices) - len(self.layer.cell.matrices)
            work = problem.dual(steps) + self._products(steps) + Work(calls=count)
            phase = Phase("gradient", work * (1 / steps), self._touched(steps, one_pass=True))
            return [self._forward(steps), phase]
        work = self._outer(steps)
        if self.kernel:
            work += cost.scan_work(problem.states, steps, problem.batch * problem.units, problem.item, True)
        else:
            work += problem.credit(steps)
        return [self._forward(steps), Phase("gradient", work * (1 / steps), self._touched(steps))]

    def _bptt(self) -> list[Phase]:
        steps = self._length()
        outer = Phase("gradient", self._outer(steps) * (1 / steps), self._touched(steps))
        return [self._forward(steps), self._credits(steps), outer]

    def _eager(self) -> list[Phase]:
        steps, problem = self._length(), self.problem
        count = max(1, len(self.layer.cell.matrices))
        w = sum(weight.numel() for weight in self.layer.recurrent_weights()) * problem.item
        work = problem.pointwise(problem.calls.eager.at(steps) * (1 / steps))
        work += Work(
            flop=6.0 * problem.batch * w / problem.item,
            bytes=EAGER_PASSES * w,
            matrix_bytes=2.0 * w,
            fresh_bytes=fresh_bytes_of(w / count, count),
        )
        near = Phase("new gradients", Work(bytes=EAGER_NEAR_PASSES * w), w / count)
        return [Phase("loop and its backward", work, (2 + 1 / count) * w), near]

    def _tbptt(self) -> list[Phase]:
        outer = self._outer(self.chunk) * (1 / self.chunk)
        return [
            cost.loop_phase(self.problem, self.chunk),
            self._credits(self.chunk),
            Phase("gradient", outer, self._touched(self.chunk) + self.weight_bytes),
        ]

    def _rtrl(self, head: int) -> list[Phase]:
        problem = self.problem
        gamma = float(problem.states * head * problem.batch * problem.weight_bytes)
        blocks = problem.batch * problem.units // head
        counted = problem.calls.rtrl if head == problem.units else problem.calls.rtrl_heads
        work = problem.pointwise(counted) + Work(
            flop=2.0 * problem.batch * (problem.states * head) ** 2 * problem.weight_numbers
            + 2.0 * problem.batch * problem.weight_numbers,
            bytes=RTRL_PASSES * gamma + problem.weight_bytes,
        )
        spare = gamma if blocks == 1 else gamma * rows_at_once(blocks) / blocks
        phases = [Phase("γ and gradient", work, gamma + spare)]
        if blocks > 1:
            phases.append(Phase("pieces of γ", Work(bytes=RTRL_NEAR_PASSES * gamma), 2 * spare))
        return phases

    def _length(self) -> int:
        assert self.steps is not None
        return self.steps

    def phases(self, algorithm: str) -> list[Phase]:
        """Of one algorithm, as `bench.cases` and `OnlineLearner` run it; rtrl by the layer's own heads."""
        forms = {name: form for form, name in FORMS.items()}
        if algorithm in forms:
            at_least_2 = max(2, self.chunk)
            found = cost.form_costs(self.problem, at_least_2, self.steps, cost.CPU, self.rewrite_every)
            return list(next(one.phases for one in found if one.form == forms[algorithm]))
        made: dict[str, Callable[[], list[Phase]]] = {
            "rfp-dual": self._dual,
            "bptt": self._bptt,
            "bptt-autograd": self._eager,
            "tbptt": self._tbptt,
            "rtrl": lambda: self._rtrl(self.problem.units),
            "rtrl-heads": lambda: self._rtrl(self._head()),
        }
        return made[algorithm]()

    def _head(self) -> int:
        return self.problem.units // (self.layer.heads or 1)

    # --- bytes ---

    def state_bytes(self, algorithm: str) -> int:
        """Learning state, kept from one gradient to the next, with the layer's own states where there is a stream."""
        problem = self.problem
        own = problem.layer_state_bytes
        if algorithm in ("rfp-step", "rfp-chunk"):
            return problem.gamma_bytes + own
        if algorithm == "rfp-lazy":
            return problem.gamma_bytes + problem.grown_bytes(self.rewrite_every - 1) + own
        if algorithm == "rfp-history":
            return problem.grown_bytes(self._length()) + own
        if algorithm == "tbptt":
            return own
        if algorithm in ("rtrl", "rtrl-heads"):
            head = problem.units if algorithm == "rtrl" else self._head()
            return problem.states * head * problem.batch * problem.weight_bytes + own
        cell = self.layer.cell
        kept = (
            problem.calls.eager_kept if algorithm == "bptt-autograd" else len(cell.states) + len(cell.gates)
        )
        return kept * self._length() * problem.batch * problem.units * problem.item

    def peak_bytes(self, algorithm: str) -> int:
        """The most at once, beside weights and their gradients' sums: state, new gradients, and a pass's arrays."""
        problem, w = self.problem, self.weight_bytes
        state = self.state_bytes(algorithm)
        if algorithm in SEQUENCE:
            arrays = BACKWARD_ARRAYS * self._length() * problem.batch * problem.units * problem.item
            return state + arrays + w
        if algorithm in ("rtrl", "rtrl-heads"):
            head = problem.units if algorithm == "rtrl" else self._head()
            blocks = problem.batch * problem.units // head
            gamma = state - problem.layer_state_bytes
            jacobian = problem.batch * problem.units * head * problem.states**2 * problem.item
            return (
                state + gamma * (1 if blocks == 1 else rows_at_once(blocks)) // max(1, blocks) + w + jacobian
            )
        if algorithm == "tbptt":
            return state + 2 * problem.window_bytes(self.chunk) + w
        if algorithm == "rfp-history":
            return 2 * state + w
        temporaries = 0
        if problem.runs == "torch":  # a block of rows of Γ^ν at a time
            rows = min(problem.batch, max(1, (1 << 20) // max(1, problem.weight_numbers)))
            temporaries = 6 * rows * w
        if algorithm == "rfp-chunk":
            return state + 2 * problem.window_bytes(self.chunk) + 2 * w + temporaries
        if algorithm == "rfp-lazy":
            return state + 2 * problem.grown_bytes(self.rewrite_every) + 2 * w + temporaries
        return state + problem.window_bytes(1) + w + temporaries


def device_of(text: str) -> Device:
    """A known device by its key; this machine's, measured now, for "here"; or the one of a file ending in .json.

    Raises ValueError naming the known ones; OSError for a file that can't be read.
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
    """Write a device's profile to a JSON file, as `--device` takes it and `devices.json` has it."""
    path.write_text(json.dumps({device.key: device.to_dict()}, indent=2) + "\n")


def _model(
    question: Question, batch: int, rates: cost.Rates, *, gpu: bool, heads: int | None = None
) -> Model:
    layer = question.layer(heads)
    problem = counting.problem(layer, batch, question.kept_in, gpu=gpu)
    every = cost.rewrite_every(problem, rates)
    return Model(layer, problem, question.steps, question.chunk, every, gpu=gpu)


def predictions(question: Question, device: Device, batch: int | None = None) -> list[Predicted]:
    """Every way to train what is asked for, with a batch of its own if given; the cheapest a step first."""
    rows = question.batch if batch is None else batch
    gpu = device.kind == "gpu"
    if question.cuda_graph and not gpu:
        raise ValueError(f"cuda_graph=True needs a GPU, got device {device.key!r}")
    threads = torch.get_num_threads() if device.key == HERE and not gpu else None
    eager = cost.rates(device, question.dtype, threads=threads)
    graph = cost.rates(device, question.dtype, cuda_graph=True) if question.cuda_graph else eager
    model = _model(question, rows, eager, gpu=gpu)
    names = ["rfp-step", "rfp-lazy", "tbptt"]
    names += ["rfp-chunk"] if model.chunk > 1 else []
    names += ["rfp-history", *SEQUENCE] if question.steps is not None else []
    models = dict.fromkeys(names, model)
    if not model.layer.cell.matrices:  # the loop is written for recurrent weights alone
        models.pop("bptt-autograd", None)
    if any(weight.dim() > 1 for weight in model.layer.recurrent_weights()):
        models["rtrl"] = model
        head = cases.head_size(question.hidden)
        if 1 < head < question.hidden:
            models["rtrl-heads"] = _model(question, rows, eager, gpu=gpu, heads=question.hidden // head)
    every = {"tbptt": model.chunk, "rfp-chunk": model.chunk, **dict.fromkeys(SEQUENCE)}
    found = []
    for name, of in models.items():
        weights = list(of.layer.recurrent_weights())
        told = exactness(of.layer.cell, weights, LEARNING[name])
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


def rows_that_fit(question: Question, device: Device, algorithm: str) -> int:
    """The largest batch, up to the one asked for, that one device holds; 0 if not even one row."""

    def fits(batch: int) -> bool:
        found = predictions(question, device, batch)
        return next(one for one in found if one.algorithm == algorithm).fits(device)

    low, high = 0, question.batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- which to take -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """What to take and why, in words; algorithm None if nothing fits. devices: how many share the batch's rows."""

    algorithm: str | None
    devices: int
    text: str


USE = {
    "rfp-step": 'OnlineLearner(layer, B, form="step")',
    "rfp-lazy": 'OnlineLearner(layer, B, form="lazy")',
    "rfp-chunk": 'OnlineLearner(layer, B, update_every=C, form="chunk")',
    "rfp-history": 'OnlineLearner(layer, B, horizon=T, form="history")',
    "rfp-dual": 'the layer itself, learning="rfp"',
    "tbptt": 'OnlineLearner(layer, B, learning="tbptt", update_every=C)',
    "bptt": 'the layer itself, learning="bptt"',
    "bptt-autograd": "a Python loop under autograd",
    "rtrl": 'OnlineLearner(layer, B, learning="rtrl")',
    "rtrl-heads": 'a layer with heads, and OnlineLearner(layer, B, learning="rtrl")',
}


def advise(question: Question, device: Device, found: Sequence[Predicted]) -> Advice:
    """Which of the predicted ways to take on that device, and why.

    Of a stream (T unknown) those that are online; with exact, those whose gradient is. The network stays the one asked
    for, unless nothing else is exact and fits; truncated BPTT, which forgets, is taken where nothing else fits.
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
    # "rfp-lazy" may be predicted faster, by less than what it must be taken by
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
    if best.other_network:
        text += " It is another network: recurrent weights in blocks."
    if best.algorithm == "tbptt":
        carried = [one for one in wanted if one.algorithm != "tbptt"]
        text += (
            f" What carries the past is too large for one device: {_share(question, device, carried).text}."
        )
    return Advice(best.algorithm, 1, text)


def _bound(phase: Phase, rates: cost.Rates) -> str:
    """What a phase's predicted time goes to mostly."""
    parts = phase.work.parts(rates, phase.working_set)
    return "its " + max(parts, key=lambda name: parts[name])


def _share(question: Question, device: Device, wanted: Sequence[Predicted]) -> Advice:
    """Where nothing fits: over how many devices the batch would go, or that not even a row fits on one."""
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


HEADINGS = ("algorithm", "gradient", "every", "a step", "a sequence", "state", "peak", "fits")


def table(question: Question, device: Device, found: Sequence[Predicted]) -> Table:
    """Every way with its predicted cost on the device."""
    size = f"{question.cell} N = {question.hidden}, B = {question.batch}"
    size += f", T = {question.steps}" if question.steps is not None else ", no end"
    out = Table(
        title=f"predicted, on {device.name}: {size}, C = {question.chunk}, {question.dtype}",
        caption=f"nothing measured here; rates: {device.basis()}"
        + (f" ({device.sources})" if device.sources else ""),
    )
    for heading in HEADINGS:
        out.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", no_wrap=True)
    for one in found:
        whole = "" if question.steps is None else seconds_text(one.seconds * question.steps)
        kind = "exact" if one.exact else {"tbptt": "truncated"}.get(one.algorithm, "RFP")
        out.add_row(
            one.algorithm + (" (another network)" if one.other_network else ""),
            kind,
            "sequence" if one.every is None else "step" if one.every == 1 else f"{one.every} steps",
            seconds_text(one.seconds),
            whole,
            bytes_text(one.state_bytes),
            bytes_text(one.peak_bytes),
            "yes" if one.fits(device) else "no",
        )
    return out


# --- checked against records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A record against the model: predicted / measured of time, and of state bytes where both are counted."""

    device: str
    algorithm: str
    units: int
    seconds: float
    state: float | None


def predict_record(made: Record) -> tuple[float, int | None] | None:
    """Seconds a step, or of "forward" a call, and state bytes of what a record measured; None if it isn't modelled."""
    if made.benchmark == "forward":
        return _predict_forward(made)
    if made.benchmark != "scaling" or made.algorithm not in (*LEARNING, "rfp-step-gamma", "copy"):
        return None
    p = made.params
    gpu = p["device"] == "cuda"
    rates = _rates_of_record(made)
    head = cases.head_size(p["N"]) if made.algorithm == "rtrl-heads" else p["N"]
    heads = p["N"] // head if made.algorithm == "rtrl-heads" else None
    question = Question(p["N"], p["B"], p["T"], p["C"], dtype=p["dtype"])
    model = _model(question, p["B"], rates, gpu=gpu, heads=heads if heads and heads < p["N"] else None)
    model.rewrite_every = p["C"]  # of a case
    if made.backend is not None:
        model.problem = replace(model.problem, runs=made.backend.partition(":")[0])
    problem = model.problem
    w = float(problem.weight_bytes)
    if made.algorithm == "copy":
        moved = 2.0 * (problem.gamma_bytes + w)
        return Phase("copy", Work(calls=1, bytes=moved), moved).seconds(rates), None
    if made.algorithm == "rfp-step-gamma":
        touched = problem.gamma_bytes + w
        return Phase("Γ", cost.gamma_pass(problem), touched).seconds(rates), problem.gamma_bytes
    return cost.seconds(model.phases(made.algorithm), rates), model.state_bytes(made.algorithm)


def _rates_of_record(made: Record) -> cost.Rates:
    kind = "gpu" if made.params["device"] == "cuda" else "cpu"
    device = devices.find(made.device, kind)
    return cost.rates(device, made.params["dtype"], threads=made.params["threads"] if kind == "cpu" else None)


def _predict_forward(made: Record) -> tuple[float, None] | None:
    p = made.params
    cell = FORWARD_CELLS[p["cell"]]()
    weights = [torch.empty(p["N"], p["N"], device="meta")] * len(cell.matrices)
    gpu = p["device"] == "cuda"
    compiled = not gpu and ops.choose_scan("auto", CPU, torch.float32) == "compile"
    told = parallel.forward_problem(cell, weights, (p["T"], p["B"], p["N"]), torch.float32, gpu, compiled)
    rates, w = _rates_of_record(made), float(told.weight_numbers * told.item)
    if made.algorithm == "sequential":
        return told.sequential().seconds(rates, w), None
    if made.algorithm == "parallel":
        return told.one_round().seconds(rates) * made.payload["rounds"], None
    return None


def against(records: Iterable[Record]) -> list[Checked]:
    """Every timed record that the model speaks of, against it."""
    out = []
    for made in records:
        if made.timing is None:
            continue
        told = predict_record(made)
        if told is None:
            continue
        seconds, state = told
        counted = made.state_bytes if made.benchmark == "scaling" else None
        name = made.algorithm if made.benchmark == "scaling" else f"forward, {made.algorithm}"
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


LARGE_FROM = 512


def median_error(ratios: Sequence[float]) -> float | None:
    """Median |predicted / measured - 1|; None of nothing."""
    return statistics.median(abs(ratio - 1) for ratio in ratios) if ratios else None


def check_table(checked: Sequence[Checked]) -> Table:
    """By device and algorithm, and of all but the copy: records, median errors, and the ratio of the farthest."""
    out = Table(title="the model against records: median |predicted / measured - 1| (number of records)")
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
            of = [one for one in mine if one.algorithm == name or (name is None and one.algorithm != "copy")]
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
