"""The rules of the core in plain Python: dicts, deques and loops, with a record of everything that was ever applied.

Slow on purpose, and written from docs/behavior.md and docs/protocol.md, not from the kernels.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from dataclasses import dataclass, field

from instep_client.protocol.codes import Code
from tests.support.core_streams import Answer, Answered, Sent


@dataclass
class Stream:
    """One stream; `inputs` and `outputs` are kept for ever."""

    owner: int
    handles: list[int]
    """All that were given out, the present one last."""
    next_seq: int
    step_seq: int
    acked: int
    inputs: dict[int, bytes] = field(default_factory=dict)
    messages: dict[int, Message] = field(default_factory=dict)
    """The message with which the frame of a seq came last."""
    outputs: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    unanswered: int = 0
    is_closing: bool = False


@dataclass
class Column:
    """One column of a pending message."""

    stream: Stream | None
    seq: int
    skipped: int
    length: int
    code: int
    expected_seq: int
    fresh: int


@dataclass(eq=False)
class Message:
    """A message that was taken and is not answered."""

    origin: int
    tag: int
    columns: list[Column]
    remaining: int
    frames: int


@dataclass
class CoreModel:
    """What `CoreStreams` must do, with the same limits."""

    window: int
    max_pending: int
    credit: int
    streams: dict[int, Stream] = field(default_factory=dict)
    """Open streams by slot."""
    holds: dict[int, int] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    queued: set[int] = field(default_factory=set)
    round: deque[tuple[int, deque[int]]] = field(default_factory=deque)
    """The origins that have ready streams, the next one first, with their queues of slots."""
    messages: list[Message] = field(default_factory=list)
    complete: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """Of messages of which nothing had to be computed."""

    @property
    def pending(self) -> int:
        """Frames admitted and not yet computed."""
        return sum(stream.next_seq - stream.step_seq for stream in self.streams.values())

    def resolve(self, handle: int, origin: int) -> tuple[Stream | None, int]:
        """The stream that a handle names, and why the origin may not use it."""
        for stream in self.streams.values():
            if handle in stream.handles and not stream.is_closing:
                if handle != stream.handles[-1]:
                    return None, Code.FENCED
                return (stream, 0) if stream.owner == origin else (None, Code.FOREIGN_STREAM)
        return None, Code.UNKNOWN_STREAM

    # ── Admission ──────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, *messages: Sent) -> list[int]:
        """Take messages together: for each 0, or why it is refused as a whole."""
        codes = [self._admit(sent) for sent in messages]
        done = [message for message in self.messages if not message.frames]
        self.answers += [self._answer(message) for message in done]
        return codes

    def _admit(self, sent: Sent) -> int:
        timesteps, width, _ = sent.x.shape
        unanswered = sum(message.frames for message in self.messages if message.origin == sent.origin)
        columns = sum(len(message.columns) for message in self.messages)
        if (
            unanswered + timesteps * width > self.credit
            or self.pending + timesteps * width > self.max_pending
            or len(self.messages) == self.max_pending
            or columns + width > self.max_pending
        ):
            return Code.BUSY
        named = [id(self.resolve(handle, sent.origin)[0]) for handle, _, _ in sent.columns]
        good = [each for each in named if each != id(None)]
        if len(set(good)) < len(good):
            return Code.REPEATED_STREAM
        message = Message(sent.origin, sent.tag, [], 0, 0)
        self.messages.append(message)
        for at, (handle, seq, acked) in enumerate(sent.columns):
            column = self._admit_column(message, handle, seq, acked, [frame.tobytes() for frame in sent.x[:, at]])
            message.columns.append(column)
            message.frames += column.fresh
        message.remaining = message.frames
        return 0

    def _admit_column(self, message: Message, handle: int, seq: int, acked: int, frames: list[bytes]) -> Column:
        stream, code = self.resolve(handle, message.origin)
        if stream is None:
            return Column(None, seq, 0, 0, code, 0, 0)
        column = Column(stream, seq, 0, 0, 0, stream.next_seq, 0)
        if acked > stream.step_seq:
            column.code = Code.ACK_AHEAD
            return column
        oldest = max(stream.acked, stream.next_seq - self.window)
        stream.acked = max(stream.acked, acked)
        if seq > stream.next_seq:
            column.code = Code.SEQ_GAP
            return column
        if seq < stream.next_seq and (stream.unanswered or seq < oldest):
            column.code = Code.SEQ_REPEATED
            return column
        for frame in frames:
            at = seq + column.length
            if at < stream.next_seq:
                if stream.inputs[at] != frame:
                    column.code = Code.CONFLICT
            elif not all(math.isfinite(value) for (value,) in struct.iter_unpack("f", frame)):
                column.code = Code.NOT_FINITE
            elif at >= acked + self.window:
                column.code = Code.WINDOW_FULL
            if column.code:
                break
            column.length += 1
        column.skipped = min(column.length, stream.next_seq - seq)
        column.fresh = column.length - column.skipped
        for at in range(column.skipped, column.length):
            stream.inputs[seq + at] = frames[at]
            stream.messages[seq + at] = message
        if column.fresh:
            stream.next_seq += column.fresh
            stream.unanswered += column.fresh
            column.expected_seq = stream.next_seq
            self._push(stream)
        return column

    # ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def answered(self, stream: Stream) -> int:
        """The outputs of all seqs below were sent."""
        columns = [column for message in self.messages for column in message.columns if column.stream is stream]
        return min([stream.step_seq, *(column.seq + column.skipped for column in columns if column.fresh)])

    def slot(self, stream: Stream) -> int:
        """Where a stream is."""
        return next(slot for slot, each in self.streams.items() if each is stream)

    def _push(self, stream: Stream) -> None:
        slot = self.slot(stream)
        may_step = slot not in self.running and not self.holds.get(slot) and slot not in self.queued
        if may_step and stream.next_seq > stream.step_seq:
            self.queued.add(slot)
            for origin, queue in self.round:
                if origin == stream.owner:
                    queue.append(slot)
                    return
            self.round.append((stream.owner, deque([slot])))

    def begin(self, max_batch_size: int, max_steps: int) -> tuple[list[int], int]:
        """The slots of the next batch, and how many steps."""
        slots: list[int] = []
        while self.round and len(slots) < max_batch_size:
            origin, queue = self.round.popleft()
            slot = queue.popleft()
            self.queued.remove(slot)
            if queue:
                self.round.append((origin, queue))
            stream = self.streams.get(slot)
            if stream is not None and not self.holds.get(slot) and stream.next_seq > stream.step_seq:
                slots.append(slot)
        self.running |= set(slots)
        waiting = [self.streams[slot].next_seq - self.streams[slot].step_seq for slot in slots]
        return slots, min([max_steps, *waiting])

    def finish(self, slots: list[int], steps: int, *, is_over: bool) -> None:
        """Steps were applied."""
        for _ in range(steps):
            for slot in slots:
                stream = self.streams[slot]
                seq = stream.step_seq
                stream.total += struct.unpack("f", stream.inputs[seq][:4])[0]
                stream.outputs[seq] = stream.total
                stream.step_seq += 1
                self._count_down(stream.messages[seq])
        if is_over:
            for slot in slots:
                self.running.remove(slot)
                self._push(self.streams[slot])

    def _count_down(self, message: Message) -> None:
        message.remaining -= 1
        if not message.remaining:
            self.complete.append(message)

    def fail(self, slots: list[int], code: int) -> None:
        """Everything that is pending of these streams fails."""
        for slot in slots:
            stream = self.streams[slot]
            self.running.discard(slot)
            for seq in range(stream.step_seq, stream.next_seq):
                message = stream.messages[seq]
                for column in message.columns:
                    if column.stream is stream and column.length > seq - column.seq:
                        column.length = seq - column.seq
                        column.code = code if seq == stream.step_seq else Code.SEQ_GAP
                        column.expected_seq = stream.step_seq
                self._count_down(message)
            stream.next_seq = stream.step_seq

    def hold(self, slot: int) -> None:
        """Let a stream begin no step."""
        self.holds[slot] = self.holds.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """Undo one hold."""
        self.holds[slot] -= 1
        self._push(self.streams[slot])

    # ── Replies ────────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(self) -> list[Answer]:
        """The replies of all complete messages."""
        answers = self.answers + [self._answer(message) for message in self.complete]
        self.answers, self.complete = [], []
        return answers

    def _answer(self, message: Message) -> Answer:
        self.messages.remove(message)
        columns = []
        for column in message.columns:
            stream, outputs = column.stream, []
            if stream is not None:
                stream.unanswered -= column.fresh
                outputs = [stream.outputs[column.seq + at] for at in range(column.length)]
            columns.append(Answered(column.code, column.length, column.expected_seq, outputs))
        return Answer(message.origin, message.tag, columns)
