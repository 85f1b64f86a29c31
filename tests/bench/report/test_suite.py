"""Every benchmark within a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.report import suite


def test_the_stages_are_commands_with_options_that_exist(tmp_path: Path) -> None:
    group: Any = typer.main.get_command(bench)
    for stage in suite.stages(tmp_path, "cpu", 2):
        assert stage.command[:4] == (sys.executable, "-m", "rjepa_triton", "bench")
        command = group.commands[stage.command[4]]
        known = {name for option in command.params for name in option.opts}
        assert {part for part in stage.command[5:] if part.startswith("--")} <= known, stage.name
    names = [stage.name for stage in suite.stages(tmp_path, "cpu", 0)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("text", "seconds"), [("8min", 480), ("90s", 90), ("1.5h", 5400), (" 2 min ", 120)])
def test_times(text: str, seconds: float) -> None:
    assert suite.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "min", "-1s", "0s", "8 days"])
def test_what_is_no_time_is_an_error(text: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["all", f"--budget={text}", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "--budget must be a time such as 8min" in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_finished_is_not_run_again_and_the_report_is_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "scaling --hidden {} --batch 1 --steps 4 --chunk 2 --algorithms rfp-dual,bptt --sample 0.01 --passes 1"
    order = tuple((f"scaling-{n}", small.format(n), 60.0) for n in (8, 16))
    monkeypatch.setattr(suite, "ORDER", order[:1])
    said: list[str] = []
    code, written = suite.run(120, tmp_path, device="cpu", tell=said.append)
    assert code == 0
    assert "scaling-8: ok" in said[0]
    assert (tmp_path / "report" / "index.html") in written
    monkeypatch.setattr(suite, "ORDER", order)
    said.clear()
    assert suite.run(120, tmp_path, device="cpu", tell=said.append)[0] == 0
    assert said[0] == "kept from an earlier run: scaling-8"
    assert [line.partition(":")[0] for line in said[1:]] == ["scaling-16"]
    kept = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [(stage["name"], stage["status"]) for stage in kept] == [("scaling-8", "ok"), ("scaling-16", "ok")]
    lines = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [line["params"]["N"] for line in lines] == [8, 8, 16, 16]
    assert all(line["command"].startswith("rjepa bench scaling --hidden") for line in lines)
    # another torch: what was finished says nothing about it
    told = json.loads((tmp_path / "summary.json").read_text())
    told["versions"]["torch"] = "0"
    (tmp_path / "summary.json").write_text(json.dumps(told))
    said.clear()
    suite.run(120, tmp_path, device="cpu", tell=said.append)
    assert [line.partition(":")[0] for line in said] == ["scaling-8", "scaling-16"]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["all", "--device", "tpu", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "device must be 'cpu'" in result.output
    assert not (tmp_path / "out").exists()
