"""What the parts of the `rjepa` command share: how user errors, missing packages and a closed pipe end it."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import typer

# What a stream that can't write a character gets for it, beside the names of Greek letters.
PLAIN = {
    "…": "...", "·": "*", "×": "x", "−": "-", "–": "-", "—": "-", "→": "->", "←": "<-", "↔": "<->",
    "≤": "<=", "≥": ">=", "≈": "~", "≠": "!=", "±": "+-", "√": "sqrt",
    "∂": "d", "∞": "inf", "µ": "u", "°": " deg", "‖": "||", "⊙": "*", "²": "^2",
    "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "•": "*", "□": "[]",
}  # fmt: skip

# The exit status that a shell reports of a program that SIGPIPE (signal 13) has ended.
PIPE_CLOSED = 128 + 13


@contextmanager
def user_errors() -> Iterator[None]:
    """An error that the user can cause ends with its message on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def needs(extra: str, packages: tuple[str, ...]) -> Iterator[None]:
    """If one of `packages` is missing, say which extra installs it, and end with exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        typer.echo(
            f"error: this needs {package}, which is not installed: pip install 'rjepa-triton[{extra}]'",
            err=True,
        )
        raise typer.Exit(2) from None


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What a codec writes for a character that it doesn't have: plain letters, for Γ "Gamma".

    A byte of a file's name that wasn't text (PEP 383) is written as it was.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    if character in PLAIN:
        return PLAIN[character], error.start + 1
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        line = name.split()[-1]
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(line, "+"), error.start + 1
    kind, _, letter = name.rpartition(" LETTER ")
    if kind in ("GREEK CAPITAL", "GREEK SMALL") and letter:
        name = letter.split()[0].lower().replace("lamda", "lambda")
        return (name.capitalize() if kind == "GREEK CAPITAL" else name), error.start + 1
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()  # é is e
    return letters or "?", error.start + 1


@contextmanager
def quiet_end_of_pipe() -> Iterator[None]:
    """Exit with status `PIPE_CLOSED`, and no message, when the reader of stdout or stderr goes away (`… | head -1`);
    with a message and 2 if what they go to can't be written, as on a full disk.

    Inside the block stdout and stderr write through `_Pipe`; characters that their encoding lacks come out as `plain`
    says. It raises SystemExit in place of BrokenPipeError, so that no handler of an ordinary error on the way
    (`user_errors`, click's, rich's) reports a closed pipe as a fault; a BrokenPipeError of any other pipe stays what it
    is. Both streams are flushed at the end of the block: what is
    written later, when the interpreter shuts down, could no longer end quietly.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_guarded(stream) for stream in before)
    try:
        yield
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before


class _Pipe(io.FileIO):
    """A file descriptor whose reader may go away, or whose disk may be full: writing then ends the program, with exit
    status `PIPE_CLOSED` or with a message and 2, and later writes are dropped."""

    def write(self, data: object) -> int | None:  # type: ignore[override] # any buffer, as the base class's
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            # what the buffers above still hold is flushed at the interpreter's end; it must not fail again there
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise SystemExit(PIPE_CLOSED) from None
            if self.fileno() != sys.__stderr__.fileno():  # type: ignore[union-attr] # or else there is nowhere to say it
                with suppress(OSError):
                    told = f"error: standard output can't be written: {error.strerror}\n"
                    os.write(sys.__stderr__.fileno(), told.encode("ascii", "replace"))  # type: ignore[union-attr]
            raise SystemExit(2) from None


def _guarded(stream: TextIO) -> TextIO:
    """The same stream writing through `_Pipe`; one that isn't the process's own (a test's capture) as it is."""
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    codecs.register_error("rjepa-plain", plain)
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="rjepa-plain",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
