"""What the kernels' launchers share, and what may be imported beside them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from rjepa_triton.kernels import _launch
from rjepa_triton.kernels._launch import vector_width

KERNELS = sorted(Path(_launch.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("what", ["refuse", "compile"])
def test_without_the_interpreter(what):
    """On CPU tensors every launcher refuses; past that check, every launch compiles as it is passed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    script = Path(__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Beside those, what lies in the same folder.
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
