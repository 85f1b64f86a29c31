"""Where Triton's kernels run in tests: compiled on a GPU if there is one, else interpreted on the CPU (`conftest.py`)."""

from __future__ import annotations

import pytest
import torch

from rjepa_triton.backend import triton_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def absent() -> str | None:
    """Why no kernels run here, or None."""
    return triton_backend.no_triton(DEVICE, torch.float32)


def go() -> None:
    """Have the test make its tensors where kernels run, to its end (`conftest.py`); skip it where none do."""
    pytest.importorskip("triton")
    if why := absent():
        pytest.skip(why)
    if DEVICE.type != "cpu":  # a default device is a mode, in which no compiled code runs
        torch.set_default_device(DEVICE)
