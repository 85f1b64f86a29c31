"""The stages of a check on a GPU: limits, failures, and a summary that is whole at every moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rjepa_triton import cli
from rjepa_triton.bench import gpu_check
from rjepa_triton.bench.gpu_check import Stage


def python(name: str, code: str, seconds: float = 30, must_finish: bool = False) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), seconds, must_finish)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / gpu_check.SUMMARY).read_text())


def run(stages: list[Stage], out: Path, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    code = gpu_check.run_stages(stages, out, tell=lambda line: None, **options)
    return code, {stage["name"]: stage for stage in summary(out)["stages"]}


def test_all_well(tmp_path: Path) -> None:
    report = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>'
    stages = [
        python("tests", f"open({str(tmp_path / 'tests.xml')!r}, 'w').write({report!r}); print('fine')"),
        python("after", "print('too')"),
    ]
    code, found = run(stages, tmp_path, about={"device": "one"})
    assert code == 0
    assert summary(tmp_path)["device"] == "one"
    assert [stage["status"] for stage in found.values()] == ["ok", "ok"]
    assert found["tests"]["counts"] == {"tests": 3, "failures": 0, "errors": 0, "skipped": 1}
    assert found["tests"]["tail"] == ["fine"]
    assert (tmp_path / "after.log").read_text() == "too\n"


def test_a_failure_is_recorded_and_the_next_stage_runs(tmp_path: Path) -> None:
    (tmp_path / "bad.xml").write_text('<testsuite tests="9"/>')  # of an earlier run
    stages = [
        python("bad", "import sys; print('why'); sys.exit(3)"),
        Stage("absent", (str(tmp_path / "no-such-program"),), 5),
        python("next", "pass"),
    ]
    code, found = run(stages, tmp_path)
    assert code == 1
    assert (found["bad"]["status"], found["bad"]["code"], found["bad"]["tail"]) == ("failed", 3, ["why"])
    assert found["bad"]["counts"] == {}
    assert found["absent"]["status"] == "failed"
    assert "no-such-program" in found["absent"]["tail"][0]
    assert found["next"]["status"] == "ok"


INTERRUPTED = """
import time
print('began', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('wrote what it had', flush=True)
"""


@pytest.mark.parametrize("must_finish", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_stage_out_of_time_is_interrupted(tmp_path: Path, must_finish: bool, ignored: bool) -> None:
    """Where interrupts are ignored too, as of a command that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        code, found = run([python("slow", INTERRUPTED, 1.2, must_finish), python("next", "pass")], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == int(must_finish)
    assert found["slow"]["status"] == "cut off"
    assert found["slow"]["tail"] == ["began", "wrote what it had"]
    assert found["next"]["status"] == "ok"


def test_a_stage_that_will_not_stop_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "STOP_SECONDS", 0.3)
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    _, found = run([python("stubborn", stubborn, 1.2)], tmp_path)
    assert (found["stubborn"]["status"], found["stubborn"]["code"]) == ("cut off", -9)
    status = Path(f"/proc/{found['stubborn']['tail'][0]}/status")
    for _ in range(100):  # until whoever adopts it has buried it
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the stage's child still runs")


def test_no_time_left_skips_what_is_left(tmp_path: Path) -> None:
    stages = [python("first", "import time; time.sleep(60)", 30), python("tests", "pass", 30, True)]
    code, found = run(stages, tmp_path, total_seconds=1.5)
    assert code == 1
    assert [stage["status"] for stage in found.values()] == ["cut off", "skipped"]
    assert found["first"]["limit"] <= 1.5


def test_the_summary_is_there_while_a_stage_runs(tmp_path: Path) -> None:
    look = f"print(open({str(tmp_path / gpu_check.SUMMARY)!r}).read())"
    run([python("first", "pass"), python("second", look)], tmp_path)
    seen = json.loads((tmp_path / "second.log").read_text())["stages"]
    assert [stage["status"] for stage in seen] == ["ok", "running"]


def test_stages_see_the_checkout_and_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], 'TRITON_INTERPRET' in os.environ)"
    _, found = run([python("look", code)], tmp_path)
    here, path, interpreted = found["look"]["tail"][0].split()
    assert here == str(gpu_check.ROOT)
    assert path.split(os.pathsep)[0] == here
    assert interpreted == "False"


def test_the_real_stages(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path)
    assert [s.name for s in stages if s.must_finish] == ["tests"]
    assert len({s.name for s in stages}) == len(stages)
    # with what starting takes, and stopping the last stage, twice
    assert sum(s.seconds for s in stages) <= gpu_check.TOTAL_SECONDS
    assert gpu_check.TOTAL_SECONDS + 2 * gpu_check.STOP_SECONDS + 10 < 9 * 60
    files = gpu_check.files_of_tests(gpu_check.ROOT)
    assert all((gpu_check.ROOT / file).exists() for file in files)
    assert "tests/test_kernels_static.py" not in files
    assert {"tests/test_gpu.py", "tests/test_ops.py", "tests/test_kernels_gamma_step.py"} <= set(files)


def command(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize("which", ["kernels", "scaling-B1", "scaling-B32", "plot-B1", "plot-B32"])
def test_the_commands_exist_as_they_are_called(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is taken by the command line, and refused for what is missing here alone."""
    (stage,) = (s for s in gpu_check.stages(tmp_path) if s.name == which)
    assert stage.command[2] == "from rjepa_triton.cli import main; main()"
    assert command(monkeypatch, stage.command[3:]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert ("scaling.jsonl" if which.startswith("plot") else "torch finds no CUDA device here") in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_exits_2_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, out = "error: gpu-check needs a GPU, and torch", ("--out", str(tmp_path / "out"))
    module = [sys.executable, "-m", "rjepa_triton.bench.gpu_check", *out]
    done = subprocess.run(module, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert command(monkeypatch, ("bench", "gpu-check", *out)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
