"""Online learning: a layer that runs step by step, or in chunks, and learns while it does.

It is one long file because it is one class: the contract of its constructor, its steps and its state stand together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import _checks as check
from .._device import autocast_is_on, without_autocast
from ..backend import operations
from ..cells import weights as weight_ops
from ..cells.two_point import Matrix
from ..layers import functional, transforms
from ..layers.layer import State, TwoPointRNN
from ..rules import rfp
from ..rules.exactness import Exactness, exactness
from . import checkpoint
from .autograd import Input, PendingBackward, Steps
from .compiled import CompiledCalls, refuse_while_compiling
from .cuda_graph import Capture, Graphed, GraphedStep
from .cuda_graph import cuda_graph as capture_cuda_graph
from .holding import held
from .nonfinite import Watch, in_steps, watched
from .options import (
    ONLY_FORM,
    Form,
    Learning,
    Nonfinite,
    Options,
    distributed_call,
    learning_rate,
    refuse_distributed,
    refuse_fully_sharded,
    refuse_hooks,
)
from .past import Past, full_credit
from .readout import has_readout, readout
from .rows import LearnerRows
from .sensitivity import Exact, NoSensitivity, PerUnit, RankOne, Sensitivity
from .sharded import planned
from .tape import Block, joined, recorded
from .traces import by_parameter, read_rows, rows_of_steps, through_readout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class OnlineLearner(LearnerRows):
    """Runs a recurrent layer on a stream; a loss's own backward() then finds the gradients of the layer's weights.

        learner = OnlineLearner(layer, batch_size)
        for x_t, target in stream:
            s_t = learner.step(x_t)
            loss(s_t, target).backward()          # adds to layer.weight_ss.grad, …, and goes on to what made x_t
            optimizer.step(); optimizer.zero_grad()

    With lr=0.01 the layer needs no optimizer: backward() itself takes the weights' step of SGD, in the pass over Γ that
    finds their gradient, which then is never written to memory.

    RFP's gradient is Σ_{b,ν} δ^ν(t) ⊙_rows Γ^{ν,k}(t) (paper, eq. 4 and 14; `docs/math.md`): exact for a diagonal
    layer, an approximation for a dense one (`docs/exactness.md`). Weights may change after any backward(), in form
    "chunk" only at the end of a chunk: each step advances Γ with the weights that the step ran with. All forms give the
    same gradient; `learning`, `credit` and `refine` change it.

    When backward() may be called is the same in all forms that "auto" chooses from:

    - after each step() and before the next;
    - with update_every = C, also after the last of the C steps and before the next: once, on the sum of their losses,
      or for one step after the other, in their order;
    - after each chunk() and before the next call, on any of its outputs together.

    form="step", which "auto" takes only with update_every=1, and so "rtrl", "uoro", lr and cuda_graph, serves the first
    and the last of these. With lag=1 a loss may also reach the step before; with cuda_graph=True each step has one
    backward(). Under torch.compile each call of the compiled function has its own. A backward() that comes too late
    raises RuntimeError.

    The input gets the gradient of its own step's loss or, within one chunk() call, credit from the later steps of that
    call as well. Γ carries the effect of earlier steps for the weights only, not for earlier inputs.

    Args:
        layer: the recurrent layer. The learner keeps its state, zero at first.
        batch_size: B, the number of streams that run side by side.
        learning: what is carried forward of the past; None: the layer's own rule.
            "rfp"    Γ, the sensitivity of the unit that a weight enters
            "eprop", "rflo", "snap0"   the same with parts of M dropped (`rules.rfp.transition`)
            "rtrl"   γ, the sensitivity of every unit of the weight's head, or of its `block`: exact for heads;
                     S·b·B·Σ_k N·M_k numbers with b units a head or block
            "uoro"   a random product that equals γ on average (`sensitivity.RankOne`): unbiased, noisy
            "tbptt"  nothing: BPTT, truncated at the beginning of the chunk, with lag=1 of the chunk before
        block: of "rtrl", b units that divide a head's: sensitivities of the units of a weight's block of b alone, that
            credit reaches within the block (`rules.rtrl`). 1 is RFP, a head's units (None) exact; in between it costs
            b times what RFP costs in memory, and its products b² times.
        update_every: C ≥ 1, the number of steps between changes of the weights.
        form: "step"; "lazy", which reads Γ at every step and rewrites it at every R-th; "chunk", which needs
            update_every ≥ 2 unless credit is "carry"; "history", whose memory grows until reset; or "auto", chosen by
            the cost model. "rtrl" and "uoro" run in "step" only, "tbptt" in "chunk" only.
        rewrite_every: R ≥ 1 of form "lazy"; None: what the cost model finds best (`cost.rewrite_every`).
        credit: how credit passes back within a chunk. "own": through each unit's own S×S block M, as Γ is advanced.
            "carry", in form "chunk": through the full Jacobian, between the chunk's steps and on to Γ. This is
            truncated BPTT that doesn't forget what came before the chunk.
        refine: with credit "carry", rounds of refinement that find this credit in place of the exact sequential
            backward pass, or "exact" for as many as it takes (`rules.refine`); r ≥ 1 implies "carry".
        lag: 0, or 1 for losses that compare s(t-1) with s(t): how many steps before the current one a loss may still
            reach.
        gamma_dtype: the dtype of Γ, float32 or bfloat16; a float64 layer has float64 in place of float32.
        gamma_rounding: how a bfloat16 Γ is rounded in form "step". "nearest"; or "stochastic", whose mean over seeds
            is right. Stochastic rounding is better where memory lasts 500 steps or more and the signal has a mean, as
            a bias's y = 1 has, and a little worse elsewhere. A learner draws the same bits in every run; Triton and
            torch draw from the same distribution, but not the same bits.
        horizon: the number of steps between resets, if known; with it "auto" may choose "history".
        backend: runs the recursion of Γ and the loops over time: "torch", "compile" (CPU), "triton" (GPU), or "auto"
            (`operations.choose_gamma`, `operations.choose_scan`).
        seed: for the random signs of "uoro" and for stochastic rounding.
        cuda_graph: run each step, and its backward, as a CUDA graph, so that small layers don't wait for kernel
            launches. It needs a layer on a GPU, form "step", lag 0, and a rule that carries Γ. It runs step by step
            (no chunk()), with one backward() a step, and the layer's parameters must keep their storage.
        lr: η ≥ 0 of plain SGD, W ← W - η ∂E/∂W, which backward() then takes itself for those of the layer's weights()
            that require a gradient. Their `.grad` stays as it is, and hooks on it aren't called; gradients that reach
            them elsewhere in the graph go to `.grad` as usual. The input's gradient is that of the weights before. It
            needs form "step", lag 0, update_every 1 and contiguous weights, and doesn't run under torch.compile.
            `learner.lr` may be set at any time. None: gradients go to `.grad`.
        nonfinite: what is done about NaN and infinities in the input or the states, told with step (counted from 1
            since the learner was made), batch row and unit, and about sensitivities that explode: that are NaN, or
            beyond the root of the largest number of their dtype, 1.8e19 in float32 and bfloat16, 1.3e154 in float64.
            They are looked at before a step, every 64 steps, or every 8 by "raise" and "clip".
            "warn"   one RuntimeWarning for each learner, which then looks no more
            "raise"  FloatingPointError, of the step in which it was found. On a CPU that step has not run: the learner
                     goes on from the state before, with the same step's right input or after a reset; only the
                     backward() of earlier steps may come too late by then. In a `StackLearner` the layers below have
                     run.
            "clip"   changes the gradient to keep it finite, and warns once. Batch rows that aren't finite start anew,
                     at the step that isn't, with zeros in place of what isn't finite in their input; such a step that
                     isn't finite even so raises FloatingPointError. Rows of Γ (of one batch row, matrix, unit and
                     state) with a number beyond the bound are scaled so that the largest is the bound; of "rtrl" and
                     "uoro" likewise, rows of what is carried along its last dimension.
            "ignore" nothing is looked at
            On a GPU no step waits for this: flags are made on the device and are read when they have come, 64 to 128
            steps later, or 8 to 16; "raise" and "clip" then act on the learner as it is by then. What form "history"
            and "tbptt" find in a backward pass is told once it reaches a state.
        mesh: a DeviceMesh of one dimension, on whose ranks the rows of the weights and of Γ lie, ⌈N/R⌉ units on each of
            R ranks; or None. Every rank makes the learner, and calls it with the same input and the same losses. The
            layer's weights() become DTensors, with the values of the mesh's first rank, and so do their gradients:
            `layer.weight_ss.grad.full_tensor()` gathers one, `to_local()` is the rank's own. Make the optimizer
            afterwards. A step gathers the states, S·B·N numbers; where x requires a gradient, that is summed over the
            ranks; nothing else is sent. It goes with the rules that carry Γ, in the forms "step" and "chunk", and
            "auto" is one of these by `update_every` (`online.sharded`).

    Under autocast the layer and its learning run in the parameters' own dtype.

    step(), chunk(), reset() and backward() mutate the learner's state and Γ; with lr, backward() mutates the weights. A
    step that fails half-way (out of memory, Ctrl-C) leaves the learner as it was before. Where a backward() fails while
    it advances the sensitivities, some of them are of a later step than others: every call raises RuntimeError from
    then on, until reset() of all rows, load_state_dict() or a new `state`.

    A learner is a torch.nn.Module whose `forward` is `step`. The layer is its submodule, so that a module that holds
    the learner has the layer's parameters; the state and the sensitivities are its buffers, which `.to()` moves.

    In eval mode (`learner.eval()`) step() and chunk() run the layer alone: the state moves on, outputs have no graph,
    nothing is learned or looked at (`nonfinite`), and a step costs what the layer's costs. The sensitivities would no
    longer be those of the state, so the first step back in training mode begins without them, as after `state` was set.
    To act in between without this, use `peek`, or a copy.deepcopy of the learner.

    Raises:
        TypeError, ValueError: for an argument out of its range, naming it; for a combination that can't run, naming
            the nearest that can; for sensitivities that don't fit in memory; with a mesh, on every rank, for what ranks
            disagree in: sizes, options, the code that they run.
        RuntimeError: with a mesh, here and in a step, where another rank has ended or doesn't come in time.
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        batch_size: int,
        *,
        learning: Learning | None = None,
        block: int | None = None,
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
        nonfinite: Nonfinite = "warn",
        mesh: DeviceMesh | None = None,
    ) -> None:
        refuse_while_compiling("OnlineLearner(…)", "make the learner outside of the compiled function")
        given = {
            "learning": learning,
            "block": block,
            "update_every": update_every,
            "form": form,
            "rewrite_every": rewrite_every,
            "credit": credit,
            "refine": refine,
            "lag": lag,
            "gamma_dtype": gamma_dtype,
            "gamma_rounding": gamma_rounding,
            "horizon": horizon,
            "backend": backend,
            "seed": seed,
            "cuda_graph": cuda_graph,
            "nonfinite": nonfinite,
            "lr": lr,
        }
        options, choice, shard = planned(layer, batch_size, mesh, given)
        super().__init__()
        self._shard = shard
        if shard is not None:
            shard.distribute(layer)
        self.training = layer.training
        self._options = options
        self._modules["layer"] = layer
        self.batch_size = options.batch_size
        self.learning, self.credit, self._refine = options.learning, options.credit, options.refine
        self.update_every, self.horizon = options.update_every, options.horizon
        self.gamma_rounding = options.gamma_rounding
        self._has_readout = has_readout(layer)
        self._within: int | None = None  # what `distributed_call` said at the last step; None before a first
        self._reads_input = any(matrix.reads == "input" for matrix in layer.matrices)
        self._asked_rewrite_every = options.rewrite_every
        self._choice = choice
        self.form, self.carried_bytes = self._choice.form, self._choice.carried_bytes
        self._past = self._new_past(options)
        self._start_at_zero()
        self._watch = Watch(options.nonfinite, self._state, self._past.scan_backend, one_flag=cuda_graph)
        self._register(self._state, self._sensitivities())
        self._compiled = CompiledCalls(self)
        self._lr: Tensor | None = None
        if lr is not None:
            self._lr = self._state.new_zeros(1)  # a tensor, which captured steps read in place
            self.lr = lr
        self._graph: GraphedStep | None = None
        # Whether weights must be the layer's parameters themselves: they are changed in place, or read by address.
        self._fixed = lr is not None or cuda_graph
        self._known: list[int] = []  # the weights that were last found to be fit for that, by their ids
        if cuda_graph:
            self._check_new_weights()
            if self._state.device.type != "cuda":
                raise ValueError(
                    f"cuda_graph=True needs a layer on a CUDA or ROCm device, got {self._state.device}"
                )
            self._graph = self._graphed(capture=capture_cuda_graph)

    def _new_past(self, options: Options) -> Past:
        """An empty past of the chosen form, with the sensitivities that the rule carries."""
        layer = self.layer
        weights = self._weights()
        backend = "auto" if options.backend == "compile" else options.backend
        scan = operations.choose_scan(backend, weights[0].device, weights[0].dtype)
        sensitivity = None if self.form == "history" else self._new_sensitivity(options, scan)
        # whether credit passes through the full Jacobian, so that blocks carry the weights of their steps
        self._full = self.credit == "carry" or self.learning in ONLY_FORM
        credit = full_credit(layer.cell, options.rounds, scan) if self._full else None
        every = self._choice.rewrite_every if self.form == "lazy" else 1
        return Past(self._matrices(), self.form, options.lag, sensitivity, every, scan, credit)

    def _new_sensitivity(self, options: Options, scan: str) -> Sensitivity:
        """Sensitivities of zero, of the kind that the rule carries."""
        layer, weights = self.layer, self._weights()
        if self.learning == "tbptt":
            return NoSensitivity(weights)
        sizes = (self._matrices(), weights, len(layer.cell.states), self.batch_size)
        if self.learning == "rtrl":
            return Exact(layer.cell, *sizes, options.block, scan)
        if self.learning == "uoro":
            return RankOne(*sizes, options.seed)
        seed = options.seed if options.gamma_rounding == "stochastic" else None
        return PerUnit(*sizes, options.gamma_dtype, options.backend, seed)

    def _weights(self) -> tuple[Tensor, ...]:
        """The layer's weights(), or this rank's rows of them."""
        return self.layer.weights() if self._shard is None else self._shard.weights(self.layer)

    def _matrices(self) -> Sequence[Matrix]:
        return self.layer.matrices if self._shard is None else self._shard.matrices

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh on whose ranks rows lie, or None."""
        return None if self._shard is None else self._shard.mesh

    def _refuse_sharded(self, what: str, instead: str) -> None:
        if self._shard is not None:
            raise ValueError(f"{what} can't go with mesh, whose ranks own rows alone: {instead}")

    def _sensitivities(self) -> list[Tensor]:
        """The tensors of numbers that are carried."""
        carried = self._past.sensitivity
        return [] if carried is None else carried.numbers()

    def _start_at_zero(self) -> None:
        layer = self.layer
        states, units = len(layer.cell.states), layer.hidden_size
        self._state = self._weights()[0].detach().new_zeros(states, self.batch_size, units)
        # The recurrent weights of the chunk that runs, where credit passes through the full Jacobian.
        self._chunk_weights: tuple[Tensor, ...] | None = None
        self._forget: Tensor | None = None  # batch rows to forget when the next step begins, (B,) bool
        self._forget_all = False
        # The last step's input, where the layer's readout reads it; None before a first step and after a checkpoint.
        self._input: Tensor | None = None
        self._cut = False  # whether the state was given, so that the next step begins without a past
        self._position = 0  # how many of the update_every steps between two updates step() has run
        # Of the weights when these steps began; None where a copy or a checkpoint goes on: those of the next step.
        self._versions: tuple[int, ...] | None = None
        # The last step's credit port (`autograd.Steps`), for the next step of its chunk. It is held here and not in
        # `_past`, to which autograd's graphs refer: a graph that reached itself would never be freed.
        self._port: Tensor | None = None

    def _graphed(self, capture: Capture) -> GraphedStep:
        """The steps as CUDA graphs. Raises ValueError where they can't be captured."""
        carried = self._past.sensitivity
        if self.form != "step" or self.lag or not isinstance(carried, PerUnit):
            raise ValueError(
                f"cuda_graph=True goes with form='step', lag=0 and a rule of {', '.join(rfp.RULES)}, "
                f"got form={self.form!r}, lag={self.lag}, learning={self.learning!r}"
            )
        return GraphedStep(
            self.layer,
            carried,
            self._state,
            self.learning,
            self._past.scan_backend,
            self._lr,
            capture,
            self._watch,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: all but autograd's graphs and what is this learner's alone.

        The copy can't serve the backward() of a step that ran before. Raises TypeError with cuda_graph=True or a mesh.
        """
        if self._shard is not None:
            raise TypeError(
                "an OnlineLearner with a mesh can't be copied or pickled: make a new one, and pass it the state_dict() "
                "of this one"
            )
        if self._graph is not None:
            raise TypeError(
                "an OnlineLearner with cuda_graph=True can't be copied or pickled: make a new one, and pass it the "
                "state_dict() of this one"
            )
        return {
            **self.__dict__,
            "_compiled": None,
            "_within": None,
            "_port": None,
            "_versions": None,
            "_chunk_weights": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register(self._state, self._sensitivities())
        self._compiled = CompiledCalls(self)

    def __copy__(self) -> OnlineLearner:
        """Raises TypeError: two learners can't share what they carry."""
        raise TypeError("copy.copy of an OnlineLearner would share what it has learned: use copy.deepcopy")

    @property
    def number(self) -> int:
        """This learner's number in `LEARNERS`: no other learner of the process has it, nor any copy."""
        return self._compiled.number

    @property
    def lr(self) -> float | None:
        """η of the step of SGD that backward() takes; None where gradients go to `.grad`."""
        return None if self._lr is None else float(self._lr)

    @lr.setter
    def lr(self, value: float) -> None:
        if self._lr is None:
            raise ValueError(
                f"lr can't be set to {value} in a learner that was made without it: OnlineLearner(..., lr=…)"
            )
        self._lr.fill_(learning_rate(value, self._lr.dtype))

    @property
    def block(self) -> int | None:
        """b, the units of a block, or of a head, among which "rtrl" carries sensitivities; None with other rules."""
        carried = self._past.sensitivity
        return carried.block if isinstance(carried, Exact) else None

    @property
    def nonfinite(self) -> str:
        """What is done about NaN, infinities and sensitivities that explode."""
        return self._watch.policy

    @property
    def lag(self) -> int:
        """How many steps before the current one a loss may still reach."""
        return self._past.lag

    @property
    def rewrite_every(self) -> int:
        """R, the number of steps that are kept before they are folded into Γ; 1 but for form "lazy"."""
        return self._past.rewrite_every

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The layer's S states now, (B, N) each: copies, detached.

        They can be set, to a tuple of S tensors, or to one tensor for a cell with one state. The past of all batch rows
        is then forgotten when the next step begins, since sensitivities are those of the state that was; the steps
        between two updates begin anew. Setting raises TypeError or ValueError, with nothing changed, for a state of
        another shape, dtype or device.
        """
        if torch.compiler.is_compiling():
            return self._compiled.state(self._state[0], len(self.layer.cell.states))
        return tuple(state.clone() for state in self._state)

    @state.setter
    def state(self, state: State) -> None:
        self.go_on_from(self.joined_state(state))

    def joined_state(self, state: State) -> Tensor:
        """What `state` is set to, as a copy (S, B, N). Raises as that does."""
        refuse_while_compiling("setting the state", "set it outside of the compiled function")
        names = self.layer.cell.states
        given = (state,) if isinstance(state, Tensor) and len(names) == 1 else state
        functional.initial_state(given, names, self.batch_size, self.layer.hidden_size, self._state)
        return torch.stack([value.detach() for value in given])

    def go_on_from(self, state: Tensor) -> None:
        """Continue from a state (S, B, N) that no step of the past has led to."""
        self._past.mend()
        if self._graph is None:
            self._state = state
        else:
            self._state.copy_(state)  # in place for a CUDA graph, which reads it at a fixed address
        self._cut, self._forget, self._forget_all = True, None, False
        self.end_chunk()

    def _begin_anew(self) -> None:
        """Forget the past that has not led to the state."""
        self._cut = False
        self._past.cut()
        if self._graph is not None:
            self._graph.load(self._state)

    def end_chunk(self) -> None:
        """End the update_every steps that run before their time, at the end of an episode for instance.

        Then call backward() of their losses, before the next step(), which is the first of update_every steps again.
        Weights may change after that backward(). It does nothing between two chunks, and where update_every is 1.
        """
        refuse_while_compiling("end_chunk()", "call it outside of the compiled function")
        self._position, self._port, self._past.mid_chunk = 0, None, False

    @property
    def nbytes(self) -> int:
        """Bytes of learning state now: Γ, the window or history, and the layer's state."""
        refuse_while_compiling("nbytes", "read it outside of the compiled function")
        return self._past.nbytes + self._state.numel() * self._state.element_size()

    def step(self, x: Tensor, active: Any = None) -> Tensor:
        """Advance one step. x (B, F), with F input features → the layer's output (B, N).

        active: None, or a mask (B,) as of `reset`: rows where it is False take no step, as in environments that step
        apart. Their state and sensitivities stay as they are, bit for bit, and their x counts as zero, whatever it is.
        Their output is that of the state which stays, and a loss of it finds the gradient of that state, as torch.where
        of old and new states would; the update_every steps and `horizon` count calls.

        The class says when backward() may be called. Mutates the learner's state.

        Raises TypeError or ValueError for x and active; ValueError, with nothing changed, if the weights changed inside
        a chunk, and for active with cuda_graph=True; RuntimeError for active under torch.compile; FloatingPointError as
        `nonfinite` says.
        """
        if isinstance(x, Tensor) and autocast_is_on(x.device):
            with without_autocast(x.device):
                return self._step(x.to(self._state.dtype), self._has_readout, active)
        return self._step(x, self._has_readout and self.lag > 0, active)

    def _step(self, x: Tensor, one_node: bool, active: Any) -> Tensor:
        """As `step`, without autocast. one_node: whether the layer's readout is a node of its own (`readout`)."""
        self._check_input(x, (self.batch_size,))
        if active is not None:
            refuse_while_compiling("step(x, active)", "call it outside of the compiled function")
            if self._graph is not None:
                raise ValueError(
                    "active can't go with cuda_graph=True, whose captured step advances all batch rows: make the "
                    "learner without it"
                )
            active = self._flags("active", active)[None]
            x = x.masked_fill(~active[0, :, None], 0)
        if not self.training:
            return self._act(x[None], None, active)[0]
        if torch.compiler.is_compiling():
            if self.form == "chunk":
                raise ValueError("form='chunk' runs by chunk() under torch.compile, got step()")
            return self._run_compiled(x[None], None)[0]
        if self._graph is not None:
            self._past.enter()
            try:
                if self._cut:
                    self._begin_anew()
                if self._watch.next <= self._graph.now:
                    self._look(self._graph.now, self._graph.now)
                outputs = Graphed.apply(self._graph, self._forget, x, *self.layer.weights())
                self._forget, self._forget_all = None, False
                if self._has_readout:
                    self._input = x.detach().clone()
            finally:
                self._past.leave()
            return self._readout(outputs, x, one_node)
        if self.form == "step":
            return self._run(x.unsqueeze(0), None, None, one_node, active=active)[0].squeeze(0)
        if self.form == "chunk":
            self._check_chunk_weights()
        output, port = self._run(x.unsqueeze(0), None, self._port, one_node, joins=True, active=active)
        self._position = (self._position + 1) % self.update_every
        self._past.mid_chunk = self._position > 0
        self._port = port if self._position and self.form == "chunk" else None
        return output.squeeze(0)

    def chunk(self, x: Tensor, resets: Tensor | None = None, active: Any = None) -> Tensor:
        """Advance C steps with the weights as they are. x (C, B, F), for any C ≥ 1 → outputs (C, B, N).

        With a layer of batch_first these are (B, C, ·), and so are resets and active.
        resets (C, B) bool or None: rows in which a new episode starts at that step.
        active: None, or a mask (C, B), bools or numbers: rows that take no step where it is False. States, outputs and
        sensitivities are those of C calls of reset(resets[t]) and step(x[t], active[t]); the steps run one by one, as
        they do there.
        Call backward() once, on the sum of all losses of these outputs, before the next call. Mutates the learner's
        state. Raises TypeError or ValueError for x, resets and active; RuntimeError for active under torch.compile;
        FloatingPointError as `nonfinite` says.
        """
        if isinstance(x, Tensor) and autocast_is_on(x.device):
            with without_autocast(x.device):
                return self._chunk(x.to(self._state.dtype), resets, self._has_readout, active)
        return self._chunk(x, resets, self._has_readout and self.lag > 0, active)

    def _chunk(self, x: Tensor, resets: Tensor | None, one_node: bool, active: Any) -> Tensor:
        """As `chunk`, without autocast. one_node: as in `_step`."""
        if self._graph is not None:
            raise ValueError("chunk() can't go with cuda_graph=True, which captures one step: call step()")
        first = self.layer.batch_first
        self._check_input(x, (self.batch_size, "C") if first else ("C", self.batch_size))
        if resets is not None:
            resets = check.mask("resets", resets, tuple(x.shape[:2]), x.device)
        if active is not None:
            refuse_while_compiling("chunk(x, active=…)", "call it outside of the compiled function")
            active = self._flags("active", active, tuple(x.shape[:2]))
            x = x.masked_fill(~active[..., None], 0)
        if first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
            active = None if active is None else active.transpose(0, 1)
        output = self._chunk_of(x, resets, one_node, active)
        return output.transpose(0, 1) if first else output

    def _chunk_of(self, x: Tensor, resets: Tensor | None, one_node: bool, active: Tensor | None) -> Tensor:
        """As `chunk`, of x (C, B, F) that has been checked."""
        if not self.training:
            return self._act(x, resets, active)
        if torch.compiler.is_compiling():
            return self._run_compiled(x, resets)
        self._position, self._port, self._past.mid_chunk = 0, None, False
        return self._run(x, resets, None, one_node, active=active)[0]

    def peek(self, x: Tensor) -> Tensor:
        """The output (B, N) that step(x) would give, without moving on, and without a graph: x (B, F).

        This is the value of the next state that a target of temporal differences takes. Nothing is mutated. Raises
        TypeError or ValueError for x.
        """
        if isinstance(x, Tensor) and autocast_is_on(x.device):
            with without_autocast(x.device):
                return self.peek(x.to(self._state.dtype))
        self._check_input(x, (self.batch_size,))
        refuse_while_compiling("peek()", "call it outside of the compiled function")
        return self._ahead(x[None], None)[0][0]

    def _act(self, x: Tensor, resets: Tensor | None, active: Tensor | None = None) -> Tensor:
        """Outputs (C, B, N) of x (C, B, F), in eval mode: the state moves on, and nothing else."""
        refuse_while_compiling(
            "a step in eval mode", "call it outside of the compiled function, or layer() in it"
        )
        self._past.enter()
        try:
            output, state = self._ahead(x, resets, active)
            self.go_on_from(state)
        finally:
            self._past.leave()
        return output

    @torch.no_grad()
    def _ahead(self, x: Tensor, resets: Tensor | None, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (C, B, N) of x (C, B, F), and the state (S, B, N) after it, of the layer alone.

        active (C, B) or None: as `chunk` has it.
        """
        layer, shard = self.layer, self._shard
        weights = self._weights()
        state, parts = self._state, []
        drive = layer.drive(x, weights) if shard is None else x[None]
        for t in range(1 if active is None else len(x)):  # all at once, or one by one
            steps = slice(None) if active is None else slice(t, t + 1)
            starts = None if resets is None else resets[steps]
            if shard is not None:
                after = shard.run(layer, x[steps], weights, state, starts).after
            else:
                after = operations.scan(
                    layer.cell,
                    drive[:, steps],
                    weights[: len(layer.cell.matrices)],
                    state.unbind(0),
                    starts,
                    keep=False,
                    backend=self._past.scan_backend,
                ).after
            if active is not None:
                stays = state if starts is None else state.masked_fill(starts[0, :, None], 0)
                after = torch.where(active[t, :, None], after, stays[:, None])
            state = after[:, -1]
            parts.append(after)
        after = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        # copies, which share no memory with the state
        return layer.readout([after[nu].clone() for nu in layer.cell.outputs], x), state.clone()

    def traces(self) -> dict[str, Tensor]:
        """The sensitivity of the states now to each parameter of layer.weights(), by its name: copies.

        With Γ ("rfp", "eprop", "rflo", "snap0"): (S, B, *W), W the parameter's shape; Γ^ν is ∂c^ν/∂W of the unit that
        the weight enters, its row's, as the rule has it. With "rtrl": (S, B, H, b, b, M), H heads or blocks of b units:
        entry [ν, b, h, j, p, m] is ∂c^ν_j/∂W_pm with units j and p of head h. They are the eligibility traces of the
        batch rows: ∂L_b/∂W = Σ_ν δ^ν_b ⊙_rows Γ^ν_b. Nothing is mutated; it takes the memory of a second Γ, and a pass
        over it. With a mesh they are of this rank's rows.

        Raises ValueError for "uoro" and "tbptt", which have no such numbers.
        """
        names = self.layer._names
        return dict(zip(names, self._traces(), strict=True))

    @torch.no_grad()
    def _traces(self) -> list[Tensor]:
        refuse_while_compiling("traces()", "call it outside of the compiled function")
        if self.learning in ("uoro", "tbptt"):
            raise ValueError(
                f"traces() needs a rule that carries a sensitivity for each weight, got learning={self.learning!r}; "
                "the nearest are 'rtrl', which is exact, and 'rfp'; row_gradients() goes with any"
            )
        return by_parameter(self._carried_now())

    def _carried_now(self) -> Sensitivity:
        """A copy of what is carried, of the state now."""
        carried = self._new_sensitivity(self._options, self._past.scan_backend)
        if self._cut:
            return carried
        if self._past.sensitivity is not None:
            carried.load_(self._past.sensitivity.tensors())
        window = self._past.window()
        if self._graph is not None:
            window = [Block.from_dict(saved) for saved in self._graph.unfolded().get("window", [])]
        for block in window:
            carried.step_(block)
        if self._forget is not None:
            carried.forget_(self._forget)
        return carried

    @torch.no_grad()
    def row_gradients(self, credit: Tensor) -> dict[str, Tensor]:
        """The gradients of B scalars at once: for each parameter of the layer, by its name, (B, *W).

        credit (B, N): the gradient of the sum of the scalars with respect to the last step's output, of which row b's
        scalar depends on row b alone, as `torch.autograd.grad(values.sum(), output)` gives it. Row b of the result is
        the gradient of scalar b by the learner's rule; summed over rows it is what backward() of the last output adds
        to `.grad`. Of a layer with a readout of its own it is taken with the readout's parameters as they are now.
        Rows that were reset since the step have none, nor has any row once the state was set. Nothing is mutated; it
        takes what `traces` takes, and a pass over the chunk where credit passes through the full Jacobian.

        Raises TypeError or ValueError for credit; RuntimeError for a layer with a readout before the first step after
        load_state_dict(), which doesn't have the last input, and after backward() where that drops the chunk (credit
        "carry" and rule "tbptt").
        """
        layer = self.layer
        refuse_while_compiling("row_gradients()", "call it outside of the compiled function")
        self._refuse_sharded("row_gradients()", "traces() has this rank's rows of Γ, of which they are made")
        check.shape("credit", check.tensor("credit", credit), (self.batch_size, layer.hidden_size))
        check.like("credit", credit, "the learner", self._state)
        rows = torch.full((self.batch_size,), self._cut, device=credit.device)
        rows = rows if self._forget is None else rows | self._forget
        credit = credit.detach().masked_fill(rows[:, None], 0)
        outputs = [self._state[nu] for nu in layer.cell.outputs]
        of_outputs: Sequence[Tensor] = [credit]
        of_readout: dict[str, Tensor] = {}
        if self._has_readout:
            x = self._input
            if x is None and not self._cut:
                raise RuntimeError(
                    f"row_gradients() of {type(layer).__name__} needs the last step's input, which its readout reads "
                    "and a state_dict() doesn't have: call step() first"
                )
            x = credit.new_zeros(self.batch_size, layer.fan_in) if x is None else x
            x = x.masked_fill(rows[:, None], 0)
            of_outputs, of_readout = through_readout(layer, outputs, x, credit)
        of_states = torch.zeros_like(self._state)
        for nu, of in zip(layer.cell.outputs, of_outputs, strict=False):
            of_states[nu] = of
        if self._full and self.form == "chunk":
            made = self._rows_of_chunk(of_states)
        else:
            made = read_rows(layer, self._carried_now(), of_states)
        return {**dict(zip(layer._names, made, strict=True)), **of_readout}

    def _rows_of_chunk(self, delta: Tensor) -> list[Tensor]:
        """`row_gradients` where credit passes through the full Jacobian. delta (S, B, N): of the states."""
        layer, past = self.layer, self._past
        assert past.sensitivity is not None
        if self._cut or past.is_new:
            return read_rows(layer, past.sensitivity, torch.zeros_like(delta))
        parts, passed = past.last_credits(delta)
        made = read_rows(layer, past.sensitivity, passed)
        for block, credit in parts:
            for total, part in zip(made, rows_of_steps(layer, block, credit), strict=True):
                total.add_(part)
        return made

    def _check_input(self, x: Tensor, leading: tuple[int | str, ...]) -> None:
        refuse_hooks(self.layer)
        if self._shard is not None:
            refuse_while_compiling("a learner with a mesh", "call it outside of the compiled function")
        if transforms.active():
            raise RuntimeError(
                "an OnlineLearner can't go under torch.func, whose transforms know of no state that moves on: use the "
                "layer on a sequence there; row_gradients() has the gradients of single batch rows"
            )
        if self._fixed and torch.compiler.is_compiling():  # where an object has no id
            if "parametrizations" in self.layer._modules:
                self._check_new_weights()
        elif self._fixed and self._known != (known := [*map(id, self.layer.weights())]):
            self._check_new_weights()
            self._known = known
        check.shape("x", check.tensor("x", x), (*leading, self.layer.fan_in), "to match the learner")
        weight = self.layer.like()
        check.like("x", x, "the layer", weight)
        check.like("the layer", weight, "the learner", self._state)

    def _check_new_weights(self) -> None:
        """Raise ValueError if the weights are others now, which the learner can't change or read in place."""
        for matrix, weight in zip(self.layer.matrices, self.layer.weights(), strict=True):
            if not isinstance(weight, torch.nn.Parameter):
                raise ValueError(
                    f"lr and cuda_graph=True go with weights that are parameters, and {matrix.name} is computed from "
                    "others by now: make a new OnlineLearner without them"
                )
        refuse_fully_sharded(self.layer)

    def _check_chunk_weights(self) -> None:
        layer = self.layer
        parametrized = "parametrizations" in layer._modules
        versions = tuple(
            weight._version for weight in (layer.parameters() if parametrized else self._weights())
        )
        if self._position and self._versions is not None and versions != self._versions:
            raise ValueError(
                f"weights changed inside a chunk, after step {self._position} of update_every="
                f"{self.update_every}; change them after its last step, or use form='step'"
            )
        self._versions = versions

    def _run(
        self,
        x: Tensor,
        resets: Tensor | None,
        port: Tensor | None,
        one_node: bool,
        joins: bool = False,
        active: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (C, B, N) of x (C, B, F), and the credit port for the chunk's next call, if any.

        joins: whether this is one step of a chunk that several calls make up. active (C, B) or None.
        """
        run = self.advance if active is None else functools.partial(self.advance, active=active)
        self._past.enter()
        try:
            if self._within != (within := distributed_call()):
                refuse_distributed(self.layer, self, lr=self._lr is not None)
                self._within = within
            weights = self._weights()
            resets = self._before_steps(x, resets, weights)
            before = self._before()
            try:
                if self.form == "chunk" and joins and x.requires_grad and torch.is_grad_enabled():
                    made: list[tuple[PendingBackward, list[Tensor], Sequence[Tensor]]] = []

                    def advance(
                        x: Tensor, resets: Tensor | None, continues: bool, weights: Sequence[Tensor]
                    ) -> tuple[PendingBackward, list[Tensor], Sequence[Tensor]]:
                        made.append(run(x, resets, continues, weights))
                        return made[0]

                    port, *outputs = Steps.apply(advance, resets, x.detach(), port, *weights)
                    ((pending, _, input_weights),) = made
                    outputs = Input.apply(pending, input_weights, x, *outputs)
                else:
                    port, *outputs = Steps.apply(run, resets, x, port, *weights)
                return self._readout(outputs, x, one_node), port
            except BaseException:
                self._take_back(*before)
                raise
        finally:
            self._past.leave()

    def _before(self) -> tuple[int, Tensor, Tensor | None, Tensor | None, bool]:
        """What steps change, for `_take_back`."""
        return self._past.now, self._state, self._input, self._forget, self._forget_all

    def _take_back(
        self, now: int, state: Tensor, x: Tensor | None, forget: Tensor | None, forget_all: bool
    ) -> None:
        """After steps that failed: the state and the window become what they were `_before`."""
        if self._past.now > now:
            self._past.take_back()
        self._state, self._input, self._forget, self._forget_all = state, x, forget, forget_all

    def _readout(self, outputs: Sequence[Tensor], x: Tensor, one_node: bool) -> Tensor:
        return readout(self.layer, outputs, x, self.lag > 0) if one_node else self.layer.readout(outputs, x)

    def _before_steps(self, x: Tensor, resets: Tensor | None, weights: Sequence[Tensor]) -> Tensor | None:
        """Fold what no later loss may reach, and keep the weights if they are needed.

        Returns `resets` with the rows that reset() has marked. Raises ValueError, with nothing changed, if the weights
        aren't those of the chunk's first step: a parametrization may have drawn others.
        """
        within = self.block or self.layer.hidden_size  # credit within the window stays in a block, as γ does
        recurrent = weights[: len(self.layer.cell.matrices)]
        first = self.form == "step" or self._position == 0 or self._chunk_weights is None
        if self._full and not first and "parametrizations" in self.layer._modules:
            for name, weight, own in zip(
                self.layer._names, recurrent, self._chunk_weights or (), strict=False
            ):
                if not torch.equal(weight_ops.within_blocks(weight, within), own):
                    raise ValueError(
                        f"the parametrization of {name} gave other weights at step {self._position + 1} of "
                        f"update_every={self.update_every} than at the first, and credit passes back by one Jacobian: "
                        "use chunk(), which computes them once, or a rule or form without full credit"
                    )
        if self._cut:
            self._begin_anew()
        if self._watch.next <= self._past.now:
            self._look(self._past.now, self._past.base)
        self._past.before_steps(self._forget, self._forget_all)
        if self._forget is not None:
            marks = x.new_zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets.clone()
            marks[0] |= self._forget
            resets = marks
        if self._full and first:
            self._chunk_weights = tuple([weight_ops.within_blocks(weight, within) for weight in recurrent])
        return resets

    def _look(self, now: int, base: int) -> None:
        """Act on what has been found on the device, and on the sensitivities, which are of time `base`."""
        watched(self._watch, self.layer, now, base, self._state, self._past.sensitivity, self.reset)

    def advance(
        self,
        x: Tensor,
        resets: Tensor | None,
        continues_chunk: bool,
        weights: Sequence[Tensor],
        active: Tensor | None = None,
    ) -> tuple[PendingBackward, list[Tensor], Sequence[Tensor]]:
        """Run steps from the current state and record them. x (C, B, F). active (C, B) or None: as `chunk` has it.

        Returns what the backward pass needs, the cell's outputs (C, B, N) each, and those of the weights that read the
        layer's input.
        """
        layer, past, cell = self.layer, self._past, self.layer.cell
        x = given = x.clone()  # callers may write the next input into the same memory
        input_weights = [w for k, w in zip(layer.matrices, weights, strict=True) if k.reads == "input"]
        after, block = self._record(x, resets, self._state, weights, self._chunk_weights, active)
        state = after.select(1, -1).clone()
        seen = state if x.shape[0] == 1 else after  # the former is in one piece
        if self._watch.on and self._watch.found(past.now, x, seen):
            x, after, block = self._act_on(x, resets, weights, after, block, active)
            state = after.select(1, -1).clone()
        self._forget, self._forget_all = None, False
        record = past.add(block, len(cell.inputs), continues_chunk)
        # copies, which the caller may change: the window goes on reading the states
        outputs = [after.select(0, nu).clone() for nu in cell.outputs]
        self._state = state
        if self._has_readout:
            self._input = given[-1].clone()
        return PendingBackward(layer, past, record, weights, self._lr, self._shard), outputs, input_weights

    def _act_on(
        self,
        x: Tensor,
        resets: Tensor | None,
        weights: Sequence[Tensor],
        after: Tensor,
        block: Block,
        active: Tensor | None,
    ) -> tuple[Tensor, Tensor, Block]:
        """x, states and block of steps that aren't finite, as the policy has them. The learner stays as it is."""
        layer, now, watch = self.layer, self._past.now, self._watch
        place = in_steps(layer, now, x, after)
        if place is None:
            return x, after, block
        watch.tell(layer, place.what)
        if watch.policy != "clip":
            return x, after, block
        x, resets = place.mended(x, resets)
        after, block = self._record(x, resets, self._state, weights, self._chunk_weights, active)
        place = in_steps(layer, now, x, after)
        if place is not None:
            raise FloatingPointError(
                f"OnlineLearner of {type(layer).__name__}: {place.what}; nonfinite='clip' made these batch rows start "
                "anew, and they weren't finite again"
            )
        return x, after, block

    def _record(
        self,
        x: Tensor,
        resets: Tensor | None,
        state: Tensor,
        weights: Sequence[Tensor],
        kept: Sequence[Tensor] | None,
        active: Tensor | None = None,
    ) -> tuple[Tensor, Block]:
        """The states after steps from `state` (S, B, N), and their block.

        kept: the weights that the block carries. active (C, B) or None: as `chunk` has it.
        """
        layer = self.layer
        if active is not None and len(x) > 1:
            each, blocks = [], []
            for t in range(len(x)):
                starts = None if resets is None else resets[t : t + 1]
                step = self._record(x[t : t + 1], starts, state, weights, kept, active[t : t + 1])
                each.append(step[0])
                blocks.append(step[1])
                state = step[0][:, -1]
            return torch.cat(each, 1), joined(blocks)
        rule = self.learning if self.learning in rfp.RULES else "rfp"
        if self._shard is not None:
            after, block = self._shard.recorded(
                layer, x, weights, state, resets, rule, self._past.scan_backend
            )
        else:
            after, block = recorded(
                layer.cell,
                layer.drive(x, weights),
                weights[: len(layer.cell.matrices)],
                state,
                resets,
                x if self._reads_input else None,
                rule,
                None if kept is None else tuple(kept),
                self._past.scan_backend,
            )
        return (after, block) if active is None else held(after, block, state, active[0], resets)

    def _run_compiled(self, x: Tensor, resets: Tensor | None) -> Tensor:
        """Outputs (C, B, N) of x (C, B, F) by an operator, while torch.compile traces."""
        if self._lr is not None:
            raise ValueError("lr can't go under torch.compile, which must know of weights that change")
        if self._graph is not None:
            raise ValueError("cuda_graph=True can't go under torch.compile: use one of the two")
        layer = self.layer
        outputs = self._compiled.outputs(
            x, resets, layer.weights(), layer.hidden_size, len(layer.cell.outputs)
        )
        return layer.readout(outputs, x)

    def operate(self, x: Tensor, resets: Tensor | None) -> list[Tensor]:
        """What the operator `learner_steps` runs: the cell's outputs (C, B, N) of x (C, B, F), and the call's clock."""
        self._position, self._port, self._past.mid_chunk = 0, None, False
        self._past.enter()
        try:
            weights = self.layer.weights()
            resets = self._before_steps(x, resets, weights)
            before = self._before()
            try:
                pending, outputs, input_weights = self.advance(x, resets, False, weights)
            except BaseException:
                self._take_back(*before)
                raise
        finally:
            self._past.leave()
        return [*outputs, self._compiled.add(pending, input_weights, self.lag)]

    def operator_gradients(self, call: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """What the operator `learner_gradients` runs: gradients of x (C, B, F) and of the weights."""
        return self._compiled.gradients(call, grads)

    def reset(self, mask: Any = None) -> None:
        """Start a new episode at the next step in the batch rows where mask (B,) is True, or in all.

        mask: a bool tensor; or the flags as an environment gives them, numbers that are 0 where the episode goes on, as
        a tensor, or a numpy array of bools or numbers.

        The state of those rows is zero at once. Their sensitivities are forgotten when the next step begins, so a
        backward() of the step before still works. Raises TypeError or ValueError for mask.
        """
        if mask is None:
            rows = torch.ones(self.batch_size, dtype=torch.bool, device=self._state.device)
            self._past.mend()
        else:
            rows = self._flags("mask", mask)
        if torch.compiler.is_compiling():
            self._compiled.reset(None if mask is None else rows)
            return
        # in place for a CUDA graph, which reads the state at a fixed address
        self._state = (
            self._state.masked_fill(rows[:, None], 0)
            if self._graph is None
            else self._state.masked_fill_(rows[:, None], 0)
        )
        self._forget = rows.clone() if self._forget is None else self._forget | rows
        self._forget_all |= mask is None

    def lend(self) -> tuple[Tensor, PerUnit | Exact]:
        """The state (S, B, N) and Γ as they are now, for a `Stream`, which advances them in place; then `returned`.

        A backward() of an earlier step comes too late from here on.
        """
        sensitivity = self._past.sensitivity
        assert isinstance(sensitivity, PerUnit | Exact)
        self._past.enter()
        try:
            if self._cut:
                self._begin_anew()
            if self._past.now > self._past.base:
                self._past.fold()
            if self._forget is not None:
                sensitivity.forget_(self._forget)
                self._forget, self._forget_all = None, False
            if not self._state.is_contiguous():
                self._state = self._state.contiguous()
        finally:
            self._past.leave()
        return self._state, sensitivity

    def returned(self, steps: int) -> None:
        """What was lent has been advanced by so many steps."""
        self._past.begin(self._past.now + steps)
        if self._watch.next <= self._past.now:
            self._look(self._past.now, self._past.now)

    def settle(self) -> None:
        """Fold into the sensitivities all steps so far, and what `reset` has marked: no window is left.

        A backward() of an earlier step comes too late from here on. Mutates what is carried. Raises ValueError, with
        nothing changed, in the middle of the `update_every` steps between two updates (`end_chunk`), and for forms and
        rules that carry nothing to fold into.
        """
        refuse_while_compiling("settle()", "call it outside of the compiled function")
        if self._position:
            raise ValueError(
                f"settle() can't come after step {self._position} of update_every={self.update_every}: call it, or "
                "save, after the last, or call end_chunk() first"
            )
        if self._graph is not None or not isinstance(self._past.sensitivity, PerUnit | Exact):
            raise ValueError(
                f"settle() needs a form and rule that carry sensitivities, without cuda_graph, got form={self.form!r}, "
                f"learning={self.learning!r}"
            )
        self.lend()

    def _checkpoint(self, *, saved: bool = True) -> dict[str, Any]:
        """`state_dict()`; if not `saved`, only what a state that is loaded is compared with: nothing is folded."""
        refuse_while_compiling("state_dict()", "call it outside of the compiled function")
        if saved:
            self._past.refuse_broken()
            if self._shard is not None:
                self.settle()
        past = self._past.state_dict()
        if self._shard is not None and saved:
            past["gamma"] = [self._shard.whole(gamma, 2) for gamma in past["gamma"]]
        if self._graph is not None:
            past.update(self._graph.unfolded())
        if self._cut:  # as it will be when the next step begins
            now, numbers = past["now"], {id(tensor) for tensor in self._sensitivities()}
            past.update(base=now, episode=now, ends=[], filling=False, window=[])
            past["gamma"] = [torch.zeros_like(t) if id(t) in numbers else t for t in past["gamma"]]
        return {
            "version": checkpoint.VERSION,
            "layer": checkpoint.kind(self.layer),
            "form": self.form,
            "learning": self.learning,
            "credit": self.credit,
            "gamma_rounding": self.gamma_rounding,
            "batch_size": self.batch_size,
            "update_every": self.update_every,
            "state": self._state,
            "position": self._position,
            "forget": self._forget,
            "forget_all": self._forget_all,
            **past,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        refuse_while_compiling("load_state_dict()", "call it outside of the compiled function")
        self.refuse_foreign(state)
        if self._shard is not None:
            state = self._shard.own_rows(state)
        self._past.load_state_dict(state)
        if self._graph is None:
            self._state = checkpoint.owned(state["state"])
        else:
            self._past.fold()
            self._graph.load(state["state"])
        self._position, self._port, self._chunk_weights, self._input = state["position"], None, None, None
        self._cut = False
        self._versions = None
        self._watch.begin(self._past.now if self._graph is None else self._graph.now)
        self._forget = None if state["forget"] is None else checkpoint.owned(state["forget"])
        self._forget_all = state["forget_all"]

    def _refuse_move(self, probe: Tensor) -> None:
        refuse_while_compiling("to()", "move the learner outside of the compiled function")
        self._refuse_sharded("to()", "move the layer before the learner is made")
        if self._graph is not None:
            raise ValueError(
                "an OnlineLearner with cuda_graph=True can't be moved, since its graphs read fixed memory: make a new "
                "one on the other device, and pass it the state_dict() of this one"
            )
        if probe.dtype not in (torch.float64, torch.float32):
            raise TypeError(
                f"an OnlineLearner runs in float64 or float32, got {probe.dtype}; gamma_dtype=torch.bfloat16 halves Γ"
            )
        backend = self._options.backend
        operations.choose_scan("auto" if backend == "compile" else backend, probe.device, probe.dtype)
        operations.choose_gamma(
            backend, probe.device, probe.dtype, self._gamma_dtype(probe.dtype), len(self.layer.cell.states)
        )

    def _gamma_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of Γ with weights of this dtype."""
        asked = self._options.gamma_dtype
        return asked if asked == torch.bfloat16 else dtype

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        past = self._past.state_dict()

        def finish() -> None:
            dtype = self._state.dtype
            self._options = replace(self._options, gamma_dtype=self._gamma_dtype(dtype))
            past["window"] = [
                {
                    **block,
                    "tensors": [move(tensor) for tensor in block["tensors"]],
                    "weights": None if block["weights"] is None else [move(w) for w in block["weights"]],
                }
                for block in past["window"]
            ]
            self._renew_past(past)
            self._port = self._chunk_weights = self._versions = None
            self._forget = None if self._forget is None else move(self._forget)
            self._lr = None if self._lr is None else move(self._lr)
            self._input = None if self._input is None else move(self._input)
            self._watch = Watch(self._options.nonfinite, self._state, self._past.scan_backend)
            self._watch.begin(self._past.now)

        return finish

    def _renew_past(self, past: dict[str, Any]) -> None:
        """Go on with another past, of the sizes that the options have now, and what `Past.state_dict` gave."""
        self._past = self._new_past(self._options)
        self._past.load_state_dict(past)
        self._register(self._state, self._sensitivities())

    def extra_repr(self) -> str:
        carried = self._past.sensitivity
        backends = (
            sorted({group.serving()[0] for group in carried.groups}) if isinstance(carried, PerUnit) else []
        )
        backend = ", ".join(backends) or self._past.scan_backend
        return (
            f"batch_size={self.batch_size}, learning={self.learning!r}, form={self.form!r}, backend={backend!r}, "
            f"{self.nbytes:,} bytes"
            + ("" if self._shard is None else f", rank {self._shard.rank} of {self._shard.ranks}")
        )

    def refuse_foreign(self, state: dict[str, Any]) -> None:
        """Raise TypeError or ValueError if `load_state_dict` could not load `state`."""
        own = self._checkpoint(saved=False)
        if self._shard is not None:
            own["gamma"], state = self._sensitivities(), self._shard.own_rows(state)
        wanted = checkpoint.Wanted(own, self._one_step, self._past.sensitivity is not None)
        checkpoint.refuse_damaged(state, wanted)

    @torch.no_grad()
    def _one_step(self) -> Block:
        """A block of one step from the zero state, as `advance` records it; the learner stays as it is."""
        assert self._shard is None  # whose checkpoints have no window
        layer = self.layer
        x = self._state.new_zeros(1, self.batch_size, layer.fan_in)
        return self._record(
            x,
            None,
            torch.zeros_like(self._state),
            layer.weights(),
            layer.recurrent_weights() if self._full else None,
        )[1]

    def exactness(self) -> Exactness:
        """Whether the gradient is exact, and why or why not: print it, or use it as a condition."""
        weights = self.layer.recurrent_weights()
        return exactness(
            self.layer.cell, weights, self.learning, self._refine, self.credit, self._options.block
        )

    def explain(self) -> None:
        """Print what each form would cost by the cost model, which one runs, and why."""
        from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model

        problem, rates = self._choice.problem, cost.rates_of(self._state.device, self._state.dtype)
        if self._shard is not None:
            print(
                f"rank {self._shard.rank} of {self._shard.ranks} has {self._shard.units} of {self._shard.all_units} "
                "units; what the ranks send isn't in the predictions (rjepa bench plan --ranks)"
            )
        print(
            f"{type(self.layer).__name__}: N = {problem.units}, B = {problem.batch}, "
            f"{len(problem.fan_ins)} matrices, update_every = {self.update_every}, "
            f"horizon = {self.horizon or 'unbounded'}, learning = {self.learning!r}, credit = {self.credit!r}"
        )
        if self.learning in ONLY_FORM:
            print(
                f"carried: {self.carried_bytes:,} bytes; form = {self.form!r}, the only one for {self.learning!r}"
            )
            return
        print(
            f"predicted at {rates.bytes_per_second:.0e} bytes/s, {rates.flop_per_second:.0e} FLOP/s, "
            f"{rates.seconds_per_call * 1e6:.0f} µs a call, {rates.name}:"
        )
        for each in self._choice.costs:
            print(
                f"  {each.form:8} {each.seconds * 1e6:12,.1f} µs a step  {each.state_bytes:16,} bytes  "
                f"{each.because}"
            )
        print(f"form = {self.form!r}: {self._choice.reason()}")
        if self.form == "lazy":
            why = "by the cost model" if self._asked_rewrite_every is None else "asked for"
            print(f"rewrite_every = {self.rewrite_every}: {why}")
        if isinstance(self._past.sensitivity, PerUnit):
            for group in self._past.sensitivity.groups:
                names = ", ".join(matrix.name for matrix in group.matrices)
                backend, why = group.serving()
                print(f"backend of {names}: {backend} ({why})")
