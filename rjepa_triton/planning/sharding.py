"""What learning costs on several ranks: rows of the weights and Γ on each, states that all gather (`online.sharded`).

    seconds a step = the form's on ⌈N/R⌉ units (`cost`) + calls · ⌈log₂R⌉ · latency + bytes / link

A collective takes at least ⌈log₂R⌉ messages one after the other, and each rank receives what the others own. The terms
are added up, as if nothing overlapped. Data parallel ranks add, once an update, an all-reduce of the rank's gradient:
2·(D-1)/D of its bytes over the link, and 2·⌈log₂D⌉ latencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .cost import FormCost, Problem, Rates, form_costs


@dataclass(frozen=True)
class Link:
    """What joins the ranks. bytes_per_second: that a rank receives; latency: seconds of one message."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Sent:
    """What a rank sends and receives in collectives. calls: of them; bytes: that it receives from the others."""

    calls: float
    bytes: float

    def seconds(self, link: Link, ranks: int) -> float:
        """Predicted seconds over a link, between so many ranks."""
        return self.calls * math.ceil(math.log2(ranks)) * link.latency + self.bytes / link.bytes_per_second


def gathered(ranks: int, units: int, batch: int, states: int, item: int, steps: int, dense: bool) -> Sent:
    """The all-gathers of one call of C = `steps` steps: N units on R ranks, B rows, S states of `item` bytes.

    dense: whether a matrix of the layer reads the states of all units, so that every step waits for them; else they are
    gathered once a call. The last rank's block is sent as large as the others'.
    """
    if ranks == 1:
        return Sent(1, 0)
    block = -(-units // ranks)
    return Sent(steps if dense else 1, float((ranks - 1) * block * states * batch * steps * item))


def reduced(replicas: int, numbers: float, item: int) -> Sent:
    """The all-reduce, once an update, of a gradient of so many numbers over D = `replicas` of the batch."""
    if replicas == 1:
        return Sent(0, 0)
    return Sent(2, 2 * (replicas - 1) / replicas * numbers * item)


@dataclass(frozen=True)
class Scaled:
    """One form on R ranks. seconds: of a time step, of which `sending`; state_bytes: of one rank; sent: a time step."""

    ranks: int
    form: str
    seconds: float
    sending: float
    state_bytes: int
    sent: Sent


def scaled(problem: Problem, ranks: int, every: int, rates: Rates, link: Link, dense: bool = True) -> Scaled:
    """The cost of a learner with a mesh of R ranks. problem: of the whole layer; every: C, steps between updates."""
    block = -(-problem.units // ranks)
    own = replace(
        problem, units=block, loop=problem.loop and ranks == 1, one_step=problem.one_step and ranks == 1
    )
    form = "step" if every == 1 else "chunk"
    cost: FormCost = next(one for one in form_costs(own, every, None, rates, 1) if one.form == form)
    sent = gathered(ranks, problem.units, problem.batch, problem.states, problem.item, every, dense)
    sent = Sent(sent.calls / every, sent.bytes / every)
    sending = sent.seconds(link, ranks) if ranks > 1 else 0.0
    return Scaled(ranks, form, cost.seconds + sending, sending, cost.state_bytes, sent)
