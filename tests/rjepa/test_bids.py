"""Eye tracking in BIDS: events, positions of their samples, and JSON files that are inherited."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rjepa_triton.rjepa import trackers
from rjepa_triton.rjepa.fixations import FixationError, Fixations
from rjepa_triton.rjepa.sidecar import Sidecar

STEM = "sub-07_task-film_recording-eye1"
EVENTS = {"Columns": ["onset", "duration", "trial_type", "blink", "message"], "OnsetSource": "timestamp"}
SAMPLES = {
    "Columns": ["timestamp", "x_coordinate", "y_coordinate", "pupil_size"],
    "SamplingFrequency": 500,
    "x_coordinate": {"Units": "pixel"},
    "y_coordinate": {"Units": "pixel"},
}
WANTED = [(100, 200), (350, 250), (700, 300)]  # ms since the first sample, and how long


def dataset(
    folder: Path,
    *,
    step: float = 2,
    lasts: float = 1,
    events: dict[str, Any] = EVENTS,
    samples: dict[str, Any] = SAMPLES,
) -> Path:
    """A recording of 1.2 s at 500 Hz; time stamps are `step` apart, durations `lasts` times as large as in ms."""
    rng = np.random.default_rng(0)
    place = folder / "sub-07" / "func"
    place.mkdir(parents=True)
    (folder / "dataset_description.json").write_text("{}")
    first = 13_894_432
    count = 600
    x, y = rng.uniform(50, 350, count), rng.uniform(50, 250, count)
    rows = [f"{first + k * step:.4f}\t{x[k]:.17g}\t{y[k]:.17g}\t1" for k in range(count)]
    rows[60] = f"{first + 60 * step:.4f}\tn/a\tn/a\t0"  # lost, in the first fixation
    np.savez(folder / "truth.npz", x=x, y=y)
    lines = [f"{first}\tn/a\tn/a\tn/a\tready"]
    lines += [f"{first + a / 2 * step:.4f}\t{b * lasts:g}\tfixation\t0\tn/a" for a, b in WANTED]
    lines.insert(2, f"{first + 155 * step:.4f}\t{30 * lasts:g}\tsaccade\t0\tn/a")
    for kind, text in (("physio", rows), ("physioevents", lines)):
        (place / f"{STEM}_{kind}.tsv.gz").write_bytes(gzip.compress("\n".join([*text, ""]).encode()))
    (folder / "task-film_physioevents.json").write_text(json.dumps(events))
    (folder / "task-film_physio.json").write_text(json.dumps(samples))
    (place / f"{STEM}_physio.json").write_text(json.dumps({"RecordedEye": "left"}))
    return place / f"{STEM}_physioevents.tsv.gz"


def read(path: Path, **said: Any) -> Fixations:
    return trackers.read(
        "bids", path, Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300], **said})
    )


@pytest.mark.parametrize("unit", ["said to be ms", "ms", "µs", "ns", "s", "ms, durations in s"])
def test_positions_are_means_of_samples(tmp_path: Path, unit: str) -> None:
    step = {"µs": 2000, "ns": 2_000_000, "s": 0.002}.get(unit, 2)
    lasts = 0.001 if unit == "ms, durations in s" else step / 2
    samples: dict[str, Any] = dict(SAMPLES)
    if "said" in unit:
        del samples["SamplingFrequency"]
        samples["timestamp"] = {"Units": "ms"}
    got = read(dataset(tmp_path, step=step, lasts=lasts, samples=samples))
    assert (set(got.participant.tolist()), set(got.movie.tolist())) == ({"07"}, {"film"})
    assert got.row.tolist() == [2, 4, 5]
    onset, duration = np.array(WANTED).T / 1000
    np.testing.assert_allclose(got.onset, onset, atol=1e-4 if unit == "s" else 1e-6)
    np.testing.assert_allclose(got.duration, duration, atol=1e-9)
    if unit != "s":  # whose steps are too fine for the digits written above
        truth = np.load(tmp_path / "truth.npz")
        for name in ("x", "y"):
            want = []
            for a, b in WANTED:
                inside = [k for k in range(600) if a <= 2 * k < a + b and k != 60]
                want.append(np.mean([truth[name][k] for k in inside]))
            np.testing.assert_allclose(getattr(got, name), want, rtol=1e-9)
    assert got.report.left_out == {"name isn't fixation": 2}


def test_names_and_the_movies_start(tmp_path: Path) -> None:
    columns = {"participant": {"value": "p7"}, "movie": {"value": "m"}}
    got = read(dataset(tmp_path), columns=columns, movie_start=0.05)
    assert (got.participant[0], got.movie[0]) == ("p7", "m")
    assert got.onset.tolist() == pytest.approx([0.05, 0.3, 0.65])
    assert trackers.read(
        "bids",
        tmp_path / "sub-07" / "func" / f"{STEM}_physioevents.tsv.gz",
        Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300]}),
        eye="left",
    ).onset.tolist() == pytest.approx([0.1, 0.35, 0.7])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"events": {}}, "no JSON beside or above it has its Columns"),
        (
            {"events": {**EVENTS, "Columns": ["onset", "duration", "a", "b", "c"]}},
            "no column 'trial_type'; its JSON has onset",
        ),
        (
            {"events": {**EVENTS, "Columns": ["onset", "duration", "trial_type"]}},
            "row 1 has 5 fields, its JSON 3 columns",
        ),
        ({"events": {**EVENTS, "OnsetSource": "n/a"}}, "OnsetSource must be 'timestamp', got 'n/a'"),
        (
            {"samples": {**SAMPLES, "x_coordinate": {"Units": "deg"}}},
            "x_coordinate must be in pixels, got 'deg'",
        ),
        (
            {"samples": {**SAMPLES, "SamplingFrequency": None}},
            r"must have timestamp\.Units or SamplingFrequency",
        ),
        (
            {"samples": {**SAMPLES, "SamplingFrequency": 60}},
            "time stamps are 2 apart, which fits 60 Hz in no unit",
        ),
        ({"lasts": 50}, "the median fixation lasts 12500 s"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(FixationError, match=says):
        read(dataset(tmp_path, **change))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    with pytest.raises(ValueError, match=r"columns\.x must have a value: BIDS says what columns are called"):
        read(path, columns={"x": "there"})
    with pytest.raises(FixationError, match=r"must be a file …_physioevents\.tsv\.gz"):
        read(path.with_name(f"{STEM}_physio.tsv.gz"))
    (tmp_path / "task-film_physio.json").write_text("{")
    with pytest.raises(FixationError, match=r"task-film_physio\.json: not JSON that can be read"):
        read(path)
    (tmp_path / "task-film_physio.json").write_text("[]")
    with pytest.raises(FixationError, match=r"task-film_physio\.json: must be a mapping, got list"):
        read(path)
    path.with_name(f"{STEM}_physio.tsv.gz").unlink()
    with pytest.raises(FixationError, match=rf"no {STEM}_physio\.tsv\.gz beside it, which has the positions"):
        read(path)
