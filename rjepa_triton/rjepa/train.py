"""Trains R-JEPA from a configuration: `rjepa train`.

A run's folder holds these files, each of which is written whole or not at all:

    config.yaml
    checkpoint.pt              after each epoch, and where a run is asked to stop (`Trainer.stop`); an interrupted run
                               continues from it, and on the CPU ends bitwise as an uninterrupted run does
    metrics.csv, tensorboard/  every diagnostic of every epoch
    weights.safetensors        the trained model
    evaluation.json            every diagnostic before and after training

Beside the model a control learns, the same in everything but that its recurrence can't learn (`model.control_of`): it
shows what recurrence adds.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _files
from ..online.learner import OnlineLearner
from . import backbone, config, storage
from .config import Config, TrainConfig
from .encoder import Encoder, Encoding, State
from .evaluation import Evaluator, scalars, warnings
from .model import PSI, RJEPA, control_of
from .online import Streams, optimizer_in
from .sequences import Data, Features, features, losses, prepare, taken

CHECKPOINT, METRICS, WEIGHTS, EVALUATION, CONFIG = (
    "checkpoint.pt",
    "metrics.csv",
    "weights.safetensors",
    "evaluation.json",
    "config.yaml",
)
PLAIN = ("32-true", "64-true")  # precisions without autocast


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
        refine=t.refine,
        head=m.head,  # type: ignore[arg-type]
        gate=m.gate,  # type: ignore[arg-type]
        heads=m.heads or None,
    )
    return RJEPA(
        encoder,
        kind=m.distance,  # type: ignore[arg-type]
        hidden=m.predictor_hidden,
        actions=m.actions,  # type: ignore[arg-type]
        target=m.target,  # type: ignore[arg-type]
        momentum=m.momentum,
        predictor=m.predictor,
        weights=(m.lambda_r, m.lambda_a),
        stop_gradient=m.stop_gradient,
        regularizer=m.regularizer,
        strength=m.regularizer_weight,
    )


def optimizer_of(model: RJEPA, settings: TrainConfig) -> torch.optim.Optimizer:
    """Adam for what of the model learns, at the rates of the encoder, of its gates' biases, and of the predictors."""
    encoder = model.encoder
    biases = list(encoder.circuit.weights()[len(encoder.circuit.recurrent_weights()) :])
    own = {id(p) for p in biases}
    predictors = [
        model.predictor,
        *([model.action_predictor] if model.action_predictor else []),
        *([model.yardstick] if model.yardstick is not model.predictor else []),
    ]
    groups = [
        {
            "params": [p for p in encoder.trained_parameters() if id(p) not in own],
            "lr": settings.lr_recurrent,
        },
        {"params": [p for p in biases if p.requires_grad], "lr": settings.lr_bias},
        {"params": [p for one in predictors for p in one.parameters()], "lr": settings.lr_predictor},
    ]
    kind = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
    return kind([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


class Stopped(Exception):
    """A run was asked to stop, and has written its checkpoint."""


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
        # the first weights of what makes x^High and the yardstick, which an evaluation needs later
        self.first = {
            name: value.detach().clone()
            for name, value in model.encoder.state_dict().items()
            if not name.startswith("backbone.")
        }
        control = control_of(model)
        self.model, self.optimizer = self.fabric.setup(model, optimizer_of(model, t))
        self.control, self.control_optimizer = self.fabric.setup(control, optimizer_of(control, t))
        for one in (self.model, self.control):
            for method in ("from_inputs", "losses"):
                one.mark_forward_method(method)
        self.evaluator = Evaluator(self.data, settings.model.distance)
        self.best: dict[
            str, Any
        ] = {}  # of the epoch that does best on validation data: its weights, gain and number
        # what runs online updates, of the model or its control and a number of sequences
        self._made: dict[tuple[bool, int], Streams | str] = {}
        self.done = 0  # epochs
        self.begun = 0  # batches of the epoch after them
        self._asked = self._evaluating = False  # whether the run was asked to stop; whether it is evaluating
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
        there, now = config.text(config.read_run(file)), config.text(self.settings)
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
            self.begun = state.get("batches", 0)
            self.before, self.best = json.loads(state["before"]), state["best"]
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            told = _files.first_line(error)
            raise ValueError(f"{file} isn't a checkpoint of this run: {told}; {advice}") from None
        place = f"epoch {self.done}" + (f" and {self.begun} batches" if self.begun else "")
        self.say(f"continuing after {place} of {self.folder}")

    def _save(self) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {
            "model": self.model.state_dict(),
            "control": self.control.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "control_optimizer": self.control_optimizer.state_dict(),
            "epochs": self.done,
            "batches": self.begun,
            "history": self.history,
            "before": json.dumps(self.before),
            "best": self.best,
            "first": self.first,
        }
        storage.save(self.folder / CHECKPOINT, state)
        table = io.StringIO()
        names = dict.fromkeys(name for row in self.history for name in row)
        writer = csv.DictWriter(table, list(names), restval="")
        writer.writeheader()
        writer.writerows(self.history)
        _files.write_text(self.folder / METRICS, table.getvalue())

    # --- learning ------------------------------------------------------------------------------------------

    def run(self, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Train the missing epochs, write the folder's files, and return the evaluations before and after training.

        With train.patience, "after" is after the epoch with the best R² on validation data. advance: called after each
        batch. Raises Stopped, with the checkpoint written, after the batch in which `stop` was called.
        """
        from torch.utils.tensorboard import SummaryWriter

        logs = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.done + 1)
        try:
            for epoch in range(self.done, self.settings.train.epochs):
                if self._waited_enough():
                    break
                for batch in self._order(epoch)[self.begun :]:
                    self._learn(batch)
                    self.begun += 1
                    advance()
                    self._end_if_asked()
                number = epoch + 1
                if number % self.settings.train.evaluate_every == 0 or self.settings.train.patience:
                    for name, value in self._measure(number).items():
                        logs.add_scalar(name, value, number)
                self.done, self.begun = number, 0
                self._save()
            self._end_if_asked()
        except Stopped:
            self._save()
            raise
        finally:
            logs.close()
        if self.best:
            self.model.load_state_dict(self.best["model"])
            self.control.load_state_dict(self.best["control"])
        after = self.before if self.done == 0 else self.evaluate()
        both: dict[str, Any] = {"before": self.before, "after": after, "config": config.text(self.settings)}
        both["held_out"] = list(self.data.held_out)
        both["epoch"] = int(self.best["epoch"]) if self.best else self.done
        if self.fabric.is_global_zero:
            storage.save_tensors(self.folder / WEIGHTS, self.model.state_dict())
            _files.write_text(self.folder / EVALUATION, json.dumps(both))
        return both

    def stop(self) -> None:
        """Ask `run` to end: after the batch that it is at, at once where it evaluates. For handlers of signals.

        Raises Stopped where it evaluates, which changes nothing that is saved.
        """
        self._asked = True
        if self._evaluating:
            raise Stopped

    def _end_if_asked(self) -> None:
        """Raise Stopped if any of the processes was asked to stop: all end after the same batch."""
        asked: Any = self._asked
        if self.fabric.world_size > 1:
            mine = torch.tensor(float(asked), device=self.fabric.device)
            asked = self.fabric.all_reduce(mine, reduce_op="sum")
        if asked:
            raise Stopped

    def _measure(self, number: int) -> dict[str, float]:
        """Evaluate epoch `number`, whose batches are done, for `history`; say what is wrong with the representation."""
        row = {"epoch": float(number), **scalars(self.evaluate(whole=False))}
        if self.settings.train.patience:
            row["validation_gain"] = self._choose(number)
        self.history.append(row)
        for told in warnings(row, self.before):
            self.say(f"epoch {number}: {told}")
        return row

    def _choose(self, number: int) -> float:
        """R² gained on validation data in epoch `number`; its weights are kept if it is the best so far."""
        for one in (self.model, self.control):
            one.eval()
        with self._stoppable():
            gain = self.evaluator.gain(self.model, self.control)
        if not self.best or gain > self.best["gain"]:
            kept = {
                name: {key: value.detach().cpu().clone() for key, value in one.state_dict().items()}
                for name, one in (("model", self.model), ("control", self.control))
            }
            self.best = {**kept, "gain": gain, "epoch": number}
        return gain

    def _waited_enough(self) -> bool:
        patience = self.settings.train.patience
        return bool(patience and self.best and self.done - self.best["epoch"] >= patience)

    @property
    def batches(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.data.train) / self.settings.train.batch)

    def _order(self, epoch: int) -> list[Tensor]:
        """The indices of each of the epoch's batches, which depend on the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self.settings.train.seed * 100_003 + epoch)
        drawn = torch.randperm(len(self.data.train), generator=generator)
        return list(drawn.split(self.settings.train.batch))

    def _share(self, which: Tensor) -> tuple[Tensor, float]:
        """This process's sequences of a batch, and what their mean loss counts in the mean over processes.

        A process for which none is left takes one that doesn't count, since the others wait for it.
        """
        world = self.fabric.world_size
        own = which[self.fabric.global_rank :: world]
        return (own, len(own) * world / len(which)) if len(own) else (which[:1], 0.0)

    def _learn(self, which: Tensor) -> None:
        """One batch of sequences, for the model and then for its control."""
        own, counts = self._share(which)
        batch, train = taken(self.data.train, own, self.model), self.settings.train
        for model, optimizer in ((self.model, self.optimizer), (self.control, self.control_optimizer)):
            model.train()
            if train.updates:
                assert batch.x is not None
                streams = self._streams(model, optimizer, batch.x.shape[1])
                if isinstance(streams, Streams):
                    streams.learn(batch.x, batch.yardstick)
                else:
                    self._learn_online(model, optimizer, batch.x, batch.yardstick)
            else:
                with self.fabric.autocast():
                    loss = losses(model, batch).total(PSI[train.psi])
                self._update(model, optimizer, counts * loss)

    def _update(self, model: Any, optimizer: Any, loss: Tensor) -> None:
        self.fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        model.follow_()

    def _streams(self, model: Any, optimizer: Any, batch: int) -> Streams | str:
        """One call for all steps of a batch of so many sequences, or why a loop over them must do it."""
        if self.settings.train.updates > 1:
            return "an update comes after several steps"
        if self.settings.train.precision not in PLAIN:
            return f"the precision is {self.settings.train.precision!r}"
        key = model is self.model, batch
        if key not in self._made:
            self._made[key] = Streams.of(model.module, optimizer_in(optimizer), batch)
        return self._made[key]

    def _learn_online(self, model: Any, optimizer: Any, x: Tensor, yardstick: Tensor) -> None:
        """Learn from a batch of sequences as streams, with an update every `updates` steps; memory doesn't grow with T.

        An `OnlineLearner` carries the sensitivities, except of a control, which has none. A loss depends on h(t-1) and
        h(t), so with an update in every step the learner keeps one step more. With longer chunks, a loss across the
        boundary of two chunks trains the predictor alone.
        """
        every, steps = self.settings.train.updates, len(x)
        encoder, learner = model.encoder, None
        if any(p.requires_grad for p in encoder.circuit.parameters()):
            learner = OnlineLearner(encoder.circuit, x.shape[1], update_every=every, lag=int(every == 1))
        before: Tensor | None = None
        state: State | None = None
        teacher: State | None = None
        for start in range(0, steps, every):
            part = x[start : start + every]
            if learner is None:
                made = encoder.encode(part, state)
                state, h = made.state, made.h
            else:
                h = learner.step(part[0])[None] if every == 1 else learner.chunk(part)
            target, teacher = model.targets(Encoding(h, part, h, h, State((), (h[-1], h[-1]))), teacher)
            joined = h if before is None else torch.cat([before[None], h])
            if len(joined) > 1:
                new = len(joined) - 1
                with self.fabric.autocast():
                    own, error = model.errors(
                        joined[:-1], target[-new:], None, yardstick[start : start + every][-new:]
                    )
                self._update(model, optimizer, own.mean() + error.mean())
            before = h[-1] if every == 1 else h[-1].detach()

    # --- diagnostics ---------------------------------------------------------------------------------------

    def evaluate(self, *, whole: bool = True) -> dict[str, Any]:
        """Every diagnostic on the test sequences: lists by step, spectra, and single numbers (docs/rjepa.md).

        whole: as for `evaluation.Evaluator`.
        """
        for one in (self.model, self.control):
            one.eval()
        with self._stoppable():
            return self.evaluator(self.model, self.control, whole=whole)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """A time in which `stop` ends the run at once, of one process; several wait for one another."""
        self._evaluating = self.fabric.world_size == 1
        try:
            if self._asked and self._evaluating:
                raise Stopped
            yield
        finally:
            self._evaluating = False


@dataclass(frozen=True)
class Finished:
    """A finished run, as `finished` reads it: its model and control in eval mode, and data as these take them."""

    settings: Config
    model: RJEPA
    control: RJEPA
    data: Data


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every diagnostic of a finished run's weights, on its own test data or on those that overrides "data.…" name.

    Raises what `finished` raises.
    """
    run = finished(folder, overrides)
    return Evaluator(run.data, run.settings.model.distance)(run.model, run.control)


def finished(folder: Path, overrides: Sequence[str] = ()) -> Finished:
    """A finished run with its own data, or with those that overrides "data.…" name.

    The head keeps the statistics of training. Raises FileNotFoundError if the run isn't finished; ValueError for other
    overrides, and for weights that don't belong to the configuration.
    """
    for file in (CONFIG, WEIGHTS, CHECKPOINT):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} isn't a finished run: there is no {file} in it")
    other = [override for override in overrides if not override.startswith("data.")]
    if other:
        raise ValueError(f"overrides of a finished run must begin with 'data.', got {', '.join(other)}")
    settings = config.read_run(folder / CONFIG, overrides)
    model = build(settings)
    control = control_of(model)
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    weights = storage.read_tensors(folder / WEIGHTS)
    trained = _of_this_version(weights, model)
    try:
        model.load_state_dict(trained)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} doesn't belong to {folder / CONFIG}: {_files.first_line(error)}"
        ) from None
    model.load_state_dict(drawn)
    checkpoint = storage.unpickled(folder / CHECKPOINT)
    known = features(settings, model.encoder.backbone)
    head = "encoder.head."
    try:
        # version 0.1 kept no first weights, and its heads were frozen where their statistics matter here
        first = checkpoint.get("first") or {
            name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith(head)
        }
        model.encoder.load_state_dict(first, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / CHECKPOINT} doesn't belong to {folder / CONFIG}: {_files.first_line(error)}"
        ) from None
    data = prepare(settings, model.eval(), known, calibrate=False)
    model.load_state_dict(trained)
    try:
        best = checkpoint.get("best") or checkpoint
        control.load_state_dict(_of_this_version(best["control"], control, model.encoder.state_dict()))
    except (RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder / CHECKPOINT} doesn't belong to {folder / CONFIG}: {_files.first_line(error)}"
        ) from None
    return Finished(settings, model.eval(), control.eval(), data)


def _of_this_version(
    state: Mapping[str, Tensor], model: RJEPA, encoder: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state_dict of version 0.1 as one of this.

    There was no predictor of the yardstick: the model's own stands for it. The control was a predictor alone: its
    encoder gets what is not recurrent of `encoder`.
    """
    found = dict(state)
    if "first.weight" in found:
        assert encoder is not None
        recurrent = ("circuit.", "areas.", "feedback.")
        found = {f"predictor.{name}": value for name, value in found.items()}
        found |= {f"encoder.{name}": v for name, v in encoder.items() if not name.startswith(recurrent)}
        found |= {
            f"encoder.{name}": v
            for name, v in model.encoder.state_dict().items()
            if name.startswith(recurrent)
        }
    if not any(name.startswith("yardstick.") for name in found):
        found |= {
            f"yardstick.{name.removeprefix('predictor.')}": value
            for name, value in found.items()
            if name.startswith("predictor.")
        }
    return found


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path, and then rename it to `file`, which is written completely or not at all."""
    with _files.replacing(file) as temporary:
        write(temporary)
