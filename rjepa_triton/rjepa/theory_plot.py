"""The plot of `rjepa theory`: numerical results are lines and markers, derived ones are dashed lines over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..bench.harness.record import Record
from ..bench.harness.style import DASHED, SOLID, STYLE, Look, save
from . import theory
from .theory_runs import CORRELATION, ETA, HIDDEN, MOMENTS, alive, decays_text, select

LOOKS = {
    "white": Look("#0072B2", "o"),
    "white, uneven rates": Look("#56B4E9", "v"),
    "coloured": Look("#E69F00", "s"),
    "coloured, non-commuting": Look("#D55E00", "D"),
}
STARTS = {
    (ETA, 1.0): ("#0072B2", f"η = {ETA:g}, ordinary first weights"),
    (0.0, 0.02): ("#009E73", "η = 0, first weights × 0.02"),
    (0.0, 1.0): ("#D55E00", "η = 0, ordinary first weights"),
}
MOMENT_LOOKS = (Look("#0072B2", "o"), Look("#E69F00", "s"), Look("#CC79A7", "D"))
PREDICTED: dict[str, Any] = {"color": "black", "linestyle": DASHED, "linewidth": 1.3}


def draw(records: Sequence[Record], path: Path | str) -> list[Path]:
    """Draw the records of a run of `rjepa theory` as PNG (150 dpi) and SVG, and return the two paths.

    The six panels show the gap WᵀW - PPᵀ, the cosines, learning without weight decay, learning without stop-gradient,
    singular values, and Appendix B's moments. path: where to write; its suffix is replaced.

    Raises ValueError if a study's records are missing.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(16, 9.6))
        figure.subplots_adjust(left=0.05, right=0.985, top=0.91, bottom=0.065, wspace=0.24, hspace=0.32)
        try:
            _gap(axes[0, 0], select(records, "balance"))
            _cosines(axes[0, 1], select(records, "balance"))
            _starts(axes[0, 2], select(records, "start"))
            _collapse(axes[1, 0], select(records, "stop-gradient"))
            _values(axes[1, 1], select(records, "values"))
            _moments(axes[1, 2], select(records, "moments"))
        except ValueError:
            plt.close(figure)
            raise
        for letter, panel in zip("abcdef", axes.flat, strict=True):
            panel.set_title(f"{letter}   {panel.get_title()}", loc="left", fontweight="bold", fontsize=11)
            panel.set_title("")
            panel.grid(True, color="0.92", linewidth=0.8)
            panel.set_axisbelow(True)
        figure.suptitle(
            "Theorem 1 and Appendix B as they hold  ·  linear R-JEPA in expectation, means of "
            f"{select(records, 'balance')[0].params['seeds']} seeds  ·  dashed: derived",
            fontsize=12.5,
        )
        return save(figure, Path(path).with_suffix(""))


