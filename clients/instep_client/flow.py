"""What is sent when: lanes take turns, and the server's credit and each stream's window bound what is unanswered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from instep_client.arrays import Indices
from instep_client.blocks import Block
from instep_client.calls import Failed, StepCall
from instep_client.outbox import MAX_REPLY_BYTES, Outbox
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import COLUMN, MAX_BLOCK_STREAMS, Code, ServerInfo
from instep_client.requests import CloseCall, LaneCall
from instep_client.streams import SEQ, Lane, StreamTable
from instep_client.transit import BEHIND, Transit


class Flow:
    """The lanes of one session, from the user's calls to blocks on their way.

    Args:
        table: the streams.
        info: what the server takes.
        outbox: where blocks go.
        ask: asks for what a call wants whose turn has come.
        shutdown_s: as for `Transit`.
    """

    def __init__(
        self,
        table: StreamTable,
        info: ServerInfo,
        outbox: Outbox,
        ask: Callable[[LaneCall], None],
        shutdown_s: float,
    ) -> None:
        self._table = table
        self._outbox = outbox
        self._ask = ask
        self._credit = info.credit_frames
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
        self.transit = Transit(table, outbox, info.outputs, shutdown_s, self._conclude, self.end)
        self._full_since: dict[Lane, float] = {}

    def submit(self, call: StepCall) -> None:
        """A new step call; it is sent when its lane's turn comes."""
        if not call.lone:
            call.cut(self._most_frames, self._most_columns, max(1, self._window // 2))
        if call.keep:
            call.lane.results.append(call)
        self.enqueue(call.lane, call)

    def enqueue(self, lane: Lane, call: StepCall | LaneCall | None = None) -> None:
        """The lane has something to send, or may be able to go on."""
        if call is not None:
            lane.calls.append(call)
        if lane.calls and not (lane.queued or lane.asking or lane in self._full_since):
            lane.queued = True
            self._line.append(lane)

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
        if not self.transit.is_free(now):
            return
        while self._line and self._take_turns(now):
            pass

    def deadline(self, timeout_s: float) -> float | None:
        """When `advance` has something to do though no message comes."""
        times = [since + timeout_s for since in self._full_since.values()]
        resend_at = self.transit.deadline()
        if resend_at is not None:
            times.append(resend_at)
        return min(times, default=None)

    def end(self, rows: Indices, code: Code, sentence: str) -> None:
        """Streams have ended: what waits for them fails; what groups have on the way will be answered."""
        self._table.end(rows, code, sentence)
        lanes: dict[Lane, None] = {}
        for row in rows.tolist():
            lane = self._table.lanes[row]
            if lane is not None:
                lanes[lane] = None
        for lane in lanes:
            lane.has_ended = True
            for call in list(lane.calls):
                if isinstance(call, CloseCall):
                    if lane.single:  # it stays, to give the row back when nothing is unanswered
                        call.fail(self._table.why_ended(int(lane.rows[0])))
                        self._outbox.wake(call)
                    continue
                concerned = call.rows if isinstance(call, StepCall) else lane.rows
                ended = concerned[self._table.ended[concerned] != 0]
                if len(ended):
                    self._abort(call, self._table.why_ended(int(ended[0])))
            self._outbox.wake(lane)
        for block in self.transit.blocks():
            for step in block.calls:
                if step.lane in lanes and step.lane.single:
                    self._end(step, self._table.why_ended(int(step.rows[0])))

    def withdraw(self, call: StepCall) -> None:
        """Nobody waits for a call any more: what of it was not sent is not sent; the rest stays on its way."""
        if call in call.lane.calls:
            self._abort(call, InstepError("the call was cancelled"))

    def answered(self, lane: Lane) -> None:
        """What else was asked of a lane was answered: it goes on."""
        lane.asking = False
        self.enqueue(lane)

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
        for block in self.transit.blocks():
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
        room = self._credit - self.transit.unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            lane = self._line[0]
            call = lane.calls[0]
            if not isinstance(call, StepCall):
                self._pause(lane)
                if lane.unanswered == 0:
                    lane.calls.popleft()
                    lane.asking = True
                    self._ask(call)
                continue
            begins = call.keep and not call.started
            if begins and lane.unread and lane.unread + call.frames > self._credit:
                self._pause(lane)
                self._full_since[lane] = now
                continue
            if call.next_frames() > room:
                break
            if lane.unanswered and not self._table.in_window(*call.next_rows(), self._window):
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
                    self.transit.post(Block.of_singles(self._table, singles))
                    singles = []
            else:
                block = self._next_block(call)
                if block is not None:
                    lane.unanswered += block.frames
                    room -= block.frames
                    self.transit.post(block)
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
            self.transit.post(Block.of_singles(self._table, singles))
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

    def _conclude(self, calls: Iterable[StepCall]) -> None:
        """End the calls of which every frame was answered, and let their lanes go on."""
        for call in calls:
            if call.left == 0 and not call.done:
                call.conclude()
                self._tell(call)
            lane = call.lane
            if lane.calls:
                self.enqueue(lane)

    def _abort(self, call: StepCall | LaneCall, error: InstepError) -> None:
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
