"""What is shown of one benchmark's records: its tables and its picture. Each wing declares the views of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.table import Table

from .record import Record, latest
from .terminal import print_tables

Tables = Callable[[Sequence[Record]], Sequence[Table]]
Draw = Callable[[Sequence[Record], Path], Sequence[Path]]


@dataclass(frozen=True)
class View:
    """How one benchmark is shown.

    title, about   the heading, and one sentence on what is measured
    command        what makes the records; shown where they don't say it themselves
    tables, draw   functions of records that make tables, and write pictures (None if there is no picture)
    points         how many different (N, B, T) must have been measured for the picture to say something
    """

    title: str
    about: str
    command: str
    tables: Tables
    draw: Draw | None
    points: int = 1

    def says_something(self, records: Sequence[Record]) -> bool:
        """Whether there is a picture, and enough points were measured for it."""
        measured = {tuple(r.params.get(name) for name in "NBT") for r in records if r.status == "ok"}
        return self.draw is not None and len(measured) >= self.points


def one_table(table: Callable[[Sequence[Record]], Table]) -> Tables:
    """A function that makes one table, as `View.tables` takes it."""
    return lambda records: [table(records)]


def show_records(view: View, records: Sequence[Record], file: Path, markdown: bool = False) -> None:
    """Print the view's tables of the records, draw its picture, and print where the files are."""
    print_tables(view.tables(records), markdown)
    tell_files(view, records, file, markdown)


def tell_files(view: View, records: Sequence[Record], file: Path, markdown: bool = False) -> None:
    """Draw the view's picture of the records beside their file, and print where the file and the pictures are.

    The lines go to stderr where stdout has Markdown.
    """
    shown = latest(records)
    drawn = view.draw(shown, file) if view.draw is not None and view.says_something(shown) else []
    for kind, path in (("records", file), *(("plot", path) for path in drawn)):
        typer.echo(f"{kind + ':':8} {path}", err=markdown)
