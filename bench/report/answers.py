"""The questions that a reader has, and what the records answer: a sentence with its number, a picture, a table.

A question that the records can't answer is left out. Every number is computed from records when the page is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from ..harness.record import Record
from ..harness.tables import bytes_text, seconds_text
from ..peers.registry import PEERS
from ..scaling import powers
from ..scaling.cases import CASES
from .chart import Chart, Series

# Curves of the first picture: an algorithm and how it is drawn.
SHOWN = ("rfp-stream", "rfp-step", "rfp-dual", "bptt-autograd", "rtrl-heads", "rtrl")


@dataclass(frozen=True)
class Answer:
    """A question of the page.

    name, question     the anchor, and the heading
    text               the answer, in a sentence or two, its numbers from `records`
    charts, table      the pictures, and the numbers
    commands, records  what made the records, and the records
    """

    name: str
    question: str
    text: str
    charts: list[Chart] = field(default_factory=list)
    table: Table | None = None
    commands: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Devices and days of the records, in words."""
        devices = dict.fromkeys(r.device for r in self.records)
        days = sorted({r.run[:10] for r in self.records if r.run})
        return ", ".join([*devices, *(" to ".join(dict.fromkeys((days[0], days[-1]))) for _ in days[:1])])


def answers(records: Sequence[Record]) -> list[Answer]:
    """The answers to all questions, of which the records tell something. records: the last of each key."""
    made = (_is_it_n2(records), _exactness(records), _stream(records), _whom(records), _gpu(records))
    return [answer for answer in made if answer is not None]


