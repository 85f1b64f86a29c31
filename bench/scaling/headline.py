"""The one picture of the scaling sweep: time and memory of RFP, BPTT and exact RTRL against N, and three numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record, latest
from ..harness.style import DASHED, SOLID, STYLE, Look, save, unmixed, where
from ..harness.tables import bytes_text
from . import powers


@dataclass(frozen=True)
class Curve:
    """An algorithm of the picture: how it is drawn, and the powers of N that its time and memory are meant to have."""

    name: str
    label: str
    look: Look
    time: int | None
    memory: int | None


CURVES = (
    Curve("rtrl", "exact RTRL", Look("#000000", "*", SOLID), 4, 3),
    Curve("rfp-stream", "RFP", Look("#0072B2", "o", SOLID), 2, 2),
    Curve("bptt", "BPTT", Look("#D55E00", "^", DASHED), None, None),
)
GUIDES = {2: "N²", 3: "N³", 4: "N⁴"}
GUIDE = (0, (1.5, 1.5))
LARGE = 1024  # N at which memory, and the times of RFP and BPTT, are compared
GROWN = (
    4.0  # a guide starts where its curve is so many times its least value: on the left of it, calls cost most
)


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the picture as PNG and SVG; `path` with either ending or none. Returns the two paths.

    records must be of the benchmark "scaling", and of one device, B, T and dtype; else ValueError says which are mixed,
    or which of the three algorithms is missing. Filled markers are measured; hollow ones are predicted and were not
    run.
    """
    records = unmixed(latest(records), "scaling", {"batch sizes B": "B", "lengths T": "T", "dtypes": "dtype"})
    if untimed := missing(records):
        raise ValueError(
            f"the picture needs times of {', '.join(c.name for c in CURVES)}; missing: {', '.join(untimed)}"
        )
    with plt.rc_context({**STYLE, "font.size": 12}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.8))
        figure.subplots_adjust(left=0.085, right=0.955, bottom=0.29, top=0.865, wspace=0.33)
        for curve in CURVES:
            measured = _timed(records, curve)
            predicted = _known(records, curve, "predicted_seconds", measured)
            _line(left, curve, measured, predicted, curve.time)
            measured = _known(records, curve, "peak_bytes", {})
            predicted = _known(records, curve, "predicted_peak_bytes", measured)
            _line(right, curve, measured, predicted, curve.memory)
        _finish(left, "seconds a time step", "time")
        _finish(right, "bytes at the peak", "memory")
        left.legend(loc="upper left", frameon=False, handlelength=2.4)
        right.legend(handles=_marks(), loc="upper left", frameon=False, handlelength=2.4, fontsize=10.5)
        figure.text(0.02, 0.02, "\n".join(numbers(records)), fontsize=12, va="bottom", linespacing=1.5)
        p = records[0].params
        figure.suptitle(
            f"Learning of a recurrent layer of N units, {where(records)}, B = {p['B']}: Recurrent Forward Propagation "
            f"(RFP)\nand exact RTRL at every time step, BPTT over {p['T']} steps",
            fontsize=11.5,
        )
        return save(figure, Path(path))


def missing(records: Sequence[Record]) -> list[str]:
    """The algorithms of the picture that have no time in these records."""
    return [curve.name for curve in CURVES if not _timed(records, curve)]


def numbers(records: Sequence[Record]) -> list[str]:
    """The three sentences below the picture, as far as the records tell them: each with its number."""
    rtrl, rfp, bptt = (_timed(records, curve) for curve in CURVES)
    out = []
    both = sorted(rtrl.keys() & rfp.keys())
    if both:
        n = both[-1]
        out.append(f"N = {n}: a step of exact RTRL takes {rtrl[n] / rfp[n]:,.0f} times as long as RFP's.")
    memory = [
        {**_known(records, curve, "predicted_peak_bytes", {}), **_known(records, curve, "peak_bytes", {})}
        for curve in CURVES
    ]
    at = [n for n in memory[0].keys() & memory[1].keys() if n <= LARGE]
    if at:
        n = max(at)
        would = "would need" if n not in _known(records, CURVES[0], "peak_bytes", {}) else "needs"
        out.append(f"N = {n}: RTRL {would} {bytes_text(memory[0][n])}, RFP {bytes_text(memory[1][n])}.")
    both = [n for n in rfp.keys() & bptt.keys() & memory[1].keys() & memory[2].keys() if n <= LARGE]
    if both:
        n, steps = max(both), records[0].params["T"]
        out.append(
            f"N = {n}: RFP takes {rfp[n] / bptt[n]:.1f} times as long as BPTT and {memory[1][n] / memory[2][n]:.1f} "
            f"times its memory over {steps} steps, which grows with them."
        )
    return out


def _timed(records: Sequence[Record], curve: Curve) -> dict[int, float]:
    return {r.params["N"]: r.timing.median for r in _mine(records, curve) if r.timing}


def _known(records: Sequence[Record], curve: Curve, field: str, but: Mapping[int, float]) -> dict[int, float]:
    """A field's values by N, at the N that aren't in `but`."""
    found = {r.params["N"]: getattr(r, field) for r in _mine(records, curve)}
    return {n: value for n, value in found.items() if value and n not in but}


def _mine(records: Sequence[Record], curve: Curve) -> list[Record]:
    return powers.of(records, curve.name, records[0].params["B"])


def _line(
    axes: Axes, curve: Curve, measured: Mapping[int, float], predicted: Mapping[int, float], power: int | None
) -> None:
    look = curve.look
    axes.plot(
        list(measured), list(measured.values()), color=look.colour, marker=look.marker, linestyle=look.line,
        linewidth=2.2, markersize=6, label=curve.label,
    )  # fmt: skip
    axes.plot(
        list(predicted), list(predicted.values()), linestyle="none", marker=look.marker, markersize=7,
        markerfacecolor="white", markeredgecolor=look.colour,
    )  # fmt: skip
    if power is None or len(measured) < 2:
        return
    whole = {**measured, **predicted}
    least = min(measured.values())
    start = min((n for n, y in measured.items() if y >= GROWN * least), default=max(measured))
    ends = [start, max(whole)]
    along = [measured[start] * (n / start) ** power for n in ends]
    axes.plot(ends, along, color="0.55", linestyle=GUIDE, linewidth=1.3, zorder=0.5)
    axes.annotate(
        GUIDES[power], (ends[-1], along[-1]), xytext=(5, 0), textcoords="offset points", va="center", color="0.3",
        annotation_clip=False,
    )  # fmt: skip


def _marks() -> list[Line2D]:
    """Entries of a legend that say what isn't a measured curve."""
    guide = Line2D([], [], color="0.55", linestyle=GUIDE, linewidth=1.3, label="a power of N")
    hollow = Line2D(
        [], [], linestyle="none", marker="*", markersize=7, markerfacecolor="white", markeredgecolor="black",
        label="predicted, not run",
    )  # fmt: skip
    return [guide, hollow]


def _finish(axes: Axes, y_label: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("N, units of the layer")
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=12, loc="left")
    axes.grid(True, which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
