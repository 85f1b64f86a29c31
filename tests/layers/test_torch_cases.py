"""torch's own cases of its recurrent modules, of the installed version, against `rjepa_triton.compat` (docs/coming-from.md).

They are what torch's test suite draws its module tests from: constructors, calls and states of every kind with a
reference function, and constructors and calls that must raise.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal import common_modules

from rjepa_triton import compat

F64 = torch.float64
KINDS = ("LSTM", "GRU", "RNN")
RULES = ("bptt", "rtrl", "rfp")
DATABASE = {info.module_cls: info for info in common_modules.module_db}


def cases_of(kind: str, *, training: bool, dtype: torch.dtype = F64) -> list[Any]:
    info = DATABASE[getattr(nn, kind)]
    return list(
        info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    )


def made(kind: str, case: Any, learning: str, module: Any = compat) -> Any:
    args, kwargs = case.constructor_input.args, dict(case.constructor_input.kwargs)
    torch.manual_seed(0)
    more = {"learning": learning} if module is compat else {}
    return getattr(module, kind)(*args, dtype=F64, **kwargs, **more)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("learning", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_torch_and_of_its_reference(kind: str, learning: str) -> None:
    count = 0
    for training in (True, False):
        for case in cases_of(kind, training=training):
            layer = made(kind, case, learning).train(training)
            args, kwargs = case.forward_input.args, case.forward_input.kwargs
            found = layer(*args, **kwargs)
            torch.testing.assert_close(found, made(kind, case, learning, nn)(*args, **kwargs))
            reference = case.reference_fn(layer, *args, **kwargs)
            torch.testing.assert_close(tensors(found), tensors(reference))
            count += 1
    assert count == {"LSTM": 64, "GRU": 32, "RNN": 64}[kind]


@pytest.mark.parametrize("learning", ["bptt", "rtrl"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, learning: str) -> None:
    for case in cases_of(kind, training=True)[::7]:
        layer = made(kind, case, learning)
        names, weights = zip(*layer.named_parameters(), strict=True)
        given = [tensor.detach().requires_grad_() for tensor in tensors(case.forward_input.args)]

        def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x, *state = leaves[: len(given)]  # noqa: B023
            hx = (tuple(state) if len(state) > 1 else state[0]) if state else None
            replaced = dict(zip(names, leaves[len(given) :], strict=True))  # noqa: B023
            return tuple(tensors(torch.func.functional_call(layer, replaced, (x, hx))))  # noqa: B023

        assert torch.autograd.gradcheck(run, (*given, *weights), fast_mode=True)
        if learning == "bptt":
            assert torch.autograd.gradgradcheck(run, (*given, *weights), fast_mode=True)


@pytest.mark.parametrize("learning", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_inputs_of_any_layout_and_repeated_calls(kind: str, learning: str) -> None:
    for case in cases_of(kind, training=True)[::5]:
        layer = made(kind, case, learning)
        args = case.forward_input.args
        want = layer(*args)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
            torch.testing.assert_close(twin(*args), want, rtol=0, atol=0)
        apart = [
            torch.stack([tensor, tensor], -1)[..., 0] if isinstance(tensor, torch.Tensor) else tensor
            for tensor in args
        ]
        torch.testing.assert_close(layer(*apart), want)
        assert repr(layer)


@pytest.mark.parametrize("learning", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_refuses_is_refused(kind: str, learning: str) -> None:
    info = DATABASE[getattr(nn, kind)]
    errors = list(
        info.module_error_inputs_func(info, device="cpu", dtype=F64, requires_grad=False, training=True)
    )
    assert len(errors) >= 2
    for error in errors:
        case = error.module_error_input
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        make = functools.partial(getattr(compat, kind), *args, **kwargs, learning=learning)
        call = make
        if error.error_on is common_modules.ModuleErrorEnum.FORWARD_ERROR:
            given = case.forward_input
            call = functools.partial(make(), *given.args, **given.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            call()
