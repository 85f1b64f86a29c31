"""The file of records: whole lines, faults named, identity."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from checkout import RESULTS
from rich.table import Table

from rjepa_triton.bench.harness import record, tables, terminal
from rjepa_triton.bench.harness.record import Record, Timing
from rjepa_triton.bench.report import views


def made(n: int = 8, median: float = 1e-3, **changes: object) -> Record:
    plain = Record(
        benchmark="scaling",
        algorithm="rfp-dual",
        params={"N": n, "B": 1, "T": 4, "dtype": "float32", "device": "cpu", "threads": 1},
        status="ok",
        device="a processor",
        versions=record.versions(),
        git=None,
        run=record.now(),
        time=record.now(),
        timing=Timing(median, 0.99 * median, 1.01 * median, 9),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    records = [made(8), made(16, timing=None, status="oom", message="predicted"), made(8, payload={"x": 1})]
    for r in records:
        record.append(file, r)
    assert record.load(file) == records
    assert record.latest(records) == [records[2], records[1]]


@pytest.mark.parametrize("tail", ['{"schema": 1, "bench', '{"schema": 1, "bench\n'])
def test_a_broken_last_line_is_dropped_and_then_cut_off(tmp_path: Path, tail: str) -> None:
    file = tmp_path / "a.jsonl"
    record.append(file, made(8))
    with file.open("a") as handle:
        handle.write(tail)
    with pytest.warns(UserWarning, match="line 2: left out, an interrupted write broke it"):
        assert [r.params["N"] for r in record.load(file)] == [8]
    with pytest.warns(UserWarning, match=f"cut off the last {len(tail)} bytes"):
        record.append(file, made(16))
    assert [r.params["N"] for r in record.load(file)] == [8, 16]


def _rewrite(file: Path, number: int, line: str) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")


def test_a_broken_middle_line_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for n in (8, 16, 32):
        record.append(file, made(n))
    _rewrite(file, 2, "{broken")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a line of JSON"):
        record.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 4}, "schema must be 1, 2 or 3, got 4; a newer rjepa-triton wrote it"),
        ({"schema": "x"}, "schema must be 1, 2 or 3, got 'x'$"),
        ({"status": "fine"}, "status must be one of ok, oom, error, over_budget, missing, got 'fine'"),
        ({"timing": {"median": 1}}, "timing must have median, p20, p80, repeats"),
        ({"extra": 1}, "unknown fields: extra"),
        ({"git": None, "device": ...}, "missing fields: device"),
        ({"params": 3}, "params must be an object, got int"),
        ({"payload": [1]}, "payload must be an object, got list"),
        ({"params": {"N": "64"}}, "N in params must be a whole number, got '64'"),
        ({"params": {"threads": 2.5}}, "threads in params must be a whole number, got 2.5"),
        ({"algorithm": 7}, "algorithm can't be 7"),
        ({"peak_bytes": "much"}, "peak_bytes can't be 'much'"),
        ({"predicted_seconds": math.nan}, "predicted_seconds can't be nan"),
        (
            {"timing": {"median": "1", "p20": 1, "p80": 1, "repeats": 1}},
            "timing must have median, .* above 0",
        ),
        ({"timing": {"median": 0, "p20": 1, "p80": 1, "repeats": 1}}, "timing must have median, .* above 0"),
    ],
)
def test_a_record_that_is_not_ours_is_an_error(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = tmp_path / "a.jsonl"
    record.append(file, made())
    data = {**json.loads(file.read_text()), **change}
    _rewrite(file, 1, json.dumps({k: v for k, v in data.items() if v is not ...}))
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        record.load(file)


def test_a_record_of_schema_1_is_read_without_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    record.append(file, made())
    data = {**json.loads(file.read_text()), "schema": 1}
    for name in ("low", "high", "yardsticks"):
        del data["timing"][name]
    del data["command"]
    _rewrite(file, 1, json.dumps(data))
    (old,) = record.load(file)
    assert old.schema == 1
    assert old.timing == Timing(1e-3, 0.99e-3, 1.01e-3, 9)
    assert old.timing.per(2).low is None


@pytest.mark.parametrize("room", [0, 700])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, room: int) -> None:
    """No file may grow beyond a limit, as on a disk with room for a part of a record, or for none."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.jsonl"
    record.append(path, made())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
    try:
        with pytest.raises(OSError, match=r"could not add a record to .*a\.jsonl: .*File too large"):
            record.append(path, made(16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    record.append(path, made(16))
    assert len(record.load(path)) == 2


def test_a_record_that_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
    record.append(tmp_path / "a.jsonl", made())
    assert len(record.load(tmp_path / "a.jsonl")) == 1


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/rjepa", "bench", "scaling", "--out", "a folder"])
    assert record.started("scaling", "a machine")["command"] == "rjepa bench scaling --out 'a folder'"
    monkeypatch.setattr("sys.argv", ["/a/rjepa_triton/__main__.py", "theory"])
    assert record.command() == "rjepa theory"
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest", "-q"])
    assert record.command() == ""


def test_key_is_what_was_measured_not_when() -> None:
    a = made()
    assert record.key(a) == record.key(made(git="abc", time="later", status="oom", timing=None))
    assert record.key(a) != record.key(made(16))
    assert record.key(a) != record.key(made(algorithm="bptt"))
    assert record.key(a) != record.key(made(device="another"))
    other = made(versions={**a.versions, "torch": "0"})
    assert record.key(a) != record.key(other)
    assert record.key(a, versions=False) == record.key(other, versions=False)


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for n in (8, 16):
        record.append(file, made(n))
    lines = file.read_bytes().splitlines(keepends=True)
    for bad in (lines[0].replace(b"rfp", b"r\xffp"), b"[" * 100_000 + b"\n", b"\0\0\n"):
        file.write_bytes(bad + lines[1])
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not a line of JSON"):
            record.load(file)
        file.write_bytes(lines[1] + bad)
        with pytest.warns(UserWarning, match="line 2: left out"):
            assert len(record.load(file)) == 1


@pytest.mark.parametrize("results", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_records_without_what_a_table_or_picture_needs_are_named(results: Path, tmp_path: Path) -> None:
    """Each parameter and each entry of the payload is removed, then replaced by a value of another type."""
    if results not in record.files_of(results.parent):
        pytest.skip("no records of a benchmark")
    whole = [json.loads(line) for line in results.read_text().splitlines()]
    names = {(part, name) for data in whole for part in ("params", "payload") for name in data[part]}
    file = tmp_path / "a.jsonl"
    for part, name in sorted(names):
        for value in (..., {}):
            changed = []
            for data in whole[:200]:
                content = {k: v for k, v in data[part].items() if k != name or value is not ...}
                changed.append({**data, part: {k: value if k == name else v for k, v in content.items()}})
            file.write_text("".join(json.dumps(data) + "\n" for data in changed))
            said = f"{file}: "
            try:
                views.tables(record.load(file))
            except ValueError as error:
                said = str(error)
            assert said.startswith(f"{file}"), said


def test_brackets_in_a_message_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unescaped, rich would take brackets for markup, or raise MarkupError."""
    message = "[bold]no[/] such [/path] | :smile:\nsecond line"
    table = Table("message", title="[/title]")
    table.add_row(message)
    terminal.show([table])
    terminal.plain_console(stderr=True).print(f"failed: {message}")
    said = capsys.readouterr()
    for written in (said.out, said.err):
        assert "[bold]no[/] such [/path] | :smile:" in written
    assert tables.markdown(table).splitlines()[-1] == r"| [bold]no[/] such [/path] \| :smile: second line |"
