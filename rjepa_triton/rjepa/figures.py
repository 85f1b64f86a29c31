"""The paper's figures 3 and 4, drawn from evaluations of runs. Beside the loss stands what it doesn't show."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .. import _files
from ..bench.harness.statistics import interval
from ..bench.harness.style import STYLE, save
from . import config
from .evidence import WINDOWS
from .evidence import late as _late
from .train import EVALUATION

COLOURS = {"rfp": "#0072B2", "bptt": "#E69F00", "rtrl": "#000000", "eprop": "#009E73", "snap0": "#CC79A7"}
CONTROL = "#777777"
CEILING = "#009E73"
ORDERS = {"shuffled": "#D55E00", "other": "#CC79A7"}
TOLD = {"shuffled": "order shuffled", "other": "patches of other scenes"}
# What is drawn and told of an evaluation, before and after training.
CURVES = ("loss", "normalised", "control", "control_normalised")
LISTS = ("spectrum", "correlation_spectrum", "input_gain")
NUMBERS = ("participation_ratio", "correlation_participation_ratio", "next_from_h", "next_from_x")
# What version 0.1 didn't record; drawn and told where all runs have it.
BY_STEP = ("next_from_h_by_step", "next_from_x_by_step", "next_from_ceiling_by_step")
Runs = dict[str, list[dict[str, Any]]]


def load(folders: Sequence[Path | str]) -> Runs:
    """The evaluations of finished runs, by learning rule; one for each seed.

    Those whose data have another order than recorded come apart, as "rfp, shuffled".

    Raises FileNotFoundError for a run that isn't finished; ValueError if there is no run, or if runs differ in more
    than learning rule, rates, seeds and order.
    """
    return by_rule(evaluations(folders))


def evaluations(folders: Sequence[Path | str]) -> list[tuple[str, dict[str, Any]]]:
    """The evaluation of each run, with the run's name. Raises FileNotFoundError for a run that isn't finished."""
    found = []
    for folder in map(Path, folders):
        file = folder / EVALUATION
        if not file.is_file():
            raise FileNotFoundError(f"{folder} isn't a finished run: there is no {EVALUATION} in it")
        found.append((str(folder), _evaluation(file)))
    return found


def _evaluation(file: Path) -> dict[str, Any]:
    """What a run's file of evaluations holds. Raises ValueError, naming the file, if something is missing."""
    try:
        found = json.loads(_files.read_text(file))
        config.differences(found["config"], found["config"])
        lengths = set()
        for when in ("before", "after"):
            for name in CURVES:
                lengths.add(np.asarray(found[when][name], dtype=np.float64).shape)
            for name in LISTS:
                np.asarray(found[when][name], dtype=np.float64).reshape(-1)[0]
            for name in NUMBERS:
                float(found[when][name])
        np.asarray(found["after"]["trajectories"], dtype=np.float64).reshape(-1, 2)[0]
        if (
            len(lengths) != 1
            or len(lengths.pop()) != 1
            or not all(isinstance(n, str) for n in found["held_out"])
        ):
            raise ValueError("its curves have different lengths")
    except KeyError as error:
        raise ValueError(f"{file} isn't an evaluation of a run: it has no {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file} isn't an evaluation of a run: {_files.first_line(error)}") from None
    return found


def by_rule(named: Sequence[tuple[str, dict[str, Any]]]) -> Runs:
    """The same for evaluations that come with the name of their run. Raises ValueError as `load` does."""
    runs: Runs = {}
    trained = ("learning", "seed", "lr_recurrent", "lr_bias")
    free = ("data.seed:", "data.order:", *(f"train.{key}:" for key in trained))
    for where, found in named:
        differences = config.differences(named[0][1]["config"], found["config"])
        other = [difference for difference in differences if not difference.startswith(free)]
        if other:
            raise ValueError(f"{where} can't be averaged with the others: {'; '.join(other)}")
        rule, order = (config.value(found["config"], key) for key in ("train.learning", "data.order"))
        runs.setdefault(str(rule) if order in (None, "recorded") else f"{rule}, {order}", []).append(found)
    if not runs:
        raise ValueError("folders must name at least one run")
    return runs


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Draw fig3 and fig4, each as PNG and SVG, into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*_collapse(runs, folder / "fig3"), *_over_time(runs, folder / "fig4")]


