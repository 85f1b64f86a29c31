"""The cost of every algorithm for one layer: seconds of its phases, bytes of its state and at its peak.

The same model of cost (`planning.cost`) by which the online learner chooses its form, continued to the algorithms that
the benchmark has beside: the dual form, BPTT by hand and by autograd, truncated BPTT, and exact RTRL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ...backend import operations
from ...layers import functional, parallel
from ...layers.layer import TwoPointRNN
from ...online import counting
from ...online.stream_code import PANELS_BELOW
from ...planning import cost
from ...planning.cost import Phase, Problem, Work, fresh_bytes_of
from ...rules.rtrl import rows_at_once
from .question import Question

CPU = torch.device("cpu")
# The learning rule of each algorithm.
LEARNING = {
    "rfp-step": "rfp",
    "rfp-lazy": "rfp",
    "rfp-chunk": "rfp",
    "rfp-history": "rfp",
    "rfp-dual": "rfp",
    "tbptt": "tbptt",
    "bptt": "bptt",
    "bptt-autograd": "bptt",
    "rtrl": "rtrl",
    "rtrl-heads": "rtrl",
    "rtrl-block": "rtrl",
    "stream": "rfp",
}
# The online learner's forms of RFP, as algorithms; and the algorithms that need a whole sequence.
FORMS = {"step": "rfp-step", "lazy": "rfp-lazy", "chunk": "rfp-chunk", "history": "rfp-history"}
SEQUENCE = ("rfp-dual", "bptt", "bptt-autograd")
RTRL = ("rtrl", "rtrl-heads", "rtrl-block")
# Arrays of T·B·N numbers that a backward pass holds at once, beside those kept by the forward pass; and where it is one
# pass of compiled code.
BACKWARD_ARRAYS, ONE_PASS_HELD = 12, 5
# Arrays of that size that the dual form's backward pass touches; where they are large it goes by windows of time.
TOUCHED_ARRAYS = 20
# The same where the backward pass is one pass of compiled code: arrays read and arrays written.
ONE_PASS_ARRAYS = 14
# Passes over the bytes of W in one step of an eager loop under autograd, beside the two that the products of the
# forward and the backward pass read. The sum of gradients is read and written. Each new gradient, of one matrix at a
# time, is written where the one before was, and read right away: these passes are near, in a cache.
EAGER_PASSES, EAGER_NEAR_PASSES = 2.0, 2.0
# A `Stream`'s step takes this share of the time of a pass over Γ and the weights in the last cache, since parts of them
# are in nearer ones; and this share of a call, whatever the size. Both fitted to stream-cpu.jsonl, one core of an AMD
# EPYC, SGD.
STREAM_PASSES, STREAM_CALLS = 0.7, 0.3
# What a compiled layer's call and its backward pass under autograd take beside the compiled code, whatever the size.
# Fitted to scaling-one-thread-cpu.jsonl, N = 16 to 64.
LAYER_CALL = Work(calls=60, views=30)
# Passes over γ in one step: its product reads and writes it, and the gradient reads it. With heads each piece goes
# through a small buffer, which is written and read (near passes).
RTRL_PASSES, RTRL_NEAR_PASSES = 3.0, 2.0


class Model:
    """The cost of every algorithm for one layer and its sizes, on one kind of device.

    problem: N, B and what is counted of the layer. steps T, None for a stream; chunk C; rewrite_every: steps after
    which "rfp-lazy" rewrites Γ. gpu: whether the device is one. block: the units of a block of "rtrl-block".
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        problem: Problem,
        steps: int | None,
        chunk: int,
        rewrite_every: int,
        *,
        gpu: bool,
        population: int = 1,
        block: int | None = None,
    ) -> None:
        self.population, self.block = population, block
        self.layer, self.problem, self.steps, self.gpu = layer, problem, steps, gpu
        self.chunk = chunk if steps is None else min(chunk, steps)
        self.rewrite_every = rewrite_every
        self.kernel = gpu and problem.item == 4
        self.compiled = not gpu and operations.choose_scan("auto", CPU, layer.weights()[0].dtype) == "compile"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a network, or of all of a population."""
        return self.population * self.problem.weight_bytes

    def needs(self, algorithm: str) -> int:
        """Bytes needed in all: peak, weights, and the weights' gradients."""
        return self.peak_bytes(algorithm) + 2 * self.weight_bytes

    # --- phases, of one time step ---

    def _forward(self, steps: int) -> Phase:
        """The forward pass: the layer's loop over a sequence."""
        problem, layer = self.problem, self.layer
        sizes = (steps, problem.batch, problem.units)
        dtype = layer.weights()[0].dtype
        recurrent = list(layer.recurrent_weights())
        told = parallel.forward_problem(layer.cell, recurrent, sizes, dtype, self.kernel, self.compiled)
        work = told.sequential() * (1 / steps)
        own = sum(weight.numel() for weight in layer.weights()) - told.weight_numbers
        # the weights that read the input take one product over all steps
        rest = Work(flop=2.0 * problem.batch * own, bytes=own * problem.item / steps)
        joined = Work(bytes=2.0 * told.weight_numbers * told.item / steps)
        if problem.loop:
            work += LAYER_CALL * (1 / steps)
        return Phase("forward", work + rest + joined, self.weight_bytes)

    def _outer(self, steps: int) -> Work:
        """The gradients Σ E yᵀ over a sequence, with the linearization and the elementwise products that make E."""
        problem = self.problem
        return (
            problem.linearize(steps) + problem.pointwise(problem.calls.outer, steps) + self._products(steps)
        )

    def _products(self, steps: int) -> Work:
        """The matrix products Σ E yᵀ over a sequence alone."""
        problem, count = self.problem, max(1, len(self.problem.fan_ins))
        work = Work(flop=2.0 * problem.batch * problem.weight_numbers * steps, bytes=self.weight_bytes)
        return work + Work(fresh_bytes=fresh_bytes_of(self.weight_bytes / count, count))

    def _touched(self, steps: int, *, one_pass: bool = False) -> float:
        numbers = steps * self.problem.batch * self.problem.units
        large, window = functional.LARGE[one_pass]
        if not self.gpu and numbers > large:
            numbers = window
        return float((ONE_PASS_ARRAYS if one_pass else TOUCHED_ARRAYS) * numbers * self.problem.item)

    def _credits(self, steps: int) -> Phase:
        """BPTT's credits: one product for each matrix and step."""
        problem = self.problem
        w = sum(weight.numel() for weight in self.layer.recurrent_weights()) * problem.item
        work = problem.exact(steps) * (1 / steps)
        work += Work(flop=2.0 * problem.batch * w / problem.item, matrix_bytes=float(w))
        return Phase("credits", work, float(w))

    def _dual(self) -> list[Phase]:
        steps, problem = self._length(), self.problem
        if problem.partials:  # one product for all recurrent matrices, one for each of the others
            count = 1 + len(self.layer.matrices) - len(self.layer.cell.matrices)
            work = problem.dual(steps) + self._products(steps) + Work(calls=count)
            phase = Phase("gradient", work * (1 / steps), self._touched(steps, one_pass=True))
            return [self._forward(steps), phase]
        work = self._outer(steps)
        if self.kernel:
            work += cost.scan_work(problem.states, steps, problem.batch * problem.units, problem.item, True)
        else:
            work += problem.credit(steps)
        return [self._forward(steps), Phase("gradient", work * (1 / steps), self._touched(steps))]

    def _bptt(self) -> list[Phase]:
        steps, problem = self._length(), self.problem
        # Compiled, it is the dual form's pass with a product at each step. The weights are packed first, and then read
        # in order.
        if problem.loop:
            _, gradient = self._dual()
            w = sum(weight.numel() for weight in self.layer.recurrent_weights()) * problem.item
            products = Work(flop=2.0 * problem.batch * w / problem.item, bytes=w + 2.0 * w / steps)
            return [self._forward(steps), Phase("credits", products, float(w)), gradient]
        outer = Phase("gradient", self._outer(steps) * (1 / steps), self._touched(steps))
        return [self._forward(steps), self._credits(steps), outer]

    def _eager(self) -> list[Phase]:
        steps, problem = self._length(), self.problem
        count = max(1, len(self.layer.cell.matrices))
        w = sum(weight.numel() for weight in self.layer.recurrent_weights()) * problem.item
        work = problem.pointwise(problem.calls.eager.at(steps) * (1 / steps))
        work += Work(
            flop=6.0 * problem.batch * w / problem.item,
            bytes=EAGER_PASSES * w,
            matrix_bytes=2.0 * w,
            fresh_bytes=fresh_bytes_of(w / count, count),
        )
        near = Phase("new gradients", Work(bytes=EAGER_NEAR_PASSES * w), w / count)
        return [Phase("loop and its backward", work, (2 + 1 / count) * w), near]

    def _tbptt(self) -> list[Phase]:
        outer = self._outer(self.chunk) * (1 / self.chunk)
        return [
            cost.loop_phase(self.problem, self.chunk),
            self._credits(self.chunk),
            Phase("gradient", outer, self._touched(self.chunk) + self.weight_bytes),
        ]

    def _rtrl(self, algorithm: str) -> list[Phase]:
        problem, head = self.problem, self._head(algorithm)
        gamma = float(problem.states * head * problem.batch * problem.weight_bytes)
        blocks = problem.batch * problem.units // head
        counted = problem.calls.rtrl if head == problem.units else problem.calls.rtrl_heads
        work = problem.pointwise(counted) + Work(
            flop=2.0 * problem.batch * (problem.states * head) ** 2 * problem.weight_numbers
            + 2.0 * problem.batch * problem.weight_numbers,
            bytes=RTRL_PASSES * gamma + problem.weight_bytes,
        )
        spare = gamma if blocks == 1 else gamma * rows_at_once(blocks) / blocks
        phases = [Phase("γ and gradient", work, gamma + spare)]
        if blocks > 1:
            phases.append(Phase("pieces of γ", Work(bytes=RTRL_NEAR_PASSES * gamma), 2 * spare))
        return phases

    def _stream(self) -> list[Phase]:
        """A step of a `Stream` by compiled code, with SGD: one pass over Γ and the weights."""
        problem = self.problem
        touched = self.population * float(problem.gamma_bytes + problem.weight_bytes)
        work = Work(calls=STREAM_CALLS * self.population, bytes=2.0 * STREAM_PASSES * touched)
        return [Phase("pass over Γ and weights", work, touched)]

    def _length(self) -> int:
        assert self.steps is not None
        return self.steps

    def phases(self, algorithm: str) -> list[Phase]:
        """The phases of one time step of an algorithm, as `bench.scaling.cases` and `OnlineLearner` run it.

        "rtrl" and "rtrl-heads" have the heads of the model's own layer; "rtrl-block" has the model's blocks.
        """
        forms = {name: form for form, name in FORMS.items()}
        if algorithm in forms:
            at_least_2 = max(2, self.chunk)
            found = cost.form_costs(self.problem, at_least_2, self.steps, cost.CPU, self.rewrite_every)
            return list(next(one.phases for one in found if one.form == forms[algorithm]))
        made: dict[str, Callable[[], list[Phase]]] = {
            "rfp-dual": self._dual,
            "bptt": self._bptt,
            "bptt-autograd": self._eager,
            "tbptt": self._tbptt,
            "stream": self._stream,
            **{name: functools.partial(self._rtrl, name) for name in RTRL},
        }
        return made[algorithm]()

    def _head(self, algorithm: str) -> int:
        """The units among which RTRL's sensitivities are dense."""
        head = self.problem.units // (self.layer.heads or 1)
        return self.block or head if algorithm == "rtrl-block" else head

    # --- bytes ---

    def state_bytes(self, algorithm: str) -> int:
        """Bytes of learning state, kept from one gradient to the next; online with the layer's own states."""
        problem = self.problem
        own = problem.layer_state_bytes
        if algorithm in ("rfp-step", "rfp-chunk"):
            return problem.gamma_bytes + own
        if algorithm == "stream":
            return self.population * (problem.gamma_bytes + own)
        if algorithm == "rfp-lazy":
            return problem.gamma_bytes + problem.grown_bytes(self.rewrite_every - 1) + own
        if algorithm == "rfp-history":
            return problem.grown_bytes(self._length()) + own
        if algorithm == "tbptt":
            return own
        if algorithm in RTRL:
            return problem.states * self._head(algorithm) * problem.batch * problem.weight_bytes + own
        cell = self.layer.cell
        kept = (
            problem.calls.eager_kept if algorithm == "bptt-autograd" else len(cell.states) + len(cell.gates)
        )
        return kept * self._length() * problem.batch * problem.units * problem.item

    def peak_bytes(self, algorithm: str) -> int:
        """The most bytes at once: state, new gradients, temporary arrays. Weights and summed gradients don't count."""
        problem, w = self.problem, self.weight_bytes
        state = self.state_bytes(algorithm)
        if algorithm in SEQUENCE:
            one_pass = algorithm != "bptt-autograd" and problem.loop
            arrays = ONE_PASS_HELD if one_pass else BACKWARD_ARRAYS
            return state + arrays * self._length() * problem.batch * problem.units * problem.item + w
        if algorithm in RTRL:
            head = self._head(algorithm)
            blocks = problem.batch * problem.units // head
            gamma = state - problem.layer_state_bytes
            jacobian = problem.batch * problem.units * head * problem.states**2 * problem.item
            return (
                state + gamma * (1 if blocks == 1 else rows_at_once(blocks)) // max(1, blocks) + w + jacobian
            )
        if algorithm == "tbptt":
            return state + 2 * problem.window_bytes(self.chunk) + w
        if algorithm == "rfp-history":
            return 2 * state + w
        if algorithm == "stream":  # of one batch row and few units, a call works on a copy of Γ and weights
            return 2 * state + w if problem.batch == 1 and problem.units < PANELS_BELOW else state
        temporaries = 0
        if problem.runs == "torch":  # torch works on a block of batch rows of Γ^ν at a time
            rows = min(problem.batch, max(1, (1 << 20) // max(1, problem.weight_numbers)))
            temporaries = 6 * rows * w
        if algorithm == "rfp-chunk":
            return state + 2 * problem.window_bytes(self.chunk) + 2 * w + temporaries
        if algorithm == "rfp-lazy":
            return state + 2 * problem.grown_bytes(self.rewrite_every) + 2 * w + temporaries
        return state + problem.window_bytes(1) + w + temporaries


def model_of(
    question: Question, batch: int, rates: cost.Rates, *, gpu: bool, heads: int | None = None
) -> Model:
    """The model of a question's layer, with its own batch and number of heads, at a device's rates."""
    layer = question.layer(heads)
    problem = counting.problem(layer, batch, question.kept_in, gpu=gpu)
    every = cost.rewrite_every(problem, rates)
    return Model(
        layer,
        problem,
        question.steps,
        question.chunk,
        every,
        gpu=gpu,
        population=question.population,
        block=question.block,
    )
