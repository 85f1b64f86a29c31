"""`rjepa bench ranks`: processes that share a learner's rows, against one."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench


def test_each_rank_holds_its_half_and_both_are_timed() -> None:
    asked = ["ranks", "--hidden", "16", "--batch", "2", "--chunk", "3", "--rounds", "2", "--markdown"]
    shown = CliRunner().invoke(bench, asked)
    assert shown.exit_code == 0, shown.output
    gamma = [
        line.split("|")[4].strip() for line in shown.output.splitlines() if re.match(r"\| +[12] \|", line)
    ]
    assert gamma == ["16.4 kB", "8.19 kB"]  # 4 matrices · 2 states · 2 rows · 16 · 16 · 4 bytes


def test_bad_options_are_named() -> None:
    for option, value, says in (
        ("--ranks", "0", "--ranks must be at least 1"),
        ("--chunk", "1", "--chunk must be at least 2"),
    ):
        shown = CliRunner().invoke(bench, ["ranks", option, value])
        assert shown.exit_code == 2
        assert says in shown.output
