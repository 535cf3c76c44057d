"""Blocks from their sending until every frame was answered for good, whatever BUSY and lost connections do to them.

The server refuses a whole block with BUSY and, because a frame is then missing, fails later blocks of the same streams
with SEQ_GAP. So on the first BUSY nothing new is sent until every block on its way was answered; then the refused
frames go out once more in the order in which they were sent, before anything new. When the connection is lost, all
that was on its way waits with them, and goes out once more under the handles of the next connection: what the server
had applied is answered again with the same outputs, the rest is applied now. A frame that was answered otherwise is
never sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.blocks import StepBlock
from instep_client.outbox import Outbox
from instep_client.protocol.wire import Code
from instep_client.replies import ColumnError, ErrorReply, Stepped
from instep_client.sleepers import Sleepers
from instep_client.steps import FailedFrames, StepCall
from instep_client.streams import ENDING, HANDLE, SEQ, OpenStreams

BEHIND: Final = "an earlier frame of this stream was refused, so this one, which came after it, was not applied"
_DRAIN_RETRY_S: Final = 0.25
"""How long blocks wait that a server refuses because it shuts down: its end, or another server, comes soon."""


class InFlight:
    """Blocks on their way.

    Args:
        table: the streams.
        outbox: where blocks go.
        sleepers: wakes streams that hibernate.
        outputs: width of an output.
        shutdown_s: how long what a server refuses because it shuts down waits for its end and the next one.
        settled: told of the calls of which frames were answered for good.
        end: told of streams that an answer says have ended.
    """

    def __init__(
        self,
        table: OpenStreams,
        outbox: Outbox,
        sleepers: Sleepers,
        outputs: int,
        shutdown_s: float,
        settled: Callable[[Iterable[StepCall]], None],
        end: Callable[[Indices, Code, str], None],
    ) -> None:
        self._table = table
        self._outbox = outbox
        self._sleepers = sleepers
        self._is_waking = False
        self._outputs = outputs
        self._shutdown_s = shutdown_s
        self._shutting_down_since: float | None = None
        self._settled = settled
        self._end = end
        self._on_the_way: dict[StepBlock, None] = {}
        self._refused: list[StepBlock] = []
        self._congested = False
        self._resend_at = 0.0
        self.unanswered_frames = 0
        """Frames sent and not answered at all; never more than the server's credit."""

    def blocks(self) -> list[StepBlock]:
        """Every block that is not answered for good."""
        return [*self._on_the_way, *self._refused]

    def post(self, block: StepBlock) -> None:
        """Send a block."""
        block.request = self._outbox.step(block)
        self._on_the_way[block] = None
        self.unanswered_frames += block.frames

    def answered(self, block: StepBlock, answer: Stepped) -> None:
        """A block's STEPPED came."""
        self._leave(block)
        self._shutting_down_since = None
        self._acknowledge(block, answer.failures)
        whole = block
        if answer.failures:
            held = self._sort_failures(block, answer.failures)
            if held:
                rest = np.setdiff1d(np.arange(len(block.rows)), held)
                self._refused.append(block.take(np.array(held, np.int64)))
                block = block.take(rest)
                answer = answer._replace(outputs=answer.outputs[:, rest])
        block.deliver(answer)
        self._settled(whole.calls)

    def refused(self, block: StepBlock, refusal: ErrorReply, now: float) -> None:
        """A block's ERROR came: nothing of it was applied."""
        if not self._passes(refusal.code, now):
            failures = [
                ColumnError(column, 0, refusal.code, refusal.sentence, int(seq))
                for column, seq in enumerate(block.columns[:, SEQ])
            ]
            outputs = np.full((*block.x.shape[:2], self._outputs), np.nan, np.float32)
            self.answered(block, Stepped(block.request, outputs, failures, (0, 0, 0)))
            return
        self._leave(block)
        self._congested = True
        wait_s = refusal.retry_after_s if refusal.code is Code.BUSY else _DRAIN_RETRY_S
        self._resend_at = max(self._resend_at, now + wait_s)
        self._table.held[block.rows] = True
        self._refused.append(block)

    def _passes(self, code: Code, now: float) -> bool:
        """Whether what was refused with this code may be taken later."""
        if code is not Code.SHUTTING_DOWN:
            return code is Code.BUSY
        if self._shutting_down_since is None:
            self._shutting_down_since = now
        return now < self._shutting_down_since + self._shutdown_s

    def is_free(self, now: float) -> bool:
        """Whether new blocks may be sent; what waits to be sent again is, when its time has come."""
        if self._congested:
            if self._on_the_way or now < self._resend_at or self._wakes():
                return False
            self._resend()
        return True

    def _wakes(self) -> bool:
        """Whether what is to be sent again waits for streams that hibernate."""
        rows = np.concatenate([block.rows for block in self._refused] or [np.zeros(0, np.int64)])
        if not self._table.asleep[rows].any():
            return False
        if not self._is_waking:
            self._is_waking = True
            self._sleepers.wake(rows, self._woken)
        return True

    def _woken(self) -> None:
        self._is_waking = False

    def deadline(self) -> float | None:
        """When blocks are to be sent again though no message comes."""
        is_due = self._congested and not self._on_the_way and not self._is_waking
        return self._resend_at if is_due else None

    def lost(self) -> None:
        """The connection is lost."""
        self._refused = self.blocks()
        self._on_the_way.clear()
        self._shutting_down_since = None
        self.unanswered_frames = 0

    def resumed(self) -> None:
        """There is another connection, and the table holds the handles of it."""
        self._congested = True  # all goes out again as soon as it may

    def _leave(self, block: StepBlock) -> None:
        del self._on_the_way[block]
        self.unanswered_frames -= block.frames

    def _acknowledge(self, block: StepBlock, failures: list[ColumnError]) -> None:
        first = block.columns[:, SEQ]
        end = first + np.uint64(len(block.x))
        for failure in failures:
            end[failure.column] = first[failure.column] + np.uint64(failure.timestep)
        self._table.came(block.rows, first, end)

    def _resend(self) -> None:
        blocks = sorted(self._refused, key=lambda block: block.request)
        self._refused = []
        self._table.held[:] = False
        self._congested = False
        self._resend_at = 0.0
        for block in blocks:
            lost = (self._table.rewound_at[block.rows] > block.stamps()) | (self._table.ended[block.rows] != 0)
            if np.any(lost):
                self._give_up(block.take(np.flatnonzero(lost)))
                block = block.take(np.flatnonzero(~lost))
            if len(block.rows):
                block.renew(self._table)
                self.post(block)

    def _give_up(self, block: StepBlock) -> None:
        """Refused frames that may not be sent again: their stream was rewound or ended meanwhile."""
        for column, row in enumerate(block.rows.tolist()):
            call, index = block.owner(column)
            code = Code(int(self._table.ended[row]) or Code.SEQ_GAP)
            sentence = self._table.sentences.get(code, BEHIND)
            expected = int(self._table.columns[row, SEQ])
            call.refuse(index, FailedFrames(int(block.columns[column, SEQ]), code, sentence, expected))
        block.settle()
        self._settled(block.calls)

    def _sort_failures(self, block: StepBlock, failures: list[ColumnError]) -> list[int]:
        """Tell the calls what failed and set the streams back; returns the columns that have to be sent again.

        Those are the ones that only wait for a BUSY one, and those of streams that hibernated when their frames came.
        """
        held: list[int] = []
        ending: dict[tuple[Code, str], list[int]] = {}
        for column, timestep, code, sentence, expected in failures:
            call, index = block.owner(column)
            row = int(block.rows[column])
            stale = bool(self._table.rewound_at[row] > call.stamp)
            if code is Code.SEQ_GAP and timestep == 0 and self._table.held[row] and not stale:
                held.append(column)
                continue
            has_slept = self._table.asleep[row] or self._table.columns[row, HANDLE] != block.columns[column, HANDLE]
            if code is Code.UNKNOWN_STREAM and has_slept:  # it may be awake again by the time of this answer
                held.append(column)
                self._congested = self._table.held[row] = True
                continue
            seq = int(block.columns[column, SEQ]) + timestep
            call.refuse(index, FailedFrames(seq, code, sentence, expected))
            if code in ENDING:
                ending.setdefault((code, sentence), []).append(row)
            elif code is Code.CONFLICT:
                self._rewind(row, call, seq)  # not forward: outputs of other frames are not this client's
            else:
                self._rewind(row, call, expected, outputs_are_gone=code is Code.SEQ_REPEATED)
        for (code, sentence), rows in ending.items():
            self._end(np.array(rows, np.int64), code, sentence)
        return held

    def _rewind(self, row: int, call: StepCall, expected: int, outputs_are_gone: bool = False) -> None:
        """The stream goes on from the seq the server expects.

        What was asked for before the last rewind says nothing new. (Should a step on the server fail after a later
        frame of the stream was refused, the stream's next frame is refused once more, and that sets it right.)
        """
        table = self._table
        if call.stamp > table.rewound_at[row]:
            table.rewound_at[row] = call.handle.rewound_at = table.stamp()
            table.rewind(row, expected, outputs_are_gone)
