"""Draw `rjepa bench memory`: peak bytes against T, N and B, measured (markers) on top of predicted (lines)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record
from ..harness.statistics import crossovers
from ..harness.style import STYLE, save, unmixed, where
from ..harness.tables import bytes_text
from . import memory
from .cases import CASES
from .plot import LOOKS

WORDS = {"T": "T, steps of the sequence", "N": "N, units of the layer", "B": "B, rows of the batch"}
RINGED = ("bptt-autograd", "rfp-step")


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the panels as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    Raises ValueError without records, where no sweep has two points, or for several devices or backends.
    """
    records = unmixed(records, "memory", {"backends": "backend"})
    base = memory.base_of(records)
    sweeps = [what for what in WORDS if len({r.params[what] for r in memory.swept(records, what)}) > 1]
    if not sweeps:
        raise ValueError("no sweep of the benchmark 'memory' has two points to draw a curve through")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(sweeps), figsize=(4.6 * len(sweeps) + 1, 5.8), squeeze=False)
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.27, top=0.86, wspace=0.22)
        for axes, what in zip(panels[0], sweeps, strict=True):
            _panel(axes, records, what)
            axes.set_title(
                ", ".join(f"{name} = {base[name]}" for name in WORDS if name != what), fontsize=10.5
            )
            axes.set_xlabel(WORDS[what])
        panels[0][0].set_ylabel("peak bytes")
        shown = [name for name in CASES if any(r.algorithm == name for r in records)]
        handles = [
            Line2D([], [], color=LOOKS[name].colour, marker=LOOKS[name].marker, label=CASES[name].label)
            for name in shown
        ]
        figure.legend(
            handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9.5,
            title=f"line: predicted; marker: measured; ring: {CASES[RINGED[0]].label} passes {CASES[RINGED[1]].label}",
            title_fontsize=9,
        )  # fmt: skip
        figure.suptitle(f"Peak memory of learning, RGC, float32  ·  {where(records)}", fontsize=12)
        return save(figure, Path(path))


def _panel(axes: Axes, records: Sequence[Record], what: str) -> None:
    for name in CASES:
        predicted = memory.curve(records, what, name, "predicted_peak_bytes")
        measured = memory.curve(records, what, name, "peak_bytes")
        look = LOOKS[name]
        axes.plot(
            list(predicted), list(predicted.values()), color=look.colour, linestyle=look.line, linewidth=1.6
        )
        axes.plot(
            list(measured), list(measured.values()), linestyle="none", marker=look.marker, color=look.colour,
            markersize=6, alpha=0.8,
        )  # fmt: skip
    curves = [memory.curve(records, what, name, "peak_bytes") for name in RINGED]
    for x, y in crossovers(*curves):
        axes.plot([x], [y], marker="o", markersize=14, markerfacecolor="none", markeredgecolor="0.2")
        axes.annotate(
            f"{what} ≈ {x:.0f}", (x, y), xytext=(8, -14), textcoords="offset points", fontsize=9, color="0.2"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: bytes_text(value)))
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
