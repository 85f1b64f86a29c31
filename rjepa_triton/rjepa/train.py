"""Trains R-JEPA from a configuration: `rjepa train`.

A run's folder holds these files, each of which is written whole or not at all:

    config.yaml
    checkpoint.pt              after each epoch; an interrupted run continues from it, and on the CPU ends bitwise as an
                               uninterrupted run does
    metrics.csv, tensorboard/  every diagnostic of every epoch
    weights.safetensors        the trained model
    evaluation.json            every diagnostic before and after training

Beside the model's predictor, a second one learns to predict x^High, the top circuit's input, from x^High. It is the
control that shows what recurrence adds.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _files
from ..online.learner import OnlineLearner
from ..online.stream_readout import Residual
from ..online.streams import Stream
from . import backbone, config, storage
from .config import Config
from .encoder import Encoder
from .evaluation import evaluate, scalars
from .model import PSI, RJEPA, Predictor, distance
from .sequences import Features, features, losses, prepare

CHECKPOINT, METRICS, WEIGHTS, EVALUATION, CONFIG = (
    "checkpoint.pt",
    "metrics.csv",
    "weights.safetensors",
    "evaluation.json",
    "config.yaml",
)


ROWS_IN_ONE_CALL = 16  # most sequences of a batch for which one call for all steps is faster than the loop


def build(settings: Config) -> RJEPA:
    """The model of a configuration, with initial weights drawn from train.seed."""
    m, t = settings.model, settings.train
    torch.manual_seed(t.seed)
    encoder = Encoder(
        backbone.load(m.backbone, m.train_backbone),
        preset=m.preset,  # type: ignore[arg-type]
        units=m.units,
        hidden=m.hidden,
        learning=t.learning,  # type: ignore[arg-type]
        embedding=m.embedding or None,
        kernel_size=m.kernel_size,
        depthwise=m.depthwise,
        feedback=m.feedback,
        delay=m.delay,
        train_head=m.train_head,
    )
    return RJEPA(encoder, kind=m.distance, hidden=m.predictor_hidden, actions=m.actions)  # type: ignore[arg-type]


class Trainer:
    """A run: the model, its control, their optimisers, and the epochs done.

    folder: where the run is written; if it holds a checkpoint, the run continues from that. say: called with messages.
    known: as for `prepare`.

    Raises ValueError if the folder holds a run of another configuration, naming what differs, or if its checkpoint
    can't be read.
    """

    def __init__(
        self,
        settings: Config,
        folder: Path,
        say: Callable[[str], None] = print,
        known: Features | None = None,
    ) -> None:
        from lightning.fabric import Fabric

        self.settings, self.folder, self.say = settings, Path(folder), say
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_folder()
        t = settings.train
        try:
            self.fabric = Fabric(accelerator=t.accelerator, devices=t.devices, precision=t.precision)  # type: ignore[arg-type]
        except (RuntimeError, ValueError, ImportError) as error:
            raise ValueError(
                f"train.accelerator={t.accelerator}, train.devices={t.devices} and train.precision={t.precision} can't "
                f"be used here: {_files.first_line(error)}"
            ) from None
        self.fabric.launch()
        model = build(settings)
        self.data = prepare(settings, model, known)
        control = Predictor(model.encoder.circuit.hidden_size, settings.model.predictor_hidden)
        predictors = [model.predictor, *([model.action_predictor] if model.action_predictor else [])]
        groups = [
            {"params": model.encoder.trained_parameters(), "lr": t.lr_recurrent},
            {"params": [p for one in predictors for p in one.parameters()], "lr": t.lr_predictor},
        ]
        self.model, self.optimizer = self.fabric.setup(
            model, torch.optim.Adam(groups, weight_decay=t.weight_decay)
        )
        self.control, self.control_optimizer = self.fabric.setup(
            control, torch.optim.Adam(control.parameters(), lr=t.lr_predictor, weight_decay=t.weight_decay)
        )
        for method in ("from_inputs", "losses"):
            self.model.mark_forward_method(method)
        self.done = 0  # epochs
        self.history: list[dict[str, float]] = []
        self.before: dict[str, Any] = {}
        _files.write_text(self.folder / CONFIG, config.text(settings))  # what can't be run has left nothing
        self._resume()

    # --- a run's folder ------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """Raise ValueError for a run of another configuration; only the number of epochs may be another."""
        file = self.folder / CONFIG
        if not file.exists():
            return
        there, now = config.text(config.read(file)), config.text(self.settings)
        other = [d for d in config.differences(there, now) if not d.startswith("train.epochs:")]
        if other:
            raise ValueError(f"{self.folder} holds a run of another configuration: {'; '.join(other)}")

    def _resume(self) -> None:
        file = self.folder / CHECKPOINT
        if not file.exists():
            self.before = self.evaluate()
            self.history = [{"epoch": 0.0, **scalars(self.before)}]
            self._save()
            return
        advice = "remove it to begin the run anew, or put a copy of it back"
        try:
            state = storage.unpickled(file)
        except ValueError as error:
            raise ValueError(f"{error}; {advice}") from None
        try:
            self.model.load_state_dict(state["model"])
            self.control.load_state_dict(state["control"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.control_optimizer.load_state_dict(state["control_optimizer"])
            self.done, self.history = state["epochs"], state["history"]
            self.before = json.loads(state["before"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            told = _files.first_line(error)
            raise ValueError(f"{file} isn't a checkpoint of this run: {told}; {advice}") from None
        self.say(f"continuing after epoch {self.done} of {self.folder}")

    def _save(self) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {
            "model": self.model.state_dict(),
            "control": self.control.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "control_optimizer": self.control_optimizer.state_dict(),
            "epochs": self.done,
            "history": self.history,
            "before": json.dumps(self.before),
        }
        storage.save(self.folder / CHECKPOINT, state)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.history[0]), restval="")
        writer.writeheader()
        writer.writerows(self.history)
        _files.write_text(self.folder / METRICS, table.getvalue())

    # --- learning ------------------------------------------------------------------------------------------

    def run(self, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Train the missing epochs, write the folder's files, and return the evaluations before and after training.

        advance: called after each batch.
        """
        from torch.utils.tensorboard import SummaryWriter

        logs = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.done + 1)
        try:
            for epoch in range(self.done, self.settings.train.epochs):
                for batch in self._order(epoch):
                    self._learn(batch)
                    advance()
                found = self.evaluate()
                row = {"epoch": float(epoch + 1), **scalars(found)}
                self.done = epoch + 1
                self.history.append(row)
                for name, value in row.items():
                    logs.add_scalar(name, value, epoch + 1)
                self._save()
        finally:
            logs.close()
        both = {"before": self.before, "after": self.evaluate(), "config": config.text(self.settings)}
        both["held_out"] = list(self.data.held_out)
        if self.fabric.is_global_zero:
            storage.save_tensors(self.folder / WEIGHTS, self.model.state_dict())
            _files.write_text(self.folder / EVALUATION, json.dumps(both))
        return both

    @property
    def batches(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.data.train) / self.settings.train.batch)

    def _order(self, epoch: int) -> list[Tensor]:
        """The indices of each of the epoch's batches: this process's share of them.

        They depend on the seed and the epoch alone. A last batch with fewer sequences than processes is left out, since
        processes without a sequence would make the others wait.
        """
        generator = torch.Generator().manual_seed(self.settings.train.seed * 100_003 + epoch)
        drawn = torch.randperm(len(self.data.train), generator=generator).split(self.settings.train.batch)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        return [batch[rank::world] for batch in drawn if len(batch) >= world]

    def _learn(self, batch: Tensor) -> None:
        data, train = self.data.train, self.settings.train
        self.model.train()
        if train.updates:
            assert data.x is not None
            x = self._here(data.x[:, batch])
            self._learn_online(x)
        else:
            found, x = losses(self.model, data, batch, self.fabric.device)
            self._update(found.total(PSI[train.psi]))
        control = distance(self.settings.model.distance, self.control(x[:-1]), x[1:])  # type: ignore[arg-type]
        self.control_optimizer.zero_grad()
        self.fabric.backward(control.mean())
        self.control_optimizer.step()

    def _update(self, loss: Tensor) -> None:
        self.fabric.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _learn_online(self, x: Tensor) -> None:
        """Learn from a batch of sequences as streams, with an update every `updates` steps; memory doesn't grow with T.

        An `OnlineLearner` carries the sensitivities. A loss depends on h(t-1) and h(t), so with an update in every step
        the learner keeps one step more. With longer chunks, a loss across the boundary of two chunks trains the
        predictor alone.
        """
        every, steps = self.settings.train.updates, len(x)
        if every == 1 and (stream := self._stream(x.shape[1])) is not None:
            stream.run(x)
            return
        circuit, predictor = self.model.encoder.circuit, self.model.predictor
        kind = self.settings.model.distance
        learner = OnlineLearner(circuit, x.shape[1], update_every=every, lag=int(every == 1))
        before: Tensor | None = None
        for start in range(0, steps, every):
            if every == 1:
                h = learner.step(x[start])[None]
            else:
                h = learner.chunk(x[start : start + every])
            joined = h if before is None else torch.cat([before[None], h])
            if len(joined) > 1:
                self._update(distance(kind, predictor(joined[:-1]), joined[1:]).mean())  # type: ignore[arg-type]
            before = h[-1] if every == 1 else h[-1].detach()

    def _stream(self, rows: int) -> Stream | None:
        """The top circuit and its predictor as one that learns by itself, or None where no compiled call serves it."""
        if self.settings.train.learning != "rfp" or rows > ROWS_IN_ONE_CALL:
            return None
        predictor = self.model.predictor
        stream = Stream(
            self.model.encoder.circuit,
            Residual(nn.Sequential(predictor.first, nn.ReLU(), predictor.second)),
            rows,
            loss="mse" if self.settings.model.distance == "square" else "cosine",
            optimizer=self.optimizer.optimizer,
            self_prediction=True,
        )
        return stream if stream.backend == "compile" else None

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.fabric.device)

    # --- diagnostics ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Every diagnostic on the test sequences: lists by step, spectra, and single numbers (docs/rjepa.md)."""
        self.model.eval()
        return evaluate(self.model, self.control, self.data, self.settings.model.distance, self.fabric.device)


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every diagnostic of a finished run's weights, on its own test data or on those that overrides "data.…" name.

    The head keeps the statistics of training. Raises FileNotFoundError if the run isn't finished; ValueError for other
    overrides, and for weights that don't belong to the configuration.
    """
    for file in (CONFIG, WEIGHTS, CHECKPOINT):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} isn't a finished run: there is no {file} in it")
    other = [override for override in overrides if not override.startswith("data.")]
    if other:
        raise ValueError(f"overrides of an evaluation must begin with 'data.', got {', '.join(other)}")
    settings = config.read(folder / CONFIG, overrides)
    model = build(settings)
    control = Predictor(model.encoder.circuit.hidden_size, settings.model.predictor_hidden)
    weights = storage.read_tensors(folder / WEIGHTS)
    known = features(settings, model.encoder.backbone)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} doesn't belong to {folder / CONFIG}: {_files.first_line(error)}"
        ) from None
    checkpoint = storage.unpickled(folder / CHECKPOINT)
    try:
        control.load_state_dict(checkpoint["control"])
    except (RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder / CHECKPOINT} doesn't belong to {folder / CONFIG}: {_files.first_line(error)}"
        ) from None
    data = prepare(settings, model.eval(), known, calibrate=False)
    with torch.no_grad():
        return evaluate(model, control.eval(), data, settings.model.distance, torch.device("cpu"))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path, and then rename it to `file`, which is written completely or not at all."""
    with _files.replacing(file) as temporary:
        write(temporary)
