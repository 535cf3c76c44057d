"""Whatever a server does with BUSY and failures, in whatever order it answers: frames are applied in order, once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest

from instep_client.connection import State
from instep_client.frames import StepCall
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import FramesRefused, InstepError
from instep_client.protocol.wire import COLUMN, Kind
from instep_client.session import Session
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, INFO, FakeRules, Message, error, stepped
from tests.support.step_messages import parts

pytestmark = pytest.mark.heavy

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


class Run:
    """A session, a staged server, and dice that decide what happens next."""

    def __init__(
        self, seed: int, credit_frames: int, busy: float, fails: float, bad: float, cancels: float, window: int = 32
    ) -> None:
        self.dice = Random(seed)
        self.server = StagedServer(self.dice, credit_frames, busy, fails, window)
        self.session = Session("tcp://somewhere:1", reconnect_s=0.0)
        self.bad = bad
        self.cancels = cancels
        self.now = 0.0
        self.to_server: deque[Message] = deque()
        self.to_client: deque[Message] = deque()
        self.numbers = 0
        self.calls: list[StepCall] = []
        self.cancelled: set[int] = set()
        self.drain()
        opened = [self.session.open([name], None, single=True) for name in ("a", "b", "c")]
        opened.append(self.session.open(["d", "e", "f"], None, single=False))
        self.drain()
        self.handles = [call.result() for call in opened]

    def frames(self, timesteps: int, columns: int) -> F32:
        """New frames, some of them bad."""
        x = np.zeros((timesteps, columns, 2), np.float32)
        for frame in x.reshape(-1, 2):
            self.numbers += 1
            frame[0] = self.numbers
            frame[1] = np.nan if self.dice.random() < self.bad else 0
        return x

    def submit(self) -> None:
        """The user steps a stream handle."""
        handle = self.dice.choice(self.handles)
        timesteps = self.dice.choice([1, 1, 1, 2, 5])
        if handle.single:
            x = self.frames(timesteps, 1)[:, 0]
            self.calls.append(self.session.step(handle, x if timesteps > 1 else x[0]))
        else:
            rows = self.dice.sample(range(3), self.dice.randint(1, 3))
            self.calls.append(self.session.step(handle, self.frames(timesteps, len(rows)), rows))

    def act(self) -> None:
        """One thing happens somewhere."""
        match self.dice.randrange(6):
            case 0:
                self.submit()
                if self.dice.random() < self.cancels:
                    call = self.dice.choice(self.calls)
                    self.cancelled.add(id(call))
                    self.session.cancel(call)
            case 1:
                self.advance()
            case 2 if self.to_server:
                self.server.receive(self.to_server.popleft())
            case 3:
                self.server.work()
            case 4 if self.to_client:
                self.session.receive(self.to_client.popleft(), self.now)
            case _:
                self.now += self.dice.choice([0.0, 0.001, 0.01])
        self.to_client.extend(self.server.answers)
        self.server.answers.clear()

    def advance(self) -> None:
        """The session acts."""
        self.session.advance(self.now)
        self.to_server.extend([bytes(frame) for frame in message] for message in self.session.outbox.take_messages())

    def drain(self) -> None:
        """Until everything is answered."""
        for _ in range(10_000):
            self.advance()
            while self.to_server:
                self.server.receive(self.to_server.popleft())
            while self.server.work():
                pass
            self.to_client.extend(self.server.answers)
            self.server.answers.clear()
            if not self.to_client and self.session.deadline() is None:
                return
            while self.to_client:
                self.session.receive(self.to_client.popleft(), self.now)
            self.now += 0.001
        raise AssertionError("the session never comes to rest")

    def told(self, handle: StreamHandle, row: int) -> tuple[list[int], list[float]]:
        """What the calls say was applied of one stream: numbers and outputs, in the order of the calls."""
        number = int(self.session.table.columns[row, 0])
        applied = self.server.streams[number].applied if number in self.server.streams else []
        numbers: list[int] = []
        outputs: list[float] = []
        for call in self.calls:
            if call.handle is not handle or row not in call.rows:
                continue
            column = int(np.flatnonzero(call.rows == row)[0])
            sent = call.x[:, column, 0].astype(int).tolist()
            if id(call) in self.cancelled and (call.error is not None or not call.done):
                sent = [number for number in sent if number in applied]
                numbers += sent
                outputs += [np.nan] * len(sent)
                continue
            assert call.done
            y = outputs_of(call).reshape(call.x.shape[0], -1)[:, column]
            good = int(np.isfinite(y).sum())
            assert np.isfinite(y[:good]).all(), "outputs after a refused frame"
            numbers += sent[:good]
            outputs += y[:good].tolist()
        return numbers, outputs

    def check(self) -> None:
        """Calls and server tell the same story."""
        assert self.session.state is State.OPEN
        for handle in self.handles:
            for row in handle.rows.tolist():
                number = int(self.session.table.columns[row, 0])
                stream = self.server.streams.get(number)
                numbers, outputs = self.told(handle, row)
                assert numbers == (stream.applied if stream else [])
                if self.server.fails == 0:
                    assert int(self.session.table.columns[row, 1]) == (stream.admitted if stream else 0)
                for mine, theirs in zip(outputs, stream.outputs if stream else [], strict=True):
                    assert np.isnan(mine) or mine == theirs

    def check_streams_are_usable(self) -> None:
        """Of two more frames one at most is refused, because a failed step came to light late; then all is well."""
        self.bad = self.server.fails = self.server.busy = 0.0
        for _ in range(2):
            frames = [self.frames(1, len(handle.rows)) for handle in self.handles]
            probes = [
                self.session.step(handle, x[:, 0] if handle.single else x)
                for handle, x in zip(self.handles, frames, strict=True)
            ]
            self.drain()
        assert all(probe.error is None for probe in probes)


def outputs_of(call: StepCall) -> F32:
    """Outputs, of a refused call too."""
    return call.error.outputs if isinstance(call.error, FramesRefused) else call.result().outputs


SEEDS = [range(100), pytest.param(range(100, 3000), marks=pytest.mark.long)]


def run_with_busy_alone(seed: int, credit_frames: int, busy: float, window: int) -> None:
    run = Run(seed, credit_frames, busy, fails=0.0, bad=0.0, cancels=0.0, window=window)
    for _ in range(150):
        run.act()
    run.drain()
    run.check()
    sent = sum(call.frames for call in run.calls)
    assert sum(len(stream.applied) for stream in run.server.streams.values()) == sent


@pytest.mark.parametrize("seeds", SEEDS)
def test_with_busy_alone_every_frame_is_applied_in_order_once(seeds: range) -> None:
    for seed in seeds:
        dice = Random(seed)
        run_with_busy_alone(seed, dice.choice([1, 3, 8, 40]), dice.choice([0.0, 0.2, 0.6]), dice.choice([1, 2, 5, 32]))


@pytest.mark.parametrize("seeds", SEEDS)
def test_failures_and_cancelled_calls_never_reorder_or_repeat_a_frame(seeds: range) -> None:
    kinds = set[type]()
    for seed in seeds:
        dice = Random(seed)
        credit, busy, fails = dice.choice([1, 3, 8, 40]), dice.choice([0.0, 0.3]), dice.choice([0.0, 0.1])
        bad, cancels, window = dice.choice([0.0, 0.1, 0.4]), dice.choice([0.0, 0.3]), dice.choice([1, 2, 5, 32])
        run = Run(seed, credit, busy, fails, bad, cancels, window)
        for _ in range(150):
            run.act()
        run.drain()
        run.check()
        kinds |= {type(call.error) for call in run.calls}
        run.check_streams_are_usable()
    assert kinds == {type(None), FramesRefused, InstepError}
