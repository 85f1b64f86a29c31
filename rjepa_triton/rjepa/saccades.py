"""Scan-path prediction: where the eye goes next, from the context c(t) of a frozen model, beside what needs no picture.

Each predictor gives a density of the next fixation's place, of which likelihood and NSS are measured:

    uniform     the same everywhere in the frame
    centre      where training's fixations lie in the frame: the centre bias
    markov      of the saccade, given the place of the eye and the saccade that led there
    c           of the saccade, given c(t) = [s(t), m(t)] of all areas
    markov+c    of the saccade, given both: what it gains over markov is what c knows

A density is constant in cells of a grid, of the frame for `centre`, around the eye for those of the saccade, and 0
outside the frame. Those of the saccade are logistic regressions (scikit-learn) over the cells that training has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bench.harness.statistics import interval
from . import evidence
from .patches import FixationSequences
from .sequences import Sequences, encoding, taken
from .train import Finished

PREDICTORS = ("uniform", "centre", "markov", "c", "markov+c")
LAPSE = 0.02  # part of every predicted density that is uniform: no place is impossible
STRENGTHS = (0.001, 0.01, 0.1)  # C of logistic regressions that are tried
FITTED = 12000  # at most so many saccades are learned from, and half as many choose C


@dataclass(frozen=True)
class Saccades:
    """n saccades of late steps.

    start, end    (n, 2) degrees from the frame's centre
    before        (n, 2) degrees, the saccade that led to the start
    context       (n, P) c(t) at the start
    extent        (n, 2) width and height of the frame, degrees
    sequence, source   (n,) the number of the sequence, and its picture or movie
    """

    start: np.ndarray
    end: np.ndarray
    before: np.ndarray
    context: np.ndarray
    extent: np.ndarray
    sequence: np.ndarray
    source: np.ndarray


@dataclass(frozen=True)
class Grid:
    """Squares of `cell` degrees, K of them, whose lower corners are `corners` (K, 2)."""

    corners: np.ndarray
    cell: float

    @classmethod
    def of(cls, places: np.ndarray, cell: float) -> tuple[Grid, np.ndarray]:
        """The squares that hold places (n, 2), and the number of each place's. One has (0, 0) in its middle."""
        which = np.floor(places / cell + 0.5)
        corners, number = np.unique(which, axis=0, return_inverse=True)
        return cls((corners - 0.5) * cell, cell), number.reshape(-1)

    def number(self, places: np.ndarray) -> np.ndarray:
        """(n,) the square that holds each place, or -1."""
        above = places[:, None] - self.corners
        inside = np.all((above >= 0) & (above < self.cell), axis=-1)
        return np.where(inside.any(1), inside.argmax(1), -1)

    def inside(self, extent: np.ndarray, eye: np.ndarray) -> np.ndarray:
        """(n, K) the area of each square, moved by `eye` (n, 2), that is inside of frames (n, 2) around 0."""
        low = self.corners + eye[:, None]
        edge = extent[:, None] / 2
        overlap = np.minimum(low + self.cell, edge) - np.maximum(low, -edge)
        return np.prod(np.clip(overlap, 0, None), axis=-1)


