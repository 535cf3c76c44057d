"""The frames of every stream: inputs that wait for their step, and outputs that may be asked for again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from instep.core.streams import StreamTable
from instep.core.typing import F32, I32, I64, U8, float32_zeros
from instep.core.verdict import Admission

# Arrays, not numbers: numpy takes twice as long to join a number with a small array.
_ONCE, _NOT = np.array(1, np.uint8), np.array(0, np.uint8)


_TIMESTEPS: I64 = np.arange(64)[:, None]
_TIMESTEPS.flags.writeable = False


def timesteps(count: int) -> I64:
    """0 … `count` - 1, to be joined with an entry a column: int64 [count, 1], not to be changed."""
    return _TIMESTEPS[:count] if count <= len(_TIMESTEPS) else np.arange(count)[:, None]


class Rings:
    """One ring of `window` frames for each slot, found by seq: frame `seq` of a slot has one place, its row.

    What is pending of a stream are the frames from `step_seq` to `next_seq` of the table; what was computed stays in
    the ring until a later frame takes its place. A frame is admitted only when the client has acknowledged the one
    whose place it takes (see `admission`), so an output that may still be asked for is never overwritten.

    A stream has at most one frame in a step: from `take` to `let_go` it is stepping, and what arrives for it meanwhile
    waits. Places of equal seq lie side by side, so streams that go in step are copied in one piece.

    Args:
        table: the streams.
        window: frames a ring holds.
        max_streams: slots run from 1 to this.
        features: width of an input.
        outputs: width of an output.
        max_pending: the most frames admitted and not yet computed, of all streams together.
        zeros: makes the arrays of inputs and outputs; others than numpy's may be in memory that is shared.
    """

    def __init__(
        self,
        table: StreamTable,
        window: int,
        max_streams: int,
        features: int,
        outputs: int,
        max_pending: int,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.window = window
        self.max_pending = max_pending
        self.pending_count = 0
        """Frames admitted and not yet computed, of all streams together."""
        self._table = table
        stride = max_streams + 1
        rows = window * stride
        self._window: I64 = np.array(window)
        self._stride: I64 = np.array(stride)
        self.x = zeros((rows, features))
        self.y = zeros((rows, outputs))
        self.block: I32 = np.zeros(rows, np.int32)
        """The number of the block that the frame of a row came in; counts while the frame is pending."""
        self._holds: U8 = np.zeros(stride, np.uint8)
        """Why a slot may not step now: it is stepping, or its state is being changed, once or several times over (as
        often as changes may wait for the step worker, which is less than 100 times)."""

    @property
    def room(self) -> int:
        """How many more frames may be admitted now."""
        return self.max_pending - self.pending_count

    def rows(self, slots: I64, seqs: I64) -> I64:
        """Where frames lie: slots and seqs of any shapes that go together → int64."""
        rows: I64 = seqs % self._window * self._stride + slots
        return rows

    def stretches(self, slots: I64, first_seqs: I64, counts: I64) -> tuple[I64, I64]:
        """Where `counts` frames of each slot lie, one slot after another, and whose each is: both int64 [frames]."""
        whose = np.repeat(slots, counts)
        place = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.rows(whose, np.repeat(first_seqs, counts) + place), whose

    def append(self, verdict: Admission, x: F32, block: int | I32) -> I64:
        """Put the admitted frames of a block, or of several beside each other, into their places.

        Args:
            verdict: on them; `next_seq` of the table has moved past what it admits.
            x: float32 [T, N, features].
            block: the block's number, or int32 [N], that of each column's.

        Returns:
            ready: int64 [≤ N], slots that can step now: they had nothing pending and are not stepping.
        """
        (slots, fresh), rows = verdict.admitted, verdict.rows
        if not verdict.is_whole:
            at = timesteps(len(x))
            admitted = (at >= verdict.skipped) & (at < verdict.lengths)
            block = np.broadcast_to(block, rows.shape)[admitted]
            rows, x = rows[admitted], x[admitted]
        count = rows.size
        assert count <= self.room, "more frames were admitted than there is room for"
        self.block[rows] = block
        self.x[rows.reshape(-1)] = x.reshape(-1, x.shape[-1])  # with one index for each frame, numpy copies them faster
        self.pending_count += count
        had_nothing = self._table.next_seq[slots] - self._table.step_seq[slots] == fresh
        ready: I64 = slots[had_nothing & (self._holds[slots] == _NOT)]
        return ready

    def rows_of(self, slots: I64, first_seqs: I64, count: int) -> I64:
        """Where `count` frames of each slot lie: int64 [count, N]."""
        return self.rows(slots, first_seqs[None] if count == 1 else first_seqs + timesteps(count))

    def take(self, slots: I64, at_most: int = 1) -> I64:
        """Take the oldest pending frames of each slot for a run of steps; the streams are stepping until `let_go`.

        Args:
            slots: int64 [N], each with something pending.
            at_most: how many steps; fewer where a stream has fewer frames.

        Returns:
            rows: int64 [steps, N].
        """
        seqs = self._table.step_seq[slots]
        pending = int(np.minimum.reduce(self._table.next_seq[slots] - seqs))
        assert pending > 0, "a stream with nothing pending was scheduled"
        assert not np.count_nonzero(self._holds[slots]), "a stream that is stepping or held was scheduled"
        self._holds[slots] = 1
        return self.rows_of(slots, seqs, min(pending, at_most))

    def applied(self, slots: I64, steps: int = 1) -> None:
        """So many steps of a run of these slots were applied; the run is over with `let_go` or `failed`."""
        self._table.step_seq[slots] += steps
        self.pending_count -= len(slots) * steps

    def hold(self, slots: I64) -> None:
        """Let distinct slots with nothing pending wait, until as many `let_go` as `hold`."""
        self._holds[slots] += 1

    def let_go(self, slots: I64) -> I64:
        """Slots were held; those that can step now: int64 [≤ N]."""
        holds = self._holds[slots] - _ONCE
        self._holds[slots] = holds
        has_pending = self._table.next_seq[slots] > self._table.step_seq[slots]
        ready: I64 = slots[has_pending & (holds == _NOT)]
        return ready

    def failed(self, slots: I64) -> tuple[I64, I64]:
        """What these slots were held for, a step or a change of their states, went wrong; each was held for it once.

        So nothing they have pending can be applied; it is taken out.

        Returns:
            rows: int64 [frames], of everything that was pending.
            slots: int64 [frames], whose they are.
        """
        table = self._table
        first = table.step_seq[slots]
        counts = table.next_seq[slots] - first
        rows, whose = self.stretches(slots, first, counts)
        table.next_seq[slots] = first
        self._holds[slots] -= 1
        self.pending_count -= len(rows)
        return rows, whose

    def outputs(self, rows: I64) -> F32:
        """Outputs of frames, int64 [count, N]: float32 [count, N, outputs], a copy."""
        return self.y.take(rows, axis=0)

    def holds_same(self, slots: I64, first_seqs: I64, counts: I64, x: F32) -> I64:
        """How many leading frames of each column are the very bytes that the ring holds.

        Args:
            slots: int64 [N].
            first_seqs: int64 [N], seq of timestep 0; the ring still holds the first `counts` of them.
            counts: int64 [N], how many of a column's frames to look at.
            x: float32 [T, N, features].

        Returns:
            int64 [N], 0 … `counts`.
        """
        at = timesteps(len(x))
        held = self.x.take(self.rows(slots, first_seqs + at), axis=0)
        differs = (held.view(np.uint32) != x.view(np.uint32)).any(axis=2) & (at < counts)
        same: I64 = np.where(differs.any(axis=0), differs.argmax(axis=0), counts)
        return same
