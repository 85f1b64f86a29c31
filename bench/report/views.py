"""What is shown of every benchmark's records: the views of all wings, for `rjepa bench table`, `plot` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..harness.record import Record, latest, named_errors, source
from ..harness.view import Draw, Tables, View
from ..kernels import views as kernels
from ..learning import views as learning
from ..peers import views as peers
from ..scaling import views as scaling
from ..streams import views as streams

__all__ = ["ORDER", "VIEWS", "Draw", "Tables", "View", "draw", "of", "tables"]

# The benchmarks as a report tells of them.
ORDER = (
    "scaling",
    "peers",
    "kernels",
    "online",
    "memory",
    "fidelity",
    "learn",
    "pays",
    "forward",
    "forward-predicted",
    "selfcheck",
)
_ALL = {**scaling.VIEWS, **kernels.VIEWS, **learning.VIEWS, **streams.VIEWS, **peers.VIEWS}
VIEWS: dict[str, View] = {name: _ALL[name] for name in ORDER}


def of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The last record of each key, by benchmark, in the order of `VIEWS`; benchmarks without a view are left out."""
    known = latest(records)
    found = {name: [r for r in known if r.benchmark == name] for name in VIEWS}
    return {name: mine for name, mine in found.items() if mine}


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of all benchmarks in `records`. Raises ValueError if no benchmark with a view is among them."""
    found: list[Table] = []
    for name, mine in of(records).items():
        with named_errors(mine):
            found += VIEWS[name].tables(mine)
    if not found:
        raise ValueError(f"{source(records) or 'no file'}: there are no records of {', '.join(VIEWS)}")
    return found


def draw(records: Sequence[Record], path: Path) -> list[Path]:
    """Draw the pictures of all benchmarks in `records`, and return their files.

    They go to `path`; where there are several benchmarks, each adds its name to it.
    Raises ValueError if there is nothing to draw.
    """
    found = {name: mine for name, mine in of(records).items() if VIEWS[name].draw is not None}
    if not found:
        drawn = ", ".join(name for name, view in VIEWS.items() if view.draw is not None)
        raise ValueError(f"there are no records of {drawn} to draw")
    written: list[Path] = []
    for name, mine in found.items():
        picture = VIEWS[name].draw
        assert picture is not None
        with named_errors(mine):
            written += picture(mine, path if len(found) == 1 else path.with_name(f"{path.stem}-{name}"))
    return written
