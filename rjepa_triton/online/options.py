"""The options of an online learner: how they are checked, and which form they lead to."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _checks as check
from .._device import available_bytes
from ..cells.two_point import Matrix
from ..layers.layer import TwoPointRNN
from ..rules import rfp, rtrl
from .nonfinite import POLICIES

if TYPE_CHECKING:
    from ..planning import cost

Form = Literal["auto", "step", "lazy", "chunk", "history"]
FORMS = ("auto", "step", "lazy", "chunk", "history")
Learning = Literal["rfp", "eprop", "rflo", "snap0", "rtrl", "uoro", "tbptt"]
LEARNING = (*rfp.RULES, "rtrl", "uoro", "tbptt")
# The rules that run in one form only, and which form that is.
ONLY_FORM = {"rtrl": "step", "uoro": "step", "tbptt": "chunk"}
GAMMA_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUNDINGS = ("nearest", "stochastic")
Nonfinite = Literal["warn", "raise", "clip", "ignore"]


@dataclass(frozen=True)
class Options:
    """Arguments of an `OnlineLearner` that have been checked. Their meaning is told there; these may differ from it:

    learning     the rule that runs: the layer's own where none was given
    block        of "rtrl", b; None: all units of a head
    credit       "carry" where `refine` implies it
    rounds       of refinement; 0: the exact sequential backward pass; None: as many as make the credit exact
    form         the only form that the other options allow, or "auto" where the cost model chooses
    gamma_dtype  float64 where the layer is float64 and float32 was asked for
    """

    batch_size: int
    learning: str
    block: int | None
    update_every: int
    form: Form
    rewrite_every: int | None
    credit: str
    refine: int | Literal["exact"]
    rounds: int | None
    lag: int
    gamma_dtype: torch.dtype
    gamma_rounding: str
    horizon: int | None
    backend: str
    seed: int
    cuda_graph: bool
    nonfinite: str


def check_options(
    layer: TwoPointRNN,
    batch_size: int,
    *,
    learning: str | None,
    block: int | None,
    update_every: int,
    form: str,
    rewrite_every: int | None,
    credit: str,
    refine: int | Literal["exact"],
    lag: int,
    gamma_dtype: torch.dtype,
    gamma_rounding: str,
    horizon: int | None,
    backend: str,
    seed: int,
    cuda_graph: bool,
    nonfinite: str,
    lr: float | None,
) -> Options:
    """The arguments of `OnlineLearner`, checked one by one and together, and the layer's weights.

    `backend` is left to what chooses a backend.

    Raises TypeError or ValueError, naming the argument; for a combination that can't run, the nearest that can.
    """
    refuse_no_layer(layer)
    refuse_hooks(layer)
    refuse_distributed(layer)
    check.integer("batch_size", batch_size, 1)
    check.integer("update_every", update_every, 1)
    check.one_of("form", form, FORMS)
    if check.integer("lag", lag, 0) > 1:
        raise ValueError(f"lag must be 0 or 1, got {lag}")
    if horizon is not None:
        check.integer("horizon", horizon, 1)
    if gamma_dtype not in GAMMA_DTYPES:
        raise TypeError(f"gamma_dtype must be one of {', '.join(map(str, GAMMA_DTYPES))}, got {gamma_dtype}")
    rule = _rule(layer, learning)
    credit, rounds = _credit_and_rounds(rule, credit, refine)
    allowed = _form_of_rule(rule, credit, form, update_every)
    if rewrite_every is not None and allowed != "lazy":
        raise ValueError(f"rewrite_every goes with form='lazy', got form={allowed!r}")
    check.one_of("gamma_rounding", gamma_rounding, ROUNDINGS)
    if gamma_rounding == "stochastic":
        allowed = _form_of_stochastic_rounding(rule, allowed, gamma_dtype)
    check.integer("seed", seed, -(2**63))
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph must be a bool, got {type(cuda_graph).__name__}")
    check.one_of("nonfinite", nonfinite, POLICIES)
    weights = layer.weights()
    if block is not None:
        if rule != "rtrl":
            raise ValueError(f"block goes with learning='rtrl', got learning={rule!r}")
        rtrl.block_units(layer.recurrent_weights(), layer.hidden_size, block)
    if lr is not None:
        learning_rate(lr, weights[0].dtype)
        allowed = _form_of_lr(allowed, lag, update_every, layer.matrices, weights)
    check.floating("layer", weights[0], (torch.float64, torch.float32))
    for matrix, weight in zip(layer.matrices, weights, strict=True):
        check.finite(f"layer's {matrix.name}", weight)
    if weights[0].dtype == torch.float64 and gamma_dtype == torch.float32:
        gamma_dtype = torch.float64
    return Options(
        batch_size=batch_size,
        learning=rule,
        block=block,
        update_every=update_every,
        form=allowed,
        rewrite_every=rewrite_every,
        credit=credit,
        refine=refine,
        rounds=rounds,
        lag=lag,
        gamma_dtype=gamma_dtype,
        gamma_rounding=gamma_rounding,
        horizon=horizon,
        backend=backend,
        seed=seed,
        cuda_graph=cuda_graph,
        nonfinite=nonfinite,
    )


def learning_rate(value: object, dtype: torch.dtype) -> float:
    """`value` as η. Raises ValueError unless it is a number ≥ 0 that `dtype` can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"lr must be a finite number ≥ 0, got {value!r}")
    if value > torch.finfo(dtype).max:
        shown = repr(value) if isinstance(value, float) else f"an int of {value.bit_length()} bits"
        raise ValueError(f"lr must be a finite number of the layer's dtype, {dtype}, got {shown}")
    return float(value)


