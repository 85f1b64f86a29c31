"""Draw what `rjepa bench plan --ranks` predicts: a step's time by ranks, of one network and of larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes

from ...planning.devices import Device
from ...planning.sharding import Link, Scaled
from ..harness.style import DASHED, STYLE, save
from ..harness.tables import bytes_text, seconds_text
from .question import Question
from .scale import predicted

STEP, SENDING, IDEAL = "#0072B2", "#D55E00", "0.55"


def draw(question: Question, device: Device, ranks: int, link: Link, path: Path) -> list[Path]:
    """Write strong and weak scaling as PNG (150 dpi) and SVG; `path` with any ending or none. Returns the two paths.

    ranks, link: as `scale.tables` has checked them.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.9), sharey=True)
        figure.subplots_adjust(left=0.085, right=0.975, bottom=0.2, top=0.8, wspace=0.08)
        for axes, weak in zip(panels, (False, True), strict=True):
            _panel(axes, list(predicted(question, device, ranks, link, weak)), weak)
        panels[0].set_ylabel("a step")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
        figure.suptitle(
            f"Predicted, nothing measured  ·  {question.cell} N = {question.hidden:,}, B = {question.batch}, "
            f"C = {question.chunk}, {question.dtype}\n{device.name} on each rank, link "
            f"{bytes_text(link.bytes_per_second)}/s and {seconds_text(link.latency)} a message",
            fontsize=11,
        )
        return save(figure, path)


def _panel(axes: Axes, found: Sequence[tuple[int, Scaled]], weak: bool) -> None:
    count = [one.ranks for _, one in found]
    first = found[0][1].seconds
    axes.plot(count, [one.seconds for _, one in found], color=STEP, marker="o", label="a step")
    sending = [(one.ranks, one.sending) for _, one in found if one.sending]
    if sending:
        axes.plot(*zip(*sending, strict=True), color=SENDING, marker="s", label="of it sending states")
    ideal = [first if weak else first / ranks for ranks in count]
    axes.plot(count, ideal, color=IDEAL, linestyle=DASHED, label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.13)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: seconds_text(value)))
    axes.set_xlabel("ranks")
    last_units, last = found[-1]
    gain = first / last.seconds * (last.ranks if weak else 1)
    axes.annotate(
        f"{gain:,.0f} times the work a second" if weak else f"{gain:,.1f} times as fast",
        (last.ranks, last.seconds), xytext=(0, 10), textcoords="offset points", ha="right", color=STEP, fontsize=9,
    )  # fmt: skip
    kind = f"N = {found[0][0]:,} to {last_units:,}, Γ of a rank as large" if weak else f"N = {last_units:,}"
    axes.set_title(f"{'Weak' if weak else 'Strong'} scaling: {kind}", fontsize=10.5)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
