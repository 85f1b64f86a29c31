"""A stream of online learning in one call: T steps of a layer, a readout, a loss and an optimizer.

`Stream` is an `OnlineLearner`, a readout, a loss of torch.nn.functional and an optimizer of torch.optim. Where compiled
code serves (`explain` says whether), `run` is one call of it, on the same memory: the layer's and the readout's
parameters, the learner's state and Γ, and the optimizer's moments. Elsewhere `run` is the loop over steps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from .learner import OnlineLearner
from .options import Learning
from .stream_code import LOSSES, OPTIMIZERS, Compiled, Result
from .stream_readout import Parts

__all__ = ["Result", "Stream"]

Loss = Literal["mse", "cross_entropy", "huber", "cosine", "delta"]
Nonfinite = Literal["raise", "skip", "continue"]
NONFINITE = ("raise", "skip", "continue")
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]


class Stream:
    """Learns online from a stream, many steps in one call.

        stream = Stream(layer, nn.Linear(layer.hidden_size, O), batch_size, lr=0.01)
        losses, outputs, state = stream.run(x, target)        # x (T, B, F), target (T, B, O)

    Each step is, with torch.optim's own optimizer and its defaults,

        output = readout(learner.step(x[t]))
        loss = torch.nn.functional.mse_loss(output, target[t])
        optimizer.zero_grad(); loss.backward(); optimizer.step()

    and any partition of T into calls gives the same. The weights of `layer` and `readout` change in place. For an
    environment in the loop, `step(x) -> output` and `learn(target)` are the two halves of a step.

    Args:
        layer: the recurrent layer.
        readout: nn.Linear; nn.Sequential of linear parts and activations; `Residual` of these, h + inner(h); or any
            module from (B, N) to (B, O), which runs by the loop over steps.
        batch_size: B, the number of batch rows that run side by side.
        loss: the mean over batch rows (and over outputs, but for "cross_entropy" and "cosine") of
            "mse"            (output - target)²
            "huber"          torch.nn.functional.huber_loss, whose delta is `huber_delta`
            "cross_entropy"  for target (T, B), the classes as int64
            "cosine"         1 - cosine similarity
            "delta"          target is ∂L/∂output (T, B, O) itself; the loss told is Σ target · output
        optimizer: "sgd", "adam", "adamw" or "rmsprop".
        lr: its learning rate; `run` may take one for each step.
        optimizer_options: further arguments of torch.optim's class, such as {"momentum": 0.9}.
        learning: the rule; None: the layer's own. As for `OnlineLearner`.
        update_every: C ≥ 1: the optimizer steps after every C-th step, by the sum of C gradients.
        clip_norm: the largest norm of all weights' gradient (torch.nn.utils.clip_grad_norm_); None: no limit.
        huber_delta: δ > 0 of the loss "huber".
        population: P: learn P independent networks, each a copy of `layer` and `readout` whose parameters are drawn
            anew with a seed of its own; `members` lists their streams. `run` takes one stream for all, or P of them, x
            (P, T, B, F), and gives losses (P, T) and outputs (P, T, B, O); lr may be P numbers. On a CPU threads
            share the networks. step() and learn() are the members' own.
        seeds: P seeds; None: 0 … P - 1.
        nonfinite: what `run` does about NaN and infinities in x or target: "raise" ValueError, with nothing changed;
            "skip" the batch row at that step: it has no part in the loss, and starts a new episode if x isn't finite;
            "continue". Exploding sensitivities and losses are told by a RuntimeWarning.
        backend: "auto"; "compile": raise ValueError where compiled code doesn't serve; "torch": the loop over steps.

    Raises TypeError or ValueError for an argument out of its range.
    """

    layer: TwoPointRNN
    readout: nn.Module
    batch_size: int
    loss: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    learner: OnlineLearner
    why: str

    def __init__(
        self,
        layer: TwoPointRNN,
        readout: nn.Module,
        batch_size: int = 1,
        *,
        loss: Loss = "mse",
        optimizer: OptimizerName = "sgd",
        lr: float | Sequence[float] = 1e-3,
        optimizer_options: Mapping[str, Any] | None = None,
        learning: Learning | None = None,
        update_every: int = 1,
        clip_norm: float | None = None,
        huber_delta: float = 1.0,
        population: int | None = None,
        seeds: Sequence[int] | None = None,
        nonfinite: Nonfinite = "raise",
        backend: str = "auto",
    ) -> None:
        check.one_of("nonfinite", nonfinite, NONFINITE)
        self.nonfinite = nonfinite
        self.members: list[Stream] | None = None
        if population is not None:
            self.members = _members(
                layer,
                readout,
                batch_size,
                check.integer("population", population, 1),
                seeds,
                lr,
                {
                    "loss": loss,
                    "optimizer": optimizer,
                    "optimizer_options": optimizer_options,
                    "learning": learning,
                    "update_every": update_every,
                    "clip_norm": clip_norm,
                    "huber_delta": huber_delta,
                    "nonfinite": nonfinite,
                    "backend": backend,
                },
            )
            self.batch_size, self.layer, self.loss = self.members[0].batch_size, layer, loss
            self.why = self.members[0].why
            return
        if seeds is not None:
            raise ValueError(f"seeds go with population, got seeds={seeds!r} and no population")
        if isinstance(lr, Sequence):
            raise ValueError(f"lr must be one number without a population, got {len(lr)} of them")
        if not isinstance(readout, nn.Module):
            raise TypeError(f"readout must be a torch.nn.Module, got {type(readout).__name__}")
        check.one_of("loss", loss, LOSSES)
        self.loss = loss
        check.one_of("optimizer", optimizer, tuple(OPTIMIZERS))
        check.one_of("backend", backend, ("auto", "compile", "torch"))
        self.update_every = check.integer("update_every", update_every, 1)
        self.clip_norm = None if clip_norm is None else _positive("clip_norm", clip_norm)
        self.huber_delta = _positive("huber_delta", huber_delta)
        watch: Literal["ignore", "warn"] = "ignore" if nonfinite == "continue" else "warn"
        self.learner = OnlineLearner(layer, batch_size, learning=learning, form="step", nonfinite=watch)
        self.layer, self.readout, self.batch_size = layer, readout, self.learner.batch_size
        _refuse_foreign(layer, readout)
        self.parameters = list(dict.fromkeys([*layer.parameters(), *readout.parameters()]))
        self.kind = list(OPTIMIZERS).index(optimizer)
        self.optimizer = OPTIMIZERS[optimizer](self.parameters, lr=lr, **dict(optimizer_options or {}))
        self.position = 0  # how many of the C steps between two updates have run
        self._pending: Tensor | None = None  # the output of step(), until learn()
        self._step_shape = (self.batch_size, layer.fan_in)
        self._compiled: Compiled | None = None
        self._one_step: Compiled | None = None  # what runs the pending step; None: the loop
        self._served = True  # whether the compiled calls ran last: they hold the gradients' sum
        self.why = "asked for"
        if backend != "torch":
            made = Compiled.of(self)
            if isinstance(made, Compiled):
                self._compiled, self.why = made, "one call for all steps"
            else:
                self.why = made
                if backend == "compile":
                    raise ValueError(f"backend='compile' can't run: {made}")

    @property
    def backend(self) -> str:
        """What runs the stream, "compile" or "torch"."""
        if self.members is not None:
            return self.members[0].backend
        return "torch" if self._compiled is None else "compile"

    def explain(self) -> None:
        """Print what runs the stream, and why."""
        print(f"backend = {self.backend!r}: {self.why}")

    def run(
        self,
        x: Tensor,
        target: Tensor,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        lr: Tensor | None = None,
    ) -> Result:
        """Learn from T steps.

        Args:
            x: (T, B, F), F the layer's fan_in.
            target: (T, B, O); for "cross_entropy" (T, B), classes from 0 on.
            resets: (T, B) bool or None: rows in which a new episode starts at that step.
            mask: (T, B) bool or None: the rows that a step's loss is the mean over. A step without any has the loss 0
                and a gradient of zero.
            lr: (T,) learning rates, one for each step; None: the optimizer's.

        Mutates the weights, the learner and the optimizer. Raises TypeError or ValueError, with nothing changed, for an
        argument that doesn't fit.
        """
        if self.members is not None:
            return self._run_members(self.members, x, target, resets, mask, lr)
        given = self._checked(x, target, resets, mask, lr)
        compiled = self._serving()
        result = self._loop(*given) if compiled is None else compiled.run(*given)
        self._tell(result.losses)
        return result

    def _checked(
        self, x: Tensor, target: Tensor, resets: Tensor | None, mask: Tensor | None, lr: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[float]]:
        """The arguments of `run`, checked, with what `nonfinite` makes of them; the learning rate of each step."""
        if self._pending is not None:
            raise RuntimeError("run() came after step() without its learn(target)")
        x = check.tensor("x", x)
        check.shape("x", x, ("T", *self._step_shape), "to match the stream")
        check.like("x", x, "the layer", self.layer.weights()[0])
        steps = x.shape[0]
        target = self._checked_target(target, steps)
        resets, mask = (
            None if given is None else check.mask(name, given, (steps, self.batch_size), x.device)
            for name, given in (("resets", resets), ("mask", mask))
        )
        rates = self._rates(lr, steps)
        if self.nonfinite == "continue":
            return x, target, resets, mask, rates
        for name, value in (("x", x), ("target", target)):
            if not value.is_floating_point() or bool(value.sum().isfinite()):
                continue
            bad = ~value.isfinite().all(-1)
            if not bad.any():  # the sum alone has overflowed
                continue
            if self.nonfinite == "raise":
                t, b = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"{name} must hold finite numbers, got one that isn't at step {t}, batch row {b}"
                )
            mask = ~bad if mask is None else mask & ~bad
            if name == "x":
                x = x.masked_fill(bad[..., None], 0)
                resets = bad if resets is None else resets | bad
            else:
                target = target.masked_fill(bad[..., None], 0)
        return x, target, resets, mask, rates

    def _tell(self, losses: Tensor) -> None:
        """Warn of losses that aren't finite."""
        if self.nonfinite != "continue" and len(losses) and not bool(losses.sum().isfinite()):
            bad = ~losses.isfinite()
            if bad.any():
                t = int(bad.nonzero()[0])
                warnings.warn(
                    f"the loss of a Stream isn't finite from step {t} of this call on: its weights or sensitivities "
                    "have grown too large",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _run_members(
        self,
        members: Sequence[Stream],
        x: Tensor,
        target: Tensor,
        resets: Tensor | None,
        mask: Tensor | None,
        lr: Tensor | None,
    ) -> Result:
        """`run` of a population."""
        count = len(members)

        def split(name: str, value: Tensor | None, dims: int) -> list[Any]:
            """The P networks' own, of one for all or of P."""
            if value is None:
                return [None] * count
            if check.tensor(name, value).dim() == dims:
                return [value] * count
            if value.dim() == dims + 1 and len(value) == count:
                return list(value)
            raise ValueError(
                f"{name} must have {dims} dimensions, one for all networks, or {dims + 1} with population={count} "
                f"first, got shape {tuple(value.shape)}"
            )

        given = [
            member._checked(*each)
            for member, *each in zip(
                members,
                split("x", x, 3),
                split("target", target, 2 if self.loss == "cross_entropy" else 3),
                split("resets", resets, 2),
                split("mask", mask, 2),
                split("lr", lr, 1),
                strict=True,
            )
        ]
        compiled = [one for member in members if (one := member._serving()) is not None]
        if len(compiled) == count:
            results = Compiled.run_all(compiled, given)
        else:
            for member in members:
                member._serving(never=True)
            results = [member._loop(*each) for member, each in zip(members, given, strict=True)]
        for member, result in zip(members, results, strict=True):
            member._tell(result.losses)
        return Result(
            torch.stack([result.losses for result in results]),
            torch.stack([result.outputs for result in results]),
            [result.state for result in results],
        )

    def _checked_target(self, target: Tensor, steps: int) -> Tensor:
        target = check.tensor("target", target)
        outputs = self._outputs()
        if self.loss == "cross_entropy":
            check.shape(
                "target", target, (steps, self.batch_size), "of classes, for the loss 'cross_entropy'"
            )
            if target.dtype != torch.int64:
                raise TypeError(f"target must hold classes as int64, got {target.dtype}")
            if target.numel() and outputs is not None:
                low, high = int(target.min()), int(target.max())
                if low < 0 or high >= outputs:
                    raise ValueError(
                        f"target must hold classes from 0 to {outputs - 1}, got one that is {low if low < 0 else high}"
                    )
            return target
        wanted: tuple[int | str, ...] = (steps, self.batch_size, "O" if outputs is None else outputs)
        check.shape("target", target, wanted, f"for the loss {self.loss!r}")
        check.like("target", target, "the layer", self.layer.weights()[0])
        return target.detach()

    def _outputs(self) -> int | None:
        """O, where the readout says it."""
        parts = Parts.of(self.readout, self.layer.hidden_size)
        return None if isinstance(parts, str) else parts.sizes(self.layer.hidden_size)[-1]

    def _rates(self, lr: Tensor | None, steps: int) -> list[float]:
        if lr is None:
            return [float(self.optimizer.param_groups[0]["lr"])] * steps
        if check.tensor("lr", lr).shape != (steps,):
            raise ValueError(f"lr must have shape ({steps},), one rate for each step, got {tuple(lr.shape)}")
        if steps and not bool((lr >= 0).all()):
            raise ValueError("lr must hold numbers of at least 0, got one that isn't")
        found: list[float] = lr.double().tolist()
        return found

    def step(self, x: Tensor) -> Tensor:
        """The first half of a step: x (B, F) → the output (B, O), detached. `learn` is the other half.

        Not of a population, whose `members` have it. Raises RuntimeError if the step before wasn't learned from;
        TypeError or ValueError for x.
        """
        self._refuse_population("step")
        if self._pending is not None:
            raise RuntimeError("step() came twice without learn(target) in between")
        compiled = self._one_step
        if compiled is None or not compiled.is_ready():
            self._one_step = compiled = self._serving()
        if compiled is None:
            output = self.readout(self.learner.step(x))
            self._pending = output
            return output.detach().clone()
        weight = self.parameters[0]
        if not isinstance(x, Tensor) or x.dtype is not weight.dtype or x.shape != self._step_shape:
            check.shape("x", check.tensor("x", x), self._step_shape, "to match the stream")
            check.like("x", x, "the layer", weight)
        self._pending = output = compiled.step(x)
        return output

    def learn(self, target: Tensor, mask: Tensor | None = None) -> float:
        """The other half of a step: learn from what `step` gave, and return the loss. target (B, O), or (B,) classes.

        Raises RuntimeError if no step is pending; TypeError or ValueError for target and mask.
        """
        self._refuse_population("learn")
        output = self._pending
        if output is None:
            raise RuntimeError("learn(target) came without a step(x) before it")
        if target.dtype is not output.dtype or target.shape != output.shape:
            target = self._checked_target(check.tensor("target", target)[None], 1)[0]
        if mask is not None:
            mask = check.mask("mask", mask, (self.batch_size,), target.device)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self._pending = None
        if self._one_step is not None:
            return self._one_step.learn(target, mask, rate)
        return float(self._learn_from(output, target, mask, rate))

    def reset(self, mask: Tensor | None = None) -> None:
        """Start a new episode at the next step in the batch rows where mask (B,) is True, or in all."""
        if self.members is not None:
            for member in self.members:
                member.reset(mask)
            return
        self.learner.reset(mask)

    def _serving(self, never: bool = False) -> Compiled | None:
        """The compiled calls if they serve now, else None: the loop does. It gets the gradients' sum so far."""
        compiled = self._compiled
        if compiled is None:
            return None
        serves = not never and compiled.obstacle() is None
        if serves != self._served:
            if self.position:
                (compiled.take_gradients if serves else compiled.give_gradients)()
            compiled.renew()
            self._served = serves
        return compiled if serves else None

    def _refuse_population(self, name: str) -> None:
        if self.members is not None:
            raise ValueError(f"{name}() is of one network: call it of one of `members`")

    def _loop(
        self, x: Tensor, target: Tensor, resets: Tensor | None, mask: Tensor | None, rates: Sequence[float]
    ) -> Result:
        """The steps one by one."""
        losses, outputs, groups = [], [], self.optimizer.param_groups
        kept = [group["lr"] for group in groups]
        for t in range(len(x)):
            if resets is not None and bool(resets[t].any()):
                self.learner.reset(resets[t])
            output = self.readout(self.learner.step(x[t]))
            outputs.append(output.detach().clone())
            losses.append(self._learn_from(output, target[t], None if mask is None else mask[t], rates[t]))
        for group, rate in zip(groups, kept, strict=True):
            group["lr"] = rate
        return Result(torch.stack(losses), torch.stack(outputs), self.learner.state)

    def _learn_from(self, output: Tensor, target: Tensor, mask: Tensor | None, rate: float) -> Tensor:
        loss = self.loss_of(output, target, mask)
        if self.position == 0:
            self.optimizer.zero_grad()
        loss.backward()
        self.position = (self.position + 1) % self.update_every
        if self.position == 0:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        return loss.detach()

    def loss_of(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of one step: output (B, O), target (B, O) or (B,), mask (B,) or None."""
        if self.loss == "delta":
            rows = (output * target).sum(-1)
            return rows.sum() if mask is None else rows[mask].sum()
        if self.loss == "cross_entropy":
            rows = F.cross_entropy(output, target, reduction="none")
        elif self.loss == "cosine":
            rows = 1 - F.cosine_similarity(output, target)
        elif self.loss == "huber":
            rows = F.huber_loss(output, target, reduction="none", delta=self.huber_delta).mean(-1)
        else:
            rows = (output - target).square().mean(-1)
        if mask is None:
            return rows.mean()
        return torch.where(mask, rows, 0).sum() / mask.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed stream needs: weights, the learner's state with Γ, the optimizer's, and the gradients'
        sum since its last step.
        """
        if self.members is not None:
            return {"members": [member.state_dict() for member in self.members]}
        return {
            "layer": self.layer.state_dict(),
            "readout": self.readout.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "gradients": self._gradients() if self.position else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that made `state` was. Raises TypeError or ValueError if it doesn't fit."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {type(state).__name__}")
        if self.members is not None:
            states = state.get("members")
            if not isinstance(states, Sequence) or len(states) != len(self.members):
                raise ValueError(f"state must be of a population of {len(self.members)}")
            for member, one in zip(self.members, states, strict=True):
                member.learner.refuse_foreign(one["learner"])
            for member, one in zip(self.members, states, strict=True):
                member.load_state_dict(one)
            return
        missing = [
            k for k in ("layer", "readout", "learner", "optimizer", "position", "gradients") if k not in state
        ]
        if missing:
            raise ValueError(f"state must be what state_dict() gave, and lacks {', '.join(missing)}")
        self.learner.refuse_foreign(state["learner"])
        if state["position"] and len(state["gradients"]) != len(self.parameters):
            raise ValueError(f"state must have the gradients of {len(self.parameters)} parameters")
        before = copy.deepcopy(
            [self.layer.state_dict(), self.readout.state_dict(), self.optimizer.state_dict()]
        )
        owners = (self.layer, self.readout, self.optimizer)
        try:
            for owner, name in zip(owners, ("layer", "readout", "optimizer"), strict=True):
                owner.load_state_dict(state[name])
        except BaseException:
            for owner, value in zip(owners, before, strict=True):
                owner.load_state_dict(value)
            raise
        self.learner.load_state_dict(state["learner"])
        self.position, self._pending, self._served = state["position"], None, True
        if self._compiled is not None:
            self._compiled.forget()
        if self.position:
            for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            if self._compiled is not None:
                self._compiled.take_gradients()

    def _gradients(self) -> list[Tensor | None]:
        """The gradients' sum since the optimizer's last step, of each of `parameters`."""
        if self._compiled is not None and self._served:
            self._compiled.give_gradients()
        return [parameter.grad for parameter in self.parameters]

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: without what is of this process. A copy can't learn from a step of this one."""
        if self.members is None and self.position:
            self._gradients()
        serves = self.backend == "compile"
        gone = {"_compiled": None, "_one_step": None, "_pending": None, "_served": True}
        return {**self.__dict__, **gone, "_serves": serves}

    def __setstate__(self, state: dict[str, Any]) -> None:
        serves = state.pop("_serves")
        self.__dict__.update(state)
        if serves and self.members is None:
            made = Compiled.of(self)
            if isinstance(made, Compiled):
                self._compiled = made
                if self.position:
                    made.take_gradients()
            else:
                self.why = made


def _members(
    layer: TwoPointRNN,
    readout: nn.Module,
    batch_size: int,
    population: int,
    seeds: Sequence[int] | None,
    lr: float | Sequence[float],
    options: Mapping[str, Any],
) -> list[Stream]:
    """The streams of a population, on copies of the layer and the readout. Raises TypeError or ValueError."""
    own = list(range(population)) if seeds is None else list(seeds)
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * population
    for name, value in (("seeds", own), ("lr", rates)):
        if len(value) != population:
            raise ValueError(f"{name} must be {population} numbers, one for each network, got {len(value)}")
    found = []
    for seed, rate in zip(own, rates, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check.integer("seeds", seed, 0))
            copies = copy.deepcopy((layer, readout))
            for module in (each for of in copies for each in of.modules()):
                if callable(draw := getattr(module, "reset_parameters", None)):
                    draw()
        found.append(Stream(*copies, batch_size, lr=rate, **options))
    return found


def _positive(name: str, value: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not value > 0
        or value == float("inf")
    ):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _refuse_foreign(layer: TwoPointRNN, readout: nn.Module) -> None:
    """Raise ValueError unless a linear readout fits the layer."""
    weight = layer.weights()[0]
    first = readout[0] if isinstance(readout, nn.Sequential) and len(readout) else readout
    if isinstance(first, nn.Linear):
        if first.in_features != layer.hidden_size:
            raise ValueError(
                f"readout must take the layer's {layer.hidden_size} units, got in_features={first.in_features}"
            )
        check.like("readout", first.weight, "the layer", weight)
