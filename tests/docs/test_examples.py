"""Every Python example and every command of the documentation is what the package takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from pages import PAGES, Block, all_blocks, blocks, check, commands, is_walk, run_python


def name(block: Block) -> str:
    return block.place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the examples run, on one thread: an empty folder with the benchmarks' records."""
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RJEPA_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [b for b in all_blocks("python") if not is_walk(b.page)], ids=name)
def test_an_example_runs_alone(block: Block, folder: Path) -> None:
    run_python(block, {})


@pytest.mark.parametrize("block", [b for b in all_blocks("sh") if not is_walk(b.page)], ids=name)
def test_commands_are_accepted(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands(block):
        check(command, monkeypatch)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if is_walk(page)], ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_a_page_runs_from_top_to_bottom(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names)
        elif block.language == "yaml":
            found = re.match(r"# (\S+)\n", block.text)
            assert found, f"{block.place}: the first line must name the file"
            (folder / found[1]).write_text(block.text)
        elif block.language == "sh":
            for command in commands(block):
                check(command, monkeypatch)


def test_no_command_hides_where_no_test_looks() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            assert not re.match(r" {4,}(\$ )?(\S*/)?(rjepa|make|pip) ", line), f"{page.name}:{number}: {line}"
    for block in [block for page in PAGES for block in blocks(page)]:
        assert block.language in ("python", "sh", "yaml", "text", "make"), block.place
