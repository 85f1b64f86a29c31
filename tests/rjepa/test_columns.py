"""Tables of other programs: names and units of columns, y upwards, rows above the header, encodings."""

from __future__ import annotations

import gzip
from pathlib import Path

import films
import numpy as np
import pytest
from tables import GOOD, SIDE, write

from rjepa_triton.rjepa import fixations, trackers
from rjepa_triton.rjepa.fixations import FixationError, Fixations
from rjepa_triton.rjepa.sidecar import Sidecar


def plain(tmp_path: Path, **changes: object) -> Fixations:
    return fixations.read(write(tmp_path, GOOD, name="plain.csv", **changes))


def same(a: Fixations, b: Fixations) -> None:
    for name in ("participant", "movie"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()
    for name in ("onset", "duration", "x", "y"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-9)


def cells() -> list[list[str]]:
    return [row.split(",") for row in GOOD]


def test_names_and_a_unit_a_column(tmp_path: Path) -> None:
    """Onset in µs beside a duration in ms, as some programs have it; movie_start is in onset's unit."""
    rows = [f"{who}\t{int(on) * 1000}\t{dur}\t{what}\t{x}\t{y}" for who, what, on, dur, x, y in cells()]
    columns = {
        "participant": "Subject",
        "movie": "Stimulus",
        "onset": {"name": "Start [µs]", "unit": "us"},
        "duration": {"name": "Duration [ms]", "unit": "ms"},
        "x": "Position X",
        "y": "Position Y",
    }
    header = "Subject\tStart [µs]\tDuration [ms]\tStimulus\tPosition X\tPosition Y"
    table = write(tmp_path, rows, header, columns=columns, time_unit=None, movie_start=-50_000)
    same(fixations.read(table), plain(tmp_path, movie_start=-50))


@pytest.mark.parametrize("unit", ["fraction", "percent", "px"])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("screen", [None, {"size": [800, 600], "frame": [100, 50, 400, 300]}])
def test_parts_of_the_screen_and_y_upwards(tmp_path: Path, unit: str, up: bool, screen: dict | None) -> None:
    width, height = (400, 300) if screen is None else (800, 600)
    by = {"fraction": (width, height), "percent": (width / 100, height / 100), "px": (1, 1)}[unit]
    left, top = (0, 0) if screen is None else (100, 50)
    rows = []
    for who, what, on, dur, x, y in cells():
        on_screen = float(x) + left, float(y) + top
        down = height - on_screen[1] if up else on_screen[1]
        rows.append(f"{who},{what},{on},{dur},{on_screen[0] / by[0]!r},{down / by[1]!r}")
    columns = {"x": {"name": "x", "unit": unit}, "y": {"name": "y", "unit": unit, "up": up}}
    got = fixations.read(write(tmp_path, rows, columns=columns, screen=screen))
    same(got, plain(tmp_path))
    assert got.movies["m"].px_per_degree == pytest.approx(10)


def test_rows_above_the_header_and_an_encoding(tmp_path: Path) -> None:
    table = write(tmp_path, [row.replace("p1", "Jürgen") for row in GOOD])
    text = "## Über den Versuch\n## Date: 2020\n\n" + table.read_text()
    side = Sidecar.from_dict({**SIDE, "header": 4, "encoding": "latin-1"})
    for body in (text.encode("latin-1"), gzip.compress(text.encode("latin-1"))):
        table.write_bytes(body)
        got = fixations.read(table, side)
        assert got.participant.tolist() == ["Jürgen"] * 3 + ["p2"] * 2
        assert got.row.tolist() == [5, 6, 7, 8, 9]  # as in the file
    table.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        FixationError, match=r"row 1 has the byte 0xdc; save it as UTF-8, or name its encoding"
    ):
        fixations.read(table, Sidecar.from_dict(SIDE))
    with pytest.raises(FixationError, match=r"row 4 names the columns, .* or say header: 4 in the sidecar"):
        fixations.read(table, Sidecar.from_dict({**SIDE, "encoding": "latin-1"}))
    with pytest.raises(FixationError, match="row 3, which names the columns, is empty"):
        fixations.read(table, Sidecar.from_dict({**SIDE, "encoding": "latin-1", "header": 3}))
    with pytest.raises(FixationError, match="not text in utf-8"):
        fixations.read(table, Sidecar.from_dict({**SIDE, "encoding": "utf8"}))


def test_a_value_for_a_column_that_is_not_there(tmp_path: Path) -> None:
    rows = [",".join(row[2:]) for row in cells()[:3]]
    columns = {"participant": {"value": "p1"}, "movie": {"value": "m"}}
    got = fixations.read(write(tmp_path, rows, "onset,duration,x,y", columns=columns))
    assert set(got.participant.tolist()) == {"p1"}
    assert set(got.movie.tolist()) == {"m"}
    with pytest.raises(FixationError, match=r"has a column 'movie', for which .*fix\.csv\.yaml has a value"):
        fixations.read(write(tmp_path, GOOD, columns=columns))


