"""Probes for labels: what a classifier finds of the labels of scenes in a frozen h(t), beside what it finds in x(t).

Two classifiers of scikit-learn see h(t) of single steps, late in the sequence: logistic regression ("linear"), and the
vote of the nearest neighbours by the cosine ("neighbours"). A third sees h(1) … h(t) and learns where to look
("attentive"): logistic regression on what a query q gathers,

    Σ_{s ≤ t} w_s h(s),        w = softmax over s ≤ t of q·h(s) / √P

All learn from the training sequences and are tested on sources that are held out whole. x(t) is of the patch alone:
what h tells beyond it is memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _checks as check
from ..bench.harness.statistics import interval
from . import evidence, stretches
from .columns import as_text
from .evaluation import embedded
from .patches import FixationSequences
from .sequences import Sequences
from .train import Finished

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # C, the inverse of the penalty, of logistic regressions that are tried
PROBES = ("linear", "neighbours", "attentive")


def probe(run: Finished, file: str | Path, *, column: str = "label", neighbours: int = 20) -> dict[str, Any]:
    """How well the labels in a table (`stretches.read`) are told from a finished run's h and x, on test sequences.

    column: of the table, with the labels. neighbours: how many vote, at most.

    Returns a record:

    labels        the labels, sorted
    rows          fixations that were used of the "train" and "test" side, and those without a label, "unlabelled"
    most_frequent    accuracy of always saying the most frequent label of training
    linear, neighbours, attentive   for "h" and "x" each: accuracy, and balanced_accuracy, the mean over the test's
                  labels; "gain": accuracy from h less that from x, [mean, half its 95 % interval] over test
                  sequences; None for the half-width of fewer than two

    Raises ValueError if data.order isn't "recorded", if training has fewer than two labels or lacks one of the test's,
    and what `stretches.read` raises.
    """
    check.integer("neighbours", neighbours, 1)
    if run.settings.data.order != "recorded":
        raise ValueError(
            f"labels go with data.order='recorded', got {run.settings.data.order!r}: other patches have other scenes"
        )
    found = stretches.read(file)
    if column not in found.columns:
        raise ValueError(
            f"{found.source}: no column {column!r}; there are {', '.join(found.columns) or 'no others'}"
        )
    named = as_text(found.columns[column])
    unnamed = found.row[named == ""]
    if len(unnamed):
        raise ValueError(f"{found.source}: row {unnamed[0]}: has no {column}")
    label = np.empty(len(found.movie), dtype=named.dtype)
    label[found.stretch] = named
    sides = [_labelled(side, found, label) for side in (run.data.train, run.data.test)]
    (train, learned), (test, wanted) = ((which, label[stretch[which]]) for which, stretch in sides)
    _check_labels(found.source, learned, wanted)
    numbers = {side: int(which.sum()) for side, which in (("train", train), ("test", test))}
    numbers["unlabelled"] = sum(which.size for which, _ in sides) - sum(numbers.values())
    record: dict[str, Any] = {"labels": sorted(set(learned.tolist())), "rows": numbers}
    often, counts = np.unique(learned, return_counts=True)
    record["most_frequent"] = float(np.mean(wanted == often[counts.argmax()]))

    groups = np.broadcast_to(run.data.train.sources, train.shape)[train]
    strength: float | None = None
    right: dict[str, dict[str, np.ndarray]] = {name: {} for name in PROBES}
    for inputs in ("x", "h"):  # x's strength is h's, too
        steps = [
            embedded(run.model, side, inputs).double().numpy() for side in (run.data.train, run.data.test)
        ]
        rows = [all_of[-len(which) :][which] for all_of, which in zip(steps, (train, test), strict=True)]
        predicted, strength = classified(rows[0], learned, rows[1], groups, neighbours, strength)
        predicted["attentive"] = attended((steps[0], train), learned, (steps[1], test), strength)
        for name, said in predicted.items():
            right[name][inputs] = said == wanted
            record.setdefault(name, {})[inputs] = {
                "accuracy": float(np.mean(said == wanted)),
                "balanced_accuracy": float(
                    np.mean([np.mean(said[wanted == one] == one) for one in set(wanted)])
                ),
            }
    sequence = np.broadcast_to(np.arange(test.shape[1]), test.shape)[test]
    for name in PROBES:
        more = right[name]["h"].astype(float) - right[name]["x"]
        record[name]["gain"] = _interval([more[sequence == one].mean() for one in np.unique(sequence)])
    return record


def classified(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    groups: np.ndarray,
    neighbours: int,
    strength: float | None = None,
) -> tuple[dict[str, np.ndarray], float]:
    """What each classifier of single rows (n, P) that learns from labels (n,) says of test rows, and the strength C.

    groups: (n,) what is left out as a whole in the cross-validation that chooses C, unless `strength` is given: each
    label's rows must be of at least two groups, else C is 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    mean, std = train.mean(0), np.maximum(train.std(0), 1e-8)
    a, b = (evidence.standardised(rows, mean, std) for rows in (train, test))
    strength = _chosen(a, labels, groups) if strength is None else strength
    made = {
        "linear": LogisticRegression(C=strength, max_iter=1000),
        "neighbours": KNeighborsClassifier(min(neighbours, len(a)), metric="cosine"),
    }
    return {name: one.fit(a, labels).predict(b) for name, one in made.items()}, strength


