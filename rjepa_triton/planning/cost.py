"""What learning and the forward pass cost: bytes, FLOP and seconds, before they run.

One model for the learner's own choice of a form and for `rjepa bench plan`. A training step is a few phases, each with
its `Work`, and a device has `Rates`; seconds are

    calls · s/call + FLOP / rate + bytes / bandwidth + scan steps · s/step + fresh bytes · s/byte

as if nothing overlapped. Of a CPU the bandwidth depends on the phase's working set, all that it touches before it comes
round again: the part of it that the last cache can hold is read at the cache's rate, the rest at memory's. Matrices
that are multiplied with a few rows come from the cache at a rate of their own. Calls are counted by running the code on
a few units (`counting`); FLOP and bytes follow from sizes.

For the layer's matrices, N×M_k each, S states a unit and batch B; Γ has g = S·B·Σ_k N·M_k numbers of
`gamma_item` bytes each, W and its gradient w = Σ_k N·M_k of `item` bytes each. A pointwise call moves three arrays.

    forward   a step: reads W, 2·B·w FLOP
    step      reads and writes Γ, and writes the gradient, once a step
    chunk     the same once a chunk of C steps (plain torch goes over Γ for the fold and for the rank-C update),
              and 2·S·B·w + 2·B·w FLOP a step: its rank-C update and its own part of the gradient
    lazy      reads Γ, and adds up the gradient's two parts, every step, and in the R-th of them folds R steps as
              chunk does; 2·S·B·w FLOP a step, and as history does of the t = 1 … R steps kept
    history   a reverse scan and a product over the t steps since reset: 2·B·t·w FLOP, S²·B·N·t numbers read

The forward pass over T steps, with calls and bytes of the pointwise work counted on a small problem (`counted`):

    sequential   T steps: calls, 2·B·w FLOP, w·item bytes of weights and the pointwise work's, each; the calls of one
                 where the loop is compiled code's (`ops`)
    parallel     rounds of as many FLOP over T steps in few calls, w·item bytes, and an affine scan
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._device import device_name
from ..backends import dispatch as ops
from ..backends import room as _room
from ..backends.native import calls as _native
from ..rules import rfp, rtrl
from . import devices


@dataclass(frozen=True)
class Rates:
    """A device's rates, as the model takes them.

    bytes_per_second        of memory, read and written ones together
    flop_per_second         of matrix products in the layer's dtype
    seconds_per_call        that a call of torch takes at least
    seconds_per_scan_step   of a scan's kernel, which takes its steps one after the other
    cache_bytes             of the last cache, and cache_bytes_per_second of what is in it; 0: not told apart
    matrix_bytes_per_second of a matrix in the cache that is multiplied with a few rows: slower than a pass over it
    seconds_per_fresh_byte  of memory that the system maps anew
    seconds_per_view        that a call takes which makes a view or room for an array; 0 on a GPU, which doesn't wait
    """

    name: str
    bytes_per_second: float
    flop_per_second: float
    seconds_per_call: float
    seconds_per_scan_step: float = 0.0
    cache_bytes: float = 0.0
    cache_bytes_per_second: float = 0.0
    matrix_bytes_per_second: float = 0.0
    seconds_per_fresh_byte: float = 0.0
    seconds_per_view: float = 0.0

    def bandwidth(self, working_set: float, matrix: bool = False) -> float:
        """Bytes a second of what touches `working_set` bytes before it comes round again.

        matrix: of a matrix that is multiplied with a few rows.
        """
        cached = self.matrix_bytes_per_second if matrix else self.cache_bytes_per_second
        if not self.cache_bytes or not cached:
            return self.bytes_per_second
        held = min(1.0, self.cache_bytes / working_set) if working_set > 0 else 1.0
        return 1 / (held / cached + (1 - held) / self.bytes_per_second)


def rates(
    device: devices.Device, dtype: str = "float32", *, cuda_graph: bool = False, threads: int | None = None
) -> Rates:
    """A profile's rates for a dtype, "float32" or "float64"; in a CUDA graph; of a CPU by fewer threads than cores."""
    share = 1.0 if threads is None or device.cores is None else min(1.0, threads / device.cores)
    return Rates(
        device.name,
        bytes_per_second=device.rate("copy"),
        flop_per_second=share * device.rate(dtype),
        seconds_per_call=device.rate("graph_call" if cuda_graph else "call"),
        seconds_per_scan_step=device.rate("scan_step"),
        cache_bytes=device.cache_bytes,
        cache_bytes_per_second=share * device.rate("cache"),
        matrix_bytes_per_second=share * device.rate("matrix"),
        seconds_per_fresh_byte=device.rate("fresh"),
        seconds_per_view=device.rate("view"),
    )