def test_what_is_wrong_is_named_and_nothing_passes_mirrored(tmp_path: Path) -> None:
    for content, said in {
        "columns.z": ({"columns": {"z": "a"}}, r"columns\.z: unknown column; known are participant, movie"),
        "both": ({"columns": {"movie": {"name": "a", "value": "b"}}}, "must have either name or value"),
        "value": (
            {"columns": {"x": {"value": "3"}}},
            r"columns\.x\.value goes with participant and movie alone",
        ),
        "unit": (
            {"columns": {"onset": {"name": "a", "unit": "min"}}},
            "unit must be one of s, ms, us, ns, got 'min'",
        ),
        "place": (
            {"columns": {"x": {"name": "x", "unit": "deg"}}},
            "unit must be one of px, fraction, percent",
        ),
        "up": (
            {"columns": {"x": {"name": "x", "up": True}}},
            "up must be true or false, and goes with y alone",
        ),
        "header": ({"header": 0}, "header must be the number of a row, 1 or more, got 0"),
        "encoding": ({"encoding": "klingon"}, "encoding must be an encoding that Python knows"),
    }.values():
        with pytest.raises(ValueError, match=said):
            Sidecar.from_dict({**SIDE, **content})
    up = {"columns": {"y": {"name": "y", "up": True}}, "screen": {"offset": [0, 0]}}
    with pytest.raises(
        ValueError, match=r"screen\.size must be given with columns that are parts of the screen or"
    ):
        fixations.read(write(tmp_path, GOOD, **up))
    with pytest.raises(FixationError, match=r"no column 'when'; there are participant, movie, onset"):
        fixations.read(write(tmp_path, GOOD, columns={"onset": "when"}))


def test_a_table_without_onsets_is_in_order(tmp_path: Path) -> None:
    """Durations follow one another, of each participant and picture; without durations each fixation lasts 0.25 s."""
    rows = [
        "p1,m,200,10,20",
        "p2,m,300,11,21",
        "p1,m,250,12,22",
        "p1,n,150,13,23",
        "p1,m,100,14,24",
        "p2,m,100,15,25",
    ]
    header = "participant,movie,duration,x,y"
    got = fixations.read(write(tmp_path, rows, header, order=True))
    assert got.participant.tolist() == ["p1"] * 3 + ["p2"] * 2 + ["p1"]
    np.testing.assert_allclose(got.onset, [0, 0.2, 0.45, 0, 0.3, 0])
    np.testing.assert_allclose(got.duration, [0.2, 0.25, 0.1, 0.3, 0.1, 0.15])
    assert got.x.tolist() == [10, 12, 14, 11, 15, 13]
    short = [",".join(row.split(",")[:2] + row.split(",")[3:]) for row in rows]
    got = fixations.read(write(tmp_path, short, "participant,movie,x,y", order=True, time_unit=None))
    np.testing.assert_allclose(got.onset, [0, 0.25, 0.5, 0, 0.25, 0])
    bad = fixations.read(
        write(tmp_path, [*rows, "p1,m,,16,26", "p1,m,80,17,27"], header, order=True), policy="skip"
    )
    assert (bad.onset[3], bad.report.rows_with("time missing")) == (pytest.approx(0.55), (8,))


def test_what_does_not_go_with_an_order_is_refused(tmp_path: Path) -> None:
    films.write(tmp_path / "m.mp4", 12)
    for table, said in {
        write(tmp_path, GOOD, name="a.csv", order=True): "has a column 'onset', and .* says order: true",
        write(
            tmp_path, ["p,1,2"], "participant,x,y", name="b.csv", order=True
        ): "no column 'movie'; there are",
        write(
            tmp_path,
            ["p,m,1,2"],
            "participant,movie,x,y",
            name="c.csv",
            order=True,
            frame_size=None,
            movies={"m": "m.mp4"},
        ): "'m' is a film, and order: true goes with pictures",
    }.items():
        with pytest.raises(FixationError, match=said):
            fixations.read(table)
    with pytest.raises(ValueError, match="movie_start must be left out with order: true, which has no clock"):
        Sidecar.from_dict({**SIDE, "order": True, "movie_start": 3})
    with pytest.raises(ValueError, match="order must be true or false, got 'yes'"):
        Sidecar.from_dict({**SIDE, "order": "yes"})
    side = Sidecar.from_dict({**SIDE, "order": True})
    for format in ("tobii", "asc", "eyelink"):
        with pytest.raises(
            ValueError, match=r"order (goes with a table of one's own|doesn't go with this format)"
        ):
            trackers.read(format, tmp_path / "a.csv", side)