# Where torch keeps a module's hooks; a learner runs the layer's parts, and not the layer's own forward().
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def refuse_no_layer(layer: object) -> None:
    """Raise TypeError unless `layer` is a recurrent layer."""
    if not isinstance(layer, TwoPointRNN):
        raise TypeError(f"layer must be a recurrent layer such as RGC, got {type(layer).__name__}")


def refuse_hooks(layer: torch.nn.Module, name: str = "layer", learner: str = "an OnlineLearner") -> None:
    """Raise ValueError if the module, the argument `name`, has hooks, which its learner's steps would not run."""
    if not (
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    ):
        return
    names = [
        f"{getattr(hook, '__name__', type(hook).__name__)} in {kind}"
        for kind in _HOOKS
        for hook in getattr(layer, kind).values()
    ]
    raise ValueError(
        f"{name} must have no hooks on its forward or backward pass, which {learner} doesn't run, got "
        f"{', '.join(names)}; remove them, and compute weights by torch.nn.utils.parametrize instead"
    )


def distributed_call() -> int:
    """Which DistributedDataParallel's forward pass runs, as its id; 0 for none."""
    return id(within) if (within := getattr(DistributedDataParallel, "_active_ddp_module", None)) else 0


def _around(layer: TwoPointRNN, kind: type) -> list[Any]:
    """All modules of that kind that hold the layer."""
    objects = gc.get_objects()  # hundreds of thousands, of a few thousand types
    kinds = {each for each in set(map(type, objects)) if issubclass(each, kind)}
    return [
        each
        for each in (objects if kinds else ())
        if type(each) in kinds and any(m is layer for m in each.modules())
    ]


def refuse_distributed(layer: TwoPointRNN, learner: nn.Module | None = None, *, lr: bool = False) -> None:
    """Raise ValueError if the layer is in a DistributedDataParallel that would not serve its learner.

    It serves a learner that is in it too, and takes no step of SGD itself, if it leaves the learner's buffers alone,
    which are of each process's own batch rows. learner: None where it is only being made. It looks at all objects.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for each in _around(layer, DistributedDataParallel):
        if learner is None or not any(m is learner for m in each.modules()):
            raise ValueError(
                "layer must not be in a DistributedDataParallel, which would not reduce the gradients of an "
                "OnlineLearner outside of it: make the learner of a layer that isn't wrapped, and wrap the learner or "
                "the module that holds it, with broadcast_buffers=False; or reduce .grad between the processes before "
                "the optimizer's step"
            )
        if lr:
            raise ValueError(
                "lr can't go in a DistributedDataParallel: backward() takes the weights' step before the processes' "
                "gradients are averaged. Make the learner without lr, and use an optimizer"
            )
        own = {id(buffer) for buffer in learner.buffers()}
        shared = [
            name
            for name, buffer in each.module.named_buffers()
            if id(buffer) in own and name not in each.parameters_to_ignore
        ]
        if shared and each.broadcast_buffers:
            raise ValueError(
                f"broadcast_buffers must be False in a DistributedDataParallel with an OnlineLearner, whose buffers, "
                f"{', '.join(shared)}, are of each process's own batch rows"
            )


def refuse_fully_sharded(layer: TwoPointRNN) -> None:
    """Raise ValueError if fully_shard has the layer, whose weights then are copies that live for one forward pass."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    if _around(layer, FSDPModule):
        raise ValueError(
            "lr and cuda_graph=True can't go with fully_shard, which gathers copies of the weights for each forward "
            "pass: make the learner without them, and use an optimizer"
        )


