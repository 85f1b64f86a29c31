"""`Stream.step` and `learn` in compiled code: what they are given stays the caller's, and what he changes is seen."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import RGC, Stream
from rjepa_triton.backend import native_backend

pytestmark = pytest.mark.skipif(native_backend.cpp_compiler() is None, reason="no C++ compiler")

F64 = torch.float64
STEPS, BATCH, IN, UNITS, OUT = 7, 2, 3, 5, 3


def pair(**options: Any) -> list[Stream]:
    """The same stream by compiled code and by the loop."""
    layer = RGC(UNITS, input_size=IN, init="uniform", dtype=F64)
    readout = nn.Sequential(nn.Linear(UNITS, OUT, dtype=F64))
    return [
        Stream(copy.deepcopy(layer), copy.deepcopy(readout), BATCH, backend=backend, **options)
        for backend in ("compile", "torch")
    ]


def wide(*shape: int) -> Tensor:
    """Every other number of a tensor that is twice as wide."""
    return torch.randn(*shape[:-1], 2 * shape[-1], dtype=F64)[..., ::2]


GIVEN: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda *shape: torch.randn(*shape, dtype=F64),
    "wide": wide,
    "expanded": lambda *shape: torch.randn(*shape[:-1], 1, dtype=F64).expand(shape),
    "transposed": lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=F64).mT,
    "negated": lambda *shape: torch.randn(*shape, dtype=torch.complex128).conj().imag,
    "of a graph": lambda *shape: torch.randn(*shape, dtype=F64, requires_grad=True) * 2,
    "a parameter": lambda *shape: nn.Parameter(torch.randn(*shape, dtype=F64)),
}


@pytest.mark.parametrize("loss", ["mse", "delta", "cross_entropy"])
@pytest.mark.parametrize("of", GIVEN)
def test_tensors_of_every_kind(of: str, loss: str) -> None:
    xs = [GIVEN[of](BATCH, IN) for _ in range(STEPS)]
    aims = [GIVEN[of](BATCH, OUT) for _ in range(STEPS)]
    if loss == "cross_entropy":
        aims = [torch.randint(OUT, (BATCH, 2))[:, 0] for _ in range(STEPS)]
    found = []
    for stream in pair(loss=loss, lr=0.1):
        told = []
        for x, aim in zip(xs, aims, strict=True):
            output = stream.step(x)
            told += [output, torch.tensor(stream.learn(aim), dtype=F64)]
        found.append([*told, *stream.parameters])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_memory_that_is_written_again() -> None:
    """x between step() and learn(), and both between steps; what step() gave stays."""
    xs, aims = torch.randn(STEPS, BATCH, IN, dtype=F64), torch.randn(STEPS, BATCH, OUT, dtype=F64)
    compiled, loop = pair(lr=0.1, optimizer="adam")
    x, aim, kept, wanted = xs[0].clone(), aims[0].clone(), [], []
    for t in range(STEPS):
        kept.append(compiled.step(x.copy_(xs[t])))
        wanted.append(loop.step(xs[t]))
        kept[-1].mul_(1.0)
        x.fill_(torch.nan)
        losses = compiled.learn(aim.copy_(aims[t])), loop.learn(aims[t])
        aim.fill_(torch.nan)
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(kept, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled.parameters, loop.parameters, rtol=1e-12, atol=1e-12)


def test_an_output_that_is_changed() -> None:
    """The loss is of what step() computed."""
    compiled, loop = pair(lr=0.1)
    x, aim = torch.randn(BATCH, IN, dtype=F64), torch.randn(BATCH, OUT, dtype=F64)
    losses = []
    for stream in (compiled, loop):
        stream.step(x).zero_()
        losses.append(stream.learn(aim))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_outputs_are_no_classes() -> None:
    """Though they have the shape and dtype that other losses take."""
    for stream in pair(loss="cross_entropy"):
        stream.step(torch.randn(BATCH, IN, dtype=F64))
        with pytest.raises(ValueError, match="target must have shape"):
            stream.learn(torch.rand(BATCH, OUT, dtype=F64))
        stream.learn(torch.zeros(BATCH, dtype=torch.int64))


def _new_counts(stream: Stream) -> None:
    for state in stream.optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"])


def _other_memory(stream: Stream) -> None:
    for parameter in stream.parameters:
        parameter.data = parameter.data.clone()


def _other_moments(stream: Stream) -> None:
    for state in stream.optimizer.state.values():
        state["exp_avg"] = 0.5 * state["exp_avg"]


def _other_memory_of_counts(stream: Stream) -> None:
    for state in stream.optimizer.state.values():
        state["step"].data = state["step"].data.clone()


def _doubled(stream: Stream) -> None:
    """Modules inside of the readout are others."""
    linear = stream.readout[0]  # type: ignore[index]
    stream.readout[0] = type(linear)(UNITS, OUT, dtype=F64)  # type: ignore[index,operator]
    stream.readout[0].weight, stream.readout[0].bias = linear.weight, linear.bias  # type: ignore[index]


def _stepped(stream: Stream) -> None:
    """The learner takes a step of its own."""
    stream.learner.step(torch.ones(BATCH, IN, dtype=F64))


def _reset(stream: Stream) -> None:
    stream.reset(torch.tensor([True, False]))


CHANGES = [_new_counts, _other_memory, _other_moments, _other_memory_of_counts, _doubled, _stepped, _reset]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: Callable[[Stream], None]) -> None:
    xs, aims = torch.randn(STEPS, BATCH, IN, dtype=F64), torch.randn(STEPS, BATCH, OUT, dtype=F64)
    compiled, loop = pair(lr=0.1, optimizer="adam")
    for t in range(STEPS):
        if t in (2, 5):
            change(compiled), change(loop)
            gc.collect()  # what nothing holds any more is another's from here on
        outputs = compiled.step(xs[t]), loop.step(xs[t])
        torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
        assert compiled.learn(aims[t]) == pytest.approx(loop.learn(aims[t]), rel=1e-11)
    torch.testing.assert_close(compiled.parameters, loop.parameters, rtol=1e-11, atol=1e-11)
    for mine, its in zip(compiled.parameters, loop.parameters, strict=True):
        states = compiled.optimizer.state[mine], loop.optimizer.state[its]
        torch.testing.assert_close(*map(dict, states), rtol=1e-11, atol=1e-11)


def test_a_tensor_whose_storage_was_freed_is_refused_and_one_of_zeros_taken() -> None:
    streams = [Stream(RGC(4, input_size=2), nn.Linear(4, 2), 1, lr=0.1) for _ in range(2)]
    streams[1].load_state_dict(copy.deepcopy(streams[0].state_dict()))
    zeros = torch._efficientzerotensor((1, 2))
    for stream, x in zip(streams, (torch.zeros(1, 2), zeros), strict=True):
        stream.step(x)
        freed = torch.ones(1, 2)
        freed.untyped_storage().resize_(0)
        with pytest.raises(
            ValueError, match="target must have memory of its own, got a tensor whose storage"
        ):
            stream.learn(freed)
        stream.learn(x)
        with pytest.raises(ValueError, match="x must have memory of its own"):
            stream.step(freed)
        stream.step(x)
    for a, b in zip(*(stream.parameters for stream in streams), strict=True):
        assert torch.equal(a, b)
