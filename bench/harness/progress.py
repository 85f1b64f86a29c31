"""Shows a sweep's progress as a bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .record import STATUSES, Record
from .tables import place


def shown(
    name: str,
    total: int,
    sweep: Callable[[Callable[[Record], None]], int],
    console: Console,
    tell: Sequence[str] = STATUSES[1:],
) -> None:
    """Run `sweep` with a bar on `console` that counts to `total` records.

    sweep is given what to call with each new record, and returns how many it kept from an earlier run. A record whose
    status is one of `tell` has a line of its own.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=total)

        def on_record(made: Record) -> None:
            progress.update(bar, description=f"{name} {place(made)}", advance=1)
            if made.status in tell:
                progress.console.print(
                    f"{place(made)}: {made.status}: {made.message}", highlight=False, soft_wrap=True
                )

        kept = sweep(on_record)
        progress.update(bar, description=name, advance=kept)
    if kept:
        console.print(f"kept {kept} records measured earlier; --fresh measures them again", highlight=False)