def _rule(layer: TwoPointRNN, learning: str | None) -> str:
    """The rule that runs: the layer's own if `learning` is None."""
    name = "the layer's learning" if learning is None else "learning"
    chosen = layer.learning if learning is None else learning
    if chosen == "bptt":
        raise ValueError(
            f"{name}='bptt' needs the whole sequence, which an online learner doesn't keep: the nearest online are "
            "learning='tbptt', form='chunk' with credit='carry', and learning='rtrl', which is exact"
        )
    check.one_of(name, chosen, LEARNING)
    return chosen


def _credit_and_rounds(learning: str, credit: str, refine: object) -> tuple[str, int | None]:
    """How credit passes back within a chunk, and `Options.rounds`."""
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
            f"{asked} goes with learning='rfp', whose Γ carries what came before the chunk, got learning={learning!r}"
            + (", which is exact without it" if learning == "rtrl" else "")
        )
    return credit, None if refine == "exact" else int(refine)  # type: ignore[call-overload]


def _form_of_rule(learning: str, credit: str, form: str, update_every: int) -> Form:
    """The form that was asked for, or the only one in which the rule runs. Raises ValueError if they differ."""
    only = "chunk" if credit == "carry" else ONLY_FORM.get(learning)
    if only is not None:
        if form not in ("auto", only):
            asked = "credit='carry'" if credit == "carry" else f"learning={learning!r}"
            raise ValueError(f"{asked} runs in form={only!r} only, got form={form!r}; form='auto' chooses it")
        return only  # type: ignore[return-value]
    if form == "chunk" and update_every == 1:
        raise ValueError(
            "form='chunk' needs update_every ≥ 2, the number of steps for which the weights stay as they are, "
            "got update_every=1; form='step' serves weights that change at every step"
        )
    return form  # type: ignore[return-value]


def _form_of_stochastic_rounding(learning: str, form: str, gamma_dtype: torch.dtype) -> Form:
    """The form that rounds Γ stochastically. Raises ValueError where there is no Γ, or none that is rounded so."""
    asked = "gamma_rounding='stochastic'"
    if learning not in rfp.RULES:
        raise ValueError(f"{asked} goes with a rule of {', '.join(rfp.RULES)}, got learning={learning!r}")
    if gamma_dtype != torch.bfloat16:
        raise ValueError(f"{asked} goes with gamma_dtype=torch.bfloat16, got gamma_dtype={gamma_dtype}")
    if form not in ("auto", "step"):
        raise ValueError(f"{asked} goes with form='step', which rounds Γ at every step, got form={form!r}")
    return "step"


def _form_of_lr(
    form: str, lag: int, update_every: int, matrices: Sequence[Matrix], weights: Sequence[Tensor]
) -> Form:
    """The form in which backward() may change the weights. Raises ValueError where it can't."""
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
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"lr goes with weights that are parameters: {matrix.name} is computed from others, by a "
                "parametrization or a hook, and backward() would change the result, not these; use an optimizer"
            )
        if not weight.is_contiguous():
            raise ValueError(
                f"lr goes with contiguous weights, got {matrix.name} with strides {weight.stride()}"
            )
    return "step"


