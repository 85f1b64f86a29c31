"""Checkpoints of a run on one or several ranks, which go on on any number of ranks (torch.distributed.checkpoint).

    save(folder, step, {"layer": layer, "learner": learner, "optimizer": optimizer})     on every rank
    step = load(folder, {"layer": layer, "learner": learner, "optimizer": optimizer})    None if there is none

A checkpoint is a folder `step-000000000012` in `folder`, to which each rank writes what it owns. It is written under
another name, which begins with a dot, synced to disk, and renamed when all ranks are done: it is there as a whole or
not at all, whenever a rank or the machine stops. What a killed save has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._files import first_line, sync
from .learner import OnlineLearner
from .population import Population
from .sharded import gathered_objects, together
from .streams import Stream

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NAME = re.compile(r"step-(\d{12})")
_PART = ".step.part"
_STRUCTURE = "structure"
VERSION = 1


class Part(Protocol):
    """What a checkpoint holds a part of: a layer, a learner, an optimizer, a stream, a scheduler, …"""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def steps(folder: str | Path) -> list[int]:
    """The steps of which `folder` has a checkpoint, in order."""
    with contextlib.suppress(FileNotFoundError):
        found = (_NAME.fullmatch(entry.name) for entry in Path(folder).iterdir())
        return sorted(int(match[1]) for match in found if match)
    return []


def save(folder: str | Path, step: int, parts: Mapping[str, Part], *, keep: int = 2) -> None:
    """Write a checkpoint: all ranks call this with the same arguments, between two updates.

    step: ≥ 0, later than those that `folder` has. parts: by names of your own. keep: how many of the last checkpoints
    stay, ≥ 1. Learners in the parts settle (`OnlineLearner.settle`): a backward() of an earlier step comes too late. A
    rank writes the networks that it has of a `Stream` with a population.

    Raises TypeError or ValueError for an argument, on every rank, where ranks disagree or one fails, and for learners
    whose mesh isn't of all ranks, as with the batch divided among ranks; OSError where the folder can't be written. No
    checkpoint is there then of this step, and the earlier ones are as they were.
    """
    folder = Path(folder)
    with together(_group(), "checkpoint", step=step, keep=keep, parts=list(parts)):
        check.integer("step", step, 0)
        check.integer("keep", keep, 1)
        if step >= 10**12:
            raise ValueError(f"step must be below 10**12, got {step}")
        last = max(steps(folder), default=-1)
        if step <= last:
            raise ValueError(f"step must be later than the last checkpoint's in {folder}, {last}, got {step}")
        tensors, structure = _split(parts)
        if _first():
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_PART}*"):
                shutil.rmtree(left)
    _join_populations(parts, structure)
    tensors[_STRUCTURE] = pickle.dumps({"version": VERSION, "parts": structure})  # whole: it has no tensors
    with together(_group(), "checkpoint"), _named(folder, "can't be written", OSError):
        _dcp().save(tensors, checkpoint_id=folder / _PART, no_dist=not _distributed())
    with together(_group(), "checkpoint"):
        if _first():
            sync(folder / _PART)
            os.rename(folder / _PART, _path(folder, step))
            sync(folder)
            for old in steps(folder)[:-keep]:
                gone = folder / f"{_PART}.{old}"
                os.rename(_path(folder, old), gone)
                shutil.rmtree(gone)


def load(folder: str | Path, parts: Mapping[str, Part], step: int | None = None) -> int | None:
    """Go on from a checkpoint: all ranks call this with parts made anew, on as many ranks as there are now.

    step: of the checkpoint; None: the last one. Returns its step, or None where `folder` has no checkpoint. Each rank
    reads the rows that it owns now. Mutates the parts, by their load_state_dict(). Checkpoints hold pickled objects:
    load only those that you trust.

    Raises ValueError on every rank, with nothing changed, for a step that isn't there, a checkpoint that is damaged,
    and parts of another kind or size, which are named.
    """
    folder = Path(folder)
    with together(_group(), "checkpoint", step=step, parts=list(parts), checkpoints=steps(folder)):
        found = steps(folder)
        if step is not None and step not in found:
            raise ValueError(f"step must be one of a checkpoint in {folder}, {found}, got {step}")
        if not found:
            return None
        step = found[-1] if step is None else step
        path = _path(folder, step)
        own, _ = _split(parts)
        with _named(path, "is damaged", ValueError):
            held = _dcp().FileSystemReader(path).read_metadata().state_dict_metadata
            read: dict[str, Any] = {_STRUCTURE: None}
            _dcp().load(read, checkpoint_id=path, no_dist=True)
            described = pickle.loads(read[_STRUCTURE])
        if described["version"] != VERSION:
            raise ValueError(f"{path} must be of version {VERSION}, got {described['version']}")
        saved = described["parts"]
        if set(saved) != set(parts):
            raise ValueError(f"parts must be those of {path}, {sorted(saved)}, got {sorted(parts)}")
        saved = {name: _of_this_rank(path, name, part, saved[name]) for name, part in parts.items()}
        into = {name: _like(path, name, own, held, parts) for name in _paths(saved)}
        _refuse_others(path, own, held, parts)
    with together(_group(), "checkpoint"), _named(path, "is damaged", ValueError):
        _dcp().load(into, checkpoint_id=path, no_dist=not _distributed())
    states = {name: _joined(saved[name], into) for name in parts}
    with together(_group(), "checkpoint"):
        for name, part in parts.items():
            for learner, state in _learners_states(part, states[name]):  # can tell before anything changes
                learner.refuse_foreign(state)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return step


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:012d}"


def _dcp() -> Any:
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _group() -> Any:
    """That of all ranks, or None."""
    return torch.distributed.group.WORLD if _distributed() else None


def _first() -> bool:
    return not _distributed() or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def _named(path: Path, what: str, kind: type[Exception]) -> Iterator[None]:
    """Let an error of torch.distributed.checkpoint, which may be of any kind, name the path."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is in one process
            yield
    except (Exception, _dcp().CheckpointException) as error:
        inner = getattr(error, "failures", {})
        causes = [first for first, *_ in inner.values()] if inner else [error]
        raise kind(f"{path} {what}: {type(causes[0]).__name__}: {first_line(causes[0])}") from error


