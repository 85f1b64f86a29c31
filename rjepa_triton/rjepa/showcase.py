"""`rjepa demo`: R-JEPA end to end, from data over training by several rules and seeds to evaluation and figures."""

from __future__ import annotations

import dataclasses
import functools
import json
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
# Smaller batches and fewer sequences than the defaults: each seed has data of its own, and all of it takes ten minutes.
OWN = ("data.train=60", "data.test=100", "train.batch=25", "train.epochs=8", "train.evaluate_every=4")
ORDERS = ("shuffled", "other")  # of the first rule's further controls
EVALUATIONS, FEATURES = "evaluations.jsonl", "features-{}.pt"


@dataclass(frozen=True)
class Run:
    """One run: its rule, its seed, of weights and of data, and the order of its patches (`config.DataConfig`)."""

    rule: str
    seed: int
    order: str = "recorded"

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return (
            f"{self.rule}-{self.seed}"
            if self.order == "recorded"
            else f"{self.rule}-{self.order}-{self.seed}"
        )


@dataclass(frozen=True)
class Plan:
    """What a demo runs: every rule with every seed and its data; the first rule also on data without order or scenes.

    shuffles: how many seeds of these further controls there are, at most.
    """

    rules: Sequence[str] = tuple(RATES)
    seeds: int = 5
    overrides: Sequence[str] = ()
    shuffles: int = 3

    def settings(self, run: Run) -> Config:
        """The configuration of one run; `overrides` win over the plan's own settings."""
        own = (f"train.learning={run.rule}", f"train.lr_recurrent={RATES.get(run.rule, RATES['rfp'])}")
        which = (f"train.seed={run.seed}", f"data.seed={run.seed}", f"data.order={run.order}")
        return config.read(None, [*OWN, *own, *which, *self.overrides])

    @property
    def runs(self) -> list[Run]:
        plain = [Run(rule, seed) for seed in range(self.seeds) for rule in self.rules]
        few = range(min(self.shuffles, self.seeds))
        return [*plain, *(Run(self.rules[0], seed, order) for order in ORDERS for seed in few)]


def run(
    plan: Plan, out: Path, advance: Callable[[int, int], None], jobs: int = 0
) -> tuple[figures.Runs, list[Path]]:
    """Run a demo in the folder `out`, except for what is there already.

    It writes features-SEED.pt (anew if it is damaged or of another configuration), a folder for each run,
    evaluations.jsonl with the evaluations of all runs, fig3 and fig4.
    advance: called with the number of steps done and their total. jobs: processes, with one thread each; 0: one per
    core.

    Returns the evaluations by rule, and the paths of evaluations.jsonl and the figures. Raises ValueError, with nothing
    written, for overrides that one of the runs can't have.
    """
    for one in plan.runs:
        plan.settings(one)
    out.mkdir(parents=True, exist_ok=True)
    total = len(plan.runs) + plan.seeds
    advance(0, total)
    count = min(jobs or len(os.sched_getaffinity(0)), len(plan.runs))
    with _processes.Workers(count) as pool:
        done = 0
        for work, given in (
            (functools.partial(_make_features, plan, out), range(plan.seeds)),
            (functools.partial(_one, plan, out), plan.runs),
        ):
            for _ in pool.map(work, given):
                done += 1
                advance(done, total)
    folders = [out / one.name for one in plan.runs]
    runs = figures.load(folders)
    lines = "".join(_files.read_text(folder / train.EVALUATION) + "\n" for folder in folders)
    _files.write_text(out / EVALUATIONS, lines)
    return runs, [out / EVALUATIONS, *figures.draw(runs, out)]


def _source(settings: Config) -> str:
    """What features depend on, as text: the data, but not their order, and the backbone."""
    recorded = dataclasses.replace(settings.data, order="recorded")
    return json.dumps([dataclasses.asdict(recorded), settings.model.backbone])


def _features(out: Path, settings: Config) -> dict[str, Any] | None:
    """The features of a configuration that `out` holds; None if there are none, of another one or damaged ones."""
    try:
        kept = storage.unpickled(out / FEATURES.format(settings.data.seed))
        return kept if kept["of"] == _source(settings) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
        return None


def _make_features(plan: Plan, out: Path, seed: int) -> None:
    """Write the features of a seed's data, unless they are there. Called in a process of its own, with one thread."""
    torch.set_num_threads(1)
    settings = plan.settings(Run(plan.rules[0], seed))
    if _features(out, settings) is None:
        made = sequences.features(settings, backbone.load(settings.model.backbone))
        kept = {side: getattr(made, side) for side in ("train", "test", "validation")}
        storage.save(out / FEATURES.format(settings.data.seed), {**kept, "of": _source(settings)})


def _one(plan: Plan, out: Path, which: Run) -> None:
    """Do one run, unless it is finished. Called in a process of its own, which uses one thread."""
    folder = out / which.name
    if (folder / train.EVALUATION).exists():
        return
    torch.set_num_threads(1)
    settings = plan.settings(which)
    kept = _features(out, settings)
    if kept is None:
        raise ValueError(
            f"{out / FEATURES.format(settings.data.seed)} is damaged, or of another configuration"
        )
    sides = data.datasets(settings.data)
    known = sequences.Features(sides, kept["train"], kept["test"], kept["validation"])
    train.Trainer(settings, folder, lambda _: None, known).run()
