"""A random story of streams, told to the kernels and to the model in plain Python, which must agree on all of it.

`python -m tests.support.core_story SEED` prints a digest of the tables after a story, for comparing kernels that are
compiled with the same kernels run as ordinary Python.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections import deque
from dataclasses import dataclass, field
from random import Random

import numpy as np

from instep_client.protocol.codes import Code
from tests.support.core_streams import FEATURES, Answer, Answered, Batch, CoreStreams, Sent, check_invariants, ints


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


ORIGINS = 3
STREAMS = 5


@dataclass(frozen=True)
class Run:
    """A run under way, and the slots and steps that the model expects of it."""

    batch: Batch
    slots: list[int]
    steps: int


class Story:
    """Each event happens to both sides, and what they say is compared at once.

    Args:
        random: chooses the limits and everything that happens.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        window, max_pending = random.randint(1, 5), random.choice([6, 30, 100])
        credit = random.choice([6, 20, 100])
        generation = random.choice([7, 2**32 - 3])
        limits = {"max_reply_frames": random.choice([1, 4, 100]), "max_reply_messages": random.choice([1, 2, 100])}
        self.core = CoreStreams(window, STREAMS, ORIGINS, max_pending, credit, generation, **limits)
        self.model = CoreModel(window, max_pending, credit)
        self._runs: list[Run] = []
        self._old_handles: list[int] = [0, 1, 99, 2**64 - 1]
        self._opened = self._tags = 0
        self._events = [self._send] * 6 + [self._begin, self._end, self._answer] * 4
        self._events += [self._open, self._hand_over, self._hold, self._release, self._close]

    def tell(self, events: int) -> None:
        """That many events, and then everything that is pending until it is answered."""
        for _ in range(STREAMS):
            self._open()
        for _ in range(events):
            self._random.choice(self._events)()
            check_invariants(self.core)
            self._compare()
        for slot, count in self.model.holds.items():
            for _ in range(count):
                self._let_go(slot)
        while self._runs or self.model.round:
            self._begin()
            self._end()
        self._answer()
        self._compare()
        check_invariants(self.core)
        assert not self.model.messages
        assert self.core.pending == self.core.ready == 0

    def digest(self) -> str:
        """Of everything in the tables."""
        digest = hashlib.sha256()
        for array in self.core.tables:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _compare(self) -> None:
        assert self.core.pending == self.model.pending
        for slot, stream in self.model.streams.items():
            record = self.core.tables.streams[slot]
            told = record["next_seq"], record["step_seq"], record["acked"], record["unanswered"], record["handle"]
            assert told == (
                stream.next_seq, stream.step_seq, stream.acked, stream.unanswered, stream.handles[-1],
            )  # fmt: skip

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        if len(self.model.streams) == STREAMS:
            return
        owner, first = self._random.randrange(ORIGINS), self._random.choice([0, 3, 2**62 - 1])
        self._opened += 1
        (handle,) = self.core.open(str(self._opened), owner=owner, first_seqs=[first])
        slot = handle & 0xFFFF_FFFF
        assert slot not in self.model.streams
        self.model.streams[slot] = Stream(owner, [handle], first, first, first)

    def _slot(self) -> int | None:
        return self._random.choice(sorted(self.model.streams)) if self.model.streams else None

    def _hand_over(self) -> None:
        slot = self._slot()
        if slot is not None:
            owner = self._random.randint(0, ORIGINS)  # the last one has the parked streams
            self.core.table.hand_over(ints(slot), owner, now_ns=0)
            stream = self.model.streams[slot]
            stream.owner = owner
            stream.handles += self.core.handles(ints(slot))

    def _hold(self) -> None:
        slot = self._slot()
        if slot is not None:
            self.core.hold(slot)
            self.model.hold(slot)

    def _release(self) -> None:
        held = [slot for slot, count in self.model.holds.items() if count]
        if held:
            self._let_go(self._random.choice(held))

    def _let_go(self, slot: int) -> None:
        self.core.release(slot)
        self.model.release(slot)

    def _close(self) -> None:
        slot = self._slot()
        if slot is None or slot in self.model.running or self.model.holds.get(slot):
            return
        stream = self.model.streams[slot]
        if self._random.random() < 0.5:
            self.core.fail(ints(slot), Code.STATE_LOST)
            self.model.fail([slot], Code.STATE_LOST)
        self.core.table.closing[slot] = stream.is_closing = True
        if stream.next_seq == stream.step_seq:
            self._answer()
        if not stream.unanswered:
            self.core.table.release(ints(slot))
            self._old_handles += stream.handles
            del self.model.streams[slot]

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(self) -> None:
        messages = [self._message() for _ in range(self._random.choice([1, 1, 2, 3]))]
        messages = messages[: self.core.max_pending]
        self.core.admit(*messages)
        assert self.core.refusals == self.model.admit(*messages)

    def _message(self) -> Sent:
        random = self._random
        origin = random.randrange(ORIGINS)
        if self.model.streams and random.random() < 0.8:
            origin = random.choice(list(self.model.streams.values())).owner
        own = [stream for stream in self.model.streams.values() if stream.owner == origin]
        chosen: list[Stream | None] = list(random.sample(own, random.randint(0, len(own))))
        if random.random() < 0.1 or not chosen:
            chosen.append(random.choice([None, *self.model.streams.values()]))
        timesteps = random.randint(1, 4)
        columns, x = [], np.empty((timesteps, len(chosen), FEATURES), np.float32)
        for at, stream in enumerate(chosen):
            columns.append(self._column(stream, x[:, at]))
        self._tags += 1
        return Sent(columns, x, origin, self._tags)

    def _column(
        self, stream: Stream | None, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    ) -> tuple[int, int, int]:
        random = self._random
        for frame in x:
            frame[:] = random.randint(1, 9), random.choice([1.0] * 20 + [1e-42, 1e-42, np.nan, -np.inf])
        if stream is None:
            return random.choice(self._old_handles), random.choice([0, 2**63, 2**64 - 1]), 0
        seq = max(0, stream.next_seq + random.choice([0, 0, 0, 0, -1, -2, -4, 1]))
        # Whoever acknowledges outputs before they were sent may get others instead: not tried here.
        acked = max(0, self.model.answered(stream) - random.choice([0, 0, 0, 1, 2, 5]))
        if random.random() < 0.05:
            acked = stream.step_seq + 1
        if random.random() < 0.02:
            seq, acked = random.choice([(2**63, acked), (2**64 - 1, acked), (seq, 2**63), (seq, 2**64 - 1)])
        for at in range(len(x)):  # sent again, mostly with the same bytes
            if seq + at in stream.inputs and random.random() < 0.9:
                x[at] = np.frombuffer(stream.inputs[seq + at], np.float32)
        handle = stream.handles[-1] if random.random() < 0.95 else random.choice(stream.handles)
        return handle, seq, acked

    def _begin(self) -> None:
        size, most_steps = self._random.randint(1, 4), self._random.randint(1, 3)
        batch = self.core.begin(size, most_steps)
        slots, steps = self.model.begin(size, most_steps)
        assert batch.slots.tolist() == slots
        assert len(set(slots)) == len(slots)
        assert batch.rows.shape == (steps, len(slots))
        for step, rows in enumerate(batch.rows):
            held = [self.core.tables.x[row].tobytes() for row in rows]
            streams = [self.model.streams[slot] for slot in slots]
            assert held == [stream.inputs[stream.step_seq + step] for stream in streams]
        if slots:
            self._runs.append(Run(batch, slots, steps))

    def _end(self) -> None:
        if not self._runs:
            return
        run = self._runs.pop(0)
        failed = self._random.random() < 0.15
        steps = self._random.randrange(run.steps) if failed else run.steps
        self.core.compute(run.batch, steps)
        self.core.finish(run.batch, steps, is_over=not failed)
        self.model.finish(run.slots, steps, is_over=not failed)
        if failed:
            self.core.fail(run.batch.slots)
            self.model.fail(run.slots, Code.STEP_FAILED)

    def _answer(self) -> None:
        told, expected = self.core.answer(), self.model.answer()
        assert sorted(told, key=_tag) == sorted(expected, key=_tag)


def _tag(answer: Answer) -> int:
    return answer.tag


if __name__ == "__main__":
    story = Story(Random(int(sys.argv[1])))
    story.tell(200)
    sys.stdout.write(story.digest() + "\n")