def _split(parts: Mapping[str, Part]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of all parts by their paths, and what is left, with a path in the place of each tensor."""
    tensors: dict[str, Any] = {}

    def left(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return _At(path)
        if isinstance(value, Mapping):
            return {key: left(each, f"{path}.{key}") for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [left(each, f"{path}.{i}") for i, each in enumerate(value)]
        return value

    for name, part in parts.items():
        if not name.isidentifier():
            raise ValueError(f"parts must have names such as 'learner', got {name!r}")
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, OnlineLearner):
                _refuse_rows_apart(name, module.mesh)
                module.settle()
        for stream in _streams(part).values():
            _refuse_rows_apart(name, stream.learner.mesh if part is stream else _population(part).mesh)  # type: ignore[union-attr]
            if stream.position or stream._pending is not None:
                raise ValueError(f"{name} must be between two updates, got a step that waits for its update")
            stream.learner.settle()
    return tensors, {name: left(part.state_dict(), name) for name, part in parts.items()}


def _population(part: Part) -> Population | None:
    return part.population if isinstance(part, Stream) else None


def _streams(part: Part) -> dict[str, Stream]:
    """The streams of a part that is one, by what their paths begin with after the part's name."""
    if (population := _population(part)) is not None:
        return {f".members.{at}": one for at, one in zip(population.own, population.members, strict=True)}
    return {"": part} if isinstance(part, Stream) else {}


def _learners_states(part: Part, state: Any) -> list[tuple[OnlineLearner, Any]]:
    """The learners of a part that is one or has some, with their states in the part's."""
    if isinstance(part, OnlineLearner):
        return [(part, state)]
    if (population := _population(part)) is not None:
        pairs = zip(population.own, population.members, strict=True)
        return [(one.learner, state["members"][at]["learner"]) for at, one in pairs]
    return [(part.learner, state["learner"])] if isinstance(part, Stream) else []


def _join_populations(parts: Mapping[str, Part], structure: dict[str, Any]) -> None:
    """Add to the structure, of populations that are divided among ranks, that of the other ranks' networks."""
    divided = [
        name for name, part in parts.items() if (p := _population(part)) is not None and p.mesh is not None
    ]
    if divided and _distributed():
        for theirs in gathered_objects(_group(), {name: structure[name] for name in divided}, "checkpoint"):
            for name in divided:
                structure[name]["members"].update(theirs[name]["members"])


def _of_this_rank(path: Path, name: str, part: Part, saved: Any) -> Any:
    """What was saved of a part; of a population that of this rank's networks, by their places. Raises ValueError."""
    if (population := _population(part)) is None:
        return saved
    members = saved.get("members") if isinstance(saved, dict) else None
    if members is None or len(members) != population.count:
        has = "none" if members is None else f"{len(members)} networks"
        raise ValueError(f"{name} must be a population as in {path}, which has {has}, got {population.count}")
    return {"members": {at: members[at] for at in population.own}}


def _refuse_rows_apart(name: str, mesh: DeviceMesh | None) -> None:
    """Raise ValueError if ranks have batch rows of their own, so that one rank's state is not the run's."""
    if not _distributed() or torch.distributed.get_world_size() == 1:
        return
    ranks = torch.distributed.get_world_size()
    if mesh is None or mesh.size() != ranks:
        has = "none" if mesh is None else f"one of {mesh.size()}"
        raise ValueError(
            f"{name} must have a mesh of all {ranks} ranks, got {has}: each rank has batch rows of its own, whose "
            "states its own torch.save(learner.state_dict()) keeps"
        )


class _At(str):
    """The path of a tensor, in its place."""


def _joined(left: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_split` took apart, with these tensors."""
    if isinstance(left, _At):
        return tensors[left]
    if isinstance(left, dict):
        return {key: _joined(each, tensors) for key, each in left.items()}
    return [_joined(each, tensors) for each in left] if isinstance(left, list) else left


def _paths(left: Any) -> Iterator[str]:
    """The paths of the tensors in what `_split` has left."""
    if isinstance(left, _At):
        yield str(left)
    elif isinstance(left, dict | list):
        for each in left.values() if isinstance(left, dict) else left:
            yield from _paths(each)


def _like(
    path: Path, name: str, own: Mapping[str, Tensor], held: Mapping[str, Any], parts: Mapping[str, Part]
) -> Tensor:
    """An empty tensor for what the checkpoint has under a name, laid out as the part's own. Raises ValueError."""
    size, dtype = tuple(held[name].size), held[name].properties.dtype
    like = own.get(name)
    if like is None:
        like = _of_optimizer(name, parts)
        if like is None:
            raise ValueError(f"{name} of {path} has no place in parts, which are of another kind")
        if like.shape != size:
            return torch.empty(size, dtype=dtype, device=like.device if math.prod(size) > 1 else "cpu")
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    if tuple(like.shape) != size or like.dtype != dtype:
        raise ValueError(
            f"{name} of {path} must have the shape and dtype of parts, {tuple(like.shape)} {like.dtype}, got {size} "
            f"{dtype}"
        )
    return torch.empty_like(like, requires_grad=False)


def _optimizers(parts: Mapping[str, Part]) -> dict[str, torch.optim.Optimizer]:
    """The parts that are optimizers, and those of streams, by their paths."""
    found = {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
    for name, part in parts.items():
        found |= {f"{name}{at}.optimizer": stream.optimizer for at, stream in _streams(part).items()}
    return found


def _of_optimizer(name: str, parts: Mapping[str, Part]) -> Tensor | None:
    """The parameter to which state of an optimizer belongs, by a name such as "optimizer.state.3.exp_avg"."""
    whose, _, rest = name.rpartition(".state.")
    optimizer = _optimizers(parts).get(whose)
    if optimizer is None or rest.count(".") != 1:
        return None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = int(rest.split(".")[0])
    return parameters[index].detach() if index < len(parameters) else None


def _refuse_others(
    path: Path, own: Mapping[str, Tensor], held: Mapping[str, Any], parts: Mapping[str, Part]
) -> None:
    """Raise ValueError if a part has a tensor of which the checkpoint has none; a used optimizer may have."""
    of_optimizers = tuple(f"{path}.state." for path in _optimizers(parts))
    for name in own:
        if name not in held and not name.startswith(of_optimizers):
            raise ValueError(f"{path} has no {name}, which parts have: they are of another kind")
