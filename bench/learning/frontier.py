"""Draw `rjepa bench fidelity`: how far each rule's gradient is from the exact one, against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from ..harness.record import Record
from ..harness.style import STYLE, Look, save
from .fidelity import CELLS, METHODS, interval, select

LOOKS = {
    "parts of M": Look("#999999", "v"),
    "RFP": Look("#0072B2", "o"),
    "UORO": Look("#F0E442", "h"),
    "TBPTT": Look("#E69F00", "^"),
    "carry": Look("#009E73", "s"),
    "refined": Look("#CC79A7", "D"),
    "blocks": Look("#D55E00", "X"),
    "exact": Look("#000000", "*"),
    "other network": Look("#56B4E9", "P"),
}
EXACT = 1e-6  # 1 - cosine below which a gradient counts as exact: float32's rounding is of this size


class Mark(NamedTuple):
    """One marker of the plot."""

    cost: float
    distance: float
    label: str
    kind: str


def draw(records: Sequence[Record], path: Path | str, scale: float = 0.3) -> list[Path]:
    """Draw the frontier as PNG (150 dpi) and SVG; returns the two paths.

    1 - cosine is shown against time a step and against bytes, with one row of panels for each cell. Exact gradients lie
    on a line of their own below the others. Raises ValueError unless `records` have timed ones of the sweep "frontier"
    at `scale`, all of one device.
    """
    mine = [r for r in select(records, "frontier") if r.params["scale"] == scale and r.timing]
    if not mine:
        raise ValueError(f"there are no timed records of the frontier at scale {scale:g} to draw")
    devices = {r.device for r in mine}
    if len(devices) > 1:
        raise ValueError(f"one plot can't mix devices, got {', '.join(sorted(devices))}")
    cells = [cell for cell in CELLS if any(r.params["cell"] == cell for r in mine)]
    p = mine[0].params
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(cells), 2, figsize=(13, 5.2 * len(cells)), squeeze=False)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.92, bottom=0.1, hspace=0.3, wspace=0.16)
        for row, cell in zip(axes, cells, strict=True):
            here = [r for r in mine if r.params["cell"] == cell]
            for panel, what in zip(row, ("time", "bytes"), strict=True):
                _panel(panel, [_mark(r, what) for r in here], what)
            row[0].set_title(f"{cell.upper()}", loc="left", fontweight="bold")
        threads = f"{p['threads']} thread{'s' * (p['threads'] != 1)}"
        figure.suptitle(
            f"How far from the exact gradient, at what cost  ·  {mine[0].device}, {threads}  ·  "
            f"N = {p['N']}, T = {p['T']}, B = {p['B']}, W ~ {scale:g}/√N",
            fontsize=12.5,
        )
        handles = [
            plt.Line2D([], [], color=look.colour, marker=look.marker, linestyle="", label=kind)
            for kind, look in LOOKS.items()
            if any(METHODS[r.algorithm].kind == kind for r in mine)
        ]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
        return save(figure, Path(path))


def _mark(made: Record, what: str) -> Mark:
    assert made.timing is not None
    method = METHODS[made.algorithm]
    cost = made.timing.median * 1e6 if what == "time" else float(made.state_bytes or 0)
    return Mark(cost, 1 - interval(made.payload["cosines"])[0], method.short, method.kind)


def _panel(axes: Axes, points: Sequence[Mark], what: str) -> None:
    floor = min((p.distance for p in points if p.distance >= EXACT), default=1.0) / 6
    points = [p if p.distance >= EXACT else p._replace(distance=floor) for p in points]
    for p in points:
        look = LOOKS[p.kind]
        axes.plot(
            p.cost, p.distance, marker=look.marker, color=look.colour, markersize=8, markeredgecolor="black", mew=0.5
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 3)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.06)
    axes.axhline(floor, color="#BBBBBB", linewidth=0.8, linestyle=":", zorder=0)
    axes.annotate(
        f"exact (below {EXACT:g})", (0, floor), xycoords=("axes fraction", "data"), xytext=(4, -10),
        textcoords="offset points", fontsize=7.5, color="#666666",
    )  # fmt: skip
    axes.set_xlabel("µs a time step, forward pass included" if what == "time" else "bytes of learning state")
    axes.set_ylabel("1 - cosine with the exact gradient")
    _label(axes, points)


def _label(axes: Axes, points: Sequence[Mark]) -> None:
    """Write each label beside its marker, where it covers least of the markers and of the labels already there.

    Markers of one kind that lie on top of each other share a label.
    """
    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    pixel = figure.dpi / 72
    places = [axes.transData.transform((p.cost, p.distance)) for p in points]
    taken = [Bbox.from_bounds(x - 5 * pixel, y - 5 * pixel, 10 * pixel, 10 * pixel) for x, y in places]
    groups: list[list[int]] = []
    for i, p in enumerate(points):
        on = [
            g
            for g in groups
            if points[g[0]].kind == p.kind and abs(places[g[0]] - places[i]).max() < 6 * pixel
        ]
        if on:
            on[0].append(i)
        else:
            groups.append([i])
    # tried in this order: right of the marker, its other sides, then the same farther away
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    for group in groups:
        p = points[group[0]]
        best: tuple[float, Any] | None = None
        for gap, (right, up) in product((7, 15, 24, 36), sides):
            text = axes.annotate(
                " · ".join(points[i].label for i in group),
                (p.cost, p.distance),
                xytext=(gap * right, gap * up),
                textcoords="offset points",
                ha=("right", "center", "left")[right + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=7.5,
                color="#333333",
                arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.5, "shrinkB": 4}
                if gap > 7
                else None,
            )
            box = _extent(text, renderer).padded(pixel)
            covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
            covered += _area(box) - _area(Bbox.intersection(box, axes.bbox))
            if best is None or covered < best[0]:
                if best:
                    best[1].remove()
                best = covered, text
            else:
                text.remove()
            if covered == 0:
                break
        assert best is not None
        taken.append(_extent(best[1], renderer))


def _extent(text: Annotation, renderer: Any) -> Bbox:
    """The extent of the text alone. That of the annotation includes the line to its marker, which covers the marker."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _area(box: Bbox | None) -> float:
    return box.width * box.height if box is not None else 0.0
