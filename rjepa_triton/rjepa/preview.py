"""Draws one sequence: its scan path on the frame, and below it the strip of patches that a model sees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import _checks as check
from .. import _files
from .patches import FixationSequences, View
from .video import still

# In inches, except COLUMNS and DPI.
COLUMNS = 12  # patches in a row of the strip
WIDTH, MARGIN, TITLE, GAP = 9.6, 0.2, 0.4, 0.06
TALLEST = 6.5  # the greatest height of the frame: a taller one is drawn narrower
DPI = 150
COLOURS = "plasma"  # dark for the first fixation, light for the last
AREA = 500.0  # a marker's area, in square points per second of fixation
LABEL: dict[str, Any] = {
    "color": "white",
    "fontsize": 7,
    "path_effects": [patheffects.withStroke(linewidth=1.8, foreground="black")],
}


def draw(
    sequences: FixationSequences, index: int, file: str | Path, *, start: int = 0, steps: int | None = 20
) -> Path:
    """Draw `steps` fixations of item `index`, from fixation `start` on, into the PNG `file`; return its path.

    Above is the frame shown in the middle of the stretch (the other fixations on a film saw other frames). On it, each
    fixation has a numbered marker whose area shows the duration; lines are saccades, and squares are the patches. Below
    are the patches, framed in the colour of their marker. steps: None draws all; the stretch ends with the sequence.

    Raises IndexError if there is no such item, ValueError if `start` isn't in it.
    """
    view = sequences.view(index)
    length = len(view.frame)
    if check.integer("start", start, 0) >= length:
        raise ValueError(f"start must be below {length}, the fixations of the sequence, got {start}")
    steps = length - start if steps is None else min(check.integer("steps", steps, 1), length - start)
    shown = range(start, start + steps)
    colours = colormaps[COLOURS](np.linspace(0.2, 0.95, steps))
    patches = rearrange(sequences[index]["patches"].numpy(), "t c h w -> t h w c")
    film = view.scene.film
    frame = film.frames[view.frame[shown[steps // 2]]]
    image = still(film, int(view.frame[shown[steps // 2]]), round(DPI * WIDTH))

    inner = WIDTH - 2 * MARGIN
    above = min(inner * frame.shape[0] / frame.shape[1], TALLEST)
    cell = (inner + GAP) / COLUMNS
    below = cell * math.ceil(steps / COLUMNS)
    height = TITLE + above + MARGIN + below + MARGIN - GAP
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)

    def box(left: float, top: float, width: float, tall: float) -> Axes:
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    figure.text(MARGIN / WIDTH, 1 - TITLE / 2 / height, _title(view, shown), va="center", fontsize=10)
    path = box(MARGIN, TITLE, inner, above)
    path.imshow(image, extent=(0, frame.shape[1], frame.shape[0], 0), interpolation="antialiased")
    _draw_path(path, view, shown, frame, sequences.patch, colours)
    for k, colour in zip(shown, colours, strict=True):
        row, column = divmod(k - start, COLUMNS)
        top = TITLE + above + MARGIN + row * cell
        _draw_patch(box(MARGIN + column * cell, top, cell - GAP, cell - GAP), patches[k], k, colour)
    file = Path(file)
    with _files.replacing(file) as temporary:
        figure.savefig(temporary, format="png")
    return file


def _title(view: View, shown: range) -> str:
    path = view.path
    end = path.onset[shown[-1]] + path.duration[shown[-1]]
    title = (
        f"{view.movie}, {view.participant}: fixations {shown[0]} to {shown[-1]} of {len(view.frame)}, "
        f"{path.onset[shown[0]]:.1f} to {end:.1f} s"
    )
    times = view.scene.film.times
    if len(times) > 1:
        title += f"; the frame at {times[view.frame[shown[len(shown) // 2]]]:.2f} s"
    return title


def _draw_path(
    axes: Axes, view: View, shown: range, frame: np.ndarray, patch: int, colours: np.ndarray
) -> None:
    which = list(shown)
    place, corner = view.centre[which], view.corner[which]
    squares = [Rectangle((x, y), patch, patch) for x, y in corner]
    axes.add_collection(PatchCollection(squares, facecolor="none", edgecolor=colours, linewidth=1, alpha=0.8))
    saccades = list(np.stack([place[:-1], place[1:]], 1))
    axes.add_collection(LineCollection(saccades, colors="black", linewidths=2.6, alpha=0.5))
    axes.add_collection(LineCollection(saccades, colors=colours[1:], linewidths=1.3))
    area = AREA * view.path.duration[which]
    axes.scatter(place[:, 0], place[:, 1], s=area, c=colours, edgecolors="white", linewidths=0.8, zorder=3)
    points = axes.get_position().width * WIDTH * 72 / frame.shape[1]
    for k, (x, y) in zip(shown, _label_places(place * points, len(str(shown[-1]))) / points, strict=True):
        axes.text(x, y, str(k), **LABEL, ha="center", va="center", zorder=4)
    axes.set(xlim=(0, frame.shape[1]), ylim=(frame.shape[0], 0))
    axes.set_axis_off()


def _draw_patch(axes: Axes, patch: np.ndarray, number: int, colour: np.ndarray) -> None:
    axes.imshow(patch, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2)
    axes.text(0.05, 0.93, str(number), **LABEL, transform=axes.transAxes, va="top")


def _label_places(place: np.ndarray, digits: int) -> np.ndarray:
    """Places (n, 2), in points, of numbers 7 points high: on their markers, or beside them if another is in the way."""
    box = np.array([4.5 * digits + 1, 7.5])
    turns = np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(turns), np.sin(turns)], 1)
    tries = np.concatenate([np.zeros((1, 2)), *(radius * ring for radius in (9, 14, 20, 27))])
    written = np.empty((0, 2))
    for at in place:
        free = (np.abs(at + tries[:, None] - written) >= box).any(2).all(1)
        written = np.concatenate(
            [written, at + tries[None, np.argmax(free)]]
        )  # the marker itself if none is free
    return written
