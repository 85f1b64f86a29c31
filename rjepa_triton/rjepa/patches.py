"""A data set of sequences of fixated patches, from recorded fixations or from simulated scan paths.

A film is decoded at the width at which a patch of P pixels covers the wanted angle, so cutting a patch is a crop.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import Dataset

from .. import _checks as check
from .report import FixationError, listed
from .rows import POLICIES, ROUNDING, Fixations
from .scanpath import ScanPath, Statistics, simulate
from .video import Film, VideoError, decode, probe, there_and_back

EDGES = ("shift", "pad", "refuse")
PATCH, DEGREES = 50, 5.0  # a patch's side in pixels, and the angle it covers, as in the paper (Section 3.2)
STEPS = 100  # fixations in a sequence, as in the paper (Section 4.2)
# So many fixations are drawn before a simulated sequence and dropped: the paper's sequences begin anywhere in a film,
# whereas a scan path's first fixations are at the frame's centre.
WARM_UP = 20
ASPECT = 0.02  # how much a film's aspect may differ from that of the frame in which fixations are given


@dataclass(frozen=True)
class Source:
    """A picture or film over which scan paths are simulated.

    px_per_degree: pixels of its frame, as it is shown, per degree of visual angle. fps: the rate at which a film is
    shown; None: as the file's time stamps say.
    """

    name: str
    file: Path
    px_per_degree: float
    fps: float | None = None


@dataclass(frozen=True)
class Scene:
    """A film from which patches are cut, and the frame in which positions are given.

    size, px_per_degree   width and height of that frame in pixels, and its pixels per degree
    scale                 (x, y) pixels of the film's frames per pixel of that frame
    """

    film: Film
    size: tuple[int, int]
    px_per_degree: float

    @property
    def scale(self) -> np.ndarray:
        height, width = self.film.frames.shape[1:3]
        return np.array([width / self.size[0], height / self.size[1]])


@dataclass(frozen=True)
class View:
    """One sequence of fixations on its film: where patches will be cut.

    path      the fixations, in pixels of the frame in which positions are given
    frame     (T,) the index of the film's frame shown in the middle of each fixation
    centre    (T, 2) x and y of the gaze, in pixels of the film's frames
    corner    (T, 2) int, x and y of each patch's upper left corner in the film's frames
    """

    participant: str
    movie: str
    scene: Scene
    path: ScanPath
    frame: np.ndarray
    centre: np.ndarray
    corner: np.ndarray


class FixationSequences(Dataset[dict[str, Any]]):
    """Sequences of T consecutive fixations of one participant in one movie. Each item is a dict:

    patches        (T, 3, P, P) uint8, the image around the gaze in the middle of each fixation
    positions      (T, 2) float32, degrees from the frame's centre: x to the right, y down
    actions        (T, 2) float32, the next position minus this one; NaN for the last, whose next isn't in the sequence
    onsets         (T,) float64, seconds since the movie began. In a simulated path over a film, seconds since the film
                   began to play forward and backward (`there_and_back`)
    durations      (T,) float64, seconds
    participant    str; simulated-0, simulated-1, … for the simulated paths over each source
    movie          str

    edge decides about a patch that sticks out of the frame. "shift" moves it inside by the shortest way, so it isn't
    centred on the gaze any more (`positions` still gives the gaze); "pad" fills the outside with black, like the dark
    room around a screen; "refuse" raises ValueError when the data set is made. Simulated paths stay within the frame.

    `unused` counts the fixations that are in no sequence, by reason.

    Items can be read in any order and in any worker process: item i is always the same.
    """

    def __init__(
        self,
        paths: _Recorded | _Simulated,
        scenes: Mapping[str, Scene],
        *,
        patch: int = PATCH,
        degrees: float = DEGREES,
        edge: str = "shift",
        unused: Mapping[str, int] | None = None,
        items: np.ndarray | None = None,
    ) -> None:
        """Called by `from_fixations`, `simulated`, `demo.sequences` and `select`, which users call."""
        self.paths = paths
        self.scenes = dict(scenes)
        self.patch = patch
        self.degrees = degrees
        self.edge = edge
        self.unused = dict(unused or {})
        self.items = np.arange(len(paths.movie)) if items is None else items

    @classmethod
    def from_fixations(
        cls,
        fixations: Fixations,
        *,
        steps: int = STEPS,
        stride: int | None = None,
        max_gap: float | None = None,
        segments: int | None = None,
        seed: int = 0,
        patch: int = PATCH,
        degrees: float = DEGREES,
        edge: str = "shift",
        policy: str = "refuse",
        cache: str | Path | None = None,
    ) -> FixationSequences:
        """Sequences of recorded fixations on the films that their sidecar names.

        steps     T
        stride    fixations from the start of one sequence to the start of the next; None: T, so that none is used twice
        segments  so many sequences at places that `seed` draws, each place at most once, from all where T fixations
                  follow one another; they may overlap. None: one after the other
        max_gap   seconds; a longer gap between two fixations (a blink, lost data, skipped rows) ends a sequence; None:
                  no gap does
        patch, degrees   a patch's side in pixels, and the angle it covers
        policy    what becomes of fixations whose film is missing, broken, or over by their middle: "refuse" raises
                  VideoError or FixationError, "skip" counts them in `unused`
        cache     folder of decoded films; None: `video.default_cache()`

        Raises ValueError for an argument out of its range, for a movie without a known file or with another aspect than
        its film, and if not one sequence is left.
        """
        check.one_of("policy", policy, POLICIES)
        check.integer("steps", steps, 1)
        if segments is not None:
            check.integer("segments", segments, 1)
            check.integer("seed", seed, 0)
            if stride is not None:
                raise ValueError(
                    f"stride goes with consecutive sequences, got {stride} with segments={segments}"
                )
            stride = 1
        stride = steps if stride is None else check.integer("stride", stride, 1)
        _check_patch(patch, degrees, edge)
        unused: Counter[str] = Counter()
        scenes: dict[str, Scene] = {}
        good = np.ones(len(fixations), dtype=bool)
        source = fixations.report.source
        for name in np.unique(fixations.movie).tolist():
            of_movie = fixations.movie == name
            movie = fixations.movies[name]
            if movie.file is None:
                raise ValueError(
                    f"{source}: no file of movie {name!r} is known; list it under movies in the sidecar"
                )
            try:
                film = decode(
                    movie.file, cache, width=_width(movie.size[0], movie.px_per_degree, patch, degrees)
                )
            except VideoError as error:
                if policy == "refuse":
                    raise
                unused[f"film missing or broken: {error}"] += int(of_movie.sum())
                good &= ~of_movie
                continue
            if abs(film.size[0] / film.size[1] / (movie.size[0] / movie.size[1]) - 1) > ASPECT:
                raise ValueError(
                    f"{movie.file}: its frame of {film.size[0]} × {film.size[1]} pixels has another aspect than the "
                    f"frame_size of movie {name!r}, {movie.size[0]} × {movie.size[1]}"
                )
            film = film.at_rate(movie.fps) if movie.fps is not None else film
            scenes[name] = Scene(film, movie.size, movie.px_per_degree)
            late = of_movie & ~(fixations.onset + fixations.duration / 2 < film.end)
            if late.any() and policy == "refuse":
                raise FixationError(
                    f"{source}: {late.sum()} fixations have their middle after the end of {movie.file}, "
                    f"{film.end:g} s: rows {listed(fixations.row[late].tolist())}. Correct them, or leave them out "
                    "with policy='skip'"
                )
            unused["after the film's end"] += int(late.sum())
            good &= ~late
        kept = fixations.select(good)
        runs = _runs(kept, max_gap)
        starts = np.array([at for a, b in runs for at in range(a, b - steps + 1, stride)], dtype=np.int64)
        if segments is not None and len(starts):
            if segments > len(starts):
                raise ValueError(
                    f"segments must be at most {len(starts)}, the places in {source} where {steps} fixations follow "
                    f"one another, got {segments}"
                )
            starts = np.sort(np.random.default_rng(seed).choice(starts, segments, replace=False))
        left = _left(runs, starts, steps)
        unused.update(left)
        unused = Counter({reason: count for reason, count in unused.items() if count})
        if not len(starts):
            told = "; ".join(f"{count} {reason}" for reason, count in unused.items())
            raise ValueError(f"{source}: no sequence of {steps} fixations in {len(fixations)} ({told})")
        made = cls(
            _Recorded(kept, starts, steps), scenes, patch=patch, degrees=degrees, edge=edge, unused=unused
        )
        made._check_edges(kept)
        return made

    @classmethod
    def simulated(
        cls,
        sources: Iterable[Source],
        *,
        sequences: int,
        steps: int = STEPS,
        seed: int = 0,
        patch: int = PATCH,
        degrees: float = DEGREES,
        statistics: Statistics | None = None,
        cache: str | Path | None = None,
    ) -> FixationSequences:
        """`sequences` simulated scan paths of T = `steps` fixations over each source.

        A path depends on the seed, the source's name, the path's number and the frame's size in degrees; other sources
        don't change it. A film is played forward and backward from a random time on, for as long as the path lasts.
        patch, degrees: a patch's side in pixels, and the angle it covers; cache: as in `from_fixations`.

        Raises ValueError if there is no source, if two have the same name, or if a frame is smaller than a patch;
        VideoError.
        """
        check.integer("sequences", sequences, 1)
        check.integer("steps", steps, 1)
        check.integer("seed", seed, 0)
        _check_patch(patch, degrees, "shift")
        sources = tuple(sources)
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"sources must be at least one, each with a name of its own, got {', '.join(names)}"
            )
        scenes: dict[str, Scene] = {}
        for source in sources:
            width = probe(source.file).width
            film = decode(source.file, cache, width=_width(width, source.px_per_degree, patch, degrees))
            film = film.at_rate(source.fps) if source.fps is not None else film
            scenes[source.name] = Scene(film, film.size, source.px_per_degree)
            _check_size(scenes[source.name], patch)
        paths = _Simulated(scenes, sequences, steps, seed, degrees, statistics)
        return cls(paths, scenes, patch=patch, degrees=degrees)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        people, movies = len(set(self.participant.tolist())), len(set(self.movie.tolist()))
        return f"FixationSequences({len(self)} of {self.steps} fixations, {movies} movies, {people} participants)"

    @property
    def steps(self) -> int:
        """T, the fixations in a sequence."""
        return self.paths.steps

    @property
    def participant(self) -> np.ndarray:
        """The participant of each item, (n,)."""
        return self.paths.participant[self.items]

    @property
    def movie(self) -> np.ndarray:
        """The movie of each item, (n,)."""
        return self.paths.movie[self.items]

    def middles(self) -> np.ndarray:
        """(T, n): seconds of its movie at which each fixation has its middle."""
        return np.stack([self.paths.path(int(item))[1] for item in self.items], axis=1)

    def positions(self, index: int) -> np.ndarray:
        """(T, 2): where the fixations of item `index` are, in degrees from the frame's centre, x right and y down."""
        item = int(self.items[index])
        return _degrees(self.paths.path(item)[0], self.scenes[str(self.paths.movie[item])])

    def extent(self, index: int) -> np.ndarray:
        """(2,): width and height of the frame of item `index`, in degrees."""
        scene = self.scenes[str(self.paths.movie[int(self.items[index])])]
        return np.array(scene.size) / scene.px_per_degree

    def select(self, which: np.ndarray) -> FixationSequences:
        """The items that a mask (n,) or an array of indices picks."""
        items = self.items[which]
        there = set(self.paths.movie[items].tolist())
        scenes = {name: scene for name, scene in self.scenes.items() if name in there}
        return FixationSequences(
            self.paths,
            scenes,
            patch=self.patch,
            degrees=self.degrees,
            edge=self.edge,
            unused=self.unused,
            items=items,
        )

    def view(self, index: int) -> View:
        """Where the patches of item `index` lie on its film. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        item = int(self.items[index])
        movie = str(self.paths.movie[item])
        scene = self.scenes[movie]
        path, shown = self.paths.path(item)
        centre = np.stack([path.x, path.y], 1) * scene.scale
        corner = _corners(centre, self.patch)
        if self.edge == "shift":
            height, width = scene.film.frames.shape[1:3]
            corner = np.clip(corner, 0, [width - self.patch, height - self.patch])
        return View(
            str(self.paths.participant[item]), movie, scene, path, scene.film.index(shown), centre, corner
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = self.view(index)
        positions = _degrees(view.path, view.scene)
        actions = np.full_like(positions, np.nan)
        actions[:-1] = np.diff(positions, axis=0)
        return {
            "patches": torch.from_numpy(_cut(view, self.patch)),
            "positions": torch.from_numpy(positions.astype(np.float32)),
            "actions": torch.from_numpy(actions.astype(np.float32)),
            "onsets": torch.from_numpy(view.path.onset.copy()),
            "durations": torch.from_numpy(view.path.duration.copy()),
            "participant": view.participant,
            "movie": view.movie,
        }

    def _check_edges(self, fixations: Fixations) -> None:
        out = np.zeros(len(fixations), dtype=bool)
        for name, scene in self.scenes.items():
            if self.edge == "shift":
                _check_size(scene, self.patch)
            if self.edge == "refuse":
                of_movie = fixations.movie == name
                centre = np.stack([fixations.x[of_movie], fixations.y[of_movie]], 1) * scene.scale
                corner = _corners(centre, self.patch)
                height, width = scene.film.frames.shape[1:3]
                out[of_movie] = ((corner < 0) | (corner + self.patch > [width, height])).any(1)
        if out.any():
            raise ValueError(
                f"{fixations.report.source}: {out.sum()} patches stick out of the frame: rows "
                f"{listed(fixations.row[out].tolist())}; edge='shift' moves them inside, edge='pad' fills the outside "
                "with black"
            )


@dataclass(frozen=True)
class _Recorded:
    """Sequences of `steps` recorded fixations, which begin at the indices `starts`."""

    fixations: Fixations
    starts: np.ndarray
    steps: int

    @property
    def participant(self) -> np.ndarray:
        return self.fixations.participant[self.starts]

    @property
    def movie(self) -> np.ndarray:
        return self.fixations.movie[self.starts]

    def path(self, item: int) -> tuple[ScanPath, np.ndarray]:
        """The scan path, and the time in the film of each fixation's middle, whose frame is shown."""
        f, where = self.fixations, slice(self.starts[item], self.starts[item] + self.steps)
        path = ScanPath(f.onset[where], f.duration[where], f.x[where], f.y[where])
        return path, path.onset + path.duration / 2


