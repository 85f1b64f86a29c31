"""Before anything imports triton: without a GPU its kernels are interpreted, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
