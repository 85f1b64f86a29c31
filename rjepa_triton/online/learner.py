"""Online learning: a layer that runs step by step, or in chunks, and learns while it does."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks as check
from .._device import autocast_is_on, available_bytes, without_autocast
from ..backends import dispatch as ops
from ..cells.two_point import Matrix
from ..layers.layer import TwoPointRNN
from ..planning import cost
from ..rules import refine as refinement
from ..rules import rfp, rtrl
from ..rules.exactness import Exactness, exactness
from .counting import problem as problem_of
from .cuda_graph import Capture, Graphed, GraphedStep
from .cuda_graph import cuda_graph as capture_cuda_graph
from .past import FullCredit, Past, Record
from .sensitivity import Carried, Exact, Nothing, PerUnit, RankOne
from .tape import Block, recorded

Form = Literal["auto", "step", "lazy", "chunk", "history"]
FORMS = ("auto", "step", "lazy", "chunk", "history")
Learning = Literal["rfp", "eprop", "rflo", "snap0", "rtrl", "uoro", "tbptt"]
LEARNING = (*rfp.RULES, "rtrl", "uoro", "tbptt")
# The one form of the rules that have only one.
ONLY_FORM = {"rtrl": "step", "uoro": "step", "tbptt": "chunk"}
# Learners by their numbers, for the operators that torch.compile sees.
LEARNERS: weakref.WeakValueDictionary[int, OnlineLearner] = weakref.WeakValueDictionary()
_numbers = itertools.count()
GAMMA_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class OnlineLearner:
    """Runs a recurrent layer on a stream and gives its weights their gradient in the loss's own backward().

        learner = OnlineLearner(layer, batch_size)
        for x_t, target in stream:
            s_t = learner.step(x_t)
            loss(s_t, target).backward()          # adds to layer.weight_ss.grad, …, and to what made x_t
            optimizer.step(); optimizer.zero_grad()

    Or with lr=0.01, and no optimizer for the layer: backward() takes its weights' step of SGD in the pass over Γ that
    finds their gradient, which never goes to memory then.

    RFP's gradient is Σ_{b,ν} δ^ν(t) ⊙_rows Γ^{ν,k}(t) (paper, eq. 4 and 14; `docs/math.md`): exact for a
    diagonal layer, an approximation for a dense one (`docs/exactness.md`). Weights may change after any
    backward() (with form "chunk", at a chunk's end): each step's Γ is advanced with the weights that step ran
    with. All forms give one gradient; `learning`, `credit` and `refine` change it.

    What goes on to x is the step's instantaneous gradient or, within one chunk() call, the credit of that
    call's later steps as well. What earlier inputs did is in Γ, for the weights alone.

    Args:
        layer: the recurrent layer; its state is the learner's, zero at first.
        batch_size: B, rows that run side by side.
        learning: what is carried forward of the past; None: the layer's own rule.
            "rfp"    Γ, the sensitivity of the unit that a weight enters
            "eprop", "rflo", "snap0"   the same with parts of M dropped (`reference.rfp.transition`)
            "rtrl"   γ, of every unit of the weight's head: exact; S·b·B·Σ_k N·M_k numbers, b units a head
            "uoro"   a random product that is γ on average (`sensitivity.RankOne`): unbiased, noisy
            "tbptt"  nothing: BPTT truncated at the chunk's beginning
        update_every: C ≥ 1, steps between changes of the weights.
        form: "step", "lazy" (Γ read at every step, rewritten at every R-th), "chunk" (needs update_every ≥ 2,
            unless credit is "carry"), "history" (memory grows until reset), or "auto". "rtrl" and "uoro" have
            "step" alone, "tbptt" "chunk".
        rewrite_every: R ≥ 1 of form "lazy"; None: what the cost model takes (`cost.rewrite_every`).
        credit: how credit passes back within a chunk. "own": by each unit's own M, as Γ is advanced. "carry",
            with form "chunk": by the full Jacobian, from the chunk's steps to one another and to Γ: truncated
            BPTT that doesn't forget what lies before the chunk.
        refine: with credit "carry", rounds of refinement that find that credit in place of the exact
            sequential backward, or "exact" (`reference.refine`); r ≥ 1 implies "carry".
        lag: 0, or 1 for losses that compare s(t-1) with s(t): how many steps before the current one a loss
            may still reach.
        gamma_dtype: what Γ is kept in, float32 or bfloat16; a float64 layer keeps float64 for float32.
        gamma_rounding: how Γ in bfloat16 is rounded, in form "step": to "nearest", or "stochastic", right in the
            mean over seeds, which is better where memory lasts 500 steps or more and what enters has a mean, as
            a bias's y = 1 has, and a little worse elsewhere. A learner draws the same bits on every run; Triton
            and torch draw from one distribution, but not the same bits.
        horizon: steps between resets, if known: lets "auto" consider "history".
        backend: of the Γ recursion, and of loops over time: "torch", "compile" (CPU), "triton" (GPU), or "auto"
            (`ops.choose_gamma`, `ops.choose_scan`).
        seed: of the random signs of "uoro", and of stochastic rounding.
        cuda_graph: run each step, and its backward, as a CUDA graph, so that small layers don't wait for kernel
            launches. For a layer on a GPU, form "step", lag 0, and rules that carry Γ; step by step (no chunk()),
            one backward() a step, and the layer's parameters must keep their storage.
        lr: η ≥ 0 of plain SGD, W ← W - η ∂E/∂W, which backward() takes itself of those of the layer's weights() that
            require a gradient: their `.grad` stays as it is, hooks on it aren't called, and what else in the graph
            depends on them goes to `.grad` as ever. The input's gradient is that of the weights before. Form "step",
            lag 0, update_every 1, contiguous weights; not under torch.compile. `learner.lr` may be set at any time.
            None: gradients go to `.grad`.

    Under autocast the layer and its learning run in the parameters' own dtype.

    step(), chunk(), reset() and backward() mutate the learner's state and Γ; with lr alone, backward() the weights.

    Raises:
        TypeError, ValueError: an argument out of its range, naming it; a combination that can't be, naming the
            nearest that can; sensitivities that don't fit in memory.
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        batch_size: int,
        *,
        learning: Learning | None = None,
        update_every: int = 1,
        form: Form = "auto",
        rewrite_every: int | None = None,
        credit: Literal["own", "carry"] = "own",
        refine: int | Literal["exact"] = 0,
        lag: int = 0,
        gamma_dtype: torch.dtype = torch.float32,
        gamma_rounding: Literal["nearest", "stochastic"] = "nearest",
        horizon: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        cuda_graph: bool = False,
        lr: float | None = None,
    ) -> None:
        if not isinstance(layer, TwoPointRNN):
            raise TypeError(f"layer must be a recurrent layer such as RGC, got {type(layer).__name__}")
        self.layer = layer
        self.batch_size = check.integer("batch_size", batch_size, 1)
        self.update_every = check.integer("update_every", update_every, 1)
        check.one_of("form", form, FORMS)
        if check.integer("lag", lag, 0) > 1:
            raise ValueError(f"lag must be 0 or 1, got {lag}")
        self.horizon = None if horizon is None else check.integer("horizon", horizon, 1)
        if gamma_dtype not in GAMMA_DTYPES:
            wanted = ", ".join(map(str, GAMMA_DTYPES))
            raise TypeError(f"gamma_dtype must be one of {wanted}, got {gamma_dtype}")
        self.learning = _learning(layer, learning)
        self.credit, self._rounds = _credit(self.learning, credit, refine)
        self._refine = refine
        form = _form(self.learning, self.credit, form, self.update_every)
        if rewrite_every is not None and form != "lazy":
            raise ValueError(f"rewrite_every goes with form='lazy', got form={form!r}")
        self.gamma_rounding = gamma_rounding
        check.one_of("gamma_rounding", gamma_rounding, ("nearest", "stochastic"))
        if gamma_rounding == "stochastic":
            form = _form_of_stochastic(self.learning, form, gamma_dtype)
        weights = layer.weights()
        if lr is not None:
            form = _form_of_lr(form, lag, self.update_every, layer.matrices, weights)
        check.floating("layer", weights[0], (torch.float64, torch.float32))
        for matrix, weight in zip(layer.matrices, weights, strict=True):
            check.finite(f"layer's {matrix.name}", weight)
        dtype, device = weights[0].dtype, weights[0].device
        if (dtype, gamma_dtype) == (torch.float64, torch.float32):
            gamma_dtype = torch.float64

        self._problem = problem_of(layer, batch_size, gamma_dtype, gpu=device.type == "cuda")
        if backend in ("torch", "compile", "triton"):  # asked for; what can't run is refused below
            self._problem = replace(self._problem, runs=backend)
        self._available = available_bytes(device)
        rates = cost.rates_of(device, dtype)
        self._asked_rewrite = rewrite_every
        if rewrite_every is None:
            rewrite_every = cost.rewrite_every(self._problem, rates)
        rewrite_every = check.integer("rewrite_every", rewrite_every, 1)
        self._costs = cost.form_costs(self._problem, update_every, self.horizon, rates, rewrite_every)
        if form == "auto" and cuda_graph:  # the one that can be captured
            form = "step"
        self._asked = form
        self.form = cost.cheapest(self._costs, self._available).form if form == "auto" else form
        heads = rtrl.joint_heads([w.detach() for w in layer.recurrent_weights()], layer.hidden_size)
        self.carried_bytes = self._problem.carried_bytes(self.learning, layer.hidden_size // heads)
        sensitivity: Carried | None = None
        scan = ops.choose_scan("auto" if backend == "compile" else backend, device, dtype)
        if self.form != "history":
            self._refuse_if_too_large(device)
            sizes = (layer.matrices, weights, self._problem.states, batch_size)
            if self.learning == "rtrl":
                sensitivity = Exact(layer.cell, *sizes, scan)
            elif self.learning == "uoro":
                sensitivity = RankOne(*sizes, seed)
            elif self.learning == "tbptt":
                sensitivity = Nothing(weights)
            else:
                drawn = seed if gamma_rounding == "stochastic" else None
                sensitivity = PerUnit(*sizes, gamma_dtype, backend, drawn)
        self._full = self.credit == "carry" or self.learning in ONLY_FORM
        full_credit = _full_credit(layer, self._rounds, scan) if self._full else None
        every = rewrite_every if self.form == "lazy" else 1
        self._past = Past(layer.matrices, self.form, lag, sensitivity, every, scan, full_credit)
        # The recurrent weights of the chunk that runs, where credit takes the full Jacobian.
        self._chunk_weights: tuple[Tensor, ...] | None = None
        self._state = weights[0].detach().new_zeros(self._problem.states, batch_size, layer.hidden_size)
        self._forget: Tensor | None = None  # rows to forget when the next step begins, (B,) bool
        self._forget_all = False
        self._position = 0  # steps that step() has made of the update_every between two updates
        self._versions: tuple[int, ...] = ()  # of the weights when that chunk began
        self.number = next(_numbers)
        LEARNERS[self.number] = self
        # Goes from each call of the operator to the next, so that torch.compile neither joins nor reorders two of them.
        self._clock = torch.zeros((), dtype=torch.int64)
        self._calls: dict[
            int, _Call
        ] = {}  # of operators, by time of their last step, while a loss may reach them
        self._lr: Tensor | None = None
        if lr is not None:
            self._lr = weights[0].detach().new_zeros(1)  # where a captured step reads it
            self.lr = lr
        self._graph: GraphedStep | None = None
        if cuda_graph:
            if device.type != "cuda":
                raise ValueError(f"cuda_graph=True needs a layer on a CUDA or ROCm device, got {device}")
            self._graph = self._graphed(capture=capture_cuda_graph)
        # The last step's credit port, for the next step of its chunk. Held here and not in `_past`, which
        # graphs refer to: a graph that reached itself would never be freed.
        self._token: Tensor | None = None

    def _graphed(self, capture: Capture) -> GraphedStep:
        """The steps as graphs; raise where they can't be."""
        carried = self._past.sensitivity
        if self.form != "step" or self.lag or not isinstance(carried, PerUnit):
            raise ValueError(
                f"cuda_graph=True goes with form='step', lag=0 and a rule of {', '.join(rfp.RULES)}, "
                f"got form={self.form!r}, lag={self.lag}, learning={self.learning!r}"
            )
        return GraphedStep(
            self.layer, carried, self._state, self.learning, self._past.scan_backend, self._lr, capture
        )

    def _refuse_if_too_large(self, device: torch.device) -> None:
        need, per_step = self.carried_bytes, self._problem.window_bytes(1)
        if self._available is not None and need > self._available:
            raise ValueError(
                f"learning={self.learning!r} in form={self.form!r} carries sensitivities of {need:,} bytes, and "
                f"{device} has {self._available:,} left; with learning='rfp' "
                f"form='history' takes {per_step:,} bytes for each step since reset, "
                f"so up to {self._available // per_step:,} steps"
            )

    @property
    def lr(self) -> float | None:
        """η of the step of SGD that backward() takes; None where gradients go to `.grad`."""
        return None if self._lr is None else float(self._lr)

    @lr.setter
    def lr(self, value: float) -> None:
        if self._lr is None:
            raise ValueError(
                f"lr can't be set to {value} in a learner that was made without: OnlineLearner(..., lr=…)"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"lr must be a finite number ≥ 0, got {value!r}")
        self._lr.fill_(value)

    @property
    def lag(self) -> int:
        """How many steps before the current one a loss may still reach."""
        return self._past.lag

    @property
    def rewrite_every(self) -> int:
        """R, steps that are kept before they are folded into Γ; 1 but for form "lazy"."""
        return self._past.rewrite_every

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The layer's S states now, (B, N) each, detached."""
        return self._state.unbind(0)

    @property
    def nbytes(self) -> int:
        """Bytes of learning state now: Γ, the window or history, and the layer's state."""
        return self._past.nbytes + self._state.numel() * self._state.element_size()

    def step(self, x: Tensor) -> Tensor:
        """Advance one step. x (B, F) → the layer's output (B, N), F its input features.

        Call backward() on a loss of s before the next step() (form "step"), or at the latest at the end of
        the update_every steps it is of (forms "lazy", "chunk", "history"). Raises TypeError or ValueError for x;
        ValueError, with nothing changed, if the weights changed inside a chunk.
        """
        if isinstance(x, Tensor) and autocast_is_on(x.device):
            with without_autocast(x.device):
                return self.step(x.to(self._state.dtype))
        self._check_input(x, (self.batch_size,))
        if torch.compiler.is_compiling():
            if self.form == "chunk":
                raise ValueError("under torch.compile form='chunk' goes by chunk(), got step()")
            return self._by_operator(x[None], None)[0]
        if self._graph is not None:
            shown = Graphed.apply(self._graph, self._forget, x, *self.layer.weights())
            self._forget, self._forget_all = None, False
            return self.layer.readout(shown, x)
        if self.form == "step":
            return self._run(x[None], None, None)[0][0]
        if self.form == "chunk":
            self._check_chunk_weights()
        output, token = self._run(x[None], None, self._token)
        self._position = (self._position + 1) % self.update_every
        self._past.filling = self._position > 0
        self._token = token if self._position and self.form == "chunk" else None
        return output[0]

    def chunk(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """Advance C steps with the weights as they are. x (C, B, F) → outputs (C, B, N), any C ≥ 1.

        resets (C, B) bool or None: a new episode starts at that step. Call backward() on one loss of them, or of
        all its parts, before the next call. Raises TypeError or ValueError for x and resets.
        """
        if isinstance(x, Tensor) and autocast_is_on(x.device):
            with without_autocast(x.device):
                return self.chunk(x.to(self._state.dtype), resets)
        if self._graph is not None:
            raise ValueError("chunk() can't go with cuda_graph=True, which captures one step: call step()")
        self._check_input(x, ("C", self.batch_size))
        if resets is not None:
            resets = check.mask("resets", resets, tuple(x.shape[:2]), x.device)
        if torch.compiler.is_compiling():
            return self._by_operator(x, resets)
        self._position, self._token, self._past.filling = 0, None, False
        return self._run(x, resets, None)[0]

    def _check_input(self, x: Tensor, leading: tuple[int | str, ...]) -> None:
        check.shape("x", check.tensor("x", x), (*leading, self.layer.fan_in), "to match the learner")
        weight = self.layer.weights()[0]
        check.like("x", x, "the layer", weight)
        check.like("the layer", weight, "the learner", self._state)

    def _check_chunk_weights(self) -> None:
        versions = tuple(weight._version for weight in self.layer.weights())
        if self._position and versions != self._versions:
            raise ValueError(
                f"weights changed inside a chunk, after step {self._position} of update_every="
                f"{self.update_every}; change them after its last step, or use form='step'"
            )
        self._versions = versions

    def _run(self, x: Tensor, resets: Tensor | None, link: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Outputs (C, B, N) of x (C, B, F), and the port that credit from later in the chunk enters by, if any."""
        resets = self._prepare(x, resets)
        token, *shown = _Steps.apply(self, resets, x, link, *self.layer.weights())
        return self.layer.readout(shown, x), token

    def advance(
        self, x: Tensor, resets: Tensor | None, linked: bool, weights: Sequence[Tensor]
    ) -> tuple[_Call, list[Tensor]]:
        """Run steps from the state on and record them.

        Returns the call, and the cell's outputs (C, B, N) each.
        """
        layer, past, cell = self.layer, self._past, self.layer.cell
        recurrent = weights[: len(cell.matrices)]
        x = x.clone()  # callers may write the next input where this one was
        readers = [w for k, w in zip(layer.matrices, weights, strict=True) if k.reads == "input"]
        after, block = recorded(
            cell,
            layer.drive(x),
            recurrent,
            self._state,
            resets,
            x if readers else None,
            self.learning if self.learning in rfp.RULES else "rfp",
            self._chunk_weights,
            past.scan_backend,
        )
        record = past.add(block, len(cell.inputs), linked)
        # the caller's own: the window goes on reading the states
        shown = [after[nu].clone() for nu in cell.outputs]
        self._state = after[:, -1].clone()
        return _Call(layer, past, record, readers, self._lr), shown

    def _prepare(self, x: Tensor, resets: Tensor | None) -> Tensor | None:
        """Before new steps: make room for them, keep the weights if they are needed; resets with those due."""
        self._past.make_room(self._forget, self._forget_all)
        if self._forget is not None:
            marks = x.new_zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets.clone()
            marks[0] |= self._forget
            resets = marks
        if self._full and (self.form == "step" or self._position == 0 or self._chunk_weights is None):
            self._chunk_weights = tuple(weight.detach().clone() for weight in self.layer.recurrent_weights())
        self._forget, self._forget_all = None, False
        return resets

    def _by_operator(self, x: Tensor, resets: Tensor | None) -> Tensor:
        """Outputs (C, B, N) of x (C, B, F) by the operator that torch.compile takes as it is."""
        if self._lr is not None:
            raise ValueError("lr can't go under torch.compile, which must know of weights that change")
        weights = list(self.layer.weights())
        made = torch.ops.rjepa_triton.learner_steps(self.number, x, resets, weights, self._clock)
        *shown, self._clock = made
        return self.layer.readout(shown, x)

    def operate(self, x: Tensor, resets: Tensor | None) -> tuple[list[Tensor], int]:
        """What the operator `learner_steps` does: the cell's outputs (C, B, N) of x (C, B, F), and their time."""
        self._position, self._token, self._past.filling = 0, None, False
        resets = self._prepare(x, resets)
        call, shown = self.advance(x, resets, False, self.layer.weights())
        self._calls[call.record.end] = call
        while len(self._calls) > 1 + self.lag:
            del self._calls[next(iter(self._calls))]
        return shown, call.record.end

    def operator_gradients(self, time: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """What the operator `learner_gradients` does: of x (C, B, F) and of the weights."""
        if time not in self._calls:
            raise RuntimeError(
                f"backward of step {time} comes too late: call backward() before the steps after it"
            )
        for_x, _, gradients = self._calls[time].gradients(grads, None, True)
        assert for_x is not None
        return [for_x, *(gradient for gradient in gradients if gradient is not None)]

    def reset(self, mask: Tensor | None = None) -> None:
        """Start a new episode at the next step in the rows where mask (B,) is True, or in all.

        The state of those rows is zero at once; their sensitivities are forgotten when the next step begins,
        so a backward() of the step before is still served. Raises TypeError or ValueError for mask.
        """
        if mask is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self._state.device)
        else:
            rows = check.mask("mask", mask, (self.batch_size,), self._state.device)
        # in place for the graph, which reads it where it is
        self._state = (
            self._state.masked_fill(rows[:, None], 0)
            if self._graph is None
            else self._state.masked_fill_(rows[:, None], 0)
        )
        self._forget = rows.clone() if self._forget is None else self._forget | rows
        self._forget_all |= mask is None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed learner needs, as tensors, numbers, strings and lists; shared, not copied.

        Graphs are not kept: the backward() of a step made before can't be had from the resumed learner.
        """
        if self._graph is not None:
            self._graph.fold()
        return {
            "form": self.form,
            "learning": self.learning,
            "credit": self.credit,
            "gamma_rounding": self.gamma_rounding,
            "batch_size": self.batch_size,
            "state": self._state,
            "position": self._position,
            "forget": self._forget,
            "forget_all": self._forget_all,
            **self._past.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where the learner that made `state` was.

        Raises TypeError or ValueError, with nothing changed, if it is of another form, rule, rounding, batch size
        or layer.
        """
        self.refuse_foreign(state)
        self._past.load_state_dict(state)
        if self._graph is None:
            self._state = state["state"].clone()
        else:
            self._state.copy_(state["state"])
        self._position, self._token, self._chunk_weights = state["position"], None, None
        self._versions = tuple(weight._version for weight in self.layer.weights())
        self._forget = None if state["forget"] is None else state["forget"].clone()
        self._forget_all = state["forget_all"]

    def refuse_foreign(self, state: dict[str, Any]) -> None:
        """Raise TypeError or ValueError if `load_state_dict` could not take `state`."""
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict from state_dict(), got {type(state).__name__}")
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"state must have the keys {sorted(own)}, got {sorted(map(str, state))}")
        for name in ("form", "learning", "credit", "gamma_rounding", "batch_size"):
            if state[name] != own[name]:
                raise ValueError(f"state's {name} must be the learner's, {own[name]!r}, got {state[name]!r}")
        if len(state["gamma"]) != len(own["gamma"]):
            raise ValueError(
                f"state's gamma must have {len(own['gamma'])} tensors, got {len(state['gamma'])}"
            )
        pairs = {"state": (state["state"], own["state"])}
        for i, pair in enumerate(zip(state["gamma"], own["gamma"], strict=True)):
            pairs[f"gamma[{i}]"] = pair
        for name, (got, want) in pairs.items():
            check.shape(f"state's {name}", check.tensor(f"state's {name}", got), tuple(want.shape))
            check.like(f"state's {name}", got, "the learner", want)

    def exactness(self) -> Exactness:
        """Whether the gradient is exact, and why or why not: print it, or use it as a condition."""
        weights = self.layer.recurrent_weights()
        return exactness(self.layer.cell, weights, self.learning, self._refine, self.credit)

    def explain(self) -> None:
        """Print what each form would cost by the cost model, and which one runs and why."""
        problem, rates = self._problem, cost.rates_of(self._state.device, self._state.dtype)
        print(
            f"{type(self.layer).__name__}: N = {problem.units}, B = {problem.batch}, "
            f"{len(problem.fan_ins)} matrices, update_every = {self.update_every}, "
            f"horizon = {self.horizon or 'unbounded'}, learning = {self.learning!r}, credit = {self.credit!r}"
        )
        if self.learning in ONLY_FORM:
            print(
                f"carried: {self.carried_bytes:,} bytes; form = {self.form!r}, the only one of {self.learning!r}"
            )
            return
        print(
            f"predicted at {rates.bytes_per_second:.0e} bytes/s, {rates.flop_per_second:.0e} FLOP/s, "
            f"{rates.seconds_per_call * 1e6:.0f} µs a call, {rates.name}:"
        )
        for each in self._costs:
            print(
                f"  {each.form:8} {each.seconds * 1e6:12,.1f} µs a step  {each.state_bytes:16,} bytes  "
                f"{each.because}"
            )
        print(f"form = {self.form!r}: {self._why()}")
        if self.form == "lazy":
            why = "by the cost model" if self._asked_rewrite is None else "asked for"
            print(f"rewrite_every = {self.rewrite_every}: {why}")
        if isinstance(self._past.sensitivity, PerUnit):
            for group in self._past.sensitivity.groups:
                names = ", ".join(matrix.name for matrix in group.matrices)
                print(f"backend of {names}: {group.backend} ({group.why})")

    def _why(self) -> str:
        if self._asked != "auto":
            return "asked for"
        chosen = next(each for each in self._costs if each.form == self.form)
        if self._available is not None and chosen.state_bytes > self._available:
            return "no form fits in memory; this one takes the least"
        lazy = next(each for each in self._costs if each.form == "lazy")
        fits = self._available is None or lazy.state_bytes <= self._available
        if fits and lazy.seconds < chosen.seconds:
            return f"'lazy' is taken only where predicted {cost.LAZY_MARGIN} times as fast as any other that fits"
        return "the fastest that fits in memory"


def _learning(layer: TwoPointRNN, learning: str | None) -> str:
    """The rule that runs; the layer's own if `learning` is None."""
    name = "the layer's learning" if learning is None else "learning"
    chosen = layer.learning if learning is None else learning
    if chosen == "bptt":
        raise ValueError(
            f"{name}='bptt' needs the whole sequence, and a learner has none: the nearest online are learning='tbptt', "
            "form='chunk' with credit='carry', and the exact 'rtrl'"
        )
    check.one_of(name, chosen, LEARNING)
    return chosen


def _credit(learning: str, credit: str, refine: object) -> tuple[str, int | None]:
    """How credit passes within a chunk, and rounds of refinement: 0 for the sequential backward."""
    check.one_of("credit", credit, ("own", "carry"))
    if refine != "exact":
        if isinstance(refine, str):
            raise ValueError(f"refine must be a number of rounds or 'exact', got {refine!r}")
        check.integer("refine", refine, 0)
    if refine:
        credit = "carry"
    if credit == "carry" and learning != "rfp":
        asked = f"refine={refine!r}" if refine else "credit='carry'"
        raise ValueError(
            f"{asked} goes with learning='rfp', whose Γ brings in the past, got learning={learning!r}"
            + (", which is exact without" if learning == "rtrl" else "")
        )
    return credit, None if refine == "exact" else int(refine)  # type: ignore[call-overload]


def _form(learning: str, credit: str, form: str, update_every: int) -> Form:
    """The form asked for, or the only one that serves; raise where it can't."""
    only = "chunk" if credit == "carry" else ONLY_FORM.get(learning)
    if only is not None:
        if form not in ("auto", only):
            asked = "credit='carry'" if credit == "carry" else f"learning={learning!r}"
            raise ValueError(f"{asked} has form={only!r} alone, got form={form!r}; form='auto' takes it")
        return only  # type: ignore[return-value]
    if form == "chunk" and update_every == 1:
        raise ValueError(
            "form='chunk' needs update_every ≥ 2, the steps for which the weights stay as they are, "
            "got update_every=1; form='step' serves weights that change every step"
        )
    return form  # type: ignore[return-value]


def _form_of_stochastic(learning: str, form: str, gamma_dtype: torch.dtype) -> Form:
    """The form that rounds Γ stochastically; raise where there is no Γ, or none that is rounded so."""
    asked = "gamma_rounding='stochastic'"
    if learning not in rfp.RULES:
        raise ValueError(f"{asked} goes with a rule of {', '.join(rfp.RULES)}, got learning={learning!r}")
    if gamma_dtype != torch.bfloat16:
        raise ValueError(f"{asked} goes with gamma_dtype=torch.bfloat16, got gamma_dtype={gamma_dtype}")
    if form not in ("auto", "step"):
        raise ValueError(f"{asked} goes with form='step', which rounds Γ at every step, got form={form!r}")
    return "step"


def _full_credit(layer: TwoPointRNN, rounds: int | None, scan: str) -> FullCredit:
    """Credits by the full Jacobian: sequentially, or by rounds of refinement."""
    cell = layer.cell

    def credits(block: Block, delta: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        assert block.weights is not None
        if rounds == 0:
            return ops.exact_credits(cell, block.lin, block.weights, delta, carry, backend=scan)
        return refinement.credits(
            block.lin,
            block.m,
            cell.matrices,
            block.weights,
            delta,
            carry,
            rounds=rounds,
            scan=functools.partial(ops.reverse_scan, backend=scan),
        )

    return credits


def _form_of_lr(
    form: str, lag: int, update_every: int, matrices: Sequence[Matrix], weights: Sequence[Tensor]
) -> Form:
    """The form in which backward() may change weights; raise where it can't."""
    if form not in ("auto", "step"):
        raise ValueError(
            f"lr goes with form='step', whose weights may change at every step, got form={form!r}"
        )
    for name, value, wanted in (("lag", lag, 0), ("update_every", update_every, 1)):
        if value != wanted:
            raise ValueError(
                f"lr goes with {name}={wanted}: backward() changes the weights, got {name}={value}"
            )
    for matrix, weight in zip(matrices, weights, strict=True):
        if not weight.is_contiguous():
            raise ValueError(
                f"lr goes with contiguous weights, got {matrix.name} of strides {weight.stride()}"
            )
    return "step"


@dataclass(frozen=True)
class _Call:
    """Steps that one call has run: their record, the weights that read the layer's input, as they were, and `lr`."""

    layer: TwoPointRNN
    past: Past
    record: Record
    readers: Sequence[Tensor]
    lr: Tensor | None = None

    def gradients(
        self, grads: Sequence[Tensor | None], arrived: Tensor | None, needs_x: bool
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Of the layer's input (C, B, F), what a linked call passes on, and of the weights.

        grads: of the cell's outputs, (C, B, N) or None each; arrived (S, B, N): credit from the chunk's later calls.
        """
        before = self.record.block.lin.before
        delta = before.new_zeros(before.shape)
        for nu, grad in zip(self.layer.cell.outputs, grads, strict=True):
            if grad is not None:
                delta[nu] = grad
        weights = self.layer.weights()
        to_input = functools.partial(self.layer.input_gradient, readers=self.readers) if needs_x else None
        descent = None if self.lr is None else ops.Descent.down(weights, self.lr)
        for_x, passed, by_weight = self.past.gradients(
            self.record, weights, delta, arrived, to_input, descent
        )
        if descent is not None:
            descent.taken()
        return for_x, passed if self.record.linked else None, by_weight


class _Steps(torch.autograd.Function):
    """The node of one call: the token, None but in chunks, and the cell's outputs.

    Credit enters at the token and leaves at the link.
    """

    @staticmethod
    def forward(
        ctx: Any,
        learner: OnlineLearner,
        resets: Tensor | None,
        x: Tensor,
        link: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        linked = link is not None and link.requires_grad
        call, shown = learner.advance(x, resets, linked, weights)
        # saved so that autograd notices if they change before the backward pass
        ctx.call = replace(call, readers=()) if call.readers else call
        ctx.save_for_backward(*call.readers)
        ctx.set_materialize_grads(False)
        if learner.form != "chunk":
            return None, *shown
        return shown[0].new_zeros(1).expand_as(learner._state), *shown

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, arrived: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if arrived is None and all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs_x, _, *needs_weight = ctx.needs_input_grad[2:]
        # not looked at unless needed: a chunk's later backward comes here again, when they are freed
        call = replace(ctx.call, readers=ctx.saved_tensors) if needs_x else ctx.call
        for_x, passed, gradients = call.gradients(grads, arrived, needs_x)
        return (
            None,
            None,
            for_x,
            passed,
            *(g if need else None for g, need in zip(gradients, needs_weight, strict=True)),
        )
