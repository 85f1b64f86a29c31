"""What one who knows torch.nn calls, with right and wrong arguments: the float64 oracle's value, or a named argument.

Learners are called in orders that are drawn: steps and chunks with masks, peek, traces, gradients of rows, rows that come
and go, states that are set, resets by flags of any kind, eval mode. Each batch row keeps the steps that it took, and
`replayed` gives its state, outputs and gradients once more. Layers and learners are made of options that are drawn too,
and the modules of `compat` are held against torch.nn's.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import replayed
import torch
from fuzzing import Count, cases
from hypothesis import given
from hypothesis import strategies as st
from replayed import F64, Loss, Step
from torch import Tensor, nn

import rjepa_triton
from rjepa_triton import ELSTM, GRU, LRU, LSTM, RGC, RNN, OnlineLearner, TwoPointRNN, compat

F32, BF16 = torch.float32, torch.bfloat16
LAYERS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda **o: RGC(3, input_size=2, init="uniform", **o),
    "heads": lambda **o: RGC(4, input_size=3, init="uniform", heads=2, **o),
    "diagonal": lambda **o: RGC(3, input_size=2, init="uniform", recurrence="diagonal", **o),
    "rnn": lambda **o: RNN(3, 4, **o),
    "lstm": lambda **o: LSTM(3, 2, **o),
    "gru": lambda **o: GRU(2, 3, **o),
    "elstm": lambda **o: ELSTM(2, 3, **o),
    "lru": lambda **o: LRU(2, 3, **o),
}
RULES: dict[str, list[dict[str, Any]]] = {
    "rfp": [{"form": form} for form in ("step", "lazy", "chunk", "history", "auto")],
    "eprop": [{"form": "step"}, {"form": "chunk"}],
    "rflo": [{"form": "lazy"}],
    "snap0": [{"form": "step"}],
    "rtrl": [{}],
    "tbptt": [{}],
    "carry": [{"credit": "carry"}, {"refine": "exact"}],
}
WHOLE = ("tbptt", "carry")  # credit passes through the full Jacobian within a chunk alone


@dataclass
class Row:
    """A batch row: the state that it went on from, and the steps that it took since."""

    start: tuple[Tensor, ...]
    now: tuple[Tensor, ...]
    steps: list[Step] = field(default_factory=list)
    chunk: int = 0  # the step with which the chunk that runs began
    reset: bool = False  # before its next step
    held: bool = False  # in the last step of all


@dataclass
class Case:
    learner: OnlineLearner
    rule: str
    generator: torch.Generator
    count: Count
    tolerance: float
    rows: list[Row]
    position: int = 0
    calls: int = 0
    input_known: bool = False  # the last step's
    trained: bool = False  # since the last step

    @property
    def layer(self) -> TwoPointRNN:
        return self.learner.layer

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weights()[0].dtype

    @property
    def has_readout(self) -> bool:
        return isinstance(self.layer, (ELSTM, LRU))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=self.generator)

    def number(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))

    def flags(self, *shape: int, share: float) -> tuple[Tensor, Any]:
        """A mask, and the same as an environment may give it."""
        mask = torch.rand(*shape, generator=self.generator) < share
        kinds = (mask, mask.float(), mask.int() * -2, mask.numpy(), mask.double().numpy())
        return mask, kinds[self.number(len(kinds))]

    def close(self, got: Tensor, want: Tensor, what: str) -> None:
        assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, wanted {tuple(want.shape)}"
        gap = float((got.double() - want.double()).abs().max()) / max(1.0, float(want.abs().max()))
        assert gap < self.tolerance, f"{what}: off by {gap:.1e}"
        self.count.add("values compared")

    # What moves on

    def advance(self, steps: int | None) -> None:
        """One step, or a chunk of so many steps, and perhaps backward()."""
        layer, batch, learner = self.layer, len(self.rows), self.learner
        x = self.random(steps or 1, batch, layer.fan_in)
        masked, resetting = self.number(2) == 0, steps is not None and self.number(2) == 0
        active, given = torch.ones(len(x), batch, dtype=torch.bool), None
        if masked:
            active, given = self.flags(len(x), batch, share=0.6)
            x[~active] = torch.nan
        resets = torch.rand(len(x), batch, generator=self.generator) < (0.25 if resetting else 0)
        if steps is None:
            output = learner(x[0].to(self.dtype), None if given is None else given[0])[None]
        else:
            output = learner.chunk(x.to(self.dtype), resets if resetting else None, given)
        assert output.requires_grad == learner.training
        if steps is not None or self.position == 0 or learner.form == "step":
            for row in self.rows:
                row.chunk = len(row.steps)
        wanted, begun = torch.zeros_like(output, dtype=F64), [len(row.steps) for row in self.rows]
        for t in range(len(x)):
            for b, row in enumerate(self.rows):
                wanted[t, b] = self.take(row, x[t, b], bool(active[t, b]), bool(resets[t, b]))
        self.close(output.detach(), wanted, "output")
        self.calls, self.input_known, self.trained = self.calls + 1, True, False
        if not learner.training:
            self.go_on_from_now()
        else:
            self.position = (
                0 if steps or learner.form == "step" else (self.position + 1) % learner.update_every
            )
            if self.number(2):
                self.train(output, active, begun)
        self.count.add("steps", len(x))

    def take(self, row: Row, x: Tensor, active: bool, reset: bool) -> Tensor:
        """The output of a step of one row, or of none."""
        layer, starts = self.layer, torch.tensor([row.reset or reset])
        row.held = not active
        if not active:
            row.reset = row.reset or reset
            if row.reset:
                row.now = replayed.zeros(layer, 1)
            nothing = torch.zeros(1, layer.fan_in)
            with torch.no_grad():
                return replayed.output(layer, replayed.step_of(layer, nothing, starts, 0, 0), row.now)[0]
        step = replayed.step_of(layer, x[None], starts, self.calls, row.chunk)
        row.steps.append(step)
        row.reset = False
        with torch.no_grad():
            row.now = replayed.after(layer, step, row.now, "rfp", False)
            return replayed.output(layer, step, row.now)[0]

    def train(self, output: Tensor, active: Tensor, begun: list[int]) -> None:
        weight = self.random(*output.shape).masked_fill(~active[..., None], 0)
        self.learner.zero_grad()
        (output * weight.to(self.dtype)).sum().backward()
        self.trained = True
        wanted = {name: torch.zeros_like(p, dtype=F64) for name, p in self.layer.named_parameters()}
        for b, (row, start) in enumerate(zip(self.rows, begun, strict=True)):
            own = weight[active[:, b], b][:, None]
            if len(own):
                for total, part in zip(wanted.values(), self.of_row(row, start, own), strict=True):
                    total += part
        for name, p in self.layer.named_parameters():
            assert p.grad is not None, name
            self.close(p.grad, wanted[name], f"gradient of {name}")

    def of_row(self, row: Row, start: int, weight: Tensor) -> list[Tensor]:
        """The gradients of a loss of a row's last outputs, from its step `start` on."""
        loss = Loss(start, len(row.steps), weight)
        return replayed.gradients(self.layer, row.steps, [loss], self.rule, row.start)[0]

    def go_on_from_now(self) -> None:
        """Every row goes on from its state, without a past."""
        self.position = 0
        for row in self.rows:
            row.start, row.steps, row.chunk, row.reset = row.now, [], 0, False

    # What is read

    def peek(self) -> None:
        x = self.random(len(self.rows), self.layer.fan_in)
        before = fingerprint(self.learner)
        output = self.learner.peek(x.to(self.dtype))
        assert not output.requires_grad
        for b, row in enumerate(copy.deepcopy(self.rows)):
            self.close(output[b], self.take(row, x[b], True, False), "peek")
        assert same(before, fingerprint(self.learner))

    def traces(self) -> None:
        before = fingerprint(self.learner)
        if self.rule == "tbptt":
            with pytest.raises(ValueError, match="learning='tbptt'"):
                self.learner.traces()
        elif self.rule == "rtrl":
            assert all(trace.isfinite().all() for trace in self.learner.traces().values())
        else:
            rule = "rfp" if self.rule == "carry" else self.rule
            for b, row in enumerate(self.rows):
                self.traces_of(b, row, rule)
        assert same(before, fingerprint(self.learner))

    def traces_of(self, b: int, row: Row, rule: str) -> None:
        names, found = list(self.layer._names), self.learner.traces()
        assert list(found) == names
        forgotten = row.reset or not row.steps
        last = None if forgotten else replayed.states(self.layer, row.steps, row.start, rule)[-1]
        leaves = [weight for step in row.steps for weight in step.weights]
        for nu in range(len(self.layer.cell.states)):
            wanted = {
                name: torch.zeros_like(p, dtype=F64)
                for name, p in zip(names, self.layer.weights(), strict=True)
            }
            if last is not None and last[nu].requires_grad:
                given = torch.autograd.grad(last[nu].sum(), leaves, retain_graph=True, allow_unused=True)
                for i, gradient in enumerate(given):
                    if gradient is not None:
                        wanted[names[i % len(names)]] += gradient
            for name, want in wanted.items():
                self.close(found[name][nu, b], want, f"trace of {name}")

    def row_gradients(self) -> None:
        credit = self.random(len(self.rows), self.layer.hidden_size)
        for b, row in enumerate(self.rows):
            outside = self.rule in WHOLE and row.steps and row.steps[-1].chunk != row.chunk
            if row.held and (self.has_readout or outside):
                credit[b] = 0
        before = fingerprint(self.learner)
        try:
            found = self.learner.row_gradients(credit.to(self.dtype))
        except RuntimeError as error:
            late = "come too late" in str(error) and self.rule in WHOLE and self.trained
            unknown = (
                "needs the last step's input" in str(error) and self.has_readout and not self.input_known
            )
            if not late and not unknown:
                raise
            self.count.add("refused gradients of rows")
            return
        assert same(before, fingerprint(self.learner))
        for b, row in enumerate(self.rows):
            wanted = [torch.zeros_like(p, dtype=F64) for p in self.layer.parameters()]
            if row.steps and not row.reset and credit[b].any():
                wanted = self.of_row(row, len(row.steps) - 1, credit[b][None, None])
            for (name, _), want in zip(self.layer.named_parameters(), wanted, strict=True):
                self.close(found[name][b], want, f"row gradient of {name}")

    # What changes the learner

    def reset(self) -> None:
        mask, given = self.flags(len(self.rows), share=0.5)
        every = self.number(3) == 0
        self.learner.reset(*(() if every else (given,)))
        for row, is_reset in zip(self.rows, mask.tolist(), strict=True):
            if every or is_reset:
                row.reset, row.now = True, replayed.zeros(self.layer, 1)

    def change_rows(self, add: bool) -> None:
        count = 1 + self.number(2)
        mask, given = self.flags(len(self.rows), share=0.4)
        before = fingerprint(self.learner)
        try:
            if add:
                self.learner.add_rows(count)
            else:
                self.learner.remove_rows(given)
        except ValueError as error:
            in_middle = self.position and "update_every" in str(error)
            assert in_middle or (not add and mask.all() and re.search(r"\bmask\b", str(error))), error
            assert same(before, fingerprint(self.learner))
            self.count.add("wrong calls refused")
            return
        assert not self.position
        if add:
            zero = replayed.zeros(self.layer, 1)
            self.rows += [Row(zero, zero, held=True) for _ in range(count)]
        else:
            self.rows = [row for row, goes in zip(self.rows, mask.tolist(), strict=True) if not goes]
        assert self.learner.batch_size == len(self.rows)

    def set_state(self) -> None:
        given = [
            self.random(len(self.rows), self.layer.hidden_size).to(self.dtype) for _ in self.layer.cell.states
        ]
        self.learner.state = given[0] if len(given) == 1 and self.number(2) else tuple(given)
        for b, row in enumerate(self.rows):
            row.now = tuple(value[b : b + 1].double() for value in given)
        self.go_on_from_now()

    def change_weights(self) -> None:
        if self.position == 0:
            with torch.no_grad():
                for p in self.layer.parameters():
                    p.mul_(0.9)
            if self.has_readout:
                self.input_known = self.input_known and False  # rows' gradients are those of the new readout
                self.learner._input = None

    def reload(self) -> None:
        self.learner.load_state_dict(copy.deepcopy(self.learner.state_dict()))
        self.input_known = False

    def copied(self) -> None:
        self.learner = copy.deepcopy(self.learner)

    def misuse(self) -> None:
        """A call with a wrong argument, which names it and changes nothing."""
        learner, batch = self.learner, len(self.rows)
        right = torch.zeros(batch, self.layer.fan_in, dtype=self.dtype)
        mask: list[Any] = [
            1,
            "all",
            [True] * batch,
            torch.zeros(batch + 1),
            np.zeros(batch + 1),
            np.array(["a"] * batch),
        ]
        mask += [
            torch.zeros(batch, dtype=torch.complex64),
            torch.zeros(batch, device="meta"),
            np.zeros((batch, 2, 1)),
        ]
        x: list[Any] = [
            None,
            1.0,
            "x",
            right[None, None],
            right[:, :0],
            right.to(F32 if self.dtype == F64 else F64),
        ]
        x += [
            torch.zeros(batch + 1, self.layer.fan_in, dtype=self.dtype),
            right.int(),
            right.to("meta"),
            right.to_sparse(),
        ]
        h = torch.zeros(batch, self.layer.hidden_size, dtype=self.dtype)
        credit: list[Any] = [
            None,
            1,
            h[:, :-1],
            h[None],
            h.to(F32 if self.dtype == F64 else F64),
            h.int(),
            h.tolist(),
        ]
        states = len(self.layer.cell.states)
        state: list[Any] = [
            None,
            1,
            "s",
            (),
            (h,) * (states + 1),
            (h[:, :-1],) * states,
            (h.int(),) * states,
            [1] * states,
        ]
        chunk = right[None].repeat(2, 1, 1)

        def assign(value: Any) -> None:
            learner.state = value

        calls: list[tuple[str, list[Any], Callable[[Any], object]]] = [
            ("x", x, learner.peek),
            ("x", x, learner),
            ("active", mask, lambda m: learner(right, m)),
            ("active", mask, lambda m: learner.chunk(chunk, None, m)),
            ("resets", mask, lambda m: learner.chunk(chunk, m, torch.ones(2, batch))),
            ("mask", mask, learner.reset),
            ("mask", mask, learner.remove_rows),
            ("count", [0, -1, 1.0, True, "1", None], learner.add_rows),
            ("credit", credit, learner.row_gradients),
            ("state", state, assign),
        ]  # fmt: skip
        name, wrong, call = calls[self.number(len(calls))]
        value, before = wrong[self.number(len(wrong))], fingerprint(learner)
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            call(value)
        assert same(before, fingerprint(learner))
        self.count.add("wrong arguments refused")

    def run(self, call: str) -> None:
        if call == "chunk":
            self.advance(1 + self.number(3))
        elif call == "step":
            self.advance(None)
        elif call in ("train", "eval"):
            self.learner.train(call == "train")
        elif call == "end_chunk":
            self.learner.end_chunk()
            self.position = 0
        elif call in ("add_rows", "remove_rows"):
            self.change_rows(call == "add_rows")
        else:
            getattr(self, call)()
        for nu, state in enumerate(self.learner.state):
            self.close(state, torch.cat([row.now[nu] for row in self.rows]), "state")


