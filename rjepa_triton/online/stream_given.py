"""What a `Stream` is given: arguments that are checked before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from ..rules import rfp
from .options import refuse_no_layer
from .stream_optimizer import OPTIMIZERS, refuse_late, unserved
from .stream_readout import Parts

if TYPE_CHECKING:
    from .streams import Stream


LOSSES = ("mse", "cross_entropy", "huber", "cosine", "delta")  # in the order of stream.h
NONFINITE = ("raise", "skip", "continue")


def check_options(
    layer: TwoPointRNN,
    readout: nn.Module,
    mesh: object,
    *,
    lr: float | Sequence[float],
    population: int | None,
    seeds: Sequence[int] | None,
    loss: str,
    optimizer: str | torch.optim.Optimizer,
    optimizer_options: Mapping[str, Any] | None,
    update_every: int,
    clip_norm: float | None,
    huber_delta: float,
    mean: str,
    self_prediction: bool,
    nonfinite: str,
    backend: str,
    **_of_the_learner: object,
) -> None:
    """Raise TypeError or ValueError for arguments of `Stream`, but for those that its `OnlineLearner` checks."""
    check.one_of("nonfinite", nonfinite, NONFINITE)
    check.one_of("mean", mean, ("counted", "all"))
    given = isinstance(optimizer, torch.optim.Optimizer)
    if population is not None and given:
        raise ValueError(
            "optimizer must be a name with a population, whose networks have weights of their own"
        )
    if seeds is not None and population is None:
        raise ValueError(f"seeds go with population, got seeds={seeds!r} and no population")
    if isinstance(lr, Sequence) and population is None:
        raise ValueError(f"lr must be one number without a population, got {len(lr)} of them")
    if not isinstance(readout, nn.Module):
        raise TypeError(f"readout must be a torch.nn.Module, got {type(readout).__name__}")
    check.one_of("loss", loss, LOSSES)
    if not given:
        check.one_of("optimizer", optimizer, tuple(OPTIMIZERS))
    elif optimizer_options is not None:
        raise ValueError("optimizer_options go with the name of an optimizer, got an optimizer")
    check.one_of("backend", backend, ("auto", "compile", "triton", "torch"))
    check.integer("update_every", update_every, 1)
    if clip_norm is not None:
        positive("clip_norm", clip_norm)
    positive("huber_delta", huber_delta)
    refuse_no_layer(layer)
    refuse_foreign(layer, readout)
    if mesh is not None and population is None:
        _refuse_with_rows(optimizer, lr, optimizer_options, self_prediction, backend)


def _refuse_with_rows(
    optimizer: str | torch.optim.Optimizer,
    lr: float | Sequence[float],
    optimizer_options: Mapping[str, Any] | None,
    self_prediction: bool,
    backend: str,
) -> None:
    """Raise ValueError for what doesn't go with rows on the ranks of a mesh; as torch.optim does for its options."""
    if not isinstance(optimizer, str):
        raise ValueError(
            "optimizer must be a name with mesh, by which the weights become others, got an optimizer"
        )
    if self_prediction:
        raise ValueError("self_prediction doesn't go with mesh: leave one of them out")
    if backend not in ("auto", "torch"):
        raise ValueError(f"mesh goes with backend='auto' or 'torch', the loop over steps, got {backend!r}")
    OPTIMIZERS[optimizer](
        [nn.Parameter(torch.empty(1, device="cpu"))], lr=lr, **dict(optimizer_options or {})
    )


def checked(
    stream: Stream,
    x: Tensor,
    target: Tensor | None,
    resets: Tensor | None,
    mask: Tensor | None,
    lr: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[list[float]]]:
    """The arguments of `run`, checked, with what `nonfinite` makes of them; the rates of each group and step."""
    if stream._pending is not None:
        raise RuntimeError("run() came after step() without its learn(target)")
    refuse_changed(stream)
    x = check.tensor("x", x)
    check.shape("x", x, ("T", *stream._step_shape), "to match the stream")
    check.like("x", x, "the layer", stream.layer.weights()[0])
    steps = x.shape[0]
    target = checked_target(stream, target, steps)
    resets, mask = (
        None if given is None else check.mask(name, given, (steps, stream.batch_size), x.device)
        for name, given in (("resets", resets), ("mask", mask))
    )
    rates = rates_of(stream, lr, steps)
    if stream.nonfinite == "continue":
        return x, target, resets, counting(stream, mask, resets, steps), rates
    for name, value in (("x", x), ("target", target)):
        if value is None or not value.is_floating_point() or bool(value.sum().isfinite()):
            continue
        bad = ~value.isfinite().all(-1)
        if not bad.any():  # the sum alone has overflowed
            continue
        if stream.nonfinite == "raise":
            t, b = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must hold finite numbers, got one that isn't at step {t}, batch row {b}"
            )
        mask = ~bad if mask is None else mask & ~bad
        if name == "x":
            x = x.masked_fill(bad[..., None], 0)
            resets = bad if resets is None else resets | bad
        else:
            target = value.masked_fill(bad[..., None], 0)
    return x, target, resets, counting(stream, mask, resets, steps), rates


def counting(stream: Stream, mask: Tensor | None, resets: Tensor | None, steps: int) -> Tensor | None:
    """The mask of a call; with `self_prediction`, of rows whose step isn't the first of an episode."""
    if not stream.self_prediction:
        return mask
    counts = begun(stream).expand(steps, -1).clone()
    counts[1:] = True
    for given in (None if resets is None else ~resets, mask):
        counts = counts if given is None else counts & given
    return counts


def begun(stream: Stream) -> Tensor:
    """The rows (B,) whose episode has had a step, but for those that a `reset` since then lets begin anew."""
    forget = stream.learner._forget
    return stream.begun if forget is None else stream.begun & ~forget


