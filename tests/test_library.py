"""The operators that torch.compile sees: their contract, and a compiled model's values and gradients."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from rjepa_triton import RGC

F64 = torch.float64


@pytest.mark.parametrize("learning", ["rfp", "bptt", "rtrl"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_operators_keep_their_contract(learning: str, steps: int, diagonal: bool) -> None:
    x, weights, (s0, m0), _, _ = oracle.problem(steps, 2, 3, diagonal=diagonal)
    x = x.detach()[None].requires_grad_()
    resets = torch.rand(steps, 2) < 0.3
    torch.library.opcheck(
        torch.ops.rjepa_triton.rgc.default, (x, s0, m0, weights, resets, learning, 0, "torch")
    )
    states, saved = torch.ops.rjepa_triton.rgc(x, s0, m0, weights, resets, learning, 0, "torch")
    plain = [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.rjepa_triton.rgc_gradients.default,
        (
            x.detach(),
            states.detach(),
            saved.detach(),
            plain,
            resets,
            torch.randn_like(states),
            learning,
            0,
            "torch",
        ),
    )


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = RGC(5, input_size=3, init="uniform", dtype=F64, **options)
        self.readout = nn.Linear(5, 2, dtype=F64)

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        output, (s, m) = self.layer(x, resets=resets)
        return self.readout(output).square().mean() + (s * m).mean()


@pytest.mark.parametrize(
    "options", [{}, {"learning": "bptt"}, {"recurrence": "diagonal", "batch_first": True}], ids=str
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_compiled_model_is_one_graph_for_every_length(options: dict[str, Any], reset: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for steps in (4, 7, 9):
        x = torch.randn(steps, 2, 3, dtype=F64, requires_grad=True)
        given = x.transpose(0, 1) if options.get("batch_first") else x
        resets = torch.rand(given.shape[:2]) < 0.3 if reset else None
        results = []
        for run in (model, compiled):
            loss = run(given, resets)
            results.append([loss, *torch.autograd.grad(loss, [x, *model.parameters()])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length, then any


def test_a_compiled_model_by_inductor() -> None:
    torch._dynamo.reset()
    model = Model()
    x = torch.randn(4, 2, 3, dtype=F64)
    want = torch.autograd.grad(model(x), list(model.parameters()))
    got = torch.autograd.grad(torch.compile(model, fullgraph=True)(x), list(model.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_compiled_model_under_autocast() -> None:
    model = torch.nn.ModuleDict({"below": torch.nn.Linear(3, 4), "rgc": RGC(4, init="uniform")})

    def run(x: torch.Tensor) -> torch.Tensor:
        return model["rgc"](model["below"](x))[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), run(x))
