"""Layers exported to ONNX, run by onnxruntime, against the layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnxruntime

from rjepa_triton import (
    ALIF,
    ELSTM,
    GRU,
    LRU,
    LSTM,
    RGC,
    MinLSTM,
    TimeDecay,
    compat,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rgc": lambda: RGC(4),
    "lstm": lambda: LSTM(3, 4),
    "lstm by heads": lambda: LSTM(3, 4, heads=2),
    **{
        each.__name__: lambda each=each: each(3, 4)
        for each in (ELSTM, LRU, MinLSTM, TimeDecay, ALIF)  # readouts, no matrices, parameters, surrogates
    },
    "batch first": lambda: GRU(3, 4, batch_first=True),
    "compat.LSTM": lambda: compat.LSTM(3, 4, num_layers=2, bidirectional=True, learning="rfp"),
}


def run(program: Any, folder: Path, *given: torch.Tensor) -> list[torch.Tensor]:
    """What the exported program gives."""
    program.save(folder / "layer.onnx")
    session = onnxruntime.InferenceSession(folder / "layer.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, (value.numpy() for value in given), strict=True)))
    return [torch.from_numpy(value) for value in found]


@pytest.mark.filterwarnings("ignore")  # of onnxscript's own
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exported(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]().eval()
    x = torch.randn(5, 2, getattr(layer, "fan_in", 3))
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    for value in (x, 3 * torch.randn_like(x)):
        with torch.no_grad():
            output, _ = layer(value)
        torch.testing.assert_close(run(program, tmp_path, value)[0], output, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_states_and_resets_are_inputs(tmp_path: Path) -> None:
    layer = RGC(4, init="uniform").eval()
    x, state = torch.randn(5, 2, 4), (torch.randn(2, 4), torch.randn(2, 4))
    resets = torch.rand(5, 2) < 0.4
    program = torch.onnx.export(layer, (x, state, resets), dynamo=True, verbose=False)
    with torch.no_grad():
        output, last = layer(x, state, resets)
    found = run(program, tmp_path, x, *state, resets)
    for got, want in zip(found, (output, *last), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_layer_is_the_same_outside_of_an_export() -> None:
    """The export leaves nothing behind: the operator is used again."""
    layer = GRU(3, 4).eval()
    torch.onnx.export(layer, (torch.randn(2, 1, 3),), dynamo=True, verbose=False)
    program = torch.export.export(layer, (torch.randn(2, 1, 3),))
    assert re.search("rjepa_triton.two_point", str(program.graph))
