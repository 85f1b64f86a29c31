"""A layer whose rows lie on the ranks of a mesh: what a rank owns, and what it has to know of the others.

    p(t) = W y(t),    Γ ← M ⊙_rows Γ + φ yᵀ,    ∂E/∂W = Σ_b δ ⊙_rows Γ

p, M, φ and δ are numbers of one unit, and so is a row of W, Γ and the gradient. A rank that owns some rows therefore
needs of the other ranks only y, the states of all units, which dense matrices read: B·N numbers a state and step, by
one all-gather. The states that no matrix of another rank reads are gathered once a call, for the layer's output.

The learner's recursion sees a rank as a layer of few units, to which the states of all units are part of the input
(`Matrix.columns`); M alone needs the weight from a unit to itself, which the rank owns.

The weights are DTensors (`torch.distributed.tensor`), sharded by rows, so that torch's optimizers and checkpoints know
what a rank owns. A rank's units are those of torch.chunk: ⌈N/R⌉ on each of R ranks, fewer on the last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backend import operations
from ..cells import weights as weight_ops
from ..cells.two_point import Trajectory, state_read
from ..layers.layer import TwoPointRNN, local
from ..rules import rfp
from .checkpoint import kind
from .options import FormChoice, Options, check_options, choose_form
from .tape import Block, linearized

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Run:
    """Steps that a rank has run with the others.

    trajectory  of the rank's own units
    inputs      (T, B, ·): what its matrices read that isn't of its own units, or None
    after       (S, T, B, N): the states of all units
    """

    trajectory: Trajectory
    inputs: Tensor | None
    after: Tensor


class Shard:
    """The rows of a layer that this rank of a mesh owns. layer: as it is before `distribute`.

    mesh      one-dimensional; `ranks` R, and this one's place `rank`
    units     how many of the layer's N units are this rank's, which lie at `rows`
    matrices  the layer's, as the rank sees them

    Raises ValueError for a mesh that doesn't fit the layer.
    """

    def __init__(self, layer: TwoPointRNN, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        _refuse_layer(layer, mesh)
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.all_units = layer.hidden_size
        self._block = -(-self.all_units // self.ranks)
        full = -(-self.all_units // self._block)
        if full < self.ranks:
            raise ValueError(
                f"mesh must leave each rank some of the layer's {self.all_units} units, got {self.ranks} ranks with "
                f"{self._block} units each, of which the last {self.ranks - full} would have none: take {full} ranks"
            )
        if layer.heads is not None and layer.heads % self.ranks:
            raise ValueError(f"mesh must divide the layer's {layer.heads} heads, got {self.ranks} ranks")
        first = self.rank * self._block
        self.rows = slice(first, min(first + self._block, self.all_units))
        self.units = self.rows.stop - first
        pairs = list(zip(layer.matrices, layer.weights(), strict=True))
        self._read = sorted({state_read(k) for k, w in pairs if isinstance(k.reads, int) and w.dim() == 2})
        self._unread = [nu for nu in range(len(layer.cell.states)) if nu not in self._read]
        self._features = layer.fan_in if any(matrix.reads == "input" for matrix in layer.matrices) else 0
        columns = [(0, self._features)]
        for _ in self._read:
            columns.append((columns[-1][1], columns[-1][1] + self.all_units))
        self.matrices = tuple(
            replace(matrix, reads="input", columns=columns[1 + self._read.index(matrix.reads)])
            if isinstance(matrix.reads, int) and weight.dim() == 2
            else replace(matrix, columns=columns[0] if matrix.reads == "input" else None)
            for matrix, weight in pairs
        )

    def distribute(self, layer: TwoPointRNN) -> None:
        """Make the layer's weights() DTensors of rows, and all its parameters those of the mesh's first rank.

        Mutates the layer: of these parameters a rank keeps its own rows. Those of a readout stay whole on every rank.
        """
        from torch.distributed.tensor import Shard as Rows
        from torch.distributed.tensor import distribute_tensor

        make_alike((p for name, p in layer.named_parameters() if name not in layer._names), self.mesh)
        for name in layer._names:
            parameter = layer.get_parameter(name)
            made = distribute_tensor(parameter.detach(), self.mesh, [Rows(0)])
            layer.register_parameter(name, nn.Parameter(made, requires_grad=parameter.requires_grad))

    def weights(self, layer: TwoPointRNN) -> tuple[Tensor, ...]:
        """This rank's rows of the layer's weights(), which autograd follows to the DTensors.

        Raises RuntimeError while fully_shard has these rows divided among ranks of the batch too.
        """
        if layer._parameters[layer._names[0]].device_mesh.ndim > 1:  # type: ignore[union-attr]
            raise RuntimeError(
                "the layer's weights are divided among ranks of the batch, by fully_shard, which gathers them where "
                "the module is called: call learner(x), or torch.distributed.fsdp.register_fsdp_forward_method("
                "learner, 'chunk') first"
            )
        return tuple([local(weight) for weight in layer.weights()])

    def whole(self, own: Tensor, dim: int) -> Tensor:
        """This rank's units, in dimension `dim`, as a DTensor of all units, which shares their memory."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Rows

        shape = list(own.shape)
        shape[dim] = self.all_units
        return DTensor.from_local(
            own, self.mesh, [Rows(dim)], run_check=False, shape=torch.Size(shape), stride=_strides(shape)
        )

    def own_rows(self, state: Any) -> Any:
        """A learner's state_dict() with this rank's units of Γ, which may be whole in it, or DTensors of this mesh.

        Raises ValueError for a Γ that is of another mesh, and for steps that aren't folded into Γ.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Rows

        if not isinstance(state, dict) or not isinstance(state.get("gamma"), list | tuple):
            return state  # which is refused with the rest
        if state.get("window"):
            raise ValueError(
                "state's window must be empty with a mesh: call settle() of the learner that is saved"
            )
        gammas = []
        for i, gamma in enumerate(state["gamma"]):
            if isinstance(gamma, DTensor):
                if gamma.device_mesh != self.mesh or tuple(gamma.placements) != (Rows(2),):
                    raise ValueError(
                        f"state's gamma[{i}] must lie on the learner's mesh, {self.mesh}, by units, got "
                        f"{gamma.placements} on {gamma.device_mesh}: load it by rjepa_triton.online.elastic, which "
                        "reads rows that were saved by other ranks"
                    )
                gamma = gamma.to_local()
            elif isinstance(gamma, Tensor) and gamma.dim() == 4 and gamma.shape[2] == self.all_units:
                gamma = gamma[:, :, self.rows]
            gammas.append(gamma)
        return {**state, "gamma": gammas}

    def gather(self, own: Tensor) -> Tensor:
        """(…, n) of this rank's units → (…, N) of all units, on every rank: one all-gather.

        Raises RuntimeError where a rank has ended or doesn't come within the group's timeout.
        """
        return self._begin_gather(own)()

    def _begin_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """What waits for the result of `gather`, which is on its way from now on."""
        lines = own.reshape(-1, own.shape[-1])
        if self.units < self._block:
            lines = nn.functional.pad(lines, (0, self._block - self.units))
        lines = lines.contiguous()
        found = own.new_empty(self.ranks, len(lines), self._block)
        arrived = begin(self.mesh.get_group(), torch.distributed.all_gather, list(found.unbind(0)), lines)

        def finish() -> Tensor:
            arrived()
            joined = found.transpose(0, 1).flatten(1)[:, : self.all_units]
            return joined.reshape(*own.shape[:-1], self.all_units)

        return finish

    def input_gradient(self, layer: TwoPointRNN, per_unit: Tensor, input_weights: Sequence[Tensor]) -> Tensor:
        """As the layer's, of what this rank's units give: summed over the ranks, or gathered if x is their own."""
        part = layer.input_gradient(per_unit, input_weights)
        if not input_weights:
            return self.gather(part)
        part = part.contiguous()
        collective(self.mesh.get_group(), torch.distributed.all_reduce, part)
        return part

    @torch.no_grad()
    def run(
        self,
        layer: TwoPointRNN,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Tensor,
        resets: Tensor | None,
        backend: str = "torch",
    ) -> Run:
        """Run steps on all ranks. x (T, B, F); weights: this rank's; state (S, B, N) of all units.

        resets (T, B) bool or None; backend: of `operations.advance`. Nothing is mutated.
        """
        cell, (steps, batch) = layer.cell, x.shape[:2]
        drive = layer.drive(x if layer.input_size is not None else x[..., self.rows], weights)
        recurrent = weights[: len(cell.matrices)]
        dense = [
            (k, state_read(matrix), weight)
            for k, (matrix, weight) in enumerate(zip(cell.matrices, recurrent, strict=True))
            if weight.dim() == 2
        ]
        own = state.new_empty(len(state), steps + 1, batch, self.units)
        own[:, 0] = state[..., self.rows]
        saved = state.new_empty(cell.saves, steps, batch, self.units)
        read = state.new_empty(len(self._read), steps, batch, self.all_units)
        after = state.new_empty(len(state), steps, batch, self.all_units)
        y, arrives = state[self._read], None
        for t in range(steps):
            before = own[:, t]
            if resets is not None:
                before = before.masked_fill(resets[t, :, None], 0)
            # the other ranks' states are on their way while their own are multiplied
            begun = [before[source] @ weight[:, self.rows].mT for _, source, weight in dense]
            if arrives is not None:
                y = after[self._read, t - 1] = arrives()
            if resets is not None:
                y = y.masked_fill(resets[t, :, None], 0)
            read[:, t] = y
            products: list[Tensor | None] = [None] * len(recurrent)
            for product, (k, source, weight) in zip(begun, dense, strict=True):
                self._add_others_(product, weight, y[self._read.index(source)])
                products[k] = product
            own[:, t + 1], saved[:, t] = operations.advance(
                cell, drive[:, t], recurrent, products, before, backend=backend
            )
            if self._read and t + 1 < steps:
                arrives = self._begin_gather(own[self._read, t + 1])
        self._gather_rest(own, after)
        inputs = [x] if self._features else []
        inputs += read.unbind(0)
        trajectory = Trajectory(drive, own, saved, resets)
        return Run(trajectory, torch.cat(inputs, -1) if inputs else None, after)

    def _add_others_(self, product: Tensor, weight: Tensor, y: Tensor) -> None:
        """Add to the product (B, n) of this rank's rows what the units of the other ranks, of y (B, N), enter."""
        for columns in (slice(0, self.rows.start), slice(self.rows.stop, self.all_units)):
            if columns.start < columns.stop:
                product.addmm_(y[:, columns], weight[:, columns].mT)

    def _gather_rest(self, own: Tensor, after: Tensor) -> None:
        """Gather what the steps of own (S, T + 1, B, n) have not: writes into after (S, T, B, N)."""
        last = own[self._read, -1:].flatten(0, -2)
        found = self.gather(torch.cat([last, own[self._unread, 1:].flatten(0, -2)]))
        parts = found.split([len(last), len(found) - len(last)])
        if self._read:
            after[self._read, -1:] = parts[0].view(len(self._read), 1, *after.shape[2:])
        if self._unread:
            after[self._unread] = parts[1].view(len(self._unread), *after.shape[1:])

    def recorded(
        self,
        layer: TwoPointRNN,
        x: Tensor,
        weights: Sequence[Tensor],
        state: Tensor,
        resets: Tensor | None,
        rule: str,
        backend: str,
    ) -> tuple[Tensor, Block]:
        """The states of all units after steps, (S, T, B, N), and the block of this rank's units (`tape.recorded`)."""
        run = self.run(layer, x, weights, state, resets, backend)
        recurrent = [
            weight.diagonal(self.rows.start).contiguous() if weight.dim() == 2 else weight_ops.own(weight)
            for weight in weights[: len(layer.cell.matrices)]
        ]
        return run.after, linearized(layer.cell, run.trajectory, recurrent, run.inputs, rule, backend=backend)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(*shape, device="meta").stride()


