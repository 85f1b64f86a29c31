"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and has the whole API."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from checkout import DOCS, ROOT

import rjepa_triton

with_docs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="the extra docs is not installed"
)


def test_every_public_name_has_its_place() -> None:
    shown = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in rjepa_triton.__all__:
        if not isinstance(getattr(rjepa_triton, name), types.ModuleType):
            assert f"::: rjepa_triton.{name}\n" in shown, name


@with_docs
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("mkdocs")
    made = subprocess.run(
        [command, "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        assert not re.search(r"""<(?:script|img|source)[^>]+src=["']?(?:https?:)?//""", text), page
        assert not re.search(r"""<link[^>]+href=["']?(?:https?:)?//""", text), page


@with_docs
def test_docstrings_become_markdown() -> None:
    place = importlib.util.spec_from_file_location("docstrings", DOCS / "site" / "docstrings.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    text = """A step of Γ[ν], for *all* units.

    Γ = M * Γ

m        (B, N)   the transition
rest     what remains, which takes
         two lines

Args:
    rule: one of these.
        "rfp"    Γ of `W[i]`
"""
    assert module.markdown(text).splitlines() == [
        r"A step of Γ\[ν\], for \*all\* units.",
        "",
        "    Γ = M * Γ",
        "",
        "- `m`: (B, N), the transition",
        "- `rest`: what remains, which takes two lines",
        "",
        "Args:",
        "    rule: one of these.",
        "",
        '        - `"rfp"`: Γ of `W[i]`',
    ]
