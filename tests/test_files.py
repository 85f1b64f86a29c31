"""Reading and writing files: whole or not at all, in UTF-8 whatever the locale, and damage is noticed."""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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
    words = range(len(whole) - 64 - len(_files.SEAL), len(whole) - 64)  # without which there is no seal
    for at in range(8 * len(whole)):
        if at // 8 in words:
            continue
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^a\.zip is damaged"):
            _files.check_seal(bytes(changed), "a.zip")


def test_a_digest_of_the_ends_sees_them_and_the_size(tmp_path: Path) -> None:
    file, found = tmp_path / "a", set()
    for body in (b"0123456789", b"1123456789", b"0123456788", b"01234456789"):
        file.write_bytes(body)
        found.add(_files.digest(file, 3))
    assert len(found) == 4
    file.write_bytes(b"0123x56789")
    assert _files.digest(file, 3) in found
    assert _files.digest(file, 5) not in found