def _gap(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("WᵀW → PPᵀ, whatever the input")
    mine = [r for r in records if decays_text(r.params) == "0.3"]
    for n, r in enumerate(mine):
        look, times = LOOKS[r.params["input"]], np.array(r.payload["times"])
        axes.plot(
            times, r.payload["gap"], color=look.colour, linewidth=2, marker=look.marker, markersize=6,
            markevery=(2 * n, 8), label=r.params["input"],
        )  # fmt: skip
    axes.plot(times, np.exp(-2 * ETA * times), **PREDICTED, label="exp(-2ηs)", zorder=5)
    axes.set_yscale("log")
    axes.set_xlabel("learning time s (rate × steps)")
    axes.set_ylabel("‖WᵀW - PPᵀ‖, of its start")
    axes.legend(frameon=False, title=f"τ = 0.3, η = {ETA:g}")


def _cosines(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("HHᵀ agrees where the decayed input is white")
    for n, name in enumerate(LOOKS):
        mine = [r for r in records if r.params["input"] == name and len(r.params["decays"]) == 1]
        for place, r in zip((-0.22, 0.0, 0.22), mine, strict=True):
            found = r.payload["cosine_covariance"]
            mean, look = np.mean(found), LOOKS[name]
            axes.errorbar(
                n + place, mean, yerr=[[mean - min(found)], [max(found) - mean]], color=look.colour,
                marker=look.marker, markersize=7, capsize=3,
            )  # fmt: skip
            axes.plot(
                n + place, min(r.payload["cosine_end"]), marker="_", color="black", markersize=13, mew=1.8
            )
            axes.annotate(
                f"{r.params['decays'][0]:g}", (n + place, min(found)), xytext=(0, -12), fontsize=8.5, color="0.3",
                textcoords="offset points", ha="center", va="center",
            )  # fmt: skip
    axes.plot(
        [],
        [],
        marker="_",
        color="black",
        linestyle="",
        markersize=13,
        mew=1.8,
        label="WᵀW and PPᵀ, worst seed",
    )
    axes.errorbar(
        [],
        [],
        yerr=[],
        color="0.45",
        marker="o",
        linestyle="",
        capsize=3,
        label="WᵀW and HHᵀ (eq. 3), seeds' range",
    )
    axes.set_xticks(
        range(len(LOOKS)), ["white", "white,\nuneven rates", "coloured", "coloured,\nnon-commuting"]
    )
    axes.set_xlim(-0.55, len(LOOKS) - 0.45)
    axes.set_ylim(0.67, 1.03)
    axes.set_ylabel("cosine at s = 500")
    axes.legend(frameon=False, loc="lower left", title="number below a marker: τ", title_fontsize=9)


def _starts(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Without weight decay the first weights decide")
    for r in records:
        key = r.params["eta"], r.params["scale"]
        if r.params["input"] == "coloured, non-commuting" and key in STARTS:
            colour, label = STARTS[key]
            axes.plot(r.payload["times"], r.payload["cosine"], color=colour, linewidth=2, label=label)
    axes.axhline(1, **PREDICTED)
    axes.set_ylim(0.4, 1.03)
    axes.set_xlabel("learning time s")
    axes.set_ylabel("cos(WᵀW, PPᵀ)")
    axes.legend(frameon=False, loc="center right", title="coloured, non-commuting, τ = 0.3")


def _collapse(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Without stop-gradient the representation collapses")
    for r in records:
        p, found = r.params, r.payload
        if p["eta"]:
            continue
        look, times = LOOKS[p["input"]], np.array(found["times"])
        label = f"{p['input']}, stop-gradient" if p["stop_gradient"] else f"{p['input']}, no stop-gradient"
        axes.plot(
            times, found["power"], color=look.colour, linewidth=2, marker="" if p["stop_gradient"] else look.marker,
            markevery=6, linestyle=SOLID, label=label,
        )  # fmt: skip
        if not p["stop_gradient"]:
            bound = found["power"][0] * np.exp(-min(found["bound"]) * times)
            axes.plot(times, bound, **{**PREDICTED, "color": look.colour})
    axes.plot([], [], **PREDICTED, label="no slower than exp(-2λs)")
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 1e8)  # the legend lies above the lines
    axes.set_xlabel("learning time s")
    axes.set_ylabel("tr PPᵀ")
    axes.legend(frameon=False, loc="upper right", title="η = 0, τ = 0.3", fontsize=9)


def _values(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Surviving singular values, and where none survive")
    limit = CORRELATION**2 / 4
    eta = limit * np.linspace(0, 1, 200)
    upper, lower = np.transpose([theory.surviving(CORRELATION, float(e)) for e in eta])
    for r in records:
        at, living = r.params["eta"], alive(r)
        axes.plot([at] * len(living), living, "o", color="#0072B2", markersize=7)
        if not living:
            axes.plot([at], [0], "o", color="#D55E00", markersize=7)
    axes.plot(eta, upper, **PREDICTED)
    axes.plot(eta, lower, **{**PREDICTED, "linestyle": (0, (1, 2))})
    axes.axvline(limit, ymax=0.72, color="0.5", linewidth=1)
    axes.annotate("η = ρ²/4", (limit, 0.7), xytext=(6, 0), textcoords="offset points", color="0.3")
    axes.plot([], [], "o", color="#0072B2", label=f"W and P, those of {HIDDEN} that survive")
    axes.plot([], [], "o", color="#D55E00", label="all have gone to zero")
    axes.plot([], [], **PREDICTED, label="(ρ + √(ρ² - 4η))/2")
    axes.plot(
        [], [], **{**PREDICTED, "linestyle": (0, (1, 2))}, label="(ρ - √(ρ² - 4η))/2, below it zero attracts"
    )
    axes.set_ylim(-0.04, 1.22)
    axes.set_xlabel("weight decay η")
    axes.set_ylabel("singular value at s = 1000")
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _moments(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("Appendix B's moments, entry 1122")
    taus = [r.params["tau"] for r in records]
    for n, (name, look) in enumerate(zip(MOMENTS, MOMENT_LOOKS, strict=True)):
        axes.plot(taus, [r.payload["exact"][n] for r in records], color=look.colour, linewidth=1.8)
        axes.errorbar(
            taus, [r.payload["sampled"][n] for r in records], yerr=[r.payload["interval"][n] for r in records],
            color=look.colour, marker=look.marker, markersize=6, linestyle="", capsize=3, label=name,
        )  # fmt: skip
        axes.plot(
            taus,
            [r.payload["paper"][n] for r in records],
            color=look.colour,
            linestyle=(0, (1, 2)),
            linewidth=2,
        )
    axes.plot([], [], color="0.4", linewidth=1.8, label="exact")
    axes.plot([], [], color="0.4", linestyle=(0, (1, 2)), linewidth=2, label="paper's eqs. 10-12")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(taus, [f"{tau:g}" for tau in taus])
    axes.minorticks_off()
    axes.set_xlabel("τ")
    axes.set_ylabel("fourth moment; markers: sampled, 99 %")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
