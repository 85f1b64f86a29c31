"""Functions of the reference whose results other tests see only as part of a sum."""

from __future__ import annotations

import pytest
import torch

from rjepa_triton.rules import rfp


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("states", [1, 2, 3])
def test_suffix_products_are_products_of_matrices(states: int, steps: int) -> None:
    m = torch.randn(states, states, steps, 2, 5, dtype=torch.float64)
    by_unit = m.permute(2, 3, 4, 0, 1)
    want = [torch.eye(states, dtype=torch.float64).expand(2, 5, states, states)]
    for t in range(steps - 1, -1, -1):
        want.append(want[-1] @ by_unit[t])
    suffix, whole = rfp.suffix_products(m)
    torch.testing.assert_close(whole.permute(2, 3, 0, 1), want[-1])
    torch.testing.assert_close(suffix.permute(2, 3, 4, 0, 1), torch.stack(want[-2::-1]))


def test_suffix_products_survive_torch_compile() -> None:
    """Products written into views of the result did not: torch 2.11 and 2.14 compiled these to wrong numbers."""
    m = torch.randn(2, 2, 5, 1, 3, dtype=torch.float64)
    compiled = torch.compile(rfp.suffix_products, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(m), rfp.suffix_products(m))
