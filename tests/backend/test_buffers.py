"""Room for a large array: whose memory is lent again, and when it isn't."""

from __future__ import annotations

import gc

import pytest
import torch

from rjepa_triton import RGC, OnlineLearner
from rjepa_triton.backend import buffers
from rjepa_triton.backend.buffers import ReusedMemory
from rjepa_triton.backend.native import library
from rjepa_triton.bench.harness import measure


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "LARGE", 64)


def test_memory_is_lent_again_once_nothing_has_it() -> None:
    lender, like = ReusedMemory(), torch.empty(0)
    first = lender.empty((3, 20), like)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((3, 20), torch.float32, True)
    address, kept = first.data_ptr(), first[1, 2:]  # a part is enough to keep it
    first.fill_(1)
    del first
    other = lender.empty((3, 20), like)
    assert other.data_ptr() != address
    other.fill_(2)
    assert kept.eq(1).all()
    address = other.data_ptr()
    del other
    assert lender.empty((60,), like).data_ptr() == address


def test_another_size_is_other_memory() -> None:
    lender = ReusedMemory()
    address = lender.empty((40,), torch.empty(0)).data_ptr()
    assert lender.empty((20,), torch.empty(0, dtype=torch.float64)).data_ptr() == address  # as many bytes
    assert lender.empty((41,), torch.empty(0)).numel() == 41
    assert lender.empty((2,), torch.empty(0)).numel() == 2  # small: torch's own


def test_what_it_lent_outlives_it() -> None:
    lender = ReusedMemory()
    lent = lender.empty((100,), torch.empty(0)).fill_(3)
    del lender
    gc.collect()
    assert lent.eq(3).all()


def test_what_it_takes_is_counted() -> None:
    lender = ReusedMemory()
    taken = measure.peak_bytes(lambda: lender.empty((50,), torch.empty(0)), torch.device("cpu"))
    assert taken == 200


@pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
def test_gradients_that_are_kept_stay_as_they_are() -> None:
    """Those of a learner, by steps whose gradients are kept, freed, or added up."""
    layer = RGC(9)
    learner = OnlineLearner(layer, 2, form="step")
    kept, copies, x = [], [], torch.randn(8, 2, 9)
    for t in range(8):
        if t % 2:
            layer.zero_grad()
        learner.step(x[t]).sum().backward()
        if t in (2, 5):
            kept += [p.grad for p in layer.parameters() if p.grad is not None]
            copies += [grad.clone() for grad in kept[-4:]]
            layer.zero_grad()
    torch.testing.assert_close(kept, copies, rtol=0, atol=0)
