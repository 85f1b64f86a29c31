"""Checks that the settings of several benchmarks have. They raise TypeError or ValueError, which name the argument."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ... import _checks as check


def check_chosen(name: str, chosen: Sequence[str], known: Collection[str]) -> None:
    """Refuse an empty choice, and one that isn't among `known`."""
    if not chosen:
        raise ValueError(f"{name} must name at least one of {', '.join(known)}")
    for each in chosen:
        check.one_of(name, each, known)


def check_points(points: Sequence[tuple[int, int]]) -> None:
    """Refuse a point (N, B) with a size below 1."""
    for units, batch in points:
        check.integer("hidden", units, 1)
        check.integer("batch", batch, 1)


def check_above_zero(settings: object, *names: str) -> None:
    """Refuse settings of these names that aren't above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(settings, name)}")
