"""The forward pass in parallel in time compared with the loop: measured here, and predicted for a GPU.

What is timed is `parallel.forward` alone, without a gradient, in each of its modes; inputs are noise, and
W ~ scale·N(0, 1)/√N. What is predicted is a whole training step of an RGC. The prediction counts calls, FLOP, bytes and
dependent steps of scan kernels by running the same functions here, takes the number of rounds that the problem needs
here, and multiplies with assumed rates.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ... import _checks as check
from ...cells.builtin import LRUCell, RGCCell
from ...cells.two_point import Cell, Trajectory
from ...layers import functional, parallel
from ...planning import cost, devices
from ...planning.cost import Work
from ...rules import rfp
from ..harness import inputs, measure, record
from ..harness.device import check_device, failure
from ..harness.record import Record
from ..harness.settings import check_above_zero, check_chosen
from ..harness.tables import bytes_text, seconds_text

FILE = "forward.jsonl"
# The affine cell (LRU) has no recurrent weights: it needs one round, and one more which finds no change.
CELLS: dict[str, Callable[[], Cell]] = {"rgc": RGCCell, "lru": LRUCell}
# A relative error in norm above this, in float32 over some thousand steps, is more than rounding and the tolerance of
# the iteration explain.
TOLERANCE = 1e-4
MODES: tuple[parallel.Forward, ...] = ("sequential", "parallel", "auto")


@dataclass(frozen=True)
class Settings:
    """Every N at every B and T, for every cell.

    budget: seconds that a call may take. case_seconds: for how long each mode is sampled at least.
    """

    hidden: tuple[int, ...] = (64, 256)
    batches: tuple[int, ...] = (1, 8)
    steps: tuple[int, ...] = (1024, 4096)
    cells: tuple[str, ...] = tuple(CELLS)
    scale: float = 0.1
    device: str = "cpu"
    seed: int = 0
    budget: float = 3.0
    case_seconds: float = 0.2

    def __post_init__(self) -> None:
        for name, values in (("hidden", self.hidden), ("batch", self.batches), ("steps", self.steps)):
            if not values:
                raise ValueError(f"{name} must name at least one size")
            for value in values:
                check.integer(name, value, 1)
        check_chosen("cells", self.cells, CELLS)
        check_above_zero(self, "budget", "case_seconds")
        check_device(self.device)

    def params(self, cell: str, units: int, batch: int, steps: int) -> dict[str, Any]:
        """The parameters that identify a point, as its records have them."""
        return {
            "cell": cell,
            "N": units,
            "B": batch,
            "T": steps,
            "scale": self.scale,
            "dtype": "float32",
            "device": torch.device(self.device).type,
            "input": "noise",
            "seed": self.seed,
            "threads": torch.get_num_threads(),
        }


Given = tuple[Cell, Tensor, list[Tensor], list[Tensor]]


def problem(cell: Cell, units: int, batch: int, steps: int, scale: float, seed: int, like: Tensor) -> Given:
    """The cell, x, weights and a zero state. Per-unit parameters have the cell's initial values."""
    x = inputs.normal((len(cell.per_unit), steps, batch, units), seed, 3, like)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = cell.initial_parameters(units)
    for j, value in enumerate(own.values(), start=len(cell.inputs)):
        x[j] = value.to(like)
    weights = inputs.weights(units, scale, seed, like) if cell.matrices else []
    return cell, x, weights, [like.new_zeros(batch, units) for _ in cell.states]


def measure_point(given: Given, settings: Settings, tried: set[str]) -> dict[str, dict[str, Any]]:
    """Check and time every mode at one point; the fields of each one's record, by mode.

    tried: modes that took longer than the budget at fewer steps. They are not run; a mode that does so here is added.
    """
    cell, x, weights, state = given
    device = x.device
    found: dict[str, dict[str, Any]] = {mode: {"payload": {}} for mode in MODES}
    runs: dict[str, Callable[[], object]] = {}
    want = cell.scan(x, weights, state).states
    # builds the cell's code, which is part of no call's time
    parallel.forward(cell, x[:, :1], weights, state, mode="sequential")
    for mode in MODES:
        if mode in tried:
            found[mode].update(status="over_budget", message=f"over {settings.budget:g} s at fewer steps")
            continue
        run = functools.partial(parallel.forward, cell, x, weights, state, mode=mode)
        begin = time.perf_counter()
        try:
            got: Trajectory | None
            if mode == "parallel":
                made = parallel.attempt(cell, x, weights, state)
                found[mode]["payload"].update(rounds=made.rounds, change=made.change)
                got = made.trajectory
                if got is None:
                    raise ArithmeticError(f"did not converge in {made.rounds} rounds")
            else:
                got = run()
            error = float((got.states - want).norm() / want.norm())
            spent = time.perf_counter() - begin
            if not error <= TOLERANCE:
                raise ArithmeticError(
                    f"states differ from the loop's by {error:.1e} (tolerance {TOLERANCE:.0e})"
                )
        except Exception as failed:
            found[mode]["status"], found[mode]["message"] = failure(failed)
            continue
        found[mode]["payload"]["error"] = error
        if spent > settings.budget:
            tried.add(mode)
            message = f"{seconds_text(spent)} for one call, budget {settings.budget:g} s"
            found[mode].update(status="over_budget", message=message)
        else:
            runs[mode] = run
    for name, timing in measure.interleave(runs, device, case_seconds=settings.case_seconds).items():
        if isinstance(timing, Exception):
            found[name]["status"], found[name]["message"] = failure(timing)
        else:
            found[name].update(status="ok", timing=timing)
    return found


