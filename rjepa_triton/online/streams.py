"""A stream of online learning in one call: T steps of a layer, a readout, a loss and an optimizer.

`Stream` is an `OnlineLearner`, a readout, a loss of torch.nn.functional and an optimizer of torch.optim. Where compiled
code serves (`explain` says whether), `run` is one call of it, on the same memory: the layer's and the readout's
parameters, the learner's state and Γ, and the optimizer's moments. Elsewhere `run` is the loop over steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from ..backend import native_backend
from ..backend.native import generated, library
from ..cells.trace import traced
from ..layers.layer import TwoPointRNN
from ..rules import rfp
from .learner import OnlineLearner
from .options import Learning

__all__ = ["Result", "Stream"]

Loss = Literal["mse", "cross_entropy", "huber", "cosine", "delta"]
LOSSES = ("mse", "cross_entropy", "huber", "cosine", "delta")
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


class Result:
    """What `Stream.run` gives: iterate over it, or name its parts.

    losses   (T,), or (P, T) of a population
    outputs  (T, B, O), or (P, T, B, O)
    state    the layer's S states after the last step, (B, N) each; a list of these of a population
    """

    def __init__(self, losses: Tensor, outputs: Tensor, state: Any) -> None:
        self.losses, self.outputs, self.state = losses, outputs, state

    def __iter__(self) -> Any:
        return iter((self.losses, self.outputs, self.state))


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
        readout: nn.Linear; or nn.Sequential or any module from (B, N) to (B, O), which runs by the loop over steps.
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
        clip_norm: the largest norm of the gradient of all weights, as torch.nn.utils.clip_grad_norm_; None: no limit.
        huber_delta: δ > 0 of the loss "huber".
        backend: "auto"; "compile": raise ValueError where compiled code doesn't serve; "torch": the loop over steps.

    Raises TypeError or ValueError for an argument out of its range.
    """

    def __init__(
        self,
        layer: TwoPointRNN,
        readout: nn.Module,
        batch_size: int = 1,
        *,
        loss: Loss = "mse",
        optimizer: OptimizerName = "sgd",
        lr: float = 1e-3,
        optimizer_options: Mapping[str, Any] | None = None,
        learning: Learning | None = None,
        update_every: int = 1,
        clip_norm: float | None = None,
        huber_delta: float = 1.0,
        backend: str = "auto",
    ) -> None:
        if not isinstance(readout, nn.Module):
            raise TypeError(f"readout must be a torch.nn.Module, got {type(readout).__name__}")
        check.one_of("loss", loss, LOSSES)
        self.loss = loss
        check.one_of("optimizer", optimizer, tuple(OPTIMIZERS))
        check.one_of("backend", backend, ("auto", "compile", "torch"))
        self.update_every = check.integer("update_every", update_every, 1)
        self.clip_norm = None if clip_norm is None else _positive("clip_norm", clip_norm)
        self.huber_delta = _positive("huber_delta", huber_delta)
        self.learner = OnlineLearner(layer, batch_size, learning=learning, form="step")
        self.layer, self.readout, self.batch_size = layer, readout, self.learner.batch_size
        _refuse_foreign(layer, readout)
        self.parameters = list(dict.fromkeys([*layer.parameters(), *readout.parameters()]))
        self.kind = list(OPTIMIZERS).index(optimizer)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[optimizer](
            self.parameters, lr=lr, **dict(optimizer_options or {})
        )
        self.position = 0  # how many of the C steps between two updates have run
        self._pending: Tensor | None = None  # the output of step(), until learn()
        self._step_shape = (self.batch_size, layer.fan_in)
        self._compiled: _Compiled | None = None
        self.why = "asked for"
        if backend != "torch":
            made = _Compiled.of(self)
            if isinstance(made, _Compiled):
                self._compiled, self.why = made, "one call for all steps"
            else:
                self.why = made
                if backend == "compile":
                    raise ValueError(f"backend='compile' can't run: {made}")

    @property
    def backend(self) -> str:
        """What runs the stream, "compile" or "torch"."""
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
            x: (T, B, F), F the layer's fan_in. T may be 0.
            target: (T, B, O); for "cross_entropy" (T, B), classes from 0 on.
            resets: (T, B) bool or None: rows in which a new episode starts at that step.
            mask: (T, B) bool or None: the rows that a step's loss is the mean over. A step without any has the loss 0
                and a gradient of zero.
            lr: (T,) learning rates, one for each step; None: the optimizer's.

        Mutates the weights, the learner and the optimizer. Raises TypeError or ValueError, with nothing changed, for an
        argument that doesn't fit.
        """
        if self._pending is not None:
            raise RuntimeError("run() came after step() without its learn(target)")
        check.shape(
            "x", check.tensor("x", x), ("T", self.batch_size, self.layer.fan_in), "to match the stream"
        )
        weight = self.layer.weights()[0]
        check.like("x", x, "the layer", weight)
        steps = x.shape[0]
        target = self._checked_target(target, steps)
        resets, mask = (
            None if given is None else check.mask(name, given, (steps, self.batch_size), x.device)
            for name, given in (("resets", resets), ("mask", mask))
        )
        rates = self._rates(lr, steps)
        if self._compiled is not None and steps:
            return self._compiled.run(x, target, resets, mask, rates)
        return self._loop(x, target, resets, mask, rates)

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
        last = (
            self.readout[-1]
            if isinstance(self.readout, nn.Sequential) and len(self.readout)
            else self.readout
        )
        return last.out_features if isinstance(last, nn.Linear) else None

    def _rates(self, lr: Tensor | None, steps: int) -> list[float]:
        if lr is None:
            return [float(self.optimizer.param_groups[0]["lr"])] * steps
        check.shape("lr", check.tensor("lr", lr), (steps,), "one rate for each step")
        if steps and not bool((lr >= 0).all()):
            raise ValueError("lr must hold numbers of at least 0, got one that isn't")
        found: list[float] = lr.double().tolist()
        return found

    def step(self, x: Tensor) -> Tensor:
        """The first half of a step: x (B, F) → the output (B, O), detached. `learn` is the other half.

        Raises RuntimeError if the step before wasn't learned from; TypeError or ValueError for x.
        """
        if self._pending is not None:
            raise RuntimeError("step() came twice without learn(target) in between")
        if self._compiled is None:
            output = self.readout(self.learner.step(x))
            self._pending = output
            return output.detach().clone()
        weight = self.parameters[0]
        if not isinstance(x, Tensor) or x.dtype is not weight.dtype or x.shape != self._step_shape:
            check.shape("x", check.tensor("x", x), self._step_shape, "to match the stream")
            check.like("x", x, "the layer", weight)
        self._pending = output = self._compiled.step(x)
        return output

    def learn(self, target: Tensor, mask: Tensor | None = None) -> float:
        """The other half of a step: learn from what `step` gave, and return the loss. target (B, O), or (B,) classes.

        Raises RuntimeError if no step is pending; TypeError or ValueError for target and mask.
        """
        output = self._pending
        if output is None:
            raise RuntimeError("learn(target) came without a step(x) before it")
        if target.dtype is not output.dtype or target.shape != output.shape:
            target = self._checked_target(check.tensor("target", target)[None], 1)[0]
        if mask is not None:
            mask = check.mask("mask", mask, (self.batch_size,), target.device)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self._pending = None
        if self._compiled is not None:
            return self._compiled.learn(target, mask, rate)
        return float(self._learn_from(output, target, mask, rate))

    def reset(self, mask: Tensor | None = None) -> None:
        """Start a new episode at the next step in the batch rows where mask (B,) is True, or in all."""
        self.learner.reset(mask)

    def _loop(
        self, x: Tensor, target: Tensor, resets: Tensor | None, mask: Tensor | None, rates: Sequence[float]
    ) -> Result:
        """The steps one by one."""
        losses, outputs = [], []
        for t in range(len(x)):
            if resets is not None and bool(resets[t].any()):
                self.learner.reset(resets[t])
            output = self.readout(self.learner.step(x[t]))
            outputs.append(output.detach().clone())
            losses.append(self._learn_from(output, target[t], None if mask is None else mask[t], rates[t]))
        if not losses:
            outputs_shape = (0, self.batch_size, self._outputs() or 0)
            return Result(x.new_zeros(0), x.new_zeros(outputs_shape), self.learner.state)
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
        """All that a resumed stream needs: weights, the learner's state with Γ, and the optimizer's."""
        return {
            "layer": self.layer.state_dict(),
            "readout": self.readout.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that made `state` was. Raises TypeError or ValueError if it doesn't fit."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {type(state).__name__}")
        missing = [k for k in ("layer", "readout", "learner", "optimizer", "position") if k not in state]
        if missing:
            raise ValueError(f"state must be what state_dict() gave, and lacks {', '.join(missing)}")
        self.learner.refuse_foreign(state["learner"])
        self.layer.load_state_dict(state["layer"])
        self.readout.load_state_dict(state["readout"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learner.load_state_dict(state["learner"])
        self.position, self._pending = state["position"], None
        if self._compiled is not None:
            self._compiled.forget()


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


RULES = {"rfp": 0, "eprop": 1, "rflo": 2, "snap0": 3}
LOSSES_AT = {
    name: k for k, name in enumerate(LOSSES)
}  # in the order of stream.h, as are these and OPTIMIZERS
INPUT, ONE = -1, -2
FORWARD, LEARN = 1, 2
OPTIONS = 6  # numbers of `Network::options`
Tables = tuple[list[int], list[int], list[float]]
FIRST = (
    "x",
    "target",
    "outputs",
    "losses",
    "resets",
    "mask",
    "rates",
)  # the first addresses, which a call gives


class _Compiled:
    """Calls of `stream.h` for one stream, by the addresses of what the stream owns."""

    def __init__(self, stream: Stream, code: ctypes.CDLL) -> None:
        self.stream = stream
        layer, weight = stream.layer, stream.layer.weights()[0]
        self.function = code.stream_float if weight.dtype == torch.float32 else code.stream_double
        self.function.argtypes, self.function.restype = [ctypes.c_void_p] * 3, None
        cell, found = layer.cell, traced(layer.cell)
        assert found is not None
        self.entries = {"gate": found.entries[1], "input": found.entries[2]}
        self.outputs = int(stream.readout.out_features)  # type: ignore[arg-type]
        counts = len(cell.states), len(cell.gates), len(cell.per_unit)
        planes = sum(counts) + counts[0] ** 2 + len(set(found.partials.values())) + 1
        self.scratch = weight.new_empty(stream.batch_size * (layer.hidden_size * planes + self.outputs) + 128)
        self.totals: list[Tensor | None] = [None] * len(self.learned())
        self._one: _OneStep | None = None

    @classmethod
    def of(cls, stream: Stream) -> _Compiled | str:
        """The compiled calls, or why there are none."""
        layer, readout, learner = stream.layer, stream.readout, stream.learner
        weight = layer.weights()[0]
        options = stream.optimizer.param_groups[0]
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            return (
                f"compiled code serves float32 and float64 on the CPU, got {weight.dtype} on {weight.device}"
            )
        if type(readout) is not nn.Linear:
            return f"compiled code takes a readout that is one nn.Linear, got {type(readout).__name__}"
        if learner.learning not in rfp.RULES:
            return f"compiled code takes the rules {', '.join(rfp.RULES)}, got {learner.learning!r}"
        if type(layer).readout is not TwoPointRNN.readout:
            return f"{type(layer).__name__} computes its output outside of the recurrence"
        for name in ("amsgrad", "maximize", "centered", "differentiable", "decoupled_weight_decay"):
            if options.get(name) and not (name == "decoupled_weight_decay" and stream.kind == 2):
                return f"compiled code has no {name} of torch.optim"
        if stream.kind == 3 and options["momentum"]:
            return "compiled code has no momentum of RMSprop"
        if any("parametrizations" in module._modules for module in (layer, readout)):
            return "a weight is computed from others"
        if len(stream.parameters) != len(layer.weights()) + (1 if readout.bias is None else 2):
            return "the layer or the readout has parameters that no step uses, or shares them"
        if any(not parameter.is_contiguous() for parameter in stream.parameters):
            return "a weight isn't contiguous"
        if native_backend.cpp_compiler() is None:
            library.tell_of_no_compiler()
            return "no C++ compiler was found"
        code = generated.stream_code(layer.cell)
        return (
            "the cell can't be traced, or its code could not be built" if code is None else cls(stream, code)
        )

    def forget(self) -> None:
        """What was made of memory that the stream no longer has."""
        self._one, self.totals = None, [None] * len(self.totals)

    def learned(self) -> list[nn.Parameter]:
        """The readout's weight and bias, then the layer's weights."""
        readout, layer = self.stream.readout, self.stream.layer
        return [p for p in (readout.weight, readout.bias, *layer.weights()) if p is not None]  # type: ignore[misc]

    def tables(self, given: Mapping[str, Tensor | None], steps: int, phase: int) -> Tables:
        """Addresses, numbers and options of one network, as stream.h reads them. given: tensors named in `FIRST`."""
        stream = self.stream
        learner, layer, readout = stream.learner, stream.layer, stream.readout
        state, sensitivity = learner.lend()
        options = stream.optimizer.param_groups[0]
        moments, done = self.moments(options)
        arrays = [_address(given.get(name)) for name in FIRST] + [state.data_ptr(), self.scratch.data_ptr()]
        numbers: list[int] = [
            *(phase, steps, stream.batch_size, layer.hidden_size, layer.fan_in, self.outputs),
            *(LOSSES_AT[stream.loss], stream.kind, stream.update_every, stream.position),
            *(RULES[learner.learning], layer.cell.outputs[0], done),
        ]
        sums_up = stream.update_every > 1 or stream.clip_norm is not None
        place = iter(range(len(self.totals)))

        def add(parameter: Any) -> None:
            if parameter is None:
                arrays.extend((0, 0, 0, 0))
                numbers.append(0)
                return
            k = next(place)
            if sums_up and self.totals[k] is None:
                self.totals[k] = torch.zeros_like(parameter)
            arrays.extend(_address(one) for one in (parameter, *moments[k], self.totals[k]))
            numbers.append(parameter.requires_grad)

        add(readout.weight)
        add(readout.bias)
        weights = layer.weights()
        numbers.append(len(weights))
        places = {index: (group, k) for group in sensitivity.groups for k, index in enumerate(group.indices)}
        for index, (matrix, weight) in enumerate(zip(layer.matrices, weights, strict=True)):
            add(weight)
            group, k = places[index]
            first = group.gammas[0]
            arrays.extend(g.data_ptr() + g.element_size() * k * g.stride(1) for g in group.gammas)
            reads = {"input": INPUT, "one": ONE}.get(str(matrix.reads), matrix.reads)
            phi = dict(self.entries[matrix.into[0]][matrix.into[1]])
            numbers += [
                *(int(reads), matrix.into[0] == "gate", matrix.into[1]),
                *(weight.dim(), first.shape[3], first.stride(0)),
                *(phi.get(nu, -1) for nu in range(len(layer.cell.states))),
            ]
        first_beta, second_beta = options.get(
            "betas", (options.get("alpha", options.get("momentum", 0.0)), 0.0)
        )
        return (
            arrays,
            list(map(int, numbers)),
            [
                *(float(first_beta), float(options.get("dampening", second_beta))),
                *(float(options.get("eps", options.get("nesterov", False))), float(options["weight_decay"])),
                *(stream.huber_delta, stream.clip_norm or 0.0),
            ],
        )

    def moments(self, options: dict[str, Any]) -> tuple[list[tuple[Tensor | None, Tensor | None]], int]:
        """The optimizer's moments of each weight, made as torch.optim makes them, and how many steps it has taken."""
        found: list[tuple[Tensor | None, Tensor | None]] = []
        done = 0
        kind = self.stream.kind
        for parameter in self.learned():
            if not parameter.requires_grad or (kind == 0 and not options["momentum"]):
                found.append((None, None))
                continue
            state = self.stream.optimizer.state[parameter]
            if kind == 0:
                done = int(state.get("momentum_buffer") is not None)
                if not done:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                found.append((state["momentum_buffer"], None))
                continue
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                for name in ("square_avg",) if kind == 3 else ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter)
            done = int(state["step"])
            found.append((state.get("exp_avg"), state.get("exp_avg_sq", state.get("square_avg"))))
        return found, done

    def advanced(self, steps: int, learned: Sequence[nn.Parameter]) -> None:
        """So many steps have run whole: the optimizer, the position and the learner know of it."""
        stream = self.stream
        torch.autograd.graph.increment_version(learned)
        updates, stream.position = divmod(stream.position + steps, stream.update_every)
        if updates and stream.kind > 0:
            states = [stream.optimizer.state.get(parameter, {}) for parameter in learned]
            torch._foreach_add_([state["step"] for state in states if "step" in state], float(updates))
        stream.learner.returned(steps)

    def run(
        self, x: Tensor, target: Tensor, resets: Tensor | None, mask: Tensor | None, rates: Sequence[float]
    ) -> Result:
        steps, self._one = len(x), None
        given = self.given(x, target, resets, mask, rates)
        _call(self.function, [self.tables(given, steps, FORWARD | LEARN)])
        self.advanced(steps, self.learned())
        losses, outputs = given["losses"], given["outputs"]
        assert losses is not None
        assert outputs is not None
        return Result(losses.to(x.dtype), outputs, self.stream.learner.state)

    def given(
        self, x: Tensor, target: Tensor, resets: Tensor | None, mask: Tensor | None, rates: Sequence[float]
    ) -> dict[str, Tensor | None]:
        """The tensors of a call, by their names in `FIRST`, with those that it writes."""
        given: dict[str, Tensor | None] = {"x": x, "target": target, "resets": resets, "mask": mask}
        given = {name: None if a is None else a.detach().contiguous() for name, a in given.items()}
        given["outputs"] = x.new_empty(len(x), self.stream.batch_size, self.outputs)
        given["losses"] = torch.empty(len(x), dtype=torch.float64)
        given["rates"] = torch.tensor(rates, dtype=torch.float64)
        return given

    def step(self, x: Tensor) -> Tensor:
        """The output (B, O) of one step."""
        if self._one is None or not self._one.is_still():
            self._one = _OneStep(self)
        return self._one.forward(x)

    def learn(self, target: Tensor, mask: Tensor | None, rate: float) -> float:
        """The loss of the step that ran; it is learned from."""
        assert self._one is not None
        return self._one.learn(target, mask, rate)


