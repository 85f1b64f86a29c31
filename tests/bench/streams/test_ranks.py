"""`rjepa bench ranks`: processes that share a learner's rows, against one."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.streams import ranks


def test_each_rank_holds_its_half_and_both_are_timed() -> None:
    asked = ["ranks", "--hidden", "16", "--batch", "2", "--chunk", "3", "--rounds", "2", "--markdown"]
    shown = CliRunner().invoke(bench, asked)
    assert shown.exit_code == 0, shown.output
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in shown.output.splitlines()
        if re.match(r"\| +[12] \|", line)
    ]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("1", "whole", "16.4 kB"),  # 4 matrices · 2 states · 2 rows · 16 · 16 · 4 bytes
        ("2", "whole, each its own", "16.4 kB"),
        ("2", "sharded", "8.19 kB"),
    ]
    assert re.search(r"processes that share nothing do \d+\.\d\d \(", shown.output.replace("\n", " "))


def test_ratios_are_of_the_slowest_rank_in_each_round() -> None:
    question = ranks.Question(16, 2, 2, 2, 3)
    first = ranks.Timed([2.0, 2.0, 2.0], [2.5, 2.0, 2.5], [1.0, 1.0, 1.0], 8, 4)
    second = ranks.Timed([], [2.0, 2.5, 2.0], [0.5, 1.25, 1.0], 8, 4)
    said = str(ranks.table(question, [first, second]).caption)
    assert "2 ranks are 2.00 (" in said  # 2 / max(1, .5), 2 / 1.25, 2 / 1
    assert "share nothing do 1.60 (1.60 to 1.60)" in said  # 2 · 2 / 2.5


def test_bad_options_are_named() -> None:
    for option, value, says in (
        ("--ranks", "0", "--ranks must be at least 1"),
        ("--chunk", "1", "--chunk must be at least 2"),
    ):
        shown = CliRunner().invoke(bench, ["ranks", option, value])
        assert shown.exit_code == 2
        assert says in shown.output
