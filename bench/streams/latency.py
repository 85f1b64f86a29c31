"""Draw `rjepa bench online`: the part of the steps that takes longer than a given time, in one panel for each point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

from ..harness.record import Record
from ..harness.style import DASHED, STYLE, Look, save, unmixed, where
from ..harness.tables import seconds_text
from . import online

LOOKS = {
    "step": Look("#0072B2", "o"),
    "lazy": Look("#332288", "p", DASHED),
    "step-graph": Look("#56B4E9", "v"),
    "step-lr": Look("#D55E00", "X"),
    "step-graph-lr": Look("#882255", "P"),
    "chunk": Look("#009E73", "s", DASHED),
    "carry": Look("#CC79A7", "D", DASHED),
    "tbptt": Look("#E69F00", "^", DASHED),
    "stream": Look("#000000", "*"),
    "stream-adam": Look("#999933", "h"),
    "stream-P": Look("#661100", "8"),
}
MARKED = (0.5, 0.9, 0.99)


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the distributions as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    Raises ValueError if there are no timed records, or records of several devices.
    """
    records = [r for r in unmixed(records, "online", {}) if r.timing]
    points = sorted({(r.params["B"], r.params["N"]) for r in records})
    if not points:
        raise ValueError("no record of the benchmark 'online' has a time to draw")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(points), figsize=(max(7, 4.3 * len(points) + 0.6), 5), sharey=True, squeeze=False
        )
        figure.subplots_adjust(
            left=0.075 if len(points) > 1 else 0.12, right=0.985, bottom=0.2, top=0.85, wspace=0.08
        )
        for axes, (batch, units) in zip(panels[0], points, strict=True):
            _panel(axes, [r for r in records if (r.params["B"], r.params["N"]) == (batch, units)])
            axes.set_title(f"N = {units}, B = {batch}", fontsize=10.5)
        panels[0][0].set_ylabel("part of the steps that take longer")
        shown = dict(
            pair[::-1] for axes in panels[0] for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=len(shown), frameon=False)
        figure.suptitle(f"Latency of one whole online step, RGC  ·  {where(records)}", fontsize=12)
        return save(figure, Path(path))


def _panel(axes: Axes, records: Sequence[Record]) -> None:
    least = 1.0
    for form in online.FORMS:
        for r in (r for r in records if r.algorithm == form):
            look, steps = LOOKS[form], r.params["steps"]
            # the slowest step is drawn at the height of one step in all steps
            pairs = [(value, 1 - q) for q, value in r.payload["quantiles"] if 1 - q >= 1 / steps]
            pairs.append((online.quantile(r, 1.0), 1 / steps))
            least = min(least, 1 / steps)
            c = r.params["C"]
            axes.plot(
                *zip(*pairs, strict=True), color=look.colour, linestyle=look.line, linewidth=1.8,
                label=form + (f", C = {c}" if c > 1 else ""),
            )  # fmt: skip
            for q in MARKED:
                axes.plot(
                    [online.quantile(r, q)], [1 - q], marker=look.marker, color=look.colour, markersize=5.5
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(least * 0.8, 1.2)
    axes.set_xlabel("latency of a step")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: seconds_text(value)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    for q in MARKED:
        axes.axhline(1 - q, color="0.75", linewidth=0.7, linestyle=(0, (2, 3)), zorder=0.5)
        axes.annotate(
            f"p{100 * q:.0f}", (1, 1 - q), xycoords=("axes fraction", "data"), xytext=(-3, 2),
            textcoords="offset points", ha="right", color="0.45", fontsize=8,
        )  # fmt: skip
