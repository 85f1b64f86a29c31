"""Every case's gradient is right, its bytes are predicted, and a wrong one is noticed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rjepa_triton.backend import native_backend
from rjepa_triton.bench.harness import measure
from rjepa_triton.bench.scaling import cases
from rjepa_triton.bench.scaling.cases import CASES, Case, Problem, Size


def problem(size: Size, dtype: torch.dtype = torch.float64, backend: str = "torch") -> Problem:
    like = torch.empty(0, dtype=dtype)
    return cases.problem(size, kind="noise", scale=0.3, seed=1, backend=backend, like=like)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "torch"), (torch.float32, "auto"), (torch.float64, "torch")]
)
@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_float64(name: str, dtype: torch.dtype, backend: str) -> None:
    cases.verify(CASES[name], problem(Size(7, 3, 9, 4), dtype, backend))


def test_the_two_oracles_differ() -> None:
    """If they did not, the check could not tell RFP from BPTT."""
    p = problem(Size(7, 3, 9, 4))
    rfp, bptt = cases.oracle(p, exact=False), cases.oracle(p, exact=True)
    assert all(float((a - b).norm() / b.norm()) > 1e-3 for a, b in zip(rfp, bptt, strict=True))


@pytest.mark.parametrize(
    "name", ["rfp-stream", "rfp-step", "rfp-lazy", "rfp-chunk", "rfp-dual", "bptt", "bptt-autograd", "rtrl"]
)
def test_a_wrong_gradient_is_noticed(name: str) -> None:
    right = CASES[name]

    class Wrong(right):  # type: ignore[misc, valid-type]
        def run(self) -> Sequence[Tensor]:
            first, *rest = super().run()
            return [first, *rest[:-1], 1.0001 * rest[-1]]

    with pytest.raises(ArithmeticError, match="gradient of W_sm differs from float64 by"):
        cases.verify(Wrong, problem(Size(7, 3, 9, 4)))


@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_near_the_measured(name: str) -> None:
    size = Size(units=48, batch=2, steps=20, chunk=8, itemsize=8)
    case: type[Case] = CASES[name]
    p = problem(size, backend="auto")
    measured = measure.peak_bytes(lambda: case(p).run(), torch.device("cpu"))
    assert case.state_bytes(size) <= measured
    assert 0.7 <= case.peak_bytes(size) / measured <= 1.5


def test_state_bytes_are_the_formulas_stated() -> None:
    size = Size(units=10, batch=3, steps=20, chunk=8, itemsize=4)
    assert CASES["rfp-step"].state_bytes(size) == 4 * 8 * 3 * 10**2
    assert CASES["rtrl"].state_bytes(size) == 4 * 8 * 3 * 10**3
    assert CASES["bptt"].state_bytes(size) == 4 * 6 * 20 * 3 * 10
    assert CASES["rtrl"].flop(size) == 32 * 3 * 10**4
    assert CASES["pass"].state_bytes(size) == CASES["rfp-stream"].state_bytes(size) == 4 * 8 * 3 * 10**2


def test_a_run_covers_the_steps_it_says() -> None:
    p = problem(Size(5, 1, 20, 8))
    covers = {name: case(p).covers for name, case in CASES.items()}
    assert covers.pop("rfp-stream") % 20 == 0
    assert covers == {
        "rfp-step": 1,
        "rfp-step-gamma": 1,
        "pass": 1,
        "rfp-lazy": 8,
        "rfp-chunk": 8,
        "rfp-history": 20,
        "rfp-dual": 20,
        "bptt": 20,
        "bptt-autograd": 20,
        "tbptt": 8,
        "rtrl": 1,
        "rtrl-heads": 1,
    }


def test_running_on_starts_over_at_the_end() -> None:
    case = CASES["rfp-chunk"](problem(Size(5, 1, 20, 8)))
    for _ in range(5):
        assert all(torch.isfinite(g).all() for g in case.run())


@pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("rfp-step", "gamma_step_of_"),
        ("rfp-step-gamma", "gamma_step_"),
        ("rfp-chunk", "gamma_chunk_of_"),
        ("rfp-lazy", "gamma_read"),
    ],
)
def test_a_case_tells_what_runs_it_once_a_kernel_has_given_way(
    name: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel fails when the case first runs, which is after the case was built."""
    native = native_backend.NATIVE

    class Broken(Exception):
        pass

    def broken(*_: object, **__: object) -> None:
        raise Broken("no such instruction")

    made = CASES[name](problem(Size(8, 2, 6, 4), torch.float32, "auto"))
    assert made.backend is not None
    assert made.backend.startswith("compile: ")
    monkeypatch.setattr(native, "failed", {})
    monkeypatch.setattr(native, "failures", lambda: (Broken,))
    monkeypatch.setitem(native.implementations, operation, broken)
    with pytest.warns(UserWarning, match="no such instruction"):
        made.run()
    assert made.backend == "torch: backend 'compile' failed: no such instruction"
