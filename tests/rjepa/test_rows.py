"""Rows of a table of fixations: every bad row is named and counted, never dropped in silence."""

from __future__ import annotations

from pathlib import Path

import films
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import GOOD, HEADER, write

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import FixationError
from rjepa_triton.rjepa.video import VideoError

# Each: rows beside the good ones, the kind of problem, what the message says of it.
BAD: dict[str, tuple[str, str]] = {
    "p1,m,900,200,,100": ("position missing", "row 7: x is missing"),
    "p1,m,900,200,100,NaN": ("position missing", "row 7: y is missing"),
    "p1,m,900,200,inf,100": ("position missing", "row 7: x is missing or not finite"),
    "p1,m,,200,100,100": ("time missing", "row 7: onset is missing"),
    "p1,m,900,200,here,100": ("not a number", "row 7: x is 'here'"),
    "p1,m,900,200,1_0,100": ("not a number", "row 7: x is '1_0'"),
    "p1,m,900,200,١٢,100": ("not a number", "row 7: x is '١٢'"),
    "p1,m,900,200,n/a,100": ("position missing", "row 7: x is missing or not finite: the cell holds 'n/a'"),
    "p1,m,900,200,100,-inf": ("position missing", "row 7: y is missing or not finite: the cell holds '-inf'"),
    '"p1,m,900,200,100,100': ("open quote", "row 7: has a quote that its line doesn't close: '\"p1,m,900"),
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


# Tables none of whose rows can be used, and what is said of the rows.
NONE: dict[str, tuple[list[str], dict[str, object], str]] = {
    "no start": (GOOD, {"movie_start": {"other": {"p1": 0}}}, "row 2: movie_start has no time for movie 'm'"),
    "no film": (GOOD, {"frame_size": None, "movies": {"m": "no.mp4"}}, r"row 2: .*no\.mp4: no such file"),
    "no duration": (["p,m,0,200,9,9,900", "p,m,400,200,9,9,2900"], {}, r"row 2: offset - onset is 0\.9 s"),
    "no movie": (GOOD, {"movies": {"other": {"fps": 2}}}, "row 2: movie 'm' isn't listed"),
    "no numbers": (["p,m,0,200,a,b", "p,m,9,200,c,."], {}, "row 2: x is 'a'; row 3: x is 'c'"),
    "no positions": (["p,m,0,200,.,NA"], {}, r"1 position missing\): row 2: x is .* the cell holds '\.'"),
    "blank": ([",,,,,"], {}, "none of its 1 rows can be used: 1 left out: blank line"),
}


@pytest.mark.parametrize("policy", ["refuse", "skip"])
@pytest.mark.parametrize("case", NONE)
def test_a_table_without_a_row_that_can_be_used_says_what_the_rows_hold(
    tmp_path: Path, case: str, policy: str
) -> None:
    rows, changes, said = NONE[case]
    table = write(tmp_path, rows, HEADER + ",offset" * (case == "no duration"), **changes)
    error = VideoError if (case, policy) == ("no film", "refuse") else FixationError
    with pytest.raises(error, match=said if error is FixationError else r"no\.mp4: no such file"):
        fixations.read(table, policy=policy)


def test_limits_hold_whatever_is_lost_in_rounding(tmp_path: Path) -> None:
    for first, duration, second in ((9503, 117, 9619), (1003, 117, 1119), (70001, 333, 70333)):
        got = fixations.read(
            write(
                tmp_path,
                [f"p,m,{first},{duration},547,510", f"p,m,{second},200,267,542"],
                frame_size=[900, 900],
            )
        )
        assert len(got) == 2  # they overlap by 1 ms
    third = {"screen": {"frame": [0.1, 0.1, 120.3, 90.225]}}
    got = fixations.read(write(tmp_path, ["p,m,0,200,120.4,90.325", "p,m,300,200,0.1,0.1"], **third))
    assert got.x.tolist() == [400, 0]
    assert got.y.tolist() == [300, 0]
    rows = [f"p,m,{k / 10},0.2,9,9,{(2 * k + 4.1) / 20}" for k in (3, 7, 11)]
    assert len(fixations.read(write(tmp_path, rows, HEADER + ",offset", time_unit="s"))) == 3  # 5 ms more


@pytest.mark.parametrize(
    ("factor", "apart"), [(1000, "300 s"), (0.001, "0.0003 s"), (60, "18 s"), (0.2, "0.06 s")]
)
@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_onsets_in_another_unit_than_durations(
    tmp_path: Path, factor: float, apart: str, policy: str
) -> None:
    rows = [f"p,m,{300 * k * factor:g},200,{10 + 9 * k},{20 + 7 * k}" for k in range(12)]
    with pytest.raises(
        FixationError, match=f"the median fixation lasts 0.2 s, and the next one begins {apart} after"
    ):
        fixations.read(write(tmp_path, rows), policy=policy)
    if factor > 1:
        assert len(fixations.read(write(tmp_path, rows[:5]))) == 5


def test_long_pauses_are_no_other_unit(tmp_path: Path) -> None:
    rows = [f"p,m,{300 * k + 60_000 * (k // 4)},200,{10 + 9 * k},{20 + 7 * k}" for k in range(12)]
    assert len(fixations.read(write(tmp_path, rows))) == 12
