"""A server that admits frames and works on them later, in an order that dice choose, and is full when they say so.

Its streams' rule is written down once more, frame by frame: what it applied, in which order, is the truth that a
client's bookkeeping is held against. A frame is [number, value]: numbers are unique, a value that is not finite is
refused.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import COLUMN, Kind
from tests.support.fake_server import F32, INFO, FakeRules, Message, error, stepped
from tests.support.step_messages import parts

STAGED_INFO = replace(INFO, features=2, outputs=1)


@dataclass
class StagedBlock:
    """An admitted block: its outputs so far, and how many frames still wait."""

    request: int
    y: F32
    waiting: int = 0
    failures: list[tuple[int, int, Code, int]] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """T × N."""
        return int(self.y.shape[0]) * int(self.y.shape[1])


@dataclass
class StagedStream:
    """One stream, and the numbers of the frames that it applied."""

    admitted: int = 0
    state: np.float32 = field(default_factory=np.float32)
    waiting: deque[tuple[StagedBlock, int, int, int, F32]] = field(default_factory=deque)
    applied: list[int] = field(default_factory=list)
    outputs: list[np.float32] = field(default_factory=list)


class StagedServer:
    """Takes messages, gives answers in `answers`; `work` does one frame."""

    def __init__(self, dice: Random, credit_frames: int, busy: float, fails: float, window: int = 32) -> None:
        self.info = replace(STAGED_INFO, credit_frames=credit_frames, window_frames=window)
        self.answers: list[Message] = []
        self.streams: dict[int, StagedStream] = {}
        self.outcomes: dict[int, Code | None] = {}
        """Of each frame by number, how it was last answered; None when applied or waiting."""
        self.unanswered = 0
        self._rules = FakeRules(self.info)
        self._dice = dice
        self.busy = busy
        self.fails = fails

    def receive(self, frames: list[bytes]) -> None:
        """One message."""
        header, arrays = parts(frames)
        if header[0] != Kind.STEP:
            self.answers += [answer for _, answer in self._rules.handle(b"", frames)]
            return
        _, request, steps, columns, features, _ = header
        x = np.frombuffer(arrays[1], "<f4").reshape(steps, columns, features)
        assert self.unanswered + steps * columns <= self.info.credit_frames, "the client overdrew its credit"
        for number in x[:, :, 0].ravel().astype(int).tolist():
            last = self.outcomes.get(number, Code.BUSY)
            assert last in (Code.BUSY, Code.SEQ_GAP), f"frame {number} was sent again after {last}"
        if self._dice.random() < self.busy:
            for number in x[:, :, 0].ravel().astype(int).tolist():
                self.outcomes[number] = Code.BUSY
            self.answers.append(error(request, Code.BUSY, self._dice.randint(1, 5000)))
            return
        block = StagedBlock(request, np.full((steps, columns, 1), np.nan, np.float32))
        self.unanswered += block.frames
        for column, (handle, seq, acked) in enumerate(np.frombuffer(arrays[0], COLUMN).tolist()):
            stream = self.streams.setdefault(handle, StagedStream())
            assert acked <= len(stream.applied), "the client acknowledged outputs that were not computed"
            assert seq + steps <= acked + self.info.window_frames, "the client sent beyond the window"
            self._admit(block, column, stream, seq, x[:, column])
        self._answer(block)

    def work(self) -> bool:
        """Apply, or fail, the oldest frame of one stream; False when nothing waits."""
        busy = [stream for stream in self.streams.values() if stream.waiting]
        if not busy:
            return False
        stream = self._dice.choice(busy)
        block, column, t, seq, x = stream.waiting.popleft()
        if self._dice.random() < self.fails:
            self._fail(stream, block, column, t, seq, x)
            return True
        stream.state = np.float32(0.5) * stream.state + np.float32(x.sum())
        stream.applied.append(int(x[0]))
        stream.outputs.append(stream.state)
        block.y[t, column, 0] = stream.state
        block.waiting -= 1
        self._answer(block)
        return True

    def _admit(self, block: StagedBlock, column: int, stream: StagedStream, seq: int, x: F32) -> None:
        numbers = x[:, 0].astype(int).tolist()
        if seq != stream.admitted:
            code = Code.SEQ_GAP if seq > stream.admitted else Code.SEQ_REPEATED
            block.failures.append((column, 0, code, stream.admitted))
            self.outcomes.update(dict.fromkeys(numbers, code))
            return
        for t, frame in enumerate(x):
            if not np.isfinite(frame).all():
                block.failures.append((column, t, Code.NOT_FINITE, stream.admitted))
                self.outcomes.update(dict.fromkeys(numbers[t:], Code.NOT_FINITE))
                return
            stream.waiting.append((block, column, t, stream.admitted, frame))
            stream.admitted += 1
            block.waiting += 1
            self.outcomes[numbers[t]] = None

    def _fail(self, stream: StagedStream, block: StagedBlock, column: int, t: int, seq: int, x: F32) -> None:
        """The step failed: this frame and all that wait behind it are not applied."""
        stream.admitted = seq
        lost = [(block, column, t, seq, x), *stream.waiting]
        stream.waiting.clear()
        told: set[tuple[int, int]] = set()
        for lost_block, lost_column, lost_t, _, frame in lost:
            code = Code.STEP_FAILED if lost_block is block and lost_column == column else Code.SEQ_GAP
            lost_block.waiting -= 1
            self.outcomes[int(frame[0])] = code
            if (lost_block.request, lost_column) not in told:
                told.add((lost_block.request, lost_column))
                lost_block.failures = [entry for entry in lost_block.failures if entry[0] != lost_column]
                lost_block.failures.append((lost_column, lost_t, code, seq))
        for lost_block in {id(entry[0]): entry[0] for entry in lost}.values():
            self._answer(lost_block)

    def _answer(self, block: StagedBlock) -> None:
        if block.waiting == 0:
            self.unanswered -= block.frames
            self.answers.append(stepped(block.request, block.y, block.failures))
