"""A stream of online learning in one call: T steps of a layer, a readout, a loss and an optimizer.

`Stream` is an `OnlineLearner`, a readout, a loss of torch.nn.functional and an optimizer of torch.optim. Where compiled
code serves (`explain` says whether), `run` is one call of it, on the same memory: the layer's and the readout's
parameters, the learner's state and Γ, and the optimizer's moments. Elsewhere `run` is the loop over steps.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from . import checkpoint, sharded, stream_given
from .learner import OnlineLearner
from .options import Learning
from .population import Population
from .sensitivity import Sensitivity
from .stream_code import Compiled, Result
from .stream_kernel import InKernel
from .stream_optimizer import OPTIMIZERS, clip_

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Result", "Stream"]

Loss = Literal["mse", "cross_entropy", "huber", "cosine", "delta"]
Nonfinite = Literal["raise", "skip", "continue"]
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

    With `self_prediction`, the layer predicts itself, without a target:

        h(t) = learner.step(x[t])
        loss = torch.nn.functional.mse_loss(readout(h(t-1)), h(t).detach())

    is learned from with the sensitivities of h(t-1), in rows whose step t isn't the first of an episode. A step in
    which no row counts is not learned from: the optimizer takes no step, and `update_every` doesn't count it. With a
    target, target[t] takes the place of h(t): it is predicted from h(t-1).

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
        optimizer: "sgd", "adam", "adamw" or "rmsprop"; or an optimizer of torch.optim that has just the weights of
            `layer` and `readout`, in groups with learning rates of their own if need be.
        lr: its learning rate, which an optimizer that is given has already; `run` may take one for each step.
        optimizer_options: further arguments of torch.optim's class, such as {"momentum": 0.9}.
        learning, block: the rule; None: the layer's own. As for `OnlineLearner`.
        update_every: C ≥ 1: the optimizer steps after every C-th step, by the sum of C gradients.
        clip_norm: the largest norm of all weights' gradient (torch.nn.utils.clip_grad_norm_); None: no limit.
        huber_delta: δ > 0 of the loss "huber".
        mean: a step's loss is the mean over "counted" rows, those of `mask`; or over "all", where others' loss is 0.
        self_prediction: learn to predict the layer's next output. Goes with the losses "mse", "huber" and "cosine", and
            a readout that gives as many numbers as the layer has units.
        population: P: learn P independent networks, each a copy of `layer` and `readout` whose parameters are drawn
            anew with a seed of its own; `members` lists their streams. `run` takes one stream for all, or P of them, x
            (P, T, B, F), and gives losses (P, T) and outputs (P, T, B, O); lr may be P numbers. On a CPU threads
            share the networks. step() and learn() are the members' own.
        seeds: P seeds; None: 0 … P - 1.
        nonfinite: what `run` does about NaN and infinities in x or target: "raise" ValueError, with nothing changed;
            "skip" the batch row at that step: it has no part in the loss, and starts a new episode if x isn't finite;
            "continue". Exploding sensitivities and losses are told by a RuntimeWarning.
        backend: "auto": compiled code on a CPU, a Triton kernel on a GPU, and the loop over steps where these don't
            serve; "compile" or "triton": raise ValueError where it doesn't serve; "torch": the loop over steps.
        mesh: a DeviceMesh of one dimension, on whose ranks the rows of the layer's weights and of Γ lie, as for
            `OnlineLearner`: the loop over steps runs, and a readout is on every rank. With `population` the networks
            are divided among the ranks, and `members` are this rank's. Every rank makes the same calls with the same
            arguments, and gets the same results. All weights start with the values of the mesh's first rank.

    Raises TypeError or ValueError for an argument out of its range; with a mesh on every rank, and RuntimeError where a
    rank has ended or doesn't come in time.
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
        optimizer: OptimizerName | torch.optim.Optimizer = "sgd",
        lr: float | Sequence[float] = 1e-3,
        optimizer_options: Mapping[str, Any] | None = None,
        learning: Learning | None = None,
        block: int | None = None,
        update_every: int = 1,
        clip_norm: float | None = None,
        huber_delta: float = 1.0,
        mean: Literal["counted", "all"] = "counted",
        self_prediction: bool = False,
        population: int | None = None,
        seeds: Sequence[int] | None = None,
        nonfinite: Nonfinite = "raise",
        backend: str = "auto",
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.group = None if mesh is None else sharded.one_dimensional(mesh).get_group()
        options: dict[str, Any] = {
            "loss": loss,
            "optimizer": optimizer,
            "optimizer_options": optimizer_options,
            "learning": learning,
            "block": block,
            "update_every": update_every,
            "clip_norm": clip_norm,
            "huber_delta": huber_delta,
            "mean": mean,
            "self_prediction": self_prediction,
            "nonfinite": nonfinite,
            "backend": backend,
        }
        given = {"batch_size": batch_size, "lr": lr, "population": population, "seeds": seeds, **options}
        with sharded.together(self.group, "stream", **given):
            stream_given.check_options(layer, readout, mesh, **given)
        self.loss, self.nonfinite, self.mean, self.self_prediction = loss, nonfinite, mean, self_prediction
        self.layer = layer
        self.population: Population | None = None
        if population is not None:
            make = functools.partial(Stream, batch_size=batch_size, **options)
            self.population = Population(make, layer, readout, population, seeds, lr, mesh)
            self.batch_size, self.why = batch_size, self.population.members[0].why
            return
        self.update_every, self.huber_delta = update_every, float(huber_delta)
        self.clip_norm = None if clip_norm is None else float(clip_norm)
        self.learner = OnlineLearner(
            layer,
            batch_size,
            learning=learning,
            block=block,
            form="step",
            nonfinite="ignore" if nonfinite == "continue" else "warn",
            mesh=mesh,
        )
        if mesh is not None:
            sharded.make_alike(readout.parameters(), mesh)
        self.readout, self.batch_size = readout, self.learner.batch_size
        self.parameters = list(dict.fromkeys([*layer.parameters(), *readout.parameters()]))
        if self_prediction:
            stream_given.refuse_for_self_prediction(self)
        if isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
            if set(self.groups()) != set(self.parameters):
                raise ValueError(
                    "optimizer must have the weights of the layer and the readout, and no others"
                )
        else:
            further = dict(optimizer_options or {})
            if mesh is not None:
                further.setdefault("foreach", False)  # which takes no DTensors and tensors together
            self.optimizer = OPTIMIZERS[optimizer](self.parameters, lr=lr, **further)
        kinds: list[type[torch.optim.Optimizer]] = list(OPTIMIZERS.values())
        # Its place in `OPTIMIZERS`; -1 for another, which the loop runs.
        self.kind = kinds.index(type(self.optimizer)) if type(self.optimizer) in kinds else -1
        self.position = 0  # how many of the C steps between two updates have run
        self._pending: Tensor | None = None  # the output of step(), until learn()
        # Of self-prediction: rows whose episode has had a step; what step() of the loop has left for learn().
        self.begun = torch.zeros(self.batch_size, dtype=torch.bool, device=layer.weights()[0].device)
        self._left: tuple[Tensor, Tensor, Tensor, Sensitivity] | None = None
        self._step_shape = (self.batch_size, layer.fan_in)
        self._compiled: Compiled | None = None
        self._one_step: Compiled | None = None  # what runs the pending step; None: the loop
        self._served = True  # whether the compiled calls ran last: they hold the gradients' sum
        self.why, self._asked = "asked for", backend
        if mesh is not None:
            self.why = "the ranks of a mesh send one another states in every step"
        elif backend != "torch":
            made = self._calls()
            if isinstance(made, Compiled):
                self._compiled, self.why = made, "one call for all steps"
            else:
                self.why = made
                if backend != "auto":
                    raise ValueError(f"backend={backend!r} can't run: {made}")

    @property
    def members(self) -> list[Stream] | None:
        """The streams of a population's networks, with a mesh those of this rank's; None without a population."""
        return None if self.population is None else self.population.members

    @property
    def backend(self) -> str:
        """What runs the stream, "compile", "triton" or "torch"."""
        if self.members is not None:
            return self.members[0].backend
        return "torch" if self._compiled is None else self._compiled.backend

    def _calls(self) -> Compiled | str:
        """The calls that run all steps, or why there are none."""
        on_gpu = self._asked == "auto" and self.parameters[0].is_cuda
        return (InKernel if on_gpu or self._asked == "triton" else Compiled).of(self)

    def groups(self) -> dict[nn.Parameter, int]:
        """Which of the optimizer's groups each weight is in."""
        groups = self.optimizer.param_groups
        return {parameter: at for at, group in enumerate(groups) for parameter in group["params"]}

    def explain(self) -> None:
        """Print what would run the stream now, and why. Raises ValueError if its weights were replaced."""
        one = self if self.members is None else self.members[0]
        obstacle = None if one._compiled is None else one._compiled.obstacle()
        print(f"backend = {'torch' if obstacle else self.backend!r}: {obstacle or self.why}")

    def run(
        self,
        x: Tensor,
        target: Tensor | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        lr: Tensor | None = None,
        *,
        hidden: bool = False,
    ) -> Result:
        """Learn from T steps.

        Args:
            x: (T, B, F), F the layer's fan_in.
            target: (T, B, O); for "cross_entropy" (T, B), classes from 0 on. With `self_prediction` None, or what is
                predicted in place of the layer's own outputs (T, B, N).
            resets: (T, B) bool or None: rows in which a new episode starts at that step.
            mask: (T, B) bool or None: the rows that a step's loss is the mean over. A step without any has the loss 0
                and a gradient of zero.
            lr: (T,) learning rates of all weights, one for each step; None: the optimizer's.
            hidden: whether the result has the layer's output at each step, T·B·N numbers.

        Mutates the weights, the learner and the optimizer. Raises TypeError or ValueError, with nothing changed, for an
        argument that doesn't fit.
        """
        if self.population is not None:
            return self.population.run(x, target, resets, mask, lr, hidden)
        with sharded.together(self.group, "stream", x=getattr(x, "shape", None), hidden=hidden):
            given = stream_given.checked(self, x, target, resets, mask, lr)
        compiled = self._serving()
        result = self._loop(*given, hidden) if compiled is None else compiled.run(*given, hidden)
        self.begun.fill_(True)
        self._tell(result.losses)
        return result

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

    def step(self, x: Tensor) -> Tensor:
        """The first half of a step: x (B, F) → the output (B, O), detached. `learn` is the other half.

        Not of a population, whose `members` have it. Raises RuntimeError if the step before wasn't learned from;
        TypeError or ValueError for x.
        """
        self._refuse_population("step")
        if self._pending is not None:
            raise RuntimeError("step() came twice without learn(target) in between")
        if self.self_prediction:
            self.begun = stream_given.begun(self)
        compiled = self._one_step
        if compiled is None or not compiled.is_ready():
            by_step = self._compiled is not None and self._compiled.serves_steps
            self._one_step = compiled = self._serving(never=not by_step)
        if compiled is None:
            stream_given.refuse_changed(self)
            self._pending = self._forward(x)[0]
            return self._pending.detach().clone()
        weight = self.parameters[0]
        if not isinstance(x, Tensor) or x.dtype is not weight.dtype or x.shape != self._step_shape:
            check.shape("x", check.tensor("x", x), self._step_shape, "to match the stream")
            check.like("x", x, "the layer", weight)
        self._pending = output = compiled.step(x)
        return output

    def learn(self, target: Tensor | None = None, mask: Tensor | None = None) -> float:
        """The other half of a step: learn from what `step` gave, and return the loss.

        target: (B, O), or (B,) classes; None with `self_prediction`, as in `run`.

        Raises RuntimeError if no step is pending; TypeError or ValueError for target and mask.
        """
        self._refuse_population("learn")
        output = self._pending
        if output is None:
            raise RuntimeError("learn(target) came without a step(x) before it")
        if not (self.self_prediction and target is None) and (
            self.loss == "cross_entropy"
            or not isinstance(target, Tensor)
            or target.dtype is not output.dtype
            or target.shape != output.shape
        ):
            checked = stream_given.checked_target(self, check.tensor("target", target)[None], 1)
            target = None if checked is None else checked[0]
        if mask is not None:
            mask = check.mask("mask", mask, (self.batch_size,), output.device)
        if (compiled := self._one_step) is None:
            stream_given.refuse_changed(self)
        if self.self_prediction:
            mask = self.begun.clone() if mask is None else self.begun & mask
        if compiled is not None and not compiled.is_told():
            loss = compiled.summed(target, mask)
            if mask is None or not self.self_prediction or bool(mask.any()):
                self._update()
        elif compiled is None:
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            loss = float(self._learn_from(output, target, mask, rates))
        else:
            loss = compiled.learn(target, mask)
        if self.self_prediction:
            self.begun.fill_(True)
        self._pending = None
        return loss

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
        self,
        x: Tensor,
        target: Tensor | None,
        resets: Tensor | None,
        mask: Tensor | None,
        rates: Sequence[Sequence[float]],
        wanted: bool,
    ) -> Result:
        """The steps one by one. wanted: whether the layer's outputs are."""
        losses, outputs, hidden, groups = [], [], [], self.optimizer.param_groups
        kept = [group["lr"] for group in groups]
        for t in range(len(x)):
            if resets is not None and bool(resets[t].any()):
                self.learner.reset(resets[t])
            output, now = self._forward(x[t])
            outputs.append(output.detach().clone())
            if wanted:
                hidden.append(now.detach().clone())
            aim, counts = (None if each is None else each[t] for each in (target, mask))
            losses.append(self._learn_from(output, aim, counts, [rate[t] for rate in rates]))
        for group, rate in zip(groups, kept, strict=True):
            group["lr"] = rate
        shown = torch.stack(hidden) if wanted else None
        return Result(torch.stack(losses), torch.stack(outputs), shown, self.learner.state)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The readout's output at a step, and the layer's, h(t).

        With `self_prediction` the former is readout(h(t-1)), and what its gradient needs is left for `_learn_from`.
        """
        if not self.self_prediction:
            now = self.learner.step(x)
            return self.readout(now), now
        states, sensitivity = self.learner.lend()
        before = states[self.layer.cell.outputs[0]].clone().requires_grad_()
        with torch.no_grad():
            now = self.learner.step(x)
        self._left = before, now, torch.zeros_like(states), sensitivity
        return self.readout(before), now

    def _learn_from(
        self, output: Tensor, target: Tensor | None, mask: Tensor | None, rates: Sequence[float]
    ) -> Tensor:
        if self._left is not None:
            target = self._left[1] if target is None else target
            if mask is not None and not bool(mask.any()):
                self._left = None
                return output.new_zeros(())
        assert target is not None
        loss = self.loss_of(output, target, mask)
        if self.position == 0:
            self.optimizer.zero_grad()
        loss.backward()
        if self._left is not None:
            self._credit_before()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if float(group["lr"]) != rate:  # else the optimizer's own, which may be a tensor
                group["lr"] = rate
        self._update()
        return loss.detach()

    def _update(self) -> None:
        """A step's gradients were summed: the optimizer takes its step if it is the last of `update_every`."""
        self.position = (self.position + 1) % self.update_every
        if self.position == 0:
            if self.clip_norm is not None:
                clip_(self.parameters, self.clip_norm, self.learner.mesh is not None)
            self.optimizer.step()

    def _credit_before(self) -> None:
        """Add the layer's gradient through h(t-1) to the weights' `.grad`: Γ is still that of step t-1."""
        assert self._left is not None
        before, _, credit, sensitivity = self._left
        self._left = None
        if before.grad is None:
            return
        credit[self.layer.cell.outputs[0]] = before.grad
        for weight, gradient in zip(self.layer.weights(), sensitivity.read(credit), strict=True):
            if weight.requires_grad:
                weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)

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
        count = mask.sum().clamp(min=1) if self.mean == "counted" else len(mask)
        return torch.where(mask, rows, 0).sum() / count

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed stream needs: weights, the learner's state with Γ, the optimizer's, and the gradients'
        sum since its last step.
        """
        if self.population is not None:
            return self.population.state_dict()
        return {
            "layer": self.layer.state_dict(),
            "readout": self.readout.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
            "gradients": self._gradients() if self.position else None,
            **({"begun": self.begun} if self.self_prediction else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that made `state` was. Raises TypeError or ValueError if it doesn't fit."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {type(state).__name__}")
        if self.population is not None:
            self.population.load_state_dict(state)
            return
        wanted = ["layer", "readout", "learner", "optimizer", "position", "gradients"]
        missing = [name for name in wanted + ["begun"] * self.self_prediction if name not in state]
        if missing:
            raise ValueError(f"state must be what state_dict() gave, and lacks {', '.join(missing)}")
        self.learner.refuse_foreign(state["learner"])
        checkpoint.refuse_sums(state, self.update_every, self.parameters)
        if self.self_prediction:
            checkpoint.refuse_mask("begun", state["begun"], self.batch_size)
        parts = {"layer": self.layer, "readout": self.readout, "optimizer": self.optimizer}
        checkpoint.load_all(parts, state)
        self.learner.load_state_dict(state["learner"])
        self.position, self._pending, self._served = state["position"], None, True
        if self.self_prediction:
            self.begun = state["begun"].clone()
        if self._compiled is not None:
            self._compiled.forget()
        if self.position:
            for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
                parameter.grad = None if gradient is None else gradient.detach().clone()
            if self._compiled is not None:
                self._compiled.take_gradients()

    def _gradients(self) -> list[Tensor | None]:
        """The gradients' sum since the optimizer's last step, of each of `parameters`."""
        if self._compiled is not None and self._served:
            self._compiled.give_gradients()
        return [parameter.grad for parameter in self.parameters]

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: without what is of this process. A copy can't learn from a step of this one.

        Raises TypeError with a mesh.
        """
        if self.group is not None:
            raise TypeError(
                "a Stream with a mesh can't be copied or pickled: make a new one, and pass it the state_dict() of this "
                "one"
            )
        # Copies of a parameter come without its gradient.
        gradients = self._gradients() if self.members is None and self.position else None
        serves = self.backend != "torch"
        gone = {"_compiled": None, "_one_step": None, "_pending": None, "_left": None, "_served": True}
        return {**self.__dict__, **gone, "_serves": serves, "_kept": gradients}

    def __setstate__(self, state: dict[str, Any]) -> None:
        serves, gradients = state.pop("_serves"), state.pop("_kept")
        self.__dict__.update(state)
        if gradients is not None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        if serves and self.members is None:
            made = self._calls()
            if isinstance(made, Compiled):
                self._compiled = made
                if self.position:
                    made.take_gradients()
            else:
                self.why = made
