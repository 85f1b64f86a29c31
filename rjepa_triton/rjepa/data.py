"""The training and test data of a run, as its configuration describes them (docs/data.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from . import demo, trackers
from .config import DataConfig
from .patches import FixationSequences, Source
from .split import split


@dataclass(frozen=True)
class Sides:
    """Training and test sequences, and the names of what is held out for the test.

    The two share no source; of recorded fixations they share no movie, no participant or neither, as `split` says.
    validation: sequences of sources that were taken from the training side, to choose by; None if none were named.
    """

    train: FixationSequences
    test: FixationSequences
    held_out: tuple[str, ...]
    validation: FixationSequences | None = None


def datasets(settings: DataConfig) -> Sides:
    """Read or simulate the fixations, and split them.

    `settings.validate` names movies of the training side, of a table split by participant participants.

    Raises ValueError, naming the key of the configuration, if something is missing or contradictory; and what
    `fixations.read`, `FixationSequences` and `split` raise.
    """
    sides = _both(settings)
    if not settings.validate:
        return sides
    by = "participant" if settings.source == "table" and settings.split == "participant" else "movie"
    try:
        again = split(sides.train, by, test=settings.validate)
    except ValueError as error:
        raise ValueError(f"data.validate, of the training side: {error}") from None
    return replace(sides, train=again.train, validation=again.test)


def _both(settings: DataConfig) -> Sides:
    if settings.source == "demo":
        return _demo(settings)
    if settings.source == "pictures":
        return _pictures(settings)
    if not settings.table:
        raise ValueError("data.table must name a CSV or parquet file for data.source='table'")
    read = trackers.read(
        settings.format,
        settings.table,
        settings.sidecar or None,
        movie=settings.movie_column,
        policy=settings.policy,
        eye=settings.eye or None,
    )
    whole = FixationSequences.from_fixations(
        read,
        steps=settings.steps,
        stride=settings.stride or None,
        segments=settings.segments or None,
        seed=settings.seed,
        max_gap=settings.max_gap or None,
        edge=settings.edge,
        policy=settings.policy,
    )
    sides = split(whole, settings.split, test=settings.held_out or 0.2, seed=settings.seed)
    return Sides(sides.train, sides.test, _names(sides.test))


def _demo(settings: DataConfig) -> Sides:
    held = tuple(settings.held_out) or demo.TEST
    unknown = sorted(set(held) - set(demo.FILES))
    if unknown or len(held) == len(demo.FILES):
        raise ValueError(
            f"data.held_out must be some, not all, of the demo's sources {', '.join(demo.FILES)}, got {', '.join(held)}"
        )
    return _simulated(settings, [demo.source(name) for name in demo.FILES], held)


def _pictures(settings: DataConfig) -> Sides:
    if len(settings.files) < 2:
        raise ValueError(
            f"data.files must name at least 2 pictures or films, one of them to hold out, got {len(settings.files)}"
        )
    sources = [Source(Path(file).stem, Path(file), settings.px_per_degree) for file in settings.files]
    names = [source.name for source in sources]
    held = tuple(settings.held_out) or (names[-1],)
    unknown = sorted(set(held) - set(names))
    if unknown or len(set(held)) == len(names):
        raise ValueError(f"data.held_out must be some, not all, of {', '.join(names)}, got {', '.join(held)}")
    return _simulated(settings, sources, held)


def _simulated(settings: DataConfig, sources: list[Source], held: tuple[str, ...]) -> Sides:
    def side(wanted: bool, count: int) -> FixationSequences:
        chosen = [source for source in sources if (source.name in held) == wanted]
        return FixationSequences.simulated(chosen, sequences=count, steps=settings.steps, seed=settings.seed)

    return Sides(side(False, settings.train), side(True, settings.test), held)


def _names(side: FixationSequences) -> tuple[str, ...]:
    return tuple(sorted({*side.movie.tolist(), *side.participant.tolist()}))