def _collapse(runs: Runs, path: Path) -> list[Path]:
    """Fig. 3: where h is and two of its paths, on two principal components; spectra, before and after training."""
    with plt.rc_context(STYLE):
        figure, (trajectory, covariance, correlation) = plt.subplots(1, 3, figsize=(15, 4.8))
        figure.subplots_adjust(left=0.05, right=0.985, top=0.84, bottom=0.13, wspace=0.24)
        recorded = {rule: found for rule, found in runs.items() if rule in COLOURS} or runs
        rule = next(iter(recorded))
        after = runs[rule][0]["after"]
        if "density" in after:
            x0, x1, y0, y1 = after["density_extent"]
            trajectory.imshow(
                np.log1p(np.array(after["density"])).T,
                origin="lower",
                extent=(x0, x1, y0, y1),
                aspect="auto",
                cmap="Greys",
                alpha=0.7,
            )
        for k, points in enumerate(np.array(after["trajectories"])[[0, -1], :12]):
            line = trajectory.plot(
                *points.T, "-o", markersize=4, linewidth=1.2, color=("#0072B2", "#D55E00")[k]
            )[0]
            trajectory.plot(
                *points[0], "s", color=line.get_color(), markersize=9, label=f"sequence {k + 1}, 12 steps"
            )
        trajectory.legend(frameon=False, fontsize=9)
        trajectory.set_title(f"h of all test sequences (grey) and two paths, {rule.upper()}; □ first step")
        trajectory.set_xlabel("first principal component")
        trajectory.set_ylabel("second")
        for axes, name, title in (
            (covariance, "spectrum", "eigenvalues of h's covariance"),
            (
                correlation,
                "correlation_spectrum",
                "eigenvalues of h's correlation matrix\n(paper: about 50 of 120 dimensions)",
            ),
        ):
            ratio = "participation_ratio" if name == "spectrum" else "correlation_participation_ratio"
            stages = [("before", rule, CONTROL)] + [("after", r, COLOURS.get(r, CONTROL)) for r in recorded]
            for when, r, colour in stages:
                values = np.array([one[when][name] for one in runs[r]])
                ratios = [one[when][ratio] for one in runs[r]]
                label = "before training" if when == "before" else f"after, {r.upper()}"
                axes.plot(
                    np.arange(1, values.shape[1] + 1),
                    np.maximum(values.mean(0), 1e-12),
                    color=colour,
                    linestyle="--" if when == "before" else "-",
                    label=f"{label}: participation ratio {np.mean(ratios):.1f}",
                )
            axes.set_yscale("log")
            axes.set_ylim(1e-5 * axes.get_ylim()[1], None)
            axes.set_title(title)
            axes.set_xlabel("rank")
            axes.legend(frameon=False, fontsize=9)
        figure.suptitle(_told(runs), fontsize=11)
        return save(figure, path)


