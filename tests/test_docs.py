"""What the documentation counts is what the code keeps."""

from __future__ import annotations

import torch

from rjepa_triton import RGC, OnlineLearner
from rjepa_triton.reference import rtrl


def test_bytes_of_learning_state() -> None:
    batch, units = 3, 16
    learner = OnlineLearner(RGC(units), batch, form="step")
    assert learner.nbytes == 32 * batch * units**2 + 8 * batch * units
    weights = [torch.zeros(units, units) for _ in range(4)]
    assert rtrl.ExactSensitivity(2, batch, units, weights).nbytes == 32 * batch * units**3
