"""The data as a model takes it: features of a frozen backbone and x^High are computed once where they never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import heads
from .config import Config
from .data import Sides, datasets
from .encoder import Encoding
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
    yardstick   (T, n, E): context-free embeddings by the encoder's first weights (`model.RJEPA`)
    sources     (n,): the name of each sequence's movie or picture
    """

    x: Tensor | None
    features: Tensor | None
    patches: Dataset[Any]
    targets: Tensor
    actions: Tensor | None
    yardstick: Tensor
    sources: np.ndarray

    def __len__(self) -> int:
        return self.targets.shape[1]


@dataclass
class Data:
    """Both sides of a split, what is held out to choose by, if anything, and the names of the test's sources."""

    train: Sequences
    test: Sequences
    held_out: Sequence[str]
    validation: Sequences | None = None


@dataclass(frozen=True)
class Features:
    """A frozen backbone's features of a run's data, which are the same for all seeds and learning rules.

    sides          the data sets
    train, test    of each side: features (T, n, D) and actions (T, n, 2)
    validation     likewise, or None
    """

    sides: Sides
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None = None


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

    chosen_by = None if sides.validation is None else of(sides.validation)
    return Features(sides, of(sides.train), of(sides.test), chosen_by)


@torch.no_grad()
def prepare(settings: Config, model: RJEPA, known: Features | None = None, *, calibrate: bool = True) -> Data:
    """The data as the model takes it.

    The model must have its first weights, which make the yardstick. calibrate: whether to set the statistics of its
    head, in place, from features of training sequences. known: `features` of the same data and backbone, if they were
    computed before.
    """
    encoder = model.encoder
    known = features(settings, encoder.backbone) if known is None else known
    sides = known.sides
    given = [(known.train, sides.train), (known.test, sides.test)]
    if known.validation is not None and sides.validation is not None:
        given.append((known.validation, sides.validation))
    order, seed = settings.data.order, settings.data.seed
    found = [(reordered(values, order, seed), actions, patches) for (values, actions), patches in given]
    sample = found[0][0][:, :SAMPLE]
    if calibrate:
        encoder.head.calibrate_(sample)
    components = _components(sample)
    frozen = encoder.preset == "initial" and not settings.model.train_backbone
    learning = encoder.head.training
    encoder.head.eval()
    made = [
        Sequences(
            x=encoder.head(values) if frozen and not settings.model.train_head else None,
            features=values if frozen and settings.model.train_head else None,
            patches=patches,
            targets=components(values),
            actions=None if settings.model.actions == "none" else actions,
            yardstick=encoder.context_free(encoder.head(values)),
            sources=patches.movie,
        )
        for values, actions, patches in found
    ]
    encoder.head.train(learning)
    return Data(made[0], made[1], sides.held_out, made[2] if len(made) > 2 else None)


def reordered(values: Tensor, order: str, seed: int) -> Tensor:
    """Features (T, n, D) in another order of patches (`config.DataConfig`); the same for the same seed."""
    steps, count = values.shape[:2]
    drawn = torch.Generator().manual_seed(seed)
    if order == "shuffled":
        places = torch.stack([torch.randperm(steps, generator=drawn) for _ in range(count)], dim=1)
        return values[places, torch.arange(count)]
    if order == "other":
        return values.flatten(0, 1)[torch.randperm(steps * count, generator=drawn)].unflatten(
            0, (steps, count)
        )
    return values


def _components(sample: Tensor, count: int = 50) -> Callable[[Tensor], Tensor]:
    """A function of features (…, D): their first principal components (…, Q), Q ≤ `count`, by those of the sample.

    They are standardised and clipped first, and not whitened.
    """
    from sklearn.decomposition import PCA

    rows = rearrange(sample, "... d -> (...) d")
    mean, std = heads.statistics(rows)
    z = heads.standardised(rows, mean, std).double().cpu().numpy()
    found = PCA(
        min(count, *z.shape), svd_solver="covariance_eigh" if z.shape[0] > z.shape[1] else "full"
    ).fit(z)
    axes, centre = (torch.from_numpy(made).float() for made in (found.components_.T.copy(), found.mean_))

    def of(values: Tensor) -> Tensor:
        return (heads.standardised(values, mean, std) - centre) @ axes

    return of


@dataclass(frozen=True)
class Batch:
    """Some sequences, as a model takes them: x^High, features or patches, which it has, and what else losses need."""

    x: Tensor | None
    features: Tensor | None
    patches: Tensor | None
    actions: Tensor | None
    yardstick: Tensor


def taken(data: Sequences, which: Tensor, model: nn.Module) -> Batch:
    """The sequences with the indices `which`, with the dtype of the model's weights, and on their device."""
    weight = next(model.parameters())

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, which].to(weight)

    patches = None
    if data.x is None and data.features is None:
        # bytes as they are: the backbone scales them
        patches = torch.stack([data.patches[int(i)]["patches"] for i in which], dim=1).to(weight.device)
    return Batch(
        of(data.x), of(data.features), patches, of(data.actions), data.yardstick[:, which].to(weight)
    )


def encoding(model: Any, batch: Batch) -> Encoding:
    """What the encoder makes of a batch. It isn't called through Lightning Fabric: this is for evaluations."""
    if batch.patches is not None:
        return model.encoder(batch.patches)
    return model.encoder.encode(model.encoder.head(batch.features) if batch.x is None else batch.x)


def losses(model: Any, batch: Batch) -> Losses:
    """The losses of a batch."""
    given = {"actions": batch.actions, "yardstick": batch.yardstick}
    if batch.patches is not None:
        return model(batch.patches, **given)
    x = model.encoder.head(batch.features) if batch.x is None else batch.x
    return model.from_inputs(x, **given)