@dataclass(frozen=True)
class FormChoice:
    """The form that runs, and the predictions that it was chosen by.

    requested      the form that the options lead to; "auto" where the cost model chose
    rewrite_every  R of form "lazy"
    costs          the cost model's prediction for each form
    problem        what the cost model was told of the layer
    available      bytes that were free on the device, None if unknown
    carried_bytes  of the sensitivities that the rule carries
    made_for       B of the learner when it was made, where batch rows have come or gone since
    """

    form: str
    requested: Form
    rewrite_every: int
    costs: Sequence[cost.FormCost]
    problem: cost.Problem
    available: int | None
    carried_bytes: int
    made_for: int | None = None

    def of_rows(self, layer: TwoPointRNN, options: Options) -> FormChoice:
        """The same form for another batch size. Raises ValueError for sensitivities that don't fit in memory."""
        every = self.rewrite_every if self.form == "lazy" else options.rewrite_every
        found = choose_form(layer, replace(options, form=self.form, rewrite_every=every))  # type: ignore[arg-type]
        made_for = self.problem.batch if self.made_for is None else self.made_for
        return replace(found, requested=self.requested, made_for=made_for)

    def reason(self) -> str:
        """Why this form runs, in words."""
        from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model

        if self.requested != "auto":
            return "asked for"
        if self.made_for is not None:
            return f"chosen for batch_size={self.made_for}, and kept"
        chosen = next(each for each in self.costs if each.form == self.form)
        if self.available is not None and chosen.state_bytes > self.available:
            return "no form fits in memory; this one takes the least"
        lazy = next(each for each in self.costs if each.form == "lazy")
        fits = self.available is None or lazy.state_bytes <= self.available
        if fits and lazy.seconds < chosen.seconds:
            return f"'lazy' is chosen only where predicted {cost.LAZY_MARGIN} times as fast as any other that fits"
        step = next(each for each in self.costs if each.form == "step")
        if step.seconds < chosen.seconds:
            return "the fastest that fits in memory and serves one backward() for several steps"
        return "the fastest that fits in memory"


def choose_form(layer: TwoPointRNN, options: Options, units: int | None = None) -> FormChoice:
    """The form that `options` ask for, or the one that the cost model predicts to be fastest.

    units: how many of the layer's units run here, where others run elsewhere; None: all.

    Raises TypeError or ValueError for `rewrite_every`, and ValueError for sensitivities that don't fit in memory.
    """
    from ..planning import cost  # here: `import rjepa_triton` doesn't need the cost model
    from .counting import problem as problem_of

    first = layer.weights()[0]
    device, dtype = first.device, first.dtype
    problem = problem_of(layer, options.batch_size, options.gamma_dtype, gpu=device.type == "cuda")
    if options.backend in ("torch", "compile", "triton"):  # by name; whether it can run is checked elsewhere
        problem = replace(problem, runs=options.backend)
    if units is not None:
        problem = replace(problem, units=units)
    available, rates = available_bytes(device), cost.rates_of(device, dtype)
    rewrite_every = options.rewrite_every
    if rewrite_every is None:
        rewrite_every = cost.rewrite_every(problem, rates)
    check.integer("rewrite_every", rewrite_every, 1)
    costs = cost.form_costs(problem, options.update_every, options.horizon, rates, rewrite_every)
    requested = options.form
    if requested == "auto" and options.cuda_graph:
        requested = "step"  # the only form that a CUDA graph can capture
    # Form "step" doesn't serve a loss of several steps: whether "auto" takes it must not depend on its cost.
    eligible = [each for each in costs if each.form != "step" or options.update_every == 1]
    form = cost.cheapest(eligible, available).form if requested == "auto" else requested
    block = rtrl.block_units(
        [w.detach() for w in layer.recurrent_weights()], layer.hidden_size, options.block
    )
    carried = problem.carried_bytes(options.learning, block)
    choice = FormChoice(form, requested, rewrite_every, costs, problem, available, carried)
    if form != "history":
        _refuse_if_too_large(choice, options.learning, device)
    return choice


def _refuse_if_too_large(choice: FormChoice, learning: str, device: torch.device) -> None:
    need, available = choice.carried_bytes, choice.available
    if available is None or need <= available:
        return
    per_step = choice.problem.window_bytes(1)
    raise ValueError(
        f"learning={learning!r} in form={choice.form!r} carries sensitivities of {need:,} bytes, and {device} has "
        f"{available:,} left; with learning='rfp' form='history' takes {per_step:,} bytes for each step since reset, "
        f"so up to {available // per_step:,} steps"
    )