def run(path: Path, settings: Settings) -> list[Record]:
    """Measure every cell at every point, append a record of each mode to `path`, and return the records."""
    device = torch.device(settings.device)
    like = torch.empty(0, device=device)
    about = record.started("forward", device)
    made = []
    for name in settings.cells:
        for units in settings.hidden:
            for batch in settings.batches:
                tried: set[str] = set()
                for steps in sorted(settings.steps):
                    given = problem(CELLS[name](), units, batch, steps, settings.scale, settings.seed, like)
                    params = settings.params(name, units, batch, steps)
                    for mode, fields in measure_point(given, settings, tried).items():
                        made.append(
                            Record(algorithm=mode, params=params, time=record.now(), **about, **fields)
                        )
                        record.append(path, made[-1])
    return made


def _time(made: Record | None) -> str:
    if made is None:
        return ""
    if made.timing is None:
        return made.message.partition(",")[0] if made.status == "over_budget" else made.status
    return seconds_text(made.timing.median)


HEADINGS = (
    "cell",
    "N",
    "B",
    "T",
    "sequential",
    "parallel",
    "rounds",
    "auto",
    "sequential / parallel",
    "auto / best",
)


def rows(records: Sequence[Record]) -> list[list[str]]:
    """The rows under `HEADINGS`, one a point: median times of a call, and their ratios."""
    points: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        points.setdefault(tuple(r.params[name] for name in ("cell", "N", "B", "T")), {})[r.algorithm] = r
    out = []
    for point, by in points.items():
        loop, rounds, auto = (by.get(mode) for mode in ("sequential", "parallel", "auto"))
        timed = [r.timing.median for r in (loop, rounds) if r is not None and r.timing is not None]
        gain = f"{timed[0] / timed[1]:.2f}" if len(timed) == 2 else ""
        against = f"{auto.timing.median / min(timed):.2f}" if timed and auto and auto.timing else ""
        taken = "" if rounds is None else str(rounds.payload.get("rounds", ""))
        out.append([*map(str, point), _time(loop), _time(rounds), taken, _time(auto), gain, against])
    return out


def markdown(records: Sequence[Record]) -> str:
    """The table of measured times as Markdown, for the docs."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(records: Sequence[Record]) -> Table:
    """The table of measured times for a terminal."""
    threads = sorted({r.params["threads"] for r in records})
    out = Table(*HEADINGS, title=f"forward pass, seconds a call; threads: {', '.join(map(str, threads))}")
    for row in rows(records):
        out.add_row(*row)
    return out


# --- predicted for a GPU -----------------------------------------------------------------------------------

PREDICTED_AT = (64, 1, 4096)  # N, B, T
# The assumed rates of a GPU with a CUDA graph whose nodes wait for one another.
GRAPH = replace(cost.rates(devices.generic("gpu"), cuda_graph=True), name="GPU, CUDA graph (assumed)")
COUNT_STEPS = (8, 16)


@dataclass(frozen=True)
class Prediction:
    """One way to take a training step. parts: the work and the predicted seconds of each of its parts, by name."""

    name: str
    parts: dict[str, tuple[Work, float]]

    @property
    def work(self) -> Work:
        return functools.reduce(Work.__add__, (work for work, _ in self.parts.values()))

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts.values())


def _at(counts: Callable[[int], Work], steps: int) -> Work:
    """Work counted at two short lengths, extrapolated to `steps`. All of it is constant or proportional to T."""
    short, long = COUNT_STEPS
    few, more = counts(short), counts(long)
    return few + (more + few * -1.0) * ((steps - short) / (long - short))


def predict(units: int, batch: int, steps: int, scale: float, seed: int) -> tuple[list[Prediction], int]:
    """Ways to take a training step of an RGC in float32, and the rounds of the forward pass in parallel in time."""
    cell, x, weights, state = problem(RGCCell(), units, batch, steps, scale, seed, torch.empty(0))
    rounds = parallel.attempt(cell, x, weights, state).rounds
    about = parallel.forward_problem(cell, weights, (steps, batch, units), x.dtype, kernel=True)
    products = Work(flop=2.0 * batch * about.weight_numbers)  # of one step, with all matrices
    reading = Work(bytes=about.weight_numbers * about.item)

    def short(length: int) -> tuple[Trajectory, Tensor]:
        trajectory = cell.scan(x[:, :length], weights, state)
        return trajectory, torch.ones_like(trajectory.after)

    def backward(length: int, learning: str) -> Work:
        trajectory, delta = short(length)
        return cost.counted(
            lambda: functional.gradients(cell, trajectory, weights, delta, learning, backend="torch")
        )

    def dual(length: int) -> Work:
        """The backward pass without the scan's own calls, since a kernel runs the scan."""
        trajectory, delta = short(length)
        lin = cell.linearize(trajectory)
        m = rfp.transition(lin, cell.matrices, weights)
        scan = cost.counted(lambda: rfp.reverse_scan(m, delta))
        return backward(length, "rfp") + scan * -1.0

    numbers = steps * batch * units * about.item
    scan = Work(
        calls=2, bytes=2.0 * numbers * about.states * (about.states + 2), scan_steps=cost.kernel_steps(steps)
    )
    outer = products * steps  # the gradients of the weights
    of_dual = _at(dual, steps) + scan + outer
    of_bptt = _at(lambda length: backward(length, "bptt"), steps) + outer + (products + reading) * steps
    of_loop, of_rounds = replace(about, launch=False).sequential(), about.one_round() * rounds
    of_launch = replace(about, launch=True).sequential()

    def way(name: str, **parts: tuple[Work, cost.Rates]) -> Prediction:
        return Prediction(name, {part: (work, work.seconds(rates)) for part, (work, rates) in parts.items()})

    return [
        way("loop, BPTT; CUDA graph", forward=(of_loop, GRAPH), backward=(of_bptt, GRAPH)),
        way("loop, dual; CUDA graph", forward=(of_loop, GRAPH), backward=(of_dual, GRAPH)),
        way("one launch, dual; eager", forward=(of_launch, cost.GPU), backward=(of_dual, cost.GPU)),
        way("rounds, dual; eager", forward=(of_rounds, cost.GPU), backward=(of_dual, cost.GPU)),
    ], rounds