class _OneStep:
    """The tables of one step, which a loop with an environment uses again and again."""

    def __init__(self, compiled: _Compiled) -> None:
        stream = compiled.stream
        self.stream, self.compiled, self.function = stream, compiled, compiled.function
        batch, weight = stream.batch_size, stream.parameters[0]
        classes = stream.loss == "cross_entropy"
        self.x = weight.new_zeros(batch, stream.layer.fan_in)
        aims = (batch,) if classes else (batch, compiled.outputs)
        self.target = torch.zeros(aims, dtype=torch.int64 if classes else weight.dtype)
        self.outputs = weight.new_zeros(batch, compiled.outputs)
        self.mask = torch.ones(batch, dtype=torch.bool)
        self.loss, self.rate = ctypes.c_double(), ctypes.c_double()
        given = {"x": self.x, "target": self.target, "outputs": self.outputs, "mask": self.mask}
        arrays, numbers, options = compiled.tables(given, 1, FORWARD)
        arrays[FIRST.index("losses")] = ctypes.addressof(self.loss)
        arrays[FIRST.index("rates")] = ctypes.addressof(self.rate)
        self.arrays, self.numbers, self.options = _packed([(arrays, numbers, options)])
        self.learned, self.masked = compiled.learned(), False
        self.addresses = self._addresses()
        self.done = numbers[DONE - 3]

    def _addresses(self) -> list[int]:
        state = self.stream.learner.lend()[0]
        return [state.data_ptr(), *[parameter.data_ptr() for parameter in self.learned]]

    def is_still(self) -> bool:
        """Whether the tables name the memory that the stream has now."""
        return self.addresses == self._addresses()

    def forward(self, x: Tensor) -> Tensor:
        """The output of a step, (B, O)."""
        self.x.copy_(x)
        self.numbers[PHASE] = FORWARD
        self.function(self.arrays, self.numbers, self.options)
        return self.outputs.clone()

    def learn(self, target: Tensor, mask: Tensor | None, rate: float) -> float:
        """The loss of the step that `forward` ran; it is learned from."""
        self.target.copy_(target)
        if mask is not None or self.masked:
            self.masked = mask is not None
            self.mask.fill_(True) if mask is None else self.mask.copy_(mask)
        self.rate.value = rate
        numbers, stream = self.numbers, self.stream
        numbers[PHASE], numbers[POSITION] = LEARN, stream.position
        numbers[DONE] = self.done
        self.function(self.arrays, self.numbers, self.options)
        self.compiled.advanced(1, self.learned)
        self.done += stream.position == 0
        return self.loss.value


# Places in the table of numbers, which begins with those of networks, threads and options.
PHASE, POSITION, DONE = 3, 12, 15


def _packed(networks: Sequence[Tables]) -> tuple[Any, Any, Any]:
    """The tables of some networks as C arrays."""
    arrays = [address for network in networks for address in network[0]]
    numbers = [
        len(networks),
        torch.get_num_threads(),
        OPTIONS,
        *(n for network in networks for n in network[1]),
    ]
    options = [value for network in networks for value in network[2]]
    return (
        (ctypes.c_void_p * len(arrays))(*arrays),
        (ctypes.c_long * len(numbers))(*numbers),
        (ctypes.c_double * len(options))(*options),
    )


def _call(function: Any, networks: Sequence[Tables]) -> None:
    function(*_packed(networks))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
