"""The paper's figures 3 and 4, drawn from evaluations of runs; beside the raw loss they show its normalised form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .. import _files
from ..bench.harness.statistics import interval
from ..bench.harness.style import STYLE, save
from . import config
from .evaluation import PROBE_FROM
from .train import EVALUATION

COLOURS = {"rfp": "#0072B2", "bptt": "#E69F00", "rtrl": "#000000"}
CONTROL = "#777777"
# What is drawn and told of an evaluation, before and after training.
CURVES = ("loss", "normalised", "control", "control_normalised")
LISTS = ("spectrum", "correlation_spectrum", "input_gain")
NUMBERS = ("participation_ratio", "correlation_participation_ratio", "next_from_h", "next_from_x")
Runs = dict[str, list[dict[str, Any]]]


def load(folders: Sequence[Path | str]) -> Runs:
    """The evaluations of finished runs, by learning rule; one for each seed.

    Raises FileNotFoundError for a run that isn't finished; ValueError if there is no run, or if runs differ in more
    than learning rule, rate and seed.
    """
    evaluations = []
    for folder in map(Path, folders):
        file = folder / EVALUATION
        if not file.is_file():
            raise FileNotFoundError(f"{folder} isn't a finished run: there is no {EVALUATION} in it")
        evaluations.append((str(folder), _evaluation(file)))
    return by_rule(evaluations)


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


def by_rule(evaluations: Sequence[tuple[str, dict[str, Any]]]) -> Runs:
    """The same for evaluations that come with the name of their run. Raises ValueError as `load` does."""
    runs: Runs = {}
    free = ("train.learning:", "train.seed:", "train.lr_recurrent:")
    for where, found in evaluations:
        differences = config.differences(evaluations[0][1]["config"], found["config"])
        other = [difference for difference in differences if not difference.startswith(free)]
        if other:
            raise ValueError(f"{where} can't be averaged with the others: {'; '.join(other)}")
        runs.setdefault(str(config.value(found["config"], "train.learning")), []).append(found)
    if not runs:
        raise ValueError("folders must name at least one run")
    return runs


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Draw fig3 and fig4, each as PNG and SVG, into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*_collapse(runs, folder / "fig3"), *_over_time(runs, folder / "fig4")]


def _collapse(runs: Runs, path: Path) -> list[Path]:
    """Fig. 3: trajectories on two principal components; spectra of h's covariance and correlation, before and after."""
    with plt.rc_context(STYLE):
        figure, (trajectory, covariance, correlation) = plt.subplots(1, 3, figsize=(15, 4.8))
        figure.subplots_adjust(left=0.05, right=0.985, top=0.86, bottom=0.13, wspace=0.24)
        rule = next(iter(runs))
        for k, points in enumerate(np.array(runs[rule][0]["after"]["trajectories"])):
            line = trajectory.plot(*points.T, "-o", markersize=2.5, linewidth=0.6, alpha=0.8)[0]
            trajectory.plot(*points[0], "s", color=line.get_color(), markersize=7, label=f"sequence {k + 1}")
        trajectory.set_title(f"h(t) of test sequences, {rule.upper()}, first step □")
        trajectory.set_xlabel("first principal component")
        trajectory.set_ylabel("second")
        for axes, name, title in (
            (covariance, "spectrum", "eigenvalues of h's covariance"),
            (correlation, "correlation_spectrum", "eigenvalues of h's correlation matrix"),
        ):
            ratio = "participation_ratio" if name == "spectrum" else "correlation_participation_ratio"
            stages = [("before", rule, CONTROL)] + [("after", r, COLOURS[r]) for r in runs]
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
    """Fig. 4: by time step, the loss, the normalised loss, and its difference from the control's; a column per rule."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            3, len(runs), figsize=(1.5 + 6 * len(runs), 11), squeeze=False, sharex=True, sharey="row"
        )
        figure.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.06, hspace=0.16, wspace=0.06)
        for column, (rule, found) in zip(panels.T, runs.items(), strict=True):
            colour = COLOURS[rule]
            for axes, own, control in (
                (column[0], "loss", "control"),
                (column[1], "normalised", "control_normalised"),
            ):
                _curve(axes, [one["before"][own] for one in found], "#BBBBBB", "before training")
                _curve(
                    axes, [one["after"][control] for one in found], CONTROL, "control: predictor alone", "--"
                )
                _curve(axes, [one["after"][own] for one in found], colour, f"after, {rule.upper()}")
            below = [
                np.array(one["after"]["normalised"]) - np.array(one["after"]["control_normalised"])
                for one in found
            ]
            _curve(column[2], below, colour, f"{rule.upper()} less control")
            column[2].axhline(0, color=CONTROL, linewidth=1, linestyle="--")
            column[0].set_title(rule.upper())
            column[2].set_xlabel("time step")
            for axes in column:
                axes.legend(frameon=False, fontsize=9)
        for axes, label in zip(
            panels[:, 0],
            ("prediction loss", "loss / that of the best constant", "difference of normalised losses"),
            strict=True,
        ):
            axes.set_ylabel(label)
        figure.suptitle(f"{_told(runs)}\nmean and 95 % interval over seeds", fontsize=11)
        return save(figure, path)


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
    seeds = " and ".join(f"{len(found)} of {rule.upper()}" for rule, found in runs.items())
    held = ", ".join(one["held_out"])
    held = held if len(held) < 60 else f"{len(one['held_out'])} sources"
    return f"R-JEPA, held-out {held}; {seeds} seeds"


def summary(runs: Runs) -> list[list[str]]:
    """The results of training, a row per learning rule with the columns SUMMARY: mean ± half a 95 % t-interval."""
    rows = []
    for rule, found in runs.items():
        after, before = [one["after"] for one in found], [one["before"] for one in found]
        gaps = [
            [own - control for own, control in zip(a["normalised"], a["control_normalised"], strict=True)]
            for a in after
        ]
        kept = [
            a["participation_ratio"] / b["participation_ratio"] for a, b in zip(after, before, strict=True)
        ]
        rows.append(
            [
                rule,
                _mean([_late(a["normalised"]) for a in after]),
                _mean([_late(a["control_normalised"]) for a in after]),
                _mean([_late(gap) for gap in gaps]),
                _mean([_late(a["normalised"]) - a["normalised"][0] for a in after]),
                _mean([_late(gap) - gap[0] for gap in gaps]),
                _mean([a["next_from_h"] for a in after]),
                _mean([a["next_from_h"] - a["next_from_x"] for a in after]),
                _mean(kept),
                _mean([_late(a["input_gain"]) for a in after]),
            ]
        )
    return rows


SUMMARY = (
    "rule",
    "normalised loss, late",
    "control's",
    "less control's",
    "own, late less first",
    "difference, late less first",
    "next-patch R² from h",
    "less that from x",
    "participation ratio, of before",
    "input gain",
)


def _late(curve: Sequence[float]) -> float:
    return float(np.mean(curve[min(PROBE_FROM, len(curve) - 1) :]))


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    middle, half = interval(list(values))
    return f"{middle:.4f} ± {half:.4f}"
