"""Every kernel of the benchmark once, at a small size, against float64: the first thing that is asked of a GPU."""

from __future__ import annotations

import pytest
import torch

from rjepa_triton.bench.kernels import timing
from rjepa_triton.bench.kernels.cases import KERNELS, problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, UNITS, BATCH = 4, 64, 2


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel(name: str) -> None:
    kernel = KERNELS[name]
    if not timing._fits(kernel, UNITS, DEVICE):
        pytest.skip("this GPU has too few multiprocessors")
    given = problem(kernel, UNITS, BATCH, kernel.steps or STEPS, 0, DEVICE)
    want = kernel.reference(given.copy(torch.float64))
    runners = kernel.runners(DEVICE)
    if not runners:
        pytest.skip("nothing runs it on the CPU")
    by = next(by for by in ("triton", "compile", "torch") if by in runners)
    timing.verify(kernel, runners[by], given, want)
