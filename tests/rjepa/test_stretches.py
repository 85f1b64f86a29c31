"""Tables of labels and responses: which stretch each fixation is in, and rows that are refused."""

from __future__ import annotations

from pathlib import Path

import films
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from rjepa_triton.rjepa import stretches
from rjepa_triton.rjepa.fixations import FixationError
from rjepa_triton.rjepa.patches import FixationSequences


def written(folder: Path, *lines: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_each_fixation_is_in_its_stretch(tmp_path: Path) -> None:
    """Middles lie at 0.1, 0.4, 0.7, … s. A stretch has its start and lacks its end; n is one stretch as a whole."""
    films.picture(tmp_path)
    films.picture(tmp_path, name="n.png")
    rows = [*films.looking(8), *films.looking(4, movie="n")]
    got = films.table(tmp_path, rows, {"m": "m.png", "n": "n.png"})
    data = FixationSequences.from_fixations(got, steps=4, patch=20, degrees=2, cache=tmp_path / "cache")
    assert data.movie.tolist() == ["m", "m", "n"]
    np.testing.assert_allclose(data.middles()[:, 1], [1.3, 1.6, 1.9, 2.2])
    lines = "movie,start,end,label", "n,,,c", "m,1.3,1.9,b", "", "m,,0.4,a", "m,2,,d", "other,1,2,e"
    found = stretches.read(written(tmp_path, *lines))
    assert found.movie.tolist() == ["n", "m", "m", "m", "other"]
    assert found.start.tolist() == [-np.inf, 1.3, -np.inf, 2, 1]
    assert found.row.tolist() == [2, 3, 5, 6, 7]
    assert found.at(data).T.tolist() == [[2, -1, -1, -1], [1, 1, -1, 3], [0, 0, 0, 0]]
    table = pa.table({"movie": ["m", "n"], "v": [1.0, 2.0]})
    pyarrow.parquet.write_table(table, tmp_path / "v.parquet")
    assert stretches.read(tmp_path / "v.parquet").at(data).T.tolist() == [[0] * 4, [0] * 4, [1] * 4]


def test_rows_of_one_stretch_are_told_apart(tmp_path: Path) -> None:
    file = written(tmp_path, "movie,subject,v", "m,1,0.5", "m,2,0.25", "n,1,1")
    found = stretches.read(file, apart=("subject",))
    assert found.stretch.tolist() == [0, 0, 1]
    assert found.movie.tolist() == ["m", "n"]
    with pytest.raises(FixationError, match=r"labels\.csv: row 3: is of the same stretch as row 2$"):
        stretches.read(file)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["label,start", "a,1"], r"labels\.csv: no column 'movie'; there are label, start"),
        (["movie,a,a", "m,1,1"], "2 columns are called 'a'"),
        (["movie,label"], "has no rows"),
        (["movie,label", ",a"], "row 2: has no movie"),
        (["movie,start,end", "m,1,2", "m,x,3"], "row 3: start is 'x'"),
        (["movie,start,end", "m,2,2"], "row 2: goes from 2 to 2 s"),
        (
            ["movie,start,end", "m,,1", "m,0.5,"],
            r"row 3: begins at 0\.5 s, and the stretch of row 2 ends at 1 s",
        ),
        (
            ["movie,start,end", "m,0.5,3", "m,,"],
            r"row 2: begins at 0\.5 s, and the stretch of row 3 ends at inf s",
        ),
        (["movie,label", "m,a,b"], "row 2: has 3 fields, the header has 2"),
        (["movie,label", *[",a"] * 9, "m,b"], "; and 1 more$"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(FixationError, match=says):
        stretches.read(written(tmp_path, *lines))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        stretches.read(tmp_path / "none.csv")
