"""Draw `rjepa bench pays`: each rule's final loss as a share of chance, a row a task, a panel a setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..harness.record import Record
from ..harness.statistics import interval
from ..harness.style import STYLE, Look, save
from .pays import RULES, groups
from .probes import PROBES

LOOKS = {
    "snap0": Look("#CC79A7", "d"),
    "eprop": Look("#D55E00", "v"),
    "rfp": Look("#0072B2", "o"),
    "block": Look("#009E73", "s"),
    "rtrl": Look("#000000", "*"),
}


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Write the picture as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    Raises ValueError if there are no records of the benchmark.
    """
    by = groups(records)
    if not by:
        raise ValueError("there are no records of the benchmark 'pays' to draw")
    tasks = [name for name in PROBES if any(key[0] == name for key in by)]
    panels = list(dict.fromkeys(key[1:] for key in by))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        height = 1.6 + rows * (1.2 + 0.5 * len(tasks))
        figure, grid = plt.subplots(
            rows, columns, figsize=(2.2 + 3.4 * columns, height), squeeze=False, sharex=True, sharey=True
        )
        width = figure.get_figwidth()
        figure.subplots_adjust(left=0.9 / width, right=0.985, bottom=1.15 / height, top=1 - 0.85 / height)
        figure.subplots_adjust(hspace=0.25, wspace=0.08)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _panel(axes, [by.get((task, *panel), {}) for task in tasks])
            cell, units, optimizer = panel
            axes.set_title(f"{cell}, N = {units}, {optimizer}", fontsize=10)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        grid[0, 0].set_xlim(left=0)  # once all is drawn: the panels share their axes
        grid[0, 0].set_yticks(range(len(tasks)), tasks)
        grid[0, 0].set_ylim(len(tasks) - 0.5, -0.5)
        for axes in grid[-1]:
            axes.set_xlabel("final loss / chance")
        used = [rule for rule in RULES if any(rule in of for of in by.values())]
        figure.legend(
            handles=[
                Line2D(
                    [], [], color=LOOKS[r].colour, marker=LOOKS[r].marker, linestyle="", label=RULES[r].label
                )
                for r in used
            ],
            loc="lower center",
            ncols=len(used),
            frameon=False,
        )
        p = next(iter(next(iter(by.values())).values())).params
        figure.suptitle(
            f"Does Γ pay?  ·  mean and 95 % interval over {p['seeds']} seeds, {p['T']:,} steps, further left is better",
            fontsize=11,
        )
        return save(figure, Path(path))


def _panel(axes: Axes, by_task: Sequence[dict[str, Record]]) -> None:
    used = [rule for rule in RULES if any(rule in of for of in by_task)]
    for place, rule in zip(np.linspace(-0.3, 0.3, len(used)) if len(used) > 1 else [0.0], used, strict=True):
        for row, of in enumerate(by_task):
            if rule in of:
                chance = PROBES[of[rule].params["task"]].chance
                mean, half = (value / chance for value in interval(of[rule].payload["finals"]))
                axes.errorbar(
                    mean, row + place, xerr=half, color=LOOKS[rule].colour, marker=LOOKS[rule].marker,
                    markersize=5.5, elinewidth=1.2,
                )  # fmt: skip
    axes.axvline(1, color="0.35", linestyle=(0, (6, 4)), linewidth=1)
    axes.grid(True, axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
