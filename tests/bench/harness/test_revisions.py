"""Two revisions of a tiny repository: what changed is found, what didn't isn't, and what fails is a row."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import revisions
from rjepa_triton.bench.harness.revisions import Row, Settings, row

WORK = "def work(n):\n    total = 0\n    for k in range(n):\n        total += k * k\n    return total\n"
CASES = """
import tiny

def fails():
    raise RuntimeError("no such luck")

def older():
    tiny.added_later
    return lambda: None

CASES = {"work": lambda: lambda: tiny.work(tiny.SIZE), "fails": fails, "older": older}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags: base; same; little, 2 % more work; much, twice the work; broken, which can't be imported."""
    folder = tmp_path_factory.mktemp("tiny") / "a repository"
    (folder / "tiny").mkdir(parents=True)

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e@x.y", *words],
            cwd=folder,
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    for tag, size, more in (
        ("base", 10000, ""), ("same", 10000, "# more words"), ("little", 10200, "added_later = 1"),
        ("much", 20000, ""), ("broken", 1, "this is no Python"),
    ):  # fmt: skip
        (folder / "tiny" / "__init__.py").write_text(f"{WORK}SIZE = {size}\n{more}\n")
        git("add", ".")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    (folder / "cases.py").write_text(CASES)
    return folder


def compared(repository: Path, a: str, b: str, **more: object) -> dict[str, Row]:
    settings = Settings(
        a, b, repository, repository / "cases.py", processes=3, rounds=5, seconds=0.005, **more
    )  # type: ignore[arg-type]
    found = revisions.run(settings)
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, check=True, capture_output=True)
    assert len(listed.stdout.splitlines()) == 1  # the worktrees are gone
    return {one.case: one for one in found}


def test_twice_the_work_is_found_and_failures_are_rows(repository: Path) -> None:
    found = compared(repository, "base", "much")
    assert found["work"].verdict == "more"
    assert found["work"].low < found["work"].ratio < found["work"].high
    assert 1.5 < found["work"].ratio < 2.6
    assert "base: RuntimeError: no such luck; much: RuntimeError" in found["fails"].verdict
    assert compared(repository, "much", "base", only=("work",))["work"].verdict == "less"


def test_a_revision_against_itself_has_no_change(repository: Path) -> None:
    (found,) = compared(repository, "base", "same", only=("work",)).values()
    assert found.verdict == "same"


@pytest.mark.skipif(
    shutil.which("valgrind") is None and not revisions.counter_works(), reason="needs valgrind or a counter"
)
def test_counted_instructions_find_two_percent(repository: Path) -> None:
    found = compared(repository, "base", "little", count="instructions")
    assert found["work"].verdict == "more"
    assert found["work"].ratio == pytest.approx(1.02, abs=0.003)
    assert found["work"].a > 10000 * 10  # Python takes more than ten instructions for a turn of a loop
    assert "added_later" in found["older"].verdict
    assert (
        compared(repository, "base", "same", count="instructions", only=("work",))["work"].verdict == "same"
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_code_that_valgrind_runs_has_no_avx512(tmp_path: Path) -> None:
    """valgrind ends a program at its first instruction of AVX-512, which a processor's own code may have."""
    ours = revisions.compilers(tmp_path / "bin") / "g++"
    done = subprocess.run(
        [ours, "-march=native", "-dM", "-E", "-x", "c++", "-"],
        input="",
        text=True,
        capture_output=True,
        check=True,
    )
    assert "__GNUC__" in done.stdout
    assert "__AVX512" not in done.stdout


def test_a_revision_that_cannot_be_imported_is_a_row(repository: Path) -> None:
    result = CliRunner().invoke(
        bench,
        ["compare-revisions", "base", "broken", "--repository", str(repository), "--cases", str(repository / "cases.py"),
         "--only", "work", "--processes", "2", "--rounds", "2", "--markdown"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "| work |  |  |  |  | broken: SyntaxError" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("base nowhere", "rev-parse: fatal: Needed a single revision"),
        ("base -h", "No such option"),
        ("base same --only juggle", "only must be one of 'work', 'fails', 'older', got 'juggle'"),
        ("base same --count joules", "count must be one of 'instructions', got 'joules'"),
        ("base same --processes 1", "processes must be at least 2, got 1"),
        ("base same --floor -1", "floor must be at least 0, got -1"),
        ("base same --cases nothing.py", "cases must be a Python file, got nothing.py"),
        ("base same --repository /", "not a git repository"),
    ],
)
def test_bad_input(repository: Path, words: str, says: str) -> None:
    line = ["compare-revisions", "--repository", str(repository), "--cases", str(repository / "cases.py")]
    result = CliRunner().invoke(bench, [*line, *words.split()])
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())


def test_no_way_to_count_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "counter_works", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "valgrind" else f"/usr/bin/{name}")
    with pytest.raises(ValueError, match="or valgrind, and neither is here"):
        compared(repository, "base", "same", count="instructions")


def test_the_interval_covers_a_change_and_has_what_differs_between_processes() -> None:
    steady = row("x", [[1.0] * 5] * 4, [[1.1] * 5] * 4, 0.03)
    assert (steady.ratio, steady.low, steady.high) == pytest.approx((1.1, 1.1, 1.1))
    assert steady.verdict == "more"
    # each pair of processes is steady in itself, and they disagree: nothing is found
    apart = row("x", [[1.0] * 5] * 4, [[k] * 5 for k in (1.3, 0.9, 1.2, 1.0)], 0.03)
    assert apart.low < 1 < apart.high
    assert apart.verdict == "same"
    assert Row("x", message="no").verdict == "no"
    assert math.isnan(Row("x", message="no").ratio)


def test_the_processor_s_counter_counts() -> None:
    """By the kernel's clock of a task (software event 1), which is there where no hardware counter is."""
    scope: dict[str, object] = {"__name__": "worker"}
    exec(revisions.SCRIPT, scope)
    try:
        descriptor = scope["counter"](1, 1)  # type: ignore[operator]
    except OSError as error:
        pytest.skip(str(error))
    before = scope["value"](descriptor)  # type: ignore[operator]
    sum(range(1_000_000))
    assert 1e5 < scope["value"](descriptor) - before < 1e10  # type: ignore[operator]
