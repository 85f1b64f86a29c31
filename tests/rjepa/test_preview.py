"""The picture of a scan path, and the commands that draw it and check a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import films
import numpy as np
import pytest
from PIL import Image

from rjepa_triton import cli
from rjepa_triton.rjepa import preview
from rjepa_triton.rjepa.patches import FixationSequences


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", "fixations", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    code = end.value.code
    return code if isinstance(code, int) else 0


def test_numbers_are_written_apart_and_near() -> None:
    place = np.repeat([[50.0, 60.0]], 8, 0)
    written = preview._label_places(place, 2)
    apart = np.abs(written[:, None] - written) >= [10, 7.5]
    assert (apart.any(2) | np.eye(8, dtype=bool)).all()
    assert np.hypot(*(written - place).T).max() < 30
    assert written[0].tolist() == [50, 60]
    far = np.array([[0.0, 0.0], [100.0, 0.0]])
    assert np.array_equal(preview._label_places(far, 2), far)


def test_frame_and_patches_are_in_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), (40, 160, 90)).save(tmp_path / "m.png")
    got = films.table(tmp_path, films.looking(15), {"m": "m.png"})
    data = FixationSequences.from_fixations(got, steps=15, cache=tmp_path / "cache")
    for steps, start in ((13, 2), (None, 0), (1, 14)):
        file = preview.draw(data, 0, tmp_path / "a.png", start=start, steps=steps)
        drawn = np.asarray(Image.open(file).convert("RGB")).astype(int)
        green = (np.abs(drawn - (40, 160, 90)).max(2) < 12).mean()
        assert green > 0.4
        last = drawn[-drawn.shape[0] // 8 :]  # the last row of patches
        assert (np.abs(last - (40, 160, 90)).max(2) < 12).any()
    with pytest.raises(ValueError, match="start must be below 15, the fixations of the sequence, got 30"):
        preview.draw(data, 0, tmp_path / "a.png", start=30)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        preview.draw(data, 0, tmp_path / "a.png", steps=0)


def test_preview_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    films.write(tmp_path / "m.mp4", 28 * 5, size=(200, 152))
    rows = [*films.looking(8), *films.looking(8, "q")]
    films.table(tmp_path, rows, {"m": "m.mp4"})
    out, table = tmp_path / "new" / "a.png", tmp_path / "fix.csv"
    common = ("--table", table, "--out", out, "--cache", tmp_path / "cache")
    assert run(monkeypatch, "preview", *common) == 0
    said = capsys.readouterr()
    assert said.out == f"picture: {out}\n"
    assert "p in m, the first of 2 pairs" in said.err
    assert Image.open(out).width > 1000
    assert run(monkeypatch, "preview", *common, "--participant", "r") == 2
    assert "no fixations of participant r in movie (any); there are p in m, q in m" in capsys.readouterr().err
    table.write_text(table.read_text() + "q,m,9000,200,10,10\nq,m,3000,200,,10\n")
    assert run(monkeypatch, "preview", *common, "--participant", "q") == 2
    assert "row 19: x is missing" in capsys.readouterr().err
    assert run(monkeypatch, "preview", *common, "--participant", "q", "--policy", "skip") == 0
    assert "2 with a problem" not in (err := capsys.readouterr().err)
    assert "1 with a problem: position missing (row 19)" in err
    assert "1 with a problem: after the movie (row 18)" in err


def test_preview_of_a_simulated_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    film = films.write(tmp_path / "m.mp4", 28, size=(200, 152))
    still = films.picture(tmp_path)
    common = ("--out", tmp_path / "a.png", "--cache", tmp_path / "cache", "--steps", 4)
    for chosen in (("--video", film, "--px-per-degree", 5), ("--image", still), ("--demo", "flower")):
        (tmp_path / "a.png").unlink(missing_ok=True)
        assert run(monkeypatch, "preview", *common, *chosen) == 0, capsys.readouterr().err
        assert (tmp_path / "a.png").exists()
    assert run(monkeypatch, "preview", *common) == 2
    assert "give one of --table, --image, --video, --demo, got none" in capsys.readouterr().err
    assert run(monkeypatch, "preview", *common, "--demo", "moon") == 2
    assert "demo source must be one of 'bigbuckbunny'" in capsys.readouterr().err
    assert run(monkeypatch, "preview", *common, "--image", tmp_path / "no.png") == 2
    assert "no.png: no such file" in capsys.readouterr().err


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    films.picture(tmp_path)
    films.table(tmp_path, films.looking(8), {"m": "m.png"})
    table = tmp_path / "fix.csv"
    assert run(monkeypatch, "check", table) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{table}: 8 rows, 8 kept",
        "  1 participant–movie pairs, 1 movies",
    ]
    table.write_text(table.read_text() + "p,m,9000,200,10,\np,m,9300,200,10,\n")
    assert run(monkeypatch, "check", table, "--rows", 1) == 2
    said = capsys.readouterr()
    assert "2 with a problem: position missing (row 10, 11)" in said.out
    assert said.out.endswith("  row 10: y is missing or not finite\n  … 1 more\n")
    assert "error: " in said.err
    assert "2 of its 10 rows are bad" in said.err
    assert run(monkeypatch, "check", table, "--policy", "skip") == 0
    assert "8 kept" in capsys.readouterr().out
    assert run(monkeypatch, "check", tmp_path / "no.csv") == 2
    assert "no.csv: no such file" in capsys.readouterr().err
    assert run(monkeypatch, "check", table, "--format", "edf") == 2
    assert (
        "--format must be one of 'table', 'eyelink', 'asc', 'tobii', 'smi', 'pupil', 'pymovements', 'bids', got 'edf'"
        in capsys.readouterr().err
    )


def test_check_an_eyelink_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = [
        "RECORDING_SESSION_LABEL",
        "film",
        "CURRENT_FIX_START",
        "CURRENT_FIX_DURATION",
        "CURRENT_FIX_X",
        "CURRENT_FIX_Y",
    ]
    (tmp_path / "r.txt").write_text("\t".join(head) + "\ns1\tm\t0\t200\t10\t10\n")
    (tmp_path / "r.yaml").write_text("px_per_degree: 10\nframe_size: [200, 150]\n")
    assert run(monkeypatch, "check", tmp_path / "r.txt", "--format", "eyelink", "--movie-column", "film") == 0
    assert "1 rows, 1 kept" in capsys.readouterr().out


MISSING = """
import sys
sys.modules["av"] = None
from rjepa_triton.rjepa.cli import fixations
assert not {"pyarrow", "torchvision", "matplotlib"} & set(sys.modules)
fixations(["preview", "--demo", "china"])
"""


def test_a_missing_package_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "this needs av, which is not installed: pip install 'rjepa-triton[" in done.stderr
