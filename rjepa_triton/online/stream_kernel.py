"""Calls of a stream's Triton kernel (`kernels/cell_stream.py`): one launch for all steps, with Γ in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backend import triton_backend, triton_cells
from ..rules import rfp
from . import stream_given
from .stream_code import INPUT, LOSSES_AT, ONE, Compiled, Result
from .stream_readout import LINEAR, Parts
from .stream_tables import address

if TYPE_CHECKING:
    from ..kernels.stream_layout import Config, Problem
    from .streams import Stream

TOO_LARGE = "{} units with their Γ don't fit in the registers of one GPU"


class InKernel(Compiled):
    """Calls of the kernel for one stream with one batch row, or for the networks of a population."""

    backend, serves_steps = "triton", False

    @classmethod
    def of(cls, stream: Stream) -> InKernel | str:
        """The calls, or why there are none."""
        layer = stream.layer
        weight = layer.weights()[0]
        if why := triton_backend.no_triton(weight.device, weight.dtype):
            return str(why)
        parts = stream_given.served_parts(stream, rfp.RULES)
        if isinstance(parts, str):
            return parts
        if stream.batch_size > 1:
            return f"the kernel takes one batch row, got batch_size={stream.batch_size}"
        if stream.self_prediction:
            return "the kernel has no self_prediction"
        if parts.residual or [kind for kind, _ in parts.kinds()] != [LINEAR]:
            return "the kernel takes a readout that is one nn.Linear"
        if any(one.dim() == 3 for one in layer.weights()):
            return "the kernel takes dense or diagonal weights, got heads"
        if triton_cells.kernels_of(layer.cell) is None:
            return "the cell can't be traced"
        made = cls(stream, parts)
        if made.layout(made.problem()) is None:
            return TOO_LARGE.format(layer.hidden_size)
        return made

    def __init__(self, stream: Stream, parts: Parts) -> None:
        self._settle(stream, parts)
        self.scratch = stream.layer.weights()[0].new_empty(0)

    def obstacle(self) -> str | None:
        why = super().obstacle()
        if why is None and [kind for kind, _ in self.parts.kinds()] != [LINEAR]:
            why = "the kernel takes a readout that is one nn.Linear"
        if why is None and self.layout(self.problem()) is None:
            why = TOO_LARGE.format(self.stream.layer.hidden_size)
        return why

    def layout(self, problem: Problem) -> Config | None:
        """How the network lies on the GPU; None if it doesn't fit."""
        from ..kernels import stream_layout

        device = self.scratch.device
        if (
            device.type != "cuda"
        ):  # the interpreter runs one program after the other, and has no registers to fill
            return stream_layout.whole(problem)
        about = torch.cuda.get_device_properties(device)
        return stream_layout.pick_config(problem, about.warp_size, about.multi_processor_count)

    def linear(self) -> nn.Linear:
        """The readout."""
        (only,) = self.parts.parts
        assert isinstance(only, nn.Linear)
        return only

    def problem(self) -> Problem:
        """What the kernel is built for, as the stream is now."""
        from ..kernels.stream_layout import Problem

        stream = self.stream
        layer, options, kind = stream.layer, stream.optimizer.param_groups[0], stream.kind
        made = triton_cells.kernels_of(layer.cell)
        assert made is not None
        cell, rule = made.functions, stream.learner.learning
        every = range(cell.states**2)
        links = {
            "snap0": (False,) * len(every),
            "rflo": tuple(cell.links[k] and k // cell.states == k % cell.states for k in every),
        }
        weights, found = layer.weights(), cell.partials_found
        reads, phi = [], []
        for matrix in layer.matrices:
            reads.append(int({"input": INPUT, "one": ONE}.get(str(matrix.reads), matrix.reads)))
            entries = dict(made.entries[1 if matrix.into[0] == "gate" else 2][matrix.into[1]])
            places = {nu: k if k < found else found + made.known[k - found] for nu, k in entries.items()}
            phi.append(tuple(places.get(nu, -1) for nu in range(cell.states)))
        linear = self.linear()
        slots: list[Any] = [linear.weight, linear.bias, *weights]
        group_of = stream.groups()
        return Problem(
            cell=cell,
            links=links.get(rule, cell.links),
            diagonal=rule == "rfp",
            out=layer.cell.outputs[0],
            passes=INPUT not in reads and layer.fan_in == layer.hidden_size,
            reads=tuple(reads),
            of_gate=tuple(matrix.into[0] == "gate" for matrix in layer.matrices),
            into=tuple(int(matrix.into[1]) for matrix in layer.matrices),
            phi=tuple(phi),
            fan_in=tuple(int(weight.shape[1]) if weight.dim() == 2 else 1 for weight in weights),
            learns=tuple(one is not None and one.requires_grad for one in slots),
            groups=tuple(0 if one is None else group_of[one] for one in slots),
            bias=linear.bias is not None,
            kind=kind,
            moments=(int(options.get("momentum", 0) != 0), 2, 2, 1)[kind],
            decays=options["weight_decay"] != 0,
            nesterov=kind == 0 and bool(options["nesterov"]),
            every=stream.update_every,
            clips=stream.clip_norm is not None,
            loss=LOSSES_AT[stream.loss],
            units=layer.hidden_size,
            features=layer.fan_in,
            outputs=self.outputs,
        )

    def addresses(self, given: dict[str, Tensor | None], problem: Problem) -> tuple[list[int], int]:
        """The table's row of this network, and how many steps its optimizer has taken."""
        from ..kernels import stream_layout

        stream = self.stream
        state, sensitivity = stream.learner.lend()
        moments, done = self.moments(stream.optimizer.param_groups[0])
        assert done is not None
        row = [address({**given, "state": state}[name]) for name in stream_layout.ADDRESSES]
        linear = self.linear()
        places = self.gammas(sensitivity)
        sums_up = stream.update_every > 1 or stream.clip_norm is not None
        nth = 0
        slots: list[Any] = [linear.weight, linear.bias, *stream.layer.weights()]
        for slot, parameter in enumerate(slots):
            size = 4 + problem.cell.states
            if parameter is None:
                row += [0] * size
                continue
            if sums_up and self.totals[nth] is None:
                self.totals[nth] = torch.zeros_like(parameter)
            kept = [moment for moment in moments[nth] if moment is not None]
            of = [parameter.data_ptr(), *map(address, kept)]
            of += [0] * (3 - len(of)) + [address(self.totals[nth])]
            if slot >= 2:
                of += places[slot - 2][0]
            row += of + [0] * (size - len(of))
            nth += 1
        return row, done

    def rates_of(self, rates: Tensor, done: int) -> list[Tensor]:
        """The learning rates of each group (groups, T), and the scales of Adam's moments, (T,) each."""
        stream, steps = self.stream, rates.shape[1]
        ones = torch.ones(steps, dtype=torch.float64, device="cpu")
        if stream.kind not in (1, 2):
            return [*rates, ones, ones]
        updates = done + 1 + (stream.position + torch.arange(steps, device="cpu")) // stream.update_every
        first, second = self.settings()[:2]
        return [*rates, 1 / (1 - first**updates), 1 / (1 - second**updates).sqrt()]

    @staticmethod
    def run_all(
        networks: Sequence[Compiled], arguments: Sequence[tuple[Any, ...]], hidden: bool
    ) -> list[Result]:
        """`run` of some networks; those of one kind in one launch, as far as they fit on the GPU at once."""
        from ..kernels import cell_stream, stream_layout

        alike: dict[tuple[Any, ...], list[tuple[list[int], Tensor]]] = {}
        given = [one.given(hidden, *each) for one, each in zip(networks, arguments, strict=True)]
        steps = len(arguments[0][0])
        device = networks[0].scratch.device
        for one, each in zip(networks, given, strict=True):
            assert isinstance(one, InKernel)
            problem = one.problem()
            row, done = one.addresses(each, problem)
            rates = each["rates"]
            assert rates is not None
            first, second, eps, decay, huber, norm, *_ = one.settings()
            settings = (first, 1 - first, second, 1 - second, eps, decay, huber, norm)
            present = tuple(each[name] is not None for name in ("resets", "mask"))
            whole = all(place % 16 == 0 for place in row[len(stream_layout.ADDRESSES) :])
            key = problem, settings, one.stream.position, done == 0, present, 16 if whole else 4
            alike.setdefault(key, []).append((row, torch.stack(one.rates_of(rates, done))))
        for (problem, settings, position, begins, present, alignment), rows in alike.items() if steps else ():
            config = networks[0].layout(problem)  # type: ignore[attr-defined]
            assert config is not None
            at_once = len(rows)
            if config.team > 1:  # a program has a multiprocessor to itself
                at_once = torch.cuda.get_device_properties(device).multi_processor_count // config.team
            for start in range(0, len(rows), at_once):
                these = rows[start : start + at_once]
                table = torch.tensor([row for row, _ in these], dtype=torch.int64).to(device)
                rates = torch.stack([rate for _, rate in these]).float().to(device)
                cell_stream.cell_stream(
                    problem,
                    config,
                    table,
                    rates,
                    cell_stream.Room.of(problem, config, len(these), device),
                    settings,
                    steps,
                    position,
                    begins,
                    resets=present[0],
                    mask=present[1],
                    hidden=hidden,
                    alignment=alignment,
                )
        results = []
        for one, each in zip(networks, given, strict=True):
            one.advanced(steps, steps, one.learned())
            losses, outputs = each["losses"], each["outputs"]
            assert losses is not None
            assert outputs is not None
            results.append(Result(losses, outputs, each["hidden"], one.stream.learner.state))
        return results

    def given(self, hidden: bool, *arguments: Any) -> dict[str, Tensor | None]:
        given = super().given(hidden, *arguments)
        given["losses"] = self.scratch.new_empty(len(arguments[0]))
        return given
