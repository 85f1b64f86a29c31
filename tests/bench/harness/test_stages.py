"""Stages: limits, failures, and a summary that is whole at every moment."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rjepa_triton.bench.harness import stages as module
from rjepa_triton.bench.harness.stages import Stage


def python(name: str, code: str, seconds: float = 30, must_finish: bool = False) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), seconds, must_finish)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / module.SUMMARY).read_text())


def run(stages: list[Stage], out: Path, **options: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    options = {"total_seconds": 60, **options}
    code = module.run_stages(stages, out, tell=lambda line: None, **options)
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
    (tmp_path / "bad.xml").write_text('<testsuite tests="9"/>')  # an earlier run left it
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
    """This holds also where SIGINT is ignored, as in a command that a shell runs in the background."""
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
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    _, found = run([python("stubborn", stubborn, 1.2)], tmp_path)
    assert (found["stubborn"]["status"], found["stubborn"]["code"]) == ("cut off", -9)
    status = Path(f"/proc/{found['stubborn']['tail'][0]}/status")
    for _ in range(100):  # the process that adopts the orphan needs a moment to reap it
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
    look = f"print(open({str(tmp_path / module.SUMMARY)!r}).read())"
    run([python("first", "pass"), python("second", look)], tmp_path)
    seen = json.loads((tmp_path / "second.log").read_text())["stages"]
    assert [stage["status"] for stage in seen] == ["ok", "running"]


def test_stages_see_the_checkout_and_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.getcwd(), os.environ['PYTHONPATH'], 'TRITON_INTERPRET' in os.environ)"
    (tmp_path / "checkout").mkdir()
    _, found = run([python("look", code)], tmp_path, checkout=tmp_path / "checkout")
    here, path, interpreted = found["look"]["tail"][0].split()
    assert here == str(tmp_path / "checkout")
    assert path.split(os.pathsep)[0] == here
    assert interpreted == "False"


def test_what_an_earlier_summary_says_is_kept(tmp_path: Path) -> None:
    assert module.load_results(tmp_path) == ({}, [])
    run([python("first", "pass")], tmp_path, about={"device": "one"})
    head, earlier = module.load_results(tmp_path)
    assert head == {"device": "one"}
    assert [(result.name, result.status) for result in earlier] == [("first", "ok")]
    _, found = run([python("second", "pass")], tmp_path, earlier=earlier)
    assert [(name, stage["status"]) for name, stage in found.items()] == [("first", "ok"), ("second", "ok")]
    (tmp_path / module.SUMMARY).write_text("{broken")
    assert module.load_results(tmp_path) == ({}, [])
