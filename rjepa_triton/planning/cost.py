"""What online learning costs before it runs: seconds and bytes of each form, and which form is the cheapest.

One model serves the learner's own choice of a form and `rjepa bench plan`. A training step is a few phases, each with
its `Work`; the device's `Rates` make seconds of it (`work`). Calls are counted by running the code on a few units
(`calls`, `online.counting`); FLOP and bytes follow from the sizes. `forward` has the forward pass, step by step or in
parallel in time. The public names of those three modules can be had from this one too.

Sizes: S states per unit, batch B, N units, matrices of N×M_k. Γ has g = S·B·Σ_k N·M_k numbers of `gamma_item` bytes
each; the weights, and their gradient, have w = Σ_k N·M_k numbers of `item` bytes each. A pointwise call moves three
arrays. Per training step:

    forward   reads the weights; 2·B·w FLOP
    step      reads and writes Γ, and writes the gradient
    chunk     does the same once per chunk of C steps (plain torch goes over Γ twice: to carry it over the chunk and to
              add the rank-C update); 2·S·B·w + 2·B·w FLOP a step, for the rank-C update and for the chunk's own part of
              the gradient
    lazy      reads Γ and adds the two parts of the gradient in every step, and in every R-th step carries Γ over R
              steps as chunk does; 2·S·B·w FLOP a step, and those of history over the t = 1 … R steps kept since
    history   a reverse scan and a product over the t steps since the last reset: 2·B·t·w FLOP, S²·B·N·t numbers read
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..backend import native_backend
from ..backend.native.calls import MOST_STATES
from ..backend.triton_backend import MAX_STATES as KERNELS_STATES
from ..rules import rtrl
from .calls import Calls, Line, counted
from .forward import (
    ON_CHIP_STEP,
    ForwardProblem,
    forward_seconds,
    kernel_steps,
    scan_level,
    scan_work,
)
from .work import (
    COMPILED_ARRIVING,
    COMPILED_DUAL,
    COMPILED_EXACT,
    COMPILED_LINEARIZE,
    COMPILED_LOOP,
    COMPILED_PASS,
    COMPILED_REVERSE,
    CPU,
    GPU,
    Phase,
    Rates,
    Work,
    fresh_bytes_of,
    rates,
    rates_of,
    seconds,
)

__all__ = [
    "COMPILED_ARRIVING",
    "COMPILED_DUAL",
    "COMPILED_EXACT",
    "COMPILED_LINEARIZE",
    "COMPILED_LOOP",
    "COMPILED_PASS",
    "COMPILED_REVERSE",
    "CPU",
    "GPU",
    "LAZY_MARGIN",
    "ON_CHIP_STEP",
    "PADDING_CALLS",
    "PADDING_VIEWS",
    "READ_ALONE",
    "Calls",
    "FormCost",
    "ForwardProblem",
    "Line",
    "Phase",
    "Problem",
    "Rates",
    "Work",
    "cheapest",
    "chunk_work",
    "compared_seconds",
    "counted",
    "fold_work",
    "form_costs",
    "forward_phase",
    "forward_seconds",
    "fresh_bytes_of",
    "gamma_pass",
    "gamma_work",
    "history_work",
    "kept_work",
    "kernel_steps",
    "loop_phase",
    "rates",
    "rates_of",
    "reading_work",
    "rewrite_every",
    "runs_gamma",
    "scan_level",
    "scan_work",
    "seconds",
]

# Only reading Γ takes a CPU as long as if it moved this many times Γ's bytes: a core waits for what it reads, and not
# for what it writes. On 2 cores of an AMD EPYC (kernels-cpu.jsonl, N = 1024) reading took 0.73 of a step's time.
READ_ALONE = 1.45
# The same of the weights that a compiled step reads: Γ has put them out of the nearest caches since the step before. It
# is fitted to rfp-step's times from N = 128 on (scaling-one-thread-cpu.jsonl, scaling-cpu.jsonl).
WEIGHTS_ALONE = 2.0
# Calls with which a step of form "lazy" puts zeros beside its credit, for the steps kept before it (`online.past`).
PADDING_CALLS, PADDING_VIEWS = 3, 6


@dataclass(frozen=True)
class FormCost:
    """The predicted cost of one form.

    seconds      of a training step
    state_bytes  of what learning keeps between steps, the layer's own state included
    because      what these are made of, in words
    phases       the parts of a training step
    """

    form: str
    seconds: float
    state_bytes: int
    because: str
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A layer that learns, as the model of cost sees it.

    states, batch, units   S, B, N
    fan_ins    M_k of each matrix; 1 for a diagonal matrix or a bias
    item, gamma_item   bytes of a number of the layer, and of one of Γ
    calls      counted calls of torch
    features   I, the size of the layer's input if a matrix reads it, else 0
    runs       what runs Γ's recursion: "torch", "compile" or "triton" (`runs_gamma`)
    loop       whether the layer's loop is one call of compiled code (`native_backend.compiled_loop`)
    one_step   whether a single step is one call of compiled code on the CPU, or one launch of an RGC on a GPU
               (`operations.step`)
    partials   the same of the linearization (`operations.linearize`)
    reverse    whether the reverse scan is a call of compiled code (`native_backend.compiled_reverse`)
    """

    states: int
    batch: int
    units: int
    fan_ins: Sequence[int]
    item: int
    gamma_item: int
    calls: Calls
    features: int = 0
    runs: str = "torch"
    loop: bool = False
    one_step: bool = False
    partials: bool = False
    reverse: bool = False

    @property
    def weight_numbers(self) -> int:
        return self.units * sum(self.fan_ins)

    @property
    def weight_bytes(self) -> int:
        return self.weight_numbers * self.item

    @property
    def gamma_bytes(self) -> int:
        return self.states * self.batch * self.weight_numbers * self.gamma_item

    @property
    def layer_state_bytes(self) -> int:
        """Bytes of the layer's own S states."""
        return self.states * self.batch * self.units * self.item

    def carried_bytes(self, learning: str, per_head: int) -> int:
        """Bytes of what a learning rule carries forward in time: Γ of RFP, exact sensitivities of RTRL, …

        per_head: b, the units of a head, among which RTRL's sensitivities are dense.
        """
        if learning == "rtrl":
            gamma = self.states * per_head * self.batch * self.weight_numbers * self.item
            return gamma + gamma * rtrl.rows_at_once(blocks := self.batch * self.units // per_head) // blocks
        if learning == "uoro":
            return self.batch * (self.states * self.units + self.weight_numbers) * self.item
        return 0 if learning == "tbptt" else self.gamma_bytes

    def window_bytes(self, steps: int) -> int:
        """Bytes of `steps` recorded steps: M, φ, the states that matrices read, ∂F/∂x and the layer's input."""
        return steps * self.batch * (self.units * self.calls.window + self.features) * self.item

    def grown_bytes(self, steps: int) -> int:
        """Bytes of a window to which `steps` steps were added one by one: its buffer doubles when it is full."""
        return self.window_bytes(1 << (steps - 1).bit_length()) if steps else 0

    def pointwise(self, counted: Work, steps: float = 1) -> Work:
        """The counted calls and views; each call moves three arrays of `steps` × B·N numbers."""
        moved = 3.0 * counted.calls * steps * self.batch * self.units * self.item
        return Work(calls=counted.calls, views=counted.views, bytes=moved)

    def exact(self, steps: float) -> Work:
        """BPTT's credits over `steps` steps, without the products.

        Where the loop is compiled, so are they, and the weights are packed first.
        """
        if not self.loop:
            return self.pointwise(self.calls.exact.at(steps))
        rows = steps * self.batch * self.units * self.item
        return COMPILED_EXACT + Work(
            bytes=rows * (3.0 * self.states + 2 * len(self.fan_ins)) + 2.0 * self.weight_bytes
        )

    def credit(self, steps: float) -> Work:
        """The reverse scan over `steps` steps on the CPU. Compiled code reads M and δ and writes λ."""
        if not self.reverse:
            return self.pointwise(self.calls.credit.at(steps))
        moved = steps * self.batch * self.units * self.item * self.states * (self.states + 2)
        return COMPILED_REVERSE + Work(bytes=float(moved))

    def linearize(self, steps: float = 1) -> Work:
        """The partials and M of `steps` recorded steps.

        Compiled code reads RGC's gates, states and x, and writes ten arrays.
        """
        if not self.partials:
            return self.pointwise(self.calls.linearize, steps)
        return COMPILED_LINEARIZE + Work(bytes=17.0 * steps * self.batch * self.units * self.item)

    def dual(self, steps: float) -> Work:
        """A sequence's backward in compiled code, without the products.

        It reads RGC's gates, states, x and δ, and writes five arrays.
        """
        return COMPILED_DUAL + Work(bytes=14.0 * steps * self.batch * self.units * self.item)


def runs_gamma(gpu: bool, item: int, gamma_item: int, states: int) -> str:
    """What backend "auto" runs Γ's recursion with (`operations.choose_gamma`): "torch", "compile" or "triton".

    gpu: whether on a GPU, else on the CPU; item, gamma_item: bytes of a number of the layer and of Γ; states: S.
    """
    if gpu:
        return "triton" if item == 4 and states <= KERNELS_STATES else "torch"
    same = item == gamma_item and native_backend.cpp_compiler() is not None
    return "compile" if same and states <= MOST_STATES else "torch"


def forward_phase(problem: Problem, working_set: float) -> Phase:
    """The forward pass of a single time step, recorded."""
    work = COMPILED_LOOP if problem.one_step else problem.pointwise(problem.calls.step)
    times = WEIGHTS_ALONE if problem.one_step and problem.runs == "compile" else 1.0
    read = Work(flop=2.0 * problem.batch * problem.weight_numbers, matrix_bytes=times * problem.weight_bytes)
    return Phase("forward", work + read, working_set)


def _passes(states: int) -> float:
    """How often plain torch goes over an array as large as Γ^ν for Σ_ν' M ⊙ Γ^{ν'}.

    S products read one and write one; S - 1 sums read two and write one.
    """
    return 2 + 5 * (states - 1)


def gamma_pass(problem: Problem) -> Work:
    """Γ's step and the gradient that is read from Γ, by the backend that runs them; φ and y are arrays already."""
    g, w, calls = problem.gamma_bytes, problem.weight_bytes, problem.calls
    fresh = fresh_bytes_of(w)
    if problem.runs == "triton":
        return Work(calls=calls.groups, bytes=2.0 * g + 2.0 * w)
    if problem.runs == "compile":
        return COMPILED_PASS * calls.groups + Work(bytes=2.0 * g + w)  # the gradient's memory is used again
    passes = _passes(problem.states)
    moved = g * (passes + 4 + 2 + (passes + 1) / problem.states)
    return calls.gamma + Work(bytes=moved, fresh_bytes=fresh)


def gamma_work(problem: Problem) -> Work:
    """A time step of form "step": the linearization of the recorded step, and `gamma_pass`."""
    work = gamma_pass(problem) + problem.linearize()
    # compiled code and kernels read φ and y in place
    return work + problem.pointwise(problem.calls.stacked) if problem.runs == "torch" else work


def reading_work(problem: Problem) -> Work:
    """A gradient from Γ and a credit, by the backend that runs it; Γ is only read."""
    g, w, calls = problem.gamma_bytes, problem.weight_bytes, problem.calls
    fresh = fresh_bytes_of(w)
    if problem.runs == "triton":
        return Work(calls=calls.groups, bytes=float(g + w))
    if problem.runs == "compile":
        return COMPILED_PASS * calls.groups + Work(bytes=READ_ALONE * g + w)
    moved = g * (_passes(problem.states) + 1) / problem.states
    return calls.read + Work(bytes=moved, fresh_bytes=fresh)


def fold_work(problem: Problem, steps: int) -> Work:
    """Γ carried over C = `steps` linearized steps by a rank-C update, after a gradient was read from it."""
    g, w, calls = problem.gamma_bytes, problem.weight_bytes, problem.calls
    work = problem.pointwise(calls.stacked, steps)
    work += Work(flop=2.0 * problem.states * problem.batch * problem.weight_numbers * steps)
    if problem.runs == "triton":
        return work + Work(calls=2 * calls.groups, bytes=2.0 * g + 2.0 * w, scan_steps=steps)
    if problem.runs == "compile":
        return work + (COMPILED_PASS + COMPILED_ARRIVING) * calls.groups + Work(bytes=2.0 * g + w)
    passes = _passes(problem.states)
    moved = g * (passes + 4 + (passes + 1) / problem.states)
    return work + calls.chunk.at(steps) + Work(bytes=moved, fresh_bytes=fresh_bytes_of(w))


def chunk_work(problem: Problem, steps: int) -> Work:
    """All that learning does for a chunk of C = `steps` steps: linearization, credits, gradient, and Γ's update."""
    w, calls, count = problem.weight_bytes, problem.calls, len(problem.fan_ins)
    # the chunk's own part of the gradient, which is added to the part from Γ
    work = problem.linearize(steps) + problem.pointwise(calls.outer, steps)
    work += Work(calls=count, flop=2.0 * problem.batch * problem.weight_numbers * steps, bytes=4.0 * w)
    work += Work(fresh_bytes=fresh_bytes_of(w / max(1, count), count))
    if problem.runs == "triton":
        work += scan_work(problem.states, steps, problem.batch * problem.units, problem.item, True)
    else:
        work += problem.credit(steps)
    return work + fold_work(problem, steps)


def history_work(problem: Problem, steps: float, kernel: bool) -> Work:
    """A training step's gradient from the t = `steps` steps recorded since the last reset.

    kernel: whether a Triton kernel runs the reverse scan.
    """
    calls, count = problem.calls, len(problem.fan_ins)
    work = problem.linearize() + problem.pointwise(Work(calls=calls.arrays, views=2 * calls.arrays))
    work += problem.pointwise(calls.outer + Work(calls=-count), steps)
    work += Work(flop=2.0 * problem.batch * steps * problem.weight_numbers, bytes=problem.weight_bytes)
    work += Work(calls=count, fresh_bytes=fresh_bytes_of(problem.weight_bytes / max(1, count), count))
    if kernel:
        whole = max(1, round(steps))
        return work + scan_work(problem.states, whole, problem.batch * problem.units, problem.item, True)
    return work + problem.credit(steps)


def kept_work(problem: Problem, steps: float) -> Work:
    """In a step of form "lazy": the gradient from the t = `steps` kept steps, and its sum with the part from Γ."""
    added = Work(
        calls=len(problem.fan_ins) + PADDING_CALLS, views=PADDING_VIEWS, bytes=3.0 * problem.weight_bytes
    )
    return history_work(problem, steps, problem.runs == "triton") + added


def rewrite_every(problem: Problem, rates: Rates) -> int:
    """The best R of form "lazy", whose seconds a step are a constant + a/R + b·R: R = √(a/b), at least 1.

    a is the time by which carrying Γ over the kept steps exceeds reading it, without what grows with their number; b is
    half of the time that a kept step adds to every later gradient.
    """
    touched = problem.gamma_bytes + 3.0 * problem.weight_bytes
    one, two = (fold_work(problem, steps).seconds(rates, touched) for steps in (1, 2))
    a = 2 * one - two - reading_work(problem).seconds(rates, touched)
    one, two = (kept_work(problem, steps).seconds(rates, touched) for steps in (1, 2))
    return max(1, round(math.sqrt(max(0.0, a) / ((two - one) / 2))))


def form_costs(
    problem: Problem, update_every: int, horizon: int | None, rates: Rates, rewrite_every: int
) -> list[FormCost]:
    """Costs of the forms that can be used: step, lazy, chunk if update_every ≥ 2, history if a horizon is known.

    update_every: C, steps between changes of the weights; horizon: steps between resets, None if unbounded;
    rewrite_every: R, steps between updates of Γ in form "lazy". Seconds are those of a whole training step: the layer's
    forward pass and learning.
    """
    g, w, own = problem.gamma_bytes, problem.weight_bytes, problem.layer_state_bytes
    touched = g + 2.0 * w

    def cost(form: str, state: int, because: str, *phases: Phase) -> FormCost:
        return FormCost(form, seconds(phases, rates), state + own, because, phases)

    work = gamma_work(problem)
    costs = [
        cost(
            "step",
            g,
            f"{work.bytes:.3g} bytes moved a step",
            forward_phase(problem, touched),
            Phase("Γ and gradient", work, touched),
        )
    ]
    held = touched + w + problem.window_bytes(rewrite_every)
    gamma = reading_work(problem) * (rewrite_every - 1) + fold_work(problem, rewrite_every)
    gamma *= 1 / rewrite_every
    kept = kept_work(problem, (rewrite_every + 1) / 2)
    both = gamma + kept
    costs.append(
        cost(
            "lazy",
            g + problem.grown_bytes(rewrite_every - 1),
            f"{both.bytes:.3g} bytes moved and {both.flop:.3g} FLOP a step, Γ rewritten every {rewrite_every} steps",
            forward_phase(problem, held),
            Phase("Γ", gamma, held),
            Phase("kept steps", kept, held),
        )
    )
    if update_every >= 2:
        work = chunk_work(problem, update_every) * (1 / update_every)
        costs.append(
            cost(
                "chunk",
                g + problem.window_bytes(update_every),
                f"{work.bytes:.3g} bytes moved and {work.flop:.3g} FLOP a step",
                loop_phase(problem, update_every),
                Phase("Γ and gradient", work, g + 3.0 * w),
            )
        )
    if horizon is not None:
        steps = (horizon + 1) / 2  # recorded steps, mean over an episode
        work = history_work(problem, steps, problem.runs == "triton")
        costs.append(
            cost(
                "history",
                problem.grown_bytes(horizon),
                f"{work.flop:.3g} FLOP and {steps:.0f} scanned steps a step, mean over {horizon} steps",
                forward_phase(problem, 2.0 * w + problem.window_bytes(math.ceil(steps))),
                Phase("gradient", work, 2.0 * w + problem.window_bytes(math.ceil(steps))),
            )
        )
    return costs


def loop_phase(problem: Problem, steps: int) -> Phase:
    """One of `steps` steps of the layer's loop, which joins the weights once and then reads them in every step."""
    w = problem.weight_bytes
    calls = problem.calls.loop.at(steps)
    work = COMPILED_LOOP * (1 / steps) if problem.loop else problem.pointwise(calls * (1 / steps))
    read = Work(flop=2.0 * problem.batch * problem.weight_numbers, bytes=2.0 * w / steps, matrix_bytes=w)
    return Phase("forward", work + read, w)


# "lazy" is chosen only if it is predicted to be this many times as fast as any other form: its time is the sum of many
# small parts, of which the model knows little. On 2 busy CPU cores (N = 256, B = 64) it took 1.2 times the time of
# "step", where 0.87 times was predicted.
LAZY_MARGIN = 1.2


def compared_seconds(form: str, seconds: float) -> float:
    """The seconds by which forms are compared: as predicted, for "lazy" times `LAZY_MARGIN`."""
    return seconds * LAZY_MARGIN if form == "lazy" else seconds


def cheapest(costs: Sequence[FormCost], available_bytes: int | None) -> FormCost:
    """The fastest form, by `compared_seconds`, whose state fits in `available_bytes`; if none fits, the smallest.

    available_bytes: None if memory is no limit.
    """
    fitting = [c for c in costs if available_bytes is None or c.state_bytes <= available_bytes]
    if fitting:
        return min(fitting, key=lambda c: compared_seconds(c.form, c.seconds))
    return min(costs, key=lambda c: c.state_bytes)
