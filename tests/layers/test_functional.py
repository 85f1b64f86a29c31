"""functional.rgc: values and gradients by each learning rule, and its refusals."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rjepa_triton import functional
from rjepa_triton.cells.builtin import LSTMCell, RGCCell
from rjepa_triton.layers.functional import rgc

F64 = torch.float64
RULES = [("rfp", "own"), ("bptt", "full"), ("rtrl", "full")]
SIZES = [(1, 1, 1), (2, 1, 1), (1, 3, 2), (7, 3, 5), (17, 2, 13)]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("learning", "through"), RULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_equal_the_oracle(
    size: tuple[int, int, int], learning: str, through: str, reset: bool, diagonal: bool, recompute: bool
) -> None:
    x, weights, state, ds, dm = oracle.problem(*size, diagonal=diagonal)
    resets = torch.rand(size[:2]) < 0.3 if reset else None
    leaves = [x, *state, *weights]
    s, m = rgc(x, *weights, state, resets=resets, learning=learning, recompute=recompute)
    want_s, want_m = oracle.rgc(x, weights, state, resets, through)
    torch.testing.assert_close(s, want_s, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m, want_m, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((s * ds + m * dm).sum(), leaves)
    want = torch.autograd.grad((want_s * ds + want_m * dm).sum(), leaves)
    assert oracle.relative(got, want) < 1e-12


def test_rfp_is_the_papers_equation_14() -> None:
    x, weights, _, ds, _ = oracle.problem(9, 3, 6)
    s, _ = rgc(x, *weights, learning="rfp")
    got = torch.autograd.grad((s * ds).sum(), weights)
    with torch.no_grad():
        assert oracle.relative(got, oracle.equation_14(x, weights, ds)) < 1e-12


def test_rfp_is_exact_for_diagonal_recurrence_and_not_for_dense() -> None:
    for diagonal, exact in ((True, True), (False, False)):
        x, weights, state, ds, _ = oracle.problem(20, 2, 12, diagonal=diagonal)
        gradients = [
            torch.autograd.grad((rgc(x, *weights, state, learning=rule)[0] * ds).sum(), weights)
            for rule in ("rfp", "bptt")
        ]
        assert (oracle.relative(*gradients) < 1e-12) == exact


@pytest.mark.parametrize("learning", ["bptt", "rtrl"])
def test_exact_rules_pass_gradcheck(learning: str) -> None:
    x, weights, state, _, _ = oracle.problem(3, 2, 3)
    resets = torch.tensor([[False, False], [True, False], [False, False]])

    def f(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rgc(leaves[0], *leaves[3:], leaves[1:3], resets=resets, learning=learning)

    assert torch.autograd.gradcheck(f, (x, *state, *weights))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**31),
    st.sampled_from(RULES),
)
def test_any_size(
    steps: int, batch: int, units: int, diagonal: bool, seed: int, rule: tuple[str, str]
) -> None:
    torch.manual_seed(seed)
    x, weights, state, ds, dm = oracle.problem(steps, batch, units, diagonal=diagonal)
    s, m = rgc(x, *weights, state, learning=rule[0])
    want_s, want_m = oracle.rgc(x, weights, state, None, rule[1])
    got = torch.autograd.grad((s * ds + m * dm).sum(), [x, *state, *weights])
    want = torch.autograd.grad((want_s * ds + want_m * dm).sum(), [x, *state, *weights])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_first_step_passes_its_input_through() -> None:
    x, weights, _, _, _ = oracle.problem(1, 2, 4)
    s, m = rgc(x, *weights)
    torch.testing.assert_close(s, x)
    torch.testing.assert_close(m, x)


def test_state_carried_across_calls_equals_one_call() -> None:
    x, weights, _, _, _ = oracle.problem(8, 2, 5)
    s, m = rgc(x, *weights)
    s1, m1 = rgc(x[:3], *weights)
    s2, m2 = rgc(x[3:], *weights, (s1[-1], m1[-1]))
    torch.testing.assert_close(torch.cat([s1, s2]), s, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat([m1, m2]), m, rtol=0, atol=1e-14)


def test_float32_is_within_rounding_of_float64() -> None:
    x, weights, state, ds, _ = oracle.problem(50, 4, 32)
    want = torch.autograd.grad((rgc(x, *weights, state)[0] * ds).sum(), weights)
    x32, *rest = [t.detach().float().requires_grad_() for t in (x, *state, *weights)]
    got = torch.autograd.grad((rgc(x32, *rest[2:], tuple(rest[:2]))[0] * ds.float()).sum(), rest[2:])
    assert oracle.relative(got, want) < 1e-5


def test_strided_and_expanded_tensors_work() -> None:
    x, weights, _, ds, _ = oracle.problem(5, 3, 4)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    turned = [w.detach().T.contiguous().T.requires_grad_() for w in weights]
    one = x.new_ones(1, 4).expand(3, 4)
    got = torch.autograd.grad((rgc(strided, *turned, (one, one))[0] * ds).sum(), turned)
    ones = x.new_ones(3, 4)
    want = torch.autograd.grad((rgc(x.detach(), *weights, (ones, ones))[0] * ds).sum(), weights)
    assert oracle.relative(got, want) < 1e-14
    constant = x.detach()[:, :1].expand(5, 3, 4)
    torch.testing.assert_close(rgc(constant, *weights)[0], rgc(constant.contiguous(), *weights)[0])


def test_only_what_is_asked_for_is_differentiated() -> None:
    x, weights, state, ds, _ = oracle.problem(4, 2, 3)
    frozen = [w.detach() for w in weights]
    frozen[2] = weights[2]
    s, _ = rgc(x.detach(), *frozen, tuple(v.detach() for v in state))
    (got,) = torch.autograd.grad((s * ds).sum(), [weights[2]])
    want = torch.autograd.grad((rgc(x, *weights, state)[0] * ds).sum(), weights)[2]
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_a_weight_changed_before_backward_is_refused() -> None:
    x, weights, _, _, _ = oracle.problem(4, 2, 3)
    s, _ = rgc(x, *weights)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.sum().backward()


def test_an_output_changed_in_place_is_refused() -> None:
    x, weights, _, _, _ = oracle.problem(4, 2, 3)
    s, _ = rgc(x, *weights)
    loss = s.sum()
    s.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


GOOD = {name: torch.zeros(3, 3) for name in ("weight_ss", "weight_ms", "weight_mm", "weight_sm")}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must have shape \(T, B, N\), got \(2, 3\)"),
        ({"x": torch.zeros(0, 2, 3)}, ValueError, r"x must have shape \(T, B, N\), got \(0, 2, 3\)"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4, 2, 3, dtype=torch.int64)}, TypeError, "x must have one of the dtypes"),
        ({"weight_ms": torch.zeros(3, 4)}, ValueError, r"weight_ms must have shape \(3, 3\) or \(H, b, b\), or \(N,\), to match x, got \(3, 4\)"),
        ({"weight_mm": torch.zeros(4)}, ValueError, r"weight_mm must have shape \(3,\) to match x, got \(4,\)"),
        ({"weight_sm": torch.zeros(3, 3, dtype=F64)}, TypeError, "weight_sm must have the dtype of x"),
        ({"weight_sm": torch.zeros(3, 3, device="meta")}, ValueError, "weight_sm must be on the device of x, cpu, got meta"),
        ({"state": torch.zeros(2, 3)}, TypeError, r"state must be a tuple \(s, m\), got Tensor"),
        ({"state": (torch.zeros(2, 3),)}, ValueError, "got 1 entries"),
        ({"state": (torch.zeros(5, 3), torch.zeros(5, 3))}, ValueError, r"state's s must have shape \(2, 3\) to match x, got \(5, 3\)"),
        ({"resets": torch.zeros(4, 2)}, TypeError, "resets must have dtype torch.bool"),
        ({"resets": torch.zeros(4, 1, dtype=torch.bool)}, ValueError, r"resets must have shape \(4, 2\), got \(4, 1\)"),
        ({"learning": "adam"}, ValueError, "learning must be one of 'rfp', 'bptt', 'rtrl', 'eprop', 'rflo', 'snap0', got 'adam'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], says: str) -> None:
    arguments: dict[str, object] = {"x": torch.zeros(4, 2, 3), **GOOD, **change}
    with pytest.raises(error, match=says):
        rgc(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("cell", [RGCCell(), LSTMCell()], ids=["rgc", "lstm"])
def test_windows_of_time_give_the_whole_gradient(
    cell: Any, dtype: torch.dtype, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(len(cell.per_unit), 11, 2, 3, dtype=dtype)
    weights = [torch.randn(3, 3, dtype=dtype) for _ in cell.matrices]
    state = [torch.randn(2, 3, dtype=dtype) for _ in cell.states]
    resets = torch.rand(11, 2) < 0.3 if reset else None
    trajectory = cell.scan(x, weights, state, resets)
    delta = torch.randn_like(trajectory.after)
    want = functional.gradients(cell, trajectory, weights, delta, "rfp")
    windows = dict.fromkeys(functional.LARGE, (0, 4 * 2 * 3))  # of 4, 4 and 3 steps
    monkeypatch.setattr(functional, "LARGE", windows)
    got = functional.gradients(cell, trajectory, weights, delta, "rfp")
    error = 1e-12 if dtype == F64 else 1e-5
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error)
