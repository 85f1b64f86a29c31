"""Representational similarity: how alike h and recorded responses hold the same stretches of movies apart.

Each side makes a matrix of the dissimilarities of all pairs of stretches; the two matrices are then correlated
(Kriegeskorte, Mur and Bandettini 2008). Responses may be of anything: neurons, voxels, sensors, ratings, other models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import _checks as check
from ..bench.harness.statistics import RESAMPLES
from . import evidence, stretches
from .columns import as_numbers, as_text
from .evaluation import embedded
from .patches import FixationSequences
from .report import listed
from .train import Finished

METRICS = ("correlation", "euclidean", "cosine")  # of `scipy.spatial.distance.pdist`
KINDS = ("spearman", "pearson")
SIDES = ("test", "train", "both")
SUBJECT = "subject"
LEAST = 4  # stretches: three have as many pairs as can be ranked in six ways


def compare(
    run: Finished,
    file: str | Path,
    *,
    metric: str = "correlation",
    kind: str = "spearman",
    side: str = "test",
    permutations: int = 999,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a finished run's h, and x, with the responses in a table (`stretches.read`).

    Every column beside movie, start, end and subject is a channel of the responses, and every row holds those to one
    stretch, with a column subject those of one subject. The model's response to a stretch is the mean of h over all
    late fixations in it.

    metric          of the dissimilarities of two stretches' responses (`METRICS`)
    kind            the correlation of the two sides' dissimilarities
    side            whose sequences are used: "test", which the model hasn't seen, "train" or "both"
    permutations    of the stretches, for the p-values; seed: of these, and of the bootstrap

    Returns a record: "stretches", how many are used, and "unseen", those without a late fixation, which are left out;
    "channels" and "subjects"; of "h" and of "x" the "similarity", the mean over subjects, and its one-sided "p", the
    share of permutations with as much, itself among them; "gain", similarity of h less that of x, and the bounds of its
    95 % bootstrap interval over stretches; "ceiling", the bounds of the `noise_ceiling` of several subjects, else None.

    Raises ValueError for an argument out of its range, fewer than 4 stretches with fixations, a subject without a
    stretch that others have, cells that aren't numbers, and responses that are constant where that can't be compared.
    """
    check.one_of("metric", metric, METRICS)
    check.one_of("kind", kind, KINDS)
    check.one_of("side", side, SIDES)
    check.integer("permutations", permutations, 1)
    check.integer("seed", seed, 0)
    if run.settings.data.order != "recorded":
        raise ValueError(f"responses go with data.order='recorded', got {run.settings.data.order!r}")
    found = stretches.read(file, apart=(SUBJECT,))
    responses, subjects = _responses(found)
    chosen = {"test": [run.data.test], "train": [run.data.train], "both": [run.data.train, run.data.test]}[
        side
    ]
    places, values = [], []
    for one in chosen:
        assert isinstance(one.patches, FixationSequences)
        late = min(evidence.LATE, one.targets.shape[0] - 1)
        places.append(found.at(one.patches)[late:].reshape(-1))
        made = [embedded(run.model, one, name)[late:] for name in ("h", "x")]
        values.append([part.double().numpy().reshape(-1, part.shape[-1]) for part in made])
    place = np.concatenate(places)
    counts = np.bincount(place[place >= 0], minlength=len(found.movie))
    seen = np.flatnonzero(counts)
    if len(seen) < LEAST:
        raise ValueError(
            f"{found.source}: at least {LEAST} stretches must have late fixations of the {side} sequences, got "
            f"{len(seen)} of {len(counts)}"
        )
    recorded = []
    for number, of_subject in enumerate(responses):
        if not np.isfinite(of_subject[seen]).all():
            bad = seen[~np.isfinite(of_subject[seen]).all(1)][0]
            raise ValueError(
                f"{found.source}: subject {subjects[number]!r} has no row for the stretch of row "
                f"{found.row[found.stretch == bad][0]}"
            )
        recorded.append(dissimilarities(of_subject[seen], metric, f"{found.source}: responses"))
    rng = np.random.default_rng(seed)
    record: dict[str, Any] = {
        "stretches": len(seen),
        "unseen": len(counts) - len(seen),
        "channels": responses.shape[-1],
        "subjects": len(subjects),
    }
    models = {}
    for name, parts in zip(("h", "x"), zip(*values, strict=True), strict=True):
        rows = np.concatenate(parts)
        means = np.stack([rows[place == k].mean(0) for k in seen])
        models[name] = dissimilarities(means, metric, name)
        similarity = np.mean([correlation(models[name], one, kind) for one in recorded])
        drawn = [
            np.mean([correlation(permuted, one, kind) for one in recorded])
            for permuted in (reordered(models[name], rng.permutation(len(seen))) for _ in range(permutations))
        ]
        least = similarity - 1e-12  # a permutation that changes nothing counts, whatever rounding does
        record[name] = {
            "similarity": float(similarity),
            "p": float((1 + np.sum(np.array(drawn) >= least)) / (1 + permutations)),
        }
    record["gain"] = [
        record["h"]["similarity"] - record["x"]["similarity"],
        *_bootstrap(models["h"], models["x"], recorded, kind, rng),
    ]
    record["ceiling"] = list(noise_ceiling(np.array(recorded), kind)) if len(recorded) > 1 else None
    return record


