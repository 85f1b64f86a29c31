"""EyeLink's .asc files: fixations by trial, the movie and its start by messages, both eyes, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from rjepa_triton.rjepa import trackers
from rjepa_triton.rjepa.fixations import FixationError, Fixations
from rjepa_triton.rjepa.sidecar import Sidecar

HEAD = [
    "** CONVERTED FROM C:\\data\\s7.edf using edfapi 4.2.1",
    "** DATE: Wed Mar  8 09:25:20 2023",
    "",
    "MSG\t900 DISPLAY_COORDS 0 0 399 299",
]
TRIAL = [
    "MSG\t1000 TRIALID 1",
    "START\t1010 \tLEFT\tRIGHT\tSAMPLES\tEVENTS",
    "EVENTS\tGAZE\tLEFT\tRIGHT\tRATE\t1000.00\tTRACKING\tCR\tFILTER\t2",
    "1011\t  138.1\t  132.8\t  778.0\t...",
    "MSG\t1104 4 DISPLAY ON",  # it was on at 1100
    "SFIX L   1120",
    "EFIX L   1120\t1319\t200\t   40.5\t   30.0\t    791",
    "EFIX R   1122\t1321\t200\t   41.5\t   31.0\t    790",
    "ESACC L  1320\t1340\t21\t1\t2\t3\t4\t1.21\t103",
    "EFIX L   1350\t1599\t250\t   80.0\t   45.0\t    791",
    "END\t1700 \tSAMPLES\tEVENTS\tRES\t37.17\t37.75",
    "MSG\t1710 !V TRIAL_VAR movie films/a.avi",
    "MSG\t1711 !V TRIAL_VAR other 3",
]
SECOND = [line.replace("TRIALID 1", "TRIALID 2").replace("a.avi", "b.avi") for line in TRIAL]
MESSAGES = {"movie": r"TRIAL_VAR movie \S*/(\w+)\.avi", "start": "^DISPLAY ON"}


def read(
    folder: Path, lines: list[str], name: str = "s7.asc", eye: str | None = "L", **said: Any
) -> Fixations:
    side = {"px_per_degree": 10, "frame_size": [400, 300], "messages": MESSAGES, **said}
    side = {key: value for key, value in side.items() if value is not None}
    body = "\n".join([*lines, ""]).encode()
    (folder / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    return trackers.read("asc", folder / name, Sidecar.from_dict(side), eye=eye)


@pytest.mark.parametrize("name", ["s7.asc", "s7.asc.gz"])
def test_fixations_of_each_trial(tmp_path: Path, name: str) -> None:
    got = read(tmp_path, [*HEAD, *TRIAL, *SECOND], name)
    assert set(got.participant.tolist()) == {"s7"}
    assert got.movie.tolist() == ["a", "a", "b", "b"]
    assert got.onset.tolist() == pytest.approx([0.02, 0.25, 0.02, 0.25])
    assert got.duration.tolist() == pytest.approx([0.2, 0.25] * 2)
    assert (got.x.tolist(), got.y.tolist()) == ([40.5, 80] * 2, [30, 45] * 2)
    assert got.row.tolist() == [11, 14, 24, 27]
    assert got.report.left_out == {"eye isn't L": 2}
    right = read(tmp_path, [*HEAD, *TRIAL, *SECOND], name, eye="right")
    assert right.x.tolist() == [41.5, 41.5]
    with pytest.raises(
        FixationError, match="has fixations of the eyes L, R, which overlap: say which to take"
    ):
        read(tmp_path, [*HEAD, *TRIAL], eye=None)


def test_without_a_start_time_is_counted_from_recording(tmp_path: Path) -> None:
    messages = {"movie": MESSAGES["movie"]}
    got = read(tmp_path, [*HEAD, *TRIAL], messages=messages, movie_start=100)
    assert got.onset.tolist() == pytest.approx([0.01, 0.24])
    moved = [TRIAL[1], *TRIAL[:1], *TRIAL[2:]]  # recording goes on while a trial begins
    assert read(tmp_path, [*HEAD, *moved], messages=messages, movie_start=100).onset[0] == pytest.approx(0.01)


def test_several_movies_in_a_trial_and_trials_without_one(tmp_path: Path) -> None:
    lines = [
        "MSG\t1000 TRIALID 1",
        "START\t1010 \tLEFT",
        "MSG\t1050 PLAY a",
        "EFIX L\t1100\t1299\t200\t10\t10\t1",
        "MSG\t2000 PLAY b",
        "EFIX L\t2100\t2299\t200\t20\t10\t1",
        "MSG\t3000 TRIALID 2",
        "START\t3010 \tLEFT",
        "EFIX L\t3100\t3299\t200\t30\t10\t1",
    ]
    got = read(tmp_path, lines, messages={"movie": r"PLAY (\w)", "start": "PLAY"})
    assert (got.movie.tolist(), got.x.tolist()) == (["a", "b"], [10, 20])
    assert got.onset.tolist() == pytest.approx([0.05, 0.1])
    assert got.report.left_out == {"no message names a movie in the trial": 1}
    columns = {"movie": {"value": "film"}, "participant": {"value": "p1"}}
    got = read(tmp_path, lines[:6], messages=None, columns=columns)
    assert (got.movie.tolist(), got.participant.tolist()) == (["film"] * 2, ["p1"] * 2)
    assert got.onset.tolist() == pytest.approx([0.09, 1.09])


def test_a_trial_without_its_start_has_no_time(tmp_path: Path) -> None:
    second = [line for line in SECOND if "DISPLAY ON" not in line]
    with pytest.raises(
        FixationError, match=r"2 of its 6 rows are bad \(2 time missing\): row 23: onset is missing"
    ):
        read(tmp_path, [*HEAD, *TRIAL, *second])


def test_half_milliseconds(tmp_path: Path) -> None:
    lines = [
        "MSG\t1000.5 TRIALID 1",
        "START\t1000.5 \tLEFT",
        "MSG\t1001 PLAY a",
        "EFIX L\t1100.5\t1299\t199.0\t10\t10\t1",
    ]
    got = read(tmp_path, lines, messages={"movie": r"PLAY (\w)"})
    assert (got.onset[0], got.duration[0]) == (pytest.approx(0.1), pytest.approx(0.199))


@pytest.mark.parametrize(
    ("change", "said", "says"),
    [
        (
            lambda lines: [line.replace("EVENTS\tGAZE", "EVENTS\tHREF") for line in lines],
            {},
            r"row 7: positions of events must be GAZE",
        ),
        (
            lambda lines: [line for line in lines if "EFIX" not in line],
            {},
            r"has no fixations, which are lines .* EFIX",
        ),
        (lambda _: ["a,b", "1,2"], {}, "not an .asc file: no line begins with EFIX or MSG"),
        (
            lambda lines: [*lines, "EFIX L\t1\t2"],
            {},
            "row 18: has 3 fields after EFIX, a fixation has at least 6",
        ),
        (
            lambda lines: [line.replace("40.5", ".") for line in lines],
            {},
            "row 11: x is missing or not finite",
        ),
        (
            lambda lines: [line.replace("200\t   40.5", "abc\t   40.5") for line in lines],
            {},
            "row 11: duration is 'abc'",
        ),
        (list, {"messages": {"movie": "NOTHING"}}, r"no message matches sidecar: messages\.movie, 'NOTHING'"),
        (
            list,
            {"messages": {"movie": "movie", "start": "NO"}},
            r"no message matches sidecar: messages\.start, 'NO'",
        ),
        (
            list,
            {"messages": None},
            r"one of messages: \{movie: …\} and columns: \{movie: \{value: …\}\} must say which movie",
        ),
        (list, {"columns": {"movie": {"value": "m"}}}, "one of messages"),
        (list, {"columns": {"x": "there"}}, r"columns\.x must have a value: an \.asc file has no columns"),
        (list, {"messages": {"movie": "("}}, r"messages\.movie must be a regular expression, got '\('"),
        (list, {"messages": {"film": "x"}}, "messages: unknown key 'film'; known keys: movie, start"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Any, said: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read(tmp_path, change([*HEAD, *TRIAL]), **said)
