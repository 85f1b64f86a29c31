"""`rjepa demo`: R-JEPA end to end, from data over training by several rules and seeds to evaluation and figures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _files, _processes
from . import backbone, config, data, figures, sequences, storage, train
from .config import Config

# The circuit's learning rate for each rule (docs/rjepa.md says how they were chosen).
RATES = {"rfp": 3e-5, "bptt": 1e-5}
EVALUATIONS, FEATURES = "evaluations.jsonl", "features.pt"


@dataclass(frozen=True)
class Plan:
    """What a demo runs: every rule with every seed, on the same data."""

    rules: Sequence[str] = tuple(RATES)
    seeds: int = 5
    overrides: Sequence[str] = ()

    def settings(self, rule: str, seed: int) -> Config:
        """The configuration of one run; `overrides` win over the plan's own settings."""
        own = (f"train.learning={rule}", f"train.seed={seed}", f"train.lr_recurrent={RATES[rule]}")
        return config.read(None, [*own, *self.overrides])

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(rule, seed) for seed in range(self.seeds) for rule in self.rules]


def run(
    plan: Plan, out: Path, advance: Callable[[int, int], None], jobs: int = 0
) -> tuple[figures.Runs, list[Path]]:
    """Run a demo in the folder `out`, except for what is there already.

    It writes features.pt (anew if it is damaged or of another configuration), a folder for each run, evaluations.jsonl
    with the evaluations of all runs, fig3 and fig4.
    advance: called with the number of steps done and their total. jobs: processes, with one thread each; 0: one per
    core.

    Returns the evaluations by rule, and the paths of evaluations.jsonl and the figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = plan.settings(*plan.runs[0])
    total = len(plan.runs) + 1
    advance(0, total)
    if _features(out, settings) is None:
        made = sequences.features(settings, backbone.load(settings.model.backbone))
        kept = {"train": made.train, "test": made.test, "of": _source(settings)}
        storage.save(out / FEATURES, kept)
    advance(1, total)
    count = min(jobs or len(os.sched_getaffinity(0)), len(plan.runs))
    with _processes.Workers(count) as pool:
        work = functools.partial(_one, plan, out)
        for done, _ in enumerate(pool.map(work, plan.runs), start=2):
            advance(done, total)
    folders = [out / name(rule, seed) for rule, seed in plan.runs]
    runs = figures.load(folders)
    lines = "".join(_files.read_text(folder / train.EVALUATION) + "\n" for folder in folders)
    _files.write_text(out / EVALUATIONS, lines)
    return runs, [out / EVALUATIONS, *figures.draw(runs, out)]


def _source(settings: Config) -> str:
    """What features depend on, as text: the data, and the backbone."""
    return config.text(Config(data=settings.data, model=config.ModelConfig(backbone=settings.model.backbone)))


def _features(out: Path, settings: Config) -> dict[str, Any] | None:
    """The features of a configuration that `out` holds; None if there are none, of another one or damaged ones."""
    try:
        kept = storage.unpickled(out / FEATURES)
        return kept if kept["of"] == _source(settings) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
        return None


def name(rule: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{rule}-{seed}"


def _one(plan: Plan, out: Path, which: tuple[str, int]) -> None:
    """Do one run, unless it is finished. Called in a process of its own, which uses one thread."""
    folder = out / name(*which)
    if (folder / train.EVALUATION).exists():
        return
    torch.set_num_threads(1)
    settings = plan.settings(*which)
    kept = _features(out, settings)
    if kept is None:
        raise ValueError(f"{out / FEATURES} is damaged, or of another configuration")
    sides = data.datasets(settings.data)
    known = sequences.Features(sides, kept["train"], kept["test"])
    train.Trainer(settings, folder, lambda _: None, known).run()
