"""Draw `rjepa bench peers`: the time of each peer divided by ours, with intervals, a panel for each task and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

from ..harness.record import Record
from ..harness.style import STYLE, save, unmixed, where
from ..harness.tables import seconds_text
from .tasks import TASKS

OURS, THEIRS, EXACT = "#0072B2", "#D55E00", "#009E73"


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the ratios as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    Raises ValueError if no record has a time, or if devices or numbers of threads differ, or T within a panel.
    """
    records = unmixed(records, "peers", {"numbers of threads": "threads"})
    timed = [r for r in records if r.timing]
    if not timed:
        raise ValueError("no record of the benchmark 'peers' has a time to draw")
    tasks = [name for name in TASKS if any(r.params["task"] == name for r in timed)]
    sizes = sorted({(r.params["B"], r.params["N"]) for r in timed})
    counts = [len({r.algorithm for r in timed if r.params["task"] == task}) for task in tasks]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(tasks), len(sizes), figsize=(1.5 + 4.4 * len(sizes), 1.3 + 0.34 * sum(counts) + 0.75 * len(tasks)),
            squeeze=False, height_ratios=counts,
        )  # fmt: skip
        for row, task in zip(panels, tasks, strict=True):
            for axes, (batch, units) in zip(row, sizes, strict=True):
                here = [
                    r
                    for r in timed
                    if (r.params["task"], r.params["B"], r.params["N"]) == (task, batch, units)
                ]
                if not here:
                    axes.set_axis_off()
                    continue
                (length,) = {r.params["T"] for r in unmixed(here, "peers", {"lengths T": "T"})}
                _panel(axes, here, TASKS[task].ours[0])
                axes.set_title(f"{task}, N = {units}, B = {batch}, T = {length}", fontsize=10)
        figure.suptitle(f"Peers  ·  {where(timed)}", fontsize=12)
        figure.supxlabel(
            "time / ours, right of 1: ours is faster     blue: ours, green: exact gradient, orange: another one",
            fontsize=9,
        )
        figure.tight_layout()
        return save(figure, Path(path))


def _panel(axes: Axes, records: Sequence[Record], against: str) -> None:
    shown = []
    for r in records:
        value = [1.0, 1.0, 1.0] if r.algorithm == against else r.payload.get("ratios", {}).get(against)
        if value is not None:
            shown.append((value, r))
    shown.sort(key=lambda pair: pair[0][0], reverse=True)
    for y, ((value, low, high), r) in enumerate(shown):
        mine = r.algorithm in TASKS[r.params["task"]].ours
        colour = OURS if mine else EXACT if r.payload.get("gradient") == "bptt" else THEIRS
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([value], [y], marker="o", color=colour, markersize=6)
        assert r.timing is not None
        axes.annotate(
            seconds_text(r.timing.median), (1, y), xycoords=("axes fraction", "data"), xytext=(-2, 0),
            textcoords="offset points", ha="right", va="center", fontsize=8, color="0.4",
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [r.algorithm for _, r in shown], fontsize=9)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25) * (max(high, 1.25) / min(low, 0.8)) ** 0.25)
    axes.axvline(1, color="0.5", linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(True, axis="x", which="major", color="0.9", linewidth=0.8)