def one_dimensional(mesh: object) -> DeviceMesh:
    """`mesh`, or TypeError or ValueError if it isn't one of one dimension that has this process."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        one = f"one of its dimensions, mesh[{names[0]!r}]" if names else "a mesh of one dimension"
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: give {one}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must have this process, rank {torch.distributed.get_rank()}, got {mesh}")
    return mesh


def _refuse_layer(layer: TwoPointRNN, mesh: DeviceMesh) -> None:
    """Raise ValueError unless the layer's weights are plain parameters on the mesh's devices."""
    for name, weight in zip(layer._names, layer.weights(), strict=True):
        if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
            kind = type(weight.data).__name__ if isinstance(weight, nn.Parameter) else "computed from others"
            raise ValueError(f"mesh goes with a layer of plain parameters, got {name}, which is {kind}")
        refuse_other_device(weight, mesh)


def refuse_other_device(weight: Tensor, mesh: DeviceMesh) -> None:
    """Raise ValueError if a layer's weight isn't on the mesh's devices."""
    if weight.device.type != mesh.device_type:
        raise ValueError(f"mesh must be of the layer's device, {weight.device}, got {mesh.device_type}")


def make_alike(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give parameters, in place, the values that they have on the mesh's first rank."""
    for parameter in parameters:
        collective(
            mesh.get_group(), functools.partial(torch.distributed.broadcast, group_src=0), parameter.detach()
        )


def planned(
    layer: TwoPointRNN, batch_size: int, mesh: object, given: Mapping[str, Any]
) -> tuple[Options, FormChoice, Shard | None]:
    """An `OnlineLearner`'s options, checked, its form, and with a mesh its rows; all ranks agree, or all raise.

    given: the other arguments by name. Nothing is mutated. Raises as `OnlineLearner` says.
    """
    if mesh is None:
        options = check_options(layer, batch_size, **given)
        return options, choose_form(layer, options), None
    own = one_dimensional(mesh)
    facts: dict[str, object] = {"batch_size": batch_size, **given, "the code": revision()}
    try:
        options = check_options(layer, batch_size, **given)
        _refuse_options(options, given["lr"])
        shard = Shard(layer, own)
        if options.form == "auto":
            options = replace(options, form="step" if options.update_every == 1 else "chunk")
        choice = choose_form(layer, options, shard.units)
    except (TypeError, ValueError) as error:
        agree(own.get_group(), facts, error)
        raise
    first = layer.weights()[0]
    sizes = {"hidden_size": layer.hidden_size, "the layer": (*kind(layer), first.dtype)}
    agree(own.get_group(), {**sizes, **facts})
    return options, choice, shard


def _refuse_options(options: Options, lr: float | None) -> None:
    """Raise ValueError, naming the nearest that can, for options of a learner that don't go with a mesh."""
    asked: list[tuple[str, object, Sequence[object]]] = [
        ("learning", options.learning, rfp.RULES),
        ("credit", options.credit, ("own",)),
        ("form", options.form, ("auto", "step", "chunk")),
        ("gamma_rounding", options.gamma_rounding, ("nearest",)),
        ("nonfinite", options.nonfinite, ("warn", "ignore")),
        ("cuda_graph", options.cuda_graph, (False,)),
        ("lr", lr, (None,)),
    ]
    for name, value, allowed in asked:
        if value not in allowed:
            raise ValueError(
                f"mesh goes with {name} of {', '.join(map(repr, allowed))}, got {name}={value!r}: a rank owns rows, "
                "and acts on them alone"
            )


def agree(
    group: Any, facts: Mapping[str, object], failed: Exception | None = None, *, what: str = "mesh"
) -> None:
    """Raise, on every rank of a process group, where one has failed or where the ranks' facts differ.

    Nothing but these are sent. what: begins the messages. failed: what went wrong on this rank so far, which is raised
    here. Raises ValueError that names what differs, and on which ranks; RuntimeError where a rank is missing.
    """
    mine = {name: repr(value) for name, value in facts.items()}
    mine["error"] = "" if failed is None else f"{type(failed).__name__}: {failed}"
    found = gathered_objects(group, mine, what)
    count = len(found)
    if failed is not None:
        raise failed
    for rank, theirs in enumerate(found):
        if theirs["error"]:
            raise ValueError(f"{what}: rank {rank} of {count} can't go on: {theirs['error']}")
    for name in dict.fromkeys(name for theirs in found for name in theirs):
        by_value: dict[str, list[str]] = {}
        for rank, theirs in enumerate(found):
            by_value.setdefault(theirs.get(name, "nothing"), []).append(str(rank))
        if len(by_value) > 1:
            told = " and ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in by_value.items())
            raise ValueError(f"{name} must be the same on all {count} ranks of the {what}, got {told}")


def gathered_objects(group: Any, mine: object, what: str) -> list[Any]:
    """What each rank gives, pickled and sent, on every rank. Raises RuntimeError where a rank is missing."""
    distributed = torch.distributed
    found: list[Any] = [None] * distributed.get_world_size(group)
    try:
        if distributed.get_backend(group) == "gloo":
            distributed.monitored_barrier(group)  # which knows who is missing
        distributed.all_gather_object(found, mine, group)
    except RuntimeError as error:
        raise RuntimeError(_lost(group, error, what)) from error
    return found


@contextlib.contextmanager
def together(group: Any, what: str, **facts: object) -> Iterator[None]:
    """All ranks of a group end the block without an error, and with the same facts, or all raise (`agree`).

    group: None: there is this process alone.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
        if group is None:
            raise
    if group is not None:
        agree(group, facts, failed, what=what)


def collective(group: Any, function: Callable[..., object], *given: object) -> None:
    """A collective of torch.distributed. Raises RuntimeError that says so where a rank has ended or doesn't come."""
    begin(group, function, *given)()


def begin(group: Any, function: Callable[..., Any], *given: object) -> Callable[[], None]:
    """Begin a collective, and return what waits for its end. Both raise as `collective` does."""

    def told(run: Callable[[], Any]) -> Any:
        try:
            return run()
        except RuntimeError as error:
            raise RuntimeError(_lost(group, error, "mesh")) from error

    work = told(lambda: function(*given, group=group, async_op=True))
    return lambda: told(work.wait)


def _lost(group: Any, error: Exception, what: str) -> str:
    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return (
        f"{what}: rank {rank} of {count} got no answer from another rank, which has ended, or did "
        f"not come within the group's timeout: {error}. Start all ranks again from the last checkpoint"
    )


@functools.cache
def revision() -> str:
    """Of the code that runs: this package's sources, as a digest, and the versions of torch and Python."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{found.hexdigest()[:12]} (torch {torch.__version__}, Python {sys.version.split()[0]})"
