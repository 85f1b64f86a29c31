"""What an online learner keeps of the past: Γ at one time, the base, and the steps since, the window.

A gradient of the loss at any step of the window is carried back to the base by the per-unit scan, and meets Γ
there (`reference.rfp`, the chunk's formula). Forms differ in when the window is folded into Γ:

    step     after every step: folding and the gradient are then one pass over Γ
    chunk    after every chunk, by a rank-C update
    history  never: Γ is zero at the base, the last reset, so there is none
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._tape import Block, Recorded, Tape
from .cells import Matrix
from .reference import rfp
from .sensitivity import Sensitivity


class Record:
    """Steps start + 1 … end, made by one call, and what their backward leaves for the chunk's first call.

    linked: credit passes on to the call before it in its chunk, whose first call gives the gradients.
    """

    def __init__(self, start: int, recorded: Recorded, linked: bool, epoch: object) -> None:
        self.start, self.end = start, start + recorded.steps
        self.recorded, self.linked, self.epoch = recorded, linked, epoch
        self.credit: Tensor
        self.received = False


class Past:
    """Γ, the window, and the gradients they give.

    matrices    all of the layer's
    sensitivity Γ, or None for form "history"
    lag         steps before the current one that a loss may still reach
    scan_backend  of the reverse scan (`ops.choose_scan`)
    filling     True while losses of earlier steps are still due, in the middle of a chunk (or of the steps
                between two updates): nothing is folded or forgotten
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        form: str,
        lag: int,
        sensitivity: Sensitivity | None,
        scan_backend: str = "torch",
    ) -> None:
        self.matrices, self.form, self.lag = matrices, form, lag
        self._scan = functools.partial(ops.reverse_scan, backend=scan_backend)
        self.sensitivity = sensitivity
        self.filling = False
        self.begin(0)

    def begin(self, now: int) -> None:
        """Start an empty window at time `now`; backwards of earlier steps are too late from here on."""
        self.now = self.base = self._episode = now  # _episode: when all rows were reset last
        self._tape = Tape()
        self._ends: list[int] = []  # of the calls whose steps are in the window
        self._records: list[Record] = []  # those calls, unless they came from a checkpoint
        self._epoch = object()

    @property
    def nbytes(self) -> int:
        return self._tape.nbytes + (0 if self.sensitivity is None else self.sensitivity.nbytes)

    def add(self, recorded: Recorded, linked: bool) -> Record:
        """Put new steps on the window."""
        record = Record(self.now, recorded, linked, self._epoch)
        self._tape.append(recorded)
        self.now = record.end
        if self.sensitivity is not None:
            self._ends.append(record.end)
            self._records.append(record)
        return record

    def make_room(self, forget: Tensor | None, all_rows: bool) -> None:
        """Before new steps: fold into Γ what no later loss may reach.

        forget (B,) bool or None: rows that the next step resets; all_rows: known to be all of them.
        """
        if all_rows:
            self._episode = self.now
        if self.filling:
            return
        if self.sensitivity is None:
            if self.base < self._episode <= self.now - self.lag:
                self._move_base(self._episode)
            return
        if all_rows and self.lag == 0:  # nothing to carry over, and no loss left to serve
            self.sensitivity.forget_(None)
            self.begin(self.now)
            return
        foldable = [end for end in self._ends if end <= self.now - self.lag]
        if foldable:
            block = self._window(foldable[-1])
            fold = self.sensitivity.step_ if self.form == "step" else self.sensitivity.chunk_
            fold(block.lin, block.m, block.inputs)
            self._move_base(foldable[-1])
        if forget is not None and not self._ends:
            # M is zero there at the next step, but zero times an infinity isn't
            self.sensitivity.forget_(forget)

    def gradients(
        self,
        record: Record,
        weights: Sequence[Tensor],
        delta: Tensor,
        arrived: Tensor | None,
        needs_input: bool,
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Gradients from one call's steps. May fold them into Γ, where that saves a pass over it.

        delta (S, C, B, N): the loss's gradient with respect to the states; arrived (S, B, N): credit from the
        chunk's later calls. Returns the gradient of the call's per-unit inputs (J, C, B, N) if needs_input,
        what a linked call passes on (S, B, N), and the weights' gradients.

        Raises RuntimeError if Γ has moved on, so that it can't give this gradient any more.
        """
        self._refuse_if_late(record)
        recorded, sensitivity = record.recorded, self.sensitivity

        def for_input(due: Tensor) -> Tensor | None:
            lin = recorded.block.lin
            return rfp.input_gradient(lin, due, len(recorded.cell.inputs)) if needs_input else None

        if record.end <= self.base:
            assert sensitivity is not None
            return for_input(delta), None, sensitivity.read(delta[:, 0])

        alone = record.start == self.base
        if self.form == "step" and alone and record.end <= self.now - self.lag:
            assert sensitivity is not None
            one_step = recorded.steps == 1
            due: Tensor | None
            if one_step and recorded.trajectory.resets is None and sensitivity.learns_in_one_call:
                gradients, due = sensitivity.learn_step_(recorded, delta)
            else:
                block = recorded.block
                due = for_input(delta if one_step else self._scan(block.m, delta)[0])
                stepped = sensitivity.step_(block.lin, block.m, block.inputs, delta)
                assert stepped is not None
                gradients = stepped
            self._move_base(record.end)
            return due, None, gradients

        block = recorded.block
        credit, passed = self._scan(block.m, delta, arrived)
        due = for_input(delta if recorded.steps == 1 else credit)
        record.received = arrived is not None
        if record.linked:
            record.credit = credit
            return due, passed, [None] * len(self.matrices)

        chain = self._chain(record)
        if chain or not alone:
            block, credit, passed = self._with_window(record, chain, credit, passed)
        gradients = rfp.weight_gradients(block.lin, self.matrices, weights, credit, block.inputs)
        if self.sensitivity is None:
            return due, None, gradients
        if self.form == "chunk" and alone and not self.filling and self.lag == 0:
            window = self._window(self.now)
            from_past = self.sensitivity.chunk_(window.lin, window.m, window.inputs, passed)
            self._move_base(self.now)
        else:
            from_past = self.sensitivity.read(passed)
        assert from_past is not None
        return due, None, [own.add_(past) for own, past in zip(gradients, from_past, strict=True)]

    def _refuse_if_late(self, record: Record) -> None:
        same = record.epoch is self._epoch
        one_step = record.end - record.start == 1
        at_base = self.sensitivity is not None and one_step and record.end == self.base
        if same and (record.start >= self.base or at_base):
            return
        steps = f"step {record.end}" if one_step else f"steps {record.start + 1} to {record.end}"
        moved = f"Γ is that of step {self.base} now" if same else "their past was reset or replaced"
        before = "the chunk after it begins" if self.form == "chunk" else f"step {record.end + self.lag + 1}"
        raise RuntimeError(
            f"backward of {steps} comes too late: {moved}. With form={self.form!r} and lag={self.lag}, call "
            f"backward() once, on the sum of the losses, before {before}"
        )

    def _chain(self, root: Record) -> list[Record]:
        """The linked calls after `root` whose credit reached it in this backward."""
        chain: list[Record] = []
        if root in self._records:
            last = root
            for record in self._records[self._records.index(root) + 1 :]:
                if not (record.linked and last.received):
                    break
                chain.append(record)
                last = record
        return chain

    def _with_window(
        self, record: Record, chain: Sequence[Record], credit: Tensor, passed: Tensor
    ) -> tuple[Block, Tensor, Tensor]:
        """The window from the base to the chain's end, its credits, and what they pass to the base."""
        start = record.start - self.base
        window = self._window(chain[-1].end if chain else record.end)
        whole = torch.zeros_like(window.lin.before)
        whole[:, start : record.end - self.base] = credit
        for linked in chain:
            whole[:, linked.start - self.base : linked.end - self.base] = linked.credit
        if start:
            earlier, passed = self._scan(window.m[:, :, :start], whole[:, :start], passed)
            whole[:, :start] = earlier
        return window, whole, passed

    def _window(self, end: int) -> Block:
        """The window's steps up to time `end`."""
        block = self._tape.joined()
        assert block is not None
        return block.narrow(0, end - self.base) if end < self.now else block

    def _move_base(self, end: int) -> None:
        """Γ is that of time `end` now: drop the steps before it from the window."""
        self._tape.drop_first(end - self.base)
        self.base = end
        self._ends = [e for e in self._ends if e > end]
        self._records = [r for r in self._records if r.start >= end]

    def state_dict(self) -> dict[str, Any]:
        """Γ and the window, as tensors, numbers and lists; shared, not copied."""
        window = self._tape.joined()
        return {
            "now": self.now,
            "base": self.base,
            "episode": self._episode,
            "ends": list(self._ends),
            "filling": self.filling,
            "gamma": [] if self.sensitivity is None else self.sensitivity.tensors(),
            "window": None if window is None else window.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state whose Γ has the shapes of this one's."""
        window = None if state["window"] is None else Block.from_dict(state["window"]).map(Tensor.clone)
        if self.sensitivity is not None:
            for target, source in zip(self.sensitivity.tensors(), state["gamma"], strict=True):
                target.copy_(source)
        self.begin(state["now"])
        self.base, self._ends, self.filling = state["base"], list(state["ends"]), state["filling"]
        self._episode = state["episode"]
        if window is not None:
            self._tape.append(window)
