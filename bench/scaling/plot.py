"""Draw the scaling sweep: time per step and memory against N, with guide slopes and fitted powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record, latest
from ..harness.statistics import Slope
from ..harness.style import DASHED, SOLID, STYLE, Dashes, Look, save, unmixed, where
from . import powers
from .cases import CASES

# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that differ in grey prints.
LOOKS = {
    "rfp-stream": Look("#117733", ">"),
    "rfp-step": Look("#0072B2", "o"),
    "rfp-step-gamma": Look("#56B4E9", "v"),
    "pass": Look("#999999", "x"),
    "rfp-lazy": Look("#332288", "p", DASHED),
    "rfp-chunk": Look("#009E73", "s", DASHED),
    "rfp-history": Look("#44AA99", "h"),
    "rfp-dual": Look("#CC79A7", "D"),
    "bptt": Look("#E69F00", "^", DASHED),
    "bptt-autograd": Look("#D55E00", "P"),
    "tbptt": Look("#F0E442", "X", DASHED),
    "rtrl": Look("#000000", "*"),
    "rtrl-heads": Look("#882255", "d", (0, (1, 1.5))),
}
GUIDES = {2: "N²", 3: "N³", 4: "N⁴"}


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the plot as PNG (150 dpi) and SVG beside each other; `path` with either ending or none.

    records must be of the benchmark "scaling", and of one device, B, T and dtype; else ValueError says which are mixed.
    Returns the two paths. Filled markers are measured; hollow ones are predicted and were not run.
    """
    records, path = latest(records), Path(path)
    title = _title(records)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 8.8))
        figure.subplots_adjust(left=0.06, right=0.965, bottom=0.345, top=0.925, wspace=0.2)
        _time_panel(left, records)
        _memory_panel(right, records)
        figure.suptitle(title, fontsize=12.5)
        return save(figure, path)


def _title(records: Sequence[Record]) -> str:
    """The title, with device, B, T and dtype. Raises ValueError if there are no records, or several of one of these."""
    records = unmixed(records, "scaling", {"batch sizes B": "B", "lengths T": "T", "dtypes": "dtype"})
    p = records[0].params
    return f"RGC layer, one training pass  ·  {where(records)}  ·  B = {p['B']}, T = {p['T']}, {p['dtype']}"


def _time_panel(axes: Axes, records: Sequence[Record]) -> None:
    handles, batch = [], records[0].params["B"]
    for name in CASES:
        mine = powers.of(records, name, batch)
        timed = {r.params["N"]: r.timing for r in mine if r.timing}
        look = LOOKS[name]
        if timed:
            below, above = zip(*((t.median - t.p20, t.p80 - t.median) for t in timed.values()), strict=True)
            axes.errorbar(
                list(timed),
                [t.median for t in timed.values()],
                yerr=[below, above],
                color=look.colour,
                marker=look.marker,
                markersize=6,
                linewidth=1.6,
                elinewidth=1,
                capsize=2,
            )
            handles.append(_handle(name, {"": powers.slopes(mine, name, batch)["time"]}, SOLID))
        _hollow(axes, [(r.params["N"], r.predicted_seconds) for r in mine if not r.timing], look)
    _finish(
        axes,
        "time per step [s]",
        records,
        handles,
        2,
        "p of a + b·Nᵖ with its 95 % interval, where the points tell it",
    )
    _mark_crossings(axes, records)


def _memory_panel(axes: Axes, records: Sequence[Record]) -> None:
    handles, batch = [], records[0].params["B"]
    for name in CASES:
        mine = powers.of(records, name, batch)
        # a pass learns nothing, and "Γ alone" needs the same memory as rfp-step
        if not mine or name in (powers.PASS, "rfp-step-gamma"):
            continue
        look = LOOKS[name]
        counted = {r.params["N"]: r.state_bytes for r in mine if r.state_bytes}
        axes.plot(
            list(counted), list(counted.values()), color=look.colour, linestyle=look.line, linewidth=1.8
        )
        measured = {r.params["N"]: r.peak_bytes for r in mine if r.peak_bytes}
        axes.plot(
            list(measured),
            list(measured.values()),
            linestyle="none",
            marker=look.marker,
            color=look.colour,
            alpha=0.45,
            markersize=6,
        )
        found = powers.slopes(mine, name, batch)
        handles.append(_handle(name, {"state ": found["state"], "  peak ": found["peak"]}, look.line))
        _hollow(axes, [(r.params["N"], r.predicted_peak_bytes) for r in mine if not r.peak_bytes], look)
    note = "line: learning state, counted; marker: peak, measured"
    _finish(axes, "memory [bytes]", records, handles, 1, note)


def _hollow(axes: Axes, points: Sequence[tuple[int, float | None]], look: Look) -> None:
    """Draw predicted points as hollow markers."""
    known = [(n, y) for n, y in points if y]
    axes.plot(
        [n for n, _ in known],
        [y for _, y in known],
        linestyle="none",
        marker=look.marker,
        markersize=8,
        markerfacecolor="white",
        markeredgecolor=look.colour,
        markeredgewidth=1.3,
    )


def _handle(name: str, slopes: dict[str, Slope | None], line: Dashes) -> Line2D:
    """An entry of the legend: line, marker, name, and the fitted powers with their intervals."""
    label, look = CASES[name].label, LOOKS[name]
    for what, slope in slopes.items():
        if slope is not None:
            label += f"  {what}$N^{{{slope.value:.2f} \\pm {slope.half_width:.2f}}}$"
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle=line, linewidth=1.8, label=label)


def _finish(
    axes: Axes, y_label: str, records: Sequence[Record], handles: Sequence[Line2D], columns: int, note: str
) -> None:
    """Set the scales, draw the guides within the limits of the data, and put the legend below the panel."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("N, units of the layer")
    axes.set_ylabel(y_label)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    _guides(axes)
    if any(r.status in ("oom", "over_budget") for r in records):
        note += "; hollow: predicted, not run"
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.11),
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        title=note,
        title_fontsize=8.5,
        handlelength=2.6,
        columnspacing=2.5,
    )


def _guides(axes: Axes) -> None:
    """Draw dashed lines N², N³ and N⁴ from the lower left corner of the data, labelled where they leave the panel."""
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    for power, label in GUIDES.items():
        x_end = min(x_high, x_low * (y_high / y_low) ** (1 / power))
        y_end = y_low * (x_end / x_low) ** power
        axes.plot([x_low, x_end], [y_low, y_end], color="0.6", linestyle=(0, (5, 4)), linewidth=1, zorder=0.5)
        over_top = math.isclose(y_end, y_high, rel_tol=1e-6)
        axes.annotate(
            label, (x_end, y_end), color="0.4", annotation_clip=False, textcoords="offset points",
            xytext=(0, 3) if over_top else (4, 0), ha="center" if over_top else "left",
            va="bottom" if over_top else "center",
        )  # fmt: skip
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)


def _mark_crossings(axes: Axes, records: Sequence[Record]) -> None:
    """Mark with a ring and a letter where two curves cross for the last time; the upper left says which curves."""
    lines: list[str] = []
    for letter, (a, b, n, low, high, y) in zip(
        "abc", powers.crossings(records, records[0].params["B"]), strict=False
    ):
        lines.append(
            f"{letter}   {CASES[a].label} = {CASES[b].label} at N ≈ {n:.0f} ({low:.0f} to {high:.0f})"
        )
        axes.plot([n], [y], marker="o", markersize=12, markerfacecolor="none", markeredgecolor="0.2")
        axes.annotate(letter, (n, y), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.text(0.02, 0.98, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=9, color="0.2")
