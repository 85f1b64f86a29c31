"""What one who knows torch.nn makes: layers, learners and modules of `compat`, of options that are drawn, right and wrong.

Each gives what float64 or torch.nn gives, or an error that names the argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import replayed
import torch
from fuzzing import Count, cases
from hypothesis import given
from hypothesis import strategies as st
from replayed import F64, Loss, Step
from small_layers import LAYERS
from torch import Tensor, nn

import rjepa_triton
from rjepa_triton import OnlineLearner, TwoPointRNN, compat

F32, BF16 = torch.float32, torch.bfloat16
NAN = float("nan")
LEARNER_OPTIONS: dict[str, list[Any]] = {
    "batch_size": [1, 2, 3, 0, -1, 2.0, True, None],
    "learning": ["rfp", "eprop", "rflo", "snap0", "rtrl", "uoro", "tbptt", "bptt", "x", 1],
    "block": [1, 2, 0, 1.5, "x"],
    "update_every": [1, 2, 3, 0, 1.5, True, None],
    "form": ["auto", "step", "lazy", "chunk", "history", "x", None],
    "rewrite_every": [1, 3, 0, "x"],
    "credit": ["own", "carry", "x", None],
    "refine": [0, 1, 2, "exact", -1, 1.5, "x"],
    "lag": [0, 1, 2, -1, None, 1.0],
    "gamma_dtype": [F32, BF16, torch.float16, torch.int8, None],
    "gamma_rounding": ["nearest", "stochastic", "x", None],
    "horizon": [1, 50, 0, "x"],
    "backend": ["auto", "torch", "compile", "x", None],
    "seed": [0, -1, 2**70, "x", None],
    "cuda_graph": [False, True, 1],
    "lr": [0.5, 1, 0, -1, NAN, "x"],
    "nonfinite": ["warn", "raise", "clip", "ignore", "x", None],
}


def drawn(options: dict[str, list[Any]], data: st.DataObject, most: int) -> dict[str, Any]:
    names = data.draw(st.lists(st.sampled_from(list(options)), max_size=most, unique=True))
    return {name: data.draw(st.sampled_from(options[name])) for name in names}


def named(error: BaseException, options: dict[str, Any]) -> bool:
    return any(re.search(rf"\b{name}\b", str(error)) for name in options)


def test_learners_options(record_property: Callable[[str, object], None]) -> None:
    """A learner of drawn options, right and wrong, takes two steps."""
    with Count(record_property) as count:

        @cases(60, 20_000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            torch.manual_seed(data.draw(st.integers(0, 2**31)))
            layer = LAYERS[data.draw(st.sampled_from(list(LAYERS)))](dtype=F64)
            given = drawn(LEARNER_OPTIONS, data, 4)
            options = {"batch_size": 2, **given}
            count.add("cases of learners' options")
            try:
                learner = OnlineLearner(layer, **options)
            except (TypeError, ValueError) as error:
                assert named(error, given), error
                count.add("wrong options refused")
                return
            rule = learner.learning
            rule = "carry" if learner.credit == "carry" else rule
            if rule == "rtrl" and not learner.exactness():
                assert given["block"] < layer.hidden_size
                rule = "rfp" if learner.block == 1 else "blocks"
            approximate = rule in ("uoro", "blocks") or (
                learner._refine not in (0, "exact") and learner.update_every > 1
            )
            steps: list[Step] = []
            for t in range(2):
                old = [p.detach().clone() for p in layer.parameters()]
                x = torch.randn(learner.batch_size, layer.fan_in, dtype=F64)
                output, weight = learner(x), torch.randn(learner.batch_size, layer.hidden_size, dtype=F64)
                resets = torch.zeros(learner.batch_size, dtype=torch.bool)
                first = t - t % learner.update_every
                if rule == "tbptt" and learner.lag:  # the chunk before is kept for losses of its last step
                    first = max(0, first - learner.update_every)
                steps.append(replayed.step_of(layer, x, resets, t, first))
                layer.zero_grad()
                (output * weight).sum().backward()
                if approximate:
                    continue
                want, _ = replayed.gradients(layer, steps, [Loss(t, t + 1, weight[None])], rule)
                tolerance = 0.05 if learner._options.gamma_dtype == BF16 else 1e-9
                for (name, p), before, gradient in zip(layer.named_parameters(), old, want, strict=True):
                    if learner.lr is not None and name in layer._names:
                        found = (before - p.detach()) / learner.lr if learner.lr else gradient
                    else:
                        found = torch.zeros_like(p) if p.grad is None else p.grad
                    gap = float((found - gradient).abs().max()) / max(1.0, float(gradient.abs().max()))
                    assert gap < tolerance, f"{name}: off by {gap:.1e}"
                    count.add("values compared")

        run()


SIZES: list[Any] = [1, 2, 3, 4, 0, -1, 2.0, None, "2"]
LAYER_OPTIONS: dict[str, list[Any]] = {
    "hidden_size": SIZES,
    "input_size": SIZES,
    "recurrence": ["dense", "diagonal", "x", None],
    "heads": [None, 1, 2, 3, 0, 1.0, "x"],
    "learning": ["rfp", "bptt", "rtrl", "eprop", "rflo", "snap0", "uoro", "tbptt", "x", None],
    "refine": [0, 1, "exact", -1, 1.5, "x", None],
    "forward": ["auto", "sequential", "parallel", "x", None],
    "recompute": [False, True, 1, None],
    "init": ["zeros", "uniform", "x", None],
    "bias": [True, False, 1, None],
    "batch_first": [True, False, 1, None],
}
OWN_OPTIONS: dict[str, dict[str, list[Any]]] = {
    "IndRNN": {"nonlinearity": ["relu", "tanh", "x", None]},
    "CTRNN": {"alpha": [0.1, 1, 0, 1.5, "x", None], "nonlinearity": ["relu", "tanh", "x"]},
    "RNN": {"nonlinearity": ["relu", "tanh", "x", None]},
    "LRU": {"nonlinearity": [None, "tanh", "x"], "r_min": [0.1, -1, "x"], "r_max": [0.99, 2, None], "max_phase": [1.0, -1, "x"]},
    "LIF": {"decay": [0.5, 2, "x"], "threshold": [0.5, 0, None], "dampening": [0.3, -1, "x"]},
    "ALIF": {"adaptation_decay": [0.9, 2, "x"], "adaptation": [0.1, -1, None]},
}  # fmt: skip
KINDS = ("RGC", "RNN", "IndRNN", "CTRNN", "LSTM", "GRU", "MGU", "MinLSTM", "MinGRU", "ELSTM", "TimeDecay", "LRU", "LIF", "ALIF")  # fmt: skip
REPLAYS = {"rfp": "rfp", "bptt": "rtrl", "rtrl": "rtrl", "eprop": "eprop", "rflo": "rflo", "snap0": "snap0"}


def test_layers(record_property: Callable[[str, object], None]) -> None:
    """A layer of drawn options, right and wrong, is called on a sequence with drawn arguments, right and wrong."""
    with Count(record_property) as count:

        @cases(60, 20_000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            torch.manual_seed(data.draw(st.integers(0, 2**31)))
            kind = data.draw(st.sampled_from(KINDS))
            given = drawn({**LAYER_OPTIONS, **OWN_OPTIONS.get(kind, {})}, data, 4)
            count.add("cases of layers")
            try:
                layer = getattr(rjepa_triton, kind)(
                    **{"input_size": 2, "hidden_size": 4, **given, "dtype": F64}
                )
            except (TypeError, ValueError) as error:
                assert named(error, given), error
                count.add("wrong options refused")
                return
            called(layer, data, count)

        run()


def called(layer: TwoPointRNN, data: st.DataObject, count: Count) -> None:
    steps, batch, units, states = 3, 2, layer.hidden_size, len(layer.cell.states)
    x = torch.randn(steps, batch, layer.fan_in, dtype=F64)
    resets = torch.rand(steps, batch) < 0.3
    start = tuple(torch.randn(batch, units, dtype=F64) * 0.5 for _ in range(states))
    wrong: dict[str, list[Any]] = {
        "x": [None, 1, x[..., :0], x[0, 0], x[None], x.float(), x.int(), x.to("meta"), x.tolist()],
        "state": [
            1,
            "s",
            (),
            (*start, start[0]),
            tuple(s[:1] for s in start),
            tuple(s.float() for s in start),
        ],
        "resets": [1, "r", resets[:1], resets.float(), resets[None], resets.to("meta"), resets.tolist()],
    }
    arguments: dict[str, Any] = {"x": x, "state": start, "resets": resets}
    for name in ("state", "resets"):
        if data.draw(st.booleans()):
            arguments[name] = None
    bad = data.draw(st.sampled_from([None, None, *wrong]))
    if layer.batch_first:
        arguments["x"] = x.transpose(0, 1)
        arguments["resets"] = None if arguments["resets"] is None else resets.T
    if bad is not None:
        arguments[bad] = data.draw(st.sampled_from(wrong[bad]))
        with pytest.raises((TypeError, ValueError), match=rf"\b{bad}\b"):
            layer(**arguments)
        count.add("wrong arguments refused")
        return
    given, begins = arguments["state"], arguments["resets"]
    given = given[0] if given is not None and states == 1 and data.draw(st.booleans()) else given
    rule = REPLAYS[layer.learning] if not layer.refine or layer.refine == "exact" else None
    rule = "rtrl" if layer.refine == "exact" else rule
    surrogate = type(layer.cell).partials is not rjepa_triton.Cell.partials
    if surrogate and layer.cell.states[0] != "z":
        raise AssertionError("a surrogate derivative that the oracle doesn't know")
    output, last = layer(arguments["x"], given, begins)
    output = output.transpose(0, 1) if layer.batch_first else output
    marks = torch.zeros(steps, batch, dtype=torch.bool) if begins is None else resets
    taken = [replayed.step_of(layer, x[t], marks[t], 0, 0) for t in range(steps)]
    before = replayed.zeros(layer, batch) if given is None else start
    with torch.no_grad():
        found = replayed.states(layer, taken, before, "rfp")
        wanted = torch.stack([replayed.output(layer, *each) for each in zip(taken, found, strict=True)])
    tolerance = 1e-4 if layer.forward_mode == "parallel" else 1e-9
    for value, want in zip((last,) if isinstance(last, Tensor) else last, found[-1], strict=True):
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    count.add("values compared")
    weight = torch.randn_like(wanted)
    (output * weight).sum().backward()
    if rule is None or surrogate:
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        return
    gradients, _ = replayed.gradients(layer, taken, [Loss(0, steps, weight)], rule, before)
    for (name, p), want in zip(layer.named_parameters(), gradients, strict=True):
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            gradient, want, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        count.add("values compared")


TORCH_OPTIONS: dict[str, list[Any]] = {
    "input_size": [1, 2, 3, 0, -1, "2", None],
    "hidden_size": [1, 2, 3, 0, -1, 2.0, "2"],
    "num_layers": [1, 2, 0, -1],
    "bias": [True, False],
    "batch_first": [True, False],
    "dropout": [0.0, 0.5, 1.0, -1, 2, True, "x"],
    "bidirectional": [True, False],
    "proj_size": [0, 1, 2, -1, 5],
}


def outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for each in value for tensor in flat(each)]


@pytest.mark.filterwarnings("ignore:dropout option adds dropout", "ignore:Initializing zero-element")
def test_compat(record_property: Callable[[str, object], None]) -> None:
    """torch.nn's modules and those of `compat`, made and called alike: the same values, or both raise."""
    with Count(record_property) as count:

        @cases(60, 20_000)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            seed = data.draw(st.integers(0, 2**31))
            kind = data.draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
            given = drawn(
                {**TORCH_OPTIONS, **({"nonlinearity": ["tanh", "relu", "x"]} if kind == "RNN" else {})},
                data,
                4,
            )
            own = drawn({"learning": REPLAYS_AND_WRONG, "refine": [0, 1, "exact", -1, "x"]}, data, 2)
            options = {"input_size": 2, "hidden_size": 3, **given, "dtype": F64}
            count.add("cases of compat")
            torch.manual_seed(seed)
            theirs, raised = outcome(lambda: getattr(nn, kind)(**options))
            torch.manual_seed(seed)
            ours, ours_raised = outcome(lambda: getattr(compat, kind)(**options, **own))
            if ours_raised is not None:
                by_own = named(ours_raised, own) and isinstance(ours_raised, (TypeError, ValueError))
                assert by_own or (type(ours_raised), str(ours_raised)) == (type(raised), str(raised)), (
                    ours_raised
                )
                count.add("wrong options refused")
                return
            assert raised is None, raised
            beside_torch(theirs, ours, data, count)

        run()


