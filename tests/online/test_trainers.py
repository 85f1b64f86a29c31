"""Learners in the training loops of others: Lightning's Trainer with manual optimization, and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import GRU, LSTM, OnlineLearner

PER_EPOCH = 5
X = torch.randn(4 * PER_EPOCH, 2, 3, generator=torch.Generator().manual_seed(0))


def stream_model(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Module()
    model.learner = OnlineLearner(LSTM(3, 4), 2, **options)
    model.head = nn.Linear(4, 3)
    return model


def loss_of(model: Any, t: int) -> Tensor:
    return (model.head(model.learner(X[t])) - X[(t + 1) % len(X)]).square().mean()


def lightning_module(options: dict[str, Any]) -> Any:
    lightning = pytest.importorskip("lightning")

    class Streaming(lightning.LightningModule):  # type: ignore[name-defined,misc]
        """Learns at each step of a stream; an epoch is a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = stream_model(**options)
            self.losses: list[float] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(list(range(PER_EPOCH)), batch_size=None)

        def training_step(self, batch: int, _: int) -> None:
            loss = loss_of(self.model, self.current_epoch * PER_EPOCH + batch)
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.losses.append(loss.item())

    return Streaming()


def trainer(folder: Path, epochs: int) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, enable_checkpointing=False, **quiet
    )


def by_hand(options: dict[str, Any]) -> list[float]:
    model, losses = stream_model(**options), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for t in range(len(X)):
        loss = loss_of(model, t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning", "ignore::FutureWarning:lightning", "ignore::UserWarning:torch"
)
@pytest.mark.parametrize("options", [{"form": "step"}, {"form": "lazy"}, {"form": "history"}], ids=str)
def test_lightning_resumes_a_stream(options: dict[str, Any], tmp_path: Path) -> None:
    whole, first, second = (lightning_module(options) for _ in range(3))
    trainer(tmp_path, 4).fit(whole)
    assert whole.losses == by_hand(options)
    begun = trainer(tmp_path, 2)
    begun.fit(first)
    begun.save_checkpoint(tmp_path / "stream.ckpt")
    trainer(tmp_path, 4).fit(second, ckpt_path=tmp_path / "stream.ckpt")
    assert first.losses + second.losses == whole.losses


def learned(accelerator: Any, model: Any, optimizer: Any, start: int, stop: int) -> list[float]:
    losses = []
    for t in range(start, stop):
        loss = loss_of(model, t)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accelerate_resumes_a_module_with_a_learner(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = stream_model()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    assert isinstance(model.learner, OnlineLearner)
    losses = learned(accelerator, model, optimizer, 0, 10)
    accelerator.save_state(str(tmp_path), safe_serialization=False)  # a learner's state is more than tensors
    losses += (rest := learned(accelerator, model, optimizer, 10, 20))
    assert losses == by_hand({})
    accelerator.load_state(str(tmp_path))
    assert learned(accelerator, model, optimizer, 10, 20) == rest


def test_accelerate_resumes_a_layer_and_its_learner(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    layer, head = GRU(3, 4), nn.Linear(4, 3)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.01)
    layer, head, optimizer = accelerator.prepare(layer, head, optimizer)
    model = nn.Module()
    model.learner, model.head = OnlineLearner(layer, 2), head
    accelerator.register_for_checkpointing(model.learner)
    learned(accelerator, model, optimizer, 0, 10)
    accelerator.save_state(str(tmp_path))  # in safetensors, and the learner in a file of its own
    rest = learned(accelerator, model, optimizer, 10, 20)
    accelerator.load_state(str(tmp_path))
    assert learned(accelerator, model, optimizer, 10, 20) == rest
