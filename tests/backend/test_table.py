"""The table of backends: contracts, choosing, refusing, giving way to torch once and saying so."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from rjepa_triton import RGC, OnlineLearner
from rjepa_triton.backend import native_backend, operations, table
from rjepa_triton.backend.table import BACKENDS, Backend, Operation, Refusal
from rjepa_triton.online.sensitivity import PerUnit

OPERATIONS = {name: op for name, op in vars(operations).items() if isinstance(op, Operation)}


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_implementations_have_their_operations_parameters(backend: str) -> None:
    for name, implementation in BACKENDS[backend].implementations.items():
        contract = inspect.signature(OPERATIONS[name].in_torch).parameters
        assert list(contract) == [*inspect.signature(implementation).parameters, "backend"], name
        for parameter in inspect.signature(implementation).parameters.values():
            assert (parameter.kind, parameter.default) == (
                contract[parameter.name].kind,
                contract[parameter.name].default,
            )


def test_an_operation_is_the_function_that_declares_it() -> None:
    for name, op in OPERATIONS.items():
        assert op.__name__ == op.name == name
        assert op.__doc__ == op.in_torch.__doc__
        assert inspect.signature(op).parameters["backend"].default == "torch"


@pytest.fixture
def mine() -> Iterator[Backend]:
    """A backend for tensors on the meta device, as its own file would make it."""

    class CannotLaunch(Exception):
        pass

    backend = Backend(
        "mine",
        "meta",
        "nothing to compute",
        lambda device, dtype: "needs float64" if dtype != torch.float64 else None,
        lambda device, dtype, gamma_dtype, states: None,
        failures=lambda: (CannotLaunch,),
    )

    @backend.implements("gamma_read")
    def gamma_read(gammas: list[Tensor], credit: Tensor, *, memory: object = None) -> Tensor | Refusal:
        if len(gammas) > 1:
            return Refusal("one state alone")
        return credit.new_full((), 7.0)

    @backend.implements("reverse_scan")
    def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None = None) -> None:
        raise CannotLaunch("out of registers")

    yield backend
    del BACKENDS["mine"]


def test_a_backend_is_one_file(mine: Backend) -> None:
    gammas, credit = [torch.ones(2, 1, 3, 4)] * 2, torch.ones(2, 2, 3)
    assert operations.gamma_read(gammas[:1], credit[:1], backend="mine") == 7
    # refused: torch runs, now and later, and nothing is said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(
                operations.gamma_read(gammas, credit, backend="mine"), torch.full((1, 3, 4), 4.0)
            )
    assert operations.gamma_read(gammas[:1], credit[:1], backend="mine") == 7
    # an operation that it doesn't have
    assert (
        operations.affine_scan(torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 2, 1, 1), backend="mine").sum() == 2
    )


def test_what_fails_gives_way_once_and_is_told(mine: Backend) -> None:
    m, delta = torch.randn(1, 1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    with pytest.warns(
        UserWarning, match="'mine' can't run reverse_scan here, torch runs it.*out of registers"
    ) as told:
        found = [operations.reverse_scan(m, delta, backend="mine") for _ in range(2)]
    assert len(told) == 1
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], operations.reverse_scan(m, delta))
    assert table.serving("mine", "fast", operations.gamma_read, operations.reverse_scan) == (
        "torch",
        "backend 'mine' failed: out of registers",
    )
    assert table.serving("mine", "fast", operations.gamma_read) == ("mine", "fast")
    assert table.serving("torch", "asked for", operations.reverse_scan) == ("torch", "asked for")


def test_choosing(mine: Backend) -> None:
    meta, cpu = torch.device("meta"), torch.device("cpu")
    assert operations.choose_scan("auto", meta, torch.float64) == "mine"
    assert operations.choose_scan("auto", meta, torch.float32) == "torch"
    assert operations.choose_scan("mine", cpu, torch.float64) == "mine"
    with pytest.raises(ValueError, match="backend='mine' can't run: needs float64; use backend='torch'"):
        operations.choose_scan("mine", meta, torch.float32)
    assert operations.choose_gamma("auto", meta, torch.float32, torch.float32, 1) == (
        "mine",
        "nothing to compute",
    )
    assert operations.choose_scan("auto", torch.device("xpu"), torch.float64) == "torch"


def test_auto_takes_the_next_backend_where_the_first_refuses(mine: Backend) -> None:
    mine.device_type = "cpu"
    cpu = torch.device("cpu")
    name, why = operations.choose_gamma("auto", cpu, torch.bfloat16, torch.bfloat16, 1)
    assert (name, why) == ("mine", "nothing to compute")


def test_explain_tells_what_runs_after_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    learner = OnlineLearner(RGC(4), 1, form="step")
    learner.explain()
    assert "backend of ss, ms, mm, sm: compile (one pass over Γ a step)" in capsys.readouterr().out
    monkeypatch.setitem(native_backend.NATIVE.failed, "gamma_step_of_", "no registers left")
    learner.explain()
    assert (
        "backend of ss, ms, mm, sm: torch (backend 'compile' failed: no registers left)"
        in capsys.readouterr().out
    )


@pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("form", ["step", "chunk", "lazy"])
@pytest.mark.parametrize("name", [n for n in native_backend.NATIVE.implementations if n.startswith("gamma")])
def test_a_learner_tells_of_every_operation_on_gamma_that_gave_way(
    name: str, form: Literal["step", "chunk", "lazy"], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Exception):
        pass

    def broken(*_: object, **__: object) -> None:
        raise Broken("no such instruction")

    native = native_backend.NATIVE
    every, rewrite_every = (3 if form == "chunk" else 1), (2 if form == "lazy" else None)
    learner = OnlineLearner(RGC(4), 2, form=form, update_every=every, rewrite_every=rewrite_every)
    monkeypatch.setattr(native, "failed", {})
    monkeypatch.setattr(native, "failures", lambda: (Broken,))
    monkeypatch.setitem(native.implementations, name, broken)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in torch.randn(4, 3, 2, 4):
            outputs = [learner.step(row) for row in x[:every]]
            torch.stack(outputs).sum().backward()
    sensitivity = learner._past.sensitivity
    assert isinstance(sensitivity, PerUnit)
    (group,) = sensitivity.groups
    assert group.serving()[0] == ("torch" if told else "compile")
    runs = {
        "step": ["gamma_step_of_"],
        "chunk": ["gamma_chunk_of_"],
        "lazy": ["gamma_chunk_of_", "gamma_read"],
    }
    assert bool(told) == (name in runs[form])
