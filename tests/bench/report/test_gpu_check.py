"""What a GPU is asked: the stages are commands that exist, and they fit into the time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rjepa_triton import cli
from rjepa_triton.bench.harness import stages as stages_module
from rjepa_triton.bench.report import gpu_check


def test_the_real_stages(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path)
    assert [s.name for s in stages if s.must_finish] == ["tests"]
    assert len({s.name for s in stages}) == len(stages)
    # with what starting takes, and stopping the last stage, twice
    assert sum(s.seconds for s in stages) <= gpu_check.TOTAL_SECONDS
    assert gpu_check.TOTAL_SECONDS + 2 * stages_module.STOP_SECONDS + 10 < 9 * 60
    files = gpu_check.files_of_tests(gpu_check.ROOT)
    assert all((gpu_check.ROOT / file).exists() for file in files)
    assert "tests/bench/kernels/test_static.py" not in files
    assert {
        "tests/test_gpu.py",
        "tests/backends/test_operations.py",
        "tests/kernels/test_gamma_step.py",
    } <= set(files)


def command(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize("which", ["kernels", "scaling-B1", "scaling-B32", "online", "report"])
def test_the_commands_exist_as_they_are_called(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is taken by the command line, and refused for what is missing here alone."""
    (stage,) = (s for s in gpu_check.stages(tmp_path) if s.name == which)
    assert stage.command[1:3] == ("-m", "rjepa_triton")
    assert command(monkeypatch, stage.command[3:]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert ("have no records" if which == "report" else "torch finds no CUDA device here") in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_exits_2_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, out = "error: gpu-check needs a GPU, and torch", ("--out", str(tmp_path / "out"))
    module = [sys.executable, "-m", "rjepa_triton.bench.report.gpu_check", *out]
    done = subprocess.run(module, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert command(monkeypatch, ("bench", "gpu-check", *out)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
