"""A random story of streams, told to the kernels and to the model in plain Python, which must agree on all of it.

`python -m tests.support.core_story SEED` prints a digest of the tables after a story, for comparing kernels that are
compiled with the same kernels run as ordinary Python.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from random import Random

import numpy as np

from instep_client.protocol.codes import Code
from tests.support.core_model import CoreModel, Stream
from tests.support.core_streams import FEATURES, Answer, Batch, CoreStreams, Sent, check_invariants, ints

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
