"""The order of sending: stream handles take turns, within the server's credit and the window of each stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from instep_client.arrays import Indices
from instep_client.calls import OutputsCall
from instep_client.in_flight import BEHIND, InFlight
from instep_client.pending import MAX_REPLY_BYTES, Pending
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import COLUMN, MAX_BLOCK_STREAMS, ServerInfo
from instep_client.replies import ErrorReply, Stepped
from instep_client.sleepers import EndedRows, Sleepers, TurnRequest
from instep_client.steps import FailedFrames, StepBlock, StepCall
from instep_client.streams import OpenStreams, StreamHandle


class SendQueue:
    """The calls of one stream handle that were not sent, or not sent completely, in the order they were made."""

    def __init__(self, handle: StreamHandle) -> None:
        self.handle = handle
        self.steps: deque[StepCall] = deque()
        self.requests: deque[TurnRequest] = deque()
        self.is_idle = True
        """Whether it is not in line, and not held up by a request that was asked, by streams that hibernate or by
        outputs that nobody takes. What it holds waits for answers then."""

    def next_request(self) -> TurnRequest | None:
        """The request whose turn it is, if it is not a step's."""
        if not self.requests or (self.steps and self.steps[0].stamp < self.requests[0].stamp):
            return None
        return self.requests[0]