CALLS = (
    *("step", "step", "step", "chunk", "chunk", "peek", "traces", "row_gradients", "row_gradients", "reset"),
    *("add_rows", "remove_rows", "set_state", "eval", "train", "train", "end_chunk", "change_weights", "reload"),
    *("copied", "misuse", "misuse"),
)  # fmt: skip


def fingerprint(learner: OnlineLearner) -> Any:
    return copy.deepcopy(learner.state_dict())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("rule", RULES)
def test_learners(rule: str, record_property: Callable[[str, object], None]) -> None:
    """Orders of calls."""
    with Count(record_property) as count:

        @cases(8, 300)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            options = dict(data.draw(st.sampled_from(RULES[rule])))
            seed, batch = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([1, 2, 3]))
            dtype = data.draw(st.sampled_from([F64, F64, F32]))
            chunks = options.get("form") == "chunk" or rule in WHOLE
            every = data.draw(st.sampled_from([2, 3] if chunks else [1, 1, 3]))
            torch.manual_seed(seed)
            layer = LAYERS[data.draw(st.sampled_from(list(LAYERS)))](dtype=dtype)
            learning = "rfp" if rule == "carry" else rule
            learner = OnlineLearner(layer, batch, learning=learning, update_every=every, **options)
            zero = replayed.zeros(layer, 1)
            rows = [Row(zero, zero, held=True) for _ in range(batch)]
            tolerance = 1e-9 if dtype == F64 else 3e-4
            case = Case(learner, rule, torch.Generator().manual_seed(seed), count, tolerance, rows)
            calls = data.draw(st.lists(st.sampled_from(CALLS), min_size=4, max_size=14))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for call in calls:
                    case.run(call)
            count.add("cases of learners' calls")

        run()


NAN = float("nan")
LEARNER_OPTIONS: dict[str, list[Any]] = {
    "batch_size": [1, 2, 3, 0, -1, 2.0, True, None],
    "learning": ["rfp", "eprop", "rflo", "snap0", "rtrl", "uoro", "tbptt", "bptt", "x", 1],
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

        @cases(60, 1000)
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
            approximate = rule == "uoro" or (learner._refine not in (0, "exact") and learner.update_every > 1)
            steps: list[Step] = []
            for t in range(2):
                old = [p.detach().clone() for p in layer.parameters()]
                x = torch.randn(learner.batch_size, layer.fan_in, dtype=F64)
                output, weight = learner(x), torch.randn(learner.batch_size, layer.hidden_size, dtype=F64)
                resets = torch.zeros(learner.batch_size, dtype=torch.bool)
                first = t - t % learner.update_every
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

        @cases(60, 1000)
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

        @cases(60, 1000)
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
