"""What one who knows torch.nn calls of a learner, with right and wrong arguments: the float64 oracle's value, or an error
that names the argument.

Learners are called in orders that are drawn: steps and chunks with masks, peek, traces, gradients of rows, rows that come
and go, states that are set, resets by flags of any kind, eval mode. Each batch row keeps the steps that it took, and
`replayed` gives its state, outputs and gradients once more.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import replayed
import torch
from fuzzing import Count, cases, no_warnings
from hypothesis import given
from hypothesis import strategies as st
from replayed import F64, Loss, Step
from small_layers import LAYERS
from states import fingerprint, same
from torch import Tensor

from rjepa_triton import ELSTM, LRU, OnlineLearner, TwoPointRNN

F32, BF16 = torch.float32, torch.bfloat16
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
                self.input_known = False  # rows' gradients are those of the new readout
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


@pytest.mark.parametrize("rule", RULES)
def test_learners(rule: str, record_property: Callable[[str, object], None]) -> None:
    """Orders of calls."""
    with Count(record_property) as count:

        @cases(8, 6_000)
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
            with no_warnings():
                for call in calls:
                    case.run(call)
            count.add("cases of learners' calls")

        run()
