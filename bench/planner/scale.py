"""What a learner would cost on 1 to R ranks that share its rows (`planning.sharding`): `rjepa bench plan --ranks`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from rich.table import Table

from ... import _checks as check
from ...online import counting
from ...planning import cost
from ...planning.devices import Device
from ...planning.sharding import Link, Scaled, scaled
from ..harness.tables import bytes_text, seconds_text
from .plan import Question

MOST_RANKS = 1 << 16
HEADINGS = (
    "ranks",
    "N",
    "form",
    "a step",
    "of it sending",
    "received a step",
    "state a rank",
    "times as fast",
)


def link_of(gigabytes: float, microseconds: float) -> Link:
    """A link of so many GB/s and µs. Raises TypeError or ValueError, naming the option."""
    for name, value in (("--link", gigabytes), ("--latency", microseconds)):
        check.number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return Link(gigabytes * 1e9, microseconds * 1e-6)


def predicted(
    question: Question, device: Device, ranks: int, link: Link, weak: bool
) -> Iterator[tuple[int, Scaled]]:
    """(N, cost) on 1, 2, 4, … up to `ranks` ranks, each such a device, as long as each owns units.

    weak: N grows as √R, to a multiple of R, so that Γ of a rank stays as large; else it is the question's.
    """
    rates = cost.rates(device, question.dtype)
    for count in (1 << i for i in range(ranks.bit_length())):
        units = count * round(question.hidden / math.sqrt(count)) if weak else question.hidden
        if -(-units // -(-units // count)) < count:
            return
        layer = replace(question, hidden=units).layer()
        problem = counting.problem(layer, question.batch, question.kept_in, gpu=device.kind == "gpu")
        dense = any(weight.dim() == 2 for weight in layer.recurrent_weights())
        yield units, scaled(problem, count, question.chunk, rates, link, dense)


def tables(question: Question, device: Device, ranks: int, link: Link) -> list[Table]:
    """Strong and weak scaling up to `ranks` ranks, as tables. Raises TypeError or ValueError for `ranks`."""
    check.integer("--ranks", ranks, 1)
    if ranks > MOST_RANKS:
        raise ValueError(f"--ranks must be at most {MOST_RANKS:,}, got {ranks:,}")
    return [_table(question, device, ranks, link, weak) for weak in (False, True)]


def _table(question: Question, device: Device, ranks: int, link: Link, weak: bool) -> Table:
    kind = "weak scaling, N as √ranks" if weak else "strong scaling"
    out = Table(
        title=f"predicted, {kind}: {question.cell} N = {question.hidden}, B = {question.batch}, C = {question.chunk}, "
        f"{question.dtype}, on ranks with a {device.name} each",
        caption=f"nothing measured here; link {link.bytes_per_second:.3g} bytes/s, {link.latency * 1e6:.3g} µs; rates: "
        f"{device.basis()}",
    )
    for heading in HEADINGS[: 7 if weak else 8]:
        out.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    alone: float | None = None
    for units, one in predicted(question, device, ranks, link, weak):
        alone = one.seconds if alone is None else alone
        row = [f"{one.ranks:,}", f"{units:,}", one.form, seconds_text(one.seconds), seconds_text(one.sending)]
        row += [bytes_text(one.sent.bytes), bytes_text(one.state_bytes)]
        out.add_row(*row, *([] if weak else [f"{alone / one.seconds:.2f}"]))
    return out
