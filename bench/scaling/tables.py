"""Tables of a scaling sweep: time and bytes, ratios within a run, and fitted powers of N."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ..harness.record import Record
from ..harness.tables import bytes_text, seconds_text
from . import powers
from .cases import CASES

# The ratios that the sweep is meant to show: numerator and denominator.
RATIOS = (
    ("bptt-autograd", "rfp-dual"),
    ("rtrl", "rfp-step"),
    ("rtrl", "rfp-step-gamma"),
    ("rfp-step", "rfp-chunk"),
    ("rfp-step-gamma", "pass"),
    ("rfp-stream", "pass"),
)
# A median is marked if p20 to p80 of its samples is more than this part of it: something else used the machine.
NOISY = 0.3


def ratios(records: Sequence[Record]) -> list[tuple[str, int, int, float, bool]]:
    """Ratios of medians, for each of `RATIOS` at each point that has both algorithms.

    As (name of the ratio, N, B, value, whether both were timed in the same run).
    """
    timed = {(r.algorithm, r.params["N"], r.params["B"]): (r.timing, r.run) for r in records if r.timing}
    found = []
    for above, below in RATIOS:
        for (name, n, b), (over, run) in timed.items():
            if name == above and (below, n, b) in timed:
                under, other_run = timed[below, n, b]
                found.append((f"{above} / {below}", n, b, over.median / under.median, run == other_run))
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    """For each B tables of time per step and peak bytes by N and algorithm, and of ratios; last, powers of N,
    and where curves cross.
    """
    out = []
    algorithms = [name for name in CASES if any(r.algorithm == name for r in records)]
    batches = sorted({r.params["B"] for r in records})
    for batch in batches:
        at = {(r.params["N"], r.algorithm): r for r in records if r.params["B"] == batch}
        cells = {
            f"time per step (~: p20 to p80 is over {NOISY:.0%} of it)": {
                where: _time_cell(r) for where, r in at.items()
            },
            "peak bytes (predicted)": {where: _bytes_cell(r) for where, r in at.items()},
        }
        for title, by_place in cells.items():
            out.append(_by_size(f"{title}, B = {batch}", algorithms, by_place))
        found = [f for f in ratios(records) if f[2] == batch]
        if found:
            mixed = "" if all(together for *_, together in found) else " (*: from two runs)"
            out.append(
                _by_size(
                    f"ratios of medians, B = {batch}{mixed}",
                    list(dict.fromkeys(name for name, *_ in found)),
                    {(n, name): f"{value:.2f}" + "*" * (not one) for name, n, _, value, one in found},
                )
            )
    last = (
        _growth_table(records, algorithms, batches),
        _level_table(records, batches),
        _crossing_table(records, batches),
    )
    return [*out, *(table for table in last if table.row_count)]


def _by_size(title: str, columns: Sequence[str], cells: dict[tuple[int, str], str]) -> Table:
    """A table with one row for each N, from texts by (N, column)."""
    table = Table(title=title)
    for heading in ("N", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    for n in sorted({n for n, _ in cells}):
        table.add_row(str(n), *(cells.get((n, column), "") for column in columns))
    return table


def _time_cell(made: Record) -> str:
    if made.timing is None:
        return made.status
    noisy = made.timing.p80 - made.timing.p20 > NOISY * made.timing.median
    return "~" * noisy + seconds_text(made.timing.median)


def _bytes_cell(made: Record) -> str:
    if made.peak_bytes is not None:
        return bytes_text(made.peak_bytes)
    return f"({bytes_text(made.predicted_peak_bytes)})" if made.predicted_peak_bytes else made.status


def _growth_table(records: Sequence[Record], algorithms: Sequence[str], batches: Sequence[int]) -> Table:
    """Powers of N: of work, as counted; of bytes of state and at the peak; of time."""
    table = Table(title="power of N ± 95 % interval (time: a + b·Nᵖ)")
    columns = (
        "algorithm",
        "B",
        "FLOP counted",
        "bytes moved, counted",
        "state",
        "peak",
        "time",
        "time grows as",
    )
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "algorithm" else "right", no_wrap=True)
    for batch in batches:
        for name in algorithms:
            found = powers.slopes(records, name, batch)
            counted = ["" if s is None else f"{s.value:.2f}" for s in (found["flop"], found["bytes"])]
            fitted = [str(found[what] or "") for what in ("state", "peak", "time")]
            cells = [*counted, *fitted, str(powers.shape(records, name, batch) or "")]
            if any(cells):
                table.add_row(name, str(batch), *cells)
    return table


def _level_table(records: Sequence[Record], batches: Sequence[int]) -> Table:
    """Time over that of a pass over Γ's bytes, and the power of N in it, for each level of memory."""
    table = Table(title="time over that of a pass over Γ's bytes, offsets taken off")
    for heading in ("algorithm", "B", "Γ in", "N", "time / pass", "power of N"):
        table.add_column(heading, justify="left" if heading in ("algorithm", "Γ in", "N") else "right")
    for batch in batches:
        for name in powers.CARRYING:
            for level in powers.levels(records, name, batch):
                units = f"{level.units[0]} to {level.units[-1]}"
                table.add_row(name, str(batch), level.name, units, f"{level.ratio:.2f}", str(level.power))
    return table


def _crossing_table(records: Sequence[Record], batches: Sequence[int]) -> Table:
    table = Table(title="where times cross")
    for heading in ("of", "and of", "B", "at N", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("of", "and of") else "right")
    for batch in batches:
        for a, b, n, low, high, _ in powers.crossings(records, batch):
            table.add_row(a, b, str(batch), f"{n:.0f}", f"{low:.0f} to {high:.0f}")
    return table