def attended(
    train: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    test: tuple[np.ndarray, np.ndarray],
    strength: float,
) -> np.ndarray:
    """What the attentive classifier says of each test row.

    train, test: all steps (T, n, P), and which of the last L have a label, (L, n). labels: those of training, in
    the order of `which`. It lessens C times the sum of the cross-entropies plus half the squares of q and of the
    weights of the regression, C = strength, by L-BFGS from q = 0, the mean. Training takes whole sequences, at most
    `evidence.CHOOSING` rows or one sequence.
    """
    from scipy.optimize import minimize

    (steps, which), names = train, np.unique(labels)
    rows = steps[-len(which) :][which]
    mean, std = rows.mean(0), np.maximum(rows.std(0), 1e-8)
    place = np.zeros(which.shape, dtype=np.int64)
    place[which] = np.searchsorted(names, labels)
    taken = np.linspace(
        0, which.shape[1] - 1, max(1, min(which.shape[1], evidence.CHOOSING // len(which)))
    ).astype(int)
    taken = np.union1d(taken, [np.argmax(((place == k) & which).any(0)) for k in range(len(names))])
    given = torch.from_numpy(evidence.standardised(steps[:, taken], mean, std))
    seen = torch.from_numpy(which[:, taken])
    aim, width = torch.from_numpy(place[:, taken])[seen], steps.shape[-1]

    def split(parameters: np.ndarray) -> list[torch.Tensor]:
        """q (P,), the regression's weights (K, P) and biases (K,)."""
        parts = torch.from_numpy(parameters).split([width, len(names) * width, len(names)])
        return [part.view(shape) for part, shape in zip(parts, [(-1,), (-1, width), (-1,)], strict=True)]

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        query, weights, bias = (part.requires_grad_() for part in split(parameters))
        logits = torch.nn.functional.linear(_gathered(given, query, len(which))[seen], weights, bias)
        loss = strength * torch.nn.functional.cross_entropy(logits, aim, reduction="sum")
        loss = loss + 0.5 * (query.square().sum() + weights.square().sum())
        found = torch.autograd.grad(loss, [query, weights, bias])
        return float(loss.detach()), torch.cat([one.flatten() for one in found]).numpy()

    start = np.zeros(width + len(names) * (width + 1))
    query, weights, bias = split(minimize(objective, start, jac=True, method="L-BFGS-B").x)
    (steps, which), found = test, []
    for part in np.array_split(np.arange(which.shape[1]), max(1, which.size // evidence.CHOOSING)):
        given = torch.from_numpy(evidence.standardised(steps[:, part], mean, std))
        found.append(
            torch.nn.functional.linear(_gathered(given, query, len(which)), weights, bias).argmax(-1)
        )
    return names[torch.cat(found, dim=1).numpy()[which]]


def _gathered(steps: torch.Tensor, query: torch.Tensor, last: int) -> torch.Tensor:
    """What a query (P,) gathers of steps (T, n, P) up to each of the last L, (L, n, P)."""
    count = len(steps)
    score = steps @ query / steps.shape[-1] ** 0.5
    later = torch.ones(count, count, dtype=torch.bool).triu(1)[-last:, :, None]
    share = score.expand(last, -1, -1).masked_fill(later, -torch.inf).softmax(1)
    return torch.einsum("tsn,snp->tnp", share, steps)


def _chosen(rows: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """The strength C that tells the labels of left-out groups best."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

    folds = min(5, *(len(np.unique(groups[labels == one])) for one in np.unique(labels)))
    if folds < 2:
        return 1.0
    some = np.linspace(0, len(rows) - 1, min(len(rows), evidence.CHOOSING)).astype(int)
    search = GridSearchCV(
        LogisticRegression(max_iter=1000),
        {"C": list(STRENGTHS)},
        cv=StratifiedGroupKFold(folds),
        scoring="balanced_accuracy",
        refit=False,
    )
    search.fit(rows[some], labels[some], groups=groups[some])
    return float(search.best_params_["C"])


def _labelled(
    side: Sequences, found: stretches.Annotations, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(late steps, n): which late fixations of a side have a label, and the number of each one's stretch."""
    assert isinstance(side.patches, FixationSequences)
    stretch = found.at(side.patches)
    stretch = stretch[min(evidence.LATE, len(stretch) - 1) :]
    return stretch >= 0, stretch


def _check_labels(source: str, learned: np.ndarray, wanted: np.ndarray) -> None:
    """Raise ValueError if a classifier can't learn the labels, or can't be tested on them."""
    there = sorted(set(learned.tolist()))
    if len(there) < 2:
        raise ValueError(
            f"{source}: training sequences must have at least 2 labels, got {', '.join(there) or 'none'}"
        )
    if not len(wanted):
        raise ValueError(f"{source}: no late fixation of the test sequences has a label")
    strange = sorted(set(wanted.tolist()) - set(there))
    if strange:
        raise ValueError(
            f"{source}: test sequences have labels that no training sequence has: {', '.join(strange)}; hold out other "
            "sources, or leave these labels out"
        )


def _interval(values: list[Any]) -> list[float | None]:
    if len(values) < 2:
        return [float(np.mean(values)), None]
    return list(interval([float(value) for value in values]))
