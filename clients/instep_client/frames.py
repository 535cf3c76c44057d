"""Frames on their way: from a call of `step` through blocks in flight to its outputs.

`SendQueue` is the only place that sends frames. Stream handles take turns to send, within the server's credit and the
window of each stream. A block is in flight until the server has applied or finally refused each of its frames.

The server refuses a whole block with BUSY. Later blocks of the same streams then fail with SEQ_GAP, because a frame is
missing. So after a BUSY the queue sends nothing new until every block in flight was answered. It then sends the refused
frames again in their order, and new frames after them.

When the connection is lost, blocks in flight are sent again over the next connection, under the new handles. The server
answers frames that it has applied with the same outputs, and applies the others. A frame that was finally refused is
never sent again.

The server does not apply frames of a stream that hibernates, but wakes the stream. The queue sends them again under the
stream's new handle, once the frames that were sent under the old handle are answered. Other streams do not wait.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from instep_client.arguments import NOBODY, Indices
from instep_client.connection import MAX_REPLY_BYTES, Call, Outbox
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    FrameFailure,
    FramesRefused,
    InstepError,
    MalformedMessage,
    StepTimeout,
    StreamEvicted,
)
from instep_client.protocol.wire import COLUMN, F32, MAX_BLOCK_STREAMS, U64, ServerInfo, pack_step
from instep_client.replies import ColumnError, ErrorReply, Stepped
from instep_client.streams import ACKED, ENDING, HANDLE, SEQ, OpenStreams, StreamHandle

if TYPE_CHECKING:
    from instep_client.requests import TurnCall

BEHIND: Final = "an earlier frame of this stream was refused, so this one, which came after it, was not applied"
_DRAIN_RETRY_S: Final = 0.25
"""The delay before a block that a server refused because it shuts down is sent again."""
_ONE_COLUMN: Final[Indices] = np.zeros(1, np.int64)

EndedRows = dict[tuple[Code, str], list[int]]
"""Rows of ended streams, by reason."""


class TimedOutputs(NamedTuple):
    """The outputs of a step and where the server spent its time.

    The three times are the server's, in microseconds; for a step that was sent as several blocks each is the longest of
    any block.
    """

    outputs: F32
    """[outputs], [T, outputs], [N, outputs] or [T, N, outputs], as the frames were given."""
    queue_us: int
    """From the block's admission to the start of its last batch."""
    compute_us: int
    """The step of that batch."""
    send_us: int
    """From the end of that step until the server began to build the answer; copying the outputs and sending come after.
    0 if no frame of the block was admitted.
    """


class FailedFrames(NamedTuple):
    """The frames of a column that were not applied: those from `seq` on."""

    seq: int
    code: Code
    sentence: str
    expected_seq: int


