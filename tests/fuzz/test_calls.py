"""Orders of calls on learners: what isn't refused is right, and what is refused changes nothing.

Each case makes a learner and calls it in an order that is drawn: steps and chunks in several modes, backward() early,
late, twice and together, resets, changes of weights, checkpoints, copies, and calls with wrong arguments. The steps that
take effect are noted and replayed in float64 (`replayed`), which gives every gradient once more.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import replayed
import torch
from fuzzing import Count, cases, no_warnings
from hypothesis import given
from hypothesis import strategies as st
from replayed import F64, Loss, Step
from states import fingerprint, same
from torch import Tensor

from rjepa_triton import CTRNN, ELSTM, GRU, LRU, LSTM, RGC, RNN, IndRNN, OnlineLearner, TimeDecay, TwoPointRNN

F32, BF16 = torch.float32, torch.bfloat16

LAYERS: dict[str, Callable[..., TwoPointRNN]] = {
    "rgc": lambda **o: RGC(4, init="uniform", **o),
    "rgc-input-heads": lambda **o: RGC(4, input_size=3, init="uniform", heads=2, **o),
    "rgc-diagonal": lambda **o: RGC(5, input_size=2, init="uniform", recurrence="diagonal", **o),
    "rnn": lambda **o: RNN(3, 5, **o),
    "rnn-relu-no-bias": lambda **o: RNN(2, 4, "relu", bias=False, **o),
    "indrnn": lambda **o: IndRNN(3, 4, "tanh", **o),
    "ctrnn": lambda **o: CTRNN(3, 4, 0.4, **o),
    "lstm": lambda **o: LSTM(3, 4, **o),
    "lstm-heads": lambda **o: LSTM(1, 6, heads=3, **o),
    "gru": lambda **o: GRU(3, 5, **o),
    "gru-no-bias": lambda **o: GRU(2, 3, bias=False, **o),
    "elstm": lambda **o: ELSTM(3, 4, **o),
    "time-decay": lambda **o: TimeDecay(3, 4, **o),
    "lru": lambda **o: LRU(3, 4, **o),
    "rtu": lambda **o: LRU(2, 3, nonlinearity="tanh", **o),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "step": {"form": "step"},
    "lazy": {"form": "lazy"},
    "chunk": {"form": "chunk"},
    "history": {"form": "history"},
    "auto": {"form": "auto"},
    "carry": {"credit": "carry"},
    "refined": {"refine": "exact"},
    "rtrl": {"learning": "rtrl"},
    "uoro": {"learning": "uoro"},
    "tbptt": {"learning": "tbptt"},
    "lr": {"form": "step", "lr": 0.05},
    "lag": {"lag": 1},
}
CALLS = (
    *(
        "step",
        "step",
        "step",
        "step",
        "step",
        "step to train",
        "step to train",
        "chunk",
        "chunk",
        "train",
        "train",
    ),
    *(
        "train all",
        "train late",
        "train twice",
        "reset",
        "reset rows",
        "change",
        "save",
        "load",
        "load elsewhere",
    ),
    *("copy", "pickle", "fork", "misuse"),
)
MODES = ("plain", "plain", "plain", "plain", "no_grad", "inference", "autocast")


@dataclass(eq=False)
class Made:
    """One call of step() or chunk(): its output, and what its backward pass must find."""

    output: Tensor
    x: Tensor
    start: int
    stop: int
    last: int = 0  # of the calls so far
    alive: bool = True  # whether the learner still has the past that it belongs to
    used: bool = False
    current: bool = True  # whether the weights are still those of its steps


@dataclass
class Case:
    learner: OnlineLearner
    rule: str
    generator: torch.Generator
    count: Count
    tolerance: float
    options: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    pending: Tensor = field(default_factory=lambda: torch.zeros(0))  # rows to reset before the next step
    position: int = 0
    chunk: int = 0  # the step with which the chunk that runs began
    group: list[Made] = field(default_factory=list)  # calls since the last change of the weights was due
    saved: tuple[Any, ...] | None = None
    changed: bool = False  # whether the weights changed in the middle of a chunk
    goes_on: bool = False  # whether the chunk goes on from a copy or a checkpoint, with any weights
    calls: int = 0

    @property
    def layer(self) -> TwoPointRNN:
        return self.learner.layer

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=self.generator)

    def number(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))

    # Steps

    def advance(self, mode: str, steps: int | None, trained: bool = False) -> None:
        """One step, or a chunk of so many steps."""
        layer, batch = self.layer, self.learner.batch_size
        dtype = layer.weights()[0].dtype
        x = self.random(steps or 1, batch, layer.fan_in).to(dtype)
        x = x if steps else x[0]
        x.requires_grad_(self.number(3) == 0)
        resets = None
        if steps and self.number(2):
            resets = torch.rand(steps, batch, generator=self.generator) < 0.25
        refused = self.changed and steps is None and self.learner.form == "chunk"
        before = fingerprint(self.learner) if refused else None
        try:
            with in_mode(mode):
                output = self.learner.step(x) if steps is None else self.learner.chunk(x, resets)
        except ValueError as error:
            if not refused or "weights changed inside a chunk" not in str(error):
                raise
            assert same(before, fingerprint(self.learner))
            self.count.add("refused steps")
            return
        assert not refused
        self.changed = self.goes_on = False
        if steps is not None or self.position == 0 or self.learner.form == "step":
            self.chunk, self.group = len(self.steps), []
        start = len(self.steps)
        if resets is None:
            resets = torch.zeros(steps or 1, batch, dtype=torch.bool)
        resets = resets.clone()
        resets[0] |= self.pending
        self.pending = torch.zeros(batch, dtype=torch.bool)
        for row, marks in zip(x if steps else x[None], resets, strict=True):
            self.steps.append(replayed.step_of(layer, row, marks, self.calls, self.chunk))
        self.position = (
            0 if steps or self.learner.form == "step" else (self.position + 1) % self.learner.update_every
        )
        made = Made(output, x, start, len(self.steps), self.calls)
        self.calls += 1
        self.made.append(made)
        self.group.append(made)
        self.count.add("steps", steps or 1)
        assert output.shape == (*x.shape[:-1], layer.hidden_size)
        if trained and output.requires_grad and self.legal(made):
            self.train([made])

    # Backward passes

    def legal(self, made: Made) -> bool:
        """Whether the class's docstring promises that this call's backward may run now."""
        if not (made.alive and made.current and made.output.requires_grad) or made.used:
            return False
        lag = self.options.get("lag", 0)
        latest = self.made[-1]
        if made is latest:
            return True
        if lag and made.last == self.calls - 2:
            return made.stop - made.start == 1 and latest.stop - latest.start == 1
        return False

    def train(self, which: list[Made], twice: bool = False) -> None:
        """The backward pass of losses of these calls together."""
        which = [made for made in which if made.output.requires_grad]
        if not which:
            return
        promised = (len(which) == 1 and self.legal(which[0])) or which == self.promised_together()
        weights = [self.random(*made.output.shape) for made in which]
        loss = torch.stack(
            [(made.output * w.to(made.output.dtype)).sum() for made, w in zip(which, weights, strict=True)]
        ).sum()
        for p in self.layer.parameters():
            p.grad = None
        for made in which:
            if made.x.is_leaf:
                made.x.grad = None
        before = fingerprint(self.learner)
        start = [p.detach().clone() for p in self.layer.parameters()]
        try:
            with in_mode("autocast") if self.number(8) == 0 else contextlib.nullcontext():
                loss.backward(retain_graph=twice)
        except RuntimeError as error:
            if promised or not any(each in str(error) for each in REFUSALS):
                raise
            if len(which) == 1:
                assert same(before, fingerprint(self.learner))
            self.count.add("refused backward passes")
            for made in which:
                made.used = True
            return
        for made in which:
            made.used = True  # a second backward pass may be refused
        alive = [made.alive for made in which]
        assert all(alive), "the backward pass of a learner that has been replaced ran"
        losses = [
            Loss(made.start, made.stop, w if w.dim() == 3 else w[None])
            for made, w in zip(which, weights, strict=True)
        ]
        want, of_inputs = self.wanted(losses)
        got = []
        lr = self.learner.lr
        if lr is not None:
            self.outdated()
        own = set(self.layer._names)
        for (name, p), old in zip(self.layer.named_parameters(), start, strict=True):
            if lr is not None and name in own:
                assert p.grad is None
                got.append((old - p.detach()) / lr)
            else:
                got.append(torch.zeros_like(p) if p.grad is None else p.grad)
        self.close(got, want, "weights")
        for made, gradient in zip(which, of_inputs, strict=True):
            if made.x.requires_grad:
                wanted = torch.stack(gradient) if made.x.dim() == 3 else gradient[0]
                self.close([made.x.grad], [wanted], "input")
        self.count.add("gradients compared", len(got) + len(which))

    def promised_together(self) -> list[Made] | None:
        """The calls whose losses may be summed now: all steps between two updates, after the last of them."""
        if self.learner.form == "step" or self.position or len(self.group) < 2:
            return None
        if any(
            made.used or not (made.alive and made.current and made.output.requires_grad)
            for made in self.group
        ):
            return None
        return self.group if self.group[-1] is self.made[-1] else None

    def wanted(self, losses: list[Loss]) -> tuple[list[Tensor], list[list[Tensor]]]:
        if self.rule == "uoro":
            return self.repeated(losses)
        return replayed.gradients(self.layer, self.steps, losses, self.rule)

    def repeated(self, losses: list[Loss]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """As a new learner finds them, which takes the same steps and nothing else."""
        layer = copy.deepcopy(self.layer)
        total: list[Tensor] | None = None
        of_inputs = []
        for loss in losses:
            layer.zero_grad()
            learner = OnlineLearner(layer, self.learner.batch_size, **self.options)
            t = 0
            while t < loss.stop:
                stop = t + 1
                while stop < len(self.steps) and self.steps[stop].call == self.steps[t].call:
                    stop += 1
                taken = self.steps[t:stop]
                with torch.no_grad():
                    outside = [p for name, p in layer.named_parameters() if name not in layer._names]
                    for p, value in zip(
                        (*layer.weights(), *outside), (*taken[0].weights, *taken[0].readout), strict=True
                    ):
                        p.copy_(value)
                dtype = layer.weights()[0].dtype
                x = torch.stack([step.x.detach() for step in taken]).to(dtype).requires_grad_()
                output = learner.chunk(x, torch.stack([step.resets for step in taken]))
                if stop == loss.stop:
                    (output * loss.weight.to(dtype)).sum().backward()
                    assert x.grad is not None
                    of_inputs.append(list(x.grad.double()))
                t = stop
            found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        return total, of_inputs

    def close(self, got: list[Any], want: list[Tensor], what: str) -> None:
        """The difference is measured against the largest of the gradients: each is a sum, rounded as such."""
        scale = max(1.0, max(float(w.abs().max()) for w in want if w.numel()))
        for g, w in zip(got, want, strict=True):
            assert g is not None, what
            gap = float((g.double() - w.double()).abs().max()) / scale
            assert gap < self.tolerance, f"{what}: off by {gap:.1e}"

    # What else may be called

    def reset(self, rows: bool) -> None:
        batch = self.learner.batch_size
        mask = torch.rand(batch, generator=self.generator) < 0.5 if rows else None
        if (
            self.rule == "uoro" and mask is None
        ):  # reset() drops the last step and its signs, which are not drawn then
            mask = torch.ones(batch, dtype=torch.bool)
        self.learner.reset(mask)
        self.pending = self.pending | (torch.ones(batch, dtype=torch.bool) if mask is None else mask)

    def change(self) -> None:
        """Other weights, as an optimizer makes them."""
        with torch.no_grad():
            for p in self.layer.parameters():
                p.mul_(0.9)
        self.outdated()
        if self.position and self.learner.form == "chunk" and not self.goes_on:
            self.changed = True

    def outdated(self) -> None:
        for made in self.made:
            made.current = False

    def save(self) -> None:
        state = copy.deepcopy(self.learner.state_dict())
        if self.number(2):
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.saved = (state, list(self.steps), self.pending, self.position, self.chunk)

    def load(self, elsewhere: bool) -> None:
        if self.saved is None:
            return
        state, steps, self.pending, self.position, self.chunk = self.saved
        self.steps = list(steps)
        for made in self.made:  # their past is replaced
            made.alive = False
        self.group, self.changed, self.goes_on = [], False, True
        if elsewhere:
            self.learner = OnlineLearner(self.layer, self.learner.batch_size, **self.options)
            self.made = []
        self.learner.load_state_dict(state)

    def copied(self, by_pickle: bool) -> None:
        if by_pickle:
            self.learner = pickle.loads(pickle.dumps(self.learner))
        else:
            self.learner = copy.deepcopy(self.learner)
        self.made, self.group, self.changed, self.goes_on = (
            [],
            [],
            False,
            True,
        )  # what ran before is the other's

    def fork(self) -> None:
        """A copy that goes its own way, and the learner, which doesn't notice."""
        before = fingerprint(self.learner)
        other = copy.deepcopy(self.learner)
        assert same(before, fingerprint(other))
        x = self.random(self.learner.batch_size, self.layer.fan_in).to(self.layer.weights()[0].dtype)
        other.step(x).sum().backward()
        other.reset()
        assert same(before, fingerprint(self.learner))

    def misuse(self) -> None:
        """A call with a wrong argument, which names it and changes nothing."""
        batch, features = self.learner.batch_size, self.layer.fan_in
        dtype = self.layer.weights()[0].dtype
        right = torch.zeros(batch, features, dtype=dtype)
        wrong_x: list[Any] = [
            None, 1.0, [1.0], "x", right.tolist(), right[:, :0], right[:0], right[None], right[..., None, None],
            right.to(F32 if dtype == F64 else F64), right.to(torch.int64), right.to("meta"), right.to_sparse(),
            torch.zeros(batch + 1, features, dtype=dtype), torch.zeros(batch, features + 1, dtype=dtype),
            right.to(torch.complex64),
        ]  # fmt: skip
        wrong_mask: list[Any] = [
            True, 1, [True] * batch, torch.zeros(batch), torch.zeros(batch + 1, dtype=torch.bool),
            torch.zeros(batch + 1, 1, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool, device="meta"), "all",
            torch.zeros((), dtype=torch.bool), torch.zeros(batch, dtype=torch.bool).to_sparse(),
        ]  # fmt: skip
        wrong_state: list[Any] = [None, 1, {}, [], {"state": right}, {**self.learner.state_dict(), "now": -1}]
        learner = self.learner
        kind = self.number(5)
        calls: tuple[Callable[[], object], str]
        if kind == 0:
            x = wrong_x[self.number(len(wrong_x))]
            calls = (lambda: learner.step(x), "x")
        elif kind == 1:
            x = wrong_x[self.number(len(wrong_x))]
            x = x[None] if isinstance(x, Tensor) and x.layout is torch.strided and x.dim() != 3 else x
            x = (
                right[None, :0]
                if isinstance(x, Tensor)
                and x.shape == (1, batch, features)
                and x.dtype == dtype
                and not x.is_meta
                else x
            )
            calls = (lambda: learner.chunk(x), "x")
        elif kind == 2:
            mask = wrong_mask[self.number(len(wrong_mask))]
            if isinstance(mask, Tensor) and mask.dtype == torch.float32:  # numbers are flags to reset()
                mask = mask.to(torch.complex64)
            calls = (lambda: learner.reset(mask), "mask")
        elif kind == 3:
            mask = wrong_mask[self.number(len(wrong_mask))]
            calls = (lambda: learner.chunk(right[None], mask), "resets")
        else:
            state = wrong_state[self.number(len(wrong_state))]
            calls = (lambda: learner.load_state_dict(state), "state")
        call, name = calls
        before = fingerprint(learner)
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            call()
        assert same(before, fingerprint(learner))
        self.count.add("wrong arguments refused")

    def run(self, call: str, mode: str) -> None:
        if call in ("step", "step to train"):
            self.advance(mode, None, call == "step to train")
        elif call == "chunk":
            self.advance(mode, 1 + self.number(4))
        elif call == "train" and self.made:
            self.train([self.made[-1]])
        elif call == "train twice" and self.made:
            self.train([self.made[-1]], twice=True)
            self.train([self.made[-1]])
        elif call == "train all" and self.group:
            self.train(list(self.group))
        elif call == "train late" and self.made:
            self.train([self.made[self.number(len(self.made))]])
        elif call in ("reset", "reset rows"):
            self.reset(call == "reset rows")
        elif call == "change":
            self.change()
        elif call == "save":
            self.save()
        elif call in ("load", "load elsewhere"):
            self.load(call == "load elsewhere")
        elif call in ("copy", "pickle"):
            self.copied(call == "pickle")
        elif call == "fork":
            self.fork()
        elif call == "misuse":
            self.misuse()

    def finish(self) -> None:
        """The outputs of all steps that took effect, and the state."""
        if not self.steps:
            return
        outputs, state = replayed.trajectory(self.layer, self.steps)
        state = tuple(torch.where(self.pending[:, None], torch.zeros_like(c), c) for c in state)
        self.close(list(self.learner.state), list(state), "state")
        if all(made.alive for made in self.made):
            for made in self.made:
                wanted = torch.stack(outputs[made.start : made.stop]).reshape(made.output.shape)
                self.close([made.output.detach()], [wanted], "output")
        assert self.learner._past.now >= 0


