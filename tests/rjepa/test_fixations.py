"""Reading fixations: from tables, EyeLink reports and pymovements' events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tables import GOOD, HEADER, write

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import FixationError, Report
from rjepa_triton.rjepa.sidecar import Sidecar


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


@pytest.mark.parametrize("what", ["name", "value", "both", "value of a column that isn't read"])
def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path, what: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    arrow = pyarrow.csv.read_csv(write(tmp_path, GOOD))
    if what != "name":
        at = arrow.column_names.index("movie")
        wrong = pa.array([b"m\xb2"] * len(arrow)).cast(pa.string(), safe=False)
        arrow = (
            arrow.append_column("note", wrong)
            if "isn't read" in what
            else arrow.set_column(at, "movie", wrong)
        )
    file = tmp_path / "fix.parquet"
    pyarrow.parquet.write_table(arrow, file, compression="none")
    if what in ("name", "both"):
        file.write_bytes(
            file.read_bytes().replace(b"duration", b"durat\xb2on").replace(b"offset", b"off\xb2et")
        )
    with pytest.raises(
        FixationError, match=r"fix\.parquet: not a parquet file that can be read: .*[uU][tT][fF]"
    ):
        fixations.read(file, tmp_path / "fix.csv.yaml", policy="skip")


def test_columns_of_dates_and_of_integers_that_float64_lacks(tmp_path: Path) -> None:
    """Those that Python's dates don't reach, too: as text, refused by row where numbers are wanted."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    arrow = pyarrow.csv.read_csv(write(tmp_path, GOOD))
    file = tmp_path / "fix.parquet"

    def read(name: str, values: list[int], kind: pa.DataType) -> fixations.Fixations:
        made = pa.array(values, pa.int64()).view(kind)
        pyarrow.parquet.write_table(arrow.set_column(arrow.column_names.index(name), name, made), file)
        return fixations.read(file, tmp_path / "fix.csv.yaml")

    far = [2**60 + row for row in range(len(arrow))]
    assert len(set(read("participant", far, pa.timestamp("us")).participant)) == len(arrow)
    assert len(set(read("participant", list(range(len(arrow))), pa.timestamp("ns")).participant)) == len(
        arrow
    )
    with pytest.raises(FixationError, match=r"fix\.parquet") as caught:
        read("x", far, pa.timestamp("us"))
    assert "row 1" in str(caught.value)
    with pytest.raises(FixationError, match=r"fix\.parquet"):
        read("onset", far, pa.int64())


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
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        fixations.read(tmp_path / "no.csv")
    table = write(tmp_path, GOOD)
    (tmp_path / "alone.csv").write_bytes(table.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"alone\.csv: no sidecar alone\.csv\.yaml beside it"):
        fixations.read(tmp_path / "alone.csv")
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        fixations.read(tmp_path / "no.csv", tmp_path / "fix.csv.yaml")
    with pytest.raises(ValueError, match="policy must be one of 'refuse', 'skip', got 'drop'"):
        fixations.read(table, policy="drop")
    (tmp_path / "fix.csv").write_bytes(b"participant,movie\xe9\n")
    with pytest.raises(FixationError, match="not text in UTF-8 or UTF-16"):
        fixations.read(table)


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
