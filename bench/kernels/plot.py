"""Draw `rjepa bench kernels`: each kernel's FLOP/s against its FLOP per byte, under the roof of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record
from ..harness.style import STYLE, save, unmixed, where
from .cases import BY, KERNELS
from .timing import rate_text

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"triton": "o", "torch": "s", "compile": "^"}
# The family of a kernel, by the first word of its name.
FAMILY = {
    "step": "Γ, a step",
    "read": "Γ, read",
    "chunk": "Γ, a chunk",
    "scan": "reverse scan",
    "suffix": "suffix products",
    "arriving": "suffix products",
    "rgc": "RGC, forward and backward",
    "rtrl": "exact RTRL",
}


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the roofline as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    The x axis is FLOP that a call must do divided by bytes that it must move, the y axis FLOP/s reached. The roof is
    the copy bandwidth and the rate of matrix products that were measured along with the kernels, as medians over the
    runs. Raises ValueError without records that have times, or for records of several devices.
    """
    timed = [r for r in unmixed(records, "kernels", {}) if r.timing]
    if not timed:
        raise ValueError("no record of the benchmark 'kernels' has a time to draw")
    families = list(dict.fromkeys(FAMILY[name.partition("-")[0]] for name in KERNELS))
    shown = [f for f in families if any(_family(r) == f for r in timed)]
    colours = dict(zip(shown, COLOURS, strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9.5, 6.6))
        figure.subplots_adjust(left=0.145, right=0.97, bottom=0.255, top=0.92)
        sizes = sorted({r.params["N"] for r in timed})
        for r in timed:
            flop, moved = r.payload["flop"], r.payload["bytes"]
            by = r.params["by"]
            axes.plot(
                [flop / moved], [r.payload["flop_per_second"]], marker=MARKERS[by], linestyle="none",
                color=colours[_family(r)], markersize=4 + 3.5 * (1 + sizes.index(r.params["N"])) / len(sizes),
                alpha=0.75, markeredgewidth=0,
            )  # fmt: skip
        _roofs(axes, timed)
        axes.set_xlabel("FLOP by byte that a call must move")
        axes.set_ylabel("FLOP/s that it does")
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: rate_text(value, "FLOP")))
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        handles = [Line2D([], [], color=colours[f], marker="o", linestyle="none", label=f) for f in shown]
        runners = [by for by in BY if any(r.params["by"] == by for r in timed)]
        handles += [
            Line2D([], [], color="0.3", marker=MARKERS[by], linestyle="none", label=f"by {by}")
            for by in runners
        ]
        figure.legend(
            handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9.5,
            title=f"larger: larger N, {', '.join(map(str, sizes))}; above the roof: data stayed in a cache",
            title_fontsize=9,
        )  # fmt: skip
        axes.set_title(f"Kernels under the roof  ·  {where(timed)}", fontsize=12)
        return save(figure, Path(path))


def _family(made: Record) -> str:
    return FAMILY[made.params["kernel"].partition("-")[0]]


def _roofs(axes: Axes, timed: Sequence[Record]) -> None:
    """Draw the slope of the copy bandwidth, and a flat roof for each rate of matrix products, with labels."""
    copy = statistics.median(r.payload["copy_bytes_per_second"] for r in timed)
    by_rate: dict[str, list[float]] = {}
    for r in timed:
        by_rate.setdefault(KERNELS[r.params["kernel"]].rate, []).append(r.payload["gemm_flop_per_second"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    rates = {name: statistics.median(values) for name, values in by_rate.items()}
    high = max(high, 3 * max(rates.values()) / copy)
    x = np.geomspace(low, high, 200)
    for name, rate in rates.items():
        axes.plot(x, np.minimum(copy * x, rate), color="0.25", linewidth=1.4, zorder=0.6)
        axes.annotate(
            f"{name} products, {rate_text(rate, 'FLOP')}", (high, rate), xytext=(-4, 4), ha="right",
            textcoords="offset points", fontsize=9, color="0.25",
        )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, max(top, 2.5 * max(rates.values())))
    at = low * (max(rates.values()) / copy / low) ** 0.25
    start, end = (axes.transData.transform((v, copy * v)) for v in (at, 2 * at))
    axes.annotate(
        f"copy, {rate_text(copy, 'B')}", (at, copy * at), xytext=(-6, 6), textcoords="offset points", fontsize=9,
        color="0.25", rotation=float(np.degrees(np.arctan2(*(end - start)[::-1]))), rotation_mode="anchor",
    )  # fmt: skip