# How torch and the learner refuse a backward pass.
REFUSALS = (
    "comes too late", "a second time", "modified by an inplace operation",
)  # fmt: skip


@contextlib.contextmanager
def in_mode(mode: str) -> Any:
    entered: Any = {
        "plain": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", BF16),
    }[mode]()
    with entered:
        yield


def begun(options: str, data: st.DataObject, count: Count) -> Case:
    """A learner of drawn sizes, dtypes and options."""
    layer_name = data.draw(st.sampled_from(list(LAYERS)))
    seed = data.draw(st.integers(0, 2**31))
    dtype = data.draw(st.sampled_from([F64, F64, F32]))
    batch = data.draw(st.sampled_from([1, 2, 3]))
    chosen = dict(OPTIONS[options])
    fixed = chosen.get("learning") or ("rfp" if chosen.get("credit") or chosen.get("refine") else None)
    rule = fixed or data.draw(st.sampled_from(["rfp", "rfp", "eprop", "rflo", "snap0"]))
    chosen["learning"] = rule
    every = (
        1
        if options in ("step", "lr")
        else data.draw(st.sampled_from([2, 3, 4] if options == "chunk" else [1, 2, 4]))
    )
    chosen["update_every"] = every
    if options == "lazy":
        chosen["rewrite_every"] = data.draw(st.sampled_from([1, 2, 3, 5]))
    if options == "lag":
        chosen["form"] = data.draw(st.sampled_from(["step", "lazy", "history", "auto"]))
    if options in ("step", "lr", "chunk", "lazy"):
        chosen["backend"] = data.draw(st.sampled_from(["auto", "torch"]))
    if options == "uoro":
        chosen["seed"] = 3
    tolerance = 1e-9 if dtype == F64 else 2e-4
    if (
        options in ("step", "lazy", "chunk")
        and chosen["backend"] == "torch"
        and data.draw(st.integers(0, 3)) == 0
    ):
        chosen["gamma_dtype"], tolerance = BF16, 0.05
    torch.manual_seed(seed)
    layer = LAYERS[layer_name](dtype=dtype)
    learner = OnlineLearner(layer, batch, **chosen)
    reference = "carry" if chosen.get("credit") or chosen.get("refine") else rule
    return Case(
        learner,
        reference,
        torch.Generator().manual_seed(seed),
        count,
        tolerance,
        chosen,
        pending=torch.zeros(batch, dtype=torch.bool),
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_orders_of_calls(options: str, record_property: Callable[[str, object], None]) -> None:
    with Count(record_property) as count:

        @cases(40, 1700)
        @given(st.data())
        def run(data: st.DataObject) -> None:
            case = begun(options, data, count)
            calls = data.draw(
                st.lists(st.tuples(st.sampled_from(CALLS), st.sampled_from(MODES)), min_size=6, max_size=24)
            )
            with no_warnings():
                for call, mode in calls:
                    case.run(call, mode)
            case.finish()
            count.add("cases of call orders")

        run()