def _over_time(runs: Runs, path: Path) -> list[Path]:
    """Fig. 4, a column per rule, by time step: the yardstick's error, R² of the next patch beyond that from x, the
    paper's loss, and the same normalised.
    """
    recorded = {rule: found for rule, found in runs.items() if rule in COLOURS} or runs
    whole = all("yardstick" in one["after"] for found in runs.values() for one in found)
    rows = [
        ("loss", "control", "prediction loss, the paper's"),
        ("normalised", "control_normalised", "loss / that of the best constant"),
    ]
    if whole:
        rows.insert(
            0,
            (
                "yardstick",
                "yardstick_control",
                "yardstick: error of the next patch's\ncontext-free embedding / constant's",
            ),
        )
    count = len(rows) + 1
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            count,
            len(recorded),
            figsize=(1.5 + 6 * len(recorded), 3.6 * count),
            squeeze=False,
            sharey="row",
        )
        figure.subplots_adjust(
            left=0.1, right=0.98, top=1 - 0.8 / (3.6 * count), bottom=0.05, hspace=0.24, wspace=0.06
        )
        places = [0, 2, 3] if whole else [0, 1]
        for column, (rule, found) in zip(panels.T, recorded.items(), strict=True):
            colour = COLOURS.get(rule, CONTROL)
            for place, (own, control, label) in zip(places, rows, strict=True):
                axes = column[place]
                if own == "loss":
                    _curve(axes, [one["before"][own] for one in found], "#BBBBBB", "before training")
                _curve(
                    axes, [one["after"][control] for one in found], CONTROL, "control: no recurrence", "--"
                )
                _curve(axes, [one["after"][own] for one in found], colour, f"after, {rule.upper()}")
                panels[place, 0].set_ylabel(label)
            axes = column[1 if whole else 2]
            if whole:
                _gains(axes, rule, runs)
                panels[1, 0].set_ylabel("R² of the next patch, less that from x")
            else:
                below = [
                    np.array(one["after"]["normalised"]) - np.array(one["after"]["control_normalised"])
                    for one in found
                ]
                _curve(axes, below, colour, f"{rule.upper()} less control")
                panels[2, 0].set_ylabel("difference of normalised losses")
            axes.axhline(0, color=CONTROL, linewidth=1, linestyle="--")
            column[0].set_title(rule.upper())
            column[-1].set_xlabel("time step")
        for place, row in enumerate(panels):
            by_step = place in places
            if by_step:  # its curves fill the panel: room for the legend above them
                low, high = row[0].get_ylim()
                row[0].set_ylim(low, high + 0.15 * (high - low))
            for axes in row:
                axes.legend(
                    frameon=False,
                    fontsize=9,
                    loc="upper left" if by_step else "best",
                    ncols=3 if by_step else 1,
                )
        figure.suptitle(f"{_told(runs)}\nmean and 95 % interval over runs", fontsize=11)
        return save(figure, path)


def _gains(axes: Axes, rule: str, runs: Runs) -> None:
    """What h tells of the next patch beyond x, by windows of steps; what a linear map finds; and with other orders."""

    def beyond(
        found: Sequence[Mapping[str, Any]],
        name: str,
        colour: str,
        label: str,
        line: str = "-",
        start: int = 0,
    ) -> None:
        own, of_x = f"next_from_{name}_by_step", "next_from_x_by_step"
        gaps = np.array([np.subtract(one["after"][own], one["after"][of_x]) for one in found])
        bounds = [*(w for w in WINDOWS if start <= w < gaps.shape[1]), gaps.shape[1]]
        windows = list(itertools.pairwise(bounds))
        places = [(i + 1 + j) / 2 for i, j in windows]
        means = np.stack([gaps[:, i:j].mean(1) for i, j in windows], axis=1)
        middle = means.mean(0)
        axes.plot(
            places, middle, color=colour, linestyle=line, marker="o", markersize=4, linewidth=1.4, label=label
        )
        if len(means) > 1:
            half = np.array([interval(list(column))[1] for column in means.T])
            axes.fill_between(places, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)

    # in earlier windows, of few rows, its own ridge tells more than its inputs
    beyond(runs[rule], "ceiling", CEILING, "x and its running averages", "--", start=4)
    beyond(runs[rule], "h", COLOURS.get(rule, CONTROL), f"h, {rule.upper()}")
    for order, colour in ORDERS.items():
        if f"{rule}, {order}" in runs:
            beyond(runs[f"{rule}, {order}"], "h", colour, f"h, {TOLD[order]}")
    axes.set_xscale("log")
    axes.set_ylim(-0.04, 0.08)
    axes.set_xlabel("time step, mean of windows")


def _curve(axes: Axes, curves: Sequence[Sequence[float]], colour: str, label: str, line: str = "-") -> None:
    values = np.array(curves)
    steps = np.arange(2, values.shape[1] + 2)  # step 2 is the first that is predicted
    middle = values.mean(0)
    axes.plot(steps, middle, color=colour, linestyle=line, linewidth=1.4, label=label)
    if len(values) > 1:
        half = np.array([interval(list(column))[1] for column in values.T])
        axes.fill_between(steps, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)


def _told(runs: Runs) -> str:
    one = next(iter(runs.values()))[0]
    seeds = " and ".join(f"{len(found)} of {rule.upper()}" for rule, found in runs.items() if rule in COLOURS)
    held = ", ".join(one["held_out"])
    held = held if len(held) < 60 else f"{len(one['held_out'])} sources"
    return f"R-JEPA, held-out {held}; {seeds} seeds"