class StepCall(Call[TimedOutputs]):
    """Frames [T, N, features] for some rows of one stream handle."""

    sent = False
    """Whether every frame was sent, or refused before it could be sent."""
    times = (0, 0, 0)
    t = n = 0
    """The timestep and column at which the next piece begins."""
    height = width = 1
    """The timesteps and columns of a piece."""
    _outputs: F32 | None = None

    def __init__(
        self,
        queue: SendQueue,
        handle: StreamHandle,
        rows: Indices,
        x: F32,
        shape: tuple[int, ...],
        stamp: int,
        keep: bool,
    ) -> None:
        self._queue = queue
        self.handle = handle
        self.rows = rows
        self.x = x
        self._shape = shape
        """The shape of the user's outputs."""
        self.stamp = stamp
        """The session's counter when it was made. If a stream is rewound later, none of this call's frames are sent for
        it.
        """
        self.keep = keep
        """Whether the outputs wait to be taken in order (a pipelined send)."""
        self.frames = self.left = len(x) * len(rows)
        """The number of frames; `left` is the number of those without a final answer."""
        self.lone = handle.single and self.frames == 1
        """Whether it is a single frame of one stream, which shares a block with others."""
        self.failures: dict[int, FailedFrames] = {}
        """The earliest failure of each column."""

    def cancel(self) -> None:
        """Drop unsent frames; see `Call.cancel`."""
        self._queue.withdraw(self, InstepError("the call was cancelled"))

    def time_out(self, timeout_s: float) -> None:
        """End it with StepTimeout and drop unsent frames."""
        error = StepTimeout(timeout_s, self.sent or self.started)
        self._queue.withdraw(self, error)
        self.fail(error)

    @property
    def started(self) -> bool:
        """Whether any of several frames was sent."""
        return self.t > 0 or self.n > 0

    def cut(self, most_frames: int, most_columns: int, most_timesteps: int) -> None:
        """Choose pieces within the limits: whole rows of streams if they fit, otherwise equal parts of a row."""
        columns = self.x.shape[1]
        parts = -(-columns // most_columns)
        self.width = -(-columns // parts)
        self.height = min(most_timesteps, max(1, most_frames // columns)) if parts == 1 else 1

    def next_piece(self) -> tuple[slice, slice]:
        """The timesteps and columns of the next piece."""
        timesteps, columns = self.x.shape[:2]
        return slice(self.t, min(self.t + self.height, timesteps)), slice(self.n, min(self.n + self.width, columns))

    def next_rows(self) -> tuple[Indices, int]:
        """The streams of the next piece, and its number of timesteps."""
        timesteps, columns = self.next_piece()
        return self.rows[columns], timesteps.stop - timesteps.start

    def advance(self) -> None:
        """Move on to the next piece."""
        self.n += self.width
        if self.n >= self.x.shape[1]:
            self.n = 0
            self.t += self.height
            self.sent = self.t >= len(self.x)

    def put(self, t: int, columns: Indices, outputs: F32) -> None:
        """Copy outputs of the timesteps from `t` on for some columns."""
        if outputs.shape[:2] == self.x.shape[:2]:
            self._outputs = outputs.copy()
            return
        if self._outputs is None:
            self._outputs = self._missing()
        self._outputs[t : t + len(outputs), columns] = outputs

    def put_lone(self, outputs: F32, times: tuple[int, int, int]) -> None:
        """Copy the outputs [outputs] of the only frame."""
        self._outputs = outputs.copy()
        self.times = times
        self.left = 0
        self.handle.unanswered -= 1

    def refuse(self, column: int, failed: FailedFrames) -> None:
        """Note that frames of a column were not applied; the earliest refusal counts."""
        known = self.failures.get(column)
        if known is None or failed.seq < known.seq:
            self.failures[column] = failed

    def conclude(self, table: OpenStreams) -> None:
        """Make the result, after every frame was answered."""
        outputs = self._missing() if self._outputs is None else self._outputs
        if outputs.shape != self._shape:
            outputs = outputs.reshape(self._shape)
        if not self.failures:
            self.finish(TimedOutputs(outputs, *self.times))
            return
        failures: list[FrameFailure] = []
        ended: StreamEvicted | None = None
        for column, failed in sorted(self.failures.items()):
            row = self.rows[column]
            why = table.why_any_ended(self.rows[[column]])
            ended = ended or why
            code = failed.code if why is None else why.code
            failures.append(FrameFailure(self.handle.name_of(row), failed.seq, code, failed.expected_seq))
        if ended is not None:
            ended.failures, ended.outputs = tuple(failures), outputs
            self.fail(ended)
        else:
            sentence = self.failures[min(self.failures)].sentence
            self.fail(FramesRefused(failures[0].code, sentence, tuple(failures), outputs))

    def _missing(self) -> F32:
        return np.full((*self.x.shape[:2], self._shape[-1]), np.nan, np.float32)


class StepBlock:
    """The frames of one STEP: a piece of one call, or single frames of several calls side by side."""

    def __init__(
        self, calls: Sequence[StepCall], rows: Indices, columns: U64, x: F32, start: int, where: Indices
    ) -> None:
        self.calls = calls
        """The only call, or a call for each column."""
        self.rows = rows
        self.columns = columns
        """(handle, seq of the first timestep, seq before which every output has come) of each column, as sent."""
        self.x = x
        """float32 [T, N, features], contiguous."""
        self.start = start
        """The timestep of the call at which the block begins."""
        self.where = where
        """The index of each column in its call."""
        self.frames = len(x) * len(rows)
        """Its number of frames, T × N."""
        self.number = 0
        """The number under which it was last sent; numbers rise."""

    @classmethod
    def of_singles(cls, table: OpenStreams, calls: Sequence[StepCall]) -> StepBlock:
        """A block of single frames of distinct streams; advances their next seqs."""
        if len(calls) == 1:
            rows, x, where = calls[0].rows, calls[0].x, _ONE_COLUMN
        else:
            rows = np.concatenate([call.rows for call in calls])
            x = np.concatenate([call.x for call in calls], axis=1)
            where = np.zeros(len(rows), np.int64)
        return cls(calls, rows, table.take_columns(rows, 1), x, 0, where)

    def owner(self, column: int) -> tuple[StepCall, int]:
        """The call that a column belongs to, and the column's index in it."""
        return self.calls[column if len(self.calls) > 1 else 0], int(self.where[column])

    def take(self, columns: Indices) -> StepBlock:
        """A block of some columns, with the number of this one."""
        calls = [self.calls[column] for column in columns.tolist()] if len(self.calls) > 1 else self.calls
        x = np.ascontiguousarray(self.x[:, columns])
        part = StepBlock(calls, self.rows[columns], self.columns[columns], x, self.start, self.where[columns])
        part.number = self.number
        return part

    def renew(self, table: OpenStreams) -> None:
        """Prepare to send it again, with present handles and acknowledgements."""
        present = table.columns[self.rows]
        self.columns[:, HANDLE] = present[:, HANDLE]
        self.columns[:, ACKED] = np.minimum(present[:, ACKED], self.columns[:, SEQ])

    def deliver(self, answer: Stepped) -> None:
        """Give each call its outputs once every column has its final answer, and count frames as answered."""
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


class SendQueue:
    """The frames of one session, from the users' calls to their answers.

    Args:
        table: the streams.
        outbox: receives the messages.
        timeout_s: the longest time for which outputs may wait to be taken while more frames wait to be sent.
        shutdown_s: the longest time for which frames refused by a server that shuts down wait for the next one.
    """

    def __init__(self, table: OpenStreams, outbox: Outbox, timeout_s: float, shutdown_s: float) -> None:
        self._table = table
        self._outbox = outbox
        self._timeout_s = timeout_s
        self._shutdown_s = shutdown_s
        self._window = self._most_frames = self._most_columns = 1
        self._outputs_width = 0
        self._credit = 0
        """The most frames that may be unanswered."""
        self._line: deque[StreamHandle] = deque()
        """The handles that take turns."""
        self._full_since: dict[StreamHandle, float] = {}
        """The handles that wait until the user takes outputs, with the time of the first output; infinity before it."""
        self.on_the_way: dict[int, StepBlock] = {}
        """Blocks that the server has not answered, by number."""
        self._unanswered_frames = 0
        self._refused: list[StepBlock] = []
        """Blocks that are to be sent again."""
        self._congested = False
        """Whether nothing may be sent until every block on its way was answered."""
        self._settles = False
        """Whether any stream is settling."""
        self._resend_at = 0.0
        self._shutting_down_since: float | None = None

    def limit(self, info: ServerInfo) -> None:
        """Set the server's limits."""
        self._outputs_width = info.outputs
        self._credit = info.credit_frames
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

    # What users ask for.

    def submit(self, call: StepCall) -> None:
        """Queue a step call, which is sent when its handle's turn comes."""
        if not call.lone:
            call.cut(self._most_frames, self._most_columns, max(1, self._window // 2))
        handle = call.handle
        if call.keep:
            handle.results.append(call)
        handle.steps.append(call)
        if handle.is_idle:
            handle.is_idle = False
            self._line.append(handle)

    def enqueue(self, request: TurnCall[Any]) -> None:
        """Queue a request, which is asked after the earlier calls of its handle."""
        request.stamp = self._table.stamp()
        request.handle.requests.append(request)
        self.go_on(request.handle)

    def withdraw(self, call: StepCall, error: InstepError) -> None:
        """Drop the unsent frames of a call, which fails with this error if there are any; the rest stays in flight."""
        if call in call.handle.steps:
            self._abort(call, error)

    def take(self, handle: StreamHandle) -> StepCall | None:
        """The next pipelined send that is done, in the order of the sends."""
        if not handle.results or not handle.results[0].done:
            return None
        call = handle.results.popleft()
        handle.unread -= call.frames
        if self._full_since.pop(handle, None) is not None:
            self.release(handle)
        return call

    # What a session does.

    def advance(self, now: float) -> None:
        """Send everything that may be sent at `now`."""
        for handle, since in list(self._full_since.items()) if self._full_since else ():
            if since == math.inf and handle.results[0].done:
                self._full_since[handle] = now
            elif now >= since + self._timeout_s:
                self._abort(handle.steps[0], _nobody_reads(handle))
        if self._settles:
            self._settle()
        if self._is_free(now):
            while self._line and self._take_turns(now):
                pass

    @property
    def is_waiting(self) -> bool:
        """Whether any sent frame has no answer yet, or has to be sent again."""
        return bool(self.on_the_way or self._refused)

    def deadline(self) -> float:
        """The time at which `advance` must be called even without a message; infinity for never."""
        resend_at = self._resend_at if self._congested and not self.on_the_way else math.inf
        return min(min(self._full_since.values()) + self._timeout_s, resend_at) if self._full_since else resend_at

    def stepped(self, answer: Stepped) -> None:
        """Process the STEPPED for a block.

        Raises:
            MalformedMessage: when it answers no block in flight.
        """
        block = self.on_the_way.get(answer.request)
        if block is None:
            raise MalformedMessage(f"STEPPED with number {answer.request} answers nothing that was asked")
        if answer.outputs.shape != (*block.x.shape[:2], self._outputs_width):
            raise MalformedMessage("a block of another size was sent than the one that was answered")
        self._leave(block)
        self._take(block, answer)

    def refused(self, number: int, refusal: ErrorReply, now: float) -> bool:
        """Process an ERROR if it is for a block, of which the server has applied nothing."""
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
            self._fail(block, refusal.code, refusal.sentence)
        return True

    def woke(self, rows: Indices) -> None:
        """Continue streams that have woken, once the frames that were sent before are answered.

        Those have to be sent again, and before any new frame.
        """
        self._table.sleep(rows)
        self._table.settling[rows] = True
        self._settle()

    def _settle(self) -> None:
        table = self._table
        rows = np.flatnonzero(table.settling)
        is_settled = ~np.isin(rows, np.concatenate([NOBODY, *(block.rows for block in self.on_the_way.values())]))
        self._settles = not is_settled.all()
        table.sleep(rows[is_settled], False)
        for handle in table.handles_of(rows):
            self.go_on(handle)

    def sleep_on(self, rows: Indices, code: Code, sentence: str) -> None:
        """Fail the calls of streams that could not be woken."""
        for block in sorted(self._refused, key=lambda block: block.number):
            is_asleep = np.isin(block.rows, rows)
            if is_asleep.any():
                self._refused.remove(block)
                if not is_asleep.all():
                    self._refused.append(block.take(np.flatnonzero(~is_asleep)))
                self._fail(block.take(np.flatnonzero(is_asleep)), code, sentence)
        self.woke(rows)

    def lost(self) -> None:
        """Keep all blocks after the loss of a connection, to send them over the next one."""
        self._refused = self._blocks()
        self.on_the_way.clear()
        self._shutting_down_since = None
        self._congested = True
        self._unanswered_frames = 0

    def end(self, reasons: EndedRows) -> None:
        """Fail the calls of streams that have ended, except steps of groups, which continue for the other streams."""
        handles: dict[StreamHandle, None] = {}
        for (code, sentence), ended in reasons.items():
            rows = np.array(ended, np.int64)
            self._table.end(rows, code, sentence)
            handles.update(dict.fromkeys(self._table.handles_of(rows)))
        for handle in handles:
            handle.has_ended = True
            self._end_unsent(handle)
            self._outbox.woken.append(handle)
        for block in self._blocks():
            for step in block.calls:
                if step.handle in handles and step.handle.single:
                    self._end(step, self._table.why_ended(int(step.rows[0])))

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """End the session: everything that waits or is in flight fails."""
        for block in self._blocks():
            for step in block.calls:
                self._end(step, error(sentence))
        for handle in self._table.live_handles():
            for call in list(handle.steps):
                self._abort(call, error(sentence))
            for request in handle.requests:
                request.fail(error(sentence))
                self._outbox.woken.append(request)
            handle.requests.clear()
            self._outbox.woken.append(handle)
        self._line.clear()
        self._full_since.clear()

    def go_on(self, handle: StreamHandle) -> None:
        """Put a handle in line if it has something to send and nothing blocks it."""
        if handle.is_idle and (handle.steps or handle.requests):
            handle.is_idle = False
            self._line.append(handle)

    def release(self, handle: StreamHandle) -> None:
        """Let a handle continue that had to wait."""
        handle.is_idle = True
        self.go_on(handle)

    # Sending.

    def _take_turns(self, now: float) -> bool:
        """Send one round: the next block of every waiting handle; single frames share a block."""
        table = self._table
        room = self._credit - self._unanswered_frames
        singles: list[StepCall] = []
        moved = False
        for _ in range(len(self._line)):
            handle = self._line.popleft()
            if handle.requests and (not handle.steps or handle.requests[0].stamp < handle.steps[0].stamp):
                handle.is_idle = handle.unanswered > 0  # until everything sent was answered, then until the request was
                if not handle.is_idle:
                    handle.requests.popleft().ask()
                continue
            if not handle.steps:
                handle.is_idle = True  # the user has taken back what was to be sent
                continue
            call = handle.steps[0]
            if handle.has_sleepers and table.asleep[call.rows].any():
                handle.is_idle = True  # until they are awake
                continue
            begins = call.keep and not call.started
            if begins and handle.unread and handle.unread + call.frames > self._credit:
                self._full_since[handle] = now if handle.results[0].done else math.inf
                continue
            rows, timesteps = (call.rows, 1) if call.lone else call.next_rows()
            if timesteps * len(rows) > room:
                self._line.appendleft(handle)
                break
            if handle.unanswered and not table.in_window(rows, timesteps, self._window):
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
                    self._post(StepBlock.of_singles(table, singles))
                    singles = []
            else:
                block = self._next_block(call)
                if block is not None:
                    handle.unanswered += block.frames
                    room -= block.frames
                    self._post(block)
            if call.sent:
                handle.steps.popleft()
                if call.keep:
                    self._outbox.woken.append(call)
                if call.left == 0:
                    self._conclude((call,))
            if handle.steps or handle.requests:
                self._line.append(handle)
            else:
                handle.is_idle = True
        if singles:
            self._post(StepBlock.of_singles(table, singles))
        return moved

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
                self._refuse_behind(call, int(where[index]), int(rows[index]), expected)
                call.left -= len(x)
            if not np.any(fresh):
                return None
            where, rows, x = where[fresh], rows[fresh], np.ascontiguousarray(x[:, fresh])
        return StepBlock((call,), rows, table.take_columns(rows, len(x)), x, timesteps.start, where)

    def _post(self, block: StepBlock) -> None:
        block.number = self._outbox.next_number()
        timesteps, _, features = block.x.shape
        header = pack_step(block.number, timesteps, features, block.columns.tobytes())
        self._outbox.messages.append([header, block.x.data.cast("B")])
        self.on_the_way[block.number] = block
        self._unanswered_frames += block.frames

    def _is_free(self, now: float) -> bool:
        """Whether new blocks may be sent; sends blocks again whose time has come."""
        if self._congested:
            if self.on_the_way or now < self._resend_at:
                return False
            self._table.held[:] = False
            self._congested = False
            self._resend_at = 0.0
        return not self._refused or self._resend()

    def _resend(self) -> bool:
        """Send again the blocks that wait for no stream to wake, as far as credit allows. True if all were sent."""
        blocks = sorted(self._refused, key=lambda block: block.number)
        self._refused = []
        given_up: list[StepCall] = []
        for index, block in enumerate(blocks):
            asleep = self._table.asleep[block.rows]
            if asleep.any():
                if asleep.all():
                    self._refused.append(block)
                    continue
                self._refused.append(block.take(np.flatnonzero(asleep)))
                block = block.take(np.flatnonzero(~asleep))
            made_at = [call.stamp for call in block.calls]  # one number for all columns, or one for each
            lost = (self._table.rewound_at[block.rows] > made_at) | (self._table.ended[block.rows] != 0)
            if np.any(lost):
                given_up += self._give_up(block.take(np.flatnonzero(lost)))
                block = block.take(np.flatnonzero(~lost))
            if block.frames > self._credit - self._unanswered_frames:
                for rest in (block, *blocks[index + 1 :]):
                    rest.number = self._outbox.next_number()  # it comes after what was sent now
                    self._refused.append(rest)
                break
            if len(block.rows):
                block.renew(self._table)
                self._post(block)
        else:
            index = len(blocks)
        self._conclude(given_up)
        return index == len(blocks)

    def _give_up(self, block: StepBlock) -> Sequence[StepCall]:
        """Fail refused frames that may not be sent again, because their stream was rewound or has ended."""
        for column, row in enumerate(block.rows.tolist()):
            call, index = block.owner(column)
            self._refuse_behind(call, index, row, int(block.columns[column, SEQ]))
        block.settle()
        return block.calls

    def _refuse_behind(self, call: StepCall, column: int, row: int, seq: int) -> None:
        code = Code(int(self._table.ended[row]) or Code.SEQ_GAP)
        sentence = self._table.sentences.get(code, BEHIND)
        call.refuse(column, FailedFrames(seq, code, sentence, int(self._table.seqs[row])))

    # Answers.

    def _blocks(self) -> list[StepBlock]:
        return [*self.on_the_way.values(), *self._refused]

    def _passes(self, code: Code, now: float) -> bool:
        """Whether a block that was refused with this code may be accepted later."""
        if code is not Code.SHUTTING_DOWN:
            return code is Code.BUSY
        if self._shutting_down_since is None:
            self._shutting_down_since = now
        return now < self._shutting_down_since + self._shutdown_s

    def _leave(self, block: StepBlock) -> None:
        del self.on_the_way[block.number]
        self._unanswered_frames -= block.frames

    def _fail(self, block: StepBlock, code: Code, sentence: str) -> None:
        failures = [
            ColumnError(column, 0, code, sentence, int(seq)) for column, seq in enumerate(block.columns[:, SEQ])
        ]
        outputs = np.full((*block.x.shape[:2], self._outputs_width), np.nan, np.float32)
        self._take(block, Stepped(block.number, outputs, failures, (0, 0, 0)))

    def _take(self, block: StepBlock, answer: Stepped) -> None:
        self._shutting_down_since = None
        self._acknowledge(block, answer.failures)
        calls, ended = block.calls, EndedRows()
        if answer.failures:
            held = self._sort_failures(block, answer.failures, ended)
            if held:
                rest = np.setdiff1d(np.arange(len(block.rows)), held)
                self._refused.append(block.take(np.array(held, np.int64)))
                block = block.take(rest)
                answer = answer._replace(outputs=answer.outputs[:, rest])
        block.deliver(answer)
        if ended:
            self.end(ended)
        self._conclude(calls)

    def _acknowledge(self, block: StepBlock, failures: list[ColumnError]) -> None:
        if len(block.rows) == 1 and not failures and self._table.came_next(block.rows, block.columns, len(block.x)):
            return
        first = block.columns[:, SEQ]
        end = first + np.uint64(len(block.x))
        for failure in failures:
            end[failure.column] = first[failure.column] + np.uint64(failure.timestep)
        self._table.came(block.rows, first, end)

    def _sort_failures(self, block: StepBlock, failures: list[ColumnError], ended: EndedRows) -> list[int]:
        """Pass failures to the calls, rewind the streams, and return the columns that have to be sent again.

        These are columns that wait for a BUSY one, and those of streams that hibernated.
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
            if code is Code.UNKNOWN_STREAM and table.asleep[row]:
                held.append(column)
                continue
            seq = int(block.columns[column, SEQ]) + timestep
            call.refuse(index, FailedFrames(seq, code, sentence, expected))
            if code in ENDING:
                ended.setdefault((code, sentence), []).append(row)
            elif code is Code.CONFLICT:
                self._rewind(row, call, seq)  # not forward: outputs of other frames are not this client's
            else:
                self._rewind(row, call, expected, outputs_are_gone=code is Code.SEQ_REPEATED)
        return held

    def _rewind(self, row: int, call: StepCall, expected: int, outputs_are_gone: bool = False) -> None:
        """Continue a stream from the seq that the server expects.

        Answers to frames from before the last rewind are ignored. (Should a step on the server fail after a later frame
        of the stream was refused, the stream's next frame is refused once more, and that sets it right.)
        """
        table = self._table
        if call.stamp > table.rewound_at[row]:
            table.rewound_at[row] = call.handle.rewound_at = table.stamp()
            table.rewind(row, expected, outputs_are_gone)

    def _conclude(self, calls: Iterable[StepCall]) -> None:
        """End the calls whose frames are all answered, and continue their stream handles."""
        for call in calls:
            if call.left == 0 and not call.done:
                call.conclude(self._table)
                self._tell(call)
            self.go_on(call.handle)

    def _end_unsent(self, handle: StreamHandle) -> None:
        """Fail the waiting calls of a handle after some of its streams have ended, except steps of a group.

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
                self.go_on(handle)
                request.fail(error)
            if request.done:
                self._outbox.woken.append(request)

    def _abort(self, call: StepCall, error: InstepError) -> None:
        handle = call.handle
        handle.steps.remove(call)
        if self._full_since.pop(handle, None) is not None:
            self.release(handle)
        self.go_on(handle)
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
        self._outbox.woken.append(call)
        if call.keep:
            self._outbox.woken.append(call.handle)


def _nobody_reads(handle: StreamHandle) -> InstepError:
    return InstepError(
        f"nobody reads the outputs of stream {handle.names[0]!r}: {handle.unread} frames wait to be taken; "
        "iterate over the stream while sending, in another task or thread"
    )
