"""Text tables: every line is a row that is kept or named, whatever its quotes, encoding and delimiter."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tables import GOOD, HEADER, write

from rjepa_triton.rjepa import fixations
from rjepa_triton.rjepa.fixations import FixationError
from rjepa_triton.rjepa.sidecar import Sidecar

SIDE = Sidecar.from_dict({"px_per_degree": 10, "frame_size": [400, 300]})
EYELINK = "RECORDING_SESSION_LABEL\tvideo\tCURRENT_FIX_START\tCURRENT_FIX_DURATION\tCURRENT_FIX_X\tCURRENT_FIX_Y\tNOTE"


def report(folder: Path, notes: list[str], delimiter: str = "\t") -> Path:
    rows = [f"s\tm\t{k * 300}\t200\t{9 + k}\t9\t{note}" for k, note in enumerate(notes)]
    file = folder / "report.txt"
    file.write_text("\n".join([EYELINK, *rows]).replace("\t", delimiter) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "note", ['"open', 'he said "', '"a" b', '5"', '"a "" b"', '"closed"', '"', "\x85 \u2028"]
)
def test_a_quote_in_a_report_takes_no_row_away(tmp_path: Path, note: str) -> None:
    notes = ["x"] * 20
    notes[3] = notes[8] = note
    got = fixations.from_eyelink(report(tmp_path, notes), SIDE, movie="video", policy="skip")
    assert got.row.tolist() == list(range(2, 22))
    assert str(got.report).endswith("20 rows, 20 kept")


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_quote_in_a_csv_spoils_its_own_row(tmp_path: Path, delimiter: str) -> None:
    notes = ["x"] * 20
    notes[3], notes[8], notes[9], notes[12] = '"open', '"in, one; field"', 'a "word" inside', '"a" b'
    file = report(tmp_path, notes, delimiter)
    got = fixations.from_eyelink(file, SIDE, movie="video", policy="skip")
    assert got.report.rows_with("open quote") == (5, 14)
    assert len(got) == 18
    with pytest.raises(
        FixationError, match=r"report\.txt: 2 of its 20 rows .*row 5: has a quote .* '\"open'"
    ):
        fixations.from_eyelink(file, SIDE, movie="video")


def test_rows_with_too_few_or_too_many_cells_are_named(tmp_path: Path) -> None:
    for delimiter in ",;\t":
        rows = [*GOOD, "p1,m,900,200,9", "p1,m,1200,200,9,9,9", '"p1,m",1500,200,9']
        table = write(tmp_path, [row.replace(",", delimiter) for row in rows], HEADER.replace(",", delimiter))
        got = fixations.read(table, policy="skip")
        assert got.row.tolist() == [2, 3, 4, 5, 6]
        assert got.report.rows_with("wrong number of fields") == (7, 8, 9)
        assert got.report.rows == 8


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_ends_of_lines_encodings_and_gzip(tmp_path: Path, end: str, encoding: str) -> None:
    table = write(tmp_path, [])
    body = end.join([HEADER, *GOOD]).replace("p1", "José").encode(encoding)
    for file, written in ((table, body), (tmp_path / "fix.tsv.gz", gzip.compress(body))):
        file.write_bytes(written)
        got = fixations.read(file, tmp_path / "fix.csv.yaml")
        assert got.participant.tolist() == ["José"] * 3 + ["p2"] * 2
        assert got.row.tolist() == [2, 3, 4, 5, 6]


# What else may be given for a table, and what is said of it.
WRONG: dict[str, tuple[bytes, str]] = {
    "latin-1": (
        f"{HEADER}\n{GOOD[0]}\nJosé,m".encode("latin-1"),
        "row 3 has the byte 0xe9; save it as UTF-8",
    ),
    "utf-16 without a mark": (HEADER.encode("utf-16-le"), "row 1 has a character 0"),
    "half a character": (b"\xff\xfea\0b", "not text in UTF-8 or UTF-16: 'utf-16.*' codec can't decode"),
    "workbook": (b"PK\x03\x04" + bytes(20), "not a table: it is a workbook or a zip archive; save the sheet"),
    "asc": (b"** CONVERTED FROM a.edf", r"not a table: it is an EyeLink \.asc file"),
    "preamble": (
        f"System,Tobii\n\n{HEADER}\n{GOOD[0]}".encode(),
        "row 3 names the columns, and the first row must",
    ),
    "cut gzip": (gzip.compress(HEADER.encode() * 99)[:40], "not a gzip file that can be read"),
    "flipped gzip": (gzip.compress(HEADER.encode())[:-5] + b"xxxxx", "not a gzip file that can be read"),
    "parquet": (b"PAR1" + bytes(50), "not a parquet file that can be read"),
    "empty": (b"", "its first row, which names the columns, is empty"),
    "other columns": (b"a,b\n1,2\n", "no column 'participant'; there are a, b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_table_is_named(tmp_path: Path, case: str) -> None:
    body, said = WRONG[case]
    table = write(tmp_path, GOOD)
    table.write_bytes(body)
    with pytest.raises(FixationError, match=rf"fix\.csv: .*{said}"):
        fixations.read(table)


def test_parquet_is_told_by_its_content_and_takes_no_column_from_its_folder(tmp_path: Path) -> None:
    pl = pytest.importorskip("polars")
    table = write(tmp_path, GOOD)
    (tmp_path / "x=1:2").mkdir()
    pl.read_csv(table).write_parquet(tmp_path / "x=1:2" / "fix.dat")
    got = fixations.read(tmp_path / "x=1:2" / "fix.dat", tmp_path / "fix.csv.yaml")
    assert got.x.tolist() == fixations.read(table).x.tolist()
