"""Tables of fixations: what is read, and that every bad row is named and counted, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import films
import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import FixationError, Report
from rjepa_triton.rjepa.sidecar import Sidecar
from rjepa_triton.rjepa.video import VideoError

SIDE = {"time_unit": "ms", "px_per_degree": 10, "frame_size": [400, 300]}
HEADER = "participant,movie,onset,duration,x,y"
GOOD = [
    "p1,m,0,200,100,100",
    "p1,m,250,300,200,150",
    "p1,m,600,250,300,200",
    "p2,m,10,200,50,60",
    "p2,m,300,200,60,70",
]


def write(
    folder: Path, rows: list[str], header: str = HEADER, name: str = "fix.csv", **changes: object
) -> Path:
    """A table and its sidecar; a key changed to None is left out of the sidecar."""
    table = folder / name
    table.write_text("\n".join([header, *rows]) + "\n")
    side = {key: value for key, value in {**SIDE, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(side))
    return table


def test_seconds_and_frame_pixels(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD, movie_start=-50, screen={"offset": [20, 10], "scale": 0.5})
    got = fixations.read(table)
    assert got.participant.tolist() == ["p1"] * 3 + ["p2"] * 2
    np.testing.assert_allclose(got.onset, [0.05, 0.3, 0.65, 0.06, 0.35])
    np.testing.assert_allclose(got.duration, [0.2, 0.3, 0.25, 0.2, 0.2])
    np.testing.assert_allclose(got.x, [40, 90, 140, 15, 20])
    np.testing.assert_allclose(got.y, [45, 70, 95, 25, 30])
    assert got.row.tolist() == [2, 3, 4, 5, 6]
    assert (
        got.movies["m"].px_per_degree == 5
    )  # of the frame: 10 of the screen, on which it was shown twice as large
    assert got.pairs() == {("p1", "m"): slice(0, 3), ("p2", "m"): slice(3, 5)}
    assert got.report == Report(str(table), 5, 5)
    with pytest.raises(ValueError, match="read-only"):
        got.x[0] = 1
    assert got.select(got.participant == "p2").row.tolist() == [5, 6]


def test_offset_other_columns_order_of_columns_and_names_that_look_like_numbers(tmp_path: Path) -> None:
    rows = ["0.5;100;007;0.75;3;m;90", "1.0;100;007;1.25;3;m;90", "0.1;1;08;0.3;3;m;9"]
    table = write(tmp_path, rows, "onset; x;participant;offset;pupil;movie;y", time_unit="s")
    got = fixations.read(table)
    assert got.participant.tolist() == ["007", "007", "08"]
    np.testing.assert_allclose(got.duration, [0.25, 0.25, 0.2])


def test_rows_of_participants_may_alternate(tmp_path: Path) -> None:
    got = fixations.read(write(tmp_path, [GOOD[0], GOOD[3], GOOD[1], GOOD[4], GOOD[2]]))
    assert got.row.tolist() == [2, 4, 6, 3, 5]
    assert len(got.pairs()) == 2


def test_parquet_is_read_as_the_csv_is(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    pl.read_csv(table).write_parquet(tmp_path / "fix.parquet")
    other = fixations.read(tmp_path / "fix.parquet", tmp_path / "fix.csv.yaml")
    want = fixations.read(table)
    for name in ("participant", "movie", "onset", "duration", "x", "y"):
        assert np.array_equal(getattr(other, name), getattr(want, name))
    assert other.row.tolist() == [1, 2, 3, 4, 5]


# Each: rows beside the good ones, the kind of problem, what the message says of it.
BAD: dict[str, tuple[str, str]] = {
    "p1,m,900,200,,100": ("position missing", "row 7: x is missing"),
    "p1,m,900,200,100,NaN": ("position missing", "row 7: y is missing"),
    "p1,m,900,200,inf,100": ("position missing", "row 7: x is missing or not finite"),
    "p1,m,,200,100,100": ("time missing", "row 7: onset is missing"),
    "p1,m,900,200,here,100": ("not a number", "row 7: x is 'here'"),
    "p1,m,900,0,100,100": ("duration not positive", "row 7: lasts 0 s"),
    "p1,m,900,200,401,100": (
        "outside the frame",
        r"row 7: \(401, 100\) is outside the frame of 400 × 300 pixels",
    ),
    "p1,m,900,200,100,-1": ("outside the frame", r"row 7: \(100, -1\)"),
    "p3,m,-200,150,100,100": ("before the movie", r"row 7: begins 0\.2 s before the movie"),
    "p1,m,700,200,100,100": ("overlap", r"row 7: begins 0\.15 s before row 4 ends"),
    "p1,m,260,200,100,101": ("unordered", r"row 7: begins 0\.34 s before row 4, which comes earlier"),
    "p1,m,250,300,200,150": ("duplicate", "row 7: repeats row 3"),
    ",m,900,200,100,100": ("participant missing", "row 7: has no participant"),
    "p1,,900,200,100,100": ("movie missing", "row 7: has no movie"),
    "p1,m,900,200,100": ("wrong number of fields", "row 7: has 5 fields, the header has 6"),
}


@pytest.mark.parametrize(("row", "kind", "said"), [(row, *rest) for row, rest in BAD.items()])
def test_a_bad_row_is_refused_or_skipped_and_named(tmp_path: Path, row: str, kind: str, said: str) -> None:
    table = write(tmp_path, [*GOOD, row, "p4,m,0,200,5,5"])
    with pytest.raises(
        FixationError, match=rf"fix\.csv: 1 of its 7 rows are bad \(1 {kind}\): {said}"
    ) as refused:
        fixations.read(table)
    assert refused.value.report is not None
    assert refused.value.report.counts == {kind: 1}
    got = fixations.read(table, policy="skip")
    assert got.row.tolist() == [2, 3, 4, 5, 6, 8]
    assert got.report.rows_with(kind) == (7,)
    assert (got.report.rows, got.report.kept) == (7, 6)
    assert f"1 with a problem: {kind} (row 7)" in str(got.report)


def test_after_the_movie(tmp_path: Path) -> None:
    films.write(tmp_path / "m.mp4", 24)  # 0.96 s of 64 × 48 pixels
    rows = ["p,m,0,200,9,9", "p,m,400,200,9,9", "p,m,860,190,50,9", "p,m,1060,200,9,9"]
    table = write(tmp_path, rows, frame_size=None, movies={"m": "m.mp4"})
    with pytest.raises(FixationError, match=r"row 5: has its middle at 1\.16 s, the movie ends at 0\.96 s"):
        fixations.read(table)
    got = fixations.read(table, policy="skip")
    assert got.movies["m"].size == (64, 48)
    assert got.movies["m"].file == tmp_path / "m.mp4"


def test_an_unknown_movie(tmp_path: Path) -> None:
    films.write(tmp_path / "m.mp4", 24)
    table = write(tmp_path, ["p,m,0,200,9,9", "p,n,0,200,9,9"], frame_size=None, movies={"m": "m.mp4"})
    with pytest.raises(FixationError, match=r"row 3: movie 'n' isn't listed in .*fix\.csv\.yaml"):
        fixations.read(table)


def test_a_film_that_is_missing_or_broken(tmp_path: Path) -> None:
    films.write(tmp_path / "m.mp4", 24)
    (tmp_path / "n.mp4").write_bytes(b"no film")
    movies = {"l": "l.mp4", "m": "m.mp4", "n": "n.mp4"}
    rows = ["p,m,0,200,9,9", "p,n,0,200,9,9", "p,l,0,200,9,9"]
    table = write(tmp_path, rows, frame_size=None, movies=movies)
    with pytest.raises(VideoError, match=r"l\.mp4: no such file"):
        fixations.read(table)
    got = fixations.read(table, policy="skip")
    assert got.row.tolist() == [2]
    assert got.report.rows_with("film missing or broken") == (3, 4)


def test_offset_and_duration_that_disagree(tmp_path: Path) -> None:
    rows = ["p,m,0,200,200,9,9", "p,m,300,499,200,9,9", "p,m,600,900,200,9,9"]
    with pytest.raises(FixationError, match=r"row 4: offset - onset is 0\.3 s, duration 0\.2 s"):
        fixations.read(write(tmp_path, rows, "participant,movie,onset,offset,duration,x,y"))


@pytest.mark.parametrize(("unit", "meant", "factor"), [("s", "ms", 1), ("us", "ms", 1), ("ms", "us", 1000)])
@pytest.mark.parametrize("policy", fixations.POLICIES)
def test_wrong_time_units_are_refused_with_the_right_one(
    tmp_path: Path, unit: str, meant: str, factor: int, policy: str
) -> None:
    rows = [f"p,m,{k * 300 * factor},{250 * factor},9,9" for k in range(5)]
    with pytest.raises(
        FixationError, match=rf"median fixation lasts 2.* {unit}.*set time_unit: {meant} in .*yaml"
    ):
        fixations.read(write(tmp_path, rows, time_unit=unit), policy=policy)


@pytest.mark.parametrize("policy", fixations.POLICIES)
def test_positions_in_other_units_are_refused(tmp_path: Path, policy: str) -> None:
    rng = np.random.default_rng(0)

    def rows(x: np.ndarray) -> list[str]:
        return [f"p,m,{k * 300},250,{a:.4f},{b:.4f}" for k, (a, b) in enumerate(x)]

    for positions, said in (
        (rng.uniform(0, 1, (20, 2)), "within .* pixels of a frame of 400 × 300; x and y must be in pixels"),
        (rng.uniform(-15, 15, (20, 2)), "of 20 fixations lie outside the frame: .* x goes from -1"),
        (rng.uniform(400, 1900, (20, 2)), "20 of 20 fixations lie outside the frame"),
    ):
        with pytest.raises(FixationError, match=said):
            fixations.read(write(tmp_path, rows(positions)), policy=policy)


@pytest.mark.parametrize("policy", fixations.POLICIES)
def test_a_movie_start_in_another_unit_is_refused(tmp_path: Path, policy: str) -> None:
    with pytest.raises(FixationError, match=r"5 of 5 fixations begin before their movie.*movie_start"):
        fixations.read(write(tmp_path, GOOD, movie_start=5e6), policy=policy)
    films.write(tmp_path / "m.mp4", 24, size=(400, 300))
    late = write(tmp_path, GOOD, movie_start=-5e6, frame_size=None, movies={"m": "m.mp4"})
    with pytest.raises(FixationError, match="5 of 5 fixations lie after the end of their movie"):
        fixations.read(late, policy=policy)


def test_movie_start_by_movie_and_participant(tmp_path: Path) -> None:
    start = {"m": {"p1": 0, "p2": 10}}
    assert fixations.read(write(tmp_path, GOOD, movie_start=start)).onset.tolist()[3] == 0
    assert fixations.read(write(tmp_path, GOOD, movie_start={"p1": 0, "p2": 10})).onset.tolist()[3] == 0
    assert fixations.read(write(tmp_path, GOOD, movie_start={"m": -10})).onset.tolist()[0] == 0.01
    with pytest.raises(FixationError, match="row 5: movie_start has no time for movie 'm', participant 'p2'"):
        fixations.read(write(tmp_path, GOOD, movie_start={"m": {"p1": 0}}))


def test_names_that_yaml_reads_as_numbers(tmp_path: Path) -> None:
    rows = ["1,2,30,200,10,10", "3,2,50,200,20,20"]
    got = fixations.read(write(tmp_path, rows, movie_start={2: {1: 30, 3: 40}}, movies={2: {"fps": 25}}))
    assert got.onset.tolist() == pytest.approx([0, 0.01])


def test_a_skipped_row_is_not_what_the_next_is_held_against(tmp_path: Path) -> None:
    # row 4 overlaps row 3 and reaches over row 5, which follows row 3 well
    rows = ["p,m,0,200,9,9", "p,m,210,200,9,9", "p,m,300,500,9,9", "p,m,450,200,9,9", "p,m,449,100,9,9"]
    got = fixations.read(write(tmp_path, rows), policy="skip")
    assert got.row.tolist() == [2, 3, 5]
    assert got.report.counts == {"overlap": 1, "unordered": 1}


def test_blank_lines_are_left_out_and_do_not_shift_row_numbers(tmp_path: Path) -> None:
    table = write(tmp_path, [GOOD[0], "", GOOD[1], "p1,m", "", "p1,m,900,200,100,999", ""])
    got = fixations.read(table, policy="skip")
    assert got.report.left_out["blank line"] >= 2
    assert got.row.tolist() == [2, 4]
    assert got.report.rows_with("outside the frame") == (7,)
    assert got.report.rows_with("wrong number of fields") == (5,)


def test_eyes(tmp_path: Path) -> None:
    rows = [f"{row},{eye}" for row in GOOD for eye in ("left", "RIGHT")]
    table = write(tmp_path, rows, HEADER + ",eye")
    with pytest.raises(FixationError, match=r"participant 'p1' has fixations of the eyes L, R, .* eye='L'"):
        fixations.read(table)
    got = fixations.read(table, eye="R")
    assert got.row.tolist() == [3, 5, 7, 9, 11]
    assert got.report.left_out == {"eye isn't R": 5}
    with pytest.raises(FixationError, match="no row is of the eye 'middle'; there are L, R"):
        fixations.read(table, eye="middle")
    with pytest.raises(FixationError, match="eye='L' was asked for, but there is no column 'eye'"):
        fixations.read(write(tmp_path, GOOD), eye="L")


def test_events_of_another_name_are_left_out(tmp_path: Path) -> None:
    rows = [f"{GOOD[0]},fixation", "p1,m,200,50,100,100,saccade", f"{GOOD[1]},fixation"]
    table = write(tmp_path, rows, HEADER + ",name")
    got = fixations.read(table)
    assert got.row.tolist() == [2, 4]
    assert got.report.left_out == {"name isn't fixation": 1}
    with pytest.raises(
        FixationError, match="no row has the name 'blink'; names that are there: fixation, saccade"
    ):
        fixations.read(table, event="blink")


# What is wrong with the file as a whole: how to make it, and what is said.
FILES: dict[str, Callable[[Path], Path]] = {
    r"fix\.csv: no column 'y'; there are participant, movie, onset, duration, x": lambda p: write(
        p, ["p,m,0,1,2"], "participant,movie,onset,duration,x"
    ),
    r"fix\.csv: no column 'offset' or 'duration'": lambda p: write(
        p, ["p,m,0,1,2"], "participant,movie,onset,x,y"
    ),
    r"fix\.csv: 2 columns are called 'x'": lambda p: write(p, ["p,m,0,1,2,3,4"], HEADER + ",x"),
    r"fix\.csv: its first row, which names the columns, is empty": lambda p: write(p, [], ""),
    r"fix\.csv: none of its 0 rows": lambda p: write(p, []),
    r"fix\.csv: none of its 1 rows": lambda p: write(p, ["p,m,0,200,,"]),
    r"fix\.parquet: not a parquet file": lambda p: write(p, GOOD, name="fix.parquet"),
}


@pytest.mark.parametrize("said", FILES)
def test_a_table_that_is_wrong_as_a_whole(tmp_path: Path, said: str) -> None:
    with pytest.raises(FixationError, match=said):
        fixations.read(FILES[said](tmp_path), policy="skip")


def test_missing_files_and_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no sidecar no\.csv\.yaml beside it"):
        fixations.read(tmp_path / "no.csv")
    table = write(tmp_path, GOOD)
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        fixations.read(tmp_path / "no.csv", tmp_path / "fix.csv.yaml")
    with pytest.raises(ValueError, match="policy must be one of 'refuse', 'skip', got 'drop'"):
        fixations.read(table, policy="drop")
    (tmp_path / "fix.csv").write_bytes(b"participant,movie\xe9\n")
    with pytest.raises(FixationError, match="not text in UTF-8 or UTF-16"):
        fixations.read(table)


# Changes to the sidecar, and what is said of each.
SIDECARS: list[tuple[dict[str, object], str]] = [
    ({"time_unit": None}, "time_unit is missing: one of s, ms, us"),
    ({"time_unit": "min"}, "time_unit must be one of s, ms, us, got 'min'"),
    ({"px_per_degree": None}, "px_per_degree is missing"),
    ({"px_per_degree": -1}, "px_per_degree must be a positive number, got -1"),
    ({"fps": "fast"}, "fps must be a positive number, got 'fast'"),
    ({"frame_size": None}, "give the file of movie 'm' under movies, or frame_size"),
    ({"frame_size": [400]}, r"frame_size must be two numbers, \[x, y\], got \[400\]"),
    ({"frame_size": [400.5, 2]}, r"frame_size must be \[width, height\] in pixels"),
    ({"framesize": [400, 300]}, "unknown key 'framesize'; those that mean something: time_unit"),
    ({"movies": ["m"]}, "movies must be a mapping of names to values, got list"),
    ({"movies": {"m": {"start": 2}}}, r"movies\.m: unknown key 'start'"),
    ({"movies": {"m": {"fps": 0}}}, r"movies\.m\.fps must be a positive number, got 0"),
    ({"movie_start": "noon"}, "movie_start must be a time, or times by movie or participant, got 'noon'"),
    ({"movie_start": {"m": {"p1": "noon"}}}, r"movie_start\.m\.p1 must be a time, got 'noon'"),
    ({"screen": {"size": [2, 2]}}, r"screen\.size is of use only with .*screen\.frame"),
    ({"screen": {"frame": [0, 0, 400, 300], "scale": 2}}, "either frame, or offset and scale, got both"),
    ({"screen": {"frame": [0, 0, 400]}}, r"screen\.frame must be \[left, top, width, height\]"),
    ({"screen": {"frame": [0, 0, 400, 0]}}, r"screen\.frame must have a positive width and height"),
    (
        {"screen": {"frame": [9, 9, 400, 300], "size": [400, 300]}},
        "must lie on the screen of 400 × 300 pixels",
    ),
    ({"screen": {"frame": [0, 0, 400, 400]}}, "stretches the frame by 33% in one direction"),
]


@pytest.mark.parametrize(("changes", "said"), SIDECARS)
def test_what_is_wrong_with_a_sidecar(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"fix\.csv\.yaml: .*{said}"):
        fixations.read(write(tmp_path, GOOD, **changes))


def test_a_sidecar_that_is_no_yaml(tmp_path: Path) -> None:
    table = write(tmp_path, GOOD)
    (tmp_path / "fix.csv.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"fix\.csv\.yaml: not a YAML file"):
        fixations.read(table)
    (tmp_path / "fix.csv.yaml").rename(tmp_path / "fix.yaml")
    with pytest.raises(ValueError, match=r"fix\.yaml: not a YAML file"):
        fixations.read(table)


def test_a_rectangle_on_the_screen_and_a_movie_of_its_own(tmp_path: Path) -> None:
    own = {"screen": {"size": [1920, 1080], "frame": [560, 240, 800, 600]}, "px_per_degree": 40, "fps": 10}
    rows = ["p1,m,0,200,560,240", "p1,m,300,200,1359,839"]
    got = fixations.read(write(tmp_path, rows, movies={"m": own}))
    assert got.x.tolist() == [0, 399.5]
    assert got.y.tolist() == [0, 299.5]
    assert got.movies["m"].px_per_degree == 20
    assert got.movies["m"].fps == 10


EYELINK = "RECORDING_SESSION_LABEL\tTRIAL_INDEX\tvideo\tEYE_USED\tCURRENT_FIX_START\tCURRENT_FIX_END\tCURRENT_FIX_DURATION\tCURRENT_FIX_X\tCURRENT_FIX_Y"
EYELINK_ROWS = ["s01\t1\tm\tRIGHT\t0\t199\t201\t100.5\t99", "s01\t1\tm\tRIGHT\t250\t499\t250\t.\t.", "s01\t1\tm\tRIGHT\t600\t799\t200\t120\t80"]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_eyelink_fixation_report(tmp_path: Path, encoding: str) -> None:
    report = tmp_path / "report.txt"
    report.write_text("\n".join([EYELINK, *EYELINK_ROWS]) + "\n", encoding=encoding)
    side = Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300]})
    with pytest.raises(FixationError, match=r"report\.txt: .*row 3: x is missing"):
        fixations.from_eyelink(report, side, movie="video")
    got = fixations.from_eyelink(report, side, movie="video", policy="skip")
    assert got.participant.tolist() == ["s01", "s01"]
    np.testing.assert_allclose(got.duration, [0.201, 0.2])
    assert got.x.tolist() == [100.5, 120]
    with pytest.raises(FixationError, match=r"report\.txt: no column 'film'"):
        fixations.from_eyelink(report, side, movie="film")
    wrong = Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300], "time_unit": "s"})
    with pytest.raises(ValueError, match="time_unit must be ms for such a table, got s"):
        fixations.from_eyelink(report, wrong, movie="video")


@pytest.mark.parametrize("listed", [True, False])
def test_pymovements_events(listed: bool) -> None:
    columns = {
        "subject": [1, 1, 1],
        "clip": ["m"] * 3,
        "name": ["fixation", "saccade", "fixation"],
        "onset": [0, 200, 250],
        "offset": [200, 250, 500],
        "duration": [200, 50, 250],
    }
    where = [[10.0, 20.0], None, [30.0, 40.0]]
    if listed:
        frame = pl.DataFrame({**columns, "location": where})
    else:
        xy = {"location_x": [10.0, None, 30.0], "location_y": [20.0, None, 40.0]}
        frame = pl.DataFrame({**columns, **xy})
    side = Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300]})
    got = fixations.from_pymovements(frame, side, movie="clip", participant="subject")
    assert got.x.tolist() == [10, 30]
    assert got.y.tolist() == [20, 40]
    assert got.row.tolist() == [1, 3]
    assert got.participant.tolist() == ["1", "1"]
    assert got.report.left_out == {"name isn't fixation": 1}

    class Events:
        def __init__(self, frame: pl.DataFrame) -> None:
            self.frame = frame

    assert len(fixations.from_pymovements(Events(frame), side, movie="clip", participant="subject")) == 2
    with pytest.raises(TypeError, match="events must be a polars frame or pymovements' Events, got dict"):
        fixations.from_pymovements(columns, side, movie="clip", participant="subject")


ROW = st.tuples(
    st.sampled_from(["p1", "p2", ""]),
    st.sampled_from(["0", "150", "300", "450", "600", "-50", "", "x"]),
    st.sampled_from(["100", "149", "200", "0", ""]),
    st.sampled_from(["10", "400", "400.1", "nan"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, min_size=1, max_size=12))
def test_every_row_is_kept_left_out_or_has_a_problem(tmp_path: Path, rows: list[tuple[str, ...]]) -> None:
    table = write(tmp_path, [f"{p},m,{onset},{duration},{x},5" for p, onset, duration, x in rows])
    try:
        got = fixations.read(table, policy="skip")
        report = got.report
    except FixationError as refused:
        got, report = None, refused.report
    assert report is not None
    assert report.rows == len(rows)
    if got is None:
        return
    assert report.rows == report.kept + len(report.problems) + sum(report.left_out.values())
    assert sorted([*got.row.tolist(), *(p.row for p in report.problems)]) == list(range(2, len(rows) + 2))
    for where in got.pairs().values():
        assert (np.diff(got.onset[where]) >= got.duration[where][:-1] - fixations.OVERLAP - 1e-9).all()
    assert ((got.onset >= 0) & (got.x >= 0) & (got.x <= 400)).all()