class _Simulated:
    """`sequences` scan paths over each scene; a path is drawn whenever it is asked for, the same each time."""

    def __init__(
        self,
        scenes: Mapping[str, Scene],
        sequences: int,
        steps: int,
        seed: int,
        degrees: float,
        statistics: Statistics | None,
    ) -> None:
        self.movie = np.repeat(np.array(list(scenes), dtype=np.str_), sequences)
        self.participant = np.array([f"simulated-{k}" for k in range(sequences)] * len(scenes), dtype=np.str_)
        self.frames = {name: (s.size, s.px_per_degree, s.film.end) for name, s in scenes.items()}
        self.sequences, self.steps, self.seed = sequences, steps, seed
        self.degrees, self.statistics = degrees, statistics

    def path(self, item: int) -> tuple[ScanPath, np.ndarray]:
        name = str(self.movie[item])
        size, px_per_degree, end = self.frames[name]
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), item % self.sequences])
        steps = self.steps + WARM_UP
        path = simulate(
            rng, steps, size, px_per_degree, patch_degrees=self.degrees, statistics=self.statistics
        ).since(WARM_UP)
        onset = path.onset + (rng.uniform(0, 2 * end) if math.isfinite(end) else 0.0)
        return ScanPath(onset, path.duration, path.x, path.y), there_and_back(onset + path.duration / 2, end)


