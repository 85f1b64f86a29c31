"""Tables of a scaling sweep: time and bytes, ratios within a run, and fitted powers of N."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from ..harness.record import Record, Timing
from ..harness.statistics import NORMAL_95, Slope, first_n, slope
from ..harness.tables import bytes_text, seconds_text
from .cases import CASES

# The ratios that the sweep is meant to show: numerator and denominator.
RATIOS = (
    ("bptt-autograd", "rfp-dual"),
    ("rtrl", "rfp-step"),
    ("rtrl", "rfp-step-gamma"),
    ("rfp-step", "rfp-chunk"),
    ("rfp-step-gamma", "copy"),
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


def slopes(records: Sequence[Record], algorithm: str, batch: int) -> dict[str, Slope | None]:
    """The fitted powers of N of a case's "time" per step, computed "state" bytes and measured "peak" bytes.

    None if fewer than 3 points are large enough (`statistics.first_n`). State bytes have no part that doesn't grow, so
    all their points are fitted. The interval of the power of time includes the intervals of the medians.
    """
    mine = [r for r in records if r.algorithm == algorithm and r.params["B"] == batch]
    deviations = {r.params["N"]: _deviation(r.timing) for r in mine if r.timing}
    curves: dict[str, dict[int, float]] = {
        "time": {r.params["N"]: r.timing.median for r in mine if r.timing},
        "state": {r.params["N"]: r.state_bytes for r in mine if r.state_bytes},
        "peak": {r.params["N"]: r.peak_bytes for r in mine if r.peak_bytes},
    }
    fitted: dict[str, Slope | None] = {}
    for what, curve in curves.items():
        n, y = list(curve), list(curve.values())
        first = 1 if what == "state" or not y else first_n(n, y)
        known = [deviations[size] for size in n] if what == "time" else None
        fitted[what] = slope(n, y, first, known)
    return fitted


def _deviation(timing: Timing) -> float:
    """The standard deviation of the median's logarithm, from its 95 % interval; 0 if there is no interval."""
    if timing.low is None or timing.high is None:
        return 0.0
    return math.log(timing.high / timing.low) / (2 * NORMAL_95)


def tables(records: Sequence[Record]) -> list[Table]:
    """For each B tables of time per step and peak bytes by N and algorithm, and of ratios; last, fitted powers of N."""
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
    fitted = _slope_table(records, algorithms, batches)
    return [*out, fitted] if fitted.row_count else out


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


def _slope_table(records: Sequence[Record], algorithms: Sequence[str], batches: Sequence[int]) -> Table:
    table = Table(title="power of N ± 95 % interval")
    columns = ("algorithm", "B", "time per step", "time from N", "state bytes", "peak bytes", "peak from N")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for batch in batches:
        for name in algorithms:
            found = slopes(records, name, batch)
            shown = {what: "" if s is None else str(s) for what, s in found.items()}
            first = {what: "" if s is None else f"{s.first:g}" for what, s in found.items()}
            if any(shown.values()):
                time, state, peak = (shown[what] for what in ("time", "state", "peak"))
                table.add_row(name, str(batch), time, first["time"], state, peak, first["peak"])
    return table