def summary(runs: Runs) -> list[list[str]]:
    """The results of training, a row per learning rule with the columns SUMMARY: mean ± half a 95 % t-interval."""
    return [[rule, *_results(found)] for rule, found in runs.items()]


def compared(named: Sequence[tuple[str, dict[str, Any]]], base: str | None = None) -> list[list[str]]:
    """A row for each configuration, whatever it is, with the columns COMPARED.

    The first says how it differs from `base`, the configuration that a run has in its evaluation, or from the defaults;
    runs that differ in their seeds alone share a row. named: the evaluation of each run, with the run's name.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    same, base = ("the defaults", config.text(config.Config())) if base is None else ("nothing", base)
    for _, found in named:
        changed = []
        for difference in config.differences(found["config"], base):
            key, _, values = difference.partition(": ")
            if key not in ("train.seed", "data.seed"):
                changed.append(f"{key}={values.partition(' against ')[0].strip(chr(39))}")
        groups.setdefault(" ".join(changed) or same, []).append(found)
    shared = set.intersection(*(set(name.split(" ")) for name in groups)) if len(groups) > 1 else set()
    return [
        [" ".join(part for part in name.split(" ") if part not in shared) or "nothing", *_results(found)]
        for name, found in groups.items()
    ]


# What the tables read of an evaluation after training.
_READ = (
    *("yardstick", "yardstick_control", "normalised", "control_normalised", "input_gain"),
    *("next_from_x", "next_from_h", "next_from_ceiling", "current_from_h", "participation_ratio"),
)


def reduced(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's evaluation that `compared` reads, its numbers to eight digits."""

    def short(value: Any) -> Any:
        return [short(each) for each in value] if isinstance(value, list) else float(f"{value:.8g}")

    return {
        "config": found["config"],
        "before": {"participation_ratio": short(found["before"]["participation_ratio"])},
        "after": {name: short(found["after"][name]) for name in _READ},
    }


def _results(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns RESULTS of runs; a dash for what version 0.1 didn't record."""
    after, before = [one["after"] for one in found], [one["before"] for one in found]
    told = ["–"] * 5
    if all("yardstick" in a for a in after):
        own = [a["yardstick"] for a in after]
        below = [np.subtract(a["yardstick"], a["yardstick_control"]) for a in after]
        told = [
            _mean([curve[0] for curve in own]),
            _mean([_late(curve) for curve in own]),
            _mean([_late(curve) - curve[0] for curve in own]),
            _mean([_late(curve) for curve in below]),
            _mean([_late(curve) - float(curve[0]) for curve in below]),
        ]
    room = [a["next_from_ceiling"] - a["next_from_x"] for a in after if "next_from_ceiling" in a]
    present = [a["current_from_h"] for a in after if "current_from_h" in a]
    kept = [a["participation_ratio"] / b["participation_ratio"] for a, b in zip(after, before, strict=True)]
    return [
        str(len(found)),
        *told,
        _mean([a["normalised"][0] for a in after]),
        _mean([_late(a["normalised"]) for a in after]),
        _mean([_late(a["control_normalised"]) for a in after]),
        _mean([a["next_from_x"] for a in after]),
        _mean([a["next_from_h"] - a["next_from_x"] for a in after]),
        _mean(room),
        _mean(present),
        _mean(kept),
        _mean([_late(a["input_gain"]) for a in after]),
    ]


RESULTS = (
    "runs",
    "yardstick, first",
    "late",
    "late less first",
    "less control's, late",
    "less control's, late less first",
    "own loss, normalised: first",
    "own loss, late",
    "control's, late",
    "next-patch R² from x",
    "from h, less that",
    "from the ceiling, less x's",
    "present-patch R² from h",
    "participation ratio, of before",
    "input gain",
)
SUMMARY = ("rule", *RESULTS)
COMPARED = ("what differs", *RESULTS)
# Those of COMPARED that a page has room for.
BRIEF = (
    *("what differs", "late", "less control's, late", "own loss, late", "from h, less that"),
    *("present-patch R² from h", "participation ratio, of before", "input gain"),
)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    middle, half = interval(list(values))
    return f"{middle:.4f} ± {half:.4f}"
