"""What a GPU is asked: commands that exist, in time, whose findings outlast whatever goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rjepa_triton import cli
from rjepa_triton.bench.harness import clocks
from rjepa_triton.bench.harness import stages as stages_module
from rjepa_triton.bench.harness.stages import Stage
from rjepa_triton.bench.report import gpu_check, gpu_tests

NO_PLUGINS = not (importlib.util.find_spec("xdist") and importlib.util.find_spec("pytest_timeout"))


@pytest.fixture
def rehearsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REHEARSE", "1")
    monkeypatch.setattr(gpu_check, "source", lambda root: "as it is")
    # variables by which this run of pytest configures its own workers
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


def test_the_real_stages(tmp_path: Path) -> None:
    stages = gpu_check.stages(tmp_path)
    assert [s.name for s in stages if s.must_finish] == ["smoke", "tests"]
    assert len({s.name for s in stages}) == len(stages)
    # starting counts too, and stopping the last stage counts twice
    assert sum(s.seconds for s in stages) <= gpu_check.TOTAL_SECONDS
    assert gpu_check.TOTAL_SECONDS + 2 * stages_module.STOP_SECONDS + 10 < 7 * 60
    order = [s.name for s in stages]
    assert order.index("smoke") < order.index("kernels") < order.index("rivals")
    assert next(s for s in stages if s.name == "smoke").seconds <= 60
    files = gpu_check.files_of_tests(gpu_check.ROOT)
    assert all((gpu_check.ROOT / file).exists() for file in files)
    assert "tests/bench/kernels/test_static.py" not in files
    assert {
        "tests/test_gpu.py",
        "tests/backend/test_operations.py",
        "tests/kernels/test_gamma_step.py",
    } <= set(files)
    assert [s.name for s in gpu_check.stages(tmp_path, rehearse=True)][:4] == order[:4]


def command(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["rjepa", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize("which", ["kernels", "rivals", "scaling-B1", "scaling-B32", "online", "report"])
def test_the_commands_exist_as_they_are_called(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line accepts each command, which then fails only for lack of something that is missing here."""
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
    monkeypatch.delenv("REHEARSE", raising=False)
    assert command(monkeypatch, ("bench", "gpu-check", "--out", str(tmp_path / "out"))) == 2
    assert "error: gpu-check needs a GPU, and torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def python(name: str, code: str, seconds: float = 30, must_finish: bool = False) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), seconds, must_finish)


def found(out: Path) -> dict[str, str]:
    return {s["name"]: s["status"] for s in json.loads((out / "summary.json").read_text())["stages"]}


def members(out: Path) -> list[str]:
    with tarfile.open(out / gpu_check.ARCHIVE) as archive:
        return archive.getnames()


def test_findings_are_three_small_files_renewed_after_each_stage(tmp_path: Path, rehearsing: None) -> None:
    out = tmp_path / "out"

    def make(work: Path, _: bool) -> list[Stage]:
        look = f"import os; print(sorted(os.listdir({str(out)!r})))"
        noise = f"import os; open({str(work / 'big.png')!r}, 'wb').write(os.urandom(20 << 20)); print('x' * (1 << 20))"
        return [
            python("first", "print(1)"),
            python("look", look),
            python("noise", noise),
            python("slow", "import time; time.sleep(60)", 1.2),
        ]

    assert gpu_check.check(out, make) == 0
    files = sorted(path.name for path in out.iterdir())
    assert files == ["results.md", "results.tar.gz", "summary.json"]
    assert all(path.stat().st_size < 16 << 20 for path in out.iterdir())
    assert found(out) == {"first": "ok", "look": "ok", "noise": "ok", "slow": "cut off"}
    assert "big.png" not in members(out)
    with tarfile.open(out / gpu_check.ARCHIVE) as archive:
        seen, noise = (archive.extractfile(name) for name in ("look.log", "noise.log"))
        assert seen is not None
        assert noise is not None
        assert "results.tar.gz" in seen.read().decode()
        assert len(noise.read()) == gpu_check.MOST_OF_LOG
    assert "| slow | cut off |" in (out / gpu_check.PAGE).read_text()


def test_a_rerun_goes_on_unless_something_changed(
    tmp_path: Path, rehearsing: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, count = tmp_path / "out", tmp_path / "count"

    def make(work: Path, _: bool) -> list[Stage]:
        add = f"open({str(count)!r}, 'a').write('a')"
        fail = f"import os, sys; ok = os.path.exists({str(work / 'kept')!r}); open({str(work / 'kept')!r}, 'w'); sys.exit(not ok)"
        return [python("once", add), python("twice", fail)]

    assert gpu_check.check(out, make) == 1
    assert gpu_check.check(out, make) == 0  # the file that the first run left is still there
    assert count.read_text() == "a"
    assert "kept from an earlier run: once" in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "source", lambda root: "changed")
    assert gpu_check.check(out, make) == 1
    assert count.read_text() == "aa"
    assert "the earlier run is left out" in capsys.readouterr().out
    (out / gpu_check.ARCHIVE).write_bytes(b"damaged")
    assert gpu_check.check(out, make) == 1
    assert "can't be read" in capsys.readouterr().out


