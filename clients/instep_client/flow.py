"""What is sent when: lanes take turns, credit bounds what is unanswered, and BUSY makes the connection wait and resend.

The server refuses a whole block with BUSY and, because a frame is then missing, fails later blocks of the same streams
with SEQ_GAP. So on the first BUSY nothing new is sent until every block on its way was answered; then the refused
frames go out once more in the order in which they were sent, before anything new. A frame that was answered
otherwise is never sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import numpy as np

from instep_client.arrays import Indices
from instep_client.blocks import Block
from instep_client.calls import ENDING, CloseCall, Failed, StepCall
from instep_client.errors import InstepError, StreamEvicted
from instep_client.openings import MAX_REPLY_BYTES, Openings
from instep_client.outbox import Outbox
from instep_client.replies import Failure, Refusal, Stepped
from instep_client.streams import SEQ, Lane, StreamTable
from instep_client.wire import COLUMN, F32_NAME, MAX_BLOCK_STREAMS, Code, Kind, Message, ServerInfo, raw

BEHIND: Final = "an earlier frame of this stream was refused, so this one, which came after it, was not applied"


class Flow:
    """The step blocks of one connection, from the lanes to the wire and back."""

    def __init__(self, table: StreamTable, info: ServerInfo, outbox: Outbox, openings: Openings) -> None:
        self._table = table
        self._outbox = outbox
        self._openings = openings
        self._credit = info.credit_frames
        self._outputs = info.outputs
        self._window = info.window_frames
        frame_bytes = 4 * max(info.features, 1)
        self._most_frames = max(
            1,
            min(
                info.max_block_frames,
                info.credit_frames // 4,  # a few blocks on the way at once, so that the server never waits for us
                info.max_message_bytes // frame_bytes,
                MAX_REPLY_BYTES // (4 * info.outputs),
            ),
        )
        self._most_columns = max(
            1, min(self._most_frames, MAX_BLOCK_STREAMS, info.max_message_bytes // COLUMN.itemsize)
        )
        self._line: deque[Lane] = deque()
        self._clock = 0
        self._on_the_way: dict[Block, None] = {}
        self.unanswered_frames = 0
        """Frames sent and not answered at all; never more than the server's credit."""
        self.congested = False
        """Whether a BUSY is being waited out."""
        self._resend_at = 0.0
        self._refused: list[Block] = []
        self._full_since: dict[Lane, float] = {}

    def submit(self, call: StepCall) -> None:
        """A new step call; it is sent when its lane's turn comes."""
        if not call.lone:
            call.cut(self._most_frames, self._most_columns, max(1, self._window // 2))
        if call.keep:
            call.lane.results.append(call)
        self.enqueue(call.lane, call)

    def enqueue(self, lane: Lane, call: StepCall | CloseCall | None = None) -> None:
        """The lane has something to send, or may be able to go on."""
        if call is not None:
            lane.calls.append(call)
        if lane.calls and not lane.queued and lane not in self._full_since:
            lane.queued = True
            self._line.append(lane)

    def stamp(self) -> int:
        """The next number of the counter by which calls and set-backs are ordered."""
        self._clock += 1
        return self._clock

    def advance(self, now: float, timeout_s: float) -> None:
        """Send everything that may be sent at `now`."""
        for lane, since in list(self._full_since.items()):
            if now >= since + timeout_s:
                self._abort(
                    lane.calls[0],
                    InstepError(
                        f"nobody reads the outputs of stream {lane.names[0]!r}: {lane.unread} frames wait to be taken; "
                        "iterate over the stream while sending, in another task or thread"
                    ),
                )
        if self.congested:
            if self._on_the_way or now < self._resend_at:
                return
            self._resend()
        while self._line and self._take_turns(now):
            pass

    def deadline(self, timeout_s: float) -> float | None:
        """When `advance` has something to do though no message comes."""
        times = [since + timeout_s for since in self._full_since.values()]
        if self.congested and not self._on_the_way:
            times.append(self._resend_at)
        return min(times, default=None)

    def answered(self, block: Block, answer: Stepped) -> None:
        """A block's STEPPED came."""
        self._leave(block)
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
        self._conclude(whole.calls)

    def _acknowledge(self, block: Block, failures: list[Failure]) -> None:
        first = block.columns[:, SEQ]
        end = first + np.uint64(len(block.x))
        for failure in failures:
            end[failure.column] = first[failure.column] + np.uint64(failure.timestep)
        self._table.came(block.rows, first, end)

    def refused(self, block: Block, refusal: Refusal, now: float) -> None:
        """A block's ERROR came: nothing of it was applied."""
        if refusal.code is not Code.BUSY:
            failures = [
                Failure(column, 0, refusal.code, refusal.sentence, int(seq))
                for column, seq in enumerate(block.columns[:, SEQ])
            ]
            outputs = np.full((*block.x.shape[:2], self._outputs), np.nan, np.float32)
            self.answered(block, Stepped(outputs, failures, (0, 0, 0)))
            return
        self._leave(block)
        self.congested = True
        self._resend_at = max(self._resend_at, now + refusal.retry_after_s)
        self._table.held[block.rows] = True
        self._refused.append(block)

    def end(self, rows: Indices, code: Code, sentence: str) -> None:
        """The server ended streams: what waits for them fails; what groups have on the way will be answered."""
        self._table.end(rows, code, sentence)
        lanes: dict[Lane, None] = {}
        for row in rows.tolist():
            lane = self._table.lanes[row]
            if lane is not None:
                lanes[lane] = None
        for lane in lanes:
            lane.has_ended = True
            for call in list(lane.calls):
                if isinstance(call, StepCall):
                    ended = call.rows[self._table.ended[call.rows] != 0]
                    if len(ended):
                        self._abort(call, StreamEvicted(code, sentence, lane.name_of(ended[0])))
                elif lane.single:
                    call.fail(StreamEvicted(code, sentence, lane.names[0]))
                    self._outbox.wake(call)
            self._outbox.wake(lane)
        for block in [*self._on_the_way, *self._refused]:
            for step in block.calls:
                if step.lane in lanes and step.lane.single:
                    self._end(step, StreamEvicted(code, sentence, step.lane.names[0]))

    def withdraw(self, call: StepCall) -> None:
        """Nobody waits for a call any more: what of it was not sent is not sent; the rest stays on its way."""
        if call in call.lane.calls:
            self._abort(call, InstepError("the call was cancelled"))

    def take(self, lane: Lane) -> StepCall | None:
        """The next pipelined send that is done, in the order of the sends."""
        if not lane.results or not lane.results[0].done:
            return None
        call = lane.results.popleft()
        lane.unread -= call.frames
        self._full_since.pop(lane, None)
        self.enqueue(lane)
        return call

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """The connection is over: everything that waits or is on its way fails."""
        for block in [*self._on_the_way, *self._refused]:
            for step in block.calls:
                self._end(step, error(sentence))
        for lane in self._table.live_lanes():
            for call in list(lane.calls):
                self._abort(call, error(sentence))
            self._outbox.wake(lane)
        self._line.clear()
        self._full_since.clear()

    def _take_turns(self, now: float) -> bool:
        """One round: the next block's worth of every lane in line, single frames side by side."""
        room = self._credit - self.unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            lane = self._line[0]
            call = lane.calls[0]
            if isinstance(call, CloseCall):
                self._pause(lane)
                if lane.unanswered == 0:
                    lane.calls.popleft()
                    self._openings.close(call)
                continue
            begins = call.keep and not call.started
            if begins and lane.unread and lane.unread + call.frames > self._credit:
                self._pause(lane)
                self._full_since[lane] = now
                continue
            if call.next_frames() > room:
                break
            if not self._table.in_window(*call.next_rows(), self._window):
                self._pause(lane)  # until some of its outputs have come
                continue
            self._line.popleft()
            if begins:
                lane.unread += call.frames
            moved = True
            if call.lone and lane.rewound_at < call.stamp:
                singles.append(call)
                call.advance()
                lane.unanswered += 1
                room -= 1
                if len(singles) == self._most_columns:
                    self._post(Block.of_singles(self._table, singles))
                    singles = []
            else:
                block = self._next_block(call)
                if block is not None:
                    lane.unanswered += block.frames
                    room -= block.frames
                    self._post(block)
            if call.sent:
                lane.calls.popleft()
                if call.keep:
                    self._outbox.wake(call)
                if call.left == 0:
                    self._conclude((call,))
            if lane.calls:
                self._line.append(lane)
            else:
                lane.queued = False
        if singles:
            self._post(Block.of_singles(self._table, singles))
        return moved

    def _pause(self, lane: Lane) -> None:
        """Out of line until something happens to the lane."""
        self._line.popleft()
        lane.queued = False

    def _next_block(self, call: StepCall) -> Block | None:
        """The block of a call's next piece, without the streams that were set back since the call was made."""
        timesteps, columns = call.next_piece()
        call.advance()
        rows = call.rows[columns]
        x = call.x[timesteps, columns]
        where: Indices | slice = columns
        if call.lane.rewound_at > call.stamp:
            fresh = self._table.rewound_at[rows] < call.stamp
            for index in np.flatnonzero(~fresh).tolist():
                expected = int(self._table.columns[rows[index], SEQ])
                call.refuse(columns.start + index, Failed(expected, Code.SEQ_GAP, BEHIND, expected))
                call.left -= len(x)
            if not np.any(fresh):
                return None
            where = columns.start + np.flatnonzero(fresh)
            rows = rows[fresh]
            x = np.ascontiguousarray(x[:, fresh])
        return Block.of_piece(self._table, call, rows, x, timesteps.start, where)

    def _post(self, block: Block) -> None:
        frames: Message = [block.columns.tobytes(), raw(block.x)]
        block.request = self._outbox.ask(Kind.STEP, block, *block.x.shape, F32_NAME, frames=frames)
        self._on_the_way[block] = None
        self.unanswered_frames += block.frames

    def _leave(self, block: Block) -> None:
        del self._on_the_way[block]
        self.unanswered_frames -= block.frames

    def _resend(self) -> None:
        blocks = sorted(self._refused, key=lambda block: block.request)
        self._refused = []
        self._table.held[:] = False
        self.congested = False
        for block in blocks:
            lost = (self._table.rewound_at[block.rows] > block.stamps()) | (self._table.ended[block.rows] != 0)
            if np.any(lost):
                self._give_up(block.take(np.flatnonzero(lost)))
                block = block.take(np.flatnonzero(~lost))
            if len(block.rows):
                self._post(block)

    def _give_up(self, block: Block) -> None:
        """Refused frames that may not be sent again: their stream was set back or ended meanwhile."""
        for column, row in enumerate(block.rows.tolist()):
            call, index = block.owner(column)
            code = Code(int(self._table.ended[row]) or Code.SEQ_GAP)
            sentence = self._table.sentences.get(code, BEHIND)
            expected = int(self._table.columns[row, SEQ])
            call.refuse(index, Failed(int(block.columns[column, SEQ]), code, sentence, expected))
        block.settle()
        self._conclude(block.calls)

    def _sort_failures(self, block: Block, failures: list[Failure]) -> list[int]:
        """Tell the calls what failed and set the streams back; returns the columns that only wait for a BUSY one."""
        held: list[int] = []
        ending: dict[tuple[Code, str], list[int]] = {}
        for column, timestep, code, sentence, expected in failures:
            call, index = block.owner(column)
            row = int(block.rows[column])
            stale = bool(self._table.rewound_at[row] > call.stamp)
            if code is Code.SEQ_GAP and timestep == 0 and self._table.held[row] and not stale:
                held.append(column)
                continue
            seq = int(block.columns[column, SEQ]) + timestep
            call.refuse(index, Failed(seq, code, sentence, expected))
            if code in ENDING:
                ending.setdefault((code, sentence), []).append(row)
            else:
                self._set_back(row, call, expected)
        for (code, sentence), rows in ending.items():
            self.end(np.array(rows, np.int64), code, sentence)
        return held

    def _set_back(self, row: int, call: StepCall, expected: int) -> None:
        """The stream goes on from the seq the server expects.

        What was asked for before the last set-back says nothing new. (Should a step on the server fail after a later
        frame of the stream was refused, the stream's next frame is refused once more, and that sets it right.)
        """
        table = self._table
        if call.stamp > table.rewound_at[row]:
            table.rewound_at[row] = call.lane.rewound_at = self.stamp()
            table.columns[row, SEQ] = expected

    def _conclude(self, calls: Iterable[StepCall]) -> None:
        """End the calls of which every frame was answered, and let their lanes go on."""
        for call in calls:
            if call.left == 0 and not call.done:
                call.conclude()
                self._tell(call)
            lane = call.lane
            if lane.calls:
                self.enqueue(lane)

    def _abort(self, call: StepCall | CloseCall, error: InstepError) -> None:
        """End a call that was not sent completely."""
        lane = call.lane
        lane.calls.remove(call)
        if lane.queued and not lane.calls:
            self._line.remove(lane)
            lane.queued = False
        self._full_since.pop(lane, None)
        self.enqueue(lane)
        if isinstance(call, StepCall):
            if call.keep:
                lane.results.remove(call)
                if call.started:
                    lane.unread -= call.frames
            self._end(call, error)
        else:
            call.fail(error)
            self._outbox.wake(call)

    def _end(self, call: StepCall, error: InstepError) -> None:
        if not call.done:
            call.fail(error)
            self._tell(call)

    def _tell(self, call: StepCall) -> None:
        self._outbox.wake(call)
        if call.keep:
            self._outbox.wake(call.lane)
