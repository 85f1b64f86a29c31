"""`rjepa theory`: compares Theorem 1 and Appendix B with what docs/theory.md derives; its records and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .. import _checks as check
from ..bench.harness import record
from ..bench.harness.record import Record
from . import theory
from .theory import DTYPE, Covariances, Weights

FILE = "theory.jsonl"
SIZE, HIDDEN = 10, 6  # d and m
ETA = 0.02
CORRELATION = 0.8  # between steps of `theory.white`
ENTRY = (0, 0, 1, 1)
MOMENTS = ("T(0,0,0)", "T(0,1,1)", "T(1,2,2)")
TAUS = (0.4, 0.2, 0.1, 0.05)
Z_99 = 2.576  # half the width of a 99 % interval of the normal distribution


@dataclass(frozen=True)
class Case:
    """One setting of linear R-JEPA, which learns from several draws of input and weights.

    study          a key of UNTIL
    input          a key of `theory.INPUTS`
    decays         τ of each area
    eta            weight decay η
    scale          of the initial weights (`theory.ordinary`)
    stop_gradient, first_order   as in `theory.flow` and `theory.covariances`
    """

    study: str
    input: str
    decays: tuple[float, ...]
    eta: float = ETA
    scale: float = 1.0
    stop_gradient: bool = True
    first_order: bool = False


# What each study runs, and up to which learning time.
BALANCE = [
    *(Case("balance", name, (tau,)) for name, tau in product(theory.INPUTS, (0.0, 0.3, 0.7))),
    Case("balance", "white, uneven rates", (0.0, 0.0)),
    Case("balance", "coloured, non-commuting", (0.3, 0.7)),
]
FIRST_ORDER = [
    Case("first-order", name, (tau,), first_order=first)
    for name, tau in (("white", 0.7), ("coloured", 0.3), ("coloured", 0.7), ("coloured, non-commuting", 0.3))
    for first in (False, True)
]
START = [
    Case("start", name, (0.3,), eta, scale)
    for name in ("white", "coloured, non-commuting")
    for eta, scale in ((ETA, 1.0), (0.0, 1.0), (0.0, 0.02), (ETA, 0.005))
]
STOP = [
    Case("stop-gradient", name, (0.3,), eta, stop_gradient=stop)
    for name, eta, stop in product(("white", "coloured, non-commuting"), (0.0, ETA), (True, False))
]
VALUES = [
    Case("values", "white", (0.0,), eta, 2.0) for eta in (0.01, 0.02, 0.04, 0.08, 0.12, 0.15, 0.17, 0.2)
]
UNTIL = {"balance": 500, "first-order": 50, "start": 500, "stop-gradient": 100, "values": 1000}
# The learning time at which the rate of the gap is read, before the gap is mere rounding.
RATE_AT = {"balance": 200, "first-order": 50}


def run(
    file: Path, seeds: int = 5, samples: int = 400_000, say: Callable[[str], None] = print
) -> list[Record]:
    """Run all studies, write the records to `file` in place of its old content, and return them.

    seeds: draws of input and weights, at least 2. samples: chains from which Appendix B's moments are estimated, at
    least 1,000. say: called with a line on each study when it begins.
    """
    check.integer("--seeds", seeds, 2)
    check.integer("--samples", samples, 1000)
    about = record.started("theory", torch.device("cpu"))
    records = [
        Record(
            **about,
            algorithm=name,
            params={**params, "dtype": "float64", "device": "cpu"},
            status="ok",
            time=record.now(),
            payload=payload,
        )
        for name, params, payload in _everything(seeds, samples, say)
    ]
    file.unlink(missing_ok=True)
    for made in records:
        record.append(file, made)
    return records


def _everything(
    seeds: int, samples: int, say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for cases in (BALANCE, FIRST_ORDER, START, STOP, VALUES):
        study = cases[0].study
        say(f"{study}: {len(cases)} settings, {seeds} seeds, to learning time {UNTIL[study]}")
        for case, payload in _learn(cases, seeds):
            yield study, {**asdict(case), "seeds": seeds, "d": SIZE, "m": HIDDEN}, payload
    say(f"Appendix B: {len(TAUS)} decays, {samples:,} chains each")
    for seed, tau in enumerate(TAUS):
        yield "moments", {"tau": tau, "samples": samples, "entry": list(ENTRY)}, _moments(tau, samples, seed)


def _learn(cases: Sequence[Case], seeds: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The payload of each case. Cases with the same number of areas and the same gradient learn as one batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products of matrices this small take longer on several threads
    try:
        yield from _batches(cases, seeds)
    finally:
        torch.set_num_threads(threads)


def _batches(cases: Sequence[Case], seeds: int) -> list[tuple[Case, dict[str, Any]]]:
    until = UNTIL[cases[0].study]
    times = [0.0, *(until * k / 50 for k in range(1, 51))]
    done: dict[Case, dict[str, Any]] = {}
    for areas, stop, first in dict.fromkeys(map(_kind, cases)):
        mine = [c for c in cases if _kind(c) == (areas, stop, first)]
        drawn = [(c, seed) for c in mine for seed in range(seeds)]
        inputs = [theory.INPUTS[c.input](SIZE, seed) for c, seed in drawn]
        z = theory.stack(
            [theory.covariances(x, c.decays, first) for x, (c, _) in zip(inputs, drawn, strict=True)]
        )
        starts = [theory.ordinary(SIZE, HIDDEN, areas, seed, c.scale) for c, seed in drawn]
        start = Weights(
            torch.cat([s.predictor for s in starts]),
            tuple(map(torch.cat, zip(*(s.areas for s in starts), strict=True))),
        )
        eta = torch.tensor([c.eta for c, _ in drawn], dtype=DTYPE)[:, None, None]
        path = theory.flow(start, z, eta, times, stop)
        for n, case in enumerate(mine):
            done[case] = _payload(case, times, path, z, slice(n * seeds, (n + 1) * seeds))
    return [(case, done[case]) for case in cases]


def _kind(case: Case) -> tuple[int, bool, bool]:
    return len(case.decays), case.stop_gradient, case.first_order


def _payload(
    case: Case, times: Sequence[float], path: Sequence[Weights], z: Covariances, rows: slice
) -> dict[str, Any]:
    """The results of a case: curves are means over seeds; numbers at the end of learning are lists by seed.

    path: the weights at each of `times`; rows: the part of the batch that belongs to the case.
    """
    z = Covariances(*(part[rows] for part in z))
    path = [Weights(w.predictor[rows], tuple(area[rows] for area in w.areas)) for w in path]
    grams = [theory.gram(w) for w in path]
    gaps = torch.stack([(a - b).norm(dim=(-2, -1)) for a, b in grams])
    covariances = [theory.representation(w, z) for w in path]
    (predicted, encoded), last = grams[-1], covariances[-1]
    found = {
        "times": list(times),
        "gap": _numbers((gaps / gaps[0]).log().mean(1).exp()),
        "cosine": _numbers(torch.stack([theory.cosine(a, b) for a, b in grams]).mean(1)),
        "power": _numbers(torch.stack([w.encoder.square().sum((-2, -1)) for w in path]).mean(1)),
        "trace": _numbers(torch.stack([_trace(c).mean() for c in covariances])),
        "cosine_start": _numbers(theory.cosine(*grams[0])),
        "cosine_end": _numbers(theory.cosine(predicted, encoded), 16),
        "cosine_covariance": _numbers(theory.cosine(predicted, last)),
        "trace_end": _numbers(_trace(last)),
        "rank": _numbers(_trace(last) ** 2 / last.square().sum((-2, -1))),
    }
    if case.study in RATE_AT:
        at = times.index(RATE_AT[case.study])
        found["rate"] = _numbers(-(gaps[at] / gaps[0]).log() / (2 * case.eta * times[at]), 10)
    if case.study == "stop-gradient":
        found["bound"] = _numbers(2 * (theory.collapse_rate(z) + case.eta))
    if case.study == "values":
        found["values"] = [
            _numbers(torch.linalg.svdvals(part).reshape(-1), 10)
            for part in (path[-1].predictor, path[-1].areas[0])
        ]
    return found


def _moments(tau: float, samples: int, seed: int) -> dict[str, Any]:
    """Appendix B at U = τ diag(1, .8, .6): one entry, exact, sampled and by the paper's formula; and norms.

    "orders" are the powers of τ with which the norms grow, from τ/2 to τ.
    """
    noise = torch.tensor([[1.0, 0.5, 0.2], [0.5, 0.8, -0.3], [0.2, -0.3, 0.6]], dtype=DTYPE)
    shape = torch.diag(torch.tensor([1.0, 0.8, 0.6], dtype=DTYPE))

    def norms(at: float) -> dict[str, Tensor]:
        recurrence = at * shape
        exact = theory.fourth_moments(recurrence, noise)
        kinds = {
            "exact": exact,
            "paper": theory.papers_fourth_moments(recurrence, noise),
            "connected": theory.connected(exact, recurrence, noise),
        }
        return {kind: torch.stack([m.norm() for m in moments]) for kind, moments in kinds.items()}

    recurrence = tau * shape
    drawn = theory.sampled_fourth_moments(recurrence, noise, ENTRY, samples, seed)
    here, half = norms(tau), norms(tau / 2)
    return {
        "exact": [float(m[ENTRY]) for m in theory.fourth_moments(recurrence, noise)],
        "paper": [float(m[ENTRY]) for m in theory.papers_fourth_moments(recurrence, noise)],
        "sampled": _numbers(drawn.mean(1)),
        "interval": _numbers(Z_99 * drawn.std(1) / samples**0.5),
        "norms": {kind: _numbers(value) for kind, value in here.items()},
        "orders": {kind: _numbers((here[kind] / half[kind]).log2()) for kind in here},
    }


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _numbers(values: Tensor, digits: int = 6) -> list[float | None]:
    """The values as floats with so many digits; None if undefined, such as the cosine of zero matrices."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]


