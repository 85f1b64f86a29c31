"""The sweep: resumes, refuses what can't fit, records failures; and the command around it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import measure, record
from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.bench.harness.tables import bytes_text, seconds_text
from rjepa_triton.bench.scaling import cases, powers
from rjepa_triton.bench.scaling import tables as scaling_tables
from rjepa_triton.bench.scaling import timing as scaling
from rjepa_triton.bench.scaling.cases import CASES
from rjepa_triton.bench.scaling.timing import Settings

TINY = Settings(
    points=((8, 1), (16, 1)),
    algorithms=("rfp-dual", "rtrl"),
    steps=4,
    input="noise",
    backend="torch",
    case_seconds=0.01,
    passes=1,
)


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(bench, [str(a) for a in arguments])
    return result.exit_code, result.output


def with_(**changes: object) -> Settings:
    return Settings(**{**TINY.__dict__, **changes})


def sweep(settings: Settings, file: Path, on_record: Callable[[Record], None] = lambda made: None) -> int:
    """A sweep in this process, so that it sees the cases that a test has replaced."""
    return scaling.sweep(settings, file, on_record=on_record, start=lambda: ThreadPoolExecutor(1))


def test_tiny_sweep_by_the_command(tmp_path: Path) -> None:
    code, shown = command(
        "scaling", "--hidden", "8,16", "--steps", 4, "--algorithms", "rfp-dual,rtrl", "--sample", 0.01,
        "--backend", "torch", "--passes", 2, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, shown
    assert "time per step" in shown
    records = record.load(tmp_path / "scaling.jsonl")
    first, second = records[:4], records[4:]
    for part in (first, second):
        assert [(r.algorithm, r.params["N"]) for r in part] == [
            ("rfp-dual", 8), ("rtrl", 8), ("rfp-dual", 16), ("rtrl", 16),
        ]  # fmt: skip
    for once, r in zip(first, second, strict=True):
        assert once.timing is not None
        assert r.timing is not None
        assert (len(once.timing.samples), len(r.timing.samples)) == (1, 2)
        assert r.timing.samples[0] == once.timing.samples[0]
        assert {len(by_pass) for by_pass in r.timing.yardsticks.values()} == {2}
        assert r.timing.repeats == sum(map(len, r.timing.samples))
        assert (r.peak_bytes, r.backend) == (once.peak_bytes, once.backend)
    for r in records:
        assert r.status == "ok", r.message
        assert r.timing is not None
        assert 0 < r.timing.p20 <= r.timing.median <= r.timing.p80
        assert r.peak_bytes is not None
        assert r.state_bytes is not None
        assert r.peak_bytes >= r.state_bytes > 0
        assert r.params["threads"] == torch.get_num_threads()
        assert r.versions["torch"] == torch.__version__


def test_resume_runs_only_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    ran: list[Record] = []
    sweep(with_(algorithms=("rfp-dual",)), file)
    sweep(TINY, file, on_record=ran.append)
    assert [(r.algorithm, r.params["N"]) for r in ran] == [("rtrl", 8), ("rtrl", 16)]
    ran.clear()
    assert sweep(TINY, file, on_record=ran.append) == 4
    assert ran == []
    sweep(with_(seed=1, points=((8, 1),)), file, on_record=ran.append)
    assert len(ran) == 2


def test_passes_go_on_where_they_stopped(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    ran: list[Record] = []
    sweep(with_(algorithms=("rfp-dual",)), file)
    assert sweep(with_(passes=2), file, on_record=ran.append) == 0
    assert [(r.algorithm, r.params["N"], scaling._passes(r)) for r in ran] == [
        ("rtrl", 8, 1), ("rtrl", 16, 1), ("rfp-dual", 8, 2), ("rtrl", 8, 2), ("rfp-dual", 16, 2), ("rtrl", 16, 2),
    ]  # fmt: skip
    assert sweep(with_(passes=2), file) == 4
    assert sweep(TINY, file) == 4


def test_passes_of_another_revision_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    ran: list[Record] = []
    sweep(with_(points=((8, 1),)), file)
    monkeypatch.setattr(record, "git_revision", lambda: "another")
    assert sweep(with_(points=((8, 1),), passes=2), file, on_record=ran.append) == 0
    assert [(r.algorithm, scaling._passes(r), r.git) for r in ran] == [
        (name, number, "another") for number in (1, 2) for name in ("rfp-dual", "rtrl")
    ]


def test_a_case_that_fails_in_a_later_pass_is_recorded_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    settings = with_(points=((8, 1),), passes=3)
    run = cases.RfpDual.run

    def fails_later(self: cases.RfpDual) -> Sequence[Tensor]:
        if file.exists():
            raise RuntimeError("not again")
        return run(self)

    monkeypatch.setattr(cases.RfpDual, "run", fails_later)
    sweep(settings, file)
    said = [(r.algorithm, r.status) for r in record.load(file)]
    assert said == [
        ("rfp-dual", "ok"), ("rtrl", "ok"), ("rfp-dual", "error"), ("rtrl", "ok"), ("rtrl", "ok"),
    ]  # fmt: skip


def test_a_process_that_dies_costs_its_point_only(tmp_path: Path) -> None:
    class Dying(ThreadPoolExecutor):
        def submit(self, function: Callable[..., object], /, *args: object, **kwargs: object) -> Future[Any]:
            if args[1:2] == (8,):
                raise BrokenExecutor("gone")
            return super().submit(function, *args, **kwargs)

    started: list[Dying] = []

    def start() -> Dying:
        started.append(Dying(1))
        return started[-1]

    scaling.sweep(with_(passes=2), tmp_path / "a.jsonl", start=start)
    said = [(r.algorithm, r.params["N"], r.status) for r in record.load(tmp_path / "a.jsonl")]
    assert said[:2] == [("rfp-dual", 8, "error"), ("rtrl", 8, "error")]
    assert said[2:] == [("rfp-dual", 16, "ok"), ("rtrl", 16, "ok")] * 2
    assert len(started) == 3  # another one after the death, and one for the second pass


def test_a_pass_is_a_process_with_as_many_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # this isn't the number that a process has by itself
        with scaling.own_process() as process:
            assert process.submit(os.getpid).result() != os.getpid()
            assert process.submit(torch.get_num_threads).result() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    sweep(with_(budget=1e-12), file)
    assert {r.status for r in record.load(file)} == {"over_budget"}
    sweep(TINY, file)
    assert {r.status for r in record.latest(record.load(file))} == {"ok"}


def test_what_cannot_fit_is_recorded_and_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.Rtrl.__init__

    def never(self: cases.Rtrl, problem: cases.Problem) -> None:
        assert problem.x.is_meta, "it was tried"  # its work is counted, which needs no memory
        right(self, problem)

    monkeypatch.setattr(cases.Rtrl, "__init__", never)
    monkeypatch.setattr(measure, "available_bytes", lambda device: 100_000)
    sweep(with_(points=((16, 1),)), tmp_path / "a.jsonl")
    dual, rtrl = record.load(tmp_path / "a.jsonl")
    assert dual.status == "ok"
    assert rtrl.status == "oom"
    assert rtrl.message == "predicted: needs 274 kB, 100 kB available"
    assert rtrl.timing is None
    assert rtrl.state_bytes == 4 * 8 * 16**3
    assert rtrl.payload["flop"] > 32 * 16**4


def test_a_wrong_gradient_is_an_error_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(cases.RfpDual):
        def run(self) -> Sequence[Tensor]:
            return [1.01 * g for g in super().run()]

    monkeypatch.setitem(CASES, "rfp-dual", Wrong)
    sweep(with_(points=((8, 1),)), tmp_path / "a.jsonl")
    wrong, rtrl = record.load(tmp_path / "a.jsonl")
    assert (wrong.status, wrong.timing) == ("error", None)
    assert "ArithmeticError: gradient of W_ss differs from float64 by 1.0e-02" in wrong.message
    assert rtrl.status == "ok"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no more"), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), "oom"),
        (RuntimeError("shapes can't be multiplied"), "error"),
    ],
)
def test_failures_while_running_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def fails(self: object) -> Sequence[Tensor]:
        raise error

    monkeypatch.setattr(cases.RfpDual, "run", fails)
    sweep(with_(points=((8, 1),)), tmp_path / "a.jsonl")
    failed, rtrl = record.load(tmp_path / "a.jsonl")
    assert failed.status == status
    assert str(error) in failed.message
    assert rtrl.status == "ok"


def test_fresh_deletes_earlier_records(tmp_path: Path) -> None:
    arguments = (
        "scaling",
        "--hidden",
        8,
        "--steps",
        4,
        "--algorithms",
        "rfp-dual",
        "--sample",
        0.01,
        "--passes",
        1,
    )
    assert command(*arguments, "--out", tmp_path)[0] == 0
    assert command(*arguments, "--out", tmp_path, "--fresh", "--seed", 1)[0] == 0
    assert [r.params["seed"] for r in record.load(tmp_path / "scaling.jsonl")] == [1]


def test_a_corrupt_file_is_an_error_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "scaling.jsonl"
    file.write_text("{broken\n{}\n")
    code, shown = command("scaling", "--hidden", 8, "--out", tmp_path)
    assert code == 2
    assert "line 1: not a line of JSON" in shown
    assert file.read_text() == "{broken\n{}\n"


def test_points() -> None:
    assert scaling.points((8,), ()) == ((8, 1),)
    assert scaling.points((8, 16), (1, 4)) == ((8, 1), (16, 1), (8, 4), (16, 4))
    assert scaling.points((), (), default=((3, 1), (4, 1), (3, 8))) == ((3, 1), (4, 1), (3, 8))
    assert scaling.points((), (2,), default=((3, 1), (4, 1), (3, 8))) == ((3, 2), (4, 2))
    assert (1024, 1) in scaling.points((), ())
    assert (512, 8) in scaling.points((), ())


def test_texts() -> None:
    assert [bytes_text(b) for b in (12, 1500, 34.36e9)] == ["12 B", "1.5 kB", "34.4 GB"]
    assert [seconds_text(s) for s in (12e-6, 4.56e-3, 1.2)] == ["12 µs", "4.56 ms", "1.2 s"]


def timed(algorithm: str, n: int, median: float, p80: float, started: str = "now") -> Record:
    return Record(
        benchmark="scaling",
        algorithm=algorithm,
        params={"N": n, "B": 1},
        status="ok",
        device="a processor",
        versions={},
        git=None,
        run=started,
        time="",
        timing=Timing(median, median, p80, 9),
        state_bytes=32 * n**2,
    )


def test_tables_say_ratios_slopes_and_what_to_doubt() -> None:
    records = [timed("rfp-step", n, 1e-9 * n**2, 1e-9 * n**2) for n in (64, 128, 256, 512, 1024)]
    records += [
        timed("rfp-chunk", 128, 0.5e-9 * 128**2, 1),
        timed("rfp-chunk", 256, 1e-9 * 256**2, 1, "then"),
    ]
    assert scaling_tables.ratios(records) == [
        ("rfp-step / rfp-chunk", 128, 1, 2.0, True),
        ("rfp-step / rfp-chunk", 256, 1, 1.0, False),
    ]
    found = powers.slopes(records, "rfp-step", 1)
    assert str(found["time"]) == str(found["state"]) == "2.00 ± 0.00"
    assert found["peak"] is None
    console = Console(width=160, record=True, file=io.StringIO())
    for table in scaling_tables.tables(records):
        console.print(table)
    shown = console.export_text()
    assert "~8.19 µs" in shown
    assert "1.00*" in shown
