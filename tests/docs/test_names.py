"""What the pages name is there: files, tests, modules, and what they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT
from pages import PAGES

FOLDERS = ("rjepa_triton", "kernels", "bench", "tests", "docs")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page without what was moved in the changelog: its left column has old names."""
    return re.sub(r"^\| `rjepa_triton\.\S*?`.*$", "", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_tests_that_a_page_names_are_there(page: Path) -> None:
    for path, test in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)(?:::(\w+))?`", text_of(page)):
        assert (ROOT / path).exists(), f"{name(page)}: {path}"
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{name(page)}: {path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{name(page)}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
