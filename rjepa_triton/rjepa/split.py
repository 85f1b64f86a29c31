"""Train and test sides that share no movie or no participant: these are held out as a whole, never in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _checks as check


class Labelled(Protocol):
    """What can be split: `Fixations` or `FixationSequences`."""

    @property
    def participant(self) -> np.ndarray: ...

    @property
    def movie(self) -> np.ndarray: ...

    def select(self, which: np.ndarray) -> Any: ...


class Split(NamedTuple):
    """Train and test sides that share no movie, no participant, or neither; left_out: how many items are on no side."""

    train: Any
    test: Any
    left_out: int


def split(
    data: Labelled,
    by: str = "movie",
    *,
    test: float | Sequence[str] | Mapping[str, float | Sequence[str]] = 0.2,
    seed: int = 0,
) -> Split:
    """Split fixations or sequences so that whole movies, whole participants, or both are held out for the test.

    by     "movie": no movie is on both sides; "participant": no participant is; "both": neither is. Under "both", items
           that pair a movie of one side with a participant of the other are on no side, and are counted
    test   the names that are held out, or the fraction of names, at least one, that `seed` chooses; by="both" also
           takes {"movie": …, "participant": …}

    Raises ValueError for unknown names, and if a side would be empty.
    """
    check.one_of("by", by, ("movie", "participant", "both"))
    kinds = ("movie", "participant") if by == "both" else (by,)
    train_mask = np.ones(len(data.movie), dtype=bool)
    test_mask = train_mask.copy()
    for kind in kinds:
        labels = data.movie if kind == "movie" else data.participant
        if isinstance(test, Mapping):
            if set(test) != set(kinds):
                raise ValueError(f"test must give {' and '.join(kinds)}, got {', '.join(map(str, test))}")
            held = _held_out(labels, kind, test[kind], seed)
        else:
            held = _held_out(labels, kind, test, seed)
        inside = np.isin(labels, held)
        train_mask &= ~inside
        test_mask &= inside
    for side, mask in (("train", train_mask), ("test", test_mask)):
        if not mask.any():
            raise ValueError(
                f"the {side} side would be empty: no item is left there by {by} with test={test!r}"
            )
    sides = Split(data.select(train_mask), data.select(test_mask), int((~train_mask & ~test_mask).sum()))
    for kind in kinds:
        both = set(getattr(sides.train, kind).tolist()) & set(getattr(sides.test, kind).tolist())
        assert not both, f"{kind} on both sides: {both}"
    return sides


def _held_out(labels: np.ndarray, kind: str, test: float | Sequence[str], seed: int) -> list[str]:
    names = sorted(set(labels.tolist()))
    if isinstance(test, int | float):
        if not 0 < test < 1:
            raise ValueError(f"test must be a fraction between 0 and 1, or names, got {test}")
        if len(names) < 2:
            raise ValueError(f"a split by {kind} needs at least 2 of them, got {', '.join(names)}")
        count = min(max(1, round(test * len(names))), len(names) - 1)
        return [names[i] for i in np.random.default_rng([seed, len(kind)]).permutation(len(names))[:count]]
    held = [test] if isinstance(test, str) else list(test)
    unknown = [name for name in held if name not in names]
    if unknown:
        raise ValueError(
            f"test names {kind} {unknown[0]!r}, which isn't there; there are {', '.join(names[:20])}"
        )
    return held