def refuse_changed(stream: Stream) -> None:
    """Raise ValueError unless layer, readout, optimizer and learner go with each other as when the stream was made."""
    mine, optimizer = set(stream.parameters), stream.optimizer
    if {*stream.layer.parameters(), *stream.readout.parameters()} != mine:
        raise ValueError("a weight of the layer or the readout was replaced: make a new Stream")
    if stream.groups().keys() != mine:
        raise ValueError(
            "optimizer must still have the weights of the layer and the readout, and no others, in its groups"
        )
    if stream.learner.batch_size != stream.batch_size:
        raise ValueError(
            f"the stream's learner must keep its {stream.batch_size} batch rows, got {stream.learner.batch_size}: make "
            "a new Stream"
        )
    refuse_late(optimizer)


def refuse_for_self_prediction(stream: Stream) -> None:
    """Raise ValueError unless the layer can predict itself with this loss, readout and rule."""
    units, outputs = stream.layer.hidden_size, outputs_of(stream)
    if stream.loss in ("cross_entropy", "delta"):
        raise ValueError(
            f"self_prediction goes with loss='mse', 'huber' or 'cosine', got {stream.loss!r}, whose target isn't a "
            "state"
        )
    if outputs is not None and outputs != units:
        raise ValueError(
            f"readout must give the layer's {units} units with self_prediction, got {outputs} outputs"
        )
    if stream.learner.learning not in rfp.RULES:
        raise ValueError(
            f"self_prediction goes with the rules {', '.join(rfp.RULES)}, got {stream.learner.learning!r}; the "
            "nearest is an OnlineLearner with lag=1"
        )
    if type(stream.layer).readout is not TwoPointRNN.readout:
        raise ValueError(
            f"self_prediction goes with a layer whose output is a state, got {type(stream.layer).__name__}"
        )


def checked_target(stream: Stream, target: Tensor | None, steps: int) -> Tensor | None:
    if stream.self_prediction and target is None:
        return None
    target = check.tensor("target", target)
    outputs = outputs_of(stream)
    if stream.loss == "cross_entropy":
        check.shape("target", target, (steps, stream.batch_size), "of classes, for the loss 'cross_entropy'")
        if target.dtype != torch.int64:
            raise TypeError(f"target must hold classes as int64, got {target.dtype}")
        if target.numel() and outputs is not None:
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= outputs:
                raise ValueError(
                    f"target must hold classes from 0 to {outputs - 1}, got one that is {low if low < 0 else high}"
                )
        return target
    wanted: tuple[int | str, ...] = (steps, stream.batch_size, "O" if outputs is None else outputs)
    check.shape("target", target, wanted, f"for the loss {stream.loss!r}")
    check.like("target", target, "the layer", stream.layer.weights()[0])
    return target.detach()


def outputs_of(stream: Stream) -> int | None:
    """O, where the readout says it."""
    parts = Parts.of(stream.readout, stream.layer.hidden_size)
    return None if isinstance(parts, str) else parts.sizes(stream.layer.hidden_size)[-1]


def rates_of(stream: Stream, lr: Tensor | None, steps: int) -> list[list[float]]:
    """The learning rate of each of the optimizer's groups at each step."""
    groups = stream.optimizer.param_groups
    if lr is None:
        return [[float(group["lr"])] * steps for group in groups]
    if check.tensor("lr", lr).shape != (steps,):
        raise ValueError(f"lr must have shape ({steps},), one rate for each step, got {tuple(lr.shape)}")
    if steps and not bool((lr >= 0).all()):
        raise ValueError("lr must hold numbers of at least 0, got one that isn't")
    return [lr.double().tolist()] * len(groups)


def positive(name: str, value: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not value > 0
        or value == float("inf")
    ):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def refuse_foreign(layer: TwoPointRNN, readout: nn.Module) -> None:
    """Raise ValueError unless a linear readout fits the layer."""
    weight = layer.weights()[0]
    first = readout[0] if isinstance(readout, nn.Sequential) and len(readout) else readout
    if isinstance(first, nn.Linear):
        if first.in_features != layer.hidden_size:
            raise ValueError(
                f"readout must take the layer's {layer.hidden_size} units, got in_features={first.in_features}"
            )
        check.like("readout", first.weight, "the layer", weight)


def served_parts(stream: Stream, rules: Collection[str]) -> Parts | str:
    """The readout's parts, or why neither compiled code nor the kernel, which have these rules, takes the stream."""
    layer, readout, learner = stream.layer, stream.readout, stream.learner
    weight = layer.weights()[0]
    parts = Parts.of(readout, layer.hidden_size)
    if isinstance(parts, str):
        return parts
    if learner.learning not in rules:
        return f"compiled code takes the rules {', '.join(rules)}, got {learner.learning!r}"
    if type(layer).readout is not TwoPointRNN.readout:
        return f"{type(layer).__name__} computes its output outside of the recurrence"
    if stream.kind < 0:
        known = ", ".join(kind.__name__ for kind in OPTIMIZERS.values())
        return f"compiled code takes the optimizers {known}, got {type(stream.optimizer).__name__}"
    if why := unserved(stream.optimizer, stream.kind):
        return why
    if "parametrizations" in layer._modules:
        return "a weight is computed from others"
    if any(one.dtype != weight.dtype or one.device != weight.device for one in stream.parameters):
        return f"compiled code takes weights that are all {weight.dtype} on {weight.device}"
    if len(stream.parameters) != len(layer.weights()) + len(parts.parameters()):
        return "the layer or the readout has parameters that no step uses, or shares them"
    if any(not parameter.is_contiguous() for parameter in stream.parameters):
        return "a weight isn't contiguous"
    return parts
