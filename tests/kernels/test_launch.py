"""The helpers that the kernels' launchers share, and what the kernels' files may import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from checkout import ROOT

from rjepa_triton.kernels import _launch
from rjepa_triton.kernels._launch import device_sizes, split_rows, vector_width

KERNELS = sorted(Path(_launch.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("what", ["refuse", "compile"])
def test_without_the_interpreter(what):
    """Every launcher refuses CPU tensors; without that check, every launch compiles with the arguments it passes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    script = ROOT / "tests" / "support" / "launches.py"
    done = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Files may also import from their own folder.
            assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed)


@pytest.mark.parametrize(
    ("size", "dtype", "width"),
    [
        (1024, torch.float32, 4),
        (1000, torch.bfloat16, 8),
        (1004, torch.float32, 4),
        (1004, torch.bfloat16, 1),
        (1, torch.float32, 1),
        (62, torch.float32, 1),
    ],
)
def test_vector_width(size, dtype, width):
    assert vector_width(size, dtype) == width


@pytest.mark.parametrize(
    ("row_bytes", "batch", "gpu", "rows"),
    [
        # RGC in float32 has 32·N² bytes of Γ per batch row: 64, 128, 256 and 4,096 units, on 132 multiprocessors.
        (32 * 64**2, 64, 132, 8),
        (32 * 128**2, 64, 132, 16),
        (32 * 128**2, 30, 132, 10),
        (32 * 128**2, 28, 132, 14),
        (32 * 256**2, 64, 132, 64),
        (32 * 4096**2, 64, 132, 64),
        # In bfloat16, and on more multiprocessors, a larger Γ is split.
        (16 * 256**2, 64, 132, 32),
        (32 * 256**2, 64, 304, 32),
        # A small batch isn't split, and neither is a prime one.
        (8, 15, 132, 15),
        (8, 31, 132, 31),
        (8, 16, 132, 8),
        (8, 1, 132, 1),
    ],
)
def test_split_rows(row_bytes, batch, gpu, rows):
    assert split_rows(row_bytes, batch, gpu) == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU says how many it has")
def test_interpreted_kernels_are_laid_out_as_on_an_h100():
    assert device_sizes(torch.zeros(1)) == (32, 132)
