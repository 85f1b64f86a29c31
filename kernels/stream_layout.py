"""How a stream's network is laid out on a GPU for its kernel (`cell_stream`): what the kernel is built for, how many
programs share a network, and where they find what it has.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton

from ._cell import CellFunctions

# The first addresses of a network.
ADDRESSES = ("x", "target", "outputs", "hidden", "losses", "resets", "mask", "state")
# Most numbers of a thread, of 255 registers, by `registers`: of SGD, and of optimizers that have moments, whose roots
# and divisions take registers of their own. Beyond, kernels were found to spill.
PLAIN_NUMBERS, NUMBERS_WITH_MOMENTS = 200, 120
WARPS, LEAST_ROWS = (1, 2, 4, 8), 2


class Problem(NamedTuple):
    """What one build of the kernel serves: a layer with N units and F features, O outputs, an optimizer and a loss.

    cell            its functions
    links           for each ν and ν', whether M^{νν'} may be other than zero by the rule
    diagonal        whether M counts recurrent weights, as RFP's does
    out             the state that the readout reads
    passes          whether no matrix reads the layer's input, which is the cell's own
    reads           for each matrix of the layer, the state that it reads, INPUT or ONE
    of_gate, into   whether it enters a gate or an input, and which
    phi             for each of its states, the place of φ among the partials that `cell.partials` finds, or, so many
                    further on, among the saved numbers; -1 where it is zero
    fan_in          of each: N, F, or 1 of a vector
    learns, groups  of the readout's weight, its bias, and each matrix: whether it learns, the optimizer's group
    bias            whether the readout has one
    kind            0 SGD, 1 Adam, 2 AdamW, 3 RMSprop, with so many `moments` of each weight; `decays`, `nesterov`
    every           steps from one of the optimizer's to the next; clips: whether the gradient's norm is limited
    loss            0 squared, 1 cross-entropy, 2 Huber's, 3 cosine, 4 the gradient given
    """

    cell: CellFunctions
    links: tuple[bool, ...]
    diagonal: bool
    out: int
    passes: bool
    reads: tuple[int, ...]
    of_gate: tuple[bool, ...]
    into: tuple[int, ...]
    phi: tuple[tuple[int, ...], ...]
    fan_in: tuple[int, ...]
    learns: tuple[bool, ...]
    groups: tuple[int, ...]
    bias: bool
    kind: int
    moments: int
    decays: bool
    nesterov: bool
    every: int
    clips: bool
    loss: int
    units: int
    features: int
    outputs: int


class Config(NamedTuple):
    """How a network is laid out: `team` programs of `rows` units and `num_warps` warps each."""

    team: int
    rows: int
    num_warps: int


def registers(problem: Problem, rows: int, warps: int, warp_size: int) -> int:
    """About how many numbers a thread has of a program of so many units: weights, moments, sums and Γ, and of each of
    its units partials and M. The compiler adds what it needs in between.
    """
    cell, block = problem.cell, triton.next_power_of_2(problem.units)
    of_weight = 1 + problem.moments + (problem.every > 1 or problem.clips)
    threads, columns = warps * warp_size, [triton.next_power_of_2(fan_in) for fan_in in problem.fan_in]
    # A warp reads rows of four numbers a thread where these lie at multiples of 16 bytes, else of single numbers.
    lanes = min(warp_size, block // 4 if problem.units % 4 == 0 and block >= 4 else block)
    across = 1 if problem.units % 4 == 0 else min(warps, max(1, block // lanes))
    units = max(1, rows // (warp_size // lanes * (warps // across)))  # of a thread
    found = 0
    for fan_in in columns:
        each = units if fan_in == 1 else max(1, rows * fan_in // threads)
        found += each * (of_weight + cell.states)
    readout = triton.next_power_of_2(problem.outputs)
    for width in (block, *[rows] * (rows < block), *[1] * problem.bias):
        found += max(1, readout * width // threads) * of_weight
    vectors = cell.states**2 + cell.states + len({k for phi in problem.phi for k in phi}) + cell.inputs + 4
    return found + units * (vectors + 2 * len(cell.entering))


def whole(problem: Problem) -> Config:
    """One program for all units."""
    return Config(1, triton.next_power_of_2(problem.units), WARPS[-1])


def pick_config(problem: Problem, warp_size: int, multiprocessors: int) -> Config | None:
    """The largest programs whose numbers fit in registers; None where no team fits on the GPU. A pure function."""
    most = NUMBERS_WITH_MOMENTS if problem.moments else PLAIN_NUMBERS
    rows = whole(problem).rows
    least = min(rows, LEAST_ROWS)
    while rows >= least:
        team = -(-problem.units // rows)
        if team > multiprocessors:
            return None
        for warps in WARPS:
            if registers(problem, rows, warps, warp_size) <= most:
                return Config(team, rows, warps)
        rows //= 2
    return None


def constants(
    problem: Problem, config: Config, *, resets: bool, mask: bool, hidden: bool, alignment: int = 16
) -> dict[str, Any]:
    """The kernel's constants."""
    cell, before = problem.cell, 1 + (config.team > 1) + problem.bias
    # the blocks of weights, by whose they are
    slots = [0, *[0] * (config.team > 1), *[1] * problem.bias, *range(2, 2 + len(problem.reads))]
    # what divides the places at which rows of a block begin; of the readout's columns, also a program's units
    columns = [*[math.gcd(problem.units, config.rows)] * (config.team > 1), *[problem.units] * problem.bias]
    begins = [problem.units, *columns, *problem.fan_in]
    learns = [problem.learns[slot] for slot in slots]
    assert len(slots) == before + len(problem.reads)
    return {
        "UPDATE": cell.update,
        "PARTIALS": cell.partials,
        "S": cell.states,
        "G": len(cell.entering),
        "J": cell.inputs,
        "K": cell.matrices,
        "FOUND": cell.partials_found,
        "SAVES": cell.saves,
        "OUT": problem.out,
        "PASSES": problem.passes,
        "LINKS": problem.links,
        "DIAGONAL": problem.diagonal,
        "READS": problem.reads,
        "OF_GATE": problem.of_gate,
        "INTO": problem.into,
        "PHI": problem.phi,
        "COLUMNS": tuple(map(triton.next_power_of_2, problem.fan_in)),
        "SLOTS": tuple(slots),
        "LEARNS": tuple(learns),
        "NTH": tuple(sum(learns[:block]) for block in range(len(slots))),
        "GROUPS": tuple(problem.groups[slot] for slot in slots),
        "BIAS": problem.bias,
        "KIND": problem.kind,
        "MOMENTS": problem.moments,
        "DECAYS": problem.decays,
        "NESTEROV": problem.nesterov,
        "EVERY": problem.every,
        "CLIPS": problem.clips,
        "LOSS": problem.loss,
        "HAS_RESETS": resets,
        "HAS_MASK": mask,
        "HAS_HIDDEN": hidden,
        "RATES": 1 + max(problem.groups),
        "A": addresses(problem),
        "FIRST": len(ADDRESSES),
        "BYTES": tuple(alignment if begin % 4 == 0 else 4 for begin in begins),
        "N": problem.units,
        "F": problem.features,
        "O": problem.outputs,
        "TEAM": config.team,
        "ROWS": config.rows,
        "BLOCK": triton.next_power_of_2(problem.units),
        "FEATURES": triton.next_power_of_2(problem.features),
        "OUTPUTS": triton.next_power_of_2(problem.outputs),
    }


def addresses(problem: Problem) -> int:
    """How many addresses the table has of a network: `ADDRESSES`, then of the readout's weight and bias and of each
    matrix itself, two moments, the gradient's sum, and Γ of each state; 0 for what there isn't.
    """
    return len(ADDRESSES) + (4 + problem.cell.states) * (2 + len(problem.reads))