def record_prediction(path: Path, scale: float, seed: int) -> Record:
    """Predict at `PREDICTED_AT`, append the record to `path`, and return it."""
    units, batch, steps = PREDICTED_AT
    ways, rounds = predict(units, batch, steps, scale, seed)
    made = Record(
        **record.started("forward-predicted", f"{cost.GPU.name} (predicted)"),
        algorithm=ways[-1].name,
        params={"N": units, "B": batch, "T": steps, "scale": scale, "dtype": "float32", "seed": seed},
        status="ok",
        time=record.now(),
        predicted_seconds=ways[-1].seconds,
        payload={
            "predicted": True,
            "rounds": rounds,
            "ways": [
                {
                    "name": way.name,
                    "seconds": way.seconds,
                    "parts": [
                        {"part": part, "seconds": spent, **asdict(work)}
                        for part, (work, spent) in way.parts.items()
                    ],
                }
                for way in ways
            ],
            "rates": [asdict(cost.GPU), asdict(GRAPH)],
        },
    )
    record.append(path, made)
    return made


PREDICTED_HEADINGS = (
    "training step",
    "part",
    "launches",
    "dependent scan steps",
    "bytes",
    "predicted",
    "of the last",
)


def predicted_rows(made: Record) -> list[list[str]]:
    """The rows under `PREDICTED_HEADINGS`: the parts of each way, then their sum."""
    out = []
    for way in made.payload["ways"]:
        parts = way["parts"]
        total = {name: sum(part[name] for part in parts) for name in ("calls", "scan_steps", "bytes")}
        for part in [*parts, {"part": "all", "seconds": way["seconds"], **total}]:
            what, whole = part["part"], part["part"] == "all"
            if what == "forward" and way["name"].startswith("rounds"):
                what = f"forward, {made.payload['rounds']} rounds"
            counts = (f"{part['calls']:,.0f}", f"{part['scan_steps']:,.0f}", bytes_text(part["bytes"]))
            ratio = f"{way['seconds'] / made.payload['ways'][-1]['seconds']:.1f}" if whole else ""
            out.append([way["name"], what, *counts, seconds_text(part["seconds"]), ratio])
    return out


def predicted_markdown(made: Record) -> str:
    """The table of the prediction as Markdown, for the docs."""
    lines = [PREDICTED_HEADINGS, ["---"] * len(PREDICTED_HEADINGS), *predicted_rows(made)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def predicted_table(made: Record) -> Table:
    """The table of the prediction for a terminal."""
    p, (eager, graph) = made.params, made.payload["rates"]
    each = {name: seconds_text(eager[name]) for name in ("seconds_per_call", "seconds_per_scan_step")}
    in_graph = seconds_text(graph["seconds_per_call"])
    out = Table(
        *PREDICTED_HEADINGS,
        title=f"predicted for a GPU: RGC, N = {p['N']}, B = {p['B']}, T = {p['T']}, W ~ {p['scale']:g}/√N",
        caption=f"assumed: {each['seconds_per_call']} a launch, {in_graph} in a CUDA graph, "
        f"{each['seconds_per_scan_step']} a dependent scan step, {bytes_text(eager['bytes_per_second'])}/s, "
        f"{eager['flop_per_second'] / 1e12:g} TFLOP/s; nothing measured",
    )
    for row in predicted_rows(made):
        out.add_row(*row)
    return out