def _check_patch(patch: int, degrees: float, edge: str) -> None:
    check.integer("patch", patch, 1)
    if not (math.isfinite(degrees) and degrees > 0):
        raise ValueError(f"degrees must be a positive number, got {degrees}")
    check.one_of("edge", edge, EDGES)


def _check_size(scene: Scene, patch: int) -> None:
    height, width = scene.film.frames.shape[1:3]
    if min(width, height) < patch:
        raise ValueError(
            f"{scene.film.file}: its frame is {width} × {height} pixels at the resolution of the patches, smaller than "
            f"a patch of {patch}; is px_per_degree {scene.px_per_degree:g} right?"
        )


def _width(pixels: int, px_per_degree: float, patch: int, degrees: float) -> int:
    """The width of a frame at which `patch` pixels cover `degrees`."""
    if not (math.isfinite(px_per_degree) and px_per_degree > 0):
        raise ValueError(f"px_per_degree must be a positive number, got {px_per_degree}")
    return max(1, round(pixels / px_per_degree * patch / degrees))


def _runs(fixations: Fixations, max_gap: float | None) -> list[tuple[int, int]]:
    """The first index, and the one after the last, of each run of fixations that follow one another."""
    if max_gap is not None and not max_gap > 0:
        raise ValueError(f"max_gap must be positive, got {max_gap}")
    runs: list[tuple[int, int]] = []
    for where in fixations.pairs().values():
        bounds = [where.start, where.stop]
        if max_gap is not None:
            onset, duration = fixations.onset[where], fixations.duration[where]
            gaps = onset[1:] - (onset + duration)[:-1]
            bounds[1:1] = (where.start + 1 + np.flatnonzero(gaps > max_gap + ROUNDING)).tolist()
        runs += itertools.pairwise(bounds)
    return runs


