"""How this package reads and writes files: text is UTF-8, and a file is written as a whole or stays as it was."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Words that a file's seal begins with; behind them stands the SHA-256 of the file without its seal.
SEAL = b"rjepa-triton sha256 "
_ZIP_END = b"PK\x05\x06"  # begins a zip archive's last record, of 22 bytes and the archive's comment


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises ValueError, naming the file and the byte, if it isn't UTF-8; OSError.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, with "\\n" at the ends of lines, as `replacing` does."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary, temporary.open("wb") as opened:
        opened.write(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """An empty temporary file beside `path`, which takes its place if the block ends without an error.

    The file is synced to disk before it is renamed, and the folder after it. Its mode is what the umask leaves of 0666.
    If anything fails, `path` is what it was, and the temporary file is removed; one that a killed process left is
    removed when `path` is written again. A path that isn't a regular file, such as /dev/stdout, is written itself.

    Raises OSError, which names `path`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} can't be written: it is a folder")
        _remove_leftovers(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        temporary.chmod(mode)  # some libraries put a file of their own there, with mode 0600
        sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems can't sync a folder
            sync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`."""
    name = re.compile(re.escape(f".{path.name[:100]}.") + r"(\d+)\.[0-9a-f]{8}\.part")
    for entry in path.parent.glob(".*.part"):
        found = name.fullmatch(entry.name)
        if found and not _runs(int(found[1])):
            with suppress(OSError):
                entry.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this number may be running. Where that can't be asked, it may."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: str | Path, most: int | None = None) -> str:
    """The SHA-256 of a file. most: of a longer file, that of its size and of `most` bytes at either end."""
    found = hashlib.sha256()
    with Path(path).open("rb") as body:
        size = os.fstat(body.fileno()).st_size
        if most is not None and size > 2 * most:
            found.update(f"{size} ".encode() + body.read(most))
            body.seek(size - most)
        while part := body.read(2**20):
            found.update(part)
    return found.hexdigest()


def sealed(archive: bytes) -> bytes:
    """A zip archive with its SHA-256 as the archive's comment, which readers of zip archives pass over."""
    end = len(archive) - 22
    assert archive[end:].startswith(_ZIP_END), "a zip archive without a comment"
    seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def check_seal(data: bytes, source: str | Path) -> None:
    """Raise ValueError, naming `source`, if `data` have a seal of `sealed` and were changed since.

    A zip archive is taken without a seal only if it ends without a comment, as one that was never sealed does: a seal
    may be damaged with the rest.
    """
    length = len(SEAL) + 64
    seal = data[-length - 2 :]
    if seal[2:].startswith(SEAL):
        found = hashlib.sha256(data[: -length - 2])
        found.update(bytes(2))
        if seal != length.to_bytes(2, "little") + SEAL + found.hexdigest().encode():
            raise ValueError(
                f"{source} is damaged: its content doesn't have the SHA-256 that was stored with it"
            )
    elif data.startswith(b"PK") and not (data[-22:].startswith(_ZIP_END) and data.endswith(bytes(2))):
        raise ValueError(f"{source} is damaged: it ends neither as a zip archive does nor with its SHA-256")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
