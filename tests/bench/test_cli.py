"""The `rjepa` command: help, and what it says where its extra packages are missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rjepa_triton import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    code = end.value.code
    return code if isinstance(code, int) else 0


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "bench", "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("scaling", "plot", "compare", "fidelity"))


def test_an_unknown_command_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "bench", "juggle") == 2
    assert "juggle" in capsys.readouterr().err


MISSING = """
import sys
from rjepa_triton.cli import main
for package in ("typer", "matplotlib", "rich"):
    kept = sys.modules.get(package)
    sys.modules[package] = None
    try:
        main()
    except SystemExit as end:
        print(package, end.code)
    if kept is None:
        del sys.modules[package]
    else:
        sys.modules[package] = kept
"""


def test_missing_packages_are_named() -> None:
    """In a process of its own, since this one has them all imported."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MISSING], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["typer", "2", "matplotlib", "2", "rich", "2"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("rjepa needs")]
    assert [line.split()[2].strip(",:") for line in lines] == ["typer", "matplotlib", "rich"]
    assert all("pip install 'rjepa-triton[bench]'" in line for line in lines)
