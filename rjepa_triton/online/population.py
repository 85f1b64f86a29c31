"""A population: P independent networks that learn in the same call of a `Stream`, on one or several ranks.

With a mesh the networks are divided among its ranks, the first ⌈P/R⌉ or ⌊P/R⌋ on the first of R ranks, and so on. They
don't need one another, so nothing is sent but what a call gives.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..layers.layer import TwoPointRNN
from . import sharded, stream_given
from .stream_code import Result

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .streams import Stream


class Population:
    """Networks that learn independently.

    make(layer, readout, lr=rate) gives the stream of one. layer, readout, count, seeds and lr are as for `Stream`; they
    are copied. mesh: a DeviceMesh of one dimension, or None.

    members  the streams of this rank's networks
    own      their places among all `count`
    shares   how many networks each rank has

    Raises TypeError or ValueError; with a mesh on every rank.
    """

    def __init__(
        self,
        make: Callable[..., Stream],
        layer: TwoPointRNN,
        readout: nn.Module,
        count: object,
        seeds: Sequence[int] | None,
        lr: float | Sequence[float],
        mesh: DeviceMesh | None,
    ) -> None:
        self.mesh, self.group = mesh, None if mesh is None else mesh.get_group()
        ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
        with sharded.together(self.group, "stream"):
            self.count = check.integer("population", count, 1)
            if ranks > self.count:
                raise ValueError(
                    f"mesh must leave each rank some of the {self.count} networks, got {ranks} ranks"
                )
            if mesh is not None:
                sharded.refuse_other_device(layer.weights()[0], mesh)
                layer, readout = copy.deepcopy((layer, readout))
        if mesh is not None:
            sharded.make_alike([*layer.parameters(), *readout.parameters()], mesh)
        self.shares = [self.count // ranks + (one < self.count % ranks) for one in range(ranks)]
        first = sum(self.shares[:rank])
        self.own = range(first, first + self.shares[rank])
        with sharded.together(self.group, "stream"):
            self.members = [
                make(*copies, lr=rate)
                for copies, rate in networks(layer, readout, self.count, seeds, lr, self.own)
            ]

    def run(
        self,
        x: Tensor,
        target: Tensor | None,
        resets: Tensor | None,
        mask: Tensor | None,
        lr: Tensor | None,
        hidden: bool,
    ) -> Result:
        """`Stream.run` of all networks. With a mesh every rank gets what all have given."""
        members = self.members
        with sharded.together(self.group, "stream", x=getattr(x, "shape", None), hidden=hidden):
            split = functools.partial(_split, count=self.count, own=self.own)
            classes = members[0].loss == "cross_entropy"
            given = [
                stream_given.checked(member, *each)
                for member, *each in zip(
                    members,
                    split("x", x, 3),
                    split("target", target, 2 if classes else 3),
                    split("resets", resets, 2),
                    split("mask", mask, 2),
                    split("lr", lr, 1),
                    strict=True,
                )
            ]
        with sharded.together(self.group, "stream"):
            compiled = [one for member in members if (one := member._serving()) is not None]
            if len(compiled) == len(members):
                results = type(compiled[0]).run_all(compiled, given, hidden)
            else:
                for member in members:
                    member._serving(never=True)
                results = [member._loop(*each, hidden) for member, each in zip(members, given, strict=True)]
        for member in members:
            member.begun.fill_(True)
        shown = [result.hidden for result in results if result.hidden is not None]
        states = self._of_all([torch.stack(tuple(result.state)) for result in results])
        found = Result(
            self._of_all([result.losses for result in results]),
            self._of_all([result.outputs for result in results]),
            self._of_all(shown) if hidden else None,
            [state.unbind() for state in states],
        )
        for member, result in zip(members, results, strict=True):
            member._tell(result.losses)
        return found

    def _of_all(self, own: Sequence[Tensor]) -> Tensor:
        """A tensor of each of this rank's networks → one of all networks, on every rank."""
        joined = torch.stack(list(own))
        if self.group is None:
            return joined
        padded = joined.new_zeros(max(self.shares), *joined.shape[1:])
        padded[: len(joined)] = joined
        found = [torch.empty_like(padded) for _ in self.shares]
        sharded.collective(self.group, torch.distributed.all_gather, found, padded)
        return torch.cat([each[:share] for each, share in zip(found, self.shares, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """The members' states, in a list; with a mesh those of this rank's, by their places among all."""
        states = [member.state_dict() for member in self.members]
        return {"members": states if self.mesh is None else dict(zip(self.own, states, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with such states: a list of all networks', or this rank's by their places."""
        given: Any = state.get("members")
        by_place = isinstance(given, Mapping) and set(given) >= set(self.own)
        if not by_place and not (isinstance(given, Sequence) and len(given) == self.count):
            raise ValueError(f"state must be of a population of {self.count}")
        states = [given[place] for place in self.own]
        for member, one in zip(self.members, states, strict=True):
            member.learner.refuse_foreign(one["learner"])
        for member, one in zip(self.members, states, strict=True):
            member.load_state_dict(one)


def networks(
    layer: TwoPointRNN,
    readout: nn.Module,
    population: int,
    seeds: Sequence[int] | None,
    lr: float | Sequence[float],
    chosen: range,
) -> Iterator[tuple[tuple[TwoPointRNN, nn.Module], float]]:
    """For each chosen network of a population copies of layer and readout, drawn anew with its seed, and its rate.

    Raises TypeError or ValueError.
    """
    own = list(range(population)) if seeds is None else list(seeds)
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * population
    for name, value in (("seeds", own), ("lr", rates)):
        if len(value) != population:
            raise ValueError(f"{name} must be {population} numbers, one for each network, got {len(value)}")
    for place in chosen:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check.integer("seeds", own[place], 0))
            copies = copy.deepcopy((layer, readout))
            for module in (each for of in copies for each in of.modules()):
                if callable(draw := getattr(module, "reset_parameters", None)):
                    draw()
        yield copies, rates[place]


def _split(name: str, value: Tensor | None, dims: int, count: int, own: range) -> list[Any]:
    """An argument of each of some networks, `own` of `count`: one for all, of `dims` dimensions, or as many.

    Raises TypeError or ValueError.
    """
    if value is None:
        return [None] * len(own)
    if check.tensor(name, value).dim() == dims:
        return [value] * len(own)
    if value.dim() == dims + 1 and len(value) == count:
        return [value[place] for place in own]
    raise ValueError(
        f"{name} must have {dims} dimensions, one for all networks, or {dims + 1} with population={count} first, got "
        f"shape {tuple(value.shape)}"
    )