def test_damaged_findings_stop_nothing(tmp_path: Path, rehearsing: None) -> None:
    def make(work: Path, _: bool) -> list[Stage]:
        (work / "kernels.jsonl").write_text("no record\n{}\n")
        (work / "tests.tests").write_text('["a", "failed"]\n["b", "pas\n')
        return [python("first", "pass"), python("second", "pass")]

    assert gpu_check.check(tmp_path / "out", make) == 0
    page = (tmp_path / "out" / gpu_check.PAGE).read_text()
    assert "tests: 1 told, 1 failed" in page
    assert "kernels.jsonl" in members(tmp_path / "out")
    assert "line 1" in page


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_it_had(
    tmp_path: Path, way: signal.Signals, rehearsing: None
) -> None:
    out = tmp_path / "out"
    code = f"""
import sys
from pathlib import Path
from rjepa_triton.bench.harness.stages import Stage
from rjepa_triton.bench.report import gpu_check
gpu_check.source = lambda root: ""
def make(work, rehearse):
    log = "print('well', flush=True); import time; time.sleep(int(sys.argv[1]))"
    return [Stage(name, (sys.executable, "-c", "import sys; " + log, str(s)), 300) for name, s in (("a", 0), ("b", 300))]
gpu_check.check(Path({str(out)!r}), make)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out / gpu_check.ARCHIVE).exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(way)
    run.wait(20)
    assert found(out)["a"] == "ok"
    assert "a.log" in members(out)


FAULTS = '''
import ctypes, os, time
import pytest
from rjepa_triton.bench.report import gpu_tests

class Device:
    """A stand-in for a GPU that its process can no longer use after one bad call."""
    broken = False
    def call(self):
        if Device.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

gpu_tests.usable = lambda: not Device.broken
GOOD = pytest.mark.parametrize("n", range(3))

@GOOD
def test_before(n):
    Device().call()

def test_sticky():
    Device.broken = True
    Device().call()

@GOOD
def test_after_sticky(n):
    Device().call()

def test_hangs_in_c():
    ctypes.CDLL(None).sleep(600)

@GOOD
def test_after_hang(n):
    Device().call()

def test_crashes():
    os.abort()

@GOOD
def test_after_crash(n):
    Device().call()

def test_fails_once():
    assert os.path.exists(os.environ["SECOND"])
'''


@pytest.mark.skipif(NO_PLUGINS, reason="needs pytest-xdist and pytest-timeout")
def test_what_one_test_breaks_costs_that_test_alone(
    tmp_path: Path, rehearsing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hang, a crash and a GPU that is unusable from then on; a rerun runs what hasn't passed."""
    monkeypatch.setenv("SECOND", str(tmp_path / "second"))
    file, out = tmp_path / "test_faults.py", tmp_path / "out"
    file.write_text(FAULTS)

    def make(work: Path, _: bool) -> list[Stage]:
        stage = gpu_check.pytest_stage("tests", [str(file), "-c", os.devnull], work, 150, workers=1, limit=4)
        return [stage, python("next", "pass")]

    assert gpu_check.check(out, make) == 1
    assert found(out) == {"tests": "failed", "next": "ok"}
    page = (out / gpu_check.PAGE).read_text()
    with tarfile.open(out / gpu_check.ARCHIVE) as archive:
        archive.extract("tests.tests", tmp_path)
    passed = {test.partition("::")[2] for test in gpu_tests.passed(tmp_path / "tests.tests")}
    assert passed == {
        f"test_{when}[{n}]"
        for when in ("before", "after_sticky", "after_hang", "after_crash")
        for n in range(3)
    }
    for failed in ("sticky", "hangs_in_c", "crashes", "fails_once"):
        assert f"::test_{failed}\n" in page
    (tmp_path / "second").touch()
    assert gpu_check.check(out, make) == 1
    told = (out / gpu_check.PAGE).read_text()
    assert "::test_fails_once\n" not in told
    assert "::test_crashes\n" in told
    summary = json.loads((out / "summary.json").read_text())
    assert next(s for s in summary["stages"] if s["name"] == "tests")["counts"]["tests"] <= 8


def test_clocks() -> None:
    assert clocks.now("cpu") == {}
    line = "1980, 2619, 1980, 41, 312.55, 700.00, 0x0000000000000005\n"
    assert clocks.read(line) == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "most_sm_mhz": 1980.0, "celsius": 41.0, "watts": 312.55,
        "most_watts": 700.0, "throttled": "0x4",
    }  # fmt: skip
    assert clocks.read("1980, [N/A], 1980, 41, [N/A], 700, [N/A]") == {
        "sm_mhz": 1980.0, "most_sm_mhz": 1980.0, "celsius": 41.0, "most_watts": 700.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="asked for 7 values"):
        clocks.read("No devices were found")
