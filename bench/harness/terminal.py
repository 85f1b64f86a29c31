"""Print tables on stdout, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

from . import tables as texts


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints text as it is: a path or message may have brackets, which rich takes for markup."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False)


def show(tables: Sequence[Table]) -> None:
    """Print tables on stdout; 160 columns wide if that isn't a terminal."""
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=160)
    for table in tables:
        console.print(table)


def print_tables(tables: Sequence[Table], markdown: bool) -> None:
    """Print tables on stdout, with what stands below them, as Markdown or for a terminal."""
    if markdown:
        for table in tables:
            below = f"\n{table.caption}\n" if table.caption else ""
            typer.echo(f"{texts.markdown(table)}\n{below}")
    else:
        show(tables)