# --- tables ------------------------------------------------------------------------------------------------


def select(records: Sequence[Record], study: str) -> list[Record]:
    """The records of one study. Raises ValueError if there are none."""
    found = [r for r in record.latest(records) if r.benchmark == "theory" and r.algorithm == study]
    if not found:
        raise ValueError(f"there are no records of {study!r} of `rjepa theory`")
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables: balance, first-order gradient, first weights, stop-gradient, singular values, moments and orders."""
    return [
        _balance(select(records, "balance")),
        _first_order(select(records, "first-order")),
        _start(select(records, "start")),
        _stop(select(records, "stop-gradient")),
        _values(select(records, "values")),
        _entries(select(records, "moments")),
        _orders(select(records, "moments")),
    ]


def decays_text(params: dict[str, Any]) -> str:
    """τ of each area as text, such as "0.3, 0.7"."""
    return ", ".join(f"{tau:g}" for tau in params["decays"])


def _balance(records: Sequence[Record]) -> Table:
    table = _table(
        f"What W comes to, η = {ETA:g}",
        ("input", "τ", "cos(WᵀW, PPᵀ)", "gap's rate / 2η", "cos(WᵀW, HHᵀ)", "directions"),
    )
    for r in records:
        p, found = r.params, r.payload
        off = max(found["rate"], key=lambda value: abs(value - 1))
        table.add_row(
            p["input"],
            decays_text(p),
            f"{min(found['cosine_end']):.6f}",
            f"{off:.6f}",
            _spread(found["cosine_covariance"], 3),
            f"{statistics.fmean(found['rank']):.1f}",
        )
    return table


def _first_order(records: Sequence[Record]) -> Table:
    table = _table(
        f"The first-order gradient, η = {ETA:g}, s = {UNTIL['first-order']}",
        ("input", "τ", "gradient", "gap, of its start", "cos(WᵀW, PPᵀ)", "tr HHᵀ"),
    )
    for r in records:
        found = r.payload
        table.add_row(
            r.params["input"],
            decays_text(r.params),
            "first-order" if r.params["first_order"] else "whole",
            f"{found['gap'][-1]:.3g}",
            _spread(found["cosine_end"], 3),
            _size(found["trace"][-1]),
        )
    return table


def _start(records: Sequence[Record]) -> Table:
    table = _table(
        f"First weights and weight decay, s = {UNTIL['start']}",
        ("input", "η", "first weights × ", "cos(WᵀW, PPᵀ) at first", "at the end", "tr HHᵀ at the end"),
    )
    for r in records:
        found = r.payload
        gone = max(found["trace_end"]) < 1e-6
        table.add_row(
            r.params["input"],
            f"{r.params['eta']:g}",
            f"{r.params['scale']:g}",
            _spread(found["cosine_start"], 3),
            "-" if gone else _spread(found["cosine_end"], 4),
            _size(statistics.fmean(found["trace_end"])),
        )
    return table


def _stop(records: Sequence[Record]) -> Table:
    table = _table(
        f"Stop-gradient, s = {UNTIL['stop-gradient']}",
        (
            "input",
            "η",
            "stop-gradient",
            "tr HHᵀ at first",
            "at the end",
            "rate of tr PPᵀ",
            "at least 2(λ + η)",
        ),
    )
    for r in records:
        found, stop = r.payload, r.params["stop_gradient"]
        rate = -math.log(found["power"][-1] / found["power"][0]) / found["times"][-1]
        table.add_row(
            r.params["input"],
            f"{r.params['eta']:g}",
            "yes" if stop else "no",
            f"{found['trace'][0]:.3g}",
            _size(found["trace"][-1]),
            "-" if stop else f"{rate:.3f}",
            "-" if stop else f"{min(found['bound']):.3f}",
        )
    return table


def alive(made: Record) -> list[float]:
    """The singular values of W and P that have not gone to zero, of all seeds of a record of the study "values"."""
    roots = theory.surviving(CORRELATION, made.params["eta"])
    return [value for part in made.payload["values"] for value in part if roots and value > roots[1]]


def _values(records: Sequence[Record]) -> Table:
    table = _table(
        f"Singular values of W and P, white input, τ = 0, ρ = {CORRELATION:g}, so ρ²/4 = {CORRELATION**2 / 4:g}",
        ("η", "predicted", "found", "largest difference", f"alive of {HIDDEN}", "largest of the others"),
    )
    for r in records:
        roots = theory.surviving(CORRELATION, r.params["eta"])
        living = alive(r)
        rest = sorted(value for part in r.payload["values"] for value in part)[: -len(living) or None]
        table.add_row(
            f"{r.params['eta']:g}",
            f"{roots[0]:.5f}" if roots else "0",
            f"{statistics.fmean(living):.5f}" if living else "0",
            f"{max(abs(value - roots[0]) for value in living):.1e}" if living and roots else "-",
            f"{len(living) / 2 / r.params['seeds']:.1f}",
            f"{max(rest):.1e}" if rest else "-",
        )
    return table


def _entries(records: Sequence[Record]) -> Table:
    table = _table(
        f"Appendix B's moments, entry {''.join(str(n + 1) for n in ENTRY)}, U = τ diag(1, .8, .6)",
        ("τ", "moment", "exact", "sampled, 99 % interval", "paper's formula"),
    )
    for r in records:
        found = r.payload
        for n, name in enumerate(MOMENTS):
            table.add_row(
                f"{r.params['tau']:g}",
                name,
                f"{found['exact'][n]:.4f}",
                f"{found['sampled'][n]:.4f} ± {found['interval'][n]:.4f}",
                f"{found['paper'][n]:.4f}",
            )
    return table


def _orders(records: Sequence[Record]) -> Table:
    tau, orders = records[-1].params["tau"], records[-1].payload["orders"]
    table = _table(
        f"Powers of τ that the norms grow with, from τ = {tau / 2:g} to {tau:g}",
        ("moment", "exact", "connected part", "paper's formula"),
    )
    for n, name in enumerate(MOMENTS):
        table.add_row(name, *(f"{orders[kind][n]:.2f}" for kind in ("exact", "connected", "paper")))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column.strip(), no_wrap=True)
    return table


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean over seeds and, if they differ as written, the least and the greatest."""
    low, high, mean = (
        f"{value:.{digits}f}" for value in (min(values), max(values), statistics.fmean(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _size(value: float) -> str:
    return f"{value:.3g}" if value > 1e-3 else f"{value:.0e}"
