"""`stream.h` against the loop over steps, for weights of every shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rjepa_triton import RNN, Stream
from rjepa_triton.backend import native_backend

pytestmark = pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize("steps", [4, 12])  # one batch row runs on panels from 8 on, and half the units
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [{}, {"recurrence": "diagonal"}, {"heads": 4}, {"heads": 20}])
@pytest.mark.parametrize(
    "inputs", [3, 259]
)  # matrices of 256 inputs and more stay as they are, beside panels
@pytest.mark.parametrize("options", [{}, {"optimizer": "adam", "update_every": 3}, {"optimizer": "adamw"}])
def test_weights_of_every_shape(
    shape: dict[str, Any], batch: int, steps: int, inputs: int, options: dict[str, Any]
) -> None:
    compare(RNN(inputs, 20, dtype=torch.float64, **shape), batch, steps, options)


@pytest.mark.parametrize("inputs", [500, 9001])  # some rows of weights at once, and a row in parts
def test_several_rows_at_once_and_a_row_in_parts(inputs: int) -> None:
    compare(RNN(inputs, 70, dtype=torch.float64), 2, 3, {})


def compare(layer: RNN, batch: int, steps: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    units = layer.hidden_size
    readout = nn.Linear(units, 2, dtype=torch.float64)
    x, target = (torch.randn(steps, batch, n, dtype=torch.float64) for n in (layer.input_size, 2))
    resets = torch.rand(steps, batch) < 0.2
    found = []
    for backend in ("compile", "torch"):
        stream = Stream(
            copy.deepcopy(layer), copy.deepcopy(readout), batch, lr=0.01, backend=backend, **options
        )
        result = stream.run(x, target, resets)
        found.append([result.losses, result.outputs, *stream.layer.weights()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
