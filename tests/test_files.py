"""Reading and writing files: whole or not at all, in UTF-8 whatever the locale, and damage is noticed."""

from __future__ import annotations

import ast
import errno
import io
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkout import ROOT

from rjepa_triton import _files


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file can be written beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_fails_changes_nothing_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    _files.write_text(file, "before\n")
    with full_disk(100), pytest.raises(OSError, match=r"a\.txt can't be written: File too large"):
        _files.write_text(file, "x" * 200)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match=r"a\.txt can't be written: No space left on device") as raised:
                _files.write_text(file, "after")
            assert raised.value.errno == errno.ENOSPC
    writing = _files.replacing(file)
    writing.__enter__().write_bytes(b"half")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert file.read_bytes() == b"before\n"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("there", "there can't be written: it is a folder"),
        ("none/a.txt", r"a\.txt can't be written: No such file or directory"),
        ("file/a.txt", r"a\.txt can't be written: Not a directory"),
    ],
)
def test_where_nothing_can_be_written(tmp_path: Path, where: str, said: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=said):
        _files.write_text(tmp_path / where, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


@pytest.mark.skipif(os.name != "posix", reason="modes, links and devices of POSIX")
def test_mode_links_devices_and_what_a_killed_process_left(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with _files.replacing(tmp_path / "a.txt") as temporary:  # as a library that makes a file of its own
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to("a.txt")
    _files.write_text(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert _files.read_text(tmp_path / "a.txt") == "through"
    _files.write_text("/dev/null", "x")
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    gone, here = (tmp_path / f".a.txt.{pid}.0123abcd.part" for pid in (child, os.getpid()))
    gone.touch()
    here.touch()
    _files.write_text(tmp_path / "a.txt", "again")
    assert not gone.exists()
    assert here.exists()


def test_text_is_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    _files.write_text(file, "Γ\n")
    assert file.read_bytes() == b"\xce\x93\n"
    assert _files.read_text(file) == "Γ\n"
    file.write_bytes("\ufeffΓ".encode())
    assert _files.read_text(file) == "Γ"
    for encoding, byte in (("gbk", "0xa6"), ("cp1252", "0xe9"), ("utf-16", "0xff")):
        file.write_bytes(("é" if encoding == "cp1252" else "Γ").encode(encoding))
        with pytest.raises(ValueError, match=rf"a\.txt: not text in UTF-8: byte 0 is {byte}"):
            _files.read_text(file)


def test_every_changed_bit_of_a_sealed_archive_is_noticed() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a", b"content")
    _files.check_seal(made.getvalue(), "unsealed.zip")
    whole = _files.sealed(made.getvalue())
    _files.check_seal(whole, "a.zip")
    assert zipfile.ZipFile(io.BytesIO(whole)).read("a") == b"content"
    for at in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^a\.zip is damaged"):
            _files.check_seal(bytes(changed), "a.zip")
    for length in range(len(made.getvalue()), len(whole)):
        with pytest.raises(ValueError, match=r"^a\.zip is damaged"):
            _files.check_seal(whole[:length], "a.zip")


def test_a_digest_of_the_ends_sees_them_and_the_size(tmp_path: Path) -> None:
    file, found = tmp_path / "a", set()
    for body in (b"0123456789", b"1123456789", b"0123456788", b"01234456789"):
        file.write_bytes(body)
        found.add(_files.digest(file, 3))
    assert len(found) == 4
    file.write_bytes(b"0123x56789")
    assert _files.digest(file, 3) in found
    assert _files.digest(file, 5) not in found


@pytest.mark.parametrize("top", ["rjepa_triton", "bench", "kernels"])
def test_every_text_has_its_encoding_said(top: str) -> None:
    """The locale's own is another on another machine: ASCII, GBK, cp1252."""
    lacking = []
    for path in sorted((ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if (
                owner in ("_files", "os", "Image", "av", "tarfile")
                or getattr(node.func, "id", "") == "read_text"
            ):
                continue  # which take no encoding, or say it themselves
            named = {keyword.arg for keyword in node.keywords}
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = any("b" in mode and len(mode) <= 3 for mode in modes)
            text = called in ("open", "fdopen", "read_text", "write_text") and not binary
            text |= any(k.arg == "text" and getattr(k.value, "value", None) is True for k in node.keywords)
            if text and "encoding" not in named:
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert not lacking


READS = """
import locale, sys
from pathlib import Path
assert not locale.getpreferredencoding(False).lower().startswith("utf"), "the test's own locale"
from rjepa_triton import _files
from rjepa_triton.planning import devices
from rjepa_triton.rjepa import config, fixations, figures
from rjepa_triton.bench.harness import record
folder = Path(sys.argv[1])
assert devices.known()
got = fixations.read(folder / "fix.csv")
assert got.participant.tolist() == ["José Γ"], ascii(got.participant)
assert config.read(folder / "run.yaml").data.table == "Γ.csv"
made = record.Record("scaling", "Γ", {}, "ok", "µ", {}, None, "", "")
record.append(folder / "records.jsonl", made)
assert record.load(folder / "records.jsonl") == [made]
_files.write_text(folder / "a.txt", config.text(config.read(folder / "run.yaml")))
assert "Γ.csv" in (folder / "a.txt").read_text(encoding="utf-8")
"""


@pytest.mark.skipif(os.name != "posix", reason="locales of POSIX")
def test_files_are_read_and_written_alike_in_an_ascii_locale(tmp_path: Path) -> None:
    side = "time_unit: ms\npx_per_degree: 10\nframe_size: [400, 300]\nmovie_start: {José Γ: 5}\n"
    (tmp_path / "fix.csv.yaml").write_text(side, encoding="utf-8")
    rows = "participant,movie,onset,duration,x,y\nJosé Γ,m,5,200,9,9\n"
    (tmp_path / "fix.csv").write_text(rows, encoding="utf-8")
    (tmp_path / "run.yaml").write_text("data: {table: Γ.csv}\n", encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    code = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:rjepa_triton"]
    (tmp_path / "reads.py").write_text(READS, encoding="utf-8")
    done = subprocess.run(
        [*code, str(tmp_path / "reads.py"), str(tmp_path)], env=env, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