def dissimilarities(responses: np.ndarray, metric: str, name: str = "responses") -> np.ndarray:
    """The dissimilarity of each pair of rows of (k, P), (k(k-1)/2,), pairs in the order (0, 1), (0, 2), …, (1, 2), ….

    "correlation" is 1 - r over the P channels, "cosine" 1 - cosine, "euclidean" the distance.

    Raises ValueError, with `name`, where the metric isn't defined: for a row that is constant, or zero.
    """
    from scipy.spatial.distance import pdist

    bad = {
        "correlation": np.ptp(responses, axis=1) == 0,
        "cosine": ~responses.any(1),
        "euclidean": np.zeros(len(responses), dtype=bool),
    }[metric]
    if bad.any():
        what = "differ between channels" if metric == "correlation" else "not all be 0"
        raise ValueError(
            f"{name} must {what} in each stretch for metric={metric!r}, but {bad.sum()} of {len(bad)} don't: number "
            f"{listed((np.flatnonzero(bad) + 1).tolist())}; metric='euclidean' takes them"
        )
    return np.asarray(pdist(responses, metric))


def correlation(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    """Pearson's correlation of a and b (n,), or of their ranks; ties share the mean of their ranks.

    0 if one of the two is constant.
    """
    from scipy.stats import rankdata

    if kind == "spearman":
        a, b = rankdata(a), rankdata(b)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


def reordered(pairs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The dissimilarities of the same rows in another order."""
    from scipy.spatial.distance import squareform

    return np.asarray(squareform(squareform(pairs)[np.ix_(order, order)], checks=False))


def noise_ceiling(recorded: np.ndarray, kind: str) -> tuple[float, float]:
    """The bounds between which the best possible model's similarity lies, of dissimilarities (S, pairs) of S subjects.

    Each subject is compared with the mean of the others (lower bound), and of all (upper), after each one's ranks, or
    standard scores, are taken (Nili et al. 2014).
    """
    from scipy.stats import rankdata, zscore

    each = rankdata(recorded, axis=1) if kind == "spearman" else zscore(recorded, axis=1)
    total = each.sum(0)
    lower = [correlation(one, total - one, kind) for one in each]
    upper = [correlation(one, total, kind) for one in each]
    return float(np.mean(lower)), float(np.mean(upper))


def _responses(found: stretches.Annotations) -> tuple[np.ndarray, list[str]]:
    """(S, k, P) the responses of S subjects to k stretches, NaN where there is no row, and the subjects' names."""
    channels = [name for name in found.columns if name != SUBJECT]
    if not channels:
        raise ValueError(f"{found.source}: no column has responses beside movie, start, end and subject")
    table = np.empty((len(found.row), len(channels)))
    for column, name in enumerate(channels):
        values, texts = as_numbers(found.columns[name])
        table[:, column] = values
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            told = repr(texts[int(bad[0])]) if int(bad[0]) in texts else "missing or not finite"
            raise ValueError(
                f"{found.source}: row {found.row[bad[0]]}: {name} must be a number, but is {told}"
            )
    who = as_text(found.columns[SUBJECT]) if SUBJECT in found.columns else np.full(len(table), "")
    subjects = sorted(set(who.tolist()))
    made = np.full((len(subjects), len(found.movie), len(channels)), np.nan)
    made[np.searchsorted(subjects, who), found.stretch] = table
    return made, subjects


def _bootstrap(
    a: np.ndarray, b: np.ndarray, recorded: list[np.ndarray], kind: str, rng: np.random.Generator
) -> tuple[float, float]:
    """Bounds of the 95 % interval of a's similarity less b's, over stretches.

    Stretches are drawn with replacement; pairs of one with itself are left out.
    """
    from scipy.spatial.distance import squareform

    whole = [squareform(one) for one in (a, b, *recorded)]
    count = len(whole[0])
    upper = np.triu_indices(count, 1)
    drawn: list[float] = []
    while len(drawn) < RESAMPLES:
        which = rng.integers(0, count, count)
        one, other = which[upper[0]], which[upper[1]]
        apart = one != other
        if apart.sum() < 3:
            continue
        first, second, *rest = (matrix[one[apart], other[apart]] for matrix in whole)
        differences = [correlation(first, r, kind) - correlation(second, r, kind) for r in rest]
        drawn.append(float(np.mean(differences)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
