"""The order of sending: stream handles take turns, within the server's credit and the window of each stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from instep_client.arrays import Indices
from instep_client.blocks import StepBlock
from instep_client.calls import OutputsCall
from instep_client.in_flight import BEHIND, InFlight
from instep_client.outbox import MAX_REPLY_BYTES, Outbox
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import COLUMN, MAX_BLOCK_STREAMS, Code, ServerInfo
from instep_client.requests import CloseCall, QueuedCall
from instep_client.sleepers import Sleepers
from instep_client.steps import FailedFrames, StepCall
from instep_client.streams import SEQ, OpenStreams, StreamHandle


class SendQueue:
    """The calls of one stream handle that were not sent, or not sent completely, in the order they were made."""

    __slots__ = ("calls", "handle", "in_line", "is_waking", "request_pending")

    def __init__(self, handle: StreamHandle) -> None:
        self.handle = handle
        self.calls: deque[StepCall | QueuedCall] = deque()
        self.in_line = False
        """Whether it is among those that take turns."""
        self.request_pending = False
        """Whether a request other than STEP is unanswered; nothing more is sent until it is answered."""
        self.is_waking = False
        """Whether streams that its next call is about hibernate, and were asked for."""


class Flow:
    """The stream handles of one session, from the user's calls to blocks in flight.

    Args:
        table: the streams.
        info: what the server takes.
        outbox: where blocks go.
        ask: asks for what a call wants whose turn has come.
        sleepers: wakes streams that hibernate.
        shutdown_s: as for `InFlight`.
    """

    def __init__(
        self,
        table: OpenStreams,
        info: ServerInfo,
        outbox: Outbox,
        ask: Callable[[QueuedCall], None],
        sleepers: Sleepers,
        shutdown_s: float,
    ) -> None:
        self._table = table
        self._sleepers = sleepers
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
        self._queues: dict[StreamHandle, SendQueue] = {}
        """From a handle's first call until it is closed."""
        self._line: deque[SendQueue] = deque()
        """The queues that take turns."""
        self.in_flight = InFlight(table, outbox, sleepers, info.outputs, shutdown_s, self._conclude, self.end)
        self._full_since: dict[SendQueue, float] = {}
        """The queues that wait until the user takes outputs, and since when."""

    def submit(self, call: StepCall) -> None:
        """A new step call; it is sent when its stream handle's turn comes."""
        if not call.lone:
            call.cut(self._most_frames, self._most_columns, max(1, self._window // 2))
        if call.keep:
            call.handle.results.append(call)
        self.enqueue(call)

    def enqueue(self, call: StepCall | QueuedCall) -> None:
        """A call whose turn comes after those that were made through its stream handle before."""
        queue = self._queues.get(call.handle)
        if queue is None:
            queue = self._queues[call.handle] = SendQueue(call.handle)
        queue.calls.append(call)
        self._continue(queue)

    def _continue(self, queue: SendQueue) -> None:
        """Put a queue in line, unless it has nothing to send or something holds it up."""
        is_held_up = queue.in_line or queue.request_pending or queue.is_waking or queue in self._full_since
        if queue.calls and not is_held_up:
            queue.in_line = True
            self._line.append(queue)

    def advance(self, now: float, timeout_s: float) -> None:
        """Send everything that may be sent at `now`."""
        for queue, since in list(self._full_since.items()):
            if now >= since + timeout_s:
                self._abort(queue, queue.calls[0], _nobody_reads(queue.handle))
        if not self.in_flight.is_free(now):
            return
        while self._line and self._take_turns(now):
            pass

    def deadline(self, timeout_s: float) -> float | None:
        """When `advance` has something to do though no message comes."""
        times = [since + timeout_s for since in self._full_since.values()]
        resend_at = self.in_flight.deadline()
        if resend_at is not None:
            times.append(resend_at)
        return min(times, default=None)

    def end(self, rows: Indices, code: Code, sentence: str) -> None:
        """Streams have ended: what waits for them fails; what groups have on the way will be answered."""
        self._table.end(rows, code, sentence)
        handles: dict[StreamHandle, None] = {}
        for row in rows.tolist():
            handle = self._table.handles[row]
            if handle is not None:
                handles[handle] = None
        for handle in handles:
            handle.has_ended = True
            if handle in self._queues:
                self._end_queued(self._queues[handle])
            self._outbox.wake(handle)
        for block in self.in_flight.blocks():
            for step in block.calls:
                if step.handle in handles and step.handle.single:
                    self._end(step, self._table.why_ended(int(step.rows[0])))

    def _end_queued(self, queue: SendQueue) -> None:
        """Some streams of a queue have ended: its calls about them fail."""
        handle = queue.handle
        for call in list(queue.calls):
            if isinstance(call, CloseCall):
                if handle.single:  # it stays, to give the row back when nothing is unanswered
                    call.fail(self._table.why_ended(int(handle.rows[0])))
                    self._outbox.wake(call)
                continue
            concerned = call.rows if isinstance(call, StepCall) else handle.rows
            ended = concerned[self._table.ended[concerned] != 0]
            if len(ended):
                self._abort(queue, call, self._table.why_ended(int(ended[0])))

    def withdraw(self, call: StepCall) -> None:
        """Nobody waits for a call any more: what of it was not sent is not sent; the rest stays on its way."""
        queue = self._queues.get(call.handle)
        if queue is not None and call in queue.calls:
            self._abort(queue, call, InstepError("the call was cancelled"))

    def answered(self, handle: StreamHandle) -> None:
        """A request other than STEP was answered, on which the calls behind it wait."""
        queue = self._queues[handle]
        queue.request_pending = False
        if handle.closed:
            del self._queues[handle]
        else:
            self._continue(queue)

    def take(self, handle: StreamHandle) -> OutputsCall | None:
        """The next pipelined send that is done, in the order of the sends."""
        if not handle.results or not handle.results[0].done:
            return None
        call = handle.results.popleft()
        handle.unread -= call.frames
        queue = self._queues.get(handle)
        if queue is not None:
            self._full_since.pop(queue, None)
            self._continue(queue)
        return call

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """The session is over: everything that waits or is in flight fails."""
        for block in self.in_flight.blocks():
            for step in block.calls:
                self._end(step, error(sentence))
        for queue in self._queues.values():
            for call in list(queue.calls):
                self._abort(queue, call, error(sentence))
        for handle in self._table.live_handles():
            self._outbox.wake(handle)
        self._line.clear()
        self._full_since.clear()

    def _take_turns(self, now: float) -> bool:
        """One round: the next block's worth of every stream handle in line, single frames side by side."""
        room = self._credit - self.in_flight.unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            queue = self._line[0]
            handle, call = queue.handle, queue.calls[0]
            # A close wakes its streams itself, some at a time: the server may not have room for all of them.
            if handle.has_sleepers and not isinstance(call, CloseCall):
                rows = call.rows if isinstance(call, StepCall) else handle.rows
                if self._wakes(queue, rows):
                    continue
            if not isinstance(call, StepCall):
                self._pause(queue)
                if handle.unanswered == 0:
                    queue.calls.popleft()
                    queue.request_pending = True
                    self._ask(call)
                continue
            begins = call.keep and not call.started
            if begins and handle.unread and handle.unread + call.frames > self._credit:
                self._pause(queue)
                self._full_since[queue] = now
                continue
            if call.next_frames() > room:
                break
            if handle.unanswered and not self._table.in_window(*call.next_rows(), self._window):
                self._pause(queue)  # until some of its outputs have come
                continue
            self._line.popleft()
            if begins:
                handle.unread += call.frames
            moved = True
            if call.lone and handle.rewound_at < call.stamp:
                singles.append(call)
                call.advance()
                handle.unanswered += 1
                room -= 1
                if len(singles) == self._most_columns:
                    self.in_flight.post(StepBlock.of_singles(self._table, singles))
                    singles = []
            else:
                block = self._next_block(call)
                if block is not None:
                    handle.unanswered += block.frames
                    room -= block.frames
                    self.in_flight.post(block)
            if call.sent:
                queue.calls.popleft()
                if call.keep:
                    self._outbox.wake(call)
                if call.left == 0:
                    self._conclude((call,))
            if queue.calls:
                self._line.append(queue)
            else:
                queue.in_line = False
        if singles:
            self.in_flight.post(StepBlock.of_singles(self._table, singles))
        return moved

    def _wakes(self, queue: SendQueue, rows: Indices) -> bool:
        """Whether the first queue has to wait until streams that hibernate are awake."""
        if not self._table.asleep[rows].any():
            return False
        self._pause(queue)
        queue.is_waking = True

        def go_on() -> None:
            queue.is_waking = False
            self._continue(queue)

        self._sleepers.wake(rows, go_on)
        return True

    def _pause(self, queue: SendQueue) -> None:
        """Take the first queue out of line until something happens to its stream handle."""
        self._line.popleft()
        queue.in_line = False

    def _next_block(self, call: StepCall) -> StepBlock | None:
        """The block of a call's next piece, without the streams that were rewound since the call was made."""
        timesteps, columns = call.next_piece()
        call.advance()
        rows = call.rows[columns]
        x = call.x[timesteps, columns]
        where: Indices | slice = columns
        if call.handle.rewound_at > call.stamp:
            fresh = self._table.rewound_at[rows] < call.stamp
            for index in np.flatnonzero(~fresh).tolist():
                expected = int(self._table.columns[rows[index], SEQ])
                call.refuse(columns.start + index, FailedFrames(expected, Code.SEQ_GAP, BEHIND, expected))
                call.left -= len(x)
            if not np.any(fresh):
                return None
            where = columns.start + np.flatnonzero(fresh)
            rows = rows[fresh]
            x = np.ascontiguousarray(x[:, fresh])
        return StepBlock.of_piece(self._table, call, rows, x, timesteps.start, where)

    def _conclude(self, calls: Iterable[StepCall]) -> None:
        """End the calls of which every frame was answered, and let their stream handles go on."""
        for call in calls:
            if call.left == 0 and not call.done:
                call.conclude()
                self._tell(call)
            self._continue(self._queues[call.handle])

    def _abort(self, queue: SendQueue, call: StepCall | QueuedCall, error: InstepError) -> None:
        """End a call that was not sent completely."""
        handle = queue.handle
        queue.calls.remove(call)
        if queue.in_line and not queue.calls:
            self._line.remove(queue)
            queue.in_line = False
        self._full_since.pop(queue, None)
        self._continue(queue)
        if isinstance(call, StepCall):
            if call.keep:
                handle.results.remove(call)
                if call.started:
                    handle.unread -= call.frames
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
            self._outbox.wake(call.handle)


def _nobody_reads(handle: StreamHandle) -> InstepError:
    return InstepError(
        f"nobody reads the outputs of stream {handle.names[0]!r}: {handle.unread} frames wait to be taken; "
        "iterate over the stream while sending, in another task or thread"
    )
