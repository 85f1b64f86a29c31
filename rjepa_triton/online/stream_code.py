"""Calls of a stream's compiled code (`backend/native/stream.h`): tables of the addresses of what the stream owns."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backend import native_backend
from ..backend.native import generated, library
from ..cells.trace import traced
from . import stream_given
from .options import refuse_hooks
from .sensitivity import Exact, PerUnit, Sensitivity
from .stream_optimizer import MOMENTS, alike, unserved
from .stream_readout import LINEAR, Parts
from .stream_step import OneStep
from .stream_tables import FIRST, FORWARD, LEARN, Tables, address, packed

if TYPE_CHECKING:
    from .streams import Stream

RULES = {"rfp": 0, "eprop": 1, "rflo": 2, "snap0": 3, "rtrl": 4}
# S times the units of a head, up to which RTRL is compiled; products of larger J are BLAS's work.
EXACT_ROWS = 256
LOSSES_AT = {name: k for k, name in enumerate(stream_given.LOSSES)}
INPUT, ONE = -1, -2
# Steps of a call from which copying dense matrices to panels saves time: so many, and one for every other unit, since
# what is copied grows as N², and what a step saves as N, the number of rows.
PANELS_FROM = 8
APART, PANELS_BELOW = 9 * 64, 256  # of strips.h
VECTOR = 16  # numbers of a vector, at most
# Numbers of Γ, times steps, of a call from which waking other threads saves time: of one network, and of several.
SHARED_CALL, SHARED_NETWORKS = 1 << 26, 1 << 22


def copies_panels(units: int, batch: int, steps: int) -> bool:
    """Whether a call copies dense matrices of fewer than PANELS_BELOW inputs, and their Γ, to panels."""
    return batch == 1 and steps >= max(PANELS_FROM, units // 2)


class Result:
    """What `Stream.run` gives: iterate over it, or name its parts.

    losses   (T,), or (P, T) of a population
    outputs  (T, B, O), or (P, T, B, O)
    hidden   (T, B, N), or (P, T, B, N): the layer's output at each step; None unless it was asked for. Iteration leaves
             it out
    state    the layer's S states after the last step, (B, N) each; a list of these of a population
    """

    def __init__(self, losses: Tensor, outputs: Tensor, hidden: Tensor | None, state: Any) -> None:
        self.losses, self.outputs, self.hidden, self.state = losses, outputs, hidden, state

    def __iter__(self) -> Any:
        return iter((self.losses, self.outputs, self.state))


class Compiled:
    """Calls of `stream.h` for one stream, by the addresses of what the stream owns."""

    backend, serves_steps = "compile", True

    def __init__(self, stream: Stream, parts: Parts, code: ctypes.CDLL) -> None:
        self._settle(stream, parts)
        layer, weight = stream.layer, stream.layer.weights()[0]
        self.function = code.stream_float if weight.dtype == torch.float32 else code.stream_double
        self.function.argtypes, self.function.restype = [ctypes.c_void_p] * 3, None
        cell, found = layer.cell, traced(layer.cell)
        assert found is not None
        self.entries = {"gate": found.entries[1], "input": found.entries[2]}
        sizes = parts.sizes(layer.hidden_size)
        counts = len(cell.states), len(cell.gates), len(cell.per_unit)
        planes = sum(counts) + counts[0] ** 2 + len(set(found.partials.values())) + 1
        products = len(layer.weights()) * _vectors(layer.hidden_size) if stream.batch_size == 1 else 0
        self.scratch = weight.new_empty(
            stream.batch_size * (layer.hidden_size * planes + self.outputs + 2 * sum(sizes)) + products + 128
        )
        self.head = stream.learner.block or 0  # units of a head or block of RTRL
        self.carried = stream.batch_size * counts[0] * sum(weight.numel() for weight in layer.weights())
        self.carried *= self.head or 1
        self._room: Tensor | None = None

    def _settle(self, stream: Stream, parts: Parts) -> None:
        self.stream, self.parts, self.outputs = stream, parts, parts.sizes(stream.layer.hidden_size)[-1]
        self.readout = stream.readout
        self.totals: list[Tensor | None] = [None] * len(self.learned())
        # Moments of weights that no step has changed yet.
        self.new: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._one: OneStep | None = None

    @classmethod
    def of(cls, stream: Stream) -> Compiled | str:
        """The compiled calls, or why there are none."""
        layer, weight = stream.layer, stream.layer.weights()[0]
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            return (
                f"compiled code serves float32 and float64 on the CPU, got {weight.dtype} on {weight.device}"
            )
        parts = stream_given.served_parts(stream, RULES)
        if isinstance(parts, str):
            return parts
        rows = len(layer.cell.states) * (stream.learner.block or 0)
        if rows > EXACT_ROWS:
            return f"compiled code takes RTRL of heads or blocks of at most {EXACT_ROWS} states, got {rows}"
        if native_backend.cpp_compiler() is None:
            library.tell_of_no_compiler()
            return "no C++ compiler was found"
        code = generated.stream_code(layer.cell)
        return (
            "the cell can't be traced, or its code could not be built"
            if code is None
            else cls(stream, parts, code)
        )

    def obstacle(self) -> str | None:
        """Why this call must be the loop's, or None. Raises ValueError if the stream's weights are others by now."""
        stream = self.stream
        if not self.is_still_readout():
            parts = Parts.of(stream.readout, stream.layer.hidden_size)
            if isinstance(parts, str):
                return parts
            self.parts, self.readout = parts, stream.readout
            if not parts.are_still():
                return "the readout has hooks"
        stream_given.refuse_changed(stream)
        learned = self.learned()
        for parameter in learned:
            if parameter.dtype != self.scratch.dtype or parameter.device != self.scratch.device:
                raise ValueError(
                    f"the weights must stay {self.scratch.dtype} on {self.scratch.device}, as at first, got "
                    f"{parameter.dtype} on {parameter.device}: make a new Stream"
                )
        refuse_hooks(stream.layer)
        if not all(parameter.is_contiguous() for parameter in learned):
            return "a weight isn't contiguous"
        if why := unserved(stream.optimizer, stream.kind):
            return why
        if not alike(stream.optimizer):
            return "the optimizer's groups of weights differ in more than lr"
        if not any(parameter.requires_grad for parameter in learned):
            return "no weight requires a gradient"
        if self.moments(stream.optimizer.param_groups[0])[1] is None:
            return "the optimizer has taken a number of steps that differs from weight to weight"
        return None

    def is_still_readout(self) -> bool:
        """Whether the stream's readout is the one that `parts` are of."""
        return self.stream.readout is self.readout and self.parts.are_still()

    def forget(self) -> None:
        """What was made of memory that the stream no longer has."""
        self._one, self.totals = None, [None] * len(self.totals)

    def give_gradients(self) -> None:
        """Let the weights' `.grad` be the gradients' sum so far."""
        for parameter, total in zip(self.learned(), self.totals, strict=True):
            parameter.grad = None if total is None or not parameter.requires_grad else total.clone()

    def take_gradients(self) -> None:
        """Go on from the gradients' sum that the weights' `.grad` holds."""
        self.totals = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for parameter in self.learned()
        ]

    def learned(self) -> list[nn.Parameter]:
        """The readout's weights and biases, then the layer's weights."""
        return [*self.parts.parameters(), *self.stream.layer.weights()]

    def tables(
        self, given: Mapping[str, Tensor | None], steps: int, phase: int, *, updates: bool = True
    ) -> Tables:
        """Addresses, numbers and options of one network, as stream.h reads them. given: tensors named in `FIRST`.

        updates: whether the weights take the optimizer's steps; else gradients are summed alone.
        """
        stream = self.stream
        learner, layer = stream.learner, stream.layer
        state, sensitivity = learner.lend()
        options = stream.optimizer.param_groups[0]
        none: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.totals)
        moments, done = self.moments(options) if updates else (none, 0)
        assert done is not None
        arrays = [address(given.get(name)) for name in FIRST] + [state.data_ptr(), self.scratch.data_ptr()]
        sums_up = not updates or stream.update_every > 1 or stream.clip_norm is not None
        by_panels = copies_panels(layer.hidden_size, stream.batch_size, steps) and not self.head
        beside = max(sum(one is not None for one in pair) for pair in moments)
        beside += sums_up or any(total is not None for total in self.totals)
        arrays.append(self.room(1 + len(layer.cell.states) + beside) if by_panels else 0)
        numbers: list[int] = [
            *(phase, steps, stream.batch_size, layer.hidden_size, layer.fan_in, self.outputs),
            *(LOSSES_AT[stream.loss], stream.kind),
            *(stream.update_every if updates else stream.position + 2, stream.position),
            *(RULES[learner.learning], layer.cell.outputs[0], done, stream.self_prediction, self.head),
            stream.mean == "all",
        ]
        place = iter(range(len(self.totals)))
        group_of = stream.groups()

        def add(parameter: Any) -> None:
            if parameter is None:
                arrays.extend((0, 0, 0, 0))
                numbers.extend((0, 0))
                return
            k = next(place)
            if sums_up and self.totals[k] is None:
                self.totals[k] = torch.zeros_like(parameter)
            arrays.extend(address(one) for one in (parameter, *moments[k], self.totals[k]))
            numbers.extend((parameter.requires_grad, group_of[parameter]))

        numbers += [self.parts.residual, len(self.parts.parts)]
        sizes = self.parts.sizes(layer.hidden_size)
        for part, (kind, _), size in zip(self.parts.parts, self.parts.kinds(), sizes, strict=True):
            numbers += [kind, size]
            if kind == LINEAR:
                add(part.weight)
                add(part.bias)
        weights = layer.weights()
        numbers.append(len(weights))
        places = self.gammas(sensitivity)
        for index, (matrix, weight) in enumerate(zip(layer.matrices, weights, strict=True)):
            add(weight)
            gammas, fan_in, apart = places[index]
            arrays.extend(gammas)
            reads = {"input": INPUT, "one": ONE}.get(str(matrix.reads), matrix.reads)
            phi = dict(self.entries[matrix.into[0]][matrix.into[1]])
            numbers += [
                *(int(reads), matrix.into[0] == "gate", matrix.into[1]),
                *(weight.dim(), fan_in, apart),
                *(phi.get(nu, -1) for nu in range(len(layer.cell.states))),
            ]
        return arrays, list(map(int, numbers)), self.settings()

    def gammas(self, sensitivity: Sensitivity) -> dict[int, tuple[list[int], int, int]]:
        """Of each of the layer's matrices the addresses of its Γ^ν, its fan-in, and how far rows of Γ lie apart."""
        found = {}
        states = len(self.stream.layer.cell.states)
        if isinstance(sensitivity, Exact):  # γ (B, H, S, b, K, b, M)
            for gamma, indices in sensitivity.by_index():
                fan_in, size = gamma.shape[-1], gamma.element_size()
                for k, index in enumerate(indices):
                    first = gamma.data_ptr() + size * k * gamma.stride(4)
                    found[index] = [first] + [0] * (states - 1), fan_in, gamma.stride(3)
            return found
        assert isinstance(sensitivity, PerUnit)
        for group in sensitivity.groups:
            first_of = group.gammas[0]
            for k, index in enumerate(group.indices):
                places = [g.data_ptr() + g.element_size() * k * g.stride(1) for g in group.gammas]
                found[index] = places, first_of.shape[3], first_of.stride(0)
        return found

    def room(self, arrays: int) -> int:
        """The address of room for the panels of strips.h, kept because new memory costs more than a short call.

        arrays: how many there are of each matrix: weights, sensitivities, and what the optimizer has.
        """
        layer, size = self.stream.layer, self.scratch.element_size()
        sizes = [tuple(weight.shape) for weight in layer.weights() if weight.dim() == 2]
        numbers = [_vectors(units) * fan_in + APART for units, fan_in in sizes if fan_in < PANELS_BELOW]
        most = arrays * sum(numbers) + 64 // size
        if self._room is None or len(self._room) < most:
            self._room = self.scratch.new_empty(most)
        return -(-self._room.data_ptr() // 64) * 64

    def settings(self) -> list[float]:
        """`Network::options` of stream.h."""
        stream = self.stream
        options = stream.optimizer.param_groups[0]
        first, second = options.get("betas", (options.get("alpha", options.get("momentum", 0.0)), 0.0))
        return [
            *(float(first), float(options.get("dampening", second))),
            *(float(options.get("eps", options.get("nesterov", False))), float(options["weight_decay"])),
            *(stream.huber_delta, stream.clip_norm or 0.0),
            *(setting for _, setting in self.parts.kinds()),
        ]

    def moments(
        self, options: Mapping[str, Any]
    ) -> tuple[list[tuple[Tensor | None, Tensor | None]], int | None]:
        """The optimizer's moments of each weight, made as torch.optim makes them, and how many steps it has taken.

        Moments that are new are the optimizer's once a step has been taken (`advanced`). None in place of the number of
        steps where weights differ in it.
        """
        found: list[tuple[Tensor | None, Tensor | None]] = []
        steps: set[int] = set()
        kind = self.stream.kind
        names = MOMENTS[kind]
        for parameter in self.learned():
            if not parameter.requires_grad or (kind == 0 and not options["momentum"]):
                self.new.pop(parameter, None)
                found.append((None, None))
                continue
            state = self.stream.optimizer.state.get(parameter) or {}
            if state.get(names[0]) is None:
                if parameter not in self.new:
                    self.new[parameter] = {name: torch.zeros_like(parameter) for name in names}
                    if kind > 0:
                        self.new[parameter]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state = self.new[parameter]
                steps.add(0)
            else:
                self.new.pop(parameter, None)
                steps.add(int(state["step"]) if kind > 0 else 1)
            found.append(
                (state.get(names[0]), state[names[1]])
                if kind in (1, 2)
                else ((state[names[0]], None) if kind == 0 else (None, state[names[0]]))
            )
        return found, max(steps, default=0) if len(steps) < 2 else None

    def advanced(
        self, steps: int, counted: int, learned: Sequence[nn.Parameter], counts: Sequence[Any] = ()
    ) -> None:
        """So many steps have run whole, and so many counted: the optimizer, the position and the learner know of it.

        counts: the optimizer's numbers of steps as ctypes has them, if there are any and they are known.
        """
        stream = self.stream
        torch.autograd.graph.increment_version(learned)
        updates, stream.position = divmod(stream.position + counted, stream.update_every)
        if updates and self.new:
            for parameter, made in self.new.items():
                stream.optimizer.state[parameter].update(made)
            self.new, counts = {}, ()
        if updates and counts:
            for count in counts:
                count.value += updates
        elif updates and stream.kind > 0:
            states = [stream.optimizer.state.get(parameter, {}) for parameter in learned]
            torch._foreach_add_([state["step"] for state in states if "step" in state], float(updates))
        stream.learner.returned(steps)

    def run(self, *given: Any) -> Result:
        """`Stream.run` of checked arguments (`stream_given.checked`), and whether the layer's outputs are wanted."""
        return self.run_all([self], [given[:-1]], given[-1])[0]

    @staticmethod
    def run_all(
        networks: Sequence[Compiled], arguments: Sequence[tuple[Any, ...]], hidden: bool
    ) -> list[Result]:
        """`run` of some networks in one call."""
        given = [one.given(hidden, *each) for one, each in zip(networks, arguments, strict=True)]
        steps = len(arguments[0][0])
        tables = [one.tables(each, steps, FORWARD | LEARN) for one, each in zip(networks, given, strict=True)]
        numbers = len(networks) * steps * networks[0].carried
        enough = numbers >= (SHARED_CALL if len(networks) == 1 else SHARED_NETWORKS)
        table = packed(tables, torch.get_num_threads() if enough else 1)
        with contextlib.ExitStack() as alone:  # another thread may come in while compiled code runs
            for one in networks:
                past = one.stream.learner._past
                past.enter()
                alone.callback(past.leave)
            networks[0].function(*table)
        results = []
        for one, each in zip(networks, given, strict=True):
            one._one = None
            losses, outputs, mask = each["losses"], each["outputs"], each["mask"]
            lagged = one.stream.self_prediction and mask is not None
            one.advanced(steps, int(mask.any(1).sum()) if lagged else steps, one.learned())  # type: ignore[union-attr]
            assert losses is not None
            assert outputs is not None
            results.append(
                Result(losses.to(outputs.dtype), outputs, each["hidden"], one.stream.learner.state)
            )
        return results

    def given(
        self,
        hidden: bool,
        x: Tensor,
        target: Tensor | None,
        resets: Tensor | None,
        mask: Tensor | None,
        rates: Sequence[Sequence[float]],
    ) -> dict[str, Tensor | None]:
        """The tensors of a call, by their names in `FIRST`, with those that it writes."""
        given: dict[str, Tensor | None] = {"x": x, "target": target, "resets": resets, "mask": mask}
        given = {name: None if a is None else a.detach().contiguous() for name, a in given.items()}
        given["outputs"] = x.new_empty(len(x), self.stream.batch_size, self.outputs)
        shape = len(x), self.stream.batch_size, self.stream.layer.hidden_size
        given["hidden"] = x.new_empty(shape) if hidden else None
        given["losses"] = torch.empty(len(x), dtype=torch.float64, device="cpu")
        given["rates"] = torch.tensor(rates, dtype=torch.float64, device="cpu")
        return given

    def step(self, x: Tensor) -> Tensor:
        """The output (B, O) of one step."""
        if self._one is None:
            self._one = OneStep(self)
        return self._one.forward(x)

    def is_ready(self) -> bool:
        """Whether the tables of one step name what the stream has now; else they are made anew at the next step."""
        if self._one is not None and not self._one.is_still():
            self._one = None
        return self._one is not None

    def renew(self) -> None:
        """Others than these calls have run steps: make the tables anew."""
        self._one = None

    def learn(self, target: Tensor | None, mask: Tensor | None) -> float:
        """The loss of the step that ran; it is learned from."""
        assert self._one is not None
        return self._one.learn(target, mask)

    def is_told(self) -> bool:
        """Whether the tables of the step that ran still have the optimizer's and the loss's settings."""
        assert self._one is not None
        return self._one.is_told()

    def summed(self, target: Tensor | None, mask: Tensor | None) -> float:
        """As `learn`, but the gradients' sum goes to the weights' `.grad`; the optimizer's step is the caller's."""
        assert self._one is not None
        stream_given.refuse_changed(self.stream)
        loss = self._one.summed(target, mask)
        self.give_gradients()
        self._one = None
        return loss


def _vectors(numbers: int) -> int:
    """How many numbers the vectors hold that so many fill."""
    return -(-numbers // VECTOR) * VECTOR