def scores(
    shares: np.ndarray, inside: np.ndarray, hit: np.ndarray, area: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of n predictions: bits by which the density at the place beats the uniform one, and its NSS, (n,) each.

    shares  (n, K) probabilities of the squares of a grid
    inside  (n, K) areas of the squares inside of the frame; what a prediction has beyond the frame is taken into it
    hit     (n,) the square in which the place is; -1: none, where the density is that of `LAPSE`
    area    (n,) of the frame

    NSS is the density at the place, in standard deviations from its mean over the frame; 0 for a density that is the
    same everywhere.
    """
    mass = shares * inside
    total = mass.sum(1, keepdims=True)
    share = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
    lost = (total[:, 0] == 0)[:, None]  # nothing is predicted inside the frame
    uniform = 1 / area[:, None]
    lapse = np.where(lost, 1.0, LAPSE)
    density = (1 - lapse) * np.divide(
        share, inside, out=np.zeros_like(share), where=inside > 0
    ) + lapse * uniform
    rest = lapse[:, 0] * uniform[:, 0]  # outside of all squares
    rows = np.arange(len(hit))
    at = np.where(hit >= 0, density[rows, np.maximum(hit, 0)], rest)
    beyond = np.clip(area - inside.sum(1), 0, None)
    squares = (density**2 * inside).sum(1) + rest**2 * beyond
    spread = np.sqrt(np.clip(squares / area - uniform[:, 0] ** 2, 0, None))
    even = spread <= 1e-9 * uniform[:, 0]
    nss = np.where(even, 0.0, (at - uniform[:, 0]) / np.where(even, 1.0, spread))
    return np.log2(at * area), nss


def predict(run: Finished, *, cell: float = 3.0) -> dict[str, Any]:
    """How well saccades of a finished run's test sequences are predicted by each of `PREDICTORS`.

    cell: degrees, the side of the grids' squares.

    Returns a record: "saccades" of the "train" and "test" side; for each predictor "bits" per saccade beyond the
    uniform density, and "nss"; "gain", of markov+c over markov, "bits" and "nss" as [mean, half its 95 % interval] over
    test sequences, None for the half-width of fewer than two.

    Raises ValueError for a cell that isn't positive, an order of patches in which no saccade leads to the next, or
    sequences of fewer than three fixations.
    """
    if not (np.isfinite(cell) and cell > 0):
        raise ValueError(f"cell must be a positive number of degrees, got {cell}")
    if run.settings.data.order != "recorded":
        raise ValueError(f"saccades go with data.order='recorded', got {run.settings.data.order!r}")
    if run.settings.data.steps < 3:
        raise ValueError(f"saccades go with data.steps of 3 or more, got {run.settings.data.steps}")
    train, test = (saccades(run.model, side) for side in (run.data.train, run.data.test))
    found = measured(train, test, cell)
    record: dict[str, Any] = {"saccades": {"train": len(train.start), "test": len(test.start)}}
    for name, values in found.items():
        record[name] = {kind: float(one.mean()) for kind, one in values.items()}
    record["gain"] = {}
    for kind in ("bits", "nss"):
        more = found["markov+c"][kind] - found["markov"][kind]
        means = [float(more[test.sequence == one].mean()) for one in np.unique(test.sequence)]
        record["gain"][kind] = list(interval(means)) if len(means) > 1 else [means[0], None]
    return record


def centre(places: np.ndarray, test: Saccades, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """`scores` of the centre bias: how often training's fixations, at `places` (n, 2), are in each square."""
    grid, number = Grid.of(places, cell)
    counts = np.bincount(number, minlength=len(grid.corners)) / len(number)
    area = test.extent.prod(1)
    inside, hit = grid.inside(test.extent, np.zeros_like(test.start)), grid.number(test.end)
    return scores(np.broadcast_to(counts, inside.shape), inside, hit, area)


def measured(train: Saccades, test: Saccades, cell: float) -> dict[str, dict[str, np.ndarray]]:
    """For each of `PREDICTORS`, learned from `train`: "bits" and "nss" (n,) of the saccades of `test` (`scores`)."""
    area = test.extent.prod(1)
    found = {"uniform": (np.zeros(len(area)), np.zeros(len(area))), "centre": centre(train.end, test, cell)}
    grid, number = Grid.of(train.end - train.start, cell)
    inside, hit = grid.inside(test.extent, test.start), grid.number(test.end - test.start)
    for name in ("markov", "c", "markov+c"):
        seen = [_inputs(one, name) for one in (train, test)]
        found[name] = scores(_probabilities(seen[0], number, seen[1], train), inside, hit, area)
    return {name: {"bits": bits, "nss": nss} for name, (bits, nss) in found.items()}


@torch.no_grad()
def saccades(model: Any, side: Sequences) -> Saccades:
    """The saccades of a side's late steps, with the model's c(t) at their start."""
    patches = side.patches
    assert isinstance(patches, FixationSequences)
    place = np.stack([patches.positions(i) for i in range(len(patches))], axis=1)
    extent = np.stack([patches.extent(i) for i in range(len(patches))])
    late = max(1, min(evidence.LATE, len(place) - 2))
    count = len(place) - 1 - late
    context = _contexts(model, side)[late:-1]
    number = np.broadcast_to(np.arange(len(patches)), (count, len(patches))).reshape(-1)
    return Saccades(
        place[late:-1].reshape(-1, 2),
        place[late + 1 :].reshape(-1, 2),
        (place[late:-1] - place[late - 1 : -2]).reshape(-1, 2),
        context.double().numpy().reshape(-1, context.shape[-1]),
        extent[number],
        number,
        side.sources[number],
    )


def _contexts(model: Any, side: Sequences, size: int = 64) -> Tensor:
    """c(t) (T, n, P): s and m of the top area, and of low areas, where these recur, their means over places."""
    encoder, parts = model.encoder, []
    for which in torch.arange(len(side)).split(size):
        batch = taken(side, which, model)
        if not len(encoder.areas):
            made = encoding(model, batch)
            parts.append(torch.cat([made.s, made.m], dim=-1))
            continue
        assert batch.patches is not None
        state, steps = None, []
        for patch in batch.patches.split(1):
            made = encoder(patch, state)
            state = made.state
            low = [values.mean((-2, -1)) for pair in state.areas for values in pair]
            steps.append(torch.cat([made.s[0], made.m[0], *low], dim=-1))
        parts.append(torch.stack(steps))
    return torch.cat(parts, dim=1)


def _inputs(one: Saccades, predictor: str) -> np.ndarray:
    """What a predictor of the saccade sees, (n, P)."""
    x, y = one.start.T
    dx, dy = one.before.T
    path = np.stack([x, y, x * x, y * y, x * y, dx, dy, np.hypot(dx, dy)], axis=1)
    return np.concatenate(
        [path] * ("markov" in predictor) + [one.context] * ("c" in predictor.split("+")), axis=1
    )


def _probabilities(train: np.ndarray, number: np.ndarray, test: np.ndarray, of: Saccades) -> np.ndarray:
    """(n, K) for test inputs (n, P), the probability of each square, from training inputs and the squares hit."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupShuffleSplit

    mean, std = train.mean(0), np.maximum(train.std(0), 1e-8)
    a, b = (evidence.standardised(rows, mean, std) for rows in (train, test))
    count = int(number.max()) + 1
    groups = of.source if len(np.unique(of.source)) > 1 else of.sequence

    def shares(rows: np.ndarray, strength: float, seen: np.ndarray) -> np.ndarray:
        there = np.unique(number[rows])
        made = np.zeros((len(seen), count))
        if len(there) < 2:
            made[:, there] = 1.0
            return made
        fitted = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(a[rows], number[rows])
        made[:, fitted.classes_] = fitted.predict_proba(seen)
        return made

    every = np.linspace(0, len(a) - 1, min(len(a), FITTED)).astype(int)
    strength = STRENGTHS[0]
    if len(np.unique(groups)) > 1:
        some = every[:: max(1, 2 * len(every) // FITTED)]
        learned, left = next(
            GroupShuffleSplit(1, test_size=0.3, random_state=0).split(some, groups=groups[some])
        )
        learned, left = some[learned], some[left]
        at = np.arange(len(left)), number[left]
        likely = [
            np.log(LAPSE / count + (1 - LAPSE) * shares(learned, one, a[left])[at]).mean()
            for one in STRENGTHS
        ]
        strength = STRENGTHS[int(np.argmax(likely))]
    return shares(every, strength, b)
