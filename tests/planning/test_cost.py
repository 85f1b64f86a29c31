"""The model of cost: what it counts, against the code that runs, and which form it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rjepa_triton import ELSTM, GRU, LSTM, RGC, OnlineLearner, TwoPointRNN
from rjepa_triton.online import counting
from rjepa_triton.planning import cost
from rjepa_triton.rules import bptt, rfp

LAYERS = {
    "rgc": lambda units: RGC(units),
    "rgc-in": lambda units: RGC(units, input_size=5),
    "lstm": lambda units: LSTM(5, units),
    "gru": lambda units: GRU(5, units),
    "elstm": lambda units: ELSTM(5, units),
    "heads": lambda units: RGC(units, heads=2),
}


def problem(layer: TwoPointRNN, batch: int = 1, gpu: bool = False) -> cost.Problem:
    return counting.problem(layer, batch, torch.float32, gpu=gpu)


@pytest.mark.parametrize("name", LAYERS)
def test_calls_are_those_of_any_size(name: str) -> None:
    """At lengths and sizes that were not counted."""
    layer = LAYERS[name](8)
    told = counting.calls(layer.cell, layer.matrices, layer.weights())
    recurrent = [weight.detach() for weight in layer.recurrent_weights()]
    x = torch.randn(len(layer.cell.per_unit), 9, 1, 8)
    state = [torch.zeros(1, 8)] * len(layer.cell.states)
    ran = cost.counted(lambda: layer.cell.scan(x, recurrent, state))
    assert ran.calls == pytest.approx(told.loop.at(9).calls)
    trajectory = layer.cell.scan(x, recurrent, state)
    lin = layer.cell.linearize(trajectory)
    m = rfp.transition(lin, layer.cell.matrices, recurrent)
    delta = torch.randn_like(trajectory.after)
    ran = cost.counted(lambda: rfp.reverse_scan(m, delta))
    assert ran.calls == told.credit.at(9).calls
    ran = cost.counted(lambda: bptt.credits(lin, layer.cell.matrices, recurrent, delta))
    assert ran.calls == told.exact.at(9).calls


def test_they_are_counted_once() -> None:
    first, second = (LSTM(3, units) for units in (4, 16))
    counts = [counting.calls(one.cell, one.matrices, one.weights()) for one in (first, second)]
    assert counts[0] is counts[1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("form", "rewrite"),
    [("step", None), ("lazy", 1), ("lazy", 3), ("lazy", 6), ("chunk", None), ("history", None)],
)
def test_state_bytes_are_the_learners(name: str, form: str, rewrite: int | None) -> None:
    layer, batch, every = LAYERS[name](16), 3, 4 if form == "chunk" else 1
    horizon = 7 if form == "history" else None
    options: dict[str, Any] = {"form": form, "rewrite_every": rewrite}
    learner = OnlineLearner(layer, batch, update_every=every, horizon=horizon, **options)
    held = 0
    for _ in range(2 if form == "chunk" else 7):
        x = torch.randn(every, batch, layer.fan_in)
        out = learner.chunk(x) if form == "chunk" else learner.step(x[0])
        if form == "chunk":  # its window stands until backward()
            held = max(held, learner.nbytes)
        out.sum().backward()
        held = max(held, learner.nbytes)
    costs = cost.form_costs(problem(layer, batch), every, horizon, cost.CPU, learner.rewrite_every)
    told = next(one for one in costs if one.form == form)
    assert told.state_bytes == pytest.approx(held, rel=0.02)
    assert told.seconds == cost.seconds(told.phases, cost.CPU)


def test_what_runs_gamma_moves_its_bytes() -> None:
    layer = RGC(256, device="meta")
    g, w = 4 * 8 * 2 * 256**2, 4 * 4 * 256**2
    gpu = problem(layer, 2, gpu=True)
    assert (gpu.runs, gpu.gamma_bytes, gpu.weight_bytes) == ("triton", g, w)
    assert cost.gamma_pass(gpu).bytes == 2 * g + 2 * w
    assert cost.gamma_pass(gpu).calls == 1
    # a chunk reads and writes Γ once where one kernel does all, twice where torch adds what enters
    dense = cost.chunk_work(gpu, 8)
    assert dense.bytes == pytest.approx(2 * g + 6 * w, rel=0.15)  # and pointwise work
    assert dense.flop == 6 * 2 * 4 * 256**2 * 8
    assert cost.runs_gamma(True, 8, 8, 2) == "torch"
    assert (cost.runs_gamma(False, 4, 4, 3), cost.runs_gamma(False, 4, 4, 5)) == ("compile", "torch")
    assert (cost.runs_gamma(True, 4, 4, 3), cost.runs_gamma(True, 4, 4, 5)) == ("triton", "torch")
    assert cost.runs_gamma(False, 4, 2, 2) == "torch"


def test_plain_torch_makes_as_many_passes_over_gamma() -> None:
    units, batch = 48, 2
    told = replace(problem(RGC(units), batch), runs="torch")
    gammas = [torch.zeros(batch, 4, units, units) for _ in range(2)]
    m, phi = torch.zeros(2, 2, batch, units), torch.zeros(2, batch, 4, units)
    y, delta = torch.zeros(batch, 4, units), torch.zeros(2, batch, units)
    ran = cost.counted(lambda: rfp.gamma_step_(gammas, m, phi, y, delta))
    assert cost.gamma_pass(told).calls == ran.calls
    assert cost.gamma_pass(told).bytes == pytest.approx(ran.bytes, rel=0.1)


def test_a_learner_counts_what_it_is_asked_to_run_by() -> None:
    plain, compiled = (
        next(c for c in OnlineLearner(RGC(256), 1, backend=backend)._choice.costs if c.form == "step")
        for backend in ("torch", "compile")
    )
    g = 4 * 8 * 256**2
    gamma = [cost.phases[1].work.bytes for cost in (plain, compiled)]
    assert gamma[0] > 10 * g > 4 * g > gamma[1]


@pytest.mark.parametrize("name", LAYERS)
def test_lazy_takes_as_many_calls_more_than_step(name: str) -> None:
    """A step of a learner; what it calls in any form is not told apart here."""
    layer, every = LAYERS[name](16), 6
    # by plain torch, whose calls are what is counted: a call of compiled code is none of torch's
    told_of = replace(problem(layer), runs="torch", loop=False, one_step=False, partials=False, reverse=False)
    costs = {c.form: c for c in cost.form_costs(told_of, 1, None, cost.CPU, every)}
    x = torch.randn(1, layer.fan_in)
    ran, told = {}, {}
    for form, options in (("step", {}), ("lazy", {"rewrite_every": every})):
        learner = OnlineLearner(layer, 1, form=form, backend="torch", **options)  # type: ignore[arg-type]

        def run(learner: OnlineLearner = learner) -> None:
            for _ in range(every):
                shown = learner.step(x)
                shown.backward(torch.ones_like(shown))

        run()
        layer.zero_grad()
        ran[form] = cost.counted(run).calls / every
        told[form] = sum(phase.work.calls for phase in costs[form].phases)
    assert told["lazy"] - told["step"] == pytest.approx(ran["lazy"] - ran["step"], rel=0.1)


@pytest.mark.parametrize("runs", ["torch", "compile", "triton"])
def test_gamma_is_read_for_less_than_it_is_rewritten(runs: str) -> None:
    """And R grows with what rewriting takes above reading."""
    layer = RGC(256, device="meta")
    few, many = (replace(problem(layer, batch), runs=runs) for batch in (1, 64))
    for told in (few, many):
        g, w = told.gamma_bytes, told.weight_bytes
        read, fold = cost.reading_work(told), cost.fold_work(told, 1)
        assert g + w <= read.bytes < fold.bytes
        assert (
            cost.chunk_work(told, 8).flop
            == cost.fold_work(told, 8).flop + 2 * told.batch * 8 * told.weight_numbers
        )
    costs = {c.form: c for every in (1, 4) for c in cost.form_costs(many, 1, None, cost.GPU, every)}
    assert costs["lazy"].seconds == cost.seconds(costs["lazy"].phases, cost.GPU)
    slow = replace(cost.GPU, bytes_per_second=1e10)
    assert cost.rewrite_every(many, slow) > cost.rewrite_every(many, replace(slow, flop_per_second=1e11))


def test_lazy_is_taken_by_a_margin() -> None:
    step, lazy = (cost.FormCost(form, 1.0, state, "") for form, state in (("step", 1), ("lazy", 2)))
    for factor, wanted in ((1 / 1.19, "step"), (1 / 1.21, "lazy")):
        assert cost.cheapest([step, replace(lazy, seconds=factor)], None).form == wanted
    assert cost.cheapest([step, replace(lazy, seconds=0.1)], 1).form == "step"
