"""The documentation's pages, and what of them a test can run: Python examples and shell commands.

Python stands in ```python blocks, commands in ```sh blocks, one a line. A command whose comment begins with a time ("# minutes",
"# 8 minutes") or with "your" ("# your table") is too dear, or needs what only a reader has: it is parsed and not run.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkout import DOCS, ROOT

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Read from top to bottom: a block goes on where the one before it stopped.
WALKS = ("tutorials", "how-to")
NOT_RUN = re.compile(r"(your|(about |half )?(an? |\d+ )?(seconds|minutes?|hours?))\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, and the line that it begins on."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for a test's name."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line of an ```sh block."""

    block: Block
    words: tuple[str, ...]
    comment: str

    @property
    def runs(self) -> bool:
        """Whether a test can run it."""
        return NOT_RUN.match(self.comment) is None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of an ```sh block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        code, *comment = re.split(r"(?:^|\s)#\s*", line, maxsplit=1)
        words = tuple(shlex.split(code))
        if words:
            yield Command(block, words, "".join(comment))


def all_blocks(language: str) -> list[Block]:
    """The blocks of one language on all pages."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def is_walk(page: Path) -> bool:
    """Whether the page is read from top to bottom."""
    return page.parent.name in WALKS


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block; loops of 1000 steps are cut to 20."""
    code = compile(
        "\n" * block.line + block.text.replace("range(1000)", "range(20)"), str(block.page), "exec"
    )
    exec(code, names)


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command: `rjepa` runs if it can, and else is parsed; what `make` and `pip` are asked for must be there."""
    name, *rest = command.words
    checks = {"rjepa": _rjepa, "make": _make, "pip": _pip, "git": _git}
    known = Path(name).name
    assert known in checks, f"{command.block.place}: no test knows what {name} is"
    checks[known](rest, command, monkeypatch)


def _rjepa(words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer.core

    from rjepa_triton.cli import main

    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["rjepa", *words])
        patched.setenv("COLUMNS", "120")
        if not command.runs:
            patched.setattr(typer.core.TyperCommand, "invoke", lambda self, context: _parsed(context))
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code, f"{command.block.place}: {shlex.join(command.words)}"


def _parsed(context: Any) -> None:
    """What stands in for a command that is not run: its overrides, if it takes any, are read."""
    overrides = [word for word in context.params.get("overrides") or () if "=" in word]
    if overrides:
        from rjepa_triton.rjepa import config

        config.read(None, overrides)


def _make(words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


@functools.cache
def _extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return set(re.findall(r"^(\w+) = \[", text.partition("\n[")[0], re.MULTILINE))


def _pip(words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = re.findall(r"\[(.*?)\]", " ".join(words))
    assert words[0] == "install"
    assert {extra for group in asked for extra in group.split(",")} <= _extras(), command.words


def _git(words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] in ("clone", "config"), command.words