class Flow:
    """The stream handles of one session, from the user's calls to blocks in flight.

    Args:
        table: the streams.
        pending: where messages go.
        sleepers: wakes streams that hibernate.
        timeout_s: how long outputs may wait to be taken while more are to be sent.
        shutdown_s: as for `InFlight`.
    """

    def __init__(
        self, table: OpenStreams, pending: Pending, sleepers: Sleepers, timeout_s: float, shutdown_s: float
    ) -> None:
        self._table = table
        self._sleepers = sleepers
        self._pending = pending
        self._timeout_s = timeout_s
        self._window = self._most_frames = self._most_columns = 1
        self._queues: dict[StreamHandle, SendQueue] = {}
        """From a handle's first call until it is closed."""
        self._line: deque[SendQueue] = deque()
        """The queues that take turns."""
        self._waking: dict[SendQueue, Indices] = {}
        """The queues that wait for streams that hibernate, and the rows of those."""
        self._full_since: dict[SendQueue, float] = {}
        """The queues that wait until the user takes outputs, and since when."""
        self.in_flight = InFlight(table, pending, sleepers, shutdown_s)

    def limit(self, info: ServerInfo) -> None:
        """Keep what the server takes."""
        self.in_flight.outputs_width = info.outputs
        self.in_flight.credit = info.credit_frames
        self._window = info.window_frames
        self._most_frames = max(
            1,
            min(
                info.max_block_frames,
                info.credit_frames // 4,  # a few blocks on the way at once, so that the server never waits for us
                info.max_message_bytes // (4 * max(info.features, 1)),
                MAX_REPLY_BYTES // (4 * info.outputs),
            ),
        )
        self._most_columns = max(
            1, min(self._most_frames, MAX_BLOCK_STREAMS, info.max_message_bytes // COLUMN.itemsize)
        )

    def submit(self, call: StepCall) -> None:
        """A new step call; it is sent when its stream handle's turn comes."""
        if not call.lone:
            call.cut(self._most_frames, self._most_columns, max(1, self._window // 2))
        if call.keep:
            call.handle.results.append(call)
        queue = self._queues.get(call.handle) or self._queue_of(call.handle)
        queue.steps.append(call)
        if queue.is_idle:
            queue.is_idle = False
            self._line.append(queue)

    def enqueue(self, request: TurnRequest) -> None:
        """A request whose turn comes after the calls that were made through its stream handle before."""
        queue = self._queue_of(request.handle)
        request.stamp = self._table.stamp()
        queue.requests.append(request)
        self._continue(queue)

    def advance(self, now: float) -> None:
        """Send everything that may be sent at `now`."""
        if self._full_since or self._waking:
            self._release_due(now)
        is_free = self.in_flight.is_free(now)
        self._settle()
        if is_free:
            while self._line and self._take_turns(now):
                pass

    def _release_due(self, now: float) -> None:
        for queue, since in list(self._full_since.items()):
            if now >= since + self._timeout_s:
                self._abort(queue, queue.steps[0], _nobody_reads(queue.handle))
        for queue, rows in list(self._waking.items()):
            if not self._sleepers.wake(rows):
                del self._waking[queue]
                self._release(queue)

    def deadline(self) -> float:
        """When `advance` has something to do though no message comes; infinity for never."""
        if not self._full_since:
            return self.in_flight.deadline()
        return min(min(self._full_since.values()) + self._timeout_s, self.in_flight.deadline())

    def stepped(self, answer: Stepped) -> None:
        """STEPPED came for a block.

        Raises:
            MalformedMessage: when it answers nothing that was asked.
        """
        self.in_flight.answered(answer)
        self._settle()

    def refused(self, number: int, refusal: ErrorReply, now: float) -> bool:
        """ERROR came for a block, if there is one of that number."""
        is_known = self.in_flight.refused(number, refusal, now)
        self._settle()
        return is_known

    def request_answered(self, handle: StreamHandle) -> None:
        """A request was answered, on which the calls behind it wait."""
        queue = self._queues[handle]
        if handle.closed:
            del self._queues[handle]
        else:
            self._release(queue)

    def end(self, reasons: EndedRows) -> None:
        """Streams have ended: what waits for them fails; what groups have on the way will be answered."""
        handles: dict[StreamHandle, None] = {}
        for (code, sentence), rows in reasons.items():
            self._table.end(np.array(rows, np.int64), code, sentence)
            handles.update((handle, None) for row in rows if (handle := self._table.handles[row]) is not None)
        for handle in handles:
            handle.has_ended = True
            if handle in self._queues:
                self._end_queued(self._queues[handle])
            self._pending.woken.append(handle)
        for block in self.in_flight.blocks():
            for step in block.calls:
                if step.handle in handles and step.handle.single:
                    self._end(step, self._table.why_ended(int(step.rows[0])))

    def withdraw(self, call: StepCall) -> None:
        """Nobody waits for a call any more: what of it was not sent is not sent; the rest stays on its way."""
        queue = self._queues.get(call.handle)
        if queue is not None and call in queue.steps:
            self._abort(queue, call, InstepError("the call was cancelled"))

    def take(self, handle: StreamHandle) -> OutputsCall | None:
        """The next pipelined send that is done, in the order of the sends."""
        if not handle.results or not handle.results[0].done:
            return None
        call = handle.results.popleft()
        handle.unread -= call.frames
        queue = self._queues.get(handle)
        if queue is not None and self._full_since.pop(queue, None) is not None:
            self._release(queue)
        return call

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """The session is over: everything that waits or is in flight fails."""
        for block in self.in_flight.blocks():
            for step in block.calls:
                self._end(step, error(sentence))
        for queue in self._queues.values():
            for call in list(queue.steps):
                self._abort(queue, call, error(sentence))
            for request in queue.requests:
                request.fail(error(sentence))
                self._pending.woken.append(request)
            queue.requests.clear()
        for handle in self._table.live_handles():
            self._pending.woken.append(handle)
        self._line.clear()
        self._full_since.clear()

    def _queue_of(self, handle: StreamHandle) -> SendQueue:
        queue = self._queues.get(handle)
        if queue is None:
            queue = self._queues[handle] = SendQueue(handle)
        return queue

    def _continue(self, queue: SendQueue) -> None:
        """Put a queue in line, unless it has nothing to send or something holds it up."""
        if queue.is_idle and (queue.steps or queue.requests):
            queue.is_idle = False
            self._line.append(queue)

    def _release(self, queue: SendQueue) -> None:
        """What held a queue up is over."""
        queue.is_idle = True
        self._continue(queue)

    def _take_turns(self, now: float) -> bool:
        """One round: the next block's worth of every stream handle in line, single frames side by side."""
        room = self.in_flight.credit - self.in_flight.unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            queue = self._line[0]
            handle = queue.handle
            request = queue.next_request() if queue.requests else None
            if request is not None:
                self._line.popleft()
                self._take_request(queue, request, now)
                continue
            if not queue.steps:
                self._line.popleft()  # the user has taken back what was to be sent
                queue.is_idle = True
                continue
            call = queue.steps[0]
            if handle.has_sleepers and self._wakes(queue, call.rows):
                self._line.popleft()
                continue
            begins = call.keep and not call.started
            if begins and handle.unread and handle.unread + call.frames > self.in_flight.credit:
                self._line.popleft()
                self._full_since[queue] = now
                continue
            rows, timesteps = (call.rows, 1) if call.lone else call.next_rows()
            if timesteps * len(rows) > room:
                break
            if handle.unanswered and not self._table.in_window(rows, timesteps, self._window):
                self._line.popleft()
                queue.is_idle = True  # until some of its outputs have come
                continue
            self._line.popleft()
            if begins:
                handle.unread += call.frames
            moved = True
            if call.lone and handle.rewound_at < call.stamp:
                singles.append(call)
                call.sent = True
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
                queue.steps.popleft()
                if call.keep:
                    self._pending.woken.append(call)
                if call.left == 0:
                    self._conclude((call,))
            if queue.steps or queue.requests:
                self._line.append(queue)
            else:
                queue.is_idle = True
        if singles:
            self.in_flight.post(StepBlock.of_singles(self._table, singles))
        return moved

    def _take_request(self, queue: SendQueue, request: TurnRequest, now: float) -> None:
        if request.needs_all_awake and queue.handle.has_sleepers and self._wakes(queue, queue.handle.rows):
            return
        queue.is_idle = queue.handle.unanswered > 0  # until everything sent was answered, then until the request was
        if not queue.is_idle:
            queue.requests.popleft()
            request.ask(now)

    def _wakes(self, queue: SendQueue, rows: Indices) -> bool:
        """Whether a queue has to wait until streams that hibernate are awake."""
        if not self._sleepers.wake(rows):
            return False
        self._waking[queue] = rows
        return True

    def _next_block(self, call: StepCall) -> StepBlock | None:
        """The block of a call's next piece, without the streams that were rewound since the call was made.

        The next seqs of its streams move on.
        """
        timesteps, columns = call.next_piece()
        call.advance()
        where = np.arange(columns.start, columns.stop)
        rows, x = call.rows[where], call.x[timesteps, columns]
        if call.handle.rewound_at > call.stamp:
            fresh = self._table.rewound_at[rows] < call.stamp
            for index in np.flatnonzero(~fresh).tolist():
                expected = int(self._table.seqs[rows[index]])
                call.refuse(int(where[index]), FailedFrames(expected, Code.SEQ_GAP, BEHIND, expected))
                call.left -= len(x)
            if not np.any(fresh):
                return None
            where, rows, x = where[fresh], rows[fresh], np.ascontiguousarray(x[:, fresh])
        return StepBlock((call,), rows, self._table.take_columns(rows, len(x)), x, timesteps.start, where)

    def _settle(self) -> None:
        """Act on what answers have said."""
        if self.in_flight.ended:
            ended, self.in_flight.ended = self.in_flight.ended, {}
            self.end(ended)
        if self.in_flight.settled:
            settled, self.in_flight.settled = self.in_flight.settled, []
            self._conclude(settled)

    def _conclude(self, calls: Iterable[StepCall]) -> None:
        """End the calls of which every frame was answered, and let their stream handles go on."""
        for call in calls:
            if call.left == 0 and not call.done:
                call.conclude(self._table)
                self._tell(call)
            self._continue(self._queues[call.handle])

    def _end_queued(self, queue: SendQueue) -> None:
        """Some streams of a queue have ended: its calls about them fail."""
        for call in list(queue.steps):
            error = self._table.why_any_ended(call.rows)
            if error is not None:
                self._abort(queue, call, error)
        for request in list(queue.requests):
            error = self._table.why_any_ended(queue.handle.rows)
            if error is not None and request.streams_ended(error):
                queue.requests.remove(request)
                self._continue(queue)
                request.fail(error)
            if request.done:
                self._pending.woken.append(request)

    def _abort(self, queue: SendQueue, call: StepCall, error: InstepError) -> None:
        """End a call that was not sent completely."""
        handle = queue.handle
        queue.steps.remove(call)
        if self._full_since.pop(queue, None) is not None:
            self._release(queue)
        self._continue(queue)
        if call.keep:
            handle.results.remove(call)
            if call.started:
                handle.unread -= call.frames
        self._end(call, error)

    def _end(self, call: StepCall, error: InstepError) -> None:
        if not call.done:
            call.fail(error)
            self._tell(call)

    def _tell(self, call: StepCall) -> None:
        self._pending.woken.append(call)
        if call.keep:
            self._pending.woken.append(call.handle)


def _nobody_reads(handle: StreamHandle) -> InstepError:
    return InstepError(
        f"nobody reads the outputs of stream {handle.names[0]!r}: {handle.unread} frames wait to be taken; "
        "iterate over the stream while sending, in another task or thread"
    )