REPLAYS_AND_WRONG = [*REPLAYS, "uoro", "x", None]


def beside_torch(theirs: Any, ours: Any, data: st.DataObject, count: Count) -> None:
    directed = theirs.num_layers * (2 if theirs.bidirectional else 1)
    width = theirs.proj_size or theirs.hidden_size
    x = torch.randn(2, 3, theirs.input_size, dtype=F64)
    batch = 2 if theirs.batch_first else 3
    h, c = (torch.randn(directed, batch, size, dtype=F64) for size in (width, theirs.hidden_size))
    right = (h, c) if isinstance(theirs, nn.LSTM) else h
    wrong: list[Any] = [
        h[:, :-1],
        h[0],
        (h, c, c),
        (h[..., :0], c),
        1,
        "h",
        c.float(),
        (h.float(), c.float()),
    ]
    inputs: list[Any] = [x, x, x, x[:, 0], x[..., :0], x[0, 0], x[None], x.float(), x.int(), x[:0], x[:, :0]]
    x = data.draw(st.sampled_from(inputs))
    hx = data.draw(st.sampled_from([None, None, right, right, *wrong]))
    training = data.draw(st.booleans())
    results = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        module.train(training)
        results.append(outcome(lambda module=module: module(x, hx)))
    (want, raised), (found, ours_raised) = results
    if raised is not None or ours_raised is not None:
        assert (raised is None) == (ours_raised is None), f"torch: {raised!r}; ours: {ours_raised!r}"
        count.add("wrong arguments refused")
        return
    torch.testing.assert_close(flat(found), flat(want))
    count.add("values compared")
    if not all(value.requires_grad and value.numel() for value in (flat(found)[0], flat(want)[0])):
        return
    weight = torch.randn_like(flat(want)[0])
    for value in (flat(found)[0], flat(want)[0]):
        (value * weight).sum().backward()
    if ours.learning in ("bptt", "rtrl") or ours.refine == "exact":
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}")
            count.add("values compared")
