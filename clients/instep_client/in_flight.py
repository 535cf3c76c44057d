"""Blocks from their sending until every frame was answered for good, whatever BUSY and lost connections do to them.

The server refuses a whole block with BUSY and, because a frame is then missing, fails later blocks of the same streams
with SEQ_GAP. So on the first BUSY nothing new is sent until every block on its way was answered; then the refused
frames go out once more in the order in which they were sent, before anything new. When the connection is lost, all
that was on its way waits with them, and goes out once more under the handles of the next connection: what the server
had applied is answered again with the same outputs, the rest is applied now. A frame that was answered otherwise is
never sent again.

Frames of streams that hibernate wait until their streams are awake, and hold nothing else up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.handles import FailedFrames, StepCall
from instep_client.pending import Pending
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.step_messages import pack_step
from instep_client.protocol.wire import F32, U64
from instep_client.replies import ColumnError, ErrorReply, Stepped
from instep_client.sleepers import EndedRows, Sleepers
from instep_client.streams import ACKED, ENDING, HANDLE, SEQ, OpenStreams

BEHIND: Final = "an earlier frame of this stream was refused, so this one, which came after it, was not applied"
_DRAIN_RETRY_S: Final = 0.25
"""How long blocks wait that a server refuses because it shuts down: its end, or another server, comes soon."""
_ONE_COLUMN: Final[Indices] = np.zeros(1, np.int64)


class StepBlock:
    """The frames of one STEP: a piece of one call, or single frames of many calls side by side."""

    def __init__(
        self, calls: Sequence[StepCall], rows: Indices, columns: U64, x: F32, start: int, where: Indices
    ) -> None:
        self.calls = calls
        """The one call, or one call a column."""
        self.rows = rows
        self.columns = columns
        """(handle, seq of the first timestep, seq before which every output has come) of each column, as sent."""
        self.x = x
        """float32 [T, N, features], contiguous."""
        self.start = start
        """The call's timestep that is the block's first."""
        self.where = where
        """Which column of its call each column is."""
        self.frames = len(x) * len(rows)
        """How many frames it carries, T × N."""
        self.number = 0
        """The number it was last sent with; numbers grow."""

    @classmethod
    def of_singles(cls, table: OpenStreams, calls: Sequence[StepCall]) -> StepBlock:
        """Single frames of distinct streams side by side; their next seqs move on."""
        if len(calls) == 1:
            rows, x, where = calls[0].rows, calls[0].x, _ONE_COLUMN
        else:
            rows = np.concatenate([call.rows for call in calls])
            x = np.concatenate([call.x for call in calls], axis=1)
            where = np.zeros(len(rows), np.int64)
        return cls(calls, rows, table.take_columns(rows, 1), x, 0, where)

    def owner(self, column: int) -> tuple[StepCall, int]:
        """The call that a column belongs to, and which of the call's columns it is."""
        return self.calls[column if len(self.calls) > 1 else 0], int(self.where[column])

    def take(self, columns: Indices) -> StepBlock:
        """A block of some of the columns, sent when this one was."""
        calls = [self.calls[column] for column in columns.tolist()] if len(self.calls) > 1 else self.calls
        x = np.ascontiguousarray(self.x[:, columns])
        part = StepBlock(calls, self.rows[columns], self.columns[columns], x, self.start, self.where[columns])
        part.number = self.number
        return part

    def renew(self, table: OpenStreams) -> None:
        """Prepare to send it again, with the present handles and acknowledgements."""
        present = table.columns[self.rows]
        self.columns[:, HANDLE] = present[:, HANDLE]
        self.columns[:, ACKED] = np.minimum(present[:, ACKED], self.columns[:, SEQ])

    def deliver(self, answer: Stepped) -> None:
        """Every column was answered for good: give each call its outputs, and count its frames as answered."""
        first = self.calls[0] if self.calls else None
        if first is not None and not first.lone:
            first.put(self.start, self.where, answer.outputs)
            self.settle(answer.times)
        else:
            for call, outputs in zip(self.calls, answer.outputs[0], strict=False):  # no column where it was held
                call.put_lone(outputs, answer.times)

    def settle(self, times: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Count its frames as answered in every call and stream handle."""
        share = self.frames // len(self.calls) if self.calls else 0
        for call in self.calls:
            call.left -= share
            call.handle.unanswered -= share
            a, b = call.times, times
            call.times = b if call.frames == 1 else (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))


class InFlight:
    """Blocks on their way. What a server that shuts down refuses waits `shutdown_s` for its end and the next server."""

    def __init__(self, table: OpenStreams, pending: Pending, sleepers: Sleepers, shutdown_s: float) -> None:
        self._table = table
        self._pending = pending
        self._sleepers = sleepers
        self._shutdown_s = shutdown_s
        self._shutting_down_since: float | None = None
        self.on_the_way: dict[int, StepBlock] = {}
        """By number."""
        self._refused: list[StepBlock] = []
        self._congested = False
        self._resend_at = 0.0
        self.outputs_width = 0
        """Numbers in an output."""
        self.credit = 0
        """How many frames the server lets be unanswered."""
        self.unanswered_frames = 0
        """Frames sent and not answered at all; never more than the server's credit."""
        self.settled: list[StepCall] = []
        """Calls of which frames were answered for good since `Flow` last looked."""
        self.ended: EndedRows = {}
        """Streams that have ended, as answers say, since `Flow` last looked."""

    def blocks(self) -> list[StepBlock]:
        """Every block that is not answered for good."""
        return [*self.on_the_way.values(), *self._refused]

    def post(self, block: StepBlock) -> None:
        """Send a block."""
        block.number = self._pending.next_number()
        timesteps, _, features = block.x.shape
        header = pack_step(block.number, timesteps, features, block.columns.tobytes())
        self._pending.messages.append([header, block.x.data.cast("B")])
        self.on_the_way[block.number] = block
        self.unanswered_frames += block.frames

    def answered(self, answer: Stepped) -> None:
        """STEPPED came for a block."""
        block = self.on_the_way.get(answer.request)
        if block is None:
            raise MalformedMessage(f"STEPPED with number {answer.request} answers nothing that was asked")
        if answer.outputs.shape != (*block.x.shape[:2], self.outputs_width):
            raise MalformedMessage("a block of another size was sent than the one that was answered")
        self._leave(block)
        self._take(block, answer)

    def refused(self, number: int, refusal: ErrorReply, now: float) -> bool:
        """ERROR came for a block, if there is one of that number: nothing of it was applied."""
        block = self.on_the_way.get(number)
        if block is None:
            return False
        self._leave(block)
        if self._passes(refusal.code, now):
            self._congested = True
            wait_s = refusal.retry_after_s if refusal.code is Code.BUSY else _DRAIN_RETRY_S
            self._resend_at = max(self._resend_at, now + wait_s)
            self._table.held[block.rows] = True
            self._refused.append(block)
        else:
            failures = [
                ColumnError(column, 0, refusal.code, refusal.sentence, int(seq))
                for column, seq in enumerate(block.columns[:, SEQ])
            ]
            outputs = np.full((*block.x.shape[:2], self.outputs_width), np.nan, np.float32)
            self._take(block, Stepped(number, outputs, failures, (0, 0, 0)))
        return True

    def is_free(self, now: float) -> bool:
        """Whether new blocks may be sent; what waits to be sent again is, when its time has come."""
        if self._congested:
            if self.on_the_way or now < self._resend_at:
                return False
            self._table.held[:] = False
            self._congested = False
            self._resend_at = 0.0
        return not self._refused or self._resend()

    def deadline(self) -> float:
        """When blocks are to be sent again though no message comes; infinity for never."""
        return self._resend_at if self._congested and not self.on_the_way else math.inf

    def lost(self) -> None:
        """The connection is lost: all waits, to go out again once there is another and the table has its handles."""
        self._refused = self.blocks()
        self.on_the_way.clear()
        self._shutting_down_since = None
        self._congested = True
        self.unanswered_frames = 0

    def _passes(self, code: Code, now: float) -> bool:
        """Whether what was refused with this code may be taken later."""
        if code is not Code.SHUTTING_DOWN:
            return code is Code.BUSY
        if self._shutting_down_since is None:
            self._shutting_down_since = now
        return now < self._shutting_down_since + self._shutdown_s

    def _leave(self, block: StepBlock) -> None:
        del self.on_the_way[block.number]
        self.unanswered_frames -= block.frames

    def _take(self, block: StepBlock, answer: Stepped) -> None:
        self._shutting_down_since = None
        self._acknowledge(block, answer.failures)
        self.settled.extend(block.calls)
        if answer.failures:
            held = self._sort_failures(block, answer.failures)
            if held:
                rest = np.setdiff1d(np.arange(len(block.rows)), held)
                self._refused.append(block.take(np.array(held, np.int64)))
                block = block.take(rest)
                answer = answer._replace(outputs=answer.outputs[:, rest])
        block.deliver(answer)

    def _acknowledge(self, block: StepBlock, failures: list[ColumnError]) -> None:
        if len(block.rows) == 1 and not failures and self._table.came_next(block.rows, block.columns, len(block.x)):
            return
        first = block.columns[:, SEQ]
        end = first + np.uint64(len(block.x))
        for failure in failures:
            end[failure.column] = first[failure.column] + np.uint64(failure.timestep)
        self._table.came(block.rows, first, end)

    def _sort_failures(self, block: StepBlock, failures: list[ColumnError]) -> list[int]:
        """Tell the calls what failed and set the streams back; returns the columns that have to be sent again.

        Those are the ones that only wait for a BUSY one, and those of streams that hibernated when their frames came.
        """
        table = self._table
        held: list[int] = []
        for column, timestep, code, sentence, expected in failures:
            call, index = block.owner(column)
            row = int(block.rows[column])
            stale = bool(table.rewound_at[row] > call.stamp)
            if code is Code.SEQ_GAP and timestep == 0 and table.held[row] and not stale:
                held.append(column)
                continue
            has_slept = table.asleep[row] or table.numbers[row] != block.columns[column, HANDLE]
            if code is Code.UNKNOWN_STREAM and has_slept:  # it may be awake again by the time of this answer
                held.append(column)
                self._congested = table.held[row] = True
                continue
            seq = int(block.columns[column, SEQ]) + timestep
            call.refuse(index, FailedFrames(seq, code, sentence, expected))
            if code in ENDING:
                self.ended.setdefault((code, sentence), []).append(row)
            elif code is Code.CONFLICT:
                self._rewind(row, call, seq)  # not forward: outputs of other frames are not this client's
            else:
                self._rewind(row, call, expected, outputs_are_gone=code is Code.SEQ_REPEATED)
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

    def _resend(self) -> bool:
        """Send again the blocks that wait for no stream to wake, as far as credit allows. True if all were sent."""
        blocks = sorted(self._refused, key=lambda block: block.number)
        self._refused = []
        for index, block in enumerate(blocks):
            if self._sleepers.wake(block.rows):
                asleep = self._table.asleep[block.rows]
                if asleep.all():
                    self._refused.append(block)
                    continue
                self._refused.append(block.take(np.flatnonzero(asleep)))
                block = block.take(np.flatnonzero(~asleep))
            made_at = [call.stamp for call in block.calls]  # one number for all columns, or one for each
            lost = (self._table.rewound_at[block.rows] > made_at) | (self._table.ended[block.rows] != 0)
            if np.any(lost):
                self._give_up(block.take(np.flatnonzero(lost)))
                block = block.take(np.flatnonzero(~lost))
            if block.frames > self.credit - self.unanswered_frames:
                for rest in (block, *blocks[index + 1 :]):
                    rest.number = self._pending.next_number()  # it comes after what was sent now
                    self._refused.append(rest)
                return False
            if len(block.rows):
                block.renew(self._table)
                self.post(block)
        return True

    def _give_up(self, block: StepBlock) -> None:
        """Refused frames that may not be sent again: their stream was rewound or ended meanwhile."""
        for column, row in enumerate(block.rows.tolist()):
            call, index = block.owner(column)
            code = Code(int(self._table.ended[row]) or Code.SEQ_GAP)
            sentence = self._table.sentences.get(code, BEHIND)
            expected = int(self._table.seqs[row])
            call.refuse(index, FailedFrames(int(block.columns[column, SEQ]), code, sentence, expected))
        block.settle()
        self.settled.extend(block.calls)