CPU = rates(devices.generic("cpu"))
GPU = rates(devices.generic("gpu"))
# A step of a loop in one launch, in steps of a scan's kernel; assumed. Its products are summed over the lanes of a warp
# and its states go round through shared memory, where a scan's step waits for one load. Of up to 64 units it has less
# to do; of 128 its instructions and the weights from the cache alone are 0.9 µs on an H100 (`rgc_forward_small`).
ON_CHIP_STEP = 5
# What only reads Γ on a CPU goes as if it moved so many times its bytes: a core waits for what it reads, and not for
# what it writes. On 2 cores of an AMD EPYC (kernels-cpu.jsonl, N = 1024) reading took 0.73 of a step's time.
READ_ALONE = 1.45
# Calls in which a step of form "lazy" has its credit beside zeros for the steps kept before it (`_past`).
PADDING_CALLS, PADDING_VIEWS = 3, 6


def rates_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of a device here: of the profile that matches its name (`devices`), else assumed ones."""
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        return GPU
    kind = "cpu" if device.type == "cpu" else "gpu"
    profile = devices.find(device_name(device), kind)
    threads = torch.get_num_threads() if kind == "cpu" else None
    return rates(profile, "float64" if dtype == torch.float64 else "float32", threads=threads)


@dataclass(frozen=True)
class Work:
    """What something costs: calls that launch something, FLOP of products, bytes, dependent steps of scan kernels.

    Beside `bytes`: matrix_bytes of matrices that are multiplied with a few rows, and fresh_bytes of arrays so large
    that the system maps them anew (`fresh_bytes_of`). Beside `calls`: `views`, those that make a view of an array or
    room for one.
    """

    calls: float = 0.0
    flop: float = 0.0
    bytes: float = 0.0
    scan_steps: float = 0.0
    matrix_bytes: float = 0.0
    fresh_bytes: float = 0.0
    views: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.calls + other.calls,
            self.flop + other.flop,
            self.bytes + other.bytes,
            self.scan_steps + other.scan_steps,
            self.matrix_bytes + other.matrix_bytes,
            self.fresh_bytes + other.fresh_bytes,
            self.views + other.views,
        )

    def __mul__(self, count: float) -> Work:
        return Work(
            self.calls * count,
            self.flop * count,
            self.bytes * count,
            self.scan_steps * count,
            self.matrix_bytes * count,
            self.fresh_bytes * count,
            self.views * count,
        )

    def parts(self, rates: Rates, working_set: float = math.inf) -> dict[str, float]:
        """Predicted seconds by what they go to; working_set: bytes touched before it comes round again."""
        return {
            "calls": self.calls * rates.seconds_per_call + self.views * rates.seconds_per_view,
            "arithmetic": self.flop / rates.flop_per_second,
            "bytes moved": self.bytes / rates.bandwidth(working_set)
            + self.matrix_bytes / rates.bandwidth(working_set, matrix=True),
            "dependent steps": self.scan_steps * rates.seconds_per_scan_step,
            "memory mapped anew": self.fresh_bytes * rates.seconds_per_fresh_byte,
        }

    def seconds(self, rates: Rates, working_set: float = math.inf) -> float:
        """Predicted, as if nothing overlapped."""
        return sum(self.parts(rates, working_set).values())


# What a call of compiled code takes beside its arithmetic: room for arrays, views of them, what it is told (`_native`).
COMPILED_LOOP, COMPILED_REVERSE = Work(calls=1, views=3), Work(calls=1, views=2)
COMPILED_LINEARIZE, COMPILED_EXACT = Work(calls=2, views=8), Work(calls=4, views=8)
COMPILED_DUAL = Work(calls=2, views=8)
COMPILED_PASS, COMPILED_ARRIVING = Work(calls=1, views=3), Work(calls=1, views=2)


def fresh_bytes_of(array: float, count: float = 1) -> float:
    """Bytes of `count` arrays of `array` bytes that are mapped anew each time they are made."""
    return count * array if array > _room.LARGE else 0.0


@dataclass(frozen=True)
class Phase:
    """A part of a training step: its work, of one time step, and the bytes it touches before it comes round again."""

    name: str
    work: Work
    working_set: float = math.inf

    def seconds(self, rates: Rates) -> float:
        """Predicted."""
        return self.work.seconds(rates, self.working_set)


def seconds(phases: Sequence[Phase], rates: Rates) -> float:
    """Predicted seconds of all phases, one after the other."""
    return sum(phase.seconds(rates) for phase in phases)


@dataclass(frozen=True)
class Line:
    """Calls that grow with the number of steps: fixed + each · steps."""

    fixed: Work
    each: Work

    def at(self, steps: float) -> Work:
        return self.fixed + self.each * steps


@dataclass(frozen=True)
class Calls:
    """Calls of torch that the parts of a training step take, `calls` and `views` of a `Work`, by `counting.calls`.

    step        one step of the layer, recorded; loop: several
    linearize   partials and M of recorded steps, any number
    stacked     φ and y as arrays, by group of matrices of one shape; groups: how many
    gamma       Γ's step and gradient in plain torch, without `stacked`; read: what a credit reads of Γ
    chunk       Γ's chunk in plain torch, with the suffix products
    credit      RFP's credits of some steps in plain torch; exact: BPTT's
    outer       the products Σ E yᵀ of all matrices
    eager       a Python loop of the cell and its backward under autograd, which keeps eager_kept numbers of a unit, row
                and step
    rtrl        a step of exact RTRL with dense weights, rtrl_heads: with heads
    arrays      arrays of a recorded block; window: their numbers for one unit, row and step, inputs left out
    """

    step: Work
    loop: Line
    linearize: Work
    stacked: Work
    groups: int
    gamma: Work
    read: Work
    chunk: Line
    credit: Line
    exact: Line
    outer: Work
    eager: Line
    eager_kept: int
    rtrl: Work
    rtrl_heads: Work
    arrays: int
    window: int


@dataclass(frozen=True)
class FormCost:
    """Predicted cost of one form: seconds a step, bytes of learning state, and what they are made of."""

    form: str
    seconds: float
    state_bytes: int
    because: str
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True)
class Problem:
    """S, B, N; M_k of each matrix (1 for a diagonal one or a bias); bytes of a number; calls, and what runs Γ.

    features   I, of the layer's input where a matrix reads it, else 0
    loop, one_step, partials, reverse   whether the layer's loop, a step on its own, the linearisation and the reverse
               scan are each a call of compiled code (`ops.compiled_loop`, `ops.linearize`, `ops.compiled_reverse`); of
               an RGC on a GPU, whether a step and the linearisation are a launch (`ops.step`)
    runs       "torch", "compile" or "triton": what Γ's recursion is run by (`runs_gamma`)
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
        """Of the S states of the layer itself."""
        return self.states * self.batch * self.units * self.item

    def carried_bytes(self, learning: str, per_head: int) -> int:
        """Bytes of what a learning rule carries forward; per_head b: units that meet within the step."""
        if learning == "rtrl":
            gamma = self.states * per_head * self.batch * self.weight_numbers * self.item
            return gamma + gamma * rtrl.rows_at_once(blocks := self.batch * self.units // per_head) // blocks
        if learning == "uoro":
            return self.batch * (self.states * self.units + self.weight_numbers) * self.item
        return 0 if learning == "tbptt" else self.gamma_bytes

    def window_bytes(self, steps: int) -> int:
        """Bytes that `steps` recorded steps take: M, φ, the states read, ∂F/∂x and the layer's input."""
        return steps * self.batch * (self.units * self.calls.window + self.features) * self.item

    def grown_bytes(self, steps: int) -> int:
        """Bytes of a window that `steps` steps were added to one by one: its buffer doubles when it is full."""
        return self.window_bytes(1 << (steps - 1).bit_length()) if steps else 0

    def pointwise(self, counted: Work, steps: float = 1) -> Work:
        """The calls that were counted, each of which moves three arrays of `steps` by B·N."""
        moved = 3.0 * counted.calls * steps * self.batch * self.units * self.item
        return Work(calls=counted.calls, views=counted.views, bytes=moved)

    def exact(self, steps: float) -> Work:
        """BPTT's credits over `steps` steps, without the products; compiled, where the loop is, and weights packed."""
        if not self.loop:
            return self.pointwise(self.calls.exact.at(steps))
        rows = steps * self.batch * self.units * self.item
        return COMPILED_EXACT + Work(
            bytes=rows * (3.0 * self.states + 2 * len(self.fan_ins)) + 2.0 * self.weight_bytes
        )

    def credit(self, steps: float) -> Work:
        """The reverse scan over `steps` steps on the CPU; compiled, M and δ go in and λ out."""
        if not self.reverse:
            return self.pointwise(self.calls.credit.at(steps))
        moved = steps * self.batch * self.units * self.item * self.states * (self.states + 2)
        return COMPILED_REVERSE + Work(bytes=float(moved))

    def linearize(self, steps: float = 1) -> Work:
        """Partials and M of `steps` recorded steps; compiled, RGC's gates, states and x go in, ten arrays out."""
        if not self.partials:
            return self.pointwise(self.calls.linearize, steps)
        return COMPILED_LINEARIZE + Work(bytes=17.0 * steps * self.batch * self.units * self.item)

    def dual(self, steps: float) -> Work:
        """A sequence's backward without the products: RGC's gates, states, x and δ go in, five arrays out; compiled."""
        return COMPILED_DUAL + Work(bytes=14.0 * steps * self.batch * self.units * self.item)


def runs_gamma(gpu: bool, item: int, gamma_item: int, states: int) -> str:
    """What Γ's recursion is run by on such a device, by "auto" (`ops.choose_gamma`)."""
    if gpu:
        return "triton" if item == 4 else "torch"
    same = item == gamma_item and ops.cpp_compiler() is not None
    return "compile" if same and states <= _native.MOST_STATES else "torch"


def forward_phase(problem: Problem, working_set: float) -> Phase:
    """One step of the layer on its own, recorded."""
    work = COMPILED_LOOP if problem.one_step else problem.pointwise(problem.calls.step)
    read = Work(flop=2.0 * problem.batch * problem.weight_numbers, matrix_bytes=problem.weight_bytes)
    return Phase("forward", work + read, working_set)


def _passes(states: int) -> float:
    """Passes over one Γ^ν that plain torch takes for Σ_ν' M ⊙ Γ^{ν'}: a product each, and a sum each but the first."""
    return 2 + 5 * (states - 1)


def gamma_pass(problem: Problem) -> Work:
    """Γ one step on and the gradient read from it, from φ and y as arrays, by what runs it."""
    g, w, calls = problem.gamma_bytes, problem.weight_bytes, problem.calls
    fresh = fresh_bytes_of(w)
    if problem.runs == "triton":
        return Work(calls=calls.groups, bytes=2.0 * g + 2.0 * w)
    if problem.runs == "compile":
        return COMPILED_PASS * calls.groups + Work(bytes=2.0 * g + w)  # in room that is kept
    passes = _passes(problem.states)
    moved = g * (passes + 4 + 2 + (passes + 1) / problem.states)
    return calls.gamma + Work(bytes=moved, fresh_bytes=fresh)


def gamma_work(problem: Problem) -> Work:
    """A recorded step linearised, and `gamma_pass`."""
    work = gamma_pass(problem) + problem.linearize()
    # compiled code and kernels take φ and y where they lie
    return work + problem.pointwise(problem.calls.stacked) if problem.runs == "torch" else work


def reading_work(problem: Problem) -> Work:
    """What a credit reads of Γ, which is left as it is, by what runs it."""
    g, w, calls = problem.gamma_bytes, problem.weight_bytes, problem.calls
    fresh = fresh_bytes_of(w)
    if problem.runs == "triton":
        return Work(calls=calls.groups, bytes=float(g + w))
    if problem.runs == "compile":
        return COMPILED_PASS * calls.groups + Work(bytes=READ_ALONE * g + w)
    moved = g * (_passes(problem.states) + 1) / problem.states
    return calls.read + Work(bytes=moved, fresh_bytes=fresh)


def fold_work(problem: Problem, steps: int) -> Work:
    """Γ folded on by C = `steps` linearised steps, a rank-C update, and what a credit reads of it before that."""
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
    """A chunk of C = `steps` steps: Γ folded on by it, and the gradient; linearisation and all."""
    w, calls, count = problem.weight_bytes, problem.calls, len(problem.fan_ins)
    # its own part of the gradient, which is added to what Γ gives
    work = problem.linearize(steps) + problem.pointwise(calls.outer, steps)
    work += Work(calls=count, flop=2.0 * problem.batch * problem.weight_numbers * steps, bytes=4.0 * w)
    work += Work(fresh_bytes=fresh_bytes_of(w / max(1, count), count))
    if problem.runs == "triton":
        work += scan_work(problem.states, steps, problem.batch * problem.units, problem.item, True)
    else:
        work += problem.credit(steps)
    return work + fold_work(problem, steps)


def history_work(problem: Problem, steps: float, kernel: bool) -> Work:
    """A step's gradient from the t = `steps` recorded ones since reset."""
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
    """Of a step of form "lazy": its gradient from the t = `steps` kept ones, and its sum with what Γ gives."""
    added = Work(
        calls=len(problem.fan_ins) + PADDING_CALLS, views=PADDING_VIEWS, bytes=3.0 * problem.weight_bytes
    )
    return history_work(problem, steps, problem.runs == "triton") + added


def rewrite_every(problem: Problem, rates: Rates) -> int:
    """R of form "lazy": its seconds a step are a constant and a/R + b·R, least at R = √(a/b).

    a: what folding steps into Γ takes above reading it, but for what grows with them; b: half of what a kept step adds
    to every later gradient.
    """
    touched = problem.gamma_bytes + 3.0 * problem.weight_bytes
    one, two = (fold_work(problem, steps).seconds(rates, touched) for steps in (1, 2))
    a = 2 * one - two - reading_work(problem).seconds(rates, touched)
    one, two = (kept_work(problem, steps).seconds(rates, touched) for steps in (1, 2))
    return max(1, round(math.sqrt(max(0.0, a) / ((two - one) / 2))))


def form_costs(
    problem: Problem, update_every: int, horizon: int | None, rates: Rates, rewrite_every: int
) -> list[FormCost]:
    """Costs of the forms that can serve: step, lazy, chunk if update_every ≥ 2, history if a horizon is known.

    update_every C: steps between changes of the weights; horizon: steps between resets, None if unbounded;
    rewrite_every R: steps between rewritings of Γ in form "lazy". Seconds are those of a whole training step: the
    layer's, and what is learned from it.
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
        steps = (horizon + 1) / 2  # mean over an episode
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
    """A step of the layer among `steps`: weights are joined once, then read again and again."""
    w = problem.weight_bytes
    calls = problem.calls.loop.at(steps)
    work = COMPILED_LOOP * (1 / steps) if problem.loop else problem.pointwise(calls * (1 / steps))
    read = Work(flop=2.0 * problem.batch * problem.weight_numbers, bytes=2.0 * w / steps, matrix_bytes=w)
    return Phase("forward", work + read, w)


# "lazy" must be predicted so many times as fast as what it is taken over: its seconds are many small parts', of which
# the model knows little. On 2 busy CPU cores (N = 256, B = 64) it took 1.2 times step's time, predicted 0.87 times.
LAZY_MARGIN = 1.2


def compared_seconds(form: str, seconds: float) -> float:
    """Predicted seconds as forms are compared by: those of "lazy" times `LAZY_MARGIN`."""
    return seconds * LAZY_MARGIN if form == "lazy" else seconds


def cheapest(costs: Sequence[FormCost], available_bytes: int | None) -> FormCost:
    """The fastest form, by `compared_seconds`, whose state fits in `available_bytes`, or the smallest if none fits."""
    fitting = [c for c in costs if available_bytes is None or c.state_bytes <= available_bytes]
    if fitting:
        return min(fitting, key=lambda c: compared_seconds(c.form, c.seconds))
    return min(costs, key=lambda c: c.state_bytes)


# What launches nothing: memory without a value, and names for what is there.
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::alias")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class _Counter(TorchDispatchMode):
    """Counts what torch is called for: calls, and apart from them views and what is in `_NO_LAUNCH`."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first call imports all of torch.compile, which takes seconds; nothing compiled is counted.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if func.is_view or name.startswith(_NO_LAUNCH):
            self.work += Work(views=1)
        else:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            moved = 0 if name.startswith(_PRODUCTS) else sum(tensor.nbytes for tensor in tensors)
            self.work += Work(calls=1, bytes=moved)
        return out


def counted(function: Callable[[], object]) -> Work:
    """Calls that one call of `function` makes of torch, views apart, and bytes that they move but for products."""
    with _Counter() as counter:
        function()
    return counter.work


def scan_level(states: int, steps: int, numbers: int, item: int) -> Work:
    """One halving of `rfp.affine_scan` from T = `steps` to T/2, `numbers` of B·N."""
    planes = states**2 * (states + 1) + states * (3 * states + 1) + 2 * states
    return Work(calls=3 * states + 3, bytes=float(planes * steps * numbers * item))


def kernel_steps(steps: int) -> int:
    """Dependent steps of Triton's scan over T = `steps` of few units: all, or those of √(2T) blocks of time.

    As `kernels.reverse_scan.pick_scan_config` cuts it: a block of √(T/2) steps twice, and a summary a block.
    """
    return steps if steps < 256 else round(2 * math.sqrt(2 * steps))


def scan_work(states: int, steps: int, numbers: int, item: int, kernel: bool) -> Work:
    """Of `ops.affine_scan` over T = `steps`, S = `states`, `numbers` of B·N; kernel: whether Triton's."""
    moved = float(numbers * item * states * (states + 2))  # of a step: M and r in, c out
    if kernel:  # M and r are turned round before, c after; two launches, each of which reads M and r
        return Work(calls=7, bytes=5 * steps * moved, scan_steps=kernel_steps(steps))
    total, left = Work(), steps
    while left > max(1, rfp.SERIAL_STEPS):
        total += scan_level(states, left, numbers, item)
        left //= 2
    return total + Work(calls=(left - 1) * states + 1, bytes=2 * left * moved)


@dataclass(frozen=True)
class ForwardProblem:
    """S, B, N, T; the numbers of all recurrent weights; bytes of a number; and what was counted of the cell.

    step     of the loop: calls of one step, and bytes that they move for one unit and row, products left out
    round    of the parallel pass: calls of one round, and bytes for one unit, row and step, without the scan
    kernel   whether a Triton kernel does the scan
    launch   whether the loop is one launch, with the weights on chip (`kernels.rgc_forward`)
    compiled whether it is one call of compiled code on the CPU (`ops.compiled_loop`)
    """

    states: int
    batch: int
    units: int
    steps: int
    weight_numbers: int
    item: int
    step: Work
    round: Work
    kernel: bool
    launch: bool = False
    compiled: bool = False

    @property
    def _products(self) -> float:
        """FLOP of a step's matrix products."""
        return 2.0 * self.batch * self.weight_numbers

    def sequential(self) -> Work:
        """The loop over all T steps, which reads the weights on each, or once where all is one launch."""
        moved = (
            4.0 * self.states * self.batch * self.units * self.item * self.steps
        )  # the input in, states, gates out
        flop, read = self._products * self.steps, float(self.weight_numbers * self.item)
        if self.compiled:
            return COMPILED_LOOP + Work(flop=flop, bytes=moved, matrix_bytes=read * self.steps)
        if self.launch:
            return Work(1, flop, moved + read, ON_CHIP_STEP * self.steps)
        moved = self.step.bytes * self.batch * self.units
        work = Work(self.step.calls, self._products, moved, matrix_bytes=read, views=self.step.views)
        return work * self.steps

    def one_round(self) -> Work:
        """One round of the parallel pass over all T steps, which reads the weights once."""
        numbers = self.batch * self.units
        moved = self.round.bytes * numbers * self.steps + self.weight_numbers * self.item
        round_ = Work(self.round.calls, self._products * self.steps, moved, views=self.round.views)
        return round_ + scan_work(self.states, self.steps, numbers, self.item, self.kernel)


def forward_seconds(problem: ForwardProblem, rounds: int, rates: Rates) -> tuple[float, float]:
    """Predicted seconds of the forward pass: sequential, and in parallel by so many rounds."""
    return problem.sequential().seconds(rates), problem.one_round().seconds(rates) * rounds