def _left(runs: list[tuple[int, int]], starts: np.ndarray, steps: int) -> dict[str, int]:
    """How many fixations of the runs are in none of the sequences that begin at `starts`, by reason."""
    used = np.zeros(runs[-1][1] if runs else 0, dtype=bool)
    for start in starts:
        used[start : start + steps] = True
    left: Counter[str] = Counter()
    for begin, end in runs:
        short = end - begin < steps
        reason = "in runs shorter than a sequence" if short else "beside the sequences"
        left[reason] += int((~used[begin:end]).sum())
    return dict(left)


def _degrees(path: ScanPath, scene: Scene) -> np.ndarray:
    """(T, 2): where a path's fixations are, in degrees from the frame's centre."""
    return (np.stack([path.x, path.y], 1) - np.array(scene.size) / 2) / scene.px_per_degree


def _corners(centre: np.ndarray, patch: int) -> np.ndarray:
    return np.floor(centre - patch / 2 + 0.5).astype(np.int64)


def _cut(view: View, patch: int) -> np.ndarray:
    """The patches, (T, 3, P, P); black where they stick out of the frame."""
    frames = view.scene.film.frames
    height, width = frames.shape[1:3]
    patches = np.zeros((len(view.frame), patch, patch, 3), dtype=np.uint8)
    for into, frame, (x, y) in zip(patches, view.frame, view.corner, strict=True):
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + patch, width), min(y + patch, height)
        if left < right and top < bottom:
            into[top - y : bottom - y, left - x : right - x] = frames[frame, top:bottom, left:right]
    return np.ascontiguousarray(rearrange(patches, "t h w c -> t c h w"))
