"""What an online learner keeps of the past: sensitivities at one time, the base, and the steps since, the window.

A gradient of the loss at any step of the window is carried back to the base, and meets there what is carried
forward (`sensitivity.py`; for Γ, `reference.rfp`, the chunk's formula). Forms differ in when the window is folded
into it:

    step     after every step: folding and the gradient are then one pass over Γ
    chunk    after every chunk, by a rank-C update
    lazy     when it holds R steps, by a rank-R update; till then Γ is only read
    history  never: Γ is zero at the base, the last reset, so there is none

Rules differ in what is carried forward, and in how credit passes back within the window: by each unit's own M,
or by the full Jacobian, which takes the weights that the steps ran with (`Block.weights`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..backends import dispatch as ops
from ..cells.two_point import Matrix
from ..rules import rfp
from .sensitivity import Carried, Nothing
from .tape import Block, Tape


class Record:
    """Steps start + 1 … end, made by one call, and what their backward leaves for the chunk's first call.

    inputs: per-unit inputs that the layer's input drives. linked: credit passes on to the call before it in its chunk,
    whose first call gives the gradients.
    """

    def __init__(self, start: int, block: Block, inputs: int, linked: bool, epoch: object) -> None:
        self.start, self.end = start, start + block.steps
        self.block, self.inputs, self.linked, self.epoch = block, inputs, linked, epoch
        self.credit: Tensor
        self.received = False


FullCredit = Callable[[Block, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Past:
    """What is carried forward, the window, and the gradients they give.

    matrices    all of the layer's
    sensitivity what is carried forward, or None for form "history"
    lag         steps before the current one that a loss may still reach
    rewrite_every  R, steps that no later loss may reach before they are folded: 1 but for form "lazy"
    scan_backend  of the scans, backward and forward (`ops.choose_scan`)
    full_credit credits within steps that carry their weights: (block, delta, carry) → as `bptt.credits`
    filling     True while losses of earlier steps are still due, in the middle of a chunk (or of the steps
                between two updates): nothing is folded or forgotten
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        form: str,
        lag: int,
        sensitivity: Carried | None,
        rewrite_every: int = 1,
        scan_backend: str = "torch",
        full_credit: FullCredit | None = None,
    ) -> None:
        self.matrices, self.form, self.lag, self.rewrite_every = matrices, form, lag, rewrite_every
        self._full_credit = full_credit
        self.scan_backend = scan_backend
        self._scan = functools.partial(ops.reverse_scan, backend=scan_backend)
        self.sensitivity = sensitivity
        self.filling = False
        self.begin(0)

    def begin(self, now: int) -> None:
        """Start an empty window at time `now`; backwards of earlier steps are too late from here on."""
        self.now = self.base = self._episode = now  # _episode: when all rows were reset last
        self._closed = now  # no loss of new steps may reach the steps before this
        self._tape = Tape()
        self._ends: list[int] = []  # of the calls whose steps are in the window
        self._records: list[Record] = []  # those calls, where they may be linked
        self._epoch = object()

    @property
    def nbytes(self) -> int:
        return self._tape.nbytes + (0 if self.sensitivity is None else self.sensitivity.nbytes)

    def add(self, block: Block, inputs: int, linked: bool) -> Record:
        """Put new steps on the window."""
        record = Record(self.now, block, inputs, linked, self._epoch)
        self._tape.append(block)
        self.now = record.end
        if self.sensitivity is not None:
            self._ends.append(record.end)
        if self.form == "chunk":
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
        if all_rows and self.lag == 0:  # nothing to carry over, and no loss left to serve
            if self.sensitivity is not None:
                self.sensitivity.forget_(None)
            self.begin(self.now)
            return
        reach = self.now - self.lag
        if self.sensitivity is None:
            if self.base < self._episode <= reach:
                self._move_base(self._episode)
        else:
            self._closed = max((end for end in self._ends if end <= reach), default=self.base)
            if self._closed - self.base >= self.rewrite_every:
                fold = self.sensitivity.step_ if self.form == "step" else self.sensitivity.chunk_
                for block in self._tape.blocks(self._closed - self.base):
                    fold(block)
                self._move_base(self._closed)
        if forget is not None and self.lag == 0:
            # M is zero there at the next step, but zero times an infinity isn't
            self._tape.forget_(forget)
            if self.sensitivity is not None:
                self.sensitivity.forget_(forget)
            self._epoch = object()

    def gradients(
        self,
        record: Record,
        weights: Sequence[Tensor],
        delta: Tensor,
        arrived: Tensor | None,
        to_input: Callable[[Tensor], Tensor] | None,
        descent: ops.Descent | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """Gradients from one call's steps. May fold them into Γ, where that saves a pass over it.

        delta (S, C, B, N): the loss's gradient with respect to the states; arrived (S, B, N): credit from the
        chunk's later calls. Returns what to_input makes of the gradient of the call's per-unit inputs (J, C, B, N),
        what a linked call passes on (S, B, N), and the weights' gradients: none of them with a descent, of form
        "step", which the weights take once to_input has run.

        Raises RuntimeError if Γ has moved on, so that it can't give this gradient any more.
        """
        self._refuse_if_late(record)
        block, sensitivity = record.block, self.sensitivity

        def for_input(due: Tensor) -> Tensor | None:
            return None if to_input is None else to_input(rfp.input_gradient(block.lin, due, record.inputs))

        if record.end <= self.base:
            assert sensitivity is not None
            due, read = for_input(delta), sensitivity.read(delta[:, 0])
            if descent is not None:
                descent.take_(read)
                return due, None, [None] * len(self.matrices)
            return due, None, read

        alone = record.start == self.base
        if self.form == "step" and alone and record.end <= self.now - self.lag:
            assert sensitivity is not None
            due = for_input(delta if block.steps == 1 else self._credit(block, delta)[0])
            gradients = sensitivity.step_(block, delta, descent)
            self._move_base(record.end)
            return due, None, [None] * len(self.matrices) if gradients is None else gradients

        assert descent is None
        credit, passed = self._credit(block, delta, arrived)
        due = for_input(delta if block.steps == 1 else credit)
        record.received = arrived is not None
        if record.linked:
            record.credit = credit
            return due, passed, [None] * len(self.matrices)

        chain = self._chain(record)
        parts = [(block, credit)]
        if chain or not alone:
            parts, passed = self._over_window(record, chain, credit, passed)
        gradients = self._own_part(parts, weights)
        if self.sensitivity is None:
            return due, None, gradients
        whole_window = self._tape.blocks()
        full = self.now - self.base >= self.rewrite_every and len(whole_window) == 1
        last_due = record.start == self._closed and not self.filling and self.lag == 0
        # a chunk's losses are one sum; else each step between two updates may have a backward of its own
        if full and last_due and (self.form == "chunk" or record.end == self.now):
            from_past = self.sensitivity.chunk_(whole_window[0], passed)
            self._move_base(self.now)
        else:
            from_past = self.sensitivity.read(passed)
        assert from_past is not None
        return due, None, [own.add_(past) for own, past in zip(gradients, from_past, strict=True)]

    def _refuse_if_late(self, record: Record) -> None:
        same = record.epoch is self._epoch
        one_step = record.end - record.start == 1
        carried = self.sensitivity is not None and not isinstance(self.sensitivity, Nothing)
        at_base = carried and one_step and record.end == self.base
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

    def _credit(self, block: Block, delta: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Credits (S, T, B, N) of a block's steps and what they pass on (S, B, N)."""
        if block.weights is None:
            return self._scan(block.m, delta, carry)
        assert self._full_credit is not None
        return self._full_credit(block, delta, carry)

    def _over_window(
        self, record: Record, chain: Sequence[Record], credit: Tensor, passed: Tensor
    ) -> tuple[list[tuple[Block, Tensor]], Tensor]:
        """The window's blocks from the base to the chain's end with their credits, and what passes to the base."""
        start = record.start - self.base
        stop = (chain[-1].end if chain else record.end) - self.base
        whole = credit.new_zeros(credit.shape[0], stop, *credit.shape[2:])
        whole[:, start : record.end - self.base] = credit
        for linked in chain:
            whole[:, linked.start - self.base : linked.end - self.base] = linked.credit
        blocks = self._tape.blocks(stop)
        end = stop
        for block in reversed(blocks):
            begin = end - block.steps
            before = min(end, start)  # steps of this block before the record's
            if begin < before:
                part = block if before == end else block.narrow(0, before - begin)
                whole[:, begin:before], passed = self._credit(part, whole[:, begin:before], passed)
            end = begin
        credits = whole.split([block.steps for block in blocks], dim=1)
        return list(zip(blocks, credits, strict=True)), passed

    def _own_part(self, parts: Sequence[tuple[Block, Tensor]], weights: Sequence[Tensor]) -> list[Tensor]:
        """The window's own part of the gradients."""
        total: list[Tensor] | None = None
        for block, credit in parts:
            part = rfp.weight_gradients(block.lin, self.matrices, weights, credit, block.inputs)
            total = part if total is None else [a.add_(b) for a, b in zip(total, part, strict=True)]
        assert total is not None
        return total

    def _move_base(self, end: int) -> None:
        """Γ is that of time `end` now: drop the steps before it from the window."""
        self._tape.drop_first(end - self.base)
        self.base = end
        self._ends = [e for e in self._ends if e > end]
        self._records = [r for r in self._records if r.start >= end]

    def state_dict(self) -> dict[str, Any]:
        """Γ and the window, as tensors, numbers and lists; shared, not copied."""
        return {
            "now": self.now,
            "base": self.base,
            "episode": self._episode,
            "ends": list(self._ends),
            "filling": self.filling,
            "gamma": [] if self.sensitivity is None else self.sensitivity.tensors(),
            "window": [block.to_dict() for block in self._tape.blocks()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state whose Γ has the shapes of this one's."""
        window = [Block.from_dict(saved).map(Tensor.clone) for saved in state["window"]]
        if self.sensitivity is not None:
            self.sensitivity.load_(state["gamma"])
        self.begin(state["now"])
        self.base, self._ends, self.filling = state["base"], list(state["ends"]), state["filling"]
        self._episode = state["episode"]
        for block in window:
            self._tape.append(block)
