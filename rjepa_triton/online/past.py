"""What an online learner keeps of the past: sensitivities as of one time, the base, and all steps since, the window.

The gradient of a loss at some step of the window consists of two parts. Credit goes back from the loss to the base,
which gives the part of the window's own steps; at the base it meets the sensitivities, which gives the part of all
steps before (`sensitivity.py`; for Γ, the formula of the chunk form in `rules.rfp`). The forms differ in when the
window's steps are folded into the sensitivities, which moves the base:

    step     after every step: folding and the gradient are then one pass over Γ
    chunk    after every chunk of C steps, by one rank-C update
    lazy     when the window holds R steps, by one rank-R update; until then Γ is only read
    history  never: the base is the last reset, where Γ is zero, so that no Γ is kept

The rules differ in what is carried forward, and in how credit passes back within the window: through each unit's own
S×S block M of the Jacobian, or through the full Jacobian, which needs the weights that the steps ran with
(`Block.weights`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..backend import operations
from ..backend.descent import Descent
from ..cells.two_point import Cell, Matrix
from ..rules import refine as refinement
from ..rules import rfp
from .checkpoint import owned
from .sensitivity import NoSensitivity, Sensitivity
from .tape import Block, Tape


class Record:
    """The steps start + 1 … end that one call of step() or chunk() has run.

    block            the steps, linearized
    inputs           how many of the cell's per-unit inputs the layer's input drives
    continues_chunk  in form "chunk": an earlier call of the same chunk gives the gradients, and takes this one's credit
    epoch            of the past when the steps were added (`Past`)
    credit, received_credit   what the backward pass of this call leaves for that of the chunk's first call: credits
                     (S, C, B, N), and whether the chunk's later calls had passed any on
    """

    def __init__(self, start: int, block: Block, inputs: int, continues_chunk: bool, epoch: object) -> None:
        self.start, self.end = start, start + block.steps
        self.block, self.inputs, self.continues_chunk, self.epoch = block, inputs, continues_chunk, epoch
        self.credit: Tensor
        self.received_credit = False


# Credits of a block's steps (S, T, B, N) and what they pass to the state before (S, B, N), from the block, the loss's
# gradient (S, T, B, N), and the credit that later steps pass back (S, B, N) or None; as `bptt.credits`.
FullCredit = Callable[[Block, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def full_credit(cell: Cell, rounds: int | None, backend: str) -> FullCredit:
    """Credits through the full Jacobian, for blocks that carry the weights of their steps.

    rounds: 0 for the exact sequential backward pass; else rounds of refinement, None for as many as it takes.
    backend: of the scans, as `operations.choose_scan` returns it.
    """

    return functools.partial(_credits, cell, rounds, backend)


def _credits(
    cell: Cell, rounds: int | None, backend: str, block: Block, delta: Tensor, carry: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert block.weights is not None
    if rounds == 0:
        return operations.exact_credits(cell, block.lin, block.weights, delta, carry, backend=backend)
    return refinement.credits(
        block.lin,
        block.m,
        cell.matrices,
        block.weights,
        delta,
        carry,
        rounds=rounds,
        scan=functools.partial(operations.reverse_scan, backend=backend),
    )


class _Advancing:
    """The sensitivities of `past`, for a change that is either whole, or has not begun, or is told from then on.

    A class, since a generator of contextlib would take longer, in each step.
    """

    __slots__ = ("_past", "_sensitivity", "_version")

    def __init__(self, past: Past) -> None:
        assert past.sensitivity is not None
        self._past, self._sensitivity = past, past.sensitivity
        self._version = past.sensitivity.version()

    def __enter__(self) -> Sensitivity:
        return self._sensitivity

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if error is not None and self._sensitivity.version() != self._version:
            self._past.broken = f"{type(error).__name__}: {error}".rstrip(": ")


class Past:
    """Sensitivities at the base, the window of steps since, and the gradients that they give.

    matrices       all matrices of the layer
    sensitivity    what is carried forward; None for form "history"
    lag            how many steps before the current one a loss may still reach
    rewrite_every  R: steps are folded once there are R that no later loss may reach; 1 but for form "lazy"
    scan_backend   of the scans over time (`operations.choose_scan`)
    full_credit    credits of steps that carry their weights
    mid_chunk      True while losses of earlier steps are still to come, in the middle of a chunk (or of the steps
                   between two updates): nothing is folded or forgotten then
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        form: str,
        lag: int,
        sensitivity: Sensitivity | None,
        rewrite_every: int = 1,
        scan_backend: str = "torch",
        full_credit: FullCredit | None = None,
    ) -> None:
        self.matrices, self.form, self.lag, self.rewrite_every = matrices, form, lag, rewrite_every
        self._full_credit = full_credit
        self.scan_backend = scan_backend
        self.sensitivity = sensitivity
        self.mid_chunk = False
        self.broken = ""  # what failed while the sensitivities were being advanced
        self._in_use = threading.Lock()
        self.begin(0)

    def begin(self, now: int) -> None:
        """Start an empty window at time `now`. A backward pass of an earlier step is refused from here on."""
        self.now = self.base = self._last_full_reset = now
        self._unreachable = now  # no loss of a new step may reach the steps up to this time
        self._tape = Tape()
        # Of what is folded as one, in the window: calls, or chunks in form "chunk".
        self._ends: list[int] = []
        self._records: list[Record] = []  # those calls, in form "chunk"
        # A new one whenever the past is reset or replaced. The backward pass of a record of another comes too late.
        self._epoch = object()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without the records, whose backward passes belong to this past, and the lock."""
        return {**self.__dict__, "_records": [], "_in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_use = threading.Lock()

    def enter(self) -> None:
        """Begin to change the past; call `leave` afterwards.

        Raises RuntimeError if another thread is at it, or if the sensitivities are broken.
        """
        if self.broken:
            self.refuse_broken()
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "another thread is running this OnlineLearner: steps and backward passes of one learner come one after "
                "the other; give each thread a learner of its own"
            )

    def leave(self) -> None:
        """End what `enter` began."""
        self._in_use.release()

    def refuse_broken(self) -> None:
        """Raise RuntimeError if a call failed while it advanced the sensitivities, so that some are of a later step."""
        if self.broken:
            raise RuntimeError(
                f"an earlier call of this OnlineLearner failed while it advanced the sensitivities ({self.broken}): "
                "some are of a later step than others. reset() forgets them all, load_state_dict() replaces them"
            )

    def mend(self) -> None:
        """If the sensitivities are broken, forget all steps so far."""
        if self.broken:
            self.cut()

    def forget_all(self) -> None:
        """Set the sensitivities to zero, whatever they are."""
        if self.sensitivity is not None:
            self.sensitivity.forget_(None)
        self.broken = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the sensitivities and the window."""
        return self._tape.nbytes + (0 if self.sensitivity is None else self.sensitivity.nbytes)

    @property
    def is_new(self) -> bool:
        """Whether no step has run since it began, or since a reset of all rows."""
        return self._last_full_reset == self.now

    def add(self, block: Block, inputs: int, continues_chunk: bool) -> Record:
        """Append new steps to the window. The arguments are those of `Record`."""
        record = Record(self.now, block, inputs, continues_chunk, self._epoch)
        self._tape.append(block)
        self.now = record.end
        if self.sensitivity is not None:
            if self.form == "chunk" and self.mid_chunk and self._ends[-1:] == [record.start]:
                self._ends.pop()  # a chunk's calls are folded together: its first gives the gradients of all
            self._ends.append(record.end)
        if self.form == "chunk":
            self._records.append(record)
        return record

    def take_back(self) -> None:
        """Drop the steps that were added last, before any other call."""
        self.now -= self._tape.take_back()
        if self.sensitivity is not None:
            self._ends.pop()
            if self.now > max(self.base, *self._ends[-1:], 0):
                self._ends.append(self.now)
        if self.form == "chunk":
            self._records.pop()

    def before_steps(self, forget: Tensor | None, all_rows: bool) -> None:
        """Before new steps run: fold into the sensitivities the steps that no later loss may reach.

        forget (B,) bool or None: batch rows that are reset before the next step; all_rows: they are known to be all.
        """
        if all_rows:
            self._last_full_reset = self.now
        if self.mid_chunk:
            return
        if all_rows and self.lag == 0:  # nothing is carried over, and no loss of an earlier step can come
            self.forget_all()
            self.begin(self.now)
            return
        reach = self.now - self.lag
        if self.sensitivity is None:
            if self.base < self._last_full_reset <= reach:
                self._move_base(self._last_full_reset)
        else:
            self._unreachable = max((end for end in self._ends if end <= reach), default=self.base)
            if self._unreachable - self.base >= self.rewrite_every:
                blocks = self._tape.blocks(self._unreachable - self.base)
                with _Advancing(self) as sensitivity:
                    fold = sensitivity.step_ if self.form == "step" else sensitivity.chunk_
                    for block in blocks:
                        fold(block)
                    self._move_base(self._unreachable)
        if forget is not None and self.lag == 0:
            # M of the next step is zero in these rows, but zero times an infinity is not
            self._tape.forget_(forget)
            if self.sensitivity is not None:
                self.sensitivity.forget_(forget)
            self._epoch = object()

    def gradients(
        self,
        record: Record,
        weights: Sequence[Tensor],
        delta: Tensor,
        later_credit: Tensor | None,
        to_input: Callable[[Tensor], Tensor] | None,
        descent: Descent | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """The gradients that the losses of one call's steps give. May fold these steps, where that saves a pass over Γ.

        delta (S, C, B, N): the losses' gradient with respect to the states. later_credit (S, B, N) or None: what the
        chunk's later calls pass back. to_input: makes the gradient of the layer's input from that of the per-unit
        inputs (J, C, B, N); None where that isn't needed.

        Returns that gradient of the input, the credit that passes to the steps before (S, B, N), and the weights'
        gradients. These are None in a call that continues a chunk, whose first call gives them, and with a descent
        (form "step" only), which takes its step after to_input has run.

        Raises RuntimeError if the base has moved beyond these steps, so that their gradient is lost.
        """
        self._refuse_if_late(record, later_credit)
        block, sensitivity = record.block, self.sensitivity

        def for_input(of: Tensor) -> Tensor | None:
            return None if to_input is None else self.input_gradient(record, of, to_input)

        if record.end <= self.base:  # another loss of the step that was folded last: Γ is still its own
            assert sensitivity is not None
            for_x, read = for_input(delta), sensitivity.read(delta[:, 0])
            if descent is not None:
                descent.apply_(read)
                return for_x, None, [None] * len(self.matrices)
            return for_x, None, read

        alone = record.start == self.base
        if self.form == "step" and alone and record.end <= self.now - self.lag:  # fold and read in one pass
            assert sensitivity is not None
            for_x = for_input(delta if block.steps == 1 else self._credit(block, delta)[0])
            with _Advancing(self):
                gradients = sensitivity.step_(block, delta, descent)
                self._move_base(record.end)
            return for_x, None, [None] * len(self.matrices) if gradients is None else gradients

        assert descent is None
        credit, passed = self._credit(block, delta, later_credit)
        for_x = for_input(delta if block.steps == 1 else credit)
        record.received_credit = later_credit is not None
        if record.continues_chunk:
            record.credit = credit
            return for_x, passed, [None] * len(self.matrices)

        later_calls = self._later_calls(record)
        parts = [(block, credit)]
        if later_calls or not alone:
            parts, passed = self._over_window(record, later_calls, credit, passed)
        gradients = self._from_window(parts, weights)
        if self.sensitivity is None:
            return for_x, None, gradients
        whole_window = self._tape.blocks()
        full = self.now - self.base >= self.rewrite_every and len(whole_window) == 1
        last_loss = record.start == self._unreachable and not self.mid_chunk and self.lag == 0
        # Each step between two updates may have a backward of its own, and steps are folded by the last alone.
        last_step = (later_calls[-1] if later_calls else record).end
        if full and last_loss and last_step == self.now:
            with _Advancing(self):
                from_past = self.sensitivity.chunk_(whole_window[0], passed)
                self._move_base(self.now)
        else:
            from_past = self.sensitivity.read(passed)
        assert from_past is not None
        return for_x, None, [own.add_(past) for own, past in zip(gradients, from_past, strict=True)]

    def input_gradient(self, record: Record, of: Tensor, to_input: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of the layer's input that credits `of` (S, C, B, N) give; to_input as in `gradients`."""
        return to_input(rfp.input_gradient(_with_credit(record.block, of).lin, of, record.inputs))

    def last_credits(self, delta: Tensor) -> tuple[list[tuple[Block, Tensor]], Tensor]:
        """Credits of the window's steps of a loss of the last step alone, and what passes to the base (S, B, N).

        delta (S, B, N): the loss's gradient with respect to the last step's states. The credits (S, T, B, N) come with
        their blocks, as `gradients` finds them. Nothing is mutated. Raises RuntimeError if the last step has been
        folded, so that its credit is lost.
        """
        if self.base == self.now:
            raise RuntimeError(
                f"the gradients of step {self.now} come too late: with form={self.form!r} and credit through the full "
                "Jacobian, ask for them before backward() of the chunk's losses"
            )
        whole = bool(self._records) and self._records[0].start == self.base
        blocks = [record.block for record in self._records] if whole else self._tape.blocks()
        parts, passed = [], None
        for block in reversed(blocks):
            of = delta.new_zeros(len(delta), block.steps, *delta.shape[1:])
            if passed is None:
                of[:, -1] = delta
            credit, passed = self._credit(block, of, passed)
            parts.append((_with_credit(block, credit), credit))
        assert passed is not None
        return parts, passed

    def _refuse_if_late(self, record: Record, later_credit: Tensor | None) -> None:
        same = record.epoch is self._epoch
        one_step = record.end - record.start == 1
        carried = self.sensitivity is not None and not isinstance(self.sensitivity, NoSensitivity)
        # Γ of the step itself gives its gradient, but where credit passes through the full Jacobian: from one step to
        # the one before it, that is not how Γ was advanced.
        own = record.block.weights is None or self.form == "step"
        at_base = carried and own and one_step and record.end == self.base and later_credit is None
        if same and (record.start >= self.base or at_base):
            return
        steps = f"step {record.end}" if one_step else f"steps {record.start + 1} to {record.end}"
        moved = f"Γ is that of step {self.base} now" if same else "their past was reset or replaced"
        before = "the chunk after it begins" if self.form == "chunk" else f"step {record.end + self.lag + 1}"
        raise RuntimeError(
            f"backward of {steps} comes too late: {moved}. With form={self.form!r} and lag={self.lag}, call "
            f"backward() once, on the sum of the losses, before {before}"
        )

    def _later_calls(self, first: Record) -> list[Record]:
        """The calls after a chunk's first whose credit has reached it in this backward pass."""
        calls: list[Record] = []
        if first in self._records:
            last = first
            for record in self._records[self._records.index(first) + 1 :]:
                if not (record.continues_chunk and last.received_credit):
                    break
                calls.append(record)
                last = record
        return calls

    def _credit(self, block: Block, delta: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Credits (S, T, B, N) of a block's steps, and what they pass to the state before (S, B, N)."""
        if block.lin.resets is not None:
            block = block.without(rfp.without_credit(block.lin.resets, delta, carry))
        if block.weights is None:
            return operations.reverse_scan(block.m, delta, carry, block.lin.resets, backend=self.scan_backend)
        assert self._full_credit is not None
        return self._full_credit(block, delta, carry)

    def _over_window(
        self, record: Record, later_calls: Sequence[Record], credit: Tensor, passed: Tensor
    ) -> tuple[list[tuple[Block, Tensor]], Tensor]:
        """The window's blocks from the base to the last of these calls with their credits, and what passes to the base.

        credit and passed are the record's own; the steps between the base and the record get theirs from `passed`.
        """
        start = record.start - self.base
        stop = (later_calls[-1].end if later_calls else record.end) - self.base
        whole = credit.new_zeros(credit.shape[0], stop, *credit.shape[2:])
        whole[:, start : record.end - self.base] = credit
        for call in later_calls:
            whole[:, call.start - self.base : call.end - self.base] = call.credit
        blocks = self._tape.blocks(stop)
        if any(block.lin.resets is not None for block in blocks):  # no credit reaches some steps of any block
            blocks = [block.marked() for block in blocks]
        end = stop
        for block in reversed(blocks):
            begin = end - block.steps
            before = min(end, start)  # steps of this block that come before the record's
            if begin < before:
                part = block if before == end else block.narrow(0, before - begin)
                whole[:, begin:before], passed = self._credit(part, whole[:, begin:before], passed)
            end = begin
        credits = whole.split([block.steps for block in blocks], dim=1)
        return list(zip(blocks, credits, strict=True)), passed

    def _from_window(self, parts: Sequence[tuple[Block, Tensor]], weights: Sequence[Tensor]) -> list[Tensor]:
        """The part of the gradients that the window's own steps give, from blocks and their credits."""
        total: list[Tensor] | None = None
        for block, credit in parts:
            block = _with_credit(block, credit)
            part = rfp.weight_gradients(block.lin, self.matrices, weights, credit, block.inputs)
            total = part if total is None else [a.add_(b) for a, b in zip(total, part, strict=True)]
        assert total is not None
        return total

    def _move_base(self, end: int) -> None:
        """The sensitivities are those of time `end` now: drop the steps up to it from the window."""
        self._tape.drop_first(end - self.base)
        self.base = end
        self._ends = [e for e in self._ends if e > end]
        self._records = [r for r in self._records if r.start >= end]

    def fold(self) -> None:
        """Fold the whole window into the sensitivities, step by step."""
        blocks = self._tape.blocks()
        with _Advancing(self) as sensitivity:
            for block in blocks:
                sensitivity.step_(block)
            self.begin(self.now)

    def window(self) -> list[Block]:
        """The steps since the base."""
        return self._tape.blocks()

    def cut(self) -> None:
        """Forget all steps so far, of every batch row: what comes next begins with a state that is given."""
        self.forget_all()
        self.mid_chunk = False
        self.begin(self.now)

    def state_dict(self) -> dict[str, Any]:
        """Sensitivities and window as tensors, numbers and lists; the tensors are shared, not copied."""
        return {
            "now": self.now,
            "base": self.base,
            "episode": self._last_full_reset,
            "ends": list(self._ends),
            "filling": self.mid_chunk,
            "gamma": [] if self.sensitivity is None else self.sensitivity.tensors(),
            "window": [block.to_dict() for block in self._tape.blocks()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, as copies. Nothing is checked here (`checkpoint.refuse_damaged`)."""
        window = [Block.from_dict(saved).map(owned) for saved in state["window"]]
        window = [
            block if block.weights is None else replace(block, weights=tuple(map(owned, block.weights)))
            for block in window
        ]
        if self.sensitivity is not None:
            self.sensitivity.load_(state["gamma"])
        self.broken = ""
        self.begin(state["now"])
        self.base, self._ends, self.mid_chunk = state["base"], list(state["ends"]), state["filling"]
        self._last_full_reset = state["episode"]
        for block in window:
            self._tape.append(block)


def _with_credit(block: Block, credit: Tensor) -> Block:
    """The block with zeros for the steps without credit (S, T, B, N): before a reset these may be NaN."""
    if block.lin.resets is None:
        return block
    return block.without(~(credit != 0).any(-1).any(0))
