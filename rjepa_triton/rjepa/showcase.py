"""`rjepa demo`: R-JEPA end to end, from data over training by several rules and seeds to evaluation and figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
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
EVALUATIONS, COMPARED, FEATURES = "evaluations.jsonl", "compared.jsonl", "features-{}.pt"


@dataclass(frozen=True)
class Run:
    """One run: its rule, its seed, of weights and of data, the order of its patches (`config.DataConfig`), and what is
    varied: overrides, separated by spaces.
    """

    rule: str
    seed: int
    order: str = "recorded"
    varied: str = ""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        order = "" if self.order == "recorded" else self.order
        varied = re.sub(r"[^\w.=,+-]+", "_", self.varied)
        return "-".join(part for part in (self.rule, order, varied, str(self.seed)) if part)


@dataclass(frozen=True)
class Plan:
    """What a demo runs: every rule with every seed and its data; the first rule also on data without order or scenes.

    shuffles: how many seeds of these further controls there are, at most. vary: of each, overrides separated by spaces;
    the first rule runs with them too, with every seed.
    """

    rules: Sequence[str] = tuple(RATES)
    seeds: int = 5
    overrides: Sequence[str] = ()
    shuffles: int = 3
    vary: Sequence[str] = ()

    def settings(self, run: Run) -> Config:
        """The configuration of one run; `overrides` win over the plan's own settings, and what is varied over these."""
        own = (f"train.learning={run.rule}", f"train.lr_recurrent={RATES.get(run.rule, RATES['rfp'])}")
        which = (f"train.seed={run.seed}", f"data.seed={run.seed}", f"data.order={run.order}")
        return config.read(None, [*OWN, *own, *which, *self.overrides, *run.varied.split()])

    @property
    def runs(self) -> list[Run]:
        plain = [Run(rule, seed) for seed in range(self.seeds) for rule in self.rules]
        few = range(min(self.shuffles, self.seeds))
        shuffled = [Run(self.rules[0], seed, order) for order in ORDERS for seed in few]
        varied = [Run(self.rules[0], seed, varied=each) for each in self.vary for seed in range(self.seeds)]
        return [*plain, *shuffled, *varied]

    def check(self) -> None:
        """Raise ValueError for overrides that one of the runs can't have."""
        for each in self.vary:
            if changed := [override for override in each.split() if override.startswith("data.")]:
                raise ValueError(
                    f"vary must leave the data as they are, which all runs of a seed share, got {', '.join(changed)}"
                )
        names = [one.name for one in self.runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"runs must have names of their own, got {', '.join(twice)} more than once")
        for one in self.runs:
            self.settings(one)


def run(
    plan: Plan, out: Path, advance: Callable[[int, int], None], jobs: int = 0
) -> tuple[figures.Runs, list[Path]]:
    """Run a demo in the folder `out`, except for what is there already.

    It writes features-SEED.pt (anew if it is damaged or of another configuration), a folder for each run,
    evaluations.jsonl, and fig3 and fig4, of the runs that nothing is varied in, and compared.jsonl, what
    `figures.compared` reads of all runs, if something is.
    advance: called with the number of steps done and their total. jobs: processes, with one thread each; 0: one per
    core.

    Returns the evaluations by rule of the runs that nothing is varied in, and the paths of what it wrote. Raises as
    `Plan.check`, with nothing written.
    """
    plan.check()
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
    folders = [out / one.name for one in plan.runs if not one.varied]
    runs = figures.load(folders)
    lines = "".join(_files.read_text(folder / train.EVALUATION) + "\n" for folder in folders)
    _files.write_text(out / EVALUATIONS, lines)
    written = [out / EVALUATIONS]
    if plan.vary:
        named = figures.evaluations([out / one.name for one in plan.runs])
        _files.write_text(
            out / COMPARED, "".join(json.dumps(figures.reduced(found)) + "\n" for _, found in named)
        )
        written.append(out / COMPARED)
    return runs, [*written, *figures.draw(runs, out)]


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
