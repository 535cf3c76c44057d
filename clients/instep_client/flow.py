"""The order of sending: stream handles take turns, within the server's credit and the window of each stream."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from instep_client.arrays import Indices
from instep_client.handles import FailedFrames, StepCall, StreamHandle, TurnRequest
from instep_client.in_flight import BEHIND, InFlight, StepBlock
from instep_client.pending import MAX_REPLY_BYTES, Pending
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import COLUMN, MAX_BLOCK_STREAMS, ServerInfo
from instep_client.replies import ErrorReply, Stepped
from instep_client.sleepers import EndedRows, Sleepers
from instep_client.streams import OpenStreams


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
        self._line: deque[StreamHandle] = deque()
        """The handles that take turns."""
        self._waking: dict[StreamHandle, Indices] = {}
        """The handles that wait for streams that hibernate, and the rows of those."""
        self._full_since: dict[StreamHandle, float] = {}
        """The handles that wait until the user takes outputs, and since when there are any; infinity for not yet."""
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
        handle = call.handle
        if call.keep:
            handle.results.append(call)
        handle.steps.append(call)
        if handle.is_idle:
            handle.is_idle = False
            self._line.append(handle)

    def enqueue(self, request: TurnRequest) -> None:
        """A request whose turn comes after the calls that were made through its stream handle before."""
        request.stamp = self._table.stamp()
        request.handle.requests.append(request)
        self._continue(request.handle)

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
        for handle, since in list(self._full_since.items()):
            if since == math.inf and handle.results[0].done:
                self._full_since[handle] = now
            elif now >= since + self._timeout_s:
                self._abort(handle.steps[0], _nobody_reads(handle))
        for handle, rows in list(self._waking.items()):
            if not self._sleepers.wake(rows):
                del self._waking[handle]
                self.release(handle)

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

    def end(self, reasons: EndedRows) -> None:
        """Streams have ended: what waits for them fails, except the steps of groups, which go on for the others."""
        handles: dict[StreamHandle, None] = {}
        for (code, sentence), rows in reasons.items():
            self._table.end(np.array(rows, np.int64), code, sentence)
            handles.update((handle, None) for row in rows if (handle := self._table.handles[row]) is not None)
        for handle in handles:
            handle.has_ended = True
            self._end_unsent(handle)
            self._pending.woken.append(handle)
        for block in self.in_flight.blocks():
            for step in block.calls:
                if step.handle in handles and step.handle.single:
                    self._end(step, self._table.why_ended(int(step.rows[0])))

    def withdraw(self, call: StepCall) -> None:
        """Nobody waits for a call any more: what of it was not sent is not sent; the rest stays on its way."""
        if call in call.handle.steps:
            self._abort(call, InstepError("the call was cancelled"))

    def take(self, handle: StreamHandle) -> StepCall | None:
        """The next pipelined send that is done, in the order of the sends."""
        if not handle.results or not handle.results[0].done:
            return None
        call = handle.results.popleft()
        handle.unread -= call.frames
        if self._full_since.pop(handle, None) is not None:
            self.release(handle)
        return call

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """The session is over: everything that waits or is in flight fails."""
        for block in self.in_flight.blocks():
            for step in block.calls:
                self._end(step, error(sentence))
        for handle in self._table.live_handles():
            for call in list(handle.steps):
                self._abort(call, error(sentence))
            for request in handle.requests:
                request.fail(error(sentence))
                self._pending.woken.append(request)
            handle.requests.clear()
            self._pending.woken.append(handle)
        self._line.clear()
        self._full_since.clear()

    def _continue(self, handle: StreamHandle) -> None:
        """Put a handle in line, unless it has nothing to send or something holds it up."""
        if handle.is_idle and (handle.steps or handle.requests):
            handle.is_idle = False
            self._line.append(handle)

    def release(self, handle: StreamHandle) -> None:
        """Let a handle continue that had to wait."""
        handle.is_idle = True
        self._continue(handle)

    def _take_turns(self, now: float) -> bool:
        """One round: the next block's worth of every stream handle in line, single frames side by side."""
        room = self.in_flight.credit - self.in_flight.unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            handle = self._line.popleft()
            if handle.requests and (not handle.steps or handle.requests[0].stamp < handle.steps[0].stamp):
                self._take_request(handle.requests[0])
                continue
            if not handle.steps:
                handle.is_idle = True  # the user has taken back what was to be sent
                continue
            call = handle.steps[0]
            if handle.has_sleepers and self._wakes(handle, call.rows):
                continue
            begins = call.keep and not call.started
            if begins and handle.unread and handle.unread + call.frames > self.in_flight.credit:
                self._full_since[handle] = now if handle.results[0].done else math.inf
                continue
            rows, timesteps = (call.rows, 1) if call.lone else call.next_rows()
            if timesteps * len(rows) > room:
                self._line.appendleft(handle)
                break
            if handle.unanswered and not self._table.in_window(rows, timesteps, self._window):
                handle.is_idle = True  # until some of its outputs have come
                continue
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
                handle.steps.popleft()
                if call.keep:
                    self._pending.woken.append(call)
                if call.left == 0:
                    self._conclude((call,))
            if handle.steps or handle.requests:
                self._line.append(handle)
            else:
                handle.is_idle = True
        if singles:
            self.in_flight.post(StepBlock.of_singles(self._table, singles))
        return moved

    def _take_request(self, request: TurnRequest) -> None:
        handle = request.handle
        if request.needs_all_awake and handle.has_sleepers and self._wakes(handle, handle.rows):
            return
        handle.is_idle = handle.unanswered > 0  # until everything sent was answered, then until the request was
        if not handle.is_idle:
            handle.requests.popleft()
            request.ask()

    def _wakes(self, handle: StreamHandle, rows: Indices) -> bool:
        """Whether a handle has to wait until streams that hibernate are awake."""
        if not self._sleepers.wake(rows):
            return False
        self._waking[handle] = rows
        return True

    def _next_block(self, call: StepCall) -> StepBlock | None:
        """The block of a call's next piece, without the streams that were rewound or ended since the call was made.

        The next seqs of its streams move on.
        """
        table = self._table
        timesteps, columns = call.next_piece()
        call.advance()
        where = np.arange(columns.start, columns.stop)
        rows, x = call.rows[where], call.x[timesteps, columns]
        if call.handle.rewound_at > call.stamp or call.handle.has_ended:
            fresh = (table.rewound_at[rows] < call.stamp) & (table.ended[rows] == 0)
            for index in np.flatnonzero(~fresh).tolist():
                expected = int(table.seqs[rows[index]])
                code = Code(int(table.ended[rows[index]]) or Code.SEQ_GAP)
                sentence = table.sentences.get(code, BEHIND)
                call.refuse(int(where[index]), FailedFrames(expected, code, sentence, expected))
                call.left -= len(x)
            if not np.any(fresh):
                return None
            where, rows, x = where[fresh], rows[fresh], np.ascontiguousarray(x[:, fresh])
        return StepBlock((call,), rows, table.take_columns(rows, len(x)), x, timesteps.start, where)

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
                call.conclude(self._table.why_any_ended)
                self._tell(call)
            self._continue(call.handle)

    def _end_unsent(self, handle: StreamHandle) -> None:
        """Some streams of a handle have ended: its waiting calls fail, except the steps of a group.

        `_next_block` sends those without the ended streams. If a step failed here, its caller would repeat it for the
        other streams, but steps made in the meantime would be sent first, and a step that was partly sent would be
        applied twice.
        """
        for call in list(handle.steps) if handle.single else ():
            error = self._table.why_any_ended(call.rows)
            if error is not None:
                self._abort(call, error)
        for request in list(handle.requests):
            error = self._table.why_any_ended(handle.rows)
            if error is not None and request.streams_ended(error):
                handle.requests.remove(request)
                self._continue(handle)
                request.fail(error)
            if request.done:
                self._pending.woken.append(request)

    def _abort(self, call: StepCall, error: InstepError) -> None:
        """End a call that was not sent completely."""
        handle = call.handle
        handle.steps.remove(call)
        if self._full_since.pop(handle, None) is not None:
            self.release(handle)
        self._continue(handle)
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
