"""Splits: whole movies and whole participants, and neither side empty."""

from __future__ import annotations

from pathlib import Path

import films
import pytest

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import Fixations
from rjepa_triton.rjepa.patches import FixationSequences
from rjepa_triton.rjepa.split import split


def grid(folder: Path, people: int = 3, movies: int = 4) -> FixationSequences:
    """One sequence of every participant in every movie."""
    names = [f"m{k}" for k in range(movies)]
    files: dict[str, object] = {name: films.picture(folder, name=f"{name}.png").name for name in names}
    rows = [row for who in range(people) for name in names for row in films.looking(3, f"p{who}", name)]
    got = films.table(folder, rows, files)
    return FixationSequences.from_fixations(got, steps=3, patch=20, degrees=2, cache=folder / "cache")


def test_splits_share_nothing(tmp_path: Path) -> None:
    data = grid(tmp_path)
    train, test, left_out = split(data, test=0.25)
    assert (len(train), len(test), left_out) == (9, 3, 0)
    assert not set(train.movie) & set(test.movie)
    assert set(test.scenes) == set(test.movie)
    assert test[0]["movie"] == test.movie[0]
    assert split(data, test=0.25).test.movie.tolist() == test.movie.tolist()
    assert len({split(data, test=0.25, seed=seed).test.movie[0] for seed in range(20)}) > 1

    train, test, left_out = split(data, "participant", test=["p1"])
    assert (len(train), len(test), left_out) == (8, 4, 0)
    assert set(test.participant) == {"p1"}

    train, test, left_out = split(data, "both", test={"movie": ["m0"], "participant": 0.1})
    assert (len(train), len(test), left_out) == (6, 1, 5)
    assert not set(train.participant) & set(test.participant)
    assert not set(train.movie) & set(test.movie)


def test_fixations_split_too(tmp_path: Path) -> None:
    grid(tmp_path)
    train, test, _ = split(fixations.read(tmp_path / "fix.csv"), "participant", test=0.3)
    assert (len(train), len(test)) == (24, 12)
    assert isinstance(test, Fixations)


@pytest.mark.parametrize(
    ("by", "test", "said"),
    [
        ("movie", ["m9"], "test names movie 'm9', which isn't there; there are m0, m1"),
        ("movie", ["m0", "m1"], "the train side would be empty"),
        ("movie", [], "the test side would be empty"),
        ("movie", 1.0, "test must be a fraction between 0 and 1, or names, got 1.0"),
        ("participant", 0.5, "a split by participant needs at least 2 of them, got p0"),
        ("both", {"movie": 0.5}, "test must give movie and participant, got movie"),
        ("frame", 0.5, "by must be one of 'movie', 'participant', 'both', got 'frame'"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, by: str, test: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split(grid(tmp_path, people=1, movies=2), by, test=test)  # type: ignore[arg-type]
