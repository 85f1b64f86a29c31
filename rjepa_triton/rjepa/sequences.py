"""What a model is trained and tested on: features of a frozen backbone, and x^High, each made once where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import diagnostics
from .config import Config
from .data import Sides, datasets
from .model import RJEPA, Losses
from .patches import FixationSequences

SAMPLE = 500  # training sequences at most that the head is calibrated on and the probes' components are of


@dataclass
class Sequences:
    """What a model is trained or tested on.

    x           (T, n, N): x^High, made beforehand where backbone and head are frozen; else None
    features    (T, n, D): the backbone's, where it is frozen and recurs nowhere, but the head learns; else None
    patches     the sequences themselves
    targets     (T, n, Q): components of the features, which probes are asked for
    actions     (T, n, 2) or None
    """

    x: Tensor | None
    features: Tensor | None
    patches: Dataset[Any]
    targets: Tensor
    actions: Tensor | None

    def __len__(self) -> int:
        return self.targets.shape[1]


@dataclass
class Data:
    """Both sides of a split, with names of what is held out."""

    train: Sequences
    test: Sequences
    held_out: Sequence[str]


@dataclass(frozen=True)
class Features:
    """What a frozen backbone makes of a run's data, the same for all seeds and rules.

    sides          the data sets
    train, test    (T, n, D) each, and actions (T, n, 2) each
    """

    sides: Sides
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _batches(patches: Dataset[Any], size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches (T, B, 3, P, P) and actions (T, B, 2) of all sequences in order."""
    for batch in DataLoader(patches, batch_size=size):
        yield batch["patches"].transpose(0, 1), batch["actions"].transpose(0, 1).float()


@torch.no_grad()
def features(
    settings: Config, network: nn.Module, advance: Callable[[int], None] = lambda _: None
) -> Features:
    """Read the data and run the backbone, `network`, on all of it; advance: called with the sequences just done."""
    sides = datasets(settings.data)

    def made(side: FixationSequences) -> tuple[Tensor, Tensor]:
        parts = []
        for patches, actions in _batches(side):
            flat = torch.cat([network(part) for part in patches.flatten(0, 1).split(512)])
            parts.append((flat.unflatten(0, patches.shape[:2]), actions))
            advance(patches.shape[1])
        values, actions = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))
        return values, actions

    return Features(sides, made(sides.train), made(sides.test))


@torch.no_grad()
def prepare(settings: Config, model: RJEPA, known: Features | None = None, *, calibrate: bool = True) -> Data:
    """The data as the model takes it; with `calibrate` its head, which is mutated, takes training features' statistics.

    known: `features` of the same data and backbone, so as not to make them again.
    """
    encoder = model.encoder
    known = features(settings, encoder.backbone) if known is None else known
    sides, found = known.sides, (known.train, known.test)
    sample = known.train[0][:, :SAMPLE]
    if calibrate:
        encoder.head.calibrate_(sample)
    components = diagnostics.Components.of((sample - encoder.head.mean) / encoder.head.std)
    made = []
    for (values, actions), patches in zip(found, (sides.train, sides.test), strict=True):
        targets = components((values - encoder.head.mean) / encoder.head.std)
        frozen = encoder.preset == "initial" and not settings.model.train_backbone
        made.append(
            Sequences(
                x=encoder.head(values) if frozen and not settings.model.train_head else None,
                features=values if frozen and settings.model.train_head else None,
                patches=patches,
                targets=targets,
                actions=None if settings.model.actions == "none" else actions,
            )
        )
    return Data(made[0], made[1], sides.held_out)


def losses(model: Any, data: Sequences, batch: Tensor, device: torch.device) -> tuple[Losses, Tensor]:
    """Losses of the sequences `batch`, and x^High without recurrence and gradient, which the control is given."""
    encoder = model.encoder
    actions = None if data.actions is None else data.actions[:, batch].to(device)
    if data.x is not None:
        x = data.x[:, batch].to(device)
        return model.from_inputs(x, actions), x
    if data.features is not None:
        x = encoder.head(data.features[:, batch].to(device))
        return model.from_inputs(x, actions), x.detach()
    patches = torch.stack([data.patches[int(i)]["patches"] for i in batch], dim=1).to(device)
    with torch.no_grad():
        x = encoder.without_recurrence(patches)
    return model(patches, actions), x
