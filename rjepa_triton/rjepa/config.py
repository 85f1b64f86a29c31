"""The configuration of a training run: dataclasses, read from YAML and from overrides such as train.epochs=3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _checks as check
from .. import _files
from . import plain_yaml, regularizers
from .encoder import LEARNING, PRESETS
from .formats import FORMATS
from .gates import GATES
from .heads import HEADS
from .model import ACTIONS, DISTANCES, PREDICTORS, PSI, TARGETS

# What `data.order` takes (`sequences.reordered`).
ORDERS = ("recorded", "shuffled", "other")
# Keys that a run of version 0.1 didn't have, and what it did: their defaults are others now.
EARLIER = {"model.head": "mlp", "model.gate": "tanh"}


@dataclass
class DataConfig:
    """Where fixation sequences come from (docs/data.md).

    source           "demo": scan paths simulated over pictures that installed packages carry; "pictures": scan paths
                     simulated over `files`; "table": a lab's own fixations, from `table`, its sidecar and movies
    files            pictures and films for source "pictures"
    table, sidecar   for source "table"; an empty sidecar is looked for beside the table
    format           of the table: "table", or the program that it is of (`formats.FORMATS`)
    movie_column     of format "eyelink", a fixation report of Data Viewer: the column that names the movie
    eye              which eye to take from a table of both; empty: there is one
    px_per_degree    pixels per degree of visual angle, for `files`
    steps            T, the fixations in a sequence
    stride           of a table: fixations from the start of one sequence to the start of the next; 0: T
    segments         of a table: so many sequences at places that `seed` draws, as in the paper, before the table is
                     split, which may overlap; 0: consecutive ones
    max_gap          of a table: seconds; a longer gap between two fixations ends a sequence; 0: no gap does
    edge             of a table: what becomes of patches that stick out of the frame, as in `FixationSequences`
    train, test      simulated scan paths over each source of that side
    split            how a table is split, by "movie", "participant" or "both"; simulated paths are split by source
    held_out         names for the test side; if empty: the demo's own, the last of `files`, or a fifth of a table's
    policy           what becomes of bad rows of a table: "refuse" or "skip"
    order            of the patches: "recorded"; as controls "shuffled": each sequence in a random order, where memory
                     of the scene still helps; "other": each patch is one of any sequence of its side, so that a
                     sequence shows no scene, and no memory helps
    validate         names that are taken from the training side to choose by: the epoch, with train.patience
    seed             of simulated scan paths, of the choice of a fifth, of segments, and of another order
    """

    source: str = "demo"
    files: list[str] = field(default_factory=list)
    table: str = ""
    sidecar: str = ""
    format: str = "table"
    movie_column: str = "movie"
    eye: str = ""
    px_per_degree: float = 10.0
    steps: int = 100
    stride: int = 0
    segments: int = 0
    max_gap: float = 0.0
    edge: str = "shift"
    train: int = 100
    test: int = 150
    split: str = "movie"
    held_out: list[str] = field(default_factory=list)
    policy: str = "refuse"
    order: str = "recorded"
    validate: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass
class ModelConfig:
    """The model: arguments of `encoder.Encoder` and `model.RJEPA`.

    backbone          a name that `backbone.load` takes
    head              what makes x^High of features: "onoff", "components" or "mlp" (`heads`)
    hidden            hidden units of an MLP
    gate              of the top circuit: "tanh", "affine" or "sigmoid" (`gates`)
    heads             H of the top circuit, whose weights are then block-diagonal; 0: dense
    target            what is predicted: "h", "context_free" or "ema" (`model.RJEPA`)
    momentum          of the teacher of target "ema"
    embedding         E of a linear F; 0: F is the identity
    distance          d_R, "square" or "cosine"
    predictor         G: "mlp" or "linear"
    predictor_hidden  hidden units of an MLP
    lambda_r, lambda_a   λ₁ of L_R and λ₂ of L_A
    stop_gradient     whether the target h(t+1) gets no gradient
    regularizer       against collapse: "none", "vicreg" or "sigreg" (`regularizers`)
    regularizer_weight   of that, in the loss
    train_head, train_backbone   whether these learn too
    """

    backbone: str = "gabor"
    preset: str = "initial"
    units: int = 120
    head: str = "onoff"
    hidden: int = 512
    gate: str = "affine"
    heads: int = 0
    target: str = "h"
    momentum: float = 0.99
    embedding: int = 0
    kernel_size: int = 3
    depthwise: bool = False
    feedback: bool = True
    delay: bool = False
    distance: str = "cosine"
    predictor: str = "mlp"
    predictor_hidden: int = 240
    lambda_r: float = 1.0
    lambda_a: float = 1.0
    stop_gradient: bool = True
    regularizer: str = "none"
    regularizer_weight: float = 1.0
    actions: str = "none"
    train_head: bool = False
    train_backbone: bool = False


@dataclass
class TrainConfig:
    """How the model learns.

    learning       how the circuits learn: "rfp", "bptt" or "rtrl"; for comparison "eprop" or "snap0"
    refine         rounds that refine RFP's credits in the top circuit
    updates        steps between updates, for learning online; 0: one update for each batch of whole sequences
    psi            how the losses of all steps add up if updates is 0: "mean", "last" or "time" (`model.PSI`)
    epochs, batch  passes over the training sequences, and sequences in a batch
    lr_recurrent   learning rate of the encoder: circuits, feedback and whatever else of it learns
    lr_bias        learning rate of the biases of a circuit's gates
    lr_predictor   learning rate of the predictors G and A
    weight_decay   by Adam's gradient; with `decoupled`, by AdamW
    evaluate_every   epochs from one row of metrics.csv to the next
    patience       epochs without a better R² on data.validate after which training ends, with the best epoch's weights;
                   0: all epochs, and the last one's weights
    seed           of the first weights and of the order of sequences
    accelerator, devices, precision   arguments of Lightning Fabric
    """

    learning: str = "rfp"
    refine: int = 0
    updates: int = 0
    psi: str = "mean"
    epochs: int = 12
    batch: int = 50
    lr_recurrent: float = 3e-5
    lr_bias: float = 1e-3
    lr_predictor: float = 3e-3
    weight_decay: float = 0.0
    decoupled: bool = False
    evaluate_every: int = 1
    patience: int = 0
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"


@dataclass
class Config:
    """The configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def read(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, changed by a YAML file and then by overrides "section.key=value".

    Names are text, as they are written: data.held_out=[007] holds out 007.

    Raises ValueError, naming the file and the key, if it is unknown or its value is of another type or out of its
    range; FileNotFoundError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = "overrides"
    try:
        merged = OmegaConf.structured(Config)
        if file is not None:
            if not Path(file).is_file():
                raise FileNotFoundError(f"there is no configuration {file}")
            where = str(file)
            found = plain_yaml.read_texts(file)
            if not isinstance(found, dict):
                raise ValueError(f"{file}: a configuration must have sections, got {found!r:.60}")
            merged = OmegaConf.merge(merged, found)
        for override in overrides:
            key, equals, written = override.partition("=")
            if not equals:
                raise ValueError(f"an override must be section.key=value, got {override!r}")
            where = override
            given = OmegaConf.create()
            OmegaConf.update(given, key, plain_yaml.value(written, override))
            merged = OmegaConf.merge(merged, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_files.first_line(error)}") from None
    assert isinstance(config, Config)
    try:
        _check(config)
    except (TypeError, ValueError) as error:
        if file is None:
            raise
        changes = f" with {' '.join(overrides)}" if overrides else ""
        raise type(error)(f"{file}{changes}: {error}") from None
    return config


def read_run(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A run's own configuration, of this version or an earlier one, changed by overrides. Raises as `read` does."""
    found = plain_yaml.read_texts(file)
    lacking = [
        f"{key}={value}"
        for key, value in EARLIER.items()
        if isinstance(found, dict) and key.partition(".")[2] not in _section(found, key)
    ]
    return read(file, [*lacking, *overrides])


def _section(found: dict[str, Any], key: str) -> dict[str, Any]:
    section = found.get(key.partition(".")[0])
    return section if isinstance(section, dict) else {}


def text(config: Config) -> str:
    """The configuration as YAML, with all keys."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def value(written: str, key: str) -> Any:
    """The value of a key such as train.seed in a YAML text that `text` returned."""
    from omegaconf import OmegaConf

    return OmegaConf.select(OmegaConf.create(written), key)


def differences(a: str, b: str) -> list[str]:
    """How two such YAML texts differ, as "section.key: x against y". A key that one lacks has its default there, or
    what version 0.1 did.

    So a configuration of an earlier version, which knew fewer keys, is the same. Raises ValueError for a text that
    isn't a configuration.
    """
    left, right = map(_whole, (a, b))
    return [
        f"{key}: {left.get(key)!r} against {right.get(key)!r}"
        for key in sorted(set(left) | set(right))
        if left.get(key) != right.get(key)
    ]


def _whole(written: str) -> dict[str, Any]:
    """All keys and values of a configuration's text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        base = OmegaConf.structured(Config)
        for key, value in EARLIER.items():
            OmegaConf.update(base, key, value)
        merged = OmegaConf.merge(base, plain_yaml.texts(written, "configuration"))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"not a configuration: {_files.first_line(error)}") from None
    return _flat(OmegaConf.to_container(merged))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, branch in tree.items()
        for name, value in _flat(branch, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _check(config: Config) -> None:
    data, model, train = config.data, config.model, config.train
    check.one_of("data.source", data.source, ("demo", "pictures", "table"))
    check.one_of("data.policy", data.policy, ("refuse", "skip"))
    check.one_of("data.format", data.format, FORMATS)
    check.one_of("data.edge", data.edge, ("shift", "pad", "refuse"))
    check.one_of("data.split", data.split, ("movie", "participant", "both"))
    check.one_of("model.preset", model.preset, PRESETS)
    check.one_of("data.order", data.order, ORDERS)
    check.one_of("model.head", model.head, HEADS)
    check.one_of("model.gate", model.gate, GATES)
    check.one_of("model.target", model.target, TARGETS)
    check.one_of("model.predictor", model.predictor, PREDICTORS)
    check.one_of("model.distance", model.distance, DISTANCES)
    check.one_of("model.actions", model.actions, ACTIONS)
    check.one_of("model.regularizer", model.regularizer, regularizers.KINDS)
    check.one_of("train.learning", train.learning, LEARNING)
    check.one_of("train.psi", train.psi, PSI)
    for name, value, least in (
        ("data.steps", data.steps, 2),
        ("data.stride", data.stride, 0),
        ("data.segments", data.segments, 0),
        ("data.train", data.train, 1),
        ("data.test", data.test, 2),
        ("model.units", model.units, 1),
        ("model.hidden", model.hidden, 1),
        ("model.heads", model.heads, 0),
        ("model.embedding", model.embedding, 0),
        ("model.predictor_hidden", model.predictor_hidden, 1),
        ("train.refine", train.refine, 0),
        ("train.evaluate_every", train.evaluate_every, 1),
        ("train.patience", train.patience, 0),
        ("train.updates", train.updates, 0),
        ("train.epochs", train.epochs, 0),
        ("train.batch", train.batch, 1),
        ("train.devices", train.devices, 1),
    ):
        check.integer(name, value, least)
    for name, rate in (
        ("data.px_per_degree", data.px_per_degree),
        ("train.lr_recurrent", train.lr_recurrent),
        ("train.lr_bias", train.lr_bias),
        ("train.lr_predictor", train.lr_predictor),
    ):
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be above 0, got {rate}")
    for name, rate in (
        ("train.weight_decay", train.weight_decay),
        ("data.max_gap", data.max_gap),
        ("model.lambda_r", model.lambda_r),
        ("model.lambda_a", model.lambda_a),
        ("model.regularizer_weight", model.regularizer_weight),
    ):
        if not 0 <= rate < math.inf:
            raise ValueError(f"{name} must be at least 0, got {rate}")
    if train.precision == "16-true":
        raise ValueError(
            "train.precision must not be '16-true', in which Adam's second moments are 0: the nearest is '16-mixed'"
        )
    if not 0 <= model.momentum < 1:
        raise ValueError(f"model.momentum must be at least 0 and below 1, got {model.momentum}")
    if model.heads and model.units % model.heads:
        raise ValueError(f"model.heads must divide model.units, {model.units}, got {model.heads}")
    if not model.stop_gradient and model.target != "h":
        raise ValueError(f"model.stop_gradient=false goes with model.target='h', got {model.target!r}")
    if data.segments and data.stride:
        raise ValueError(f"data.stride goes with data.segments=0, got {data.stride} and {data.segments}")
    if train.patience and not data.validate:
        raise ValueError(f"train.patience={train.patience} needs data.validate to choose by, got none")
    if data.order != "recorded" and model.actions != "none":
        raise ValueError(
            f"data.order={data.order!r} goes with model.actions='none', got {model.actions!r}: no saccade leads from "
            "one patch to the next there"
        )
    if data.order != "recorded" and (model.preset != "initial" or model.train_backbone):
        raise ValueError(
            f"data.order={data.order!r} goes with model.preset='initial' and a frozen backbone, whose features are put "
            "into another order"
        )
    if train.updates:
        _check_online(config)


def _check_online(config: Config) -> None:
    """Refuse what can't learn online."""
    if config.train.precision == "bf16-true":
        raise ValueError(
            f"train.updates={config.train.updates} (online) goes with weights of float32 or float64, got "
            "train.precision='bf16-true'; the nearest is 'bf16-mixed'"
        )
    for name, value, only in (
        ("model.preset", config.model.preset, "initial"),
        ("model.train_head", config.model.train_head, False),
        ("model.train_backbone", config.model.train_backbone, False),
        ("model.actions", config.model.actions, "none"),
        ("model.embedding", config.model.embedding, 0),
        ("model.stop_gradient", config.model.stop_gradient, True),
        ("model.regularizer", config.model.regularizer, "none"),
        ("train.psi", config.train.psi, "mean"),
        ("train.refine", config.train.refine, 0),
        ("train.devices", config.train.devices, 1),
    ):
        if value != only:
            raise ValueError(
                f"train.updates={config.train.updates} (online) goes with {name}={only!r}, got {value!r}; the nearest "
                "is train.updates=0, one update for each batch of sequences"
            )
    if config.train.learning == "bptt":
        raise ValueError(
            f"train.updates={config.train.updates} (online) goes with train.learning='rfp' or 'rtrl', got 'bptt', "
            "which needs whole sequences"
        )
