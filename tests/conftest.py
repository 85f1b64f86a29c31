"""Shared by all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported: kernels run in Python, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