def _sweep(records: Sequence[Record]) -> list[Record]:
    """The sweep of N with most records: one benchmark, device, B, T and number of threads."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for r in records:
        if r.benchmark == "scaling" and r.algorithm in (*SHOWN, powers.PASS):
            at = (r.device, *(r.params.get(name) for name in ("B", "T", "threads", "dtype")))
            groups.setdefault(at, []).append(r)
    return max(
        groups.values(),
        key=lambda mine: len({r.params["N"] for r in mine}) * 100 - mine[0].params["B"],
        default=[],
    )


def _curves(records: Sequence[Record], what: str) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, dict[float, float]] = {}
    for r in records:
        value = (r.timing.median if r.timing else None) if what == "time" else r.state_bytes
        if value:
            curves.setdefault(r.algorithm, {})[r.params["N"]] = value
    return {name: sorted(curves[name].items()) for name in SHOWN if name in curves}


def _is_it_n2(records: Sequence[Record]) -> Answer | None:
    mine = _sweep(records)
    fitted = {name: powers.slopes(mine, name, mine[0].params["B"]) for name in SHOWN} if mine else {}
    rfp, rtrl = fitted.get("rfp-step"), fitted.get("rtrl")
    if rfp is None or rfp["state"] is None:
        return None
    text = "Yes" if abs(rfp["state"].value - 2) < 0.05 else "Not here"
    text += f": what RFP keeps grows as N^{rfp['state'].value:.2f}"
    text += f", what exact RTRL keeps as N^{rtrl['state'].value:.2f}" if rtrl and rtrl["state"] else ""
    text += f". The work of a step, counted: RFP's N^{rfp['flop'].value:.2f}" if rfp["flop"] else ""
    text += f", RTRL's N^{rtrl['flop'].value:.2f}" if rfp["flop"] and rtrl and rtrl["flop"] else ""
    text += ". "
    levels = powers.levels(mine, "rfp-stream", mine[0].params["B"])
    if levels:
        told = ", ".join(f"{level.power} while Γ is in {level.name}" for level in levels)
        text += f"A stream's time over that of a pass over as many bytes has the power {told}: 0 means N². "
    times = [(CASES[name].label, found["time"]) for name, found in fitted.items()]
    told = "; ".join(f"{label}: {s}" for label, s in times if s is not None)
    if told:
        text += f"Powers of a step's time, caches and all, with their 95 % intervals: {told}."
    charts = []
    for what, label, words in (
        ("time", "seconds a step", seconds_text),
        ("state", "bytes of learning state", bytes_text),
    ):
        series = [
            Series(CASES[name].label, points, SHOWN.index(name))
            for name, points in _curves(mine, what).items()
        ]
        guides = {"rfp-stream": 2, "rtrl": 4 if what == "time" else 3}
        lines = {
            f"N{'²³⁴'[p - 2]}": (p, points[-1])
            for name, points in _curves(mine, what).items()
            for p in [guides.get(name)]
            if p
        }
        charts.append(Chart("N, units of the layer", label, series, words, lines))
    return Answer("n2", "Is it N²?", text, charts, None, _commands(mine), mine)


def _exactness(records: Sequence[Record]) -> Answer | None:
    mine = _sweep(records)
    at = {(r.algorithm, r.params["N"]): r.timing.median for r in mine if r.timing}
    ratio: dict[str, list[tuple[float, float]]] = {
        name: sorted(
            (n, at[name, n] / at["rfp-step", n]) for a, n in at if a == name and ("rfp-step", n) in at
        )
        for name in ("rtrl", "rtrl-heads")
    }
    if not any(ratio.values()):
        return None
    parts = []
    for name, words in (("rtrl", "exact RTRL of dense weights"), ("rtrl-heads", "of heads of √N units")):
        if ratio[name]:
            n, value = ratio[name][-1]
            parts.append(f"{words} takes {_times(value)} the time of RFP at N = {n:g}")
    text = "A step of " + ", and ".join(parts) + "."
    near = [
        r
        for r in records
        if r.benchmark == "fidelity" and r.algorithm == "rfp" and r.params.get("sweep") == "frontier"
    ]
    near = [
        r for r in near if r.params.get("cell") == "rgc" and all(c is not None for c in r.payload["cosines"])
    ]
    if near:
        values = [(r.params["scale"], sum(r.payload["cosines"]) / len(r.payload["cosines"])) for r in near]
        told = ", ".join(f"{cosine:.2f} for weights of {scale:g}/√N" for scale, cosine in sorted(set(values)))
        text += (
            f" The cosine of RFP's gradient with the exact one is {told} (RGC, N = {near[0].params['N']})."
        )
    series = [
        Series(CASES[name].label, points, SHOWN.index(name)) for name, points in ratio.items() if points
    ]
    chart = Chart(
        "N, units of the layer", "time of a step / RFP's", series, lambda value: f"{value:.3g} times"
    )
    return Answer(
        "exactness",
        "What does exactness cost?",
        text,
        [chart],
        None,
        _commands([*mine, *near]),
        [*mine, *near],
    )


def _peers(records: Sequence[Record], *, streams: bool) -> list[Record]:
    return [
        r for r in records
        if r.benchmark == "peers" and r.timing and r.algorithm in PEERS and r.params["threads"] == 1
        and (r.params["task"] == "rgc-stream" or not streams)
    ]  # fmt: skip


STREAMS = {
    "stream": "Stream, one call",
    "stream-adam": "Stream, one call, Adam",
    "stream-step": "Stream, step by step",
    "stream-learner": "loop over OnlineLearner",
    "jax-stream": "JAX, one scan",
}


def _stream(records: Sequence[Record]) -> Answer | None:
    mine = [r for r in _peers(records, streams=True) if r.algorithm in STREAMS]
    by: dict[str, dict[float, float]] = {}
    for r in mine:
        by.setdefault(r.algorithm, {})[r.params["N"]] = r.payload["step_seconds"]
    if "stream" not in by:
        return None
    sizes = sorted(by["stream"])
    n = min(sizes, key=lambda size: abs(math.log(size / 128)))
    step = by["stream"][n]
    text = f"A network of N = {n:g} takes {seconds_text(step)} a step, forward pass, learning and update: "
    text += f"{1 / step:,.0f} steps a second"
    others = [
        (STREAMS[name], by[name][n] / step)
        for name in ("stream-learner", "jax-stream")
        if n in by.get(name, {})
    ]
    text += (
        "".join(
            f", {'and ' * (k > 0)}{_times(ratio)} as fast as {'the ' * (k == 0)}{name}"
            for k, (name, ratio) in enumerate(others)
        )
        + "."
    )
    series = [
        Series(label, sorted(by[name].items()), k)
        for k, (name, label) in enumerate(STREAMS.items())
        if name in by
    ]
    chart = Chart("N, units of the layer", "seconds a step", series, seconds_text)
    return Answer("stream", "How fast is a stream?", text, [chart], None, _commands(mine), mine)


def _ours(name: str) -> bool:
    return PEERS[name].module.rpartition(".")[2] in ("ours", "streams")


def _whom(records: Sequence[Record]) -> Answer | None:
    mine = _peers(records, streams=False)
    points: dict[tuple[str, str, int, int, int], dict[bool, dict[str, float]]] = {}
    for r in mine:
        at = (r.params["task"], r.payload["gradient"], r.params["N"], r.params["B"], r.params["T"])
        assert r.timing is not None
        points.setdefault(at, {True: {}, False: {}})[_ours(r.algorithm)][r.algorithm] = r.timing.median
    table = Table(title="the fastest of ours against the fastest of the others that gives the same gradient")
    for heading in (
        "task",
        "gradient",
        "N",
        "B",
        "T",
        "ours",
        "time",
        "best of the others",
        "time",
        "theirs / ours",
    ):
        table.add_column(
            heading,
            justify="left" if heading in ("task", "gradient", "ours", "best of the others") else "right",
        )
    ratios, series = [], dict[str, list[tuple[float, float]]]()
    for (task, gradient, n, b, steps), found in sorted(points.items()):
        if found[True] and found[False]:
            us, them = (min(found[side], key=found[side].__getitem__) for side in (True, False))
            here, there = found[True][us], found[False][them]
            ratios.append(there / here)
            series.setdefault(f"{task}, {gradient}", []).append((n, there / here))
            table.add_row(
                task,
                gradient,
                str(n),
                str(b),
                str(steps),
                us,
                seconds_text(here),
                them,
                seconds_text(there),
                f"{there / here:.2f}",
            )
    if not ratios:
        return None
    won = sum(ratio > 1 for ratio in ratios)
    text = "Against the fastest other library that gives the same gradient, this one is faster in "
    text += f"{won} of {len(ratios)} comparisons and slower in {len(ratios) - won}: their time is "
    text += f"{min(ratios):.2g} to {_times(max(ratios))} ours."
    chart = Chart(
        "N, units of the layer",
        "their time / ours",
        [Series(name, sorted(p), k) for k, (name, p) in enumerate(series.items())],
        _times,
        line=1.0,
    )
    return Answer("whom", "Against whom?", text, [chart], table, _commands(mine), mine)


def _gpu(records: Sequence[Record]) -> Answer:
    mine = [r for r in records if r.params.get("device") == "cuda" and r.timing]
    if not mine:
        text = (
            "No record here is of a GPU. On a machine that has one, the command below makes a page like this."
        )
        return Answer("gpu", "On my GPU?", text, commands=["make gpu-check"])
    fastest = [r for r in mine if r.algorithm == "rfp-step"]
    devices = ", ".join(dict.fromkeys(r.device for r in mine))
    text = f"{len(mine)} measurements are of {devices}."
    if fastest:
        last = max(fastest, key=lambda r: r.params["N"])
        assert last.timing is not None
        text += f" An online step of N = {last.params['N']}, B = {last.params['B']} takes "
        text += f"{seconds_text(last.timing.median)} there."
    series = [
        Series(CASES[name].label, points, SHOWN.index(name)) for name, points in _curves(mine, "time").items()
    ]
    charts = [Chart("N, units of the layer", "seconds a step", series, seconds_text)] if series else []
    return Answer("gpu", "On my GPU?", text, charts, None, _commands(mine), mine)


def _times(ratio: float) -> str:
    """A ratio in words, to two digits: 0.45 times, 4,900 times."""
    digits = 1 - math.floor(math.log10(ratio))
    return f"{round(ratio, digits):,.{max(0, digits)}f} times"


def _commands(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r.command for r in records if r.command))
