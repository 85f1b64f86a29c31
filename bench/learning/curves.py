"""Draw `rjepa bench learn`: loss against steps of the stream, mean and interval over seeds, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record
from ..harness.statistics import interval
from ..harness.style import DASHED, SOLID, STYLE, Look, save
from . import learn
from .tasks import TASKS

# Okabe and Ito's colours. Rules that take chunks are dashed. Dotted lines leave the curve below them visible: that of
# rflo lies on another one.
DOTTED = (0, (1, 1.4))
LOOKS = {
    "rtrl": Look("#000000", "*"),
    "rtrl-heads": Look("#999999", "P"),
    "rfp": Look("#0072B2", "o"),
    "rfp-chunk": Look("#0072B2", "s", DASHED),
    "carry": Look("#009E73", "D", DASHED),
    "refine-2": Look("#56B4E9", "h", DOTTED),
    "tbptt": Look("#E69F00", "^", DASHED),
    "eprop": Look("#D55E00", "v", SOLID),
    "rflo": Look("#CC79A7", "X", DOTTED),
    "snap0": Look("#CC79A7", "d", SOLID),
    "uoro": Look("#F0E442", "<", SOLID),
}


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the curves of `learn.measure`'s records as PNG (150 dpi) and SVG; `path` with any ending or none.

    Returns the two paths. Raises ValueError if there are no records, or if they mix several sizes, saying which.
    """
    records = [r for r in records if r.benchmark == "learn" and r.params["stage"] == "learning"]
    if not records:
        raise ValueError("there are no records of the benchmark 'learn' to draw")
    for what in ("N", "B", "T", "window"):
        values = {r.params[what] for r in records}
        if len(values) > 1:
            raise ValueError(f"one plot can't mix {what}, got {', '.join(map(str, sorted(values)))}")
    tasks = [name for name in TASKS if any(r.params["task"] == name for r in records)]
    rules = [name for name in learn.RULES if any(r.algorithm == name for r in records)]
    p, seeds = records[0].params, {r.params["seed"] for r in records}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(tasks), figsize=(max(11, 5 * len(tasks) + 1), 6.4), squeeze=False
        )
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.25, top=0.88, wspace=0.17)
        for axes, task in zip(panels[0], tasks, strict=True):
            _panel(axes, task, [r for r in records if r.params["task"] == task])
        chunk = max(r.params["C"] for r in records)
        figure.legend(
            handles=[_handle(rule) for rule in rules],
            loc="lower center",
            ncols=6 if len(tasks) > 2 else 4,
            frameon=False,
            title=f"mean and 95 % t-interval over {len(seeds)} seeds; chunks: weights change every {chunk} steps, "
            "of the other rules every step",
            title_fontsize=9,
            handlelength=3.2,
        )
        figure.suptitle(
            f"Learning online  ·  N = {p['N']}, B = {p['B']}, Adam, learning rate chosen for each rule",
            fontsize=12.5,
        )
        return save(figure, Path(path))


def _panel(axes: Axes, task: str, records: Sequence[Record]) -> None:
    chance = TASKS[task].chance
    top = chance
    for rank, rule in enumerate(learn.RULES):
        mine = [r for r in records if r.algorithm == rule]
        if not mine:
            continue
        look, window = LOOKS[rule], mine[0].params["window"]
        found = [interval(list(losses)) for losses in zip(*map(learn.curve, mine), strict=True)]
        mean, half = np.array(found).T
        steps = window * np.arange(1, len(mean) + 1)
        axes.fill_between(
            steps, np.maximum(mean - half, 0), mean + half, color=look.colour, alpha=0.1, linewidth=0
        )
        top = max(top, mean.max())
        axes.plot(
            steps, mean, color=look.colour, linestyle=look.line, linewidth=1.7, marker=look.marker, markersize=5.5,
            markevery=(rank % 4, 4),
        )  # fmt: skip
    axes.axhline(chance, color="0.35", linestyle=(0, (6, 4)), linewidth=1)
    axes.annotate(
        "chance", (1, chance), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
        ha="right", color="0.25", fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
    )  # fmt: skip
    axes.set_ylim(0, 1.08 * top)
    axes.set_title(f"{task}, {records[0].params['cell']}")
    axes.set_xlabel("steps of the stream")
    axes.set_ylabel(f"loss: {TASKS[task].loss}" + (" [nats]" if TASKS[task].loss == "cross-entropy" else ""))
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _handle(rule: str) -> Line2D:
    look = LOOKS[rule]
    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        linewidth=1.8,
        label=learn.RULES[rule].label,
    )
