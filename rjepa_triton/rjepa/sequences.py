"""The data as a model takes it: features of a frozen backbone and x^High are computed once where they never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import diagnostics
from .config import Config
from .data import Sides, datasets
from .model import RJEPA, Losses
from .patches import FixationSequences

SAMPLE = (
    500  # at most so many training sequences calibrate the head and give the probes' principal components
)


@dataclass
class Sequences:
    """n sequences on which a model is trained or tested.

    x           (T, n, N): x^High, if backbone and head are frozen; else None
    features    (T, n, D): the backbone's features, if it is frozen and not recurrent, but the head learns; else None
    patches     the sequences themselves
    targets     (T, n, Q): principal components of the features, which the probes predict
    actions     (T, n, 2), or None if the model uses none
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
    """Both sides of a split, and the names of the sources that are held out."""

    train: Sequences
    test: Sequences
    held_out: Sequence[str]


@dataclass(frozen=True)
class Features:
    """A frozen backbone's features of a run's data, which are the same for all seeds and learning rules.

    sides          the data sets
    train, test    of each side: features (T, n, D) and actions (T, n, 2)
    """

    sides: Sides
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _batches(patches: Dataset[Any], size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches (T, B, 3, P, P) and actions (T, B, 2) of all sequences in order, B = `size` at a time."""
    for batch in DataLoader(patches, batch_size=size):
        yield (
            rearrange(batch["patches"], "b t c h w -> t b c h w"),
            rearrange(batch["actions"], "b t a -> t b a").float(),
        )


@torch.no_grad()
def features(
    settings: Config, network: nn.Module, advance: Callable[[int], None] = lambda _: None
) -> Features:
    """Read the data and run the backbone `network` on all of it.

    advance: called after each batch with its number of sequences.
    """
    sides = datasets(settings.data)

    def of(side: FixationSequences) -> tuple[Tensor, Tensor]:
        parts = []
        for patches, actions in _batches(side):
            flat = rearrange(patches, "t b c h w -> (t b) c h w")
            made = torch.cat([network(part) for part in flat.split(512)])
            parts.append((rearrange(made, "(t b) d -> t b d", t=len(patches)), actions))
            advance(patches.shape[1])
        values, actions = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))
        return values, actions

    return Features(sides, of(sides.train), of(sides.test))


@torch.no_grad()
def prepare(settings: Config, model: RJEPA, known: Features | None = None, *, calibrate: bool = True) -> Data:
    """The data as the model takes it.

    calibrate: whether to set the statistics of the model's head, in place, from features of training sequences.
    known: `features` of the same data and backbone, if they were computed before.
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
    """The losses of the sequences with the indices `batch`, and the x^High that the control is trained on.

    That x^High is the feedforward network's, without recurrence and without gradient.
    """
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
